// SPDX-License-Identifier: GPL-2.0

//! The thin ring: memory, struct pages, locks and libfdt behind safe functions.
//!
//! [`kho_memblock`](super::kho_memblock) does the same for early boot. What is above decides; what
//! is here does as it is told. Where a room calls C itself, it is a call with no rule of its own to
//! keep, and the room says why it may.

use super::kho_fdt::{
    self,
    Blob,
    FdtError, //
};
use super::kho_key::{
    Block,
    Order,
    Pfn, //
};
use super::kho_radix::{
    Hints,
    Node,
    NodeAddr,
    NodeMem,
    Pass,
    Tree, //
};
use super::kho_range::Frames;
use super::PAGE_SHIFT;
use core::{
    mem::size_of,
    ptr::NonNull,
    sync::atomic::{
        AtomicBool,
        AtomicU32,
        AtomicU64,
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

/// What may be wrong with something that a caller or another kernel says. That is not a bug of this
/// kernel, which goes on.
#[derive(Clone, Copy)]
#[repr(usize)]
pub(crate) enum Complaint {
    NotShown,
    NotPreserved,
    NothingToRestore,
    NoArea,
    Twice,
    NoKey,
    InScratch,
    Plugged,
}

impl Complaint {
    const ALL: [Self; 8] = [
        Self::NotShown,
        Self::NotPreserved,
        Self::NothingToRestore,
        Self::NoArea,
        Self::Twice,
        Self::NoKey,
        Self::InScratch,
        Self::Plugged,
    ];

    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::NotShown => "a blob is not shown in debugfs",
            Self::NotPreserved => "unpreserving what is not preserved",
            Self::NothingToRestore => "nothing to restore: not preserved, or restored already",
            Self::NoArea => "no vmalloc area: not preserved whole, or no memory",
            Self::Twice => "memory was preserved twice, only the larger block can be restored",
            Self::NoKey => "deleting a key that is not in the tree",
            Self::InScratch => "memory in scratch cannot be preserved",
            Self::Plugged => "memory that was plugged in cannot be preserved",
        }
    }

    /// Returns whether there has been none of this kind for a while.
    pub(crate) fn is_quiet(self) -> bool {
        self.heard().count.load(Ordering::Relaxed) == 0
    }

    fn heard(self) -> &'static Heard {
        static HEARD: [Heard; Complaint::ALL.len()] =
            [const { Heard::new() }; Complaint::ALL.len()];
        // There is one for each kind; the first is as good as a panic.
        HEARD.get(self as usize).unwrap_or(&HEARD[0])
    }
}

/// How often something was complained of.
struct Heard {
    /// 0 if all is quiet; else one for the complaint that has been printed in full, or for those
    /// that have been summed up, and one for each since.
    count: AtomicU64,
    /// What the last one was about.
    last: AtomicU64,
}

impl Heard {
    const fn new() -> Self {
        Self {
            count: AtomicU64::new(0),
            last: AtomicU64::new(0),
        }
    }
}

/// Tells the log what is wrong, and the number it is about. After the first one of a kind, others
/// are only counted, and [`sum_up`] tells how many, until there was none for a second.
#[cold]
#[inline(never)]
pub(crate) fn complain(what: Complaint, number: u64) {
    let heard = what.heard();
    heard.last.store(number, Ordering::Relaxed);
    if heard.count.fetch_add(1, Ordering::Relaxed) == 0 {
        pr_warn!("{} ({number:#x})\n", what.text());
        schedule_summary();
    }
}

/// Has complaints summed up in a second; not before there are work queues, see `kho_rs_init()`.
pub(crate) fn schedule_summary() {
    // SAFETY: The work is a static one.
    unsafe { bindings::kho_glue_schedule_summary() };
}

/// Sums up what was complained of since the last time. Runs from a work queue, so never twice at
/// once.
pub(crate) fn sum_up() {
    let mut again = false;
    for what in Complaint::ALL {
        let heard = what.heard();
        if what.is_quiet() {
            continue;
        }
        // Only this function makes it 0.
        let more = heard.count.swap(1, Ordering::Relaxed).wrapping_sub(1);
        if more > 0 {
            let last = heard.last.load(Ordering::Relaxed);
            pr_warn!("{}: {more} more, the last at {last:#x}\n", what.text());
            again = true;
        } else {
            let end = |count| {
                heard
                    .count
                    .compare_exchange(count, 0, Ordering::Relaxed, Ordering::Relaxed)
            };
            again |= end(1).is_err();
        }
    }
    if again {
        schedule_summary();
    }
}

