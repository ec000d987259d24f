// SPDX-License-Identifier: GPL-2.0

//! The 64-bit word that tree nodes are made of.
//!
//! Tables hold physical addresses and leaves hold bits; several CPUs change both at once, and the
//! next kernel reads them as plain memory. The kernel's own [`Atomic`] would be the usual choice,
//! but it has no `or`/`and`, and with gcc each of its operations is an out-of-line call, which is
//! what the preserve path must not have. Every ordering below names its counterpart in the Linux
//! kernel memory model, so that the two can be compared.
//!
//! [`Atomic`]: srctree/rust/kernel/sync/atomic.rs

// The crate chooses them: a model checker brings its own.
use super::atomic::{
    AtomicU64,
    Ordering, //
};

/// One word of a tree node: a table entry or 64 bits of a leaf.
#[repr(transparent)]
pub(crate) struct Word(AtomicU64);

impl Word {
    /// Reads a table entry; what the entry points to is visible (`smp_load_acquire()`).
    #[inline(always)]
    pub(crate) fn follow(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Reads the word (`READ_ONCE()`).
    #[inline(always)]
    pub(crate) fn load(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Writes the word while nobody else can see it (`WRITE_ONCE()`).
    #[inline(always)]
    pub(crate) fn store(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Puts `value` into an empty entry and makes all that was written before visible through it
    /// (`cmpxchg()`). Returns the winner's value if the entry was not empty.
    #[inline(always)]
    pub(crate) fn publish(&self, value: u64) -> Result<(), u64> {
        self.0
            .compare_exchange(0, value, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
    }

    /// Sets the bits of `mask` and returns the old word (`atomic64_fetch_or_relaxed()`).
    ///
    /// Bits order nothing between CPUs: callers have to agree on who preserves or gives up a block,
    /// as for any flag on that memory.
    #[inline(always)]
    pub(crate) fn set(&self, mask: u64) -> u64 {
        self.0.fetch_or(mask, Ordering::Relaxed)
    }

    /// Clears the bits of `mask` and returns the old word (`atomic64_fetch_and_relaxed()`).
    #[inline(always)]
    pub(crate) fn clear(&self, mask: u64) -> u64 {
        self.0.fetch_and(!mask, Ordering::Relaxed)
    }
}

/// Returns a word with the bits from `from` to before `end` set; what there is of them, if `end` is
/// more than 64.
#[inline(always)]
pub(crate) const fn bits_between(from: u64, end: u64) -> u64 {
    low_bits(end) & !low_bits(from)
}

#[inline(always)]
const fn low_bits(count: u64) -> u64 {
    if count < u64::BITS as u64 {
        !(u64::MAX << count)
    } else {
        u64::MAX
    }
}

/// Returns the numbers of the bits that are set in `word`, ascending.
#[inline]
pub(crate) fn bits(word: u64) -> impl Iterator<Item = u64> {
    let mut rest = word;
    core::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let bit = rest.trailing_zeros();
        rest &= rest - 1;
        Some(bit.into())
    })
}
