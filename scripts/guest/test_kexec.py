# SPDX-License-Identifier: GPL-2.0
"""Tests of kexec handover in QEMU; run by scripts/test.

R is the kernel with the Rust implementation, C the one with the C one, and P has
the Rust implementation and as little else as can be.  K is R with its KUnit suites
and a user of the API.  The one for arm64 has the benchmark in it.
"""
import itertools
import json
import os
import random
import re
import struct
import subprocess

import libfdt
import pytest

from . import bench, kvm, qemu as g, soak, vm as machine
from .damage import AREAS, Handover, Ram, fdt_nodes as nodes_of
from .qemu import Fail, Guest, spoilt

R, C, P, K, ARM64 = "RUST", "C", "PLAIN", "KUNIT", "ARM64"


def data(size, seed=1):
    return random.Random(seed).randbytes(size)


def make(log, kernel=None, size=300_001, **images):
    """A guest with two small files, or one of a size, for its session."""
    guest = Guest(log, kernel or R, **images)
    guest.add_file("data", data(size))
    guest.add_file("empty", b"")
    return guest


def expect(what, condition):
    if not condition:
        raise Fail(what)


# Flattened device trees, as far as KHO uses them.

def fdt_nodes(blob, file, size=None):
    """The nodes of a tree below its root, and the root: {path: {property: bytes}}.  size: of the file, else the tree's."""
    try:
        fdt = libfdt.FdtRo(bytes(blob))
    except libfdt.FdtException as error:
        raise Fail(f"{file} cannot be read: {error}") from None
    expect(f"{file} has {len(blob)} bytes, its header says {fdt.totalsize()}", len(blob) == (size or fdt.totalsize()))
    return {"" if name == "/" else "/" + name: properties
            for name, properties in nodes_of(fdt).items()}


SAVE_FDT = """
report step saving debugfs
kho=/sys/kernel/debug/kho
for way in out in; do
	save $way-fdt $kho/$way/fdt
	for blob in $kho/$way/sub_fdts/*; do
		[ ! -e "$blob" ] || report "$way blob $(basename "$blob") $(wc -c <"$blob")"
	done
done
"""


def expect_fdt(guest, run, stage, way):
    """debugfs shows the whole handover, in or out: the tree and each of its blobs."""
    path, file = guest.share / f"{way}-fdt.{stage}", f"kernel {stage}: {way}/fdt"
    expect(f"{file} does not exist", path.exists())
    # The FDT that is handed over grows in its page, and the file has all of that.
    nodes = fdt_nodes(path.read_bytes(), file, 4096 if way == "out" else None)
    root = nodes.pop("")
    expect(f"{file} is not kho-v4", root.get("compatible") == b"kho-v4\0")
    expect(f"{file} has no map", len(root.get("preserved-memory-map", b"")) == 8)
    blobs = dict(line.rsplit(" ", 1) for line in run.reported(stage, f"{way} blob"))
    expect(f"{file}: sub_fdts has {list(blobs)}", {"LUO", "kexec-metadata"} <= set(blobs))
    expect(f"{file} has {list(nodes)}, sub_fdts has {list(blobs)}", len(nodes) == len(blobs))
    for name, size in blobs.items():
        node = nodes.get(f"/{name}")
        expect(f"{file} lacks {name}", node is not None)
        expect(f"{file} has no address for {name}", len(node.get("preserved-data", b"")) == 8)
        expect(f"{file} has a wrong size for {name}",
               node.get("blob-size") == struct.pack("=Q", int(size)))


# Stages, as shell scripts for the guest.

PRESERVE, RETRIEVE = g.ROUND_TRIP[0].replace("next_kernel next", ""), g.ROUND_TRIP[1]
WHOLE = PRESERVE.replace("kho-guest preserve", "kho-guest whole")
RENEW = """
report step renewing the session
check kho-guest renew run
"""
MEMORY = """
while read -r name value _; do
	case $name in MemTotal:|MemAvailable:) report "$name $value" ;; esac
done </proc/meminfo
"""
# Takes all memory but a little, and overwrites it.
FILL = """
report step filling memory
mkdir /tmp/fill
mount -t tmpfs -o size=100% fill /tmp/fill || fail tmpfs
megabytes=$(awk '$1 == "MemAvailable:" { print int($2 / 1024) - 40 }' /proc/meminfo)
dd bs=1M count="$megabytes" if=/dev/zero of=/tmp/fill/1 || fail dd
"""
SCRATCH = """
for length in $(cat /sys/kernel/debug/kho/out/scratch_len); do
	report scratch $((length))
done
"""


def test_run(log):
    """R -> R, what make run does"""
    with make(log) as guest:
        g.expect_round_trip(guest, g.round_trip(guest, smp=2))


def test_selftest_kho(log):
    """R -> R, selftests/kho: the memory test_kho preserved"""
    cpio = g.Cpio().dirs("dev", "proc", "debugfs").console()
    cpio.file("init", g.selftest("kho", "init")).file("kernel", g.image(R))
    done = boot_selftest(log, cpio, spoilt("kho=on", ""))
    # Its second kernel has no initramfs: the panic is how that test ends.
    done.expect(2, ends_with="Kernel panic - not syncing: VFS: Unable to mount root fs")
    done.expect_line(2, "KHO restore succeeded")


def boot_selftest(log, cpio, cmdline):
    """Boots an archive of a selftest, which has its own init."""
    path = g.WORK / f"{log.stem}.cpio"
    try:
        return g.qemu(log, R, cpio.write(path), cmdline, smp=2)
    finally:
        for name in path, path.with_suffix(".inner"):
            name.unlink(missing_ok=True)


def test_selftest_liveupdate(log, note):
    """R, selftests/liveupdate: the session interface, without a kexec"""
    with Guest(log, R) as guest:
        guest.programs["liveupdate"] = g.selftest("liveupdate", "liveupdate", nolibc=False)
        done = guest.run("kho=on " + spoilt("liveupdate=on", ""),
                         ["report step liveupdate\nliveupdate >/mnt/output 2>&1\nreport status $?"])
        done.expect(1)
        output = (guest.share / "output").read_text()
    passed, failed = (re.findall(rf"^{word} \d+.*", output, re.M) for word in ("ok", "not ok"))
    plan = re.search(r"^1\.\.(\d+)", output, re.M)
    skipped = [line for line in passed if "# SKIP" in line]
    log.with_suffix(".ktap").write_text(output)
    for bad in failed, skipped:
        expect(f"{len(bad)} cases: {bad[:1]}", not bad)
    expect(f"{len(passed)} of {plan and plan[1]} cases", plan and len(passed) == int(plan[1]) >= 15)
    expect("exit status", done.reported(1, "status") == ["0"])
    note(f"{len(passed)} cases")


@pytest.mark.parametrize("name", ["kexec-simple", "multi-session", "stress-files", "stress-sessions"])
def test_luo(log, note, name):
    """As selftests/liveupdate/vmtest.sh does it: an archive within the archive."""
    init = g.selftest("liveupdate", "init")
    binary = g.selftest("liveupdate", f"luo_{name.replace('-', '_')}")
    inner = g.Cpio().dirs("dev", "proc", "debugfs").console().file("init", init).file("test_binary", binary)
    cpio = g.Cpio().dirs("dev", "proc", "debugfs").console().file("init", init).file("kernel", g.image(R))
    cpio.file("test_binary", binary).file("initrd.img", inner.write(g.WORK / f"{log.stem}.inner"))
    done = boot_selftest(log, cpio, "kho=on " + spoilt("liveupdate=on", ""))
    done.expect(2)
    done.printed(2, "INIT: Stage 2 completed successfully")
    note(done.printed(2, "[A-Z -]*TEST PASSED.*").strip("# -"))


