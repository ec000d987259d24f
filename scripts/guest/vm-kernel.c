// SPDX-License-Identifier: GPL-2.0
/*
 * The virtual machine that lives through a kexec of its host, in "make vm".
 *
 * Its memory is at any moment a known function of how far it has come: page P has version
 * V until its turn, then V + 1.  It fills all of its memory with version 0 and then goes
 * round for ever: each word of the next page has to be that of version V, and becomes that of
 * V + 1.  The number of pages done is kept in a register, in an SSE register and in memory,
 * and a timer of the local APIC counts.  So a word that is lost, old or of another page is
 * noticed here, and so is state of the processor that is lost.
 *
 * It prints one line for every 256 pages, and one that starts with BAD for what is wrong.
 */
#include "vm-kernel.h"

#define PAGE		4096UL
#define WORDS		(PAGE / sizeof(unsigned long))
#define LINE		256
#define MOST_BAD	16

#define COM1		0x3f8
#define LAPIC		0xfee00000UL
#define TIMER_VECTOR	32

/* What PVH hands over, as far as it is of interest. */
struct start_info {
	unsigned int magic, version, flags, modules;
	unsigned long modlist, cmdline, rsdp, memmap;
	unsigned int memmap_entries;
};

struct memmap_entry {
	unsigned long addr, size;
	unsigned int type, reserved;
};

struct gate {
	unsigned short low, selector, type, middle;
	unsigned int high, reserved;
};

/* The count, in a register that the compiler leaves alone. */
register unsigned long count asm("r15");

unsigned long ticks;
static unsigned long count_in_memory, first, pages, bad;
static struct gate idt[TIMER_VECTOR + 1];

static void outb(unsigned char value, unsigned short port)
{
	asm volatile("out %0, %1" : : "a" (value), "Nd" (port));
}

static unsigned char inb(unsigned short port)
{
	unsigned char value;

	asm volatile("in %1, %0" : "=a" (value) : "Nd" (port));
	return value;
}

static void print(const char *text)
{
	for (; *text; text++) {
		while (!(inb(COM1 + 5) & 0x20))
			;
		outb(*text, COM1);
	}
}

static void print_number(const char *before, unsigned long number, unsigned int base)
{
	char digits[24], *at = digits + sizeof(digits) - 1;

	*at = 0;
	do {
		*--at = "0123456789abcdef"[number % base];
		number /= base;
	} while (number);
	print(before);
	print(at);
}

/* The local APIC's registers are memory of a kind that no optimisation may touch. */
static void lapic_write(unsigned int reg, unsigned int value)
{
	asm volatile("movl %0, %1" : : "r" (value), "m" (*(unsigned int *)(LAPIC + reg)));
}

/* Adds to the count in %xmm15, and returns it. */
static unsigned long count_in_sse(unsigned long more)
{
	unsigned long value;

	asm volatile("movq %1, %%xmm14\n\t"
		     "paddq %%xmm14, %%xmm15\n\t"
		     "movq %%xmm15, %0" : "=r" (value) : "r" (more));
	return value;
}

static int is_bad(void)
{
	bad++;
	if (bad == MOST_BAD)
		print("BAD and more of it\n");
	return bad < MOST_BAD;
}

void vm_fault(unsigned long a, unsigned long b, unsigned long c)
{
	print_number("BAD exception: 0x", a, 16);
	print_number(" 0x", b, 16);
	print_number(" 0x", c, 16);
	print("\n");
	for (;;)
		asm volatile("cli; hlt");
}

static void set_gate(int vector, void (*handler)(void))
{
	unsigned long address = (unsigned long)handler;

	/* An interrupt gate to the code segment of vm-entry.S. */
	idt[vector] = (struct gate) {
		.low = address, .selector = 8, .type = 0x8e00,
		.middle = address >> 16, .high = address >> 32,
	};
}

static void start_timer(void)
{
	/* The size and the address have to be next to each other. */
	struct { unsigned short padding[3], limit; void *base; } pointer = {
		.limit = sizeof(idt) - 1, .base = idt,
	};

	for (int i = 0; i < TIMER_VECTOR; i++)
		set_gate(i, fault);
	set_gate(TIMER_VECTOR, tick);
	asm volatile("lidt %0" : : "m" (pointer.limit), "m" (pointer.base));
	/* Nothing from the two old interrupt controllers. */
	outb(0xff, 0x21);
	outb(0xff, 0xa1);
	lapic_write(0xf0, 0x1ff);			/* on */
	lapic_write(0x3e0, 0xb);			/* undivided */
	lapic_write(0x320, 0x20000 | TIMER_VECTOR);	/* periodic */
	lapic_write(0x380, 100000000);
	asm volatile("sti");
}

/* The memory from the end of this program on. */
static void find_memory(const struct start_info *info)
{
	const struct memmap_entry *entry = (void *)info->memmap;
	unsigned long end = 0;

	first = ((unsigned long)_end + PAGE - 1) & ~(PAGE - 1);
	for (unsigned int i = 0; i < info->memmap_entries; i++, entry++)
		if (entry->type == 1 && entry->addr <= first && entry->addr + entry->size > first)
			end = entry->addr + entry->size;
	pages = (end - first) / PAGE;
}

/* Words of any two pages and versions differ. */
#define STEP	0x9e3779b97f4a7c15UL

static unsigned long first_word(unsigned long page, unsigned long version)
{
	return page * 0xd1342543de82ef95UL ^ version * 0xaf251af3b0f025b5UL;
}

static void fill(void)
{
	for (unsigned long page = 0; page < pages; page++) {
		unsigned long *words = (void *)(first + page * PAGE), word = first_word(page, 0);

		for (unsigned long i = 0; i < WORDS; i++, word += STEP)
			words[i] = word;
	}
}

static void advance(unsigned long page, unsigned long version)
{
	unsigned long *words = (void *)(first + page * PAGE);
	unsigned long old = first_word(page, version), new = first_word(page, version + 1);

	for (unsigned long i = 0; i < WORDS; i++, old += STEP, new += STEP) {
		unsigned long found = words[i];

		if (found != old && is_bad()) {
			print_number("BAD word at 0x", (unsigned long)&words[i], 16);
			print_number(": found 0x", found, 16);
			print_number(", expected 0x", old, 16);
			print("\n");
		}
		words[i] = new;
	}
}

static void check_count(void)
{
	unsigned long sse = count_in_sse(0);

	if ((count != sse || count != count_in_memory) && is_bad()) {
		print_number("BAD count: ", count, 10);
		print_number(" in a register, ", sse, 10);
		print_number(" in one of SSE, ", count_in_memory, 10);
		print(" in memory\n");
	}
}

void vm_main(const struct start_info *info)
{
	find_memory(info);
	start_timer();
	print_number("memory at 0x", first, 16);
	print_number(", ", pages, 10);
	print(" pages\n");
	fill();
	count = 0;
	asm volatile("pxor %xmm15, %xmm15");
	for (;;) {
		advance(count % pages, count / pages);
		count++;
		count_in_memory++;
		count_in_sse(1);
		check_count();
		if (count % LINE)
			continue;
		print_number("count ", count, 10);
		print_number(": round ", count / pages, 10);
		print_number(", tick ", ticks, 10);
		print("\n");
	}
}
