// SPDX-License-Identifier: GPL-2.0

//! The only door to memblock: where memory is, who has reserved it, and reserving it.

use super::kho_check::{
    Machine,
    Refusal, //
};
use super::kho_place;
use super::kho_range::Frames;
use super::PAGE_SHIFT;
use kernel::{
    bindings,
    prelude::*, //
};

/// The machine as memblock knows it.
pub(crate) struct Memblock;

/// Returns the regions of a list of memblock's, sorted by address and disjoint.
///
/// # Safety
///
/// While there is memblock. The list must not be changed while the result is in use.
#[link_section = ".init.text"]
unsafe fn regions(list: *const bindings::memblock_type) -> &'static [bindings::memblock_region] {
    // SAFETY: By the caller's contract.
    unsafe { core::slice::from_raw_parts((*list).regions, (*list).cnt) }
}

/// Returns the regions of memory.
#[link_section = ".init.text"]
fn memory() -> &'static [bindings::memblock_region] {
    // SAFETY: Early boot; no caller changes them while it has the slice.
    unsafe { regions(&raw const bindings::memblock.memory) }
}

/// Returns the regions that end after `at`.
#[link_section = ".init.text"]
fn after(
    regions: &'static [bindings::memblock_region],
    at: u64,
) -> &'static [bindings::memblock_region] {
    let mut below = 0usize;
    let mut above = regions.len();
    while below < above {
        let middle = below.wrapping_add(above) / 2;
        match regions.get(middle) {
            Some(region) if region.base.saturating_add(region.size) <= at => {
                below = middle.wrapping_add(1);
            }
            _ => above = middle,
        }
    }
    regions.get(below..).unwrap_or(&[])
}

/// Returns whether a region is memory in the direct map. What is not cannot be preserved, nor hold
/// a node.
#[link_section = ".init.text"]
fn is_mapped(region: &bindings::memblock_region) -> bool {
    region.flags & bindings::memblock_flags_MEMBLOCK_NOMAP == 0
}

/// Returns whether all of `frames` is memory, in however many regions.
#[link_section = ".init.text"]
pub(crate) fn is_memory(frames: Frames) -> bool {
    let mut at = frames.phys();
    let end = at.saturating_add(frames.bytes());
    for region in after(memory(), at) {
        if at >= end || region.base > at || !is_mapped(region) {
            break;
        }
        at = region.base.saturating_add(region.size);
    }
    at >= end
}

/// Returns how many frames of memory there are.
#[link_section = ".init.text"]
pub(crate) fn total_frames() -> u64 {
    let mut count = 0u64;
    for frames in memory_frames() {
        count = count.saturating_add(frames.count());
    }
    count
}

/// Returns the first frames of `frames` that are in one region of memory, or all in none.
#[link_section = ".init.text"]
pub(crate) fn in_one_region(frames: Frames) -> Frames {
    let at = frames.phys();
    let border = match after(memory(), at).first() {
        Some(region) if region.base > at => region.base,
        Some(region) => region.base.saturating_add(region.size),
        None => u64::MAX,
    };
    // A page that two regions share is of neither.
    frames.head((border >> PAGE_SHIFT).saturating_sub(frames.start()).max(1))
}

/// Returns the regions of memory as frames, ascending.
#[link_section = ".init.text"]
pub(crate) fn memory_frames() -> MemoryFrames {
    MemoryFrames { rest: memory() }
}

/// See [`memory_frames`].
pub(crate) struct MemoryFrames {
    rest: &'static [bindings::memblock_region],
}

impl Iterator for MemoryFrames {
    type Item = Frames;

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<Frames> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(inside(first.base, first.base.saturating_add(first.size)))
    }
}

/// Returns the frames that lie wholly in a range of addresses.
#[link_section = ".init.text"]
fn inside(start: u64, end: u64) -> Frames {
    let page = (1u64 << PAGE_SHIFT).wrapping_sub(1);
    let start = start.saturating_add(page) & !page;
    let size = (end & !page).saturating_sub(start);
    Frames::exact(start, size).unwrap_or(Frames::EMPTY)
}

impl Machine for Memblock {
    #[link_section = ".init.text"]
    fn ram_end(&self) -> u64 {
        // SAFETY: Early boot.
        unsafe { bindings::memblock_end_of_DRAM() >> PAGE_SHIFT }
    }

    #[link_section = ".init.text"]
    fn room(&self, pfn: u64) -> Option<Frames> {
        first_room(pfn).filter(|room| room.start() == pfn)
    }

    #[link_section = ".init.text"]
    fn ram(&self, pfn: u64) -> Option<Frames> {
        let from = pfn.checked_mul(1 << PAGE_SHIFT)?;
        for region in after(memory(), from) {
            let end = region.base.saturating_add(region.size);
            let ram = inside(region.base.max(from), end);
            if is_mapped(region) && ram.count() > 0 {
                return Some(ram);
            }
        }
        None
    }
}

