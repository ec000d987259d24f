// SPDX-License-Identifier: GPL-2.0
/*
 * The part of kexec handover that only C can express: exports, parameters and
 * initcalls, tracepoints, work items, and inline functions of <linux/mm.h> and
 * friends under a name that Rust can call.  There is no policy here.
 */

#define pr_fmt(fmt) "KHO: " fmt

#include <linux/cma.h>
#include <linux/crash_dump.h>
#include <linux/export.h>
#include <linux/init.h>
#include <linux/kasan.h>
#include <linux/kmemleak.h>
#include <linux/kmsan.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/padata.h>
#include <linux/page-isolation.h>
#include <linux/percpu.h>
#include <linux/pgalloc_tag.h>
#include <linux/preempt.h>
#include <linux/ratelimit.h>
#include <linux/string.h>
#include <linux/vmstat.h>
#include <linux/workqueue.h>

#ifdef CONFIG_X86
#include <asm/cmdline.h>
#include <asm/e820/api.h>
#endif

#include "../../../mm/internal.h"
#include "../../../mm/page_alloc.h"
#include "kho_glue.h"

#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include "kho_trace.h"

static_assert(KHO_SCRATCH_ALIGN >= CMA_MIN_ALIGNMENT_BYTES);

/* Shared with kexec_handover_debugfs.c. */
struct kho_scratch *kho_scratch;
unsigned int kho_scratch_cnt;

early_param("kho", kho_rs_parse_enable);
early_param("kho_scratch", kho_rs_parse_scratch);
core_initcall(kho_rs_map);
fs_initcall(kho_rs_init);

EXPORT_SYMBOL_GPL(is_kho_boot);
EXPORT_SYMBOL_GPL(kho_add_subtree);
EXPORT_SYMBOL_GPL(kho_alloc_preserve);
EXPORT_SYMBOL_GPL(kho_is_enabled);
EXPORT_SYMBOL_GPL(kho_preserve_folio);
EXPORT_SYMBOL_GPL(kho_preserve_pages);
EXPORT_SYMBOL_GPL(kho_preserve_phys);
EXPORT_SYMBOL_GPL(kho_preserve_vmalloc);
EXPORT_SYMBOL_GPL(kho_radix_add_key);
EXPORT_SYMBOL_GPL(kho_radix_del_key);
EXPORT_SYMBOL_GPL(kho_radix_destroy_tree);
EXPORT_SYMBOL_GPL(kho_radix_init_tree);
EXPORT_SYMBOL_GPL(kho_radix_walk_tree);
EXPORT_SYMBOL_GPL(kho_remove_subtree);
EXPORT_SYMBOL_GPL(kho_restore_folio);
EXPORT_SYMBOL_GPL(kho_restore_free);
EXPORT_SYMBOL_GPL(kho_restore_pages);
EXPORT_SYMBOL_GPL(kho_restore_vmalloc);
EXPORT_SYMBOL_GPL(kho_retrieve_subtree);
EXPORT_SYMBOL_GPL(kho_unpreserve_folio);
EXPORT_SYMBOL_GPL(kho_unpreserve_free);
EXPORT_SYMBOL_GPL(kho_unpreserve_pages);
EXPORT_SYMBOL_GPL(kho_unpreserve_vmalloc);

/* struct pages */

struct page *kho_glue_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long kho_glue_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

bool kho_glue_one_node(unsigned long first, unsigned long last)
{
	return pfn_to_nid(first) == pfn_to_nid(last);
}

/* Whether a part of it was not there at boot. Memory is plugged in by the section. */
bool kho_glue_is_plugged(unsigned long start, unsigned long end)
{
#ifdef CONFIG_MEMORY_HOTPLUG
	for (unsigned long pfn = start; pfn < end; pfn = SECTION_ALIGN_UP(pfn + 1))
		if (!early_section(__pfn_to_section(pfn)))
			return true;
#endif
	return false;
}

/* In between no memory is removed. */
void kho_glue_get_online_mems(void)
{
	get_online_mems();
}

void kho_glue_put_online_mems(void)
{
	put_online_mems();
}

