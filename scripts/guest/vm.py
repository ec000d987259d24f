# SPDX-License-Identifier: GPL-2.0
"""A virtual machine that lives through kexecs of its host; scripts/vm runs it.

A guest is the host: its init, vm-host.c, runs a stock QEMU with the machine of
vm-kernel.c.  Everything that the machine prints, and when what happened, comes
back in the result of the guest.
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

# The machine's BIOS, what loads a kernel as PVH says, and what any PC of QEMU's asks for.
FIRMWARE = ("bios-256k.bin", "pvh.bin", "kvmvapic.bin")
FREESTANDING = ("-nostdlib", "-ffreestanding", "-mgeneral-regs-only", "-mno-red-zone", "-fno-pie", "-no-pie",
                "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
                "-Wl,-Ttext-segment=0x100000,--build-id=none,-z,max-page-size=4096")
# What the machine stands still for: (the moment when it begins, what it is); LUO and KHO have a part
# in those with a star.  The last moment is the end.
PHASES = (("stop", "stop the machine"), ("stopped", "write the state of its devices"), ("state", "end QEMU"),
          ("gone", "preserve that state *"), ("saved", "kexec to init *"), ("init", "retrieve memory and state *"),
          ("retrieved", "start QEMU"), ("answers", "read the state"), ("loaded", "continue"),
          ("running", "first line"))
END = "first"
# A guest on a busy host may take twenty times as long as on an idle one.
PATIENCE = 1800


def initramfs(path):
    """vm-host, the machine's kernel, and QEMU with all that it loads."""
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
    """Prints what the machine prints, as it comes."""

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
    """Takes a machine through the kernels, [(name, image)], and returns (Run, [moments of a kexec])."""
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
            raise Fail(f"a bit was flipped at {flipped}, and the machine noticed {found}")
        found = [line for line in found if f"word at {flipped[0]}: " not in line]
    if found:
        raise Fail(f"the machine found: {found[0]}")
    hops = []
    for stage, (name, _) in enumerate(kernels[1:], 2):
        if (g.takeover(run, stage) is not None) != (name != "c"):
            raise Fail(f"kernel {stage} is not the one with {name}")
        at = {word: int(value) for word, value in (line.split() for line in run.reported(stage, "moment"))}
        order = [at[moment] for moment, _ in PHASES] + [at[END]]
        if order != sorted(order):
            raise Fail(f"the moments of kernel {stage} are not one after the other: {at}")
        hops.append(at)
    return run, hops
