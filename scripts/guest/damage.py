# SPDX-License-Identifier: GPL-2.0
"""Damage to a handover, done from outside in the memory of a guest; and what the rules make of it.

KINDS and AREAS are the kinds of damage.  A model of the rules, which shares no code with the kernel,
says what of a damaged tree is taken over, lost or kept.
"""
import os
import random
import struct
from dataclasses import dataclass
from itertools import chain

import libfdt

PAGE = 4096


class Ram:
    """A guest's memory by physical address, of which the file has no hole below 4 GiB."""

    def __init__(self, path, size, scratch=(), spare=()):
        self.file = os.open(path, os.O_RDWR)
        self.size, self.low = size, size if size < 0xe0000000 else 3 << 30
        # Where scratch is, in frames, and addresses of empty pages that nobody will miss.
        self.scratch = scratch
        self.spare = (pfn << 12 for pfn in spare if not self.in_scratch(pfn))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        os.close(self.file)

    def _offset(self, at):
        return at if at < self.low else at - (4 << 30) + self.low

    def read(self, at, size=PAGE):
        return os.pread(self.file, size, self._offset(at))

    def write(self, at, content):
        os.pwrite(self.file, content, self._offset(at))

    def word(self, at):
        return struct.unpack("=Q", self.read(at, 8))[0]

    def set_word(self, at, value):
        self.write(at, struct.pack("=Q", value))

    def table(self, at):
        return struct.unpack("=512Q", self.read(at))

    def in_scratch(self, pfn):
        return any(start <= pfn < end for start, end in self.scratch)

    def ends(self):
        """The frames behind which RAM ends."""
        return self.low >> 12, (self.size + (4 << 30) - self.low >> 12 if self.low < self.size else 0)

    def find(self, pattern):
        """Addresses of what does not cross the border of a page."""
        at = 0
        while at < self.size:
            try:
                at = os.lseek(self.file, at, os.SEEK_DATA) & ~(PAGE - 1)
            except OSError:
                return
            part = os.pread(self.file, 1 << 20, at)
            found = part.find(pattern)
            while found >= 0:
                yield at + found + ((4 << 30) - self.low if at + found >= self.low else 0)
                found = part.find(pattern, found + 1)
            at += len(part)

    def root_fdts(self):
        """Addresses of the pages that hold a root FDT of KHO."""
        return [at for at in self.find(b"\xd0\x0d\xfe\xed") if not at % PAGE and b"kho-v4\0" in self.read(at)]


# The tree.

def shift_of(level):
    """How many bits of a key tell what is below an entry of a table."""
    return 15 + 9 * (level - 1)


def key_of(pfn, order):
    return 1 << 52 - order | pfn >> order


def block_of(key):
    order = 53 - key.bit_length()
    return (key ^ 1 << 52 - order) << order, order


def bits_of(page):
    bits = int.from_bytes(page, "little")
    while bits:
        yield (bits & -bits).bit_length() - 1
        bits &= bits - 1


def fdt_nodes(tree):
    """The subtrees and their properties, and the root's as "/": {name: {property: bytes}}."""
    nodes, node, name = {}, 0, "/"
    while node >= 0:
        at, nodes[name] = tree.first_property_offset(node, libfdt.QUIET_NOTFOUND), {}
        while at >= 0:
            found = tree.get_property_by_offset(at)
            nodes[name][found.name] = bytes(found)
            at = tree.next_property_offset(at, libfdt.QUIET_NOTFOUND)
        node = tree.next_subnode(node, libfdt.QUIET_NOTFOUND) if node else \
            tree.first_subnode(0, libfdt.QUIET_NOTFOUND)
        name = tree.get_name(node) if node >= 0 else ""
    return nodes


