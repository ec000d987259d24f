// SPDX-License-Identifier: GPL-2.0

//! Preserving memory, taking that back, and restoring what was taken over.
//!
//! The life of a block:
//!
//! ```text
//!  this kernel                           the next one
//!
//!  preserve()      key in the tree --->  takeover: reserved, a folio, first page marked Preserved
//!  unpreserve()    key gone              take_folio(): mark gone, an allocated folio
//!                                        claim(): marked Claimed, or all put back
//!                                        take(): mark gone, allocated pages
//! ```
//!
//! Restoring several blocks claims all of them before it changes the first, so that it happens
//! whole or not at all, and of two callers that restore the same memory at most one gets it.

use super::kho_key::{
    Block,
    Key,
    Order, //
};
use super::kho_log::{
    self,
    Complaint, //
};
use super::kho_mm::{
    self,
    Mark,
    Page, //
};
use super::kho_nodemem::{
    self,
    Direct, //
};
use super::kho_place;
use super::kho_radix::{
    Removal,
    Tree, //
};
use super::kho_range::Frames;
use super::kho_state;
use super::kho_takeover;
use super::kho_trace;
use super::PAGE_SHIFT;
use core::ptr::NonNull;
use kernel::{
    bindings,
    prelude::*, //
};

/// Preserves a block.
///
/// # Errors
///
/// `EOPNOTSUPP` with KHO off, `EEXIST` if exactly this block is preserved already (the caller that
/// did so counts on being the one to undo it), `ENOMEM`; else as [`kho_place::check_place`].
// Always inlined, as is `unpreserve()`: these two are what a user of KHO calls for each folio.
#[inline(always)]
pub(crate) fn preserve(block: Block) -> Result {
    if kho_place::may_be_refused(block) {
        kho_place::check_place(Frames::of_block(block))?;
    }
    let tree = kho_state::out_tree().ok_or(EOPNOTSUPP)?;
    let key = Key::of(block);
    match tree.add(key) {
        Ok(true) => {
            if kho_trace::preserve_is_on() {
                trace_key(key, kho_trace::preserve);
            }
            Ok(())
        }
        Ok(false) => Err(EEXIST),
        Err(_) => Err(ENOMEM),
    }
}

/// As [`preserve`], out of line, for callers that are not the fast path.
#[inline(never)]
fn preserve_block(block: Block) -> Result {
    preserve(block)
}

/// Undoes [`preserve`] for the block of a key. With KHO off there is nothing to undo.
#[inline(always)]
pub(crate) fn unpreserve(key: Key) {
    let Some(tree) = kho_state::out_tree() else {
        return;
    };
    match tree.remove(key) {
        Removal::Removed => {}
        Removal::Emptied => kho_nodemem::schedule_prune(),
        Removal::Absent => return complain_absent(key),
    }
    if kho_trace::unpreserve_is_on() {
        trace_key(key, kho_trace::unpreserve);
    }
}

/// Traces an event about the block of a key, which the caller has at hand anyway.
#[cold]
#[inline(never)]
fn trace_key(key: Key, event: fn(Frames)) {
    if let Some(block) = key.block() {
        event(Frames::of_block(block));
    }
}

/// As [`unpreserve`], out of line, for callers that are not the fast path.
#[inline(never)]
fn unpreserve_block(block: Block) {
    unpreserve(Key::of(block));
}

/// Preserves a range of single pages, all of it or nothing.
///
/// # Errors
///
/// As [`preserve`].
pub(crate) fn preserve_frames(frames: Frames) -> Result {
    // Pages of a vmalloc area are usually preserved one at a time.
    match frames.only_page() {
        Some(page) => preserve_block(page),
        None => preserve_blocks(frames),
    }
}

#[inline(never)]
fn preserve_blocks(frames: Frames) -> Result {
    if frames.is_empty() {
        return Ok(());
    }
    kho_place::check_place(frames)?;
    let tree = kho_state::out_tree().ok_or(EOPNOTSUPP)?;
    let keys = frames.blocks(kho_mm::one_node).map(Key::of);
    tree.add_all(keys).map_err(|(key, error)| {
        let done = key
            .block()
            .map_or(frames.start(), |block| block.pfn().get());
        // What was done ends with a block, so that the cuts are the same again. Nothing has been
        // traced of it yet.
        remove_blocks(&tree, frames.until(done), false);
        error.map_or(EEXIST, |_| ENOMEM)
    })?;
    kho_trace::preserve(frames);
    Ok(())
}

