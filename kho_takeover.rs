// SPDX-License-Identifier: GPL-2.0

//! Memory that takeover withholds from the page allocator, and gives back where it was not
//! preserved.
//!
//! memblock keeps its regions in an array, and several users walk that array again and again. One
//! region for each preserved range makes booting quadratic: in takeover, and after it in everything
//! that looks at reserved memory. So memblock is told of *grains*: blocks of the page allocator's
//! largest order that hold anything preserved. Neighbours are one region, and how many there are at
//! most depends on the size of the machine, see [`kho_grain::region_limit`].
//!
//! ```text
//!                 preserved  . # . . # . . .   . . . . . . . .   # # # # # # # #
//!                 memblock   |reserved, noinit||    free       ||reserved, noinit|
//!                 later      . # . . # . . .                     # # # # # # # #
//!                            ^   ^ ^   ^ ^ ^
//!                            given back by init_free() or init_late()
//! ```
//!
//! Why that is safe:
//!
//! - *Struct pages.* memblock and deferred initialisation leave grains alone, as they are reserved
//!   and marked "noinit". The page allocator looks at struct pages next to a block that is freed,
//!   but never outside the block of the largest order around it, and no other free memory lies in
//!   a grain. So nothing in it needs a struct page before the first of its pages is given back,
//!   and then all of them have one. That is what all deferred memory relies on, too.
//! - *Others' memory.* A grain of which anything is reserved already, is no RAM, is scratch, or
//!   belongs to two nodes or zones is a *mixed* one. It is dealt with page by page, at once: what
//!   is not ours counts as held, and all struct pages are initialised. What is given back of it is
//!   cut where its node or zone ends.
//! - *Having memory until then.* What lies below the first deferred page of its node is given back
//!   right after `memblock_free_all()`, as everybody's memory there is: all of it where struct
//!   pages are not deferred, and all of the lower zones elsewhere.
//! - *Restoring until then.* A caller that restores a block before `page_alloc_init_late()` has its
//!   grain opened first, see [`settle`].
//!
//! The tree that was handed over is read until then, so its nodes are held, too. They are freed in
//! the end. On architectures that keep memblock's arrays the regions stay in there, as those of
//! all boot memory do that is freed later.
//!
//! A handover that was refused is withheld in the same way, but nothing of it can be restored: what
//! it names may still be written to by a device that the last kernel left running.

use super::kho_check::{
    self,
    Census,
    Machine,
    Refusal,
    Sets, //
};
use super::kho_grain::{
    self,
    grain_frames,
    grain_numbers,
    grains_inside,
    Gaps,
    Ranges,
    GRAIN, //
};
use super::kho_key::{
    Block,
    Key,
    Order,
    Pfn, //
};
use super::kho_memblock::{
    self,
    Memblock, //
};
use super::kho_mm::{
    self,
    Mark,
    Page, //
};
use super::kho_nodemem::{
    self,
    Direct, //
};
use super::kho_radix::{
    NoMemory,
    NodeAddr,
    Removal,
    Tree, //
};
use super::kho_range::Frames;
use super::PAGE_SHIFT;
use core::{
    ops::Range,
    sync::atomic::{
        AtomicBool,
        Ordering, //
    },
};
use kernel::{
    bindings,
    prelude::*, //
};

/// Frames that must stay free outside scratch if memory is kept that nobody can restore: 64 MiB, or
/// one in [`FLOOR_SHARE`] where that is more ...
const FLOOR: u64 = (64 << 20) >> PAGE_SHIFT;

/// ... but no more than 4 GiB. A kernel cannot run in scratch alone, which is for movable memory.
const FLOOR_SHARE: u64 = 32;
const FLOOR_MOST: u64 = (4 << 30) >> PAGE_SHIFT;

/// A set of numbers, of frames or grains.
type Set = Tree<Direct>;

/// Makes an empty set.
#[link_section = ".init.text"]
fn new_set() -> Result<Set, NoMemory> {
    // SAFETY: The tree is made here.
    Tree::new(unsafe { Direct::new() })
}

