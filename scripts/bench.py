# SPDX-License-Identifier: GPL-2.0
"""The benchmark of kexec handover: runs guests, prints tables, draws.

  run OUT        boots every guest that is asked for, writes OUT/bench.json
  table OUT      prints what OUT/bench.json has, as one table
  rst OUT        prints the same as reStructuredText
  plot OUT       draws it, as OUT/*.svg and OUT/*.png

Guests run under "-icount shift=0": one instruction takes one nanosecond, and
the counter that the kernel reads counts instructions.  So figures do not depend
on the host, and are the same each time.
"""
import datetime
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

sys.path.insert(0, str(Path(__file__).resolve().parent))
import guest as g  # noqa: E402
from guest import Fail, say  # noqa: E402

SMALL = ("adjacent", "0", 10)
ICOUNT = ["-accel", "tcg", "-icount", "shift=0,sleep=off"]
MACHINES = {
    # (QEMU and the machine, the console)
    "x86_64": (["qemu-system-x86_64", *ICOUNT], "ttyS0"),
    "arm64": (["qemu-system-aarch64", "-M", "virt", "-cpu", "max,pauth=off", *ICOUNT], "ttyAMA0"),
}
# C is quadratic in scattered folios: some 22 instructions times their number squared.
BEARABLE = 24_000
PATIENCE = 3600

# name: (kind, order, {counts}, memory); counts for C that are not bearable are left out.
WORKLOADS = {
    "scattered-0": ("scattered", "0", (1_000, 2_000, 5_000, 10_000, 20_000, 50_000), "2G"),
    "adjacent-0": ("adjacent", "0", (1_000, 10_000, 100_000), "2G"),
    "scattered-2": ("scattered", "2", (1_000, 5_000, 15_000), "2G"),
    "adjacent-2": ("adjacent", "2", (1_000, 10_000, 50_000), "2G"),
    "scattered-9": ("scattered", "9", (50, 100, 200), "2G"),
    "adjacent-9": ("adjacent", "9", (100, 300), "2G"),
    "scattered-mixed": ("scattered", "mixed", (1_000, 5_000, 20_000), "2G"),
    "range": ("range", "0", (262_144,), "4G"),
    "vmalloc": ("vmalloc", "0", (262_144,), "4G"),
    "vmalloc-huge": ("vmalloc", "9", (262_144,), "4G"),
    "memfd": ("memfd", "0", (262_144,), "4G"),
    "memfd-huge": ("memfd", "9", (262_144,), "4G"),
    "million": ("scattered", "0", (100_000, 200_000, 500_000, 1_000_000), "12G"),
    "cold": ("cold", "0", (0,), ("512M", "1G", "4G", "12G")),
}
DEFAULT = [name for name in WORKLOADS if name != "million"]


# Guests.

def initramfs(path, arch, next_kernel=None, cmdline=None):
    """One program; for a first kernel, what it needs to start the next one as well."""
    program = g.program(f"bench-init-{arch}", g.TOP / "bench/bench-init.c", arch=arch)
    cpio = g.Cpio().dirs("dev", "proc", "sys").console().file("init", program)
    if next_kernel:
        inner = initramfs(path.with_suffix(".next"), arch)
        text = path.with_suffix(".cmdline")
        text.write_text(cmdline + "\n")
        cpio.file("next", next_kernel).file("next.initrd", inner).file("next.cmdline", text)
    return cpio.write(path)


def boot(log, arch, kernel, mem, cmdline, kernels):
    """Boots a guest and returns the figures that each of its kernels reported."""
    machine, console = MACHINES[arch]
    base = f"console={console} panic=-1 nokaslr"
    with tempfile.TemporaryDirectory(dir=g.WORK) as work:
        image = Path(work, "initramfs")
        if kernels == 2:
            initramfs(image, arch, kernel, f"{base} {cmdline}")
        else:
            initramfs(image, arch)
        run = g.qemu(log, kernel, image, cmdline, mem=mem, timeout=PATIENCE, machine=machine, base=base)
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
        else:
            peer = " kho_bench_peer" if impl == "c" else ""
            figures = boot(log, arch, kernel, mem,
                           f"kho=on liveupdate=on kho_bench={kind},{order},{count}{peer}", 2)
    except Fail as fail:
        raise Fail(f"{name}: {fail}; log at {log}") from None
    seconds = time.time() - start
    shown = figures[-1]
    say(f"bench: {name}: init {shown['kho_memory_init'][0]}, boot {shown['boot'][0]}, {seconds:.0f} s")
    return {"arch": arch, "compiler": compiler, "config": config, "impl": impl, "kind": kind,
            "order": order, "count": count, "mem": mem, "kernels": figures}


def bearable(impl, kind, order, count):
    return impl != "c" or kind != "scattered" or count <= BEARABLE


def plan(names):
    """The guests of some workloads, and the small handovers to compare them with."""
    guests = []
    for name in names:
        kind, order, counts, mem = WORKLOADS[name]
        for size in mem if isinstance(mem, tuple) else (mem,):
            if kind == "cold":
                guests += [("cold", "0", 0, size), ("cold-off", "0", 0, size)]
                continue
            if (*SMALL, size) not in guests:
                guests.append((*SMALL, size))
            guests += [(kind, order, count, size) for count in counts]
    return guests


def main_run(out):
    """Environment: KERNELS, words ARCH:COMPILER:CONFIG:IMPL:PATH; WORKLOADS."""
    names = os.environ.get("WORKLOADS", "").split() or DEFAULT
    for name in names:
        if name not in WORKLOADS:
            raise Fail(f"no workload {name}: {' '.join(WORKLOADS)}")
    kernels = [tuple(word.split(":", 4)) for word in os.environ["KERNELS"].split()]
    g.WORK.mkdir(exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    done = {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": machine(), "versions": versions(), "records": []}
    path = out / "bench.json"
    if path.exists():
        # What was measured before and is not measured again is kept.
        done["records"] = json.loads(path.read_text())["records"]
    for variant in dict.fromkeys(kernel[:3] for kernel in kernels):
        for guest in plan(names):
            for kernel in kernels:
                if kernel[:3] != variant or not bearable(kernel[3], *guest[:3]):
                    continue
                record = one(kernel, *guest)
                keys = [key for key in record if key != "kernels"]
                done["records"] = [old for old in done["records"]
                                   if any(old[key] != record[key] for key in keys)] + [record]
                path.write_text(json.dumps(done, indent=1) + "\n")


def machine():
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} CPUs"


def versions():
    """What the kernels were built with, and what ran them."""
    def first(*command):
        if not shutil.which(command[0]):
            return None
        return subprocess.check_output(command, text=True).splitlines()[0]
    return {"linux": g.SRC.name.removeprefix("linux-"), "commit": os.environ.get("COMMIT", ""),
            "gcc": first("gcc", "--version"), "clang": first("clang", "--version"),
            "rustc": first("rustc", "--version"), "qemu": first("qemu-system-x86_64", "--version")}


def main(command, out):
    {"run": main_run}[command](Path(out))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except Fail as failure:
        print(f"bench: {failure}", file=sys.stderr)
        sys.exit(1)
