// SPDX-License-Identifier: GPL-2.0

//! Sets of frames, and the grains that hold any of them.
//!
//! Takeover notes frames in trees whose keys are frame numbers: one bit for each frame, whatever
//! blocks it belongs to. Such a set costs one page for as much memory as one leaf of
//! order 0 describes.
//!
//! memblock gets to know *grains* instead of single ranges: blocks of the page allocator's largest
//! order that hold a frame of the set. The set of them has their numbers as its keys.
//!
//! ```text
//!  frames     . # . . # . . .   . . . . . . . .   # # # # # # # #
//!  grains     |      0      |   |      1      |   |      2      |
//!  set of grains     0, 2
//! ```
//!
//! The trees belong to the callers; nothing here is shared or locked.

use super::kho_key::{
    Block,
    Key,
    Order, //
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
use super::kho_word::bits_between;
use super::{
    GRAIN_ORDER,
    PAGE_SHIFT, //
};
use core::ops::Range;

/// The order of a grain. Sets of frames are read in words, each of which must lie in one grain, and
/// the frames of a grain must lie in one leaf.
pub(crate) const GRAIN: Order = match Order::new(GRAIN_ORDER) {
    Some(order) if order.pages() >= WORD_BITS && order.get() <= LEAF_BITS => order,
    _ => panic!(),
};

/// A block of order [`GRAIN`], by its number: that of its first frame shifted by the order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Grain(u64);

impl Grain {
    /// Returns the grain that has frame `pfn`.
    #[link_section = ".init.text"]
    pub(crate) fn containing(pfn: u64) -> Self {
        Self(pfn >> GRAIN.get())
    }

    /// Returns the key of the grain in a set of grains.
    #[link_section = ".init.text"]
    pub(crate) fn key(self) -> Key {
        Key::of_frame(self.0)
    }

    /// Returns the frames of the grain; none if there is no such memory.
    #[link_section = ".init.text"]
    pub(crate) fn frames(self) -> Frames {
        let start = self.0.saturating_mul(GRAIN.pages());
        Frames::between(start, start.saturating_add(GRAIN.pages()))
    }

    /// Returns the grains that have any of `frames`.
    #[link_section = ".init.text"]
    pub(crate) fn touching(frames: Frames) -> impl Iterator<Item = Self> {
        (frames.start() >> GRAIN.get()..GRAIN.blocks_below(frames.end())).map(Self)
    }

    /// Returns the numbers of the grains all of whose frames are in `frames`.
    #[link_section = ".init.text"]
    pub(crate) fn numbers_in(frames: Frames) -> Range<u64> {
        let whole = frames.whole_blocks(GRAIN);
        whole.start() >> GRAIN.get()..whole.end() >> GRAIN.get()
    }

    /// Returns the grains that have these numbers.
    #[link_section = ".init.text"]
    pub(crate) fn numbered(numbers: Range<u64>) -> impl Iterator<Item = Self> {
        numbers.map(Self)
    }
}

/// Runs of a set of numbers of blocks of one order, as frames, ascending.
pub(crate) struct Ranges<'a, M> {
    runs: Runs<'a, M>,
    order: Order,
}

impl<M: NodeMem> Iterator for Ranges<'_, M> {
    type Item = Frames;

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<Frames> {
        let run = self.runs.next()?;
        let pages = self.order.pages();
        let start = run.first.get().checked_mul(pages)?;
        Some(Frames::between(
            start,
            start.checked_add(run.count.checked_mul(pages)?)?,
        ))
    }
}

/// Returns the frames of a set of frames that are in `frames`: runs, ascending.
#[link_section = ".init.text"]
pub(crate) fn frames_in<M: NodeMem>(set: &Tree<M>, frames: Frames) -> Ranges<'_, M> {
    Ranges {
        runs: set.runs_between(frames.numbers()),
        order: Order::ZERO,
    }
}

