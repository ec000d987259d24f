// SPDX-License-Identifier: GPL-2.0

//! All calls to memblock: where memory is, whether it is reserved, and reserving it.
//!
//! They are methods of [`Memblock`], which exists while memblock does. A frame that is only partly
//! inside a region is ignored. Statics of early boot are a [`BootCell`] each, which exists as long.

use super::kho_check::{
    Machine,
    Refusal, //
};
use super::kho_place;
use super::kho_range::Frames;
use super::PAGE_SHIFT;
use core::{
    cell::Cell,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    error::to_result,
    prelude::*, //
};

/// memblock, while it is there.
///
/// # Invariants
///
/// The kernel boots, on one CPU but for `page_alloc_init_late()`, which discards memblock's lists
/// after this crate has used them for the last time. Where several CPUs have one at once, they only
/// read the lists.
#[derive(Clone, Copy)]
pub(crate) struct Memblock(());

/// A variable of early boot. To use it takes a [`Memblock`].
pub(crate) struct BootCell<T>(Cell<T>);

// SAFETY: By `Memblock`'s invariant no other CPU has one meanwhile and uses it for a variable.
unsafe impl<T: Send> Sync for BootCell<T> {}

impl<T> BootCell<T> {
    /// Returns a variable with this value.
    pub(crate) const fn new(value: T) -> Self {
        Self(Cell::new(value))
    }

    /// Returns the value.
    #[inline]
    pub(crate) fn get(&self, _memblock: Memblock) -> T
    where
        T: Copy,
    {
        self.0.get()
    }

    /// Changes the value.
    #[inline]
    pub(crate) fn set(&self, _memblock: Memblock, value: T) {
        self.0.set(value);
    }

    /// Changes the value, and returns what it was.
    #[inline]
    pub(crate) fn replace(&self, _memblock: Memblock, value: T) -> T {
        self.0.replace(value)
    }
}

/// Returns the end of a region, as an address.
#[inline]
fn end_of(region: &bindings::memblock_region) -> u64 {
    region.base.saturating_add(region.size)
}

/// Returns whether a region is memory in the direct map. What is not can neither be preserved nor
/// hold a node.
#[inline]
fn is_mapped(region: &bindings::memblock_region) -> bool {
    region.flags & bindings::memblock_flags_MEMBLOCK_NOMAP == 0
}

/// Returns the regions that end after address `at`.
#[link_section = ".init.text"]
fn after(
    regions: &'static [bindings::memblock_region],
    at: u64,
) -> &'static [bindings::memblock_region] {
    let (mut first, mut above) = (0, regions.len());
    while first < above {
        let middle = first.midpoint(above);
        match regions.get(middle) {
            Some(region) if end_of(region) <= at => first = middle.saturating_add(1),
            _ => above = middle,
        }
    }
    regions.get(first..).unwrap_or(&[])
}

/// Returns the frames that lie wholly in a range of addresses.
#[inline]
fn inside(start: u64, end: u64) -> Frames {
    let page = 1 << PAGE_SHIFT;
    let start = start.checked_next_multiple_of(page).unwrap_or(u64::MAX);
    Frames::between(start >> PAGE_SHIFT, end >> PAGE_SHIFT)
}

/// The regions of memory, see [`Memblock::memory`].
// Each is read when it is asked for: memblock moves its arrays when they have to grow.
pub(crate) struct Memory {
    memblock: Memblock,
    next: usize,
}

impl Iterator for Memory {
    type Item = Frames;

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<Frames> {
        let region = self.memblock.memory_regions().get(self.next)?;
        self.next = self.next.saturating_add(1);
        Some(inside(region.base, end_of(region)))
    }
}

impl Memblock {
    /// Returns memblock.
    ///
    /// # Safety
    ///
    /// The result must not be used after the call of `kho_memory_init_late()`, nor by several CPUs
    /// at once.
    #[link_section = ".init.text"]
    pub(crate) unsafe fn get() -> Self {
        // INVARIANT: By the caller's contract.
        Self(())
    }

