// SPDX-License-Identifier: GPL-2.0

//! Takeover: how the next kernel makes the handed-over tree its own.
//!
//! Nothing of what another kernel left behind is trusted. Takeover reads, checks and applies, in
//! that order, and changes nothing before all is checked:
//!
//! ```text
//!  survey()   every node of the tree is in RAM, outside scratch, and met once;
//!             no node stands for memory that does not exist
//!  check()    the blocks of all orders, merged into ranges: in RAM, outside scratch,
//!             and whether any two overlap
//!  busy()     which memory holds preserved blocks or the tree itself
//!  apply()    reserve the ranges, then mark the blocks
//! ```
//!
//! All but the last run before the memory map is built: they tell where it may be allocated, and
//! nobody has been told of the handover yet. The last runs right before free memory goes to the
//! page allocator.

use super::kho_key::{
    Block,
    Key,
    Order,
    Pfn, //
};
use super::kho_radix::{
    NoMemory,
    Node,
    NodeAddr,
    NodeMem,
    Run,
    Runs,
    Tree,
    Visitor,
    LEAF_BITS, //
};
use super::kho_range::Frames;
use super::PAGE_SHIFT;

/// Orders that a key can have. RAM has no blocks of the largest, but their keys must be seen to be
/// refused.
const ORDERS: usize = Order::MAX.get() as usize + 1;

/// Why a handover is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// No memory to look at the tree with.
    NoMemory,
    /// A tree node is where none can be, or is reached twice.
    Node(u64),
    /// A tree node stands for memory that does not exist.
    Reach(u64),
    /// Preserved memory that is not RAM of this machine, or lies in scratch.
    Range(Frames),
    /// The root FDT is not preserved itself.
    Fdt(u64),
    /// A range could not be reserved; the kernel's error number.
    Reserve(Frames, i32),
}

impl From<NoMemory> for Refusal {
    #[inline]
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

impl Refusal {
    /// Returns what to tell the user, and the physical address it is about; 0 if none.
    #[inline]
    pub(crate) const fn what(self) -> (&'static str, u64) {
        match self {
            Self::NoMemory => ("no memory to check it with", 0),
            Self::Node(phys) => ("no tree node can be there", phys),
            Self::Reach(phys) => ("a tree node for memory that does not exist", phys),
            Self::Range(frames) => (
                "preserved memory that is not RAM outside scratch",
                frames.phys(),
            ),
            Self::Fdt(phys) => ("the FDT is not preserved", phys),
            Self::Reserve(frames, _) => ("memory that cannot be reserved", frames.phys()),
        }
    }
}

/// What takeover needs to know of the machine, and does to it.
pub(crate) trait Machine {
    /// Returns the number of the frame after the last one of RAM.
    fn ram_end(&self) -> u64;

    /// Returns whether all of `frames` is RAM.
    fn is_ram(&self, frames: Frames) -> bool;

    /// Returns whether any of `frames` is in a scratch area.
    fn in_scratch(&self, frames: Frames) -> bool;

    /// Keeps `frames` from the page allocator; on failure returns the kernel's error number.
    fn reserve(&mut self, frames: Frames) -> Result<(), i32>;

    /// Undoes [`Machine::reserve`].
    fn release(&mut self, frames: Frames);

    /// Makes `count` adjacent blocks from `first` on restorable.
    fn adopt(&mut self, first: Block, count: u64);
}

/// Checks the structure of the tree and returns how many nodes it has. `seen` gets the frames of
/// all nodes.
///
/// How long a walk of a broken tree takes is bounded: there are only as many leaves to look at as
/// it takes to describe the RAM there is.
#[link_section = ".init.text"]
pub(crate) fn survey<M: NodeMem, S: NodeMem>(
    tree: &Tree<M>,
    machine: &dyn Machine,
    seen: &Tree<S>,
) -> Result<u64, Refusal> {
    let mut survey = Survey {
        machine,
        seen,
        nodes: 0,
        refusal: None,
    };
    tree.visit(&mut survey);
    match survey.refusal {
        None => Ok(survey.nodes),
        Some(refusal) => Err(refusal),
    }
}

struct Survey<'a, S> {
    machine: &'a dyn Machine,
    seen: &'a Tree<S>,
    nodes: u64,
    refusal: Option<Refusal>,
}

impl<S: NodeMem> Visitor for Survey<'_, S> {
    #[link_section = ".init.text"]
    fn node(&mut self, addr: NodeAddr, first: u64, last: u64) -> bool {
        let phys = addr.get();
        let node = Frames::exact(phys, 1 << PAGE_SHIFT)
            .filter(|frames| self.machine.is_ram(*frames) && !self.machine.in_scratch(*frames))
            .and_then(|frames| Key::new(frames.start()));
        self.refusal = match node.map(|node| self.seen.add(node)) {
            Some(Err(NoMemory)) => Some(Refusal::NoMemory),
            None | Some(Ok(false)) => Some(Refusal::Node(phys)),
            Some(Ok(true)) if !reaches_ram(first, last, self.machine.ram_end()) => {
                Some(Refusal::Reach(phys))
            }
            Some(Ok(true)) => None,
        };
        self.nodes = self.nodes.wrapping_add(1);
        self.refusal.is_none()
    }

    #[link_section = ".init.text"]
    fn leaf(&mut self, _first: u64, _leaf: &Node) -> bool {
        true
    }
}

