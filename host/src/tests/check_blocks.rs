// SPDX-License-Identifier: GPL-2.0

//! The chart of what was preserved, against claims that are counted frame by frame.

use super::super::kho_key::Pfn;
use super::super::kho_radix::{
    NoMemory,
    Tree, //
};
use super::super::kho_range::Frames;
use super::super::kho_check::{
    check_tree,
    larger_block,
    Stats,
    Refusal,
    Sets, //
};
use super::super::kho_grain::{
    add_frames,
    has_frames, //
};
use super::super::PAGE_SHIFT;
use super::check_nodes::{
    handed_over,
    node_mem,
    tree_at,
    Fake,
    BLOCKS,
    HOLE,
    NODES,
    RAM,
    SCRATCH, //
};
use super::{
    abi,
    block,
    dump,
    key,
    Mem,
    Rng, //
};
use std::{
    collections::BTreeSet,
    sync::atomic::Ordering::SeqCst, //
};

const LEAF: u64 = 1 << abi::BITMAP_LOG2;

/// Memory for sets.
fn set_mem() -> Mem {
    Mem::at(1 << 50, 2048)
}

/// Checks a tree, with `reserved` in `mem` and other memory for all other sets.
fn check_in(
    tree: &Tree<&Mem>,
    machine: &Fake,
    (mem, reserved): (&Mem, &Tree<&Mem>),
) -> Result<Stats, NoMemory> {
    let memory = set_mem();
    let sets = Sets {
        reserved: Tree::from_root(mem, reserved.root()),
        ..Sets::new(&memory).unwrap()
    };
    check_tree(tree, machine, &sets)
}