/// What takeover knows until everything has been given back.
pub(crate) struct Takeover {
    /// The tree that was handed over.
    tree: Tree<Direct>,
    pub(crate) census: Census,
    /// Ranges of preserved memory.
    pub(crate) ranges: u64,
    /// How long it took to read, by the counter of cycles.
    pub(crate) cycles: u64,
    /// Frames of the tree's nodes that are nothing else.
    nodes: Set,
    /// Frames of grains that are not given back: preserved, nodes, or others'.
    held: Set,
    /// Frames of blocks that cannot be taken over.
    lost: Set,
    /// How many frames of those, or of a handover that was refused, are kept all the same.
    pub(crate) kept: u64,
    /// Grains that are all ours and have not been opened.
    closed: Set,
    /// Those whose struct pages have to be initialised then.
    raw: Set,
    /// Grains that are not only ours, and not open yet. Their struct pages are initialised, and
    /// their blocks can be restored.
    mixed: Set,
}

/// What was taken over, while not everything has been given back.
// Only `Takeover::take()` and `finish()` write it, when nobody else can be looking.
static mut TAKEOVER: Option<Takeover> = None;

/// Whether the static is in use.
static PENDING: AtomicBool = AtomicBool::new(false);

/// Returns between which numbers all there is in a set lies: those of frames of RAM, and grains
/// have smaller ones.
#[link_section = ".init.text"]
fn all() -> (Key, Key) {
    let last = Memblock.ram_end().wrapping_sub(1);
    (Key::MIN, Key::of_frame(last))
}

/// Returns the frames of a set of grains.
#[link_section = ".init.text"]
fn frames_of(grains: &Set) -> Ranges<'_, Direct> {
    Ranges {
        runs: grains.runs_between(all()),
        order: GRAIN,
    }
}

/// Returns the frames of a set of frames.
#[link_section = ".init.text"]
fn runs_of(set: &Set) -> Ranges<'_, Direct> {
    Ranges {
        runs: set.runs_between(all()),
        order: Order::ZERO,
    }
}

/// Returns the frames of a set of frames that are in `frames`, which are not empty.
#[link_section = ".init.text"]
fn runs_in(set: &Set, frames: Frames) -> Ranges<'_, Direct> {
    let last = Key::of_frame(frames.end().wrapping_sub(1));
    Ranges {
        runs: set.runs_between((Key::of_frame(frames.start()), last)),
        order: Order::ZERO,
    }
}

/// Returns a single frame.
#[link_section = ".init.text"]
fn one_frame(pfn: u64) -> Frames {
    let frames = Pfn::new(pfn).and_then(|pfn| Frames::new(pfn, 1));
    frames.unwrap_or(Frames::EMPTY)
}

impl Takeover {
    /// Reads and checks the tree at `root`. Changes nothing. What is wrong with the tree is in
    /// [`Census::refusal`].
    #[link_section = ".init.text"]
    pub(crate) fn read(root: NodeAddr) -> Result<Self, NoMemory> {
        let mut takeover = Self {
            // SAFETY: It is charted before anything else.
            tree: Tree::from_root(unsafe { Direct::new() }, root),
            census: Census::default(),
            ranges: 0,
            cycles: 0,
            nodes: new_set()?,
            held: new_set()?,
            lost: new_set()?,
            kept: 0,
            closed: new_set()?,
            raw: new_set()?,
            mixed: new_set()?,
        };
        let sets = Sets {
            nodes: &takeover.nodes,
            held: &takeover.held,
            lost: &takeover.lost,
        };
        match kho_check::chart(&takeover.tree, &Memblock, sets) {
            Ok(census) => {
                takeover.census = census;
                Ok(takeover)
            }
            Err(error) => {
                takeover.forget();
                Err(error)
            }
        }
    }

    /// Returns whether all of `frames` was preserved. To be asked before [`Takeover::plan`].
    #[link_section = ".init.text"]
    pub(crate) fn has(&self, frames: Frames) -> bool {
        kho_grain::has_all(&self.held, frames)
    }

