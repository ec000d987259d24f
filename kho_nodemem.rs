// SPDX-License-Identifier: GPL-2.0

//! Memory for tree nodes: pages of the direct map, the generations that nodes belong to, and
//! pruning.
//!
//! A tree is read and changed under a [`TreeGuard`], by any number of CPUs. Only [`prune`] takes
//! nodes away, and does so while no CPU has a guard:
//!
//! ```text
//!  generation   even            odd                              even
//!  enter()      guard           waits for the prune mutex        guard
//!  prune()      +1, wait for an RCU grace period: all guards are gone, free nodes, +1
//! ```
//!
//! Lock order: the prune mutex is taken with no other lock of this crate held, and none is taken
//! under it.

use super::kho_memblock::{
    BootCell,
    Memblock, //
};
use super::kho_mm;
#[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
use super::kho_radix::Visitor;
use super::kho_radix::{
    Guard,
    Hints,
    Node,
    NodeAddr,
    NodeMem,
    Tree, //
};
use core::{
    mem::size_of,
    ptr::NonNull,
    sync::atomic::{
        AtomicBool,
        AtomicU64,
        Ordering, //
    },
};
use kernel::{
    bindings,
    prelude::*,
    sync::global_lock, //
};

/// The generation of tree nodes, for [`Hints`]; odd while a tree is being pruned.
///
/// A CPU in a tree has preemption disabled and has seen an even number. That is a read-side section
/// for RCU. So once a grace period has passed since the number became odd, the pruner is alone.
/// Callers that come meanwhile wait for the prune mutex.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// Permission to look at the nodes of trees: preemption is disabled until this is dropped.
///
/// # Invariants
///
/// `hints` points to this CPU's. `generation` is even.
pub(crate) struct TreeGuard {
    hints: NonNull<Hints>,
    generation: u64,
}

impl Guard for TreeGuard {
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

impl Drop for TreeGuard {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: Entered when this was made.
        unsafe { bindings::kho_glue_leave() };
    }
}

// C reserves memory for them, see `kho_glue_enter()`.
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
    /// long as the tree is used: either this kernel made the tree, or `kho_check::check_tree()` is
    /// about to look at it or has found it sound.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self {
            offset: kho_mm::direct_map(),
        }
    }
}

impl NodeMem for Direct {
    type Guard<'a> = TreeGuard;

    #[inline(always)]
    fn enter(&self) -> TreeGuard {
        loop {
            // SAFETY: Callers of `enter()` may sleep. Left below, or when the guard is dropped.
            let hints = unsafe { bindings::kho_glue_enter() };
            // A CPU that sees the end of a prune also sees what it took out of the tree.
            let generation = GENERATION.load(Ordering::Acquire);
            if generation & 1 == 0 {
                // INVARIANT: They are this CPU's hints, and the number is even.
                return TreeGuard {
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

    fn new_generation(&self) {
        // A tree that uses these nodes again gets them after they were freed.
        GENERATION.fetch_add(2, Ordering::Relaxed);
    }

    // The page allocator is there, or memblock is, which is gone later; as `__ref` in C.
    #[link_section = ".ref.text"]
    #[inline(never)]
    fn alloc(&self) -> Option<NodeAddr> {
        // SAFETY: May be called at any time.
        if !unsafe { bindings::slab_is_available() } {
            // SAFETY: Without a slab allocator the kernel boots, on one CPU.
            return alloc_early(unsafe { Memblock::get() });
        }
        NodeAddr::new(kho_mm::alloc_page()?)
    }

    #[link_section = ".ref.text"]
    #[inline(never)]
    fn free(&self, node: NodeAddr) {
        if BUDDY_IS_UP.load(Ordering::Relaxed) {
            // SAFETY: The page came from `alloc()`, and by its contract nobody uses it.
            unsafe { bindings::kho_glue_free_page(node.get()) };
        } else {
            // SAFETY: Without a page allocator the kernel boots, on one CPU.
            unsafe { Memblock::get() }.free(node.get(), bindings::PAGE_SIZE as u64);
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
#[link_section = ".init.data"]
static POOL: BootCell<(u64, u64)> = BootCell::new((0, 0));

/// How many pages are taken from memblock at once.
const POOL_PAGES: u64 = 16;

/// Allocates a node from memblock.
#[link_section = ".init.text"]
fn alloc_early(memblock: Memblock) -> Option<NodeAddr> {
    const PAGE: u64 = bindings::PAGE_SIZE as u64;
    let (mut next, mut end) = POOL.get(memblock);
    if next == end {
        let mut size = PAGE.saturating_mul(POOL_PAGES);
        let mut virt = memblock.alloc_untracked(size);
        if virt.is_none() {
            size = PAGE;
            virt = memblock.alloc_untracked(size);
        }
        next = kho_mm::phys(virt?.as_ptr());
        end = next.saturating_add(size);
    }
    POOL.set(memblock, (next.saturating_add(PAGE), end));
    let words = kho_mm::virt::<u64>(next);
    for at in (0..bindings::PAGE_SIZE / size_of::<u64>()).step_by(8) {
        // SAFETY: The page has that many words, and is nobody's. Volatile, or this would be a call
        // of `memset()`, which may work byte by byte; eight at a time, or it takes twice as long.
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
    }
    NodeAddr::new(next)
}

/// Frees what no node was made of.
#[link_section = ".init.text"]
pub(crate) fn drain_pool(memblock: Memblock) {
    let (next, end) = POOL.replace(memblock, (0, 0));
    // SAFETY: Only nodes of this kernel's are freed.
    let direct = unsafe { Direct::new() };
    (next..end)
        .step_by(bindings::PAGE_SIZE)
        .filter_map(NodeAddr::new)
        .for_each(|node| direct.free(node));
}

global_lock! {
    // SAFETY: `kho_kexec::init()` initialises it before it makes the outgoing tree. No other tree
    // is pruned or visited, but in KUnit, which comes later; and nobody waits unless one is pruned.
    /// Held while a tree is pruned or visited.
    pub(crate) unsafe(uninit) static KHO_PRUNE_MUTEX: Mutex<()> = ();
}

#[cold]
#[inline(never)]
fn wait_for_prune() {
    drop(KHO_PRUNE_MUTEX.lock());
}

/// Whether a prune is to come. If it is just beginning, it may miss what became empty right now;
/// the next one does not.
static PRUNE_IS_DUE: AtomicBool = AtomicBool::new(false);

/// Prunes `tree`, which this kernel made, while nobody else is in it; unless all of it is in use.
pub(crate) fn prune(tree: &Tree<Direct>) {
    PRUNE_IS_DUE.store(false, Ordering::Relaxed);
    let _lock = KHO_PRUNE_MUTEX.lock();
    if tree.has_empty() {
        GENERATION.fetch_add(1, Ordering::Relaxed);
        // SAFETY: A work item may sleep, and holds no guard.
        unsafe { bindings::synchronize_rcu() };
        tree.prune();
        GENERATION.fetch_add(1, Ordering::Release);
    }
}

/// Shows all of `tree`, which this kernel made, to `visitor`, while it is not pruned.
#[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
pub(crate) fn visit(tree: &Tree<Direct>, visitor: &mut dyn Visitor) {
    let _lock = KHO_PRUNE_MUTEX.lock();
    tree.visit(visitor);
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