/// Learns where the direct map is. To be called once, before anything else here.
#[link_section = ".init.text"]
pub(crate) fn init_direct_map() {
    // SAFETY: Memory is known to memblock and mapped by the time KHO is called at all.
    let offset = unsafe { bindings::kho_glue_direct_map() };
    DIRECT_MAP.store(offset, Ordering::Relaxed);
}

/// Returns the address at which memory at `phys` is mapped.
pub(crate) fn virt<T>(phys: u64) -> *mut T {
    // SAFETY: This is arithmetic; who uses the pointer says why there is memory.
    unsafe { bindings::kho_glue_phys_to_virt(phys) }.cast()
}

/// Returns the physical address of memory in the direct map.
pub(crate) fn phys<T>(virt: *mut T) -> u64 {
    // SAFETY: This is arithmetic.
    unsafe { bindings::kho_glue_virt_to_phys(virt.cast()) }
}

/// The generation of tree nodes, for [`Hints`]; odd while a tree is being pruned.
///
/// Who is in a tree has preemption disabled and has seen an even number. That is a read-side
/// section for RCU. So once a grace period has passed since the number became odd, whoever prunes
/// is alone. Who comes meanwhile waits for the prune mutex.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// Being in a tree: preemption is disabled until this is dropped.
///
/// # Invariants
///
/// `hints` points to this CPU's. `generation` is even.
pub(crate) struct Inside {
    hints: NonNull<Hints>,
    generation: u64,
}

impl Pass for Inside {
    #[inline(always)]
    fn hints(&self) -> &Hints {
        // SAFETY: By the type invariant. Trees are not used from interrupts, and nobody else runs
        // on this CPU while preemption is disabled.
        unsafe { self.hints.as_ref() }
    }

    #[inline(always)]
    fn generation(&self) -> u64 {
        self.generation
    }
}

impl Drop for Inside {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: Entered when this was made.
        unsafe { bindings::kho_glue_leave() };
    }
}

// C has room for them, see `kho_glue_enter()`.
const _: () = {
    use core::mem::align_of;
    assert!(size_of::<Hints>() == size_of::<bindings::kho_glue_hints>());
    assert!(align_of::<Hints>() <= align_of::<bindings::kho_glue_hints>());
};

/// Whether free memory is the page allocator's, and no longer memblock's.
static BUDDY_IS_UP: AtomicBool = AtomicBool::new(false);

/// Says that free memory is the page allocator's from now on.
#[link_section = ".init.text"]
pub(crate) fn set_buddy_is_up() {
    BUDDY_IS_UP.store(true, Ordering::Relaxed);
}

/// Tree nodes in the direct map.
#[derive(Clone, Copy)]
pub(crate) struct Direct {
    offset: usize,
}

impl Direct {
    /// Returns the direct map as memory for a tree.
    ///
    /// # Safety
    ///
    /// Every address in the tree it is used with must be that of a page which holds a node for as
    /// long as the tree is used: either this kernel made the tree, or `kho_takeover::chart()` is
    /// about to look at it or has found it sound.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self {
            offset: DIRECT_MAP.load(Ordering::Relaxed),
        }
    }
}

impl NodeMem for Direct {
    type Pass<'a> = Inside;

    #[inline(always)]
    fn enter(&self) -> Inside {
        loop {
            // SAFETY: May be called by anyone; left below, or when what is returned is dropped.
            let hints = unsafe { bindings::kho_glue_enter() };
            // Who sees the end of a prune also sees what it took out of the tree.
            let generation = GENERATION.load(Ordering::Acquire);
            if generation & 1 == 0 {
                // INVARIANT: They are this CPU's hints, and the number is even.
                return Inside {
                    // SAFETY: It is the address of a variable, which C has zeroed: valid hints.
                    hints: unsafe { NonNull::new_unchecked(hints.cast()) },
                    generation,
                };
            }
            // SAFETY: Entered above.
            unsafe { bindings::kho_glue_leave() };
            wait_for_prune();
        }
    }

