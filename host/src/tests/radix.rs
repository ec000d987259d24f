// SPDX-License-Identifier: GPL-2.0

//! The tree against a model, against the handover format, and when memory runs out.

use super::super::kho_key::{
    Key,
    Order, //
};
use super::super::kho_radix::{
    NoMemory,
    Node,
    NodeAddr,
    NodeMem,
    Removal,
    Step,
    Tree,
    Visitor, //
};
use super::super::PAGE_SHIFT;
use super::{
    abi,
    block,
    dump,
    key,
    order,
    prune,
    Mem,
    Rng, //
};
use std::{
    collections::BTreeSet,
    sync::atomic::Ordering::SeqCst, //
};

const LEAF: u64 = 1 << abi::BITMAP_LOG2;

const ALL: (u64, u64) = (0, (1 << abi::KEY_WIDTH) - 1);

/// Returns the keys that `runs_between()` finds, and checks that the runs ascend and have gaps.
pub(super) fn keys_between(tree: &Tree<&Mem>, (first, last): (u64, u64)) -> Vec<u64> {
    let mut keys = Vec::new();
    for run in tree.runs_between((key(first), key(last))) {
        assert!(run.count > 0);
        let start = run.first.get();
        let gap = keys.last().is_none_or(|before| before + 1 < start);
        assert!(gap, "run at {start:#x} is no run of its own");
        keys.extend(start..start + run.count);
    }
    keys
}

/// Places around which the tree has borders: of words, leaves, and tables of each level.
pub(super) fn borders() -> Vec<u64> {
    let tables = (0..abi::DEPTH).map(abi::node_shift);
    let shifts = [6].into_iter().chain(tables);
    let limit = ALL.1;
    shifts
        .flat_map(|shift| [1u64, 3].map(|at| at.checked_shl(shift).unwrap_or(0)))
        .chain(Order::all().map(|order| Key::bounds(order).0.get()))
        .chain([limit, limit / 3, 1 << (abi::KEY_WIDTH - 1)])
        .filter(|at| *at <= limit)
        .collect()
}

/// Sets of keys that have something in common.
fn distributions() -> Vec<Vec<u64>> {
    let mut rng = Rng::new(5);
    let base = abi::encode(5 << 34, 0);
    let limit = ALL.1 + 1;
    let near = |at: u64| (0..6).map(move |i| at.wrapping_add(i).wrapping_sub(3));
    let mixed = |_| {
        let of = rng.below(30) as u32;
        abi::encode(rng.below(1 << 30 >> of) << (PAGE_SHIFT + of), of)
    };
    // First, second and last entries everywhere, so that the way on leads up any number of levels.
    let mut digit = Rng::new(7);
    let corner = |_| {
        let digits = (0..abi::DEPTH).map(|level| match level {
            0 => (0, LEAF),
            _ => (abi::shift(level), 1 << abi::TABLE_LOG2),
        });
        let place = |(shift, size): (u32, u64)| {
            [0, 1, size - 2, size - 1][digit.below(4) as usize] << shift
        };
        digits.map(place).fold(0, |key, digit| key | digit) & ALL.1
    };
    vec![
        (0..150).map(corner).collect(),
        (base..base + 300).collect(),
        (0..300).map(mixed).collect(),
        (0..60).map(|_| rng.below(limit)).collect(),
        (1..6).flat_map(|i| near(base + i * LEAF)).collect(),
        (1..6).flat_map(|i| near(base + i * 64)).collect(),
        borders()
            .into_iter()
            .flat_map(near)
            .filter(|key| *key < limit)
            .collect(),
    ]
}

/// Compares all that a tree tells with the keys that it should have.
fn compare(tree: &Tree<&Mem>, mem: &Mem, model: &BTreeSet<u64>, some: &[u64]) {
    let keys: Vec<u64> = model.iter().copied().collect();
    assert_eq!(keys_between(tree, ALL), keys);
    let (nodes, walked) = abi::walk(mem, tree.root().get());
    assert_eq!(walked, keys);
    assert_eq!(nodes.len(), mem.live(), "nodes were lost");
    for of in Order::all() {
        let (first, last) = Key::bounds(of);
        let found: Vec<u64> = tree
            .runs_between(Key::bounds(of))
            .flat_map(|run| run.first.get()..run.first.get() + run.count)
            .collect();
        let range = first.get()..=last.get();
        assert!(found.iter().eq(model.range(range)), "{of:?}");
    }
    for pair in some.windows(2).step_by(7) {
        let (first, last) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
        let found = keys_between(tree, (first, last));
        assert!(
            found.iter().eq(model.range(first..=last)),
            "{first:#x}..={last:#x}"
        );
    }
}

