// SPDX-License-Identifier: GPL-2.0

//! The radix tree that is handed over: a set of keys, one bit each.
//!
//! Every node is one page. Inner nodes are tables of physical addresses, 0 where a subtree is
//! absent; the nodes at level 0 are leaves, bitmaps of keys. With 4 KiB pages:
//!
//! ```text
//!  key    52..51   50..42   41..33   32..24   23..15   14..0
//!        +--------+--------+--------+--------+--------+--------------+
//!        | level 5| level 4| level 3| level 2| level 1| bit in leaf  |
//!        +--------+--------+--------+--------+--------+--------------+
//! ```
//!
//! The tree is the handover format itself: at every moment another kernel may start from it. An
//! absent subtree and one without bits mean the same.
//!
//! # Concurrency
//!
//! [`Tree::add`], [`Tree::remove`] and all readers may run at once, without a lock:
//!
//! - An absent subtree is built aside, key included, and published by one compare-and-swap of the
//!   entry that lacks it. The loser continues in the winner's subtree.
//! - All nodes an insertion may need are allocated before anything is published, so that it
//!   happens whole or not at all.
//! - A published node stays where it is. Only [`Tree::prune`] and [`Tree::destroy`] take nodes
//!   away, and need to be alone in the tree. `add` and `remove` hold the guard that
//!   [`NodeMem::enter`] returns, and `prune` waits until nobody holds one.
//!
//! # Hints
//!
//! Keys of one order that are added or removed one after the other mostly share a leaf. So each
//! CPU remembers the leaf that it used last for an order, see [`Hints`], and goes there without a
//! descent if the next key belongs to it. Keys in random order mostly share the table above their
//! leaves, which is remembered as well:
//!
//! ```text
//!  hint    generation | root | key >> LEAF_BITS | leaf | table
//!          the same as now, as this tree's, as this key's?  yes: the leaf.
//!                                           but for the bits of level 1?  look in the table.
//!                                                           else: descend, remember.
//! ```
//!
//! A hint says "this tree has that leaf for those keys, below that table", which stays true for as
//! long as no node is taken away. [`NodeMem::new_generation`] invalidates all hints at once;
//! `prune` and `destroy` call it while they are alone, before they free anything. Hints are read
//! and written under a guard only. So a CPU that finds a hint of the present generation is in the
//! tree, and no node has been taken away since the hint was written.
//!
//! Hints are no shared state: CPUs that use different leaves write to no common cache line.
//!
//! The format is ABI:
//! [`include/linux/kho/abi/kexec_handover.h`](srctree/include/linux/kho/abi/kexec_handover.h).

use super::kho_key::{
    Key,
    KEY_BITS, //
};
use super::kho_word::{
    bits_between,
    Word, //
};
use super::PAGE_SHIFT;
use core::{
    cell::Cell,
    mem::size_of,
    num::NonZeroU64,
    ops::Range, //
};

/// Entries of a table, as a power of two (`KHO_TABLE_SIZE_LOG2`).
pub(crate) const TABLE_BITS: u32 = PAGE_SHIFT - size_of::<u64>().ilog2();

/// Bits of a leaf, as a power of two (`KHO_BITMAP_SIZE_LOG2`).
pub(crate) const LEAF_BITS: u32 = PAGE_SHIFT + 3;

/// Levels of the tree, the leaves' included (`KHO_TREE_MAX_DEPTH`).
pub(crate) const DEPTH: u32 = (KEY_BITS - LEAF_BITS).div_ceil(TABLE_BITS) + 1;

/// The level of the root.
const ROOT: u32 = DEPTH - 1;

/// Words in a node.
pub(crate) const WORDS: u64 = 1 << TABLE_BITS;

/// Bits in a word.
pub(crate) const WORD_BITS: u64 = u64::BITS as u64;

/// Bits, and so keys, in a leaf.
pub(crate) const LEAF_SIZE: u64 = 1 << LEAF_BITS;

/// A node: a table of physical addresses, or a leaf's bitmap.
#[repr(C)]
pub(crate) struct Node {
    words: [Word; WORDS as usize],
}

impl Node {
    /// Returns the word at `index`, which wraps around: no index is out of bounds.
    #[inline(always)]
    pub(crate) fn word(&self, index: u64) -> &Word {
        // BOUNDS: The mask is the array's length less one.
        &self.words[(index & (WORDS - 1)) as usize]
    }

