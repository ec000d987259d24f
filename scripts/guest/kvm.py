# SPDX-License-Identifier: GPL-2.0
"""How long a virtual machine (VM) stands still while the kernel of its host is replaced.

  run OUT        boots every guest; OUT/vm.jsonl has a record of each, a line, and
                 OUT/runs.jsonl with what that was
  table OUT      prints the table of Documentation/rust-benchmark.rst
  plot OUT       draws it, as OUT/vm.svg

A guest is the host: its only program, vmm/, runs the VM of vm-kernel.c on /dev/kvm, which
QEMU's emulated processor gives it.  One instruction takes a nanosecond, as in guest.bench.
"""
import concurrent.futures
import datetime
import functools
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

from . import bench, qemu as g, vm
from .qemu import Fail, say, spoilt

MACHINE = ["qemu-system-x86_64", "-cpu", "max"]
COUNTING = [*MACHINE, *bench.ICOUNT]
# Where the kernel would measure its clock, it is said to be what it is.
CLOCK = " tsc_early_khz=1000000"
BASE = "console=ttyS0 panic=-1 nokaslr initramfs_async=0 no_timer_check"
SIZES, FOLIOS = ("256M", "1G"), ("4K", "2M")
# When each part of the pause begins, and what it is.
PHASES = (("stop", "stop the VM"),
          ("stopped", "save the state of its processor"),
          ("saved", "preserve that"),
          ("kept", "leave the kernel, unpack the next"),
          ("start", "boot to init"),
          ("init", "retrieve memory and state"),
          ("found", "make a VM of them"),
          ("ready", "run it to its first exit"))
END = "first"


def vmm():
    """Builds the program of the guest, which is static, and returns its path."""
    target = g.CACHE / "host-target"
    with g.locked("vmm"):
        g.command("cargo", "rustc", "--quiet", "--locked", "--release", "--manifest-path", g.TOP / "vmm/Cargo.toml",
                  "--target-dir", target, "--", "-C", "target-feature=+crt-static")
    return target / "release/kho-vmm"


def initramfs(path, cmdline, kernel=None):
    """For a first kernel, with the VM, and with the next kernel and what that needs."""
    cpio = g.Cpio().dirs("dev").console().file("init", vmm())
    if kernel:
        text = path.with_suffix(".cmdline")
        text.write_text(cmdline)
        program = g.program("vm-kernel", g.GUEST / "vm-entry.S", g.GUEST / "vm-kernel.c", flags=vm.FREESTANDING)
        cpio.file("vm", program).file("next", kernel).file("next.cmdline", text)
        cpio.file("next.initrd", initramfs(path.with_suffix(".next"), cmdline))
    return cpio.write(path)


def boot(log, kernels, size, args, machine):
    """Boots the first of some kernels, which starts the next one if there is any."""
    base = BASE + (CLOCK if machine is COUNTING else "")
    args = f"kho=on liveupdate=on {args}"
    mem = f"{1024 + g.megabytes(size)}M"
    with tempfile.TemporaryDirectory(dir=g.WORK) as work:
        image = initramfs(Path(work, "initramfs"), f"{base} {args}", *kernels[1:])
        run = g.qemu(log, kernels[0], image, args, mem=mem, timeout=bench.PATIENCE, machine=machine, base=base)
    run.expect(len(kernels))
    for number, text in enumerate(run.kernels, 1):
        if failed := re.findall("kho_vm: FAILED: (.*)", text):
            raise Fail(f"kernel {number}: {failed[0]}")
    run.printed(len(kernels), "kho_vm: done")
    return run


def init_of(run, number):
    """When a kernel's init began, by the kernel's own clock and by the counter, in ns."""
    since, ticks = re.search(r"\[ *([\d.]+)\] kho_vm: init (\d+)", run.kernels[number - 1]).groups()
    return round(float(since) * 1e9), int(ticks)


@functools.cache
def cold(log, kernel, size):
    """How long a kernel takes to init if it takes nothing over, in ns."""
    return init_of(boot(log, [kernel], size, "", COUNTING), 1)[0]


def hop(log, kernels, size, folios="4K", flip=False, machine=COUNTING):
    """Takes a VM through a kexec; returns when what happened, in ticks, and the time to init."""
    # The VM has to notice a bit that changes, and nothing else.
    words = f"kho_vm_mem={g.megabytes(size)} kho_vm_flip={spoilt(int(flip), int(not flip))}"
    if folios == "2M":
        words += " transparent_hugepage_shmem=within_size"
    run = boot(log, kernels, size, words, machine)
    found = [line for number in (1, 2) for line in run.said(number, "kho_vm: bad ")]
    flipped = [line.split()[-1] for line in run.said(2, "kho_vm: flipped ")]
    noticed = [line for line in found if flip and flipped and f"BAD word at {flipped[0]}: " in line]
    if flip and not noticed:
        raise Fail(f"a bit was flipped at {flipped}, and the VM noticed {found or 'nothing'}")
    if others := [line for line in found if line not in noticed]:
        raise Fail(f"the VM found: {others[0]}")
    run.printed(2, r"kho_vm: checked from count \d+ to \d+")
    at = {name: int(ticks) for name, ticks in re.findall(r"kho_vm: moment (\w+) (\d+)", run.kernels[1])}
    took, at["init"] = init_of(run, 2)
    at["start"] = at["init"] - took
    return at, took


