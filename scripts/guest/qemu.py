# SPDX-License-Identifier: GPL-2.0
"""Boots kernels in QEMU, one after the other in the same guest by kexec.

A guest gets a small initramfs (busybox, kho-guest, init.sh) and shares one
directory with the host over 9p: scripts for its kernels go in, results come
out.  The serial log holds what every kernel said; each of them must be clean.
"""
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ["CACHE"])
SRC = Path(os.environ["SRC"])
GUEST = TOP / "scripts/guest"
WORK = CACHE / "guest"
# A busy host delivers a timer's interrupts too late for the kernel to find out how it is wired.
CMDLINE = "console=ttyS0 earlycon=uart8250,io,0x3f8,115200n8 panic=-1 no_timer_check"
HANG = 180
# How much longer everything takes in kernels with sanitizers.
SLOW = int(os.environ.get("KHO_SLOW") or 1)
COMPILERS = {"x86_64": "gcc", "arm64": "aarch64-linux-gnu-gcc"}

# Nothing like this is ever all right.  "panic=" is on the command line.
BAD = re.compile(r"panic(?!=)|Oops|BUG:|WARNING:|Call Trace|KASAN|general protection|refcount_t"
                 r"|hung task|blocked for more than|soft lockup|rcu: INFO")


class Fail(Exception):
    pass


def say(text):
    start = int(os.environ.setdefault("KHO_T0", str(int(time.time()))))
    print(f"[{int(time.time()) - start:6d}s] {text}", file=sys.stderr, flush=True)


def spoilt(right, wrong):
    """The right value, or the wrong one where every test has to fail: see rust-testing.rst."""
    return wrong if os.environ.get("KHO_BREAK") else right


