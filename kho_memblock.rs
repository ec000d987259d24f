// SPDX-License-Identifier: GPL-2.0

//! KHO in early boot: the handover found, and taken over, in terms of memblock.
//!
//! ```text
//!  setup_arch()          populate()        a handover is found: memblock allocates from
//!                                          scratch only from now on
//!  mm_core_init_early()  init_early()      the tree is surveyed; what lies away from it and
//!                                          from preserved memory may be allocated, too
//!  mm_core_init()        init()            takeover; or, on a cold boot, scratch is reserved,
//!                                          see `kho_scratch`
//! ```
//!
//! A handover that is refused, for whatever reason, is named in one line, and the kernel boots as
//! if there were none: all memory is its own then.
//!
//! Everything here is `__init`; it runs on one CPU, before there is anything else.

use super::kho_fdt::FdtError;
use super::kho_key::{
    Block,
    Key,
    Order,
    Pfn, //
};
use super::kho_radix::{
    NodeAddr,
    Tree, //
};
use super::kho_range::Frames;
use super::kho_scratch;
use super::kho_state;
use super::kho_sys::{
    self,
    Direct,
    Fdt,
    Mark,
    Page, //
};
use super::kho_takeover::{
    self,
    Census,
    Machine,
    Refusal, //
};
use super::PAGE_SHIFT;
use core::{
    mem::size_of,
    sync::atomic::{
        AtomicBool,
        AtomicU64,
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

/// Scratch is extended by whole blocks of this order, 1 GiB: coarse enough to be quick on large
/// machines, and of no use on small ones.
const GRAIN: Order = match Order::new(30 - PAGE_SHIFT) {
    Some(order) => order,
    None => Order::ZERO,
};

/// Physical address of the root of the tree that was handed over and found sound; 0 if none.
static IN_TREE: AtomicU64 = AtomicU64::new(0);

/// The size of the memory with the FDT that was handed over, and the physical address of the table
/// of scratch areas.
// Only `populate()` writes it and only `init_early()` reads it.
#[link_section = ".init.data"]
static mut HANDED: (u64, u64) = (0, 0);

/// What was found in that tree, and the number of its nodes.
// Only `survey()` writes it and only `take_over()` reads it.
#[link_section = ".init.data"]
static mut FOUND: Option<(Census, u64)> = None;

/// Whether this kernel runs in the scratch areas that it was handed.
static INHERITED: AtomicBool = AtomicBool::new(false);

/// Says that there is no handover, why, and about what address.
#[cold]
#[link_section = ".init.text"]
fn refuse((what, at): (&str, u64)) {
    pr_err!("handover refused: {what} ({at:#x})\n");
    kho_state::set_handover(0);
    IN_TREE.store(0, Ordering::Relaxed);
    if INHERITED.load(Ordering::Relaxed) {
        // No memory needs to be spared any more.
        // SAFETY: Early boot.
        unsafe { bindings::memblock_clear_kho_scratch_only() };
    }
}

/// Memory that is mapped for a moment, before there is a direct map to rely on.
struct EarlyMap {
    virt: *mut c_void,
    len: u64,
}

impl EarlyMap {
    #[link_section = ".init.text"]
    fn new(phys: u64, len: u64) -> Option<Self> {
        if len == 0 || len > EARLY_MAX || Frames::covering(phys, len).is_none() {
            return None;
        }
        // SAFETY: Early boot; the length is one that can be mapped.
        let virt = unsafe { bindings::early_memremap(phys, len as usize) };
        (!virt.is_null()).then_some(Self { virt, len })
    }
}

impl Drop for EarlyMap {
    #[link_section = ".ref.text"]
    #[inline(never)]
    fn drop(&mut self) {
        // SAFETY: It was mapped like that, and values of this type do not outlive early boot.
        unsafe { bindings::early_memunmap(self.virt, self.len as usize) };
    }
}

/// Takes note of what the last kernel says that it hands over: the root FDT and the table of
/// scratch areas.
#[link_section = ".init.text"]
pub(crate) fn populate(fdt_phys: u64, fdt_len: u64, scratch_phys: u64, scratch_len: u64) {
    let Some(map) = EarlyMap::new(fdt_phys, fdt_len) else {
        return refuse(("the FDT cannot be mapped", fdt_phys));
    };
    // SAFETY: It is mapped for as long as this function runs.
    let fdt = unsafe { Fdt::new(map.virt, fdt_len) }.and_then(|fdt| fdt.memory_map());
    if let Err(error) = fdt {
        return refuse((error.what(), fdt_phys));
    }

    const ENTRY: u64 = size_of::<bindings::kho_scratch>() as u64;
    let count = scratch_len / ENTRY;
    let limit = u64::from(bindings::KHO_MAX_NODES).wrapping_add(2);
    let table = EarlyMap::new(scratch_phys, scratch_len)
        .filter(|_| scratch_len % ENTRY == 0 && count <= limit && scratch_phys % 8 == 0);
    let Some(table) = table else {
        return refuse(("the table of scratch areas cannot be mapped", scratch_phys));
    };
    // SAFETY: It is mapped for as long as this function runs, and aligned.
    let areas: &[bindings::kho_scratch] =
        unsafe { core::slice::from_raw_parts(table.virt.cast(), count as usize) };
    if areas
        .iter()
        .any(|area| area.size > 0 && Frames::exact(area.addr, area.size).is_none())
    {
        return refuse(("a scratch area is not made of pages", scratch_phys));
    }
    for area in areas {
        // From here on, memblock may need memory for its own arrays, which has to be scratch.
        // SAFETY: Early boot.
        let error = unsafe {
            match bindings::memblock_add(area.addr, area.size) {
                0 => bindings::memblock_mark_kho_scratch(area.addr, area.size),
                error => error,
            }
        };
        if error != 0 {
            unmark(areas);
            return refuse(("memblock does not take a scratch area", scratch_phys));
        }
    }
    // SAFETY: Early boot. Nothing may be allocated outside of scratch before takeover: all that
    // is not scratch may be preserved.
    unsafe {
        let none = bindings::NUMA_NO_NODE;
        if bindings::__memblock_reserve(scratch_phys, scratch_len, none, 0) != 0 {
            unmark(areas);
            return refuse((
                "memblock does not take the table of scratch areas",
                scratch_phys,
            ));
        }
        bindings::memblock_set_kho_scratch_only();
        bindings::kho_scratch_cnt = count as u32;
    }
    // SAFETY: Early boot; see the static.
    unsafe { HANDED = (fdt_len, scratch_phys) };
    INHERITED.store(true, Ordering::Relaxed);
    kho_state::set_handover(fdt_phys);
    pr_info!("found kexec handover data.\n");
}

/// Checks the FDT in the `len` bytes at `phys` again, where it is used from now on, and that its
/// subtrees are in memory. Returns where the tree is.
#[link_section = ".init.text"]
fn check_fdt(phys: u64, len: u64) -> Result<NodeAddr, FdtError> {
    if !Frames::covering(phys, len).is_some_and(is_memory) {
        return Err(FdtError::Magic);
    }
    // SAFETY: It is memory.
    let fdt = unsafe { Fdt::new(kho_sys::virt(phys), len) }?;
    for blob in fdt.blobs() {
        let blob = blob?;
        if !Frames::covering(blob.phys, blob.size).is_some_and(is_memory) {
            return Err(FdtError::Blob);
        }
    }
    fdt.memory_map()
}

/// Checks what was handed over, and lets memblock allocate from where it leaves room.
#[link_section = ".init.text"]
pub(crate) fn init_early() {
    kho_sys::init_direct_map();
    if !INHERITED.load(Ordering::Relaxed) {
        return;
    }
    // SAFETY: Early boot; see the static.
    let (fdt_len, table) = unsafe { HANDED };
    // SAFETY: Early boot; the table was reserved.
    unsafe { bindings::kho_scratch = kho_sys::virt(table) };
    if !kho_state::is_enabled() {
        refuse(("KHO is off here, and nobody would take it back", 0));
        // This kernel has no use for scratch.
        unmark(kho_sys::scratch());
        // SAFETY: Early boot.
        unsafe { bindings::kho_scratch_cnt = 0 };
        return;
    }
    let fdt = kho_state::handover().unwrap_or(0);
    let root = match check_fdt(fdt, fdt_len) {
        Ok(root) => root,
        Err(error) => return refuse((error.what(), fdt)),
    };
    if let Err(refusal) = survey(root, fdt) {
        return refuse(refusal.what());
    }
    IN_TREE.store(root.get(), Ordering::Relaxed);
}

/// Makes scratch areas memory as any other.
#[link_section = ".init.text"]
fn unmark(areas: &[bindings::kho_scratch]) {
    for area in areas {
        // SAFETY: Early boot.
        unsafe { bindings::memblock_clear_kho_scratch(area.addr, area.size) };
    }
}

#[link_section = ".init.text"]
fn survey(root: NodeAddr, fdt: u64) -> Result<(), Refusal> {
    // SAFETY: For trees that are made here, and one that is surveyed first.
    let direct = || unsafe { Direct::new() };
    let machine = Memblock::new();
    let tree = Tree::from_root(direct(), root);

    let seen = Tree::new(direct())?;
    let nodes = kho_takeover::survey(&tree, &machine, &seen);
    seen.destroy();
    let nodes = nodes?;
    // All that can be wrong with it is found now: soon there will be users of what was handed over.
    let census = kho_takeover::check(&tree, &machine)?;
    if !kho_takeover::holds(&tree, Pfn::containing(fdt)) {
        return Err(Refusal::Fdt(fdt));
    }
    // SAFETY: Early boot; see the static.
    unsafe { FOUND = Some((census, nodes)) };

    // Nothing in an empty node is worth keeping memory free for. The memory of the nodes is free
    // already, as far as memblock knows.
    tree.prune(false);

    // Without more scratch there is less room to allocate from, that is all.
    let Ok(blocks) = Tree::new(direct()) else {
        pr_warn!("failed to extend scratch: no memory\n");
        return Ok(());
    };
    match kho_takeover::busy(&tree, GRAIN, &blocks) {
        Ok(()) => extend(&blocks),
        Err(_) => pr_warn!("failed to extend scratch: no memory\n"),
    }
    blocks.destroy();
    Ok(())
}

/// Marks all memory as scratch but the blocks in `busy`.
#[link_section = ".init.text"]
fn extend(busy: &Tree<Direct>) {
    let size = GRAIN.pages() << PAGE_SHIFT;
    // SAFETY: Early boot.
    let dram_end = unsafe { bindings::memblock_end_of_DRAM() };
    let mut free_from = 0u64;
    for run in busy.runs_between((Key::MIN, Key::MAX)) {
        let start = run.first.get().saturating_mul(size);
        mark_scratch(free_from, start);
        free_from = start.saturating_add(run.count.saturating_mul(size));
    }
    mark_scratch(free_from, dram_end);
}

#[link_section = ".init.text"]
fn mark_scratch(start: u64, end: u64) {
    if start < end {
        // SAFETY: Early boot.
        let error = unsafe { bindings::memblock_mark_kho_scratch(start, end.wrapping_sub(start)) };
        if error != 0 {
            pr_warn!("failed to extend scratch: error {error}\n");
        }
    }
}

/// Takes over what was handed over; on a cold boot, reserves scratch.
#[link_section = ".init.text"]
pub(crate) fn init() {
    // SAFETY: May be called at any time.
    if unsafe { bindings::kho_glue_is_kdump_kernel() } {
        kho_state::set_enabled(false);
        pr_info!("disabled in the kdump kernel\n");
        return;
    }
    if !INHERITED.load(Ordering::Relaxed) {
        if kho_state::is_enabled() && kho_scratch::reserve().is_err() {
            pr_warn!("Failed to reserve scratch area, disabling kexec handover\n");
            kho_state::set_enabled(false);
        }
        return;
    }
    kho_scratch::report();
    if let Some(root) = NodeAddr::new(IN_TREE.load(Ordering::Relaxed)) {
        if let Err(refusal) = take_over(root) {
            refuse(refusal.what());
        }
    }
}

#[link_section = ".init.text"]
fn take_over(root: NodeAddr) -> Result<(), Refusal> {
    // SAFETY: Early boot; see the static.
    let found = unsafe { (&raw mut FOUND).replace(None) };
    let Some((census, nodes)) = found else {
        return Ok(());
    };
    // SAFETY: May be called at any time.
    let start = unsafe { bindings::kho_glue_cycles() };
    // SAFETY: It was surveyed.
    let tree = Tree::from_root(unsafe { Direct::new() }, root);
    kho_takeover::apply(&tree, &mut Memblock::new(), &census)?;
    // SAFETY: As above.
    let cycles = unsafe { bindings::kho_glue_cycles() }.wrapping_sub(start);

    if let Some(pfn) = census.overlap {
        kho_sys::complain(
            "memory was preserved twice, only the larger block can be restored",
            pfn << PAGE_SHIFT,
        );
    }
    let mut blocks = 0u64;
    for (order, count) in census.orders() {
        blocks = blocks.wrapping_add(count);
        pr_info!("takeover: order {}: {} blocks\n", order.get(), count);
    }
    pr_info!(
        "takeover: {} blocks in {} runs, {} pages, {} tree nodes, {} cycles\n",
        blocks,
        census.ranges,
        census.frames,
        nodes,
        cycles
    );
    Ok(())
}

/// Gives what is not preserved to the page allocator, where struct pages are not deferred.
#[link_section = ".init.text"]
pub(crate) fn init_free() {}

/// Gives the rest of what is not preserved to the page allocator.
#[link_section = ".init.text"]
pub(crate) fn init_late() {}

/// The machine as memblock knows it.
struct Memblock {
    ram_end: u64,
}

impl Memblock {
    #[link_section = ".init.text"]
    fn new() -> Self {
        Self {
            // SAFETY: Early boot.
            ram_end: unsafe { bindings::memblock_end_of_DRAM() } >> PAGE_SHIFT,
        }
    }
}

/// Returns the regions of memory, sorted by address and disjoint.
#[link_section = ".init.text"]
fn memory() -> &'static [bindings::memblock_region] {
    // SAFETY: Early boot: nobody else changes the regions, and no caller keeps the slice while
    // it does so itself.
    unsafe {
        let memory = &raw const bindings::memblock.memory;
        core::slice::from_raw_parts((*memory).regions, (*memory).cnt)
    }
}

/// Returns whether all of `frames` is memory, in however many regions.
#[link_section = ".init.text"]
fn is_memory(frames: Frames) -> bool {
    let regions = memory();
    let mut at = frames.phys();
    let end = at.saturating_add(frames.bytes());
    // The first region that ends after the start.
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
    for region in regions.iter().skip(below) {
        // What is not in the direct map cannot be preserved, nor hold a node.
        let mapped = region.flags & bindings::memblock_flags_MEMBLOCK_NOMAP == 0;
        if at >= end || region.base > at || !mapped {
            break;
        }
        at = region.base.saturating_add(region.size);
    }
    at >= end
}

impl Machine for Memblock {
    fn ram_end(&self) -> u64 {
        self.ram_end
    }

    #[link_section = ".init.text"]
    fn is_ram(&self, frames: Frames) -> bool {
        is_memory(frames)
    }

    fn in_scratch(&self, frames: Frames) -> bool {
        kho_sys::in_scratch(frames.phys(), frames.bytes())
    }

    #[link_section = ".init.text"]
    fn reserve(&mut self, frames: Frames) -> Result<(), i32> {
        let (phys, size) = (frames.phys(), frames.bytes());
        // In two steps, because memblock does not take a range with flags of which part is
        // reserved without.
        // SAFETY: Early boot.
        unsafe {
            let none = bindings::NUMA_NO_NODE;
            let error = bindings::__memblock_reserve(phys, size, none, 0);
            if error != 0 {
                return Err(error);
            }
            match bindings::memblock_reserved_mark_noinit(phys, size) {
                0 => Ok(()),
                error => {
                    bindings::memblock_phys_free(phys, size);
                    Err(error)
                }
            }
        }
    }

    #[link_section = ".init.text"]
    fn release(&mut self, frames: Frames) {
        // SAFETY: Early boot.
        unsafe { bindings::memblock_phys_free(frames.phys(), frames.bytes()) };
    }

    #[link_section = ".init.text"]
    fn adopt(&mut self, first: Block, count: u64) {
        let order = first.order();
        let mut pfn = first.pfn().get();
        for _ in 0..count {
            init_pages(pfn, order);
            // SAFETY: It is RAM.
            if let Some(page) = unsafe { Page::of(pfn) } {
                page.mark(Mark::Preserved, order);
            }
            // OVERFLOW: The blocks are in RAM.
            pfn = pfn.wrapping_add(order.pages());
        }
    }
}

/// Initialises the struct pages of a block if that is deferred: what initialises them later spares
/// reserved memory.
#[link_section = ".init.text"]
fn init_pages(pfn: u64, order: Order) {
    if cfg!(CONFIG_DEFERRED_STRUCT_PAGE_INIT) {
        // SAFETY: Early boot, and the block is RAM, on one node.
        unsafe {
            let nid = bindings::kho_glue_early_pfn_to_nid(pfn as usize);
            for i in 0..order.pages() {
                bindings::init_deferred_page(pfn.wrapping_add(i) as usize, nid);
            }
        }
    }
}