RAMOOPS = ("reserve_mem=4M:4096:ramoops ramoops.mem_name=ramoops ramoops.pmsg_size=0x100000 "
           "ramoops.console_size=0x40000")
WRITE_PMSG = 'echo "{}" >/dev/pmsg0 || fail pmsg\n'
READ_PMSG = """
mount -t pstore pstore /tmp || fail pstore
for file in /tmp/pmsg-*; do report pmsg "$(cat "$file")"; done
"""


def expect_pmsg(run, stage, text):
    expect(f"pmsg has: {run.reported(stage, 'pmsg')}", run.reported(stage, "pmsg") == [text])


def test_reserve_mem(log):
    """R -> R -> R, regions of reserve_mem keep their place and content; one is new in the second"""
    texts = ["carried by reserve_mem", "and once more"]

    def write(text):
        return WRITE_PMSG.format(spoilt(text, "else")) + f"""
            echo "<6>console of kernel $kho_stage" >/dev/kmsg
            """

    def read(stage):
        return READ_PMSG + f"""
            report console "$(grep -c 'console of kernel {stage}' /tmp/console-*)"
            """

    with make(log) as guest:
        # No 1 GiB block is free of preserved memory, so that z comes from scratch.
        done = guest.run(f"kho=on liveupdate=on {RAMOOPS}", [
            write(texts[0]) + SCRATCH + "next_kernel next",
            read(1) + write(texts[1]) + SCRATCH + "next_kernel next",
            read(2) + SCRATCH],
            again=f"kho=on liveupdate=on {RAMOOPS} reserve_mem=2M:4096:z")
        done.expect(3)
    for stage in 2, 3:
        expect_pmsg(done, stage, texts[stage - 2])
        expect(f"the console of kernel {stage - 1} is not in pstore",
               done.reported(stage, "console") not in ([], ["0"]))
    expect("z was there before", not done.said(2, "Revived memory reservation 'z'"))
    done.expect_line(3, "Revived memory reservation 'z'")
    first, second, third = (sum(map(int, done.reported(stage, "scratch"))) for stage in (1, 2, 3))
    left = re.search(r"\d+", done.expect_line(2, "KiB of scratch are left"))[0]
    expect(f"scratch is {first}, {second}, {third} bytes, and {left} KiB are left",
           2 << 20 <= first - second <= 8 << 20 and second == third == int(left) << 10)


def test_reserve_mem_given_back(log, note):
    """R -> R -> R, a region of reserve_mem= is freed page by page in the second: its pages are sound and count
    once, and the third does not find it"""
    size = spoilt(12, 8) << 10
    with make(log) as guest:
        done = guest.run("kho=on liveupdate=on reserve_mem=12M:4M:trace trace_instance=boot_map@trace", [
            "next_kernel next",
            f"""
            mount -t tracefs tracefs /sys/kernel/tracing || fail tracefs
            {MEMORY}
            check rmdir /sys/kernel/tracing/instances/boot_map
            {MEMORY}
            """ + FILL + "umount /tmp/fill\nnext_kernel next", ""])
        done.expect(3)
    done.expect_line(2, "Revived memory reservation 'trace'")
    expect("the third kernel has what was freed", not done.said(3, "Revived memory reservation"))
    done.expect_line(3, "FDT 'memblock' has no child 'trace'")
    before, after = map(int, done.reported(2, "MemTotal:"))
    expect(f"{before} kB before, {after} kB after, not {size} kB more", after - before == size)
    note(f"{after - before} kB more")


def test_chain(log):
    """R -> R -> R -> R, the data preserved anew by each, debugfs complete in each"""
    with make(log) as guest:
        done = guest.run("kho=on liveupdate=on", [
            PRESERVE + SAVE_FDT + "next_kernel next",
            RENEW + SAVE_FDT + "next_kernel next",
            RENEW + SAVE_FDT + "next_kernel next",
            RETRIEVE + SAVE_FDT])
        done.expect(4)
        guest.expect_files(done, 1, 2, 3, 4)
        for stage in 2, 4:
            done.expect_line(stage, "KHO restore succeeded")
        counts = [re.search(r"count (\d+)", done.expect_line(stage, r"KHO: exec from: .*\(count \d+\)"))[1]
                  for stage in (2, 3, 4)]
        expect(f"kexec counts are {counts}", counts == ["1", "2", "3"])
        for stage in 2, 3, 4:
            expect_fdt(guest, done, stage, "in")
        for stage in 1, 2, 3, 4:
            expect_fdt(guest, done, stage, "out")


def between(log, first, second):
    """From one implementation to the other and, for what it left behind, back."""
    expect("RUST_KERNEL and C_KERNEL are the same", g.image(R).read_bytes() != g.image(C).read_bytes())
    with make(log, first, size=3_000_001, other=second) as guest:
        done = guest.run("kho=on liveupdate=on", [
            PRESERVE + "next_kernel other", RENEW + "next_kernel next", RETRIEVE])
        done.expect(3)
        guest.expect_files(done, 1, 2, 3)
        done.expect_line(2, "KHO restore succeeded")
        # The Rust implementation is the one that reports its takeover.
        for stage, kernel in (2, second), (3, first):
            expect(f"kernel {stage} is the wrong one",
                   (g.takeover(done, stage) is not None) == (kernel == R))


def test_c_to_rust(log):
    """C -> R -> C"""
    between(log, C, R)


def test_rust_to_c(log):
    """R -> C -> R"""
    between(log, R, C)


def test_fewer_nodes(log):
    """C on two nodes -> R that knows of none, and back: the table of scratch areas may be longer"""
    with make(log, C, other=P) as guest:
        done = guest.run("kho=on liveupdate=on", [
            PRESERVE + SCRATCH + "next_kernel other", RENEW + "next_kernel next", RETRIEVE], smp=2, nodes=2)
        done.expect(3)
        guest.expect_files(done, 1, 2, 3)
        areas = len(done.reported(1, "scratch"))
        expect(f"{areas} areas of scratch", areas == 4)
        done.expect_line(2, "KHO: takeover: ")


def summary(guest, name):
    """The figures of each line of debugfs' summary."""
    lines = (guest.share / name).read_text().splitlines()
    return {what: [int(number) for number in re.findall(r"\d+", text)]
            for what, text in (line.split(": ", 1) for line in lines)}


def test_summary(log, note):
    """R -> R: what debugfs says is preserved, was taken over, and is not restored yet"""
    size = 5_000_000
    with make(log, size=size) as guest:
        done = guest.run("kho=on liveupdate=on", [
            PRESERVE + "save summary /sys/kernel/debug/kho/summary\nnext_kernel next",
            "save before /sys/kernel/debug/kho/summary\n" + spoilt(RETRIEVE, "") + "save summary /sys/kernel/debug/kho/summary\n"])
        done.expect(2)
        left, before, after = (summary(guest, name) for name in ("summary.1", "before.2", "summary.2"))
    expect(f"{left} became {before}", before["in"] == left["out"] and before["in nodes"] == left["out nodes"])
    expect(f"{before['in not restored']} of {before['in']}", before["in not restored"] <= before["in"])
    restored = [was - now for was, now in zip(before["in not restored"], after["in not restored"])]
    expect(f"{restored} restored", restored[0] > 0 and restored[1] >= size >> 10)
    expect(f"{before}", before["in lost"] == [0] and before["in cycles"][0] > 0)
    orders = [text[1] for what, text in before.items() if what.startswith("in order ")]
    expect(f"{orders}", sum(orders) == before["in"][1])
    note(f"{restored[1]} KiB restored")


