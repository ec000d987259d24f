// SPDX-License-Identifier: GPL-2.0

//! Preserving and restoring memory from `vmalloc()`.
//!
//! What is handed over is a list of chunks, each a page of physical addresses; `struct
//! kho_vmalloc` has the first and describes the area:
//!
//! ```text
//!  kho_vmalloc          chunk                  chunk
//!  +-------------+      +---------------+      +---------------+
//!  | first       |----->| next          |----->| next = 0      |
//!  | total_pages |      | phys[0]       |      | phys[0]       |
//!  | flags       |      | ...           |      | 0             |
//!  | order       |      | phys[510]     |      | ...           |
//!  +-------------+      +---------------+      +---------------+
//! ```
//!
//! Each address stands for `2^order` pages, preserved as single pages, as are the chunks. A 0 ends
//! the addresses of a chunk.
//!
//! The format is ABI:
//! [`include/linux/kho/abi/kexec_handover.h`](srctree/include/linux/kho/abi/kexec_handover.h).

use super::kho_key::{
    Block,
    Order, //
};
use super::kho_log;
use super::kho_mm::{
    self,
    Mark,
    Page, //
};
use super::kho_pages;
use super::kho_range::Frames;
use super::kho_trace;
use core::{
    mem::ManuallyDrop,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    prelude::*, //
};

/// The flags of an area that can be preserved: those that the next kernel can give it again.
const ALLOC: usize = bindings::VM_ALLOC as usize;
const HUGE_VMAP: usize = bindings::VM_ALLOW_HUGE_VMAP as usize;

/// `VM_ALLOC` in `struct kho_vmalloc`; ABI.
const KHO_ALLOC: u16 = 1 << 0;

/// `VM_ALLOW_HUGE_VMAP` in `struct kho_vmalloc`; ABI.
const KHO_HUGE_VMAP: u16 = 1 << 1;

/// Returns the frames of the block at `phys`.
fn frames_at(phys: u64, order: Order) -> Option<Frames> {
    Block::at(phys, order).map(Frames::of_block)
}

/// A chunk of the list.
///
/// # Invariants
///
/// The frame is one of RAM in the direct map, that is used as a chunk for as long as this exists.
#[derive(Clone, Copy)]
struct Chunk(Frames);

impl Chunk {
    /// Allocates and preserves one.
    fn new() -> Result<Self> {
        let phys = kho_mm::alloc_page().ok_or(ENOMEM)?;
        let preserved = frames_at(phys, Order::ZERO)
            .ok_or(EINVAL)
            .and_then(|frames| kho_pages::preserve_frames(frames).map(|()| frames));
        // INVARIANT: The page is ours.
        preserved.map(Self).inspect_err(|_| {
            // SAFETY: The page was just allocated, and could not be preserved.
            unsafe { kho_mm::free_page(phys) };
        })
    }

    /// Returns the chunk at `phys`; [`None`] for the 0 that ends a list.
    ///
    /// # Safety
    ///
    /// There must be a chunk, unless `phys` is 0.
    unsafe fn at(phys: u64) -> Option<Self> {
        // INVARIANT: By the caller's contract.
        frames_at(phys, Order::ZERO).filter(|_| phys != 0).map(Self)
    }

    fn as_ptr(&self) -> *mut bindings::kho_vmalloc_chunk {
        kho_mm::virt(self.0.phys())
    }

    /// Returns the address of the next chunk.
    fn next(&self) -> u64 {
        // SAFETY: By the type invariant; the address is the only thing ever in there.
        unsafe { (*self.as_ptr()).hdr.next.phys }
    }

    fn set_next(&self, next: Self) {
        // SAFETY: By the type invariant.
        unsafe { (*self.as_ptr()).hdr.next.phys = next.0.phys() };
    }

    /// Returns the addresses in the chunk, of which a 0 is the end.
    fn entries(&self) -> &[u64; bindings::KHO_VMALLOC_SIZE] {
        // SAFETY: By the type invariant. Nothing changes a chunk that is in a list.
        unsafe { &(*self.as_ptr()).phys }
    }

    /// Writes the entry at `index`; returns whether there is room for it.
    fn set_entry(&self, index: usize, phys: u64) -> bool {
        // SAFETY: By the type invariant; the reference does not leave this function.
        let entries = unsafe { &mut (*self.as_ptr()).phys };
        match entries.get_mut(index) {
            Some(entry) => {
                *entry = phys;
                true
            }
            None => false,
        }
    }

    /// Frees the chunk.
    ///
    /// # Safety
    ///
    /// The caller must have the only reference to the page, and no copy of `self` may be used any
    /// more.
    unsafe fn free(self) {
        // SAFETY: By the caller's contract.
        unsafe { kho_mm::free_page(self.0.phys()) };
    }
}