/*
 * Whether a range may be RAM, as far as that is known before memblock is.  What memmap= or
 * add_efi_memmap add to the map is not, and other architectures than x86 may know nothing yet.
 */
bool __init kho_glue_may_be_ram(phys_addr_t phys, phys_addr_t size)
{
#ifdef CONFIG_X86
	char value[1];

	return e820__mapped_all(phys, phys + size, E820_TYPE_RAM) ||
	       cmdline_find_option(boot_command_line, "memmap", value, sizeof(value)) >= 0 ||
	       cmdline_find_option_bool(boot_command_line, "add_efi_memmap");
#else
	return true;
#endif
}

int __init kho_glue_early_pfn_to_nid(unsigned long pfn)
{
	return early_pfn_to_nid(pfn);
}

/* For pages that were allocated by nobody here. */
void kho_glue_clear_tags(struct page *page, unsigned long nr_pages)
{
	for (unsigned long i = 0; i < nr_pages; i++)
		clear_page_tag_ref(page + i);
}

static void split_tail(struct page *tail)
{
	tail->mapping = NULL;
	clear_compound_head(tail);
	set_page_count(tail, 1);
}

/* Makes a folio single pages, as the page allocator does that gets it back. */
void kho_glue_split(struct page *page, unsigned int order)
{
	page[1].flags.f &= ~PAGE_FLAGS_SECOND;
#ifdef NR_PAGES_IN_LARGE_FOLIO
	((struct folio *)page)->_nr_pages = 0;
#endif
	split_tail(page + 1);
	/* In pairs, or the loop takes as long as what it does. */
	for (struct page *tail = page + 2; tail < page + (1UL << order); tail += 2) {
		split_tail(tail);
		split_tail(tail + 1);
	}
	__ClearPageHead(page);
}

/* Pages allocated from memblock are still PageReserved. */
void kho_glue_free_page(phys_addr_t phys)
{
	struct page *page = phys_to_page(phys);

	if (PageReserved(page))
		free_reserved_page(page);
	else
		__free_page(page);
}

void __init kho_glue_init_cma(unsigned long pfn, unsigned long nr_pages)
{
	for (unsigned long i = 0; i < nr_pages; i += pageblock_nr_pages)
		init_cma_reserved_pageblock(pfn_to_page(pfn + i));
}

/* memory that takeover withholds */

unsigned long __init kho_glue_first_deferred(int nid)
{
#ifdef CONFIG_DEFERRED_STRUCT_PAGE_INIT
	return NODE_DATA(nid)->first_deferred_pfn;
#else
	return ULONG_MAX;
#endif
}

/* Only the last zone of a node is deferred. */
void __init kho_glue_init_deferred(struct page *page, unsigned long pfn, int nid)
{
#ifdef WANT_PAGE_VIRTUAL
#error "a struct page is more than its zone and node say"
#endif
	__init_single_page(page, pfn, NODE_DATA(nid)->nr_zones - 1, nid);
}

void __init kho_glue_make_head(struct page *page, unsigned int order)
{
	__SetPageHead(page);
	prep_compound_head(page, order);
}

void __init kho_glue_make_tail(struct page *tail, unsigned long head, unsigned int order)
{
	set_page_count(tail, 0);
	prep_compound_tail(tail, pfn_to_page(head), order);
}

/* There is no lowmem_reserve to be updated yet. */
void __init kho_glue_add_managed(struct page *page, unsigned long nr_pages)
{
	atomic_long_add(nr_pages, &page_zone(page)->managed_pages);
	totalram_pages_add(nr_pages);
}

void __init kho_glue_init_pageblocks(unsigned long pfn, unsigned long nr_pages)
{
	for (unsigned long i = 0; i < nr_pages; i += pageblock_nr_pages)
		init_pageblock_migratetype(pfn_to_page(pfn + i), MIGRATE_MOVABLE, false);
}

/* As memblock_free_pages(), whether or not deferred memory has been reached. */
void __init kho_glue_free_block(unsigned long pfn, unsigned int order)
{
	struct page *page = pfn_to_page(pfn);

	if (!kmsan_memblock_free_pages(page, order))
		return;
	clear_page_tag_ref(page);
	__free_pages_core(page, order, MEMINIT_EARLY);
}