#[test]
fn model() {
    for (seed, universe) in (0u64..).zip(distributions()) {
        let mem = Mem::new();
        let tree = Tree::new(&mem).unwrap();
        let mut model = BTreeSet::new();
        let mut rng = Rng::new(seed);
        for turn in 0..3000u64 {
            let number = universe[rng.below(universe.len() as u64) as usize];
            let word = number / 64 * 64;
            // Grow and shrink in turns.
            let grows = rng.below(8) < if turn / 500 % 2 == 0 { 6 } else { 2 };
            assert_eq!(tree.contains(key(number)), model.contains(&number));
            if grows {
                let added = tree.add(key(number)).unwrap();
                assert_eq!(added, model.insert(number), "{number:#x}");
            } else {
                let expected = if !model.remove(&number) {
                    Removal::Absent
                } else if model.range(word..word + 64).next().is_none() {
                    Removal::Emptied
                } else {
                    Removal::Removed
                };
                assert_eq!(tree.remove(key(number)), expected, "{number:#x}");
            }
            if turn % 250 == 0 {
                compare(&tree, &mem, &model, &universe);
            }
            if turn % 700 == 0 {
                let before = mem.live();
                let least = abi::least_nodes(model.iter().copied());
                assert_eq!(tree.has_empty(), before > least);
                let freed = prune(&tree, &mem);
                compare(&tree, &mem, &model, &universe);
                assert_eq!(mem.live(), least, "{model:x?}");
                assert_eq!(freed, before - least);
                assert!(!tree.has_empty());
                assert_eq!(prune(&tree, &mem), 0);
            }
        }
        for number in std::mem::take(&mut model) {
            assert_ne!(tree.remove(key(number)), Removal::Absent);
        }
        prune(&tree, &mem);
        assert_eq!(mem.live(), 1, "only the root is left");
        assert!(tree.add(key(universe[0])).unwrap());
        tree.destroy();
        assert_eq!(mem.live(), 0);
    }
}

/// Tries all patterns of the `bits` keys from `base` on.
fn patterns(base: u64, bits: u32) {
    let mem = Mem::new();
    let tree = Tree::new(&mem).unwrap();
    let mut have = 0u64;
    for count in 0..1u64 << bits {
        // Of neighbours in Gray code one bit differs.
        let want = count ^ count >> 1;
        for bit in (0..bits).filter(|bit| (have ^ want) >> bit & 1 == 1) {
            let key = key(base + u64::from(bit));
            if want >> bit & 1 == 1 {
                assert!(tree.add(key).unwrap());
            } else {
                assert_ne!(tree.remove(key), Removal::Absent);
            }
        }
        have = want;
        let expected: Vec<u64> = (0..u64::from(bits))
            .filter(|bit| want >> bit & 1 == 1)
            .map(|bit| base + bit)
            .collect();
        let range = (base, base + u64::from(bits) - 1);
        assert_eq!(keys_between(&tree, range), expected, "{want:#b}");
    }
}

#[test]
fn patterns_in_a_word() {
    let base = abi::encode(0, 0);
    patterns(base, 8);
    patterns(base + 56, 8);
}

#[test]
fn patterns_across_words() {
    patterns(abi::encode(0, 0) + 58, 12);
}

#[test]
fn patterns_across_leaves_and_tables() {
    for at in borders() {
        if at >= LEAF && at + 4 <= ALL.1 {
            patterns(at - 4, 8);
        }
    }
}

/// One run of every length and place in three words, and two with a gap between them.
#[test]
fn long_runs() {
    let mem = Mem::new();
    let tree = Tree::new(&mem).unwrap();
    let base = abi::encode(0, 0);
    tree.add(key(base)).unwrap();
    tree.remove(key(base));
    let leaf = abi::walk(&mem, tree.root().get()).0.last().unwrap().0;
    let edges = [
        0, 1, 2, 31, 62, 63, 64, 65, 100, 126, 127, 128, 129, 190, 191, 192,
    ];
    let ends = || {
        edges
            .iter()
            .flat_map(|a| edges.iter().map(move |b| (*a, *b)))
    };
    for ((a, b), (c, d)) in ends().flat_map(|x| ends().map(move |y| (x, y))) {
        if a >= b || b > c || c >= d {
            continue;
        }
        let set = |bit: &u64| (a..b).contains(bit) || (c..d).contains(bit);
        for (word, start) in mem.words(leaf).iter().zip([0, 64, 128]) {
            let bits = (0..64).filter(|bit| set(&(start + bit)));
            word.store(bits.fold(0, |word, bit| word | 1 << bit), SeqCst);
        }
        let runs: Vec<_> = tree
            .runs_between(Key::bounds(order(0)))
            .map(|run| (run.first.get() - base, run.first.get() - base + run.count))
            .collect();
        if b == c {
            assert_eq!(runs, [(a, d)]);
        } else {
            assert_eq!(runs, [(a, b), (c, d)]);
        }
    }
}

