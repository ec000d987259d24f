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
    Order,
    Pfn, //
};
use super::kho_pages::{
    self,
    Step, //
};
use super::kho_range::Frames;
use super::kho_sys::{
    self,
    Page, //
};
use core::ptr::NonNull;
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

fn frames_at(phys: u64, order: Order) -> Option<Frames> {
    Frames::new(Pfn::from_phys(phys)?, order.pages())
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
        let phys = kho_sys::alloc_page().ok_or(ENOMEM)?;
        let preserved = frames_at(phys, Order::ZERO)
            .ok_or(EINVAL)
            .and_then(|frames| kho_pages::preserve_frames(frames).map(|()| frames));
        // INVARIANT: The page is ours.
        preserved.map(Self).inspect_err(|_| {
            // SAFETY: As above.
            unsafe { kho_sys::free_page(phys) };
        })
    }

    fn as_ptr(&self) -> *mut bindings::kho_vmalloc_chunk {
        kho_sys::virt(self.0.phys())
    }

    fn set_next(&self, next: Self) {
        // SAFETY: By the type invariant.
        unsafe { (*self.as_ptr()).hdr.next.phys = next.0.phys() };
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
}

/// What [`each`] does with the memory that a list names, and with its chunks.
#[derive(Clone, Copy)]
enum Do {
    /// Takes a step on the way to being restored; after [`Step::Take`], frees the chunks.
    Restore(Step),
    /// Writes the struct pages of the area to an array.
    List(NonNull<*mut bindings::page>),
    /// Undoes its preservation, and frees the chunks.
    Unpreserve,
}

/// Does something with the parts of a list, a chunk or one of its entries each, until that fails.
/// Returns how many parts it was done with, and how many pages of the area there are if it never
/// failed.
///
/// Of two limits one depends on what is done: no more than `limit` pages pass [`Step::Check`], and
/// [`Step::Unclaim`] ends after `limit` parts.
///
/// # Safety
///
/// All that the list names must be chunks and memory, to which that may be done; with
/// [`Step::Check`] there need only be RAM in what is preserved. An array must have an entry for
/// each page.
unsafe fn each(what: Do, first: u64, order: Order, limit: u64) -> (u64, Option<u64>) {
    let is = |step| matches!(what, Do::Restore(it) if it == step);
    let ends = is(Step::Take) || matches!(what, Do::Unpreserve);
    let mut parts = 0u64;
    let mut pages = 0u64;
    let mut next = first;
    while next != 0 {
        // Every chunk but the last one has pages: a list that never ends is found out.
        if is(Step::Check) && parts > pages.saturating_mul(2) {
            return (parts, None);
        }
        let Some(chunk) = frames_at(next, Order::ZERO) else {
            return (parts, None);
        };
        if let Do::Restore(step) = what {
            if step != Step::Take && !kho_pages::all(chunk, step) {
                return (parts, None);
            }
        }
        parts = parts.wrapping_add(1);

        // INVARIANT: By the caller's contract.
        let at = Chunk(chunk).as_ptr();
        // SAFETY: By the type invariant. Nothing changes a chunk that is in a list, and the
        // reference is not used after it is given away.
        let (entries, link) = unsafe { (&(*at).phys, (*at).hdr.next.phys) };
        for phys in entries {
            if *phys == 0 || is(Step::Unclaim) && parts >= limit {
                break;
            }
            let Some(frames) = frames_at(*phys, order) else {
                return (parts, None);
            };
            let before = pages;
            pages = pages.wrapping_add(frames.count());
            if is(Step::Check) && pages > limit {
                return (parts, None);
            }
            let done = match what {
                Do::Restore(step) => kho_pages::all(frames, step),
                // SAFETY: By the caller's contract the array is long enough.
                Do::List(array) => unsafe { list(array.add(before as usize), frames) },
                Do::Unpreserve => {
                    kho_pages::unpreserve_frames(frames);
                    true
                }
            };
            if !done {
                return (parts, None);
            }
            parts = parts.wrapping_add(1);
        }
        if is(Step::Unclaim) && parts >= limit {
            break;
        }
        if ends {
            if is(Step::Take) {
                kho_pages::all(chunk, Step::Take);
            } else {
                kho_pages::unpreserve_frames(chunk);
            }
            // SAFETY: It is an allocated page now, and by the caller's contract nobody else's.
            unsafe { kho_sys::free_page(chunk.phys()) };
        }
        next = link;
    }
    (parts, Some(pages))
}

/// Writes the struct pages of `frames` to `array`; returns whether there are any.
///
/// # Safety
///
/// `array` must have room for them.
unsafe fn list(array: NonNull<*mut bindings::page>, frames: Frames) -> bool {
    for i in 0..frames.count() {
        let Some(page) = Page::online(frames.start().wrapping_add(i)) else {
            return false;
        };
        // SAFETY: By the caller's contract.
        unsafe { array.add(i as usize).write(page.as_ptr()) };
    }
    true
}