    /// Returns the index and the value of the first word from `index` on that is not 0.
    // Always inlined: takeover calls it for every word of a leaf, most of which are in use.
    #[inline(always)]
    pub(crate) fn next_used(&self, index: u64) -> Option<(u64, u64)> {
        if index < WORDS {
            let value = self.word(index).load();
            if value != 0 {
                return Some((index, value));
            }
        }
        self.search_used(index, WORDS)
    }

    /// As [`Node::next_used`], where the first word is likely to be 0. Words from `end` on, which
    /// is at most [`WORDS`], are not looked at.
    #[inline(never)]
    fn search_used(&self, index: u64, end: u64) -> Option<(u64, u64)> {
        let mut rest = self.words.get(index as usize..end as usize)?;
        // Most words of most nodes are 0. A loop over each of them takes three times as long.
        while let [a, b, c, d, e, f, g, h, tail @ ..] = rest {
            let low = a.load() | b.load() | c.load() | d.load();
            if low | e.load() | f.load() | g.load() | h.load() != 0 {
                break;
            }
            rest = tail;
        }
        let mut index = end.saturating_sub(rest.len() as u64);
        for word in rest {
            let value = word.load();
            if value != 0 {
                return Some((index, value));
            }
            index = index.saturating_add(1);
        }
        None
    }

    /// Returns the entries of a table from `index` to before `end` that are used, and where they
    /// lead.
    fn children_between(&self, index: u64, end: u64) -> impl Iterator<Item = (u64, NodeAddr)> + '_ {
        let mut from = index;
        core::iter::from_fn(move || {
            let (index, _) = self.search_used(from, end)?;
            from = index.saturating_add(1);
            Some((index, NodeAddr::new(self.word(index).follow())?))
        })
    }

    /// Returns all entries of a table that are used, and where they lead.
    fn children(&self) -> impl Iterator<Item = (u64, NodeAddr)> + '_ {
        self.children_between(0, WORDS)
    }

    /// Returns whether all words are 0.
    fn is_empty(&self) -> bool {
        self.search_used(0, WORDS).is_none()
    }

    /// Returns the first run of set bits at or after bit `from`: its first bit, and how many.
    #[inline(never)]
    pub(crate) fn run_from(&self, from: u64) -> Option<(u64, u64)> {
        if from >= LEAF_SIZE {
            return None;
        }
        let mut index = from / WORD_BITS;
        let mut word = self.word(index).load() & bits_between(from % WORD_BITS, WORD_BITS);
        if word == 0 {
            (index, word) = self.search_used(index + 1, WORDS)?;
        }
        let skip = word.trailing_zeros();
        let first = index.saturating_mul(WORD_BITS) | u64::from(skip);
        let mut count = u64::from(word.wrapping_shr(skip).trailing_ones());
        // A run that reaches the end of its word may go on in the next one.
        let mut is_open = u64::from(skip).saturating_add(count) == WORD_BITS;
        while is_open && index < WORDS - 1 {
            index += 1;
            let more = u64::from(self.word(index).load().trailing_ones());
            count = count.saturating_add(more);
            is_open = more == WORD_BITS;
        }
        Some((first, count))
    }

    /// Returns whether `count` bits from bit `from` on are set.
    pub(crate) fn has_range(&self, from: u64, count: u64) -> bool {
        let end = from.saturating_add(count);
        let mut at = from;
        while at < end {
            let first = at & !(WORD_BITS - 1);
            let bits = bits_between(at.saturating_sub(first), end.saturating_sub(first));
            if !self.word(at / WORD_BITS).load() & bits != 0 {
                return false;
            }
            at = first.saturating_add(WORD_BITS);
        }
        true
    }

    /// Sets `count` bits from bit `from` on, while nobody else uses the node; returns how many
    /// were set before.
    #[link_section = ".init.text"]
    pub(crate) fn set_range(&self, from: u64, count: u64) -> u64 {
        let end = from.saturating_add(count).min(LEAF_SIZE);
        let mut again = 0u64;
        let mut set = |word: &Word, mask: u64| {
            let old = word.load();
            word.store(old | mask);
            if old != 0 {
                again = again.saturating_add((old & mask).count_ones().into());
            }
        };
        let (first, last) = (from / WORD_BITS, end / WORD_BITS);
        let head = bits_between(from % WORD_BITS, WORD_BITS);
        let tail = bits_between(0, end % WORD_BITS);
        if first < last {
            set(self.word(first), head);
            let whole = self.words.get(first as usize + 1..last as usize);
            for word in whole.unwrap_or(&[]) {
                // Most of a large block is whole words that nobody has set.
                match word.load() {
                    0 => word.store(u64::MAX),
                    _ => set(word, u64::MAX),
                }
            }
            set(self.word(last), tail);
        } else if from < end {
            set(self.word(first), head & tail);
        }
        again
    }

    /// Returns the words that have the keys from `first` to `last`, which are in this leaf: each as
    /// the key of its first bit, and without the bits of other keys.
    #[inline]
    pub(crate) fn words_between(
        &self,
        first: Key,
        last: Key,
    ) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (first, last) = (first.get(), last.get());
        (first / WORD_BITS..=last / WORD_BITS).map(move |index| {
            let key = index.saturating_mul(WORD_BITS);
            let from = first.saturating_sub(key);
            let end = last.saturating_sub(key).saturating_add(1);
            (key, self.word(index).load() & bits_between(from, end))
        })
    }

    /// Returns the runs of set bits, in ascending order, each as its first bit and how many.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut from = 0;
        core::iter::from_fn(move || {
            let (first, count) = self.run_from(from)?;
            from = first.saturating_add(count);
            Some((first, count))
        })
    }
}

