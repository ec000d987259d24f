# SPDX-License-Identifier: GPL-2.0
"""A long chain of kexecs, with files that change at each hop; scripts/soak runs it.

kho-guest (soak.c) checks every byte; here is what must not grow from hop to hop.
"""
import re
import sys
from pathlib import Path

from . import qemu as g
from .qemu import Fail, Guest

# What must be the same in all kernels of a chain that are of one kind, but for so much.  Blocks left
# are those that nobody took back; nodes are counted before a file is preserved, and
# depend on where the kernel's own blocks lie.
BOUNDS = {"pages in all": 16, "pages free or in files": 256, "blocks left": 0, "nodes": 32,
          "KiB of scratch": 0}
PATIENCE = 90

STAGE = """
report step hop
save before /sys/kernel/debug/kho/summary
check kho-guest soak {seed} $kho_stage
save after /sys/kernel/debug/kho/summary
for length in $(cat /sys/kernel/debug/kho/out/scratch_len); do
	report scratch $((length))
done
"""


class Show:
    """Says how far the chain is."""

    def __init__(self, share, hops):
        self.share, self.hops, self.shown = share, hops, 0

    def __call__(self):
        result = self.share / "result"
        stages = re.findall(r"^(\d+) step hop", result.read_text(errors="replace"), re.M) if result.exists() else []
        if len(stages) // 5 > self.shown:
            self.shown = len(stages) // 5
            g.say(f"soak: {len(stages) - 1} of {self.hops} kexecs")


def figure(run, stage, name, what):
    """A number of a summary, or None where the kernel has none."""
    path = run.share / f"{name}.{stage}"
    found = re.search(rf"^{what}(\d+)", path.read_text(), re.M) if path.exists() else None
    return found and int(found[1])


def numbers(run, stage, word):
    lines = run.reported(stage, word)
    if not lines:
        raise Fail(f"kernel {stage} did not report: {word}")
    return [int(number) for number in re.findall(r"\d+", lines[0])]


def measure(run, stage):
    total, free = numbers(run, stage, "soak pages")
    return {"pages in all": total, "pages free or in files": free,
            "blocks left": figure(run, stage, "after", "in not restored: "),
            "nodes": figure(run, stage, "before", "out nodes: "),
            "KiB of scratch": sum(map(int, run.reported(stage, "scratch"))) >> 10}


def through(log, kernels, hops, seed, broken="", show=False):
    """Goes through the kernels, [(name, image)] in turn; returns lines about it."""
    try:
        return chain(log, kernels, hops, seed, broken, show)
    except Fail as fail:
        raise Fail(f"{fail}; seed {seed}") from fail


def chain(log, kernels, hops, seed, broken, show):
    """As through(); what failed does not name the seed."""
    count = len(kernels)
    names = [kernels[stage % count][0] for stage in range(hops + 1)]
    with Guest(log, kernels[0][1], **dict(kernels)) as guest:
        script = STAGE.format(seed=seed)
        stages = [script + f"next_kernel {name}" for name in names[1:]] + [script]
        words = {"": "", "byte": " kho_break=1", "leak": " kho_leak=1"}[broken]
        run = guest.run(f"kho=on liveupdate=on{words}", stages, mem="640M", smp=2,
                        timeout=g.HANG + PATIENCE * hops,
                        during=Show(guest.share, hops) if show else None)
        run.expect(hops + 1)
        for stage, name in enumerate(names[1:], 2):
            if (g.takeover(run, stage) is not None) != (name != "c"):
                raise Fail(f"kernel {stage} is not the one with {name}")
        found = {stage: measure(run, stage) for stage in range(1, hops + 2)}
        checked = [numbers(run, stage, "soak verified") for stage in range(2, hops + 2)]
    # lib/test_kho.c preserves in one kernel and restores in the next.
    period = count if count % 2 == 0 else 2 * count
    lines = [f"seed {seed}: {hops} kexecs ({' '.join(dict.fromkeys(names))}), {sum(row[0] for row in checked)} "
             f"files and {sum(row[1] for row in checked)} bytes verified in {sum(row[2] for row in checked)} "
             f"sessions, {sum(row[3] for row in checked)} files discarded"]
    for what, bound in BOUNDS.items():
        said = []
        for start in range(min(3, hops + 1), min(3 + period, hops + 2)):
            values = [found[stage][what] for stage in range(start, hops + 2, period)]
            # The C implementation has no summary.
            if None in values:
                continue
            said.append(f"{values[0]} and {values[-1]} ({names[start - 1]})")
            if max(values) - min(values) > bound:
                raise Fail(f"{what} must not differ by more than {bound}: {values}")
        lines.append(f"{what}, in the first and the last of a kind: {', '.join(said)}")
    return lines


def main(log, broken, hops, seed, *kernels):
    """kernels: words NAME:IMAGE."""
    g.WORK.mkdir(exist_ok=True)
    try:
        lines = through(Path(log), [tuple(word.split(":", 1)) for word in kernels], int(hops), int(seed),
                        broken, show=True)
    except Fail as fail:
        print(f"soak: FAIL ({fail}, log at {log})")
        return 1
    print("\n".join(lines))
    print("soak: PASS")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
