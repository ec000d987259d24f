// SPDX-License-Identifier: GPL-2.0

//! Tests of the pure core, and what they share: a generator of numbers, node memory that notices
//! misuse, and a second implementation of the tree.
//!
//! That second implementation ([`abi`]) works on plain arrays of numbers, as the handover format
//! is described; it shares no code and no constant with the core.

mod check_blocks;
mod fdt;
pub mod fuzz;
mod grains;
mod key;
mod param;
mod race;
mod radix;
mod range;
mod check_nodes;

use super::kho_key::{
    Block,
    Key,
    Order,
    Pfn, //
};
use super::kho_radix::{
    Hints,
    Node,
    NodeAddr,
    NodeMem,
    Removal,
    Tree, //
};
use super::PAGE_SHIFT;
use std::cell::Cell;
use std::sync::{
    atomic::{
        AtomicBool,
        AtomicI64,
        AtomicU32,
        AtomicU64,
        Ordering::SeqCst, //
    },
    Mutex,
    OnceLock,
    RwLock,
    RwLockReadGuard, //
};

/// The handover format, transcribed from its description.
mod abi {
    use super::*;

    pub(super) const KEY_WIDTH: u32 = 64 - PAGE_SHIFT + 1;
    pub(super) const TABLE_LOG2: u32 = ((1u64 << PAGE_SHIFT) / 8).ilog2();
    pub(super) const BITMAP_LOG2: u32 = PAGE_SHIFT + 8u32.ilog2();
    pub(super) const DEPTH: u32 = (KEY_WIDTH - BITMAP_LOG2).div_ceil(TABLE_LOG2) + 1;
    /// The frame number after the last.
    pub(super) const PFN_END: u64 = 1 << (64 - PAGE_SHIFT);

    /// The key of a block.
    pub(super) fn encode(phys: u64, order: u32) -> u64 {
        let shift = PAGE_SHIFT + order;
        let key = 1u128 << (64 - shift) | u128::from(phys) >> shift;
        key.try_into().unwrap()
    }

    /// The shift of a key that gives the index in a table at `level`.
    pub(super) fn shift(level: u32) -> u32 {
        BITMAP_LOG2 + (level - 1) * TABLE_LOG2
    }

    /// The shift of a key that gives the number of its node among all of `level`.
    pub(super) fn node_shift(level: u32) -> u32 {
        BITMAP_LOG2 + level * TABLE_LOG2
    }

    /// The place of `key` in a table at `level`.
    pub(super) fn index(key: u64, level: u32) -> usize {
        ((key >> shift(level)) % (1 << TABLE_LOG2)) as usize
    }

    /// A key that shares with `key` the nodes above `level`, and none below.
    pub(super) fn sibling(key: u64, level: u32) -> u64 {
        key ^ (1 << (node_shift(level) - 1).min(KEY_WIDTH - 1))
    }

    /// A node met by [`walk`]: its address, level, and first key.
    pub(super) type Met = (u64, u32, u64);

    /// Collects nodes and keys, in order.
    pub(super) fn walk(mem: &Mem, root: u64) -> (Vec<Met>, Vec<u64>) {
        walk_from(mem, (root, DEPTH - 1, 0))
    }

    /// Collects nodes and keys from a node on, which need not be the root.
    pub(super) fn walk_from(mem: &Mem, met: Met) -> (Vec<Met>, Vec<u64>) {
        let (mut nodes, mut keys) = (Vec::new(), Vec::new());
        descend(mem, met, &mut nodes, &mut keys);
        (nodes, keys)
    }

    fn descend(mem: &Mem, met: Met, nodes: &mut Vec<Met>, keys: &mut Vec<u64>) {
        let (phys, level, first) = met;
        nodes.push(met);
        for (i, word) in (0u64..).zip(mem.words(phys)) {
            let word = word.load(SeqCst);
            if word == 0 {
                continue;
            }
            if level == 0 {
                keys.extend(
                    (0..64)
                        .filter(|b| word >> b & 1 == 1)
                        .map(|b| first | (i * 64) | b),
                );
            } else {
                let below = (word, level - 1, first | (i << shift(level)));
                descend(mem, below, nodes, keys);
            }
        }
    }

    /// Adds a key by the algorithm of the format's first user.
    pub(super) fn add(mem: &Mem, root: u64, key: u64) {
        let mut node = root;
        for level in (1..DEPTH).rev() {
            let entry = &mem.words(node)[index(key, level)];
            if entry.load(SeqCst) == 0 {
                entry.store(mem.take().unwrap(), SeqCst);
            }
            node = entry.load(SeqCst);
        }
        let bit = key % (1 << BITMAP_LOG2);
        mem.words(node)[bit as usize / 64].fetch_or(1 << (bit % 64), SeqCst);
    }

