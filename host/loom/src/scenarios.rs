// SPDX-License-Identifier: GPL-2.0

//! Two or three tasks that do a few things to a tree at once, and what must be true in the end.

use super::{
    kho_radix::{
        NodeAddr,
        Removal,
        Tree, //
    },
    machine::{
        key,
        Machine,
        Task, //
    },
    Break,
};
use loom::{
    sync::Arc,
    thread, //
};
use std::process::Command;

// Keys of the four leaves: A and B have one table, C and D the other. A leaf has two words.
const A: u64 = 0;
const A2: u64 = 64;
const B: u64 = 128;
const C: u64 = 256;

/// Runs `scenario` in every way in which tasks are interrupted no more than `most` times.
fn explore(most: usize, scenario: fn()) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound.get_or_insert(most);
    model.max_branches = 10_000;
    model.check(scenario);
}

/// Makes a machine and a tree with `keys`. The leaves of `empty` are there, too, without keys.
/// Both CPUs have hints to all of these leaves.
fn start(keys: &[u64], empty: &[u64]) -> (Arc<Machine>, NodeAddr) {
    let machine = Machine::new();
    let root = {
        let task = Task::on(&machine, 0);
        let tree = Tree::new(&task).unwrap();
        grow(&machine, tree.root(), keys, empty);
        tree.root()
    };
    (machine, root)
}

fn grow(machine: &Arc<Machine>, root: NodeAddr, keys: &[u64], empty: &[u64]) {
    for cpu in 0..2 {
        let task = Task::on(machine, cpu);
        let tree = task.tree(root);
        for number in empty {
            tree.add(key(*number)).unwrap();
            tree.remove(key(*number));
        }
        for number in keys {
            tree.add(key(*number)).unwrap();
        }
        // A leaf that was new has not been noted.
        for number in empty {
            tree.remove(key(*number));
        }
        for number in keys {
            tree.add(key(*number)).unwrap();
        }
    }
}

/// Has a task do `work` to the tree at `root`.
fn spawn<R: 'static>(
    task: Task,
    root: NodeAddr,
    work: impl FnOnce(&Task, Tree<&Task>) -> R + 'static,
) -> thread::JoinHandle<R> {
    thread::spawn(move || work(&task, task.tree(root)))
}

fn add(tree: &Tree<&Task>, number: u64) -> bool {
    tree.add(key(number)).unwrap()
}

fn remove(tree: &Tree<&Task>, number: u64) -> bool {
    tree.remove(key(number)) != Removal::Absent
}

/// Two keys of one leaf, for which all nodes are missing.
#[test]
fn one_new_leaf() {
    explore(2, || {
        let (machine, root) = start(&[], &[]);
        let one = spawn(Task::on(&machine, 0), root, |_, tree| add(&tree, A));
        let two = spawn(Task::on(&machine, 1), root, |_, tree| add(&tree, A + 1));
        assert!(one.join().unwrap());
        assert!(two.join().unwrap());
        machine.check(&[(root, &[A, A + 1])]);
    });
}

/// Two keys whose leaves are entries of one table, which is missing as well.
#[test]
fn one_new_table() {
    explore(2, || {
        let (machine, root) = start(&[], &[]);
        let one = spawn(Task::on(&machine, 0), root, |_, tree| add(&tree, A));
        let two = spawn(Task::on(&machine, 1), root, |_, tree| add(&tree, B));
        assert!(one.join().unwrap());
        assert!(two.join().unwrap());
        machine.check(&[(root, &[A, B])]);
    });
}

/// One key: just one of both has added it.
#[test]
fn one_key() {
    explore(3, || {
        let (machine, root) = start(&[], &[]);
        let one = spawn(Task::on(&machine, 0), root, |_, tree| add(&tree, A));
        let two = spawn(Task::on(&machine, 1), root, |_, tree| add(&tree, A));
        assert!(one.join().unwrap() != two.join().unwrap());
        machine.check(&[(root, &[A])]);
    });
}

/// Bits of one word, by hints.
#[test]
fn one_word() {
    explore(3, || {
        let (machine, root) = start(&[A], &[]);
        let one = spawn(Task::on(&machine, 0), root, |_, tree| {
            assert!(remove(&tree, A));
            assert!(add(&tree, A + 1));
        });
        let two = spawn(Task::on(&machine, 1), root, |_, tree| {
            assert!(add(&tree, A + 2));
            assert!(remove(&tree, A + 2));
        });
        one.join().unwrap();
        two.join().unwrap();
        machine.check(&[(root, &[A + 1])]);
    });
}