def test_trace(log, note):
    """R -> R: the tracepoints' pages are those of the summary"""
    save = "save summary $kho/summary\nsave trace /sys/kernel/debug/tracing/trace\n"
    on = "trace_event=kho:* trace_buf_size=4M"
    with make(log, size=5_000_000) as guest:
        done = guest.run(f"kho=on liveupdate=on {on}", [
            PRESERVE + "kho=/sys/kernel/debug/kho\n" + save + "next_kernel next",
            RETRIEVE + "kho=/sys/kernel/debug/kho\n" + save], again=f"kho=on liveupdate=on {spoilt(on, '')}")
        done.expect(2)
        left, after = summary(guest, "summary.1"), summary(guest, "summary.2")
        traces = [(guest.share / f"trace.{stage}").read_text() for stage in (1, 2)]

    def kib(trace, event):
        return sum(int(pages) for pages in re.findall(rf" kho_{event}: pfn=\S+ nr_pages=(\d+)", trace)) << 2

    kept = kib(traces[0], "preserve") - kib(traces[0], "unpreserve")
    expect(f"{kept} KiB are preserved, not {left['out'][1]}", kept == left["out"][1])
    found = re.findall(r" kho_takeover: runs=(\d+) nr_pages=(\d+) nodes=(\d+)", traces[1])
    want = (after["in"][1] >> 2, after["in nodes"][0])
    expect(f"takeover {found}, not {want}", len(found) == 1 and tuple(map(int, found[0][1:])) == want)
    restored = after["in"][1] - after["in not restored"][1]
    expect(f"{kib(traces[1], 'restore')} KiB were restored, not {restored}", kib(traces[1], "restore") == restored > 0)
    note(f"{restored} KiB restored")


def test_debugfs_off(log):
    """R -> R with debugfs=off -> R"""
    with make(log) as guest:
        done = guest.run("kho=on liveupdate=on", [
            PRESERVE + "next_kernel next debugfs=off",
            "[ ! -e /sys/kernel/debug/kho ] || fail debugfs" + RENEW + "next_kernel next", RETRIEVE])
        done.expect(3)
        guest.expect_files(done, 1, 2, 3)
        done.expect_line(2, "KHO restore succeeded")


def test_kho_off_second(log):
    """R -> R with kho=off: reserve_mem= finds its region, and nobody gets the rest"""
    text, size = "carried although KHO is off", 64 << 20
    with make(log, size=size) as guest:
        done = guest.run(f"kho=on liveupdate=on {RAMOOPS}", [
            WRITE_PMSG.format(spoilt(text, "else")) + WHOLE + "next_kernel next",
            "[ ! -e /dev/liveupdate ] || fail /dev/liveupdate is there" + READ_PMSG + "umount /tmp" + FILL],
            again=f"kho=off liveupdate=on {RAMOOPS}", ram=guest.dir / "ram")
        done.expect(2)
        guest.expect_files(done, 1)
        expect_pmsg(done, 2, text)
        with Ram(guest.dir / "ram", 1 << 30) as ram:
            content = b"".join(ram.read(pfn << 12) for pfn in frames(guest))
        expect("the file was overwritten", content[:size] == data(size))
    lines = done.said(2, r"KHO: off, but \d+ KiB were handed over and stay reserved until they are restored")
    expect(f"{len(lines)} lines about it: {lines}", len(lines) == 1)
    kept = int(re.findall(r"\d+", lines[0])[0])
    expect(f"{kept} KiB", size + (4 << 20) <= kept << 10 <= size + (16 << 20))
    expect("refused", not done.said(2, "KHO: handover refused"))


def test_kho_off(log):
    """R, cold with kho=off"""
    with Guest(log, R) as guest:
        done = guest.run(f"kho={spoilt('off', 'on')} liveupdate=on", ["""
            [ ! -e /dev/liveupdate ] || fail /dev/liveupdate is there
            for file in /sys/kernel/debug/kho/out/*; do [ ! -e "$file" ] || fail "$file" is there; done"""])
        done.expect(1)


def test_kho_scratch(log):
    """R, cold: values of kho_scratch= that are wrong, and some that are right"""
    def boot(value, **options):
        done = guest.run(f"kho=on liveupdate=on{' kho_scratch=' + value if value else ''}",
                         ["[ -e /dev/liveupdate ] || fail no LUO" + SCRATCH], **options)
        log.rename(log.with_suffix(f".{value or 'default'}.log"))
        done.expect(1)
        return done, [int(size) >> 20 for size in done.reported(1, "scratch")]

    with Guest(log, R) as guest:
        _, default = boot("")
        expect(f"default scratch is {default} MiB", sum(default) > 16)
        for value in "banana", "1M,2M", "200", "4294967296%", "16M,16M,16M,1M":
            done, sizes = boot(value)
            lines = done.said(1, r"KHO: .*kho_scratch")
            expect(f"{value}: {len(lines)} lines about kho_scratch", len(lines) == 1)
            # The kernel's own size moves a little with every boot.
            expect(f"{value}: scratch is {sizes} MiB, by default {default} MiB",
                   abs(sum(sizes) - sum(default)) <= 8)
        done, sizes = boot(spoilt("16M,64M,16M", "16M,32M,16M"))
        expect(f"scratch is {sizes} MiB", sizes == [16, 64, 16])
        done.expect_line(1, r"KHO: .*\b16 ?MiB.*\b64 ?MiB.*\b16 ?MiB")
        # The default is 200 %.
        _, sizes = boot("150%")
        expect(f"150%: scratch is {sizes} MiB, by default {default} MiB",
               0 < sum(sizes) < 0.9 * sum(default))
        # Neither node has room for all of it.
        _, sizes = boot("300M,0,0", mem="512M", smp=2, nodes=2)
        expect(f"in pieces, scratch is {sizes} MiB", len(sizes) > 1 and sum(sizes) == 300)


# As large as a distribution's: the file of the next kernel, the memory that it asks for, and the
# initramfs of both.
IMAGE, INIT_SIZE, INITRD = 15 << 20, 64 << 20, 60 << 20


def large(guest, initrd=INITRD):
    """Makes the guest's initramfs and its next kernel as large as a distribution's."""
    padding = guest.dir / "padding"
    padding.write_bytes(data(initrd))
    guest.programs["padding"] = padding
    image = bytearray((guest.share / "next").read_bytes())
    image += data(IMAGE - len(image))
    # init_size in the setup header: what a loader has to keep free.
    struct.pack_into("<I", image, 0x260, INIT_SIZE)
    (guest.share / "next").write_bytes(image)


def scratch_use(run, stage):
    """What a kernel says about scratch: its size, the number of areas, and what booting took."""
    line = run.expect_line(stage, r"KHO: scratch has \d+ KiB")
    return [int(number) for number in re.findall(r"\d+", line)]