    fn forget(&self) {
        // Who comes to a tree that uses these nodes again does so after they were freed.
        GENERATION.fetch_add(2, Ordering::Relaxed);
    }

    // The page allocator is there, or memblock is, which is gone later; as `__ref` in C.
    #[link_section = ".ref.text"]
    #[inline(never)]
    fn alloc(&self) -> Option<NodeAddr> {
        // SAFETY: Early boot, if there is no slab.
        unsafe {
            if !bindings::slab_is_available() {
                return alloc_early();
            }
        }
        NodeAddr::new(alloc_page()?)
    }

    #[link_section = ".ref.text"]
    #[inline(never)]
    fn free(&self, node: NodeAddr) {
        // SAFETY: The page came from `alloc()`, and by its contract nobody uses it.
        unsafe {
            if BUDDY_IS_UP.load(Ordering::Relaxed) {
                bindings::kho_glue_free_page(node.get());
            } else {
                bindings::memblock_phys_free(node.get(), bindings::PAGE_SIZE as u64);
            }
        }
    }

    #[inline(always)]
    fn node(&self, addr: NodeAddr) -> &Node {
        let virt = (addr.get() as usize).wrapping_add(self.offset);
        // SAFETY: By the contract of `Direct::new()` there is a node, which is made of words that
        // are only accessed atomically.
        unsafe { &*(virt as *const Node) }
    }
}

/// Pages of memblock's that wait to become nodes: the address of the first, and their end.
///
/// Takeover makes many nodes; memblock takes its time for each request, whatever its size. They are
/// zeroed one by one, when they are used.
// Early boot runs on one CPU.
#[link_section = ".init.data"]
static mut POOL: (u64, u64) = (0, 0);

/// How many pages are taken from memblock at once.
const POOL_PAGES: u64 = 16;

/// Allocates a node from memblock.
#[link_section = ".init.text"]
fn alloc_early() -> Option<NodeAddr> {
    let page = bindings::PAGE_SIZE as u64;
    // SAFETY: Early boot; see the static.
    let (mut next, mut end) = unsafe { POOL };
    if next == end {
        for pages in [POOL_PAGES, 1] {
            let size = page.wrapping_mul(pages);
            // Without kmemleak, which would not be told when a page is freed.
            let limit = u64::from(bindings::MEMBLOCK_ALLOC_NOLEAKTRACE);
            // SAFETY: Early boot.
            let virt = unsafe {
                let none = bindings::NUMA_NO_NODE;
                bindings::memblock_alloc_try_nid_raw(size, page, 0, limit, none)
            };
            if !virt.is_null() {
                next = phys(virt);
                end = next.wrapping_add(size);
                break;
            }
        }
    }
    if next == end {
        return None;
    }
    // SAFETY: As above.
    unsafe { POOL = (next.wrapping_add(page), end) };
    let words = virt::<u64>(next);
    let mut at = 0usize;
    while at < bindings::PAGE_SIZE / size_of::<u64>() {
        // SAFETY: The page has that many, and is nobody's. Volatile, or this would be a call of
        // `memset()`, which may work byte by byte.
        unsafe {
            let word = words.add(at);
            word.write_volatile(0);
            word.add(1).write_volatile(0);
            word.add(2).write_volatile(0);
            word.add(3).write_volatile(0);
            word.add(4).write_volatile(0);
            word.add(5).write_volatile(0);
            word.add(6).write_volatile(0);
            word.add(7).write_volatile(0);
        }
        at = at.wrapping_add(8);
    }
    NodeAddr::new(next)
}

/// Frees what no node was made of.
#[link_section = ".init.text"]
pub(crate) fn drain_pool() {
    // SAFETY: Early boot; see the static.
    let (mut next, end) = unsafe { (&raw mut POOL).replace((0, 0)) };
    // SAFETY: Only nodes of this kernel's are freed.
    let direct = unsafe { Direct::new() };
    while let Some(node) = NodeAddr::new(next).filter(|_| next < end) {
        direct.free(node);
        next = next.wrapping_add(bindings::PAGE_SIZE as u64);
    }
}

#[cold]
#[inline(never)]
fn wait_for_prune() {
    // SAFETY: The mutex is a static one; the caller holds no lock.
    unsafe {
        bindings::kho_glue_lock_prune();
        bindings::kho_glue_unlock_prune();
    }
}