class Handover:
    """What one kernel leaves to the next: ram holds it, its root FDT is at fdt."""

    def __init__(self, ram, fdt, ours=(), regions=()):
        """ours: frames of the session; regions: of RAM, the first frame and the one after the last."""
        self.ram, self.fdt, self.ours, self.regions = ram, fdt, ours, regions

    # The FDT.

    def nodes(self):
        return fdt_nodes(libfdt.FdtRo(self.ram.read(self.fdt)))

    def edit(self, change):
        """Writes the FDT anew after change(tree)."""
        tree = libfdt.Fdt(self.ram.read(self.fdt))
        tree.resize(PAGE)
        change(tree)
        tree.pack()
        self.ram.write(self.fdt, bytes(tree.as_bytearray()))

    def patch(self, old, new):
        """Changes the first such bytes of the FDT."""
        self.ram.write(self.fdt + self.ram.read(self.fdt).index(old), new)

    def add_subtree(self, name, address, size):
        def change(tree):
            node = tree.add_subnode(0, name)
            for of, value in ("preserved-data", address), ("blob-size", size):
                tree.setprop(node, of, struct.pack("=Q", value))
        self.edit(change)

    def blob(self, name):
        """Address and size of a subtree's blob, None for what is not 8 bytes."""
        values = (self.nodes()[name].get(of, b"") for of in ("preserved-data", "blob-size"))
        return [struct.unpack("=Q", value)[0] if len(value) == 8 else None for value in values]

    def blob_page(self, name):
        return self.blob(name)[0] >> 12

    # The tree.

    def root_at(self):
        """Where the address of the root node is."""
        return self.fdt + self.ram.read(self.fdt).index(self.nodes()["/"]["preserved-memory-map"])

    def root(self):
        return self.ram.word(self.root_at())

    def way(self, key):
        """Addresses of the pointers on the way to a key's leaf, the root's first; makes missing nodes."""
        at = self.root_at()
        yield at
        for level in range(5, 0, -1):
            at = self.ram.word(at) + 8 * (key >> shift_of(level) & 511)
            yield at
            if not self.ram.word(at):
                node = next(self.ram.spare)
                self.ram.write(node, bytes(PAGE))
                self.ram.set_word(at, node)

    def flip(self, pfn, order=0):
        """Adds or removes a block."""
        key = key_of(pfn, order)
        *_, entry = self.way(key)
        at = self.ram.word(entry) + (key & 0x7fff) // 8
        self.ram.write(at, bytes([self.ram.read(at, 1)[0] ^ 1 << key % 8]))

    def leaves(self):
        """Where each leaf is, by the first key that it has room for."""
        def below(node, level, first):
            if level == 0:
                yield first, node
                return
            for index, entry in enumerate(self.ram.table(node)):
                if entry:
                    yield from below(entry, level - 1, first | index << shift_of(level))
        return dict(below(self.root(), 5, 0))

    def blocks(self):
        """The preserved blocks: frame number and order of each."""
        for first, leaf in self.leaves().items():
            for bit in bits_of(self.ram.read(leaf)):
                yield block_of(first | bit)

    def frames(self):
        """The frames of all blocks."""
        return {pfn + i for pfn, order in self.blocks() for i in range(1 << order)}

    def block_of(self, pfn):
        return next(block for block in self.blocks() if pfn - block[0] in range(1 << block[1]))

    def largest(self):
        """The largest block of the session."""
        return max((block for block in self.blocks() if block[0] in self.ours), key=lambda block: block[1])

    def edge(self):
        """The first frame of a scratch area with RAM below it."""
        return self.ram.scratch[0][0]

    # What the image has: where the FDT is and how long it is, and the table of scratch areas.

    def image_at(self):
        return [at + 8 for at in self.ram.find(struct.pack("=IIQQ", 10, 32, self.fdt, PAGE))]

    def set_image(self, index, value):
        """Changes the FDT's address or size, or the table's."""
        for at in self.image_at():
            self.ram.set_word(at + 8 * index, value)

    def set_areas(self, change):
        """Has the table of scratch areas be what change(areas) makes of (start, size)."""
        areas = [(start << 12, end - start << 12) for start, end in self.ram.scratch]
        changed = change(areas)
        table = b"".join(struct.pack("=QQ", *area) for area in areas)
        # The image has it in a page by itself; what is behind the kernel's own one is others'.
        for at in [at for at in self.ram.find(table) if self.ram.read(at & -PAGE) == table.ljust(PAGE, b"\0")]:
            self.ram.write(at, b"".join(struct.pack("=QQ", *area) for area in changed))
        self.set_image(3, 16 * len(changed))
        self.ram.scratch = [(start >> 12, start + size >> 12) for start, size in changed if size]


# The model.

NODE, REACH = "tree node outside usable memory, or met twice", "tree node covers no existing memory"
NOT_KEPT = "the FDT is not preserved"


