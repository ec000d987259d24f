// SPDX-License-Identifier: GPL-2.0

//! Values of `kho_scratch=`, and the arithmetic on sizes.

use super::super::kho_param::{
    round_up,
    scaled,
    Scratch, //
};

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
        ("0200%", None),
        ("4294967295%", Some(Scratch::Scale(u32::MAX))),
        ("4294967296%", None),
        ("18446744073709551617%", None),
        ("0%", None),
        ("%", None),
        ("%%", None),
        ("5%%", None),
        ("-1%", None),
        ("+5%", None),
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
