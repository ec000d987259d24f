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
//!   entry that lacks it. Who loses that race goes on in the winner's subtree.
//! - All nodes an insertion may need are allocated before anything is published, so that it
//!   happens whole or not at all.
//! - A published node stays where it is. Only [`Tree::prune`] and [`Tree::destroy`] take nodes
//!   away, and need to be alone in the tree. [`NodeMem::enter`] is how `add` and `remove` keep
//!   out of `prune`'s way.
//!
//! # Hints
//!
//! Keys of one order that are added or removed one after the other mostly share a leaf. So each
//! CPU notes the leaf that it used last for an order, see [`Hints`], and goes there without a
//! descent if the next key belongs to it:
//!
//! ```text
//!  hint    generation | root | key >> LEAF_BITS | leaf
//!          the same as now, as this tree's, as this key's?  yes: the leaf.  no: descend, and note.
//! ```
//!
//! A hint says "this tree has that leaf for those keys", which stays true for as long as no node is
//! taken away, whoever noted it. [`NodeMem::forget`] starts a new generation and so makes all hints
//! useless at once; `prune` and `destroy` call it while they are alone, before they free anything.
//! Hints are read and written between `enter` and the end of the pass only. So whoever finds a hint
//! of the present generation is in the tree, and no node has been taken away since it was noted.
//!
//! Hints are no shared state: CPUs that use different leaves write to no common cache line.
//!
//! The format is ABI:
//! [`include/linux/kho/abi/kexec_handover.h`](srctree/include/linux/kho/abi/kexec_handover.h).

