// SPDX-License-Identifier: GPL-2.0

//! Complaints: what a caller or another kernel got wrong, in the log, at a bounded rate.
//!
//! Each kind has the limit of `pr_warn_ratelimited()` for itself, so that a flood of one hides no
//! other.

use kernel::{
    bindings,
    prelude::*, //
};

/// What a caller or another kernel may have got wrong. That is no bug of this kernel, which goes
/// on.
#[derive(Clone, Copy)]
#[repr(u32)]
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

// C has a limit for each.
const _: () = assert!(Complaint::Plugged as u32 + 1 == bindings::KHO_COMPLAINTS);

impl Complaint {
    fn text(self) -> &'static str {
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
}

/// Logs what is wrong, and the number that it is about, unless that kind was logged often just now.
#[cold]
#[inline(never)]
pub(crate) fn complain(what: Complaint, number: u64) {
    // SAFETY: There are limits for that many kinds, see above.
    if unsafe { bindings::kho_glue_may_complain(what as u32) } {
        pr_warn!("{} ({number:#x})\n", what.text());
    }
}
