// SPDX-License-Identifier: GPL-2.0
/*
 * A user of kexec handover that measures it, through the public API only.
 *
 *   kho_bench=cold                   stages of the boot, nothing else
 *   kho_bench=adjacent,ORDER,COUNT   folios, next to each other as the page
 *                                    allocator gives them
 *   kho_bench=scattered,ORDER,COUNT  every second one of twice as many
 *   kho_bench=random,ORDER,COUNT     the same, preserved in random order
 *   kho_bench=sparse,0,COUNT         the first page of every second one of the
 *                                    page allocator's largest blocks
 *   kho_bench=range,SKIP,PAGES       contiguous pages, that many after an
 *                                    aligned one
 *   kho_bench=gigantic,ORDER,COUNT   folios that the page allocator has not in one
 *                                    piece, in a row
 *   kho_bench=vmalloc,ORDER,PAGES    an area, of huge pages unless ORDER is 0
 *
 * ORDER is a number, or "mixed".  With kho_bench_peer as well, the scheme that
 * the radix tree replaced is measured on the same folios.
 *
 * The kernel that finds nothing handed over preserves, the next one restores
 * and compares.  Results are lines in the log: "kho_bench: WHAT TICKS COUNT".
 * Ticks are those of get_cycles().
 */
#define pr_fmt(fmt) "kho_bench: " fmt

#include <linux/bitmap.h>
#include <linux/gfp.h>
#include <linux/init.h>
#include <linux/io.h>
#include <linux/kexec_handover.h>
#include <linux/kho/abi/kexec_handover.h>
#include <linux/kho_bench.h>
#include <linux/memblock.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/string.h>
#include <linux/vmalloc.h>
#include <linux/xarray.h>

#ifdef CONFIG_ARM64
#include <asm/arch_timer.h>
#endif

#define BENCH_NAME	"kho-bench"
#define BENCH_MAGIC	0x6b686f2d62656e63ULL	/* "kho-benc" */
#define BENCH_MIXED	UINT_MAX
#define BENCH_ROUNDS	3

enum bench_kind { COLD, ADJACENT, SCATTERED, RANDOM, SPARSE, RANGE, GIGANTIC, VMALLOC };

static const char * const kind_names[] = {
	[COLD] = "cold",
	[ADJACENT] = "adjacent",
	[SCATTERED] = "scattered",
	[RANDOM] = "random",
	[SPARSE] = "sparse",
	[RANGE] = "range",
	[GIGANTIC] = "gigantic",
	[VMALLOC] = "vmalloc",
};

static const char * const stage_names[KHO_BENCH_STAGES] = {
	[KHO_BENCH_MM_CORE_INIT_EARLY] = "mm_core_init_early",
	[KHO_BENCH_MEMORY_INIT_EARLY] = "kho_memory_init_early",
	[KHO_BENCH_MM_CORE_INIT] = "mm_core_init",
	[KHO_BENCH_MEMORY_INIT] = "kho_memory_init",
	[KHO_BENCH_FREE_ALL] = "memblock_free_all",
	[KHO_BENCH_MEMORY_INIT_FREE] = "kho_memory_init_free",
	[KHO_BENCH_SMP_INIT] = "smp_init",
	[KHO_BENCH_PAGE_ALLOC_INIT_LATE] = "page_alloc_init_late",
	[KHO_BENCH_MEMORY_INIT_LATE] = "kho_memory_init_late",
};

u64 kho_bench_stages[KHO_BENCH_STAGES][2] __initdata;

/* What the next kernel finds: which page frames to restore, one bit each. */
struct bench_handover {
	u64 magic;
	u32 kind;
	u32 order;
	u64 count;
	u64 phys;
	struct kho_vmalloc area;
	u64 nr_bits;
	unsigned long heads[];
};

static char param[64] __initdata;
static bool with_peer __initdata;

static enum bench_kind kind __initdata;
static unsigned int order __initdata;
static unsigned long count __initdata;

