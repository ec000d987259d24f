// SPDX-License-Identifier: GPL-2.0

//! Sets of frames, and grains: large blocks of memory that hold any of them.

use super::kho_key::{
    Block,
    Key,
    Order,
    Pfn, //
};
use super::kho_radix::{
    NoMemory,
    Node,
    NodeMem,
    Run,
    Runs,
    Tree,
    LEAF_BITS,
    LEAF_SIZE,
    WORDS,
    WORD_BITS, //
};
use super::kho_range::Frames;
use super::{
    GRAIN_ORDER,
    PAGE_SHIFT, //
};
use core::ops::Range;

/// Memory that memblock may allocate from before takeover, next to scratch, is found in whole
/// blocks of this size, as in the C implementation: coarse enough to be quick on large machines,
/// and of no use on small ones.
pub(crate) const EXTENSION: u64 = 1 << 30;

/// Adds the numbers of `frames` to `set`; returns how many were in it before.
#[link_section = ".init.text"]
pub(crate) fn fill<S: NodeMem>(set: &Tree<S>, frames: Frames) -> Result<u64, NoMemory> {
    let mut again = 0u64;
    let mut rest = frames;
    while rest.count() > 0 {
        let leaf = set.leaf(Key::of_frame(rest.start()))?;
        let (bit, part) = (rest.start() % LEAF_SIZE, rest.head_to(LEAF_SIZE));
        again = again.wrapping_add(leaf.fill(bit, part.count()));
        rest = rest.tail(part.count());
    }
    Ok(again)
}

/// Adds to `grains` the number of every block of order `grain` that has a frame of `held`, up to
/// the frame `last`; returns how many ranges those frames make up. A grain has at least a word's
/// frames.
#[link_section = ".init.text"]
pub(crate) fn grains<S: NodeMem>(
    held: &Tree<S>,
    last: Key,
    grain: Order,
    grains: &Tree<S>,
) -> Result<u64, NoMemory> {
    let mut ranges = 0u64;
    // The frame after the last one that was met, which is not frame 0.
    let mut end = u64::MAX;
    // The grains that were met last, in a row, and have not been added.
    let mut row = 0..0;
    let mut from = Key::MIN;
    while let Some((first, leaf)) = held.next_leaf(from, last) {
        let mut at = 0;
        while let Some((index, word)) = leaf.next_used(at) {
            let pfn = first.wrapping_add(index.wrapping_mul(WORD_BITS));
            at = index.wrapping_add(1);
            // A range starts at each bit whose neighbour below is clear.
            let below = word.wrapping_shl(1) | u64::from(end == pfn);
            if word & !below != 0 {
                ranges = ranges.wrapping_add((word & !below).count_ones().into());
            }
            end = pfn.wrapping_add(WORD_BITS.wrapping_sub(word.leading_zeros().into()));
            let number = pfn.wrapping_shr(grain.get());
            if row.end != number.wrapping_add(1) {
                if row.end != number {
                    add_row(grains, row)?;
                    row = number..number;
                }
                row.end = number.wrapping_add(1);
            }
            // What is left of a large block in this grain.
            if end % WORD_BITS == 0 {
                let last = (pfn | grain.pages().wrapping_sub(1)).wrapping_sub(first) / WORD_BITS;
                let limit = last.wrapping_add(1).min(WORDS);
                while at < limit && leaf.word(at).load() == u64::MAX {
                    at = at.wrapping_add(1);
                }
                end = first.wrapping_add(at.wrapping_mul(WORD_BITS));
            }
        }
        match Key::new(first.wrapping_add(LEAF_SIZE)) {
            Some(next) => from = next,
            None => break,
        }
    }
    add_row(grains, row)?;
    Ok(ranges)
}

/// Adds some numbers to a set.
#[link_section = ".init.text"]
fn add_row<S: NodeMem>(set: &Tree<S>, row: Range<u64>) -> Result<(), NoMemory> {
    let count = row.end.wrapping_sub(row.start);
    if let Some(numbers) = Pfn::new(row.start).and_then(|first| Frames::new(first, count)) {
        fill(set, numbers)?;
    }
    Ok(())
}

/// Makes the leaves that have room for the keys of `run`.
#[link_section = ".init.text"]
pub(crate) fn make_room<S: NodeMem>(set: &Tree<S>, run: Run) -> Result<(), NoMemory> {
    let first = run.first.get();
    let last = first.wrapping_add(run.count).wrapping_sub(1);
    for leaf in first / LEAF_SIZE..=last / LEAF_SIZE {
        set.leaf(Key::of_frame(leaf.wrapping_mul(LEAF_SIZE)))?;
    }
    Ok(())
}

