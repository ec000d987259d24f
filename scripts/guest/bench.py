# SPDX-License-Identifier: GPL-2.0
"""The benchmark of kexec handover: runs guests, prints tables, draws.

  run OUT        boots every guest that is asked for; OUT/bench.jsonl has a record
                 of each, a line, and OUT/runs.jsonl when and with what that was
  table OUT      prints the tables of Documentation/rust-benchmark.rst
  plot OUT       draws it, as OUT/*.svg

Guests run under "-icount shift=0": one instruction takes one nanosecond, and
the counter that the kernel reads counts instructions.  So figures do not depend
on the host, and are the same each time.  The exception is "cpus", which is about
time.
"""
import concurrent.futures
import datetime
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import qemu as g
from .qemu import Fail, say

SMALL = ("adjacent", "0", 10)
# Nothing from outside gets in: no time of day, and no random numbers but the same ones.
ICOUNT = ["-accel", "tcg", "-icount", "shift=0,sleep=off", "-seed", "1",
          "-rtc", "base=2026-01-01T00:00:00,clock=vm"]
# As fast as it goes, on a processor of the host for each of the guest's.
REAL_TIME = ["-accel", "tcg,thread=multi"]
MACHINES = {
    # (QEMU and the machine, the console)
    "x86_64": (["qemu-system-x86_64"], "ttyS0"),
    "arm64": (["qemu-system-aarch64", "-M", "virt", "-cpu", "max,pauth=off"], "ttyAMA0"),
}
# C is quadratic in scattered folios: some 22 instructions times their number squared.
BEARABLE = 60_000
PATIENCE = int(os.environ.get("PATIENCE", "3600"))

# name: (kind, order, {counts}, memory); counts for C that are not bearable are left out.
WORKLOADS = {
    "scattered-0": ("scattered", "0", (1_000, 5_000, 20_000, 50_000), "2G"),
    "adjacent-0": ("adjacent", "0", (1_000, 10_000, 100_000), "2G"),
    "scattered-2": ("scattered", "2", (1_000, 15_000), "2G"),
    "adjacent-2": ("adjacent", "2", (1_000, 50_000), "2G"),
    "scattered-9": ("scattered", "9", (50, 200), "2G"),
    "adjacent-9": ("adjacent", "9", (100, 300), "2G"),
    "huge": ("adjacent", "9", (1_000, 4_000), "12G"),
    "random-0": ("random", "0", (20_000,), "2G"),
    "scattered-mixed": ("scattered", "mixed", (1_000, 20_000), "2G"),
    "sparse": ("sparse", "0", (60, 240, 1_000), "12G"),
    "range": ("range", "0", (262_144,), "4G"),
    "range-odd": ("range", "1", (262_142,), "4G"),
    "gigantic": ("gigantic", "18", (1,), "4G"),
    "vmalloc": ("vmalloc", "0", (262_144,), "4G"),
    "vmalloc-huge": ("vmalloc", "9", (262_144,), "4G"),
    "memfd": ("memfd", "0", (262_144,), "4G"),
    "memfd-huge": ("memfd", "9", (262_144,), "4G"),
    "million": ("scattered", "0", (50_000, 200_000, 1_000_000), "12G"),
    "million-adjacent": ("adjacent", "0", (1_000_000,), "12G"),
    # Both with the same memory, on one processor and on two.
    "cpus": ("cpus", "9", (4_000,), "12G"),
    "cold": ("cold", "0", (0,), ("512M", "1G", "4G", "12G")),
}
DEFAULT = [name for name in WORKLOADS if not name.startswith("million")]


# Guests.

def bench_init(arch):
    return g.program(f"bench-init-{arch}", g.TOP / "bench/bench-init.c", arch=arch)


def initramfs(path, arch, next_kernel=None, cmdline=None, size=0):
    """One program; for a first kernel, what it needs to start the next one as well.

    size: that of the next kernel's initramfs, if it is to be larger than it need be.
    """
    cpio = g.Cpio().dirs("dev", "proc", "sys").console().file("init", bench_init(arch))
    if next_kernel:
        inner = initramfs(path.with_suffix(".next"), arch)
        os.truncate(inner, max(size, inner.stat().st_size))
        text = path.with_suffix(".cmdline")
        text.write_text(cmdline + "\n")
        cpio.file("next", next_kernel).file("next.initrd", inner).file("next.cmdline", text)
    return cpio.write(path)


