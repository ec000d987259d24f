// SPDX-License-Identifier: GPL-2.0

//! What a fuzzer's bytes say, done to the core and to simple models. None of this panics.
//!
//! `fuzz/` runs it under libFuzzer; [`corpus`] does so with what is kept of its inputs.

use super::super::kho_check::{check_tree, larger_block, Machine, Refusal, Sets};
use super::super::kho_fdt::{memory_map, total_size, Blob};
use super::super::kho_grain::{add_grains, coarsen, has_frames, Gaps, EXTENSION};
use super::super::kho_key::{Block, Key, Order, Pfn};
use super::super::kho_param::{cut, Scratch, Used};
use super::super::kho_radix::{NoMemory, Node, NodeAddr, NodeMem, Removal, Run, Tree};
use super::super::kho_range::Frames;
use super::super::PAGE_SHIFT;
use super::{abi, block, key, order, radix, range, Guard, Mem};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::SeqCst;

const LEAF: u64 = 1 << abi::BITMAP_LOG2;
const PAGE: u64 = 1 << PAGE_SHIFT;
const MAX_ORDER: u32 = 64 - PAGE_SHIFT;

/// The name of each target, and what it does.
pub const TARGETS: [(&str, fn(&[u8])); 5] = [
    ("tree", tree),
    ("ops", ops),
    ("fdt", fdt),
    ("param", param),
    ("range", ranges),
];

/// Bytes, and zeroes behind them.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    /// A number of so many bytes.
    fn take(&mut self, bytes: usize) -> u64 {
        let (head, rest) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = rest;
        head.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// The next byte, if there is one.
    fn next(&mut self) -> Option<u64> {
        (!self.0.is_empty()).then(|| self.take(1))
    }

    /// Up to so many bytes.
    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let count = self.take(1) % (most + 1);
        (0..count).map(|_| self.take(1) as u8).collect()
    }

    /// A number of 64 bits: any, or one around a power of two, of which one may be taken away.
    fn number(&mut self) -> u64 {
        match self.take(1) {
            shift @ 0..64 => (1u64 << shift).wrapping_add_signed(self.take(1) as i8 as i64),
            shift @ 64..128 => 0u64.wrapping_sub(1 << (shift - 64)),
            _ => self.take(8),
        }
    }

    /// A frame number, or that of the end.
    fn frame(&mut self) -> u64 {
        self.number() % (abi::PFN_END + 1)
    }
}

/// Ranges that touch or overlap, as one.
fn merged(ranges: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges.into_iter().filter(|(start, end)| start < end) {
        match all.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => all.push((start, end)),
        }
    }
    all
}

/// The runs of a set.
fn runs(set: &Tree<&Mem>) -> Vec<(u64, u64)> {
    let runs = set.runs_between((Key::MIN, Key::MAX));
    runs.map(|run| (run.first.get(), run.first.get() + run.count)).collect()
}

fn holds(ranges: &[(u64, u64)], (start, end): (u64, u64)) -> bool {
    ranges.iter().any(|range| range.0 <= start && end <= range.1)
}

/// A machine's memory, and what is in it: words by frame and index, zeroes elsewhere.
struct Image {
    /// Frames that are RAM, and those of them that are not scratch; as few ranges as can be.
    ram: Vec<(u64, u64)>,
    usable: Vec<(u64, u64)>,
    /// Where what is asked for ends, whether or not more follows.
    borders: BTreeSet<u64>,
    words: BTreeMap<(u64, u64), u64>,
    pages: BTreeMap<u64, Vec<u64>>,
}

