// SPDX-License-Identifier: GPL-2.0

//! The scratch areas of a kernel: how large they are, and where.
//!
//! ```text
//!  early_param           parse()     kho_scratch=
//!  mm_core_init_early()  give_up()   of a refused handover, if they leave too little beside them
//!  mm_core_init()        reserve()   areas reserved, in terms of memblock; or only report()
//!  core_initcall         cut()       after a handover: without what reserve_mem= has of them
//!  fs_initcall           open()      they go to the page allocator, for movable memory only
//!                        free()      or for any use, if there will be no handover
//! ```
//!
//! Scratch is the memory that the next kernel boots in. Its size is estimated from what this kernel
//! used to boot.
//!
//! Everything here is `__init`.

use super::kho_key::Pfn;
use super::kho_memblock::{
    BootCell,
    Memblock, //
};
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
    prelude::*,
    sync::SetOnce, //
};

/// Scratch areas begin and end at multiples of this.
const ALIGN: u64 = bindings::KHO_SCRATCH_ALIGN as u64;

/// What `kho_scratch=` asks for.
#[link_section = ".init.data"]
static SCRATCH: BootCell<Scratch> = BootCell::new(Scratch::DEFAULT);

/// Whether this kernel reserved its scratch areas itself, and has not opened them yet.
static RESERVED: AtomicBool = AtomicBool::new(false);

/// What early boot took, as [`report`] found it. For [`cut`], when there is no memblock any more.
#[link_section = ".init.data"]
static TOOK: SetOnce<Used> = SetOnce::new();

/// Parses `kho_scratch=`.
///
/// # Safety
///
/// `arg` must be null or a string that ends with a NUL.
#[link_section = ".init.text"]
pub(crate) unsafe fn parse(memblock: Memblock, arg: *const c_char) {
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
    SCRATCH.set(memblock, scratch);
}

/// Returns the address where low memory ends.
#[link_section = ".init.text"]
fn low_limit() -> u64 {
    // SAFETY: Takes nothing, and is known before memory is.
    unsafe { bindings::kho_glue_low_limit() }
}

/// Returns what early boot has allocated on `nid`.
#[link_section = ".init.text"]
fn used(memblock: Memblock, nid: c_int) -> Used {
    Used {
        low: memblock.used_below(low_limit(), nid),
        all: memblock.used_below(u64::MAX, nid),
    }
}

/// Returns what early boot has allocated on all nodes that the next kernel allocates again. It
/// finds regions of `reserve_mem=` where they are; memblock has them on no node in particular, so
/// that no single node's count has them.
#[link_section = ".init.text"]
fn used_again(memblock: Memblock) -> Used {
    let mut used = used(memblock, bindings::NUMA_NO_NODE);
    for (start, size) in Regions::new() {
        used = used.without(start, size, low_limit());
    }
    used
}

/// The regions of `reserve_mem=`, allocated or revived, each as its address and size.
pub(crate) struct Regions {
    next: c_uint,
}

impl Regions {
    #[link_section = ".init.text"]
    pub(crate) fn new() -> Self {
        Self { next: 0 }
    }
}

impl Iterator for Regions {
    type Item = (u64, u64);

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<(u64, u64)> {
        let (mut start, mut size) = (0, 0);
        // SAFETY: Both may be written, and nobody releases a region before there are drivers.
        let found = unsafe { bindings::reserve_mem_region(self.next, &mut start, &mut size) };
        self.next = self.next.saturating_add(1);
        found.then_some((start, size))
    }
}

/// Finds memory for the scratch areas, and reserves it.
///
/// # Errors
///
/// `ENOMEM` if there is too little; the log says why.
#[link_section = ".init.text"]
pub(crate) fn reserve(memblock: Memblock) -> Result {
    let early = used_again(memblock);
    let mut table = Table::new(memblock)?;
    let mut result = reserve_areas(&mut table, early);
    if result.is_ok() {
        result = check_left(memblock, early);
    }
    if result.is_err() {
        table.destroy();
    } else {
        RESERVED.store(true, Ordering::Relaxed);
        report_size(early);
    }
    result
}

/// The table of scratch areas while it is being made.
///
/// # Invariants
///
/// `kho_scratch` points to a table for `capacity` areas, of which there are
/// `kho_scratch_cnt`.
struct Table {
    memblock: Memblock,
    capacity: u64,
}

impl Table {
    #[link_section = ".init.text"]
    fn new(memblock: Memblock) -> Result<Self> {
        // One for each node, and one each in low memory and anywhere.
        let capacity = kho_mm::Nodes::count().saturating_add(2);
        let size = capacity.saturating_mul(ENTRY);
        let Some(table) = memblock.alloc_zeroed(size) else {
            pr_err!("disabled: no memory for the table of scratch areas\n");
            return Err(ENOMEM);
        };
        // SAFETY: By `Memblock`'s invariant nothing else runs.
        unsafe {
            bindings::kho_scratch = table.as_ptr().cast();
            bindings::kho_scratch_cnt = 0;
        }
        // INVARIANT: It was allocated for that many.
        Ok(Self { memblock, capacity })
    }

