// SPDX-License-Identifier: GPL-2.0

//! Takeover: how the next kernel makes the handed-over tree its own.
//!
//! Nothing of what another kernel left behind is trusted. Takeover reads, checks and applies, in
//! that order, and changes nothing before all is checked:
//!
//! ```text
//!  survey()   every node of the tree is in RAM, outside scratch, and met once;
//!             no node stands for memory that does not exist
//!  busy()     which memory holds preserved blocks or the tree itself
//!  check()    the blocks of all orders, merged into ranges: in RAM, outside scratch,
//!             and whether any two overlap
//!  apply()    reserve the ranges, then mark the blocks
//! ```
//!
//! The first two run before the memory map is built, as they tell where it may be allocated; the
//! others right before free memory goes to the page allocator.

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
    Open,
    Run,
    Runs,
    Tree,
    Visitor,
    LEAF_BITS, //
};
use super::kho_range::Frames;

/// Orders that a block in RAM can have: physical addresses have at most 52 bits on every
/// architecture with KHO.
const ORDERS: usize = 41;

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
    /// A range could not be reserved; the kernel's error number.
    Reserve(Frames, i32),
}

impl From<NoMemory> for Refusal {
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

impl Refusal {
    /// Returns what to tell the user, and the physical address it is about; 0 if none.
    pub(crate) const fn what(self) -> (&'static str, u64) {
        match self {
            Self::NoMemory => ("no memory to check it with", 0),
            Self::Node(phys) => ("no tree node can be there", phys),
            Self::Reach(phys) => ("a tree node for memory that does not exist", phys),
            Self::Range(frames) => (
                "preserved memory that is not RAM outside scratch",
                frames.phys(),
            ),
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
pub(crate) fn survey<M: NodeMem, S: NodeMem>(
    tree: &Tree<M>,
    machine: &dyn Machine,
    seen: &Tree<S>,
) -> Result<u64, Refusal> {
    let mut survey = Survey {
        machine,
        seen,
        nodes: 0,
    };
    tree.visit(&mut survey)?;
    Ok(survey.nodes)
}

struct Survey<'a, S> {
    machine: &'a dyn Machine,
    seen: &'a Tree<S>,
    nodes: u64,
}

impl<S: NodeMem> Visitor for Survey<'_, S> {
    type Error = Refusal;

    fn node(&mut self, addr: NodeAddr, first: u64, last: u64) -> Result<(), Refusal> {
        let phys = addr.get();
        let node = Pfn::from_phys(phys)
            .and_then(|pfn| Frames::new(pfn, 1))
            .filter(|frames| self.machine.is_ram(*frames) && !self.machine.in_scratch(*frames))
            .and_then(|frames| Key::new(frames.start()))
            .ok_or(Refusal::Node(phys))?;
        if !self.seen.add(&Open, node)? {
            return Err(Refusal::Node(phys));
        }
        if !reaches_ram(first, last, self.machine.ram_end()) {
            return Err(Refusal::Reach(phys));
        }
        self.nodes = self.nodes.wrapping_add(1);
        Ok(())
    }

    fn leaf(&mut self, _first: u64, _leaf: &Node) -> Result<(), Refusal> {
        Ok(())
    }
}

/// Returns whether any key from `first` to `last` names a block below frame `ram_end`.
fn reaches_ram(first: u64, last: u64, ram_end: u64) -> bool {
    Order::all()
        .take_while(|order| order.pages() <= ram_end)
        .any(|order| {
            let (lowest, _) = Key::bounds(order);
            let blocks = ram_end >> order.get();
            // OVERFLOW: The key of the last block of RAM is one, and so has fewer than 64 bits.
            let highest = lowest.get().wrapping_add(blocks).wrapping_sub(1);
            first <= highest && lowest.get() <= last
        })
}

/// Calls `mark` with ranges that cover all preserved memory and all nodes of a tree that
/// [`survey`] has found sound. The ranges are no finer than `grain`, a power of two of frames: who
/// asks is interested in what lies between them at that scale.
pub(crate) fn busy<M: NodeMem>(
    tree: &Tree<M>,
    grain: Order,
    mark: &mut dyn FnMut(Frames) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    tree.visit(&mut Busy { grain, mark })
}

struct Busy<'a> {
    grain: Order,
    mark: &'a mut dyn FnMut(Frames) -> Result<(), Refusal>,
}

impl Visitor for Busy<'_> {
    type Error = Refusal;

    fn node(&mut self, addr: NodeAddr, _first: u64, _last: u64) -> Result<(), Refusal> {
        let node = Frames::covering(addr.get(), 1).ok_or(Refusal::Node(addr.get()))?;
        (self.mark)(node)
    }

