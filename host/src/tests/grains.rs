// SPDX-License-Identifier: GPL-2.0

//! Large blocks with preserved frames in them, and what is not preserved there, against sets of
//! numbers.

use super::super::kho_key::{
    Block,
    Key,
    Pfn, //
};
use super::super::kho_radix::{
    NoMemory,
    Run,
    Tree, //
};
use super::super::kho_range::Frames;
use super::super::kho_grain::{
    coarsen,
    add_grains,
    frames_in,
    grains_in,
    make_leaves,
    region_limit,
    Gaps,
    Grain,
    EXTENSION,
    GRAIN, //
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
    collections::BTreeSet,
    sync::atomic::Ordering::SeqCst, //
};

const LEAF: u64 = 1 << abi::BITMAP_LOG2;

type Set = BTreeSet<u64>;

fn frames(start: u64, end: u64) -> Frames {
    Frames::new(Pfn::new(start).unwrap(), end - start).unwrap()
}

fn set_mem() -> Mem {
    Mem::at(1 << 50, 4096)
}

/// Makes a tree of numbers, and of an empty leaf for each of `empty`.
fn tree_of<'a>(mem: &'a Mem, numbers: &Set, empty: &[u64]) -> Tree<&'a Mem> {
    let tree = Tree::new(mem).unwrap();
    let root = tree.root().get();
    for number in empty {
        abi::add(mem, root, *number);
        tree.remove(key(*number));
    }
    numbers
        .iter()
        .for_each(|number| abi::add(mem, root, *number));
    tree
}

fn numbers_in(mem: &Mem, tree: &Tree<&Mem>) -> Set {
    abi::walk(mem, tree.root().get()).1.into_iter().collect()
}

/// How many runs the numbers make up.
fn count_runs(numbers: &Set) -> usize {
    numbers
        .iter()
        .filter(|number| **number == 0 || !numbers.contains(&(**number - 1)))
        .count()
}

/// Sets of frames, each with something that others do not have.
fn sets() -> Vec<Set> {
    let mut rng = Rng::new(20);
    let last = abi::PFN_END - 1;
    let mut sets: Vec<Set> = vec![
        Set::new(),
        [0].into(),
        [0, 1, 2, 63].into(),
        [1, 3, 5].into(),
        [63, 64].into(),
        [62, 65].into(),
        (10..200).collect(),
        (0..64).chain(128..192).collect(),
        [LEAF - 1, LEAF].into(),
        [LEAF - 2, LEAF + 1].into(),
        // Whole words, over a leaf and into the next but one.
        (LEAF - 100..2 * LEAF + 100).collect(),
        // The ends of leaves, with and without a neighbour that is there.
        [LEAF - 1, 2 * LEAF, 3 * LEAF - 1, 3 * LEAF, 5 * LEAF].into(),
        [last, last - 1, last - LEAF, 0].into(),
        [0x12_3456_7890 % last, LEAF << 9, (LEAF << 9) - 1].into(),
    ];
    for turn in 0..30 {
        let (limit, most) = (LEAF * (1 + turn % 4), 1 << (turn % 10));
        let mut set = Set::new();
        for _ in 0..50 {
            let start = rng.below(limit);
            set.extend(start..start + 1 + rng.below(most));
        }
        sets.push(set);
    }
    sets
}

#[test]
fn grains_of_sets() {
    let bits = abi::BITMAP_LOG2;
    for set in sets() {
        let mem = set_mem();
        let reserved = tree_of(&mem, &set, &[0, 7 * LEAF]);
        for of in [6, 7, 9, 10, 13, bits - 1, bits, bits + 3, 64 - PAGE_SHIFT] {
            let memory = set_mem();
            let found = Tree::new(&memory).unwrap();
            let ranges = add_grains(&reserved, Key::MAX, order(of), &found);
            assert_eq!(ranges, Ok(count_runs(&set) as u64), "{:x?}", set.first());
            // There is nothing behind the last frame.
            let last = key(set.last().copied().unwrap_or(0));
            let same = add_grains(&reserved, last, order(of), &Tree::new(&set_mem()).unwrap());
            assert_eq!(same, ranges);
            let expected: Set = set.iter().map(|pfn| pfn >> of).collect();
            assert!(numbers_in(&memory, &found) == expected, "order {of}");
        }
        assert_eq!(numbers_in(&mem, &reserved), set);
    }
}

