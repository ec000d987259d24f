// SPDX-License-Identifier: GPL-2.0

//! Memory management as this crate sees it: the direct map, struct pages, marks and NUMA nodes.
//!
//! Safe functions around calls into mm/. They decide nothing about a handover. The marks are this
//! file's: nobody else reads or writes `page->private` of memory that was taken over.

use super::kho_key::{
    Block,
    Order,
    Pfn, //
};
use super::kho_place;
use super::kho_range::Frames;
use super::GRAIN_ORDER;
use core::{
    ptr::NonNull,
    sync::atomic::{
        AtomicUsize,
        Ordering, //
    },
};
use kernel::{
    bindings,
    prelude::*, //
};

/// The direct map is linear: what is added to a physical address to get its virtual one.
static DIRECT_MAP: AtomicUsize = AtomicUsize::new(0);

/// Learns where the direct map is. To be called once, before anything else here.
#[link_section = ".init.text"]
pub(crate) fn init_direct_map() {
    // SAFETY: The direct map exists from `mm_core_init_early()` on, whose call this is.
    let offset = unsafe { bindings::kho_glue_direct_map() };
    DIRECT_MAP.store(offset, Ordering::Relaxed);
}

/// Returns what to add to a physical address to get its virtual one.
#[inline(always)]
pub(crate) fn direct_map() -> usize {
    DIRECT_MAP.load(Ordering::Relaxed)
}

/// Returns the CPU's counter of cycles.
pub(crate) fn cycles() -> u64 {
    // SAFETY: May be called at any time.
    unsafe { bindings::kho_glue_cycles() }
}

/// Returns the address at which memory at `phys` is mapped.
pub(crate) fn virt<T>(phys: u64) -> *mut T {
    // SAFETY: This is arithmetic; a caller that uses the pointer says why there is memory.
    unsafe { bindings::kho_glue_phys_to_virt(phys) }.cast()
}

/// Returns the physical address of memory in the direct map.
pub(crate) fn phys<T>(virt: *mut T) -> u64 {
    // SAFETY: This is arithmetic.
    unsafe { bindings::kho_glue_virt_to_phys(virt.cast()) }
}

/// Returns the frame number and order of a folio.
///
/// # Safety
///
/// `folio` must point to a folio that stays what it is during the call.
#[inline(always)]
pub(crate) unsafe fn folio_place(folio: *mut bindings::folio) -> Option<(Pfn, Order)> {
    // SAFETY: By the caller's contract.
    let folio = unsafe { bindings::kho_glue_folio(folio) };
    // CAST: An order is a small number.
    Some((Pfn::new(folio.pfn as u64)?, Order::new(folio.order as u32)?))
}

/// Returns the frames of `count` struct pages from `page` on.
///
/// # Safety
///
/// `page` must point to a struct page.
pub(crate) unsafe fn page_frames(page: *mut bindings::page, count: usize) -> Option<Frames> {
    // SAFETY: By the caller's contract.
    let pfn = unsafe { bindings::kho_glue_page_to_pfn(page) };
    Frames::new(Pfn::new(pfn as u64)?, count as u64)
}

/// Returns whether all of `frames` is System RAM, as `/proc/iomem` has it, and online.
pub(crate) fn is_online_ram(frames: Frames) -> bool {
    /// # Safety
    ///
    /// `sum` must point to a number.
    unsafe extern "C" fn add(_pfn: usize, nr_pages: usize, sum: *mut c_void) -> c_int {
        // SAFETY: By the contract.
        let sum = unsafe { &mut *sum.cast::<u64>() };
        *sum = sum.saturating_add(nr_pages as u64);
        0
    }
    let mut sum = 0u64;
    // SAFETY: The range need not be RAM; `add` gets the number that it needs.
    unsafe {
        bindings::walk_system_ram_range(
            frames.start() as usize,
            frames.count() as usize,
            (&raw mut sum).cast(),
            Some(add),
        )
    };
    // Memory is online in sections, which are larger than this.
    let mut rest = frames;
    while !rest.is_empty() && Page::online(rest.start()).is_some() {
        rest = rest.from(rest.head_to(1 << GRAIN_ORDER).end());
    }
    sum == frames.count() && rest.is_empty()
}