    /// Decides what is withheld. Returns whether that is anything: nothing is kept of a handover
    /// that was refused if the machine would have too little memory left.
    #[link_section = ".init.text"]
    pub(crate) fn plan(&mut self) -> Result<bool, NoMemory> {
        let refused = self.census.refusal.is_some();
        if (refused || self.census.lost > 0) && self.leaves_enough() {
            self.keep_lost()?;
        } else if refused {
            return Ok(false);
        }
        if !refused {
            // The tree is read until late. A node that is itself preserved stays so.
            for run in self.nodes.runs_between(all()) {
                for i in 0..run.count {
                    let node = Key::of_frame(run.first.get().wrapping_add(i));
                    if !self.held.add(node)? {
                        self.nodes.remove(node);
                    }
                }
            }
        }
        let (_, last) = all();
        self.ranges = kho_grain::grains(&self.held, last, GRAIN, &self.closed)?;
        let last = Key::of_frame(last.get() >> GRAIN.get());
        let limit = kho_grain::region_limit(kho_memblock::total_frames());
        kho_grain::coarsen(&self.closed, last, GRAIN, limit)?;
        // From here on nothing may fail for lack of memory, as far as that can be avoided: what is
        // sorted later finds its leaves.
        for run in self.closed.runs_between(all()) {
            kho_grain::make_room(&self.raw, run)?;
            kho_grain::make_room(&self.mixed, run)?;
        }
        Ok(true)
    }

    /// Returns whether a kernel can run with what is left if all is kept that was found.
    #[link_section = ".init.text"]
    fn leaves_enough(&self) -> bool {
        let mut free = 0u64;
        for memory in kho_memblock::memory_frames() {
            free = free.saturating_add(kho_memblock::free_frames(memory));
        }
        let mut found = self.census.frames;
        for frames in runs_of(&self.lost) {
            found = found.saturating_add(frames.count());
        }
        let share = kho_memblock::total_frames() / FLOOR_SHARE;
        free.saturating_sub(found) >= share.clamp(FLOOR, FLOOR_MOST)
    }

    /// Keeps the memory of blocks that cannot be taken over, as far as this boot has not used it.
    #[link_section = ".init.text"]
    fn keep_lost(&mut self) -> Result<(), NoMemory> {
        for frames in runs_of(&self.lost) {
            let mut rest = frames;
            while rest.count() > 0 {
                let part = match Memblock.room(rest.start()) {
                    Some(room) => {
                        let part = room.both(rest);
                        let again = kho_grain::fill(&self.held, part)?;
                        self.kept = self.kept.saturating_add(part.count().wrapping_sub(again));
                        part
                    }
                    None => {
                        let (scratch, kept) = kho_memblock::keep_scratch(rest);
                        self.kept = self.kept.saturating_add(kept);
                        scratch
                    }
                };
                rest = rest.tail(part.count());
            }
        }
        if self.census.refusal.is_some() {
            self.kept = self.kept.saturating_add(self.census.frames);
        }
        Ok(())
    }

