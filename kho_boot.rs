// SPDX-License-Identifier: GPL-2.0

//! KHO in early boot: the handover found, and taken over, in terms of memblock.
//!
//! ```text
//!  setup_arch()          populate()        a handover is found: memblock allocates from
//!                                          scratch only from now on
//!  mm_core_init_early()  init_early()      the handover is checked; what lies away from it may be
//!                                          allocated, too
//!  mm_core_init()        init()            takeover, see kho_withheld; or, on a cold boot, scratch
//!                                          is reserved, see kho_scratch
//! ```
//!
//! A handover that is refused is named in one line, and the kernel boots as if there were none.
//! What the readable part of it names is kept, though, if that leaves the machine enough memory: a
//! device may still write there.
//!
//! Everything here is `__init`; it runs on one CPU, before there is anything else.

use super::kho_check::Refusal;
use super::kho_fdt::FdtError;
use super::kho_grain::{
    Ranges,
    EXTENSION, //
};
use super::kho_libfdt::Fdt;
use super::kho_log;
use super::kho_memblock;
use super::kho_mm;
use super::kho_nodemem::Direct;
use super::kho_place;
use super::kho_radix::NodeAddr;
use super::kho_range::Frames;
use super::kho_scratch;
use super::kho_state;
use super::kho_takeover::Takeover;
use super::PAGE_SHIFT;
use core::{
    mem::size_of,
    sync::atomic::{
        AtomicBool,
        Ordering, //
    },
};
use kernel::{
    bindings,
    prelude::*, //
};

/// The most that `early_memremap()` maps on any architecture is 256 KiB; half of that is within
/// its reach whatever the alignment. A root FDT has one page.
const EARLY_MAX: u64 = 128 * 1024;

/// The size of the memory with the FDT that was handed over, and the physical address of the table
/// of scratch areas.
// Only `populate()` writes it and only `init_early()` reads it.
#[link_section = ".init.data"]
static mut HANDED: (u64, u64) = (0, 0);

/// What was handed over, as far as it is to be kept.
// Only `init_early()` writes it and only `init()` reads it.
#[link_section = ".init.data"]
static mut FOUND: Option<Takeover> = None;

/// Whether this kernel runs in the scratch areas that it was handed.
static INHERITED: AtomicBool = AtomicBool::new(false);

/// Says that there is no handover, why, and about what address.
#[cold]
#[link_section = ".init.text"]
fn say_refused((what, at): (&str, u64)) {
    pr_err!("handover refused: {what} ({at:#x})\n");
    kho_state::set_handover(0);
}

/// Refuses the handover, and keeps nothing of it.
#[cold]
#[link_section = ".init.text"]
fn refuse(why: (&str, u64)) {
    say_refused(why);
    use_all_memory();
}

/// Lets memblock allocate from everywhere.
#[link_section = ".init.text"]
fn use_all_memory() {
    if INHERITED.load(Ordering::Relaxed) {
        // No memory needs to be spared any more.
        // SAFETY: Early boot.
        unsafe { bindings::memblock_clear_kho_scratch_only() };
    }
}

/// Memory that is mapped for a moment, before there is a direct map to rely on.
struct EarlyMap {
    virt: *mut c_void,
    len: u64,
}

impl EarlyMap {
    #[link_section = ".init.text"]
    fn new(phys: u64, len: u64) -> Option<Self> {
        if len == 0 || len > EARLY_MAX || Frames::covering(phys, len).is_none() {
            return None;
        }
        // SAFETY: Early boot; the length is one that can be mapped.
        let virt = unsafe { bindings::early_memremap(phys, len as usize) };
        (!virt.is_null()).then_some(Self { virt, len })
    }
}

impl Drop for EarlyMap {
    #[link_section = ".ref.text"]
    #[inline(never)]
    fn drop(&mut self) {
        // SAFETY: It was mapped like that, and values of this type do not outlive early boot.
        unsafe { bindings::early_memunmap(self.virt, self.len as usize) };
    }
}