impl Image {
    fn read(input: &mut Input<'_>) -> (Self, u64) {
        let (mut ram, mut scratch) = (Vec::new(), Vec::new());
        for _ in 0..1 + input.take(1) % 8 {
            // The uppermost bit says that it is scratch.
            let (start, count) = (input.take(5), input.take(5));
            let range = (start & !(1 << 39), (start & !(1 << 39)) + count);
            [&mut ram, &mut scratch][(start >> 39) as usize].push(range);
        }
        let ends = ram.iter().chain(&scratch).flat_map(|range| [range.0, range.1]);
        let borders: BTreeSet<u64> = ends.collect();
        let within = |ranges: &[(u64, u64)], at| ranges.iter().any(|it| (it.0..it.1).contains(&at));
        let pieces = |is: &dyn Fn(u64) -> bool| {
            let pieces = borders.iter().copied().zip(borders.iter().copied().skip(1));
            merged(pieces.filter(|piece| is(piece.0)))
        };
        let mut image = Self {
            ram: pieces(&|at| within(&ram, at)),
            usable: pieces(&|at| within(&ram, at) && !within(&scratch, at)),
            borders,
            words: BTreeMap::new(),
            pages: BTreeMap::new(),
        };
        let root = image.write(input);
        for ((pfn, index), word) in &image.words {
            let page = image.pages.entry(*pfn);
            page.or_insert_with(|| vec![0; PAGE as usize / 8])[*index as usize] = *word;
        }
        (image, root)
    }

    /// Fills memory as the bytes say, and returns where the root of the tree is.
    fn write(&mut self, input: &mut Input<'_>) -> u64 {
        let root = input.take(5);
        // Nodes of our own, and the one that is being written.
        let (mut nodes, mut page) = (vec![root], root);
        while let Some(what) = input.next() {
            let node = |at: u64| nodes[at as usize % nodes.len()];
            match what % 8 {
                // A node, as it lies in another machine's memory.
                0 => page = input.take(5),
                1 => {
                    let (index, count) = (input.take(2), 1 + input.take(1));
                    let value = input.take(8);
                    for at in index..index + count {
                        self.words.insert((page, at % (PAGE / 8)), value);
                    }
                }
                // Damage: an entry, or a word, of one of our nodes.
                2 => {
                    let (from, to) = (node(input.take(1)), node(input.take(1)));
                    let used = self.words.range((from, 0)..=(from, u64::MAX));
                    let used: Vec<_> = used.map(|(at, _)| *at).collect();
                    if let Some(at) = used.get(input.take(1) as usize % used.len().max(1)) {
                        let change = input.take(1);
                        let word = self.words.entry(*at).or_default();
                        *word = match change % 4 {
                            0 => to * PAGE,
                            1 => input.number(),
                            _ => *word ^ 1 << (change / 4),
                        };
                    }
                }
                3 => page = node(input.take(1)),
                // A block, added as another kernel would.
                _ => {
                    let of = (input.take(1) % u64::from(MAX_ORDER + 1)) as u32;
                    let phys = (input.take(5) % abi::PFN_END) >> of << of << PAGE_SHIFT;
                    let number = abi::encode(phys, of);
                    page = root;
                    for level in (1..abi::DEPTH).rev() {
                        let at = (page, abi::index(number, level) as u64);
                        let fresh = nodes[nodes.len() - 1] + 1;
                        let entry = self.words.entry(at).or_default();
                        if *entry == 0 {
                            *entry = fresh * PAGE;
                            nodes.push(fresh);
                        }
                        page = *entry / PAGE;
                    }
                    let bit = number % LEAF;
                    *self.words.entry((page, bit / 64)).or_default() |= 1 << (bit % 64);
                }
            }
        }
        root * PAGE
    }
}

impl Machine for Image {
    fn ram_end(&self) -> u64 {
        self.ram.last().map_or(0, |range| range.1)
    }

    fn usable(&self, pfn: u64) -> Option<Frames> {
        let end = self.borders.range(pfn + 1..).next()?;
        holds(&self.usable, (pfn, pfn + 1)).then(|| Frames::between(pfn, *end))
    }

    fn ram(&self, pfn: u64) -> Option<Frames> {
        let range = self.ram.iter().find(|range| pfn < range.1)?;
        let start = pfn.max(range.0);
        Some(Frames::between(start, *self.borders.range(start + 1..).next()?))
    }
}