    /// Returns the memory that is held, in whole grains: runs of frames, ascending.
    #[link_section = ".init.text"]
    pub(crate) fn busy(&self) -> Ranges<'_, Direct> {
        frames_of(&self.closed)
    }

    /// Forgets everything; what was reserved stays so.
    #[link_section = ".init.text"]
    pub(crate) fn forget(self) {
        for set in [
            self.nodes,
            self.held,
            self.lost,
            self.closed,
            self.raw,
            self.mixed,
        ] {
            set.destroy();
        }
        kho_nodemem::drain_pool();
    }

    /// Reserves everything that is held, or leaves memory as it was.
    #[link_section = ".init.text"]
    pub(crate) fn take(self) -> Result<&'static Self, Refusal> {
        let mut reached = 0u64;
        if let Err(refusal) = self.reserve(&mut reached) {
            // What is in mixed grains stays reserved: it cannot be told from what is others'.
            for frames in frames_of(&self.closed) {
                let frames = frames.head(reached.saturating_sub(frames.start()));
                kho_memblock::release(frames);
            }
            self.forget();
            return Err(refusal);
        }
        for frames in frames_of(&self.mixed) {
            for number in grain_numbers(frames) {
                self.adopt(grain_frames(number));
            }
        }
        let takeover = &raw mut TAKEOVER;
        // SAFETY: Early boot; nobody looks at it before the next line.
        let takeover = unsafe { (*takeover).insert(self) };
        PENDING.store(true, Ordering::Relaxed);
        Ok(takeover)
    }

    /// Sorts the grains and reserves them, in ascending order. `reached` is the frame up to which
    /// that went well.
    ///
    /// What is found free is reserved before anything is allocated. So this need not rely on
    /// allocations keeping away from grains, as they do: none is in memory that is scratch.
    #[link_section = ".init.text"]
    fn reserve(&self, reached: &mut u64) -> Result<(), Refusal> {
        for frames in frames_of(&self.closed) {
            let mut rest = frames;
            while rest.count() > 0 {
                *reached = rest.start();
                let free = kho_memblock::first_free(rest).unwrap_or(rest.tail(rest.count()));
                let whole = grains_inside(kho_mm::in_one_zone(free));
                if whole.count() > 0 && whole.start() == rest.start() {
                    kho_memblock::reserve(whole)?;
                    *reached = whole.end();
                    self.note_raw(whole)?;
                    rest = rest.tail(whole.count());
                } else {
                    // A run of grains starts with one.
                    self.mix(rest.start() >> GRAIN.get())?;
                    rest = rest.tail(GRAIN.pages());
                }
            }
        }
        Ok(())
    }

    /// Notes which of some grains, which are on one node, have no struct pages yet.
    #[link_section = ".init.text"]
    fn note_raw(&self, grains: Frames) -> Result<(), NoMemory> {
        if grains.count() > 0 {
            let from = kho_mm::first_deferred(kho_mm::nid_of(grains.start()));
            let raw = grains.tail(from.saturating_sub(grains.start()));
            let first = Pfn::new(raw.start().wrapping_shr(GRAIN.get()));
            let count = raw.count().wrapping_shr(GRAIN.get());
            if let Some(numbers) = first.and_then(|first| Frames::new(first, count)) {
                kho_grain::fill(&self.raw, numbers)?;
            }
        }
        Ok(())
    }

    /// Reserves what is free in a mixed grain and initialises its struct pages. All else that is
    /// not held becomes so: it is not ours to give back.
    #[link_section = ".init.text"]
    fn mix(&self, number: u64) -> Result<(), Refusal> {
        let (key, grain) = (Key::of_frame(number), grain_frames(number));
        self.closed.remove(key);
        self.mixed.add(key)?;
        // A grain has one leaf, so that filling it needs no memory later.
        self.held.leaf(Key::of_frame(grain.start()))?;
        // Memory that was preserved may be reserved already, by a user who knows where it is.
        for frames in runs_in(&self.held, grain) {
            if kho_memblock::is_reserved(frames) {
                kho_memblock::mark_noinit(frames)?;
                kho_mm::init_deferred(frames);
            }
        }
        for frames in runs_in(&self.nodes, grain) {
            for pfn in frames.start()..frames.end() {
                let key = Key::of_frame(pfn);
                if kho_memblock::is_reserved(one_frame(pfn)) {
                    self.nodes.remove(key);
                }
            }
        }
        let mut rest = grain;
        while rest.count() > 0 {
            let free = kho_memblock::first_free(rest).unwrap_or(rest.tail(rest.count()));
            let others = rest.head(free.start().wrapping_sub(rest.start()));
            kho_grain::fill(&self.held, others)?;
            kho_memblock::reserve(free)?;
            kho_mm::init_deferred(free);
            rest = rest.tail(free.end().wrapping_sub(rest.start()));
        }
        Ok(())
    }

    /// Makes the blocks that start in a grain restorable, unless the handover was refused.
    ///
    /// Memory that several blocks claim goes to the largest of them: the others are not marked, so
    /// that no frame can be restored twice.
    #[link_section = ".init.text"]
    fn adopt(&self, grain: Frames) {
        if self.census.refusal.is_some() {
            return;
        }
        // SAFETY: Nothing is done with it but where blocks were charted, which are RAM.
        let Some(page) = (unsafe { Page::of(grain.start()) }) else {
            return;
        };
        for (order, _) in self.census.orders() {
            let Some((first, last)) = kho_grain::keys(grain, order) else {
                continue;
            };
            // A grain has no more blocks of an order than a leaf has bits, and both are aligned.
            let Some(leaf) = self.tree.find_leaf(first) else {
                continue;
            };
            for (key, word) in leaf.words_between(first, last) {
                let mut rest = word;
                while rest != 0 {
                    let key = Key::new(key | u64::from(rest.trailing_zeros()));
                    if let Some(block) = key.and_then(Key::block).filter(|it| self.is_whole(*it)) {
                        let index = block.pfn().get().wrapping_sub(grain.start());
                        // SAFETY: The struct pages of a grain are adjacent.
                        unsafe { page.nth(index as usize) }.mark(Mark::Preserved, order);
                    }
                    rest &= rest.wrapping_sub(1);
                }
            }
        }
    }

    /// Returns whether `block` can be taken over, and no larger block claims its memory.
    #[link_section = ".init.text"]
    #[inline]
    fn is_whole(&self, block: Block) -> bool {
        (self.census.lost == 0 || kho_check::is_usable(&Memblock, Frames::of_block(block)))
            && (self.census.overlap.is_none()
                || !kho_check::is_claimed(&self.tree, &self.census, &Memblock, block))
    }

    /// Gives what is not held in `frames` to the page allocator.
    #[link_section = ".init.text"]
    fn free_gaps(&self, frames: Frames) {
        let mut count = 0u64;
        for block in Gaps::new(&self.held, frames, GRAIN) {
            kho_mm::free_block(block.pfn().get(), block.order());
            count = count.wrapping_add(block.order().pages());
        }
        kho_mm::add_memory(count);
    }

    /// Makes sure that the struct pages of a grain are initialised, makes its blocks restorable,
    /// and gives back the rest; unless that has been done, or it is a mixed one.
    #[link_section = ".init.text"]
    fn open(&self, number: u64) {
        let (key, grain) = (Key::of_frame(number), grain_frames(number));
        if self.closed.remove(key) == Removal::Absent {
            return;
        }
        if self.raw.contains(key) {
            kho_mm::init_grain(grain);
        }
        self.adopt(grain);
        self.free_gaps(grain);
    }

    /// Opens the grains that have anything to give back and need no more struct pages for it: those
    /// below the first deferred page of their node.
    #[link_section = ".init.text"]
    fn open_early(&self) {
        for frames in frames_of(&self.closed) {
            let mut rest = frames;
            while rest.count() > 0 {
                // No grain that is closed has a border in it.
                let part = kho_memblock::in_one_region(rest);
                let end = kho_mm::first_deferred(kho_mm::nid_of(part.start()));
                let early = part.head(end.saturating_sub(part.start()));
                for number in grain_numbers(grains_inside(early)) {
                    if !kho_grain::has_all(&self.held, grain_frames(number)) {
                        self.open(number);
                    }
                }
                rest = rest.tail(part.count());
            }
        }
        self.open_mixed(kho_mm::first_deferred_of_all());
    }

    /// Opens all grains.
    #[link_section = ".init.text"]
    fn open_all(&self) {
        for frames in frames_of(&self.closed) {
            for number in grain_numbers(frames) {
                self.open(number);
            }
        }
        self.open_mixed(u64::MAX);
    }

    /// Gives back the gaps of the mixed grains below frame `end`, whose surroundings have struct
    /// pages as well.
    #[link_section = ".init.text"]
    fn open_mixed(&self, end: u64) {
        for frames in frames_of(&self.mixed) {
            for number in grain_numbers(frames) {
                let mut rest = grain_frames(number);
                if rest.end() > end {
                    continue;
                }
                self.mixed.remove(Key::of_frame(number));
                while rest.count() > 0 {
                    let part = kho_mm::in_one_zone(kho_memblock::in_one_region(rest));
                    self.free_gaps(part);
                    rest = rest.tail(part.count());
                }
            }
        }
    }

    /// Opens the grains that are wholly in a span of frames, on all CPUs.
    #[link_section = ".init.text"]
    fn open_in_parallel(&self, span: Range<u64>) {
        let count = span.end.wrapping_sub(span.start);
        let Some(frames) = Pfn::new(span.start).and_then(|start| Frames::new(start, count)) else {
            return;
        };
        let Range { start, end } = grain_numbers(grains_inside(frames));
        if start < end && self.closed_between(start, end).next().is_some() {
            // SAFETY: Spans are worked on one after the other, and each chunk of one is another
            // part of it.
            unsafe {
                bindings::kho_glue_in_parallel(
                    Some(open_chunk),
                    start as usize,
                    end as usize,
                    CHUNK,
                )
            };
        }
    }

    /// Returns the grains to be opened from number `start` to before `end`, which is larger.
    #[link_section = ".init.text"]
    fn closed_between(&self, start: u64, end: u64) -> Ranges<'_, Direct> {
        let last = Key::of_frame(end.wrapping_sub(1));
        Ranges {
            runs: self.closed.runs_between((Key::of_frame(start), last)),
            order: GRAIN,
        }
    }

    /// Frees the nodes of the tree, and what was needed to know all this.
    #[link_section = ".init.text"]
    fn finish(self) {
        if self.census.refusal.is_some() {
            // The nodes were not held.
            return self.forget();
        }
        let mut count = 0u64;
        for run in self.nodes.runs_between(all()) {
            for i in 0..run.count {
                kho_mm::free_block(run.first.get().wrapping_add(i), Order::ZERO);
            }
            count = count.wrapping_add(run.count);
        }
        kho_mm::add_memory(count);
        self.forget();
    }
}