    /// The number of nodes that no tree with `keys` can do without.
    pub(super) fn least_nodes(keys: impl IntoIterator<Item = u64> + Clone) -> usize {
        let below_root = (0..DEPTH - 1).map(|level| {
            let mut all: Vec<_> = keys.clone().into_iter().collect();
            all.iter_mut().for_each(|key| *key >>= node_shift(level));
            all.sort_unstable();
            all.dedup();
            all.len()
        });
        1 + below_root.sum::<usize>()
    }
}

/// All words of all nodes, so that any change shows.
fn dump(mem: &Mem, root: u64) -> Vec<(u64, Vec<u64>)> {
    let (nodes, _) = abi::walk(mem, root);
    let words = |phys| {
        mem.words(phys)
            .iter()
            .map(|word| word.load(SeqCst))
            .collect()
    };
    nodes
        .into_iter()
        .map(|(phys, ..)| (phys, words(phys)))
        .collect()
}

/// Numbers that are the same on every run.
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 8) % limit.max(1)
    }

    /// A number of up to `bits` bits, where short ones are as likely as long ones.
    fn bits(&mut self, bits: u64) -> u64 {
        let limit = 1 << self.below(bits + 1);
        self.below(limit)
    }
}

fn key(key: u64) -> Key {
    Key::new(key).unwrap()
}

fn order(order: u32) -> Order {
    Order::new(order).unwrap()
}

fn block(pfn: u64, of: u32) -> Block {
    Block::new(Pfn::new(pfn).unwrap(), order(of)).unwrap()
}

/// What happens at a [`Mem::script`]'s moment.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Add(u64),
    Remove(u64),
    /// Only happens while nobody is in the tree.
    Prune,
}

#[derive(Default)]
struct Slot {
    live: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

/// Fills a node that nobody else uses, and is much faster than a loop.
fn fill(words: &[AtomicU64], byte: u8) {
    // SAFETY: Atomics may be written through a shared reference, and any bytes are a value.
    unsafe { words.as_ptr().cast_mut().write_bytes(byte, words.len()) };
}

/// Memory for nodes, at addresses from `base` on. It knows what is allocated, overwrites what is
/// freed, can run out, and can do things to the tree in the middle of an operation.
struct Mem {
    base: u64,
    slots: Vec<Slot>,
    free: Mutex<Vec<usize>>,
    /// How many allocations succeed from now on.
    budget: AtomicI64,
    /// How many are in the tree.
    inside: AtomicU32,
    /// How often anybody came to it.
    entered: AtomicU64,
    /// Allocating while anybody is in the tree is an error.
    strict: AtomicBool,
    /// Who is in the tree shares this, if there is one.
    gate: Option<RwLock<()>>,
    /// The root of a tree that must not lead to a node when that is freed, or 0.
    watched: AtomicU64,
    /// The generation of nodes, which no two memories share.
    generation: AtomicU64,
    /// How often memory was asked for anything.
    steps: AtomicU64,
    script: Mutex<Option<(u64, u64, Vec<Action>)>>,
    scripted: AtomicBool,
    /// What the script's actions returned.
    done: Mutex<Vec<bool>>,
}

impl Mem {
    fn at(base: u64, count: usize) -> Self {
        Self {
            base,
            slots: (0..count).map(|_| Slot::default()).collect(),
            free: Mutex::new((0..count).rev().collect()),
            budget: AtomicI64::new(i64::MAX),
            inside: AtomicU32::new(0),
            entered: AtomicU64::new(0),
            strict: AtomicBool::new(false),
            gate: None,
            watched: AtomicU64::new(0),
            generation: AtomicU64::new(GENERATIONS.fetch_add(1, SeqCst)),
            steps: AtomicU64::new(0),
            script: Mutex::new(None),
            scripted: AtomicBool::new(false),
            done: Mutex::new(Vec::new()),
        }
    }

    fn new() -> Self {
        Self::at(1 << 40, 4096)
    }

    /// The number of nodes that are allocated.
    fn live(&self) -> usize {
        self.slots.len() - self.free.lock().unwrap().len()
    }

    fn slot(&self, phys: u64) -> (usize, &Slot) {
        let offset = phys.checked_sub(self.base).expect("below node memory");
        assert_eq!(offset % (1 << PAGE_SHIFT), 0, "{phys:#x} is no node");
        let index = (offset >> PAGE_SHIFT) as usize;
        (index, self.slots.get(index).expect("above node memory"))
    }

    /// The words of an allocated node.
    fn words(&self, phys: u64) -> &[AtomicU64] {
        let (_, slot) = self.slot(phys);
        assert!(slot.live.load(SeqCst), "{phys:#x} is not allocated");
        slot.words.get().unwrap()
    }