    /// Returns the regions of a list, sorted by address and disjoint.
    ///
    /// # Safety
    ///
    /// `list` must be one of memblock's, and not be changed while the result is in use.
    #[link_section = ".init.text"]
    unsafe fn regions(
        self,
        list: *const bindings::memblock_type,
    ) -> &'static [bindings::memblock_region] {
        // SAFETY: By the type invariant the lists exist; an array has `cnt` regions.
        unsafe { core::slice::from_raw_parts((*list).regions, (*list).cnt) }
    }

    #[link_section = ".init.text"]
    fn memory_regions(self) -> &'static [bindings::memblock_region] {
        // SAFETY: The list is memblock's, and no caller adds memory while it has the slice.
        unsafe { self.regions(&raw const bindings::memblock.memory) }
    }

    #[link_section = ".init.text"]
    fn reserved_regions(self) -> &'static [bindings::memblock_region] {
        // SAFETY: The list is memblock's, and no caller reserves anything while it has the slice.
        unsafe { self.regions(&raw const bindings::memblock.reserved) }
    }

    /// Returns the regions of memory, ascending.
    #[link_section = ".init.text"]
    pub(crate) fn memory(self) -> Memory {
        Memory {
            memblock: self,
            next: 0,
        }
    }

    /// Returns how many frames of memory there are.
    #[link_section = ".init.text"]
    pub(crate) fn total_frames(self) -> u64 {
        let mut total = 0u64;
        for frames in self.memory() {
            total = total.saturating_add(frames.count());
        }
        total
    }

    /// Returns whether all of `frames` is memory in the direct map, in however many regions.
    #[link_section = ".init.text"]
    pub(crate) fn is_memory(self, frames: Frames) -> bool {
        let mut at = frames.phys();
        let end = at.saturating_add(frames.bytes());
        for region in after(self.memory_regions(), at) {
            if at >= end || region.base > at || !is_mapped(region) {
                break;
            }
            at = end_of(region);
        }
        at >= end
    }

    /// Returns the first frames of `frames` that are in one region of memory, or all in none.
    #[link_section = ".init.text"]
    pub(crate) fn in_one_region(self, frames: Frames) -> Frames {
        let at = frames.phys();
        let border = match after(self.memory_regions(), at).first() {
            Some(region) if region.base > at => region.base,
            Some(region) => end_of(region),
            None => u64::MAX,
        };
        // A page that two regions share is of neither.
        frames.until((border >> PAGE_SHIFT).max(frames.start().saturating_add(1)))
    }

    /// Returns the first usable frames from `pfn` on, as many as follow each other in one region of
    /// memory.
    #[link_section = ".init.text"]
    fn first_usable(self, pfn: u64) -> Option<Frames> {
        let from = pfn.checked_mul(1 << PAGE_SHIFT)?;
        for region in after(self.memory_regions(), from) {
            let (mut start, mut end) = (region.base.max(from), end_of(region));
            if !is_mapped(region) {
                continue;
            }
            while let Some((scratch, behind)) = kho_place::next_scratch(start) {
                if scratch > start {
                    end = end.min(scratch);
                    break;
                }
                start = behind;
            }
            let usable = inside(start, end);
            if !usable.is_empty() {
                return Some(usable);
            }
        }
        None
    }

    /// Returns how many frames are usable, reserved or not.
    #[link_section = ".init.text"]
    pub(crate) fn usable_frames(self) -> u64 {
        let (mut count, mut at) = (0u64, 0);
        while let Some(usable) = self.first_usable(at) {
            count = count.saturating_add(usable.count());
            at = usable.end();
        }
        count
    }

    /// Returns whether any of `frames` is reserved.
    #[link_section = ".init.text"]
    pub(crate) fn is_reserved(self, frames: Frames) -> bool {
        let end = frames.phys().saturating_add(frames.bytes());
        let first = after(self.reserved_regions(), frames.phys()).first();
        first.is_some_and(|region| region.base < end)
    }

    /// Returns the first frames of `frames` that nobody has reserved.
    #[link_section = ".init.text"]
    fn unreserved(self, frames: Frames) -> Frames {
        let mut at = frames.phys();
        let end = at.saturating_add(frames.bytes());
        for region in after(self.reserved_regions(), at) {
            let free = inside(at, region.base.min(end));
            if !free.is_empty() {
                return free;
            }
            at = end_of(region);
            if at >= end {
                return Frames::EMPTY;
            }
        }
        inside(at, end)
    }

    /// Returns the first frames of `frames` that are usable and that nobody has reserved: as many
    /// as follow each other on one node.
    #[link_section = ".init.text"]
    pub(crate) fn first_free(self, frames: Frames) -> Option<Frames> {
        let mut rest = frames;
        while let Some(usable) = self.first_usable(rest.start()).map(|it| it.both(frames)) {
            if usable.is_empty() {
                break;
            }
            let free = self.unreserved(usable);
            if !free.is_empty() {
                return Some(free);
            }
            rest = rest.from(usable.end());
        }
        None
    }

    /// Returns how many frames are usable and not reserved.
    #[link_section = ".init.text"]
    pub(crate) fn free_frames(self) -> u64 {
        let mut count = 0u64;
        let mut rest = Frames::between(0, self.ram_end());
        while let Some(free) = self.first_free(rest) {
            count = count.saturating_add(free.count());
            rest = rest.from(free.end());
        }
        count
    }

    /// Keeps `frames`, which nobody has reserved, from the page allocator, and from initialisation
    /// of their struct pages.
    ///
    /// # Errors
    ///
    /// [`Refusal::Reserve`] if memblock's list cannot grow.
    #[link_section = ".init.text"]
    pub(crate) fn reserve(self, frames: Frames) -> Result<(), Refusal> {
        if frames.is_empty() {
            return Ok(());
        }
        // memblock takes a flag together with a range only if no part of it has been reserved
        // without.
        self.reserve_with(frames, bindings::memblock_flags_MEMBLOCK_RSRV_NOINIT)
    }

    #[link_section = ".init.text"]
    fn reserve_with(self, frames: Frames, flags: bindings::memblock_flags) -> Result<(), Refusal> {
        let (phys, size) = (frames.phys(), frames.bytes());
        // SAFETY: By the type invariant there is memblock, which takes any range.
        let error =
            unsafe { bindings::__memblock_reserve(phys, size, bindings::NUMA_NO_NODE, flags) };
        to_result(error).map_err(|_| Refusal::Reserve(frames))
    }

    /// Keeps `frames`, as far as they are reserved, from initialisation of their struct pages.
    ///
    /// # Errors
    ///
    /// [`Refusal::Reserve`] if memblock's list cannot grow.
    #[link_section = ".init.text"]
    pub(crate) fn mark_noinit(self, frames: Frames) -> Result<(), Refusal> {
        let (phys, size) = (frames.phys(), frames.bytes());
        // SAFETY: By the type invariant there is memblock, which takes any range.
        let error = unsafe { bindings::memblock_reserved_mark_noinit(phys, size) };
        to_result(error).map_err(|_| Refusal::Reserve(frames))
    }

    /// Undoes [`Memblock::reserve`].
    #[link_section = ".init.text"]
    pub(crate) fn unreserve(self, frames: Frames) {
        self.free(frames.phys(), frames.bytes());
    }

    /// Reserves what of `frames` nobody has reserved, as far as they are in the scratch area that
    /// the first one is in. Returns the frames that were looked at, and how many were reserved.
    #[link_section = ".init.text"]
    pub(crate) fn keep_scratch(self, frames: Frames) -> (Frames, u64) {
        let next = frames.start().saturating_add(1);
        let part = match kho_place::next_scratch(frames.phys()) {
            Some((start, end)) if start <= frames.phys() => {
                frames.until((end >> PAGE_SHIFT).max(next))
            }
            _ => frames.until(next),
        };
        let mut kept = 0u64;
        let mut rest = part;
        loop {
            let free = self.unreserved(rest);
            if free.is_empty() || self.reserve_with(free, 0).is_err() {
                return (part, kept);
            }
            kept = kept.saturating_add(free.count());
            rest = rest.from(free.end());
        }
    }

    /// Has allocations come from scratch only.
    #[link_section = ".init.text"]
    pub(crate) fn use_scratch_only(self) {
        // SAFETY: By the type invariant there is memblock.
        unsafe { bindings::memblock_set_kho_scratch_only() };
    }

    /// Has allocations come from all memory again.
    #[link_section = ".init.text"]
    pub(crate) fn use_all_memory(self) {
        // SAFETY: By the type invariant there is memblock.
        unsafe { bindings::memblock_clear_kho_scratch_only() };
    }

    /// Returns whether all of `areas` can be added. They come before memblock may move its array of
    /// memory, and it panics if that is too small.
    #[link_section = ".init.text"]
    pub(crate) fn has_room_for(self, areas: &[bindings::kho_scratch]) -> bool {
        let mut needed = self.memory_regions().len();
        for area in areas {
            needed = needed.saturating_add((area.size != 0).into());
        }
        // SAFETY: By the type invariant the list exists.
        let max = unsafe { bindings::memblock.memory.max };
        // Adding or marking one wants room for two more.
        needed.saturating_add(2) <= max
    }

    /// Adds a scratch area of another kernel to what memblock knows of memory.
    ///
    /// # Errors
    ///
    /// Those of memblock.
    #[link_section = ".init.text"]
    pub(crate) fn add_scratch(self, area: &bindings::kho_scratch) -> Result {
        // SAFETY: By the type invariant there is memblock, which takes any range.
        to_result(unsafe { bindings::memblock_add(area.addr, area.size) })?;
        self.mark_scratch(area.addr, area.addr.saturating_add(area.size))
    }

    /// Has allocations that come from scratch only also come from `start` to `end`.
    ///
    /// # Errors
    ///
    /// Those of memblock.
    #[link_section = ".init.text"]
    pub(crate) fn mark_scratch(self, start: u64, end: u64) -> Result {
        let size = end.saturating_sub(start);
        if size == 0 {
            return Ok(());
        }
        // SAFETY: By the type invariant there is memblock, which takes any range.
        to_result(unsafe { bindings::memblock_mark_kho_scratch(start, size) })
    }

    /// Makes scratch areas memory like any other.
    #[link_section = ".init.text"]
    pub(crate) fn clear_scratch(self, areas: &[bindings::kho_scratch]) {
        for area in areas {
            // SAFETY: By the type invariant there is memblock, which takes any range.
            unsafe { bindings::memblock_clear_kho_scratch(area.addr, area.size) };
        }
    }

    /// Reserves `size` bytes at `phys`, for as long as the kernel runs.
    ///
    /// # Errors
    ///
    /// Those of memblock.
    #[link_section = ".init.text"]
    pub(crate) fn reserve_bytes(self, phys: u64, size: u64) -> Result {
        // SAFETY: By the type invariant there is memblock, which takes any range.
        to_result(unsafe { bindings::__memblock_reserve(phys, size, bindings::NUMA_NO_NODE, 0) })
    }

    /// Allocates `size` bytes that start at a multiple of `align`, which is a power of two, below
    /// `limit`, 0 being the end of memory (`MEMBLOCK_ALLOC_ACCESSIBLE`). `nid` is a wish, unless it
    /// is `exact`.
    #[link_section = ".init.text"]
    pub(crate) fn alloc(
        self,
        size: u64,
        align: u64,
        limit: u64,
        nid: c_int,
        exact: bool,
    ) -> Option<u64> {
        // SAFETY: By the type invariant there is memblock, and it hands out what nobody has.
        let phys = unsafe { bindings::memblock_alloc_range_nid(size, align, 0, limit, nid, exact) };
        (phys != 0).then_some(phys)
    }

    /// Allocates `size` bytes of zeroes, mapped, at the start of a page.
    #[link_section = ".init.text"]
    pub(crate) fn alloc_zeroed(self, size: u64) -> Option<NonNull<c_void>> {
        let align = bindings::PAGE_SIZE as u64;
        // SAFETY: As for `alloc()`.
        NonNull::new(unsafe {
            bindings::memblock_alloc_try_nid(size, align, 0, 0, bindings::NUMA_NO_NODE)
        })
    }

    /// Allocates `size` bytes, mapped, at the start of a page. kmemleak does not see them, as it is
    /// not told when a part of them is freed.
    #[link_section = ".init.text"]
    pub(crate) fn alloc_untracked(self, size: u64) -> Option<NonNull<c_void>> {
        let align = bindings::PAGE_SIZE as u64;
        let limit = u64::from(bindings::MEMBLOCK_ALLOC_NOLEAKTRACE);
        // SAFETY: As for `alloc()`.
        NonNull::new(unsafe {
            bindings::memblock_alloc_try_nid_raw(size, align, 0, limit, bindings::NUMA_NO_NODE)
        })
    }

    /// Gives up `size` bytes at `phys` that were reserved or allocated.
    #[link_section = ".init.text"]
    pub(crate) fn free(self, phys: u64, size: u64) {
        // SAFETY: By the type invariant there is memblock, which takes any range.
        unsafe { bindings::memblock_phys_free(phys, size) };
    }

    /// Returns how many bytes below `limit` on node `nid` were allocated while booting. Huge pages
    /// do not count: they never come from scratch.
    #[link_section = ".init.text"]
    pub(crate) fn used_below(self, limit: u64, nid: c_int) -> u64 {
        // SAFETY: By the type invariant there is memblock.
        unsafe {
            bindings::memblock_reserved_kern_size(limit, nid)
                .saturating_sub(bindings::memblock_reserved_hugetlb_size(limit, nid))
        }
    }
}

impl Machine for Memblock {
    #[link_section = ".init.text"]
    fn ram_end(&self) -> u64 {
        // SAFETY: By the type invariant there is memblock.
        unsafe { bindings::memblock_end_of_DRAM() >> PAGE_SHIFT }
    }

    #[link_section = ".init.text"]
    fn usable(&self, pfn: u64) -> Option<Frames> {
        self.first_usable(pfn)
            .filter(|usable| usable.start() == pfn)
    }

    #[link_section = ".init.text"]
    fn ram(&self, pfn: u64) -> Option<Frames> {
        let from = pfn.checked_mul(1 << PAGE_SHIFT)?;
        for region in after(self.memory_regions(), from) {
            let ram = inside(region.base.max(from), end_of(region));
            if is_mapped(region) && !ram.is_empty() {
                return Some(ram);
            }
        }
        None
    }
}