    fn leaf(&mut self, first: u64, leaf: &Node) -> Result<(), Refusal> {
        // Blocks of a small order all lie in the same grain: one bit stands for all of them.
        let order = Key::new(first).and_then(Key::block).map(Block::order);
        let fine = order.is_some_and(|order| order.get() + LEAF_BITS <= self.grain.get());
        for (bit, count) in leaf.runs() {
            let frames = Key::new(first | bit)
                .and_then(|first| Frames::of_run(Run { first, count }))
                .ok_or(Refusal::Reach(first))?;
            (self.mark)(frames)?;
            if fine {
                break;
            }
        }
        Ok(())
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
    /// The first frame that more than one block claims.
    pub(crate) overlap: Option<u64>,
}

/// Checks every preserved range against the machine.
pub(crate) fn check<M: NodeMem>(tree: &Tree<M>, machine: &dyn Machine) -> Result<Census, Refusal> {
    let mut census = Census {
        blocks: [0; ORDERS],
        ranges: 0,
        frames: 0,
        overlap: None,
    };
    for (order, blocks) in Order::all().zip(census.blocks.iter_mut()) {
        for run in tree.runs(order) {
            *blocks = blocks.wrapping_add(run.count);
        }
    }
    let mut union = Union::new(tree, &census.blocks);
    while let Some(range) = union.next() {
        if !machine.is_ram(range) || machine.in_scratch(range) {
            return Err(Refusal::Range(range));
        }
        census.ranges = census.ranges.wrapping_add(1);
        census.frames = census.frames.wrapping_add(range.count());
    }
    census.overlap = union.overlap;
    Ok(census)
}

/// Reserves what [`check`] found and marks every block, or leaves the machine as it was.
///
/// Memory that several blocks claim is reserved like all other, and goes to the largest of them:
/// the others are not marked, so that no frame can be restored twice.
pub(crate) fn apply<M: NodeMem>(
    tree: &Tree<M>,
    machine: &mut dyn Machine,
    census: &Census,
) -> Result<(), Refusal> {
    let mut union = Union::new(tree, &census.blocks);
    let mut done = 0u64;
    while let Some(range) = union.next() {
        if let Err(errno) = machine.reserve(range) {
            let mut union = Union::new(tree, &census.blocks);
            for _ in 0..done {
                if let Some(range) = union.next() {
                    machine.release(range);
                }
            }
            return Err(Refusal::Reserve(range, errno));
        }
        done = done.wrapping_add(1);
    }
    for (order, _) in active(&census.blocks) {
        for run in tree.runs(order) {
            let Some(first) = run.first.block() else {
                continue;
            };
            if census.overlap.is_none() {
                machine.adopt(first, run.count);
                continue;
            }
            for block in (0..run.count)
                .filter_map(|i| Key::new(run.first.get().wrapping_add(i)).and_then(Key::block))
            {
                if !is_claimed(tree, &census.blocks, block) {
                    machine.adopt(block, 1);
                }
            }
        }
    }
    Ok(())
}

/// Returns whether a larger block contains `block`.
fn is_claimed<M: NodeMem>(tree: &Tree<M>, blocks: &[u64; ORDERS], block: Block) -> bool {
    active(blocks)
        .filter(|(order, _)| *order > block.order())
        .any(|(order, _)| tree.contains(Key::of(block.enclosing(order))))
}

/// Returns the orders that have blocks, and how many.
pub(crate) fn active(blocks: &[u64; ORDERS]) -> impl Iterator<Item = (Order, u64)> + '_ {
    Order::all()
        .zip(blocks.iter().copied())
        .filter(|(_, count)| *count > 0)
}

/// The preserved memory of all orders as disjoint ranges, ascending and as long as they can be.
struct Union<'a, M> {
    heads: [Option<Head<'a, M>>; ORDERS],
    overlap: Option<u64>,
}

/// The next run of one order.
struct Head<'a, M> {
    frames: Frames,
    runs: Runs<'a, M>,
}

impl<'a, M: NodeMem> Union<'a, M> {
    fn new(tree: &'a Tree<M>, blocks: &[u64; ORDERS]) -> Self {
        let mut union = Self {
            heads: [const { None }; ORDERS],
            overlap: None,
        };
        for (slot, (order, _)) in union.heads.iter_mut().zip(active(blocks)) {
            let mut runs = tree.runs(order);
            *slot = runs
                .next()
                .and_then(Frames::of_run)
                .map(|frames| Head { frames, runs });
        }
        union
    }

    /// Takes the run that starts first.
    #[inline]
    fn pop(&mut self) -> Option<Frames> {
        let mut first: Option<&mut Option<Head<'a, M>>> = None;
        for slot in self.heads.iter_mut() {
            // The slots that are used come first and are never emptied while others follow.
            let Some(head) = slot else { break };
            let earlier = match &first {
                Some(Some(best)) => head.frames.start() < best.frames.start(),
                _ => true,
            };
            if earlier {
                first = Some(slot);
            }
        }
        let slot = first?;
        let head = slot.as_mut()?;
        let frames = head.frames;
        match head.runs.next().and_then(Frames::of_run) {
            Some(next) => head.frames = next,
            None => {
                *slot = None;
                // Close the gap.
                if let Some(last) = self.heads.iter().rposition(Option::is_some) {
                    if let Some(hole) = self.heads.iter().position(Option::is_none) {
                        if hole < last {
                            self.heads.swap(hole, last);
                        }
                    }
                }
            }
        }
        Some(frames)
    }

    /// Returns the next range.
    #[inline]
    fn next(&mut self) -> Option<Frames> {
        let mut range = self.pop()?;
        loop {
            let next = self.peek();
            let Some(joined) = next.and_then(|next| range.join(next)) else {
                return Some(range);
            };
            if let Some(next) = next.filter(|next| next.overlaps(range)) {
                self.overlap.get_or_insert(next.start());
            }
            range = joined;
            self.pop();
        }
    }

    /// Returns the run that starts first.
    #[inline]
    fn peek(&self) -> Option<Frames> {
        self.heads
            .iter()
            .map_while(|slot| slot.as_ref().map(|head| head.frames))
            .min_by_key(|frames| frames.start())
    }
}
