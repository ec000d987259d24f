#!/usr/bin/env drgn
# SPDX-License-Identifier: GPL-2.0
"""What the kernel preserves for the next one: drgn [-c VMCORE] kho.py [--ranges]

Knows the C implementation of kexec handover and the Rust one. What was handed over to this
kernel is not shown: nodes of that tree may be something else by now.
"""
import struct
import sys

SHIFT = prog["PAGE_SHIFT"].value_()
PAGE = 1 << SHIFT
TABLE_BITS, LEAF_BITS = SHIFT - 3, SHIFT + 3
TOP = -(-(65 - SHIFT - LEAF_BITS) // TABLE_BITS)


def outgoing_fdt():
    """Where the outgoing FDT is, 0 if there is none, and whether that is a physical address."""
    try:
        return prog["kho_out"].fdt.value_(), False
    except KeyError:
        return prog.read_u64(prog["kho::kho_state::OUT_FDT"].address_), True


def root_of(fdt, physical):
    """Where the tree is that an FDT names: a property of its first node."""
    size, at, strings = struct.unpack(">III", prog.read(fdt + 4, 12, physical))
    data = prog.read(fdt, size, physical)
    at += 8
    while struct.unpack_from(">I", data, at)[0] == 3:
        length, name = struct.unpack_from(">II", data, at + 4)
        if data[strings + name:].startswith(b"preserved-memory-map\0"):
            return struct.unpack_from("=Q", data, at + 12)[0]
        at += 12 + (length + 3 & ~3)
    raise LookupError("the FDT names no tree")


class Walk:
    """All of a tree: how many nodes, which are not sound, and its blocks as address and order."""

    def __init__(self, root):
        self.seen, self.broken, self.blocks = set(), [], []
        self.node(root, TOP, 0)

    def node(self, phys, level, first):
        try:
            if phys % PAGE or phys in self.seen:
                raise ValueError
            words = struct.unpack(f"={PAGE // 8}Q", prog.read(phys, PAGE, physical=True))
        except (ValueError, LookupError, OverflowError):
            self.broken.append(phys)
            return
        self.seen.add(phys)
        for index, word in enumerate(words):
            if word and level:
                shift = LEAF_BITS + TABLE_BITS * (level - 1)
                self.node(word, level - 1, first | index << shift)
            for bit in range(64) if word and not level else ():
                if word >> bit & 1:
                    self.block(first | index << 6 | bit)

    def block(self, key):
        if key:
            order = 64 - SHIFT - (key.bit_length() - 1)
            self.blocks.append(((key ^ 1 << key.bit_length() - 1) << order + SHIFT, order))


fdt, physical = outgoing_fdt()
if not fdt:
    sys.exit("this kernel preserves nothing: kho=on?")
walk = Walk(root_of(fdt, physical))
pages = sum(1 << order for _, order in walk.blocks)
print(f"FDT {fdt:#x}, {len(walk.seen)} nodes, {len(walk.broken)} not sound, {pages} pages")
for order in sorted({order for _, order in walk.blocks}):
    print(f"order {order:3} {sum(order == it for _, it in walk.blocks)} blocks")
start = end = 0
for phys, order in sorted(walk.blocks) + [(1 << 64, 0)] if "--ranges" in sys.argv else []:
    if phys > end:
        if end:
            print(f"range     {start:#x}-{end:#x}")
        start = phys
    end = max(end, phys + (PAGE << order))