/// Returns the frames of those grains of a set that are numbered by `numbers`: runs, ascending.
#[link_section = ".init.text"]
pub(crate) fn grains_in<M: NodeMem>(set: &Tree<M>, numbers: Range<u64>) -> Ranges<'_, M> {
    Ranges {
        runs: set.runs_between(Frames::between(numbers.start, numbers.end).numbers()),
        order: GRAIN,
    }
}

/// Adds `frames` to a set of frames; returns how many were in it before.
///
/// # Errors
///
/// [`NoMemory`] if a node could not be allocated. Some of the frames may be in the set then.
#[link_section = ".init.text"]
pub(crate) fn add_frames<M: NodeMem>(set: &Tree<M>, frames: Frames) -> Result<u64, NoMemory> {
    let mut again = 0u64;
    let mut rest = frames;
    while !rest.is_empty() {
        let leaf = set.leaf(Key::of_frame(rest.start()))?;
        let part = rest.head_to(LEAF_SIZE);
        again = again.saturating_add(leaf.set_range(part.start() % LEAF_SIZE, part.count()));
        rest = rest.from(part.end());
    }
    Ok(again)
}

/// Returns whether all of `frames` is in a set of frames.
#[link_section = ".init.text"]
pub(crate) fn has_frames<M: NodeMem>(set: &Tree<M>, frames: Frames) -> bool {
    let mut rest = frames;
    while !rest.is_empty() {
        let part = rest.head_to(LEAF_SIZE);
        let leaf = set.find_leaf(Key::of_frame(part.start()));
        if !leaf.is_some_and(|leaf| leaf.has_range(part.start() % LEAF_SIZE, part.count())) {
            return false;
        }
        rest = rest.from(part.end());
    }
    true
}

/// Makes the leaves for the keys of `run`, so that adding any of them needs no
/// memory later.
///
/// # Errors
///
/// [`NoMemory`] if a node could not be allocated.
#[link_section = ".init.text"]
pub(crate) fn make_leaves<M: NodeMem>(set: &Tree<M>, run: Run) -> Result<(), NoMemory> {
    let keys = Frames::between(run.first.get(), run.first.get().saturating_add(run.count));
    let mut rest = keys;
    while !rest.is_empty() {
        let part = rest.head_to(LEAF_SIZE);
        set.leaf(Key::of_frame(part.start()))?;
        rest = rest.from(part.end());
    }
    Ok(())
}

/// Adds to `grains` the number of every block of order `grain`, at least a word's frames, that has
/// a frame of the set `frames` up to the frame `last`. Returns how many ranges those frames make
/// up.
///
/// # Errors
///
/// [`NoMemory`] if a node could not be allocated.
// One look at each word, because takeover does this for all that was handed over.
#[link_section = ".init.text"]
pub(crate) fn add_grains<M: NodeMem>(
    frames: &Tree<M>,
    last: Key,
    grain: Order,
    grains: &Tree<M>,
) -> Result<u64, NoMemory> {
    let mut ranges = 0u64;
    // The frame after the last one that was seen, which is not frame 0.
    let mut end = u64::MAX;
    // Grains in a row that were seen last and have not been added yet.
    let mut row = 0..0;
    let mut from = Some(Key::MIN);
    while let Some((first, leaf)) = from.and_then(|from| frames.next_leaf(from, last)) {
        let mut at = 0;
        while let Some((index, word)) = leaf.next_used(at) {
            let pfn = first | index.saturating_mul(WORD_BITS);
            at = index.saturating_add(1);
            // A range starts at each bit whose neighbour below is clear.
            let starts = word & !((word << 1) | u64::from(end == pfn));
            if starts != 0 {
                ranges = ranges.saturating_add(starts.count_ones().into());
            }
            end = pfn.saturating_add(u64::from(u64::BITS.saturating_sub(word.leading_zeros())));
            let number = pfn.wrapping_shr(grain.get());
            if !row.contains(&number) {
                if row.end != number {
                    add_numbers(grains, row)?;
                    row = number..number;
                }
                row.end = number.saturating_add(1);
            }
            // What is left of a large block in this grain.
            if end % WORD_BITS == 0 {
                let border = (pfn | grain.mask()) % LEAF_SIZE / WORD_BITS;
                let limit = if grain.get() < LEAF_BITS {
                    border + 1
                } else {
                    WORDS
                };
                while at < limit && leaf.word(at).load() == u64::MAX {
                    at += 1;
                }
                end = first.saturating_add(at.saturating_mul(WORD_BITS));
            }
        }
        from = Key::new(first.saturating_add(LEAF_SIZE));
    }
    add_numbers(grains, row)?;
    Ok(ranges)
}

