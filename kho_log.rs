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

/// What a caller or another kernel may have got wrong. That is no bug of this kernel, which goes
/// on.
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
        self.tally().count.load(Ordering::Relaxed) == 0
    }

    fn tally(self) -> &'static Tally {
        static TALLIES: [Tally; Complaint::ALL.len()] =
            [const { Tally::new() }; Complaint::ALL.len()];
        // There is one for each kind; the first is as good as a panic.
        TALLIES.get(self as usize).unwrap_or(&TALLIES[0])
    }
}

/// How often there was a complaint of one kind.
struct Tally {
    /// 0 if there was none for a while; else one for the complaint that was printed in full, or for
    /// those that were summed up, and one for each since.
    count: AtomicU64,
    /// What the last one was about.
    last: AtomicU64,
}

impl Tally {
    const fn new() -> Self {
        Self {
            count: AtomicU64::new(0),
            last: AtomicU64::new(0),
        }
    }
}

/// Logs what is wrong, and the number that it is about. After the first complaint of a kind, others
/// are only counted, and [`sum_up`] logs how many, until there was none for a second.
#[cold]
#[inline(never)]
pub(crate) fn complain(what: Complaint, number: u64) {
    let tally = what.tally();
    tally.last.store(number, Ordering::Relaxed);
    if tally.count.fetch_add(1, Ordering::Relaxed) == 0 {
        pr_warn!("{} ({number:#x})\n", what.text());
        schedule_summary();
    }
}

/// Has complaints summed up in a second; does nothing before there are work queues, see
/// `kho_rs_init()`.
pub(crate) fn schedule_summary() {
    // SAFETY: The work is a static one.
    unsafe { bindings::kho_glue_schedule_summary() };
}

/// Sums up the complaints since the last time. Runs from a work queue, and so never twice at once.
pub(crate) fn sum_up() {
    let mut again = false;
    for what in Complaint::ALL {
        let tally = what.tally();
        if what.is_quiet() {
            continue;
        }
        // Only this function makes it 0.
        let more = tally.count.swap(1, Ordering::Relaxed).saturating_sub(1);
        if more > 0 {
            let last = tally.last.load(Ordering::Relaxed);
            pr_warn!("{}: {more} more, the last at {last:#x}\n", what.text());
            again = true;
        } else {
            let end = |count| {
                tally
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
