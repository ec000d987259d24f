// SPDX-License-Identifier: GPL-2.0

//! What KHO does while the kernel boots, in the order in which C calls it.
//!
//! ```text
//!  setup_arch()          populate()     a handover is found: memblock allocates from scratch only
//!                                       from now on
//!  mm_core_init_early()  init_early()   the handover is checked; what lies away from it may be
//!                                       allocated, too
//!  mm_core_init()        init()         takeover, see kho_takeover; or, on a cold boot, scratch is
//!                                       reserved, see kho_scratch
//! ```
//!
//! If a handover is refused, one line in the log says why, and the kernel boots as if there were
//! none. What the readable part of it names is kept, though, if that leaves the machine enough
//! memory: a device may still be writing there. Where nothing is kept, scratch areas that leave too
//! little memory are given up as well.
//!
//! Everything here is `__init`; it runs on one CPU, before there is anything else. The statics are
//! this file's own.

use super::kho_check::{
    Machine,
    Refusal, //
};
use super::kho_fdt::FdtError;
use super::kho_grain::{
    Ranges,
    EXTENSION, //
};
use super::kho_libfdt::Fdt;
use super::kho_log::{
    self,
    Complaint, //
};
use super::kho_memblock::{
    BootCell,
    Memblock, //
};
use super::kho_mm;
use super::kho_nodemem::Direct;
use super::kho_radix::NodeAddr;
use super::kho_range::Frames;
use super::kho_scratch;
use super::kho_state;
#[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
use super::kho_summary;
use super::kho_takeover::{
    Plan,
    Takeover, //
};
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
/// of scratch areas. From `populate()`, for `init_early()`.
#[link_section = ".init.data"]
static HANDED: BootCell<(u64, u64)> = BootCell::new((0, 0));

/// What was handed over, as far as it is to be kept. From `init_early()`, for `init()`.
#[link_section = ".init.data"]
static FOUND: BootCell<Option<Takeover>> = BootCell::new(None);

/// Whether this kernel runs in the scratch areas that it was handed.
static INHERITED: AtomicBool = AtomicBool::new(false);