#[test]
fn a_run_over_whole_leaves() {
    let mem = Mem::new();
    let tree = Tree::new(&mem).unwrap();
    let first = abi::encode(0, 1) + 2 * LEAF;
    for leaf in 0..3 {
        abi::add(&mem, tree.root().get(), first + leaf * LEAF);
    }
    for (phys, level, _) in abi::walk(&mem, tree.root().get()).0 {
        if level == 0 {
            mem.words(phys)
                .iter()
                .for_each(|word| word.store(u64::MAX, SeqCst));
        }
    }
    assert_ne!(tree.remove(key(first)), Removal::Absent);
    assert!(tree.add(key(first + 3 * LEAF)).unwrap());
    let runs: Vec<_> = tree.runs_between(Key::bounds(order(1))).collect();
    assert_eq!(runs.len(), 1);
    assert_eq!((runs[0].first.get(), runs[0].count), (first + 1, 3 * LEAF));
}

/// Blocks of several orders can share the leaf of the smallest keys, and key 0 is there, too.
#[test]
fn runs_are_of_one_order() {
    let mem = Mem::new();
    let tree = Tree::new(&mem).unwrap();
    for number in 0..64 {
        tree.add(key(number)).unwrap();
    }
    for of in Order::all() {
        let (first, last) = Key::bounds(of);
        let runs: Vec<_> = tree.runs_between(Key::bounds(of)).collect();
        if last.get() < 64 {
            assert_eq!(runs.len(), 1, "{of:?}");
            let count = last.get() - first.get() + 1;
            assert_eq!((runs[0].first, runs[0].count), (first, count), "{of:?}");
        } else {
            assert_eq!(runs, [], "{of:?}");
        }
    }
}

/// What a visitor saw: a node's address and keys, or the first key of a leaf.
#[derive(Debug, PartialEq)]
enum Seen {
    Node(u64, u64, u64),
    Leaf(u64),
}

struct Log {
    seen: Vec<Seen>,
    stop_after: usize,
}

impl Log {
    fn push(&mut self, seen: Seen) -> bool {
        self.seen.push(seen);
        self.seen.len() != self.stop_after
    }
}

impl Visitor for Log {
    fn node(&mut self, addr: NodeAddr, first: u64, last: u64) -> Step {
        match self.push(Seen::Node(addr.get(), first, last)) {
            true => Step::In,
            false => Step::Stop,
        }
    }

    fn leaf(&mut self, first: u64, _leaf: &Node) -> bool {
        self.push(Seen::Leaf(first))
    }
}

#[test]
fn visit_order() {
    for universe in distributions() {
        let mem = Mem::new();
        let tree = Tree::new(&mem).unwrap();
        for number in universe {
            tree.add(key(number)).unwrap();
        }
        let mut expected = Vec::new();
        for (phys, level, first) in abi::walk(&mem, tree.root().get()).0 {
            let last = first + ((1 << abi::node_shift(level)) - 1);
            expected.push(Seen::Node(phys, first, last));
            if level == 0 {
                expected.push(Seen::Leaf(first));
            }
        }
        let visit = |stop_after| {
            let seen = Vec::new();
            let mut log = Log { seen, stop_after };
            (tree.visit(&mut log), log.seen)
        };
        let (result, seen) = visit(usize::MAX);
        assert!(result);
        assert_eq!(seen, expected);
        for stop in 1..expected.len().min(20) {
            let (result, seen) = visit(stop);
            assert!(!result);
            assert_eq!(seen, expected[..stop]);
        }
    }
}