# Machines that not every host has are only run when they are named.
@pytest.mark.parametrize("mem, nodes", [
    pytest.param(mem, nodes, id=mem + (f"-{nodes}-nodes" if nodes > 1 else ""),
                 marks=[pytest.mark.rare] * (mem == "12G" or (mem, nodes) == ("4G", 2)))
    for mem in ("512M", "1G", "4G", "12G") for nodes in (1, 2)])
def test_scratch(log, note, mem, nodes):
    """R -> R in a small machine: scratch is large enough, and no larger"""
    with make(log) as guest:
        large(guest)
        done = guest.run("kho=on liveupdate=on" + spoilt("", " kho_scratch=300%"),
                         ["rm /bin/padding\n" + PRESERVE + SCRATCH + "next_kernel next", RETRIEVE + SCRATCH],
                         mem=mem, nodes=nodes, smp=nodes, timeout=300)
        size, areas, first = scratch_use(done, 1)
        # Areas are rounded up to 4 MiB.
        expect(f"{size} KiB of scratch in {areas} areas, booting took {first} KiB",
               2 * first <= size <= 2 * first + areas * 4096)
        g.expect_round_trip(guest, done)
    _, _, second = scratch_use(done, 2)
    for stage in 1, 2:
        sizes = [int(length) >> 10 for length in done.reported(stage, "scratch")]
        expect(f"kernel {stage} has scratch of {sizes} KiB", sum(sizes) == size)
    text = f"{size} KiB of scratch, boots took {first} and {second} KiB"
    # The two kernels differ by some pages.
    expect(text, 2 * second <= 1.01 * size)
    note(text)


def test_scratch_reserve_mem(log, note):
    """R, cold: scratch is as large with reserve_mem= as without, and leaves as much beside it"""
    def boot(mem, args):
        done = guest.run(f"kho=on liveupdate=on {args}", [MEMORY], mem=mem)
        log.rename(log.with_suffix(f".{mem}{'.plain' if not args else ''}.log"))
        done.expect(1)
        size, _, took = scratch_use(done, 1)
        return size, took, int(done.reported(1, "MemTotal:")[0])

    results = []
    with Guest(log, R) as guest:
        for mem, args, reserved in [
                ("512M", 'reserve_mem=100M:4096:x reserve_mem=\"27M:1M:y z\"', 127),
                ("1G", "reserve_mem=256M:4096:x reserve_mem=1M:4096:x", 256)]:
            plain = boot(mem, "")
            size, took, total = boot(mem, args + spoilt("", " kho_scratch=300%"))
            what = f"{mem}: {size} KiB of scratch, {took} KiB taken, {total} kB in all; {plain}"
            expect(what, abs(size - plain[0]) <= 8192 and abs(took - plain[1]) <= 1024)
            expect(what, abs(plain[2] - total - (reserved << 10)) <= 1024)
            results.append(f"{size} KiB in {mem}")
    note(", ".join(results))


def test_scratch_too_large(log, note):
    """R, scratch that leaves too little: no KHO, one line says why; a little less is fine"""
    def boot(name, args, stages, kernels=1):
        # A kernel in the middle of memory would leave no block of that size.
        done = guest.run(f"liveupdate=on nokaslr {args}", stages, mem="512M")
        log.rename(log.with_suffix(f".{name}.log"))
        done.expect(kernels)
        return done

    with make(log) as guest:
        off = boot("off", "kho=off", [MEMORY])
        size = spoilt(440, 100)
        large = boot("large", f"kho=on kho_scratch={size}M,0,0", [
            "[ ! -e /dev/liveupdate ] || fail KHO is on" + MEMORY])
        lines = large.said(1, "KHO: disabled")
        expect(f"lines about KHO: {lines}", len(lines) == 1)
        scratch, left, total, least = map(int, re.findall(r"(\d+) KiB", lines[0]))
        expect(lines[0], scratch == size << 10 and left < least and total < 512 << 10)
        expect(lines[0], lines[0].endswith("see kho_scratch="))
        was, now = (int(done.reported(1, "MemTotal:")[0]) for done in (off, large))
        expect(f"{now} kB in all, {was} kB without KHO", abs(was - now) <= 1024)
        # Areas are multiples of 4 MiB.  The kernel works with what is left at least, and has room
        # for the next one's image.
        size -= (least - left + 4095 >> 12 << 2) + 16
        done = boot("fine", f"kho=on kho_scratch={size}M,0,0", [PRESERVE + "next_kernel next", RETRIEVE], 2)
        g.expect_round_trip(guest, done)
    note(f"{size} of 512 MiB leave {least + (16 << 10)} KiB")


def test_scratch_too_small(log, note):
    """R, an image that does not fit in scratch: the log says what is missing, and that helps"""
    def load(megabytes, then=""):
        done = guest.run(f"kho=on liveupdate=on kho_scratch={megabytes}M,0,0", [f"""
            kho-guest load /mnt/next /mnt/initrd "$(cat /mnt/cmdline)" && report loaded
            {then}"""])
        log.rename(log.with_suffix(f".{megabytes}.log"))
        done.expect(1)
        lines = done.said(1, "KHO: no room in scratch")
        loaded = len(done.reported(1, "loaded"))
        expect(f"{megabytes} MiB: {loaded} loaded, {len(lines)} lines", loaded + len(lines) == 1)
        return lines and [int(number) for number in re.findall(r"(\d+) KiB", lines[0])]

    with make(log) as guest:
        large(guest, initrd=40 << 20)
        # Too small for the kernel, then for the initramfs.
        small = 40
        segments = []
        for _ in range(2):
            size, hole, missing = load(small) or (0, 0, 0)
            expect(f"{small} MiB: a segment of {size}, a hole of {hole}, {missing} KiB missing",
                   0 < hole < small << 10 and size - hole == missing > 0)
            segments.append(size)
            # Areas are multiples of 4 MiB.
            small += (missing + 4095 >> 12 << 2) - spoilt(0, 4)
        initrd = (guest.share / "initrd").stat().st_size
        expect(f"segments of {segments} KiB",
               segments == [INIT_SIZE >> 10, (initrd + 4095 & ~4095) >> 10])
        expect(f"{small} MiB are still too small", not load(small))
    note(f"{small} MiB are enough")


def test_numa(log):
    """R -> R on two nodes"""
    with make(log, size=64 << 20) as guest:
        # The file goes to the second node; test_kho ran on the first.
        done = guest.run("kho=on liveupdate=on", [
            PRESERVE.replace("check", "check taskset 2") + """
            report "$(grep Shmem: /sys/devices/system/node/node1/meminfo)"
            next_kernel next""", RETRIEVE], smp=2, nodes=2)
        g.expect_round_trip(guest, done)
        shmem = re.search(r"\d+(?= kB)", done.reported(1, "Node 1 Shmem:")[0])[0]
        expect(f"node 1 has {shmem} kB", int(shmem) >= 64 << 10)


