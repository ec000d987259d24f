// SPDX-License-Identifier: GPL-2.0

//! Ranges of frames, and the blocks that they are cut into.

use super::super::kho_key::{
    Key,
    Order,
    Pfn, //
};
use super::super::kho_radix::Run;
use super::super::kho_range::{
    largest_hole,
    Attempts,
    Frames,
    Shortage, //
};
use super::super::PAGE_SHIFT;
use super::{
    abi,
    block,
    key,
    order,
    Rng, //
};

fn frames(start: u64, end: u64) -> Frames {
    Frames::new(Pfn::new(start).unwrap(), end - start).unwrap()
}

fn ends(frames: Frames) -> (u64, u64) {
    (frames.start(), frames.end())
}

/// Cuts `start..end`, checks every block, and returns how many there are. Two nodes take turns, at
/// each of `borders`.
pub(super) fn cut(start: u64, end: u64, borders: &[u64]) -> usize {
    let node = |pfn: u64| borders.iter().filter(|border| **border <= pfn).count() % 2;
    let cuts = |end| {
        let blocks = frames(start, end).blocks(|first, last| node(first) == node(last));
        blocks.collect::<Vec<_>>()
    };
    let blocks = cuts(end);
    let mut at = start;
    for (done, block) in blocks.iter().enumerate() {
        // Who gives up halfway has to undo just what was done.
        assert_eq!(cuts(at), blocks[..done], "{start:#x}..{at:#x} of {end:#x}");
        let pages = block.order().pages();
        assert_eq!(block.pfn().get(), at);
        assert_eq!(at % pages, 0);
        assert_eq!(node(at), node(at + pages - 1));
        // None larger would do.
        let larger = pages * 2;
        assert!(
            block.order() == Order::MAX
                || at % larger != 0
                || larger > end - at
                || node(at) != node(at + larger - 1),
            "{at:#x}+{pages:#x} of {start:#x}..{end:#x}"
        );
        at += pages;
    }
    assert_eq!(at, end);
    blocks.len()
}

#[test]
fn blocks() {
    for base in [0, 64, 0x1_0000, abi::PFN_END - 64] {
        for (start, end) in (0..=64).flat_map(|i| (i..=64).map(move |j| (base + i, base + j))) {
            if start == abi::PFN_END {
                continue;
            }
            cut(start, end, &[]);
            cut(start, end, &[base + 16]);
            cut(start, end, &[base + 7, base + 8, base + 33]);
        }
    }
    assert_eq!(cut(0, abi::PFN_END, &[]), 1);
    assert_eq!(cut(0, abi::PFN_END - 1, &[]), 64 - PAGE_SHIFT as usize);
    assert_eq!(cut(1, abi::PFN_END, &[]), 64 - PAGE_SHIFT as usize);
    assert_eq!(cut(0, 1 << 30, &[1 << 29]), 2);
    let mut rng = Rng::new(3);
    for _ in 0..1000 {
        let limit = 1 << rng.below(40);
        let start = rng.below(limit);
        let border = rng.below(limit * 2);
        cut(start, start + rng.below(limit), &[border]);
    }
}

#[test]
fn new() {
    let last = abi::PFN_END - 1;
    for (start, count, good) in [
        (0, 0, true),
        (0, abi::PFN_END, true),
        (0, abi::PFN_END + 1, false),
        (last, 0, true),
        (last, 1, true),
        (last, 2, false),
        (1, abi::PFN_END, false),
        (1, u64::MAX, false),
        (last, u64::MAX, false),
        (last, u64::MAX - last + 1, false),
    ] {
        let made = Frames::new(Pfn::new(start).unwrap(), count);
        let expected = good.then(|| (start, start + count));
        assert_eq!(made.map(ends), expected, "{start:#x} {count:#x}");
        if let Some(made) = made {
            assert_eq!(made.count(), count);
            assert_eq!(made.phys(), start << PAGE_SHIFT);
            assert_eq!(made.bytes(), count.wrapping_mul(1 << PAGE_SHIFT));
        }
    }
}

