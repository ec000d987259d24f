// SPDX-License-Identifier: GPL-2.0

//! Takeover: what the next kernel makes of the tree that it was handed.
//!
//! Nothing of what another kernel left behind is trusted. All of it is read and checked before
//! anything is changed, and before anybody has been told of the handover:
//!
//! ```text
//!  chart()    every node of the tree is in RAM, outside scratch, and met once;
//!             no node stands for memory that does not exist:
//!                 else the handover is refused
//!             every block is in RAM, outside scratch:
//!                 else only that block is lost
//!             one bit for each preserved frame, and whether any two blocks overlap
//!  grains()   which large blocks of memory have any of those frames
//!  coarsen()  fewer and longer runs of them
//! ```
//!
//! A mistake of one kernel, or of one user of it, costs as little as possible. A block that cannot
//! be taken over is a mistake about that block, and its memory is kept from everybody as far as it
//! is there. A broken node says nothing about how the rest came about, so that nothing in such a
//! tree is restored; but what the rest names may still be in use by a device, so that the walk goes
//! on, and what it finds can be kept as well.
//!
//! A node is checked before it is read, and the tree is walked once. How long that takes in a
//! broken tree is bounded: there are only as many leaves to look at as it takes to describe the RAM
//! there is.
//!
//! The chart is a tree of its own whose keys are frame numbers. It costs one page for as much
//! memory as one leaf of order 0 stands for, and makes the rest simple: ranges of several orders
//! need not be merged, for the chart has none; and what is not preserved in some range, however it
//! is fragmented, are the bits that are clear ([`Gaps`]).
//!
//! Each block of the tree is looked at once, in words of 64 where blocks are single pages.

use super::kho_grain::fill;
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
    Step,
    Tree,
    Visitor,
    LEAF_BITS,
    LEAF_SIZE,
    WORD_BITS, //
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
            Self::Node(phys) => ("tree node outside usable memory, or met twice", phys),
            Self::Reach(phys) => ("tree node covers no existing memory", phys),
            Self::Fdt(phys) => ("the FDT is not preserved", phys),
            Self::Reserve(frames, _) => ("memory that cannot be reserved", frames.phys()),
        }
    }
}

/// What takeover needs to know of the machine.
pub(crate) trait Machine {
    /// Returns the number of the frame after the last one of RAM.
    fn ram_end(&self) -> u64;

    /// Returns the frames from `pfn` on that are RAM outside scratch, as many as are known to
    /// follow each other; [`None`] if the first one is not.
    fn room(&self, pfn: u64) -> Option<Frames>;

    /// Returns the first frames from `pfn` on that are RAM, in scratch or not, as many as are known
    /// to follow each other.
    fn ram(&self, pfn: u64) -> Option<Frames>;
}

/// Returns whether all of `frames` is RAM outside scratch, so that it can be taken over.
#[link_section = ".init.text"]
pub(crate) fn is_usable(machine: &dyn Machine, frames: Frames) -> bool {
    let mut room = Frames::EMPTY;
    in_room(machine, &mut room, frames)
}

/// Returns whether all of `frames` is RAM outside scratch. `room` is where that was true last.
#[link_section = ".init.text"]
fn in_room(machine: &dyn Machine, room: &mut Frames, frames: Frames) -> bool {
    let mut at = frames.start();
    while at < frames.end() {
        if !(room.start()..room.end()).contains(&at) {
            match machine.room(at) {
                Some(found) => *room = found,
                None => return false,
            }
        }
        at = room.end();
    }
    true
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

/// What [`chart`] found.
pub(crate) struct Census {
    /// Nodes of the tree.
    pub(crate) nodes: u64,
    /// Blocks that can be taken over, by order.
    blocks: [u64; ORDERS],
    /// Frames in those blocks, each counted once.
    pub(crate) frames: u64,
    /// The first frame that was found to be in more than one block.
    pub(crate) overlap: Option<u64>,
    /// Blocks that cannot be taken over: not all of each is RAM outside scratch.
    pub(crate) lost: u64,
    /// The physical address of the first of them.
    pub(crate) first_lost: u64,
    /// The first thing that is wrong with the tree itself.
    pub(crate) refusal: Option<Refusal>,
}

impl Default for Census {
    #[inline]
    fn default() -> Self {
        Self {
            nodes: 0,
            blocks: [0; ORDERS],
            frames: 0,
            overlap: None,
            lost: 0,
            first_lost: 0,
            refusal: None,
        }
    }
}

impl Census {
    /// Returns the orders that have blocks, and how many.
    pub(crate) fn orders(&self) -> impl Iterator<Item = (Order, u64)> + '_ {
        Order::all()
            .zip(self.blocks.iter().copied())
            .filter(|(_, count)| *count > 0)
    }
}