/// The tree is only looked at, and only where there is RAM.
impl<'m> NodeMem for &'m Image {
    type Guard<'a>
        = Guard<'m>
    where
        Self: 'a;

    fn enter(&self) -> Guard<'m> { unreachable!() }
    fn new_generation(&self) { unreachable!() }
    fn alloc(&self) -> Option<NodeAddr> { unreachable!() }
    fn free(&self, _: NodeAddr) { unreachable!() }

    fn node(&self, addr: NodeAddr) -> &Node {
        static EMPTY: [u64; PAGE as usize / 8] = [0; PAGE as usize / 8];
        let pfn = addr.get() / PAGE;
        assert!(addr.get() % PAGE == 0 && holds(&self.usable, (pfn, pfn + 1)), "{addr:x?}");
        let words = self.pages.get(&pfn).map_or(&EMPTY[..], Vec::as_slice);
        // SAFETY: A node is an array of as many words, and nobody writes to this one.
        unsafe { &*words.as_ptr().cast() }
    }
}

/// What a tree says, read without the core.
#[derive(Default)]
struct Reading {
    met: BTreeSet<u64>,
    nodes: u64,
    refusal: Option<Refusal>,
    /// Blocks that can be taken over, by their order, and those that lie in no other, by start
    /// and end.
    good: BTreeMap<u32, BTreeSet<u64>>,
    taken: BTreeMap<u64, u64>,
    /// What is to be kept of blocks that cannot.
    kept: BTreeMap<u64, u64>,
    overlap: Option<u64>,
    lost: u64,
    first_lost: u64,
}

/// Adds a range to disjoint ones, unless it lies in one; returns whether it did not.
fn insert(ranges: &mut BTreeMap<u64, u64>, (start, end): (u64, u64)) -> bool {
    let around = ranges.range(..=start).next_back();
    let is_new = around.is_none_or(|(_, behind)| *behind <= start);
    is_new && ranges.insert(start, end).is_none()
}

impl Reading {
    fn node(&mut self, image: &Image, phys: u64, level: u32, first: u64) {
        let pfn = phys / PAGE;
        let is_node = phys % PAGE == 0 && holds(&image.usable, (pfn, pfn + 1));
        if !is_node || !self.met.insert(pfn) {
            self.refusal.get_or_insert(Refusal::Node(phys));
            return;
        }
        // Any block that is below the end of RAM as a whole.
        let last = first | ((1 << abi::node_shift(level)) - 1);
        let reaches = (0..=MAX_ORDER).any(|of| {
            let (lowest, count) = (abi::encode(0, of), image.ram_end() >> of);
            count > 0 && first < lowest + count && lowest <= last
        });
        if !reaches {
            self.refusal.get_or_insert(Refusal::Reach(phys));
            return;
        }
        self.nodes += 1;
        for ((_, index), word) in image.words.range((pfn, 0)..=(pfn, u64::MAX)) {
            if level > 0 && *word != 0 {
                self.node(image, *word, level - 1, first | index << abi::shift(level));
            } else if level == 0 {
                let bits = (0..64).filter(|bit| word >> bit & 1 == 1);
                bits.for_each(|bit| self.block(image, first + index * 64 + bit));
            }
        }
    }

    fn block(&mut self, image: &Image, number: u64) {
        let Some(of) = (0..=MAX_ORDER).find(|of| number >> (MAX_ORDER - of) == 1) else {
            self.refusal.get_or_insert(Refusal::Reach(number));
            return;
        };
        let start = (number ^ 1 << (MAX_ORDER - of)) << of;
        let range = (start, start + (1 << of));
        if holds(&image.usable, range) {
            self.good.entry(of).or_default().insert(start);
            if !insert(&mut self.taken, range) {
                self.overlap.get_or_insert(start);
            }
            return;
        }
        if self.lost == 0 {
            self.first_lost = start * PAGE;
        }
        self.lost += 1;
        if 1 << of <= image.ram_end() / 2 {
            for ram in &image.ram {
                let (start, end) = (range.0.max(ram.0), range.1.min(ram.1));
                if start < end {
                    insert(&mut self.kept, (start, end));
                }
            }
        }
    }
}