/// The physical address of a node, never 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NodeAddr(NonZeroU64);

impl NodeAddr {
    /// Returns `phys` as a node's address, or [`None`] if it is 0, which means "absent".
    #[inline(always)]
    pub(crate) const fn new(phys: u64) -> Option<Self> {
        match NonZeroU64::new(phys) {
            Some(phys) => Some(Self(phys)),
            None => None,
        }
    }

    /// Returns the physical address.
    #[inline(always)]
    pub(crate) const fn get(self) -> u64 {
        self.0.get()
    }
}

/// Where a CPU found leaves, by the order of their keys. All zeroes are hints that never match.
///
/// A range of memory is cut into blocks whose orders rise and fall, so that one hint for all orders
/// would be of no use there.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Hints([Hint; HINTS]);

/// How many keys are added or removed under one guard at most. A range of memory rarely has more
/// blocks, and preemption is disabled meanwhile.
const BATCH: u32 = 64;

/// Two orders share a hint only if they are this far apart; the page allocator has eleven.
const HINTS: usize = 16;

impl Hints {
    /// Returns the hint for `key`.
    #[inline(always)]
    fn of(&self, key: Key) -> &Hint {
        // A key starts with the bit that says its order, and so does what a leaf's keys share.
        // The 1 does not matter, but says that it is not 0.
        let order = (leaf_keys(key) | 1).leading_zeros() as usize;
        // BOUNDS: The remainder is less than the array's length.
        &self.0[order % HINTS]
    }
}

/// Where a CPU found a leaf.
///
/// # Invariants
///
/// While nodes are of `generation`, the tree whose root is at `root` has its leaf for the keys
/// whose upper bits are `keys` at `leaf`, and above that its table of level 1 at `table`; or `root`
/// is 0.
// A cache line each.
#[repr(C, align(64))]
struct Hint {
    generation: Cell<u64>,
    root: Cell<u64>,
    keys: Cell<u64>,
    leaf: Cell<u64>,
    table: Cell<u64>,
}

impl Hint {
    /// Returns the leaf for `key`, if it is the one that was noted.
    #[inline(always)]
    fn leaf_for(&self, generation: u64, root: NodeAddr, key: Key) -> Option<NodeAddr> {
        if self.keys.get() != leaf_keys(key)
            || self.root.get() != root.get()
            || self.generation.get() != generation
        {
            return None;
        }
        NodeAddr::new(self.leaf.get())
    }

    /// Returns the table above the leaf for `key`, if it is the one that was noted.
    #[inline(always)]
    fn table_for(&self, generation: u64, root: NodeAddr, key: Key) -> Option<NodeAddr> {
        if (self.keys.get() ^ leaf_keys(key)) >> TABLE_BITS != 0
            || self.root.get() != root.get()
            || self.generation.get() != generation
        {
            return None;
        }
        NodeAddr::new(self.table.get())
    }

    /// Notes a table and a leaf below it.
    #[inline(always)]
    fn remember(&self, generation: u64, root: NodeAddr, key: Key, table: NodeAddr, leaf: NodeAddr) {
        self.generation.set(generation);
        self.root.set(root.get());
        self.keys.set(leaf_keys(key));
        self.leaf.set(leaf.get());
        self.table.set(table.get());
    }
}

