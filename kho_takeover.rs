// SPDX-License-Identifier: GPL-2.0

//! Memory that takeover withholds from the page allocator, and gives back where it was not
//! preserved.
//!
//! memblock keeps its regions in an array, and several users walk that array again and again. One
//! region for each preserved range makes booting quadratic: in takeover, and after it in everything
//! that looks at reserved memory. So memblock gets to know *grains*, see [`kho_grain`]. Neighbours
//! are one region, and how many regions there are at most depends on the size of the machine, see
//! [`kho_grain::region_limit`].
//!
//! ```text
//!                 preserved  . # . . # . . .   . . . . . . . .   # # # # # # # #
//!                 memblock   |reserved, noinit||    free       ||reserved, noinit|
//!                 later      . # . . # . . .                     # # # # # # # #
//!                            ^   ^ ^   ^ ^ ^
//!                            given back by init_free() or init_late()
//! ```
//!
//! The states of a grain:
//!
//! ```text
//!            plan()            commit()                 init_free(), init_late(),
//!                                                       or a caller that restores
//!  free ---> pending --------> pending, perhaps uninit -------------------------> released
//!                     \------> shared ------------------------------------------> released
//! ```
//!
//! Why that is safe:
//!
//! - *Struct pages.* memblock and deferred initialisation leave grains alone, as they are reserved
//!   and marked "noinit". The page allocator looks at struct pages next to a block that is freed,
//!   but never outside the block of the largest order around it, and no other free memory lies in
//!   a grain. So nothing in it needs a struct page before the first of its pages is given back,
//!   and then all of them have one. That is what all deferred memory relies on, too.
//! - *Others' memory.* A grain of which anything is reserved already, is not RAM, is scratch, or
//!   belongs to two nodes or zones is *shared*. It is dealt with page by page, at once: what does
//!   not belong to the handover counts as reserved, and all struct pages are initialised. What is
//!   given back of it is cut where its node or zone ends.
//! - *Users without restoring.* memblock gives regions of `reserve_mem=` to their users as they
//!   are, who may free them page by page: no block of them becomes a folio, is marked or counted.
//! - *Having memory until then.* What lies below the first deferred page of its node is given back
//!   right after `memblock_free_all()`, as everybody's memory there is: all of it where struct
//!   pages are not deferred, and all of the lower zones elsewhere.
//! - *Restoring until then.* A caller that restores a block before `page_alloc_init_late()` has its
//!   grain released first, see [`ensure_initialised`].
//!
//! The tree that was handed over is read until then, so that its nodes are reserved, too. They are
//! freed in the end. On architectures that keep memblock's arrays the regions stay in there, as
//! those of all boot memory do that is freed later.
//!
//! A handover that was refused is withheld in the same way, but nothing of it can be restored: a
//! device that the last kernel left running may still be writing to what it names.

use super::kho_check::{
    self,
    Machine,
    Refusal,
    Sets,
    Stats, //
};
use super::kho_grain::{
    self,
    add_frames,
    frames_in,
    grains_in,
    Gaps,
    Grain,
    Ranges,
    GRAIN, //
};
use super::kho_key::{
    Block,
    Key,
    Order, //
};
use super::kho_memblock::Memblock;
use super::kho_mm;
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
use super::kho_scratch;
use super::kho_struct_pages::GrainPages;
use super::kho_trace;
use super::kho_word::bits;
use super::PAGE_SHIFT;
use core::sync::atomic::{
    AtomicBool,
    Ordering, //
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

/// What becomes of memory that a handover names.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plan {
    /// It is kept, to be restored, or because a device may be writing to it.
    Keep,
    /// A refused handover is not kept, because too little memory would be left.
    Drop,
}

/// What takeover knows until everything has been given back.
pub(crate) struct Takeover {
    /// memblock is there for as long as this is.
    memblock: Memblock,
    /// The tree that was handed over.
    tree: Tree<Direct>,
    pub(crate) stats: Stats,
    /// Ranges of preserved memory.
    pub(crate) ranges: u64,
    /// How long it took to read and to plan, by the counter of cycles.
    pub(crate) cycles: u64,
    /// Frames of the tree's nodes, of what is not given back, and of lost blocks.
    sets: Sets<Direct>,
    /// How many frames are kept of lost blocks, or of a handover that was refused.
    pub(crate) kept: u64,
    /// Grains that belong to the handover alone and have not been released.
    pending: Tree<Direct>,
    /// Those whose struct pages have to be initialised then.
    uninit: Tree<Direct>,
    /// Grains that somebody else has a part of, and that have not been released. Their struct pages
    /// are initialised, and their blocks can be restored.
    shared: Tree<Direct>,
    /// The frames of `reserve_mem=`, which have a user without being restored.
    owned: Tree<Direct>,
}