/// Returns the frames of the `size` bytes at `mem`, if there are any and all of them are RAM in the
/// direct map.
pub(crate) fn direct_frames(mem: *mut c_void, size: usize) -> Option<Frames> {
    // SAFETY: The function is there to check any address.
    if !unsafe { bindings::kho_glue_virt_addr_valid(mem) } {
        return None;
    }
    Frames::covering(phys(mem), size as u64)
        .filter(|frames| !frames.is_empty() && is_online_ram(*frames))
}

/// Returns whether two frames are on the same NUMA node.
#[inline(always)]
pub(crate) fn one_node(first: u64, last: u64) -> bool {
    if cfg!(not(CONFIG_NUMA)) {
        return true;
    }
    // SAFETY: The frames have struct pages: they are those of memory that somebody preserves.
    unsafe { bindings::kho_glue_one_node(first as usize, last as usize) }
}

/// What `page->private` says of the first page of a block that was taken over.
///
/// Only this kernel reads it; it is not part of the handover.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Mark {
    /// Preserved, and not asked for yet; "KHOP".
    Preserved = 0x4b48_4f50,
    /// About to be restored, if all that belongs to it can be, too.
    Claimed = 0x4b48_4f51,
}

impl Mark {
    /// Returns what `page->private` is with this mark.
    #[inline(always)]
    fn on(self, order: Order) -> usize {
        (self as usize) << MARK_SHIFT | order.get() as usize
    }
}

/// The bits of a frame number that are 0 in the first frame of a grain.
#[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
const GRAIN_MASK: u64 = (1 << GRAIN_ORDER) - 1;

/// Bits of [`Mark`] in `page->private`, above the order.
const MARK_SHIFT: u32 = 32;

/// A struct page.
///
/// # Invariants
///
/// The pointer is that of a struct page of memory that is online or was taken over, which is not
/// removed.
#[derive(Clone, Copy)]
pub(crate) struct Page(NonNull<bindings::page>);

impl Page {
    /// Returns the struct page of a frame that is online.
    #[inline(always)]
    pub(crate) fn online(pfn: u64) -> Option<Self> {
        // SAFETY: The function is there to check any number.
        let page = unsafe { bindings::kho_glue_pfn_to_online_page(pfn as usize) };
        // INVARIANT: It is online.
        NonNull::new(page).map(Self)
    }

    /// Returns the struct page of a frame, online or not.
    ///
    /// # Safety
    ///
    /// The frame must be RAM that the kernel knows of.
    pub(crate) unsafe fn of(pfn: u64) -> Option<Self> {
        // SAFETY: By the caller's contract there is a struct page.
        let page = unsafe { bindings::kho_glue_pfn_to_page(pfn as usize) };
        // INVARIANT: It is RAM, which is online from boot on.
        NonNull::new(page).map(Self)
    }

    /// Returns the struct page that `page` points to; [`None`] for a null pointer.
    ///
    /// # Safety
    ///
    /// As for [`Page::of`].
    pub(crate) unsafe fn from_ptr(page: *mut bindings::page) -> Option<Self> {
        // INVARIANT: By the caller's contract.
        NonNull::new(page).map(Self)
    }

    /// Returns the pointer.
    pub(crate) fn as_ptr(self) -> *mut bindings::page {
        self.0.as_ptr()
    }

    /// Returns the struct page `count` frames on.
    ///
    /// # Safety
    ///
    /// Both frames must be in one block of the page allocator's largest order, and the other one
    /// must be RAM as well if anything is done with it.
    #[inline]
    pub(crate) unsafe fn nth(self, count: usize) -> Self {
        // SAFETY: Struct pages of such a block are adjacent.
        Self(unsafe { self.0.add(count) })
    }

