// SPDX-License-Identifier: GPL-2.0

//! Takeover of sound and of broken trees, on a machine that records what is done to it.

use super::super::kho_key::{
    Block,
    Order,
    Pfn, //
};
use super::super::kho_radix::{
    NodeAddr,
    Tree,
    LEAF_BITS, //
};
use super::super::kho_range::Frames;
use super::super::kho_takeover::{
    apply,
    busy,
    check,
    holds,
    survey,
    Machine,
    Refusal, //
};
use super::super::PAGE_SHIFT;
use super::{
    abi,
    key,
    order,
    Mem,
    Rng, //
};
use std::{
    cell::Cell,
    collections::BTreeSet,
    sync::atomic::Ordering::SeqCst, //
};

/// Frame numbers: where RAM starts and ends, what is no RAM in between, and scratch.
const RAM: (u64, u64) = (0x10, 0x4_0000);
const HOLE: (u64, u64) = (0x8000, 0xa000);
const SCRATCH: (u64, u64) = (0x2000, 0x3000);
/// Where tree nodes lie.
const NODES: u64 = 0x3_0000;

/// What is done to a machine, with frame numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    Reserve(u64, u64),
    Release(u64, u64),
    Adopt(u64, u32, u64),
}

struct Fake {
    ram: (u64, u64),
    events: Vec<Event>,
    /// How many reservations succeed.
    budget: usize,
    /// How often it was asked for RAM.
    asked: Cell<u64>,
}

impl Fake {
    fn new() -> Self {
        Self {
            ram: RAM,
            events: Vec::new(),
            budget: usize::MAX,
            asked: Cell::new(0),
        }
    }
}

fn meet(frames: Frames, range: (u64, u64)) -> bool {
    frames.start() < range.1 && range.0 < frames.end()
}

impl Machine for Fake {
    fn ram_end(&self) -> u64 {
        self.ram.1
    }

    fn is_ram(&self, frames: Frames) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.ram.0 <= frames.start() && frames.end() <= self.ram.1 && !meet(frames, HOLE)
    }

    fn in_scratch(&self, frames: Frames) -> bool {
        meet(frames, SCRATCH)
    }

    fn reserve(&mut self, frames: Frames) -> Result<(), i32> {
        self.budget = self.budget.checked_sub(1).ok_or(-12)?;
        self.events
            .push(Event::Reserve(frames.start(), frames.end()));
        Ok(())
    }

    fn release(&mut self, frames: Frames) {
        self.events
            .push(Event::Release(frames.start(), frames.end()));
    }

    fn adopt(&mut self, first: Block, count: u64) {
        let event = Event::Adopt(first.pfn().get(), first.order().get(), count);
        self.events.push(event);
    }
}

fn node_mem() -> Mem {
    Mem::at(NODES << PAGE_SHIFT, 2048)
}

/// Makes a tree of blocks, each a frame number and an order, as another kernel would.
fn handed_over(mem: &Mem, blocks: &[(u64, u32)]) -> u64 {
    let root = mem.take().unwrap();
    for (pfn, order) in blocks {
        assert_eq!(pfn % (1 << order), 0);
        abi::add(mem, root, abi::encode(pfn << PAGE_SHIFT, *order));
    }
    root
}

fn tree_at(mem: &Mem, root: u64) -> Tree<&Mem> {
    Tree::from_root(mem, NodeAddr::new(root).unwrap())
}

/// Surveys with memory of its own; returns the result and the frames that were seen.
fn surveyed(mem: &Mem, root: u64, machine: &Fake) -> (Result<u64, Refusal>, Vec<u64>) {
    let memory = Mem::at(1 << 50, 2048);
    let seen = Tree::new(&memory).unwrap();
    let result = survey(&tree_at(mem, root), machine, &seen);
    (result, abi::walk(&memory, seen.root().get()).1)
}

fn frames(start: u64, end: u64) -> Frames {
    Frames::exact(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT).unwrap()
}

const BLOCKS: [(u64, u32); 5] = [
    (0x100, 0),
    (0x102, 1),
    (0x200, 9),
    (0xc000, 0),
    (0x1_0000, 4),
];

