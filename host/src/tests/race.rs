// SPDX-License-Identifier: GPL-2.0

//! Several at once in one tree: every interleaving of two operations that node memory can force,
//! then threads.

use super::super::kho_radix::{
    Removal,
    Tree, //
};
use super::{
    abi,
    act,
    key,
    prune,
    Action::{
        self,
        Add,
        Prune,
        Remove, //
    },
    Mem,
    Rng, //
};
use std::{
    collections::BTreeSet,
    sync::{
        atomic::{
            AtomicBool,
            AtomicI64,
            Ordering::SeqCst, //
        },
        Barrier,
        RwLock, //
    },
    thread,
};

/// The same for a set of numbers; a prune changes nothing there.
fn simulate(model: &mut BTreeSet<u64>, action: Action) -> bool {
    match action {
        Add(what) => model.insert(what),
        Remove(what) => model.remove(&what),
        Prune => false,
    }
}

/// Does `main` to a tree of `start`, with `others` in its midst after each number of steps, and
/// checks that what comes out is as if either had come first.
fn interleave(start: &[u64], main: Action, others: &[Action]) {
    for after in 0.. {
        let mem = Mem::new();
        let tree = Tree::new(&mem).unwrap();
        mem.watch(&tree);
        let root = tree.root().get();
        for number in start {
            tree.add(key(*number)).unwrap();
        }
        mem.script(after, root, others);
        let result = act(&mem, root, main);
        if mem.scripted.load(SeqCst) {
            assert!(after > 0);
            return;
        }
        let done = mem.done.lock().unwrap().clone();
        // A prune's result says nothing about keys.
        let told = |action: &Action, result: bool| (*action != Prune).then_some(result);
        let done: Vec<_> = others.iter().zip(done).map(|(a, r)| told(a, r)).collect();
        let what = format!("{start:x?}, {main:x?} with {others:x?} at step {after}");
        let outcome = |main_first: bool| {
            let mut model: BTreeSet<u64> = start.iter().copied().collect();
            let early = main_first.then(|| simulate(&mut model, main));
            let run = |action| told(action, simulate(&mut model, *action));
            let rest: Vec<_> = others.iter().map(run).collect();
            let result = early.unwrap_or_else(|| simulate(&mut model, main));
            (result, rest, model.into_iter().collect::<Vec<_>>())
        };
        let (nodes, keys) = abi::walk(&mem, root);
        let found = (result, done, keys);
        assert!(
            found == outcome(true) || found == outcome(false),
            "{what}: {found:x?}"
        );
        assert_eq!(nodes.len(), mem.live(), "{what}: a node is lost");
        assert_eq!(mem.inside.load(SeqCst), 0);
        prune(&tree, &mem);
        assert_eq!(
            mem.live(),
            abi::least_nodes(found.2.iter().copied()),
            "{what}"
        );
    }
}

#[test]
fn interleavings() {
    let target = abi::encode(0x1234_5678 << super::PAGE_SHIFT, 0);
    // Keys that share ever less with the target: its word, leaf, and table of each level.
    let siblings: Vec<u64> = (0..abi::DEPTH)
        .map(|level| abi::sibling(target, level))
        .chain([target ^ 1])
        .collect();
    let mut starts = vec![vec![], vec![target]];
    starts.extend(siblings.iter().map(|sibling| vec![*sibling]));
    for start in starts {
        let mut others = vec![
            vec![Add(target)],
            vec![Remove(target)],
            vec![Prune],
            vec![Add(target), Remove(target), Prune],
        ];
        for sibling in siblings.iter().copied() {
            others.push(vec![Add(sibling)]);
            others.push(vec![Remove(sibling), Prune]);
            others.push(vec![Add(sibling), Remove(sibling), Prune]);
        }
        for others in others {
            interleave(&start, Add(target), &others);
            interleave(&start, Remove(target), &others);
        }
    }
}

/// The entry is taken between the look at it and the swap: at each level, by the same key and by
/// one that leaves the loser nodes short of, or with some left over from, what is then missing.
#[test]
fn lost_races() {
    let target = abi::encode(0x1234_5678 << super::PAGE_SHIFT, 0);
    let mut lost = 0;
    for level in 0..abi::DEPTH {
        let winner = abi::sibling(target, level);
        for steps in 0..40 {
            let mem = Mem::new();
            let tree = Tree::new(&mem).unwrap();
            mem.watch(&tree);
            let root = tree.root().get();
            mem.script(steps, root, &[Add(winner)]);
            mem.budget.store(100, SeqCst);
            assert_eq!(tree.add(key(target)), Ok(true));
            if mem.scripted.load(SeqCst) {
                break;
            }
            let used = 100 - mem.budget.load(SeqCst);
            let least = i64::from(abi::DEPTH - 1 + level);
            // Nodes that were got for nothing had been got before the other came.
            lost += usize::from(used > least);
            let mut keys = vec![target, winner];
            keys.sort_unstable();
            assert_eq!(abi::walk(&mem, root).1, keys);
            assert_eq!(mem.live() as i64, 1 + least, "level {level}, step {steps}");
            tree.destroy();
            assert_eq!(mem.live(), 0);
        }
    }
    assert!(lost > 20, "{lost} races were lost");
}