    /// Adds an area; returns false if the table is full.
    #[link_section = ".init.text"]
    fn add(&mut self, addr: u64, size: u64) -> bool {
        let count = kho_place::scratch().len();
        if count as u64 >= self.capacity {
            return false;
        }
        // INVARIANT: There is one area more.
        // SAFETY: By the type invariant the table is larger, and by `Memblock`'s nothing else runs.
        unsafe {
            bindings::kho_scratch
                .add(count)
                .write(bindings::kho_scratch { addr, size });
            bindings::kho_scratch_cnt = count.saturating_add(1) as u32;
        }
        true
    }

    /// Frees the areas and the table.
    #[link_section = ".init.text"]
    fn destroy(self) {
        for area in kho_place::scratch() {
            self.memblock.free(area.addr, area.size);
        }
        // SAFETY: By `Memblock`'s invariant nothing else runs.
        let table = unsafe {
            bindings::kho_scratch_cnt = 0;
            (&raw mut bindings::kho_scratch).replace(core::ptr::null_mut())
        };
        let size = self.capacity.saturating_mul(ENTRY);
        self.memblock.free(kho_mm::phys(table), size);
    }
}

/// Checks that scratch leaves enough memory to the running kernel.
#[link_section = ".init.text"]
fn check_left(memblock: Memblock, early: Used) -> Result {
    let left = memblock.free_frames();
    let floor = kho_param::floor(early);
    if left << PAGE_SHIFT < floor {
        pr_err!(
            "disabled: {} KiB of scratch would leave {} KiB of {} KiB, less than {} KiB; see \
             kho_scratch=\n",
            kho_place::scratch_size() >> 10,
            left << (PAGE_SHIFT - 10),
            memblock.total_frames() << (PAGE_SHIFT - 10),
            floor >> 10
        );
        return Err(ENOMEM);
    }
    Ok(())
}

/// Where an area is to be.
struct Place {
    /// As messages name it.
    name: &'static str,
    /// It has to end below this address; 0 is the end of memory (`MEMBLOCK_ALLOC_ACCESSIBLE`).
    limit: u64,
    nid: c_int,
    /// Whether it must be on that node.
    is_exact: bool,
}

/// Returns the size of an area, if there is any that large.
#[link_section = ".init.text"]
fn checked(place: &Place, size: Option<u64>) -> Result<u64> {
    if size.is_none() {
        let name = place.name;
        pr_err!("disabled: {name} scratch of more than 64 bits; see kho_scratch=\n");
    }
    size.ok_or(ENOMEM)
}

#[link_section = ".init.text"]
fn reserve_areas(table: &mut Table, early: Used) -> Result {
    let memblock = table.memblock;
    let scratch = SCRATCH.get(memblock);
    let nodes = kho_mm::Nodes::count();
    let on_node = |nid| Place {
        name: "node",
        limit: 0,
        nid,
        is_exact: true,
    };
    let mut low = Place {
        name: "lowmem",
        limit: low_limit(),
        nid: bindings::NUMA_NO_NODE,
        is_exact: false,
    };
    let anywhere = Place {
        name: "global",
        limit: 0,
        ..low
    };

    let low_size = checked(&low, scratch.lowmem(early, ALIGN))?;
    let mut others = low_size;
    let mut areas = u64::from(low_size > 0);
    let mut most = 0;
    for nid in kho_mm::Nodes::all() {
        let early = used(memblock, nid);
        let size = checked(&on_node(nid), scratch.pernode(early, nodes, ALIGN))?;
        others = others.saturating_add(size);
        areas = areas.saturating_add(u64::from(size > 0));
        // What a node has allocated in low memory comes from the low area, so that this had better
        // be on the same node.
        if early.low > most {
            (low.nid, most) = (nid, early.low);
        }
    }
    let global_size = checked(&anywhere, scratch.global(early, others, ALIGN))?;
    areas = areas.saturating_add(u64::from(global_size > 0));

    // Entries of the table that are not needed are there for areas that are only to be had in
    // pieces.
    let spare = &mut table.capacity.saturating_sub(areas);
    reserve_area(table, &low, low_size, spare)?;
    reserve_area(table, &anywhere, global_size, spare)?;
    for nid in kho_mm::Nodes::all() {
        // Neither of the two areas is memory of this node that is not low, so the result is as it
        // was above.
        let place = on_node(nid);
        let size = checked(&place, scratch.pernode(used(memblock, nid), nodes, ALIGN))?;
        reserve_area(table, &place, size, spare)?;
    }
    Ok(())
}

