// SPDX-License-Identifier: GPL-2.0

//! The scratch areas of a kernel: how large they are, and where.
//!
//! ```text
//!  early_param           parse()     kho_scratch=
//!  mm_core_init()        reserve()   areas reserved, in terms of memblock; or only report()
//!  core_initcall         cut()       after a handover: without what reserve_mem= has of them
//!  fs_initcall           open()      they go to the page allocator, for movable memory only
//!                        free()      or for any use, if there will be no handover
//! ```
//!
//! All that scratch is for is that the next kernel boots in it. What this one took to boot is what
//! tells how much that will be.
//!
//! Everything here is `__init`.

use super::kho_key::Pfn;
use super::kho_memblock;
use super::kho_mm;
use super::kho_param::{
    self,
    Scratch,
    Used, //
};
use super::kho_place;
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

/// Scratch areas begin and end at multiples of this.
const ALIGN: u64 = bindings::KHO_SCRATCH_ALIGN as u64;

/// No node in particular.
const ANY_NODE: c_int = bindings::NUMA_NO_NODE;

/// What `kho_scratch=` asks for.
// Only `parse()` writes it and only `reserve()` reads it.
#[link_section = ".init.data"]
static mut SCRATCH: Scratch = Scratch::DEFAULT;

/// Whether this kernel reserved its scratch areas itself, and has not opened them yet.
static RESERVED: AtomicBool = AtomicBool::new(false);

/// What early boot took, as [`report`] found it.
// Only `report()` writes it and only `cut()` reads it.
#[link_section = ".init.data"]
static mut TOOK: Used = Used { low: 0, all: 0 };

/// Parses `kho_scratch=`.
///
/// # Safety
///
/// `arg` must be null or a string that ends with a NUL.
#[link_section = ".init.text"]
pub(crate) unsafe fn parse(arg: *const c_char) {
    let text: &[u8] = if arg.is_null() {
        &[]
    } else {
        // SAFETY: By the caller's contract.
        unsafe { core::slice::from_raw_parts(arg, bindings::strlen(arg)) }
    };
    let Some(scratch) = Scratch::parse(text) else {
        let text = core::str::from_utf8(text).unwrap_or("?");
        pr_err!("kho_scratch={text}: neither N% nor LOWMEM,GLOBAL,PERNODE; ignored\n");
        return;
    };
    match scratch {
        Scratch::Scale(percent) => pr_notice!("scratch scale is {percent}%\n"),
        Scratch::Sizes {
            lowmem,
            global,
            pernode,
        } => pr_notice!(
            "scratch areas: lowmem: {}MiB global: {}MiB pernode: {}MiB\n",
            lowmem >> 20,
            global >> 20,
            pernode >> 20
        ),
    }
    // SAFETY: See the static.
    unsafe { SCRATCH = scratch };
}

/// Returns what early boot has allocated on `nid`. Huge pages do not count: they never come from
/// scratch.
#[link_section = ".init.text"]
fn used(nid: c_int) -> Used {
    // SAFETY: Early boot.
    let low_limit = unsafe { bindings::kho_glue_low_limit() };
    Used {
        low: used_below(low_limit, nid),
        all: used_below(u64::MAX, nid),
    }
}

#[link_section = ".init.text"]
fn used_below(limit: u64, nid: c_int) -> u64 {
    // SAFETY: Early boot.
    unsafe {
        bindings::memblock_reserved_kern_size(limit, nid)
            .saturating_sub(bindings::memblock_reserved_hugetlb_size(limit, nid))
    }
}

/// Returns what early boot has allocated on all nodes that the next kernel allocates again. Regions
/// of `reserve_mem=` it finds where they are; memblock has them on no node in particular, so that
/// no single node's count has them.
#[link_section = ".init.text"]
fn used_again() -> Used {
    // SAFETY: Early boot.
    let low_limit = unsafe { bindings::kho_glue_low_limit() };
    let mut used = used(ANY_NODE);
    for (start, size) in regions() {
        used = used.without(start, size, low_limit);
    }
    used
}

