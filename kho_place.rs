// SPDX-License-Identifier: GPL-2.0

//! Which memory can be preserved: none that lies in a scratch area, and none that was plugged in.
//!
//! The next kernel boots in scratch, and knows only the memory that firmware reports. The scratch
//! areas are written while the kernel boots, see [`kho_scratch`](super::kho_scratch); what is
//! plugged in is noted here.

use super::kho_key::{
    Block,
    Order, //
};
use super::kho_log::{
    self,
    Complaint, //
};
use super::kho_range::Frames;
use core::sync::atomic::{
    AtomicU32,
    AtomicU64,
    Ordering, //
};
use kernel::{
    bindings,
    prelude::*, //
};

/// Returns the physical addresses and sizes of the scratch areas.
pub(crate) fn scratch() -> &'static [bindings::kho_scratch] {
    // SAFETY: The array stays. It and its length change while booting only: in early boot, when
    // nothing else runs, and in initcalls, before anything can be preserved or has been looked for
    // there.
    unsafe {
        if bindings::kho_scratch.is_null() {
            return &[];
        }
        core::slice::from_raw_parts(bindings::kho_scratch, bindings::kho_scratch_cnt as usize)
    }
}

/// Returns where the scratch areas start and end. C hands over empty ones, which are left out.
#[inline]
pub(crate) fn areas() -> impl Iterator<Item = (u64, u64)> {
    let areas = scratch().iter().filter(|area| area.size > 0);
    areas.map(|area| (area.addr, area.addr.saturating_add(area.size)))
}

/// Returns how many bytes the scratch areas have.
pub(crate) fn scratch_size() -> u64 {
    let areas = scratch().iter();
    areas.fold(0, |size, area| area.size.saturating_add(size))
}

/// Returns the scratch area around `phys`, or the next one after that.
#[link_section = ".init.text"]
pub(crate) fn next_scratch(phys: u64) -> Option<(u64, u64)> {
    areas()
        .filter(|(_, end)| *end > phys)
        .min_by_key(|(start, _)| *start)
}

/// Returns whether any of the `size` bytes at `phys` is in a scratch area.
#[inline(never)]
pub(crate) fn in_scratch(phys: u64, size: u64) -> bool {
    let after = phys.saturating_add(size);
    areas().any(|(start, end)| phys < end && start < after)
}

/// A range around all memory that was plugged in while this kernel ran, or was offline: its first
/// frame, and the one after its last. No kernel that this one boots has such memory from the start.
static PLUGGED: (AtomicU64, AtomicU64) = (AtomicU64::new(u64::MAX), AtomicU64::new(0));

/// Returns whether any of `frames` was plugged in, and was not there at boot.
pub(crate) fn is_plugged(frames: Frames) -> bool {
    let start = frames.start().max(PLUGGED.0.load(Ordering::Relaxed));
    let end = frames.end().min(PLUGGED.1.load(Ordering::Relaxed));
    // SAFETY: The range need not be RAM.
    start < end && unsafe { bindings::kho_glue_is_plugged(start as usize, end as usize) }
}

/// A coarse map of memory that may have to be refused: bit `n % 64` is set if any of the pages from
/// `n << shift` to before `(n + 1) << shift` is in a scratch area or was plugged in. Until the map
/// is drawn, all of memory may have to be refused.
static REFUSED_MAP: AtomicU64 = AtomicU64::new(u64::MAX);

/// The `shift` of [`REFUSED_MAP`].
static REFUSED_MAP_SHIFT: AtomicU32 = AtomicU32::new(Order::MAX.get());

/// Draws the map, when the scratch areas are known and before any memory can be plugged in.
#[link_section = ".init.text"]
pub(crate) fn draw_map() {
    // SAFETY: The number is known by the time there is memory to preserve.
    let frames = unsafe { bindings::max_pfn } as u64;
    // 64 bits cover all of RAM; what is plugged in later shares bits with it.
    let shift = u64::BITS - (frames >> 6).leading_zeros();
    REFUSED_MAP_SHIFT.store(shift, Ordering::Relaxed);
    let mut map = 0u64;
    for (start, end) in areas() {
        let frames = Frames::covering(start, end.saturating_sub(start));
        map |= frames.map_or(u64::MAX, map_bits);
    }
    REFUSED_MAP.store(map, Ordering::Relaxed);
    // SAFETY: Called once, while booting.
    unsafe { bindings::kho_glue_watch_memory() };
}

/// Returns the bits that the map has for `frames`.
fn map_bits(frames: Frames) -> u64 {
    let shift = REFUSED_MAP_SHIFT.load(Ordering::Relaxed);
    let first = frames.start().wrapping_shr(shift);
    let last = frames.end().saturating_sub(1).wrapping_shr(shift);
    let mut map = 0u64;
    for n in first..=last.min(first.saturating_add(63)) {
        map |= 1u64.wrapping_shl(n as u32);
    }
    map
}

/// Notes that memory is being plugged in. It is not free yet, so that a caller that gets it from
/// the page allocator also finds the note.
pub(crate) fn plug(frames: Frames) {
    PLUGGED.0.fetch_min(frames.start(), Ordering::Relaxed);
    PLUGGED.1.fetch_max(frames.end(), Ordering::Relaxed);
    REFUSED_MAP.fetch_or(map_bits(frames), Ordering::Relaxed);
}

/// Returns whether `block` may have to be refused, quickly: no is right, yes need not be.
// Always inlined: it is on the path of every folio that is preserved.
#[inline(always)]
pub(crate) fn may_be_refused(block: Block) -> bool {
    let shift = REFUSED_MAP_SHIFT.load(Ordering::Relaxed);
    // A block that is no larger than what a bit stands for has one bit, as it is aligned to its
    // size.
    let n = block.pfn().get().wrapping_shr(shift);
    block.order().get() > shift
        || REFUSED_MAP.load(Ordering::Relaxed).wrapping_shr(n as u32) & 1 != 0
}

/// Refuses memory that the next kernel could not take over.
///
/// # Errors
///
/// `EINVAL` in a scratch area: the next kernel boots in there. Movable memory may lie there, and
/// has to be pinned before it is preserved. `EADDRNOTAVAIL` for memory that was plugged in while
/// this kernel ran: the next one boots with the memory that firmware reports.
#[inline(never)]
pub(crate) fn check_place(frames: Frames) -> Result {
    if in_scratch(frames.phys(), frames.bytes()) {
        kho_log::complain(Complaint::InScratch, frames.phys());
        return Err(EINVAL);
    }
    if is_plugged(frames) {
        kho_log::complain(Complaint::Plugged, frames.phys());
        return Err(EADDRNOTAVAIL);
    }
    Ok(())
}