/// Whether a prune is to come. If it is just beginning, it may miss what became empty right now;
/// the next one does not.
static PRUNE_IS_DUE: AtomicBool = AtomicBool::new(false);

/// Prunes `tree`, which this kernel made, while nobody else is in it; unless all of it is in use.
pub(crate) fn prune(tree: &Tree<Direct>) {
    PRUNE_IS_DUE.store(false, Ordering::Relaxed);
    // SAFETY: The mutex is a static one, and this runs from a work queue, where waiting for a
    // grace period is allowed.
    unsafe { bindings::kho_glue_lock_prune() };
    if tree.has_empty() {
        GENERATION.fetch_add(1, Ordering::Relaxed);
        // SAFETY: As above.
        unsafe { bindings::synchronize_rcu() };
        tree.prune();
        GENERATION.fetch_add(1, Ordering::Release);
    }
    // SAFETY: Locked above.
    unsafe { bindings::kho_glue_unlock_prune() };
}

/// Has the outgoing tree pruned in a while.
#[inline(always)]
pub(crate) fn schedule_prune() {
    if !PRUNE_IS_DUE.load(Ordering::Relaxed) {
        PRUNE_IS_DUE.store(true, Ordering::Relaxed);
        // SAFETY: The work is a static one.
        unsafe { bindings::kho_glue_schedule_prune() };
    }
}

/// Returns the frame number and order of a folio.
///
/// # Safety
///
/// `folio` must point to a folio that stays what it is during the call.
#[inline(always)]
pub(crate) unsafe fn folio_block(folio: *mut bindings::folio) -> Option<Block> {
    // SAFETY: By the caller's contract.
    let folio = unsafe { bindings::kho_glue_folio(folio) };
    // CAST: An order is a small number.
    Block::new(Pfn::new(folio.pfn as u64)?, Order::new(folio.order as u32)?)
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
        let sum = sum.cast::<u64>();
        // SAFETY: By the contract.
        unsafe { *sum = (*sum).wrapping_add(nr_pages as u64) };
        0
    }
    let mut sum = 0u64;
    // SAFETY: Takes any range; `add` gets what it needs.
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
    while rest.count() > 0 && Page::online(rest.start()).is_some() {
        rest = rest.tail(rest.head_to(1 << bindings::KHO_MAX_PAGE_ORDER).count());
    }
    sum == frames.count() && rest.count() == 0
}