thread_local! {
    /// Memory for sets and trees, which is empty between two inputs.
    static MEM: &'static Mem = Box::leak(Box::new(Mem::at(1 << 50, 4096)));
}

/// Another kernel's tree, whatever it is, and what becomes of it.
fn tree(data: &[u8]) {
    let mut input = Input(data);
    let (of, limit, near) = (input.take(1) as u32, input.take(1) as usize, input.take(5));
    let (image, root) = Image::read(&mut input);
    let Some(root_addr) = NodeAddr::new(root) else { return };
    let mem = MEM.with(|mem| *mem);
    // Sets of much memory are not what is to be found out.
    mem.budget.store(24 + (512 << 10) / PAGE as i64, SeqCst);
    let sets = Sets::new(mem).unwrap();
    let found = Tree::from_root(&image, root_addr);
    let stats = check_tree(&found, &image, &sets);
    let ran_out = mem.budget.swap(i64::MAX, SeqCst) < 0;
    if let (Ok(stats), false) = (stats, ran_out) {
        let mut read = Reading::default();
        read.node(&image, root, abi::DEPTH - 1, 0);
        let taken = merged(read.taken.iter().map(|(start, end)| (*start, *end)));
        assert_eq!((stats.refusal, stats.nodes), (read.refusal, read.nodes));
        if let Some(refusal @ (Refusal::Node(phys) | Refusal::Reach(phys))) = stats.refusal {
            assert_eq!(refusal.what().1, phys);
        }
        assert_eq!((stats.lost, stats.first_lost), (read.lost, read.first_lost));
        assert_eq!(stats.frames, taken.iter().map(|(start, end)| end - start).sum());
        let orders = stats.orders().map(|(of, count)| (of.get(), count));
        assert!(orders.eq(read.good.iter().map(|(of, good)| (*of, good.len() as u64))));
        let met = read.met.iter().map(|pfn| (*pfn, pfn + 1));
        assert_eq!(runs(&sets.nodes), merged(met));
        assert_eq!(runs(&sets.reserved), taken);
        assert_eq!(runs(&sets.lost), merged(read.kept.into_iter()));
        if read.refusal.is_none() {
            assert_eq!(stats.overlap, read.overlap);
            for (of, good) in &read.good {
                for pfn in [good.first(), good.last()].into_iter().flatten() {
                    let mut larger = read.good.range(of + 1..);
                    let claimed = larger.any(|(of, all)| all.contains(&(pfn >> of << of)));
                    assert_eq!(larger_block(&found, &stats, &image, block(*pfn, *of)).is_some(), claimed);
                }
            }
        }
        plan(&sets.reserved, &taken, (of, limit, near));
    }
    sets.destroy();
    assert_eq!(mem.live(), 0);
}

