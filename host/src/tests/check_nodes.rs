// SPDX-License-Identifier: GPL-2.0

//! Nodes of sound and of broken trees, on a machine made of numbers.

use super::super::kho_key::Key;
use super::super::kho_radix::{
    NoMemory,
    NodeAddr,
    Tree, //
};
use super::super::kho_range::Frames;
use super::super::kho_check::{
    check_tree,
    Machine,
    Refusal,
    Sets, //
};
use super::super::PAGE_SHIFT;
use super::{
    abi,
    Mem, //
};
use std::{
    cell::Cell,
    collections::BTreeSet,
    sync::atomic::{
        AtomicU64,
        Ordering::SeqCst, //
    },
};

/// Frame numbers: where RAM starts and ends, what is no RAM in between, and scratch.
pub(super) const RAM: (u64, u64) = (0x10, 0x4_0000);
pub(super) const HOLE: (u64, u64) = (0x8000, 0xa000);
pub(super) const SCRATCH: (u64, u64) = (0x2000, 0x3000);
/// Where tree nodes lie, and how many there can be.
pub(super) const NODES: u64 = 0x3_0000;
const MOST_NODES: u64 = 2048;

/// A machine made of numbers.
pub(super) struct Fake {
    pub(super) ram: (u64, u64),
    /// RAM as well, for nodes, wherever that ends.
    nodes: (u64, u64),
    /// What is no RAM, or scratch.
    pub(super) outside: Vec<(u64, u64)>,
    /// Where RAM is in two pieces that touch.
    pub(super) seams: Vec<u64>,
    /// How often it was asked for RAM.
    pub(super) asked: Cell<u64>,
}

impl Fake {
    pub(super) fn new() -> Self {
        Self {
            ram: RAM,
            nodes: (NODES, NODES + MOST_NODES),
            outside: vec![HOLE, SCRATCH],
            seams: Vec::new(),
            asked: Cell::new(0),
        }
    }

    /// Whether the frame is RAM outside scratch.
    pub(super) fn has(&self, pfn: u64) -> bool {
        let within = |range: &(u64, u64)| (range.0..range.1).contains(&pfn);
        (within(&self.ram) || within(&self.nodes)) && !self.outside.iter().any(within)
    }

    /// Whether the frame is RAM, in scratch or not.
    pub(super) fn is_ram(&self, pfn: u64) -> bool {
        self.has(pfn) || (SCRATCH.0..SCRATCH.1).contains(&pfn)
    }

    /// Frames next to which one is RAM, or scratch, and the other is not.
    fn borders(&self) -> Vec<u64> {
        let outside = self.outside.iter().flat_map(|range| [range.0, range.1]);
        let borders = [self.ram.0, self.ram.1, self.nodes.0, self.nodes.1];
        let borders = borders.into_iter().chain(outside);
        borders.chain(self.seams.iter().copied()).collect()
    }
}

impl Machine for Fake {
    fn ram_end(&self) -> u64 {
        self.ram.1
    }

    fn usable(&self, pfn: u64) -> Option<Frames> {
        self.asked.set(self.asked.get() + 1);
        if !self.has(pfn) {
            return None;
        }
        let borders = self.borders();
        let start = borders.iter().filter(|at| **at <= pfn).max()?;
        let end = borders.iter().filter(|at| **at > pfn).min()?;
        Some(frames(*start, *end))
    }

    fn ram(&self, pfn: u64) -> Option<Frames> {
        let borders = self.borders();
        let starts = borders.iter().copied().filter(|at| *at > pfn).chain([pfn]);
        let start = starts.filter(|at| self.is_ram(*at)).min()?;
        let end = borders.iter().filter(|at| **at > start).min()?;
        Some(frames(start, *end))
    }
}

pub(super) fn node_mem() -> Mem {
    Mem::at(NODES << PAGE_SHIFT, MOST_NODES as usize)
}

/// Makes a tree of blocks, each a frame number and an order, as another kernel would.
pub(super) fn handed_over(mem: &Mem, blocks: &[(u64, u32)]) -> u64 {
    let root = mem.take().unwrap();
    for (pfn, order) in blocks {
        assert_eq!(pfn % (1 << order), 0);
        abi::add(mem, root, abi::encode(pfn << PAGE_SHIFT, *order));
    }
    root
}