class Model:
    """What becomes of a handover with a root FDT that can be read."""

    def __init__(self, handover, regions):
        self.ram, self.end = handover.ram, max(end for _, end in regions)
        self.refused, self.nodes, self.blocks, self.lost, self.twice = None, set(), [], [], False
        self.frames, self.usable, self.read = set(), set(), 0
        for start, end in regions:
            self.usable.update(pfn for pfn in range(start, end) if not self.ram.in_scratch(pfn))
        # The keys of blocks that are below the end of RAM, by order.
        self.known = [(1 << 52 - order, (1 << 52 - order) + (self.end >> order))
                      for order in range(self.end.bit_length())]
        self.visit(handover.root(), 5, 0)
        self.kept = set()
        for pfn, order in self.lost:
            if 1 << order <= self.end // 2:
                self.kept |= set(range(pfn, min(pfn + (1 << order), self.end))) & self.usable
        self.kept -= self.frames
        self.ignored = set()
        size = struct.unpack(">I", self.ram.read(handover.fdt + 4, 4))[0]
        if not self.covers(handover.fdt, size):
            self.refuse(NOT_KEPT, handover.fdt)
        if not self.refused:
            self.ignored = {name for name in handover.nodes() if name != "/" and not self.covers(*handover.blob(name))}

    def covers(self, start, size):
        """Whether a blob has an address and a size, and all of it was preserved."""
        if not start or not size or start + size > 1 << 64 or size > len(self.frames) << 12:
            return False
        return all(pfn in self.frames for pfn in range(start >> 12, (start + size - 1 >> 12) + 1))

    def refuse(self, why, address):
        self.refused = self.refused or (why, address)

    def visit(self, node, level, first):
        if node % PAGE or node >> 12 not in self.usable or node in self.nodes:
            return self.refuse(NODE, node)
        self.nodes.add(node)
        last = first + (1 << shift_of(level + 1)) - 1
        if not any(low <= last and first < high for low, high in self.known):
            return self.refuse(REACH, node)
        self.read += 1
        if level:
            for index, entry in enumerate(self.ram.table(node)):
                if entry:
                    self.visit(entry, level - 1, first | index << shift_of(level))
            return None
        for bit in bits_of(self.ram.read(node)):
            if first | bit:
                self.block(*block_of(first | bit))
        return None

    def block(self, pfn, order):
        frames = set(range(pfn, pfn + (1 << order))) if pfn + (1 << order) <= self.end else {-1}
        if not frames <= self.usable:
            return self.lost.append((pfn, order))
        self.twice |= not self.frames.isdisjoint(frames)
        self.frames |= frames
        return self.blocks.append((pfn, order))


# Kinds of damage.

@dataclass
class Kind:
    """What is done to a handover, and what the rules say that it costs.

    damage: a function of the handover.
    refused: why the handover is refused; of the tree, also what of it can still be read is kept.
    early: it is refused before the tree is looked at, and nothing is kept.
    lost, ignored, twice: blocks and subtrees that are lost; whether blocks overlap.
    said: other lines in the log.
    luo: "back", or what becomes of its session: "gone", or "off", if it could not bear the loss.
    quick: it is part of "make test" as well.
    """
    damage: object
    refused: str = ""
    early: bool = False
    lost: int = 0
    ignored: tuple = ()
    twice: bool = False
    said: tuple = ()
    luo: str = "back"
    quick: bool = False


KINDS = {}


def kinds(**same):
    """Adds kinds that have something in common: name=(damage, what differs)."""
    def add(rows):
        for name, damage, *more in rows:
            KINDS[name] = Kind(damage, **dict(chain(same.items(), *(each.items() for each in more))))
    return add


QUICK = {"quick": True}


def header(field, value):
    """Changes a field of the FDT's header."""
    fields = ("magic", "totalsize", "off_dt_struct", "off_dt_strings", "off_mem_rsvmap", "version",
              "last_comp_version", "boot_cpuid_phys", "size_dt_strings", "size_dt_struct")
    return lambda at: at.ram.write(at.fdt + 4 * fields.index(field), struct.pack(">I", value))


def patch(old, new):
    return lambda at: at.patch(old, new)


def prop(name, value, node="/"):
    """Sets a property, or takes it away."""
    def change(tree):
        offset = tree.path_offset(node if node == "/" else "/" + node)
        tree.setprop(offset, name, value) if value is not None else tree.delprop(offset, name)
    return lambda at: at.edit(change)


def prop_len(name, length, node="/"):
    """Changes what the FDT says of the length of a property's value."""
    def damage(at):
        value = at.nodes()[node][name]
        where = at.ram.read(at.fdt).index(struct.pack(">I", 3) + struct.pack(">I", len(value)))
        while at.ram.read(at.fdt + where + 12, len(value)) != value:
            where = at.ram.read(at.fdt).index(struct.pack(">II", 3, len(value)), where + 4)
        at.ram.write(at.fdt + where + 4, struct.pack(">I", length))
    return damage


def struct_word(index, value):
    """Changes a word of the FDT's structure; its last one is the end."""
    def damage(at):
        offset, size = (struct.unpack(">I", at.ram.read(at.fdt + of, 4))[0] for of in (8, 36))
        at.ram.write(at.fdt + offset + (4 * index) % size, struct.pack(">I", value))
    return damage


kinds(refused="no FDT is there", early=True)([
    ("fdt-magic", header("magic", 0xd00dfeee), QUICK),
    ("fdt-unfinished", header("magic", 0x2ff20112)),
    ("fdt-zeroes", lambda at: at.ram.write(at.fdt, bytes(PAGE))),
])
kinds(refused="the FDT does not have the size that was handed over", early=True)([
    (f"fdt-totalsize-{size:#x}", header("totalsize", size), {"quick": size == 4097})
    for size in (0, 39, 4097, 0x7fffffff, 0xffffffff)])