/// Returns whether any key from `first` to `last` names a block below frame `ram_end`.
#[link_section = ".init.text"]
fn reaches_ram(first: u64, last: u64, ram_end: u64) -> bool {
    for order in Order::all() {
        let blocks = ram_end.wrapping_shr(order.get());
        if blocks == 0 {
            break;
        }
        let (lowest, _) = Key::bounds(order);
        // OVERFLOW: The key of the last block of RAM is one, and so has fewer than 64 bits.
        let highest = lowest.get().wrapping_add(blocks).wrapping_sub(1);
        if first <= highest && lowest.get() <= last {
            return true;
        }
    }
    false
}

/// Notes in `blocks` which blocks of order `grain` hold any preserved memory or a node of the
/// tree; each as its number in memory.
///
/// [`survey`] must have found the tree sound, and [`check`] what it holds: a block as large as the
/// address space would take for ever here.
#[link_section = ".init.text"]
pub(crate) fn busy<M: NodeMem, S: NodeMem>(
    tree: &Tree<M>,
    grain: Order,
    blocks: &Tree<S>,
) -> Result<(), Refusal> {
    let mut busy = Busy {
        grain,
        blocks,
        refusal: None,
    };
    tree.visit(&mut busy);
    busy.refusal.map_or(Ok(()), Err)
}

struct Busy<'a, S> {
    grain: Order,
    blocks: &'a Tree<S>,
    refusal: Option<Refusal>,
}

impl<S: NodeMem> Busy<'_, S> {
    #[link_section = ".init.text"]
    fn mark(&mut self, frames: Option<Frames>, at: u64) -> bool {
        let Some(frames) = frames else {
            self.refusal = Some(Refusal::Reach(at));
            return false;
        };
        let grain = self.grain.get();
        let mut block = frames.start().wrapping_shr(grain);
        while block <= frames.end().wrapping_sub(1).wrapping_shr(grain) {
            // A frame number, shifted to the right, is always a key.
            if Key::new(block).is_some_and(|key| self.blocks.add(key).is_err()) {
                self.refusal = Some(Refusal::NoMemory);
                return false;
            }
            block = block.wrapping_add(1);
        }
        true
    }
}

impl<S: NodeMem> Visitor for Busy<'_, S> {
    #[link_section = ".init.text"]
    fn node(&mut self, addr: NodeAddr, _first: u64, _last: u64) -> bool {
        self.mark(Frames::covering(addr.get(), 1), addr.get())
    }

    #[link_section = ".init.text"]
    fn leaf(&mut self, first: u64, leaf: &Node) -> bool {
        // Blocks of a small order all lie in the same grain: one bit stands for all of them.
        let order = Key::new(first).and_then(Key::block).map(Block::order);
        let fine =
            order.is_some_and(|order| order.get().wrapping_add(LEAF_BITS) <= self.grain.get());
        for (bit, count) in leaf.runs() {
            let frames =
                Key::new(first | bit).and_then(|first| Frames::of_run(Run { first, count }));
            if !self.mark(frames, first) {
                return false;
            }
            if fine {
                break;
            }
        }
        true
    }
}

/// What [`check`] found.
pub(crate) struct Census {
    /// Blocks, by order.
    pub(crate) blocks: [u64; ORDERS],
    /// Ranges of adjacent preserved memory.
    pub(crate) ranges: u64,
    /// Frames in those ranges.
    pub(crate) frames: u64,
    /// The first frame that was found to be in more than one block.
    pub(crate) overlap: Option<u64>,
}

impl Census {
    /// Returns the orders that have blocks, and how many.
    pub(crate) fn orders(&self) -> impl Iterator<Item = (Order, u64)> + '_ {
        Order::all()
            .zip(self.blocks.iter().copied())
            .filter(|(_, count)| *count > 0)
    }
}

/// Checks every preserved range against the machine.
#[link_section = ".init.text"]
pub(crate) fn check<M: NodeMem>(tree: &Tree<M>, machine: &dyn Machine) -> Result<Census, Refusal> {
    let mut union = Union::new(tree);
    let mut ranges = 0u64;
    let mut frames = 0u64;
    while let Some(range) = union.next() {
        if !machine.is_ram(range) || machine.in_scratch(range) {
            return Err(Refusal::Range(range));
        }
        ranges = ranges.wrapping_add(1);
        frames = frames.wrapping_add(range.count());
    }
    Ok(Census {
        blocks: union.blocks,
        ranges,
        frames,
        overlap: union.overlap,
    })
}

/// Returns whether any block of the tree holds the frame.
#[link_section = ".init.text"]
pub(crate) fn holds<M: NodeMem>(tree: &Tree<M>, pfn: Pfn) -> bool {
    let Some(page) = Block::new(pfn, Order::ZERO) else {
        return false;
    };
    for order in Order::all() {
        if tree.contains(Key::of(page.enclosing(order))) {
            return true;
        }
    }
    false
}