/// A prune takes away the table whose leaf was the only node to be missing.
#[test]
fn more_missing_after_prune() {
    let target = abi::encode(0x1234_5678 << super::PAGE_SHIFT, 0);
    for level in 1..abi::DEPTH - 1 {
        let sibling = abi::sibling(target, level);
        let mut grew = false;
        for steps in 0..20 {
            let mem = Mem::new();
            let tree = Tree::new(&mem).unwrap();
            mem.watch(&tree);
            let root = tree.root().get();
            tree.add(key(sibling)).unwrap();
            mem.script(steps, root, &[Remove(sibling), Prune]);
            mem.budget.store(100, SeqCst);
            assert_eq!(tree.add(key(target)), Ok(true));
            if mem.scripted.load(SeqCst) {
                break;
            }
            assert!(tree.contains(key(target)));
            let used = 100 - mem.budget.load(SeqCst);
            grew |= *mem.done.lock().unwrap() == [true, true] && used > i64::from(level);
            prune(&tree, &mem);
            assert_eq!(mem.live(), abi::DEPTH as usize);
        }
        assert!(grew, "level {level}");
    }
}

/// Keys of few leaves, some of which come and go.
fn contested(rng: &mut Rng) -> Vec<u64> {
    let base = abi::encode(0, 0);
    (0..24)
        .map(|i| base + (rng.below(3) << abi::node_shift(i % 3)) + rng.below(3) * 16)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

/// Has threads change keys of their own and keys of all, and checks the outcome. A key is in the
/// tree or not as often as adding and removing it is told to have changed something.
fn storm(gate: Option<RwLock<()>>) {
    const THREADS: u64 = 4;
    let mut mem = Mem::new();
    mem.gate = gate;
    let tree = Tree::new(&mem).unwrap();
    mem.watch(&tree);
    let shared = contested(&mut Rng::new(6));
    let balance: Vec<AtomicI64> = shared.iter().map(|_| AtomicI64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let start = Barrier::new(THREADS as usize);
    let work = |id: u64| {
        start.wait();
        let (mut rng, mut own) = (Rng::new(id + 10), BTreeSet::new());
        for turn in 0..4000 {
            let pick = rng.below(shared.len() as u64) as usize;
            // Next to the shared ones, so that words and nodes are shared with others.
            let mine = shared[pick] + 8 + id;
            let add = rng.below(2) == 0;
            match (turn % 2 == 0, add) {
                (true, true) => assert_eq!(tree.add(key(mine)), Ok(own.insert(mine))),
                (true, false) => {
                    let removed = tree.remove(key(mine)) != Removal::Absent;
                    assert_eq!(removed, own.remove(&mine));
                }
                (false, true) => {
                    let new = tree.add(key(shared[pick])).unwrap();
                    balance[pick].fetch_add(new.into(), SeqCst);
                }
                (false, false) => {
                    let old = tree.remove(key(shared[pick])) != Removal::Absent;
                    balance[pick].fetch_sub(old.into(), SeqCst);
                }
            }
        }
        own
    };
    let mut model = BTreeSet::new();
    thread::scope(|scope| {
        let work = &work;
        let workers: Vec<_> = (0..THREADS)
            .map(|id| scope.spawn(move || work(id)))
            .collect();
        if let Some(gate) = &mem.gate {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    let alone = gate.write().unwrap();
                    prune(&tree, &mem);
                    drop(alone);
                    thread::yield_now();
                }
            });
        }
        let owns: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        stop.store(true, SeqCst);
        model.extend(
            owns.into_iter()
                .flat_map(|own| own.expect("a worker failed")),
        );
    });
    for (number, balance) in shared.iter().zip(&balance) {
        match balance.load(SeqCst) {
            0 => (),
            1 => assert!(model.insert(*number)),
            other => panic!("{number:#x} was added {other} times more than removed"),
        }
    }
    let (nodes, keys) = abi::walk(&mem, tree.root().get());
    assert!(keys.iter().eq(&model));
    assert_eq!(nodes.len(), mem.live());
    prune(&tree, &mem);
    assert_eq!(mem.live(), abi::least_nodes(keys));
    tree.destroy();
    assert_eq!(mem.live(), 0);
}

#[test]
fn threads() {
    storm(None);
}

#[test]
fn threads_and_pruning() {
    storm(Some(RwLock::new(())));
}

/// Threads change bits of their own in one word, all at the same time: no change gets lost.
#[test]
fn one_word() {
    const THREADS: u64 = 4;
    let mem = Mem::new();
    let tree = Tree::new(&mem).unwrap();
    let base = abi::encode(0, 0);
    tree.add(key(base)).unwrap();
    let start = Barrier::new(THREADS as usize);
    let work = |id: u64| {
        let mine = key(base + 1 + id);
        start.wait();
        for _ in 0..40_000 {
            assert_eq!(tree.add(mine), Ok(true));
            assert_eq!(tree.remove(mine), Removal::Removed);
        }
    };
    thread::scope(|scope| {
        let work = &work;
        (0..THREADS).for_each(|id| drop(scope.spawn(move || work(id))));
    });
    assert_eq!(abi::walk(&mem, tree.root().get()).1, [base]);
}

/// [`act`] itself does what it says.
#[test]
fn actions() {
    let mem = Mem::new();
    let root = Tree::new(&mem).unwrap().root().get();
    for (action, expected) in [
        (Add(7), true),
        (Add(7), false),
        (Prune, false),
        (Remove(7), true),
        (Remove(7), false),
        (Prune, true),
    ] {
        assert_eq!(act(&mem, root, action), expected);
    }
}