/// A key is removed while its leaf is being made.
#[test]
fn removed_early() {
    explore(3, || {
        let (machine, root) = start(&[], &[]);
        let one = spawn(Task::on(&machine, 0), root, |_, tree| add(&tree, A));
        let two = spawn(Task::on(&machine, 1), root, |_, tree| remove(&tree, A));
        assert!(one.join().unwrap());
        let left: &[u64] = if two.join().unwrap() { &[] } else { &[A] };
        machine.check(&[(root, left)]);
    });
}

/// What a reader has seen, another one sees that was told of it.
#[test]
fn readers() {
    explore(2, || {
        let (machine, root) = start(&[], &[]);
        let writer = spawn(Task::on(&machine, 0), root, |_, tree| {
            assert!(add(&tree, A));
            assert!(add(&tree, A + 1));
        });
        let reader = spawn(Task::on(&machine, 1), root, |_, tree| {
            let found = tree.contains(key(A));
            assert!(!found || tree.contains(key(A)));
            found
        });
        let found = reader.join().unwrap();
        let task = Task::on(&machine, 1);
        assert!(!found || task.tree(root).contains(key(A)));
        writer.join().unwrap();
        assert!(task.tree(root).contains(key(A)));
        machine.check(&[(root, &[A, A + 1])]);
    });
}

/// Three come at once, each with a leaf of its own.
#[test]
fn three_adders() {
    explore(1, || {
        let (machine, root) = start(&[], &[]);
        let work = |number| move |_: &Task, tree: Tree<&Task>| assert!(add(&tree, number));
        let one = spawn(Task::on(&machine, 0), root, work(A));
        let two = spawn(Task::on(&machine, 1), root, work(A + 1));
        add(&Task::on(&machine, 1).tree(root), B);
        one.join().unwrap();
        two.join().unwrap();
        machine.check(&[(root, &[A, A + 1, B])]);
    });
}

/// A key is added to a leaf that is about to be taken away, and to which a hint leads.
#[test]
fn add_while_pruned() {
    explore(3, || {
        let (machine, root) = start(&[], &[A]);
        let one = spawn(Task::on(&machine, 0), root, |_, tree| add(&tree, A));
        let two = spawn(Task::on(&machine, 1), root, |task, tree| task.prune(tree.root()));
        assert!(one.join().unwrap());
        two.join().unwrap();
        machine.check(&[(root, &[A])]);
    });
}

/// The last key of a leaf goes, and comes back, while that is pruned.
#[test]
fn remove_while_pruned() {
    explore(2, || {
        let (machine, root) = start(&[A], &[]);
        let one = spawn(Task::on(&machine, 0), root, |_, tree| {
            assert!(remove(&tree, A));
            assert!(add(&tree, A2));
        });
        let two = spawn(Task::on(&machine, 1), root, |task, tree| task.prune(tree.root()));
        one.join().unwrap();
        two.join().unwrap();
        machine.check(&[(root, &[A2])]);
    });
}

/// The table is taken away for which a leaf was about to be made.
#[test]
fn grow_while_pruned() {
    explore(2, || {
        let (machine, root) = start(&[], &[A]);
        let one = spawn(Task::on(&machine, 0), root, |_, tree| add(&tree, B));
        let two = spawn(Task::on(&machine, 1), root, |task, tree| task.prune(tree.root()));
        assert!(one.join().unwrap());
        two.join().unwrap();
        let task = Task::on(&machine, 0);
        task.prune(root);
        machine.check(&[(root, &[B])]);
    });
}

/// The pages of a leaf and its table become others', whose keys are not those of the hints.
#[test]
fn pages_used_again() {
    explore(2, || {
        let (machine, root) = start(&[], &[A]);
        let one = spawn(Task::on(&machine, 0), root, |task, tree| {
            task.prune(tree.root());
            assert!(add(&tree, C));
        });
        let two = spawn(Task::on(&machine, 1), root, |_, tree| add(&tree, A + 1));
        one.join().unwrap();
        assert!(two.join().unwrap());
        machine.check(&[(root, &[A + 1, C])]);
    });
}

/// A task that goes from CPU to CPU finds hints there that are older than its own.
#[test]
fn wanderer() {
    explore(2, || {
        let (machine, root) = start(&[], &[A]);
        let one = spawn(Task::wandering_from(&machine, 0), root, |_, tree| {
            assert!(add(&tree, A));
            assert!(remove(&tree, A));
            assert!(add(&tree, A + 1));
        });
        let two = spawn(Task::on(&machine, 1), root, |task, tree| task.prune(tree.root()));
        one.join().unwrap();
        two.join().unwrap();
        machine.check(&[(root, &[A + 1])]);
    });
}