#[test]
fn covering_and_exact() {
    let page = 1u128 << PAGE_SHIFT;
    let near = |at: u64| (0..5).map(move |i| at.wrapping_add(i).wrapping_sub(2));
    let edges = [
        0,
        1 << PAGE_SHIFT,
        2 << PAGE_SHIFT,
        1 << 40,
        1 << 63,
        u64::MAX << PAGE_SHIFT,
    ];
    let values: Vec<u64> = edges.into_iter().flat_map(near).collect();
    for (phys, size) in values
        .iter()
        .flat_map(|p| values.iter().map(move |s| (*p, *s)))
    {
        let end = u128::from(phys) + u128::from(size);
        let start = u128::from(phys) / page;
        let covered = (end <= 1 << 64).then(|| {
            let past = if size == 0 { start } else { end.div_ceil(page) };
            (start as u64, past as u64)
        });
        let what = format!("{phys:#x} {size:#x}");
        assert_eq!(Frames::covering(phys, size).map(ends), covered, "{what}");
        let whole = size != 0 && phys % page as u64 == 0 && size % page as u64 == 0;
        let exact = covered.filter(|_| whole);
        assert_eq!(Frames::exact(phys, size).map(ends), exact, "{what}");
    }
}

#[test]
fn runs_and_blocks() {
    let mut rng = Rng::new(4);
    for of in 0..=64 - PAGE_SHIFT {
        let pages = 1 << of;
        let blocks = abi::PFN_END >> of;
        for index in [0, rng.below(blocks), blocks - 1] {
            let block = block(index * pages, of);
            let start = index * pages;
            assert_eq!(ends(Frames::of_block(block)), (start, start + pages));
            let first = Key::of(block);
            let left = blocks - index;
            for count in [
                1,
                left / 2,
                left,
                left + 1,
                1 << 52,
                u64::MAX,
                u64::MAX >> of,
            ] {
                let run = Frames::of_run(Run { first, count });
                let end = u128::from(start) + (u128::from(count) << of);
                let good = count <= left;
                assert_eq!(run.map(ends), good.then_some((start, end as u64)));
            }
        }
    }
    let none = Run {
        first: key(0),
        count: 1,
    };
    assert_eq!(Frames::of_run(none), None);
}

#[test]
fn sharing() {
    for base in [0, abi::PFN_END - 6] {
        let all: Vec<_> = (0..6)
            .flat_map(|i| (i..=6).map(move |j| (base + i, base + j)))
            .collect();
        for (a, b) in all.iter().flat_map(|a| all.iter().map(move |b| (*a, *b))) {
            let (x, y) = (frames(a.0, a.1), frames(b.0, b.1));
            let shared = |f: &u64| a.0 <= *f && *f < a.1 && b.0 <= *f && *f < b.1;
            let both = x.both(y);
            let expected: Vec<u64> = (base..base + 6).filter(shared).collect();
            let found = both.start()..both.end();
            assert!(found.eq(expected.iter().copied()), "{a:?} {b:?}: {both:x?}");
            assert_eq!(
                both.count() as usize,
                expected.len(),
                "{a:?} {b:?}: {both:x?}"
            );
            assert!(both.end() <= abi::PFN_END, "{a:?} {b:?}");
        }
    }
}