/// The sets of frames that [`chart`] makes; all must be empty.
pub(crate) struct Sets<'a, S> {
    /// The nodes of the tree.
    pub(crate) nodes: &'a Tree<S>,
    /// What is in blocks that can be taken over.
    pub(crate) held: &'a Tree<S>,
    /// What is RAM in blocks that cannot.
    pub(crate) lost: &'a Tree<S>,
}

/// Checks every node and every preserved block against the machine, and notes their frames. Goes on
/// behind a node that is not sound; if there is one, [`Census::refusal`] says which.
///
/// # Errors
///
/// [`NoMemory`] if the sets could not be made. They say nothing then.
#[link_section = ".init.text"]
pub(crate) fn chart<M: NodeMem, S: NodeMem>(
    tree: &Tree<M>,
    machine: &dyn Machine,
    sets: Sets<'_, S>,
) -> Result<Census, NoMemory> {
    let mut chart = Chart {
        tree,
        machine,
        sets,
        room: Frames::EMPTY,
        census: Census::default(),
        out_of_memory: false,
    };
    tree.visit(&mut chart);
    if chart.out_of_memory {
        return Err(NoMemory);
    }
    Ok(chart.census)
}

struct Chart<'a, M, S> {
    tree: &'a Tree<M>,
    machine: &'a dyn Machine,
    sets: Sets<'a, S>,
    room: Frames,
    census: Census,
    out_of_memory: bool,
}