/// Preserves the area that starts at `ptr`, all of it or nothing, and returns what describes it.
///
/// # Errors
///
/// `EINVAL` if there is no area, `EOPNOTSUPP` if the next kernel could not make one like it;
/// else as [`kho_pages::preserve`].
pub(crate) fn preserve(ptr: *mut c_void) -> Result<bindings::kho_vmalloc> {
    // SAFETY: `find_vm_area()` looks any address up. The area stays: it is the caller's.
    let area = unsafe { bindings::find_vm_area(ptr).as_ref() }.ok_or(EINVAL)?;
    if area.flags & !(ALLOC | HUGE_VMAP) != 0 {
        return Err(EOPNOTSUPP);
    }
    // SAFETY: The area is the one that was found, and is only read.
    let order = unsafe { bindings::get_vm_area_page_order(core::ptr::from_ref(area).cast_mut()) };
    let order = Order::new(order).ok_or(EINVAL)?;
    let total_pages = u32::try_from(area.nr_pages).map_err(|_| EOPNOTSUPP)?;

    let first = Chunk::new()?;
    if let Err(error) = preserve_list(first, area, order) {
        // SAFETY: `preserve_list()` leaves a list of all that it preserved.
        unsafe { unpreserve_list(first.0.phys(), order) };
        return Err(error);
    }

    let mut preservation = bindings::kho_vmalloc::default();
    preservation.first.phys = first.0.phys();
    preservation.total_pages = total_pages;
    preservation.order = order.get() as u16;
    if area.flags & ALLOC != 0 {
        preservation.flags |= KHO_ALLOC;
    }
    if area.flags & HUGE_VMAP != 0 {
        preservation.flags |= KHO_HUGE_VMAP;
    }
    Ok(preservation)
}

/// Preserves the pages of `area` and lists them from `first` on.
fn preserve_list(first: Chunk, area: &bindings::vm_struct, order: Order) -> Result {
    let mut chunk = first;
    let mut index = 0usize;
    let step = order.pages() as usize;
    let mut i = 0usize;
    while i < area.nr_pages {
        // SAFETY: The area has that many pages, and the caller keeps it.
        let frames = unsafe { kho_mm::page_frames(*area.pages.add(i), step) }.ok_or(EINVAL)?;
        kho_pages::preserve_frames(frames)?;
        if !chunk.set_entry(index, frames.phys()) {
            kho_pages::unpreserve_frames(frames);
            return Err(EINVAL);
        }
        i = i.saturating_add(step);
        index = index.saturating_add(1);
        // As C does, a chunk is followed by another one as soon as it is full.
        if index == bindings::KHO_VMALLOC_SIZE {
            let next = Chunk::new()?;
            chunk.set_next(next);
            chunk = next;
            index = 0;
        }
    }
    Ok(())
}

/// Undoes [`preserve`].
///
/// # Safety
///
/// `preservation` must come from [`preserve`], and not be used after this.
pub(crate) unsafe fn unpreserve(preservation: bindings::kho_vmalloc) {
    if let Some(order) = Order::new(preservation.order.into()) {
        // SAFETY: By the caller's contract; the address is the only thing ever in there.
        unsafe { unpreserve_list(preservation.first.phys, order) };
    }
}

/// Undoes the preservation of all that a list names, and of its chunks, which are freed.
///
/// # Safety
///
/// The list must be one that this kernel made, and not be used after this.
unsafe fn unpreserve_list(first: u64, order: Order) {
    let mut next = first;
    // SAFETY: By the caller's contract.
    while let Some(chunk) = unsafe { Chunk::at(next) } {
        for phys in chunk.entries() {
            if *phys == 0 {
                break;
            }
            if let Some(frames) = frames_at(*phys, order) {
                kho_pages::unpreserve_frames(frames);
            }
        }
        kho_pages::unpreserve_frames(chunk.0);
        next = chunk.next();
        // SAFETY: By the caller's contract.
        unsafe { chunk.free() };
    }
}

/// A list of which all that has been met is claimed. Dropped, it is as it was before.
///
/// # Invariants
///
/// `chunks` chunks from `first` on are claimed, and so are the blocks that make up the first
/// `count` pages of `pages`, an array of `capacity` entries.
struct Claimed {
    first: u64,
    order: Order,
    chunks: u64,
    pages: NonNull<*mut bindings::page>,
    capacity: usize,
    count: usize,
}