/// A tree that is written by one implementation is the other's, word by word.
#[test]
fn layout() {
    for universe in distributions() {
        let (ours, theirs) = (Mem::new(), Mem::at(1 << 44, 4096));
        let tree = Tree::new(&ours).unwrap();
        let root = theirs.take().unwrap();
        for number in &universe {
            tree.add(key(*number)).unwrap();
            abi::add(&theirs, root, *number);
            assert!(ours.live() <= theirs.live());
        }
        let (left, _) = abi::walk(&ours, tree.root().get());
        let (right, keys) = abi::walk(&theirs, root);
        assert_eq!(left.len(), right.len());
        for ((a, level, first), (b, other, start)) in left.into_iter().zip(right) {
            assert_eq!((level, first), (other, start));
            for (x, y) in ours.words(a).iter().zip(theirs.words(b)) {
                let (x, y) = (x.load(SeqCst), y.load(SeqCst));
                if level == 0 {
                    assert_eq!(x, y);
                } else {
                    assert_eq!(x == 0, y == 0);
                }
            }
        }
        let theirs = Tree::from_root(&theirs, NodeAddr::new(root).unwrap());
        assert_eq!(keys_between(&theirs, ALL), keys);
        assert!(keys.iter().all(|number| theirs.contains(key(*number))));
    }
}

/// An insertion that runs out of memory leaves no trace, whatever was there before it.
#[test]
fn all_or_nothing() {
    let target = abi::encode(0x1234_5678 << PAGE_SHIFT, 0);
    for level in 0..abi::DEPTH {
        // Shares with the target all nodes above `level`.
        let sibling = abi::sibling(target, level);
        for budget in 0..i64::from(abi::DEPTH) {
            let mem = Mem::new();
            let tree = Tree::new(&mem).unwrap();
            mem.watch(&tree);
            tree.add(key(sibling)).unwrap();
            let root = tree.root().get();
            let (before, live) = (dump(&mem, root), mem.live());
            mem.budget.store(budget, SeqCst);
            let result = tree.add(key(target));
            if budget < i64::from(level) {
                assert_eq!(result, Err(NoMemory), "level {level}, budget {budget}");
                assert_eq!(mem.live(), live, "leaked");
                assert!(dump(&mem, root) == before);
                assert!(!tree.contains(key(target)));
                mem.budget.store(i64::MAX, SeqCst);
                assert_eq!(tree.add(key(target)), Ok(true));
            } else {
                assert_eq!(result, Ok(true));
                assert_eq!(mem.budget.load(SeqCst), budget - i64::from(level));
            }
            let mut both = [sibling, target];
            both.sort_unstable();
            assert_eq!(abi::walk(&mem, root).1, both);
            assert_eq!(mem.live(), live + level as usize);
            // What is there needs no memory.
            mem.budget.store(0, SeqCst);
            assert_eq!(tree.add(key(target)), Ok(false));
            assert_eq!(tree.add(key(target ^ 1)), Ok(true));
            tree.destroy();
            assert_eq!(mem.live(), 0);
        }
    }
    let mem = Mem::new();
    mem.budget.store(0, SeqCst);
    assert!(Tree::new(&mem).is_err());
    assert!(NodeAddr::new(0).is_none());
}

#[test]
fn never_allocates_inside() {
    let mem = Mem::new();
    mem.strict.store(true, SeqCst);
    let tree = Tree::new(&mem).unwrap();
    for number in [1, LEAF, 5 * LEAF, ALL.1, 1] {
        tree.add(key(number)).unwrap();
    }
    assert_eq!(tree.remove(key(1)), Removal::Emptied);
    assert_eq!(mem.inside.load(SeqCst), 0);
}

/// Many keys at once are as many one by one, up to the first that is there already.
#[test]
fn many_at_once() {
    for (seed, universe) in (40u64..).zip(distributions()) {
        let mem = Mem::new();
        mem.strict.store(true, SeqCst);
        let tree = Tree::new(&mem).unwrap();
        let mut model = BTreeSet::new();
        let mut rng = Rng::new(seed);
        for turn in 0..200u64 {
            let any = |_| universe[rng.below(universe.len() as u64) as usize];
            let some: Vec<u64> = (0..1 + turn % 90).map(any).collect();
            let keys = some.iter().map(|number| key(*number));
            if turn % 3 > 0 {
                let there = some.iter().find(|number| !model.insert(**number));
                let expected = there.map_or(Ok(()), |number| Err((key(*number), None)));
                assert_eq!(tree.add_all(keys), expected);
            } else {
                let mut absent = Vec::new();
                let emptied = tree.remove_all(keys, |key| {
                    assert_eq!(mem.inside.load(SeqCst), 0, "told inside");
                    absent.push(key.get());
                });
                let (mut missed, mut cleared) = (Vec::new(), false);
                for number in &some {
                    let word = number / 64 * 64;
                    match model.remove(number) {
                        true => cleared |= model.range(word..word + 64).next().is_none(),
                        false => missed.push(*number),
                    }
                }
                assert_eq!((absent, emptied), (missed, cleared));
            }
            assert_eq!(mem.inside.load(SeqCst), 0);
            compare(&tree, &mem, &model, &some);
        }
    }
}

