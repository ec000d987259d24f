// SPDX-License-Identifier: GPL-2.0

//! What the pure core costs on the host: nanoseconds per key, and how it scales with threads.
//!
//! ```text
//! cargo bench -- [--json FILE] [--repeat N] [--keys N]
//! ```
//!
//! Everything is done several times, and the best time counts: on a machine with other work, that
//! is the one that was disturbed least. The tree is compared with a peer that does as the C
//! implementation of 7.3 does: one mutex for the tree, taken for each key, and a descent from the
//! root under it. Both use the same node memory.

// The same files as in the kernel; not all of them is used here.
#![allow(dead_code)]

use core::sync::atomic;
const PAGE_SHIFT: u32 = 12;
const GRAIN_ORDER: u32 = 10;
mod hosts;
#[path = "../../kho_check.rs"]
mod kho_check;
#[path = "../../kho_grain.rs"]
mod kho_grain;
#[path = "../../kho_key.rs"]
mod kho_key;
#[path = "../../kho_radix.rs"]
mod kho_radix;
#[path = "../../kho_range.rs"]
mod kho_range;
#[path = "../../kho_word.rs"]
mod kho_word;

use kho_key::{
    Block,
    Key,
    Order,
    Pfn, //
};
use kho_radix::{
    Guard,
    Hints,
    Node,
    NodeAddr,
    NodeMem,
    Step,
    Tree,
    Visitor, //
};
use kho_range::Frames;
use std::{
    alloc::{
        alloc_zeroed,
        dealloc,
        Layout, //
    },
    fmt::Write as _,
    hint::black_box,
    sync::{
        atomic::{
            AtomicU64,
            AtomicUsize,
            Ordering, //
        },
        Mutex, //
    },
    thread,
    time::{
        Duration,
        Instant, //
    },
};

/// Where node memory is in the address space of the tree.
const BASE: u64 = 1 << 32;
/// RAM of the machine that takeover believes in, in frames: 1 TiB.
const RAM: u64 = 1 << 28;

/// Node memory: pages that are handed out one after the other, and never come back.
struct Arena {
    pages: *mut u8,
    layout: Layout,
    count: usize,
    used: AtomicUsize,
    generation: AtomicU64,
}

// SAFETY: All that is shared is atomic; a page is handed out once.
unsafe impl Sync for Arena {}

impl Arena {
    fn new(count: usize) -> Self {
        let layout = Layout::from_size_align(count << PAGE_SHIFT, 1 << PAGE_SHIFT).unwrap();
        // SAFETY: The size is not 0.
        let pages = unsafe { alloc_zeroed(layout) };
        assert!(!pages.is_null(), "no memory for {count} nodes");
        // The host gives memory page by page when it is first used; that is not what is measured.
        for page in 0..count {
            // SAFETY: It is there.
            unsafe { pages.add(page << PAGE_SHIFT).write_volatile(0) };
        }
        Self {
            pages,
            layout,
            count,
            used: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
        }
    }

    /// Returns how many nodes have been handed out.
    fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed).min(self.count)
    }

    fn take(&self) -> Option<u64> {
        let index = self.used.fetch_add(1, Ordering::Relaxed);
        (index < self.count).then(|| BASE + ((index as u64) << PAGE_SHIFT))
    }

    fn words(&self, phys: u64) -> *const AtomicU64 {
        // SAFETY: Only addresses that `take()` returned are in a tree.
        unsafe { self.pages.add((phys - BASE) as usize) }
            .cast_const()
            .cast()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: Allocated like that.
        unsafe { dealloc(self.pages, self.layout) };
    }
}

/// The arena as one CPU uses it: with hints of its own.
#[derive(Clone, Copy)]
struct Cpu<'a> {
    arena: &'a Arena,
    hints: &'a Hints,
}

struct In<'a> {
    hints: &'a Hints,
    generation: u64,
}

