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
use super::kho_pages;
use super::kho_range::Frames;
use super::kho_sys::{
    self,
    Page, //
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    pr_warn_once,
    prelude::*, //
};

/// The flags of an area that can be preserved: those that the next kernel can give it again.
const SUPPORTED: usize = (bindings::VM_ALLOC | bindings::VM_ALLOW_HUGE_VMAP) as usize;

/// `VM_ALLOC` in `struct kho_vmalloc`; ABI.
const KHO_ALLOC: u16 = 1 << 0;

/// `VM_ALLOW_HUGE_VMAP` in `struct kho_vmalloc`; ABI.
const KHO_HUGE_VMAP: u16 = 1 << 1;

/// Each flag of an area and what stands for it in the handover.
const FLAGS: [(usize, u16); 2] = [
    (bindings::VM_ALLOC as usize, KHO_ALLOC),
    (bindings::VM_ALLOW_HUGE_VMAP as usize, KHO_HUGE_VMAP),
];

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
    /// Makes a chunk of the page at `phys`.
    ///
    /// # Safety
    ///
    /// There must be RAM, used as a chunk.
    unsafe fn at(phys: u64) -> Option<Self> {
        // INVARIANT: By the caller's contract.
        frames_at(phys, Order::ZERO).map(Self)
    }

    /// Allocates and preserves one.
    fn new() -> Result<Self> {
        let phys = kho_sys::alloc_page().ok_or(ENOMEM)?;
        // SAFETY: The page is ours.
        let chunk = unsafe { Self::at(phys) }.ok_or(EINVAL)?;
        if let Err(error) = kho_pages::preserve_frames(chunk.0) {
            // SAFETY: As above.
            unsafe { kho_sys::free_page(phys) };
            return Err(error);
        }
        Ok(chunk)
    }

    fn as_ptr(&self) -> *mut bindings::kho_vmalloc_chunk {
        kho_sys::virt(self.0.phys())
    }

    fn next(&self) -> u64 {
        // SAFETY: By the type invariant; the address is the only thing that is ever in there.
        unsafe { (*self.as_ptr()).hdr.next.phys }
    }

    fn set_next(&self, phys: u64) {
        // SAFETY: By the type invariant.
        unsafe { (*self.as_ptr()).hdr.next.phys = phys };
    }

    /// Returns the entry at `index`, or 0 at the end.
    fn entry(&self, index: usize) -> u64 {
        // SAFETY: By the type invariant; the reference does not leave this function.
        let entries = unsafe { &(*self.as_ptr()).phys };
        entries.get(index).copied().unwrap_or(0)
    }

    fn entries(&self) -> impl Iterator<Item = u64> + '_ {
        (0..)
            .map(|index| self.entry(index))
            .take_while(|phys| *phys != 0)
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

/// Returns the chunks of a list that this kernel has made or has checked, from `phys` on.
///
/// # Safety
///
/// All that the list names must be chunks.
unsafe fn chunks(phys: u64) -> impl Iterator<Item = Chunk> {
    let mut next = phys;
    core::iter::from_fn(move || {
        // SAFETY: By the caller's contract.
        let chunk = (next != 0).then(|| unsafe { Chunk::at(next) })??;
        // Read before the caller gives the chunk away.
        next = chunk.next();
        Some(chunk)
    })
}

/// Undoes the preservation of a list and frees the chunks.
///
/// # Safety
///
/// The list at `first` must have been made by [`preserve`], and not be used after this.
unsafe fn unpreserve_list(first: u64, order: Order) {
    // SAFETY: By the caller's contract.
    for chunk in unsafe { chunks(first) } {
        for frames in chunk.entries().filter_map(|phys| frames_at(phys, order)) {
            kho_pages::unpreserve_frames(frames);
        }
        kho_pages::unpreserve_frames(chunk.0);
        // SAFETY: It was allocated by `Chunk::new()`.
        unsafe { kho_sys::free_page(chunk.0.phys()) };
    }
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
    if area.flags & !SUPPORTED != 0 {
        return Err(EOPNOTSUPP);
    }
    // SAFETY: As above.
    let order = unsafe { bindings::get_vm_area_page_order(core::ptr::from_ref(area).cast_mut()) };
    let order = Order::new(order).ok_or(EINVAL)?;
    let total_pages = u32::try_from(area.nr_pages).map_err(|_| EOPNOTSUPP)?;

    let first = Chunk::new()?;
    if let Err(error) = fill(first, area, order) {
        // SAFETY: `fill()` leaves a list of all that it preserved.
        unsafe { unpreserve_list(first.0.phys(), order) };
        return Err(error);
    }

    let mut preservation = bindings::kho_vmalloc::default();
    preservation.first.phys = first.0.phys();
    preservation.total_pages = total_pages;
    preservation.order = order.get() as u16;
    preservation.flags = FLAGS
        .iter()
        .filter(|(flag, _)| area.flags & flag != 0)
        .fold(0, |flags, (_, kho)| flags | kho);
    Ok(preservation)
}

