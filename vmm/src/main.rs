// SPDX-License-Identifier: GPL-2.0
//! The first process of a host that runs one virtual machine (VM) on /dev/kvm and takes it
//! through a kexec.
//!
//! The VM is that of scripts/guest/vm-kernel.c. Its memory is a memfd, which is preserved while
//! the VM is in use; the state of its processor, what it has printed and the time of each step
//! are in a second one. The next kernel's first process takes both back and lets the VM go on,
//! until that has checked all of its memory.
//!
//! Where the initramfs has /next, that kernel is started, with /next.initrd and /next.cmdline.
//! On the kernel's command line:
//!
//! - `kho_vm_mem=N`: memory of the VM, in MiB; without it there is none, and nothing to do;
//! - `kho_vm_flip=1`: the second kernel changes one bit of that.

mod luo;
mod vm;

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use nix::fcntl::{fallocate, FallocateFlags};
use nix::mount::{mount, MsFlags};
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::reboot::{reboot, RebootMode};

use luo::{Session, CREATE_SESSION, RETRIEVE_SESSION};
use vm::{State, Vm, LINE_PAGES, PAGE};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SESSION: &str = "vm";
const MEMORY: u64 = 0;
const STATE: u64 = 1;

/// The VM prints so many lines before the kexec.
const LINES: u64 = 4;
/// It may go through its memory so many times between two ticks of its timer.
const MOST_ROUNDS: u64 = 20;

/// Moments, as the time stamp counter says, which goes on through a kexec.
pub const MOMENTS: [&str; 9] = [
    "pin", "pinned", "stop", "stopped", "saved", "kept", "found", "ready", "first",
];

pub fn now() -> u64 {
    // SAFETY: every processor of this architecture has the counter.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn argument(name: &str) -> u64 {
    let value = env::var(name);
    value.ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// All of a memfd is allocated at once, which gives folios of 2 MiB if the kernel may.
fn memfd(name: &str, size: u64) -> Result<File> {
    let file = File::from(memfd_create(name, MFdFlags::empty())?);
    fallocate(&file, FallocateFlags::empty(), 0, size as i64)?;
    Ok(file)
}

/// Notes a moment.
fn at(state: &mut State, moment: &str) {
    let ticks = now();
    if let Some(index) = MOMENTS.iter().position(|name| *name == moment) {
        state.at[index] = ticks;
    }
}

fn first_kernel(size: u64) -> Result<()> {
    let memory = memfd("memory", size)?;
    let file = memfd("state", State::SIZE)?;
    let state = State::map(&file)?;
    let entry = vm::load(&memory, size, &fs::read("/vm")?)?;
    let mut vm = Vm::new(&memory, size)?;
    vm.start(entry)?;
    while state.count < LINES * LINE_PAGES {
        vm.run(state)?;
    }
    let (image, initrd) = (File::open("/next")?, File::open("/next.initrd")?);
    luo::load_kernel(&image, &initrd, &fs::read_to_string("/next.cmdline")?)?;

    // From here on the VM's pages do not move, but it goes on.
    let session = Session::open(CREATE_SESSION, SESSION)?;
    at(state, "pin");
    session.preserve(&memory, MEMORY)?;
    at(state, "pinned");
    while !vm.run(state)? {}

    // This exit, in the middle of a line, is the last one.
    vm.run(state)?;
    at(state, "stop");
    vm.finish_exit()?;
    at(state, "stopped");
    vm.save(state)?;
    at(state, "saved");
    session.preserve(&file, STATE)?;
    at(state, "kept");
    Err(reboot(RebootMode::RB_KEXEC).unwrap_err().into())
}

fn next_kernel(size: u64) -> Result<()> {
    let session = Session::open(RETRIEVE_SESSION, SESSION)?;
    let file = session.retrieve(STATE)?;
    let memory = session.retrieve(MEMORY)?;
    let state = State::map(&file)?;
    at(state, "found");
    let mut vm = Vm::new(&memory, size)?;
    vm.restore(state)?;
    at(state, "ready");
    vm.run(state)?;
    at(state, "first");
    session.finish()?;
    for (name, ticks) in MOMENTS.iter().zip(state.at) {
        println!("kho_vm: moment {name} {ticks}");
    }

    if argument("kho_vm_flip") != 0 {
        // A page that the VM comes to later.
        let at = state.first + (state.count + 300) % state.pages * PAGE + 1000;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at)?;
        memory.write_all_at(&[byte[0] ^ 0x10], at)?;
        println!("kho_vm: flipped {at:#x}");
    }
    // All of its memory has to be what it was, and its timer has to go on.
    let (start, tick) = (state.count, state.tick);
    let round = state.pages + LINE_PAGES;
    while state.count < start + round
        || (state.tick == tick && state.count < start + MOST_ROUNDS * round)
    {
        vm.run(state)?;
    }
    if state.tick == tick {
        return Err(format!("the VM's timer stays at {tick}").into());
    }
    println!("kho_vm: checked from count {start} to {}", state.count);
    Ok(())
}

fn run() -> Result<()> {
    mount(
        Some("dev"),
        "/dev",
        Some("devtmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    // The kernel adds what its own clock says.
    fs::write("/dev/kmsg", format!("kho_vm: init {}", now()))?;
    let size = argument("kho_vm_mem") << 20;
    match fs::exists("/next")? {
        _ if size == 0 => Ok(()),
        true => first_kernel(size),
        false => next_kernel(size),
    }
}

fn main() {
    match run() {
        Ok(()) => println!("kho_vm: done"),
        Err(error) => println!("kho_vm: FAILED: {error}"),
    }
    let _ = reboot(RebootMode::RB_POWER_OFF);
}