kinds(refused="the FDT is broken", early=True)([
    ("fdt-cut", header("totalsize", 64), QUICK),
    *((f"fdt-{field}-{value:#x}", header(field, value)) for field, value in (
        ("off_dt_struct", 0), ("off_dt_struct", 0x3a), ("off_dt_struct", 0xfffffff0),
        ("off_dt_strings", 0), ("off_dt_strings", 0xfffffff0),
        ("off_mem_rsvmap", 0), ("off_mem_rsvmap", 0x2c), ("off_mem_rsvmap", 0xfffffff8),
        ("version", 0), ("version", 15), ("last_comp_version", 18),
        ("size_dt_struct", 0xfffffffc), ("size_dt_strings", 0xffffffff))),
])
kinds(refused="the FDT is not compatible with kho-v4", early=True)([
    ("fdt-size_dt_struct-0", header("size_dt_struct", 0)),
    ("fdt-size_dt_strings-0", header("size_dt_strings", 0)),
    ("fdt-structure", struct_word(0, 9)),
    ("compatible-other", patch(b"kho-v4", b"kho-v9"), QUICK),
    ("compatible-empty", prop("compatible", b"")),
    ("compatible-missing", prop("compatible", None)),
    ("compatible-name", patch(b"compatible", b"compatable")),
    ("compatible-too-long", prop_len("compatible", 0x7ffffff0)),
])
kinds(refused="the FDT has no valid preserved-memory-map", early=True)([
    ("map-name", patch(b"preserved-memory-map", b"preserved-memory-mop"), QUICK),
    ("map-missing", prop("preserved-memory-map", None)),
    ("map-empty", prop("preserved-memory-map", b"")),
    ("map-4-bytes", prop("preserved-memory-map", bytes(4))),
    ("map-16-bytes", prop("preserved-memory-map", bytes(16))),
    ("map-too-long", prop_len("preserved-memory-map", 0xfffffff0)),
    ("map-zero", prop("preserved-memory-map", bytes(8))),
    ("map-unaligned", prop("preserved-memory-map", struct.pack("=Q", 0x1000001)), QUICK),
])
kinds()([
    ("fdt-boot_cpuid", header("boot_cpuid_phys", 0xffffffff)),
    ("fdt-version-16", lambda at: (header("version", 16)(at), header("last_comp_version", 16)(at))),
    ("fdt-no-end", struct_word(-1, 4)),
    ("compatible-list", prop("compatible", b"kho-v3\0kho-v4\0")),
    # The FDT fills up with zeroes.
    ("compatible-open", prop("compatible", b"kho-v4")),
    ("fdt-below-a-subtree", lambda at: at.edit(lambda tree: tree.add_subnode(tree.subnode_offset(0, "LUO"), "LUO"))),
])


# Pointers: to each level on the way to the FDT's own block, into every kind of memory.

def point(level, to):
    """Has the pointer to a node lead to what to(handover, pointers, index) says."""
    def damage(at):
        pointers = list(at.way(key_of(at.fdt >> 12, 0)))
        at.ram.set_word(pointers[5 - level], to(at, pointers, 5 - level))
    return damage


def copy_of(level):
    """A page with the content of a node."""
    def to(at, pointers, index):
        page = next(at.ram.spare)
        at.ram.write(page, at.ram.read(at.ram.word(pointers[5 - level])))
        return page
    return to


TARGETS = {
    "beyond": lambda at, pointers, index: 1 << 45,
    "widest": lambda at, pointers, index: (1 << 64) - PAGE,
    "behind": lambda at, pointers, index: at.ram.size,
    "unaligned": lambda at, pointers, index: at.ram.word(pointers[index]) + 8,
    "scratch": lambda at, pointers, index: at.edge() + 16 << 12,
    "reserved": lambda at, pointers, index: 0xf0000,
    "hole": lambda at, pointers, index: 0xa0000,
    # These make a cycle, or have a node below two others.
    "itself": lambda at, pointers, index: pointers[index] & -PAGE,
    "root": lambda at, pointers, index: at.root(),
    "shared": lambda at, pointers, index: at.ram.word(list(at.way(key_of(*at.largest())))[index]),
}
# What is there may look like nodes: the model says what comes of it.
ODD_TARGETS = {
    "kernel": lambda at, pointers, index: next(at.ram.find(b"Linux version ")) & -PAGE,
    "initrd": lambda at, pointers, index: next(at.ram.find(b"0707010")) & -PAGE,
    "fdt": lambda at, pointers, index: at.fdt,
    "data": lambda at, pointers, index: at.ours[0] << 12,
    "zeroes": lambda at, pointers, index: next(at.ram.spare),
    "leaf": copy_of(0),
    "table": copy_of(1),
}
QUICK_POINTERS = ("5-beyond", "5-scratch", "4-itself", "3-shared", "2-behind", "1-reserved", "0-unaligned",
                  "1-leaf", "0-kernel")


def pointers(targets, **same):
    kinds(**same)([
        (f"pointer-{level}-{name}", point(level, to), {"quick": f"{level}-{name}" in QUICK_POINTERS})
        for name, to in targets.items() for level in range(5, -1, -1)
        if level < 5 or name not in ("itself", "root", "shared")])