@contextlib.contextmanager
def locked(name):
    """What several processes would do at once, one after the other."""
    WORK.mkdir(exist_ok=True)
    with open(WORK / f".{name}", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Kernels: what is built, and the environment of scripts/kernel for it.
KERNELS = {
    "RUST": ("rust", {}),
    "C": ("c", {}),
    "KUNIT": ("kunit", {}),
    "PLAIN": ("rust", {"LLVM": "1", "CONFIG": "plain"}),
    "ARM64": ("rust", {"ARCH": "arm64", "BENCH": "1"}),
    "KVM": ("rust", {"CONFIG": "kvm"}),
}


@functools.cache
def image(kernel):
    """The file of a kernel, which is built unless this run has done so, or RUST_KERNEL=... names it."""
    if kernel not in KERNELS:
        return Path(kernel)
    if named := os.environ.get(f"{kernel}_KERNEL"):
        return Path(named)
    variant, more = KERNELS[kernel]
    env = {**os.environ, **more}
    with locked("kernels"):
        path = Path(subprocess.check_output([TOP / "scripts/kernel", "--print", variant], env=env,
                                            text=True).strip())
        if not path.exists() or path.stat().st_mtime < int(os.environ["KHO_T0"]):
            if subprocess.run([TOP / "scripts/kernel", variant], env=env, stdout=sys.stderr).returncode:
                raise Fail(f"kernel {kernel} was not built")
    return path


# Programs and the initramfs.

def command(*args):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    if done.returncode:
        raise Fail(f"{args[0]} failed: {' '.join(str(a) for a in args)}\n{done.stdout}{done.stderr}")


@functools.cache
def headers(arch="x86_64"):
    """The kernel's headers for user space."""
    usr = WORK / (("headers-" if arch == "x86_64" else f"headers-{arch}-") + SRC.name)
    if not usr.exists():
        say("guest: installing kernel headers")
        temp = Path(tempfile.mkdtemp(dir=WORK))
        command("make", "-s", "-C", SRC, f"O={temp}/build", f"INSTALL_HDR_PATH={temp}/usr",
                f"ARCH={arch}", "headers_install")
        (temp / "usr").rename(usr)
        shutil.rmtree(temp)
    return usr / "include"


def program(name, *sources, flags=(), arch="x86_64"):
    """Compiles a static program, if its sources changed, and returns its path."""
    with locked("program"):
        return compiled(name, *sources, flags=flags, arch=arch)


def compiled(name, *sources, flags, arch):
    flags = ["-static", "-O2", "-Wall", *flags, "-isystem" if "-nostdinc" not in flags else "-I",
             str(headers(arch))]
    key = hashlib.sha256(repr((sources, flags)).encode())
    for source in (*sources, *sorted(GUEST.glob("*.h"))):
        key.update(Path(source).read_bytes())
    out = WORK / f"{name}-{key.hexdigest()[:12]}"
    if not out.exists():
        for old in WORK.glob(f"{name}-*"):
            old.unlink()
        command(COMPILERS[arch], *flags, "-o", f"{out}.new", *sources)
        Path(f"{out}.new").rename(out)
    return out


def kho_guest():
    return program("kho-guest", *(GUEST / name for name in ("kho-guest.c", "luo.c", "soak.c", "fail.c")))


def inspector():
    """Builds kho-inspect and returns its path."""
    target = CACHE / "host-target"
    with locked("inspect"):
        command("cargo", "build", "--quiet", "--locked", "--manifest-path", TOP / "inspect/Cargo.toml",
                "--target-dir", target)
    return target / "debug/kho-inspect"


def selftest(directory, name, nolibc=True):
    """A program of the tree's own selftests, unmodified, built as its vmtest.sh does."""
    base = SRC / "tools/testing/selftests"
    flags = [f"-I{base}/liveupdate/lib/include"]
    if nolibc:
        flags += ["-nostdinc", "-nostdlib", "-fno-asynchronous-unwind-tables", "-fno-ident",
                  "-fno-stack-protector", f"-I{SRC}/tools/include/nolibc"]
    else:
        flags += ["-Wno-unused-function", "-D_GNU_SOURCE="]
    sources = [base / directory / f"{name}.c"]
    if name != "init":
        sources.append(base / "liveupdate/lib/lu_utils.c")
    return program(f"{directory}-{name}", *sources, flags=tuple(flags))


class Cpio:
    """An initramfs, made by the tree's own usr/gen_init_cpio."""

    def __init__(self):
        self.lines = []

    def dirs(self, *names):
        self.lines += [f"dir /{name} 755 0 0" for name in names]
        return self

    def console(self):
        self.lines.append("nod /dev/console 600 0 0 c 5 1")
        return self

    def file(self, name, path):
        self.lines.append(f"file /{name} {path} 755 0 0")
        return self

    def link(self, name, target):
        self.lines.append(f"slink /{name} {target} 777 0 0")
        return self

    def write(self, path):
        with tempfile.NamedTemporaryFile("w", suffix=".list") as listed:
            listed.write("\n".join(self.lines) + "\n")
            listed.flush()
            command(program("gen_init_cpio", SRC / "usr/gen_init_cpio.c"), "-t", "0", "-o", path, listed.name)
        return path


def initrd(path, **programs):
    """The initramfs of our own tests, with more programs where wanted."""
    busybox = shutil.which("busybox")
    cpio = Cpio().dirs("dev", "proc", "sys", "mnt", "bin", "tmp").console()
    cpio.file("init", GUEST / "init.sh").file("bin/busybox", busybox)
    for applet in subprocess.check_output([busybox, "--list"], text=True).split():
        if applet != "busybox":
            cpio.link(f"bin/{applet}", "busybox")
    cpio.file("bin/kho-guest", kho_guest())
    for name, binary in programs.items():
        cpio.file(f"bin/{name}", binary)
    return cpio.write(path)


# QEMU.

@functools.cache
def accel():
    """kvm only where it works: some hosts have a /dev/kvm that never answers."""
    flags = Path("/proc/cpuinfo").read_text()
    if not re.search(r"\b(vmx|svm)\b", flags) or not os.access("/dev/kvm", os.W_OK):
        return "tcg"
    with tempfile.NamedTemporaryFile(suffix=".img") as disk:
        # A boot sector that writes 0 to the debug exit port, which ends QEMU.
        disk.write(b"\xb0\x00\xe6\xf4\xf4".ljust(510, b"\0") + b"\x55\xaa" + bytes(1440 * 1024 - 512))
        disk.flush()
        probe = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "kvm", "-display", "none", "-nodefaults", "-no-reboot",
             "-device", "isa-debug-exit,iobase=0xf4", "-drive", f"if=floppy,format=raw,file={disk.name}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return "kvm" if probe.wait(10) == 1 else "tcg"
        except subprocess.TimeoutExpired:
            probe.kill()
            return "tcg"


def tests_machine():
    return ["qemu-system-x86_64", "-accel", accel(), *(["-cpu", "host"] if accel() == "kvm" else [])]


def megabytes(size):
    match = re.fullmatch(r"(\d+)([MG]?)", size.upper())
    if not match or not int(match[1]):
        raise Fail(f"bad size of memory: {size}")
    return int(match[1]) * (1024 if match[2] == "G" else 1)


class Run:
    """What a guest left behind."""

    def __init__(self, log, share, hang):
        self.hang = hang
        self.share = share
        text = log.read_text(errors="replace").replace("\r", "") if log.exists() else ""
        # Each kernel's part starts with the line that has its banner.
        self.kernels = re.split(r"^(?=.*Linux version \d)", text, flags=re.M)[1:]
        result = share / "result" if share else None
        lines = result.read_text(errors="replace").splitlines() if result and result.exists() else []
        self.results = [(int(line.split()[0]), line.split(" ", 1)[1]) for line in lines
                        if re.match(r"\d+ ", line)]

    def said(self, stage, pattern):
        """Every line of a kernel's log that matches, without its time stamp."""
        text = self.kernels[stage - 1] if stage <= len(self.kernels) else ""
        return [re.sub(r"^\[ *[\d.]+\] ", "", line) for line in text.splitlines()
                if re.search(pattern, line)]

    def printed(self, stage, pattern):
        """Fails unless a program printed that; the kernel's lines may come in between."""
        text = self.kernels[stage - 1] if stage <= len(self.kernels) else ""
        found = re.search(pattern, re.sub(r"\[ *\d+\.\d{6}\] .*\n", "", text))
        if not found:
            raise Fail(f"a program in kernel {stage} did not print: {pattern}")
        return found[0]

    def reported(self, stage, word):
        """What the guest reported in a stage in lines that start with a word."""
        return [line[len(word):].strip() for at, line in self.results
                if at == stage and (line + " ").startswith(word + " ")]

    def expect(self, kernels, ends_with=None, but=None):
        """Fails unless the guest got that far and every kernel's log is clean.

        ends_with: a panic that a kernel is meant to end with.
        but: what is all right nevertheless.
        """
        for number, text in enumerate(self.kernels, 1):
            if ends_with:
                text = text.split(ends_with)[0]
            for line in text.splitlines():
                if BAD.search(line) and not (but and re.search(but, line)):
                    raise Fail(f"kernel {number} said: {line.strip()}")
        for stage, line in self.results:
            if line.startswith("failed"):
                last = [text for at, text in self.results if at == stage][-2:-1]
                raise Fail(f"kernel {stage}: {line}: {''.join(last)}")
        if self.hang:
            raise Fail(f"hang in kernel {len(self.kernels)}")
        if len(self.kernels) != kernels:
            raise Fail(f"{len(self.kernels)} kernels started, not {kernels}")
        if self.share and not self.reported(kernels, "done"):
            raise Fail(f"kernel {kernels} did not finish")

    def expect_line(self, stage, pattern):
        found = self.said(stage, pattern)
        if not found:
            raise Fail(f"kernel {stage} did not say: {pattern}")
        return found[0]


def qemu(log, kernel, initramfs, cmdline, share=None, mem="1G", smp=1, nodes=1, timeout=HANG,
         ram=None, title=None, during=None, machine=None, base=CMDLINE, plug=None, keys=None):
    """Runs a guest to its end and returns its Run.

    nodes: how many there are, or the size of each, which may be 0.
    ram: a file that has the guest's memory.
    plug: memory that the guest can take into use while it runs.
    machine: QEMU and the arguments that choose another machine than the tests'.
    base: the part of the command line that goes with it.
    keys: a file from which comes what is typed at the serial port, which is on stdout then, too.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    size = megabytes(mem)
    # No guest outlives this program, however that ends.
    args = ["setpriv", "--pdeathsig", "KILL", *(machine or tests_machine()),
            "-nographic", "-nodefaults", "-no-reboot",
            "-m", f"{size}M" + (",slots=1,maxmem=8G" if plug else ""), "-smp", f"{smp},sockets={smp}",
            "-chardev", f"{'stdio,mux=on,signal=off,' if keys else 'null,'}id=serial,logfile={log}",
            "-serial", "chardev:serial", *(["-mon", "chardev=serial"] if keys else []),
            "-kernel", str(image(kernel)), *(["-initrd", str(initramfs)] if initramfs else []),
            "-append", f"{base} {cmdline}"]
    if share:
        args += ["-fsdev", f"local,id=kho,path={share},security_model=none,multidevs=remap",
                 "-device", "virtio-9p-pci,fsdev=kho,mount_tag=kho"]
    sizes = [size // nodes] * nodes if isinstance(nodes, int) else [node and megabytes(node) for node in nodes]
    if len(sizes) > 1:
        if ram:
            # QEMU makes a file for one node only.
            Path(ram).touch()
            os.truncate(ram, size << 20)
        for node, its in enumerate(sizes):
            backend = f"memory-backend-file,mem-path={ram},offset={sum(sizes[:node])}M,share=on" if ram \
                else "memory-backend-ram"
            # More than the host may have, of which little is used.
            backend += ",reserve=off" if its > 8192 else ""
            args += ["-object", f"{backend},id=mem{node},size={its}M"] if its else []
            args += ["-numa", f"node,nodeid={node}" + (f",memdev=mem{node}" if its else "")
                     + (f",cpus={node}" if node < smp else "")]
    elif ram:
        args += ["-object", f"memory-backend-file,id=ram,size={size}M,mem-path={ram},share=on",
                 "-machine", "memory-backend=ram"]
    if plug:
        args += ["-object", f"memory-backend-ram,id=plug,size={plug}", "-device", "pc-dimm,memdev=plug"]
    start = time.time()
    messages = tempfile.TemporaryFile()
    child = subprocess.Popen(args, stdin=keys or subprocess.DEVNULL, stdout=None if keys else messages,
                             stderr=messages)
    hang, shown = False, None
    while child.poll() is None:
        time.sleep(0.2)
        if title:
            shown = progress(title, log, share, start, shown)
        if during:
            during()
        if time.time() - start > timeout * SLOW:
            hang = True
            child.kill()
            child.wait()
    if title and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    run = Run(log, share, hang)
    if not run.kernels and not hang:
        messages.seek(0)
        raise Fail(f"no kernel started: {messages.read().decode(errors='replace').strip()}")
    return run


def progress(title, log, share, start, shown):
    """One line on the terminal: the kernel and the step it is in."""
    kernel = log.read_bytes().count(b"Linux version ") if log.exists() else 0
    result = share / "result" if share else None
    steps = re.findall(rf"^{kernel} step (.*)", result.read_text(errors="replace"), re.M) \
        if result and result.exists() else []
    step = f"kernel {kernel}: {steps[-1] if steps else 'booting'}" if kernel else "starting"
    if sys.stderr.isatty():
        print(f"\r\033[K          ... {title}: {step}, {int(time.time() - start)} s", end="",
              file=sys.stderr, flush=True)
    elif step != shown:
        say(f"{title}: {step}")
    return step


class Guest:
    """A shared directory and the guest that is run on it."""

    def __init__(self, log, kernel, **others):
        """others: kernels by the name that stage scripts call them, default next=kernel."""
        self.log = Path(log)
        self.dir = Path(tempfile.mkdtemp(prefix=f"{self.log.stem}-", dir=WORK))
        self.share = self.dir / "share"
        self.share.mkdir()
        self.kernel = kernel
        for name, other in {"next": kernel, **others}.items():
            shutil.copyfile(image(other), self.share / name)
        self.manifest = []
        self.programs = {}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        shutil.rmtree(self.dir, ignore_errors=True)

    def add_file(self, name, data=None, path=None):
        """Puts a file into the session that "preserve" makes; a path is moved there."""
        target = self.share / str(len(self.manifest) + 1)
        if path:
            shutil.move(path, target)
        else:
            target.write_bytes(data)
        with open(target, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.manifest.append((name, target.stat().st_size, digest))

    def run(self, cmdline, stages, again=None, **options):
        """Boots with one shell script per kernel.  again: arguments of later kernels."""
        (self.share / "result").unlink(missing_ok=True)
        for number, script in enumerate(stages, 1):
            (self.share / f"stage{number}.sh").write_text(script + "\n")
        (self.share / "manifest").write_text(
            "".join(f"{digest} {size} {name}\n" for name, size, digest in self.manifest))
        again = cmdline if again is None else again
        cmdline, again = (args + spoilt("", " kho_break=1") for args in (cmdline, again))
        (self.share / "cmdline").write_text(f"{CMDLINE} {again}")
        initrd(self.share / "initrd", **self.programs)
        return qemu(self.log, self.kernel, self.share / "initrd", f"{cmdline} kho_stage=1",
                    share=self.share, **options)

    def expect_files(self, run, *stages):
        """Fails unless each of the stages saw every file as the host has it."""
        manifest = (self.share / "manifest").read_bytes()
        want = [("manifest", len(manifest), hashlib.sha256(manifest).hexdigest()), *self.manifest]
        for stage in stages:
            got = [line.split() for line in run.reported(stage, "file")]
            if len(got) != len(want):
                raise Fail(f"kernel {stage} has {len(got)} files, not {len(want)}")
            for (name, size, digest), (_, its_size, its_digest) in zip(want, got):
                if (str(size), digest) != (its_size, its_digest):
                    raise Fail(f"kernel {stage}: {name} differs: {its_size} bytes {its_digest}, "
                               f"not {size} bytes {digest}")


# make run

def takeover(run, stage):
    """The figures that the kernel prints about its takeover, or None."""
    total = run.said(stage, r"KHO: takeover: \d+ blocks in")
    if not total:
        return None
    names = ("blocks", "runs", "pages", "nodes", "cycles")
    figures = dict(zip(names, map(int, re.findall(r"\d+", total[0].split("takeover:")[1]))))
    figures["orders"] = [tuple(map(int, re.findall(r"\d+", line.split("takeover:")[1])))
                         for line in run.said(stage, r"KHO: takeover: order \d+:")]
    # There is no clock to read so early, but the time stamp counter, whose rate is said later.
    rate = re.findall(r"tsc: Detected ([\d.]+) MHz", "\n".join(run.said(stage, r"tsc: Detected")))
    figures["ms"] = f", {figures['cycles'] / float(rate[0]) / 1e3:.2f} ms" if rate else ""
    return figures


ROUND_TRIP = ["""
report step loading and preserving files
echo within_size >/sys/kernel/mm/transparent_hugepage/shmem_enabled
check kho-guest preserve run /mnt
next_kernel next
""", """
report step retrieving files
check kho-guest retrieve run
"""]


def round_trip(guest, **options):
    """Files through one kexec, and the tree's lib/test_kho.c with them."""
    return guest.run("kho=on liveupdate=on", ROUND_TRIP, **options)


def expect_round_trip(guest, run):
    run.expect(2)
    guest.expect_files(run, 1, 2)
    run.expect_line(2, "KHO restore succeeded")


def report(guest, run):
    size = sum(size for _, size, _ in guest.manifest)
    figures = takeover(run, 2)
    print(f"files      {len(guest.manifest)}, {size} bytes, and a manifest, in one session of memfds")
    absent = "not reported by this kernel"
    print("folios     " + (", ".join(f"{count} of order {order}" for order, count in figures["orders"])
                           if figures else absent))
    print("handover   " + ("{blocks} keys in {nodes} tree nodes, {runs} runs, {pages} pages".format(**figures)
                           if figures else absent))
    print("takeover   " + ("{cycles} cycles in the second kernel{ms}".format(**figures) if figures else absent))
    print(f"test_kho   {(run.said(2, 'KHO restore') or ['said nothing'])[0]}")
    for index, (name, _, _) in enumerate([("manifest", 0, ""), *guest.manifest]):
        for stage, word in (1, "before"), (2, "after"):
            line = [line for line in run.reported(stage, "file") if line.split()[0] == str(index)]
            print(f"{word if index or stage else word:10} {line[0].split()[2] if line else 'none':64} {name}")


def main_run(kernel, log, mem, staged):
    """scripts/run: staged has the files as 1, 2, ... and their names in names."""
    WORK.mkdir(exist_ok=True)
    reason = None
    with Guest(log, kernel) as guest:
        for number, name in enumerate(Path(staged, "names").read_text().splitlines(), 1):
            guest.add_file(name, path=Path(staged, str(number)))
        try:
            # The guest reads some 15 MB/s where the processor is emulated.
            patience = HANG + sum(size for _, size, _ in guest.manifest) // 4_000_000
            run = round_trip(guest, mem=mem, smp=2, timeout=patience, title="guest")
            report(guest, run)
            expect_round_trip(guest, run)
        except Fail as fail:
            reason = str(fail)
    print(f"handover: FAIL ({reason}; log at {log})" if reason else "handover: PASS")
    return 1 if reason else 0


# make shell

SHELL = """
echo "alias next='touch /next; exit'" >/env
echo "kernel $kho_stage: $(dmesg | grep 'KHO: .* implementation')"
echo 'kho-guest preserve NAME /mnt  preserves a file in a session of memfds'
echo 'kho-guest retrieve NAME       retrieves it in the next kernel, and says its hash'
echo 'next                          starts that by kexec, and exit ends the guest'
ENV=/env setsid cttyhack sh
[ ! -e /next ] || next_kernel next
"""


def shell(guest, args="", **options):
    """Kernels with a shell each, and a file for them to preserve."""
    guest.add_file("README.md", (TOP / "README.md").read_bytes())
    return guest.run(f"kho=on liveupdate=on {args}", [SHELL] * 99, **options)


def main_shell(kernel, log, mem):
    WORK.mkdir(exist_ok=True)
    with Guest(log, kernel) as guest:
        shell(guest, "quiet", mem=mem, smp=2, timeout=float("inf"), keys=sys.stdin)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        sys.exit(main_shell(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
    sys.exit(main_run(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