/// Returns what was taken over, while something has not been given back.
#[link_section = ".init.text"]
fn pending() -> Option<&'static Takeover> {
    let takeover = &raw const TAKEOVER;
    // SAFETY: See the static.
    unsafe { (*takeover).as_ref() }
}

#[link_section = ".init.text"]
fn finish() {
    PENDING.store(false, Ordering::Relaxed);
    // SAFETY: No caller that restores is running yet, and no chunk is being worked on.
    if let Some(takeover) = unsafe { (&raw mut TAKEOVER).replace(None) } {
        takeover.finish();
    }
}

/// Gives back what may be in use from the moment on that there is a page allocator.
#[link_section = ".init.text"]
pub(crate) fn init_free() {
    kho_nodemem::set_buddy_is_up();
    let Some(takeover) = pending() else { return };
    if cfg!(CONFIG_DEFERRED_STRUCT_PAGE_INIT) {
        takeover.open_early();
    } else {
        // There is no init_late().
        takeover.open_all();
        finish();
    }
}

/// Initialises struct pages and gives back the rest, on all CPUs.
#[link_section = ".init.text"]
pub(crate) fn init_late() {
    let Some(takeover) = pending() else { return };
    // Regions that touch differ in flags or node, which makes no difference here.
    let mut span = 0..0;
    for region in kho_memblock::memory_frames() {
        if region.start() != span.end {
            takeover.open_in_parallel(span);
            span = region.start()..region.start();
        }
        span.end = region.end();
    }
    takeover.open_in_parallel(span);
    takeover.open_mixed(u64::MAX);
    finish();
}