static struct folio **folios __initdata;
static struct page *range __initdata;
static void *area __initdata;
static struct kho_vmalloc preserved_area __initdata;

static int __init set_param(char *value)
{
	strscpy(param, value ?: "");
	return 0;
}
early_param("kho_bench", set_param);

static int __init set_peer(char *value)
{
	with_peer = true;
	return 0;
}
early_param("kho_bench_peer", set_peer);

static int __init parse_param(void)
{
	char *next = param, *word = strsep(&next, ",");
	int found = match_string(kind_names, ARRAY_SIZE(kind_names), word);

	if (found < 0)
		return found;
	kind = found;
	if (kind == COLD)
		return 0;

	word = strsep(&next, ",");
	if (!word || !next)
		return -EINVAL;
	if (!strcmp(word, "mixed"))
		order = BENCH_MIXED;
	else if (kstrtouint(word, 10, &order) || order > MAX_FOLIO_ORDER)
		return -EINVAL;
	return kstrtoul(next, 10, &count);
}

#define report(what, ticks, number)	\
	pr_info("%s %llu %lu\n", what, (u64)(ticks), (unsigned long)(number))

/* Evaluates to the ticks that a statement takes. */
#define ticks_of(statement)		\
({					\
	u64 __start = get_cycles();	\
					\
	statement;			\
	get_cycles() - __start;		\
})

/* Mostly small folios, some larger, few huge ones. */
static unsigned int __init order_of(unsigned long index)
{
	if (order != BENCH_MIXED)
		return order;
	if (index % 128 == 127)
		return 9;
	return index % 4 == 3 ? 2 : 0;
}

/* The first words of a block or page say what it is. */
static void __init mark(void *start, unsigned long tag)
{
	u64 *words = start;

	words[0] = BENCH_MAGIC ^ tag;
	words[1] = ~tag;
}

static bool __init marked(void *start, unsigned long tag)
{
	u64 *words = start;

	return words[0] == (BENCH_MAGIC ^ tag) && words[1] == (u64)~tag;
}

static int __init by_address(const void *a, const void *b)
{
	const struct folio *x = *(struct folio **)a, *y = *(struct folio **)b;

	return x < y ? -1 : x > y;
}

/* Frees every second folio, in order of address. */
static void __init scatter_folios(void)
{
	for (unsigned long i = 0; i < count; i++) {
		folio_put(folios[2 * i + 1]);
		folios[i] = folios[2 * i];
	}
}

/* Keeps the first page of every second block, in order of address. */
static void __init thin_out(void)
{
	for (unsigned long i = 0; i < 2 * count; i++) {
		struct page *page = folio_page(folios[i], 0);

		if (i % 2) {
			__free_pages(page, MAX_PAGE_ORDER);
			continue;
		}
		split_page(page, MAX_PAGE_ORDER);
		for (unsigned long j = 1; j < MAX_ORDER_NR_PAGES; j++)
			__free_page(page + j);
		folios[i / 2] = page_folio(page);
	}
}

/* The same order each time. */
static void __init shuffle_folios(void)
{
	u64 random = BENCH_MAGIC;

	for (unsigned long i = count; i > 1; i--) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		swap(folios[i - 1], folios[random % i]);
	}
}

static struct folio *__init alloc_one(unsigned long index)
{
	if (kind != SPARSE)
		return folio_alloc(GFP_KERNEL | __GFP_NOWARN, order_of(index));
	/* Not a folio until it has been split. */
	return (struct folio *)alloc_pages(GFP_KERNEL | __GFP_NOWARN, MAX_PAGE_ORDER);
}

