// SPDX-License-Identifier: GPL-2.0

//! The tree under a model checker.
//!
//! `kho_radix.rs` and `kho_word.rs` are the kernel's files. [`atomic`] gives them loom's atomics,
//! which return whatever the kernel's memory model lets a CPU read; [`machine`] is memory, CPUs and
//! the prune protocol of `kho_nodemem.rs`. loom then runs each of [`scenarios`] once for every order of
//! its steps, and for everything that a load may return.
//!
//! That is only possible for small trees: a node has two words, and a key so few bits that there
//! are three levels.

#![cfg(test)]
#![allow(dead_code)]

/// A page has 16 bytes.
const PAGE_SHIFT: u32 = 4;

mod atomic;
#[path = "../../../kho_radix.rs"]
mod kho_radix;
#[path = "../../../kho_word.rs"]
mod kho_word;
mod machine;
mod scenarios;

/// Keys as in the kernel's file of that name, but of fewer bits.
mod kho_key {
    pub(crate) const KEY_BITS: u32 = 9;

    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
    pub(crate) struct Key(u64);

    impl Key {
        pub(crate) const fn new(key: u64) -> Option<Self> {
            if key >> KEY_BITS != 0 {
                return None;
            }
            Some(Self(key))
        }

        pub(crate) const fn get(self) -> u64 {
            self.0
        }
    }
}

/// What can be wrong on purpose. Each is found by some scenario, see [`scenarios::breaks`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Break {
    /// An entry is published without what it leads to (`Word::publish()` is relaxed).
    Publish,
    /// What an entry leads to need not be seen (`Word::follow()` is relaxed).
    Follow,
    /// Bits are set by a load and a store.
    Set,
    /// Bits are cleared by a load and a store.
    Clear,
    /// The generation that hints are of does not matter.
    Generation,
    /// `NodeMem::new_generation()` does nothing.
    Forget,
    /// A prune does not wait for those who are in the tree.
    Grace,
    /// Nobody waits for a prune.
    Wait,
    /// Who enters need not see what the last prune did.
    Enter,
    /// A prune ends without what it did.
    End,
}

impl Break {
    const ALL: [Self; 10] = [
        Self::Publish,
        Self::Follow,
        Self::Set,
        Self::Clear,
        Self::Generation,
        Self::Forget,
        Self::Grace,
        Self::Wait,
        Self::Enter,
        Self::End,
    ];

    /// The variable that names the break of a run.
    const VARIABLE: &'static str = "KHO_LOOM_BREAK";

    /// Returns whether this is wrong in this run.
    fn is_on(self) -> bool {
        static ON: std::sync::OnceLock<Option<Break>> = std::sync::OnceLock::new();
        let read = || {
            let name = std::env::var(Self::VARIABLE).ok()?;
            let found = Self::ALL.into_iter().find(|all| format!("{all:?}") == name);
            Some(found.expect("no such break"))
        };
        *ON.get_or_init(read) == Some(self)
    }
}