/// A range that may be empty.
fn frames_of(start: u64, count: u64) -> Frames {
    Frames::new(Pfn::new(start).unwrap(), count).unwrap()
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

/// The largest of `blocks` that is larger than the block of order `of` at `pfn`, and around it.
fn largest_around(blocks: &[(u64, u32)], (pfn, of): (u64, u32)) -> Option<(u64, u32)> {
    let around = |(start, above): &(u64, u32)| *above > of && pfn >> above == start >> above;
    blocks.iter().copied().filter(around).max_by_key(|(_, above)| *above)
}

/// Checks `blocks` and compares all that is found with a model.
fn check_on(machine: &Fake, blocks: &[(u64, u32)]) {
    let blocks: BTreeSet<(u64, u32)> = blocks.iter().copied().collect();
    let blocks: Vec<_> = blocks.into_iter().collect();
    let mem = node_mem();
    let root = handed_over(&mem, &blocks);
    let tree = tree_at(&mem, root);
    // A leaf without keys is as good as none.
    let lonely = abi::encode(RAM.0 << PAGE_SHIFT, 0);
    if !blocks.iter().any(|(pfn, of)| *of == 0 && pfn / LEAF == 0) {
        abi::add(&mem, root, lonely);
        tree.remove(key(lonely));
    }
    let before = dump(&mem, root);
    let memory = set_mem();
    let reserved = Tree::new(&memory).unwrap();
    let stats = check_in(&tree, machine, (&memory, &reserved)).unwrap();
    assert!(dump(&mem, root) == before, "the tree was changed");

    // Each frame is there once, in no more nodes than that takes.
    let claims = claims(&blocks, machine.ram.1);
    let expected: Vec<u64> = (0..machine.ram.1)
        .filter(|pfn| claims[*pfn as usize] > 0)
        .collect();
    let (nodes, found) = abi::walk(&memory, reserved.root().get());
    assert!(found == expected, "{blocks:x?}");
    assert_eq!(nodes.len(), abi::least_nodes(expected.iter().copied()));
    assert_eq!(stats.frames as usize, expected.len(), "{blocks:x?}");
    let orders: Vec<(u32, u64)> = stats
        .orders()
        .map(|(of, count)| (of.get(), count))
        .collect();
    let counts = (0..=64 - PAGE_SHIFT).map(|of| {
        let count = blocks.iter().filter(|block| block.1 == of).count();
        (of, count as u64)
    });
    let counts: Vec<_> = counts.filter(|(_, count)| *count > 0).collect();
    assert_eq!(orders, counts);
    let down = stats.orders_down().map(|of| of.get());
    assert!(down.eq(orders.iter().rev().map(|(of, _)| *of)));

    // Large blocks come first, so that the first one to be met again is the largest inner one.
    let inner = blocks.iter().filter(|block| largest_around(&blocks, **block).is_some());
    let first = inner.max_by_key(|(pfn, of)| (*of, u64::MAX - pfn));
    assert_eq!(stats.overlap, first.map(|(pfn, _)| *pfn), "{blocks:x?}");
    if let Some(pfn) = stats.overlap {
        assert!(claims[pfn as usize] > 1, "{pfn:#x} of {blocks:x?}");
    } else {
        assert!(claims.iter().all(|claim| *claim < 2), "{blocks:x?}");
    }

    let mut rng = Rng::new(blocks.len() as u64);
    let others = (0..20).map(|_| {
        let of = rng.below(18) as u32;
        (rng.below(machine.ram.1) >> of << of, of)
    });
    for (pfn, of) in blocks.iter().copied().chain(others) {
        let found = larger_block(&tree, &stats, machine, block(pfn, of));
        let largest = largest_around(&blocks, (pfn, of)).map(|(pfn, of)| block(pfn, of));
        assert_eq!(found, largest, "{pfn:#x}, order {of}, of {blocks:x?}");
    }
}

fn chart_of(blocks: &[(u64, u32)]) {
    check_on(&Fake::new(), blocks);
}

#[test]
fn some() {
    chart_of(&[]);
    chart_of(&BLOCKS);
    chart_of(&[(0x100, 0), (0x101, 0), (0x102, 1), (0x104, 2), (0x108, 0)]);
    // One frame in two blocks, in three, and one that is all of another.
    chart_of(&[(0x100, 0), (0x100, 1)]);
    chart_of(&[(0x101, 0), (0x100, 1), (0x100, 4)]);
    chart_of(&[(0x100, 4), (0x101, 0), (0x10e, 1), (0x110, 0)]);
    chart_of(&[(0x100, 0), (0x101, 0), (0x102, 0), (0x103, 0), (0x100, 2)]);
    chart_of(&[(0x140, 0), (0x200, 1), (0x202, 0), (0x200, 9), (0x400, 0)]);
    // A run of which only the last block is inside another, and then one that starts inside.
    chart_of(&[(0xc000, 3), (0xc008, 3), (0xc010, 3), (0xc010, 4)]);
    chart_of(&[(0xc000, 0), (0xc03f, 0), (0xc030, 4), (0xc040, 0)]);
    // Orders whose blocks lie one after the other, in both directions.
    let ends: Vec<_> = (0..9).map(|of| (0x400 + (of << 9), of as u32)).collect();
    chart_of(&ends);
    let ends: Vec<_> = (0..9).map(|of| (0x1800 - (of << 9), of as u32)).collect();
    chart_of(&ends);
}

#[test]
fn anything() {
    let mut rng = Rng::new(8);
    for turn in 0..150 {
        // From sparse to crowded, from one order to many.
        let (count, orders, spread) = (1 + rng.below(60), 1 + turn % 11, 1 << (6 + turn % 8));
        let blocks: Vec<_> = (0..count)
            .map(|_| {
                let of = rng.below(orders) as u32;
                (0xc000 + (rng.below(spread) >> of << of), of)
            })
            .collect();
        chart_of(&blocks);
    }
}

/// All sets of blocks of four units, the blocks of two, and the block of all four; a unit is less
/// than a word, part of one, a word, or more.
#[test]
fn all_nestings() {
    let within = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (0, 2)];
    let subset = |set: u32, unit: u32| {
        let chosen = (0..within.len()).filter(move |i| set >> i & 1 == 1);
        let place = move |(at, of): (u64, u32)| (0xc000 + (at << unit), of + unit);
        chosen.map(move |i| place(within[i])).collect::<Vec<_>>()
    };
    for unit in [0, 4, 5, 6, 8] {
        for set in 0..1 << within.len() {
            chart_of(&subset(set, unit));
        }
    }
}