/// Undoes [`preserve_frames`] for the same range.
pub(crate) fn unpreserve_frames(frames: Frames) {
    match frames.only_page() {
        Some(page) => unpreserve_block(page),
        None => unpreserve_blocks(frames),
    }
}

#[inline(never)]
fn unpreserve_blocks(frames: Frames) {
    if let Some(tree) = kho_state::out_tree() {
        remove_blocks(&tree, frames, true);
    }
}

/// Removes the blocks of a range, and traces what was there of it if `is_traced`.
fn remove_blocks(tree: &Tree<Direct>, frames: Frames, is_traced: bool) {
    let trace = |gone: Frames| {
        if is_traced && !gone.is_empty() {
            kho_trace::unpreserve(gone);
        }
    };
    let keys = frames.blocks(kho_mm::one_node).map(Key::of);
    // What is left of the range behind the last block that was not preserved.
    let mut rest = frames;
    let emptied = tree.remove_all(keys, |key| {
        complain_absent(key);
        if let Some(absent) = key.block().map(Frames::of_block) {
            trace(rest.until(absent.start()));
            rest = rest.from(absent.end());
        }
    });
    trace(rest);
    if emptied {
        kho_nodemem::schedule_prune();
    }
}

/// Says that what a key names is not preserved.
#[cold]
fn complain_absent(key: Key) {
    let phys = key.block().map_or(0, |block| block.pfn().phys());
    kho_log::complain(Complaint::NotPreserved, phys);
}

/// Memory below this is used by each kernel that boots on x86, whatever was preserved there
/// (`reserve_real_mode()`).
const LOW: u64 = if cfg!(CONFIG_X86) { 1 << 20 } else { 0 };

/// Preserves memory by its physical address, all of it or nothing.
///
/// # Errors
///
/// `EINVAL` unless both are multiples of the page size, `size` is not 0, and all of it is System
/// RAM that is online, and not what the next kernel boots with; else as [`preserve`].
pub(crate) fn preserve_phys(phys: u64, size: usize) -> Result {
    let frames = Frames::exact(phys, size as u64).ok_or(EINVAL)?;
    // The next kernel could not take over what is not RAM.
    if phys < LOW || !kho_mm::is_online_ram(frames) {
        return Err(EINVAL);
    }
    preserve_frames(frames)
}

/// Restores a folio with the order it was preserved with; the caller has the only reference.
/// [`None`] if none was preserved at `phys` or it has been restored.
#[inline(always)]
pub(crate) fn restore_folio(phys: u64) -> Option<*mut bindings::folio> {
    if kho_takeover::is_pending() {
        initialise_folio(phys);
    }
    if let Some(page) = Page::online(phys >> PAGE_SHIFT) {
        // A range of pages may have been preserved in one block that is too large for a folio.
        if let Some((folio, order)) = page.take_folio() {
            if kho_trace::restore_is_on() {
                trace_restored(page, order);
            }
            return Some(folio);
        }
    }
    kho_log::complain(Complaint::NothingToRestore, phys);
    None
}

#[cold]
#[inline(never)]
fn trace_restored(page: Page, order: Order) {
    // SAFETY: A page has a struct page.
    let frames = unsafe { kho_mm::page_frames(page.as_ptr(), order.pages() as usize) };
    frames.into_iter().for_each(kho_trace::restore);
}

/// Has the struct pages of a folio initialised, as far as that is still to be done.
#[cold]
#[inline(never)]
fn initialise_folio(phys: u64) {
    let initialise = |size| {
        if let Some(frames) = Frames::covering(phys, size) {
            kho_takeover::ensure_initialised(frames);
        }
    };
    // The order is in the first struct page.
    initialise(1);
    let page = Page::online(phys >> PAGE_SHIFT);
    if let Some(order) = page.and_then(|page| page.order(Mark::Preserved)) {
        if order.get() <= bindings::KHO_MAX_FOLIO_ORDER {
            initialise(order.pages() << PAGE_SHIFT);
        }
    }
}