def test_plugged(log, note):
    """R -> R, memory that was plugged in: it cannot be preserved, and what is elsewhere is there"""
    with make(log) as guest:
        done = guest.run("kho=on liveupdate=on memhp_default_state=offline", ["""
            check kho-guest preserve run /mnt
            report step plugging in memory
            free() { awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo; }
            before=$(free)
            for block in /sys/devices/system/memory/memory*; do
                [ "$(cat $block/state)" = online ] || echo online >$block/state || fail "$block"
            done
            report plugged $((($(free) - before) / 1024))
            check kho-guest try 150000
            check kho-guest try 1
            next_kernel next
            """, RETRIEVE], mem="512M", plug=spoilt("1G", None))
        done.expect(2)
        guest.expect_files(done, 1, 2)
    expect(f"{done.reported(1, 'plugged')} MiB", done.reported(1, "plugged") == ["1024"])
    # What has nowhere else to be, and what an allocator prefers to put there.
    tried = done.reported(1, "tried")
    expect(f"preserving it: {tried}", tried and all(int(line.split()[2]) > 0 for line in tried))
    done.expect_line(2, "KHO restore succeeded")
    note(", ".join(tried))


def test_smp(log):
    """R -> R on two CPUs, after two tasks preserved and unpreserved at once"""
    with make(log) as guest:
        done = guest.run("kho=on liveupdate=on", [
            "report step stress\ncheck kho-guest stress 60\n" + PRESERVE + "next_kernel next", RETRIEVE],
            smp=2)
        done.expect(2)
        expect("stress did not finish", len(done.reported(1, "stress:")) == 2)
        guest.expect_files(done, 1, 2)
        done.expect_line(2, "KHO restore succeeded")


def test_shell(log):
    """make shell: what is typed, also in the next kernel"""
    lines = ["kho-guest preserve a /mnt\nnext\n", spoilt("kho-guest retrieve a\nexit\n", "exit\n")]
    keys, typed = os.pipe()

    def during():
        # The shell's terminal is not there until it asks.
        text = log.read_text(errors="replace") if log.exists() else ""
        if lines and "\n~ # " in text.partition(f"\nkernel {3 - len(lines)}: ")[2]:
            os.write(typed, lines.pop(0).encode())

    with open(keys) as keys, Guest(log, R) as guest:
        done = g.shell(guest, during=during, keys=keys)
        os.close(typed)
        done.expect(2)
    digest = guest.manifest[0][2]
    expect("kernel 2 did not say the hash of README.md", done.said(2, digest))


# Memory that is scattered: every page of a file by itself, with gaps in between.

SCATTER = PRESERVE.replace("kho-guest preserve", "kho-guest scatter")
# All memory there is, and what of it is free, in the page allocator's lists or the processors'.
ACCOUNT = """
account() {
	sync
	echo 3 >/proc/sys/vm/drop_caches
	report "$1" "$(awk '$1 == "MemTotal:" { total = $2 / 4 }
		$1 == "nr_free_pages" || $1 == "count:" { free += $2 }
		END { print total, free }' /proc/meminfo /proc/zoneinfo)"
}
"""
# A machine whose counter of cycles counts instructions.
COUNTING = ["qemu-system-x86_64", *bench.ICOUNT]
# Takeover takes less than this, and this for each run.  C takes 22 for each pair of runs.
FIXED_COST, RUN_COST = 700_000, 150
# The machines of which one that goes wrong would not show on the others.
SCATTERED = {
    "1-cpu": {"machine": COUNTING},
    "4-cpus": {"smp": 4},
    "2-nodes": {"smp": 2, "nodes": 2},
    # Page owner, from early on, has all struct pages initialised at once.
    "early": {"args": "page_owner=on early_page_ext", "deferred": 0},
    # No struct pages are initialised late, and there are no nodes.
    "plain": {"kernel": P, "smp": 2, "deferred": 0},
}
# Where the boot processor stops to initialise struct pages: at the first section of 128 MiB after
# one section's worth of pages of ZONE_DMA32.  On a second node that has the upper 512 MiB it goes
# on, for one section.
DEFERRED = (256 << 20) >> 12
# As many of the frames, at least, are to be there; where the others are is up to the page allocator.
LATE = 1000
# Nobody takes back the root FDT, the blobs of the subtrees and the like: 6 or 7 pages, with the C
# implementation as well.
UNCLAIMED = 10
# The manifest, and LUO's list of the pages.
SERIALISED = 32


def scattered(log, kernel=None):
    """A guest with two files of 6 MiB, of whose 3072 pages few are neighbours."""
    guest = Guest(log, kernel or R)
    for seed in 1, 2:
        guest.add_file(f"data{seed}", data(6 << 20, seed))
    return guest


def frames(guest, session=""):
    """The preserved frames; the last one is the spare page, if they are scattered."""
    return [int(line) for line in (guest.share / session / "frames").read_text().split()]


def expect_scattered(guest, run, late=LATE):
    """The data was scattered, all of it came back, and until then nobody had it."""
    run.expect(2)
    guest.expect_files(run, 1, 2)
    run.expect_line(2, "KHO restore succeeded")
    figures = g.takeover(run, 2)
    expect(f"{figures['runs']} runs", figures["runs"] >= 2000)
    deferred = sum(frame >= DEFERRED for frame in frames(guest))
    expect(f"{deferred} frames in deferred memory", deferred >= late)
    expect_waiting(run)


def expect_waiting(run, but=0, number=3073):
    """Nobody had the frames that wait to be restored, but for a few."""
    total, odd = map(int, re.findall(r"\d+", run.reported(2, "frames")[0]))
    expect(f"{odd} of {total} frames do not wait", total == number and odd <= but)


def expect_linear(cycles, runs):
    """Takeover takes a time in proportion to what was handed over."""
    expect(f"takeover of {runs} runs took {cycles} instructions", cycles <= FIXED_COST + RUN_COST * runs)