/// Grains that are there already stay.
#[test]
fn grains_add_up() {
    let mem = set_mem();
    let memory = set_mem();
    let found = tree_of(&memory, &[3, 70].into(), &[]);
    let reserved = tree_of(&mem, &[70 << 10, 71 << 10].into(), &[]);
    assert_eq!(add_grains(&reserved, Key::MAX, order(10), &found), Ok(2));
    assert_eq!(numbers_in(&memory, &found), [3, 70, 71].into());
}

/// Grains by a frame, a number and a range, found by looking at each.
#[test]
fn grains_by_number() {
    let pages = GRAIN.pages();
    let end = abi::PFN_END / pages;
    for number in [0, 1, 5, end - 2, end - 1] {
        let all = number * pages..(number + 1) * pages;
        for pfn in [all.start, all.start + 1, all.end - 1] {
            let grain = Grain::containing(pfn);
            assert_eq!((grain.key(), grain.frames()), (key(number), frames(all.start, all.end)));
        }
    }
    assert!(Grain::containing(abi::PFN_END).frames().is_empty());
    let edges = || (0..=4).flat_map(|i| [0, 1, pages / 2, pages - 1].map(|by| i * pages + by));
    let pairs = edges().flat_map(|a| edges().map(move |b| (a, b)));
    for (a, b) in pairs.filter(|(a, b)| a < b && *b <= 4 * pages) {
        for first in [0, 7, end - 4] {
            let range = frames(first * pages + a, first * pages + b);
            let of = |is: &dyn Fn(u64) -> bool| -> Vec<Key> {
                (0..4).filter(|i| is(*i)).map(|i| key(first + i)).collect()
            };
            let touching = of(&|i| a < (i + 1) * pages && b > i * pages);
            assert!(Grain::touching(range).map(Grain::key).eq(touching), "{range:?}");
            let inside = of(&|i| a <= i * pages && b >= (i + 1) * pages);
            let numbers = Grain::numbers_in(range);
            assert!(Grain::numbered(numbers).map(Grain::key).eq(inside), "{range:?}");
        }
    }
}

/// Sets, and parts of them, as ranges of frames.
#[test]
fn ranges_of_sets() {
    let mem = set_mem();
    let set = tree_of(&mem, &(5..70).chain([LEAF - 1, LEAF, LEAF + 1]).collect(), &[]);
    let found: Vec<_> = frames_in(&set, frames(6, LEAF + 1)).collect();
    assert_eq!(found, [frames(6, 70), frames(LEAF - 1, LEAF + 1)]);
    let (set, pages) = (tree_of(&mem, &[2, 3, 9].into(), &[]), GRAIN.pages());
    let found: Vec<_> = grains_in(&set, 3..10).collect();
    assert_eq!(found, [3, 9].map(|number| frames(number * pages, (number + 1) * pages)));
}

/// What is reserved costs a look at each leaf; each grain, one way down.
#[test]
fn grains_are_brief() {
    let depth = u64::from(abi::DEPTH);
    let (grain, leaves) = (10, 4);
    let set: Set = (0..leaves * LEAF).step_by(2).collect();
    let mem = set_mem();
    let reserved = tree_of(&mem, &set, &[]);
    let memory = set_mem();
    let found = Tree::new(&memory).unwrap();
    let before = (mem.steps.load(SeqCst), memory.steps.load(SeqCst));
    assert_eq!(add_grains(&reserved, Key::MAX, order(grain), &found), Ok(set.len() as u64));
    let steps = mem.steps.load(SeqCst) - before.0;
    assert!(steps <= (leaves + 1) * depth, "{steps}");
    let steps = memory.steps.load(SeqCst) - before.1;
    let count = (leaves * LEAF) >> grain;
    assert!(steps <= (count + 6) * depth, "{steps}");
}