/// Says that there is no handover, why, and about what address.
#[cold]
#[link_section = ".init.text"]
fn report_refusal((what, at): (&'static str, u64)) {
    pr_err!("handover refused: {what} ({at:#x})\n");
    #[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
    kho_summary::note_refusal((what, at));
    kho_state::set_handover(0);
}

/// Refuses the handover, and keeps nothing of it: no memory needs to be spared any more.
#[cold]
#[link_section = ".init.text"]
fn refuse(memblock: Memblock, why: (&'static str, u64)) {
    report_refusal(why);
    if INHERITED.load(Ordering::Relaxed) {
        use_all_memory(memblock);
    }
}

/// Has memblock allocate from all memory, as nothing is kept of a handover. Scratch areas that
/// leave a kernel too little to run in are wrong, too: it goes without, as on a cold boot.
#[cold]
#[link_section = ".init.text"]
fn use_all_memory(memblock: Memblock) {
    memblock.use_all_memory();
    if !kho_scratch::leaves_enough(memblock) {
        pr_warn!("scratch areas given up: they leave too little memory of other kinds\n");
        kho_scratch::give_up(memblock);
        INHERITED.store(false, Ordering::Relaxed);
    }
}

/// Returns whether `len` bytes at `phys` may be RAM, as far as that is known yet.
#[link_section = ".init.text"]
fn may_be_ram(phys: u64, len: u64) -> bool {
    // SAFETY: The kernel boots, and the range does not wrap around.
    Frames::covering(phys, len).is_some() && unsafe { bindings::kho_glue_may_be_ram(phys, len) }
}

/// Memory that is mapped for a moment, before there is a direct map to rely on.
///
/// # Invariants
///
/// `len` bytes at `virt` are mapped.
struct EarlyMap {
    virt: *mut c_void,
    len: u64,
}

impl EarlyMap {
    #[link_section = ".init.text"]
    fn new(phys: u64, len: u64) -> Option<Self> {
        if len == 0 || len > EARLY_MAX || !may_be_ram(phys, len) {
            return None;
        }
        // SAFETY: The kernel boots, and the length is one that can be mapped.
        let virt = unsafe { bindings::early_memremap(phys, len as usize) };
        // INVARIANT: They were just mapped.
        (!virt.is_null()).then_some(Self { virt, len })
    }
}

impl Drop for EarlyMap {
    #[link_section = ".ref.text"]
    // Its own section would be lost where it is inlined.
    #[inline(never)]
    fn drop(&mut self) {
        // SAFETY: By the type invariant; values of this type do not outlive early boot.
        unsafe { bindings::early_memunmap(self.virt, self.len as usize) };
    }
}

/// Checks the scratch areas of another kernel.
#[link_section = ".init.text"]
fn check_scratch(areas: &[bindings::kho_scratch]) -> Result<(), &'static str> {
    let areas = areas.iter().filter(|area| area.size > 0);
    if areas.clone().next().is_none() {
        return Err("there is no scratch area");
    }
    for area in areas {
        if Frames::exact(area.addr, area.size).is_none() {
            return Err("a scratch area is not made of pages");
        }
        // memblock would take it for memory, and allocate there.
        if !may_be_ram(area.addr, area.size) {
            return Err("a scratch area is not RAM");
        }
    }
    Ok(())
}

/// Takes note of what the last kernel says that it hands over: the root FDT and the table of
/// scratch areas.
#[link_section = ".init.text"]
pub(crate) fn populate(memblock: Memblock, fdt: (u64, u64), scratch: (u64, u64)) {
    let ((fdt_phys, fdt_len), (scratch_phys, scratch_len)) = (fdt, scratch);
    let Some(map) = EarlyMap::new(fdt_phys, fdt_len) else {
        return refuse(memblock, ("the FDT cannot be mapped", fdt_phys));
    };
    // SAFETY: By its invariant the map has that many bytes, until the end of this function.
    let fdt = unsafe { Fdt::new(map.virt, fdt_len) }.and_then(|fdt| fdt.memory_map());
    if let Err(error) = fdt {
        return refuse(memblock, (error.what(), fdt_phys));
    }
    if let Err(why) = use_scratch(memblock, scratch_phys, scratch_len) {
        return refuse(memblock, (why, scratch_phys));
    }
    HANDED.set(memblock, (fdt_len, scratch_phys));
    INHERITED.store(true, Ordering::Relaxed);
    kho_state::set_handover(fdt_phys);
    pr_info!("found kexec handover data.\n");
}

/// Has memblock allocate from the scratch areas only that the table of `len` bytes at `phys` lists.
#[link_section = ".init.text"]
fn use_scratch(memblock: Memblock, phys: u64, len: u64) -> Result<(), &'static str> {
    // How many areas there are is the other kernel's choice, which may know of more nodes.
    const ENTRY: u64 = size_of::<bindings::kho_scratch>() as u64;
    if len % ENTRY != 0 || phys % 8 != 0 {
        return Err("the table of scratch areas has a bad size or place");
    }
    let table = EarlyMap::new(phys, len).ok_or("the table of scratch areas cannot be mapped")?;
    let count = len / ENTRY;
    // SAFETY: By its invariant the map has that many entries, until the end of this function. The
    // address is aligned, and any bytes make an entry.
    let areas: &[bindings::kho_scratch] =
        unsafe { core::slice::from_raw_parts(table.virt.cast(), count as usize) };
    check_scratch(areas)?;
    if !memblock.has_room_for(areas) {
        return Err("memblock does not take a scratch area");
    }
    for area in areas {
        // From here on, memblock may need memory for its own arrays, which has to be scratch.
        if memblock.add_scratch(area).is_err() {
            memblock.clear_scratch(areas);
            return Err("memblock does not take a scratch area");
        }
    }
    if memblock.reserve_bytes(phys, len).is_err() {
        memblock.clear_scratch(areas);
        return Err("memblock does not take the table of scratch areas");
    }
    // Nothing may be allocated outside of scratch before takeover: anything there may be preserved.
    memblock.use_scratch_only();
    // SAFETY: Nobody looks at areas before `init_early()` sets where they are.
    unsafe { bindings::kho_scratch_cnt = count as u32 };
    Ok(())
}

/// Checks the FDT in the `len` bytes at `phys` again, where it is used from now on. Returns it, and
/// where the tree is.
#[link_section = ".init.text"]
fn check_fdt(memblock: Memblock, phys: u64, len: u64) -> Result<(Fdt, NodeAddr), FdtError> {
    if !Frames::covering(phys, len).is_some_and(|frames| memblock.is_memory(frames)) {
        return Err(FdtError::Magic);
    }
    // SAFETY: Memory in the direct map can be read.
    let fdt = unsafe { Fdt::new(kho_mm::virt(phys), len) }?;
    let root = fdt.memory_map()?;
    Ok((fdt, root))
}