impl Default for Hint {
    fn default() -> Self {
        // INVARIANT: The root is 0.
        Self {
            generation: Cell::new(0),
            root: Cell::new(0),
            keys: Cell::new(0),
            leaf: Cell::new(0),
            table: Cell::new(0),
        }
    }
}

/// Permission to look at the nodes of a tree, until this is dropped.
pub(crate) trait Guard {
    /// Returns the hints of this CPU, which nobody else uses while the guard is held.
    fn hints(&self) -> &Hints;

    /// Returns the generation that nodes were of when the tree was entered. It stays the same until
    /// the guard is dropped.
    fn generation(&self) -> u64;
}

/// Where nodes live.
pub(crate) trait NodeMem: Copy {
    /// Held by [`Tree::add`], [`Tree::remove`] and the functions that do the same to many keys,
    /// while they look at nodes, but not while they allocate. [`Tree::prune`] must only be called
    /// while nobody holds one.
    type Guard<'a>: Guard
    where
        Self: 'a;

    /// Enters the tree, waiting while it is being pruned.
    fn enter(&self) -> Self::Guard<'_>;

    /// Starts a new generation of nodes: all [`Hints`] are useless from now on, in all trees of
    /// this memory. Nobody may be in a tree of which nodes are about to be taken away.
    fn new_generation(&self);

    /// Allocates a node of zeroes. May sleep.
    fn alloc(&self) -> Option<NodeAddr>;

    /// Takes back a node that [`NodeMem::alloc`] returned and nobody can reach any more.
    fn free(&self, node: NodeAddr);

    /// Returns the node at an address that was found in the tree.
    ///
    /// A tree that another kernel wrote may have any number there; its addresses are looked at
    /// by [`Tree::visit`]'s visitor before they get here, and come here only if it lets them.
    fn node(&self, addr: NodeAddr) -> &Node;
}

/// A node could not be allocated. The tree is as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NoMemory;

/// What became of a key that was to be removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Removal {
    /// It was not in the tree.
    Absent,
    /// It was removed.
    Removed,
    /// It was removed and its word has no other key, so that [`Tree::prune`] may have nodes to
    /// free. That is as much as can be told in passing; [`Tree::has_empty`] knows.
    Emptied,
}

/// Nodes for one insertion, allocated before anything is published.
struct Preload<'m, M: NodeMem> {
    mem: &'m M,
    nodes: [Option<NodeAddr>; ROOT as usize],
}

impl<'m, M: NodeMem> Preload<'m, M> {
    fn new(mem: &'m M) -> Self {
        Self {
            mem,
            nodes: [None; ROOT as usize],
        }
    }

    /// Allocates until there is a node for each level below `level`.
    #[inline(never)]
    fn fill(&mut self, level: u32) -> Result<(), NoMemory> {
        for slot in self.nodes.iter_mut().take(level as usize) {
            if slot.is_none() {
                *slot = Some(self.mem.alloc().ok_or(NoMemory)?);
            }
        }
        Ok(())
    }

    /// Links the nodes below `level` into a subtree that holds `key` only, and returns its top.
    /// [`None`] means that there are not enough of them.
    ///
    /// The nodes are for one key, and each of them is for one entry: the next attempt overwrites
    /// what one that failed has written.
    fn link(&self, level: u32, key: Key) -> Option<NodeAddr> {
        let mut below = (leaf_index(key), leaf_mask(key));
        let mut top = None;
        for at in 0..level {
            let addr = (*self.nodes.get(at as usize)?)?;
            let (index, value) = below;
            self.mem.node(addr).word(index).store(value);
            top = Some(addr);
            below = (table_index(key, at + 1), addr.get());
        }
        top
    }

    /// Forgets the nodes below `level`, which are in the tree now.
    fn spend(&mut self, level: u32) {
        self.nodes
            .iter_mut()
            .take(level as usize)
            .for_each(|slot| *slot = None);
    }
}

impl<M: NodeMem> Drop for Preload<'_, M> {
    #[inline]
    fn drop(&mut self) {
        for addr in self.nodes.iter().flatten() {
            self.mem.free(*addr);
        }
    }
}

/// Returns the bits of a key below those that level `level` of the tree resolves.
#[inline(always)]
const fn level_shift(level: u32) -> u32 {
    // OVERFLOW: `level` is at least 1 and at most `DEPTH`, so this is less than 64.
    LEAF_BITS.wrapping_add(level.wrapping_sub(1).wrapping_mul(TABLE_BITS))
}