/// Returns the frames of the `size` bytes at `mem`, if there are any and all of them are RAM in the
/// direct map.
pub(crate) fn direct_frames(mem: *mut c_void, size: usize) -> Option<Frames> {
    // SAFETY: Takes any address.
    if !unsafe { bindings::kho_glue_virt_addr_valid(mem) } {
        return None;
    }
    Frames::covering(phys(mem), size as u64)
        .filter(|frames| frames.count() > 0 && is_online_ram(*frames))
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
        // SAFETY: Takes any number.
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
        let private = (mark as usize) << MARK_SHIFT | order.get() as usize;
        self.private().store(private, Ordering::Relaxed);
    }

    /// Turns mark `from` into `to` on a block of `order`; returns false if somebody else was
    /// faster.
    #[inline(always)]
    pub(crate) fn turn(self, from: Mark, to: Mark, order: Order) -> bool {
        let word = |mark: Mark| (mark as usize) << MARK_SHIFT | order.get() as usize;
        self.private()
            .compare_exchange(word(from), word(to), Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Makes a preserved block a folio that the caller has the only reference to; [`None`] if there
    /// is none, if it is too large for a folio, or if somebody else was faster.
    #[inline(always)]
    pub(crate) fn take_folio(self) -> Option<*mut bindings::folio> {
        let private = self.private().load(Ordering::Relaxed);
        // What is left without the mark is the order, or with another mark no order at all.
        let order = private ^ (Mark::Preserved as usize) << MARK_SHIFT;
        if order > bindings::KHO_MAX_FOLIO_ORDER as usize {
            return None;
        }
        self.private()
            .compare_exchange(private, 0, Ordering::AcqRel, Ordering::Relaxed)
            .ok()?;
        // SAFETY: Only who took the mark off gets here, so that the block is nobody else's; all of
        // it was preserved.
        Some(unsafe { bindings::kho_glue_init_folio(self.as_ptr(), order as u32) })
    }

    /// Makes the claimed block single pages that the caller has the only reference to.
    pub(crate) fn into_pages(self, order: Order) {
        self.private().store(0, Ordering::Relaxed);
        // SAFETY: The block was claimed, so that it is nobody else's; all of it was preserved.
        unsafe { bindings::kho_glue_init_pages(self.as_ptr(), order.pages() as usize) };
    }
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
    let frames = Frames::covering(phys(mem.as_ptr()), order.pages() << PAGE_SHIFT);
    if frames.is_some_and(is_plugged) {
        return alloc_elsewhere(mem, order);
    }
    Some(mem)
}

/// Tries to allocate `2^order` pages that were there at boot: once on each node, and once in each
/// of the zones that hot-plugged memory mostly lies above. Frees `plugged`.
#[cold]
#[inline(never)]
fn alloc_elsewhere(plugged: NonNull<c_void>, order: Order) -> Option<NonNull<c_void>> {
    const NO_NODE: c_int = bindings::NUMA_NO_NODE;
    let mut last = NO_NODE;
    let nodes = core::iter::from_fn(|| {
        // SAFETY: Takes any number from that of no node on.
        last = unsafe { bindings::kho_glue_next_memory_node(last) };
        (last != NO_NODE).then_some((last, 0))
    });
    let zones = [
        (NO_NODE, bindings::KHO_GFP_DMA32),
        (NO_NODE, bindings::KHO_GFP_DMA),
    ];

    // What is no good is freed at the end, or it would be found again. It has room for a list.
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
        let frames = Frames::covering(phys(mem.as_ptr()), order.pages() << PAGE_SHIFT);
        if !frames.is_some_and(is_plugged) {
            found = Some(mem);
            break;
        }
        let next = rejected.cast();
        rejected = mem.cast();
        // SAFETY: As above.
        unsafe { rejected.write(Some(next)) };
    }
    let mut next = Some(rejected.cast());
    while let Some(mem) = next {
        // SAFETY: As above; nobody else has it.
        unsafe {
            next = mem.cast::<Option<NonNull<c_void>>>().read();
            free_folio(mem);
        }
    }
    found
}

/// A range around all memory that was plugged in while this kernel ran, or was offline: its first
/// frame, and the one after its last. No kernel that this one boots has such memory from the start.
static PLUGGED: (AtomicU64, AtomicU64) = (AtomicU64::new(u64::MAX), AtomicU64::new(0));

/// Notes that memory is being plugged in. It is not free yet, so that whoever gets it from the page
/// allocator also finds the note.
pub(crate) fn plug(frames: Frames) {
    PLUGGED.0.fetch_min(frames.start(), Ordering::Relaxed);
    PLUGGED.1.fetch_max(frames.end(), Ordering::Relaxed);
    REFUSED_MAP.fetch_or(granules(frames), Ordering::Relaxed);
}

/// Returns whether any of `frames` was plugged in, and was not there at boot.
pub(crate) fn is_plugged(frames: Frames) -> bool {
    let start = frames.start().max(PLUGGED.0.load(Ordering::Relaxed));
    let end = frames.end().min(PLUGGED.1.load(Ordering::Relaxed));
    // SAFETY: Takes any numbers.
    start < end && unsafe { bindings::kho_glue_is_plugged(start as usize, end as usize) }
}

/// Returns the physical addresses and sizes of the scratch areas.
pub(crate) fn scratch() -> &'static [bindings::kho_scratch] {
    // SAFETY: Both are written in early boot only, the pointer before the count's areas are looked
    // at, and the array stays.
    unsafe {
        if bindings::kho_scratch.is_null() {
            return &[];
        }
        core::slice::from_raw_parts(bindings::kho_scratch, bindings::kho_scratch_cnt as usize)
    }
}

/// Returns the scratch area around `phys`, or the next one after that.
#[link_section = ".init.text"]
pub(crate) fn next_scratch(phys: u64) -> Option<&'static bindings::kho_scratch> {
    // C hands over empty areas.
    let areas = scratch().iter().filter(|area| area.size > 0);
    areas
        .filter(|area| area.addr.saturating_add(area.size) > phys)
        .min_by_key(|area| area.addr)
}