static int __init alloc_folios(void)
{
	bool pairs = kind == SCATTERED || kind == RANDOM || kind == SPARSE;
	unsigned long number = pairs ? 2 * count : count;
	unsigned long runs = 0, end = 0;

	folios = vmalloc_array(number, sizeof(*folios));
	if (!folios)
		return -ENOMEM;
	for (unsigned long i = 0; i < number; i++) {
		/* A pair has one order. */
		folios[i] = alloc_one(pairs ? i / 2 : i);
		if (!folios[i])
			return -ENOMEM;
		cond_resched();
	}
	sort(folios, number, sizeof(*folios), by_address, NULL);
	if (kind == SCATTERED || kind == RANDOM)
		scatter_folios();
	if (kind == SPARSE)
		thin_out();

	for (unsigned long i = 0; i < count; i++) {
		unsigned long pfn = folio_pfn(folios[i]);

		mark(folio_address(folios[i]), pfn << 8 | folio_order(folios[i]));
		runs += pfn != end;
		end = pfn + folio_nr_pages(folios[i]);
	}
	report("runs", 0, runs);
	if (kind == RANDOM)
		shuffle_folios();
	return 0;
}

static int __init alloc_range(void)
{
	/* Only what is a power of two is aligned to its size. */
	range = alloc_contig_pages(roundup_pow_of_two(order + count), GFP_KERNEL,
				   first_memory_node, NULL);
	if (!range)
		return -ENOMEM;
	range += order;
	for (unsigned long i = 0; i < count; i++)
		mark(page_address(range + i), i);
	return 0;
}

/* Until they are restored, they are pages. */
static int __init alloc_gigantic(void)
{
	range = alloc_contig_pages(count << order, GFP_KERNEL, first_memory_node, NULL);
	if (!range)
		return -ENOMEM;
	for (unsigned long i = 0; i < count; i++)
		mark(page_address(range + (i << order)), i);
	return 0;
}

static int __init alloc_area(void)
{
	size_t size = count << PAGE_SHIFT;

	area = order ? vmalloc_huge(size, GFP_KERNEL) : vmalloc(size);
	if (!area)
		return -ENOMEM;
	for (unsigned long i = 0; i < count; i++)
		mark(area + (i << PAGE_SHIFT), i);
	return 0;
}

static int __init preserve_all(void)
{
	int err = 0;

	if (kind == RANGE)
		return kho_preserve_pages(range, count);
	if (kind == GIGANTIC)
		return kho_preserve_pages(range, count << order);
	if (kind == VMALLOC)
		return kho_preserve_vmalloc(area, &preserved_area);
	for (unsigned long i = 0; i < count && !err; i++)
		err = kho_preserve_folio(folios[i]);
	return err;
}

static void __init unpreserve_all(void)
{
	if (kind == RANGE) {
		kho_unpreserve_pages(range, count);
	} else if (kind == GIGANTIC) {
		kho_unpreserve_pages(range, count << order);
	} else if (kind == VMALLOC) {
		kho_unpreserve_vmalloc(&preserved_area);
	} else {
		for (unsigned long i = 0; i < count; i++)
			kho_unpreserve_folio(folios[i]);
	}
}

/*
 * The peer: what KHO had before the radix tree.  An xarray for each order has
 * bitmaps of 512 bytes; right before a kexec, a chain of pages is filled with
 * the addresses of all of them.  Not __init, which is compiled for size.
 */
#define PEER_BITS	(512 * BITS_PER_BYTE)

struct peer_bitmap {
	DECLARE_BITMAP(bits, PEER_BITS);
};

struct peer_order {
	struct xarray bitmaps;
};

struct peer_entry {
	u64 start;
	u64 bitmap;
};

struct peer_page {
	u64 next;
	u32 order;
	u32 used;
	struct peer_entry entries[(PAGE_SIZE - 16) / sizeof(struct peer_entry)];
};

static DEFINE_XARRAY(peer_orders);