/// What was added before memory ran out stays, and nothing else.
#[test]
fn many_at_once_without_memory() {
    let base = abi::encode(0, 0);
    for budget in 0..9 {
        let mem = Mem::new();
        let tree = Tree::new(&mem).unwrap();
        assert_eq!(tree.add(key(base)), Ok(true));
        // Two keys of each leaf, so that every second one needs a node.
        let numbers = (2..20u64).map(|i| base + i / 2 * LEAF + i % 2);
        mem.budget.store(budget, SeqCst);
        let first = numbers.clone().nth(2 * budget as usize).unwrap();
        let result = tree.add_all(numbers.clone().map(key));
        assert_eq!(result, Err((key(first), Some(NoMemory))), "budget {budget}");
        let model = numbers.take_while(|number| *number < first).chain([base]);
        compare(&tree, &mem, &model.collect(), &[]);
    }
}

/// Nobody stays in the tree for long, nor comes and goes for each key.
#[test]
fn many_at_once_in_few_passes() {
    let mem = Mem::new();
    let tree = Tree::new(&mem).unwrap();
    let base = abi::encode(0, 0);
    tree.add(key(base)).unwrap();
    tree.remove(key(base));
    let keys = || {
        (base..base + 1000).map(|number| {
            assert_eq!(mem.inside.load(SeqCst), 1);
            (mem.entered.load(SeqCst), key(number))
        })
    };
    let mut passes: Vec<u64> = Vec::new();
    tree.add_all(keys().map(|(pass, key)| {
        passes.push(pass);
        key
    }))
    .unwrap();
    let mut more = Vec::new();
    tree.remove_all(
        keys().map(|(pass, key)| {
            more.push(pass);
            key
        }),
        |_| panic!("all of them are there"),
    );
    for passes in [passes, more] {
        let longest = passes.chunk_by(|a, b| a == b).map(<[u64]>::len).max();
        assert_eq!(longest, Some(64));
        assert_eq!(passes.last().unwrap() - passes[0], 1000 / 64);
    }
}

/// The last key of a word may be the last of its leaf; nothing is pruned unless it is.
#[test]
fn emptied() {
    let base = Key::of(block(0, 0)).get();
    for (a, b) in [
        (0, 1),
        (0, LEAF - 1),
        (LEAF - 1, 0),
        (64, 63),
        (LEAF / 2, LEAF / 2 - 64),
    ] {
        let mem = Mem::new();
        let tree = Tree::new(&mem).unwrap();
        mem.watch(&tree);
        tree.add(key(base + a)).unwrap();
        tree.add(key(base + b)).unwrap();
        tree.add(key(base + LEAF)).unwrap();
        let first = match a / 64 == b / 64 {
            true => Removal::Removed,
            false => Removal::Emptied,
        };
        assert_eq!(tree.remove(key(base + a)), first);
        assert_eq!(tree.remove(key(base + a)), Removal::Absent);
        assert!(!tree.has_empty());
        assert_eq!(prune(&tree, &mem), 0);
        assert_eq!(tree.remove(key(base + b)), Removal::Emptied);
        assert_eq!(tree.remove(key(base + b)), Removal::Absent);
        assert_eq!(prune(&tree, &mem), 1);
        assert_eq!(tree.remove(key(base + LEAF)), Removal::Emptied);
        assert_eq!(prune(&tree, &mem), abi::DEPTH as usize - 1);
        assert_eq!(
            (mem.live(), (&mem).node(tree.root()).runs().next()),
            (1, None)
        );
    }
}

/// A leaf in a tree of its own, and where its words are.
fn a_leaf(mem: &Mem) -> (&Node, u64) {
    let tree = Tree::new(mem).unwrap();
    abi::add(mem, tree.root().get(), 0);
    let (phys, ..) = *abi::walk(mem, tree.root().get()).0.last().unwrap();
    mem.words(phys)[0].store(0, SeqCst);
    // SAFETY: A node is an array of as many words, each as an `AtomicU64`.
    let leaf = unsafe { &*mem.words(phys).as_ptr().cast() };
    (leaf, phys)
}

