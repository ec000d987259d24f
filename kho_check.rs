// SPDX-License-Identifier: GPL-2.0

//! Whether the tree that another kernel handed over is sound, and which memory it names.
//!
//! Nothing of what another kernel left behind is trusted. [`check_tree`] reads all of it, each node
//! once and after its address was checked, before anything is changed and before anybody can ask
//! about the handover:
//!
//! ```text
//!  a node     in RAM, outside scratch, met once, for memory that exists   else: refused
//!  a block    in RAM, outside scratch                                     else: the block is lost
//! ```
//!
//! A mistake of one kernel, or of one user of it, costs as little as possible. A block that cannot
//! be taken over is a mistake about that block, and its memory is kept from everybody as far as it
//! is there. A broken node says nothing about how the rest came about, so that nothing in such a
//! tree is restored; but a device may still be using what the rest names, so that the walk goes on,
//! and what it finds can be kept as well.
//!
//! How long that takes in a broken tree is bounded: a tree has only as many leaves to look at as it
//! takes to describe the RAM there is.
//!
//! The result is sets of frames, see [`kho_grain`](super::kho_grain). They make the rest simple:
//! ranges of several orders need not be merged, for a set has none; and what is not preserved in
//! some range, however it is fragmented, are the bits that are clear.

use super::kho_grain::add_frames;
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
use super::kho_word::{
    bits,
    bits_between, //
};
use super::PAGE_SHIFT;

/// Orders that a key can have. RAM has no blocks of the largest, but their keys must be seen to be
/// refused.
const ORDERS: usize = Order::MAX.get() as usize + 1;

/// Why a handover is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// No memory to check the tree with.
    NoMemory,
    /// A tree node is where none can be, or is reached twice.
    Node(u64),
    /// A tree node is for memory that does not exist.
    Reach(u64),
    /// The root FDT is not preserved itself.
    Fdt(u64),
    /// A range could not be reserved.
    Reserve(Frames),
}

impl From<NoMemory> for Refusal {
    #[inline]
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

impl Refusal {
    /// Returns the reason as the log has it, and the physical address it is about; 0 if none.
    #[inline]
    pub(crate) const fn what(self) -> (&'static str, u64) {
        match self {
            Self::NoMemory => ("no memory to check it with", 0),
            Self::Node(phys) => ("tree node outside usable memory, or met twice", phys),
            Self::Reach(phys) => ("tree node covers no existing memory", phys),
            Self::Fdt(phys) => ("the FDT is not preserved", phys),
            Self::Reserve(frames) => ("memory that cannot be reserved", frames.phys()),
        }
    }
}

/// What a check needs to know of the machine. *Usable* is RAM outside scratch.
pub(crate) trait Machine {
    /// Returns the number of the frame after the last one of RAM.
    fn ram_end(&self) -> u64;

    /// Returns the frames from `pfn` on that are usable, as many as are known to follow each other;
    /// [`None`] if the first one is not.
    fn usable(&self, pfn: u64) -> Option<Frames>;

