/* SPDX-License-Identifier: GPL-2.0 */
/* Tracepoints of the Rust implementation of kexec handover; kho_trace.rs calls them. */

#undef TRACE_SYSTEM
#undef TRACE_INCLUDE_FILE
#undef TRACE_INCLUDE_PATH
#define TRACE_SYSTEM kho
#define TRACE_INCLUDE_FILE kho_trace
#define TRACE_INCLUDE_PATH ../../kernel/liveupdate/kho

#if !defined(_KHO_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _KHO_TRACE_H

#include <linux/tracepoint.h>

DECLARE_EVENT_CLASS(kho_frames,
	TP_PROTO(unsigned long pfn, unsigned long nr_pages),
	TP_ARGS(pfn, nr_pages),
	TP_STRUCT__entry(
		__field(unsigned long, pfn)
		__field(unsigned long, nr_pages)
	),
	TP_fast_assign(
		__entry->pfn = pfn;
		__entry->nr_pages = nr_pages;
	),
	TP_printk("pfn=0x%lx nr_pages=%lu", __entry->pfn, __entry->nr_pages)
);

#define DEFINE_KHO_EVENT(name)				\
DEFINE_EVENT(kho_frames, name,				\
	TP_PROTO(unsigned long pfn, unsigned long nr_pages),	\
	TP_ARGS(pfn, nr_pages))

/* Memory was preserved, was given up again, or was restored. */
DEFINE_KHO_EVENT(kho_preserve);
DEFINE_KHO_EVENT(kho_unpreserve);
DEFINE_KHO_EVENT(kho_restore);

/* What was taken over, before what lies between it is given back. */
TRACE_EVENT(kho_takeover,
	TP_PROTO(unsigned long runs, unsigned long nr_pages, unsigned long nodes),
	TP_ARGS(runs, nr_pages, nodes),
	TP_STRUCT__entry(
		__field(unsigned long, runs)
		__field(unsigned long, nr_pages)
		__field(unsigned long, nodes)
	),
	TP_fast_assign(
		__entry->runs = runs;
		__entry->nr_pages = nr_pages;
		__entry->nodes = nodes;
	),
	TP_printk("runs=%lu nr_pages=%lu nodes=%lu",
		  __entry->runs, __entry->nr_pages, __entry->nodes)
);

#endif /* _KHO_TRACE_H */

#include <trace/define_trace.h>