/* What is at an index, which is allocated if nothing is there. */
static void *peer_get(struct xarray *xa, unsigned long index, size_t size)
{
	void *there = xa_load(xa, index), *fresh;

	if (there)
		return there;
	fresh = kzalloc(size, GFP_KERNEL);
	if (!fresh)
		return NULL;
	if (size == sizeof(struct peer_order))
		xa_init(&((struct peer_order *)fresh)->bitmaps);
	there = xa_cmpxchg(xa, index, NULL, fresh, GFP_KERNEL);
	if (!there)
		return fresh;
	kfree(fresh);
	return xa_is_err(there) ? NULL : there;
}

/* Not inlined into the loop that calls it, which a function of KHO is not either. */
static noinline int peer_preserve(struct folio *folio)
{
	unsigned long index = folio_pfn(folio) >> folio_order(folio);
	struct peer_bitmap *bitmap;
	struct peer_order *po;

	if (IS_ENABLED(CONFIG_KEXEC_HANDOVER_DEBUG) &&
	    WARN_ON(kho_scratch_overlap(PFN_PHYS(folio_pfn(folio)), folio_size(folio))))
		return -EINVAL;

	might_sleep();
	po = peer_get(&peer_orders, folio_order(folio), sizeof(*po));
	if (!po)
		return -ENOMEM;
	bitmap = peer_get(&po->bitmaps, index / PEER_BITS, sizeof(*bitmap));
	if (!bitmap)
		return -ENOMEM;
	set_bit(index % PEER_BITS, bitmap->bits);
	return 0;
}

static noinline void peer_unpreserve(struct folio *folio)
{
	unsigned long index = folio_pfn(folio) >> folio_order(folio);
	struct peer_order *po = xa_load(&peer_orders, folio_order(folio));
	struct peer_bitmap *bitmap = po ? xa_load(&po->bitmaps, index / PEER_BITS) : NULL;

	if (bitmap)
		clear_bit(index % PEER_BITS, bitmap->bits);
}

static struct peer_page *peer_add_page(struct peer_page *last, unsigned int of_order)
{
	struct peer_page *page = kzalloc(PAGE_SIZE, GFP_KERNEL);

	if (page) {
		page->order = of_order;
		if (last)
			last->next = virt_to_phys(page);
	}
	return page;
}

/* Returns the number of pages in the chain, or 0. */
static noinline unsigned long peer_serialise(struct peer_page **first)
{
	struct peer_page *page = NULL;
	unsigned long index, pages = 0;
	struct peer_order *po;

	xa_for_each(&peer_orders, index, po) {
		struct peer_bitmap *bitmap;
		struct peer_entry *entry;
		unsigned long at;
		bool full = true;

		xa_for_each(&po->bitmaps, at, bitmap) {
			if (full) {
				page = peer_add_page(page, index);
				if (!page)
					return 0;
				if (!pages++)
					*first = page;
			}
			entry = &page->entries[page->used++];
			entry->start = (u64)at * PEER_BITS << (index + PAGE_SHIFT);
			entry->bitmap = virt_to_phys(bitmap);
			full = page->used == ARRAY_SIZE(page->entries);
		}
	}
	return pages;
}

/* Frees all, and returns the number of bits that the chain led to. */
static unsigned long __init peer_free(struct peer_page *page)
{
	unsigned long index, bits = 0;
	struct peer_order *po;

	while (page) {
		struct peer_page *next = page->next ? phys_to_virt(page->next) : NULL;

		for (u32 i = 0; i < page->used; i++) {
			unsigned long *bitmap = phys_to_virt(page->entries[i].bitmap);

			bits += bitmap_weight(bitmap, PEER_BITS);
			kfree(bitmap);
		}
		kfree(page);
		page = next;
	}
	xa_for_each(&peer_orders, index, po) {
		xa_destroy(&po->bitmaps);
		kfree(po);
	}
	xa_destroy(&peer_orders);
	return bits;
}