#[test]
fn survey_of_a_sound_tree() {
    let mem = node_mem();
    let root = handed_over(&mem, &BLOCKS);
    let (nodes, _) = abi::walk(&mem, root);
    let machine = Fake::new();
    let (result, seen) = surveyed(&mem, root, &machine);
    assert_eq!(result, Ok(nodes.len() as u64));
    let mut all: Vec<u64> = nodes.iter().map(|(phys, ..)| phys >> PAGE_SHIFT).collect();
    all.sort_unstable();
    assert_eq!(seen, all);
    let empty = mem.take().unwrap();
    assert_eq!(surveyed(&mem, empty, &machine).0, Ok(1));
    // Nothing to remember the nodes with.
    let memory = Mem::at(1 << 50, 2048);
    let seen = Tree::new(&memory).unwrap();
    memory.budget.store(2, SeqCst);
    let result = survey(&tree_at(&mem, root), &machine, &seen);
    assert_eq!(result, Err(Refusal::NoMemory));
}

/// No number in any table leads takeover to read what is no node: node memory panics then.
#[test]
fn survey_of_bad_addresses() {
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
            let mut node = root;
            for above in (level + 1..abi::DEPTH).rev() {
                node = mem.words(node)[abi::index(target, above)].load(SeqCst);
            }
            mem.words(node)[abi::index(target, level)].store(bad, SeqCst);
            let (result, _) = surveyed(&mem, root, &Fake::new());
            assert_eq!(result, Err(Refusal::Node(bad)), "{bad:#x} at level {level}");
        }
    }
    // The same for the root itself.
    for bad in bad {
        let (result, seen) = surveyed(&node_mem(), bad, &Fake::new());
        assert_eq!((result, seen.len()), (Err(Refusal::Node(bad)), 0));
    }
}

/// Every node in the place of every other: a node that is met twice, in a loop or not.
#[test]
fn survey_of_aliases() {
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
        let (result, _) = surveyed(&mem, root, &machine);
        match result {
            Ok(_) => assert_eq!(from, to),
            Err(refusal) => {
                assert_ne!(from, to);
                assert!(matches!(refusal, Refusal::Node(_) | Refusal::Reach(_)));
            }
        }
        assert!(machine.asked.get() <= count as u64 + 1);
    }
}