    /// Returns `page->private`.
    #[inline(always)]
    pub(crate) fn private(&self) -> &AtomicUsize {
        // SAFETY: By the type invariant there is a struct page, and `private` is a word in it,
        // aligned as one. Nobody else uses that of preserved memory.
        unsafe { &*self.as_ptr().byte_add(bindings::KHO_PAGE_PRIVATE).cast() }
    }

    /// Returns the order of the block that starts here, if it carries `mark`.
    #[inline(always)]
    pub(crate) fn order(self, mark: Mark) -> Option<Order> {
        let private = self.private().load(Ordering::Relaxed);
        if private >> MARK_SHIFT != mark as usize {
            return None;
        }
        Order::new(private as u32)
    }

    /// Writes `mark` and the order.
    pub(crate) fn mark(self, mark: Mark, order: Order) {
        self.private().store(mark.on(order), Ordering::Relaxed);
    }

    /// Turns mark `from` into `to` on a block of `order`; returns false if somebody else was
    /// faster.
    #[inline(always)]
    pub(crate) fn turn(self, from: Mark, to: Mark, order: Order) -> bool {
        let (from, to) = (from.on(order), to.on(order));
        self.private()
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Takes the mark off a preserved folio, which makes it the caller's; [`None`] if there is
    /// none, if the block is too large for a folio, or if somebody else was faster.
    ///
    /// Takeover has left nothing else to be done, see `kho_struct_pages`: this costs the same for
    /// all orders.
    #[inline(always)]
    pub(crate) fn take_folio(self) -> Option<(*mut bindings::folio, Order)> {
        let private = self.private().load(Ordering::Relaxed);
        // What is left without the mark is the order, or with another mark no order at all.
        let order = private ^ Mark::Preserved.on(Order::ZERO);
        if order > bindings::KHO_MAX_FOLIO_ORDER as usize {
            return None;
        }
        let order = Order::new(order as u32)?;
        self.private()
            .compare_exchange(private, 0, Ordering::AcqRel, Ordering::Relaxed)
            .ok()?;
        if cfg!(CONFIG_MEM_ALLOC_PROFILING) {
            self.clear_tags(1);
        }
        Some((self.as_ptr().cast(), order))
    }

    /// Makes the claimed block single pages that the caller has the only reference to.
    pub(crate) fn into_pages(self, order: Order) {
        self.private().store(0, Ordering::Relaxed);
        if is_folio(order) {
            // SAFETY: The block was claimed, so that it is nobody else's, and takeover has made it
            // a folio.
            unsafe { bindings::kho_glue_split(self.as_ptr(), order.get()) };
        }
        if cfg!(CONFIG_MEM_ALLOC_PROFILING) {
            self.clear_tags(order.pages());
        }
    }

    /// Says of the pages of a block, whose mark is off, that nobody has allocated them.
    #[inline(never)]
    fn clear_tags(self, count: u64) {
        // SAFETY: By the caller, all of them were preserved.
        unsafe { bindings::kho_glue_clear_tags(self.as_ptr(), count as usize) };
    }
}

/// Returns whether a block of this order becomes a folio of several pages in takeover.
#[inline(always)]
pub(crate) fn is_folio(order: Order) -> bool {
    (1..=bindings::KHO_MAX_FOLIO_ORDER).contains(&order.get())
}

/// Frames that are online all or none (`PAGES_PER_SUBSECTION`).
#[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
const SUBSECTION: u64 = (2 << 20) >> super::PAGE_SHIFT;

/// Calls `each` with the order of every block that carries `mark`. Looks at each page there is, and
/// may sleep.
#[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
pub(crate) fn for_each_marked(mark: Mark, mut each: impl FnMut(Order)) {
    // Memory must not be removed while its struct pages are looked at.
    // SAFETY: The caller may sleep, and these calls are a pair.
    unsafe { bindings::kho_glue_get_online_mems() };
    // SAFETY: It is set while booting, and only grows.
    let end = unsafe { bindings::max_pfn } as u64;
    let mut pfn = 0u64;
    while pfn < end {
        if pfn & GRAIN_MASK == 0 {
            // SAFETY: The caller may sleep.
            unsafe { bindings::kho_glue_cond_resched() };
        }
        let Some(page) = Page::online(pfn) else {
            // Between the memory of two nodes there may be terabytes of nothing.
            pfn = (pfn | (SUBSECTION - 1)).saturating_add(1);
            continue;
        };
        let order = page.order(mark);
        if let Some(order) = order {
            each(order);
        }
        pfn = pfn.saturating_add(order.unwrap_or(Order::ZERO).pages());
    }
    // SAFETY: See above.
    unsafe { bindings::kho_glue_put_online_mems() };
}

/// Frees a page that was restored, or allocated as a chunk.
///
/// # Safety
///
/// The caller must have the only reference to the page at `phys`.
pub(crate) unsafe fn free_page(phys: u64) {
    // SAFETY: By the caller's contract.
    unsafe { bindings::free_pages(virt::<c_void>(phys) as usize, 0) };
}

/// Allocates a page of zeroes that the next kernel has, too, and returns its physical address.
pub(crate) fn alloc_page() -> Option<u64> {
    // SAFETY: The caller may sleep.
    let page = unsafe { bindings::kho_glue_alloc_page() };
    there_at_boot(page, Order::ZERO).map(|page| phys(page.as_ptr()))
}

/// Allocates a folio of zeroes that the next kernel has, too. The order must be one of the page
/// allocator's.
pub(crate) fn alloc_folio(order: Order) -> Option<NonNull<c_void>> {
    // SAFETY: By the caller's contract, and the caller may sleep.
    let folio = unsafe { bindings::kho_glue_alloc_folio(order.get()) };
    there_at_boot(folio, order)
}

/// Frees what [`alloc_folio`] returned.
///
/// # Safety
///
/// The caller must have the only reference to the folio.
pub(crate) unsafe fn free_folio(folio: NonNull<c_void>) {
    // SAFETY: By the caller's contract.
    unsafe { bindings::kho_glue_folio_put(bindings::kho_glue_virt_to_folio(folio.as_ptr())) };
}

/// Returns `mem`, `2^order` pages that were just allocated, or others if those were plugged in.
fn there_at_boot(mem: *mut c_void, order: Order) -> Option<NonNull<c_void>> {
    let mem = NonNull::new(mem)?;
    if is_plugged(mem, order) {
        return alloc_elsewhere(mem, order);
    }
    Some(mem)
}

/// Returns whether any of `2^order` pages that were just allocated was plugged in.
fn is_plugged(mem: NonNull<c_void>, order: Order) -> bool {
    let block = Block::at(phys(mem.as_ptr()), order);
    block.is_some_and(|block| kho_place::is_plugged(Frames::of_block(block)))
}

/// Tries to allocate `2^order` pages that were there at boot: once on each node, and once in each
/// of the zones that hot-plugged memory mostly lies above. Frees `plugged`.
#[cold]
#[inline(never)]
fn alloc_elsewhere(plugged: NonNull<c_void>, order: Order) -> Option<NonNull<c_void>> {
    let nodes = Nodes::all().map(|nid| (nid, 0));
    let zones = [
        (bindings::NUMA_NO_NODE, bindings::KHO_GFP_DMA32),
        (bindings::NUMA_NO_NODE, bindings::KHO_GFP_DMA),
    ];

    // What was plugged in is freed at the end, or it would be found again. It holds the list.
    let mut rejected = plugged.cast::<Option<NonNull<c_void>>>();
    // SAFETY: The memory is ours, and a page at least.
    unsafe { rejected.write(None) };
    let mut found = None;
    for (nid, zone) in Iterator::chain(nodes, zones) {
        // SAFETY: The order is the page allocator's; the node has memory.
        let mem = unsafe { bindings::kho_glue_alloc_folio_from(order.get(), nid, zone) };
        let Some(mem) = NonNull::new(mem) else {
            continue;
        };
        if !is_plugged(mem, order) {
            found = Some(mem);
            break;
        }
        let next = rejected.cast();
        rejected = mem.cast();
        // SAFETY: The memory was just allocated, and is a page at least.
        unsafe { rejected.write(Some(next)) };
    }
    let mut next = Some(rejected.cast());
    while let Some(mem) = next {
        // SAFETY: The list has what was allocated above, and nobody else has it.
        unsafe {
            next = mem.cast::<Option<NonNull<c_void>>>().read();
            free_folio(mem);
        }
    }
    found
}

/// The NUMA nodes with memory.
pub(crate) struct Nodes(c_int);

impl Nodes {
    pub(crate) fn all() -> Self {
        Self(bindings::NUMA_NO_NODE)
    }