/// Returns whether any of the `size` bytes at `phys` is in a scratch area.
#[inline(never)]
pub(crate) fn in_scratch(phys: u64, size: u64) -> bool {
    let end = phys.saturating_add(size);
    scratch().iter().any(|area| {
        // C hands over empty areas.
        area.size > 0 && phys < area.addr.saturating_add(area.size) && area.addr < end
    })
}

/// A coarse map of memory that may have to be refused: bit `n % 64` is set if the `n`th granule of
/// memory, which has `2^GRANULE` pages, holds part of a scratch area or of memory that was plugged
/// in. Until it is made, all of memory does.
static REFUSED_MAP: AtomicU64 = AtomicU64::new(u64::MAX);
static GRANULE: AtomicU32 = AtomicU32::new(Order::MAX.get());

/// Draws the map, when the scratch areas are known and before any memory can be plugged in.
#[link_section = ".init.text"]
pub(crate) fn draw_map() {
    // SAFETY: The number is known by the time there is memory to preserve.
    let frames = unsafe { bindings::max_pfn } as u64;
    // 64 granules cover all of RAM; what is plugged in later shares bits with it.
    let granule = u64::BITS.wrapping_sub((frames >> 6).leading_zeros());
    GRANULE.store(granule, Ordering::Relaxed);
    let mut map = 0u64;
    for area in scratch().iter().filter(|area| area.size > 0) {
        map |= Frames::covering(area.addr, area.size).map_or(u64::MAX, granules);
    }
    REFUSED_MAP.store(map, Ordering::Relaxed);
    // SAFETY: Called once, while booting.
    unsafe { bindings::kho_glue_watch_memory() };
}

/// Returns the bits that the map has for `frames`.
fn granules(frames: Frames) -> u64 {
    let granule = GRANULE.load(Ordering::Relaxed);
    let first = frames.start().wrapping_shr(granule);
    let last = frames.end().wrapping_sub(1).wrapping_shr(granule);
    let mut map = 0u64;
    for n in first..=last.min(first.wrapping_add(63)) {
        map |= 1u64.wrapping_shl(n as u32);
    }
    map
}

/// Returns whether `block` may have to be refused, quickly: no is right, yes need not be.
#[inline(always)]
pub(crate) fn may_be_refused(block: Block) -> bool {
    let granule = GRANULE.load(Ordering::Relaxed);
    // A block that is no larger than a granule lies in one, as it is aligned to its size.
    let n = block.pfn().get().wrapping_shr(granule);
    block.order().get() > granule
        || REFUSED_MAP.load(Ordering::Relaxed).wrapping_shr(n as u32) & 1 != 0
}

/// An FDT in memory.
///
/// # Invariants
///
/// The header states a size within which all of it is mapped, and libfdt knows its version.
pub(crate) struct Fdt(*const c_void);

/// A node of an FDT: libfdt's offset.
#[derive(Clone, Copy)]
pub(crate) struct FdtNode(c_int);

impl FdtNode {
    const ROOT: Self = Self(0);
}

impl Fdt {
    /// Checks that there is an FDT at `fdt`.
    ///
    /// # Safety
    ///
    /// `len` bytes at `fdt` must be readable for as long as the result is used.
    #[link_section = ".init.text"]
    pub(crate) unsafe fn new(fdt: *const c_void, len: u64) -> Result<Self, FdtError> {
        if len < kho_fdt::HEADER_LEN as u64 {
            return Err(FdtError::Size(len as u32));
        }
        // SAFETY: That many bytes are readable.
        let header = unsafe { fdt.cast::<[u8; kho_fdt::HEADER_LEN]>().read_unaligned() };
        kho_fdt::total_size(&header, len)?;
        // SAFETY: The size covers a header, and is covered by `len`.
        match unsafe { bindings::fdt_check_header(fdt) } {
            // INVARIANT: Checked.
            0 => Ok(Self(fdt)),
            error => Err(FdtError::Format(error)),
        }
    }

    /// Returns an FDT that has been checked before.
    ///
    /// # Safety
    ///
    /// [`Fdt::new`] must have been called on this memory, which must not have changed since.
    pub(crate) unsafe fn checked(fdt: *const c_void) -> Self {
        // INVARIANT: By the caller's contract.
        Self(fdt)
    }