/// Grains, and gaps, of a set of frames.
fn plan(set: &Tree<&Mem>, frames: &[(u64, u64)], (of, limit, near): (u32, usize, u64)) {
    let of = 6 + of % 20;
    let grains = Tree::new(MEM.with(|mem| *mem)).unwrap();
    assert_eq!(add_grains(set, Key::MAX, order(of), &grains), Ok(frames.len() as u64));
    let numbers = merged(frames.iter().map(|(start, end)| (start >> of, ((end - 1) >> of) + 1)));
    assert_eq!(runs(&grains), numbers);
    // The shortest gaps are closed, all of a length at once, and none that is too long.
    coarsen(&grains, Key::MAX, order(of), limit).unwrap();
    let gaps: Vec<u64> = numbers.windows(2).map(|pair| pair[1].0 - pair[0].1).collect();
    let longest = (EXTENSION >> PAGE_SHIFT) >> of;
    let longer = |least: u64| gaps.iter().filter(|gap| **gap >= least).count();
    let leasts: BTreeSet<u64> = gaps.iter().map(|gap| gap + 1).chain([1]).collect();
    let fits = |least: &&u64| **least < longest && longer(**least) < limit.max(1);
    let least = leasts.iter().find(fits).copied().unwrap_or(longest.max(1));
    let open = |(i, range): (usize, &(u64, u64))| match gaps.get(i) {
        Some(gap) if *gap < least => (range.0, range.1 + gap),
        _ => *range,
    };
    assert_eq!(runs(&grains), merged(numbers.iter().enumerate().map(open)), "to {limit}");
    grains.destroy();

    let start = near.min(abi::PFN_END - 3 * LEAF);
    let range = (start, start + (near % (3 * LEAF)));
    assert_eq!(
        has_frames(set, Frames::between(range.0, range.1)),
        range.0 == range.1 || holds(frames, range)
    );
    let mut gaps = Gaps::new(set, Frames::between(range.0, range.1), order(of));
    let mut at = range.0;
    // A frame that is in no block must be in the set.
    for next in gaps.by_ref().take(100) {
        let pfn = next.pfn().get();
        assert!(at == pfn || holds(frames, (at, pfn)), "{at:#x}..{pfn:#x}");
        let behind = frames.iter().map(|it| it.0).find(|start| *start > pfn);
        let end = behind.unwrap_or(range.1).min(range.1);
        let fits = |of: &u32| pfn % (1 << of) == 0 && pfn + (1 << of) <= end;
        assert_eq!((0..=of).rev().find(fits), Some(next.order().get()));
        at = pfn + next.order().pages();
    }
    assert!(gaps.next().is_some() || at == range.1 || holds(frames, (at, range.1)));
}