/// Bits at the borders of words, and in the midst of some.
fn edges() -> Vec<u64> {
    let words = [0, 64, 128, 640, LEAF / 2, LEAF - 128, LEAF - 64, LEAF];
    let near = |at: u64| [1, 2, 3, 30, 62, 63].map(|by| (at + by).min(LEAF));
    let mut edges: Vec<u64> = words.into_iter().flat_map(near).chain(words).collect();
    edges.sort_unstable();
    edges.dedup();
    edges
}

#[test]
fn filling_a_leaf() {
    let mem = Mem::new();
    let (leaf, phys) = a_leaf(&mem);
    let words = mem.words(phys);
    let bits = |from: u64, to: u64| {
        (from..to).map(|bit| words[bit as usize / 64].load(SeqCst) >> (bit % 64) & 1)
    };
    let clear = |word: u64| words[word as usize].store(0, SeqCst);
    for from in edges() {
        for to in edges() {
            let count = to.saturating_sub(from);
            assert_eq!(leaf.set_range(from, count), 0, "{from} {count}");
            // Sparse words around, and all bits between.
            let (low, high) = (from.saturating_sub(70), (from + count + 70).min(LEAF));
            let set: u64 = bits(low, high).sum();
            assert_eq!((set, bits(from, from + count).sum()), (count, count));
            assert!(leaf.has_range(from, count), "{from} {count}");
            assert!(from == 0 || !leaf.has_range(from - 1, count + 1));
            assert!(to == LEAF || !leaf.has_range(from, count + 1));
            if count > 4 {
                // The same again, and one more at either end.
                assert_eq!(leaf.set_range(from + 1, count - 2), count - 2);
                assert_eq!(leaf.set_range(from, 1), 1);
            }
            (from / 64..to.div_ceil(64)).for_each(clear);
        }
    }
    assert_eq!(
        mem.words(phys).iter().map(|word| word.load(SeqCst)).max(),
        Some(0)
    );
    // Of what does not fit, the part that does.
    assert_eq!(leaf.set_range(LEAF - 3, 10), 0);
    assert_eq!(leaf.set_range(LEAF - 5, u64::MAX), 3);
    assert_eq!(leaf.set_range(LEAF, 1), 0);
    assert_eq!(leaf.set_range(u64::MAX, 1), 0);
    assert_eq!(bits(0, LEAF).sum::<u64>(), 5);
    assert_eq!(bits(LEAF - 5, LEAF).sum::<u64>(), 5);
}

/// Words are found that are each other's like.
#[test]
fn equal_words() {
    let mem = Mem::new();
    let (leaf, phys) = a_leaf(&mem);
    let store = |at: u64, value| mem.words(phys)[at as usize].store(value, SeqCst);
    for (a, b) in (8..24).flat_map(|a| (a + 1..24).map(move |b| (a, b))) {
        store(a, 5);
        store(b, 5);
        assert_eq!(leaf.next_used(0), Some((a, 5)), "{a} {b}");
        assert_eq!(leaf.next_used(a + 1), Some((b, 5)));
        assert_eq!(leaf.next_used(b + 1), None);
        store(a, 0);
        store(b, 0);
    }
}

#[test]
fn filling_a_leaf_at_random() {
    let mut rng = Rng::new(30);
    let mem = Mem::new();
    let (leaf, phys) = a_leaf(&mem);
    let mut model = BTreeSet::new();
    for _ in 0..300 {
        let from = rng.below(LEAF);
        let count = rng.bits(9).min(LEAF - from);
        let again = model.range(from..from + count).count() as u64;
        assert_eq!(leaf.has_range(from, count), again == count);
        assert_eq!(leaf.set_range(from, count), again);
        model.extend(from..from + count);
    }
    let set = |bit: &u64| mem.words(phys)[*bit as usize / 64].load(SeqCst) >> (bit % 64) & 1 == 1;
    assert!((0..LEAF).filter(set).eq(model));
}

