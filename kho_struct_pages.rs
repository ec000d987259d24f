// SPDX-License-Identifier: GPL-2.0

//! Struct pages of memory that is taken over: initialised once, as what restoring finds.
//!
//! ```text
//!  preserved    one page     2^n pages                                 larger than MAX_FOLIO_ORDER
//!  becomes      a page       a folio: head, tails                      pages
//!               P            P H t t t t t t                           P . . . . . . .
//!  restoring    P goes       P goes; as pages: split                   P goes
//!
//!  P  the first page's mark, see [`Mark`]     H  head     t  tail     .  single page
//! ```
//!
//! All have one reference, which restoring hands to the caller. Code that looks at all struct pages
//! meanwhile finds memory that somebody is using.

use super::kho_key::Block;
use super::kho_mm::{
    is_folio,
    nid_of,
    Mark,
    Page, //
};
use super::kho_range::Frames;
use super::kho_word::{
    bits,
    bits_between, //
};
use super::GRAIN_ORDER;
use core::mem::size_of;
use kernel::bindings;

/// The words of a struct page.
type Words = [usize; size_of::<bindings::page>() / size_of::<usize>()];

const LRU: usize = bindings::KHO_PAGE_LRU / size_of::<usize>();

const _: () = assert!(
    size_of::<bindings::page>() % size_of::<usize>() == 0
        && LRU + 2 <= size_of::<Words>() / size_of::<usize>()
);

/// How many pages a grain has.
const GRAIN_PAGES: usize = 1 << GRAIN_ORDER;

/// The struct pages of some frames in one grain and zone.
///
/// Each is written once; those that were deferred late, and by all CPUs.
pub(crate) struct GrainPages {
    frames: Frames,
    first: Page,
    /// The struct page of a single page, if not all are initialised yet. They differ in nothing but
    /// the list head that points to itself: all of a grain is in one zone, node and section.
    single: Option<Words>,
    /// Those of the grain that are initialised, a bit each.
    done: [u64; GRAIN_PAGES / 64],
    /// How many can be restored.
    restorable: u64,
}

impl GrainPages {
    /// Returns those of `frames`. If they `are_deferred`, they are a whole grain, and none is
    /// initialised.
    ///
    /// # Safety
    ///
    /// The frames must be RAM that takeover has reserved.
    #[link_section = ".init.text"]
    pub(crate) unsafe fn new(frames: Frames, are_deferred: bool) -> Option<Self> {
        if are_deferred && frames.count() != GRAIN_PAGES as u64 {
            return None;
        }
        // SAFETY: By the caller's contract.
        let first = unsafe { Page::of(frames.start())? };
        let mut single = None;
        if are_deferred {
            let (page, start) = (first.as_ptr(), frames.start() as usize);
            // SAFETY: By the caller's contract nobody has the pages.
            unsafe {
                bindings::kho_glue_init_deferred(page, start, nid_of(frames.start()));
                single = Some(page.cast::<Words>().read());
            }
        }
        Some(Self {
            frames,
            first,
            single,
            done: [0; GRAIN_PAGES / 64],
            restorable: 0,
        })
    }

    /// Returns whether these are a whole grain, and each page belongs to a block that was added. In
    /// a part of a grain a block may reach beyond the part, and another one be missing.
    #[link_section = ".init.text"]
    pub(crate) fn is_full(&self) -> bool {
        self.restorable == GRAIN_PAGES as u64 && self.frames.count() == GRAIN_PAGES as u64
    }

    /// Returns the frames.
    #[link_section = ".init.text"]
    pub(crate) fn frames(&self) -> Frames {
        self.frames
    }

    /// Makes a preserved block, or what these frames have of one that is larger than a grain, a
    /// folio if it can be one, and marks its first page. It is quicker to add folios before single
    /// pages.
    #[link_section = ".init.text"]
    pub(crate) fn add(&mut self, block: Block) {
        let order = block.order();
        let mut part = Frames::of_block(block);
        let has_head = part.start() >= self.frames.start();
        if order.get() > GRAIN_ORDER {
            part = part.both(self.frames);
        }
        self.restorable = self.restorable.saturating_add(part.count());
        let index = part.start().saturating_sub(self.frames.start()) as usize;
        // SAFETY: The page is one of the grain.
        let page = unsafe { self.first.nth(index) };
        if is_folio(order) {
            self.make_folio(page.as_ptr(), index, part.count() as usize, block);
        } else {
            self.init_rest();
        }
        if has_head {
            page.mark(Mark::Preserved, order);
        }
    }

