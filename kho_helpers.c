// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions of <linux/mm.h> and friends that are on the path of each folio.
 * rust/helpers/helpers.c includes this file, so that CONFIG_RUST_INLINE_HELPERS
 * inlines them; what else Rust needs of C is in kho_glue.c.
 */

#include <linux/memory_hotplug.h>
#include <linux/percpu.h>
#include <linux/preempt.h>

#include "kho_glue.h"

__rust_helper struct page *rust_helper_kho_glue_pfn_to_online_page(unsigned long pfn)
{
	return pfn_to_online_page(pfn);
}

__rust_helper struct kho_glue_folio rust_helper_kho_glue_folio(struct folio *folio)
{
	return (struct kho_glue_folio) {
		.pfn = folio_pfn(folio),
		.order = folio_order(folio),
	};
}

/*
 * Disables preemption; returns the CPU's hints.  A caller may have to wait for a
 * prune or to allocate nodes.  It must not be an interrupt, which may have come
 * while the hints of this CPU were being changed.
 */
__rust_helper struct kho_glue_hints *rust_helper_kho_glue_enter(void)
{
	might_sleep();
	preempt_disable();
	return this_cpu_ptr(&kho_hints);
}

__rust_helper void rust_helper_kho_glue_leave(void)
{
	preempt_enable();
}