def move(index, keep=0):
    """Moves the last entry of the root node, so that other keys lead to what is below."""
    def damage(at):
        used = max(i for i, entry in enumerate(at.ram.table(at.root())) if entry)
        entry = at.ram.word(at.root() + 8 * used)
        at.ram.set_word(at.root() + 8 * index, entry)
        at.ram.set_word(at.root() + 8 * used, keep * entry)
    return damage


pointers(TARGETS, refused=NODE)
pointers(ODD_TARGETS, refused=".*", luo="off")
kinds()([
    # What was an address now says the order.
    ("root-orders", move(0), {"refused": f"{NODE}|{REACH}|{NOT_KEPT}", **QUICK}),
    ("root-key-too-wide", move(511), {"refused": REACH}),
    ("root-node-twice", move(1, keep=1), {"refused": f"{NODE}|{REACH}"}),
    ("root-zeroes", lambda at: at.ram.write(at.root(), bytes(PAGE)), {"refused": NOT_KEPT}),
    ("root-ones", lambda at: at.ram.write(at.root(), b"\xff" * PAGE), {"refused": NODE}),
])

# Blocks.

def block(pfn, order=0):
    """Adds a block, or takes it away; pfn may be a function."""
    return lambda at: at.flip(pfn(at) if callable(pfn) else pfn, order)


def end_of_ram(at):
    return (at.ram.size >> 12) - 0x20


def behind(order):
    """The first block that is wholly behind the end of RAM."""
    return lambda at: end_of_ram(at) + (1 << order) - 1 >> order << order


def straddling(border):
    """Adds a block that has a border of scratch in it."""
    def damage(at):
        edge = at.ram.scratch[0][border]
        order = next(order for order in range(1, 17) if edge % (1 << order))
        at.flip(edge >> order << order, order)
    return damage


def free(order):
    """A block of RAM that nobody preserved."""
    def pfn(at):
        held = at.frames()
        return next(pfn for pfn in range(1 << max(order, 12), end_of_ram(at), 1 << order)
                    if pfn + (1 << order) <= end_of_ram(at) and not any(
                        i in held or at.ram.in_scratch(i) for i in range(pfn, pfn + (1 << order))))
    return pfn


def over_data(at):
    """A block of 4 MiB around a page of the session; scratch has no border in such a block."""
    blocks = set(at.blocks())
    return next(pfn >> 10 << 10 for pfn in at.ours
                if pfn >> 10 and not at.ram.in_scratch(pfn) and (pfn >> 10 << 10, 10) not in blocks)


def around(address, order):
    """Adds the block of an order around an address."""
    return lambda at: at.flip(address(at) >> 12 >> order << order, order)


kinds(lost=1)([
    ("block-in-scratch", block(lambda at: at.edge() + 8), QUICK),
    ("block-in-scratch-large", block(lambda at: at.edge() + 1023 & ~1023, 10)),
    ("block-of-scratch-start", straddling(0), QUICK),
    ("block-of-scratch-end", straddling(1)),
    ("block-first-page", block(0)),
    ("block-cut-page", block(0x9f)),
    ("block-hole", block(0xa0), QUICK),
    ("block-reserved", block(0xf0, 4)),
    ("block-first-megabyte", block(0, 8)),
    *((f"block-behind-{order}", block(behind(order), order), {"quick": order in (0, 5, 16)})
      for order in range(17)),
    # Firmware has the last 32 pages.
    *((f"block-end-{order}", block(lambda at, order=order: end_of_ram(at) >> order << order, order))
      for order in range(6, 17)),
])
kinds(refused=REACH)([
    *((f"block-order-{order}", block(0, order)) for order in (17, 18, 31, 37, 38, 39, 51, 52)),
    ("block-next-leaf", block(1 << 17)),
    ("block-far", block(1 << 30), QUICK),
    ("block-farthest", block((1 << 52) - 1)),
])
kinds()([
    *((f"block-free-{order}", block(free(order), order)) for order in range(13)),
    ("block-low", block(0x10)),
    ("block-node", block(lambda at: at.root() >> 12), QUICK),
    ("block-nodes", lambda at: [at.flip(node >> 12) for node in at.leaves().values()]),
    # The last page of a block: the first one is where its owner's mark goes.
    ("block-in-block", lambda at: at.flip(at.largest()[0] + (1 << at.largest()[1]) - 1), {"twice": True, **QUICK}),
    ("block-in-pieces", lambda at: [at.flip(pfn + i) for pfn, order in [at.largest()] for i in range(1 << order)],
     {"twice": True}),
    ("block-halves", lambda at: [at.flip(pfn + i, order - 1) for pfn, order in [at.largest()]
                                 for i in (0, 1 << order - 1)], {"twice": True}),
    ("block-nested", lambda at: [around(lambda at: spare, order)(at) for spare in [next(at.ram.spare)]
                                 for order in range(4)], {"twice": True}),
    ("block-of-fdt", around(lambda at: at.fdt, 1), {"twice": True}),
    ("block-over-data", block(over_data, 10), {"twice": True, "luo": "off"}),
    ("fdt-given-up", block(lambda at: at.fdt >> 12), {"refused": NOT_KEPT, **QUICK}),
    ("metadata-given-up", block(lambda at: at.blob_page("kexec-metadata")), {"ignored": ("kexec-metadata",)}),
    ("luo-given-up", block(lambda at: at.blob_page("LUO")), {"ignored": ("LUO",), "luo": "gone"}),
    ("data-given-up", lambda at: at.flip(*at.block_of(at.ours[-1])),
     {"said": ("KHO: nothing to restore: not preserved",), "luo": "gone"}),
])