/// Preserves the area that starts at `ptr`, all of it or nothing, and returns what describes it.
///
/// # Errors
///
/// `EINVAL` if there is no area, `EOPNOTSUPP` if it is none that the next kernel could make again;
/// else as [`kho_pages::preserve`].
pub(crate) fn preserve(ptr: *mut c_void) -> Result<bindings::kho_vmalloc> {
    // SAFETY: Takes any address. The area stays: it is the caller's.
    let area = unsafe { bindings::find_vm_area(ptr).as_ref() }.ok_or(EINVAL)?;
    if area.flags & !(ALLOC | HUGE_VMAP) != 0 {
        return Err(EOPNOTSUPP);
    }
    // SAFETY: As above.
    let order = unsafe { bindings::get_vm_area_page_order(core::ptr::from_ref(area).cast_mut()) };
    let order = Order::new(order).ok_or(EINVAL)?;
    let total_pages = u32::try_from(area.nr_pages).map_err(|_| EOPNOTSUPP)?;

    let first = Chunk::new()?;
    if let Err(error) = fill(first, area, order) {
        // SAFETY: `fill()` leaves a list of all that it preserved.
        unsafe { each(Do::Unpreserve, first.0.phys(), order, u64::MAX) };
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
fn fill(first: Chunk, area: &bindings::vm_struct, order: Order) -> Result {
    let mut chunk = first;
    let mut index = 0usize;
    let step = order.pages() as usize;
    let mut i = 0usize;
    while i < area.nr_pages {
        // SAFETY: The area has that many pages, and the caller keeps it.
        let frames = unsafe { kho_sys::page_frames(*area.pages.add(i), step) }.ok_or(EINVAL)?;
        kho_pages::preserve_frames(frames)?;
        // As C does, a chunk is followed by another one as soon as it is full.
        if !chunk.set_entry(index, frames.phys()) {
            kho_pages::unpreserve_frames(frames);
            return Err(EINVAL);
        }
        i = i.wrapping_add(step);
        index = index.wrapping_add(1);
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
pub(crate) unsafe fn unpreserve(preservation: &bindings::kho_vmalloc) {
    if let Some(order) = Order::new(preservation.order.into()) {
        // SAFETY: By the caller's contract; the address is the only thing ever in there.
        unsafe { each(Do::Unpreserve, preservation.first.phys, order, u64::MAX) };
    }
}

/// Makes an area of preserved memory and returns its address, or changes nothing.
///
/// All that can fail is done before any memory is claimed.
pub(crate) fn restore(preservation: &bindings::kho_vmalloc) -> Option<*mut c_void> {
    // An order that no area has gives blocks that are not preserved, or too many pages.
    let order = Order::new(preservation.order.into()).unwrap_or(Order::MAX);
    let total = u64::from(preservation.total_pages);
    // SAFETY: The address is the only thing that is ever in there.
    let first = unsafe { preservation.first.phys };
    // SAFETY: What is preserved is RAM, and nobody has restored it; what is in it is not relied on.
    if total == 0 || unsafe { each(Do::Restore(Step::Check), first, order, total) }.1 != Some(total)
    {
        kho_sys::complain("a vmalloc area is not preserved whole", first);
        return None;
    }
    // Flags that are not known say nothing about the memory.
    let is_alloc = preservation.flags & KHO_ALLOC != 0;
    let mut flags = if is_alloc { ALLOC } else { 0 };
    if preservation.flags & KHO_HUGE_VMAP != 0 {
        flags |= HUGE_VMAP;
    }

    let pages = total as usize;
    // SAFETY: Takes any number; the result is freed below, or by whoever frees the area.
    let array = NonNull::new(unsafe { bindings::kho_glue_alloc_pages_array(pages) })?;
    let mut area = core::ptr::null_mut();
    // SAFETY: All of the list has been checked, and the array has an entry for each page.
    let restored = unsafe {
        each(Do::List(array), first, order, total).1.is_some()
            && {
                area = bindings::kho_glue_vmap(array.as_ptr(), pages, order.get(), flags);
                !area.is_null()
            }
            && claim(first, order)
    };
    // SAFETY: As above, and all of it is claimed; or the area, which nobody has been shown, and the
    // array are not used any more.
    unsafe {
        if !restored {
            if !area.is_null() {
                bindings::free_vm_area(area);
            }
            bindings::kvfree(array.as_ptr().cast());
            return None;
        }
        each(Do::Restore(Step::Take), first, order, total);
        Some(bindings::kho_glue_vmap_done(
            area,
            array.as_ptr(),
            pages,
            is_alloc,
        ))
    }
}

/// Claims all parts of a list, or nothing.
///
/// # Safety
///
/// The list must have been checked.
unsafe fn claim(first: u64, order: Order) -> bool {
    // SAFETY: By the caller's contract.
    unsafe {
        let (claimed, all) = each(Do::Restore(Step::Claim), first, order, u64::MAX);
        if all.is_none() && claimed > 0 {
            // Somebody else restores part of it at the same time.
            each(Do::Restore(Step::Unclaim), first, order, claimed);
        }
        all.is_some()
    }
}