def boot(log, arch, kernel, mem, cmdline, kernels, cpus=0, next_kernel=None, initrd=0, **options):
    """Boots a guest and returns the figures that each of its kernels reported.

    cpus: so many processors, in real time; else one, which counts instructions.
    next_kernel: another image than the first one; initrd: the size of its initramfs.
    """
    machine, console = MACHINES[arch]
    machine = [*machine, *(REAL_TIME if cpus else ICOUNT)]
    base = f"console={console} panic=-1 nokaslr initramfs_async=0"
    with tempfile.TemporaryDirectory(dir=g.WORK) as work:
        image = Path(work, "initramfs")
        if kernels == 2:
            initramfs(image, arch, next_kernel or kernel, f"{base} {cmdline}", initrd)
        else:
            initramfs(image, arch)
        run = g.qemu(log, kernel, image, cmdline, mem=mem, timeout=PATIENCE, machine=machine, base=base,
                     smp=cpus or 1, **options)
    run.expect(kernels)
    figures = []
    for number, text in enumerate(run.kernels, 1):
        if "kho_bench: FAILED" in text or not re.search(r"kho_bench: done ", text):
            raise Fail(f"kernel {number}: the benchmark failed")
        found = {what: [int(ticks), int(count)] for what, ticks, count in
                 re.findall(r"kho_bench: (\w+) (\d+) (\d+)", text)}
        available = re.search(r"Memory: (\d+)K/(\d+)K available", text)
        found["available"] = [int(available[1]), int(available[2])]
        # Ticks of another clock than that of instructions.
        if "hz" in found:
            scale = 1_000_000_000 // found["hz"][0]
            for what in set(found) - {"hz", "available"}:
                found[what][0] *= scale
        figures.append(found)
    return figures


def one(context, kind, order, count, mem):
    """Runs one workload on one kernel and returns its record."""
    arch, compiler, config, impl, kernel = context
    name = f"{arch}-{compiler}-{config}-{impl}-{kind}-{order}-{count}-{mem}"
    log = g.CACHE / "log/bench" / f"{name}.log"
    start = time.time()
    try:
        if kind in ("cold", "cold-off"):
            figures = boot(log, arch, kernel, mem,
                           f"kho={'on' if kind == 'cold' else 'off'} kho_bench=cold", 1)
        elif kind == "memfd":
            huge = " kho_huge" if order == "9" else ""
            figures = boot(log, arch, kernel, mem,
                           f"kho=on liveupdate=on kho_bench=cold kho_memfd={count << 12}{huge}", 2)
            for found in figures:
                if "memfd_done" not in found:
                    raise Fail("no memfd was preserved or retrieved")
        elif kind.startswith("cpus-"):
            figures = boot(log, arch, kernel, mem, f"kho=on liveupdate=on kho_bench=adjacent,{order},{count}",
                           2, cpus=int(kind.removeprefix("cpus-")))
        else:
            peer = " kho_bench_peer" if impl == "c" else ""
            figures = boot(log, arch, kernel, mem,
                           f"kho=on liveupdate=on kho_bench={kind},{order},{count}{peer}", 2)
            # A kernel that refuses the handover preserves anew.
            if figures[1].get("restore", [0, 0])[1] != count:
                raise Fail(f"not {count} blocks were restored")
    except Fail as fail:
        raise Fail(f"{name}: {fail}; log at {log}") from None
    seconds = time.time() - start
    shown = figures[-1]
    say(f"bench: {name}: init {shown['kho_memory_init'][0]}, boot {shown['boot'][0]}, {seconds:.0f} s")
    return {**keys_of(context, kind, order, count, mem), "image": image(context), "kernels": figures}


KEYS = ("arch", "compiler", "config", "impl", "kind", "order", "count", "mem")


def keys_of(context, *case):
    return dict(zip(KEYS, (*context[:4], *case)))


@functools.cache
def image(context):
    """Says which kernel and guest that was: the same ones give the same figures again."""
    arch, kernel = context[0], context[4]
    digest = hashlib.sha256(Path(kernel).read_bytes())
    digest.update(repr((bench_init(arch).name, MACHINES[arch], ICOUNT, qemu_version(arch))).encode())
    return digest.hexdigest()[:16]


@functools.cache
def qemu_version(arch):
    return subprocess.check_output([MACHINES[arch][0][0], "--version"], text=True).splitlines()[0]