/// Blocks around the borders of leaves, of the tree and of the set, as well as blocks that are
/// one leaf of the set, or several.
#[test]
fn across_leaves() {
    let mut machine = Fake::new();
    machine.ram.1 = 8 * LEAF.max(NODES);
    let bits = abi::BITMAP_LOG2;
    // The smallest block that is clear of the hole, scratch and nodes.
    let base = (4 * LEAF).max(0x4_0000);
    for of in [0, 1, 3, 6, 7] {
        let size = 1u64 << of;
        let borders = [base, base + LEAF, base + (LEAF << of).min(3 * LEAF)];
        let around = |at: u64| (at - 10 * size..at + 10 * size).step_by(size as usize);
        let blocks = borders.into_iter().flat_map(around).map(|pfn| (pfn, of));
        check_on(&machine, &blocks.collect::<Vec<_>>());
    }
    let half = LEAF / 2;
    let large = [
        vec![(base, bits)],
        vec![(base, bits + 1)],
        vec![(base, bits - 1), (base + half, bits - 1), (base + LEAF, 0)],
        vec![(base, bits), (base - 1, 0), (base + LEAF - 1, 0)],
        vec![(base + LEAF, bits), (base, bits + 1), (base + half, 0)],
        vec![(base + LEAF, 0), (base, bits + 2), (base + 2 * LEAF, bits)],
    ];
    for blocks in large {
        check_on(&machine, &blocks);
    }
}

/// What is found of some blocks: the frames that are reserved, how many blocks are lost, the frame of
/// the first of them, and the frames that are kept of them.
#[derive(PartialEq, Debug)]
struct Found {
    reserved: Vec<u64>,
    lost: u64,
    first: u64,
    kept: Vec<u64>,
}

/// Checks the blocks and returns the refusal, or what was found.
fn result_of(machine: &Fake, mem: &Mem, root: u64) -> Result<Found, Refusal> {
    // What is lost may take more memory than there is.
    let (memory, more) = (set_mem(), set_mem());
    let lost = Tree::new(&more).unwrap();
    let sets = Sets {
        lost,
        ..Sets::new(&memory).unwrap()
    };
    let before = dump(mem, root);
    let stats = check_tree(&tree_at(mem, root), machine, &sets).unwrap();
    assert!(dump(mem, root) == before, "the tree was changed");
    let found = Found {
        reserved: abi::walk(&memory, sets.reserved.root().get()).1,
        lost: stats.lost,
        first: stats.first_lost >> PAGE_SHIFT,
        kept: abi::walk(&more, sets.lost.root().get()).1,
    };
    assert_eq!(stats.frames, found.reserved.len() as u64);
    sets.destroy();
    // The set that was not used.
    assert_eq!((memory.live(), more.live()), (1, 0));
    stats.refusal.map_or(Ok(found), Err)
}

/// What has to be found of some blocks.
fn expected_of(machine: &Fake, blocks: &[(u64, u32)]) -> Found {
    let is_good = |(pfn, of): &(u64, u32)| (*pfn..pfn + (1 << of)).all(|pfn| machine.has(pfn));
    let frames_in = |blocks: Vec<(u64, u32)>| -> BTreeSet<u64> {
        let frames = blocks.into_iter().flat_map(|(pfn, of)| pfn..pfn + (1 << of));
        frames.filter(|pfn| machine.is_ram(*pfn)).collect()
    };
    let (good, mut bad): (Vec<_>, Vec<_>) = blocks.iter().copied().partition(is_good);
    // In the order of keys: the largest blocks first.
    bad.sort_by_key(|(pfn, of)| (u32::MAX - of, *pfn));
    let named = bad.iter().copied().filter(|(_, of)| 1u64 << of <= machine.ram.1 / 2);
    Found {
        reserved: frames_in(good).into_iter().collect(),
        lost: bad.len() as u64,
        first: bad.first().map_or(0, |(pfn, _)| *pfn),
        kept: frames_in(named.collect()).into_iter().collect(),
    }
}