/// Preserves the pages of `area` and lists them from `first` on.
fn fill(first: Chunk, area: &bindings::vm_struct, order: Order) -> Result {
    let mut chunk = first;
    let mut index = 0usize;
    let step = order.pages() as usize;
    for i in (0..area.nr_pages).step_by(step) {
        // SAFETY: The area has that many pages, and the caller keeps it.
        let frames = unsafe { kho_sys::page_frames(*area.pages.add(i), step) }.ok_or(EINVAL)?;
        kho_pages::preserve_frames(frames)?;
        // As C does, a chunk is followed by another one as soon as it is full.
        if !chunk.set_entry(index, frames.phys()) {
            kho_pages::unpreserve_frames(frames);
            return Err(EINVAL);
        }
        index = index.wrapping_add(1);
        if index == bindings::KHO_VMALLOC_SIZE {
            let next = Chunk::new()?;
            chunk.set_next(next.0.phys());
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
        unsafe { unpreserve_list(preservation.first.phys, order) };
    }
}

/// What [`preserve`] wrote in another kernel, found to be whole.
struct Preserved {
    first: u64,
    order: Order,
    pages: usize,
}

impl Preserved {
    /// Checks that all that the list names is preserved and can be restored, and that it has as
    /// many pages as it says.
    fn check(preservation: &bindings::kho_vmalloc) -> Option<Self> {
        let order = Order::new(preservation.order.into())
            .filter(|order| order.get() <= bindings::KHO_MAX_PAGE_ORDER)?;
        let total = u64::from(preservation.total_pages);
        // SAFETY: The address is the only thing that is ever in there.
        let first = unsafe { preservation.first.phys };
        let mut pages = 0u64;
        let mut next = first;
        // Each chunk but the last is full, so that a list which never ends is found out.
        while next != 0 && pages <= total {
            let frames = frames_at(next, Order::ZERO).filter(|it| kho_pages::is_preserved(*it))?;
            // SAFETY: It is RAM; nobody has restored it, and what it says is not relied on.
            let chunk = unsafe { Chunk::at(frames.phys()) }?;
            let before = pages;
            for phys in chunk.entries() {
                frames_at(phys, order).filter(|it| kho_pages::is_preserved(*it))?;
                pages = pages.checked_add(order.pages())?;
            }
            next = chunk.next();
            if pages == before && next != 0 {
                return None;
            }
        }
        (next == 0 && pages == total && pages > 0).then_some(Self {
            first,
            order,
            pages: pages as usize,
        })
    }

    fn chunks(&self) -> impl Iterator<Item = Chunk> {
        // SAFETY: All of the list has been checked.
        unsafe { chunks(self.first) }
    }

    /// Calls `each` with all the memory that belongs to the area, each chunk before what it
    /// names, until that returns false; returns whether it never did.
    fn all(&self, each: &mut dyn FnMut(Frames) -> bool) -> bool {
        self.chunks().all(|chunk| {
            each(chunk.0)
                && chunk
                    .entries()
                    .filter_map(|phys| frames_at(phys, self.order))
                    .all(&mut *each)
        })
    }

    /// Claims everything, or nothing.
    fn claim(&self) -> bool {
        let mut claimed = 0usize;
        if self.all(&mut |frames| {
            let ours = kho_pages::claim(frames);
            claimed = claimed.wrapping_add(ours.into());
            ours
        }) {
            return true;
        }
        // Somebody else restores part of it at the same time.
        self.all(&mut |frames| {
            let ours = claimed > 0;
            if ours {
                kho_pages::unclaim(frames);
                claimed = claimed.wrapping_sub(1);
            }
            ours
        });
        false
    }

    /// Lists the struct pages of the area in `pages`, which has room for all of them.
    fn list(&self, pages: NonNull<*mut bindings::page>) -> Option<()> {
        let mut index = 0usize;
        for chunk in self.chunks() {
            for frames in chunk
                .entries()
                .filter_map(|phys| frames_at(phys, self.order))
            {
                for pfn in frames.start()..frames.end() {
                    if index >= self.pages {
                        return None;
                    }
                    // SAFETY: The array has `self.pages` entries.
                    unsafe { pages.add(index).write(Page::online(pfn)?.as_ptr()) };
                    index = index.wrapping_add(1);
                }
            }
        }
        (index == self.pages).then_some(())
    }
}

/// Makes an area of preserved memory and returns its address, or changes nothing.
///
/// All that can fail is done before any memory is claimed.
pub(crate) fn restore(preservation: &bindings::kho_vmalloc) -> Option<*mut c_void> {
    let flags = FLAGS
        .iter()
        .filter(|(_, kho)| preservation.flags & kho != 0)
        .fold(0, |flags, (flag, _)| flags | flag);
    let Some(preserved) = Preserved::check(preservation) else {
        pr_warn_once!("a vmalloc area cannot be restored: it is not preserved whole\n");
        return None;
    };

    // SAFETY: Takes any number; the result is freed below, or by whoever frees the area.
    let array = NonNull::new(unsafe { bindings::kho_glue_alloc_pages_array(preserved.pages) })?;
    let area = preserved.list(array).and_then(|()| {
        // SAFETY: The array has that many struct pages.
        let area = unsafe {
            bindings::kho_glue_vmap(
                array.as_ptr(),
                preserved.pages,
                preserved.order.get(),
                flags,
            )
        };
        NonNull::new(area)
    });
    let Some(area) = area else {
        // SAFETY: Allocated above, and not used any more.
        unsafe { bindings::kvfree(array.as_ptr().cast()) };
        return None;
    };
    if !preserved.claim() {
        // SAFETY: The area has not been shown to anyone yet; the array is freed last.
        unsafe {
            bindings::free_vm_area(area.as_ptr());
            bindings::kvfree(array.as_ptr().cast());
        }
        return None;
    }

    for chunk in preserved.chunks() {
        chunk
            .entries()
            .filter_map(|phys| frames_at(phys, preserved.order))
            .for_each(kho_pages::take);
        kho_pages::take(chunk.0);
        // SAFETY: It has just become an allocated page, with nobody but us knowing of it.
        unsafe { kho_sys::free_page(chunk.0.phys()) };
    }
    let vm_alloc = flags & bindings::VM_ALLOC as usize != 0;
    // SAFETY: The area was made for these pages.
    Some(unsafe {
        bindings::kho_glue_vmap_done(area.as_ptr(), array.as_ptr(), preserved.pages, vm_alloc)
    })
}