/// What is to be done to a tree of our own, with and without memory.
fn ops(data: &[u8]) {
    let mem = MEM.with(|mem| *mem);
    let mut input = Input(data);
    let tree = Tree::new(mem).unwrap();
    let mut keys = BTreeSet::new();
    // Nodes below the root, by level and what their keys have in common.
    let mut nodes = BTreeSet::new();
    let path = |number: &u64| {
        let number = *number;
        (0..abi::DEPTH - 1).map(move |at| (at, number >> abi::node_shift(at)))
    };
    let borders = radix::borders();
    let mut budget = i64::MAX;
    for _ in 0..100 {
        let Some(what) = input.next() else { break };
        let mut any = || {
            let at = borders[input.take(1) as usize % borders.len()];
            at.wrapping_add_signed(input.take(1) as i8 as i64) & Key::MAX.get()
        };
        let number = any();
        let some: Vec<u64> = match what % 8 {
            2 | 3 => (0..=what / 8 % 8).map(|_| any()).chain([number]).collect(),
            _ => vec![number],
        };
        let mut missing = None;
        mem.budget.store(budget, SeqCst);
        match what % 8 {
            0 | 2 => {
                let stop = some.iter().find(|number| {
                    let fresh = path(number).filter(|node| !nodes.contains(node));
                    let fresh: Vec<_> = fresh.collect();
                    budget = budget.saturating_sub(fresh.len() as i64);
                    missing = (budget < 0).then_some(NoMemory);
                    if missing.is_none() {
                        nodes.extend(fresh);
                    }
                    missing.is_some() || !keys.insert(**number)
                });
                if what % 8 == 0 {
                    let expected = missing.map_or(Ok(stop.is_none()), Err);
                    assert_eq!(tree.add(key(number)), expected);
                } else {
                    let expected = stop.map_or(Ok(()), |number| Err((key(*number), missing)));
                    assert_eq!(tree.add_all(some.iter().map(|it| key(*it))), expected);
                }
            }
            1 | 3 => {
                let (mut absent, mut emptied) = (Vec::new(), false);
                for number in &some {
                    let word = number & !63;
                    match keys.remove(number) {
                        false => absent.push(key(*number)),
                        true => emptied |= keys.range(word..word + 64).next().is_none(),
                    }
                }
                let mut found = Vec::new();
                if what % 8 == 3 {
                    let all = some.iter().map(|it| key(*it));
                    assert_eq!(tree.remove_all(all, |it| found.push(it)), emptied);
                    assert_eq!(found, absent);
                } else {
                    let expected = match (absent.is_empty(), emptied) {
                        (false, _) => Removal::Absent,
                        (_, true) => Removal::Emptied,
                        _ => Removal::Removed,
                    };
                    assert_eq!(tree.remove(key(number)), expected);
                }
            }
            4 => {
                let least: BTreeSet<_> = keys.iter().flat_map(path).collect();
                assert_eq!(tree.has_empty(), nodes.len() > least.len());
                tree.prune();
                nodes = least;
            }
            5 => {
                let bounds = (number.min(any()), number.max(any()));
                if bounds.0 <= bounds.1 {
                    let found = radix::keys_between(&tree, bounds);
                    assert!(found.iter().eq(keys.range(bounds.0..=bounds.1)));
                }
                let leaf = nodes.range((0, number / LEAF)..(1, 0)).next().map(|leaf| leaf.1);
                let next = tree.next_leaf(key(number), Key::MAX);
                assert_eq!(next.map(|(first, _)| first / LEAF), leaf);
            }
            6 => {
                assert_eq!(tree.contains(key(number)), keys.contains(&number));
                let leaf = tree.find_leaf(key(number));
                assert_eq!(leaf.is_some(), nodes.contains(&(0, number / LEAF)));
                let last = number.max(number / LEAF * LEAF + any() % LEAF);
                let words = leaf.iter().flat_map(|leaf| leaf.words_between(key(number), key(last)));
                let found = words.flat_map(|(first, word)| {
                    let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
                    bits.map(move |bit| first + bit)
                });
                assert!(found.eq(keys.range(number..=last).copied()));
            }
            // The next time, only so many nodes can be had.
            _ => {}
        }
        assert_eq!(mem.live(), 1 + nodes.len());
        budget = if what % 8 == 7 { (what / 8 % 16) as i64 } else { i64::MAX };
    }
    mem.budget.store(i64::MAX, SeqCst);
    if data.len() % 16 == 0 {
        assert!(abi::walk(mem, tree.root().get()).1.iter().eq(&keys));
    }
    tree.remove_all(keys.iter().map(|it| key(*it)), |_| panic!());
    tree.prune();
    assert_eq!(mem.live(), 1);
    tree.destroy();
    assert_eq!(mem.live(), 0);
}