    /// Returns the total size that the header states.
    pub(crate) fn size(&self) -> usize {
        // SAFETY: By the type invariant there is a header.
        let size = unsafe { self.0.cast::<[u8; 4]>().add(1).read_unaligned() };
        u32::from_be_bytes(size) as usize
    }

    fn property(&self, node: FdtNode, name: &[u8]) -> Option<&[u8]> {
        let mut len = 0;
        // SAFETY: By the type invariant this is an FDT, in whose size libfdt stays; `name` ends
        // with a NUL.
        unsafe {
            let value = bindings::fdt_getprop(self.0, node.0, name.as_ptr(), &mut len);
            if value.is_null() {
                return None;
            }
            Some(core::slice::from_raw_parts(
                value.cast(),
                usize::try_from(len).ok()?,
            ))
        }
    }

    /// Checks the root node and returns where it says that the tree is.
    #[link_section = ".init.text"]
    pub(crate) fn memory_map(&self) -> Result<NodeAddr, FdtError> {
        // SAFETY: As in `property()`.
        let error = unsafe {
            bindings::fdt_node_check_compatible(self.0, 0, bindings::KHO_FDT_COMPATIBLE.as_ptr())
        };
        if error != 0 {
            return Err(FdtError::Compatible);
        }
        kho_fdt::memory_map(self.property(FdtNode::ROOT, bindings::KHO_FDT_MEMORY_MAP_PROP_NAME))
    }

    /// Returns the blob of a subtree.
    #[inline(never)]
    pub(crate) fn blob_at(&self, node: FdtNode) -> Result<Blob, FdtError> {
        Blob::from_properties(
            self.property(node, bindings::KHO_SUB_TREE_PROP_NAME),
            self.property(node, bindings::KHO_SUB_TREE_SIZE_PROP_NAME),
        )
    }

    /// Returns the blob of the subtree `name`.
    ///
    /// # Safety
    ///
    /// `name` must point to a string that ends with a NUL.
    pub(crate) unsafe fn blob(&self, name: *const c_char) -> Result<Blob, FdtError> {
        // SAFETY: As in `property()`.
        match unsafe { bindings::fdt_subnode_offset(self.0, 0, name) } {
            node if node >= 0 => self.blob_at(FdtNode(node)),
            _ => Err(FdtError::Absent),
        }
    }

    /// Returns the subtrees.
    pub(crate) fn subtrees(&self) -> impl Iterator<Item = FdtNode> + '_ {
        // SAFETY: As in `property()`.
        let mut next = unsafe { bindings::fdt_first_subnode(self.0, 0) };
        core::iter::from_fn(move || {
            let node = next;
            if node < 0 {
                return None;
            }
            // SAFETY: As in `property()`.
            next = unsafe { bindings::fdt_next_subnode(self.0, node) };
            Some(FdtNode(node))
        })
    }

    /// Returns the name of a subtree, to be printed.
    #[link_section = ".init.text"]
    pub(crate) fn name(&self, node: FdtNode) -> &str {
        let mut len = 0;
        // SAFETY: As in `property()`. A name has the length that libfdt says.
        let name = unsafe {
            let name = bindings::fdt_get_name(self.0, node.0, &mut len);
            if name.is_null() {
                return "?";
            }
            core::slice::from_raw_parts(name.cast::<u8>(), usize::try_from(len).unwrap_or(0))
        };
        core::str::from_utf8(name).unwrap_or("?")
    }

    /// Takes a subtree out, so that nobody finds it any more. What others there are stays where it
    /// is.
    #[link_section = ".init.text"]
    pub(crate) fn take_out(&self, node: FdtNode) {
        // SAFETY: By the type invariant this is an FDT in memory that nobody else has, and libfdt
        // has found the node in it. An error leaves it as it is.
        unsafe { bindings::fdt_nop_node(self.0.cast_mut(), node.0) };
    }
}

/// The root FDT that this kernel hands over: one page, complete at every moment but those of a
/// change.
///
/// # Invariants
///
/// The page holds an FDT that libfdt wrote; only the holder of a `RootFdt` writes it.
pub(crate) struct RootFdt(*mut c_void);

