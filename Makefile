# SPDX-License-Identifier: GPL-2.0
# The commands of this repository; the kernel's build uses Kbuild instead.

KDIR ?=
CONFIG ?=
LLVM ?=
ARCH ?= x86_64
CACHE ?=
MEM ?= 2G
FILES ?=
OUT ?=
TARBALL ?=
SHA256 ?=
ARCHS ?=
COMPILERS ?=
CONFIGS ?=
WORKLOADS ?=
T ?=
SEEDS ?=
HOPS ?=
SEED ?=
KERNELS ?=
VM_MEM ?=
BREAK ?=
SIGNOFF ?=
SECS ?=
FUZZ ?=
ARGS ?=
export KDIR CONFIG LLVM ARCH MEM FILES OUT TARBALL SHA256 ARCHS COMPILERS CONFIGS WORKLOADS T
export SEEDS HOPS SEED KERNELS VM_MEM BREAK SIGNOFF SECS FUZZ
ifneq ($(CACHE),)
export CACHE
endif

.PHONY: help prepare kernel run shell vm soak test test-all matrix fuzz mutants doc
.PHONY: bench bench-full bench-host bench-vm install uninstall series clean

help:
	@echo 'make run        build a kernel and hand real data over to it by kexec'
	@echo '                  FILES="a b"  the files to carry (default: the kernel, README.md);'
	@echo '                               names with spaces are quoted, as in a shell'
	@echo '                  MEM=2G       memory of the guest'
	@echo 'make shell      boot that kernel with a shell, in which "next" is a kexec'
	@echo 'make vm         take a running virtual machine through a kexec of its host'
	@echo '                  KERNELS="c rust c"  with the C and the Rust implementation in turn'
	@echo '                  HOPS=3       that many kexecs'
	@echo '                  VM_MEM=64M   memory of the VM'
	@echo '                  BREAK=1      flip a bit of it: the VM has to notice'
	@echo 'make test       everything: host tests, KUnit, kexec tests, checks'
	@echo '                  T="chain or smp"  the kexec tests that this selects, as pytest -k'
	@echo 'make test-all   the same, and what takes hours: every kind of damage to a handover,'
	@echo '                two configurations that are not made for the tests, each patch of'
	@echo '                make series'
	@echo '                  SEEDS=300    that many with bits flipped at random (default: 5)'
	@echo 'make matrix     the tests with sanitizers and with PREEMPT_RT, and a table of them'
	@echo 'make soak       a long chain of kexecs with files that change, each byte verified'
	@echo '                  HOPS=100 KERNELS="rust c"  that many, from one kernel to the other'
	@echo '                  SEED=1       chooses all that is random (default: a new one)'
	@echo '                  BREAK=byte|leak  something goes wrong, and it has to fail'
	@echo 'make fuzz       give the pure core what libFuzzer makes up, against models'
	@echo '                  SECS=600 FUZZ=tree|ops|fdt|param|range  seconds for each'
	@echo 'make mutants    change the pure core in each place: do tests notice? some hours'
	@echo '                  ARGS="-f kho_key.rs"  for cargo-mutants'
	@echo 'make doc        build the documents, also those of the crate, without a warning'
	@echo 'make bench      measure C and Rust in guests, and the tree on the host:'
	@echo '                  tables, JSON, drawings; half an hour'
	@echo '                  ARCHS="x86_64 arm64" COMPILERS="gcc llvm"'
	@echo '                  CONFIGS="production debug" WORKLOADS="scattered-0 million ..."'
	@echo '                  OUT=<dir>    where the results go'
	@echo 'make bench-full the same with every one of these words: some hours'
	@echo 'make bench-host measure the tree natively: nanoseconds, and scaling with threads'
	@echo 'make bench-vm   measure how long a virtual machine stands still, C and Rust: a table,'
	@echo '                JSON, a drawing; a quarter of an hour, or half an hour at first'
	@echo 'make kernel     build the kernel only'
	@echo 'make install    put the implementation into the tree KDIR'
	@echo 'make uninstall  take it out of KDIR again'
	@echo 'make series     write what install does to KDIR as patches for git am'
	@echo '                  OUT=<dir>    where they go (default: series.out)'
	@echo '                  SIGNOFF="Name <mail>"  whose they are'
	@echo 'make clean      remove the cache: build root, source and builds; not results'
	@echo
	@echo 'KDIR=<tree>     your own Linux 7.3 tree, which is copied (default: a package of'
	@echo '                Debian); only install and uninstall change it'
	@echo 'CONFIG=<.config>  your own configuration, to which what the guests need is added'
	@echo '                (run, vm, shell, test, kernel)'
	@echo 'TARBALL=<file> SHA256=<sum>  a release of Linux 7.3 that you have fetched'
	@echo 'LLVM=1          build with clang and lld instead of gcc (kernel, run, vm, shell, soak;'
	@echo '                test and bench choose themselves)'
	@echo 'ARCH=arm64      build for arm64 instead of x86_64 (kernel only)'
	@echo 'CACHE=<dir>     where everything is built (default: ~/.cache/kho)'

# scripts/kho looks at the variables, takes the cache for itself and makes sure
# that toolchain and source are there.
prepare kernel run shell vm soak matrix fuzz doc bench-host:
	@scripts/kho $@

# What takes long, each by a command of its own, unless some tests are named.
test-all: export KHO_ALL = 1
test-all: test
	$(if $(T),,@scripts/kho foreign)
	$(if $(T),,@scripts/kho series-check)

test:
	@scripts/kho test $(if $(T),"$$T")

mutants:
	@scripts/kho mutants $(ARGS)

bench:
	@scripts/kho bench $(if $(OUT),--out "$$OUT")

bench-vm:
	@scripts/kho bench-vm $(if $(OUT),--out "$$OUT")

bench-full: export ARCHS = x86_64 arm64
bench-full: export COMPILERS = gcc llvm
bench-full: export CONFIGS = production debug
bench-full: export WORKLOADS = all
bench-full: bench

install:
	@scripts/overlay install "$$KDIR"

uninstall:
	@scripts/overlay uninstall "$$KDIR"

series:
	@scripts/series "$$KDIR" "$$OUT" "$$SIGNOFF"

clean:
	@scripts/kho clean