#[test]
fn parts_of_ranges() {
    assert_eq!(ends(Frames::EMPTY), (0, 0));
    for base in [0, 64, abi::PFN_END - 16] {
        let all = (0..16).flat_map(|i| (i..=16).map(move |j| (base + i, base + j)));
        for (start, end) in all {
            let (range, length) = (frames(start, end), end - start);
            for count in (0..20).chain([1 << 32, u64::MAX - start, u64::MAX - 1, u64::MAX]) {
                let at = start + count.min(length);
                let what = format!("{start:#x}..{end:#x} at {count:#x}");
                assert_eq!(ends(range.from(at)), (at, end), "{what}");
                assert_eq!(ends(range.until(at)), (start, at), "{what}");
            }
            for shift in 0..6 {
                let size = 1u64 << shift;
                // The next multiple, found by trying.
                let next = (start + 1..).find(|pfn| pfn % size == 0).unwrap();
                let what = format!("{start:#x}..{end:#x} to {size}");
                assert_eq!(ends(range.head_to(size)), (start, next.min(end)), "{what}");
            }
            for size in [1 << (63 - PAGE_SHIFT), abi::PFN_END, 1 << 63] {
                let next = if start < size { size } else { abi::PFN_END };
                assert_eq!(ends(range.head_to(size)), (start, next.min(end)));
            }
        }
    }
    let all = frames(0, abi::PFN_END);
    assert_eq!(ends(all.from(1).head_to(1 << 20)), (1, 1 << 20));
    assert_eq!(ends(all.from(u64::MAX)), (abi::PFN_END, abi::PFN_END));
    let some = frames(5, 9);
    for (pfn, before, behind) in [(0, (5, 5), (5, 9)), (7, (5, 7), (7, 9)), (99, (5, 9), (9, 9))] {
        assert_eq!((ends(some.until(pfn)), ends(some.from(pfn))), (before, behind));
    }
    for (start, end, is) in [
        (3, 7, (3, 7)),
        (7, 7, (7, 7)),
        (7, 3, (0, 0)),
        (abi::PFN_END - 1, abi::PFN_END, (abi::PFN_END - 1, abi::PFN_END)),
        (1, abi::PFN_END + 1, (0, 0)),
    ] {
        assert_eq!(ends(Frames::between(start, end)), is);
    }
}

#[test]
fn single_pages() {
    for pfn in [0, 5, abi::PFN_END - 1] {
        assert_eq!(frames(pfn, pfn + 1).only_page(), Some(block(pfn, 0)));
        assert!(frames(pfn, pfn).is_empty() && !frames(pfn, pfn + 1).is_empty());
        assert_eq!(frames(pfn, pfn).only_page(), None);
    }
    assert_eq!(frames(4, 6).only_page(), None);
}

/// The blocks of an order that lie in a range as a whole, and the numbers of its frames, found by
/// trying.
#[test]
fn whole_blocks_of_ranges() {
    for base in [0, abi::PFN_END - 32] {
        for (start, end) in (0..32).flat_map(|i| (i..=32).map(move |j| (base + i, base + j))) {
            let range = frames(start, end);
            for of in 0..6 {
                let pages = 1u64 << of;
                let blocks = (start..end).filter(|at| at % pages == 0 && end - at >= pages);
                let inside: Vec<u64> = blocks.flat_map(|at| at..at + pages).collect();
                let found = range.whole_blocks(order(of));
                assert!((found.start()..found.end()).eq(inside), "{range:?} of {of}");
                let before = (0..start).rev().take(64).chain(0..0);
                let last = before.filter(|at| at % pages == 0).max();
                let below = last.map_or(0, |at| at / pages + 1);
                assert_eq!(order(of).blocks_below(start), below, "{start:#x}");
            }
            let (first, last) = range.numbers();
            assert!((first.get()..=last.get()).eq(start..end));
        }
    }
}

#[test]
fn holes() {
    let hole = |start, end, align, taken: &[(u64, u64)]| {
        largest_hole(start, end, align, taken.iter().copied())
    };
    assert_eq!(hole(100, 200, 1, &[]), 100);
    assert_eq!(hole(100, 200, 64, &[]), 72);
    assert_eq!(hole(100, 200, 256, &[]), 0);
    assert_eq!(hole(200, 200, 1, &[]), 0);
    assert_eq!(hole(200, 100, 1, &[]), 0);
    assert_eq!(hole(100, 200, 1, &[(100, 100)]), 0);
    assert_eq!(hole(100, 200, 1, &[(0, 1000)]), 0);
    assert_eq!(hole(100, 200, 1, &[(0, 10), (300, 10)]), 100);
    assert_eq!(hole(100, 200, 1, &[(110, 10), (150, 20)]), 30);
    // The piece that is the largest is not the one that is the largest when aligned.
    assert_eq!(hole(65, 228, 64, &[(150, 42)]), 36);
    assert_eq!(hole(u64::MAX - 10, u64::MAX, 16, &[]), 0);
    assert_eq!(hole(0, u64::MAX, 1, &[(1, u64::MAX)]), 1);
    assert_eq!(hole(0, 100, 0, &[]), 0);

    // Against trying every place.
    let mut rng = Rng::new(7);
    for _ in 0..3000 {
        let (start, end) = (rng.below(40), rng.below(80));
        let align = 1 << rng.below(5);
        let taken: Vec<_> = (0..rng.below(5))
            .map(|_| (rng.below(70), 1 + rng.below(20)))
            .collect();
        let free = |at: u64| {
            (start..end).contains(&at)
                && !taken
                    .iter()
                    .any(|&(addr, size)| (addr..addr + size).contains(&at))
        };
        let from = |at: u64| (at..).take_while(|at| free(*at)).count() as u64;
        let best = (0..80).step_by(align as usize).map(from).max().unwrap();
        assert_eq!(
            hole(start, end, align, &taken),
            best,
            "{start} {end} {align} {taken:?}"
        );
    }
}

