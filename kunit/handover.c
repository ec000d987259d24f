// SPDX-License-Identifier: GPL-2.0
/*
 * A user of kexec handover for the tests that take a kexec: memory that is
 * preserved in every way that there is, and taken back by the next kernel.
 *
 *   kho_kunit_leave     preserve it, if nothing was handed over
 *   kho_kunit_borders   say which free blocks lie in two zones
 *   kho_kunit_atomic    do what may sleep where that is a mistake
 *
 * Each word of that memory holds its own physical address.  Results are lines
 * in the log.  What is handed over to a kernel is taken back in any case.
 */
#define pr_fmt(fmt) "kho_kunit: " fmt

#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/init.h>
#include <linux/io.h>
#include <linux/kexec_handover.h>
#include <linux/kho/abi/kexec_handover.h>
#include <linux/mm.h>
#include <linux/vmalloc.h>
#include <linux/vmstat.h>

#include "../kho_glue.h"

#define NAME		"kho-kunit"
/* A range that no few blocks make up, in the middle of a larger one. */
#define RANGE_ORDER	7
#define RANGE_SKIP	3
#define RANGE_PAGES	89
/* Two chunks of the list of an area's pages are full, the third one is not. */
#define AREA_PAGES	(2 * KHO_VMALLOC_SIZE + 7)
/* As many as the tests have kinds of damage to one. */
#define AREAS		28

static const unsigned int orders[] = { 0, 1, 4, 9 };

struct state {
	phys_addr_t folios[ARRAY_SIZE(orders)];
	/* Preserved as struct pages, and as a range of RAM. */
	phys_addr_t pages, range;
	struct kho_vmalloc areas[AREAS];
};

static bool leave __initdata;

static int __init parse_leave(char *arg)
{
	leave = true;
	return 1;
}
__setup("kho_kunit_leave", parse_leave);

static bool look_at_borders __initdata;

static int __init parse_borders(char *arg)
{
	look_at_borders = true;
	return 1;
}
__setup("kho_kunit_borders", parse_borders);

static void __init fill(void *virt, size_t size)
{
	for (u64 *word = virt; size; word++, size -= sizeof(*word))
		*word = virt_to_phys(word);
}

static bool __init is_filled(void *virt, size_t size, phys_addr_t phys)
{
	for (u64 *word = virt; size; word++, size -= sizeof(*word)) {
		if (*word != phys)
			return false;
		phys += sizeof(*word);
	}
	return true;
}

/* Returns the first of RANGE_PAGES pages, each of which is one by itself. */
static struct page *__init alloc_range(void)
{
	struct page *page = alloc_pages(GFP_KERNEL, RANGE_ORDER);

	if (!page)
		return NULL;
	split_page(page, RANGE_ORDER);
	page += RANGE_SKIP;
	fill(page_address(page), RANGE_PAGES << PAGE_SHIFT);
	return page;
}

static int __init preserve(struct state *state)
{
	struct page *page;
	void *area;
	int err;

	for (int i = 0; i < ARRAY_SIZE(orders); i++) {
		struct folio *folio = folio_alloc(GFP_KERNEL, orders[i]);

		if (!folio)
			return -ENOMEM;
		fill(folio_address(folio), folio_size(folio));
		state->folios[i] = PFN_PHYS(folio_pfn(folio));
		err = kho_preserve_folio(folio);
		if (err)
			return err;
	}
	page = alloc_range();
	if (!page)
		return -ENOMEM;
	state->pages = page_to_phys(page);
	err = kho_preserve_pages(page, RANGE_PAGES);
	if (err)
		return err;
	page = alloc_range();
	if (!page)
		return -ENOMEM;
	state->range = page_to_phys(page);
	err = kho_preserve_phys(state->range, RANGE_PAGES << PAGE_SHIFT);
	if (err)
		return err;

	for (int n = 0; n < AREAS; n++) {
		area = vmalloc(AREA_PAGES << PAGE_SHIFT);
		if (!area)
			return -ENOMEM;
		for (int i = 0; i < AREA_PAGES; i++)
			fill(page_address(vmalloc_to_page(area + i * PAGE_SIZE)), PAGE_SIZE);
		err = kho_preserve_vmalloc(area, &state->areas[n]);
		if (err)
			return err;
	}
	return 0;
}

/* Of pages that have a reference each. */
void kho_kunit_make_folio(struct page *page, unsigned int order)
{
	for (unsigned long i = 1; i < 1UL << order; i++)
		set_page_count(page + i, 0);
	prep_compound_page(page, order);
}

/* Allocating takes a tag of the place that does it, which only the macros have. */
void *kho_kunit_vmalloc(unsigned long size)
{
	return vmalloc(size);
}

void *kho_kunit_vmalloc_huge(unsigned long size)
{
	return vmalloc_huge(size, GFP_KERNEL);
}

/* Allocates this page of movable memory, if it can be had. */
bool kho_kunit_take_page(unsigned long pfn)
{
	return !alloc_contig_range(pfn, pfn + 1, ACR_FLAGS_CMA, GFP_KERNEL);
}

static bool __init take_folio(phys_addr_t phys, unsigned int order)
{
	struct folio *folio = kho_restore_folio(phys);

	if (!folio || folio_order(folio) != order || folio_ref_count(folio) != 1 ||
	    !is_filled(folio_address(folio), folio_size(folio), phys))
		return false;
	folio_put(folio);
	return true;
}

