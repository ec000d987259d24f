# SPDX-License-Identifier: GPL-2.0
"""Machines and boot parameters: the ordinary handover works on each; run by scripts/test."""
import struct

import pytest

from . import qemu as g
from .qemu import spoilt
from .test_kexec import PRESERVE, R, RENEW, RETRIEVE, WHOLE, data, expect, frames, make, meddle, one_per_grain

# The emulated processor has no huge pages of 1 GiB unless it is asked for them.
GIGANTIC = [] if g.accel() == "kvm" else ["-cpu", "qemu64,+pdpe1gb"]

# Plugs in memory that only movable pages get.
PLUG = """
report step plugging in memory
for block in /sys/devices/system/memory/memory*; do
	[ "$(cat $block/state)" = online ] || echo online >$block/state || fail "$block"
done
report "$(grep -A3 'zone  Movable' /proc/zoneinfo | grep -c 'free  *[1-9]') movable zones"
"""
REPORT = 'report "{0} is $(cat {0})"\n'
REDZONE = REPORT.format("/sys/kernel/slab/kmalloc-64/red_zone")
TEXT = 'report "the kernel is at $(grep -m 1 " _text$" /proc/kallsyms)"\n'

# What a machine is, and what each of its kernels says then: what is not configured would pass
# without having been tested.  Some in make test, the rest in make test-all.
MACHINES = {
    "memoryless": ({"nodes": ("1G", 0), "smp": 2}, r"Initmem setup node 1 as memoryless"),
    "320M": ({"mem": "320M"}, r"Memory: \d+K/327[0-9]{3}K available"),
    "1G-page": ({"args": "hugepagesz=1G hugepages=1", "mem": "4G", "cpu": GIGANTIC},
                r"1\.00 GiB page size, pre-allocated 1 pages"),
}
LONG = {
    "4-nodes": ({"nodes": 4, "smp": 4}, r"Initmem setup node 3 "),
    "no-memory-on-0": ({"nodes": (0, "1G"), "smp": 2}, r"Initmem setup node 0 as memoryless"),
    "256M": ({"mem": "256M"}, r"Memory: \d+K/261[0-9]{3}K available"),
    "2M-pages": ({"args": "hugepages=100"}, r"2\.00 MiB page size, pre-allocated 100 pages"),
    "1G-pages-2-nodes": ({"args": "hugepagesz=1G hugepages=0:1,1:1", "mem": "8G", "nodes": 2, "smp": 2, "cpu": GIGANTIC},
                         r"1\.00 GiB page size, pre-allocated 2 pages"),
    "kernelcore": ({"args": "kernelcore=300M"}, r"\]   Node 0: 0x"),
    "movablecore": ({"args": "movablecore=60%", "nodes": 2}, r"\]   Node 1: 0x"),
    "movable-node": ({"args": "movable_node memhp_default_state=offline", "plug": "512M", "more": PLUG},
                     "1 movable zones"),
    "crashkernel": ({"args": "crashkernel=128M"}, "crashkernel reserved: 0x.*128 MB"),
    "init": ({"args": "init_on_alloc=1 init_on_free=1"}, "heap alloc:on, heap free:on"),
    "page-poison": ({"args": "page_poison=1 init_on_alloc=1 init_on_free=1"},
                    "mem auto-init: CONFIG_PAGE_POISONING is on"),
    "slub-debug": ({"args": "slab_debug=FZPU", "more": REDZONE}, "red_zone is 1"),
    "memmap": ({"args": "memmap=64M$0x10000000"}, r"user: \[mem 0x0*10000000-0x0*13ffffff\] .*reserved"),
    "mem": ({"args": "mem=700M"}, r"Memory: \d+K/71[0-9]{4}K available"),
    "nokaslr": ({"args": "nokaslr", "more": TEXT}, "the kernel is at ffffffff81000000"),
}
# Only where it is configured: see scripts/matrix.
RARE = {
    "memtest": ({"args": "memtest=1"}, "early_memtest: # of tests: 1"),
    "kfence": ({"args": "kfence.sample_interval=1"}, "kfence: initialized"),
}


@pytest.mark.parametrize("machine", [
    *MACHINES, *(pytest.param(name, marks=mark) for names, mark in ((LONG, pytest.mark.long), (RARE, pytest.mark.rare))
                 for name in names)])
def test_machine(log, machine):
    """R -> R -> R on other machines and with boot parameters, the data preserved anew"""
    options, says = {**MACHINES, **LONG, **RARE}[machine]
    options = dict(options)
    args, more = options.pop("args", ""), options.pop("more", "")
    options["machine"] = g.tests_machine() + options.pop("cpu", [])
    with make(log, size=8_000_001) as guest:
        done = guest.run(f"kho=on liveupdate=on {args}", [
            PRESERVE + more + "next_kernel next", RENEW + more + "next_kernel next", RETRIEVE + more], **options)
        done.expect(3)
        guest.expect_files(done, 1, 2, 3)
    done.expect_line(2, "KHO restore succeeded")
    for stage in 1, 2, 3:
        done.expect_line(stage, says)


@pytest.mark.long
def test_hugetlb_cma(log, note):
    """R -> R in 5 GiB, pages in each grain: hugetlb_cma= does not take what was handed over"""
    counts = []
    with make(log) as guest:
        done = meddle(guest, lambda at: counts.append(one_per_grain(at, range(1 << 11))), RETRIEVE, mem="5G",
                      again="hugetlb_cma=1G", machine=g.tests_machine() + GIGANTIC, timeout=300)
        guest.expect_files(done, 1, 2)
    expect(f"pages in {counts} grains", counts and min(counts) > 1000)
    note(done.expect_line(2, "hugetlb_cma: res.*failed|cma: Failed to reserve"))


@pytest.mark.long
def test_kdump(log, note):
    """R -> R -> crash kernel: the dump of the second kernel has what waits to be retrieved, and the tree"""
    size = 3_000_001
    with make(log, size=size) as guest:
        done = guest.run("kho=on liveupdate=on crashkernel=128M", [
            WHOLE + "next_kernel next", """
            report step crashing
            check kho-guest load-crash /mnt/next /mnt/initrd "$(cat /mnt/cmdline) kho_stage=3"
            umount /mnt
            exit 1
            """, """
            report step saving the dump
            cat /proc/vmcore >/mnt/vmcore || fail vmcore
            """], mem="768M", timeout=300)
        done.expect(3, ends_with="Kernel panic - not syncing: Attempted to kill init!")
        dump = (guest.share / "vmcore").read_bytes()
        content = b"".join(memory_of(dump, pfn << 12) for pfn in frames(guest))
        expect("the file in the dump differs", content[:size] == spoilt(data(size), b""))
    note(f"{len(dump) >> 20} MiB")


def memory_of(dump, at, size=4096):
    """What a core file has of memory at a physical address."""
    table, = struct.unpack_from("<Q", dump, 32)
    count, = struct.unpack_from("<H", dump, 56)
    for header in range(table, table + 56 * count, 56):
        kind, _, offset, _, start, length = struct.unpack_from("<IIQQQQ", dump, header)
        if kind == 1 and start <= at and at + size <= start + length:
            return dump[offset + at - start:offset + at - start + size]
    return b""