# Subtrees and their blobs.

def blob(name, address, size=64, **more):
    """Adds a subtree; address may be a function."""
    def damage(at):
        at.add_subtree(name, address(at) if callable(address) else address, size)
        for of, value in more.items():
            prop(of.replace("_", "-"), value, name)(at)
    return damage


def ours(offset=0):
    """The address of a preserved page that has none behind it."""
    def address(at):
        held = at.frames()
        return (next(pfn for pfn in at.ours if pfn + 1 not in held) << 12) + offset
    return address


kinds()([(f"blob-{name}", blob(name, *args, **more), {"ignored": (name,)}, *quick) for name, args, more, *quick in (
    ("empty", (ours(), 0), {}, QUICK), ("nowhere", (1 << 45,), {}, QUICK), ("zero", (0,), {}, QUICK),
    ("wrapping", ((1 << 64) - PAGE, 8192), {}, QUICK), ("widest", ((1 << 64) - 64,), {}),
    ("endless", (ours(), (1 << 64) - 1), {}), ("huge", (ours(), 1 << 63), {}),
    ("free", (lambda at: next(at.ram.spare),), {}, QUICK), ("scratch", (lambda at: at.edge() + 8 << 12,), {}, QUICK),
    ("node", (lambda at: at.root(),), {}), ("behind", (lambda at: at.ram.size,), {}),
    ("partly", (ours(), PAGE + 1), {}, QUICK), ("cut", (ours(4000), 97), {}, QUICK), ("one-byte", (ours(4095), 2), {}),
    ("no-address", (ours(),), {"preserved_data": None}, QUICK), ("no-size", (ours(),), {"blob_size": None}, QUICK),
    ("address-4-bytes", (ours(),), {"preserved_data": bytes(4)}), ("size-16-bytes", (ours(),), {"blob_size": bytes(16)}),
)])


def named(name, address=ours()):
    """Adds a subtree with a name that libfdt would not write."""
    def damage(at):
        other = "~" * max(len(name), 1)
        at.add_subtree(other, address(at), 64)
        at.patch(other.encode(), name or b"\0")
    return damage


NOT_SHOWN = {"said": ("KHO: failed to add blob",)}
kinds()([
    ("blob-good", blob("good", ours(96), 4000), QUICK),
    # The first one counts.
    ("name-twice", named(b"kexec-metadata"),
     {"said": (*NOT_SHOWN["said"], r"KHO: kexec-metadata version \d+ not supported")}),
    ("name-up", named(b"../.."), NOT_SHOWN),
    ("name-path", named(b"LUO/data"), NOT_SHOWN),
    ("name-empty", named(b""), NOT_SHOWN),
    ("name-long", named(b"." * 300), NOT_SHOWN),
    ("name-bytes", named(b"\xff\xfe"), {}),
    ("name-bytes-bad", named(b"\xff\xfe", lambda at: 0), {"ignored": ("?",)}),
    ("name-of-luo", patch(b"LUO\0", b"LUX\0"), {"luo": "gone", **QUICK}),
    ("name-of-metadata", patch(b"kexec-metadata\0", b"kexec-metadate\0")),
])

# What the last kernel says of itself.

def metadata(content, at=0):
    return lambda handover: handover.ram.write(handover.blob("kexec-metadata")[0] + at, content)


def metadata_size(size):
    return prop("blob-size", struct.pack("=Q", size), "kexec-metadata")


kinds()([
    *((f"metadata-version-{version}", metadata(struct.pack("=I", version)),
       {"said": (f"KHO: kexec-metadata version {version} not supported",), "quick": version == 2})
      for version in (0, 2, 0xffffffff)),
    *((f"metadata-size-{size}", metadata_size(size),
       {"said": (f"KHO: kexec-metadata blob too small: {size} bytes",)}) for size in (1, 3, 4, 72)),
    ("metadata-size-page", metadata_size(PAGE)),
    ("metadata-size-pages", metadata_size(1 << 40), {"ignored": ("kexec-metadata",)}),
    ("metadata-open", metadata(b"x" * 65, at=4)),
    ("metadata-bytes", metadata(b"\xff\xfe\0", at=4)),
    ("metadata-count", metadata(b"\xff" * 4, at=69)),
])