def expect_account(run, restored):
    """The second kernel counts the memory that the first one had, from boot on, and what was restored is free in the end."""
    total, free = {}, {}
    for stage, when in (1, "cold"), (2, "held"), (2, "given"):
        total[when], free[when] = map(int, run.reported(stage, when)[0].split())
    lost = total["cold"] - total["held"]
    expect(f"{lost} pages less than before the kexec", 0 <= lost <= UNCLAIMED)
    given, freed = (pages["given"] - pages["held"] for pages in (total, free))
    expect(f"{given} pages more by restoring", given == 0)
    expect(f"{freed} of {restored} restored pages are free", abs(restored + SERIALISED // 2 - freed) <= 256)
    return f"{lost} pages unclaimed"


@pytest.mark.parametrize("machine", SCATTERED)
def test_scatter(log, note, machine):
    """R -> R, thousands of runs: the data, and no memory lost or given twice"""
    options = dict(SCATTERED[machine])
    kernel, args, deferred = options.pop("kernel", R), options.pop("args", ""), options.pop("deferred", None)
    with scattered(log, kernel) as guest:
        done = guest.run(f"kho=on liveupdate=on page_poison=1 {args}", [
            ACCOUNT + "account cold" + SCATTER + "next_kernel next",
            ACCOUNT + "account held\ncheck kho-guest waiting /mnt" + RETRIEVE + "account given"],
            **options)
        expected = options.get("nodes", 1) if deferred is None else deferred
        expect_scattered(guest, done, LATE if expected else 0)
    late = done.said(2, "deferred pages initialised")
    expect(f"kernel 2 said: {late}", len(late) == expected)
    if options.get("machine") == COUNTING:
        figures = g.takeover(done, 2)
        expect_linear(figures["cycles"], figures["runs"])
    note(expect_account(done, 3073))


# Huge pages would be the gaps, and what is between them would lie elsewhere.
SPARSE = SCATTER.replace("within_size", "never").replace("/mnt", "/mnt 1020")


@pytest.mark.parametrize("args", [
    pytest.param("", id="normal"),
    # Most of the second kernel's memory is for movable pages only.
    pytest.param("kernelcore=160M", id="movable")])
def test_sparse(log, note, args):
    """R -> R, a page in each of nearly all grains: what little is free suffices until the rest is"""
    pages = 88
    with Guest(log, R) as guest:
        guest.add_file("data", data(pages << 12))
        done = guest.run("kho=on liveupdate=on page_poison=1", [
            ACCOUNT + "account cold" + SPARSE + "next_kernel next",
            ACCOUNT + "account held\ncheck kho-guest waiting /mnt" + RETRIEVE + "account given"],
            again=f"kho=on liveupdate=on page_poison=1 {args}", mem="512M")
        done.expect(2)
        guest.expect_files(done, 1, 2)
        grains = {frame >> 10 for frame in frames(guest)}
    expect(f"pages in {len(grains)} grains", len(grains) >= pages)
    expect_waiting(done, number=pages + 1)
    expect_account(done, pages + 1)
    if "kernelcore" in args:
        done.expect_line(2, r"\]   Node 0: 0x")
    note(f"{len(grains)} of 128 grains")


def test_arm64(log, note):
    """R -> R on arm64: the pages that the benchmark preserves, and what takeover takes"""
    count = spoilt(5_000, 5_000_000)
    done = bench.one(("arm64", "gcc", "debug", "rust", g.image(ARM64)), "scattered", "0", count, "1G")
    figures = done["kernels"][1]
    expect_linear(sum(figures[name][0] for name in bench.TAKEOVER), count)
    note(f"{count} scattered pages")


def test_arm64_retry(log):
    """R -> R on arm64: the loader tries one place for the kernel after the other, and says nothing of it"""
    # An initramfs has to lie behind the kernel, and below 32 GiB from the start of the kernel's
    # GiB.  The kernel fits in the areas of the two nodes only, and behind it there is no place for
    # the initramfs in either.  The third area is out of reach from the first node.
    nodes, kernel, initrd = ("1G", "33G"), 128 << 20, 96 << 20
    scratch = spoilt("0,100M,144M", "0,60M,144M")
    image = bytearray(g.image(ARM64).read_bytes())
    # image_size in the header: what a loader has to keep free.
    struct.pack_into("<Q", image, 16, kernel)
    larger = g.WORK / f"{log.stem}.image"
    larger.write_bytes(image)
    try:
        bench.boot(log, "arm64", g.image(ARM64), "34G", f"kho=on kho_scratch={scratch} kho_bench=adjacent,0,100", 2,
                   next_kernel=larger, initrd=initrd, nodes=nodes)
    finally:
        larger.unlink()
    text = log.read_text(errors="replace")
    expect("scratch has other areas", f"KHO: scratch has {388 << 10} KiB in 3 areas" in text)
    # That of a load that is given up; see scratch_too_small().
    said = re.findall(r"KHO: no room.*", text)
    expect(f"{said}", not said)


# Those who look at any struct page, while the data waits.  After the spare page there is a gap.
READERS = """
data=$(tail -n 2 /mnt/frames | head -n 1) spare=$(tail -n 1 /mnt/frames)
memory=/sys/devices/system/memory
report step reading struct pages
for file in kpageflags kpagecount pagetypeinfo buddyinfo zoneinfo; do
	cat /proc/$file >/dev/null || fail $file
done
idle=/sys/kernel/mm/page_idle/bitmap
cat $idle >/dev/null || fail $idle
# All but the end: the kernel takes nothing of the last word, again and again.
head -c 28672 /dev/zero | tr '\\0' '\\377' >/tmp/idle
dd bs=4096 if=/tmp/idle of=$idle || fail $idle
check kho-guest owned /mnt
check kho-guest owned /mnt/large
report step scanning for leaks
leaks=/sys/kernel/debug/kmemleak
# What is new in one scan is told by the next.
for _ in 1 2; do echo scan >$leaks || fail $leaks; done
report leaks "$(grep -c kho_ $leaks)"
report step moving pages
echo 1 >/proc/sys/vm/compact_memory
echo 3 >/proc/sys/vm/drop_caches
echo 64 >/proc/sys/vm/nr_hugepages
report hugepages "$(cat /proc/sys/vm/nr_hugepages)"
echo 0 >/proc/sys/vm/nr_hugepages
report step unplugging memory
report size "0x$(cat $memory/block_size_bytes)"
for block in $memory/memory*; do
	if echo offline >"$block/state"; then
		report unplugged "${block##*/memory}"
		echo online >"$block/state" || fail "$block" does not come back
	fi
done
check kho-guest waiting /mnt
check kho-guest waiting /mnt/large
report step failing memory
fails() {
	printf '%#x' $(($2 * 4096)) >$memory/$1_offline_page
	report "$1" "$3 $?"
}
fails soft "$data" preserved
fails soft "$(tail -n 1 /mnt/large/frames)" tail
fails hard "$spare" preserved
fails soft $((spare + 1)) free
fails hard $((spare + 2)) free
report "$(grep HardwareCorrupted: /proc/meminfo)"
"""


# A session whose blocks are as large as huge pages.
LARGE = """
report step preserving huge pages
echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled
mkdir /mnt/large
echo data >/mnt/large/manifest
dd bs=1M count=8 if=/dev/urandom of=/mnt/large/1 || fail dd
kho-guest whole large /mnt/large >/mnt/large/before || fail whole
"""
RETRIEVE_LARGE = """
kho-guest retrieve large >/mnt/large/after || fail retrieve
cmp /mnt/large/before /mnt/large/after || fail "huge pages differ"
"""


def test_readers(log, note):
    """R -> R, thousands of runs, and everyone who looks at struct pages while they wait"""
    with scattered(log) as guest:
        done = guest.run("kho=on liveupdate=on page_poison=1 page_owner=on page_alloc.shuffle=1 kmemleak=on", [
            SCATTER + LARGE + "next_kernel next", READERS + RETRIEVE + RETRIEVE_LARGE], smp=2)
        expect_scattered(guest, done)
        held = frames(guest) + frames(guest, "large")

    def said(word):
        return done.reported(2, word)

    size = int(said("size")[0], 16) >> 12
    lost = {str(frame // size) for frame in held} & set(said("unplugged"))
    orders = dict(g.takeover(done, 2)["orders"])
    expect(f"blocks by order: {orders}", orders.get(9, 0) >= 2)
    expect(f"huge pages: {said('frames')}", said("frames")[1:] == ["2048, 0 not waiting"])
    expect(f"page owner: {said('owned')}", said("owned") == ["49 of 49", "32 of 32"])
    expect("no block was unplugged", said("unplugged"))
    expect(f"leaks: {said('leaks')}", said("leaks") == ["0"])
    expect(f"huge pages: {said('hugepages')}", said("hugepages") == ["64"])
    expect(f"blocks {lost} with preserved memory were unplugged", not lost)
    expect(f"soft failure: {said('soft')}", said("soft") == ["preserved 1", "tail 1", "free 0"])
    expect(f"hard failure: {said('hard')}", said("hard") == ["preserved 1", "free 0"])
    note(f"{len(said('unplugged'))} blocks unplugged")


# Handovers that are changed on their way.  The guest's memory is a file into which we
# write while kernel 1 waits, so that the kernels need no hook for this.  test_damage.py has more.

def test_early_restore(log):
    """R -> R, memory that LUO restores before struct pages around it are initialised"""
    def move_luo(at):
        # LUO's page is where struct pages are early; what is in the spare one nobody wants.
        spare = frames(guest)[-1]
        expect(f"frame {spare:#x} is not in deferred memory", spare >= DEFERRED)
        address, _ = at.blob("LUO")
        at.ram.write(spare << 12, at.ram.read(address))
        at.patch(struct.pack("=Q", address), struct.pack("=Q", spare << 12))

    with scattered(log) as guest:
        # LUO writes where its sessions are when kexec happens, which is too late for the new page.
        done = meddle(guest, move_luo, """
            check kho-guest waiting /mnt
            kho-guest retrieve run && fail LUO is where it was
            """, first=SCATTER, mem="1G")
    done.expect_line(2, "luo: Retrieved live update data")
    expect_waiting(done, but=1)


# Machines that would take long to fill: the pages are preserved from outside.

def one_per_grain(at, grains):
    """Preserves a page in each of some blocks of 4 MiB; returns their number."""
    held = {pfn >> 10 for pfn, _ in at.blocks()}
    low, high = at.ram.ends()
    count = 0
    for grain in grains:
        pfn = (grain << 10) + 600
        in_ram = pfn < low or 1 << 20 <= pfn < high
        if in_ram and grain not in held and not at.ram.in_scratch(pfn):
            at.flip(pfn)
            count += 1
    return count


def test_early_page_ext(log, note):
    """R -> R in 10 GiB, all of it withheld: what page_ext_init() takes early must be there"""
    counts = []
    with make(log) as guest:
        done = meddle(guest, lambda at: counts.append(one_per_grain(at, range(1 << 12))), RETRIEVE, mem="10G",
                      again="page_owner=on early_page_ext", timeout=300)
        guest.expect_files(done, 1, 2)
    expect(f"pages in {counts} grains", counts and min(counts) > 2000)
    expect(f"{g.takeover(done, 2)['pages']} pages", g.takeover(done, 2)["pages"] >= counts[0])
    note(f"{counts[0]} grains")


# No suites, but the user of the API that comes with them.
API_USER = "kunit.filter_glob=none*"


def test_low_zones(log, note):
    """R -> R in 6 GiB, a page in each grain below 2 GiB: low memory is there before any driver"""
    counts = []
    with make(log, K) as guest:
        done = meddle(guest, lambda at: counts.append(one_per_grain(at, range(1 << 9))), RETRIEVE, mem="6G",
                      args=API_USER, timeout=300)
        guest.expect_files(done, 1, 2)
    expect(f"pages in {counts} grains", counts and min(counts) > 400)
    early = [done.expect_line(stage, "kho_kunit: early: ") for stage in (1, 2)]
    cold, now = (int(re.findall(r"\d+", line)[0]) for line in early)
    # Scratch that was handed over is where the kernel put it: it is low memory in both.
    expect(f"{now} MiB of low memory, {cold} MiB after a cold boot", cold - 64 <= now)
    expect(early[1], early[1].endswith("yes"))
    note(f"{now} MiB, and {cold} MiB after a cold boot")


# Two nodes whose border is in the middle of a grain.  No closer: the kernel itself, with the C
# implementation as well, warns if it is in the middle of a huge page.
UNEVEN, BORDER = ("1402M", "1500M"), (1402 << 20) >> 12


def test_node_border(log, note):
    """R -> R on two nodes with a border in a grain that is withheld: neither gets memory of the other"""
    counts = []

    def preserve_around(at):
        # Every second grain: that is too many runs, so that those in between are withheld as well.
        border = BORDER >> 10
        used = {grain for pfn, order in at.blocks()
                for grain in range(pfn >> 10, (pfn + (1 << order) - 1 >> 10) + 1)}
        if border in used or at.ram.in_scratch(BORDER):
            return
        counts.append(one_per_grain(at, range(border % 2 ^ 1, at.ram.ends()[0] >> 10, 2)))

    # Where the first kernel has its memory is chance; the grain of the border may be in use.
    for _ in range(5):
        with make(log, K) as guest:
            done = meddle(guest, preserve_around, RETRIEVE, mem="2902M", smp=2, nodes=UNEVEN,
                          args=f"{API_USER} kho_kunit_borders maxcpus=1")
            guest.expect_files(done, 1, 2)
        if counts:
            break
    expect(f"pages in {counts} grains", counts and min(counts) > 300)
    lines = done.said(2, "kho_kunit: border: ")
    expect(f"{lines}", any(f"node 1 from {BORDER:#x} " in line for line in lines))
    for line in lines:
        expect(line, line.endswith(" 0 of others"))
    note(f"{counts[0]} grains")


def test_atomic(log):
    """R, cold: the kernel warns about callers that must not sleep, although nothing slept"""
    with Guest(log, K) as guest:
        done = guest.run(f"kho=on {API_USER} {spoilt('kho_kunit_atomic', '')}", [""])
    done.expect_line(1, "kho_kunit: atomic: done: 0")
    text = done.kernels[0]
    for what in "preserving", "giving up":
        _, text = text.split(f"kho_kunit: atomic: {what}\n", 1)
        said, *_ = text.split("kho_kunit: atomic: ")
        expect(f"nothing was said of {what}", re.search(
            r"BUG: sleeping function called from invalid context at \S*kho_helpers\.c:", said))


def test_every_way(log):
    """R -> R, memory that was preserved in every way that the API has"""
    with Guest(log, K) as guest:
        done = guest.run(f"kho=on {API_USER} {spoilt('kho_kunit_leave', '')}", ["next_kernel next", ""])
    done.expect(2)
    done.expect_line(1, "kho_kunit: left for the next kernel: 0")
    lines = [line.removeprefix("kho_kunit: ") for line in done.said(2, "kho_kunit: (?!early)")]
    whats = "folios", "pages", "range", *(f"area {n}" for n in range(len(AREAS)))
    expect(f"{lines}", lines == [f"{what} came back" for what in whats])


def write_seeds(log, handover, root):
    """Puts what is handed over beside the log, as inputs of the fuzzer's targets: see host/src/tests/fuzz.rs"""
    ram, fdt = handover.ram, handover.fdt

    def bits(number, size=5):
        return number.to_bytes(size, "little")

    def node(at, level):
        table, out, index = ram.table(at), b"\0" + bits(at >> 12), 0
        for value, run in itertools.groupby(table):
            end = index + len(list(run))
            for start in range(index, end, 256) if value else ():
                out += b"\1" + bits(start, 2) + bits(min(end - start, 256) - 1, 1) + bits(value, 8)
            index = end
        return out + b"".join(node(child, level - 1) for child in table if child and level)

    pieces = [(0, ram.size >> 12)] + [(start | 1 << 39, end - start) for start, end in ram.scratch[:7]]
    head = b"\xff\4\3" + bits(root >> 12) + bits(len(pieces) - 1, 1)
    head += b"".join(bits(start) + bits(count) for start, count in pieces) + bits(root >> 12)
    log.with_suffix(".tree").write_bytes(head + node(root, 5))
    blob = next(it for it in handover.nodes().values() if "blob-size" in it)
    numbers = [4096, 0xd00dfeed, struct.unpack(">I", ram.read(fdt + 4, 4))[0]]
    texts = [bits(root, 8), blob["preserved-data"], blob["blob-size"]]
    log.with_suffix(".fdt").write_bytes(b"\xff" + b"".join(b"\xff" + bits(it, 8) for it in numbers) +
                                        b"".join(b"\2\xff" + it for it in texts))


@pytest.mark.parametrize("kernel", [R, C], ids=["rust", "c"])
def test_inspect(log, kernel, note):
    """R or C -> R: kho-inspect finds in a dump of the first kernel what the second one takes over"""
    tool, found = g.inspector(), []

    def look(at):
        # A core file: headers, and the memory behind them.
        dump, offset = guest.dir / "vmcore", 1 << 20
        header = b"\x7fELF" + struct.pack("<4B8xHHIQQQIHHHHHH", 2, 1, 1, 0, 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        header += struct.pack("<IIQQQQQQ", 1, 7, offset, 0, 0, at.ram.size, at.ram.size, 0)
        with open(dump, "wb") as file:
            file.write(header)
            for start in range(0, at.ram.size, 1 << 20):
                file.seek(offset + start)
                file.write(at.ram.read(start, 1 << 20))
        for options, status in ([], 0), ([f"--scratch={at.fdt},0x1000"], 1):
            done = subprocess.run([tool, dump, f"--fdt={at.fdt}", "--json", *options], capture_output=True, text=True)
            expect(f"{options}: {done.returncode} {done.stdout[-400:]}{done.stderr}", done.returncode == status)
            found.append(json.loads(done.stdout))
        write_seeds(log, at, found[0]["root"])

    with make(log, kernel, next=R) as guest:
        done = meddle(guest, look, RETRIEVE)
        guest.expect_files(done, 1, 2)
    expect("there was nothing to look at", found)
    # The second one is what is wrong: the FDT was said to lie in scratch.
    sound, broken = found[:2]
    line, = done.said(2, "KHO: takeover: .* cycles")
    blocks, runs, pages, nodes, _ = map(int, re.findall(r"(\d+) (?=\w)", line))
    expect(f"{line}: {sound}", (pages, nodes) == (sound["pages"], sound["nodes"]))
    expect(f"{line}: {sound['orders']}", blocks == sum(count for _, count in sound["orders"]))
    expect(f"{sound['subtrees']}", {"LUO", "kexec-metadata"} <= {it["name"] for it in sound["subtrees"]})
    expect(f"{broken['violations']}", "the FDT is not preserved" in [it["what"] for it in broken["violations"]])
    note(f"{pages} pages, {nodes} nodes")


@pytest.mark.parametrize("kernels, broken", [
    pytest.param((R, R), False, id="rust"),
    pytest.param((C, R, C), False, id="c-rust-c"),
    # One bit of its memory changes, and it notices.
    pytest.param((R, R), True, id="broken")])
def test_vm(log, note, kernels, broken):
    """A virtual machine goes on and finds all of its memory"""
    hops = machine.through(log, [(kernel.lower(), g.image(kernel)) for kernel in kernels], broken=broken)
    note(" ".join(f"{at[machine.END] - at['stop']:.0f} ms" for at in hops))


@pytest.mark.long
def test_kvm_vm(log):
    """The same on /dev/kvm, where a small program of our own is the first process of the host"""
    image = g.image("KVM")
    kvm.hop(log, [image, image], "64M", machine=[*kvm.MACHINE, "-accel", "tcg"])


def test_soak(log, note):
    """R -> C -> R -> C -> R -> C, files that change in each, every byte verified, nothing leaked"""
    note("; ".join(soak.through(log, [("rust", g.image(R)), ("c", g.image(C))], 5, random.getrandbits(32))))


# Pages that caches and the like may take, or lose.
SLACK = 512
FAIL_BEFORE = """
report step failing allocations
check kho-guest fail-before /mnt/next /mnt/initrd "$(cat /mnt/cmdline)"
"""
FAIL_AFTER = """
save before /sys/kernel/debug/kho/summary
report step failing allocations
check kho-guest fail-after
save after /sys/kernel/debug/kho/summary
"""


def test_fail_nth(log, note):
    """R -> R -> R, each allocation of the calls that preserve and restore fails once"""
    with make(log) as guest:
        done = guest.run("kho=on liveupdate=on", [
            FAIL_BEFORE + PRESERVE + "next_kernel next", FAIL_AFTER + RENEW + "next_kernel next", RETRIEVE], smp=2,
            timeout=600)
        # What a call says about it, and LUO's own table of files that has no room.
        done.expect(3, but=r"Call Trace:|WARNING: .*luo_retrieve_file")
        guest.expect_files(done, 1, 2, 3)
        left = [soak.figure(done, 2, when, "in not restored: .*, ") for when in ("before", "after")]
    lines = done.reported(1, "fail") + done.reported(2, "fail")
    odd = [line for line in lines if line.startswith("odd")]
    expect(f"other errors: {odd}", not odd)
    for stage in 1, 2:
        (was, nodes), (now, nodes_now) = (map(int, re.findall(r"\d+", line)) for line in done.reported(stage, "fail pages"))
        if stage == 2:
            was, now = was + left[0] // 4, now + left[1] // 4
        expect(f"kernel {stage}: {was} pages became {now}, {nodes} nodes {nodes_now}",
               abs(was - now) <= SLACK and nodes == nodes_now)
    note("; ".join([*(line for line in lines if "pages" not in line), f"{left[1]} KiB not restored"]))


def meddle(guest, damage, then, first=PRESERVE, mem="512M", args="", again="", timeout=120, **options):
    """A kexec, with damage(handover) done when all is ready for it.

    args: for both kernels; again: for the second one.
    """
    ram_path, state, failed = guest.dir / "ram", [], []

    def numbers(name):
        return [int(word, 0) for word in (guest.share / name).read_text().split()]

    def during():
        if state or not (guest.share / "waiting").exists():
            return
        areas = [(start >> 12, start + size >> 12)
                 for start, size in zip(numbers("scratch_phys"), numbers("scratch_len"))]
        regions = [(int(start, 16) + 4095 >> 12, int(end, 16) + 1 >> 12) for start, end in re.findall(
            r"BIOS-e820: \[mem (\w+)-(\w+)\] +System RAM", guest.log.read_text(errors="replace"))]
        # The kernel does without the first page.
        regions[0] = (1, regions[0][1])
        with Ram(ram_path, g.megabytes(mem) << 20, areas, numbers("donated/frames")) as ram:
            state.extend(ram.root_fdts())
            try:
                for fdt in spoilt(state, ()):
                    ours = frames(guest) if (guest.share / "frames").exists() else ()
                    damage(Handover(ram, fdt, ours, regions))
            except Exception as fail:
                failed.append(fail)
        (guest.share / "go").touch()

    done = guest.run(f"kho=on liveupdate=on {args}", ["""
        mkdir /mnt/donated
        check kho-guest donate /mnt/donated 512
        # What was preserved for that is given up: nodes that are empty then go a second later.
        sleep 2
        """ + first + """
        cat /sys/kernel/debug/kho/out/scratch_phys >/mnt/scratch_phys
        cat /sys/kernel/debug/kho/out/scratch_len >/mnt/scratch_len
        loaded() {
            touch /mnt/waiting
            while [ ! -e /mnt/go ]; do sleep 0.1; done
        }
        next_kernel next
        """, then], again=f"kho=on liveupdate=on {args} {again}", mem=mem, ram=ram_path, during=during,
        timeout=timeout, **options)
    expect("kernel 1 has no root FDT", state)
    for fail in failed:
        raise fail
    done.expect(2)
    return done