/// Returns the address and size of each region of `reserve_mem=`, allocated or revived.
fn regions() -> impl Iterator<Item = (u64, u64)> {
    // SAFETY: The command line is a string that ends with a NUL, and stays.
    let line = unsafe {
        let line = bindings::saved_command_line;
        core::slice::from_raw_parts(line.cast::<u8>(), bindings::strlen(line))
    };
    kho_param::reserve_mem_names(line).filter_map(|name| {
        // memblock takes no name that is longer.
        let mut text = [0u8; 16];
        text.get_mut(..name.len())?.copy_from_slice(name);
        text.last().filter(|last| **last == 0)?;
        let (mut start, mut size) = (0, 0);
        // SAFETY: It is a string that ends with a NUL.
        let found = unsafe {
            bindings::reserve_mem_find_by_name(text.as_ptr().cast(), &mut start, &mut size)
        };
        (found != 0).then_some((start, size))
    })
}

/// Finds memory for the scratch areas, and reserves it; says why, if there is none.
#[link_section = ".init.text"]
pub(crate) fn reserve() -> Result {
    let early = used_again();
    let room = kho_mm::Nodes::count().wrapping_add(2);
    let bytes = room.wrapping_mul(size_of::<bindings::kho_scratch>() as u64);
    // SAFETY: Early boot.
    let table = unsafe {
        let align = bindings::PAGE_SIZE as u64;
        bindings::memblock_alloc_try_nid(bytes, align, 0, 0, ANY_NODE)
    };
    if table.is_null() {
        pr_err!("disabled: no memory for the table of scratch areas\n");
        return Err(ENOMEM);
    }
    // SAFETY: Early boot; the table has room for what is added to it, and no area yet.
    unsafe {
        bindings::kho_scratch = table.cast();
        bindings::kho_scratch_cnt = 0;
    }

    let mut result = reserve_areas(early);
    if result.is_ok() {
        result = check_left(early);
    }
    if result.is_err() {
        for area in kho_place::scratch() {
            // SAFETY: Early boot.
            unsafe { bindings::memblock_phys_free(area.addr, area.size) };
        }
        // SAFETY: Early boot; allocated above.
        unsafe {
            bindings::kho_scratch_cnt = 0;
            bindings::kho_scratch = core::ptr::null_mut();
            bindings::memblock_free(table, bytes as usize);
        }
    } else {
        RESERVED.store(true, Ordering::Relaxed);
        say(early);
    }
    result
}

/// Checks that scratch leaves enough memory to the running kernel.
#[link_section = ".init.text"]
fn check_left(early: Used) -> Result {
    let (mut total, mut left) = (0u64, 0u64);
    for frames in kho_memblock::memory_frames() {
        total = total.wrapping_add(frames.count());
        left = left.wrapping_add(kho_memblock::free_frames(frames));
    }
    let floor = kho_param::floor(early);
    if left << PAGE_SHIFT < floor {
        pr_err!(
            "disabled: {} KiB of scratch would leave {} KiB of {} KiB, less than {} KiB; see \
             kho_scratch=\n",
            scratch_size() >> 10,
            left << (PAGE_SHIFT - 10),
            total << (PAGE_SHIFT - 10),
            floor >> 10
        );
        return Err(ENOMEM);
    }
    Ok(())
}

/// Returns the size of an area, if there is any that large.
#[link_section = ".init.text"]
fn checked(name: &str, size: Option<u64>) -> Result<u64> {
    if size.is_none() {
        pr_err!("disabled: {name} scratch of more than 64 bits; see kho_scratch=\n");
    }
    size.ok_or(ENOMEM)
}

#[link_section = ".init.text"]
fn reserve_areas(early: Used) -> Result {
    // SAFETY: Early boot; see the static.
    let scratch = unsafe { SCRATCH };
    // SAFETY: Early boot.
    let low_limit = unsafe { bindings::kho_glue_low_limit() };
    let nodes = kho_mm::Nodes::count();

    let low = checked("lowmem", scratch.lowmem(early, ALIGN))?;
    let mut others = low;
    let mut areas = u64::from(low > 0);
    let mut busiest = (ANY_NODE, 0);
    for nid in kho_mm::Nodes::all() {
        let early = used(nid);
        let size = checked("node", scratch.pernode(early, nodes, ALIGN))?;
        others = others.saturating_add(size);
        areas = areas.wrapping_add(u64::from(size > 0));
        if early.low > busiest.1 {
            busiest = (nid, early.low);
        }
    }
    let global = checked("global", scratch.global(early, others, ALIGN))?;
    areas = areas.wrapping_add(u64::from(global > 0));

    // The table has an entry for each node and two more; those that are not needed are there for
    // areas that are only to be had in pieces.
    let spare = &mut nodes.wrapping_add(2).saturating_sub(areas);
    // What a node has allocated in low memory comes from the low area, so that this had better be
    // on the same node.
    reserve_area("lowmem", low, low_limit, busiest.0, false, spare)?;
    reserve_area("global", global, 0, ANY_NODE, false, spare)?;
    for nid in kho_mm::Nodes::all() {
        // Neither of the two areas is memory of this node that is not low, so the result is as it
        // was above.
        let size = checked("node", scratch.pernode(used(nid), nodes, ALIGN))?;
        reserve_area("node", size, 0, nid, true, spare)?;
    }
    Ok(())
}