    /// Returns how many there are.
    pub(crate) fn count() -> u64 {
        Self::all().fold(0, |count, _| count.saturating_add(1))
    }
}

impl Iterator for Nodes {
    type Item = c_int;

    fn next(&mut self) -> Option<c_int> {
        // SAFETY: Any node may be asked for the next one, and so may the number that means none.
        self.0 = unsafe { bindings::kho_glue_next_memory_node(self.0) };
        (self.0 != bindings::NUMA_NO_NODE).then_some(self.0)
    }
}

/// Returns the first frame of a node whose struct page is not initialised yet, or [`u64::MAX`].
#[link_section = ".init.text"]
pub(crate) fn first_deferred(nid: c_int) -> u64 {
    // SAFETY: Any node may be asked for.
    unsafe { bindings::kho_glue_first_deferred(nid) as u64 }
}

/// Returns the first frame of all nodes whose struct page is not initialised yet.
#[link_section = ".init.text"]
pub(crate) fn first_deferred_of_all() -> u64 {
    let mut first = u64::MAX;
    for nid in Nodes::all() {
        first = first.min(first_deferred(nid));
    }
    first
}

/// Returns the first frames of `frames`, which are on one node, that are in one zone.
#[link_section = ".init.text"]
pub(crate) fn in_one_zone(frames: Frames) -> Frames {
    if frames.is_empty() {
        return frames;
    }
    let pfn = frames.start();
    // SAFETY: The frame is one of that node.
    frames.until(unsafe { bindings::kho_glue_zone_border(pfn as usize, nid_of(pfn)) } as u64)
}

/// Returns the node of a frame of RAM, while there is memblock.
#[link_section = ".init.text"]
pub(crate) fn nid_of(pfn: u64) -> c_int {
    // SAFETY: Any number may be asked for; memblock knows the answer.
    unsafe { bindings::kho_glue_early_pfn_to_nid(pfn as usize) }
}

/// Initialises those struct pages of `frames` that are not yet.
///
/// # Safety
///
/// The frames must be RAM whose struct pages nobody uses yet.
#[link_section = ".init.text"]
pub(crate) unsafe fn init_deferred(frames: Frames) {
    if frames.end() > first_deferred_of_all() {
        for pfn in frames.start()..frames.end() {
            // SAFETY: By the caller's contract.
            unsafe { bindings::init_deferred_page(pfn as usize, nid_of(pfn)) };
        }
    }
}

/// Gives a block to the page allocator.
///
/// # Safety
///
/// The block must be RAM that is nobody's, and no part of it may be given again. Its struct pages
/// must be initialised, and so must those of the block of the largest order around it.
#[link_section = ".init.text"]
pub(crate) unsafe fn free_block(pfn: u64, order: Order) {
    // SAFETY: By the caller's contract.
    unsafe { bindings::kho_glue_free_block(pfn as usize, order.get()) };
}

/// Says that there are `count` more pages of memory.
#[link_section = ".init.text"]
pub(crate) fn add_memory(count: u64) {
    // SAFETY: May be called at any time.
    unsafe { bindings::kho_glue_add_totalram(count as usize) };
}