static int __init measure_peer(void)
{
	struct peer_page *first = NULL;
	u64 ticks, unpreserve = U64_MAX, represerve = U64_MAX;
	unsigned long pages = 0;
	int err = 0;

	ticks = ticks_of({
		for (unsigned long i = 0; i < count && !err; i++)
			err = peer_preserve(folios[i]);
	});
	if (err)
		return err;
	report("peer_preserve", ticks, count);
	for (int round = 0; round < BENCH_ROUNDS; round++) {
		unpreserve = min(unpreserve, ticks_of({
			for (unsigned long i = 0; i < count; i++)
				peer_unpreserve(folios[i]);
		}));
		represerve = min(represerve, ticks_of({
			for (unsigned long i = 0; i < count && !err; i++)
				err = peer_preserve(folios[i]);
		}));
		if (err)
			return err;
	}
	report("peer_unpreserve", unpreserve, count);
	report("peer_represerve", represerve, count);
	ticks = ticks_of(pages = peer_serialise(&first));
	if (!pages)
		return -ENOMEM;
	report("peer_serialise", ticks, pages);
	if (peer_free(first) != count)
		return -EIO;
	return err;
}

static void __init report_stages(u64 end)
{
	for (int i = 0; i < KHO_BENCH_STAGES; i++) {
		u64 *stage = kho_bench_stages[i];

		report(stage_names[i], stage[1] - stage[0], !!stage[1]);
	}
	report("before_smp", kho_bench_stages[KHO_BENCH_SMP_INIT][0] -
	       kho_bench_stages[KHO_BENCH_MM_CORE_INIT_EARLY][0], 1);
	report("boot", end - kho_bench_stages[KHO_BENCH_MM_CORE_INIT_EARLY][0], 1);
#ifdef CONFIG_ARM64
	report("hz", arch_timer_get_cntfrq(), 1);
#endif
}

static int __init hand_over(void)
{
	unsigned long nr_bits = PHYS_PFN(memblock_end_of_DRAM());
	struct bench_handover *ho;

	ho = kho_alloc_preserve(struct_size(ho, heads, BITS_TO_LONGS(nr_bits)));
	if (IS_ERR(ho))
		return PTR_ERR(ho);
	ho->magic = BENCH_MAGIC;
	ho->kind = kind;
	ho->order = order;
	ho->count = count;
	ho->area = preserved_area;
	ho->nr_bits = nr_bits;
	if (range)
		ho->phys = page_to_phys(range);
	for (unsigned long i = 0; folios && i < count; i++)
		__set_bit(folio_pfn(folios[i]), ho->heads);
	return kho_add_subtree(BENCH_NAME, ho, sizeof(*ho));
}

static int __init measure_preserve(void)
{
	u64 ticks, unpreserve = U64_MAX, represerve = U64_MAX;
	int err;

	err = kind == RANGE ? alloc_range() : kind == GIGANTIC ? alloc_gigantic() :
	      kind == VMALLOC ? alloc_area() : alloc_folios();
	if (err)
		return err;
	if (with_peer && folios)
		err = measure_peer();
	if (err)
		return err;

	ticks = ticks_of(err = preserve_all());
	if (err)
		return err;
	report("preserve", ticks, count);
	/*
	 * From now on, all nodes of the tree are there already. The least of
	 * several rounds is the one that nobody else ran in.
	 */
	for (int round = 0; round < BENCH_ROUNDS; round++) {
		unpreserve = min(unpreserve, ticks_of(unpreserve_all()));
		represerve = min(represerve, ticks_of(err = preserve_all()));
		if (err)
			return err;
	}
	report("unpreserve", unpreserve, count);
	report("represerve", represerve, count);
#ifdef CONFIG_KEXEC_HANDOVER_RUST
	/* What giving up memory may lead to, where all nodes are in use. */
	report("prune", ticks_of(kho_rs_prune()), count);
#endif
	return hand_over();
}