#[test]
fn grains_without_memory() {
    let set: Set = [5, 5000, 40 * LEAF, 1 << 40].into();
    let mem = set_mem();
    let reserved = tree_of(&mem, &set, &[]);
    let needed = abi::least_nodes(set.iter().map(|pfn| pfn >> 9).collect::<Set>()) - 1;
    for budget in 0..=needed {
        let memory = set_mem();
        let found = Tree::new(&memory).unwrap();
        memory.budget.store(budget as i64, SeqCst);
        let result = add_grains(&reserved, Key::MAX, order(9), &found);
        let expected = if budget < needed {
            Err(NoMemory)
        } else {
            Ok(4)
        };
        assert_eq!(result, expected, "{budget} of {needed}");
        found.destroy();
        assert_eq!(memory.live(), 0);
    }
}

/// The numbers, and those in gaps between them that are shorter than `gap`.
fn closed(numbers: &Set, gap: u64) -> Set {
    let mut all = numbers.clone();
    for (low, high) in numbers.iter().zip(numbers.iter().skip(1)) {
        if high - low - 1 < gap {
            all.extend(low + 1..*high);
        }
    }
    all
}

/// The numbers after the shortest gaps were closed, none of `longest` or more.
fn coarse(numbers: &Set, limit: usize, longest: u64) -> Set {
    let fits = |gap: &u64| count_runs(&closed(numbers, *gap)) <= limit;
    // Closing gaps shorter than this makes a difference.
    let gaps = numbers.iter().zip(numbers.iter().skip(1)).map(|(low, high)| high - low);
    let gaps: Set = gaps.chain([1]).filter(|gap| *gap < longest).collect();
    closed(numbers, gaps.into_iter().find(fits).unwrap_or(longest))
}

/// The order of a grain of which `2^bits` are as much as scratch is extended by.
fn grain(bits: u32) -> u32 {
    (EXTENSION >> PAGE_SHIFT).ilog2() - bits
}

#[test]
fn coarsening() {
    let mut rng = Rng::new(21);
    let (mut grown, mut bound) = (0, 0);
    for turn in 0..80 {
        // Small numbers, and some around the border of a leaf.
        let base = [0, 64, LEAF - 1000, 8 * LEAF - 3, 3 * LEAF + 77][turn % 5];
        let spread = 1 << (4 + turn % 9);
        let count = rng.below(1 << (turn % 8));
        let set: Set = (0..count).map(|_| base + rng.below(spread)).collect();
        let bits = 1 + turn as u32 % 8;
        for limit in [1, 2, 3, 5, 8, 20, 100] {
            let mem = set_mem();
            let tree = tree_of(&mem, &set, &[base]);
            assert_eq!(coarsen(&tree, Key::MAX, order(grain(bits)), limit), Ok(()));
            let found = numbers_in(&mem, &tree);
            assert!(found == coarse(&set, limit, 1 << bits), "{set:x?} to {limit}");
            // Each block that scratch could be extended by, and is not now, holds something.
            let in_blocks = |set: &Set| set.iter().map(|it| it >> bits).collect::<Set>();
            assert!(in_blocks(&found) == in_blocks(&set), "{set:x?} to {limit}");
            bound += usize::from(count_runs(&found) > limit);
            grown += usize::from(found != set);
            assert!(found == set || count_runs(&set) > limit);
        }
    }
    assert!(grown > 100 && bound > 30, "{grown}, {bound}");
}

/// Without anything between two blocks that scratch is extended by, the limit is met.
#[test]
fn limits() {
    let frames = |bytes: u64| bytes >> PAGE_SHIFT;
    for (ram, limit) in [
        (0, 256),
        (1 << 30, 256),
        (4 << 30, 256),
        (64 << 30, 4096),
        (256 << 30, 16384),
        (1 << 40, 16384),
        (16 << 40, 16385),
        (64 << 40, 65537),
    ] {
        assert_eq!(region_limit(frames(ram)), limit, "{ram:#x}");
    }
    // A grain in every other one of all there are, and grains that are as far apart as can be.
    let bits = 6;
    for step in [2, 63, 64, 65, 128, 129] {
        let count = 40u64;
        let set: Set = (0..count).map(|it| it * step).collect();
        let last = (count - 1) * step;
        let limit = (last + 1).div_ceil(1 << bits) as usize + 1;
        let mem = set_mem();
        let tree = tree_of(&mem, &set, &[]);
        assert_eq!(coarsen(&tree, key(last), order(grain(bits)), limit), Ok(()));
        assert!(count_runs(&numbers_in(&mem, &tree)) <= limit, "{step}");
    }
}