impl Guard for In<'_> {
    #[inline(always)]
    fn hints(&self) -> &Hints {
        self.hints
    }

    #[inline(always)]
    fn generation(&self) -> u64 {
        self.generation
    }
}

impl NodeMem for Cpu<'_> {
    type Guard<'b>
        = In<'b>
    where
        Self: 'b;

    #[inline(always)]
    fn enter(&self) -> In<'_> {
        In {
            hints: self.hints,
            generation: self.arena.generation.load(Ordering::Acquire),
        }
    }

    fn new_generation(&self) {
        self.arena.generation.fetch_add(2, Ordering::Relaxed);
    }

    fn alloc(&self) -> Option<NodeAddr> {
        NodeAddr::new(self.arena.take()?)
    }

    fn free(&self, _node: NodeAddr) {}

    #[inline(always)]
    fn node(&self, addr: NodeAddr) -> &Node {
        // SAFETY: A node is an array of atomic words, as large as a page.
        unsafe { &*self.arena.words(addr.get()).cast() }
    }
}

/// What both trees can do.
trait Set: Copy + Send + Sync {
    fn add(self, cpu: Cpu<'_>, key: Key);
    fn remove(self, cpu: Cpu<'_>, key: Key);
}

/// Ours, by its root.
#[derive(Clone, Copy)]
struct Ours(NodeAddr);

impl Set for Ours {
    #[inline(always)]
    fn add(self, cpu: Cpu<'_>, key: Key) {
        Tree::from_root(cpu, self.0).add(key).unwrap();
    }

    #[inline(always)]
    fn remove(self, cpu: Cpu<'_>, key: Key) {
        Tree::from_root(cpu, self.0).remove(key);
    }
}

/// The peer: a mutex per key, and a descent under it.
#[derive(Clone, Copy)]
struct Peer<'a> {
    root: u64,
    lock: &'a Mutex<()>,
}

impl Peer<'_> {
    const TABLE: u32 = PAGE_SHIFT - 3;
    const LEAF: u32 = PAGE_SHIFT + 3;

    /// Returns the word of `key`; with `make`, makes the nodes that are missing.
    #[inline(always)]
    fn word(self, arena: &Arena, key: u64, make: bool) -> Option<&AtomicU64> {
        let mut node = self.root;
        for level in (1..kho_radix::DEPTH).rev() {
            let shift = Self::LEAF + (level - 1) * Self::TABLE;
            let index = (key >> shift) as usize % (1 << Self::TABLE);
            // SAFETY: The index is below the number of words.
            let entry = unsafe { &*arena.words(node).add(index) };
            let mut next = entry.load(Ordering::Relaxed);
            if next == 0 {
                if !make {
                    return None;
                }
                next = arena.take().unwrap();
                entry.store(next, Ordering::Relaxed);
            }
            node = next;
        }
        let index = (key as usize % (1 << Self::LEAF)) / 64;
        // SAFETY: As above.
        Some(unsafe { &*arena.words(node).add(index) })
    }
}

impl Set for Peer<'_> {
    #[inline(always)]
    fn add(self, cpu: Cpu<'_>, key: Key) {
        let _guard = self.lock.lock().unwrap();
        let word = self.word(cpu.arena, key.get(), true).unwrap();
        word.store(
            word.load(Ordering::Relaxed) | 1 << (key.get() % 64),
            Ordering::Relaxed,
        );
    }

    #[inline(always)]
    fn remove(self, cpu: Cpu<'_>, key: Key) {
        let _guard = self.lock.lock().unwrap();
        if let Some(word) = self.word(cpu.arena, key.get(), false) {
            word.store(
                word.load(Ordering::Relaxed) & !(1 << (key.get() % 64)),
                Ordering::Relaxed,
            );
        }
    }
}

/// The keys of the frames `first`, `first + stride`, ...
fn frames_from(first: u64, stride: u64, count: u64) -> Vec<Key> {
    (0..count)
        .map(|i| Pfn::new(first + i * stride).unwrap())
        .map(|pfn| Key::of(Block::new(pfn, Order::ZERO).unwrap()))
        .collect()
}

