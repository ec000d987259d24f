// SPDX-License-Identifier: GPL-2.0

//! Values of `kho_scratch=`, and the arithmetic on sizes.

use super::super::kho_param::{
    cut,
    floor,
    round_up,
    scaled,
    Scratch,
    Used, //
};
use super::Rng;

const M: u64 = 1 << 20;

fn sizes(lowmem: u64, global: u64, pernode: u64) -> Option<Scratch> {
    Some(Scratch::Sizes {
        lowmem,
        global,
        pernode,
    })
}

#[test]
fn values() {
    let table = [
        // In proportion.
        ("1%", Some(Scratch::Scale(1))),
        ("200%", Some(Scratch::Scale(200))),
        // kstrtouint() takes these.
        ("0200%", Some(Scratch::Scale(200))),
        ("00000000000000000000000000000000009%", Some(Scratch::Scale(9))),
        ("+5%", Some(Scratch::Scale(5))),
        ("+05%", Some(Scratch::Scale(5))),
        ("++5%", None),
        ("+-5%", None),
        ("+%", None),
        ("+0%", None),
        ("000%", None),
        // It takes the first of these as well, but nobody else does.
        ("5\n%", None),
        ("5%\n", None),
        ("\n5%", None),
        ("1M,2M,3M\n", None),
        ("4294967295%", Some(Scratch::Scale(u32::MAX))),
        ("4294967296%", None),
        ("18446744073709551617%", None),
        ("0%", None),
        ("%", None),
        ("%%", None),
        ("5%%", None),
        ("-1%", None),
        (" 5%", None),
        ("5 %", None),
        ("5M%", None),
        ("0x5%", None),
        ("5%,", None),
        ("1M,2M,3M%", None),
        // Sizes.
        ("16M,64M,16M", sizes(16 * M, 64 * M, 16 * M)),
        ("1K,1G,1T", sizes(1 << 10, 1 << 30, 1 << 40)),
        ("1k,1m,1g", sizes(1 << 10, M, 1 << 30)),
        ("1t,1p,1e", sizes(1 << 40, 1 << 50, 1 << 60)),
        ("2P,3E,0", sizes(2 << 50, 3 << 60, 0)),
        ("0,0,1", sizes(0, 0, 1)),
        ("0,1,0", sizes(0, 1, 0)),
        ("0x10M,010,7", sizes(16 * M, 8, 7)),
        ("0XaK,0xFf,00", sizes(10 << 10, 255, 0)),
        ("18446744073709551615,0,0", sizes(u64::MAX, 0, 0)),
        ("0xffffffffffffffff,0,0", sizes(u64::MAX, 0, 0)),
        ("15E,0,0", sizes(15 << 60, 0, 0)),
        ("18014398509481983K,0,0", sizes(((1 << 54) - 1) << 10, 0, 0)),
        ("18014398509481984K,0,0", None),
        ("18446744073709551616,0,0", None),
        ("0x10000000000000000,0,0", None),
        ("16E,0,0", None),
        ("0,0,16E", None),
        // In C these sums wrap around, the first one to 0, which is refused.
        ("8E,8E,0", None),
        ("8E,0,8E", None),
        ("0,8E,8E", None),
        ("8E,8E,1M", None),
        ("7E,8E,0", sizes(7 << 60, 8 << 60, 0)),
        ("8E,7E,0xfffffffffffffff", sizes(8 << 60, 7 << 60, (1 << 60) - 1)),
        ("8E,7E,1E", None),
        // These do not wrap around to zeroes, which would be refused for another reason.
        ("16E,1,0", None),
        ("17E,0,0", None),
        ("18014398509481985K,0,0", None),
        ("0,0,0", None),
        ("0M,0,0G", None),
        ("banana", None),
        ("", None),
        (",", None),
        (",,", None),
        ("16M", None),
        ("1M,2M", None),
        ("1M,2M,", None),
        ("1M,,2M", None),
        (",1M,2M", None),
        ("16M,64M,16M,", None),
        ("16M,64M,16M,1M", None),
        ("16M,64M,16Mb", None),
        ("16MM,64M,16M", None),
        ("16M;64M;16M", None),
        ("16M, 64M,16M", None),
        ("M,1,1", None),
        ("0x,1,1", None),
        ("0xg,1,1", None),
        // 8 and 9 are no octal digits: memparse() stops before them.
        ("08,1,1", None),
        ("1,09M,1", None),
        ("018,1,1", None),
        ("-1,0,0", None),
        ("+1,0,0", None),
    ];
    for (text, expected) in table {
        assert_eq!(Scratch::parse(text.as_bytes()), expected, "{text:?}");
    }
    assert_eq!(Scratch::parse(b"1M,2M,3M\xff"), None);
    assert_eq!(Scratch::DEFAULT, Scratch::parse(b"200%").unwrap());
}

