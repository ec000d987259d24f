// SPDX-License-Identifier: GPL-2.0

//! Complaints: what a caller or another kernel got wrong, in the log, at a bounded rate.
//!
//! The first complaint of a kind is printed in full. Later ones are counted, and summed up once a
//! second for as long as they keep coming.

use core::sync::atomic::{
    AtomicU64,
    Ordering, //
};
use kernel::{
    bindings,
    prelude::*, //
};

/// What may be wrong with something that a caller or another kernel says. That is not a bug of this
/// kernel, which goes on.
#[derive(Clone, Copy)]
#[repr(usize)]
pub(crate) enum Complaint {
    NotShown,
    NotPreserved,
    NothingToRestore,
    NoArea,
    Twice,
    NoKey,
    InScratch,
    Plugged,
}

impl Complaint {
    const ALL: [Self; 8] = [
        Self::NotShown,
        Self::NotPreserved,
        Self::NothingToRestore,
        Self::NoArea,
        Self::Twice,
        Self::NoKey,
        Self::InScratch,
        Self::Plugged,
    ];

    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::NotShown => "a blob is not shown in debugfs",
            Self::NotPreserved => "unpreserving what is not preserved",
            Self::NothingToRestore => "nothing to restore: not preserved, or restored already",
            Self::NoArea => "no vmalloc area: not preserved whole, or no memory",
            Self::Twice => "memory was preserved twice, only the larger block can be restored",
            Self::NoKey => "deleting a key that is not in the tree",
            Self::InScratch => "memory in scratch cannot be preserved",
            Self::Plugged => "memory that was plugged in cannot be preserved",
        }
    }

    /// Returns whether there has been none of this kind for a while.
    pub(crate) fn is_quiet(self) -> bool {
        self.heard().count.load(Ordering::Relaxed) == 0
    }

    fn heard(self) -> &'static Heard {
        static HEARD: [Heard; Complaint::ALL.len()] =
            [const { Heard::new() }; Complaint::ALL.len()];
        // There is one for each kind; the first is as good as a panic.
        HEARD.get(self as usize).unwrap_or(&HEARD[0])
    }
}

/// How often something was complained of.
struct Heard {
    /// 0 if all is quiet; else one for the complaint that has been printed in full, or for those
    /// that have been summed up, and one for each since.
    count: AtomicU64,
    /// What the last one was about.
    last: AtomicU64,
}

impl Heard {
    const fn new() -> Self {
        Self {
            count: AtomicU64::new(0),
            last: AtomicU64::new(0),
        }
    }
}

/// Tells the log what is wrong, and the number it is about. After the first one of a kind, others
/// are only counted, and [`sum_up`] tells how many, until there was none for a second.
#[cold]
#[inline(never)]
pub(crate) fn complain(what: Complaint, number: u64) {
    let heard = what.heard();
    heard.last.store(number, Ordering::Relaxed);
    if heard.count.fetch_add(1, Ordering::Relaxed) == 0 {
        pr_warn!("{} ({number:#x})\n", what.text());
        schedule_summary();
    }
}

/// Has complaints summed up in a second; not before there are work queues, see `kho_rs_init()`.
pub(crate) fn schedule_summary() {
    // SAFETY: The work is a static one.
    unsafe { bindings::kho_glue_schedule_summary() };
}

/// Sums up what was complained of since the last time. Runs from a work queue, so never twice at
/// once.
pub(crate) fn sum_up() {
    let mut again = false;
    for what in Complaint::ALL {
        let heard = what.heard();
        if what.is_quiet() {
            continue;
        }
        // Only this function makes it 0.
        let more = heard.count.swap(1, Ordering::Relaxed).wrapping_sub(1);
        if more > 0 {
            let last = heard.last.load(Ordering::Relaxed);
            pr_warn!("{}: {more} more, the last at {last:#x}\n", what.text());
            again = true;
        } else {
            let end = |count| {
                heard
                    .count
                    .compare_exchange(count, 0, Ordering::Relaxed, Ordering::Relaxed)
            };
            again |= end(1).is_err();
        }
    }
    if again {
        schedule_summary();
    }
}