static int __init restore_folios(struct bench_handover *ho)
{
	/* Physical addresses, and then the folios that were there. */
	unsigned long *list = vmalloc_array(ho->count, sizeof(*list));
	unsigned long pfn, number = 0, bad = 0;
	u64 ticks;

	if (!list)
		return -ENOMEM;
	for_each_set_bit(pfn, ho->heads, ho->nr_bits)
		if (number < ho->count)
			list[number++] = PFN_PHYS(pfn);
	if (number != ho->count)
		return -EIO;

	ticks = ticks_of({
		for (unsigned long i = 0; i < number; i++)
			list[i] = (unsigned long)kho_restore_folio(list[i]);
	});
	report("restore", ticks, number);

	number = 0;
	for_each_set_bit(pfn, ho->heads, ho->nr_bits) {
		struct folio *folio = (struct folio *)list[number++];

		if (!folio || folio_pfn(folio) != pfn ||
		    !marked(folio_address(folio), pfn << 8 | folio_order(folio)) ||
		    (ho->order != BENCH_MIXED && folio_order(folio) != ho->order))
			bad++;
		else
			folio_put(folio);
		cond_resched();
	}
	vfree(list);
	if (bad)
		pr_err("FAILED: %lu of %lu folios are not what they were\n", bad, number);
	return bad ? -EIO : 0;
}

static int __init restore_range(struct bench_handover *ho)
{
	struct page *page;
	u64 ticks;

	ticks = ticks_of(page = kho_restore_pages(ho->phys, ho->count));
	if (!page)
		return -EIO;
	report("restore", ticks, ho->count);
	for (unsigned long i = 0; i < ho->count; i++) {
		if (!marked(page_address(page + i), i))
			return -EIO;
		__free_page(page + i);
	}
	return 0;
}

static int __init restore_gigantic(struct bench_handover *ho)
{
	bool good = true;
	u64 ticks;

	ticks = ticks_of({
		for (unsigned long i = 0; i < ho->count; i++)
			good &= !!kho_restore_folio(ho->phys + (PAGE_SIZE * i << ho->order));
	});
	report("restore", ticks, ho->count);
	for (unsigned long i = 0; i < ho->count; i++) {
		void *start = phys_to_virt(ho->phys + (PAGE_SIZE * i << ho->order));

		good &= marked(start, i) && folio_order(virt_to_folio(start)) == ho->order;
	}
	return good ? 0 : -EIO;
}

static int __init restore_area(struct bench_handover *ho)
{
	void *start;
	u64 ticks;

	ticks = ticks_of(start = kho_restore_vmalloc(&ho->area));
	if (!start)
		return -EIO;
	report("restore", ticks, ho->count);
	for (unsigned long i = 0; i < ho->count; i++)
		if (!marked(start + (i << PAGE_SHIFT), i))
			return -EIO;
	vfree(start);
	return 0;
}

static int __init measure_restore(phys_addr_t phys)
{
	struct bench_handover *ho = phys_to_virt(phys);

	if (!kho_restore_folio(phys) || ho->magic != BENCH_MAGIC)
		return -EIO;
	if (ho->kind == RANGE)
		return restore_range(ho);
	if (ho->kind == GIGANTIC)
		return restore_gigantic(ho);
	if (ho->kind == VMALLOC)
		return restore_area(ho);
	return restore_folios(ho);
}

static int __init kho_bench(void)
{
	u64 end = get_cycles();
	phys_addr_t phys;
	int err = 0;

	if (!param[0])
		return 0;
	report_stages(end);
	/* Work that other initcalls left to kthreads is not ours to count. */
	sched_set_fifo(current);
	if (!kho_retrieve_subtree(BENCH_NAME, &phys, NULL)) {
		err = measure_restore(phys);
	} else {
		err = parse_param();
		if (!err && kind != COLD)
			err = measure_preserve();
	}
	sched_set_normal(current, 0);
	if (err)
		pr_err("FAILED: %pe\n", ERR_PTR(err));
	else
		report("done", 0, 0);
	return 0;
}
late_initcall(kho_bench);