impl RootFdt {
    /// Returns the FDT at `page`, which nobody else has until this is dropped.
    ///
    /// # Safety
    ///
    /// `page` must be the page that [`RootFdt::create`] was called on.
    pub(crate) unsafe fn lock(page: *mut c_void) -> Self {
        // SAFETY: The mutex is a static one, and the caller may sleep.
        unsafe { bindings::kho_glue_lock_fdt() };
        // INVARIANT: By the caller's contract and the lock.
        Self(page)
    }

    /// Writes an FDT without subtrees that names `map`.
    ///
    /// # Safety
    ///
    /// `page` must be a page that nobody else uses.
    pub(crate) unsafe fn create(page: *mut c_void, map: NodeAddr) -> Result<(), FdtError> {
        let map = map.get().to_ne_bytes();
        let name = bindings::KHO_FDT_MEMORY_MAP_PROP_NAME;
        let compatible = bindings::KHO_FDT_COMPATIBLE;
        // SAFETY: The page is writable, `fdt_create()` is told its size, and all that is written
        // is as long as said. After an error the rest does nothing.
        let error = unsafe {
            bindings::fdt_create(page, bindings::PAGE_SIZE as c_int)
                | bindings::fdt_finish_reservemap(page)
                | bindings::fdt_begin_node(page, c"".as_char_ptr())
                | bindings::fdt_property(
                    page,
                    c"compatible".as_char_ptr(),
                    compatible.as_ptr().cast(),
                    compatible.len() as c_int,
                )
                | bindings::fdt_property(
                    page,
                    name.as_ptr(),
                    map.as_ptr().cast(),
                    map.len() as c_int,
                )
                | bindings::fdt_end_node(page)
                | bindings::fdt_finish(page)
        };
        if error != 0 {
            return Err(FdtError::Format(error));
        }
        Ok(())
    }

    /// Returns the FDT for reading.
    pub(crate) fn read(&self) -> Fdt {
        // INVARIANT: By the type invariant.
        Fdt(self.0)
    }

    /// Adds the subtree `name` for `blob`, all of it or nothing.
    ///
    /// # Safety
    ///
    /// `name` must point to a string that ends with a NUL.
    pub(crate) unsafe fn add(&mut self, name: *const c_char, blob: Blob) -> Result<(), FdtError> {
        let set = |node: c_int, name: &[u8], value: u64| {
            let value = value.to_ne_bytes();
            // SAFETY: By the type invariant this is an FDT; `name` ends with a NUL, which is not
            // counted.
            unsafe {
                bindings::fdt_setprop_namelen(
                    self.0,
                    node,
                    name.as_ptr(),
                    name.len().wrapping_sub(1) as c_int,
                    value.as_ptr().cast(),
                    value.len() as c_int,
                )
            }
        };
        // SAFETY: The page is as long as libfdt is told. Removing the node that was added last
        // and packing cannot fail.
        unsafe {
            if bindings::fdt_open_into(self.0, self.0, bindings::PAGE_SIZE as c_int) < 0 {
                return Err(FdtError::Full);
            }
            let node = bindings::fdt_add_subnode(self.0, 0, name);
            let result = if node == -(bindings::FDT_ERR_EXISTS as c_int) {
                Err(FdtError::Exists)
            } else if node < 0 {
                Err(FdtError::Full)
            } else if set(node, bindings::KHO_SUB_TREE_PROP_NAME, blob.phys) < 0
                || set(node, bindings::KHO_SUB_TREE_SIZE_PROP_NAME, blob.size) < 0
            {
                bindings::fdt_del_node(self.0, node);
                Err(FdtError::Full)
            } else {
                Ok(())
            };
            bindings::fdt_pack(self.0);
            result
        }
    }

    /// Removes the subtree whose blob is at `phys`; returns whether there was one.
    pub(crate) fn remove(&mut self, phys: u64) -> bool {
        let fdt = self.read();
        let found = fdt
            .subtrees()
            .find(|node| Blob::is_at(fdt.property(*node, bindings::KHO_SUB_TREE_PROP_NAME), phys));
        let Some(node) = found else { return false };
        // SAFETY: By the type invariant this is an FDT, and libfdt has just found the node in it.
        unsafe {
            bindings::fdt_del_node(self.0, node.0);
            bindings::fdt_pack(self.0);
        }
        true
    }
}

impl Drop for RootFdt {
    fn drop(&mut self) {
        // SAFETY: Locked by `lock()`.
        unsafe { bindings::kho_glue_unlock_fdt() };
    }
}