/// What was taken over, while not everything has been given back.
// Only `Takeover::commit()` and `finish()` write it, when nobody else can be looking.
static mut TAKEOVER: Option<Takeover> = None;

/// Whether the static is in use.
static IN_USE: AtomicBool = AtomicBool::new(false);

impl Takeover {
    /// Reads and checks the tree at `root`. Changes nothing. What is wrong with the tree is in
    /// [`Stats::refusal`].
    ///
    /// # Errors
    ///
    /// [`NoMemory`] if there is none for the sets.
    #[link_section = ".init.text"]
    pub(crate) fn read(memblock: Memblock, root: NodeAddr) -> Result<Self, NoMemory> {
        // SAFETY: `check_tree()` looks at the tree before anything else does; the sets are made
        // here.
        let direct = unsafe { Direct::new() };
        let mut takeover = Self {
            memblock,
            tree: Tree::from_root(direct, root),
            stats: Stats::default(),
            ranges: 0,
            cycles: 0,
            sets: Sets::new(direct)?,
            kept: 0,
            pending: Tree::new(direct)?,
            uninit: Tree::new(direct)?,
            shared: Tree::new(direct)?,
            owned: Tree::new(direct)?,
        };
        match kho_check::check_tree(&takeover.tree, &memblock, &takeover.sets) {
            Ok(stats) => {
                takeover.stats = stats;
                Ok(takeover)
            }
            Err(error) => {
                takeover.drop_sets();
                Err(error)
            }
        }
    }

    /// Returns whether the handover was refused: it is kept, if at all, but not restored.
    #[link_section = ".init.text"]
    pub(crate) fn is_refused(&self) -> bool {
        self.stats.refusal.is_some()
    }

    /// Returns whether all of `frames` is reserved; before [`Takeover::plan`], whether it was
    /// preserved.
    #[link_section = ".init.text"]
    pub(crate) fn has(&self, frames: Frames) -> bool {
        kho_grain::has_frames(&self.sets.reserved, frames)
    }

    /// Returns all frames there can be in a set.
    #[link_section = ".init.text"]
    fn all_frames(&self) -> Frames {
        Frames::between(0, self.memblock.ram_end())
    }