    /// Makes `count` struct pages from `page` on, which is that number `index` of the grain, those
    /// of a folio.
    #[link_section = ".init.text"]
    fn make_folio(&mut self, page: *mut bindings::page, index: usize, count: usize, block: Block) {
        let (head, order) = (block.pfn().get(), block.order().get());
        let has_head = head >= self.frames.start();
        // SAFETY: All of the block is reserved for whoever restores it. The struct pages of a grain
        // are adjacent; a folio has a tail, and so has each part of one that is larger.
        unsafe {
            let tail = page.add(has_head.into());
            if let Some(single) = &self.single {
                init_single(page, single);
                init_single(tail, single);
                self.note(index, count);
            }
            bindings::kho_glue_make_tail(tail, head as usize, order);
            // Those that are initialised already do not differ either: nobody has had the pages.
            copy_tails(tail, page.add(count));
            if has_head {
                bindings::kho_glue_make_head(page, order);
            }
        }
    }

    /// Notes that the struct pages of a block are initialised.
    #[link_section = ".init.text"]
    fn note(&mut self, index: usize, count: usize) {
        let (word, bit) = (index / 64, (index % 64) as u64);
        if count < 64 {
            if let Some(word) = self.done.get_mut(word) {
                *word |= bits_between(bit, bit.saturating_add(count as u64));
            }
        } else if let Some(words) = self.done.get_mut(word..word.saturating_add(count / 64)) {
            words.fill(u64::MAX);
        }
    }

    /// Initialises all that are not yet as those of single pages.
    #[link_section = ".init.text"]
    fn init_rest(&mut self) {
        let Some(single) = self.single.take() else {
            return;
        };
        let mut page = self.first.as_ptr();
        for done in self.done {
            // SAFETY: These are the next 64 of the grain, and adjacent.
            unsafe {
                if done == 0 {
                    for i in 0..64 {
                        init_single(page.add(i), &single);
                    }
                } else {
                    for i in bits(!done) {
                        init_single(page.add(i as usize), &single);
                    }
                }
                page = page.add(64);
            }
        }
        // SAFETY: All of the grain has struct pages now.
        unsafe { bindings::kho_glue_init_pageblocks(self.frames.start() as usize, GRAIN_PAGES) };
    }

    /// Ends this: all are initialised, and what can be restored counts as managed memory that is in
    /// use, as the huge pages do that HugeTLB has from memblock.
    #[link_section = ".init.text"]
    pub(crate) fn finish(mut self) {
        self.init_rest();
        if self.restorable > 0 {
            // SAFETY: The struct page is initialised, and its zone is that of all of them.
            unsafe {
                bindings::kho_glue_add_managed(self.first.as_ptr(), self.restorable as usize)
            };
        }
    }
}

/// Writes a struct page. Spelled out for the usual size: with -Os a loop takes four times as long.
///
/// # Safety
///
/// `page` must be one that nobody else looks at.
#[inline(always)]
unsafe fn write(page: *mut bindings::page, words: &Words) {
    // SAFETY: By the caller's contract.
    unsafe {
        if let Ok([a, b, c, d, e, f, g, h]) = <[usize; 8]>::try_from(words.as_slice()) {
            let word = page.cast::<usize>();
            word.write(a);
            word.add(1).write(b);
            word.add(2).write(c);
            word.add(3).write(d);
            word.add(4).write(e);
            word.add(5).write(f);
            word.add(6).write(g);
            word.add(7).write(h);
        } else {
            page.cast::<Words>().write(*words);
        }
    }
}

/// Makes a struct page that of a single page, as the template `single` is.
///
/// # Safety
///
/// As for [`write()`].
#[inline(always)]
unsafe fn init_single(page: *mut bindings::page, single: &Words) {
    // SAFETY: By the caller's contract; a list head has two words.
    unsafe {
        let lru = page.cast::<usize>().add(LRU);
        let mut words = *single;
        if let Some(list) = words.get_mut(LRU..LRU + 2) {
            list.fill(lru as usize);
        }
        write(page, &words);
    }
}

/// Makes the struct pages behind `tail`, to before `end`, what that one is.
///
/// # Safety
///
/// As for [`write()`]; `tail` must be initialised, and adjacent to the others.
#[link_section = ".init.text"]
unsafe fn copy_tails(tail: *mut bindings::page, end: *mut bindings::page) {
    // SAFETY: By the caller's contract.
    unsafe {
        let words = tail.cast::<Words>().read();
        let mut page = tail.add(1);
        // Nothing is written but this: what a loop itself takes counts.
        while end.offset_from(page) >= 8 {
            write(page, &words);
            write(page.add(1), &words);
            write(page.add(2), &words);
            write(page.add(3), &words);
            write(page.add(4), &words);
            write(page.add(5), &words);
            write(page.add(6), &words);
            write(page.add(7), &words);
            page = page.add(8);
        }
        while page < end {
            write(page, &words);
            page = page.add(1);
        }
    }
}