/* The next page from which on another zone of the node begins or ends. */
unsigned long __init kho_glue_zone_border(unsigned long pfn, int nid)
{
	unsigned long border = ULONG_MAX;

	for (int i = 0; i < MAX_NR_ZONES; i++) {
		struct zone *zone = &NODE_DATA(nid)->node_zones[i];

		if (!zone->spanned_pages)
			continue;
		if (zone->zone_start_pfn > pfn)
			border = min(border, zone->zone_start_pfn);
		else if (zone_end_pfn(zone) > pfn)
			border = min(border, zone_end_pfn(zone));
	}
	return border;
}

void __init kho_glue_add_totalram(unsigned long nr_pages)
{
	totalram_pages_add(nr_pages);
}

void __init kho_glue_in_parallel(void (*fn)(unsigned long start, unsigned long end, void *arg),
				 unsigned long start, unsigned long end, unsigned long align)
{
	struct padata_mt_job job = {
		.thread_fn   = fn,
		.start       = start,
		.size        = end - start,
		.align       = align,
		.min_chunk   = align,
		.max_threads = num_online_cpus(),
		.numa_aware  = true,
	};

	padata_do_multithreaded(&job);
}

void kho_glue_cond_resched(void)
{
	cond_resched();
}

/* pages; macros of the allocator's, so that they are found in /proc/allocinfo */

void *kho_glue_alloc_page(void)
{
	return (void *)get_zeroed_page(GFP_KERNEL);
}

/* folios */

void *kho_glue_alloc_folio(unsigned int order)
{
	struct folio *folio = folio_alloc(GFP_KERNEL | __GFP_ZERO, order);

	return folio ? folio_address(folio) : NULL;
}

/* From one node; with NUMA_NO_NODE from any, but from no zone above that of @zone. */
void *kho_glue_alloc_folio_from(unsigned int order, int nid, gfp_t zone)
{
	gfp_t gfp = GFP_KERNEL | __GFP_ZERO | __GFP_RETRY_MAYFAIL | __GFP_NOWARN | zone;
	struct folio *folio;

	if (nid == NUMA_NO_NODE)
		nid = numa_mem_id();
	else
		gfp |= __GFP_THISNODE;
	folio = __folio_alloc_node(gfp, order, nid);
	return folio ? folio_address(folio) : NULL;
}

void kho_glue_folio_put(struct folio *folio)
{
	folio_put(folio);
}

struct folio *kho_glue_virt_to_folio(const void *mem)
{
	return virt_to_folio(mem);
}

/* addresses */

unsigned long __init kho_glue_direct_map(void)
{
	phys_addr_t phys = memblock_start_of_DRAM();

	return (unsigned long)phys_to_virt(phys) - phys;
}

void *kho_glue_phys_to_virt(phys_addr_t phys)
{
	return phys_to_virt(phys);
}

phys_addr_t kho_glue_virt_to_phys(void *virt)
{
	return virt_to_phys(virt);
}

bool kho_glue_virt_addr_valid(const void *virt)
{
	return virt_addr_valid(virt);
}

/* vmalloc */

struct page **kho_glue_alloc_pages_array(unsigned long nr_pages)
{
	return kvmalloc_array(nr_pages, sizeof(struct page *), GFP_KERNEL | __GFP_NOWARN);
}

struct vm_struct *kho_glue_vmap(struct page **pages, unsigned long nr_pages,
				unsigned int order, unsigned long vm_flags)
{
	unsigned int shift = PAGE_SHIFT + order;
	struct vm_struct *area;
	unsigned long addr;

	area = __get_vm_area_node(nr_pages * PAGE_SIZE, 1UL << shift, shift,
				  vm_flags | VM_UNINITIALIZED,
				  VMALLOC_START, VMALLOC_END, NUMA_NO_NODE,
				  GFP_KERNEL, __builtin_return_address(0));
	if (!area)
		return NULL;

	addr = (unsigned long)area->addr;
	if (vmap_pages_range(addr, addr + get_vm_area_size(area), PAGE_KERNEL,
			     pages, shift)) {
		free_vm_area(area);
		return NULL;
	}
	return area;
}