pub(super) fn tree_at(mem: &Mem, root: u64) -> Tree<&Mem> {
    Tree::from_root(mem, NodeAddr::new(root).unwrap())
}

/// Checks a tree with memory of its own; returns how many nodes there are, and the frames of all
/// that were met.
fn met(mem: &Mem, root: u64, machine: &Fake) -> (Result<u64, Refusal>, Vec<u64>) {
    let memory = Mem::at(1 << 50, 2048);
    let sets = Sets::new(&memory).unwrap();
    let stats = check_tree(&tree_at(mem, root), machine, &sets).unwrap();
    let result = stats.refusal.map_or(Ok(stats.nodes), Err);
    (result, abi::walk(&memory, sets.nodes.root().get()).1)
}

pub(super) fn frames(start: u64, end: u64) -> Frames {
    Frames::exact(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT).unwrap()
}

pub(super) const BLOCKS: [(u64, u32); 5] = [
    (0x100, 0),
    (0x102, 1),
    (0x200, 9),
    (0xc000, 0),
    (0x1_0000, 4),
];

#[test]
fn sound_tree() {
    let mem = node_mem();
    let root = handed_over(&mem, &BLOCKS);
    let (nodes, _) = abi::walk(&mem, root);
    let machine = Fake::new();
    let (result, seen) = met(&mem, root, &machine);
    assert_eq!(result, Ok(nodes.len() as u64));
    let mut all: Vec<u64> = nodes.iter().map(|(phys, ..)| phys >> PAGE_SHIFT).collect();
    all.sort_unstable();
    assert_eq!(seen, all);
    let empty = mem.take().unwrap();
    assert_eq!(met(&mem, empty, &machine).0, Ok(1));
    // Nothing to remember the nodes with.
    let memory = Mem::at(1 << 50, 2048);
    let sets = Sets::new(&memory).unwrap();
    memory.budget.store(2, SeqCst);
    let result = check_tree(&tree_at(&mem, root), &machine, &sets);
    assert_eq!(result.map(|_| ()), Err(NoMemory));
}

/// The entry of a tree for `key` in the table at `level`.
fn entry_to(mem: &Mem, root: u64, key: u64, level: u32) -> &AtomicU64 {
    let mut node = root;
    for above in (level + 1..abi::DEPTH).rev() {
        node = mem.words(node)[abi::index(key, above)].load(SeqCst);
    }
    &mem.words(node)[abi::index(key, level)]
}

/// No number in any table leads takeover to read what is no node: node memory panics then.
#[test]
fn bad_addresses() {
    let page = 1 << PAGE_SHIFT;
    let at = |pfn: u64| pfn << PAGE_SHIFT;
    let bad = [
        1,
        8,
        page - 1,
        page,
        at(RAM.0 - 1),
        at(RAM.0) + 8,
        at(NODES) + 1,
        at(NODES) + page / 2,
        at(SCRATCH.0),
        at(SCRATCH.1 - 1),
        at(HOLE.0),
        at(HOLE.1 - 1),
        at(RAM.1),
        at(RAM.1) + 1,
        1 << 51,
        1 << 63,
        u64::MAX,
        u64::MAX - (page - 1),
    ];
    let target = abi::encode(0x100 << PAGE_SHIFT, 0);
    for bad in bad {
        for level in 1..abi::DEPTH {
            let mem = node_mem();
            let root = handed_over(&mem, &BLOCKS);
            entry_to(&mem, root, target, level).store(bad, SeqCst);
            let (result, _) = met(&mem, root, &Fake::new());
            assert_eq!(result, Err(Refusal::Node(bad)), "{bad:#x} at level {level}");
        }
    }
    // The same for the root itself.
    for bad in bad {
        let (result, seen) = met(&node_mem(), bad, &Fake::new());
        assert_eq!((result, seen.len()), (Err(Refusal::Node(bad)), 0));
    }
}

