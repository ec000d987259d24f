# SPDX-License-Identifier: GPL-2.0
"""A virtual machine (VM) that survives kexecs of its host; scripts/vm runs it.

A guest is the host: its init, vm-host.c, runs a stock QEMU with the VM of vm-kernel.c.
What the VM prints, and the moments of each step, come back in the result of the guest.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import qemu as g
from .qemu import Fail, spoilt

# The BIOS, what loads a kernel as PVH says, and what any PC of QEMU's asks for.
FIRMWARE = ("bios-256k.bin", "pvh.bin", "kvmvapic.bin")
FREESTANDING = ("-nostdlib", "-ffreestanding", "-mgeneral-regs-only", "-mno-red-zone", "-fno-pie",
                "-no-pie", "-fno-stack-protector", "-fcf-protection=none",
                "-fno-asynchronous-unwind-tables",
                "-Wl,-Ttext-segment=0x100000,--build-id=none,-z,max-page-size=4096")
# What the VM stands still for: when that begins, what it is, and whether it is KHO and LUO.
PHASES = (("stop", "stop the VM", False),
          ("stopped", "write the state of its devices", False),
          ("state", "end QEMU", False),
          ("gone", "preserve that state", True),
          ("saved", "leave the kernel, unpack the next", False),
          ("booted", "boot to init", False),
          ("init", "retrieve memory and state", True),
          ("retrieved", "start QEMU", False),
          ("answers", "read the state", False),
          ("loaded", "continue", False),
          ("running", "first line", False))
END = "first"
# Seconds for each kernel: a busy host may take twenty times as long as an idle one.
PATIENCE = 900


def initramfs(path):
    """vm-host, the kernel of the VM, and QEMU with all that it loads."""
    qemu = shutil.which("qemu-system-x86_64")
    kernel = [g.GUEST / name for name in ("vm-entry.S", "vm-kernel.c")]
    files = {"init": g.program("vm-host", g.GUEST / "vm-host.c", g.GUEST / "luo.c"),
             "vm": g.program("vm-kernel", *kernel, flags=FREESTANDING), "bin/qemu": qemu}
    for name in FIRMWARE:
        found = [Path("/usr/share", where, name) for where in ("qemu", "seabios")]
        found = [file for file in found if file.exists()]
        if not found:
            raise Fail(f"no {name} below /usr/share/qemu or /usr/share/seabios")
        files[f"firmware/{name}"] = found[0]
    libraries = subprocess.check_output(["ldd", qemu], text=True)
    for library in re.findall(r"(/\S+) \(0x", libraries):
        files[library.lstrip("/")] = library
    cpio = g.Cpio().dirs("dev", "proc", "mnt").console()
    parents = {str(parent) for name in files for parent in Path(name).parents}
    cpio.dirs(*sorted(parents - {"."}))
    for name, source in files.items():
        cpio.file(name, source)
    return cpio.write(path)


class Show:
    """Prints what the VM prints, as it comes."""

    WORDS = {"vm": "| ", "bad": "| ", "step": "", "flipped": "a bit changes, at "}

    def __init__(self, share, kernels):
        self.result = share / "result"
        self.kernels = kernels
        self.seen = 0

    def __call__(self):
        if not self.result.exists():
            return
        text = self.result.read_text(errors="replace")
        text, self.seen = text[self.seen:text.rfind("\n") + 1], text.rfind("\n") + 1
        for line in text.splitlines():
            stage, word, rest = f"{line}  ".split(" ", 2)
            if word in self.WORDS:
                name = self.kernels[int(stage) - 1][0]
                print(f"kernel {stage} ({name})  {self.WORDS[word]}{rest.strip()}", flush=True)


def through(log, kernels, mem="64M", broken=False, show=False):
    """Takes a VM through the kernels, [(name, image)]; returns the moments of each kexec."""
    flip = spoilt(broken, not broken)
    size = g.megabytes(mem)
    words = f"kho=on liveupdate=on kho_stages={len(kernels)} kho_vm_mem={size}"
    if flip:
        words += " kho_vm_flip=2"
    with tempfile.TemporaryDirectory(prefix=f"{log.stem}-", dir=g.WORK) as work:
        share = Path(work, "share")
        share.mkdir()
        for number, (_, image) in enumerate(kernels, 1):
            shutil.copyfile(image, share / f"kernel.{number}")
        (share / "cmdline").write_text(f"{g.CMDLINE} {words}")
        run = g.qemu(log, kernels[0][1], initramfs(share / "initrd"), f"{words} kho_stage=1",
                     share=share, mem=f"{960 + size}M", smp=2,
                     timeout=PATIENCE * len(kernels), during=Show(share, kernels) if show else None)
    run.expect(len(kernels))
    found = [line for stage in range(1, len(kernels) + 1) for line in run.reported(stage, "bad")]
    if broken:
        flipped = "".join(run.reported(2, "flipped"))
        noticed = [line for line in found if flipped and f"BAD word at {flipped}: " in line]
        if not noticed:
            raise Fail(f"a bit was flipped at {flipped}, and the VM noticed {found or 'nothing'}")
        found = [line for line in found if line not in noticed]
    if found:
        raise Fail(f"the VM found: {found[0]}")
    rate = ticks_per_ms(run, len(kernels))
    return [moments(run, stage, name, rate) for stage, (name, _) in enumerate(kernels[1:], 2)]


def ticks_per_ms(run, stages):
    """How fast the counter of all moments counts, which goes on through a kexec."""
    notes = [line.split() for stage in range(1, stages) for line in run.reported(stage, "clock")]
    first, last = ((int(ticks), float(seconds)) for ticks, seconds in (notes[0], notes[-1]))
    return (last[0] - first[0]) / (last[1] - first[1]) / 1e3


def moments(run, stage, name, rate):
    """When what happened on the way to a kernel, in ms."""
    figures = g.takeover(run, stage)
    if (figures is not None) != (name != "c"):
        raise Fail(f"kernel {stage} is not the one with {name}")
    at = {}
    for line in run.reported(stage, "moment"):
        moment, ticks = line.split()
        at[moment] = int(ticks) / rate
    # The kernel's own clock starts with it, but it may go wrong if the host is busy.
    clock = dict((what, float(seconds) * 1e3) for seconds, what in re.findall(
        r"\[ *([\d.]+)\] (Run /init|KHO: takeover: \d+ blocks)", run.kernels[stage - 1]))
    at["booted"] = max(at["init"] - clock.pop("Run /init", 0), at["saved"])
    order = [at[moment] for moment, _, _ in PHASES] + [at[END]]
    if order != sorted(order):
        raise Fail(f"the moments of kernel {stage} are not one after the other: {at}")
    if figures:
        at["taken"] = min(at["booted"] + max(clock.values(), default=0), at["init"])
        at["takeover"] = at["taken"] - figures["cycles"] / rate
    return at


def rows(at):
    """(what, whether it is KHO and LUO, since when, how long), in ms; the first is all of it."""
    yield "all of it", False, 0, at[END] - at["stop"]
    ends = [moment for moment, _, _ in PHASES[1:]] + [END]
    for (moment, what, ours), end in zip(PHASES, ends):
        yield what, ours, at[moment] - at["stop"], at[end] - at[moment]
        if moment == "booted" and "takeover" in at:
            start = at["takeover"]
            yield "- of which takeover", True, start - at["stop"], at["taken"] - start


def title(number, kernels, at):
    return (f"kexec {number}, {kernels[number - 1][0]} to {kernels[number][0]}: "
            f"the VM stood still for {at[END] - at['stop']:,.0f} ms")


def notes(at):
    yield f"while the VM ran, preserving its memory took {at['preserved'] - at['preserve']:.1f} ms"
    if "takeover" not in at:
        yield "the C implementation does not report what its takeover took"


def timeline(kernels, hops):
    for number, at in enumerate(hops, 1):
        total = at[END] - at["stop"]
        yield title(number, kernels, at)
        for what, ours, since, length in rows(at):
            start = min(round(since / total * 30), 29)
            bar = ("*" if ours else "#") * max(round(length / total * 30), 1)
            yield f"{length:11,.1f} ms  {what:34} |{' ' * start}{bar}"
        yield from (f"{'':16}{line}" for line in ("*: KHO and LUO", *notes(at)))


def drawing(kernels, hops):
    """The same as SVG: a row for each phase, and time from left to right."""
    left, width, row = 250, 540, 18
    scale = width / max(at[END] - at["stop"] for at in hops)
    parts, y = [], 10

    def text(x, what, style=""):
        parts.append(f'<text x="{x:.1f}" y="{y + 13}" {style}>{what}</text>')

    for number, at in enumerate(hops, 1):
        text(10, title(number, kernels, at), 'font-weight="bold"')
        y += row + 4
        for what, ours, since, length in rows(at):
            text(left - 8, what, 'text-anchor="end"')
            parts.append(f'<rect x="{left + since * scale:.1f}" y="{y + 2}" height="14" '
                         f'width="{max(length * scale, 1.5):.1f}" '
                         f'fill="{"#0072b2" if ours else "#bbbbbb"}"/>')
            text(left + (since + length) * scale + 7, f"{length:,.1f} ms")
            y += row
        for line in ("blue: KHO and LUO", *notes(at)):
            text(left, line, 'fill="#0072b2"')
            y += row
        y += row
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{y}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def main(log, picture, mem, broken, *kernels):
    """kernels: words NAME:IMAGE."""
    g.WORK.mkdir(exist_ok=True)
    kernels = [tuple(word.split(":", 1)) for word in kernels]
    broken = broken == "1"
    try:
        hops = through(Path(log), kernels, mem, broken, show=True)
    except Fail as fail:
        print(f"vm: FAIL ({fail}; log at {log})")
        return 1
    print("\n".join(timeline(kernels, hops)))
    Path(picture).write_text(drawing(kernels, hops))
    print(f"drawing: {picture}")
    times = f"{len(hops)} kexecs" if len(hops) > 1 else "a kexec"
    print("vm: PASS (" + ("the VM noticed the bit that was flipped, and nothing else was wrong)"
          if broken else f"the VM lived through {times}, and has checked all of its memory since)"))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
