// SPDX-License-Identifier: GPL-2.0

//! Keys against the formula of the handover format.

use super::super::kho_key::{
    Block,
    Key,
    Order,
    Pfn,
    KEY_BITS, //
};
use super::super::kho_radix::{
    DEPTH,
    LEAF_BITS,
    TABLE_BITS, //
};
use super::super::PAGE_SHIFT;
use super::{
    abi,
    key,
    order,
    Rng, //
};

/// Frame numbers at and around every power of two, and some others.
fn pfns() -> Vec<u64> {
    let mut rng = Rng::new(1);
    let mut pfns: Vec<u64> = (0..64 - PAGE_SHIFT)
        .flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 1])
        .chain([abi::PFN_END - 1, abi::PFN_END - 2])
        .chain((0..100).map(|_| rng.below(abi::PFN_END)))
        .filter(|pfn| *pfn < abi::PFN_END)
        .collect();
    pfns.sort_unstable();
    pfns.dedup();
    pfns
}

#[test]
fn constants() {
    let (depth, leaf, table, width) = match PAGE_SHIFT {
        12 => (6, 15, 9, 53),
        14 => (5, 17, 11, 51),
        16 => (4, 19, 13, 49),
        _ => unreachable!(),
    };
    assert_eq!(
        (DEPTH, LEAF_BITS, TABLE_BITS, KEY_BITS),
        (depth, leaf, table, width)
    );
    assert_eq!((abi::DEPTH, abi::BITMAP_LOG2), (depth, leaf));
    assert_eq!((abi::TABLE_LOG2, abi::KEY_WIDTH), (table, width));
    assert_eq!(Key::MAX.get(), (1 << width) - 1);
}

#[test]
fn orders() {
    let max = 64 - PAGE_SHIFT;
    for number in 0..=max {
        assert_eq!(order(number).get(), number);
        assert_eq!(order(number).pages(), 1 << number);
    }
    for number in [max + 1, 64, 255, 256, 256 + 3, u32::MAX] {
        assert_eq!(Order::new(number), None, "{number}");
    }
    assert_eq!((Order::ZERO, Order::MAX), (order(0), order(max)));
    assert!(Order::all().map(Order::get).eq(0..=max));
}

#[test]
fn frames() {
    for pfn in pfns() {
        let phys = pfn << PAGE_SHIFT;
        let frame = Pfn::new(pfn).unwrap();
        assert_eq!((frame.get(), frame.phys()), (pfn, phys));
        assert_eq!(Pfn::from_phys(phys), Some(frame));
        for inside in [1, 8, (1 << PAGE_SHIFT) - 1] {
            assert_eq!(Pfn::from_phys(phys + inside), None);
            assert_eq!(Pfn::containing(phys + inside), frame);
        }
    }
    for pfn in [abi::PFN_END, abi::PFN_END + 1, u64::MAX] {
        assert_eq!(Pfn::new(pfn), None);
    }
}

#[test]
fn blocks_to_keys_and_back() {
    for at in Order::all() {
        let (first, last) = Key::bounds(at);
        assert_eq!(first.get(), abi::encode(0, at.get()));
        for pfn in pfns() {
            let frame = Pfn::new(pfn).unwrap();
            assert_eq!(Block::at(frame.phys(), at), Block::new(frame, at));
            assert_eq!(Block::at(frame.phys() + 1, at), None);
            let Some(block) = Block::new(frame, at) else {
                assert_ne!(pfn % at.pages(), 0);
                continue;
            };
            assert_eq!(pfn % at.pages(), 0);
            assert_eq!((block.pfn(), block.order()), (frame, at));
            let key = Key::of(block);
            assert_eq!(key.get(), abi::encode(pfn << PAGE_SHIFT, at.get()));
            assert!(first <= key && key <= last);
            assert_eq!(key.block(), Some(block));
            for above in Order::all() {
                let around = Block::around(frame, above);
                assert_eq!(around.order(), above);
                assert_eq!(around.pfn().get(), pfn / above.pages() * above.pages());
                assert_eq!(Key::around(frame, above), Key::of(around));
                let large = block.enclosing(above);
                let pages = above.max(at).pages();
                assert_eq!(large.order(), above.max(at));
                assert_eq!(large.pfn().get(), pfn / pages * pages);
            }
        }
        // The last block of the order ends where the address space does.
        let block = last.block().unwrap();
        assert_eq!(block.order(), at);
        assert_eq!(block.pfn().get() + at.pages(), abi::PFN_END);
    }
}

#[test]
fn keys_to_blocks_and_back() {
    let mut rng = Rng::new(2);
    let near = (0..KEY_BITS).flat_map(|bit| [(1u64 << bit) - 1, 1 << bit, (1 << bit) + 1]);
    let far = (0..1000).map(|_| rng.below(1 << 49));
    for number in near.chain(far).chain([Key::MAX.get() - 1, Key::MAX.get()]) {
        assert_eq!(key(number).get(), number);
        match key(number).block() {
            None => assert_eq!(number, 0),
            Some(block) => {
                assert_eq!(Key::of(block).get(), number);
                assert_eq!(abi::encode(block.pfn().phys(), block.order().get()), number);
            }
        }
    }
    for wide in [Key::MAX.get() + 1, Key::MAX.get() + 2, 1 << 63, u64::MAX] {
        assert_eq!(Key::new(wide), None);
    }
}

/// In a set of frames the number is the key; one that no frame has becomes one that some frame
/// has.
#[test]
fn numbers_of_frames() {
    for pfn in pfns() {
        assert_eq!(Key::of_frame(pfn), key(pfn));
        assert_eq!(Key::of_frame(pfn | abi::PFN_END), key(pfn));
    }
    assert_eq!(Key::of_frame(abi::PFN_END), key(0));
    assert_eq!(Key::of_frame(u64::MAX), key(abi::PFN_END - 1));
}

#[test]
fn orders_share_no_key() {
    let mut next = 1;
    for at in Order::all().collect::<Vec<_>>().into_iter().rev() {
        let (first, last) = Key::bounds(at);
        assert_eq!(first.get(), next);
        next = last.get() + 1;
    }
    assert_eq!(next, Key::MAX.get() + 1);
}