/// A block that is not RAM outside scratch costs only itself.
#[test]
fn edges_of_memory() {
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
        let machine = Fake::new();
        let mem = node_mem();
        let root = handed_over(&mem, &[(pfn, of), (0x500, 0), (0x3_5000, 3)]);
        let pages = 1u64 << of;
        match result_of(&machine, &mem, root) {
            Ok(found) if good => {
                assert_eq!(found.reserved.len() as u64, 9 + pages, "{pfn:#x}, order {of}");
                assert_eq!((found.lost, found.kept.len()), (0, 0));
            }
            Ok(found) => {
                assert_eq!((found.reserved.len(), found.lost, found.first), (9, 1, pfn));
                let kept = (pfn..(pfn + pages).min(RAM.1)).filter(|pfn| machine.is_ram(*pfn));
                // What is more than half of all RAM nobody can have preserved.
                let kept: Vec<u64> = kept.filter(|_| pages <= RAM.1 / 2).collect();
                assert!(found.kept == kept, "{pfn:#x}, order {of}");
            }
            // No block of its leaf is in RAM.
            Err(Refusal::Reach(_)) => assert!(pfn + pages > RAM.1, "{pfn:#x}, order {of}"),
            Err(refusal) => panic!("{refusal:?} for {pfn:#x}, order {of}"),
        }
    }
    // Of blocks that touch, only one is bad.
    for of in [0, 1, 3, 6, 7, 8] {
        let blocks = [(HOLE.0 - (1 << of), of), (HOLE.0, of), (HOLE.1, of), (SCRATCH.1 - (1 << of), of), (SCRATCH.1, of)];
        let mem = node_mem();
        let root = handed_over(&mem, &blocks);
        let machine = Fake::new();
        assert_eq!(result_of(&machine, &mem, root), Ok(expected_of(&machine, &blocks)));
    }
    // RAM may start with frame 0 and end with the last one there is.
    let mut machine = Fake::new();
    machine.ram = (0, abi::PFN_END);
    for (pfn, of) in [(0, 0), (0, 3), (abi::PFN_END - 1, 0), (abi::PFN_END - 8, 3)] {
        let mem = node_mem();
        let root = handed_over(&mem, &[(pfn, of)]);
        let found = result_of(&machine, &mem, root).unwrap();
        assert_eq!((found.reserved.len(), found.lost), (1 << of, 0), "{pfn:#x}");
    }
}

/// Anything around the borders of memory, in many orders.
#[test]
fn lost_blocks() {
    let mut rng = Rng::new(17);
    for _ in 0..300 {
        let machine = Fake::new();
        let borders = [RAM.0, RAM.1, HOLE.0, HOLE.1, SCRATCH.0, SCRATCH.1];
        let blocks: BTreeSet<(u64, u32)> = (0..1 + rng.below(40))
            .map(|_| {
                let of = rng.below(12) as u32;
                let near = borders[rng.below(6) as usize] + rng.bits(9);
                (near.saturating_sub(rng.bits(9)).min(RAM.1 + 10) >> of << of, of)
            })
            // A leaf must have a block in RAM.
            .filter(|(pfn, _)| *pfn < RAM.1)
            .collect();
        let blocks: Vec<_> = blocks.into_iter().collect();
        let mem = node_mem();
        let root = handed_over(&mem, &blocks);
        let found = result_of(&machine, &mem, root).unwrap();
        assert!(found == expected_of(&machine, &blocks), "{blocks:x?}");
    }
}

/// A block that is lost may be half of all memory, but no more.
#[test]
fn half_of_memory() {
    for (of, is_kept) in [(17, true), (18, false)] {
        let mem = node_mem();
        let found = result_of(&Fake::new(), &mem, handed_over(&mem, &[(0, of)])).unwrap();
        assert_eq!((found.lost, !found.kept.is_empty()), (1, is_kept));
    }
}

/// A larger block that is lost claims nothing.
#[test]
fn lost_blocks_claim_nothing() {
    let machine = Fake::new();
    // Two of the same order, of which one has scratch in it, and pages in both.
    let blocks = [(SCRATCH.0, 13), (SCRATCH.1, 0), (SCRATCH.1 + 8, 3), (0x4000, 13), (0x4100, 0)];
    let mem = node_mem();
    let tree = tree_at(&mem, handed_over(&mem, &blocks));
    let memory = set_mem();
    let reserved = Tree::new(&memory).unwrap();
    let stats = check_in(&tree, &machine, (&memory, &reserved)).unwrap();
    assert_eq!((stats.lost, stats.overlap), (1, Some(0x4100)));
    let claimed = blocks.map(|(pfn, of)| larger_block(&tree, &stats, &machine, block(pfn, of)).is_some());
    assert_eq!(claimed, [false, false, false, false, true]);
}