/// Reserves one area below `limit`, 0 being none, and adds it to the table. `nid` is a wish unless
/// it is `exact`. Where no hole is large enough, as in a small machine with the kernel or a border
/// between nodes in the middle, the area is cut in halves, into at most `spare` more pieces.
#[link_section = ".init.text"]
fn reserve_area(
    name: &str,
    size: u64,
    limit: u64,
    nid: c_int,
    exact: bool,
    spare: &mut u64,
) -> Result {
    let mut rest = size;
    let mut piece = size;
    let mut pieces = spare.saturating_add(1);
    while rest > 0 {
        if pieces.saturating_mul(piece) < rest {
            pr_err!(
                "disabled: no room for {} KiB of {name} scratch; see kho_scratch=\n",
                size >> 10
            );
            return Err(ENOMEM);
        }
        // SAFETY: Early boot.
        let addr =
            unsafe { bindings::memblock_alloc_range_nid(piece, ALIGN, 0, limit, nid, exact) };
        if addr == 0 {
            let half = kho_param::round_up(piece / 2, ALIGN).unwrap_or(0);
            piece = if half < piece { half } else { 0 };
            continue;
        }
        // SAFETY: Early boot; the table has room for an area of each kind and node, and pieces
        // are only made within it.
        unsafe {
            let count = bindings::kho_scratch_cnt as usize;
            bindings::kho_scratch
                .add(count)
                .write(bindings::kho_scratch { addr, size: piece });
            bindings::kho_scratch_cnt = count.wrapping_add(1) as u32;
        }
        rest = rest.saturating_sub(piece);
        piece = piece.min(rest);
        pieces = pieces.wrapping_sub(1);
        *spare = pieces;
    }
    Ok(())
}

/// Says how much scratch there is, and what booting took: in a kernel that was handed over to, what
/// it took of scratch.
#[link_section = ".init.text"]
pub(crate) fn report() {
    let early = used(ANY_NODE);
    // SAFETY: Early boot; see the static.
    unsafe { TOOK = early };
    say(early);
}

#[link_section = ".init.text"]
fn scratch_size() -> u64 {
    let mut size = 0u64;
    for area in kho_place::scratch() {
        size = size.saturating_add(area.size);
    }
    size
}

#[link_section = ".init.text"]
fn say(early: Used) {
    pr_info!(
        "scratch has {} KiB in {} areas, early boot took {} KiB\n",
        scratch_size() >> 10,
        kho_place::scratch().len(),
        early.all >> 10
    );
}

/// Cuts regions of `reserve_mem=` out of scratch.
///
/// A kernel that was handed over to may have had nothing else to allocate them from. But they are
/// to be preserved, and scratch cannot be. The next kernel finds them where they are, so that it
/// needs that much less scratch to boot.
#[link_section = ".init.text"]
pub(crate) fn cut() {
    let old = kho_place::scratch();
    let mut table = None;
    for (start, size) in regions() {
        if !kho_place::in_scratch(start, size) {
            continue;
        }
        if table.is_none() {
            table = copy_table(old);
        }
        let end = start.saturating_add(size);
        let done = table.is_some_and(|table| cut_out(table, (start, end)));
        if !done {
            pr_warn!(
                "reserve_mem= has {} KiB of scratch, which is too small to go without: they cannot \
                 be preserved; see kho_scratch=\n",
                size >> 10
            );
            continue;
        }
        pr_info!(
            "{} KiB of scratch are left: reserve_mem= has the rest\n",
            scratch_size() >> 10
        );
    }
}

/// How many areas there is room for in a table of one page.
const ROOM: usize = bindings::PAGE_SIZE / size_of::<bindings::kho_scratch>();