/// Returns the first frames from `pfn` on that are RAM outside scratch, as many as follow each
/// other in one region of memory.
#[link_section = ".init.text"]
fn first_room(pfn: u64) -> Option<Frames> {
    let from = pfn.checked_mul(1 << PAGE_SHIFT)?;
    for region in after(memory(), from) {
        let (mut start, mut end) = (
            region.base.max(from),
            region.base.saturating_add(region.size),
        );
        if !is_mapped(region) {
            continue;
        }
        while let Some(area) = kho_place::next_scratch(start) {
            if area.addr > start {
                end = end.min(area.addr);
                break;
            }
            start = area.addr.saturating_add(area.size);
        }
        let room = inside(start, end);
        if room.count() > 0 {
            return Some(room);
        }
    }
    None
}

/// Returns whether any of `frames` is reserved.
#[link_section = ".init.text"]
pub(crate) fn is_reserved(frames: Frames) -> bool {
    // SAFETY: Early boot; nothing is reserved here.
    let reserved = unsafe { regions(&raw const bindings::memblock.reserved) };
    let end = frames.phys().saturating_add(frames.bytes());
    let first = after(reserved, frames.phys()).first();
    first.is_some_and(|region| region.base < end)
}

/// Returns the first frames of `frames` that are RAM outside scratch and that nobody has reserved:
/// as many as follow each other on one node.
#[link_section = ".init.text"]
pub(crate) fn first_free(frames: Frames) -> Option<Frames> {
    let mut rest = frames;
    while let Some(room) = first_room(rest.start()).map(|room| room.both(frames)) {
        if room.count() == 0 {
            break;
        }
        let free = unreserved(room);
        if free.count() > 0 {
            return Some(free);
        }
        rest = rest.tail(room.end().wrapping_sub(rest.start()));
    }
    None
}

/// Returns the first frames of `frames` that nobody has reserved.
#[link_section = ".init.text"]
fn unreserved(frames: Frames) -> Frames {
    // SAFETY: Early boot; nothing is reserved here.
    let reserved = unsafe { regions(&raw const bindings::memblock.reserved) };
    let mut at = frames.phys();
    let end = at.saturating_add(frames.bytes());
    for region in after(reserved, at) {
        let free = inside(at, region.base.min(end));
        if free.count() > 0 {
            return free;
        }
        at = region.base.saturating_add(region.size);
        if at >= end {
            return Frames::EMPTY;
        }
    }
    inside(at, end)
}

/// Returns how many of `frames` outside scratch nobody has reserved.
#[link_section = ".init.text"]
pub(crate) fn free_frames(frames: Frames) -> u64 {
    let mut count = 0u64;
    let mut rest = frames;
    while let Some(free) = first_free(rest) {
        count = count.wrapping_add(free.count());
        rest = rest.tail(free.end().wrapping_sub(rest.start()));
    }
    count
}

/// Reserves what of `frames` nobody has reserved, as far as they are in the scratch area that the
/// first one is in. Returns the frames that were looked at, and how many were reserved.
#[link_section = ".init.text"]
pub(crate) fn keep_scratch(frames: Frames) -> (Frames, u64) {
    let part = match kho_place::next_scratch(frames.phys()) {
        Some(area) if area.addr <= frames.phys() => {
            let end = area.addr.saturating_add(area.size) >> PAGE_SHIFT;
            frames.head(end.saturating_sub(frames.start()).max(1))
        }
        _ => frames.head(1),
    };
    let mut kept = 0u64;
    let mut rest = part;
    loop {
        let free = unreserved(rest);
        if free.count() == 0 || reserve_with(free, 0).is_err() {
            return (part, kept);
        }
        kept = kept.saturating_add(free.count());
        rest = rest.tail(free.end().wrapping_sub(rest.start()));
    }
}

/// Keeps `frames`, which nobody has reserved, from the page allocator and from whoever initialises
/// struct pages.
#[link_section = ".init.text"]
pub(crate) fn reserve(frames: Frames) -> Result<(), Refusal> {
    if frames.count() == 0 {
        return Ok(());
    }
    // memblock takes a flag together with a range only if no part of it has been reserved without.
    reserve_with(frames, bindings::memblock_flags_MEMBLOCK_RSRV_NOINIT)
}

#[link_section = ".init.text"]
fn reserve_with(frames: Frames, flags: bindings::memblock_flags) -> Result<(), Refusal> {
    // SAFETY: Early boot.
    let error = unsafe {
        let none = bindings::NUMA_NO_NODE;
        bindings::__memblock_reserve(frames.phys(), frames.bytes(), none, flags)
    };
    match error {
        0 => Ok(()),
        error => Err(Refusal::Reserve(frames, error)),
    }
}

/// Keeps `frames`, as far as they are reserved, from whoever initialises struct pages.
#[link_section = ".init.text"]
pub(crate) fn mark_noinit(frames: Frames) -> Result<(), Refusal> {
    // SAFETY: Early boot.
    match unsafe { bindings::memblock_reserved_mark_noinit(frames.phys(), frames.bytes()) } {
        0 => Ok(()),
        error => Err(Refusal::Reserve(frames, error)),
    }
}

/// Undoes [`reserve`].
#[link_section = ".init.text"]
pub(crate) fn release(frames: Frames) {
    // SAFETY: Early boot.
    unsafe { bindings::memblock_phys_free(frames.phys(), frames.bytes()) };
}
