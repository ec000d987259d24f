# SPDX-License-Identifier: GPL-2.0
"""A virtual machine (VM) that lives through kexecs of its host; scripts/vm runs it.

A guest is the host: its init, vm-host.c, runs a stock QEMU with the VM of vm-kernel.c.
What the VM prints, and the moments of each step, come back in the result of the guest.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import guest as g  # noqa: E402
from guest import Fail  # noqa: E402

# The BIOS, what loads a kernel as PVH says, and what any PC of QEMU's asks for.
FIRMWARE = ("bios-256k.bin", "pvh.bin", "kvmvapic.bin")
FREESTANDING = ("-nostdlib", "-ffreestanding", "-mgeneral-regs-only", "-mno-red-zone", "-fno-pie", "-no-pie",
                "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
                "-Wl,-Ttext-segment=0x100000,--build-id=none,-z,max-page-size=4096")
# What the VM stands still for: (the moment when it begins, what it is).
PHASES = (("stop", "stop the VM"), ("stopped", "write the state of its devices"), ("state", "end QEMU"),
          ("gone", "preserve that state"), ("saved", "leave the kernel, unpack the next"), ("booted", "boot to init"),
          ("init", "retrieve memory and state"), ("retrieved", "start QEMU"), ("answers", "read the state"),
          ("loaded", "continue"), ("running", "first line"))
END = "first"
# KHO and LUO have a part in these.
OURS = {"gone": "preserving the state", "booted": "takeover", "init": "retrieving"}
# A guest on a busy host may take twenty times as long as on an idle one.
PATIENCE = 1800


def initramfs(path):
    """vm-host, the kernel of the VM, and QEMU with all that it loads."""
    qemu = shutil.which("qemu-system-x86_64")
    files = {"init": g.program("vm-host", g.GUEST / "vm-host.c", g.GUEST / "luo.c"),
             "vm": g.program("vm-kernel", g.GUEST / "vm-entry.S", g.GUEST / "vm-kernel.c", flags=FREESTANDING),
             "bin/qemu": qemu}
    for name in FIRMWARE:
        found = [file for where in ("qemu", "seabios") if (file := Path("/usr/share", where, name)).exists()]
        if not found:
            raise Fail(f"no {name} below /usr/share/qemu or /usr/share/seabios")
        files[f"firmware/{name}"] = found[0]
    for library in re.findall(r"(/\S+) \(0x", subprocess.check_output(["ldd", qemu], text=True)):
        files[library.lstrip("/")] = library
    cpio = g.Cpio().dirs("dev", "proc", "mnt").console()
    dirs = {str(parent) for name in files for parent in Path(name).parents}
    cpio.dirs(*sorted(dirs - {"."}))
    for name, source in files.items():
        cpio.file(name, source)
    return cpio.write(path)


class Show:
    """Prints what the VM prints, as it comes."""

    def __init__(self, share, kernels):
        self.result = share / "result"
        self.kernels = kernels
        self.seen = 0

    def __call__(self):
        if not self.result.exists():
            return
        with open(self.result, errors="replace") as file:
            file.seek(self.seen)
            text = file.read()
        lines = text[:text.rfind("\n") + 1]
        self.seen += len(lines.encode())
        for line in lines.splitlines():
            stage, word, rest = f"{line}  ".split(" ", 2)
            if word in ("vm", "bad", "step", "flipped"):
                name = self.kernels[int(stage) - 1][0]
                text = {"vm": "| ", "bad": "| ", "step": "", "flipped": "a bit is flipped at "}[word] + rest.strip()
                print(f"kernel {stage} ({name})  {text}", flush=True)


def through(log, kernels, mem="64M", broken=False, show=False):
    """Takes a VM through the kernels, [(name, image)]; returns the Run and the moments of each kexec."""
    flip = bool(broken) != bool(os.environ.get("KHO_BREAK"))
    words = (f"kho=on liveupdate=on kho_stages={len(kernels)} kho_vm_mem={g.megabytes(mem)}"
             + (" kho_vm_flip=2" if flip else ""))
    with tempfile.TemporaryDirectory(prefix=f"{log.stem}-", dir=g.WORK) as work:
        share = Path(work, "share")
        share.mkdir()
        for number, (_, image) in enumerate(kernels, 1):
            shutil.copyfile(image, share / f"kernel.{number}")
        (share / "cmdline").write_text(f"{g.CMDLINE} {words}")
        run = g.qemu(log, kernels[0][1], initramfs(share / "initrd"), f"{words} kho_stage=1", share=share,
                     mem=f"{960 + g.megabytes(mem)}M", smp=2, timeout=PATIENCE,
                     during=Show(share, kernels) if show else None)
    run.expect(len(kernels))
    found = [line for stage in range(1, len(kernels) + 1) for line in run.reported(stage, "bad")]
    if broken:
        flipped = run.reported(2, "flipped")
        if not flipped or not any(f"word at {flipped[0]}: " in line for line in found):
            raise Fail(f"a bit was flipped at {flipped}, and the VM noticed {found or 'nothing'}")
        found = [line for line in found if f"word at {flipped[0]}: " not in line]
    if found:
        raise Fail(f"the VM found: {found[0]}")
    return run, [moments(run, stage, name) for stage, (name, _) in enumerate(kernels[1:], 2)]


def moments(run, stage, name):
    """When what happened on the way to a kernel, in ms, and how long its takeover took, if it says that."""
    figures = g.takeover(run, stage)
    if (figures is not None) != (name != "c"):
        raise Fail(f"kernel {stage} is not the one with {name}")
    # The counter goes on through a kexec, and each kernel finds out its rate anew.
    rate = float(re.search(r"[\d.]+", run.expect_line(1, "tsc: Detected"))[0]) * 1e3
    at = {word: int(ticks) / rate for word, ticks in (line.split() for line in run.reported(stage, "moment"))}
    started = re.findall(r"\[ *([\d.]+)\] Run /init", run.kernels[stage - 1])
    at["booted"] = at["init"] - float(started[0]) * 1e3
    order = [at[moment] for moment, _ in PHASES] + [at[END]]
    if order != sorted(order):
        raise Fail(f"the moments of kernel {stage} are not one after the other: {at}")
    at["takeover"] = figures and figures["cycles"] / rate
    return at


def phases(at):
    """(what, whether KHO has a part in it, since when, how long) of all phases, in ms."""
    ends = [moment for moment, _ in PHASES[1:]] + [END]
    return [(what, moment in OURS, at[moment] - at["stop"], at[end] - at[moment])
            for (moment, what), end in zip(PHASES, ends)]


def title(number, kernels, at):
    return (f"kexec {number}, {kernels[number - 1][0]} to {kernels[number][0]}: "
            f"the VM stood still for {at[END] - at['stop']:,.0f} ms")


def ours(at):
    """Which part of it is KHO's and LUO's."""
    takeover = "not reported by this kernel" if at["takeover"] is None else f"{at['takeover']:.2f} ms"
    return (f"KHO and LUO in it: takeover {takeover}, preserving the state {at['saved'] - at['gone']:.2f} ms, "
            f"retrieving {at['retrieved'] - at['init']:.2f} ms",
            f"before, while the VM ran: preserving its memory {at['preserved'] - at['preserve']:.2f} ms")


def timeline(kernels, hops):
    for number, at in enumerate(hops, 1):
        total = at[END] - at["stop"]
        yield title(number, kernels, at)
        for what, star, since, length in phases(at):
            start, width = round(since / total * 30), max(1, round(length / total * 30))
            yield f"  {length:9,.1f} ms  {what:34}{'*' if star else ' '} |{' ' * start}{'#' * width}"
        yield from (f"{mark:>15} {words}" for mark, words in zip("* ", ours(at)))


def drawing(kernels, hops):
    """The same as SVG: a row for each phase, and time from left to right."""
    left, width, row = 250, 560, 18
    most = max(at[END] - at["stop"] for at in hops)
    parts, y = [], 10

    def text(x, what, **more):
        style = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
        parts.append(f'<text x="{x:.1f}" y="{y + 12}"{style}>{what}</text>')

    def bar(since, length, colour):
        parts.append(f'<rect x="{left + since / most * width:.1f}" y="{y + 2}" height="13" '
                     f'width="{max(length / most * width, 1):.1f}" fill="{colour}"/>')

    for number, at in enumerate(hops, 1):
        text(10, title(number, kernels, at), font_weight="bold")
        y += row + 4
        for what, star, since, length in phases(at):
            text(left - 8, what, text_anchor="end")
            bar(since, length, "#56b4e9" if star else "#999999")
            text(left + (since + length) / most * width + 6, f"{length:,.1f} ms")
            y += row
        for words in ours(at):
            text(left, words, fill="#0072b2")
            y += row
        y += row
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="920" height="{y}" font-family="sans-serif" '
            f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


def main(log, picture, kernels, mem, broken):
    """kernels: words NAME:IMAGE."""
    g.WORK.mkdir(exist_ok=True)
    kernels = [tuple(word.split(":", 1)) for word in kernels]
    try:
        _, hops = through(Path(log), kernels, mem, broken, show=True)
    except Fail as fail:
        print(f"vm: FAIL ({fail}; log at {log})")
        return 1
    print("\n".join(timeline(kernels, hops)))
    Path(picture).write_text(drawing(kernels, hops))
    print(f"drawing    {picture}")
    if broken:
        print("vm: PASS (the VM noticed the bit that was flipped, and nothing else was wrong)")
    else:
        times = f"{len(hops)} kexecs" if len(hops) > 1 else "a kexec"
        print(f"vm: PASS (the VM lived through {times}, and has checked all of its memory since)")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3], sys.argv[5:], sys.argv[3], sys.argv[4] == "1"))
