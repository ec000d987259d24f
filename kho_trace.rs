// SPDX-License-Identifier: GPL-2.0

//! Tracepoints, in `events/kho/` of tracefs: a static branch that is not taken while they are off.
//!
//! Only what succeeded is traced. A range has one event, whatever blocks it is cut into.
//! Unpreserving a range with holes has one event for each preserved part.

use super::kho_range::Frames;
#[cfg(CONFIG_TRACEPOINTS)]
use kernel::{
    bindings,
    jump_label::static_branch_unlikely, //
};
use kernel::{
    ffi::c_ulong,
    tracepoint::declare_trace, //
};

declare_trace! {
    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn kho_preserve(pfn: c_ulong, nr_pages: c_ulong);

    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn kho_unpreserve(pfn: c_ulong, nr_pages: c_ulong);

    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn kho_restore(pfn: c_ulong, nr_pages: c_ulong);

    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn kho_takeover(runs: c_ulong, nr_pages: c_ulong, nodes: c_ulong);
}

/// Makes a function that returns whether a tracepoint is on, by the same static branch. On the path
/// of each folio, nothing may be kept just for an event: that costs instructions while it is off.
macro_rules! is_on {
    ($name:ident, $tracepoint:ident) => {
        #[inline(always)]
        pub(crate) fn $name() -> bool {
            #[cfg(CONFIG_TRACEPOINTS)]
            // SAFETY: It is always okay to look at the static key of a tracepoint.
            return unsafe {
                static_branch_unlikely!(bindings::$tracepoint, bindings::tracepoint, key)
            };
            #[cfg(not(CONFIG_TRACEPOINTS))]
            return false;
        }
    };
}

is_on!(preserve_is_on, __tracepoint_kho_preserve);
is_on!(unpreserve_is_on, __tracepoint_kho_unpreserve);
is_on!(restore_is_on, __tracepoint_kho_restore);

/// Some frames were preserved.
#[inline(always)]
pub(crate) fn preserve(frames: Frames) {
    // SAFETY: Always safe to call.
    unsafe { kho_preserve(frames.start() as c_ulong, frames.count() as c_ulong) }
}

/// Some frames are not preserved any more.
#[inline(always)]
pub(crate) fn unpreserve(frames: Frames) {
    // SAFETY: Always safe to call.
    unsafe { kho_unpreserve(frames.start() as c_ulong, frames.count() as c_ulong) }
}

/// Some frames were restored.
#[inline(always)]
pub(crate) fn restore(frames: Frames) {
    // SAFETY: Always safe to call.
    unsafe { kho_restore(frames.start() as c_ulong, frames.count() as c_ulong) }
}

/// So many runs of frames, frames in all, and nodes of a tree were taken over.
#[inline(always)]
pub(crate) fn takeover(runs: u64, frames: u64, nodes: u64) {
    // SAFETY: Always safe to call.
    unsafe { kho_takeover(runs as c_ulong, frames as c_ulong, nodes as c_ulong) }
}