/// Takes the subtrees out of the FDT whose blobs were not preserved whole: nobody may get an
/// address that the last kernel gave to somebody else.
#[link_section = ".init.text"]
fn check_subtrees(fdt: &mut Fdt, takeover: &Takeover) {
    let mut next = fdt.first_subtree();
    while let Some(node) = next {
        next = fdt.next_subtree(node);
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
pub(crate) fn init_early(memblock: Memblock) {
    kho_mm::init_direct_map();
    if !INHERITED.load(Ordering::Relaxed) {
        return;
    }
    let (fdt_len, table) = HANDED.get(memblock);
    // SAFETY: The table was reserved, and its number of areas was set.
    unsafe { bindings::kho_scratch = kho_mm::virt(table) };
    let phys = kho_state::handover().unwrap_or(0);
    let (mut fdt, root) = match check_fdt(memblock, phys, fdt_len) {
        Ok(found) => found,
        Err(error) => return refuse(memblock, (error.what(), phys)),
    };
    let start = kho_mm::cycles();
    let Ok(mut takeover) = Takeover::read(memblock, root) else {
        return refuse(memblock, Refusal::NoMemory.what());
    };
    if !Frames::covering(phys, fdt.size() as u64).is_some_and(|frames| takeover.has(frames)) {
        takeover.stats.refusal.get_or_insert(Refusal::Fdt(phys));
    }
    match takeover.stats.refusal {
        Some(refusal) => report_refusal(refusal.what()),
        None => check_subtrees(&mut fdt, &takeover),
    }
    match takeover.plan() {
        Ok(Plan::Keep) => {
            extend_scratch(memblock, takeover.busy());
            takeover.cycles = kho_mm::cycles().saturating_sub(start);
            FOUND.set(memblock, Some(takeover));
        }
        Ok(Plan::Drop) => {
            pr_warn!("too little memory would be left to keep what it names\n");
            takeover.drop_sets();
            use_all_memory(memblock);
        }
        Err(error) => {
            if !takeover.is_refused() {
                report_refusal(Refusal::from(error).what());
            }
            takeover.drop_sets();
            use_all_memory(memblock);
        }
    }
}

/// Lets memblock allocate from all memory away from `busy`, runs of frames in ascending order.
#[link_section = ".init.text"]
fn extend_scratch(memblock: Memblock, busy: Ranges<'_, Direct>) {
    let mut error = Ok(());
    let mut free_from = 0;
    for frames in busy {
        error = error.and(memblock.mark_scratch(free_from, frames.phys() & !(EXTENSION - 1)));
        let end = frames.phys().saturating_add(frames.bytes());
        free_from = end.checked_next_multiple_of(EXTENSION).unwrap_or(u64::MAX);
    }
    error = error.and(memblock.mark_scratch(free_from, memblock.ram_end() << PAGE_SHIFT));
    if let Err(error) = error {
        pr_warn!("failed to extend scratch: error {}\n", error.to_errno());
    }
}

/// Takes over what was handed over; on a cold boot, reserves scratch.
#[link_section = ".init.text"]
pub(crate) fn init(memblock: Memblock) {
    // SAFETY: May be called at any time.
    if unsafe { bindings::kho_glue_is_kdump_kernel() } {
        kho_state::set_enabled(false);
        pr_info!("disabled in the kdump kernel\n");
        return;
    }
    if INHERITED.load(Ordering::Relaxed) {
        kho_scratch::report(memblock);
    }
    if let Some(takeover) = FOUND.replace(memblock, None) {
        let start = kho_mm::cycles();
        match takeover.commit() {
            Ok(takeover) => report_takeover(takeover, kho_mm::cycles().saturating_sub(start)),
            Err(refusal) => refuse(memblock, refusal.what()),
        }
    }
    if kho_state::is_enabled()
        && !INHERITED.load(Ordering::Relaxed)
        && kho_scratch::reserve(memblock).is_err()
    {
        kho_state::set_enabled(false);
    }
}

/// Says what was taken over, what was not, and how many cycles that took.
#[link_section = ".init.text"]
fn report_takeover(takeover: &Takeover, cycles: u64) {
    let cycles = cycles.saturating_add(takeover.cycles);
    let stats = &takeover.stats;
    let kept = takeover.kept << (PAGE_SHIFT - 10);
    #[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
    kho_summary::note_takeover(stats, cycles);
    if takeover.is_refused() {
        pr_warn!("{kept} KiB that the refused handover names stay reserved\n");
        return;
    }
    if stats.lost > 0 {
        pr_warn!(
            "takeover: {} blocks are not RAM outside scratch and cannot be restored, the first at \
             {:#x}; {kept} KiB of them stay reserved\n",
            stats.lost,
            stats.first_lost
        );
    }
    if !kho_state::is_enabled() {
        pr_warn!(
            "off, but {} KiB were handed over and stay reserved until they are restored\n",
            stats.frames << (PAGE_SHIFT - 10)
        );
    }
    if let Some(pfn) = stats.overlap {
        kho_log::complain(Complaint::Twice, pfn << PAGE_SHIFT);
    }
    let mut blocks = 0u64;
    for (order, count) in stats.orders() {
        blocks = blocks.saturating_add(count);
        pr_info!("takeover: order {}: {} blocks\n", order.get(), count);
    }
    pr_info!(
        "takeover: {} blocks in {} runs, {} pages, {} tree nodes, {} cycles\n",
        blocks,
        takeover.ranges,
        stats.frames,
        stats.nodes,
        cycles
    );
}