fn short(size: u64, hole: u64) -> Shortage {
    Shortage { size, hole }
}

#[test]
fn shortage() {
    assert_eq!(short(100, 30).missing(), 70);
    assert_eq!(short(100, 0).missing(), 100);
    assert_eq!(short(100, 100).missing(), 0);
    // A hole may be large enough and be of no use for another reason.
    assert_eq!(short(100, u64::MAX).missing(), 0);
    assert_eq!(short(u64::MAX, 0).missing(), u64::MAX);
}

#[test]
fn attempts() {
    let kernel = short(64, 8);
    // There is no place at all for the kernel.
    let mut none = Attempts::NONE;
    assert_eq!(none.end(kernel, true), Some(kernel));
    // There is no further one, and something else was wrong at the places that there are.
    let mut none = Attempts::NONE;
    assert_eq!(none.end(kernel, false), None);

    // Whatever the order of what was short, the least of it is what to say.
    let closest = short(50, 45);
    let others = [short(10, 1), short(50, 30), short(90, 80), short(1000, 0)];
    for at in 0..=others.len() {
        let mut attempts = Attempts::NONE;
        let mut noted = others.to_vec();
        noted.insert(at, closest);
        for shortage in noted {
            attempts.note(shortage);
        }
        assert_eq!(attempts.end(kernel, false), Some(closest), "noted as {at}");
        // It is said once.
        assert_eq!(attempts.end(kernel, false), None);
    }
    // Of two that are as close, the first one.
    let mut attempts = Attempts::NONE;
    attempts.note(short(20, 10));
    attempts.note(short(30, 20));
    assert_eq!(attempts.end(kernel, false), Some(short(20, 10)));
    // What is left of an image that had no place for its kernel is not said of the next one.
    attempts.note(closest);
    assert_eq!(attempts.end(kernel, true), Some(kernel));
    assert_eq!(attempts.end(kernel, false), None);
}

/// What a loader finds and what is said meanwhile: it tries each place for the kernel, of which
/// `holes` has the size of the largest hole behind it, and then there is none for a segment of
/// `size`. Returns whether the image was loaded.
fn load(size: u64, holes: &[u64], said: &mut Vec<Shortage>) -> bool {
    let mut attempts = Attempts::NONE;
    for hole in holes {
        if *hole >= size {
            return true;
        }
        attempts.note(short(size, *hole));
    }
    said.extend(attempts.end(short(64, 8), holes.is_empty()));
    false
}

#[test]
fn said_once_and_only_on_failure() {
    let mut rng = Rng::new(11);
    for _ in 0..2000 {
        let size = 1 + rng.below(20);
        let holes: Vec<_> = (0..rng.below(6)).map(|_| rng.below(24)).collect();
        let mut said = Vec::new();
        let loaded = load(size, &holes, &mut said);
        assert_eq!(loaded, holes.iter().any(|hole| *hole >= size));
        let largest = holes.iter().max().map(|hole| short(size, *hole));
        let expected = (!loaded).then(|| largest.unwrap_or(short(64, 8)));
        assert_eq!(said, Vec::from_iter(expected), "{size} in {holes:?}");
    }
}