/// The last numbers that a set of frames can have.
#[test]
fn coarsening_at_the_end() {
    let end = abi::PFN_END;
    let set: Set = [end - 1, end - 3, end - 6, end - 12].into();
    for limit in 1..5 {
        let mem = set_mem();
        let tree = tree_of(&mem, &set, &[]);
        assert_eq!(coarsen(&tree, Key::MAX, order(grain(4)), limit), Ok(()));
        let expected = coarse(&set, limit, 16);
        assert_eq!(numbers_in(&mem, &tree), expected, "{limit}");
    }
}

#[test]
fn coarsening_without_memory() {
    // Gaps over one border of a leaf, and over two: a leaf is needed, where gaps get so long.
    let bits = (abi::BITMAP_LOG2 + 2).min(grain(0));
    let set: Set = [LEAF - 2, LEAF + 4].into();
    let more: Set = [LEAF - 2, 2 * LEAF + 1, 9 * LEAF].into();
    let least = |set: &Set| abi::least_nodes(set.iter().copied());
    for (set, limit) in [(&set, 1), (&more, 2), (&more, 1)] {
        let needed = least(&coarse(set, limit, 1 << bits)) - least(set);
        for budget in 0..=needed {
            let mem = set_mem();
            let tree = tree_of(&mem, set, &[]);
            mem.budget.store(budget as i64, SeqCst);
            let expected = if budget < needed {
                Err(NoMemory)
            } else {
                Ok(())
            };
            let result = coarsen(&tree, Key::MAX, order(grain(bits)), limit);
            assert_eq!(result, expected);
            assert!(numbers_in(&mem, &tree).is_superset(set));
            tree.destroy();
            assert_eq!(mem.live(), 0);
        }
    }
}

/// What is not in `set`, cut into the largest aligned blocks there can be, none of which is larger
/// than `most`.
fn gaps_in(set: &Set, (start, end): (u64, u64), most: u32) -> Vec<(u64, u32)> {
    let mut blocks = Vec::new();
    let mut at = start;
    while at < end {
        // There is nothing between this frame and that.
        let next = set.range(at..end).next().copied().unwrap_or(end);
        if next == at {
            at += 1;
            continue;
        }
        let fits = |of: &u32| at % (1 << of) == 0 && at + (1 << of) <= next;
        let of = (0..=most).rev().find(fits).unwrap();
        blocks.push((at, of));
        at += 1 << of;
    }
    blocks
}

fn check_gaps(reserved: &Tree<&Mem>, set: &Set, (start, end): (u64, u64), most: u32) -> usize {
    let mut gaps = Gaps::new(reserved, frames(start, end), order(most));
    let found = gaps.by_ref().map(|it| (it.pfn().get(), it.order().get()));
    let found: Vec<_> = found.collect();
    let expected = gaps_in(set, (start, end), most);
    assert!(found == expected, "{start:#x}..{end:#x}, order {most}");
    // Nothing more comes after the end.
    assert_eq!(gaps.next(), None);
    found.len()
}