/// Every node in the place of every other: a node that is met twice, in a loop or not.
#[test]
fn aliases() {
    let count = {
        let mem = node_mem();
        let root = handed_over(&mem, &BLOCKS);
        abi::walk(&mem, root).0.len()
    };
    for (from, to) in (1..count).flat_map(|i| (0..count).map(move |j| (i, j))) {
        let mem = node_mem();
        let root = handed_over(&mem, &BLOCKS);
        let (nodes, _) = abi::walk(&mem, root);
        let (from, to) = (nodes[from].0, nodes[to].0);
        let words = nodes.iter().flat_map(|(phys, ..)| mem.words(*phys));
        let entry = words.into_iter().find(|word| word.load(SeqCst) == from);
        entry.unwrap().store(to, SeqCst);
        let machine = Fake::new();
        let (result, _) = met(&mem, root, &machine);
        assert_eq!(result.is_ok(), from == to, "{result:?}");
        assert!(machine.asked.get() <= (count + 1 + BLOCKS.len()) as u64);
    }
}

#[test]
fn too_much() {
    let end = RAM.1;
    let leaf = 1u64 << abi::BITMAP_LOG2;
    let mut table = vec![
        // Wider than a key can be: the last entry of the root.
        (
            0,
            u64::MAX >> (64 - abi::node_shift(abi::DEPTH - 1).min(63)),
            false,
        ),
        // No block at all, and the largest ones.
        (0, 0, false),
        (0, 1, false),
    ];
    for of in 0..=64 - PAGE_SHIFT {
        let first = abi::encode(0, of);
        // Whether the first leaf of an order has a block in RAM, and the first leaf behind RAM.
        let reach = end >> of > 0;
        if first >= leaf {
            table.push((of, first, reach));
            let blocks = end >> of;
            let behind = first + blocks.next_multiple_of(leaf).max(leaf);
            if behind < first * 2 {
                table.push((of, behind, false));
                table.push((of, first * 2 - 1, false));
                table.push((of, behind - 1, reach));
            }
        }
    }
    for (of, number, good) in table {
        let mem = node_mem();
        let root = handed_over(&mem, &BLOCKS);
        let before = mem.live() as u64;
        add_leaf(&mem, root, number);
        let machine = Fake::new();
        let (result, _) = met(&mem, root, &machine);
        assert_eq!(
            result.is_ok(),
            good,
            "order {of}, key {number:#x}: {result:?}"
        );
        assert!(good || matches!(result, Err(Refusal::Reach(_))));
        assert!(machine.asked.get() <= before + u64::from(abi::DEPTH) + BLOCKS.len() as u64);
    }
}

/// Adds the leaf for a key to a tree, without that key.
fn add_leaf(mem: &Mem, root: u64, number: u64) {
    abi::add(mem, root, number);
    if let Some(key) = Key::new(number) {
        tree_at(mem, root).remove(key);
    }
}

/// The number of nodes of a tree that has every key that names a block below frame `end`.
fn full_tree(end: u64) -> (Vec<u64>, usize) {
    let leaf = 1u64 << abi::BITMAP_LOG2;
    let mut leaves = BTreeSet::new();
    for of in (0..=64 - PAGE_SHIFT).take_while(|of| end >> of > 0) {
        let first = abi::encode(0, of);
        let last = first + (end >> of) - 1;
        leaves.extend((first / leaf..=last / leaf).map(|number| number * leaf));
    }
    let leaves: Vec<u64> = leaves.into_iter().collect();
    let nodes = abi::least_nodes(leaves.iter().copied());
    (leaves, nodes)
}