# What the image has for the next kernel.  With KASLR the decompressor reads it, too, and trusts it.

def image(index, value):
    def damage(at):
        old = at.ram.word(at.image_at()[0] + 8 * index)
        at.set_image(index, value(old) if callable(value) else value)
    return damage


def areas(change):
    return lambda at: at.set_areas(lambda old: change(at, old))


def area_over(page):
    """One more area, of a page."""
    return areas(lambda at, old: [*old, (page(at), PAGE)])


def half_of_memory(at, old):
    """The half of memory that has the root node."""
    start = at.root() >> 28 << 28
    return [(max(start, 1 << 20), min(start + (1 << 28), end_of_ram(at) << 12) - max(start, 1 << 20))]


def fdt_moved(at):
    new = next(at.ram.spare)
    at.ram.write(new, at.ram.read(at.fdt))
    at.set_image(0, new)
    at.fdt = new


def area_with_block(at):
    page = next(at.ram.spare)
    at.flip(page >> 12)
    area_over(lambda at: page)(at)


kinds(early=True)([
    (f"image-{name}", image(index, value), {"refused": refused, "quick": name in ("fdt-unaligned", "table-size-17")})
    for name, index, value, refused in (
        ("fdt-zero", 0, 0, "no FDT is there"),
        ("fdt-unaligned", 0, lambda old: old + 8, "no FDT is there"),
        ("fdt-hole", 0, 0xa0000, "the FDT cannot be mapped"),
        ("fdt-beyond", 0, 1 << 45, "the FDT cannot be mapped"),
        ("fdt-wrapping", 0, (1 << 64) - 8, "the FDT cannot be mapped"),
        ("fdt-size-0", 1, 0, "the FDT cannot be mapped"),
        ("fdt-size-7", 1, 7, "the FDT does not have the size that was handed over"),
        ("fdt-size-64", 1, 64, "the FDT does not have the size that was handed over"),
        ("fdt-size-large", 1, (128 << 10) + 1, "the FDT cannot be mapped"),
        ("fdt-size-huge", 1, 1 << 63, "the FDT cannot be mapped"),
        ("table-unaligned", 2, lambda old: old + 4, "the table of scratch areas has a bad size or place"),
        ("table-beyond", 2, 1 << 45, "the table of scratch areas cannot be mapped"),
        ("table-hole", 2, 0xa0000, "the table of scratch areas cannot be mapped"),
        ("table-size-0", 3, 0, "the table of scratch areas cannot be mapped"),
        ("table-size-17", 3, 17, "the table of scratch areas has a bad size or place"),
        ("table-size-large", 3, (128 << 10) + 16, "the table of scratch areas cannot be mapped"),
        ("table-size-huge", 3, 1 << 60, "the table of scratch areas cannot be mapped"),
    )])
