// SPDX-License-Identifier: GPL-2.0

//! Ranges of page frames, and how they are cut into blocks and put together from them.

use super::kho_key::{
    Block,
    Key,
    Order,
    Pfn, //
};
use super::kho_radix::Run;
use super::PAGE_SHIFT;

/// The frame number after the last one there can be.
const PFN_LIMIT: u64 = 1 << (u64::BITS - PAGE_SHIFT);

/// A range of page frames, `start..end`.
///
/// # Invariants
///
/// `start <= end`, and `end` is at most [`PFN_LIMIT`], so that lengths in pages never overflow and
/// lengths in bytes only do for all of the address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Frames {
    start: u64,
    end: u64,
}

impl Frames {
    /// No frames at all.
    pub(crate) const EMPTY: Self = Self { start: 0, end: 0 };

    /// Returns the frames from `start` to before `end`; none unless all of them exist.
    #[inline]
    pub(crate) fn between(start: u64, end: u64) -> Self {
        if start > end || end > PFN_LIMIT {
            return Self::EMPTY;
        }
        // INVARIANT: Checked above.
        Self { start, end }
    }

    /// Returns the `count` frames from `start` on, or [`None`] if they do not exist.
    #[inline]
    pub(crate) fn new(start: Pfn, count: u64) -> Option<Self> {
        let end = start.get().checked_add(count)?;
        // INVARIANT: `end` is at least `start`, and checked.
        (end <= PFN_LIMIT).then_some(Self {
            start: start.get(),
            end,
        })
    }

    /// Returns the frames that hold any of the `size` bytes at `phys`, or [`None`] if those wrap
    /// around the end of the address space.
    pub(crate) fn covering(phys: u64, size: u64) -> Option<Self> {
        let start = phys >> PAGE_SHIFT;
        let Some(last) = size.checked_sub(1) else {
            return Some(Self { start, end: start });
        };
        let last = phys.checked_add(last)?;
        // INVARIANT: A shifted address is a frame number, and `last` is at least `phys`.
        Some(Self {
            start,
            end: (last >> PAGE_SHIFT) + 1,
        })
    }

    /// Returns the range at exactly `phys..phys + size`, or [`None`] if that is empty, wraps
    /// around, or is not made of whole pages.
    pub(crate) fn exact(phys: u64, size: u64) -> Option<Self> {
        let page = (1 << PAGE_SHIFT) - 1;
        if size == 0 || (phys | size) & page != 0 {
            return None;
        }
        Self::covering(phys, size)
    }

    /// Returns the frames of `run`, whose keys are blocks of one order; [`None`] for key 0, which
    /// no run of an order contains.
    #[inline]
    pub(crate) fn of_run(run: Run) -> Option<Self> {
        let block = run.first.block()?;
        let pages = run.count.checked_mul(block.order().pages())?;
        Self::new(block.pfn(), pages)
    }

    /// Returns the frames of `block`.
    #[inline]
    pub(crate) fn of_block(block: Block) -> Self {
        // INVARIANT: By `Block`'s invariant it ends within the address space.
        Self {
            start: block.pfn().get(),
            end: block.pfn().get().saturating_add(block.order().pages()),
        }
    }

    /// Returns the only page of the range, if it has just one.
    #[inline]
    pub(crate) fn only_page(self) -> Option<Block> {
        if self.count() != 1 {
            return None;
        }
        Block::new(Pfn::new(self.start)?, Order::ZERO)
    }

    /// Returns the first frame's number.
    #[inline]
    pub(crate) const fn start(self) -> u64 {
        self.start
    }

    /// Returns the number of the frame after the last one.
    #[inline]
    pub(crate) const fn end(self) -> u64 {
        self.end
    }