#[test]
fn no_value_panics() {
    let letters = b"019xXKkE,%-g\xff";
    let count = letters.len();
    for number in 0..count.pow(5) {
        let digits = (0..5).map(|i| letters[number / count.pow(i) % count]);
        let text: Vec<u8> = digits.collect();
        if let Some(Scratch::Sizes {
            lowmem,
            global,
            pernode,
        }) = Scratch::parse(&text)
        {
            assert_ne!(lowmem | global | pernode, 0);
        }
    }
}

#[test]
fn scaling() {
    let bytes = [
        0,
        1,
        49,
        50,
        99,
        100,
        101,
        12345,
        M - 1,
        M,
        1 << 40,
        u64::MAX / 2,
        u64::MAX,
    ];
    for bytes in bytes {
        for percent in [0, 1, 50, 99, 100, 101, 200, 12345, u32::MAX] {
            for align in [1, 4096, 4 * M, 1 << 63] {
                let exact = u128::from(bytes) * u128::from(percent) / 100;
                let align = u128::from(align);
                let exact = exact.div_ceil(align) * align;
                let result = scaled(bytes, percent, align as u64);
                assert_eq!(
                    result,
                    u64::try_from(exact).ok(),
                    "{bytes} {percent} {align}"
                );
            }
        }
    }
}

#[test]
fn rounding() {
    for (bytes, align, expected) in [
        (0, 4096, Some(0)),
        (1, 4096, Some(4096)),
        (4095, 4096, Some(4096)),
        (4096, 4096, Some(4096)),
        (4097, 4096, Some(8192)),
        (u64::MAX, 1, Some(u64::MAX)),
        (u64::MAX - 4095, 4096, Some(u64::MAX - 4095)),
        (u64::MAX - 4094, 4096, None),
        (u64::MAX, 4096, None),
        (1, 1 << 63, Some(1 << 63)),
        (1 << 63, 1 << 63, Some(1 << 63)),
        ((1 << 63) + 1, 1 << 63, None),
    ] {
        assert_eq!(round_up(bytes, align), expected, "{bytes} {align}");
    }
}

/// The sizes of the low area, the global one and those of the nodes.
fn areas(scratch: Scratch, nodes: &[(u64, u64)], nowhere: (u64, u64)) -> (u64, u64, Vec<u64>) {
    const ALIGN: u64 = 4 * M;
    let used = |&(low, high): &(u64, u64)| Used {
        low,
        all: low + high,
    };
    let mut all = used(&nowhere);
    for node in nodes {
        all.low += node.0;
        all.all += node.0 + node.1;
    }
    let low = scratch.lowmem(all, ALIGN).unwrap();
    let pernode: Vec<u64> = nodes
        .iter()
        .map(|node| scratch.pernode(used(node), nodes.len() as u64, ALIGN))
        .map(Option::unwrap)
        .collect();
    let others = low + pernode.iter().sum::<u64>();
    (low, scratch.global(all, others, ALIGN).unwrap(), pernode)
}

#[test]
fn areas_in_proportion() {
    let scale = Scratch::DEFAULT;
    // All memory is low.
    let sizes = areas(scale, &[(33 * M, 0)], (0, 0));
    assert_eq!(sizes, (68 * M, 0, vec![0]));
    let sizes = areas(scale, &[(20 * M, 0), (13 * M, 0)], (0, 0));
    assert_eq!(sizes, (68 * M, 0, vec![0, 0]));
    // The only node has no area of its own, whatever it used.
    let sizes = areas(scale, &[(80 * M, 72 * M)], (0, 0));
    assert_eq!(sizes, (160 * M, 144 * M, vec![0]));
    // Each node has what it used above low memory, and the global area the rest.
    let sizes = areas(scale, &[(20 * M, 30 * M), (0, 50 * M)], (64 * M, 9 * M));
    assert_eq!(sizes, (168 * M, 20 * M, vec![60 * M, 100 * M]));
    // What rounding up added elsewhere is not added again.
    let sizes = areas(scale, &[(M, M), (M, M)], (0, 2 * M));
    assert_eq!(sizes, (4 * M, 0, vec![4 * M, 4 * M]));
    // A kernel that used nothing has no scratch.
    assert_eq!(areas(scale, &[(0, 0)], (0, 0)), (0, 0, vec![0]));
    // Another percentage is one of the same.
    let scale = Scratch::parse(b"300%").unwrap();
    let sizes = areas(scale, &[(20 * M, 30 * M), (0, 50 * M)], (64 * M, 8 * M));
    assert_eq!(sizes, (252 * M, 20 * M, vec![92 * M, 152 * M]));
    let scale = Scratch::parse(b"50%").unwrap();
    assert_eq!(areas(scale, &[(33 * M, 0)], (0, 0)), (20 * M, 0, vec![0]));
}