    /// Returns the first frames from `pfn` on that are RAM, in scratch or not, as many as are known
    /// to follow each other.
    fn ram(&self, pfn: u64) -> Option<Frames>;
}

/// Returns whether all of `frames` is usable, so that it can be taken over.
#[link_section = ".init.text"]
pub(crate) fn is_usable(machine: &dyn Machine, frames: Frames) -> bool {
    let mut known = Frames::EMPTY;
    is_usable_by(machine, &mut known, frames)
}

/// As [`is_usable`]. `known` are frames that were found to be usable last.
#[link_section = ".init.text"]
fn is_usable_by(machine: &dyn Machine, known: &mut Frames, frames: Frames) -> bool {
    let mut rest = frames;
    while !rest.is_empty() {
        if !(known.start()..known.end()).contains(&rest.start()) {
            match machine.usable(rest.start()) {
                Some(found) => *known = found,
                None => return false,
            }
        }
        rest = rest.from(known.end());
    }
    true
}

/// Returns whether any key from `first` to `last` names a block below frame `ram_end`.
#[link_section = ".init.text"]
pub(crate) fn reaches_ram(first: u64, last: u64, ram_end: u64) -> bool {
    for order in Order::all() {
        let Some((lowest, highest)) = Frames::between(0, ram_end & !order.mask()).keys(order)
        else {
            break;
        };
        if first <= highest.get() && lowest.get() <= last {
            return true;
        }
    }
    false
}

/// What [`check_tree`] has found.
pub(crate) struct Stats {
    /// Nodes of the tree.
    pub(crate) nodes: u64,
    /// Blocks that can be taken over, by order.
    blocks: [u64; ORDERS],
    /// Orders that have any, a bit each.
    orders: u64,
    /// Frames in those blocks, each counted once.
    pub(crate) frames: u64,
    /// The first frame that was found to be in more than one block; in a tree that is not sound,
    /// perhaps not the first.
    pub(crate) overlap: Option<u64>,
    /// Blocks that cannot be taken over: not all of each is usable.
    pub(crate) lost: u64,
    /// The physical address of the first of them.
    pub(crate) first_lost: u64,
    /// The first thing that is wrong with the tree itself.
    pub(crate) refusal: Option<Refusal>,
}

impl Default for Stats {
    #[inline]
    fn default() -> Self {
        Self {
            nodes: 0,
            blocks: [0; ORDERS],
            orders: 0,
            frames: 0,
            overlap: None,
            lost: 0,
            first_lost: 0,
            refusal: None,
        }
    }
}

impl Stats {
    /// Returns the orders that have blocks, the largest first.
    pub(crate) fn orders_down(&self) -> impl Iterator<Item = Order> {
        let mut rest = self.orders;
        core::iter::from_fn(move || {
            let order = Order::new(rest.checked_ilog2()?)?;
            rest ^= 1u64.wrapping_shl(order.get());
            Some(order)
        })
    }

    /// Returns the orders that have blocks, and how many.
    pub(crate) fn orders(&self) -> impl Iterator<Item = (Order, u64)> + '_ {
        Order::all()
            .zip(self.blocks.iter().copied())
            .filter(|(_, count)| *count > 0)
    }
}

/// The sets of frames that [`check_tree`] fills.
pub(crate) struct Sets<S> {
    /// The nodes of the tree.
    pub(crate) nodes: Tree<S>,
    /// Frames of blocks that can be taken over.
    pub(crate) reserved: Tree<S>,
    /// Frames that are RAM, of blocks that cannot.
    pub(crate) lost: Tree<S>,
}

impl<S: NodeMem> Sets<S> {
    /// Makes empty sets in `mem`.
    #[link_section = ".init.text"]
    pub(crate) fn new(mem: S) -> Result<Self, NoMemory> {
        Ok(Self {
            nodes: Tree::new(mem)?,
            reserved: Tree::new(mem)?,
            lost: Tree::new(mem)?,
        })
    }

    /// Frees the sets.
    #[link_section = ".init.text"]
    pub(crate) fn destroy(self) {
        self.nodes.destroy();
        self.reserved.destroy();
        self.lost.destroy();
    }
}

/// Checks every node and every preserved block against the machine, and notes their frames. Goes on
/// behind a node that is not sound; if there is one, [`Stats::refusal`] says which.
///
/// # Errors
///
/// [`NoMemory`] if the sets could not be made. They say nothing then.
#[link_section = ".init.text"]
pub(crate) fn check_tree<M: NodeMem, S: NodeMem>(
    tree: &Tree<M>,
    machine: &dyn Machine,
    sets: &Sets<S>,
) -> Result<Stats, NoMemory> {
    let mut check = Check {
        tree,
        machine,
        sets,
        usable: Frames::EMPTY,
        stats: Stats::default(),
        out_of_memory: false,
    };
    tree.visit(&mut check);
    if check.out_of_memory {
        return Err(NoMemory);
    }
    Ok(check.stats)
}

struct Check<'a, M, S> {
    tree: &'a Tree<M>,
    machine: &'a dyn Machine,
    sets: &'a Sets<S>,
    /// Frames that were found to be usable last.
    usable: Frames,
    stats: Stats,
    out_of_memory: bool,
}