static bool __init take_range(phys_addr_t phys)
{
	struct page *page = kho_restore_pages(phys, RANGE_PAGES);

	if (!page || page_to_phys(page) != phys)
		return false;
	for (int i = 0; i < RANGE_PAGES; i++, page++, phys += PAGE_SIZE) {
		if (page_count(page) != 1 || PageCompound(page) ||
		    !is_filled(page_address(page), PAGE_SIZE, phys))
			return false;
		__free_page(page);
	}
	return true;
}

static bool __init take_area(const struct kho_vmalloc *preservation)
{
	void *area = kho_restore_vmalloc(preservation);

	if (!area)
		return false;
	for (int i = 0; i < AREA_PAGES; i++) {
		void *virt = area + i * PAGE_SIZE;

		if (!is_filled(virt, PAGE_SIZE, page_to_phys(vmalloc_to_page(virt))))
			return false;
	}
	vfree(area);
	return true;
}

static void __init result(const char *what, bool good)
{
	pr_info("%s %s\n", what, good ? "came back" : "is lost");
}

static void __init take(struct state *state)
{
	bool good = true;

	for (int i = 0; i < ARRAY_SIZE(orders); i++)
		good &= take_folio(state->folios[i], orders[i]);
	result("folios", good);
	result("pages", take_range(state->pages));
	result("range", take_range(state->range));
	for (int i = 0; i < AREAS; i++) {
		char name[16];

		snprintf(name, sizeof(name), "area %d", i);
		result(name, take_area(&state->areas[i]));
	}
	kho_restore_free(state);
}

static int __init kho_kunit_init(void)
{
	struct state *state;
	phys_addr_t phys;
	int err;

	if (!kho_retrieve_subtree(NAME, &phys, NULL)) {
		take(phys_to_virt(phys));
		return 0;
	}
	if (!leave)
		return 0;
	state = kho_alloc_preserve(sizeof(*state));
	err = IS_ERR(state) ? PTR_ERR(state) : preserve(state);
	if (!err)
		err = kho_add_subtree(NAME, state, sizeof(*state));
	/* Nothing is given back on failure: the test has failed, and ends. */
	pr_info("left for the next kernel: %d\n", err);
	return err;
}
late_initcall(kho_kunit_init);

static bool be_atomic __initdata;

static int __init parse_atomic(char *arg)
{
	be_atomic = true;
	return 1;
}
__setup("kho_kunit_atomic", parse_atomic);

/* It need not sleep this time: the kernel is to notice that it might. */
static int __init kho_kunit_atomic(void)
{
	struct folio *folio;
	int err;

	if (!be_atomic)
		return 0;
	folio = folio_alloc(GFP_KERNEL, 0);
	if (!folio)
		return -ENOMEM;
	/* The tree's nodes are there after this. */
	err = kho_preserve_folio(folio);
	if (!err) {
		kho_unpreserve_folio(folio);
		pr_info("atomic: preserving\n");
		preempt_disable();
		err = kho_preserve_folio(folio);
		preempt_enable();
	}
	if (!err) {
		/* The kernel says it once a second only. */
		ssleep(2);
		pr_info("atomic: giving up\n");
		preempt_disable();
		kho_unpreserve_folio(folio);
		preempt_enable();
	}
	pr_info("atomic: done: %d\n", err);
	folio_put(folio);
	return 0;
}
late_initcall(kho_kunit_atomic);

/* Returns the number of pages on a free list that are not of its zone. */
static unsigned long __init count_strangers(struct zone *zone, struct list_head *list,
					    unsigned int order)
{
	unsigned long count = 0;
	struct page *page;

	list_for_each_entry(page, list, buddy_list) {
		for (unsigned long i = 0; i < 1UL << order; i++)
			count += page_zone(page + i) != zone;
	}
	return count;
}

/* The page allocator takes the zone and the node of a block from its first page. */
static int __init kho_kunit_borders(void)
{
	struct zone *zone;

	if (!look_at_borders)
		return 0;
	for_each_populated_zone(zone) {
		unsigned long strangers = 0, flags;
		struct list_head *list;
		unsigned int order;

		spin_lock_irqsave(&zone->lock, flags);
		for_each_free_list(list, zone, order)
			strangers += count_strangers(zone, list, order);
		spin_unlock_irqrestore(&zone->lock, flags);
		pr_info("border: node %d from 0x%lx to 0x%lx, %s: %lu managed, %lu of others\n",
			zone_to_nid(zone), zone->zone_start_pfn, zone_end_pfn(zone), zone->name,
			zone_managed_pages(zone), strangers);
	}
	return 0;
}
late_initcall(kho_kunit_borders);

#ifdef CONFIG_ZONE_DMA32
/* What drivers find that start before deferred struct pages are initialised. */
static int __init kho_kunit_early(void)
{
	struct page *page = alloc_pages(GFP_KERNEL | GFP_DMA32 | __GFP_NOWARN, 9);
	unsigned long pages = 0;
	struct zone *zone;

	for_each_populated_zone(zone)
		if (zone_idx(zone) == ZONE_DMA32)
			pages += zone_page_state(zone, NR_FREE_PAGES);
	pr_info("early: %lu MiB of low memory, a block of 2 MiB: %s\n", pages >> (20 - PAGE_SHIFT),
		page ? "yes" : "no");
	if (page)
		__free_pages(page, 9);
	return 0;
}
early_initcall(kho_kunit_early);
#endif