def one(impl, kernel, size, folios):
    """Measures one kernel with one VM; returns its record."""
    name = f"vm-{impl}-{size}-{folios}"
    try:
        at, took = hop(g.CACHE / f"log/bench/{name}.log", [kernel, kernel], size, folios)
        alone = cold(g.CACHE / f"log/bench/vm-{impl}-{size}-cold.log", kernel, size)
    except Fail as fail:
        raise Fail(f"{name}: {fail}; log at {g.CACHE}/log/bench/{name}.log") from None
    order = [at[moment] for moment, _ in PHASES] + [at[END]]
    if order != sorted(order):
        raise Fail(f"{name}: the moments are not one after the other: {at}")
    say(f"bench-vm: {name}: the VM stood still for {(order[-1] - order[0]) / 1e6:.1f} ms")
    return {"impl": impl, "vm": size, "folios": folios,
            "ns": {moment: end - start for (moment, _), start, end in zip(PHASES, order, order[1:])},
            "pause": order[-1] - order[0], "to_init": took, "to_init_cold": alone,
            "preserve_memory": at["pinned"] - at["pin"]}


def main_run(out):
    """Environment: KERNELS, words IMPL:PATH; COMMIT, JOBS."""
    kernels = dict(word.split(":", 1) for word in os.environ["KERNELS"].split())
    g.WORK.mkdir(exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    run = f"{date}, commit {os.environ.get('COMMIT') or 'unknown'}"
    vmm()
    with concurrent.futures.ThreadPoolExecutor(int(os.environ["JOBS"])) as pool:
        broken = pool.submit(hop, g.CACHE / "log/bench/vm-broken.log", [kernels["rust"]] * 2, SIZES[0], flip=True)
        records = list(pool.map(lambda case: one(case[2], kernels[case[2]], *case[:2]),
                                itertools.product(SIZES, FOLIOS, kernels)))
        broken.result()
    bench.store(out / "vm.jsonl", [{**record, "run": run} for record in records])
    print("bench-vm: PASS (each VM has checked all of its memory, and one noticed a bit that was flipped)")
    bench.store(out / "runs.jsonl", [{"run": run, "machine": bench.machine(), **bench.versions()}])


def rows(record):
    """(what, ms), the parts of the pause first."""
    for moment, what in PHASES:
        yield what, record["ns"][moment] / 1e6
        if moment == "start":
            yield "of that, over a cold boot", (record["to_init"] - record["to_init_cold"]) / 1e6
    yield "the VM stands still for", record["pause"] / 1e6
    yield "preserving its memory, while in use", record["preserve_memory"] / 1e6


def main_table(out):
    records = bench.load(out / "vm.jsonl")
    for run in bench.load(out / "runs.jsonl"):
        print(f"{run['run']}: Linux {run['linux']}, {run['gcc']}, {run['rustc']}, {run['qemu']}")
    columns = [dict(rows(record)) for record in records]
    headings = [f"{record['vm']} {record['folios']} {bench.LABELS[record['impl']]}" for record in records]
    print()
    bench.rst_table(["Work in ms", *headings],
                    [[what, *(f"{column[what]:,.2f}" for column in columns)] for what in columns[0]])


def over_cold(record):
    return max(record["to_init"] - record["to_init_cold"], 0)


def phase(*moments):
    return [lambda record, moment=moment: record["ns"][moment] for moment in moments]


# What is drawn: the parts of KHO and LUO in colours, and the rest.
DRAWN = (("stop the VM, save its state", "#cccccc", phase("stop", "stopped")),
         ("preserve that", "#56b4e9", phase("saved")),
         ("leave the kernel, unpack the next", "#999999", phase("kept")),
         ("boot to init, as if cold", "#cccccc", [*phase("start"), lambda record: -over_cold(record)]),
         ("boot to init, over that", "#d55e00", [over_cold]),
         ("retrieve memory and state", "#0072b2", phase("init")),
         ("start the VM", "#999999", phase("found", "ready")))


def main_plot(out):
    pyplot = bench.drawing()
    records = bench.load(out / "vm.jsonl")
    figure, axes = pyplot.subplots(figsize=(10, 5))
    bars = [f"{record['vm']} of {record['folios']}, {bench.LABELS[record['impl']]}" for record in records]
    ends = [0] * len(records)
    for what, colour, parts in DRAWN:
        lengths = [sum(part(record) for part in parts) / 1e6 for record in records]
        axes.barh(bars, lengths, left=ends, label=what, color=colour)
        ends = [end + length for end, length in zip(ends, lengths)]
    axes.bar_label(axes.containers[-1], [f" {end:,.0f} ms" for end in ends])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="ms of the guest: millions of instructions",
             title="How long a virtual machine stands still while the kernel of its host is replaced")
    axes.legend(fontsize="small", loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.3))
    figure.savefig(out / "vm.svg", metadata={"Date": None})


if __name__ == "__main__":
    try:
        {"run": main_run, "table": main_table, "plot": main_plot}[sys.argv[1]](Path(sys.argv[2]))
    except Fail as failure:
        print(f"bench-vm: FAIL ({failure})")
        sys.exit(1)