use super::kho_key::{
    Key,
    KEY_BITS, //
};
use super::kho_word::Word;
use super::PAGE_SHIFT;
use core::{
    cell::Cell,
    mem::size_of,
    num::NonZeroU64, //
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
    /// is [`WORDS`] at the most, are not looked at.
    #[inline(never)]
    fn search_used(&self, index: u64, end: u64) -> Option<(u64, u64)> {
        let mut rest = self.words.get(index as usize..end as usize)?;
        // Most words of most nodes are 0.
        while let [a, b, c, d, e, f, g, h, tail @ ..] = rest {
            let low = a.load() | b.load() | c.load() | d.load();
            if low | e.load() | f.load() | g.load() | h.load() != 0 {
                break;
            }
            rest = tail;
        }
        let mut index = end.wrapping_sub(rest.len() as u64);
        for word in rest {
            let value = word.load();
            if value != 0 {
                return Some((index, value));
            }
            index = index.wrapping_add(1);
        }
        None
    }

    /// Returns the first entry of a table from `index` to before `end` that is used, and where it
    /// leads.
    fn next_child(&self, index: u64, end: u64) -> Option<(u64, NodeAddr)> {
        let (index, _) = self.search_used(index, end)?;
        Some((index, NodeAddr::new(self.word(index).follow())?))
    }

    /// Returns all entries of a table that are used, and where they lead.
    fn children(&self) -> impl Iterator<Item = (u64, NodeAddr)> + '_ {
        let mut from = 0;
        core::iter::from_fn(move || {
            let child = self.next_child(from, WORDS)?;
            from = child.0.wrapping_add(1);
            Some(child)
        })
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
        let mut word = self.word(index).load() & u64::MAX.wrapping_shl(from as u32);
        if word == 0 {
            (index, word) = self.search_used(index.wrapping_add(1), WORDS)?;
        }
        let skip = word.trailing_zeros();
        let first = index.wrapping_mul(WORD_BITS).wrapping_add(skip.into());
        let mut count = u64::from(word.wrapping_shr(skip).trailing_ones());
        // A run that reaches the end of its word may go on in the next one.
        while first.wrapping_add(count) % WORD_BITS == 0 {
            index = index.wrapping_add(1);
            if index >= WORDS {
                break;
            }
            let more = self.word(index).load().trailing_ones();
            if more == 0 {
                break;
            }
            count = count.wrapping_add(more.into());
        }
        Some((first, count))
    }

    /// Sets `count` bits from bit `from` on, while nobody else uses the node; returns how many
    /// were set before.
    #[link_section = ".init.text"]
    pub(crate) fn fill(&self, from: u64, count: u64) -> u64 {
        let end = from.saturating_add(count).min(LEAF_SIZE);
        let (mut at, mut again) = (from, 0u64);
        while at < end {
            let bits = (WORD_BITS - at % WORD_BITS).min(end.wrapping_sub(at));
            let mask = u64::MAX.wrapping_shr(WORD_BITS.wrapping_sub(bits) as u32);
            let mask = mask.wrapping_shl(at as u32);
            let word = self.word(at / WORD_BITS);
            let old = word.load();
            word.store(old | mask);
            again = again.wrapping_add((old & mask).count_ones().into());
            at = at.wrapping_add(bits);
            // Most of a large block is whole words that nobody has set.
            let mut index = at / WORD_BITS;
            while index < end / WORD_BITS && self.word(index).load() == 0 {
                self.word(index).store(u64::MAX);
                index = index.wrapping_add(1);
            }
            at = at.max(index.wrapping_mul(WORD_BITS));
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
            let key = index.wrapping_mul(WORD_BITS);
            let mut word = self.word(index).load();
            if key < first {
                word &= u64::MAX.wrapping_shl(first as u32);
            }
            if last.wrapping_sub(key) < WORD_BITS {
                word &= u64::MAX.wrapping_shr(!(last as u32));
            }
            (key, word)
        })
    }

    /// Returns the runs of set bits, in ascending order, each as its first bit and how many.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut from = 0;
        core::iter::from_fn(move || {
            let (first, count) = self.run_from(from)?;
            from = first.wrapping_add(count);
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

/// How many keys are added or removed in one pass at the most. A range of memory rarely has more
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
/// whose upper bits are `keys` at `leaf`; or `root` is 0.
#[repr(C)]
struct Hint {
    generation: Cell<u64>,
    root: Cell<u64>,
    keys: Cell<u64>,
    leaf: Cell<u64>,
}

impl Hint {
    /// Returns the leaf for `key`, if it is the one that was noted.
    #[inline(always)]
    fn recall(&self, generation: u64, root: NodeAddr, key: Key) -> Option<NodeAddr> {
        if self.keys.get() != leaf_keys(key)
            || self.root.get() != root.get()
            || self.generation.get() != generation
        {
            return None;
        }
        NodeAddr::new(self.leaf.get())
    }

    #[inline(always)]
    fn note(&self, generation: u64, root: NodeAddr, key: Key, leaf: NodeAddr) {
        self.generation.set(generation);
        self.root.set(root.get());
        self.keys.set(leaf_keys(key));
        self.leaf.set(leaf.get());
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
        }
    }
}

/// Being in the tree, until this is dropped.
pub(crate) trait Pass {
    /// Returns the hints of this CPU, which nobody else uses during the pass.
    fn hints(&self) -> &Hints;

    /// Returns the generation that nodes were of when the tree was entered. It stays the same until
    /// the pass ends.
    fn generation(&self) -> u64;
}

/// Where nodes live.
pub(crate) trait NodeMem: Copy {
    /// Is held by [`Tree::add`], [`Tree::remove`] and those that do the same to many keys, while
    /// they look at nodes, but not while they allocate. [`Tree::prune`] must only be called while
    /// nobody holds one.
    type Pass<'a>: Pass
    where
        Self: 'a;

    /// Enters the tree, waiting while it is being pruned.
    fn enter(&self) -> Self::Pass<'_>;

    /// Starts a new generation of nodes: all [`Hints`] are useless from now on, in all trees of
    /// this memory. Nobody may be in a tree of which nodes are about to be taken away.
    fn forget(&self);

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
struct Stock<'m, M: NodeMem> {
    mem: &'m M,
    nodes: [Option<NodeAddr>; ROOT as usize],
}

impl<'m, M: NodeMem> Stock<'m, M> {
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
    /// A stock is for one key, and so each of its nodes for one entry: what an attempt has written
    /// that came to nothing is written again by the next one.
    fn link(&self, level: u32, key: Key) -> Option<NodeAddr> {
        let mut below = (leaf_index(key), leaf_mask(key));
        let mut top = None;
        let mut at = 0u32;
        while at < level {
            let addr = (*self.nodes.get(at as usize)?)?;
            let (index, value) = below;
            self.mem.node(addr).word(index).store(value);
            top = Some(addr);
            at = at.wrapping_add(1);
            below = (table_index(key, at), addr.get());
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

impl<M: NodeMem> Drop for Stock<'_, M> {
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

    /// Returns where the leaf for `key` is, or the level and entry where the way to it ends.
    #[inline(always)]
    fn locate(&self, key: Key) -> Result<NodeAddr, (u32, &Word)> {
        let mut addr = self.root;
        let mut level = ROOT;
        while level > 0 {
            let entry = self.mem.node(addr).word(table_index(key, level));
            addr = NodeAddr::new(entry.follow()).ok_or((level, entry))?;
            level = level.wrapping_sub(1);
        }
        Ok(addr)
    }

    /// Returns the leaf for `key`, or the level and entry where the way to it ends.
    #[inline(always)]
    fn find(&self, key: Key) -> Result<&Node, (u32, &Word)> {
        self.locate(key).map(|addr| self.mem.node(addr))
    }

    /// Returns where the leaf for `key` is, if it is the one that was noted.
    // The address, which is known not to be 0: a reference would be looked at once more.
    #[inline(always)]
    fn recall(&self, pass: &M::Pass<'_>, key: Key) -> Option<NodeAddr> {
        let hint = pass.hints().of(key);
        hint.recall(pass.generation(), self.root, key)
    }

    /// Finds the leaf for `key` as [`Tree::find_leaf`], and notes it.
    #[inline(never)]
    fn search(&self, pass: &M::Pass<'_>, key: Key) -> Option<&Node> {
        let addr = self.locate(key).ok()?;
        // INVARIANT: It has just been found. No node is taken away during the pass, and the
        // generation changes before any is.
        pass.hints()
            .of(key)
            .note(pass.generation(), self.root, key, addr);
        Some(self.mem.node(addr))
    }

    /// Adds `key`; returns whether it is new. May sleep.
    ///
    /// # Errors
    ///
    /// [`NoMemory`] if a node was needed and could not be allocated; the tree is as it was then.
    #[inline(always)]
    pub(crate) fn add(&self, key: Key) -> Result<bool, NoMemory> {
        let pass = self.mem.enter();
        match self.recall(&pass, key) {
            Some(leaf) => Ok(set(self.mem.node(leaf), key)),
            None => Self::from_root(self.mem, self.root).add_elsewhere(pass, key),
        }
    }

    /// Returns the leaf for `key`, by the hint if that is the one.
    #[inline(always)]
    fn approach(&self, pass: &M::Pass<'_>, key: Key) -> Option<&Node> {
        match self.recall(pass, key) {
            Some(leaf) => Some(self.mem.node(leaf)),
            None => self.search(pass, key),
        }
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
            match self.grow(key) {
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
            let pass = self.mem.enter();
            for _ in 0..BATCH {
                let Some(key) = keys.next() else {
                    return Ok(None);
                };
                match self.approach(&pass, key) {
                    Some(leaf) if set(leaf, key) => {}
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
            let pass = self.mem.enter();
            for _ in 0..BATCH {
                let key = keys.next()?;
                match self.approach(&pass, key).map(|leaf| clear(leaf, key)) {
                    Some(Removal::Removed) => {}
                    Some(Removal::Emptied) => *emptied = true,
                    Some(Removal::Absent) | None => return Some(key),
                }
            }
        }
    }

    /// Adds `key` to another leaf than the last one.
    // By value, so that the tree need not be in memory for `add()` to call this.
    #[inline(never)]
    fn add_elsewhere(self, pass: M::Pass<'_>, key: Key) -> Result<bool, NoMemory> {
        if let Some(leaf) = self.search(&pass, key) {
            return Ok(set(leaf, key));
        }
        drop(pass);
        self.grow(key)
    }

    /// Adds `key` where nodes are missing.
    #[cold]
    #[inline(never)]
    fn grow(&self, key: Key) -> Result<bool, NoMemory> {
        let mut stock = Stock::new(&self.mem);
        // Each turn sees a tree with fewer nodes missing or, after a prune, has more in stock.
        loop {
            let missing = {
                let _pass = self.mem.enter();
                match self.find(key) {
                    Ok(leaf) => return Ok(set(leaf, key)),
                    Err((level, entry)) => match stock.link(level, key) {
                        None => level,
                        Some(top) => {
                            if entry.publish(top.get()).is_ok() {
                                stock.spend(level);
                                return Ok(true);
                            }
                            continue;
                        }
                    },
                }
            };
            stock.fill(missing)?;
        }
    }

    /// Removes `key`.
    #[inline(always)]
    pub(crate) fn remove(&self, key: Key) -> Removal {
        let pass = self.mem.enter();
        match self.recall(&pass, key) {
            Some(leaf) => clear(self.mem.node(leaf), key),
            None => Self::from_root(self.mem, self.root).remove_elsewhere(pass, key),
        }
    }

    /// Removes `key` from another leaf than the last one.
    #[inline(never)]
    fn remove_elsewhere(self, pass: M::Pass<'_>, key: Key) -> Removal {
        match self.search(&pass, key) {
            Some(leaf) => clear(leaf, key),
            None => Removal::Absent,
        }
    }

    /// Returns the leaf that has room for `key`, if there is one.
    pub(crate) fn find_leaf(&self, key: Key) -> Option<&Node> {
        self.find(key).ok()
    }

    /// Returns the leaf that has room for `key`, made if need be. Nobody else may be in the tree.
    pub(crate) fn leaf(&self, key: Key) -> Result<&Node, NoMemory> {
        if let Ok(leaf) = self.find(key) {
            return Ok(leaf);
        }
        self.add(key)?;
        let leaf = self.find(key).map_err(|_| NoMemory)?;
        leaf.word(leaf_index(key)).store(0);
        Ok(leaf)
    }

    /// Returns whether `key` is in the tree.
    pub(crate) fn contains(&self, key: Key) -> bool {
        self.find(key)
            .is_ok_and(|leaf| leaf.word(leaf_index(key)).load() & leaf_mask(key) != 0)
    }

    /// Returns the first leaf that may hold keys from `from` to `last`, and the first key it has
    /// room for.
    #[link_section = ".init.text"]
    pub(crate) fn next_leaf(&self, from: Key, last: Key) -> Option<(u64, &Node)> {
        let mut path = [None; DEPTH as usize];
        let mut key = from.get();
        let mut level = ROOT;
        let mut node = self.mem.node(self.root);
        loop {
            let shift = level_shift(level);
            let start = key.wrapping_shr(shift) & (WORDS - 1);
            // Where this table reaches beyond `last`, the rest of it need not be looked at.
            let above = level_shift(level.wrapping_add(1));
            let end = match last.get().wrapping_shr(above) == key.wrapping_shr(above) {
                true => (last.get().wrapping_shr(shift) & (WORDS - 1)).wrapping_add(1),
                false => WORDS,
            };
            let child = node.next_child(start, end);
            if let Some((index, addr)) = child {
                if index != start {
                    key = (key.wrapping_shr(shift) & !(WORDS - 1) | index).wrapping_shl(shift);
                }
                if key > last.get() {
                    return None;
                }
                let child = self.mem.node(addr);
                if level == 1 {
                    return Some((key & !(LEAF_SIZE - 1), child));
                }
                if let Some(slot) = path.get_mut(level as usize) {
                    *slot = Some(node);
                }
                node = child;
                level = level.wrapping_sub(1);
                continue;
            }
            // Nothing more here: on to the entry after this one in the nearest table above that
            // has one. After the last entry of a table, the sum carries to the tables above it.
            let shift = level_shift(level.wrapping_add(1));
            key = key.wrapping_shr(shift).wrapping_add(1).wrapping_shl(shift);
            loop {
                level = level.wrapping_add(1);
                node = (*path.get(level as usize)?)?;
                if key.wrapping_shr(level_shift(level)) & (WORDS - 1) != 0 {
                    break;
                }
            }
        }
    }

    /// Returns the runs of adjacent keys from the first to the last of `bounds`, ascending. For
    /// takeover: what iterates is in `.init.text`.
    pub(crate) fn runs_between(&self, bounds: (Key, Key)) -> Runs<'_, M> {
        Runs {
            tree: self,
            leaf: None,
            at: bounds.0.get(),
            last: bounds.1,
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
        let bits = match level {
            0 => LEAF_BITS,
            _ => level_shift(level).wrapping_add(TABLE_BITS),
        };
        let last = first | 1u64.checked_shl(bits).unwrap_or(0).wrapping_sub(1);
        match visitor.node(addr, first, last) {
            Step::In => {}
            Step::Over => return true,
            Step::Stop => return false,
        }
        let node = self.mem.node(addr);
        if level == 0 {
            return visitor.leaf(first, node);
        }
        let shift = level_shift(level);
        for (index, child) in node.children() {
            let first = first | index.wrapping_shl(shift);
            if !self.visit_node(visitor, child, level.wrapping_sub(1), first) {
                return false;
            }
        }
        true
    }

    /// Returns whether there is anything to prune. Others may be in the tree, but not prune it.
    pub(crate) fn has_empty(&self) -> bool {
        self.has_empty_below(self.mem.node(self.root), ROOT)
    }

    fn has_empty_below(&self, node: &Node, level: u32) -> bool {
        level > 0
            && node.children().any(|(_, addr)| {
                let child = self.mem.node(addr);
                child.is_empty() || self.has_empty_below(child, level.wrapping_sub(1))
            })
    }

    /// Frees the nodes without keys, the root excepted. Nobody else may be in the tree.
    pub(crate) fn prune(&self) {
        self.mem.forget();
        self.prune_node(self.mem.node(self.root), ROOT);
    }

    fn prune_node(&self, node: &Node, level: u32) {
        if level == 0 {
            return;
        }
        for (index, addr) in node.children() {
            let child = self.mem.node(addr);
            self.prune_node(child, level.wrapping_sub(1));
            if child.is_empty() {
                node.word(index).store(0);
                self.mem.free(addr);
            }
        }
    }

    /// Frees every node. Nobody else may be in the tree or come to it.
    pub(crate) fn destroy(self) {
        self.mem.forget();
        self.destroy_node(self.root, ROOT);
    }

    fn destroy_node(&self, addr: NodeAddr, level: u32) {
        if level > 0 {
            let node = self.mem.node(addr);
            for (index, child) in node.children() {
                // A node is never freed while an entry leads to it.
                node.word(index).store(0);
                self.destroy_node(child, level.wrapping_sub(1));
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

/// Runs of adjacent keys of one order, across leaves; see [`Tree::runs_between`].
pub(crate) struct Runs<'a, M> {
    tree: &'a Tree<M>,
    /// The leaf that `at` lies in, if it has been looked up.
    leaf: Option<&'a Node>,
    /// The key to go on from.
    at: u64,
    last: Key,
}

impl<M: NodeMem> Runs<'_, M> {
    /// Goes to the next leaf from `at` on; returns whether there is one.
    #[link_section = ".init.text"]
    fn next_leaf(&mut self) -> bool {
        let next = Key::new(self.at)
            .filter(|at| *at <= self.last)
            .and_then(|at| self.tree.next_leaf(at, self.last));
        match next {
            None => {
                // Nothing more is found from here, however often it is asked for.
                self.at = u64::MAX;
                self.leaf = None;
                false
            }
            Some((base, leaf)) => {
                self.at = self.at.max(base);
                self.leaf = Some(leaf);
                true
            }
        }
    }
}

impl<M: NodeMem> Iterator for Runs<'_, M> {
    type Item = Run;

    #[link_section = ".init.text"]
    fn next(&mut self) -> Option<Run> {
        loop {
            let Some(leaf) = self.leaf else {
                if !self.next_leaf() {
                    return None;
                }
                continue;
            };
            let base = self.at & !(LEAF_SIZE - 1);
            let Some((bit, mut count)) = leaf.run_from(self.at % LEAF_SIZE) else {
                self.at = base.wrapping_add(LEAF_SIZE);
                self.leaf = None;
                continue;
            };
            let first = base | bit;
            // A leaf may have room for keys of several orders.
            let left = self.last.get().wrapping_add(1).saturating_sub(first);
            if left == 0 {
                self.at = u64::MAX;
                self.leaf = None;
                return None;
            }
            self.at = first.wrapping_add(count);
            // A run that reaches the end of its leaf may go on in the next one.
            while self.at % LEAF_SIZE == 0 {
                let end = self.at;
                if !self.next_leaf() || self.at != end {
                    break;
                }
                let Some((0, more)) = self.leaf.and_then(|leaf| leaf.run_from(0)) else {
                    break;
                };
                count = count.wrapping_add(more);
                self.at = end.wrapping_add(more);
            }
            return Some(Run {
                first: Key::new(first)?,
                count: count.min(left),
            });
        }
    }
}