/// Takes note of what the last kernel says that it hands over: the root FDT and the table of
/// scratch areas.
#[link_section = ".init.text"]
pub(crate) fn populate(fdt_phys: u64, fdt_len: u64, scratch_phys: u64, scratch_len: u64) {
    let Some(map) = EarlyMap::new(fdt_phys, fdt_len) else {
        return refuse(("the FDT cannot be mapped", fdt_phys));
    };
    // SAFETY: It is mapped for as long as this function runs.
    let fdt = unsafe { Fdt::new(map.virt, fdt_len) }.and_then(|fdt| fdt.memory_map());
    if let Err(error) = fdt {
        return refuse((error.what(), fdt_phys));
    }

    // How many areas there are is the other kernel's choice, which may know of more nodes.
    const ENTRY: u64 = size_of::<bindings::kho_scratch>() as u64;
    let count = scratch_len / ENTRY;
    if scratch_len % ENTRY != 0 || scratch_phys % 8 != 0 {
        return refuse((
            "the table of scratch areas has a bad size or place",
            scratch_phys,
        ));
    }
    let Some(table) = EarlyMap::new(scratch_phys, scratch_len) else {
        return refuse(("the table of scratch areas cannot be mapped", scratch_phys));
    };
    // SAFETY: It is mapped for as long as this function runs, and aligned.
    let areas: &[bindings::kho_scratch] =
        unsafe { core::slice::from_raw_parts(table.virt.cast(), count as usize) };
    if areas
        .iter()
        .any(|area| area.size > 0 && Frames::exact(area.addr, area.size).is_none())
    {
        return refuse(("a scratch area is not made of pages", scratch_phys));
    }
    if areas.iter().all(|area| area.size == 0) {
        return refuse(("there is no scratch area", scratch_phys));
    }
    for area in areas {
        // From here on, memblock may need memory for its own arrays, which has to be scratch.
        // SAFETY: Early boot.
        let error = unsafe {
            match bindings::memblock_add(area.addr, area.size) {
                0 => bindings::memblock_mark_kho_scratch(area.addr, area.size),
                error => error,
            }
        };
        if error != 0 {
            unmark(areas);
            return refuse(("memblock does not take a scratch area", scratch_phys));
        }
    }
    // SAFETY: Early boot. Nothing may be allocated outside of scratch before takeover: all that
    // is not scratch may be preserved.
    unsafe {
        let none = bindings::NUMA_NO_NODE;
        if bindings::__memblock_reserve(scratch_phys, scratch_len, none, 0) != 0 {
            unmark(areas);
            return refuse((
                "memblock does not take the table of scratch areas",
                scratch_phys,
            ));
        }
        bindings::memblock_set_kho_scratch_only();
        bindings::kho_scratch_cnt = count as u32;
    }
    // SAFETY: Early boot; see the static.
    unsafe { HANDED = (fdt_len, scratch_phys) };
    INHERITED.store(true, Ordering::Relaxed);
    kho_state::set_handover(fdt_phys);
    pr_info!("found kexec handover data.\n");
}

/// Checks the FDT in the `len` bytes at `phys` again, where it is used from now on. Returns it, and
/// where the tree is.
#[link_section = ".init.text"]
fn check_fdt(phys: u64, len: u64) -> Result<(Fdt, NodeAddr), FdtError> {
    if !Frames::covering(phys, len).is_some_and(kho_memblock::is_memory) {
        return Err(FdtError::Magic);
    }
    // SAFETY: It is memory.
    let fdt = unsafe { Fdt::new(kho_mm::virt(phys), len) }?;
    let root = fdt.memory_map()?;
    Ok((fdt, root))
}

/// Takes the subtrees out of the FDT whose blobs were not preserved whole: nobody may be told of
/// memory that the last kernel gave to somebody else.
#[link_section = ".init.text"]
fn check_subtrees(fdt: &Fdt, takeover: &Takeover) {
    for node in fdt.subtrees() {
        let blob = fdt.blob_at(node);
        let frames =
            blob.and_then(|blob| Frames::covering(blob.phys, blob.size).ok_or(FdtError::Blob));
        if frames.is_ok_and(|frames| takeover.has(frames)) {
            continue;
        }
        let name = fdt.name(node);
        match blob {
            Ok(blob) => pr_warn!(
                "subtree {name} ignored: its blob of {} bytes at {:#x} is not preserved\n",
                blob.size,
                blob.phys
            ),
            Err(error) => pr_warn!("subtree {name} ignored: {}\n", error.what()),
        }
        fdt.take_out(node);
    }
}

/// Checks what was handed over, and lets memblock allocate from where it leaves room.
#[link_section = ".init.text"]
pub(crate) fn init_early() {
    kho_mm::init_direct_map();
    if !INHERITED.load(Ordering::Relaxed) {
        return;
    }
    // SAFETY: Early boot; see the static.
    let (fdt_len, table) = unsafe { HANDED };
    // SAFETY: Early boot; the table was reserved.
    unsafe { bindings::kho_scratch = kho_mm::virt(table) };
    let phys = kho_state::handover().unwrap_or(0);
    let (fdt, root) = match check_fdt(phys, fdt_len) {
        Ok(found) => found,
        Err(error) => return refuse((error.what(), phys)),
    };
    // SAFETY: May be called at any time.
    let start = unsafe { bindings::kho_glue_cycles() };
    let Ok(mut takeover) = Takeover::read(root) else {
        return refuse(Refusal::NoMemory.what());
    };
    if !Frames::covering(phys, fdt.size() as u64).is_some_and(|frames| takeover.has(frames)) {
        takeover.census.refusal.get_or_insert(Refusal::Fdt(phys));
    }
    let refusal = takeover.census.refusal;
    match refusal {
        Some(refusal) => say_refused(refusal.what()),
        None => check_subtrees(&fdt, &takeover),
    }
    match takeover.plan() {
        Ok(true) => {
            extend(takeover.busy());
            // SAFETY: As above.
            takeover.cycles = unsafe { bindings::kho_glue_cycles() }.wrapping_sub(start);
            // SAFETY: Early boot; see the static.
            unsafe { FOUND = Some(takeover) };
        }
        Ok(false) => {
            pr_warn!("too little memory would be left to keep what it names\n");
            takeover.forget();
            use_all_memory();
        }
        Err(error) => {
            takeover.forget();
            match refusal {
                Some(_) => use_all_memory(),
                None => refuse(Refusal::from(error).what()),
            }
        }
    }
}

