// SPDX-License-Identifier: GPL-2.0

//! Atomics as `kho_word.rs` uses them: loom's, which can be weakened, and whose last value can be
//! looked at without taking part in what is modelled.

use super::Break;
use std::sync::atomic;

pub(crate) use atomic::Ordering;

/// A word that all threads of a scenario may use.
pub(crate) struct AtomicU64 {
    word: loom::sync::atomic::AtomicU64,
    /// What was written last, whoever may know it.
    last: atomic::AtomicU64,
}

impl AtomicU64 {
    pub(crate) fn new(value: u64) -> Self {
        Self {
            word: loom::sync::atomic::AtomicU64::new(value),
            last: atomic::AtomicU64::new(value),
        }
    }

    /// Returns what was written last. To be called for checks only.
    pub(crate) fn last(&self) -> u64 {
        self.last.load(Ordering::SeqCst)
    }

    fn written(&self, value: u64) {
        self.last.store(value, Ordering::SeqCst);
    }

    pub(crate) fn load(&self, order: Ordering) -> u64 {
        match Break::Follow.is_on() {
            true => self.word.load(Ordering::Relaxed),
            false => self.word.load(order),
        }
    }

    pub(crate) fn store(&self, value: u64, order: Ordering) {
        self.word.store(value, order);
        self.written(value);
    }

    pub(crate) fn compare_exchange(
        &self,
        from: u64,
        to: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        let (success, failure) = match Break::Publish.is_on() {
            true => (Ordering::Relaxed, Ordering::Relaxed),
            false => (success, failure),
        };
        let result = self.word.compare_exchange(from, to, success, failure);
        if result.is_ok() {
            self.written(to);
        }
        result
    }

    pub(crate) fn fetch_or(&self, mask: u64, order: Ordering) -> u64 {
        if Break::Set.is_on() {
            let old = self.word.load(Ordering::Acquire);
            self.store(old | mask, Ordering::Release);
            return old;
        }
        let old = self.word.fetch_or(mask, order);
        self.written(old | mask);
        old
    }

    pub(crate) fn fetch_and(&self, mask: u64, order: Ordering) -> u64 {
        if Break::Clear.is_on() {
            let old = self.word.load(Ordering::Acquire);
            self.store(old & mask, Ordering::Release);
            return old;
        }
        let old = self.word.fetch_and(mask, order);
        self.written(old & mask);
        old
    }
}