/// Single pages are checked in words; RAM and scratch start and end anywhere in them.
#[test]
fn words_with_borders() {
    let mut rng = Rng::new(10);
    let base = 0xc000;
    for turn in 0..1280u64 {
        let mut machine = Fake::new();
        // An area inside three words, at each of their bits and of any length, between two seams.
        let start = base + 64 + turn % 64;
        let end = start + 1 + rng.bits(6);
        machine.outside.push((start, end));
        machine.seams = vec![base + 30 + turn % 9, end + rng.below(40)];
        // None that is bad, or one: at the start of that area, at its end, or inside.
        let bad = match turn / 64 % 5 {
            0 => None,
            1 => Some(start),
            2 => Some(end - 1),
            3 => Some(start + rng.below(end - start)),
            _ => {
                machine.ram.1 = end + rng.below(64);
                Some(machine.ram.1)
            }
        };
        let density = 1 + rng.below(8);
        let good = (base..base + 320).filter(|pfn| rng.below(8) < density && machine.has(*pfn));
        let pages: BTreeSet<(u64, u32)> = good.chain(bad).map(|pfn| (pfn, 0)).collect();
        let pages: Vec<_> = pages.into_iter().collect();
        let mem = node_mem();
        let root = handed_over(&mem, &pages);
        let found = result_of(&machine, &mem, root).unwrap();
        assert!(found == expected_of(&machine, &pages), "{pages:x?}");
        assert_eq!(found.lost, bad.is_some().into());
    }
}

/// Pieces of RAM that touch are one.
#[test]
fn blocks_across_seams() {
    let mut machine = Fake::new();
    machine.seams = vec![0xc003, 0xc004, 0xc017, 0xc100, 0xd001];
    check_on(&machine, &[(0xc000, 12), (0xd000, 1), (0xe000, 0)]);
    check_on(
        &machine,
        &[(0xc003, 0), (0xc004, 0), (0xc016, 1), (0xc0ff, 0)],
    );
    let pages: Vec<_> = (0xc000..0xc140).map(|pfn| (pfn, 0)).collect();
    check_on(&machine, &pages);
    // A hole behind a seam is still one.
    machine.outside.push((0xc180, 0xc181));
    let mem = node_mem();
    let root = handed_over(&mem, &[(0xc000, 12)]);
    let expected = Ok(expected_of(&machine, &[(0xc000, 12)]));
    assert_eq!(result_of(&machine, &mem, root), expected);
}

/// The largest orders share a leaf, in which blocks of two orders may be neighbours. Nodes for a
/// chart of such blocks are more than a test can have, so the test is which block is refused.
#[test]
fn orders_that_share_a_leaf() {
    let first_shared = 64 - PAGE_SHIFT - abi::BITMAP_LOG2 + 1;
    let mut machine = Fake::new();
    machine.ram = (0x10_0000, 8 << first_shared);
    let new_tree = |keys: &[u64]| {
        let mem = Mem::at(0x18_0000 << PAGE_SHIFT, 2048);
        let root = handed_over(&mem, &[(0x20_0000, 1), (0x20_0003, 0)]);
        keys.iter().for_each(|number| abi::add(&mem, root, *number));
        (mem, root)
    };
    for of in first_shared..=64 - PAGE_SHIFT {
        let phys = 1u64.checked_shl(of + PAGE_SHIFT).unwrap_or(0);
        let last = u64::MAX.checked_shl(of + PAGE_SHIFT).unwrap_or(0);
        for (start, key) in [
            (0, abi::encode(0, of)),
            (phys, abi::encode(phys, of)),
            (last, abi::encode(last, of)),
        ] {
            // The last frame of this block is no RAM.
            let (start, pages) = (start >> PAGE_SHIFT, 1 << of);
            machine.outside = vec![(start + pages - 1, start + pages)];
            let (mem, root) = new_tree(&[key]);
            let found = result_of(&machine, &mem, root).unwrap();
            assert_eq!((found.reserved.len(), found.lost, found.first), (3, 1, start), "{key:#x}");
        }
    }
    // All that there is room for is found sound, and takes more memory than there is.
    machine.outside.clear();
    let keys: Vec<u64> = [(1, 0), (2, 0), (3, 0), (4, 2)]
        .into_iter()
        .map(|(number, above)| {
            let phys = (number << first_shared) << PAGE_SHIFT;
            abi::encode(phys, first_shared + above)
        })
        .collect();
    let (mem, root) = new_tree(&keys);
    let memory = set_mem();
    let little = Mem::at(1 << 50, 16);
    let reserved = Tree::new(&little).unwrap();
    let sets = Sets {
        reserved,
        ..Sets::new(&memory).unwrap()
    };
    let result = check_tree(&tree_at(&mem, root), &machine, &sets);
    assert_eq!(result.map(|_| ()), Err(NoMemory));
    // Key 0 names no block.
    let (mem, root) = new_tree(&[0]);
    assert_eq!(result_of(&machine, &mem, root), Err(Refusal::Reach(0)));
}