impl<M: NodeMem, S: NodeMem> Check<'_, M, S> {
    /// Notes that the tree is not sound.
    #[cold]
    #[link_section = ".init.text"]
    fn refuse(&mut self, refusal: Refusal) {
        self.stats.refusal.get_or_insert(refusal);
    }

    /// Checks a node for the keys from `first` to `last`, before it is read. Returns whether it is
    /// sound.
    #[link_section = ".init.text"]
    fn check_node(&mut self, addr: NodeAddr, first: u64, last: u64) -> Result<bool, NoMemory> {
        let phys = addr.get();
        let node = Frames::exact(phys, 1 << PAGE_SHIFT)
            .filter(|frames| self.machine.usable(frames.start()).is_some())
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
        self.stats.nodes = self.stats.nodes.saturating_add(1);
        Ok(true)
    }

    /// Notes that `count` more blocks of `order` have been seen, and in them `frames` frames that
    /// had not been seen before.
    #[link_section = ".init.text"]
    fn count(&mut self, order: Order, count: u64, frames: u64) {
        if let Some(blocks) = self.stats.blocks.get_mut(order.get() as usize) {
            *blocks = blocks.saturating_add(count);
        }
        self.stats.orders |= 1u64.wrapping_shl(order.get());
        self.stats.frames = self.stats.frames.saturating_add(frames);
    }

    /// Notes a block that cannot be taken over, and what of it is RAM: unless it is more than half
    /// of all there is, which nobody can have preserved, or there is no memory to note it with.
    #[cold]
    #[link_section = ".init.text"]
    fn lose(&mut self, block: Block) {
        if self.stats.lost == 0 {
            self.stats.first_lost = block.pfn().phys();
        }
        self.stats.lost = self.stats.lost.saturating_add(1);
        let mut rest = Frames::of_block(block);
        if rest.count() > self.machine.ram_end() / 2 {
            return;
        }
        while let Some(ram) = self.machine.ram(rest.start()).map(|ram| ram.both(rest)) {
            if ram.is_empty() || add_frames(&self.sets.lost, ram).is_err() {
                return;
            }
            rest = rest.from(ram.end());
        }
    }

    /// Returns where the first block of `run` starts that lies in a larger one. Those have all been
    /// seen, and so have the nodes on the way to them: keys of larger blocks come first. All of
    /// those must be sound.
    #[link_section = ".init.text"]
    #[inline(never)]
    fn first_claimed(&self, run: Run) -> Option<u64> {
        for block in run.keys().filter_map(Key::block) {
            if larger_block(self.tree, &self.stats, self.machine, block).is_some() {
                return Some(block.pfn().get());
            }
        }
        None
    }

    /// Checks a run of blocks of one order.
    #[link_section = ".init.text"]
    fn check_run(&mut self, run: Run) -> Result<(), NoMemory> {
        let Some((block, frames)) = run.first.block().zip(Frames::of_run(run)) else {
            self.refuse(Refusal::Reach(run.first.get()));
            return Ok(());
        };
        if !is_usable_by(self.machine, &mut self.usable, frames) {
            if run.count > 1 {
                return self.check_each(run);
            }
            self.lose(block);
            return Ok(());
        }
        let again = add_frames(&self.sets.reserved, frames)?;
        // The way to a key may lead through a node that is not sound, and was not entered.
        let is_sound = self.stats.refusal.is_none();
        if again > 0 && is_sound && self.stats.overlap.is_none() {
            self.stats.overlap = self.first_claimed(run);
        }
        self.count(
            block.order(),
            run.count,
            frames.count().saturating_sub(again),
        );
        Ok(())
    }

    /// Checks the blocks of a run of which at least one cannot be taken over.
    #[cold]
    #[link_section = ".init.text"]
    fn check_each(&mut self, run: Run) -> Result<(), NoMemory> {
        for first in run.keys() {
            self.check_run(Run { first, count: 1 })?;
        }
        Ok(())
    }

    /// Checks a leaf of blocks that are no larger than a word of a set, 64 blocks at a time. Its
    /// first bit is the block at frame `first`.
    ///
    /// This is what takes the time when many single pages are handed over, so that it knows three
    /// things of the last word: that memory around it is usable, which leaf of the set is there,
    /// and that most words of the set were 0.
    #[link_section = ".init.text"]
    fn check_small(&mut self, first: u64, order: Order, leaf: &Node) -> Result<(), NoMemory> {
        let reserved = &self.sets.reserved;
        let mut to: Option<(u64, &Node)> = None;
        let mut at = 0;
        while let Some((index, mut blocks)) = leaf.next_used(at) {
            at = index.saturating_add(1);
            let bit = index.saturating_mul(WORD_BITS);
            let mut pfn = first.saturating_add(bit.wrapping_shl(order.get()));
            // A word of blocks is as many words of the set as a block has pages.
            while blocks != 0 {
                let (mut word, mut count) = widen(blocks, order);
                let end = pfn.saturating_add(WORD_BITS);
                if word != 0 && (pfn < self.usable.start() || end > self.usable.end()) {
                    word = self.check_word(pfn, word, order);
                    count = u64::from(word.count_ones()).wrapping_shr(order.get());
                }
                if word != 0 {
                    let number = pfn / LEAF_SIZE;
                    let leaf = match to {
                        Some((last, leaf)) if last == number => leaf,
                        _ => reserved.leaf(Key::of_frame(pfn))?,
                    };
                    to = Some((number, leaf));
                    let to = leaf.word(pfn / WORD_BITS);
                    let old = to.load();
                    to.store(old | word);
                    if let Some(again) = bits(old & word).next() {
                        self.stats.overlap.get_or_insert(pfn | again);
                    }
                    self.count(order, count, (word & !old).count_ones().into());
                }
                pfn = end;
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
    fn check_word(&mut self, pfn: u64, word: u64, order: Order) -> u64 {
        let mut good = 0;
        for bit in bits(word).filter(|bit| bit & order.mask() == 0) {
            let first = Pfn::new(pfn | bit);
            // A key has a frame number, and blocks in a word are aligned as their bits are.
            let Some(block) = first.and_then(|first| Block::new(first, order)) else {
                continue;
            };
            if is_usable_by(self.machine, &mut self.usable, Frames::of_block(block)) {
                good |= bits_between(bit, bit.saturating_add(order.pages()));
            } else {
                self.lose(block);
            }
        }
        good
    }

    #[link_section = ".init.text"]
    fn check_leaf(&mut self, first: u64, leaf: &Node) -> Result<(), NoMemory> {
        // The largest orders share a leaf.
        let is_shared = first >> LEAF_BITS == 0;
        let block = Key::new(first).and_then(Key::block).filter(|_| !is_shared);
        if let Some(block) = block.filter(|block| block.order() <= WORD_ORDER) {
            return self.check_small(block.pfn().get(), block.order(), leaf);
        }
        for (bit, count) in leaf.runs() {
            // A leaf has only bits that are keys.
            let Some(key) = Key::new(first | bit) else {
                continue;
            };
            let run = Run { first: key, count };
            match is_shared {
                true => self.check_each(run)?,
                false => self.check_run(run)?,
            }
        }
        Ok(())
    }
}

impl<M: NodeMem, S: NodeMem> Visitor for Check<'_, M, S> {
    #[link_section = ".init.text"]
    fn node(&mut self, addr: NodeAddr, first: u64, last: u64) -> Step {
        match self.check_node(addr, first, last) {
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
        self.out_of_memory = self.check_leaf(first, leaf).is_err();
        !self.out_of_memory
    }
}

/// The order of the largest blocks that do not exceed a word of a set.
const WORD_ORDER: Order = match Order::new(WORD_BITS.ilog2()) {
    Some(order) => order,
    None => Order::ZERO,
};

/// Returns the word of a set for the lowest bits of `blocks`, each a block of `order`, which is at
/// most [`WORD_ORDER`], and how many blocks that are.
#[inline]
fn widen(blocks: u64, order: Order) -> (u64, u64) {
    if order == Order::ZERO {
        return (blocks, blocks.count_ones().into());
    }
    let lowest = blocks & bits_between(0, WORD_BITS.wrapping_shr(order.get()));
    let block = bits_between(0, order.pages());
    let word = bits(lowest).fold(0, |word, bit| {
        word | block.wrapping_shl(bit.wrapping_shl(order.get()) as u32)
    });
    (word, lowest.count_ones().into())
}

/// Returns the largest block that can be taken over and has the frames of `block` and others, too.
#[link_section = ".init.text"]
pub(crate) fn larger_block<M: NodeMem>(
    tree: &Tree<M>,
    stats: &Stats,
    machine: &dyn Machine,
    block: Block,
) -> Option<Block> {
    for order in stats.orders_down() {
        if order <= block.order() {
            break;
        }
        let larger = block.enclosing(order);
        if tree.contains(Key::of(larger))
            && (stats.lost == 0 || is_usable(machine, Frames::of_block(larger)))
        {
            return Some(larger);
        }
    }
    None
}