impl<M: NodeMem, S: NodeMem> Chart<'_, M, S> {
    /// Notes that the tree is not sound.
    #[cold]
    #[link_section = ".init.text"]
    fn refuse(&mut self, refusal: Refusal) {
        self.census.refusal.get_or_insert(refusal);
    }

    /// Checks a node with room for the keys from `first` to `last`, before it is read. Returns
    /// whether it is sound.
    #[link_section = ".init.text"]
    fn meet(&mut self, addr: NodeAddr, first: u64, last: u64) -> Result<bool, NoMemory> {
        let phys = addr.get();
        let node = Frames::exact(phys, 1 << PAGE_SHIFT)
            .filter(|frames| self.machine.room(frames.start()).is_some())
            .map(|frames| Key::of_frame(frames.start()));
        let is_new = match node {
            Some(node) => self.sets.nodes.add(node)?,
            None => false,
        };
        if !is_new {
            self.refuse(Refusal::Node(phys));
            return Ok(false);
        }
        if !reaches_ram(first, last, self.machine.ram_end()) {
            self.refuse(Refusal::Reach(phys));
            return Ok(false);
        }
        self.census.nodes = self.census.nodes.wrapping_add(1);
        Ok(true)
    }

    /// Notes that `count` more blocks of `order` have been seen, and in them `frames` frames that
    /// had not been met before.
    #[link_section = ".init.text"]
    fn count(&mut self, order: Order, count: u64, frames: u64) {
        if let Some(blocks) = self.census.blocks.get_mut(order.get() as usize) {
            *blocks = blocks.wrapping_add(count);
        }
        self.census.frames = self.census.frames.wrapping_add(frames);
    }

    /// Notes a block that cannot be taken over, and what of it is RAM: unless it is more than half
    /// of all there is, which nobody can have preserved, or there is no memory to note it with.
    #[cold]
    #[link_section = ".init.text"]
    fn lose(&mut self, block: Block) {
        if self.census.lost == 0 {
            self.census.first_lost = block.pfn().phys();
        }
        self.census.lost = self.census.lost.wrapping_add(1);
        let mut rest = Frames::of_block(block);
        if rest.count() > self.machine.ram_end() / 2 {
            return;
        }
        while let Some(ram) = self.machine.ram(rest.start()).map(|ram| ram.both(rest)) {
            if ram.count() == 0 || fill(self.sets.lost, ram).is_err() {
                return;
            }
            rest = rest.tail(ram.end().wrapping_sub(rest.start()));
        }
    }

    /// Returns where the first block of `run` starts that lies in a larger one. Those have all
    /// been seen, and so have the nodes on the way to them: keys of larger blocks come first.
    #[link_section = ".init.text"]
    #[inline(never)]
    fn first_claimed(&self, run: Run) -> Option<u64> {
        for i in 0..run.count {
            let block = Key::new(run.first.get().wrapping_add(i))?.block()?;
            if is_claimed(self.tree, &self.census, self.machine, block) {
                return Some(block.pfn().get());
            }
        }
        None
    }

    /// Charts a run of blocks of one order.
    #[link_section = ".init.text"]
    fn run(&mut self, run: Run) -> Result<(), NoMemory> {
        let Some((block, frames)) = run.first.block().zip(Frames::of_run(run)) else {
            self.refuse(Refusal::Reach(run.first.get()));
            return Ok(());
        };
        if !in_room(self.machine, &mut self.room, frames) {
            if run.count > 1 {
                return self.one_by_one(run);
            }
            self.lose(block);
            return Ok(());
        }
        let again = fill(self.sets.held, frames)?;
        if again > 0 && self.census.overlap.is_none() {
            self.census.overlap = self.first_claimed(run);
        }
        let new = frames.count().wrapping_sub(again);
        self.count(block.order(), run.count, new);
        Ok(())
    }

    /// Charts the blocks of a run of which at least one cannot be taken over.
    #[cold]
    #[link_section = ".init.text"]
    fn one_by_one(&mut self, run: Run) -> Result<(), NoMemory> {
        for i in 0..run.count {
            if let Some(first) = Key::new(run.first.get().wrapping_add(i)) {
                self.run(Run { first, count: 1 })?;
            }
        }
        Ok(())
    }

    /// Charts a leaf of blocks that are no larger than a word of the chart. Its first bit is the
    /// block at frame `first`.
    #[link_section = ".init.text"]
    fn small(&mut self, first: u64, order: Order, leaf: &Node) -> Result<(), NoMemory> {
        let held = self.sets.held;
        let mut chart: Option<(u64, &Node)> = None;
        let mut at = 0;
        while let Some((index, mut blocks)) = leaf.next_used(at) {
            at = index.wrapping_add(1);
            // A word of blocks is as many words of the chart as a block has pages.
            let bit = index.wrapping_mul(WORD_BITS);
            let mut pfn = first.wrapping_add(bit.wrapping_shl(order.get()));
            while blocks != 0 {
                let (mut word, mut count) = widen(blocks, order);
                let (start, end) = (self.room.start(), self.room.end());
                if word != 0 && (pfn < start || pfn.wrapping_add(WORD_BITS) > end) {
                    word = self.check(pfn, word, order);
                    count = u64::from(word.count_ones()).wrapping_shr(order.get());
                }
                if word != 0 {
                    let number = pfn / LEAF_SIZE;
                    let to = match chart {
                        Some((last, to)) if last == number => to,
                        _ => held.leaf(Key::of_frame(pfn))?,
                    };
                    chart = Some((number, to));
                    let to = to.word(pfn / WORD_BITS);
                    let old = to.load();
                    to.store(old | word);
                    let again = old & word;
                    if again != 0 {
                        let first = pfn.wrapping_add(again.trailing_zeros().into());
                        self.census.overlap.get_or_insert(first);
                    }
                    self.count(order, count, (word & !old).count_ones().into());
                }
                pfn = pfn.wrapping_add(WORD_BITS);
                let width = u64::BITS.wrapping_shr(order.get());
                blocks = blocks.checked_shr(width).unwrap_or(0);
            }
        }
        Ok(())
    }

    /// Checks the blocks of `order` whose frames are the bits in `word` one by one. Returns the
    /// bits of those that can be taken over.
    #[link_section = ".init.text"]
    #[inline(never)]
    fn check(&mut self, pfn: u64, word: u64, order: Order) -> u64 {
        // OVERFLOW: The order is at most `WORD_ORDER`.
        let ones = u64::MAX.wrapping_shr(WORD_BITS.wrapping_sub(order.pages()) as u32);
        let (mut rest, mut good) = (word, 0u64);
        while rest != 0 {
            let bit = rest.trailing_zeros();
            let bits = ones.wrapping_shl(bit);
            rest &= !bits;
            let first = Pfn::new(pfn.wrapping_add(bit.into()));
            // A key has a frame number, and blocks in a word are aligned as their bits are.
            let Some(block) = first.and_then(|first| Block::new(first, order)) else {
                continue;
            };
            if in_room(self.machine, &mut self.room, Frames::of_block(block)) {
                good |= bits;
            } else {
                self.lose(block);
            }
        }
        good
    }

    #[link_section = ".init.text"]
    fn chart(&mut self, first: u64, leaf: &Node) -> Result<(), NoMemory> {
        // The largest orders share a leaf.
        let shared = first >> LEAF_BITS == 0;
        let block = Key::new(first).and_then(Key::block).filter(|_| !shared);
        if let Some(block) = block.filter(|block| block.order() <= WORD_ORDER) {
            return self.small(block.pfn().get(), block.order(), leaf);
        }
        for (bit, count) in leaf.runs() {
            let (step, times) = if shared { (1, count) } else { (count, 1) };
            for i in 0..times {
                // A leaf has only bits that are keys.
                if let Some(first) = Key::new(first | bit.wrapping_add(i)) {
                    self.run(Run { first, count: step })?;
                }
            }
        }
        Ok(())
    }
}