    /// Allocates a node of zeroes, whatever the budget.
    fn take(&self) -> Option<u64> {
        let index = self.free.lock().unwrap().pop()?;
        let slot = &self.slots[index];
        let make = || {
            (0..1u64 << PAGE_SHIFT >> 3)
                .map(|_| AtomicU64::new(0))
                .collect()
        };
        fill(slot.words.get_or_init(make), 0);
        assert!(!slot.live.swap(true, SeqCst));
        Some(self.base + ((index as u64) << PAGE_SHIFT))
    }

    /// Has each node that is freed looked for in `tree`, which takes long if that is large.
    fn watch(&self, tree: &Tree<&Mem>) {
        self.watched.store(tree.root().get(), SeqCst);
    }

    /// Does `actions` to the tree at `root` at the `after`th step from now.
    fn script(&self, after: u64, root: u64, actions: &[Action]) {
        self.done.lock().unwrap().clear();
        *self.script.lock().unwrap() =
            Some((self.steps.load(SeqCst) + after, root, actions.into()));
        self.scripted.store(true, SeqCst);
    }

    fn step(&self) {
        let now = self.steps.fetch_add(1, SeqCst);
        if !self.scripted.load(SeqCst) {
            return;
        }
        let due = self.script.lock().unwrap().take_if(|(at, ..)| *at <= now);
        let Some((_, root, actions)) = due else {
            return;
        };
        self.scripted.store(false, SeqCst);
        // It is another CPU that does them.
        CPU.with(|cpu| cpu.set(1));
        let results = actions.into_iter().map(|action| act(self, root, action));
        *self.done.lock().unwrap() = results.collect();
        CPU.with(|cpu| cpu.set(0));
    }
}

/// Does `action` to the tree at `root` and returns whether that changed anything.
fn act(mem: &Mem, root: u64, action: Action) -> bool {
    let tree = Tree::from_root(mem, NodeAddr::new(root).unwrap());
    match action {
        Action::Add(what) => tree.add(key(what)).unwrap(),
        Action::Remove(what) => tree.remove(key(what)) != Removal::Absent,
        Action::Prune => mem.inside.load(SeqCst) == 0 && prune(&tree, mem) > 0,
    }
}

/// Prunes the tree and returns how many nodes that freed, if nobody else allocates any.
fn prune(tree: &Tree<&Mem>, mem: &Mem) -> usize {
    let before = mem.live();
    tree.prune();
    before.wrapping_sub(mem.live())
}

impl<'m> NodeMem for &'m Mem {
    type Guard<'a>
        = Guard<'m>
    where
        Self: 'a;

    fn enter(&self) -> Guard<'m> {
        let mem: &'m Mem = self;
        let _shared = mem.gate.as_ref().map(|gate| gate.read().unwrap());
        mem.inside.fetch_add(1, SeqCst);
        mem.entered.fetch_add(1, SeqCst);
        Guard { mem, _shared }
    }

    fn new_generation(&self) {
        self.generation
            .store(GENERATIONS.fetch_add(1, SeqCst), SeqCst);
    }

    fn alloc(&self) -> Option<NodeAddr> {
        let quiet = !self.strict.load(SeqCst) || self.inside.load(SeqCst) == 0;
        assert!(quiet, "allocated inside");
        self.step();
        if self.budget.fetch_sub(1, SeqCst) <= 0 {
            return None;
        }
        NodeAddr::new(self.take()?)
    }

    fn free(&self, node: NodeAddr) {
        let (index, slot) = self.slot(node.get());
        assert!(slot.live.swap(false, SeqCst), "freed twice");
        match self.watched.load(SeqCst) {
            0 => (),
            root if root == node.get() => self.watched.store(0, SeqCst),
            // Fails if it comes to a node that is not allocated.
            root => drop(abi::walk(self, root)),
        }
        fill(slot.words.get().unwrap(), 0xde);
        self.free.lock().unwrap().push(index);
    }

    fn node(&self, addr: NodeAddr) -> &Node {
        self.step();
        let words = self.words(addr.get());
        assert_eq!(size_of_val(words), size_of::<Node>());
        // SAFETY: A node is an array of as many words, each as an `AtomicU64`.
        unsafe { &*words.as_ptr().cast() }
    }
}

/// The next generation of nodes of any memory.
static GENERATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// What runs on this thread now: its own work, or that of a script.
    static CPU: Cell<usize> = const { Cell::new(0) };
    /// The hints of both.
    static HINTS: &'static [Hints; 2] = Box::leak(Box::default());
}

/// Says when somebody leaves the tree.
struct Guard<'a> {
    mem: &'a Mem,
    _shared: Option<RwLockReadGuard<'a, ()>>,
}

impl super::kho_radix::Guard for Guard<'_> {
    fn hints(&self) -> &Hints {
        HINTS.with(|hints| &hints[CPU.with(Cell::get)])
    }

    fn generation(&self) -> u64 {
        self.mem.generation.load(SeqCst)
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.mem.inside.fetch_sub(1, SeqCst);
    }
}