impl Claimed {
    /// Claims the list that starts at `first`, whose entries are of `order`, one of the page
    /// allocator's, and have `total` pages.
    fn new(first: u64, order: Order, total: u64) -> Option<Self> {
        // SAFETY: It is set while booting, and does not change when this can be called.
        let limit = unsafe { bindings::max_pfn } as u64;
        // Memory for the array is not asked for if there cannot be as many pages.
        let capacity = Some(total).filter(|total| (1..=limit).contains(total))? as usize;
        // SAFETY: The size is bounded, and the caller may sleep.
        let pages = NonNull::new(unsafe { bindings::kho_glue_alloc_pages_array(capacity) })?;
        // INVARIANT: Nothing is claimed yet.
        let mut claimed = Self {
            first,
            order,
            chunks: 0,
            pages,
            capacity,
            count: 0,
        };
        let mut next = first;
        while next != 0 {
            // No chunk can be claimed twice: a list that never ends is found out here.
            let frames = frames_at(next, Order::ZERO)?;
            kho_pages::claim(frames)?;
            // INVARIANT: What was preserved is RAM, and nobody else has it now. What is in it is
            // not relied on.
            let chunk = Chunk(frames);
            claimed.chunks = claimed.chunks.saturating_add(1);
            for phys in chunk.entries() {
                if *phys == 0 {
                    break;
                }
                claimed.add(frames_at(*phys, order)?)?;
            }
            next = chunk.next();
        }
        (claimed.count == capacity).then_some(claimed)
    }

    /// Claims `frames`, and lists them.
    fn add(&mut self, frames: Frames) -> Option<()> {
        let pages = frames.count() as usize;
        if pages > self.capacity.saturating_sub(self.count) {
            return None;
        }
        let first = kho_pages::claim(frames)?;
        for i in 0..pages {
            // SAFETY: The array has room for them, and they are one block of the page allocator's.
            unsafe {
                let entry = self.pages.add(self.count.saturating_add(i));
                entry.write(first.nth(i).as_ptr());
            }
        }
        self.count = self.count.saturating_add(pages);
        Some(())
    }

    /// Calls `each` with the blocks that are claimed, chunks excepted.
    fn blocks(&self, each: impl Fn(Page, Order)) {
        let mut i = 0usize;
        while i < self.count {
            // SAFETY: By the type invariant there is an entry, of a page that was preserved.
            let page = unsafe { Page::from_ptr(self.pages.add(i).read()) };
            // By the type invariant, this never ends early.
            let Some((page, order)) = page.and_then(|it| Some((it, it.order(Mark::Claimed)?)))
            else {
                break;
            };
            each(page, order);
            i = i.saturating_add(order.pages() as usize);
        }
    }

    /// Calls `each` with the chunks, which are not used after that.
    fn chunks(&self, each: impl Fn(Chunk)) {
        let mut next = self.first;
        for _ in 0..self.chunks {
            // SAFETY: By the type invariant.
            let Some(chunk) = (unsafe { Chunk::at(next) }) else {
                break;
            };
            next = chunk.next();
            each(chunk);
        }
    }

    /// Makes all of it allocated pages and frees the chunks. Returns the array, which is the
    /// caller's to free.
    fn take(self) -> NonNull<*mut bindings::page> {
        self.blocks(|page, order| {
            page.into_pages(order);
            // SAFETY: A page has a struct page.
            let frames = unsafe { kho_mm::page_frames(page.as_ptr(), order.pages() as usize) };
            frames.into_iter().for_each(kho_trace::restore);
        });
        self.chunks(|chunk| {
            kho_pages::take(chunk.0);
            // SAFETY: It was claimed, and nobody else's.
            unsafe { chunk.free() };
        });
        ManuallyDrop::new(self).pages
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        self.blocks(|page, order| {
            page.turn(Mark::Claimed, Mark::Preserved, order);
        });
        self.chunks(|chunk| kho_pages::unclaim(chunk.0));
        // SAFETY: Allocated like that, and not used any more.
        unsafe { bindings::kvfree(self.pages.as_ptr().cast()) };
    }
}

/// Makes an area of preserved memory and returns its address, or changes nothing.
pub(crate) fn restore(preservation: bindings::kho_vmalloc) -> Option<*mut c_void> {
    // No area has pages larger than those of the page allocator.
    let order = Order::new(preservation.order.into())
        .filter(|order| order.get() <= bindings::KHO_MAX_PAGE_ORDER);
    // SAFETY: The address is the only thing that is ever in there.
    let first = unsafe { preservation.first.phys };
    let total = preservation.total_pages.into();
    let Some(claimed) = order.and_then(|order| Claimed::new(first, order, total)) else {
        kho_log::complain(kho_log::Complaint::NoArea, first);
        return None;
    };
    // Flags that are not known say nothing about the memory.
    let is_alloc = preservation.flags & KHO_ALLOC != 0;
    let mut flags = if is_alloc { ALLOC } else { 0 };
    if preservation.flags & KHO_HUGE_VMAP != 0 {
        flags |= HUGE_VMAP;
    }
    let (pages, count) = (claimed.pages.as_ptr(), claimed.count);
    let order = claimed.order.get();
    // SAFETY: The array has that many pages. They and the array stay with the area.
    unsafe {
        let area = bindings::kho_glue_vmap(pages, count, order, flags);
        if area.is_null() {
            kho_log::complain(kho_log::Complaint::NoArea, first);
            return None;
        }
        let pages = claimed.take().as_ptr();
        Some(bindings::kho_glue_vmap_done(area, pages, count, is_alloc))
    }
}