#[test]
fn survey_of_too_much() {
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
        abi::add(&mem, root, number);
        let machine = Fake::new();
        let (result, _) = surveyed(&mem, root, &machine);
        assert_eq!(
            result.is_ok(),
            good,
            "order {of}, key {number:#x}: {result:?}"
        );
        assert!(good || matches!(result, Err(Refusal::Reach(_))));
        assert!(machine.asked.get() <= before + u64::from(abi::DEPTH));
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

/// No tree, however it is made, keeps the survey busy for longer than the largest sound one.
#[test]
fn survey_is_bounded() {
    let (leaves, most) = full_tree(RAM.1);
    let mem = node_mem();
    let root = mem.take().unwrap();
    leaves
        .iter()
        .for_each(|number| abi::add(&mem, root, *number));
    let machine = Fake::new();
    assert_eq!(surveyed(&mem, root, &machine).0, Ok(most as u64));
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
    assert!(surveyed(&mem, root, &machine).0.is_err());
    assert!(machine.asked.get() <= most as u64 + 1);
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
    assert!(surveyed(&mem, tables[0], &machine).0.is_err());
    assert!(machine.asked.get() <= most as u64);
}

#[test]
fn check_of_ranges() {
    for (pfn, of, good) in [
        (RAM.0 - 1, 0, false),
        (RAM.0, 0, true),
        (0, 5, false),
        (RAM.0, 4, true),
        (0, 0, false),
        (HOLE.0 - 1, 0, true),
        (HOLE.0, 0, false),
        (HOLE.1 - 1, 0, false),
        (HOLE.1, 0, true),
        (HOLE.0 - 2, 1, true),
        (0x4000, 14, true),
        (0x4000, 13, true),
        (0x8000, 15, false),
        (0, 16, false),
        (SCRATCH.0 - 1, 0, true),
        (SCRATCH.0, 0, false),
        (SCRATCH.1 - 1, 0, false),
        (SCRATCH.1, 0, true),
        (0x2000, 13, false),
        (0x1000, 12, true),
        (RAM.1 - 1, 0, true),
        (RAM.1, 0, false),
        (RAM.1 - 2, 1, true),
        (RAM.1, 1, false),
        (0, 18, false),
        (0, 40, false),
        (0, 64 - PAGE_SHIFT, false),
        (abi::PFN_END - 1, 0, false),
    ] {
        let mem = node_mem();
        let root = handed_over(&mem, &[(pfn, of), (0x500, 0), (0x3_5000, 3)]);
        let mut result = check(&tree_at(&mem, root), &Fake::new()).map(|census| census.frames);
        if good {
            assert_eq!(result, Ok(9 + (1 << of)), "{pfn:#x}, order {of}");
        } else {
            // The range that is refused has the block in it.
            if let Err(Refusal::Range(range)) = result {
                assert!(range.start() <= pfn && pfn + (1 << of) <= range.end());
                result = Err(Refusal::NoMemory);
            }
            assert_eq!(result, Err(Refusal::NoMemory), "{pfn:#x}, order {of}");
        }
    }
    // Blocks that are good one by one but touch what is not.
    let mem = node_mem();
    let root = handed_over(&mem, &[(HOLE.0 - 1, 0), (HOLE.0, 0)]);
    let refused = Refusal::Range(frames(HOLE.0 - 1, HOLE.0 + 1));
    let result = check(&tree_at(&mem, root), &Fake::new());
    assert_eq!(result.map(|_| ()), Err(refused));
}

/// On a machine whose RAM reaches into the orders that share a leaf, none of them is lost.
#[test]
fn orders_that_share_a_leaf() {
    let first_shared = 64 - PAGE_SHIFT - abi::BITMAP_LOG2 + 1;
    let mut machine = Fake::new();
    machine.ram = (0x10_0000, 8 << first_shared);
    let of = first_shared;
    let blocks = [
        (1 << of, of),
        (2 << of, of),
        (3 << of, of),
        (4 << of, of + 2),
        (0x20_0000, 1),
    ];
    let mem = Mem::at(0x18_0000 << PAGE_SHIFT, 2048);
    let root = handed_over(&mem, &blocks);
    let tree = tree_at(&mem, root);
    assert!(surveyed(&mem, root, &machine).0.is_ok());
    let census = check(&tree, &machine).unwrap();
    assert_eq!(
        census.orders().map(|(_, count)| count).collect::<Vec<_>>(),
        [1, 3, 1]
    );
    assert_eq!((census.ranges, census.overlap), (2, None));
    apply(&tree, &mut machine, &census).unwrap();
    let expected = [
        Event::Reserve(0x20_0000, 0x20_0002),
        Event::Reserve(1 << of, 8 << of),
        Event::Adopt(0x20_0000, 1, 1),
        Event::Adopt(1 << of, of, 3),
        Event::Adopt(4 << of, of + 2, 1),
    ];
    assert_eq!(machine.events, expected);
    // The largest orders of all are in the same leaf, and no machine has such blocks.
    for of in first_shared + 3..=64 - PAGE_SHIFT {
        let mem = Mem::at(0x18_0000 << PAGE_SHIFT, 2048);
        let root = handed_over(&mem, &[(0x20_0000, 1), (0, of)]);
        let result = check(&tree_at(&mem, root), &machine).map(|_| ());
        assert!(matches!(result, Err(Refusal::Range(_))), "order {of}");
    }
}

/// How often each frame of `blocks` is preserved, for frames below `limit`.
fn claims(blocks: &[(u64, u32)], limit: u64) -> Vec<u32> {
    let mut claims = vec![0; limit as usize];
    for (pfn, of) in blocks {
        let frames = *pfn as usize..(pfn + (1 << of)) as usize;
        claims[frames].iter_mut().for_each(|claim| *claim += 1);
    }
    claims
}

/// The ranges of frames that are preserved, as long as they can be.
fn union(claims: &[u32]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for pfn in (0..claims.len()).filter(|pfn| claims[*pfn] > 0) {
        let pfn = pfn as u64;
        match ranges.last_mut() {
            Some(last) if last.1 == pfn => last.1 += 1,
            _ => ranges.push((pfn, pfn + 1)),
        }
    }
    ranges
}

/// Takes over `blocks`, compares all that happens with a model, and has it fail everywhere.
fn take_over(blocks: &[(u64, u32)]) {
    let blocks: Vec<_> = blocks
        .iter()
        .collect::<BTreeSet<_>>()
        .into_iter()
        .copied()
        .collect();
    let mem = node_mem();
    let root = handed_over(&mem, &blocks);
    let tree = tree_at(&mem, root);
    assert!(surveyed(&mem, root, &Fake::new()).0.is_ok());
    let claims = claims(&blocks, RAM.1);
    let ranges = union(&claims);

    let census = check(&tree, &Fake::new()).unwrap();
    let overlap = claims
        .iter()
        .position(|claim| *claim > 1)
        .map(|pfn| pfn as u64);
    assert_eq!(census.overlap, overlap, "{blocks:x?}");
    assert_eq!(census.ranges as usize, ranges.len());
    let frames = claims.iter().filter(|claim| **claim > 0).count();
    assert_eq!(census.frames as usize, frames);
    for (of, count) in census.orders() {
        let expected = blocks
            .iter()
            .filter(|(_, order)| *order == of.get())
            .count();
        assert_eq!(count as usize, expected);
    }

    // Everything is reserved, in order, before anything is adopted.
    let mut machine = Fake::new();
    apply(&tree, &mut machine, &census).unwrap();
    let (reserved, adopted) = machine.events.split_at(ranges.len());
    let expected = ranges
        .iter()
        .map(|(start, end)| Event::Reserve(*start, *end));
    assert!(reserved.iter().copied().eq(expected), "{reserved:x?}");
    let mut found = Vec::new();
    for event in adopted {
        let Event::Adopt(pfn, of, count) = *event else {
            panic!("{event:?} after adoption has begun");
        };
        found.extend((0..count).map(|i| (pfn + (i << of), of)));
    }
    found.sort_unstable();
    let inner = |(pfn, of): &&(u64, u32)| {
        let larger = |(start, above): &(u64, u32)| above > of && pfn >> above == start >> above;
        blocks.iter().any(larger)
    };
    let outer: Vec<_> = blocks
        .iter()
        .filter(|block| !inner(block))
        .copied()
        .collect();
    assert_eq!(found, outer, "each frame goes to its largest block, once");

    // Whichever reservation fails, nothing stays.
    for budget in 0..ranges.len() {
        let mut machine = Fake::new();
        machine.budget = budget;
        let (start, end) = ranges[budget];
        let refusal = Refusal::Reserve(self::frames(start, end), -12);
        assert_eq!(apply(&tree, &mut machine, &census), Err(refusal));
        let done = &ranges[..budget];
        let reserved = done.iter().map(|(start, end)| Event::Reserve(*start, *end));
        let released = done.iter().map(|(start, end)| Event::Release(*start, *end));
        let expected: Vec<_> = reserved.chain(released).collect();
        assert_eq!(machine.events, expected);
    }
}

#[test]
fn take_over_some() {
    take_over(&[]);
    take_over(&BLOCKS);
    take_over(&[(0x100, 0), (0x101, 0), (0x102, 1), (0x104, 2), (0x108, 0)]);
    // One frame in two blocks, in three, and one that is all of another.
    take_over(&[(0x100, 0), (0x100, 1)]);
    take_over(&[(0x101, 0), (0x100, 1), (0x100, 4)]);
    take_over(&[(0x100, 4), (0x101, 0), (0x10e, 1), (0x110, 0)]);
    take_over(&[(0x100, 0), (0x101, 0), (0x102, 0), (0x103, 0), (0x100, 2)]);
    take_over(&[(0x140, 0), (0x200, 1), (0x202, 0), (0x200, 9), (0x400, 0)]);
    // Orders whose runs end one after the other.
    let ends: Vec<_> = (0..9).map(|of| (0x400 + (of << 9), of as u32)).collect();
    take_over(&ends);
    let ends: Vec<_> = (0..9).map(|of| (0x1800 - (of << 9), of as u32)).collect();
    take_over(&ends);
}

#[test]
fn take_over_anything() {
    let mut rng = Rng::new(8);
    for turn in 0..120 {
        // From sparse to crowded, from one order to many.
        let (count, orders, spread) = (1 + rng.below(60), 1 + turn % 11, 1 << (6 + turn % 8));
        let blocks: Vec<_> = (0..count)
            .map(|_| {
                let of = rng.below(orders) as u32;
                (0xc000 + (rng.below(spread) >> of << of), of)
            })
            .collect();
        take_over(&blocks);
    }
}

#[test]
fn take_over_across_leaves() {
    let leaf = 1u64 << LEAF_BITS;
    let border = leaf.max(0x1_0000).next_multiple_of(leaf);
    if border + 64 < NODES {
        let blocks: Vec<_> = (border - 40..border + 40).map(|pfn| (pfn, 0)).collect();
        take_over(&blocks);
    }
}

/// A frame is held by a block of any order, from its first frame to its last.
#[test]
fn held_frames() {
    let holds = |tree: &Tree<&Mem>, pfn| holds(tree, Pfn::new(pfn).unwrap());
    for of in 0..=64 - PAGE_SHIFT {
        let pages = 1u64 << of;
        let start = if of < 63 - PAGE_SHIFT { pages } else { 0 };
        let mem = node_mem();
        let tree = tree_at(&mem, handed_over(&mem, &[(start, of)]));
        assert!(
            holds(&tree, start) && holds(&tree, start + pages - 1),
            "order {of}"
        );
        assert!(start == 0 || !holds(&tree, start - 1), "order {of}");
        let end = start + pages;
        assert!(end == abi::PFN_END || !holds(&tree, end), "order {of}");
    }
    let mem = node_mem();
    assert!(!holds(&tree_at(&mem, handed_over(&mem, &[])), 0x100));
}

/// The numbers of the blocks of order `grain` that [`busy`] finds.
fn busy_at(tree: &Tree<&Mem>, grain: Order) -> Vec<u64> {
    let memory = Mem::at(1 << 50, 2048);
    let found = Tree::new(&memory).unwrap();
    busy(tree, grain, &found).unwrap();
    abi::walk(&memory, found.root().get()).1
}

#[test]
fn busy_memory() {
    let mut rng = Rng::new(9);
    let grains = [
        0,
        3,
        9,
        30 - PAGE_SHIFT,
        LEAF_BITS - 1,
        LEAF_BITS,
        LEAF_BITS + 2,
        LEAF_BITS + 5,
    ];
    for turn in 0..40 {
        let mut blocks: Vec<(u64, u32)> = (0..turn)
            .map(|_| {
                let of = rng.below(10) as u32;
                (rng.below(RAM.1) >> of << of, of)
            })
            .collect();
        blocks.push((0x2_0000, 12));
        // Both halves of a leaf.
        blocks.extend(
            [(0x1_0000, 0), (0x1_0000 + (1 << LEAF_BITS) - 1, 0)]
                .iter()
                .filter(|(pfn, _)| *pfn < RAM.1),
        );
        let mem = node_mem();
        let root = handed_over(&mem, &blocks);
        let tree = tree_at(&mem, root);
        for grain in grains {
            let (nodes, _) = abi::walk(&mem, root);
            let nodes = nodes.iter().map(|(phys, ..)| (phys >> PAGE_SHIFT, 0));
            let expected: BTreeSet<u64> = nodes
                .chain(blocks.iter().copied())
                .flat_map(|(pfn, of)| pfn >> grain..=(pfn + (1 << of) - 1) >> grain)
                .collect();
            assert!(
                busy_at(&tree, order(grain)).iter().eq(&expected),
                "grain {grain}"
            );
        }
    }
}

/// A leaf costs its grain no more than one look, if all it can name lies in there.
#[test]
fn busy_is_brief() {
    let mem = node_mem();
    let blocks: Vec<_> = (0..100).map(|i| (0x1_0000 + 2 * i, 0)).collect();
    let tree = tree_at(&mem, handed_over(&mem, &blocks));
    let steps = |grain| {
        let memory = Mem::at(1 << 50, 2048);
        let found = Tree::new(&memory).unwrap();
        busy(&tree, order(grain), &found).unwrap();
        memory.steps.load(SeqCst)
    };
    let per_key = u64::from(abi::DEPTH);
    assert!(steps(LEAF_BITS) < (2 * per_key + 1) * per_key * 2);
    assert!(steps(LEAF_BITS - 1) > steps(LEAF_BITS) + 90);
}

#[test]
fn busy_without_memory() {
    let mem = node_mem();
    let tree = tree_at(&mem, handed_over(&mem, &BLOCKS));
    let memory = Mem::at(1 << 50, 2048);
    let found = Tree::new(&memory).unwrap();
    memory.budget.store(1, SeqCst);
    assert_eq!(busy(&tree, Order::ZERO, &found), Err(Refusal::NoMemory));
    // Key 0 names no memory.
    let mem = node_mem();
    let root = handed_over(&mem, &[]);
    abi::add(&mem, root, 0);
    memory.budget.store(1000, SeqCst);
    let result = busy(&tree_at(&mem, root), Order::ZERO, &found);
    assert!(matches!(result, Err(Refusal::Reach(_))));
}

/// A node without keys stands in nobody's way once it is pruned, and is not freed: it belongs to
/// the kernel that was before.
#[test]
fn busy_after_prune() {
    let grain = order(0);
    let mem = node_mem();
    let root = handed_over(&mem, &[(0x100, 0), (0x200, 9)]);
    let tree = tree_at(&mem, root);
    let kept = busy_at(&tree, grain);
    let leaf = 1 << abi::BITMAP_LOG2;
    let far = abi::encode(0, 3) + leaf - 1;
    abi::add(&mem, root, far);
    assert_ne!(busy_at(&tree, grain), kept);
    tree.remove(key(far));
    let live = mem.live();
    // The block is gone, but not its leaf.
    assert!(busy_at(&tree, grain).len() > kept.len());
    tree.prune(false);
    assert_eq!(busy_at(&tree, grain), kept);
    assert_eq!(mem.live(), live);
}
