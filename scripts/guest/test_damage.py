# SPDX-License-Identifier: GPL-2.0
"""Damaged handovers: what each kind costs, which is not more than the rules say, and never the machine."""
import os
import re

import pytest

from . import qemu as g
from .damage import AREAS, KINDS, Model, Ram, area_of, flip_bits
from .qemu import spoilt
from .test_kexec import API_USER, FILL, K, RETRIEVE, SAVE_FDT, WHOLE, expect, expect_waiting, make, meddle

USUAL = r"found kexec handover|exec from|takeover: order|takeover: \d+ blocks in|scratch has|Rust"


def expect_lines(lines, patterns):
    """Each of the lines is one of those that are expected, and the other way round."""
    left = list(lines)
    for pattern in patterns:
        found = [line for line in left if re.match(pattern, line)]
        expect(f"no line: {pattern}; but: {left}", found)
        left.remove(found[0])
    expect(f"more lines: {left}", not left)


def numbers(text):
    return [int(word) for word in re.findall(r"\b\d+\b", text)]


def damaged(log, note, kinds, **options):
    """R -> R with some kinds of damage at once: what is said, lost and kept is what they cost."""
    found = {}
    refused = "|".join(kind.refused for kind in kinds if kind.refused)
    early = any(kind.early for kind in kinds)
    luo = next((kind.luo for kind in kinds if kind.luo != "back"), "back")

    def change(at):
        for kind in kinds:
            kind.damage(at)
        found["model"] = model = None if early else Model(at, at.regions)
        readable = model.frames if model else ()
        found["names"] = set(at.nodes()) - {"/"} if model else ()
        found["pages"] = {pfn: at.ram.read(pfn << 12) for pfn in at.ours if pfn in readable}
        lost = model.kept if model and not model.refused else ()
        (guest.share / "lost").mkdir()
        (guest.share / "lost/frames").write_text("".join(f"{pfn}\n" for pfn in sorted(lost)))

    takes = not refused and luo == "back"
    # LUO follows pointers of its own, which the damage may have led astray.
    # The parameter about memory that is plugged in does not change the firmware's map.
    again = "nokaslr memory_hotplug.memmap_on_memory=0 liveupdate=" + ("off" if luo == "off" else "on")
    script = SAVE_FDT + """
        for blob in /sys/kernel/debug/kho/in/sub_fdts/*; do
            [ ! -e "$blob" ] || cat "$blob" >/dev/null || fail "$blob"
        done
        """ + (RETRIEVE if takes else "kho-guest retrieve run && fail LUO has the session\n") + FILL + \
        "check kho-guest waiting /mnt/lost\n"
    with make(log) as guest:
        done = meddle(guest, change, script, first=WHOLE, again=again, timeout=240, **options)
        expect("nothing was damaged", found)
        if takes:
            guest.expect_files(done, 1, 2)
        model, pages = found["model"], found["pages"]
        if not takes:
            with Ram(guest.dir / "ram", 512 << 20) as ram:
                lost = [pfn for pfn, page in pages.items() if ram.read(pfn << 12) != page]
            expect(f"{len(lost)} of {len(pages)} pages were overwritten", not lost)
    lines = done.said(2, rf"KHO: (?!{USUAL})")
    if early:
        expect_lines(lines, [f"KHO: handover refused: ({refused})"])
        return
    said = [pattern for kind in kinds for pattern in kind.said]
    if model.refused:
        why, address = model.refused
        expect(f"refused: {model.refused}", re.fullmatch(refused, why))
        expect_lines(lines, [rf"KHO: handover refused: {re.escape(why)} \({address:#x}\)$",
                             "KHO: .* KiB that the refused handover names stay reserved|"
                             "KHO: too little memory would be left", *said])
        expect_kept(model, numbers(lines[1])[:1], len(model.frames) + len(model.kept))
        note(f"{why}, {len(pages)} pages")
        return
    expect(f"not refused, {len(model.lost)} lost", refused in ("", ".*"))
    if model.lost:
        said.append(rf"KHO: takeover: {len(model.lost)} blocks are not RAM outside scratch and cannot be restored, "
                    rf"the first at {model.lost[0][0] << 12:#x}; \d+ KiB of them stay reserved$")
        line = done.expect_line(2, "of them stay reserved")
        expect_kept(model, numbers(line)[-1:], len(model.kept))
    said += [f"KHO: subtree {re.escape(name if name.isprintable() else '?')} ignored: " for name in model.ignored]
    said += ["KHO: memory was preserved twice, only the larger block can be restored"] * model.twice
    if refused == ".*":
        # What is anything may be in the place of what a user asks for.
        lines = [line for line in lines if not re.match("KHO: (no vmalloc area|nothing to restore)", line)]
    expect_lines(lines, said)
    if refused != ".*":
        for what in "lost", "ignored", "twice":
            its, whole = getattr(model, what), [getattr(kind, what) for kind in kinds]
            expect(f"{what}: {its}, not {whole}",
                   (its if what == "twice" else len(its)) == (any(whole) if what == "twice" else sum(
                       len(of) if what == "ignored" else of for of in whole)))
    figures = g.takeover(done, 2)
    want = (len(model.blocks), len(model.frames), model.read)
    expect(f"{figures}, not {want}", want == (figures["blocks"], figures["pages"], figures["nodes"]))
    if "kho_test" not in model.ignored and luo != "off" and refused != ".*":
        done.expect_line(2, "KHO restore succeeded")
    expect_waiting(done, number=len(model.kept))
    # Not every name can be one of a file.
    if all(name.isidentifier() or "-" in name for name in found["names"]):
        shown = {line.split()[0] for line in done.reported(2, "in blob")}
        expect(f"debugfs has {shown} of {found['names']}", shown == found["names"] - model.ignored)
    note(f"{len(model.lost)} blocks, {len(model.ignored)} subtrees lost")