/// Makes scratch areas memory as any other.
#[link_section = ".init.text"]
fn unmark(areas: &[bindings::kho_scratch]) {
    for area in areas {
        // SAFETY: Early boot.
        unsafe { bindings::memblock_clear_kho_scratch(area.addr, area.size) };
    }
}

/// Lets memblock allocate from all memory away from `busy`, runs of frames in ascending order.
#[link_section = ".init.text"]
fn extend(busy: Ranges<'_, Direct>) {
    let mut free_from = 0u64;
    for frames in busy {
        mark_scratch(free_from, frames.phys() & !(EXTENSION - 1));
        let end = frames.phys().saturating_add(frames.bytes());
        free_from = end.checked_next_multiple_of(EXTENSION).unwrap_or(u64::MAX);
    }
    // SAFETY: Early boot.
    mark_scratch(free_from, unsafe { bindings::memblock_end_of_DRAM() });
}

#[link_section = ".init.text"]
fn mark_scratch(start: u64, end: u64) {
    if start < end {
        // SAFETY: Early boot.
        let error = unsafe { bindings::memblock_mark_kho_scratch(start, end.wrapping_sub(start)) };
        if error != 0 {
            pr_warn!("failed to extend scratch: error {error}\n");
        }
    }
}

/// Takes over what was handed over; on a cold boot, reserves scratch.
#[link_section = ".init.text"]
pub(crate) fn init() {
    // SAFETY: May be called at any time.
    if unsafe { bindings::kho_glue_is_kdump_kernel() } {
        kho_state::set_enabled(false);
        pr_info!("disabled in the kdump kernel\n");
        return;
    }
    if !INHERITED.load(Ordering::Relaxed) {
        if kho_state::is_enabled() && kho_scratch::reserve().is_err() {
            kho_state::set_enabled(false);
        }
        return;
    }
    kho_scratch::report();
    // SAFETY: Early boot; see the static.
    if let Some(takeover) = unsafe { (&raw mut FOUND).replace(None) } {
        if let Err(refusal) = take_over(takeover) {
            refuse(refusal.what());
        }
    }
    if !kho_state::is_enabled() {
        // This kernel hands nothing over, and has no use for scratch.
        unmark(kho_place::scratch());
    }
}

#[link_section = ".init.text"]
fn take_over(takeover: Takeover) -> Result<(), Refusal> {
    // SAFETY: May be called at any time.
    let start = unsafe { bindings::kho_glue_cycles() };
    let takeover = takeover.take()?;
    // SAFETY: As above.
    let cycles = unsafe { bindings::kho_glue_cycles() }.wrapping_sub(start);
    let cycles = cycles.wrapping_add(takeover.cycles);

    let census = &takeover.census;
    let kept = takeover.kept << (PAGE_SHIFT - 10);
    if census.refusal.is_some() {
        pr_warn!("{kept} KiB that the refused handover names stay reserved\n");
        return Ok(());
    }
    if census.lost > 0 {
        pr_warn!(
            "takeover: {} blocks are not RAM outside scratch and cannot be restored, the first at \
             {:#x}; {kept} KiB of them stay reserved\n",
            census.lost,
            census.first_lost
        );
    }
    if !kho_state::is_enabled() {
        pr_warn!(
            "off, but {} KiB were handed over and stay reserved until they are restored\n",
            census.frames << (PAGE_SHIFT - 10)
        );
    }
    if let Some(pfn) = census.overlap {
        kho_log::complain(kho_log::Complaint::Twice, pfn << PAGE_SHIFT);
    }
    let mut blocks = 0u64;
    for (order, count) in census.orders() {
        blocks = blocks.wrapping_add(count);
        pr_info!("takeover: order {}: {} blocks\n", order.get(), count);
    }
    pr_info!(
        "takeover: {} blocks in {} runs, {} pages, {} tree nodes, {} cycles\n",
        blocks,
        takeover.ranges,
        census.frames,
        census.nodes,
        cycles
    );
    Ok(())
}