/// Returns how many runs of grains memblock is told of at the most, on a machine with `ram` frames.
///
/// One for each 16 MiB, and 256 at least: with fewer, [`coarsen`] would keep more memory back than
/// it need, on the machines whose users scatter thousands of pages (LUO's lists of folios alone are
/// that many on a host of 1 TiB). 16384 are enough, and are an array of 384 KiB; but what lies
/// apart by [`EXTENSION`] is not joined, and needs a run of its own.
#[link_section = ".init.text"]
pub(crate) fn region_limit(ram: u64) -> usize {
    let per = |bytes: u64| ram / (bytes >> PAGE_SHIFT).max(1);
    let limit = per(16 << 20).clamp(256, 16384);
    limit.max(per(EXTENSION).saturating_add(1)) as usize
}

/// Returns how many runs of `grains`, of which none is above `last`, there would be without gaps of
/// fewer than `gap` between them.
#[link_section = ".init.text"]
fn runs_apart<S: NodeMem>(grains: &Tree<S>, last: Key, gap: u64) -> usize {
    let mut count = 0usize;
    let mut end: Option<u64> = None;
    for run in grains.runs_between((Key::MIN, last)) {
        let first = run.first.get();
        if end.is_none_or(|end| first.saturating_sub(end) >= gap) {
            count = count.saturating_add(1);
        }
        end = Some(first.saturating_add(run.count));
    }
    count
}

/// Closes the shortest gaps between runs of `grains`, of which none is above `last`, until there
/// are no more than `limit` runs, or all gaps have the length of [`EXTENSION`]: then every gap that
/// was closed lies in blocks of that size that hold something.
///
/// Why: memblock's list is walked again and again by those who use it while booting.
#[link_section = ".init.text"]
pub(crate) fn coarsen<S: NodeMem>(
    grains: &Tree<S>,
    last: Key,
    grain: Order,
    limit: usize,
) -> Result<(), NoMemory> {
    let longest = (EXTENSION >> PAGE_SHIFT).wrapping_shr(grain.get());
    // Closing gaps shorter than `short` leaves too many runs; shorter than `gap`, it need not.
    let (mut short, mut gap) = (0u64, 1u64);
    while gap < longest && runs_apart(grains, last, gap) > limit {
        short = gap;
        gap = gap.saturating_mul(2).min(longest);
    }
    if gap == 1 {
        return Ok(());
    }
    while gap.saturating_sub(short) > 1 {
        let middle = short.midpoint(gap);
        match runs_apart(grains, last, middle) > limit {
            true => short = middle,
            false => gap = middle,
        }
    }
    let mut end: Option<u64> = None;
    for run in grains.runs_between((Key::MIN, last)) {
        let first = run.first.get();
        if let Some(end) = end.filter(|end| first.saturating_sub(*end) < gap) {
            // Behind what is still to be looked at.
            add_row(grains, end..first)?;
        }
        end = Some(first.saturating_add(run.count));
    }
    Ok(())
}

/// What is not in a set, in some range of frames: as aligned blocks, ascending.
pub(crate) struct Gaps<'a, S> {
    held: &'a Tree<S>,
    /// No block is larger.
    most: Order,
    /// The gap that is being cut into blocks.
    gap: Frames,
    /// What is left of the range after the word that was read last.
    rest: Frames,
    /// The leaf for that, if there is one; it is looked up at the start of each.
    leaf: Option<&'a Node>,
    /// The first frame of that word, and which of its bits are gaps that have not been met.
    word: (u64, u64),
}

impl<'a, S: NodeMem> Gaps<'a, S> {
    /// Returns the gaps of `held` in `frames`, in blocks of order `most` at the most.
    #[link_section = ".init.text"]
    pub(crate) fn new(held: &'a Tree<S>, frames: Frames, most: Order) -> Self {
        Self {
            held,
            most,
            gap: Frames::EMPTY,
            rest: frames,
            leaf: held.find_leaf(Key::of_frame(frames.start())),
            word: (0, 0),
        }
    }

    /// Reads the next word; returns whether there is one.
    #[link_section = ".init.text"]
    fn read(&mut self) -> bool {
        let part = self.rest.head_to(WORD_BITS);
        if part.count() == 0 {
            return false;
        }
        if part.start() % LEAF_SIZE == 0 {
            self.leaf = self.held.find_leaf(Key::of_frame(part.start()));
        }
        let held = self
            .leaf
            .map_or(0, |leaf| leaf.word(part.start() / WORD_BITS).load());
        // OVERFLOW: There are from 1 to 64 frames, which end with their word at the latest.
        let bits = u64::MAX.wrapping_shr(WORD_BITS.wrapping_sub(part.count()) as u32);
        let bits = bits.wrapping_shl(part.start() as u32);
        self.word = (part.start() & !(WORD_BITS - 1), !held & bits);
        self.rest = self.rest.tail(part.count());
        true
    }