    /// Returns the number of frames.
    #[inline]
    pub(crate) const fn count(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Returns whether there are no frames.
    #[inline]
    pub(crate) const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Returns the physical address of the first frame.
    #[inline]
    pub(crate) const fn phys(self) -> u64 {
        self.start << PAGE_SHIFT
    }

    /// Returns the size in bytes; all of the address space has none that fits, and gives 0.
    #[inline]
    pub(crate) const fn bytes(self) -> u64 {
        self.count() << PAGE_SHIFT
    }

    /// Returns the frames of the range before frame `pfn`.
    #[inline]
    pub(crate) fn until(self, pfn: u64) -> Self {
        // INVARIANT: The new end is between the start and the old end.
        Self {
            start: self.start,
            end: pfn.max(self.start).min(self.end),
        }
    }

    /// Returns the frames of the range from frame `pfn` on.
    #[inline]
    pub(crate) fn from(self, pfn: u64) -> Self {
        // INVARIANT: The new start is between the old start and the end.
        Self {
            start: pfn.max(self.start).min(self.end),
            end: self.end,
        }
    }

    /// Returns the frames that are in blocks of `order` all of which is in the range.
    #[inline]
    pub(crate) fn whole_blocks(self, order: Order) -> Self {
        let start = order.blocks_below(self.start).saturating_mul(order.pages());
        self.from(start).until(self.end & !order.mask())
    }

    /// Returns the first and the last frame as the keys that they have in a set of frames. Without
    /// frames, the first key is the larger one.
    #[inline]
    pub(crate) fn numbers(self) -> (Key, Key) {
        match self.end.checked_sub(1).filter(|_| !self.is_empty()) {
            Some(last) => (Key::of_frame(self.start), Key::of_frame(last)),
            None => (Key::MAX, Key::MIN),
        }
    }

    /// Returns the first and the last key of the blocks of `order` that start in the range, if any
    /// can.
    pub(crate) fn keys(self, order: Order) -> Option<(Key, Key)> {
        let (lowest, _) = Key::bounds(order);
        let first = order.blocks_below(self.start);
        let last = order.blocks_below(self.end).checked_sub(1)?;
        // The first one may lie behind the last frame there can be, and so behind the last one.
        let first = Key::new(lowest.get().checked_add(first)?)?;
        let last = Key::new(lowest.get().checked_add(last)?)?;
        (first <= last).then_some((first, last))
    }

    /// Returns the largest block that the range starts with, of order `most` at most.
    #[inline]
    pub(crate) fn first_block(self, most: Order) -> Option<Block> {
        // Frame 0 is aligned to anything.
        let aligned = self.start.trailing_zeros();
        let order = self.count().checked_ilog2()?.min(aligned).min(most.get());
        Block::new(Pfn::new(self.start)?, Order::new(order)?)
    }

    /// Returns the range up to the next frame whose number is a multiple of `size`, a power of two.
    #[inline]
    pub(crate) fn head_to(self, size: u64) -> Self {
        let last = self.start | size.saturating_sub(1);
        self.until(last.saturating_add(1))
    }

    /// Returns what both ranges have.
    #[inline]
    pub(crate) fn both(self, other: Self) -> Self {
        let start = self.start.max(other.start).min(self.end);
        // INVARIANT: The end is one of the two, or the start.
        Self {
            start,
            end: self.end.min(other.end).max(start),
        }
    }

    /// Cuts the range into the blocks by which `kho_preserve_pages()` names it: each as large as
    /// its alignment and what is left allow.
    ///
    /// No block spans two NUMA nodes, because its struct pages are initialised for one: `one_node`
    /// says of two frame numbers, the first and the last of a block, whether they are on the same.
    /// Which blocks come out is not ABI; the same `one_node` gives the same blocks, and the same
    /// first ones if the range ends with one of them: what is left only matters to a block that it
    /// is too short for.
    pub(crate) fn blocks<F: Fn(u64, u64) -> bool>(self, one_node: F) -> Blocks<F> {
        Blocks {
            rest: self,
            one_node,
        }
    }
}

/// The blocks of a range; see [`Frames::blocks`].
pub(crate) struct Blocks<F> {
    rest: Frames,
    one_node: F,
}

impl<F: Fn(u64, u64) -> bool> Iterator for Blocks<F> {
    type Item = Block;

    #[inline(always)]
    fn next(&mut self) -> Option<Block> {
        let mut block = self.rest.first_block(Order::MAX)?;
        loop {
            let frames = Frames::of_block(block);
            let last = frames.end().saturating_sub(1);
            if block.order() == Order::ZERO || (self.one_node)(frames.start(), last) {
                self.rest = self.rest.from(frames.end());
                return Some(block);
            }
            block = self.rest.first_block(block.order().below()?)?;
        }
    }
}

/// Returns the size of the largest hole in `start..end` that begins at a multiple of `align` and
/// has none of `taken` in it, each an address and a size that is not 0. All are in bytes.
pub(crate) fn largest_hole(
    start: u64,
    end: u64,
    align: u64,
    taken: impl Iterator<Item = (u64, u64)> + Clone,
) -> u64 {
    let mut largest = 0;
    let mut next = Some(start);
    while let Some(from) = next.and_then(|from| from.checked_next_multiple_of(align)) {
        let mut to = end;
        next = None;
        for (addr, size) in taken.clone() {
            let after = addr.saturating_add(size);
            if addr < to && after > from {
                to = addr;
                next = Some(after);
            }
        }
        largest = to.saturating_sub(from).max(largest);
    }
    largest
}

/// A segment of an image for which no hole in scratch was large enough.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Shortage {
    /// The size of the segment.
    pub(crate) size: u64,
    /// The size of the largest hole.
    pub(crate) hole: u64,
}

impl Shortage {
    /// Returns how much larger a hole would have to be.
    pub(crate) fn missing(self) -> u64 {
        self.size.saturating_sub(self.hole)
    }
}

/// What has been short while a loader tries one place for the kernel after the other, because the
/// other segments have to go behind it. The image is not loaded only when there is no further
/// place.
pub(crate) struct Attempts(Option<Shortage>);

impl Attempts {
    pub(crate) const NONE: Self = Self(None);

    /// Notes that another segment has found no place, with the kernel where it is now.
    pub(crate) fn note(&mut self, shortage: Shortage) {
        // The attempt that was closest counts.
        let closer = |noted: &Shortage| noted.missing() <= shortage.missing();
        self.0 = self.0.filter(closer).or(Some(shortage));
    }

    /// Returns what to say when there is no further place for the kernel: that there is no place at
    /// all for it, or which other segment has found none. If that is nothing, something else was
    /// wrong.
    pub(crate) fn end(&mut self, kernel: Shortage, first: bool) -> Option<Shortage> {
        let noted = self.0.take();
        if first {
            Some(kernel)
        } else {
            noted
        }
    }
}