#[link_section = ".init.text"]
fn add_numbers<M: NodeMem>(set: &Tree<M>, numbers: Range<u64>) -> Result<(), NoMemory> {
    add_frames(set, Frames::between(numbers.start, numbers.end)).map(|_| ())
}

/// Memory that memblock may allocate from before takeover, beside scratch, is found in whole blocks
/// of this many bytes, as in the C implementation: coarse enough to be quick on large machines, and
/// of no use on small ones.
pub(crate) const EXTENSION: u64 = 1 << 30;

/// Returns how many runs of grains memblock gets at most, on a machine with `ram` frames.
///
/// One for each 16 MiB, and at least 256: with fewer, [`coarsen`] would withhold more memory than
/// it need, on machines whose users scatter thousands of pages (LUO's lists of folios alone are
/// that many on a host of 1 TiB). 16384 are enough, and are an array of 384 KiB; but runs that are
/// [`EXTENSION`] apart are not joined, and need a region each.
#[link_section = ".init.text"]
pub(crate) fn region_limit(ram: u64) -> usize {
    let per = |bytes: u64| ram / (bytes >> PAGE_SHIFT).max(1);
    let limit = per(16 << 20).clamp(256, 16384);
    limit.max(per(EXTENSION).saturating_add(1)) as usize
}

/// The gaps between the runs of a set of grains: each as the first number in it, and that behind
/// it.
struct GapsBetween<'a, M> {
    runs: Runs<'a, M>,
    /// Where the last run ended.
    end: Option<u64>,
}

impl<'a, M: NodeMem> GapsBetween<'a, M> {
    #[link_section = ".init.text"]
    fn new(grains: &'a Tree<M>, last: Key) -> Self {
        Self {
            runs: grains.runs_between((Key::MIN, last)),
            end: None,
        }
    }
}

impl<M: NodeMem> Iterator for GapsBetween<'_, M> {
    type Item = Range<u64>;

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<Range<u64>> {
        loop {
            let run = self.runs.next()?;
            let first = run.first.get();
            if let Some(end) = self.end.replace(first.saturating_add(run.count)) {
                return Some(end..first);
            }
        }
    }
}

#[inline]
fn length(gap: &Range<u64>) -> u64 {
    gap.end.saturating_sub(gap.start)
}

/// Returns whether there are no more than `limit` runs of `grains` if all gaps are closed that are
/// shorter than `least`.
#[link_section = ".init.text"]
fn is_enough<M: NodeMem>(grains: &Tree<M>, last: Key, least: u64, limit: usize) -> bool {
    // There is a first run, and one more behind each gap that stays open.
    let mut left = limit.saturating_sub(1);
    for gap in GapsBetween::new(grains, last) {
        if length(&gap) >= least {
            if left == 0 {
                return false;
            }
            left -= 1;
        }
    }
    true
}