/// Shuffles, the same way each time.
fn shuffle(keys: &mut [Key]) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for i in (1..keys.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        keys.swap(i, (state % (i as u64 + 1)) as usize);
    }
}

fn timed<R>(work: impl FnOnce() -> R) -> Duration {
    let start = Instant::now();
    black_box(work());
    start.elapsed()
}

/// Counts the keys that a walk of all nodes sees.
struct Count(u64);

impl Visitor for Count {
    fn node(&mut self, _addr: NodeAddr, _first: u64, _last: u64) -> Step {
        Step::In
    }

    fn leaf(&mut self, _first: u64, leaf: &Node) -> bool {
        self.0 += leaf.runs().map(|(_, count)| count).sum::<u64>();
        true
    }
}

/// A machine that has all of [`RAM`], for takeover.
struct Machine;

impl kho_check::Machine for Machine {
    fn ram_end(&self) -> u64 {
        RAM
    }

    fn usable(&self, pfn: u64) -> Option<Frames> {
        let all = Frames::new(Pfn::containing(0), RAM)?;
        (pfn < RAM).then_some(all)
    }

    fn ram(&self, pfn: u64) -> Option<Frames> {
        self.usable(pfn)
    }
}

/// One line of the first table.
struct Line {
    pattern: &'static str,
    work: &'static str,
    ns: f64,
    peer_ns: Option<f64>,
}