def wanted(impl, kind, count):
    """C is not asked for what would take hours, nor for what it has no part of."""
    return impl != "c" or (count <= BEARABLE if kind in ("scattered", "random") else not kind.startswith("cpus"))


def plan(names):
    """The guests of some workloads, and the small handovers to compare them with."""
    guests = []
    for name in names:
        kind, order, counts, mem = WORKLOADS[name]
        for size in mem if isinstance(mem, tuple) else (mem,):
            if kind == "cold":
                guests += [("cold", "0", 0, size), ("cold-off", "0", 0, size)]
                continue
            if kind == "cpus":
                guests += [(f"cpus-{cpus}", order, *counts, size) for cpus in (1, 2)]
                continue
            if (*SMALL, size) not in guests:
                guests.append((*SMALL, size))
            guests += [(kind, order, count, size) for count in counts]
    return guests


def main_run(out):
    """Environment: KERNELS, words ARCH:COMPILER:CONFIG:IMPL:PATH; WORKLOADS."""
    names = os.environ.get("WORKLOADS", "").split() or DEFAULT
    if names == ["all"]:
        names = list(WORKLOADS)
    for name in names:
        if name not in WORKLOADS:
            raise Fail(f"no workload {name}: {' '.join(WORKLOADS)}")
    kernels = [tuple(word.split(":", 4)) for word in os.environ["KERNELS"].split()]
    g.WORK.mkdir(exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    records, runs = load(out / "bench.jsonl"), load(out / "runs.jsonl")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    run = f"{date}, commit {os.environ.get('COMMIT') or 'unknown'}"
    # What was measured with the same kernels is not measured again, and what was measured with
    # other ones is not mixed with it.
    images = {kernel[:4]: image(kernel) for kernel in kernels}
    records = [old for old in records
               if images.get(tuple(old[key] for key in KEYS[:4]), old["image"]) == old["image"]]
    used = {old["run"] for old in records} - {run}
    store(out / "runs.jsonl", [*(old for old in runs if old["run"] in used),
                               {"run": run, "machine": machine(), **versions()}])
    known = [tuple(old[key] for key in KEYS) for old in records]
    # What is measured does not depend on the host, so neither on another guest there.
    guests = [(kernel, *guest) for variant in dict.fromkeys(kernel[:3] for kernel in kernels)
              for guest in plan(names) for kernel in kernels
              if kernel[:3] == variant and wanted(kernel[3], guest[0], guest[2])
              and (*kernel[:4], *guest) not in known]
    large = [guest for guest in guests if g.megabytes(guest[-1]) > 4096]
    for some, workers in ([guest for guest in guests if guest not in large], int(os.environ["JOBS"])), \
            (large, 1):
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for record in pool.map(lambda guest: one(*guest), some):
                records.append({**record, "run": run})
                store(out / "bench.jsonl", records)


def load(path):
    """The lines of a file, of which each is JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def store(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def machine():
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} CPUs"


def versions():
    """What the kernels were built with, and what ran them."""
    def first(*command):
        if not shutil.which(command[0]):
            return None
        return subprocess.check_output(command, text=True).splitlines()[0]
    linux = re.findall(r"^(?:VERSION|PATCHLEVEL|SUBLEVEL) = (\d+)", (g.SRC / "Makefile").read_text(), re.M)
    return {"linux": ".".join(linux), "gcc": first("gcc", "--version"), "clang": first("clang", "--version"), "rustc": first("rustc", "--version"), "qemu": first("qemu-system-x86_64", "--version")}


# What the figures say.

class Results:
    """The records of a benchmark, and what is derived from them."""

    def __init__(self, out):
        records, self.runs = load(out / "bench.jsonl"), load(out / "runs.jsonl")
        self.by_key = {tuple(record[key] for key in KEYS): record["kernels"] for record in records}
        # By variant and implementation: when that was measured, and of which commit.
        self.measured = {}
        for record in records:
            self.measured.setdefault(tuple(record[key] for key in KEYS[:4]), set()).add(record["run"])
        self.linux = " and ".join(sorted({run["linux"] for run in self.runs}))
        self.variants = sorted({key[:3] for key in self.by_key}, key=lambda variant: (
            list(MACHINES).index(variant[0]), variant[2] != "production", variant[1]))

    def ticks(self, variant, impl, case, what, kernel):
        """One figure, or None; several names are added up."""
        kernels = self.by_key.get((*variant, impl, *case))
        if not kernels or any(name not in kernels[kernel - 1] for name in what):
            return None
        return sum(kernels[kernel - 1][name][0] for name in what)

    def over_small(self, variant, impl, case, what):
        """What the second boot takes longer than with a small handover."""
        mine = self.ticks(variant, impl, case, what, 2)
        small = self.ticks(variant, impl, (*SMALL, case[3]), what, 2)
        return None if mine is None or small is None else mine - small

    def extrapolated(self, variant, case, what):
        """For a C kernel that was not run: a square law through the two largest counts that were."""
        kind, order, count, mem = case
        if kind not in ("scattered", "random"):
            return None
        # A count may have been measured with less memory, which this does not depend on.
        known = {}
        for key in self.by_key:
            if key[:6] == (*variant, "c", kind, order) and key[6] < count:
                value = self.over_small(variant, "c", key[4:], what)
                if value is not None:
                    known[key[6]] = value
        if len(known) < 2:
            return None
        (n1, y1), (n2, y2) = sorted(known.items())[-2:]
        square = (y2 / n2 - y1 / n1) / (n2 - n1)
        return round(count * (y1 / n1 + square * (count - n1)))

    def cases(self, variant, kind, order):
        return sorted({key[4:] for key in self.by_key
                       if key[:3] == variant and key[4:6] == (kind, order) and key[4:7] != SMALL},
                      key=lambda case: (g.megabytes(case[3]), case[2]))


TAKEOVER = ("kho_memory_init_early", "kho_memory_init")
# (title, stages of the second boot)
BOOT_COSTS = (
    ("takeover", TAKEOVER),
    ("free_all", ("memblock_free_all", "kho_memory_init_free")),
    ("before SMP", ("before_smp",)),
    ("late", ("page_alloc_init_late",)),
    ("whole boot", ("boot",)),
    ("KHO's part of late", ("kho_memory_init_late",)),
    ("all of KHO's part", (*TAKEOVER, "kho_memory_init_free", "kho_memory_init_late")),
)
# (title, name, kernel)
CALL_COSTS = (
    ("preserve, first", "preserve", 1),
    ("preserve", "represerve", 1),
    ("unpreserve", "unpreserve", 1),
    ("restore", "restore", 2),
    ("preserve", "memfd_preserve", 1),
    ("retrieve", "memfd_retrieve", 2),
    ("prune, nothing to free", "prune", 1),
)
PEER_COSTS = (
    ("xarray: preserve, first", "peer_preserve"),
    ("xarray: preserve", "peer_represerve"),
    ("xarray: unpreserve", "peer_unpreserve"),
    ("xarray: serialise", "peer_serialise"),
)



def on_two_cpus(results, variant):
    """How many times as fast as one processor two of them are after takeover."""
    one, two = (results.ticks(variant, "rust", (f"cpus-{cpus}", "9", 4_000, "12G"), ("kho_memory_init_late",), 2)
                for cpus in (1, 2))
    return one / two if one and two else None


def kept_from_cold(results, variant, impl, mem):
    """KiB that are not available with kho=on and are without."""
    on, off = (results.by_key.get((*variant, impl, kind, "0", 0, mem)) for kind in ("cold", "cold-off"))
    return off[0]["available"][0] - on[0]["available"][0] if on and off else None


def number(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.1f}"


def header(results):
    """What was measured, when, and on what."""
    for run in results.runs:
        yield f"{run['run']}: Linux {run['linux']}, {run['machine']}"
        yield from (f"    {run[tool]}" for tool in ("gcc", "clang", "rustc", "qemu") if run[tool])
    for key, runs in sorted(results.measured.items()):
        yield f"{' '.join(key)}: {'; '.join(sorted(runs))}"


# The tables of the documentation: (label, case, what), and whether the figure is for each folio
# or page.
EACH, ALL = True, False
SMALL_2G = (*SMALL, "2G")
MAIN_TABLE = (
    ("takeover of 10 folios, 2 GiB, in all", SMALL_2G, "takeover", ALL),
    ("the same, with what is done late", SMALL_2G, "all of KHO's part", ALL),
    *((f"takeover, {count:,} scattered of 4 KiB", ("scattered", "0", count, "2G"), "takeover", EACH)
      for count in (1_000, 20_000, 50_000)),
    *((f"takeover, {count:,} scattered of 4 KiB, 12 GiB", ("scattered", "0", count, "12G"), "takeover", EACH)
      for count in (50_000, 1_000_000)),
    ("whole boot, 50,000 scattered of 4 KiB", ("scattered", "0", 50_000, "2G"), "whole boot", EACH),
    ("whole boot, 1,000,000 scattered, 12 GiB", ("scattered", "0", 1_000_000, "12G"), "whole boot", EACH),
    ("before SMP, 50,000 scattered", ("scattered", "0", 50_000, "2G"), "before SMP", EACH),
    ("before SMP, 1,000,000 scattered, 12 GiB", ("scattered", "0", 1_000_000, "12G"), "before SMP", EACH),
    ("takeover, 15,000 scattered of 16 KiB", ("scattered", "2", 15_000, "2G"), "takeover", EACH),
    ("takeover, 20,000 scattered, mixed", ("scattered", "mixed", 20_000, "2G"), "takeover", EACH),
    ("takeover, 100,000 adjacent of 4 KiB", ("adjacent", "0", 100_000, "2G"), "takeover", EACH),
    ("takeover, 1,000,000 adjacent, 12 GiB", ("adjacent", "0", 1_000_000, "12G"), "takeover", EACH),
    ("takeover, 300 adjacent of 2 MiB", ("adjacent", "9", 300, "2G"), "takeover", EACH),
    ("takeover, the step from 100 to 300 of them", ("adjacent", "9", 300, "2G"), "step from 100", EACH),
    ("late, 300 adjacent of 2 MiB: KHO's part", ("adjacent", "9", 300, "2G"), "KHO's part of late", EACH),
    ("takeover, 4,000 adjacent of 2 MiB, 12 GiB", ("adjacent", "9", 4_000, "12G"), "takeover", EACH),
    ("whole boot, 4,000 adjacent of 2 MiB, 12 GiB", ("adjacent", "9", 4_000, "12G"), "whole boot", EACH),
    *((f"takeover, {count:,} sparse of 4 KiB, 12 GiB", ("sparse", "0", count, "12G"), "takeover", EACH)
      for count in (60, 240, 1_000)),
    ("whole boot, 1,000 sparse of 4 KiB, 12 GiB", ("sparse", "0", 1_000, "12G"), "whole boot", EACH),
    *((f"{what}, {kind}, 4 KiB", (kind, "0", count, "2G"), what, EACH)
      for what in ("preserve", "unpreserve")
      for kind, count in (("adjacent", 100_000), ("scattered", 50_000), ("random", 20_000))),
    ("restore, adjacent, 4 KiB", ("adjacent", "0", 100_000, "2G"), "restore", EACH),
    ("restore, scattered, 4 KiB", ("scattered", "0", 50_000, "2G"), "restore", EACH),
    ("a prune that finds nothing, 50,000 scattered", ("scattered", "0", 50_000, "2G"), "prune, nothing to free",
     ALL),
    ("restore, scattered, 16 KiB", ("scattered", "2", 15_000, "2G"), "restore", EACH),
    ("restore, adjacent, 2 MiB", ("adjacent", "9", 300, "2G"), "restore", EACH),
    ("restore, 1 GiB", ("gigantic", "18", 1, "4G"), "restore", EACH),
    *((f"xarray of bitmaps: {what}, scattered", ("scattered", "0", 50_000, "2G"), f"xarray: {what}", EACH)
      for what in ("preserve", "unpreserve", "serialise")),
    ("1 GiB of vmalloc, preserve, per page", ("vmalloc", "0", 262_144, "4G"), "preserve", EACH),
    ("1 GiB of vmalloc, unpreserve, per page", ("vmalloc", "0", 262_144, "4G"), "unpreserve", EACH),
    ("1 GiB of vmalloc, restore, per page", ("vmalloc", "0", 262_144, "4G"), "restore", EACH),
    ("1 GiB of vmalloc, takeover, per page", ("vmalloc", "0", 262_144, "4G"), "takeover", EACH),
    ("1 GiB memfd, takeover, per page", ("memfd", "0", 262_144, "4G"), "takeover", EACH),
    ("1 GiB memfd, preserve ioctl, per page", ("memfd", "0", 262_144, "4G"), "preserve", EACH),
    ("1 GiB memfd, retrieve ioctl, per page", ("memfd", "0", 262_144, "4G"), "retrieve", EACH),
    *((f"1 GiB memfd of 2 MiB pages, {what}, in all", ("memfd", "9", 262_144, "4G"), what.split()[0], ALL)
      for what in ("takeover", "preserve ioctl", "retrieve ioctl")),
    ("1 GiB range, takeover, per page", ("range", "0", 262_144, "4G"), "takeover", EACH),
    ("1 GiB range, restore, per page", ("range", "0", 262_144, "4G"), "restore", EACH),
    ("1 GiB range, preserve, in all", ("range", "0", 262_144, "4G"), "preserve", ALL),
    ("1 GiB range, unpreserve, in all", ("range", "0", 262_144, "4G"), "unpreserve", ALL),
    ("1 GiB range, not aligned, preserve, in all", ("range", "1", 262_142, "4G"), "preserve", ALL),
    ("1 GiB range, not aligned, unpreserve, in all", ("range", "1", 262_142, "4G"), "unpreserve", ALL),
    *((f"MiB kept from a cold guest of {mem}", ("cold", "0", 0, mem), "kept", ALL)
      for mem in WORKLOADS["cold"][3]),
)
ARM64_TABLE = (
    *(row for row in MAIN_TABLE if row[1][3] == "2G" and not row[0].startswith("xarray")),
    *((f"whole boot, {count:,} scattered of 4 KiB, 12 GiB", ("scattered", "0", count, "12G"), "whole boot", EACH)
      for count in (50_000, 200_000, 1_000_000)),
)


# What a host of 1 TiB does with the memory of its virtual machines, from the cost of one folio.
HOST = (
    ("boot CPU, before the others run", "before SMP"),
    ("late, shared by all CPUs", "late"),
    ("caller that preserves", "preserve"),
    ("caller that restores", "restore"),
)
HOST_FOLIOS = (
    ("2 MiB", ("adjacent", "9", 4_000, "12G"), 1 << 19),
    ("1 GiB", ("gigantic", "18", 1, "4G"), 1 << 10),
)


def host_table(results, variant):
    """Millions of instructions by who spends them; those of boot are what it takes longer."""
    for size, case, folios in HOST_FOLIOS:
        for label, what in HOST:
            values = [figure_of(results, variant, impl, case, what)[0] for impl in ("c", "rust")]
            if None not in values:
                values = [value / case[2] * folios / 1e6 for value in values]
                yield [f"{size}: {label}", *map(number, values), quotient_of(*values)]


def figure_of(results, variant, impl, case, what):
    """One figure of a table, not divided by anything, and a star if it is extrapolated."""
    stages, calls, peers = dict(BOOT_COSTS), {}, dict(PEER_COSTS)
    for title, name, kernel in CALL_COSTS:
        calls.setdefault(title, []).append((name, kernel))
    if what == "kept":
        kept = kept_from_cold(results, variant, impl, case[3])
        return kept and kept / 1024, ""
    if what in peers:
        return results.ticks(variant, impl, case, (peers[what],), 1), ""
    if what in calls:
        found = [results.ticks(variant, impl, case, (name,), kernel) for name, kernel in calls[what]]
        return next((value for value in found if value is not None), None), ""
    if what == "step from 100":
        few, many = (results.ticks(variant, impl, (*case[:2], count, case[3]), TAKEOVER, 2)
                     for count in (100, case[2]))
        # For as many as the case has, which the figure is divided by.
        return few and many and (many - few) * case[2] / (case[2] - 100), ""
    if case[:3] == SMALL:
        return results.ticks(variant, impl, case, stages[what], 2), ""
    value = results.over_small(variant, impl, case, stages[what])
    if value is None and impl == "c":
        return results.extrapolated(variant, case, stages[what]), "*"
    return value, ""


def rounded(value, digits):
    """What is extrapolated is not known better than that."""
    return float(f"{value:.{digits - 1}e}")


def rst_table(headings, table):
    widths = [max(len(row[i]) for row in (headings, *table)) for i in range(len(headings))]
    rule = " ".join("=" * width for width in widths)
    lines = [" ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
             for row in (headings, *table)]
    print("\n".join([rule, lines[0], rule, *lines[1:], rule]))


def main_table(out):
    results = Results(out)
    print("\n".join(header(results)))
    for variant in results.variants:
        table = []
        for label, case, what, each in ARM64_TABLE if variant[0] == "arm64" else MAIN_TABLE:
            values, shown = [], []
            for impl in "c", "rust":
                value, star = figure_of(results, variant, impl, case, what)
                value = value if value is None or not each else value / case[2]
                if value is not None and star:
                    value = rounded(value, 3)
                values.append(value)
                shown.append("\\-" if value is None else number(value) + star)
            if values != [None, None]:
                table.append([label, *shown, quotient_of(*values)])
        print(f"\n{', '.join(variant)}\n")
        rst_table(["Work", "C", "Rust", "Rust / C"], table)
        if host := list(host_table(results, variant)):
            print(f"\n1 TiB in millions of instructions, {' '.join(variant)}\n")
            rst_table(["Work", "C", "Rust", "Rust / C"], host)
        if faster := on_two_cpus(results, variant):
            print(f"\n4,000 adjacent of 2 MiB, late on two CPUs: {faster:.1f} times as fast as on one")


def quotient_of(c, rust):
    """How much Rust takes of what C takes."""
    if c is None or rust is None or c <= 0 or rust <= 0:
        return "\\-"
    if rust > 100 * c:
        return f"{rounded(rust / c, 2):,.0f}"
    return f"{rust / c:.2f}" if rust > 0.02 * c else f"1/{rounded(c / rust, 2):,.0f}"


# Drawing.

COLOURS = {"c": "#d55e00", "rust": "#0072b2"}
LABELS = {"c": "C", "rust": "Rust"}
SIZES = {"0": "4 KiB", "2": "16 KiB", "9": "2 MiB", "mixed": "mixed orders"}
MARKERS = {"0": "o", "2": "s", "9": "D", "mixed": "^"}


def drawing():
    """What draws; only where it is needed, as the table can be had without."""
    import matplotlib
    matplotlib.use("Agg")
    # The same figures give the same files.
    matplotlib.rcParams.update({"svg.hashsalt": "kho", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3,
                                "axes.axisbelow": True, "figure.constrained_layout.use": True})
    from matplotlib import pyplot
    return pyplot


def main_plot(out):
    pyplot = drawing()
    results = Results(out)
    for variant in results.variants:
        if figure := draw_takeover(pyplot, results, variant):
            arch, compiler, config = variant
            figure.suptitle(f"{figure.get_suptitle()}\nLinux {results.linux}, "
                            f"{arch}, {compiler}, {config} configuration", fontsize="medium")
            figure.savefig(out / f"takeover-{'-'.join(variant)}.svg", metadata={"Date": None})
            pyplot.close(figure)


def curves(axes, results, variant, kind):
    """Takeover of one kind of blocks, for each implementation and order.  Returns whether there is any."""
    for order in SIZES:
        cases = results.cases(variant, kind, order)
        for impl in "c", "rust":
            # The guest with the least memory where there are several.
            points = {}
            for case in cases:
                if y := results.ticks(variant, impl, case, TAKEOVER, 2):
                    points.setdefault(case[2], y)
            points = sorted(points.items())
            if not points:
                continue
            axes.plot(*zip(*points), color=COLOURS[impl], marker=MARKERS[order], markersize=5,
                      linestyle="-", label=f"{LABELS[impl]}, {SIZES[order]}")
            # The largest counts that C was not run with.
            more = {} if impl != "c" else {case[2]: results.extrapolated(variant, case, TAKEOVER)
                                           for case in cases if case[2] > points[-1][0]}
            more = sorted((count, y) for count, y in more.items() if y)
            if more:
                axes.plot(*zip(points[-1], *more), color=COLOURS[impl], linestyle=":")
                axes.plot(*zip(*more), color=COLOURS[impl], marker=MARKERS[order], markersize=5,
                          linestyle="none", markerfacecolor="white", label="C, extrapolated")
    axes.set(xscale="log", yscale="log", xlabel=f"{kind} blocks", ylabel="guest instructions")
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles))
    if shown:
        axes.legend(shown.values(), shown.keys(), fontsize="small")
    return bool(shown)


def draw_takeover(pyplot, results, variant):
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
    drawn = [curves(axes, results, variant, kind) for axes, kind in zip(panels, ("scattered", "adjacent"))]
    figure.suptitle("Takeover: kho_memory_init_early() and kho_memory_init() in the second kernel")
    return figure if any(drawn) else None


def main(command, out):
    {"run": main_run, "plot": main_plot, "table": main_table}[command](Path(out))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except Fail as failure:
        print(f"bench: {failure}", file=sys.stderr)
        sys.exit(1)