/// Grains that one CPU works on at a time: 128 MiB where a grain has 4 MiB.
const CHUNK: usize = 32;

/// Opens the grains from number `start` to before `end`.
///
/// # Safety
///
/// Nobody else may be working on these grains.
#[link_section = ".init.text"]
unsafe extern "C" fn open_chunk(start: usize, end: usize, _arg: *mut c_void) {
    let Some(takeover) = pending() else { return };
    for frames in takeover.closed_between(start as u64, end as u64) {
        for number in grain_numbers(frames) {
            takeover.open(number);
            // SAFETY: A thread of its own.
            unsafe { bindings::kho_glue_cond_resched() };
        }
    }
}

/// Returns whether [`settle`] has anything to do.
#[inline(always)]
pub(crate) fn is_pending() -> bool {
    PENDING.load(Ordering::Relaxed)
}

/// Makes sure that the struct pages of `frames` are initialised, before anything there is
/// restored.
///
/// That is so from `page_alloc_init_late()` on. Only an `early_initcall` can be earlier; these run
/// one after the other.
#[inline]
pub(crate) fn settle(frames: Frames) {
    if is_pending() {
        settle_now(frames);
    }
}

// As `__ref` in C: only called while there is `.init.text`.
#[cold]
#[link_section = ".ref.text"]
#[inline(never)]
fn settle_now(frames: Frames) {
    let Some(takeover) = pending() else { return };
    for number in grain_numbers(frames) {
        takeover.open(number);
    }
}