void *kho_glue_vmap_done(struct vm_struct *area, struct page **pages,
			 unsigned long nr_pages, bool vm_alloc)
{
	kasan_vmalloc_flags_t flags = KASAN_VMALLOC_PROT_NORMAL;

	if (vm_alloc)
		flags |= KASAN_VMALLOC_VM_ALLOC;

	area->nr_pages = nr_pages;
	area->pages = pages;
	area->addr = kasan_unpoison_vmalloc(area->addr, nr_pages * PAGE_SIZE, flags);
	clear_vm_uninitialized_flag(area);
	return area->addr;
}

/* locks, time, environment */

DEFINE_PER_CPU(struct kho_glue_hints, kho_hints);

void kho_glue_mutex_init(struct mutex *lock)
{
	mutex_init(lock);
}

static void kho_prune(struct work_struct *work)
{
	kho_rs_prune();
}

static DECLARE_DELAYED_WORK(kho_prune_work, kho_prune);

void kho_glue_schedule_prune(void)
{
	schedule_delayed_work(&kho_prune_work, HZ);
}

/* Before anybody can allocate what comes. */
static int kho_memory_notify(struct notifier_block *self, unsigned long action, void *arg)
{
	struct memory_notify *memory = arg;

	if (action == MEM_GOING_ONLINE)
		kho_rs_plug(memory->start_pfn, memory->nr_pages);
	return NOTIFY_OK;
}

void __init kho_glue_watch_memory(void)
{
	hotplug_memory_notifier(kho_memory_notify, DEFAULT_CALLBACK_PRI);
}

static struct ratelimit_state kho_complaints[] = {
	[0 ... KHO_COMPLAINTS - 1] = RATELIMIT_STATE_INIT(kho_complaints,
							  DEFAULT_RATELIMIT_INTERVAL,
							  DEFAULT_RATELIMIT_BURST),
};

bool kho_glue_may_complain(unsigned int kind)
{
	return ___ratelimit(&kho_complaints[kind], "KHO");
}

phys_addr_t kho_glue_low_limit(void)
{
	return ARCH_LOW_ADDRESS_LIMIT;
}

int kho_glue_next_memory_node(int nid)
{
	nid = next_node(nid, node_states[N_MEMORY]);
	return nid < MAX_NUMNODES ? nid : NUMA_NO_NODE;
}

bool kho_glue_is_kdump_kernel(void)
{
	return is_kdump_kernel();
}

void __init kho_glue_kmemleak_ignore(phys_addr_t phys)
{
	kmemleak_ignore_phys(phys);
}

const char *kho_glue_release(void)
{
	return init_uts_ns.name.release;
}

u64 kho_glue_cycles(void)
{
	return get_cycles();
}

/* debugfs */

static struct kho_debugfs kho_in_dbg, kho_out_dbg;

#ifdef CONFIG_KEXEC_HANDOVER_DEBUGFS
static int kho_summary_show(struct seq_file *file, void *data)
{
	kho_rs_summary(file);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(kho_summary);

/* KHO works without this file. */
static void __init add_summary(void)
{
	struct dentry *dir = debugfs_lookup("kho", NULL);

	debugfs_create_file("summary", 0400, dir, NULL, &kho_summary_fops);
	dput(dir);
}
#else
static void __init add_summary(void) { }
#endif

int __init kho_glue_debugfs_init(void)
{
	int err = kho_debugfs_init() ?: kho_out_debugfs_init(&kho_out_dbg);

	if (!err)
		add_summary();
	return err;
}

void __init kho_glue_debugfs_in(const void *fdt)
{
	kho_in_debugfs_init(&kho_in_dbg, fdt);
}

int kho_glue_debugfs_add(const char *name, const void *blob, size_t size, bool root)
{
	return kho_debugfs_blob_add(&kho_out_dbg, name, blob, size, root);
}

void kho_glue_debugfs_remove(void *blob)
{
	kho_debugfs_blob_remove(&kho_out_dbg, blob);
}