/// Closes the shortest gaps between runs of `grains`, of which none is above `last`, until there
/// are no more than `limit` runs, or all gaps have the length of [`EXTENSION`]: then every gap that
/// was closed lies in blocks of that size that hold something.
///
/// Why: several users walk memblock's list again and again while the kernel boots.
///
/// # Errors
///
/// [`NoMemory`] if a node could not be allocated. Some gaps may be closed then.
#[link_section = ".init.text"]
pub(crate) fn coarsen<M: NodeMem>(
    grains: &Tree<M>,
    last: Key,
    grain: Order,
    limit: usize,
) -> Result<(), NoMemory> {
    let longest = (EXTENSION >> PAGE_SHIFT).wrapping_shr(grain.get());
    // Closing gaps shorter than `short` leaves too many runs; shorter than `least`, it need not.
    let (mut short, mut least) = (0u64, 1u64);
    while least < longest && !is_enough(grains, last, least, limit) {
        short = least;
        least = least.saturating_mul(2).min(longest);
    }
    if least == 1 {
        return Ok(());
    }
    while least.saturating_sub(short) > 1 {
        let middle = short.midpoint(least);
        match is_enough(grains, last, middle, limit) {
            true => least = middle,
            false => short = middle,
        }
    }
    for gap in GapsBetween::new(grains, last) {
        if length(&gap) < least {
            // Behind what is still to be looked at.
            add_numbers(grains, gap)?;
        }
    }
    Ok(())
}

/// What is not in a set, in some range of frames: as aligned blocks, ascending.
pub(crate) struct Gaps<'a, M> {
    set: &'a Tree<M>,
    /// No block is larger.
    most: Order,
    /// The gap that is being cut into blocks.
    gap: Frames,
    /// What is left of the range after the word that was read last.
    rest: Frames,
    /// The leaf for that, if there is one; it is looked up at the start of each.
    leaf: Option<&'a Node>,
    /// The first frame of that word, and which of its bits are gaps that have not been seen.
    word: (u64, u64),
}

impl<'a, M: NodeMem> Gaps<'a, M> {
    /// Returns the gaps of `set` in `frames`, in blocks of order `most` at most.
    #[link_section = ".init.text"]
    pub(crate) fn new(set: &'a Tree<M>, frames: Frames, most: Order) -> Self {
        Self {
            set,
            most,
            gap: Frames::EMPTY,
            rest: frames,
            leaf: set.find_leaf(Key::of_frame(frames.start())),
            word: (0, 0),
        }
    }

    /// Reads the next word; returns whether there is one.
    // Always inlined: most words of large blocks are read in a loop and have no gaps.
    #[inline(always)]
    fn next_word(&mut self) -> bool {
        let (start, end) = (self.rest.start(), self.rest.end());
        if start == end {
            return false;
        }
        if start % LEAF_SIZE == 0 {
            self.leaf = self.set.find_leaf(Key::of_frame(start));
        }
        let bit = start % WORD_BITS;
        let first = start ^ bit;
        let used = self
            .leaf
            .map_or(0, |leaf| leaf.word(start / WORD_BITS).load());
        let bits = bits_between(bit, end.saturating_sub(first));
        self.word = (first, !used & bits);
        self.rest = self.rest.from(first.saturating_add(WORD_BITS));
        true
    }

    /// Finds the next gap; returns whether there is one.
    #[link_section = ".init.text"]
    fn find(&mut self) -> bool {
        while self.word.1 == 0 {
            if !self.next_word() {
                return false;
            }
        }
        let (pfn, bits) = self.word;
        let first = bits.trailing_zeros();
        let count = bits.wrapping_shr(first).trailing_ones();
        let start = pfn | u64::from(first);
        let mut end = start.saturating_add(count.into());
        self.word.1 = bits & !bits_between(0, end.saturating_sub(pfn));
        // A gap that reaches the end of its word may go on in the next one.
        while end % WORD_BITS == 0 && self.rest.start() == end && self.next_word() {
            let more = self.word.1.trailing_ones();
            if more == 0 {
                break;
            }
            end = end.saturating_add(more.into());
            self.word.1 &= !bits_between(0, more.into());
        }
        self.gap = Frames::between(start, end);
        true
    }
}

impl<M: NodeMem> Iterator for Gaps<'_, M> {
    type Item = Block;

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<Block> {
        if self.gap.is_empty() && !self.find() {
            return None;
        }
        let block = self.gap.first_block(self.most)?;
        self.gap = self.gap.from(Frames::of_block(block).end());
        Some(block)
    }
}