impl<M: NodeMem, S: NodeMem> Visitor for Chart<'_, M, S> {
    #[link_section = ".init.text"]
    fn node(&mut self, addr: NodeAddr, first: u64, last: u64) -> Step {
        match self.meet(addr, first, last) {
            Ok(true) => Step::In,
            Ok(false) => Step::Over,
            Err(NoMemory) => {
                self.out_of_memory = true;
                Step::Stop
            }
        }
    }

    #[link_section = ".init.text"]
    fn leaf(&mut self, first: u64, leaf: &Node) -> bool {
        self.out_of_memory = self.chart(first, leaf).is_err();
        !self.out_of_memory
    }
}

/// The order of the largest blocks that do not exceed a word of the chart.
const WORD_ORDER: Order = match Order::new(WORD_BITS.ilog2()) {
    Some(order) => order,
    None => Order::ZERO,
};

/// Returns the word of the chart for the lowest bits of `blocks`, each a block of `order`, and how
/// many blocks that are.
#[inline]
fn widen(blocks: u64, order: Order) -> (u64, u64) {
    if order == Order::ZERO {
        return (blocks, blocks.count_ones().into());
    }
    // OVERFLOW: The order is at most `WORD_ORDER`.
    let width = 1u32.wrapping_shl(order.get());
    let mut rest = blocks & u64::MAX.wrapping_shr(u64::BITS.wrapping_sub(u64::BITS / width));
    let block = u64::MAX.wrapping_shr(u64::BITS.wrapping_sub(width));
    let (mut word, mut count) = (0u64, 0u64);
    while rest != 0 {
        word |= block.wrapping_shl(rest.trailing_zeros().wrapping_shl(order.get()));
        count = count.wrapping_add(1);
        rest &= rest.wrapping_sub(1);
    }
    (word, count)
}

/// Returns whether a larger block that can be taken over has the frames of `block`, too.
#[link_section = ".init.text"]
pub(crate) fn is_claimed<M: NodeMem>(
    tree: &Tree<M>,
    census: &Census,
    machine: &dyn Machine,
    block: Block,
) -> bool {
    for (order, _) in census.orders() {
        if order <= block.order() {
            continue;
        }
        let larger = block.enclosing(order);
        if tree.contains(Key::of(larger))
            && (census.lost == 0 || is_usable(machine, Frames::of_block(larger)))
        {
            return true;
        }
    }
    false
}