/// A leaf that was asked for is there, and without keys it had not had before.
#[test]
fn leaves_of_keys() {
    for universe in distributions() {
        let mem = Mem::new();
        let tree = Tree::new(&mem).unwrap();
        let root = tree.root().get();
        let (some, others) = universe.split_at(universe.len() / 2);
        some.iter().for_each(|number| abi::add(&mem, root, *number));
        let keys = abi::walk(&mem, root).1;
        let have: BTreeSet<u64> = keys.iter().map(|number| number / LEAF).collect();
        for number in others {
            let found = tree.find_leaf(key(*number)).is_some();
            assert_eq!(found, have.contains(&(number / LEAF)), "{number:#x}");
        }
        for number in others {
            let leaf: *const Node = tree.leaf(key(*number)).unwrap();
            // It is the very leaf that the format says it is.
            let first = number / LEAF * LEAF;
            let (nodes, _) = abi::walk(&mem, root);
            let there = nodes
                .iter()
                .find(|(_, level, at)| *level == 0 && *at == first);
            let words = mem.words(there.unwrap().0).as_ptr();
            assert_eq!(leaf, words.cast());
            let found = tree.find_leaf(key(*number)).unwrap();
            assert!(std::ptr::eq(leaf, found));
        }
        let (nodes, after) = abi::walk(&mem, root);
        assert_eq!(after, keys);
        assert_eq!(nodes.len(), abi::least_nodes(universe.iter().copied()));
        // What is there needs no memory.
        mem.budget.store(0, SeqCst);
        assert!(universe
            .iter()
            .all(|number| tree.leaf(key(*number)).is_ok()));
    }
}

#[test]
fn leaf_without_memory() {
    let target = abi::encode(0x1234_5678 << PAGE_SHIFT, 0);
    for level in 1..abi::DEPTH {
        for budget in 0..=i64::from(level) {
            let mem = Mem::new();
            let tree = Tree::new(&mem).unwrap();
            let root = tree.root().get();
            tree.add(key(abi::sibling(target, level))).unwrap();
            let before = dump(&mem, root);
            mem.budget.store(budget, SeqCst);
            let result = tree.leaf(key(target)).map(|_| ());
            if budget < i64::from(level) {
                assert_eq!(result, Err(NoMemory));
                assert!(dump(&mem, root) == before);
            } else {
                assert_eq!(result, Ok(()));
                assert!(!tree.contains(key(target)));
            }
        }
    }
}

#[test]
fn next_leaves() {
    for universe in distributions() {
        let mem = Mem::new();
        let tree = Tree::new(&mem).unwrap();
        let leaves: BTreeSet<u64> = universe.iter().map(|number| number / LEAF).collect();
        for number in &universe {
            abi::add(&mem, tree.root().get(), *number);
        }
        let around = |at: u64| [at.saturating_sub(1), at, at + 1];
        let froms = leaves.iter().flat_map(|leaf| around(leaf * LEAF));
        let froms = froms.chain(borders()).chain([0, ALL.1]);
        for from in froms.filter(|from| *from <= ALL.1) {
            let next = leaves.range(from / LEAF..).next();
            for last in [from, from | (LEAF - 1), from.saturating_add(LEAF), ALL.1] {
                let last = last.min(ALL.1);
                let expected = next.filter(|leaf| **leaf <= last / LEAF).copied();
                let found = tree.next_leaf(key(from), key(last));
                assert_eq!(found.map(|(first, _)| first / LEAF), expected, "{from:#x}");
                if let Some((first, leaf)) = found {
                    assert_eq!(first % LEAF, 0);
                    assert!(std::ptr::eq(leaf, tree.find_leaf(key(first)).unwrap()));
                }
            }
        }
    }
}

/// Returns how often node memory was asked for something during `work`.
fn steps<R>(mem: &Mem, work: impl FnOnce() -> R) -> (u64, R) {
    let before = mem.steps.load(SeqCst);
    let result = work();
    (mem.steps.load(SeqCst) - before, result)
}

/// A key in the leaf that was used last costs no descent, one below the same table a step of it.
#[test]
fn neighbours_need_no_descent() {
    let mem = Mem::new();
    let tree = Tree::new(&mem).unwrap();
    let base = abi::encode(5 << 40, 0);
    let far = u64::from(abi::DEPTH);
    tree.add(key(base)).unwrap();
    assert_eq!(steps(&mem, || tree.add(key(base + 1))), (far, Ok(true)));
    assert_eq!(steps(&mem, || tree.add(key(base + 1))), (1, Ok(false)));
    let last = base + LEAF - 1;
    assert_eq!(steps(&mem, || tree.add(key(last))), (1, Ok(true)));
    assert_eq!(
        steps(&mem, || tree.remove(key(base + 1))),
        (1, Removal::Removed)
    );
    assert_eq!(
        steps(&mem, || tree.remove(key(base + 1))),
        (1, Removal::Absent)
    );
    tree.add(key(last + 1)).unwrap();
    assert_eq!(steps(&mem, || tree.add(key(last + 1))), (2, Ok(false)));
    assert_eq!(steps(&mem, || tree.add(key(last))), (2, Ok(false)));
    assert_eq!(
        steps(&mem, || tree.remove(key(last + 1))),
        (2, Removal::Emptied)
    );
    // Where the table has no leaf, what was noted stays.
    let none = key(last + 1 + LEAF);
    assert_eq!(steps(&mem, || tree.remove(none)), (1, Removal::Absent));
    assert_eq!(
        steps(&mem, || tree.remove(key(base))),
        (2, Removal::Emptied)
    );
    let elsewhere = base + (LEAF << abi::TABLE_LOG2);
    tree.add(key(elsewhere)).unwrap();
    assert_eq!(
        steps(&mem, || tree.remove(key(elsewhere))),
        (far, Removal::Emptied)
    );
    tree.add(key(base)).unwrap();
    // As after any node was taken away.
    (&mem).new_generation();
    assert_eq!(steps(&mem, || tree.add(key(base))), (far, Ok(false)));
    assert_eq!(abi::walk(&mem, tree.root().get()).1, [base, last]);
}