/// No tree, however it is made, keeps takeover busy for longer than the largest sound one.
#[test]
fn is_bounded() {
    let (leaves, most) = full_tree(RAM.1);
    let mem = node_mem();
    let root = mem.take().unwrap();
    leaves
        .iter()
        .for_each(|number| add_leaf(&mem, root, *number));
    let machine = Fake::new();
    assert_eq!(met(&mem, root, &machine).0, Ok(most as u64));
    assert_eq!(machine.asked.get(), most as u64);
    // Every unused entry of every table leads to one more node, which is out of reach.
    let (nodes, _) = abi::walk(&mem, root);
    for (phys, ..) in nodes.iter().filter(|(_, level, _)| *level > 0) {
        for word in mem
            .words(*phys)
            .iter()
            .filter(|word| word.load(SeqCst) == 0)
        {
            let fresh = mem.take();
            let Some(fresh) = fresh else { break };
            word.store(fresh, SeqCst);
        }
    }
    let machine = Fake::new();
    assert!(met(&mem, root, &machine).0.is_err());
    // No node is asked for twice, and none is looked into that is out of reach.
    assert!(machine.asked.get() <= mem.live() as u64);
    // Tables of which every entry leads to the same table: without a memory of what was met,
    // the walk would take for ever.
    let mem = node_mem();
    let tables: Vec<u64> = (0..abi::DEPTH).map(|_| mem.take().unwrap()).collect();
    for pair in tables.windows(2) {
        mem.words(pair[0])
            .iter()
            .for_each(|word| word.store(pair[1], SeqCst));
    }
    let machine = Fake::new();
    assert!(met(&mem, tables[0], &machine).0.is_err());
    let entries = (abi::DEPTH as u64 - 1) << abi::TABLE_LOG2;
    assert!(machine.asked.get() <= 1 + entries);
}

/// Behind a node that is not sound the walk goes on, so that what the rest names can be kept.
#[test]
fn goes_on_behind_a_broken_node() {
    let bad = abi::encode(0x102 << PAGE_SHIFT, 1);
    for level in 1..abi::DEPTH {
        let mem = node_mem();
        let root = handed_over(&mem, &BLOCKS);
        let below = entry_to(&mem, root, bad, level).swap(1, SeqCst);
        let memory = Mem::at(1 << 50, 2048);
        let sets = Sets::new(&memory).unwrap();
        let stats = check_tree(&tree_at(&mem, root), &Fake::new(), &sets).unwrap();
        assert_eq!(stats.refusal, Some(Refusal::Node(1)));
        // All that is not below that node.
        let first = bad >> abi::node_shift(level - 1) << abi::node_shift(level - 1);
        let (_, cut) = abi::walk_from(&mem, (below, level - 1, first));
        assert!(cut.contains(&bad));
        let expected: BTreeSet<u64> = BLOCKS
            .iter()
            .filter(|(pfn, of)| !cut.contains(&abi::encode(pfn << PAGE_SHIFT, *of)))
            .flat_map(|(pfn, of)| *pfn..pfn + (1 << of))
            .collect();
        let found = abi::walk(&memory, sets.reserved.root().get()).1;
        assert!(found.iter().eq(expected.iter()), "level {level}: {found:x?}");
        assert_eq!(stats.frames, expected.len() as u64);
    }
}

/// Whether blocks lie in each other is found out without the nodes that are not sound.
#[test]
fn overlap_beside_a_broken_node() {
    let leaf = 1 << abi::BITMAP_LOG2;
    let mut machine = Fake::new();
    machine.ram.1 = leaf << 10;
    // Blocks of order 8 in two leaves, of which the first is lost; the others overlap.
    let lost = (0x1_0000, 8);
    let mem = node_mem();
    let root = handed_over(&mem, &[lost, (leaf << 9, 8), (0x1_0000, 9), (0x1_0000, 7)]);
    let key = abi::encode(lost.0 << PAGE_SHIFT, lost.1);
    entry_to(&mem, root, key, 1).store(1, SeqCst);
    assert_eq!(met(&mem, root, &machine).0, Err(Refusal::Node(1)));
}

/// The log tells one reason from another, and where it is.
#[test]
fn reasons_have_names() {
    let reasons = [
        (Refusal::NoMemory, 0),
        (Refusal::Node(1), 1),
        (Refusal::Reach(2), 2),
        (Refusal::Fdt(3), 3),
        (Refusal::Reserve(frames(4, 5)), 4 << PAGE_SHIFT),
    ];
    assert!(reasons.iter().all(|(reason, at)| reason.what().1 == *at));
    let names: BTreeSet<_> = reasons.iter().map(|(reason, _)| reason.what().0).collect();
    assert_eq!(names.len(), reasons.len());
}