def expect_kept(model, found, pages):
    """What stays reserved: more only of blocks that are partly in scratch, in which this boot has a part."""
    outside = all(pfn not in range(1 << 52) or not model.ram.in_scratch(pfn + i)
                  for pfn, order in model.lost for i in {0, (1 << order) - 1})
    if found:
        expect(f"{found} KiB are kept, not {4 * pages}",
               found[0] == 4 * pages if outside else found[0] >= 4 * pages)


QUICK = [name for name, kind in KINDS.items() if kind.quick]
# What costs a block or a blob leaves room for more of it.
SMALL = [name for name in QUICK if not KINDS[name].refused and KINDS[name].luo == "back"]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in QUICK and name not in SMALL else pytest.mark.long) for name in KINDS])
def test_damage(log, note, record_property, name):
    """R -> R with one kind of damage"""
    record_property("kinds", [name])
    damaged(log, note, [KINDS[name]])


def test_damage_small(log, note, record_property):
    """R -> R with all kinds at once that cost little and are not long: each costs itself"""
    record_property("kinds", SMALL)
    damaged(log, note, [KINDS[name] for name in SMALL])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(int(os.environ.get("SEEDS") or 5)))
def test_damage_random(log, note, record_property, seed):
    """R -> R with bits flipped in nodes of the tree: what the model of the rules makes of it"""
    record_property("kinds", ["bits flipped in nodes"])
    damaged(log, note, [flip_bits(seed)])


def test_damage_memblock(log, record_property):
    """R -> R, reserve_mem= finds a blob that is empty and nowhere: it gets new memory, to hand over"""
    record_property("kinds", ["blob of reserve_mem="])
    with make(log) as guest:
        done = meddle(guest, lambda at: at.add_subtree("memblock", 1 << 45, 0), SAVE_FDT + RETRIEVE + FILL,
                      again="reserve_mem=2M:4096:ramoops")
        guest.expect_files(done, 1, 2)
        blobs = [line.split()[0] for line in done.reported(2, "out blob")]
    done.expect_line(2, r"KHO: subtree memblock ignored: ")
    expect("found what is not there", not done.said(2, "Revived memory reservation"))
    expect(f"kernel 2 hands over {blobs}", "memblock" in blobs)


def test_damage_areas(log, note, record_property):
    """R -> R with the lists of vmalloc areas damaged, each in another way: each costs its area, or nothing"""
    record_property("kinds", [f"area {name}" for name in AREAS])
    def change(at):
        for number, (damage, _) in enumerate(AREAS.values()):
            damage(area_of(at, number))

    with make(log, K) as guest:
        done = meddle(guest, change, RETRIEVE + FILL, mem="768M", args=f"{API_USER} kho_kunit_leave", timeout=300)
        guest.expect_files(done, 1, 2)
    lines = [line.removeprefix("kho_kunit: ") for line in done.said(2, "kho_kunit: (?!early)")]
    ends = [f"area {number} {'came back' if whole else 'is lost'}" for number, (_, whole) in enumerate(AREAS.values())]
    for line, want in zip(lines, [*(f"{what} came back" for what in ("folios", "pages", "range")), *ends]):
        expect(f"{line}, not {want}: {list(AREAS)[int(want.split()[1])] if 'area' in want else ''}", line == want)
    expect(f"{len(lines)} lines", len(lines) == 3 + len(AREAS))
    # There are ten lines of a kind at most in five seconds.
    lost = sum(not whole for _, whole in AREAS.values())
    said = done.said(2, "KHO: no vmalloc area: ")
    expect(f"{len(said)} lines for {lost} areas", len(said) == min(10, lost))
    note(f"{len(AREAS)} areas")