#[test]
fn areas_are_all_that_was_used_once() {
    let mut rng = Rng::new(11);
    for _ in 0..1000 {
        let nodes: Vec<_> = (0..1 + rng.below(4))
            .map(|_| (rng.below(500 * M), rng.below(500 * M)))
            .collect();
        let nowhere = (rng.below(100 * M), rng.below(100 * M));
        let percent = 1 + rng.below(400) as u32;
        let (low, global, pernode) = areas(Scratch::Scale(percent), &nodes, nowhere);
        let used: u64 = nodes.iter().chain([&nowhere]).map(|(a, b)| a + b).sum();
        let total = low + global + pernode.iter().sum::<u64>();
        let exact = used * u64::from(percent) / 100;
        // Each area may be up to one alignment larger.
        let slack = 4 * M * (2 + pernode.len() as u64);
        assert!(total >= exact && total < exact + slack, "{total} {exact}");
        assert_eq!(pernode == [0], pernode.len() == 1);
    }
}

#[test]
fn areas_by_size() {
    let sizes = Scratch::parse(b"16M,63M,1K").unwrap();
    for nodes in [vec![(M, M)], vec![(M, M), (M, 0)]] {
        let pernode = vec![4 * M; nodes.len()];
        assert_eq!(areas(sizes, &nodes, (0, 0)), (16 * M, 64 * M, pernode));
    }
    let sizes = Scratch::parse(b"0,15E,1").unwrap();
    let used = Used { low: M, all: M };
    assert_eq!(sizes.lowmem(used, 4 * M), Some(0));
    assert_eq!(sizes.global(used, 15 << 60, 4 * M), Some(15 << 60));
    let most = |text: &str| Scratch::parse(text.as_bytes()).unwrap();
    let sizes = most("18446744073709551615,0,0");
    assert_eq!(sizes.lowmem(used, 4 * M), None);
    let sizes = most("0,0xffffffffffffffff,0");
    assert_eq!(sizes.global(used, 0, 4 * M), None);
    let sizes = most("0,0,01777777777777777777777");
    assert_eq!(sizes.pernode(used, 1, 4 * M), None);
}

#[test]
fn regions_that_do_not_count() {
    let used = Used {
        low: 100 * M,
        all: 300 * M,
    };
    for (start, size, low, all) in [
        (16 * M, 0, 100, 300),
        (16 * M, 30 * M, 70, 270),
        // Half of it is low.
        (4000 * M, 192 * M, 4, 108),
        (4096 * M, 30 * M, 100, 270),
        (5000 * M, 30 * M, 100, 270),
        (16 * M, 400 * M, 0, 0),
        (u64::MAX, u64::MAX, 100, 0),
    ] {
        let expected = Used {
            low: low * M,
            all: all * M,
        };
        let left = used.without(start, size, 4096 * M);
        assert_eq!(left, expected, "{start:#x} {size:#x}");
    }
}

#[test]
fn what_is_left_at_least() {
    let left = |all| floor(Used { low: 0, all });
    assert_eq!(left(0), 64 * M);
    assert_eq!(left(64 * M), 64 * M);
    assert_eq!(left(65 * M), 65 * M);
    assert_eq!(left(u64::MAX), u64::MAX);
}

#[test]
fn areas_are_cut() {
    const ALIGN: u64 = 4;
    let area = (8, 24);
    for start in 0..32 {
        for end in 0..32 {
            let [front, behind] = cut(area, (start, end), ALIGN);
            for part in [front, behind] {
                assert!(part.0 <= part.1 && part.0 >= area.0 && part.1 <= area.1);
                assert!(part.0 % ALIGN == 0 && part.1 % ALIGN == 0);
            }
            // Exactly the granules that have part of the region are gone.
            for granule in (area.0..area.1).step_by(ALIGN as usize) {
                let taken = start < end && start < granule + ALIGN && end > granule;
                let left = [front, behind]
                    .iter()
                    .filter(|part| part.0 <= granule && granule + ALIGN <= part.1)
                    .count();
                assert_eq!(left, usize::from(!taken), "{start}..{end} at {granule}");
            }
        }
    }
    // What lies outside does not matter, even to an area that is not aligned.
    for outside in [(3, 5), (26, 27)] {
        assert_eq!(cut((6, 25), outside, ALIGN), [(6, 25), (25, 25)]);
    }
    let all = (0, u64::MAX & !3);
    assert_eq!(cut(all, (u64::MAX - 1, u64::MAX), 4), [all, (all.1, all.1)]);
    let end = (all.1 - 4, all.1);
    assert_eq!(cut(end, (all.1 - 2, u64::MAX), 4), [(end.0, end.0), (end.1, end.1)]);
}