/// Returns the entry for `key` in a table at `level`; bits of higher levels are cut off by
/// [`Node::word`].
#[inline(always)]
const fn table_index(key: Key, level: u32) -> u64 {
    key.get().wrapping_shr(level_shift(level))
}

/// Returns the first key below entry `index` of a table at `level` whose keys start at `first`.
#[inline(always)]
const fn child_first(first: u64, level: u32, index: u64) -> u64 {
    first | index.wrapping_shl(level_shift(level))
}

/// Returns the last key of a node at `level` whose keys start at `first`.
#[inline]
const fn last_key(first: u64, level: u32) -> u64 {
    // The keys of the root have all bits that its entries could tell apart.
    let bits = level_shift(level.saturating_add(1)) as u64;
    first | bits_between(0, bits)
}

/// Returns the bits of `key` that it shares with all keys of its leaf.
#[inline(always)]
const fn leaf_keys(key: Key) -> u64 {
    key.get() >> LEAF_BITS
}

/// Returns the word for `key` in its leaf.
#[inline(always)]
const fn leaf_index(key: Key) -> u64 {
    key.get() / WORD_BITS
}

/// Returns the bit for `key` in its word.
#[inline(always)]
const fn leaf_mask(key: Key) -> u64 {
    1u64.wrapping_shl(key.get() as u32)
}

/// A radix tree in memory `M`.
pub(crate) struct Tree<M> {
    mem: M,
    root: NodeAddr,
}

impl<M: NodeMem> Tree<M> {
    /// Makes an empty tree.
    pub(crate) fn new(mem: M) -> Result<Self, NoMemory> {
        let root = mem.alloc().ok_or(NoMemory)?;
        Ok(Self { mem, root })
    }

    /// Returns the tree whose root is at `root`.
    pub(crate) fn from_root(mem: M, root: NodeAddr) -> Self {
        Self { mem, root }
    }

    /// Returns where the root is.
    pub(crate) fn root(&self) -> NodeAddr {
        self.root
    }

    /// Returns where the table above the leaf for `key` is, or the level and entry where the way to
    /// it ends.
    #[inline(always)]
    fn locate_table(&self, key: Key) -> Result<NodeAddr, (u32, &Word)> {
        // A step for each level there is: a loop is half as long again.
        const _: () = assert!(ROOT <= 5);
        let mut addr = self.root;
        if ROOT >= 5 {
            addr = self.child(addr, key, 5)?;
        }
        if ROOT >= 4 {
            addr = self.child(addr, key, 4)?;
        }
        if ROOT >= 3 {
            addr = self.child(addr, key, 3)?;
        }
        if ROOT >= 2 {
            addr = self.child(addr, key, 2)?;
        }
        Ok(addr)
    }

    /// Returns where the way to `key` goes from the table at `addr`, which is at `level`, or that
    /// level and the entry if it ends there.
    #[inline(always)]
    fn child(&self, addr: NodeAddr, key: Key, level: u32) -> Result<NodeAddr, (u32, &Word)> {
        let entry = self.mem.node(addr).word(table_index(key, level));
        NodeAddr::new(entry.follow()).ok_or((level, entry))
    }

    /// Returns the leaf for `key`, or the level and entry where the way to it ends.
    #[inline(always)]
    fn find(&self, key: Key) -> Result<&Node, (u32, &Word)> {
        let table = self.locate_table(key)?;
        self.child(table, key, 1).map(|addr| self.mem.node(addr))
    }

    /// Returns the tree for a function that is not inlined. Were that given a reference, the tree
    /// would be written to memory for each key.
    #[inline(always)]
    fn by_value(&self) -> Self {
        Self::from_root(self.mem, self.root)
    }

    /// Returns where the leaf for `key` is, by the hint if that is the one.
    // The address, which is known not to be 0: a reference would be looked at once more.
    #[inline(always)]
    fn leaf_for(&self, guard: &M::Guard<'_>, key: Key) -> Option<NodeAddr> {
        let (hint, generation) = (guard.hints().of(key), guard.generation());
        hint.leaf_for(generation, self.root, key)
            .or_else(|| self.by_value().search(hint, generation, key))
    }

    /// Finds the leaf for `key`, which is not the one that was noted, and notes it.
    #[inline(never)]
    fn search(self, hint: &Hint, generation: u64, key: Key) -> Option<NodeAddr> {
        let table = match hint.table_for(generation, self.root, key) {
            Some(table) => table,
            None => self.locate_table(key).ok()?,
        };
        let leaf = self.child(table, key, 1).ok()?;
        // INVARIANT: It has just been found. No node is taken away under the guard, and the
        // generation changes before any is.
        hint.remember(generation, self.root, key, table, leaf);
        Some(leaf)
    }

