// SPDX-License-Identifier: GPL-2.0
//! The virtual machine: memory, one processor with its local APIC, and a serial port.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use kvm_bindings::{
    kvm_enable_cap, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xsave, Msrs, KVM_CAP_SPLIT_IRQCHIP,
    KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::errno::Errno;
use nix::sys::mman::{mmap, MapFlags, ProtFlags};

use crate::{Result, MOMENTS};

pub const PAGE: u64 = 4096;
/// The VM prints a line whenever it has done so many pages.
pub const LINE_PAGES: u64 = 256;

const COM1: u16 = 0x3f8;
const COM1_STATUS: u16 = COM1 + 5;
/// The status of a serial port that takes the next byte.
const READY: u8 = 0x20;

/// TSC, PAT, EFER, STAR, LSTAR and KERNEL_GS_BASE. What the VM does not use may go.
const MSRS: [u32; 6] = [0x10, 0x277, 0xc0000080, 0xc0000081, 0xc0000082, 0xc0000102];

/// Where the VM finds what PVH hands over.
const START_INFO: u64 = 0x1000;
const KERNEL: u64 = 0x10_0000;

/// What the next kernel has to know, besides the memory. Zeroes and any other bytes are one.
#[repr(C)]
pub struct State {
    pub at: [u64; MOMENTS.len()],
    /// Where the VM has its pages, how many of them are done, and what its timer has counted.
    pub first: u64,
    pub pages: u64,
    pub count: u64,
    pub tick: u64,
    /// The line that has begun.
    line: [u8; 120],
    len: u64,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: [kvm_msr_entry; MSRS.len()],
}

impl State {
    pub const SIZE: u64 = (size_of::<Self>() as u64).next_multiple_of(PAGE);

    /// What is in a file of this size.
    pub fn map(file: &File) -> Result<&'static mut Self> {
        // SAFETY: this program maps it once, and all of it is there.
        Ok(unsafe { map(file, Self::SIZE)?.cast().as_mut() })
    }

    /// Takes a byte that the VM prints; returns whether it ends a line.
    fn put(&mut self, byte: u8) -> Result<bool> {
        if byte == b'\n' {
            self.take_line()?;
            self.len = 0;
        } else if let Some(next) = self.line.get_mut(self.len as usize) {
            *next = byte;
            self.len += 1;
        }
        Ok(byte == b'\n')
    }

    fn take_line(&mut self) -> Result<()> {
        let text = String::from_utf8_lossy(&self.line[..self.len as usize]).into_owned();
        let words: Vec<_> = text
            .split([' ', ':', ','])
            .filter(|word| !word.is_empty())
            .collect();
        match words[..] {
            ["memory", "at", first, pages, "pages"] => {
                self.first = u64::from_str_radix(first.trim_start_matches("0x"), 16)?;
                self.pages = pages.parse()?;
            }
            ["count", count, "round", _, "tick", tick] => {
                let before = self.count;
                (self.count, self.tick) = (count.parse()?, tick.parse()?);
                if self.count != before + LINE_PAGES {
                    println!("kho_vm: bad count: {before}, and then {count}");
                }
            }
            // The VM says no more after that.
            ["BAD", "exception", ..] => return Err(text.into()),
            _ => println!("kho_vm: bad {text}"),
        }
        Ok(())
    }
}

fn map(file: &File, size: u64) -> Result<NonNull<core::ffi::c_void>> {
    let size = NonZeroUsize::new(size as usize).ok_or("no memory")?;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: this takes addresses that nothing is at.
    Ok(unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, file, 0) }?)
}

/// Puts an ELF program, and what PVH tells it, into memory; returns where it starts.
pub fn load(memory: &File, size: u64, elf: &[u8]) -> Result<u64> {
    let bytes = |at: u64, len: u64| {
        elf.get(at as usize..(at + len) as usize)
            .ok_or("/vm is cut off")
    };
    let word = |at| -> Result<u64> { Ok(u64::from_le_bytes(bytes(at, 8)?.try_into()?)) };
    let (headers, number) = (word(0x20)?, word(0x38)? & 0xffff);
    for header in (0..number).map(|index| headers + index * 56) {
        let (offset, address, len) = (word(header + 8)?, word(header + 24)?, word(header + 32)?);
        // PT_LOAD
        if word(header)? as u32 == 1 {
            memory.write_all_at(bytes(offset, len)?, address)?;
        }
    }
    // A magic number and a version; where the memory map is, and its one entry, which is RAM.
    let info = [
        (0, 0x1_336e_c578),
        (40, START_INFO + 64),
        (48, 1),
        (64, KERNEL),
        (72, size - KERNEL),
        (80, 1),
    ];
    for (at, word) in info {
        memory.write_all_at(&u64::to_le_bytes(word), START_INFO + at)?;
    }
    word(0x18)
}