/// What stands in an FDT.
fn fdt(data: &[u8]) {
    let mut input = Input(data);
    let (len, magic, size) = (input.number(), input.number() as u32, input.number() as u32);
    let magic = if len % 2 == 0 { 0xd00d_feed } else { magic };
    let header = (u64::from(magic) << 32 | u64::from(size)).to_be_bytes();
    let good = magic == 0xd00d_feed && size >= 40 && u64::from(size) <= len;
    assert_eq!(total_size(&header, len).ok(), good.then_some(size));
    let mut property = || match input.take(1) % 4 {
        0 => Some(input.bytes(16)),
        1 => None,
        _ => Some(input.number().to_ne_bytes().to_vec()),
    };
    let (map, data, size) = (property(), property(), property());
    let value = |bytes: &Option<Vec<u8>>| {
        let bytes = <[u8; 8]>::try_from(bytes.as_deref()?).ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    let node = value(&map).filter(|phys| *phys > 0 && phys % PAGE == 0);
    assert_eq!(memory_map(map.as_deref()).ok().map(NodeAddr::get), node);
    let blob = value(&data).zip(value(&size)).map(|(phys, size)| Blob { phys, size });
    let end = |blob: &Blob| u128::from(blob.phys) + u128::from(blob.size);
    let blob = blob.filter(|blob| blob.phys > 0 && blob.size > 0 && end(blob) <= 1 << 64);
    assert_eq!(Blob::from_properties(data.as_deref(), size.as_deref()).ok(), blob);
    let phys = value(&data).unwrap_or(0);
    assert_eq!(Blob::is_at(data.as_deref(), phys), value(&data).is_some());
    assert!(!Blob::is_at(data.as_deref(), phys ^ 1));
}

/// A size as `memparse()` reads it, if that is all of the text.
fn size(text: &str) -> Option<u64> {
    let text = text.to_ascii_lowercase();
    let hex = text.strip_prefix("0x");
    let units = if hex.is_some() { "kmgtp" } else { "kmgtpe" };
    let unit = text.chars().last().and_then(|last| units.find(last));
    let digits = hex.unwrap_or(&text);
    let digits = &digits[..digits.len() - usize::from(unit.is_some())];
    let radix = match hex {
        Some(_) => 16,
        None => if text.starts_with('0') { 8 } else { 10 },
    };
    let is_number = digits.chars().all(|it| it.is_digit(radix));
    let value = u128::from_str_radix(digits, radix).ok().filter(|_| is_number)?;
    let shift = unit.map_or(0, |unit| 10 * (unit + 1));
    u64::try_from(value).ok()?.checked_mul(1 << shift)
}

fn scratch(text: &str) -> Option<Scratch> {
    if let Some(percent) = text.strip_suffix('%') {
        return percent.parse().ok().filter(|it| *it > 0).map(Scratch::Scale);
    }
    let sizes: Option<Vec<u64>> = text.split(',').map(size).collect();
    let [lowmem, global, pernode] = sizes?[..] else { return None };
    let sum: u128 = [lowmem, global, pernode].map(u128::from).iter().sum();
    (sum > 0 && sum < 1 << 64).then_some(Scratch::Sizes { lowmem, global, pernode })
}

/// `kho_scratch=`, and what comes of it.
fn param(data: &[u8]) {
    let mut input = Input(data);
    let (all, low, others) = (input.number(), input.number(), input.number());
    let (all, low) = (all.max(low), all.min(low));
    let align = 1u64 << (input.take(1) % 64);
    let text = input.0;
    let parsed = Scratch::parse(text);
    assert_eq!(parsed, std::str::from_utf8(text).ok().and_then(scratch));
    if let Some(scratch) = parsed {
        let used = Used { low, all };
        let up = |exact: u128| exact.div_ceil(align.into()) * u128::from(align);
        let fits = |exact| u64::try_from(up(exact)).ok();
        let scaled = |bytes: u64, percent: u32| {
            fits(u128::from(bytes) * u128::from(percent) / 100)
        };
        let (lowmem, global, pernode) = match scratch {
            Scratch::Scale(percent) => (
                scaled(low, percent),
                scaled(all, percent).map(|all| all.saturating_sub(others)),
                scaled(all - low, percent),
            ),
            Scratch::Sizes { lowmem, global, pernode } => {
                (fits(lowmem.into()), fits(global.into()), fits(pernode.into()))
            }
        };
        assert_eq!(scratch.lowmem(used, align), lowmem);
        assert_eq!(scratch.global(used, others, align), global);
        assert_eq!(scratch.pernode(used, 2, align), pernode);
    }
    let area = (low & !(align - 1), all & !(align - 1));
    let region = (others, others.saturating_add(text.len() as u64));
    for (start, end) in cut(area, region, align) {
        assert!(area.0 <= start && start <= end && end <= area.1 && (start | end) % align == 0);
        assert!(start == end || end <= region.0 || start >= region.1 || region.0 == region.1);
    }
}

/// Ranges, blocks and keys where numbers end.
fn ranges(data: &[u8]) {
    let mut input = Input(data);
    let ends = |range: Frames| (range.start(), range.end());
    let (phys, size) = (input.number(), input.number());
    let end = u128::from(phys) + u128::from(size);
    let up = |at: u128| at.div_ceil(PAGE.into()) as u64;
    let start = phys / PAGE;
    let behind = if size == 0 { start } else { up(end) };
    let covering = (size == 0 || end <= 1 << 64).then_some((start, behind));
    assert_eq!(Frames::covering(phys, size).map(ends), covering);
    let exact = covering.filter(|_| size > 0 && (phys | size) % PAGE == 0);
    assert_eq!(Frames::exact(phys, size).map(ends), exact);

    let of = order((input.take(1) % u64::from(MAX_ORDER + 1)) as u32);
    let pages = of.pages();
    let (a, b) = (input.frame(), input.frame());
    let other = Frames::between(input.frame(), input.frame());
    let (start, end) = (a.min(b), a.max(b));
    let all = Frames::between(start, end);
    assert_eq!(ends(all), (start, end));
    assert_eq!((all.count(), all.is_empty()), (end - start, start == end));
    let at = input.number();
    let border = at.clamp(start, end);
    assert_eq!((ends(all.until(at)), ends(all.from(at))), ((start, border), (border, end)));
    let both = all.both(other);
    let shared = (start.max(other.start()), end.min(other.end()));
    assert!(if shared.0 < shared.1 { ends(both) == shared } else { both.is_empty() });
    let size = 1 << (at % 64);
    let next = (u128::from(start) / size + 1) * size;
    assert_eq!(ends(all.head_to(size as u64)), (start, next.min(end.into()) as u64));
    let whole = (start.next_multiple_of(pages), end / pages * pages);
    let found = all.whole_blocks(of);
    assert!(if whole.0 < whole.1 { ends(found) == whole } else { found.is_empty() });
    // Blocks that start there.
    let (first, behind) = (start.div_ceil(pages), end.div_ceil(pages));
    let place = |index: u64| abi::encode(index * pages * PAGE, of.get());
    let keys = (first < behind).then(|| (place(first), place(behind - 1)));
    assert_eq!(all.keys(of).map(|(a, b)| (a.get(), b.get())), keys);
    if let Some(pfn) = Pfn::new(start) {
        assert_eq!(Frames::new(pfn, size as u64).map(ends), {
            let end = u128::from(start) + size;
            (end <= abi::PFN_END.into()).then_some((start, end as u64))
        });
        assert_eq!(Block::new(pfn, of).is_some(), start % pages == 0);
        // Which takes much longer than all else.
        if at % 32 == 1 {
            range::cut(start, end, &[other.start(), other.end()]);
        }
    }
    let number = input.number();
    assert_eq!(Key::new(number).is_some(), number < 1 << abi::KEY_WIDTH);
    if let Some(block) = Key::new(number).and_then(Key::block) {
        assert_eq!(abi::encode(block.pfn().phys(), block.order().get()), number);
        assert_eq!(Key::of(block).get(), number);
        let (of, count) = (block.order().get(), size as u64);
        let end = u128::from(block.pfn().get()) + (size << of);
        let frames = Frames::of_run(Run { first: key(number), count }).map(ends);
        let fits = end <= abi::PFN_END.into();
        assert_eq!(frames, fits.then_some((block.pfn().get(), end as u64)));
        let around = block.enclosing(Order::MAX);
        assert_eq!((around.pfn().get(), around.order()), (0, Order::MAX));
    }
}

/// All inputs that are kept.
#[test]
fn corpus() {
    let mut count = 0;
    for (name, target) in TARGETS {
        target(&[]);
        let dir = format!("{}/../fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
        for file in std::fs::read_dir(dir).unwrap() {
            target(&std::fs::read(file.unwrap().path()).unwrap()[1..]);
            count += 1;
        }
    }
    assert!(count >= 30, "{count}");
}