/// Times of one tree in one thread: first add, add, remove.
fn change<S: Set>(arena: &Arena, set: S, keys: &[Key]) -> [Duration; 3] {
    let hints = Hints::default();
    let cpu = Cpu {
        arena,
        hints: &hints,
    };
    let all = |change: fn(S, Cpu<'_>, Key)| keys.iter().for_each(|key| change(set, cpu, *key));
    let first = timed(|| all(S::add));
    all(S::remove);
    let add = timed(|| all(S::add));
    let remove = timed(|| all(S::remove));
    all(S::add);
    [first, add, remove]
}

fn nodes_for(keys: &[Key]) -> usize {
    let leaves: std::collections::BTreeSet<u64> = keys
        .iter()
        .map(|key| key.get() >> kho_radix::LEAF_BITS)
        .collect();
    leaves.len() + leaves.len() / 256 + 64
}

/// One pattern of keys in one thread.
fn single(pattern: &'static str, keys: &[Key], repeat: u32) -> Vec<Line> {
    let mut ours = [Duration::MAX; 7];
    let mut peer = [Duration::MAX; 3];
    let keep = |best: &mut [Duration], times: &[Duration]| {
        for (best, time) in best.iter_mut().zip(times) {
            *best = (*best).min(*time);
        }
    };
    for _ in 0..repeat {
        let arena = Arena::new(nodes_for(keys));
        let lock = Mutex::new(());
        let root = arena.take().unwrap();
        keep(&mut peer, &change(&arena, Peer { root, lock: &lock }, keys));

        let arena = Arena::new(nodes_for(keys));
        let root = NodeAddr::new(arena.take().unwrap()).unwrap();
        let times = change(&arena, Ours(root), keys);
        let hints = Hints::default();
        let cpu = Cpu {
            arena: &arena,
            hints: &hints,
        };
        let tree = Tree::from_root(cpu, root);
        let contains = timed(|| assert!(keys.iter().all(|key| tree.contains(*key))));
        let visit = timed(|| {
            let mut count = Count(0);
            assert!(tree.visit(&mut count) && count.0 == keys.len() as u64);
        });
        let runs = timed(|| {
            let count: u64 = tree
                .runs_between(Key::bounds(Order::ZERO))
                .map(|run| run.count)
                .sum();
            assert_eq!(count, keys.len() as u64);
        });
        let memory = Arena::new(2 * nodes_for(keys) + 1024);
        let set_hints = Hints::default();
        let cpu = Cpu {
            arena: &memory,
            hints: &set_hints,
        };
        let check = timed(|| {
            let sets = kho_check::Sets::new(cpu).unwrap();
            let stats = kho_check::check_tree(&tree, &Machine, &sets).unwrap();
            assert_eq!(stats.frames, keys.len() as u64);
        });
        keep(&mut ours[..3], &times);
        keep(&mut ours[3..], &[contains, visit, runs, check]);
    }
    let works = [
        "first add",
        "add",
        "remove",
        "contains",
        "visit",
        "runs",
        "chart",
    ];
    let per_key = |time: Duration| time.as_nanos() as f64 / keys.len() as f64;
    let line = |(i, work)| Line {
        pattern,
        work,
        ns: per_key(ours[i]),
        peer_ns: peer.get(i).copied().map(per_key),
    };
    works.into_iter().enumerate().map(line).collect()
}

/// Millions of keys that `threads` threads add and remove in a second, each in memory of its own.
fn scale<S: Set>(threads: u64, keys: u64, make: impl Fn(&Arena) -> S, repeat: u32) -> f64 {
    let own = |id: u64| frames_from(id << 20, 1, keys);
    let sets: Vec<_> = (0..threads).map(own).collect();
    let arena = Arena::new(sets.iter().map(|keys| nodes_for(keys)).sum());
    let set = make(&arena);
    let arrived = AtomicU64::new(0);
    let cores = cores();
    // Nobody sleeps, if there is a core for each: who sleeps is woken late, on a busy machine.
    let start = |round: u64| {
        arrived.fetch_add(1, Ordering::AcqRel);
        while arrived.load(Ordering::Acquire) < threads * (round + 1) {
            match threads > cores {
                true => thread::yield_now(),
                false => std::hint::spin_loop(),
            }
        }
    };
    // Returns when each round began and ended. Rounds are short, so that some have all cores.
    let work = |keys: &[Key]| -> Vec<(Instant, Instant)> {
        let hints = Hints::default();
        let cpu = Cpu {
            arena: &arena,
            hints: &hints,
        };
        // The nodes are there when time starts to run.
        keys.iter().for_each(|key| set.add(cpu, *key));
        let round = |round| {
            start(round);
            let begin = Instant::now();
            keys.iter().for_each(|key| set.remove(cpu, *key));
            keys.iter().for_each(|key| set.add(cpu, *key));
            (begin, Instant::now())
        };
        (0..u64::from(repeat) * 40).map(round).collect()
    };
    let times: Vec<_> = thread::scope(|scope| {
        let work = &work;
        let workers: Vec<_> = sets
            .iter()
            .map(|keys| scope.spawn(move || work(keys)))
            .collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| worker.join().unwrap();
        workers.into_iter().map(join).collect()
    });
    let round = |i: usize| {
        let begin = times.iter().map(|rounds| rounds[i].0).min().unwrap();
        let end = times.iter().map(|rounds| rounds[i].1).max().unwrap();
        end - begin
    };
    let best = (0..times[0].len()).map(round).min().unwrap();
    (threads * keys * 2) as f64 / best.as_secs_f64() / 1e6
}

struct Scaling {
    threads: u64,
    ours: f64,
    peer: f64,
}

fn json(
    keys: u64,
    repeat: u32,
    cores: u64,
    lines: &[Line],
    hosts: &[hosts::Figures],
    scaling: &[Scaling],
) -> String {
    let mut out = String::new();
    let single: Vec<String> = lines
        .iter()
        .map(|line| {
            let peer = line
                .peer_ns
                .map_or("null".to_string(), |ns| format!("{ns:.2}"));
            format!(
                r#"    {{"pattern": "{}", "work": "{}", "ns": {:.2}, "peer_ns": {peer}}}"#,
                line.pattern, line.work, line.ns
            )
        })
        .collect();
    let hosts: Vec<String> = hosts.iter().map(hosts::Figures::json).collect();
    let threads: Vec<String> = scaling
        .iter()
        .map(|it| {
            format!(
                r#"    {{"threads": {}, "mkeys_per_s": {:.2}, "peer_mkeys_per_s": {:.2}}}"#,
                it.threads, it.ours, it.peer
            )
        })
        .collect();
    writeln!(
        out,
        "{{\n  \"cores\": {cores},\n  \"keys\": {keys},\n  \"repeat\": {repeat},\n  \
         \"single\": [\n{}\n  ],\n  \"hosts\": [\n{}\n  ],\n  \"threads\": [\n{}\n  ]\n}}",
        single.join(",\n"),
        hosts.join(",\n"),
        threads.join(",\n")
    )
    .unwrap();
    out
}

fn cores() -> u64 {
    thread::available_parallelism().map_or(1, |n| n.get() as u64)
}

fn usage() -> ! {
    eprintln!("usage: cargo bench -- [--json FILE] [--repeat N] [--keys N]");
    std::process::exit(2)
}

fn main() {
    let (mut file, mut repeat, mut keys) = (None, 7u32, 1_000_000u64);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse().ok()).filter(|n| *n > 0);
        match arg.as_str() {
            // What cargo itself adds.
            "--bench" => {}
            "--repeat" => repeat = number().unwrap_or_else(|| usage()) as u32,
            "--keys" => keys = number().unwrap_or_else(|| usage()),
            "--json" => file = Some(args.next().unwrap_or_else(|| usage())),
            _ => usage(),
        }
    }
    let cores = cores();

    let mut random = frames_from(0, 3, keys);
    shuffle(&mut random);
    let patterns = [
        ("adjacent", frames_from(0, 1, keys)),
        ("scattered", frames_from(0, 2, keys)),
        ("random", random),
    ];
    println!("{keys} keys of order 0, best of {repeat}, nanoseconds per key; {cores} cores");
    println!(
        "{:<12}{:<12}{:>9}{:>9}{:>8}",
        "keys", "work", "ours", "peer", "ratio"
    );
    let mut lines = Vec::new();
    for (pattern, keys) in &patterns {
        for line in single(pattern, keys, repeat) {
            let peer = line.peer_ns.map_or(String::new(), |peer| {
                format!("{peer:>9.2}{:>8.2}", line.ns / peer)
            });
            println!(
                "{:<12}{:<12}{:>9.2}{peer}",
                line.pattern, line.work, line.ns
            );
            lines.push(line);
        }
    }

    println!();
    let hosts = hosts::all(repeat.min(3));

    println!("threads, each adding and removing in memory of its own: million keys per second");
    println!(
        "{:<9}{:>9}{:>8}{:>9}{:>8}",
        "threads", "ours", "gain", "peer", "gain"
    );
    let mut scaling: Vec<Scaling> = Vec::new();
    for threads in [1, 2, 4, 8] {
        let per_thread = keys.min(1 << 20) / 8;
        let ours = |arena: &Arena| Ours(NodeAddr::new(arena.take().unwrap()).unwrap());
        let lock = Mutex::new(());
        let peer = |arena: &Arena| Peer {
            root: arena.take().unwrap(),
            lock: &lock,
        };
        let now = Scaling {
            threads,
            ours: scale(threads, per_thread, ours, repeat),
            peer: scale(threads, per_thread, peer, repeat),
        };
        let one = scaling.first().unwrap_or(&now);
        println!(
            "{threads:<9}{:>9.1}{:>8.2}{:>9.1}{:>8.2}",
            now.ours,
            now.ours / one.ours,
            now.peer,
            now.peer / one.peer
        );
        scaling.push(now);
    }
    if let Some(file) = file {
        let text = json(keys, repeat, cores, &lines, &hosts, &scaling);
        if let Err(error) = std::fs::write(&file, text) {
            eprintln!("{file}: {error}");
            std::process::exit(1);
        }
    }
}