pub struct Vm {
    vcpu: VcpuFd,
    _vm: VmFd,
}

impl Vm {
    pub fn new(memory: &File, size: u64) -> Result<Self> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        // A local APIC, and no other interrupt controller.
        vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        })?;
        let region = kvm_userspace_memory_region {
            memory_size: size,
            userspace_addr: map(memory, size)?.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: that stays mapped, and only the VM uses it.
        unsafe { vm.set_user_memory_region(region) }?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        Ok(Self { vcpu, _vm: vm })
    }

    /// As PVH says: 32-bit protected mode without paging, and all segments are all of memory.
    pub fn start(&self, entry: u64) -> Result<()> {
        let data = kvm_segment {
            limit: u32::MAX,
            selector: 16,
            type_: 3,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let code = kvm_segment {
            selector: 8,
            type_: 11,
            ..data
        };
        let mut sregs = self.vcpu.get_sregs()?;
        (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (code, data, data, data);
        sregs.cr0 |= 1;
        self.vcpu.set_sregs(&sregs)?;
        Ok(self.vcpu.set_regs(&kvm_regs {
            rip: entry,
            rbx: START_INFO,
            rflags: 2,
            ..Default::default()
        })?)
    }

    /// Runs to the next exit and does what that asks for; returns whether a line is complete.
    pub fn run(&mut self, state: &mut State) -> Result<bool> {
        match self.vcpu.run()? {
            VcpuExit::IoOut(COM1, data) => return state.put(data[0]),
            VcpuExit::IoIn(COM1_STATUS, data) => data.fill(READY),
            // It masks interrupt controllers that are not there.
            VcpuExit::IoOut(0x21 | 0xa1, _) => (),
            exit => return Err(format!("the VM: {exit:?}").into()),
        }
        Ok(false)
    }

    /// What the last exit asked for becomes part of the state, and no instruction more is run.
    pub fn finish_exit(&mut self) -> Result<()> {
        self.vcpu.set_kvm_immediate_exit(1);
        match self.vcpu.run() {
            Err(error) if error.errno() == Errno::EINTR as i32 => Ok(()),
            other => Err(format!("the VM goes on: {other:?}").into()),
        }
    }

    pub fn save(&self, state: &mut State) -> Result<()> {
        state.regs = self.vcpu.get_regs()?;
        state.sregs = self.vcpu.get_sregs()?;
        state.xsave = self.vcpu.get_xsave()?;
        state.lapic = self.vcpu.get_lapic()?;
        state.events = self.vcpu.get_vcpu_events()?;
        for (entry, index) in state.msrs.iter_mut().zip(MSRS) {
            entry.index = index;
        }
        let mut msrs = Msrs::from_entries(&state.msrs)?;
        if self.vcpu.get_msrs(&mut msrs)? != MSRS.len() {
            return Err("MSRs that cannot be read".into());
        }
        state.msrs.copy_from_slice(msrs.as_slice());
        Ok(())
    }

    pub fn restore(&self, state: &State) -> Result<()> {
        self.vcpu.set_sregs(&state.sregs)?;
        self.vcpu.set_regs(&state.regs)?;
        // KVM_SET_FPU would not do: SSE registers stay zero if XSAVE has not used them before.
        // SAFETY: only features that a process has to ask for have a longer state.
        unsafe { self.vcpu.set_xsave(&state.xsave) }?;
        if self.vcpu.set_msrs(&Msrs::from_entries(&state.msrs)?)? != MSRS.len() {
            return Err("MSRs that cannot be written".into());
        }
        // Its timer needs the counter that is among the MSRs.
        self.vcpu.set_lapic(&state.lapic)?;
        Ok(self.vcpu.set_vcpu_events(&state.events)?)
    }
}