/// Orders in turns, as in a range that is cut into blocks.
#[test]
fn orders_have_hints_of_their_own() {
    let mem = Mem::new();
    let tree = Tree::new(&mem).unwrap();
    let keys = |start: u64| (0..16).map(move |of| key(abi::encode(start << of << PAGE_SHIFT, of)));
    keys(1).for_each(|key| assert_eq!(tree.add(key), Ok(true)));
    // A leaf that was made is found from the second time on.
    keys(1).for_each(|key| assert_eq!(tree.add(key), Ok(false)));
    for key in keys(2).chain(keys(3)) {
        assert_eq!(steps(&mem, || tree.add(key)), (1, Ok(true)));
    }
    for key in keys(3).chain(keys(1)) {
        assert_eq!(steps(&mem, || tree.remove(key)), (1, Removal::Removed));
    }
    // What shares a hint is not mistaken for each other.
    let other = key(abi::encode(2 << 17 << PAGE_SHIFT, 17));
    assert_eq!(tree.add(other), Ok(true));
    assert_eq!(tree.add(other), Ok(false));
    assert!(keys(2).all(|key| tree.add(key) == Ok(false)));
    assert_eq!(tree.remove(other), Removal::Emptied);
    assert_eq!(keys_between(&tree, ALL).len(), 16);
}

/// The same keys in two trees of one memory.
#[test]
fn hint_of_another_tree() {
    let mem = Mem::new();
    let trees = [(); 2].map(|_| Tree::new(&mem).unwrap());
    for number in [7, 8, 9] {
        for tree in &trees {
            assert_eq!(tree.add(key(number)), Ok(true));
        }
    }
    for tree in &trees {
        assert_eq!(tree.remove(key(8)), Removal::Removed);
    }
    for tree in &trees {
        assert_eq!(abi::walk(&mem, tree.root().get()).1, [7, 9]);
    }
}

/// Nodes are freed and come back as others, with a hint to what they were.
#[test]
fn hint_of_a_node_that_is_gone() {
    let mem = Mem::new();
    let mut roots = BTreeSet::new();
    for number in [5, 5, 5 + LEAF, 6, 6 + 3 * LEAF] {
        let tree = Tree::new(&mem).unwrap();
        mem.watch(&tree);
        roots.insert(tree.root().get());
        for _ in 0..3 {
            assert_eq!(tree.add(key(number)), Ok(true));
            assert_eq!(tree.add(key(number)), Ok(false));
            assert_eq!(tree.remove(key(number)), Removal::Emptied);
            assert!(prune(&tree, &mem) > 0);
            assert_eq!(tree.remove(key(number)), Removal::Absent);
            // These may be what was freed.
            tree.add(key(number ^ 1 << (abi::KEY_WIDTH - 1))).unwrap();
        }
        assert_eq!(tree.add(key(number)), Ok(true));
        assert_eq!(tree.add(key(number)), Ok(false));
        tree.destroy();
        assert_eq!(mem.live(), 0);
    }
    assert_eq!(roots.len(), 1, "another address proves nothing");
}

/// A leaf is told to be empty when it is, wherever its last key was.
#[test]
fn emptied_anywhere() {
    let mem = Mem::new();
    let tree = Tree::new(&mem).unwrap();
    assert!(!tree.has_empty());
    for word in 0..LEAF / 64 {
        tree.add(key(word * 64 + word % 64)).unwrap();
        assert!(!tree.has_empty(), "word {word}");
        assert_eq!(tree.remove(key(word * 64 + word % 64)), Removal::Emptied);
        assert!(tree.has_empty());
    }
}