    /// Adds `key`; returns whether it is new. May sleep.
    ///
    /// # Errors
    ///
    /// [`NoMemory`] if a node was needed and could not be allocated; the tree is as it was then.
    #[inline(always)]
    pub(crate) fn add(&self, key: Key) -> Result<bool, NoMemory> {
        let guard = self.mem.enter();
        if let Some(leaf) = self.leaf_for(&guard, key) {
            return Ok(set(self.mem.node(leaf), key));
        }
        drop(guard);
        self.by_value().grow(key)
    }

    /// Adds `keys` one after the other, in few passes. May sleep.
    ///
    /// # Errors
    ///
    /// The first key that was not added, and [`NoMemory`] unless the reason is that it was in the
    /// tree. All keys before it were added.
    pub(crate) fn add_all(
        &self,
        mut keys: impl Iterator<Item = Key>,
    ) -> Result<(), (Key, Option<NoMemory>)> {
        loop {
            let Some(key) = self.add_some(&mut keys)? else {
                return Ok(());
            };
            match self.by_value().grow(key) {
                Ok(true) => {}
                Ok(false) => return Err((key, None)),
                Err(error) => return Err((key, Some(error))),
            }
        }
    }

    /// Adds `keys` until there are no more, or up to one for which nodes are missing, which is
    /// returned.
    #[inline(always)]
    fn add_some(
        &self,
        keys: &mut impl Iterator<Item = Key>,
    ) -> Result<Option<Key>, (Key, Option<NoMemory>)> {
        loop {
            let guard = self.mem.enter();
            for _ in 0..BATCH {
                let Some(key) = keys.next() else {
                    return Ok(None);
                };
                match self.leaf_for(&guard, key) {
                    Some(leaf) if set(self.mem.node(leaf), key) => {}
                    Some(_) => return Err((key, None)),
                    None => return Ok(Some(key)),
                }
            }
        }
    }

    /// Removes `keys` in few passes, and tells `absent` of those that were not in the tree.
    /// Returns whether there may be nodes to free, see [`Removal::Emptied`].
    pub(crate) fn remove_all(
        &self,
        mut keys: impl Iterator<Item = Key>,
        mut absent: impl FnMut(Key),
    ) -> bool {
        let mut emptied = false;
        while let Some(key) = self.remove_some(&mut keys, &mut emptied) {
            absent(key);
        }
        emptied
    }

    /// Removes `keys` until there are no more, or up to one that is not in the tree, which is
    /// returned.
    #[inline(always)]
    fn remove_some(&self, keys: &mut impl Iterator<Item = Key>, emptied: &mut bool) -> Option<Key> {
        loop {
            let guard = self.mem.enter();
            for _ in 0..BATCH {
                let key = keys.next()?;
                let leaf = self.leaf_for(&guard, key);
                match leaf.map(|leaf| clear(self.mem.node(leaf), key)) {
                    Some(Removal::Removed) => {}
                    Some(Removal::Emptied) => *emptied = true,
                    Some(Removal::Absent) | None => return Some(key),
                }
            }
        }
    }

    /// Adds `key` where nodes are missing.
    #[cold]
    #[inline(never)]
    fn grow(self, key: Key) -> Result<bool, NoMemory> {
        let mut preload = Preload::new(&self.mem);
        // Each turn sees a tree with fewer nodes missing or, after a prune, has more preloaded.
        loop {
            let missing = {
                let _pass = self.mem.enter();
                match self.find(key) {
                    Ok(leaf) => return Ok(set(leaf, key)),
                    Err((level, entry)) => match preload.link(level, key) {
                        None => level,
                        Some(top) => {
                            if entry.publish(top.get()).is_ok() {
                                preload.spend(level);
                                return Ok(true);
                            }
                            continue;
                        }
                    },
                }
            };
            preload.fill(missing)?;
        }
    }

    /// Removes `key`.
    #[inline(always)]
    pub(crate) fn remove(&self, key: Key) -> Removal {
        let guard = self.mem.enter();
        match self.leaf_for(&guard, key) {
            Some(leaf) => clear(self.mem.node(leaf), key),
            None => Removal::Absent,
        }
    }