    /// Finds the next gap; returns whether there is one.
    #[link_section = ".init.text"]
    fn find(&mut self) -> bool {
        while self.word.1 == 0 {
            if !self.read() {
                return false;
            }
        }
        let (pfn, bits) = self.word;
        let first = bits.trailing_zeros();
        let count = bits.wrapping_shr(first).trailing_ones();
        self.word.1 = bits & bits.wrapping_add(1u64.wrapping_shl(first));
        let start = pfn.wrapping_add(first.into());
        let mut end = start.wrapping_add(count.into());
        // A gap that reaches the end of its word may go on in the next one.
        while end % WORD_BITS == 0 && self.rest.start() == end && self.read() {
            let more = self.word.1.trailing_ones();
            if more == 0 {
                break;
            }
            end = end.wrapping_add(more.into());
            self.word.1 &= self.word.1.wrapping_add(1);
        }
        let count = end.wrapping_sub(start);
        let gap = Pfn::new(start).and_then(|start| Frames::new(start, count));
        self.gap = gap.unwrap_or(Frames::EMPTY);
        true
    }
}

impl<S: NodeMem> Iterator for Gaps<'_, S> {
    type Item = Block;

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<Block> {
        if self.gap.count() == 0 && !self.find() {
            return None;
        }
        let block = self.gap.first_block(self.most)?;
        self.gap = self.gap.tail(block.order().pages());
        Some(block)
    }
}

/// Returns the keys of the blocks of `order` that start in `frames`, if there can be any.
#[link_section = ".init.text"]
pub(crate) fn keys(frames: Frames, order: Order) -> Option<(Key, Key)> {
    let (lowest, _) = Key::bounds(order);
    let shift = order.get();
    let up = order.pages().wrapping_sub(1);
    let first = frames.start().wrapping_add(up).wrapping_shr(shift);
    let last = frames
        .end()
        .wrapping_add(up)
        .wrapping_shr(shift)
        .checked_sub(1)?;
    // The first one may lie behind the last frame there can be, and so behind the last one.
    let first = Key::new(lowest.get().wrapping_add(first))?;
    let last = Key::new(lowest.get().wrapping_add(last))?;
    (first <= last).then_some((first, last))
}

/// Returns whether all of `frames` is in a set.
#[link_section = ".init.text"]
pub(crate) fn has_all<S: NodeMem>(set: &Tree<S>, frames: Frames) -> bool {
    let mut rest = frames;
    while rest.count() > 0 {
        let part = rest.head_to(LEAF_SIZE);
        let bit = part.start() % LEAF_SIZE;
        let run = set
            .find_leaf(Key::of_frame(part.start()))
            .and_then(|leaf| leaf.run_from(bit));
        if !run.is_some_and(|(first, count)| first == bit && count >= part.count()) {
            return false;
        }
        rest = rest.tail(part.count());
    }
    true
}

/// The order of a grain: that of the page allocator's largest blocks. The chart is read in words,
/// each of which must lie in one grain.
pub(crate) const GRAIN: Order = match Order::new(GRAIN_ORDER) {
    Some(order) if order.pages() >= 64 => order,
    _ => Order::ZERO,
};
const _: () = assert!(GRAIN.get() > 0 && GRAIN.get() <= LEAF_BITS);

/// Runs of a set of blocks of one order, as frames, ascending.
pub(crate) struct Ranges<'a, M> {
    pub(crate) runs: Runs<'a, M>,
    pub(crate) order: Order,
}

impl<M: NodeMem> Iterator for Ranges<'_, M> {
    type Item = Frames;

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<Frames> {
        let run = self.runs.next()?;
        let start = Pfn::new(run.first.get().wrapping_shl(self.order.get()))?;
        Frames::new(start, run.count.wrapping_shl(self.order.get()))
    }
}

/// Returns the frames of a grain.
#[link_section = ".init.text"]
pub(crate) fn grain_frames(number: u64) -> Frames {
    let start = Pfn::new(number.wrapping_shl(GRAIN.get()));
    let frames = start.and_then(|start| Frames::new(start, GRAIN.pages()));
    // Numbers of grains come from frames; others would be of no memory.
    frames.unwrap_or(Frames::EMPTY)
}

/// Returns the numbers of the grains that have any of `frames`.
#[link_section = ".init.text"]
pub(crate) fn grain_numbers(frames: Frames) -> Range<u64> {
    frames.start() >> GRAIN.get()..grains_around(frames.end()) >> GRAIN.get()
}

/// Returns the end of the grain whose last frames lie before frame `end`.
#[link_section = ".init.text"]
fn grains_around(end: u64) -> u64 {
    let mask = GRAIN.pages().wrapping_sub(1);
    // OVERFLOW: Frame numbers are far from the end of numbers.
    end.wrapping_add(mask) & !mask
}

/// Returns the frames of the grains that have no others.
#[link_section = ".init.text"]
pub(crate) fn grains_inside(frames: Frames) -> Frames {
    let start = grains_around(frames.start());
    let end = frames.end() & !GRAIN.pages().wrapping_sub(1);
    frames
        .tail(start.wrapping_sub(frames.start()))
        .head(end.saturating_sub(start))
}