/// Makes a copy of the table of scratch areas that has room for more, and uses it.
#[link_section = ".init.text"]
fn copy_table(old: &[bindings::kho_scratch]) -> Option<*mut bindings::kho_scratch> {
    if old.len() > ROOM {
        return None;
    }
    let table = kho_mm::virt::<bindings::kho_scratch>(kho_mm::alloc_page()?);
    // SAFETY: The page is ours, and has room for that many. Nothing can be preserved yet, so that
    // nobody looks at areas; the old table stays, too.
    unsafe {
        old.as_ptr().copy_to_nonoverlapping(table, old.len());
        bindings::kho_scratch = table;
    }
    Some(table)
}

/// Cuts a region out of the areas in `table`, if the next kernel can do with what is left.
#[link_section = ".init.text"]
fn cut_out(table: *mut bindings::kho_scratch, region: (u64, u64)) -> bool {
    // SAFETY: Early boot; see the static.
    let (low_limit, took) = unsafe { (bindings::kho_glue_low_limit(), TOOK) };
    let mut left = Used { low: 0, all: 0 };
    let mut pieces = 0usize;
    for area in kho_place::scratch() {
        for (start, end) in parts(area, region) {
            left.all = left.all.saturating_add(end.wrapping_sub(start));
            let low = end.min(low_limit).saturating_sub(start);
            left.low = left.low.saturating_add(low);
        }
        pieces = pieces.wrapping_add(2);
    }
    if left.low < took.low || left.all < took.all || pieces > ROOM {
        return false;
    }
    let count = kho_place::scratch().len();
    let mut end = count;
    for at in 0..count {
        // SAFETY: The table has room for two parts of each area, and nobody else writes it.
        unsafe {
            let area = table.add(at);
            let [front, behind] = parts(&area.read(), region);
            (*area).size = front.1.wrapping_sub(front.0);
            if behind.0 < behind.1 {
                table.add(end).write(bindings::kho_scratch {
                    addr: behind.0,
                    size: behind.1.wrapping_sub(behind.0),
                });
                end = end.wrapping_add(1);
            }
        }
    }
    // SAFETY: As above.
    unsafe { bindings::kho_scratch_cnt = end as u32 };
    true
}

#[link_section = ".init.text"]
fn parts(area: &bindings::kho_scratch, region: (u64, u64)) -> [(u64, u64); 2] {
    let end = area.addr.saturating_add(area.size);
    kho_param::cut((area.addr, end), region, ALIGN)
}

/// Gives the scratch areas that this kernel reserved to the page allocator, which uses them for
/// memory that can be moved away. Areas that were handed over are there already.
#[link_section = ".init.text"]
pub(crate) fn open() {
    if !RESERVED.swap(false, Ordering::Relaxed) {
        return;
    }
    for area in kho_place::scratch() {
        let pages = area.size >> PAGE_SHIFT;
        // With debug_pagealloc free pages are not mapped, and kmemleak must not look there.
        // SAFETY: The area is reserved memory of whole page blocks.
        unsafe {
            bindings::kho_glue_kmemleak_ignore(area.addr);
            let pfn = Pfn::containing(area.addr).get();
            bindings::kho_glue_init_cma(pfn as usize, pages as usize);
        }
    }
}

/// Gives the scratch areas that this kernel reserved to the page allocator for any use: there
/// will be no handover. Areas that were handed over are in use already.
#[link_section = ".init.text"]
pub(crate) fn free() {
    if !RESERVED.swap(false, Ordering::Relaxed) {
        return;
    }
    for area in kho_place::scratch() {
        let start = kho_mm::virt::<u8>(area.addr);
        let end = start.wrapping_add(area.size as usize).cast();
        let pfn = Pfn::containing(area.addr).get();
        // Where struct pages were deferred, page blocks are those of scratch already. As for
        // kmemleak, see above.
        // SAFETY: The area is reserved memory of whole page blocks that nobody uses.
        unsafe {
            bindings::kho_glue_kmemleak_ignore(area.addr);
            bindings::kho_glue_init_pageblocks(pfn as usize, (area.size >> PAGE_SHIFT) as usize);
            bindings::free_reserved_area(start.cast(), end, -1, c"".as_char_ptr());
        }
    }
    // SAFETY: KHO is off from now on, and nobody looks at the table.
    unsafe { bindings::kho_scratch_cnt = 0 };
}