    /// Returns the leaf for `key`, if there is one.
    #[inline(always)]
    pub(crate) fn find_leaf(&self, key: Key) -> Option<&Node> {
        self.find(key).ok()
    }

    /// Returns the leaf for `key`, made if need be. Nobody else may be in the tree.
    #[link_section = ".init.text"]
    pub(crate) fn leaf(&self, key: Key) -> Result<&Node, NoMemory> {
        if let Some(leaf) = self.find_leaf(key) {
            return Ok(leaf);
        }
        self.add(key)?;
        let leaf = self.find_leaf(key).ok_or(NoMemory)?;
        leaf.word(leaf_index(key)).store(0);
        Ok(leaf)
    }

    /// Returns whether `key` is in the tree.
    pub(crate) fn contains(&self, key: Key) -> bool {
        self.find_leaf(key)
            .is_some_and(|leaf| leaf.word(leaf_index(key)).load() & leaf_mask(key) != 0)
    }

    /// Returns the first leaf that may hold keys from `from` to `last`, and the first key of
    /// that leaf.
    #[link_section = ".init.text"]
    pub(crate) fn next_leaf(&self, from: Key, last: Key) -> Option<(u64, &Node)> {
        self.leaf_between(self.mem.node(self.root), ROOT, 0, (from, last))
    }

    /// As [`Tree::next_leaf`], below a table whose keys start at `first`.
    #[link_section = ".init.text"]
    fn leaf_between(
        &self,
        table: &Node,
        level: u32,
        first: u64,
        bounds: (Key, Key),
    ) -> Option<(u64, &Node)> {
        let (from, last) = bounds;
        let start = match from.get() > first {
            true => table_index(from, level) & (WORDS - 1),
            false => 0,
        };
        let end = match last.get() < last_key(first, level) {
            true => (table_index(last, level) & (WORDS - 1)) + 1,
            false => WORDS,
        };
        for (index, addr) in table.children_between(start, end) {
            let (child, first) = (self.mem.node(addr), child_first(first, level, index));
            if level <= 1 {
                return Some((first, child));
            }
            let found = self.leaf_between(child, level - 1, first, bounds);
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Returns the runs of adjacent keys from the first to the last of `bounds`, ascending. For
    /// takeover: what iterates is in `.init.text`.
    pub(crate) fn runs_between(&self, bounds: (Key, Key)) -> Runs<'_, M> {
        Runs {
            tree: self,
            leaf: None,
            at: bounds.0.get(),
            last: bounds.1,
            ahead: None,
        }
    }

    /// Shows every node to `visitor`, parents before children and in the order of their keys,
    /// until it stops the walk. Returns whether it did not.
    pub(crate) fn visit(&self, visitor: &mut dyn Visitor) -> bool {
        self.visit_node(visitor, self.root, ROOT, 0)
    }

    fn visit_node(
        &self,
        visitor: &mut dyn Visitor,
        addr: NodeAddr,
        level: u32,
        first: u64,
    ) -> bool {
        match visitor.node(addr, first, last_key(first, level)) {
            Step::In => {}
            Step::Over => return true,
            Step::Stop => return false,
        }
        let node = self.mem.node(addr);
        if level == 0 {
            return visitor.leaf(first, node);
        }
        node.children().all(|(index, child)| {
            self.visit_node(visitor, child, level - 1, child_first(first, level, index))
        })
    }

    /// Returns whether there is anything to prune. Others may be in the tree, but not prune it.
    pub(crate) fn has_empty(&self) -> bool {
        self.has_empty_below(self.mem.node(self.root), ROOT)
    }

    fn has_empty_below(&self, node: &Node, level: u32) -> bool {
        level > 0
            && node.children().any(|(_, addr)| {
                let child = self.mem.node(addr);
                child.is_empty() || self.has_empty_below(child, level - 1)
            })
    }

    /// Frees the nodes without keys, the root excepted. Nobody else may be in the tree.
    pub(crate) fn prune(&self) {
        self.mem.new_generation();
        self.prune_node(self.mem.node(self.root), ROOT);
    }

    fn prune_node(&self, node: &Node, level: u32) {
        if level == 0 {
            return;
        }
        for (index, addr) in node.children() {
            let child = self.mem.node(addr);
            self.prune_node(child, level - 1);
            if child.is_empty() {
                node.word(index).store(0);
                self.mem.free(addr);
            }
        }
    }

    /// Frees every node. Nobody else may be in the tree or come to it.
    pub(crate) fn destroy(self) {
        self.mem.new_generation();
        self.destroy_node(self.root, ROOT);
    }

    fn destroy_node(&self, addr: NodeAddr, level: u32) {
        if level > 0 {
            let node = self.mem.node(addr);
            for (index, child) in node.children() {
                // A node is never freed while an entry leads to it.
                node.word(index).store(0);
                self.destroy_node(child, level - 1);
            }
        }
        self.mem.free(addr);
    }
}

/// Sets the bit of `key`; returns whether it was clear.
#[inline(always)]
fn set(leaf: &Node, key: Key) -> bool {
    let mask = leaf_mask(key);
    leaf.word(leaf_index(key)).set(mask) & mask == 0
}

/// Clears the bit of `key`, and says what became of it.
#[inline(always)]
fn clear(leaf: &Node, key: Key) -> Removal {
    let (index, mask) = (leaf_index(key), leaf_mask(key));
    let word = leaf.word(index);
    if word.clear(mask) & mask == 0 {
        Removal::Absent
    } else if word.load() == 0 {
        Removal::Emptied
    } else {
        Removal::Removed
    }
}

/// Where a walk goes from a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Into the node.
    In,
    /// Over the node, and what is below it, without reading it.
    Over,
    /// Nowhere: the walk ends.
    Stop,
}