/// Reserves what [`check`] found and marks every block, or leaves the machine as it was.
///
/// Memory that several blocks claim is reserved like all other, and goes to the largest of them:
/// the others are not marked, so that no frame can be restored twice.
#[link_section = ".init.text"]
pub(crate) fn apply<M: NodeMem>(
    tree: &Tree<M>,
    machine: &mut dyn Machine,
    census: &Census,
) -> Result<(), Refusal> {
    let mut union = Union::new(tree);
    let mut done = 0u64;
    while let Some(range) = union.next() {
        if let Err(errno) = machine.reserve(range) {
            let mut union = Union::new(tree);
            while let Some(range) = union.next().filter(|_| done > 0) {
                machine.release(range);
                done = done.wrapping_sub(1);
            }
            return Err(Refusal::Reserve(range, errno));
        }
        done = done.wrapping_add(1);
    }
    for (order, _) in census.orders() {
        for run in tree.runs(order) {
            adopt(tree, machine, census, run);
        }
    }
    Ok(())
}

/// Marks the blocks of a run, but those in a larger block.
#[link_section = ".init.text"]
fn adopt<M: NodeMem>(tree: &Tree<M>, machine: &mut dyn Machine, census: &Census, run: Run) {
    let Some(first) = run.first.block() else {
        return;
    };
    if census.overlap.is_none() {
        machine.adopt(first, run.count);
        return;
    }
    for i in 0..run.count {
        let Some(block) = Key::new(run.first.get().wrapping_add(i)).and_then(Key::block) else {
            return;
        };
        let claimed = census.orders().any(|(order, _)| {
            order > block.order() && tree.contains(Key::of(block.enclosing(order)))
        });
        if !claimed {
            machine.adopt(block, 1);
        }
    }
}

/// The next run of one order.
struct Head<'a, M> {
    frames: Frames,
    order: Order,
    runs: Runs<'a, M>,
}

/// The preserved memory of all orders as disjoint ranges, ascending and as long as they can be.
struct Union<'a, M> {
    /// The orders that have runs left come first.
    heads: [Option<Head<'a, M>>; ORDERS],
    /// Blocks that were seen, by order.
    blocks: [u64; ORDERS],
    overlap: Option<u64>,
}

impl<'a, M: NodeMem> Union<'a, M> {
    #[link_section = ".init.text"]
    #[inline(never)]
    fn new(tree: &'a Tree<M>) -> Self {
        let mut union = Self {
            heads: [const { None }; ORDERS],
            blocks: [0; ORDERS],
            overlap: None,
        };
        let mut heads = union.heads.iter_mut();
        for order in Order::all().take(ORDERS) {
            let mut runs = tree.runs(order);
            if let Some(frames) = advance(&mut runs, order, &mut union.blocks) {
                if let Some(head) = heads.next() {
                    *head = Some(Head {
                        frames,
                        order,
                        runs,
                    });
                }
            }
        }
        union
    }

    /// Returns the next range.
    #[link_section = ".init.text"]
    #[inline(never)]
    fn next(&mut self) -> Option<Frames> {
        let mut range: Option<Frames> = None;
        loop {
            // The run that starts first. There are as many as there are orders in use.
            let mut first: Option<&mut Option<Head<'a, M>>> = None;
            let mut start = u64::MAX;
            for slot in self.heads.iter_mut() {
                let Some(head) = slot else { break };
                if head.frames.start() < start {
                    start = head.frames.start();
                    first = Some(slot);
                }
            }
            let Some(slot) = first else { return range };
            let Some(head) = slot else { return range };
            range = match range {
                None => Some(head.frames),
                Some(range) => {
                    let Some(joined) = range.join(head.frames) else {
                        return Some(range);
                    };
                    if range.overlaps(head.frames) {
                        self.overlap.get_or_insert(start);
                    }
                    Some(joined)
                }
            };
            match advance(&mut head.runs, head.order, &mut self.blocks) {
                Some(frames) => head.frames = frames,
                None => {
                    *slot = None;
                    self.close_gap();
                }
            }
        }
    }

    /// Moves the last head to the slot that has become free.
    #[link_section = ".init.text"]
    fn close_gap(&mut self) {
        let free = self.heads.iter().position(Option::is_none);
        let last = self.heads.iter().rposition(Option::is_some);
        if let (Some(free), Some(last)) = (free, last) {
            if free < last {
                let head = self.heads.get_mut(last).and_then(Option::take);
                if let Some(slot) = self.heads.get_mut(free) {
                    *slot = head;
                }
            }
        }
    }
}

/// Takes the next run and counts its blocks.
#[inline]
fn advance<M: NodeMem>(
    runs: &mut Runs<'_, M>,
    order: Order,
    blocks: &mut [u64; ORDERS],
) -> Option<Frames> {
    let run = runs.next()?;
    if let Some(count) = blocks.get_mut(order.get() as usize) {
        *count = count.wrapping_add(run.count);
    }
    Frames::of_run(run)
}