#[test]
fn gaps() {
    let mut rng = Rng::new(22);
    let orders = [0, 1, 3, 6, 10, abi::BITMAP_LOG2, abi::BITMAP_LOG2 + 4];
    let mut count = 0;
    for set in sets() {
        let mem = set_mem();
        // A leaf without bits is as good as none.
        let reserved = tree_of(&mem, &set, &[9 * LEAF, 11 * LEAF]);
        let last = set.last().copied().unwrap_or(0).min(20 * LEAF);
        let middle = set.iter().nth(set.len() / 2).copied().unwrap_or(LEAF);
        let start = middle.saturating_sub(3000).min(abi::PFN_END - 7000);
        let mut ranges = vec![
            (0, 0),
            (0, 1),
            (0, 64),
            (5, 5),
            (start, start + 6000),
            (last, last + 1),
            (LEAF - 70, LEAF),
            (LEAF - 70, LEAF + 70),
            (LEAF, LEAF + 1),
            (3 * LEAF - 1, 3 * LEAF),
            (abi::PFN_END - 5000, abi::PFN_END),
            (abi::PFN_END - 1, abi::PFN_END),
        ];
        for _ in 0..6 {
            let start = rng.below(4 * LEAF);
            ranges.push((start, start + rng.bits(13)));
        }
        for range in ranges {
            for most in orders {
                count += check_gaps(&reserved, &set, range, most);
            }
        }
        // Many leaves: only large blocks, or the test takes long.
        for most in &orders[4..] {
            count += check_gaps(&reserved, &set, (1, 12 * LEAF + 5), *most);
        }
    }
    assert!(count > 100_000, "{count}");
}

/// Every pattern of twelve frames, in a word and across the borders of words and leaves.
#[test]
fn gaps_of_patterns() {
    for base in [8, 58, LEAF - 6] {
        let mem = set_mem();
        let reserved = tree_of(&mem, &Set::new(), &[0, LEAF]);
        let (nodes, _) = abi::walk(&mem, reserved.root().get());
        let leaves: Vec<_> = nodes.iter().filter(|(_, level, _)| *level == 0).collect();
        for pattern in 0..1u64 << 12 {
            let set: Set = (0..12)
                .filter(|bit| pattern >> bit & 1 == 1)
                .map(|bit| base + bit)
                .collect();
            for at in [base, base + 11] {
                let (phys, _, first) = leaves[(at / LEAF) as usize];
                let in_word = |pfn: &&u64| **pfn / 64 == at / 64;
                let bits = set.iter().filter(in_word);
                let word = bits.fold(0, |word, pfn| word | 1 << (pfn % 64));
                mem.words(*phys)[((at - first) / 64) as usize].store(word, SeqCst);
            }
            let skip = pattern % 5;
            check_gaps(&reserved, &set, (base + skip, base + 12), 3);
        }
    }
}

/// The blocks of order `of` that start in a range, found by trying every frame.
fn blocks_from(start: u64, end: u64, of: u32) -> Option<(u64, u64)> {
    let mut starts = (start..end).filter(|pfn| pfn % (1 << of) == 0);
    let first = starts.next()?;
    let last = starts.next_back().unwrap_or(first);
    let key = |pfn: u64| abi::encode(pfn << PAGE_SHIFT, of);
    Some((key(first), key(last)))
}

#[test]
fn keys_of_ranges() {
    let ends = |range: Frames, of| {
        let found = range.keys(order(of));
        found.map(|(first, last)| (first.get(), last.get()))
    };
    let top = abi::PFN_END;
    let places = (0..64 - PAGE_SHIFT).map(|bit| 1 << bit);
    let places = places.chain([0, 3 << 20, LEAF - 1, 5 * LEAF, top / 3, top - 9, top]);
    for at in places {
        let around = |by: u64| at.saturating_sub(by).min(top - 1);
        for start in [around(0), around(1), around(2), around(9), around(40)] {
            for length in [0, 1, 2, 3, 8, 9, 17, 64, 100] {
                let end = (start + length).min(top);
                for of in 0..=64 - PAGE_SHIFT {
                    let found = ends(frames(start, end), of);
                    let expected = blocks_from(start, end, of);
                    assert_eq!(found, expected, "{start:#x}..{end:#x}, order {of}");
                }
            }
        }
    }
    // Ranges of any length have the blocks of each order that start there, and no other.
    for of in 0..=64 - PAGE_SHIFT {
        let pages = 1u64 << of;
        let blocks = top / pages;
        let key = |index: u64| abi::encode((index * pages) << PAGE_SHIFT, of);
        assert_eq!(ends(frames(0, top), of), Some((key(0), key(blocks - 1))));
        let rest = (blocks > 1).then(|| (key(1), key(blocks - 1)));
        assert_eq!(ends(frames(1, top), of), rest);
        if blocks > 2 {
            let all_but_one = Some((key(1), key(blocks - 2)));
            assert_eq!(ends(frames(pages, top - pages), of), all_but_one);
            assert_eq!(ends(frames(1, top - pages), of), all_but_one);
            assert_eq!(ends(frames(pages, top - pages + 1), of), rest);
        }
    }
}