    /// Returns the grains of a set: runs, ascending, as frames.
    #[link_section = ".init.text"]
    fn all_of<'a>(&self, set: &'a Tree<Direct>) -> Ranges<'a, Direct> {
        grains_in(set, 0..GRAIN.blocks_below(self.memblock.ram_end()))
    }

    /// Decides what is withheld, and notes its grains.
    ///
    /// # Errors
    ///
    /// [`NoMemory`] if there is none for the sets.
    #[link_section = ".init.text"]
    pub(crate) fn plan(&mut self) -> Result<Plan, NoMemory> {
        let is_refused = self.is_refused();
        if (is_refused || self.stats.lost > 0) && self.leaves_enough() {
            self.keep_lost()?;
        } else if is_refused {
            return Ok(Plan::Drop);
        }
        if !is_refused {
            // Keep the old tree's nodes until the end. A node that is itself preserved stays
            // preserved.
            for run in self.sets.nodes.runs_between(self.all_frames().numbers()) {
                for node in run.keys() {
                    if !self.sets.reserved.add(node)? {
                        self.sets.nodes.remove(node);
                    }
                }
            }
        }
        let (_, last) = self.all_frames().numbers();
        self.ranges = kho_grain::add_grains(&self.sets.reserved, last, GRAIN, &self.pending)?;
        let last = Grain::containing(last.get()).key();
        let limit = kho_grain::region_limit(self.memblock.total_frames());
        kho_grain::coarsen(&self.pending, last, GRAIN, limit)?;
        // From here on nothing may fail for lack of memory, as far as that can be avoided: what is
        // sorted later finds its leaves.
        for run in self.pending.runs_between((Key::MIN, last)) {
            kho_grain::make_leaves(&self.uninit, run)?;
            kho_grain::make_leaves(&self.shared, run)?;
        }
        Ok(Plan::Keep)
    }

    /// Returns whether a kernel can run with what is left if all is kept that was found.
    #[link_section = ".init.text"]
    fn leaves_enough(&self) -> bool {
        let mut found = self.stats.frames;
        for frames in frames_in(&self.sets.lost, self.all_frames()) {
            found = found.saturating_add(frames.count());
        }
        let share = self.memblock.total_frames() / FLOOR_SHARE;
        self.memblock.free_frames().saturating_sub(found) >= share.clamp(FLOOR, FLOOR_MOST)
    }

    /// Keeps the memory of blocks that cannot be taken over, as far as this boot has not used it.
    #[link_section = ".init.text"]
    fn keep_lost(&mut self) -> Result<(), NoMemory> {
        for frames in frames_in(&self.sets.lost, self.all_frames()) {
            let mut rest = frames;
            while !rest.is_empty() {
                let (part, kept) = match self.memblock.usable(rest.start()) {
                    Some(usable) => {
                        let part = usable.both(rest);
                        let again = add_frames(&self.sets.reserved, part)?;
                        (part, part.count().saturating_sub(again))
                    }
                    None => self.memblock.keep_scratch(rest),
                };
                self.kept = self.kept.saturating_add(kept);
                rest = rest.from(part.end());
            }
        }
        if self.is_refused() {
            self.kept = self.kept.saturating_add(self.stats.frames);
        }
        Ok(())
    }

    /// Returns the memory that is withheld, in whole grains: runs of frames, ascending.
    #[link_section = ".init.text"]
    pub(crate) fn busy(&self) -> Ranges<'_, Direct> {
        self.all_of(&self.pending)
    }

    /// Frees the sets; what was reserved stays so.
    #[link_section = ".init.text"]
    pub(crate) fn drop_sets(self) {
        self.sets.destroy();
        self.pending.destroy();
        self.uninit.destroy();
        self.shared.destroy();
        self.owned.destroy();
        kho_nodemem::drain_pool(self.memblock);
    }

    /// Reserves everything that is withheld, or leaves memory as it was.
    ///
    /// # Errors
    ///
    /// Why memory could not be reserved.
    #[link_section = ".init.text"]
    pub(crate) fn commit(self) -> Result<&'static Self, Refusal> {
        let mut reached = 0;
        if let Err(refusal) = self.reserve(&mut reached) {
            // What is in shared grains stays reserved: it cannot be told from what is others'.
            for frames in self.busy() {
                self.memblock.unreserve(frames.until(reached));
            }
            self.drop_sets();
            return Err(refusal);
        }
        let takeover = &raw mut TAKEOVER;
        // SAFETY: Nobody looks at it before the next line.
        let takeover = unsafe { (*takeover).insert(self) };
        IN_USE.store(true, Ordering::Relaxed);
        Ok(takeover)
    }

    /// Sorts the grains and reserves them, in ascending order. `reached` is the frame up to which
    /// that went well.
    ///
    /// What is found free is reserved before anything is allocated. So this need not rely on
    /// allocations keeping away from grains, as they do: no grain is in memory that is scratch.
    #[link_section = ".init.text"]
    fn reserve(&self, reached: &mut u64) -> Result<(), Refusal> {
        self.note_owned()?;
        for frames in self.busy() {
            let mut rest = frames;
            while !rest.is_empty() {
                *reached = rest.start();
                let free = self.memblock.first_free(rest).unwrap_or(Frames::EMPTY);
                let whole = kho_mm::in_one_zone(free).whole_blocks(GRAIN);
                if !whole.is_empty() && whole.start() == rest.start() {
                    self.memblock.reserve(whole)?;
                    *reached = whole.end();
                    self.note_uninit(whole)?;
                    rest = rest.from(whole.end());
                } else {
                    // A run of grains starts with one.
                    let grain = Grain::containing(rest.start());
                    self.reserve_shared(grain)?;
                    rest = rest.from(grain.frames().end());
                }
            }
        }
        Ok(())
    }

    /// Notes which of some grains, which are on one node, have no struct pages yet.
    #[link_section = ".init.text"]
    fn note_uninit(&self, grains: Frames) -> Result<(), NoMemory> {
        let deferred = grains.from(kho_mm::first_deferred(kho_mm::nid_of(grains.start())));
        let numbers = Grain::numbers_in(deferred);
        add_frames(&self.uninit, Frames::between(numbers.start, numbers.end)).map(|_| ())
    }

    /// Reserves what is free in a shared grain and initialises its struct pages. All else becomes
    /// reserved as well: it is not takeover's to give back.
    #[link_section = ".init.text"]
    fn reserve_shared(&self, grain: Grain) -> Result<(), Refusal> {
        let (memblock, reserved) = (self.memblock, &self.sets.reserved);
        let frames = grain.frames();
        self.pending.remove(grain.key());
        self.shared.add(grain.key())?;
        // A grain has one leaf, so that adding its frames needs no memory later.
        reserved.leaf(Key::of_frame(frames.start()))?;
        // Memory that was preserved may be reserved already, by a user that knows where it is.
        for preserved in frames_in(reserved, frames) {
            if memblock.is_reserved(preserved) {
                memblock.mark_noinit(preserved)?;
                // SAFETY: It was preserved RAM, and whoever reserved it while memblock hands out
                // memory uses no struct pages.
                unsafe { kho_mm::init_deferred(preserved) };
            }
        }
        for run in self.sets.nodes.runs_between(frames.numbers()) {
            for node in run.keys() {
                let pfn = node.get();
                if memblock.is_reserved(Frames::between(pfn, pfn.saturating_add(1))) {
                    self.sets.nodes.remove(node);
                }
            }
        }
        let mut rest = frames;
        while !rest.is_empty() {
            let free = memblock.first_free(rest).unwrap_or(rest.from(rest.end()));
            add_frames(reserved, rest.until(free.start()))?;
            memblock.reserve(free)?;
            // SAFETY: It was free RAM until the line above.
            unsafe { kho_mm::init_deferred(free) };
            rest = rest.from(free.end());
        }
        Ok(())
    }

    /// Notes the regions of `reserve_mem=`.
    #[link_section = ".init.text"]
    fn note_owned(&self) -> Result<(), NoMemory> {
        for (phys, size) in kho_scratch::Regions::new() {
            if let Some(frames) = Frames::covering(phys, size) {
                add_frames(&self.owned, frames)?;
            }
        }
        Ok(())
    }

    /// Returns whether any of `frames` is in a region of `reserve_mem=`. memblock has given it to
    /// its user without restoring it, and frees it page by page, if at all
    /// (`reserve_mem_release_by_name()`): no block of it may become a folio.
    #[link_section = ".init.text"]
    fn is_owned(&self, frames: Frames) -> bool {
        frames_in(&self.owned, frames).next().is_some()
    }

    /// Makes the struct pages in some frames of one grain and zone what restoring finds, see
    /// [`GrainPages`]; returns whether all of the frames can be restored. If they `are_deferred`,
    /// which only those of a whole grain can be, they are initialised first. Nothing can be
    /// restored of a handover that was refused.
    ///
    /// Memory that several blocks claim goes to the largest of them: the others are not added, so
    /// that no frame can be restored twice.
    #[link_section = ".init.text"]
    fn prepare(&self, frames: Frames, are_deferred: bool) -> bool {
        // SAFETY: All of it has been reserved, and is RAM as far as there are blocks.
        let Some(mut pages) = (unsafe { GrainPages::new(frames, are_deferred) }) else {
            return false;
        };
        if !self.is_refused() {
            if let Some(block) = self.block_around(frames) {
                if !self.is_owned(Frames::of_block(block)) {
                    pages.add(block);
                }
            } else {
                let any_owned = self.is_owned(frames);
                for order in self.stats.orders_down() {
                    self.add_blocks(&mut pages, order, any_owned);
                    if pages.is_full() {
                        break;
                    }
                }
            }
        }
        let is_full = pages.is_full();
        pages.finish();
        is_full
    }

    /// Returns the block that has all of a grain and more, if there is one. `frames` are some of
    /// that grain.
    #[link_section = ".init.text"]
    fn block_around(&self, frames: Frames) -> Option<Block> {
        let page = frames.first_block(Order::ZERO)?;
        kho_check::larger_block(
            &self.tree,
            &self.stats,
            &self.memblock,
            page.enclosing(GRAIN),
        )
    }

    /// Adds the blocks of `order`, which is no larger than a grain's, that start in `pages`, but
    /// none that has memory that [is owned](Self::is_owned); there is such memory if `any_owned`.
    #[link_section = ".init.text"]
    fn add_blocks(&self, pages: &mut GrainPages, order: Order, any_owned: bool) {
        let Some((first, last)) = pages.frames().keys(order).filter(|_| order <= GRAIN) else {
            return;
        };
        // A grain has no more blocks of an order than a leaf has bits, and both are aligned.
        let Some(leaf) = self.tree.find_leaf(first) else {
            return;
        };
        for (first, word) in leaf.words_between(first, last) {
            for bit in bits(word) {
                if let Some(block) = Key::new(first | bit).and_then(Key::block) {
                    let is_owned = any_owned && self.is_owned(Frames::of_block(block));
                    if !is_owned && self.is_whole(block) {
                        pages.add(block);
                    }
                }
            }
        }
    }

    /// Returns whether `block` can be taken over, and no larger block claims its memory.
    #[link_section = ".init.text"]
    #[inline]
    fn is_whole(&self, block: Block) -> bool {
        let machine = &self.memblock;
        (self.stats.lost == 0 || kho_check::is_usable(machine, Frames::of_block(block)))
            && (self.stats.overlap.is_none()
                || kho_check::larger_block(&self.tree, &self.stats, machine, block).is_none())
    }

    /// Gives what is not reserved in `frames` to the page allocator.
    #[link_section = ".init.text"]
    fn free_gaps(&self, frames: Frames) {
        let mut count = 0u64;
        for block in Gaps::new(&self.sets.reserved, frames, GRAIN) {
            // SAFETY: Takeover has reserved it for nobody. The grain is released for the first
            // time; it has struct pages, and so has all around it, see the head of this file.
            unsafe { kho_mm::free_block(block.pfn().get(), block.order()) };
            count = count.saturating_add(block.order().pages());
        }
        kho_mm::add_memory(count);
    }

    /// Prepares a grain and gives back what was not preserved; unless that has been done, or it is
    /// shared.
    #[link_section = ".init.text"]
    fn release(&self, grain: Grain) {
        if self.pending.remove(grain.key()) == Removal::Absent {
            return;
        }
        if !self.prepare(grain.frames(), self.uninit.contains(grain.key())) {
            self.free_gaps(grain.frames());
        }
    }

    /// Releases the grains that have anything to give back and need no more struct pages for it:
    /// those below the first deferred page of their node.
    #[link_section = ".init.text"]
    fn release_early(&self) {
        for frames in self.busy() {
            let mut rest = frames;
            while !rest.is_empty() {
                // No grain that is pending has a border in it.
                let part = self.memblock.in_one_region(rest);
                let early = part.until(kho_mm::first_deferred(kho_mm::nid_of(part.start())));
                for grain in Grain::numbered(Grain::numbers_in(early)) {
                    if !self.has(grain.frames()) {
                        self.release(grain);
                    }
                }
                rest = rest.from(part.end());
            }
        }
        self.release_shared(kho_mm::first_deferred_of_all());
    }

    /// Releases all grains.
    #[link_section = ".init.text"]
    fn release_all(&self) {
        for frames in self.busy() {
            for grain in Grain::touching(frames) {
                self.release(grain);
            }
        }
        self.release_shared(u64::MAX);
    }

    /// Prepares the shared grains, whose struct pages are all initialised.
    #[link_section = ".init.text"]
    fn prepare_shared(&self) {
        for frames in self.all_of(&self.shared) {
            for grain in Grain::touching(frames) {
                let mut rest = grain.frames();
                while !rest.is_empty() {
                    let part = kho_mm::in_one_zone(self.memblock.in_one_region(rest));
                    self.prepare(part, false);
                    rest = rest.from(part.end());
                }
            }
        }
    }

    /// Releases the shared grains below frame `end`, whose surroundings have struct pages as well.
    #[link_section = ".init.text"]
    fn release_shared(&self, end: u64) {
        for frames in self.all_of(&self.shared) {
            for grain in Grain::touching(frames) {
                let mut rest = grain.frames();
                if rest.end() > end {
                    continue;
                }
                self.shared.remove(grain.key());
                while !rest.is_empty() {
                    let part = kho_mm::in_one_zone(self.memblock.in_one_region(rest));
                    self.free_gaps(part);
                    rest = rest.from(part.end());
                }
            }
        }
    }

    /// Releases the grains that are wholly in a span of frames, on all CPUs.
    #[link_section = ".init.text"]
    fn release_in_parallel(&self, span: Frames) {
        let numbers = Grain::numbers_in(span);
        if grains_in(&self.pending, numbers.clone()).next().is_some() {
            // SAFETY: Spans are worked on one after the other, and each chunk of one is another
            // part of it.
            unsafe {
                bindings::kho_glue_in_parallel(
                    Some(release_chunk),
                    numbers.start as usize,
                    numbers.end as usize,
                    CHUNK,
                )
            };
        }
    }

    /// Frees the nodes of the tree, and what was needed to know all this.
    #[link_section = ".init.text"]
    fn finish(self) {
        if !self.is_refused() {
            let mut count = 0u64;
            for frames in frames_in(&self.sets.nodes, self.all_frames()) {
                for pfn in frames.start()..frames.end() {
                    // SAFETY: Takeover has reserved the old tree's nodes, which nobody looks at any
                    // more, and all memory has struct pages by now.
                    unsafe { kho_mm::free_block(pfn, Order::ZERO) };
                }
                count = count.saturating_add(frames.count());
            }
            kho_mm::add_memory(count);
        }
        self.drop_sets();
    }
}