/// A check that runs out of memory, wherever that is, is an error and no more.
#[test]
fn without_memory() {
    let pages = [(0x100, 0), (0xc000, 0), (0x2_8000, 0), (0x2_ff00, 0)];
    let large = [(0x200, 9), (0x210, 4), (0x2_0000, 15)];
    let both = [&pages[..], &large[..]].concat();
    for blocks in [&pages[..], &large[..], &both[..]] {
        let machine = Fake::new();
        let mem = node_mem();
        let root = handed_over(&mem, blocks);
        let tree = tree_at(&mem, root);
        let before = dump(&mem, root);
        let claims = claims(blocks, RAM.1);
        let frames: Vec<u64> = (0..RAM.1).filter(|pfn| claims[*pfn as usize] > 0).collect();
        let needed = abi::least_nodes(frames.iter().copied()) - 1;
        for budget in 0..=needed {
            let memory = set_mem();
            let reserved = Tree::new(&memory).unwrap();
            memory.budget.store(budget as i64, SeqCst);
            let result = check_in(&tree, &machine, (&memory, &reserved)).map(|stats| stats.frames);
            let expected = match budget < needed {
                true => Err(NoMemory),
                false => Ok(frames.len() as u64),
            };
            assert_eq!(
                result, expected,
                "{budget} of {needed} nodes for {blocks:x?}"
            );
            assert!(dump(&mem, root) == before, "the tree was changed");
            reserved.destroy();
            assert_eq!(memory.live(), 0);
        }
    }
}

/// The steps in the tree, those in the set, and how often the machine was asked.
fn cost(blocks: &[(u64, u32)]) -> (u64, u64, u64) {
    let mem = node_mem();
    let root = handed_over(&mem, blocks);
    let memory = set_mem();
    let reserved = Tree::new(&memory).unwrap();
    let machine = Fake::new();
    let before = (mem.steps.load(SeqCst), memory.steps.load(SeqCst));
    let stats = check_in(&tree_at(&mem, root), &machine, (&memory, &reserved)).unwrap();
    assert_eq!(stats.frames, blocks.iter().map(|(_, of)| 1 << of).sum());
    (
        mem.steps.load(SeqCst) - before.0,
        memory.steps.load(SeqCst) - before.1,
        machine.asked.get() - stats.nodes,
    )
}

/// Pages cost a look at each leaf, and so do blocks in a row, however many there are. Scattered
/// blocks cost one way down each.
#[test]
fn is_brief() {
    let mut rng = Rng::new(12);
    let machine = Fake::new();
    let depth = u64::from(abi::DEPTH);
    let leaves = NODES.div_ceil(LEAF);
    // Each leaf of the set is looked for, made, linked, and found.
    let most = leaves * 6 * depth;
    let nodes = (1 + leaves) * depth;
    let mut pages = BTreeSet::new();
    while pages.len() < 10_000 {
        let pfn = 2 * rng.below(NODES / 2);
        pages.extend(machine.has(pfn).then_some((pfn, 0)));
    }
    let every = |step: u64, of: u32| {
        let starts = (RAM.0..NODES).step_by(step as usize);
        let blocks = starts.filter(|pfn| machine.has(*pfn)).map(|pfn| (pfn, of));
        blocks.collect::<Vec<_>>()
    };
    let ways = every(8, 2).len() as u64 * depth;
    for (what, blocks, more) in [
        ("scattered pages", pages.into_iter().collect(), 0),
        ("a row of pages", every(1, 0), 0),
        ("a row of blocks", every(4, 2), 0),
        ("scattered blocks", every(8, 2), ways),
    ] {
        let (tree, reserved, asked) = cost(&blocks);
        assert!(tree <= nodes, "{what}: {tree} steps in the tree");
        assert!(reserved <= most + more, "{what}: {reserved} steps in the set");
        // RAM is in three pieces.
        assert_eq!(asked, 3, "{what}");
    }
}