/// Whoever goes from range to range meets each block once.
#[test]
fn keys_of_ranges_in_a_row() {
    let mut rng = Rng::new(23);
    let limit = 1 << 20;
    let blocks: BTreeSet<(u64, u32)> = (0..500)
        .map(|_| {
            let of = rng.below(14) as u32;
            (rng.below(limit) >> of << of, of)
        })
        .collect();
    let mem = set_mem();
    let numbers = blocks
        .iter()
        .map(|(pfn, of)| abi::encode(pfn << PAGE_SHIFT, *of));
    let tree = tree_of(&mem, &numbers.collect(), &[]);
    let mut met = Vec::new();
    let mut start = 0;
    while start < limit {
        let end = (start + 1 + rng.bits(15)).min(limit);
        for of in 0..=64 - PAGE_SHIFT {
            let Some(bounds) = frames(start, end).keys(order(of)) else {
                continue;
            };
            for run in tree.runs_between(bounds) {
                let first = run.first.block().map(Block::pfn).unwrap().get();
                met.extend((0..run.count).map(|i| (first + (i << of), of)));
            }
        }
        start = end;
    }
    met.sort_unstable();
    assert!(met.iter().eq(&blocks));
}

/// Where room was made for a run, adding any key of it needs no memory.
/// What is marked in a grain: the words of a leaf between two keys, against a list of them.
#[test]
fn words_between_keys() {
    let mut rng = Rng::new(23);
    let base = 3 * LEAF;
    for turn in 0..60 {
        let set: Set = (0..rng.below(400)).map(|_| base + rng.below(LEAF)).collect();
        let mem = set_mem();
        let tree = tree_of(&mem, &set, &[base]);
        let leaf = tree.find_leaf(key(base)).unwrap();
        for step in 0..200 {
            // Within one word, around the borders of words and of the leaf, and anything.
            let near = [0, 63, 64, LEAF - 65, LEAF - 1, rng.below(LEAF)][(turn + step) % 6];
            let first = (near + rng.below(4)).min(LEAF - 1);
            let last = (first + rng.bits(1 + step as u64 % 15)).min(LEAF - 1);
            let (first, last) = (base + first, base + last);
            let mut found = Set::new();
            let mut words = Set::new();
            for (start, word) in leaf.words_between(key(first), key(last)) {
                assert!(start % 64 == 0 && words.insert(start), "{start:#x} comes twice");
                found.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| start + bit));
            }
            let expected: Set = set.range(first..=last).copied().collect();
            assert_eq!(found, expected, "{first:#x} to {last:#x}");
            assert_eq!(words.len() as u64, last / 64 - first / 64 + 1);
        }
    }
}

#[test]
fn room_is_made() {
    for (first, count) in [
        (0, 1),
        (5, 3),
        (LEAF - 1, 1),
        (LEAF - 1, 2),
        (3 * LEAF, LEAF),
        (LEAF + 7, 3 * LEAF),
    ] {
        let mem = Mem::new();
        let set = Tree::new(&mem).unwrap();
        let run = Run {
            first: key(first),
            count,
        };
        make_leaves(&set, run).unwrap();
        let room = abi::walk(&mem, set.root().get());
        assert_eq!(room.1, [], "there are keys");
        mem.budget.store(0, SeqCst);
        for number in [first, first + count / 2, first + count - 1] {
            assert!(set.add(key(number)).is_ok());
            assert!(set.contains(key(number)));
        }
        assert_eq!(mem.live(), room.0.len());
        // No more room than that.
        let ends = [first, first + count - 1].map(|number| number / LEAF);
        let leaves = room.0.iter().filter(|(_, level, _)| *level == 0).count();
        assert_eq!(leaves as u64, ends[1] - ends[0] + 1);
    }
}
