/* SPDX-License-Identifier: GPL-2.0 */
#ifndef KHO_VM_KERNEL_H
#define KHO_VM_KERNEL_H

/* Between vm-entry.S and vm-kernel.c. */
struct start_info;
void vm_main(const struct start_info *info);
void vm_fault(unsigned long a, unsigned long b, unsigned long c);
void tick(void);
void fault(void);

/* Where the linker says that the program ends. */
extern char _end[];

extern unsigned long ticks;

#endif