/// Reserves one area and adds it to the table. Where no hole is large enough, as in a small machine
/// with the kernel or a border between nodes in the middle, the area is cut in halves, into at most
/// `spare` more pieces.
#[link_section = ".init.text"]
fn reserve_area(table: &mut Table, place: &Place, size: u64, spare: &mut u64) -> Result {
    let mut rest = size;
    let mut piece = size;
    let mut pieces = spare.saturating_add(1);
    while rest > 0 {
        if pieces.saturating_mul(piece) < rest {
            pr_err!(
                "disabled: no room for {} KiB of {} scratch; see kho_scratch=\n",
                size >> 10,
                place.name
            );
            return Err(ENOMEM);
        }
        let Place {
            limit,
            nid,
            is_exact,
            ..
        } = *place;
        let Some(addr) = table.memblock.alloc(piece, ALIGN, limit, nid, is_exact) else {
            let half = kho_param::round_up(piece / 2, ALIGN).unwrap_or(0);
            piece = if half < piece { half } else { 0 };
            continue;
        };
        if !table.add(addr, piece) {
            table.memblock.free(addr, piece);
            return Err(ENOMEM);
        }
        rest = rest.saturating_sub(piece);
        piece = piece.min(rest);
        pieces = pieces.saturating_sub(1);
        *spare = pieces;
    }
    Ok(())
}

/// Says how much scratch there is, and what booting took: in a kernel that was handed over to, what
/// it took of scratch.
#[link_section = ".init.text"]
pub(crate) fn report(memblock: Memblock) {
    let early = used(memblock, bindings::NUMA_NO_NODE);
    TOOK.populate(early);
    report_size(early);
}

/// Returns whether the scratch areas of the last kernel leave this one enough memory that may be
/// used for anything.
#[link_section = ".init.text"]
pub(crate) fn leaves_enough(memblock: Memblock) -> bool {
    let floor = kho_param::floor(used(memblock, bindings::NUMA_NO_NODE));
    memblock.usable_frames() << PAGE_SHIFT >= floor
}

/// Makes the scratch areas of the last kernel memory like any other.
#[link_section = ".init.text"]
pub(crate) fn give_up(memblock: Memblock) {
    memblock.clear_scratch(kho_place::scratch());
    // SAFETY: By `Memblock`'s invariant nothing else runs.
    unsafe { bindings::kho_scratch_cnt = 0 };
}

#[link_section = ".init.text"]
fn report_size(early: Used) {
    pr_info!(
        "scratch has {} KiB in {} areas, early boot took {} KiB\n",
        kho_place::scratch_size() >> 10,
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
    for (start, size) in Regions::new() {
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
            kho_place::scratch_size() >> 10
        );
    }
}

/// How many areas a table of one page holds.
const TABLE_MAX: usize = bindings::PAGE_SIZE / size_of::<bindings::kho_scratch>();

/// The size of an entry of the table.
const ENTRY: u64 = size_of::<bindings::kho_scratch>() as u64;

/// Makes a copy of the table of scratch areas that can hold more, and uses it.
#[link_section = ".init.text"]
fn copy_table(old: &[bindings::kho_scratch]) -> Option<*mut bindings::kho_scratch> {
    if old.len() > TABLE_MAX {
        return None;
    }
    let table = kho_mm::virt::<bindings::kho_scratch>(kho_mm::alloc_page()?);
    // SAFETY: The page is ours, and holds that many. Nothing can be preserved yet, so that
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
    // On a cold boot no region is in scratch.
    let Some(took) = TOOK.copy() else {
        return false;
    };
    let old = kho_place::scratch();
    let mut left = Used { low: 0, all: 0 };
    for area in old {
        for (start, end) in parts(area, region) {
            let low = end.min(low_limit()).saturating_sub(start);
            left.low = left.low.saturating_add(low);
            left.all = left.all.saturating_add(end.saturating_sub(start));
        }
    }
    if left.low < took.low || left.all < took.all || old.len().saturating_mul(2) > TABLE_MAX {
        return false;
    }
    let mut end = old.len();
    for at in 0..old.len() {
        // SAFETY: The table holds two parts of each area, and nobody else writes it.
        unsafe {
            let area = table.add(at);
            let [front, behind] = parts(&area.read(), region);
            (*area).size = front.1.saturating_sub(front.0);
            if behind.0 < behind.1 {
                table.add(end).write(bindings::kho_scratch {
                    addr: behind.0,
                    size: behind.1.saturating_sub(behind.0),
                });
                end = end.saturating_add(1);
            }
        }
    }
    // SAFETY: Nothing can be preserved yet, so that nobody looks at areas.
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