/// Sees the nodes of a tree.
pub(crate) trait Visitor {
    /// A node at `addr`, whose keys are those from `first` to `last`. It has not been read yet,
    /// and is read only if this returns [`Step::In`].
    fn node(&mut self, addr: NodeAddr, first: u64, last: u64) -> Step;

    /// A leaf whose bit 0 is the key `first`. Returns whether to go on.
    fn leaf(&mut self, first: u64, leaf: &Node) -> bool;
}

/// A run of adjacent keys of one order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run {
    /// The first key.
    pub(crate) first: Key,
    /// How many keys follow each other, at least 1.
    pub(crate) count: u64,
}

impl Run {
    /// Returns the keys.
    pub(crate) fn keys(self) -> impl Iterator<Item = Key> {
        let first = self.first.get();
        (first..first.saturating_add(self.count)).map_while(Key::new)
    }
}

/// Runs of adjacent keys of one order, across leaves; see [`Tree::runs_between`].
pub(crate) struct Runs<'a, M> {
    tree: &'a Tree<M>,
    /// The leaf that `at` lies in, if it has been looked up.
    leaf: Option<&'a Node>,
    /// The key to go on from.
    at: u64,
    last: Key,
    /// A part of a run that was found while it was being decided where the one before it ends.
    ahead: Option<Range<u64>>,
}

impl<M: NodeMem> Runs<'_, M> {
    /// Returns the next run as far as it lies in one leaf.
    #[link_section = ".init.text"]
    fn next_part(&mut self) -> Option<Range<u64>> {
        loop {
            let from = Key::new(self.at).filter(|at| *at <= self.last)?;
            let leaf = match self.leaf {
                Some(leaf) => leaf,
                None => {
                    let (first, leaf) = self.tree.next_leaf(from, self.last)?;
                    self.at = self.at.max(first);
                    *self.leaf.insert(leaf)
                }
            };
            let base = self.at & !(LEAF_SIZE - 1);
            let found = leaf.run_from(self.at % LEAF_SIZE);
            let part = found.map(|(bit, count)| {
                let start = base | bit;
                start..start.saturating_add(count)
            });
            // OVERFLOW: The leaf of the last key ends at a number of a few more bits.
            let end = base.wrapping_add(LEAF_SIZE);
            self.at = part.as_ref().map_or(end, |part| part.end);
            if self.at == end {
                self.leaf = None;
            }
            if part.is_some() {
                return part;
            }
        }
    }
}

impl<M: NodeMem> Iterator for Runs<'_, M> {
    type Item = Run;

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<Run> {
        let mut run = self.ahead.take().or_else(|| self.next_part())?;
        // A run that reaches the end of its leaf may go on in the next one.
        while run.end % LEAF_SIZE == 0 {
            match self.next_part() {
                Some(more) if more.start == run.end => run.end = more.end,
                other => {
                    self.ahead = other;
                    break;
                }
            }
        }
        // A leaf may have keys behind the last one that was asked for.
        let end = run.end.min(self.last.get().saturating_add(1));
        let count = end.checked_sub(run.start).filter(|count| *count > 0)?;
        Some(Run {
            first: Key::new(run.start)?,
            count,
        })
    }
}
