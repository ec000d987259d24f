/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the Rust implementation of kexec handover shares with C.  bindgen reads
 * this file through rust/bindings/bindings_helper.h; nothing outside this
 * directory may include it.
 */
#ifndef KHO_GLUE_H
#define KHO_GLUE_H

#include <linux/ioport.h>
#include <linux/kexec.h>
#include <linux/kexec_handover.h>
#include <linux/kho/abi/kexec_handover.h>
#include <linux/kho/abi/kexec_metadata.h>
#include <linux/kho_radix_tree.h>
#include <linux/libfdt.h>
#include <linux/memblock.h>
#include <linux/percpu-defs.h>
#include <linux/seq_file.h>
#include <linux/timex.h>
#include <linux/utsname.h>
#include <linux/vmalloc.h>

#include <asm/early_ioremap.h>

#include "../../../mm/mm_init.h"
#include "../../../mm/vmalloc.h"
#include "../../kexec_internal.h"
#include "../kexec_handover_internal.h"
#include "kho_trace.h"

/*
 * Scratch areas are freed to the page allocator next to memory whose struct
 * pages may not be initialised yet; the allocator looks at neighbours of up to
 * its largest order.
 */
#define KHO_SCRATCH_ALIGN	(PAGE_SIZE * MAX_ORDER_NR_PAGES)

/* How many kinds of complaints there are, see kho_log.rs. */
#define KHO_COMPLAINTS	8

#ifdef __BINDGEN__
const size_t RUST_CONST_HELPER_KHO_SCRATCH_ALIGN = KHO_SCRATCH_ALIGN;
const size_t RUST_CONST_HELPER_KHO_VMALLOC_SIZE = KHO_VMALLOC_SIZE;
const unsigned int RUST_CONST_HELPER_KHO_MAX_PAGE_ORDER = MAX_PAGE_ORDER;
const unsigned int RUST_CONST_HELPER_KHO_MAX_FOLIO_ORDER = MAX_FOLIO_ORDER;
const size_t RUST_CONST_HELPER_KHO_PAGE_PRIVATE = offsetof(struct page, private);
const size_t RUST_CONST_HELPER_KHO_PAGE_LRU = offsetof(struct page, lru);
const gfp_t RUST_CONST_HELPER_KHO_GFP_DMA = __GFP_DMA;
const gfp_t RUST_CONST_HELPER_KHO_GFP_DMA32 = __GFP_DMA32;
#endif

/* A folio as the tree knows it; both words are returned in registers. */
struct kho_glue_folio {
	unsigned long pfn;
	unsigned long order;
};

/* The hints of a CPU, one in a cache line; see struct Hints in kho_radix.rs. */
struct kho_glue_hints {
	u64 words[16][8];
} __aligned(64);

DECLARE_PER_CPU(struct kho_glue_hints, kho_hints);

/* struct pages */
struct page *kho_glue_pfn_to_page(unsigned long pfn);
unsigned long kho_glue_page_to_pfn(const struct page *page);
bool kho_glue_one_node(unsigned long first, unsigned long last);
bool kho_glue_is_plugged(unsigned long start, unsigned long end);
void kho_glue_get_online_mems(void);
void kho_glue_put_online_mems(void);
bool kho_glue_may_be_ram(phys_addr_t phys, phys_addr_t size);
int kho_glue_early_pfn_to_nid(unsigned long pfn);
void kho_glue_clear_tags(struct page *page, unsigned long nr_pages);
void kho_glue_split(struct page *page, unsigned int order);
void kho_glue_free_page(phys_addr_t phys);
void kho_glue_init_cma(unsigned long pfn, unsigned long nr_pages);

/* memory that takeover withholds */
unsigned long kho_glue_first_deferred(int nid);
void kho_glue_init_deferred(struct page *page, unsigned long pfn, int nid);
void kho_glue_make_head(struct page *page, unsigned int order);
void kho_glue_make_tail(struct page *tail, unsigned long head, unsigned int order);
void kho_glue_add_managed(struct page *page, unsigned long nr_pages);
void kho_glue_init_pageblocks(unsigned long pfn, unsigned long nr_pages);
void kho_glue_free_block(unsigned long pfn, unsigned int order);
unsigned long kho_glue_zone_border(unsigned long pfn, int nid);
void kho_glue_add_totalram(unsigned long nr_pages);
void kho_glue_in_parallel(void (*fn)(unsigned long start, unsigned long end, void *arg),
			  unsigned long start, unsigned long end, unsigned long align);
void kho_glue_cond_resched(void);

/* pages */
void *kho_glue_alloc_page(void);

/* folios */
void *kho_glue_alloc_folio(unsigned int order);
void *kho_glue_alloc_folio_from(unsigned int order, int nid, gfp_t zone);
void kho_glue_folio_put(struct folio *folio);
struct folio *kho_glue_virt_to_folio(const void *mem);

/* addresses */
unsigned long kho_glue_direct_map(void);
void *kho_glue_phys_to_virt(phys_addr_t phys);
phys_addr_t kho_glue_virt_to_phys(void *virt);
bool kho_glue_virt_addr_valid(const void *virt);

/* vmalloc */
struct page **kho_glue_alloc_pages_array(unsigned long nr_pages);
struct vm_struct *kho_glue_vmap(struct page **pages, unsigned long nr_pages,
				unsigned int order, unsigned long vm_flags);
void *kho_glue_vmap_done(struct vm_struct *area, struct page **pages,
			 unsigned long nr_pages, bool vm_alloc);

/* locks, time, environment */
void kho_glue_mutex_init(struct mutex *lock);
void kho_glue_schedule_prune(void);
void kho_glue_watch_memory(void);
bool kho_glue_may_complain(unsigned int kind);
phys_addr_t kho_glue_low_limit(void);
int kho_glue_next_memory_node(int nid);
bool kho_glue_is_kdump_kernel(void);
void kho_glue_kmemleak_ignore(phys_addr_t phys);
const char *kho_glue_release(void);
u64 kho_glue_cycles(void);

/* debugfs; no-ops without CONFIG_KEXEC_HANDOVER_DEBUGFS */
int kho_glue_debugfs_init(void);
void kho_glue_debugfs_in(const void *fdt);
int kho_glue_debugfs_add(const char *name, const void *blob, size_t size, bool root);
void kho_glue_debugfs_remove(void *blob);

/* called by the glue, implemented in kho.rs */
int kho_rs_parse_enable(char *arg);
int kho_rs_parse_scratch(char *arg);
int kho_rs_map(void);
int kho_rs_init(void);
void kho_rs_plug(unsigned long pfn, unsigned long nr_pages);
void kho_rs_prune(void);
void kho_rs_summary(struct seq_file *file);

/* in kunit/handover.c */
void kho_kunit_make_folio(struct page *page, unsigned int order);
void *kho_kunit_vmalloc(unsigned long size);
void *kho_kunit_vmalloc_huge(unsigned long size);
bool kho_kunit_take_page(unsigned long pfn);

#endif /* KHO_GLUE_H */
