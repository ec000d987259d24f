/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Time stamps of a boot, for the benchmark of kexec handover only.
 *
 * To be included last by the two files that call what is measured.  A macro is
 * not expanded within itself, so each call stays where it is, between two
 * stamps.
 */
#ifndef _LINUX_KHO_BENCH_H
#define _LINUX_KHO_BENCH_H

#ifdef CONFIG_KEXEC_HANDOVER_BENCH

#include <linux/timex.h>
#include <linux/types.h>

enum kho_bench_stage {
	KHO_BENCH_MM_CORE_INIT_EARLY,
	KHO_BENCH_MEMORY_INIT_EARLY,
	KHO_BENCH_MM_CORE_INIT,
	KHO_BENCH_MEMORY_INIT,
	KHO_BENCH_FREE_ALL,
	KHO_BENCH_MEMORY_INIT_FREE,
	KHO_BENCH_SMP_INIT,
	KHO_BENCH_PAGE_ALLOC_INIT_LATE,
	KHO_BENCH_MEMORY_INIT_LATE,
	KHO_BENCH_STAGES,
};

extern u64 kho_bench_stages[KHO_BENCH_STAGES][2];

#define KHO_BENCH_STAGE(stage, call)				\
do {								\
	kho_bench_stages[KHO_BENCH_##stage][0] = get_cycles();	\
	call;							\
	kho_bench_stages[KHO_BENCH_##stage][1] = get_cycles();	\
} while (0)

#ifdef KHO_BENCH_INIT_MAIN
#define mm_core_init_early()	KHO_BENCH_STAGE(MM_CORE_INIT_EARLY, mm_core_init_early())
#define mm_core_init()		KHO_BENCH_STAGE(MM_CORE_INIT, mm_core_init())
#define smp_init()		KHO_BENCH_STAGE(SMP_INIT, smp_init())
#define page_alloc_init_late()	KHO_BENCH_STAGE(PAGE_ALLOC_INIT_LATE, page_alloc_init_late())
#else
#define kho_memory_init_early()	KHO_BENCH_STAGE(MEMORY_INIT_EARLY, kho_memory_init_early())
#define kho_memory_init()	KHO_BENCH_STAGE(MEMORY_INIT, kho_memory_init())
#define memblock_free_all()	KHO_BENCH_STAGE(FREE_ALL, memblock_free_all())
#define kho_memory_init_free()	KHO_BENCH_STAGE(MEMORY_INIT_FREE, kho_memory_init_free())
#define kho_memory_init_late()	KHO_BENCH_STAGE(MEMORY_INIT_LATE, kho_memory_init_late())
#endif

#endif /* CONFIG_KEXEC_HANDOVER_BENCH */

#ifdef CONFIG_KEXEC_HANDOVER_RUST
/* What its delayed work does. */
void kho_rs_prune(void);
#endif

#endif /* _LINUX_KHO_BENCH_H */