#[test]
fn filling() {
    let mut rng = Rng::new(13);
    let limit = 4 * LEAF;
    for turn in 0..12 {
        let memory = set_mem();
        let set = Tree::new(&memory).unwrap();
        let mut model = vec![false; limit as usize];
        for step in 0..30 {
            // Around the borders of words and leaves, and anywhere; from nothing to many leaves.
            let near = [64, LEAF, 2 * LEAF, limit, rng.below(limit)][step % 5];
            let start = (near + rng.below(8)).saturating_sub(4).min(limit - 1);
            let length = rng.bits(3 + 2 * turn).min(limit - start);
            let part = &mut model[start as usize..(start + length) as usize];
            let again = part.iter().filter(|set| **set).count() as u64;
            part.fill(true);
            let range = frames_of(start, length);
            assert_eq!(add_frames(&set, range), Ok(again), "{range:x?}");
        }
        let (nodes, keys) = abi::walk(&memory, set.root().get());
        let expected = (0..limit).filter(|pfn| model[*pfn as usize]);
        assert!(keys.iter().copied().eq(expected));
        assert!(nodes.len() <= abi::least_nodes(keys.iter().copied()));
        set.destroy();
        assert_eq!(memory.live(), 0);
    }
    // The ends of the address space, and nothing.
    let memory = set_mem();
    let set = Tree::new(&memory).unwrap();
    let last = abi::PFN_END - 1;
    assert_eq!(add_frames(&set, frames_of(last - 1, 2)), Ok(0));
    assert_eq!(add_frames(&set, frames_of(last, 1)), Ok(1));
    assert_eq!(add_frames(&set, frames_of(0, 1)), Ok(0));
    memory.budget.store(0, SeqCst);
    assert_eq!(add_frames(&set, Frames::EMPTY), Ok(0));
    assert_eq!(add_frames(&set, frames_of(LEAF, 0)), Ok(0));
    assert_eq!(add_frames(&set, frames_of(LEAF - 1, 2)), Err(NoMemory));
    let expected = [0, LEAF - 1, last - 1, last];
    assert_eq!(abi::walk(&memory, set.root().get()).1, expected);
}

/// Only orders that the stats has are looked for.
#[test]
fn claims_need_a_census() {
    let mem = node_mem();
    let tree = tree_at(&mem, handed_over(&mem, &[(0x100, 4)]));
    assert!(larger_block(&tree, &Stats::default(), &Fake::new(), block(0x100, 0)).is_none());
}

/// A range is in a set if each frame is, and how long that takes to tell does not depend on how far
/// the range goes.
#[test]
fn all_of_a_range() {
    let memory = set_mem();
    let set = Tree::new(&memory).unwrap();
    for (start, count) in [(5, 1), (60, 10), (LEAF - 3, LEAF + 9), (4 * LEAF, LEAF)] {
        add_frames(&set, frames_of(start, count)).unwrap();
    }
    let model: BTreeSet<u64> = abi::walk(&memory, set.root().get()).1.into_iter().collect();
    let mut rng = Rng::new(14);
    let mut inside = 0;
    for turn in 0..4000 {
        let near = [5, 60, 70, LEAF - 3, 2 * LEAF + 6, 4 * LEAF, 5 * LEAF][turn % 7];
        let start = (near + rng.below(6)).saturating_sub(3);
        let count = [rng.below(4), rng.below(20), rng.below(2 * LEAF)][turn % 3];
        let all = (start..start + count).all(|pfn| model.contains(&pfn));
        assert_eq!(has_frames(&set, frames_of(start, count)), all, "{start}, {count}");
        inside += usize::from(all && count > 0);
    }
    assert!(inside > 100);
    let before = memory.steps.load(SeqCst);
    assert!(!has_frames(&set, frames_of(4 * LEAF, abi::PFN_END - 4 * LEAF)));
    assert!(memory.steps.load(SeqCst) - before <= 3 * u64::from(abi::DEPTH));
}