/// Returns what was taken over, while something has not been given back.
#[link_section = ".init.text"]
fn current() -> Option<&'static Takeover> {
    let takeover = &raw const TAKEOVER;
    // SAFETY: It is written by `commit()`, before anybody asks, and by `finish()`, when nobody
    // does any more.
    unsafe { (*takeover).as_ref() }
}

#[link_section = ".init.text"]
fn finish() {
    IN_USE.store(false, Ordering::Relaxed);
    // SAFETY: No caller that restores is running yet, and no chunk is being worked on.
    if let Some(takeover) = unsafe { (&raw mut TAKEOVER).replace(None) } {
        takeover.finish();
    }
}

/// Gives back what may be in use from the moment on that there is a page allocator.
#[link_section = ".init.text"]
pub(crate) fn init_free() {
    kho_nodemem::set_buddy_is_up();
    let Some(takeover) = current() else { return };
    takeover.prepare_shared();
    if cfg!(CONFIG_DEFERRED_STRUCT_PAGE_INIT) {
        takeover.release_early();
    } else {
        // There is no init_late().
        takeover.release_all();
        finish();
    }
}

/// Initialises struct pages and gives back the rest, on all CPUs.
#[link_section = ".init.text"]
pub(crate) fn init_late() {
    let Some(takeover) = current() else { return };
    // In early boot there were no events yet.
    if !takeover.is_refused() {
        kho_trace::takeover(takeover.ranges, takeover.stats.frames, takeover.stats.nodes);
    }
    // Regions that touch differ in flags or node, which makes no difference here.
    let mut span = Frames::EMPTY;
    for region in takeover.memblock.memory() {
        if region.start() != span.end() {
            takeover.release_in_parallel(span);
            span = region;
        }
        span = Frames::between(span.start(), region.end());
    }
    takeover.release_in_parallel(span);
    takeover.release_shared(u64::MAX);
    finish();
}