/// The same, and the one that prunes adds keys, too.
#[test]
fn wanderers() {
    explore(1, || {
        let (machine, root) = start(&[], &[A, C]);
        let one = spawn(Task::wandering_from(&machine, 0), root, |_, tree| {
            assert!(add(&tree, A));
            assert!(add(&tree, C));
            assert!(remove(&tree, A));
        });
        let two = spawn(Task::wandering_from(&machine, 1), root, |task, tree| {
            task.prune(tree.root());
            assert!(add(&tree, C + 1));
            assert!(add(&tree, A + 1));
        });
        one.join().unwrap();
        two.join().unwrap();
        machine.check(&[(root, &[A + 1, C, C + 1])]);
    });
}

/// Two prunes, one after the other, and somebody who waits for either.
#[test]
fn two_prunes() {
    explore(1, || {
        let (machine, root) = start(&[C], &[A]);
        let prune = |task: &Task, tree: Tree<&Task>| task.prune(tree.root());
        let one = spawn(Task::on(&machine, 0), root, prune);
        let two = spawn(Task::on(&machine, 1), root, |task, tree| {
            assert!(remove(&tree, C));
            task.prune(tree.root());
        });
        let task = Task::on(&machine, 1);
        assert!(add(&task.tree(root), A));
        one.join().unwrap();
        two.join().unwrap();
        machine.check(&[(root, &[A])]);
    });
}

/// Many keys in one pass, some of them in a leaf that is about to go.
#[test]
fn batches() {
    explore(2, || {
        let (machine, root) = start(&[], &[A]);
        let one = spawn(Task::on(&machine, 0), root, |_, tree| {
            let keys = [A, A + 1, B].map(key);
            assert!(tree.add_all(keys.into_iter()).is_ok());
            let mut absent = 0;
            tree.remove_all(keys[1..].iter().copied(), |_| absent += 1);
            assert_eq!(absent, 0);
        });
        let two = spawn(Task::on(&machine, 1), root, |task, tree| task.prune(tree.root()));
        one.join().unwrap();
        two.join().unwrap();
        Task::on(&machine, 0).prune(root);
        machine.check(&[(root, &[A])]);
    });
}

/// A tree is destroyed and another one made, with the same pages and the same keys, while others
/// are in a third one.
#[test]
fn tree_after_tree() {
    explore(2, || {
        let (machine, other) = start(&[C], &[]);
        let old = Tree::new(&Task::on(&machine, 0)).unwrap().root();
        grow(&machine, old, &[A], &[]);
        let one = spawn(Task::wandering_from(&machine, 0), old, move |task, _| {
            task.destroy(old);
            let new = Tree::new(task).unwrap();
            assert!(add(&new, A));
            assert!(add(&new, A + 1));
            new.root()
        });
        let two = spawn(Task::on(&machine, 1), other, |_, tree| add(&tree, C + 1));
        let new = one.join().unwrap();
        assert!(two.join().unwrap());
        machine.check(&[(other, &[C, C + 1]), (new, &[A, A + 1])]);
    });
}

/// The pages of a tree that is destroyed become another one's, of which there are hints from the
/// time when they were its own.
#[test]
fn tree_beside_tree() {
    explore(2, || {
        let (machine, other) = start(&[], &[A]);
        let old = Tree::new(&Task::on(&machine, 0)).unwrap().root();
        grow(&machine, old, &[A], &[]);
        let one = spawn(Task::on(&machine, 0), other, move |task, tree| {
            task.destroy(old);
            assert!(add(&tree, C));
        });
        let two = spawn(Task::on(&machine, 1), other, |task, tree| {
            task.prune(tree.root());
            assert!(add(&tree, A));
        });
        one.join().unwrap();
        two.join().unwrap();
        machine.check(&[(other, &[A, C])]);
    });
}

/// Each break has a scenario that finds it.
#[test]
fn breaks() {
    for broken in Break::ALL {
        let scenario = match broken {
            Break::Publish => "one_new_leaf",
            Break::Follow => "one_new_leaf",
            Break::Set => "one_word",
            Break::Clear => "one_word",
            Break::Generation => "pages_used_again",
            Break::Forget => "tree_after_tree",
            Break::Grace => "add_while_pruned",
            Break::Wait => "add_while_pruned",
            Break::Enter => "add_while_pruned",
            Break::End => "add_while_pruned",
        };
        let name = format!("scenarios::{scenario}");
        let run = Command::new(std::env::current_exe().unwrap())
            .args([&name, "--exact", "--test-threads=1"])
            .env(Break::VARIABLE, format!("{broken:?}"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stdout) + String::from_utf8_lossy(&run.stderr);
        assert!(!run.status.success(), "{scenario} does not find {broken:?}");
        assert!(said.contains("running 1 test"), "{said}");
    }
}
