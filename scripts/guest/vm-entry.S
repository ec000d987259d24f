/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Where the virtual machine of vm-kernel.c starts, as PVH says: in 32-bit protected mode,
 * without paging, with %ebx pointing to what the hypervisor says about the machine.
 */
	.section .note.Xen, "a", @note
	.balign	4
	.long	4, 4, 18		/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz	"Xen"
	.long	_start

	.text
	.code32
	.globl	_start
_start:
	mov	$pml4, %eax
	mov	%eax, %cr3
	mov	%cr4, %eax
	or	$0x620, %eax		/* PAE, and SSE */
	mov	%eax, %cr4
	mov	$0xc0000080, %ecx	/* EFER */
	rdmsr
	or	$0x100, %eax		/* long mode */
	wrmsr
	mov	%cr0, %eax
	and	$~4, %eax		/* no emulation of the FPU */
	or	$0x80000003, %eax	/* paging, and the FPU is there */
	mov	%eax, %cr0
	lgdt	gdt_pointer
	ljmp	$8, $long_mode

	.code64
long_mode:
	mov	$16, %eax
	mov	%eax, %ss
	mov	%eax, %ds
	mov	%eax, %es
	mov	$stack, %esp
	mov	%ebx, %edi
	call	vm_main

	.globl	tick
tick:
	push	%rax
	incq	ticks
	mov	$0xfee000b0, %eax	/* the local APIC's end of interrupt */
	movl	$0, (%rax)
	pop	%rax
	iretq

	.globl	fault
fault:
	pop	%rdi
	pop	%rsi
	pop	%rdx
	call	vm_fault

	.data
	.balign	4096
pml4:	.quad	pdpt + 3
	.fill	511, 8, 0
	/* Four pages of 1 GiB, each at its own address. */
pdpt:	.quad	0x00000083, 0x40000083, 0x80000083, 0xc0000083
	.fill	508, 8, 0
gdt:	.quad	0, 0x00209a0000000000, 0x0000920000000000
gdt_pointer:
	.word	23
	.long	gdt

	.bss
	.balign	16
	.skip	8192
stack:

	.section .note.GNU-stack, "", @progbits