/// Claims all blocks of `frames`, whatever blocks the range was cut into when it was preserved.
/// Returns the first page; or [`None`], and nothing is claimed, if there is a block that is not
/// preserved or does not end in the range, or no block at all.
pub(crate) fn claim(frames: Frames) -> Option<Page> {
    kho_takeover::ensure_initialised(frames);
    if frames.count() == 1 {
        let page = Page::online(frames.start())?;
        let done = page.turn(Mark::Preserved, Mark::Claimed, Order::ZERO);
        return done.then_some(page);
    }
    claim_blocks(frames)
}

#[inline(never)]
fn claim_blocks(frames: Frames) -> Option<Page> {
    let mut first = None;
    let left = walk_blocks(frames, Mark::Preserved, |page, order| {
        first.get_or_insert(page);
        page.turn(Mark::Preserved, Mark::Claimed, order)
    });
    if !left.is_empty() {
        unclaim(frames.until(left.start()));
        return None;
    }
    first
}

/// Undoes [`claim`].
pub(crate) fn unclaim(frames: Frames) {
    walk_blocks(frames, Mark::Claimed, |page, order| {
        page.turn(Mark::Claimed, Mark::Preserved, order)
    });
}

/// Makes what was claimed single pages, to which the caller has the only reference.
pub(crate) fn take(frames: Frames) {
    walk_blocks(frames, Mark::Claimed, |page, order| {
        page.into_pages(order);
        true
    });
    kho_trace::restore(frames);
}

/// Calls `each` with the blocks of `frames`, all of which carry `mark`. Stops before one that does
/// not, or does not end in the range, or when `each` fails; returns the frames from there on.
fn walk_blocks(frames: Frames, mark: Mark, mut each: impl FnMut(Page, Order) -> bool) -> Frames {
    let mut rest = frames;
    while let Some(page) = Page::online(rest.start()).filter(|_| !rest.is_empty()) {
        let Some(order) = page.order(mark) else { break };
        if order.pages() > rest.count() || !each(page, order) {
            break;
        }
        rest = rest.from(rest.start().saturating_add(order.pages()));
    }
    rest
}

/// Restores a range of single pages, which starts at `phys`, all of it or nothing.
pub(crate) fn restore_frames(frames: Option<Frames>, phys: u64) -> Option<Page> {
    let claimed = frames.and_then(|frames| Some((claim(frames)?, frames)));
    let Some((page, frames)) = claimed else {
        kho_log::complain(Complaint::NothingToRestore, phys);
        return None;
    };
    take(frames);
    Some(page)
}

/// Allocates a folio of zeroes that is preserved, and returns it.
///
/// # Errors
///
/// `EINVAL` for no bytes, `E2BIG` for more than the page allocator has in one piece, `ENOMEM`; else
/// as [`preserve`].
pub(crate) fn alloc_preserve(size: usize) -> Result<*mut c_void> {
    let last = size.checked_sub(1).ok_or(EINVAL)?;
    let order = usize::BITS - (last >> PAGE_SHIFT).leading_zeros();
    if order > bindings::KHO_MAX_PAGE_ORDER {
        return Err(E2BIG);
    }
    // Check first: without an outgoing tree the folio could not be preserved.
    kho_state::out_tree().ok_or(EOPNOTSUPP)?;
    let order = Order::new(order).ok_or(E2BIG)?;
    let folio = kho_mm::alloc_folio(order).ok_or(ENOMEM)?;
    let block = Block::at(kho_mm::phys(folio.as_ptr()), order).ok_or(EINVAL);
    match block.and_then(preserve_block) {
        Ok(()) => Ok(folio.as_ptr()),
        Err(error) => {
            // SAFETY: The folio is ours.
            unsafe { kho_mm::free_folio(folio) };
            Err(error)
        }
    }
}

/// Undoes [`alloc_preserve`] and frees the memory.
///
/// # Safety
///
/// `mem` must be null or come from [`alloc_preserve`], and not be used after this.
pub(crate) unsafe fn unpreserve_free(mem: *mut c_void) {
    let Some(folio) = NonNull::new(mem) else {
        return;
    };
    // SAFETY: By the caller's contract it is a folio.
    let place = unsafe { kho_mm::folio_place(bindings::kho_glue_virt_to_folio(mem)) };
    if let Some((pfn, order)) = place {
        unpreserve_block(Block::around(pfn, order));
    }
    // SAFETY: By the caller's contract it has no other user.
    unsafe { kho_mm::free_folio(folio) };
}