kinds(refused="a scratch area is not made of pages", early=True)([
    ("area-unaligned", areas(lambda at, old: [(start + 8, size) for start, size in old]), QUICK),
    ("area-odd-size", areas(lambda at, old: [(start, size + 1) for start, size in old])),
    ("area-wrapping", areas(lambda at, old: [*old, ((1 << 64) - PAGE, 2 * PAGE)])),
    ("area-endless", areas(lambda at, old: [(start, (1 << 64) - PAGE) for start, size in old])),
])
kinds()([
    ("image-fdt-moved", fdt_moved, {"refused": NOT_KEPT}),
    ("area-none", areas(lambda at, old: [(0, 0) for _ in old]),
     {"refused": "there is no scratch area", "early": True, **QUICK}),
    ("area-empty", areas(lambda at, old: [(0, 0), *old, (1 << 45, 0)])),
    ("area-many", areas(lambda at, old: [*old, *[(0, 0)] * 250])),
    ("area-halves", areas(lambda at, old: [(start + size // 2 * i, size // 2) for start, size in old for i in (1, 0)])),
    ("area-pieces", areas(lambda at, old: [(old[0][0] + 2 * PAGE * i, PAGE) for i in range(250)]),
     {"refused": "memblock does not take a scratch area", "early": True, **QUICK}),
    ("area-twice", areas(lambda at, old: [*old, *old])),
    ("area-overlap", areas(lambda at, old: [*old, *((start, size // 2) for start, size in old)])),
    ("area-of-fdt", area_over(lambda at: at.fdt), {"refused": NOT_KEPT}),
    ("area-of-node", area_over(lambda at: at.root()), {"refused": NODE}),
    ("area-of-half", areas(half_of_memory), {"refused": NODE}),
    # Only this one leaves a kernel no memory of its own.
    ("area-of-all", areas(lambda at, old: [(1 << 20, (end_of_ram(at) - 512 << 12))]),
     {"refused": NODE, "said": ("KHO: scratch areas given up: ",), **QUICK}),
    ("area-of-block", area_with_block, {"lost": 1}),
    ("area-beyond", areas(lambda at, old: [*old, (1 << 40, 1 << 24)]), {"refused": "a scratch area is not RAM", "early": True}),
    ("area-behind", areas(lambda at, old: [*old, (end_of_ram(at) << 12, 1 << 16)]),
     {"refused": "a scratch area is not RAM", "early": True, **QUICK}),
    ("area-hole", areas(lambda at, old: [*old, (0xa0000, 0x40000)]),
     {"refused": "a scratch area is not RAM", "early": True}),
])


def flip_bits(seed):
    """Flips some bits of the tree's nodes."""
    def damage(at):
        rng = random.Random(seed)
        seen = Model(at, at.regions).nodes
        for _ in range(rng.choice((1, 1, 2, 8))):
            where = rng.choice(sorted(seen)) + rng.randrange(PAGE)
            at.ram.write(where, bytes([at.ram.read(where, 1)[0] ^ 1 << rng.randrange(8)]))
    return Kind(damage, refused=".*", luo="off")


# Lists of the pages of vmalloc areas, of which kunit/handover.c hands over one for each kind here.
# There are chunks of 511 entries, one more and 7 entries; each word of a page has its own address.

STATE, FIRST_AREA = "kho-kunit", 48


@dataclass
class Area:
    """struct kho_vmalloc, and what it leads to."""
    at: Handover
    where: int

    def set(self, **values):
        offsets = {"first": (0, "=Q"), "total": (8, "=I"), "flags": (12, "=H"), "order": (14, "=H")}
        for name, value in values.items():
            offset, size = offsets[name]
            self.at.ram.write(self.where + offset, struct.pack(size, value))

    def chunks(self):
        chunks = [self.at.ram.word(self.where)]
        while following := self.at.ram.word(chunks[-1]):
            chunks.append(following)
        return chunks

    def link(self, chunk, to):
        """Has a chunk be followed by another one: by number, or the address."""
        chunks = self.chunks()
        self.at.ram.set_word(chunks[chunk], chunks[to] if to < len(chunks) else to)

    def entry(self, chunk, index):
        return self.chunks()[chunk] + 8 + 8 * index

    def put(self, value, chunk=0, index=5):
        """Changes an entry to value(what it is)."""
        at = self.entry(chunk, index)
        self.at.ram.set_word(at, value(self.at.ram.word(at)) if callable(value) else value)


def area_of(at, number):
    return Area(at, at.blob(STATE)[0] + FIRST_AREA + 16 * number)


def spare_chunk(it):
    """A chunk that was not preserved."""
    page = next(it.at.ram.spare)
    it.at.ram.write(page, it.at.ram.read(it.chunks()[0]))
    return page


# What is done to an area, and whether it comes back.
AREAS = {
    "sound": (lambda it: None, True),
    "total-more": (lambda it: it.set(total=1030), False),
    "total-less": (lambda it: it.set(total=1028), False),
    "total-zero": (lambda it: it.set(total=0), False),
    "total-huge": (lambda it: it.set(total=0xffffffff), False),
    "order-1": (lambda it: it.set(order=1), False),
    "order-too-large": (lambda it: it.set(order=11), False),
    "order-huge": (lambda it: it.set(order=0xffff), False),
    "flags": (lambda it: it.set(flags=0xfffd), True),
    "first-none": (lambda it: it.set(first=0), False),
    "first-unaligned": (lambda it: it.set(first=it.chunks()[0] + 8), False),
    "first-beyond": (lambda it: it.set(first=1 << 45), False),
    "first-in-scratch": (lambda it: it.set(first=it.at.edge() + 8 << 12), False),
    "first-not-preserved": (lambda it: it.set(first=spare_chunk(it)), False),
    "first-is-data": (lambda it: it.set(first=it.at.ram.word(it.entry(0, 0))), False),
    "chunk-after-itself": (lambda it: it.link(1, 1), False),
    "chunks-in-a-circle": (lambda it: it.link(2, 0), False),
    "chunk-left-out": (lambda it: it.link(0, 2), False),
    "chunk-of-another": (lambda it: it.link(2, area_of(it.at, 0).chunks()[2]), False),
    "chunk-not-preserved": (lambda it: it.link(2, spare_chunk(it)), False),
    "entry-twice": (lambda it: it.put(it.at.ram.word(it.entry(1, 5))), False),
    "entry-unaligned": (lambda it: it.put(lambda old: old + 2048), False),
    "entry-beyond": (lambda it: it.put(1 << 45), False),
    "entry-in-scratch": (lambda it: it.put(it.at.edge() + 8 << 12), False),
    "entry-not-preserved": (lambda it: it.put(next(it.at.ram.spare)), False),
    "entry-of-another": (lambda it: it.put(it.at.ram.word(area_of(it.at, 0).entry(0, 0))), False),
    "entry-none": (lambda it: it.put(0), False),
    # What is behind the end.
    "entry-late": (lambda it: it.put(1 << 45, 2, 9), True),
}