/// Grains that one CPU works on at a time: 128 MiB where a grain has 4 MiB.
const CHUNK: usize = 32;

/// Releases the grains from number `start` to before `end`.
///
/// # Safety
///
/// Nobody else may be working on these grains.
#[link_section = ".init.text"]
unsafe extern "C" fn release_chunk(start: usize, end: usize, _arg: *mut c_void) {
    let Some(takeover) = current() else { return };
    for frames in grains_in(&takeover.pending, start as u64..end as u64) {
        for grain in Grain::touching(frames) {
            takeover.release(grain);
            // SAFETY: padata calls this in a thread that holds no lock.
            unsafe { bindings::kho_glue_cond_resched() };
        }
    }
}

/// Returns whether [`ensure_initialised`] has anything to do.
// Always inlined: it is on the path of every folio that is restored.
#[inline(always)]
pub(crate) fn is_pending() -> bool {
    IN_USE.load(Ordering::Relaxed)
}

/// Makes sure that the struct pages of `frames` are initialised, before anything there is
/// restored.
///
/// That is so from `page_alloc_init_late()` on. Only an `early_initcall` can be earlier; these run
/// one after the other.
#[inline]
pub(crate) fn ensure_initialised(frames: Frames) {
    if is_pending() {
        release_around(frames);
    }
}

/// Releases the grains that have any of `frames`.
// As `__ref` in C: only called while there is `.init.text`. Its own section would be lost where it
// is inlined.
#[cold]
#[link_section = ".ref.text"]
#[inline(never)]
fn release_around(frames: Frames) {
    let Some(takeover) = current() else { return };
    // A caller may ask for any number of frames.
    for grain in Grain::touching(frames.until(takeover.memblock.ram_end())) {
        takeover.release(grain);
    }
}
