// SPDX-License-Identifier: GPL-2.0

//! What stands in the root FDT.

use super::super::kho_fdt::{
    memory_map,
    total_size,
    Blob,
    FdtError, //
};
use super::super::PAGE_SHIFT;

/// The user can tell one mistake from another.
#[test]
fn mistakes_have_names() {
    let mistakes = [
        FdtError::Magic,
        FdtError::Size(1),
        FdtError::Format(1),
        FdtError::Compatible,
        FdtError::Map,
        FdtError::Blob,
        FdtError::Absent,
        FdtError::Exists,
        FdtError::Full,
    ];
    let names: std::collections::BTreeSet<_> = mistakes.iter().map(|it| it.what()).collect();
    assert_eq!(names.len(), mistakes.len());
}

fn header(magic: u32, size: u32) -> [u8; 8] {
    let mut header = [0; 8];
    header[..4].copy_from_slice(&magic.to_be_bytes());
    header[4..].copy_from_slice(&size.to_be_bytes());
    header
}

#[test]
fn sizes() {
    const MAGIC: u32 = 0xd00d_feed;
    for (magic, size, len, expected) in [
        (MAGIC, 40, 40, Ok(40)),
        (MAGIC, 40, 4096, Ok(40)),
        (MAGIC, 4096, 4096, Ok(4096)),
        (MAGIC, 4095, 4096, Ok(4095)),
        (MAGIC, u32::MAX, u64::MAX, Ok(u32::MAX)),
        // Larger than what was handed over, or cut off.
        (MAGIC, 4097, 4096, Err(FdtError::Size(4097))),
        (MAGIC, u32::MAX, 4096, Err(FdtError::Size(u32::MAX))),
        (MAGIC, 40, 39, Err(FdtError::Size(40))),
        (MAGIC, 40, 0, Err(FdtError::Size(40))),
        (
            MAGIC,
            u32::MAX,
            u64::from(u32::MAX) - 1,
            Err(FdtError::Size(u32::MAX)),
        ),
        // Shorter than any.
        (MAGIC, 39, 4096, Err(FdtError::Size(39))),
        (MAGIC, 0, 4096, Err(FdtError::Size(0))),
        (MAGIC.swap_bytes(), 4096, 4096, Err(FdtError::Magic)),
        (MAGIC + 1, 4096, 4096, Err(FdtError::Magic)),
        (0, 0, 0, Err(FdtError::Magic)),
    ] {
        assert_eq!(
            total_size(&header(magic, size), len),
            expected,
            "{magic:#x} {size} {len}"
        );
    }
}

#[test]
fn map() {
    let page = 1u64 << PAGE_SHIFT;
    for phys in [
        page,
        3 * page,
        0x1234_5678 << PAGE_SHIFT,
        u64::MAX - (page - 1),
    ] {
        // libfdt guarantees 4 bytes of alignment; no test of a wider one may depend on luck.
        for offset in 0..16 {
            let mut bytes = [0xa5; 32];
            bytes[offset..offset + 8].copy_from_slice(&phys.to_ne_bytes());
            let property = &bytes[offset..offset + 8];
            assert_eq!(memory_map(Some(property)).unwrap().get(), phys);
            let short = Some(&bytes[offset..offset + 7]);
            assert_eq!(memory_map(short), Err(FdtError::Map));
            let long = Some(&bytes[offset..offset + 9]);
            assert_eq!(memory_map(long), Err(FdtError::Map));
        }
    }
    for phys in [0, 1, 8, page - 1, page + 1, page / 2, u64::MAX] {
        let result = memory_map(Some(&phys.to_ne_bytes()));
        assert_eq!(result, Err(FdtError::Map), "{phys:#x}");
    }
    assert_eq!(memory_map(None), Err(FdtError::Map));
    assert_eq!(memory_map(Some(&[])), Err(FdtError::Map));
}

#[test]
fn blobs() {
    for (phys, size, good) in [
        (0x1000, 0x1000, true),
        (0x1003, 5, true),
        (1, u64::MAX, true),
        (u64::MAX, 1, true),
        (u64::MAX - 4095, 4096, true),
        // Past the end of the address space.
        (u64::MAX, 2, false),
        (2, u64::MAX, false),
        (u64::MAX - 4095, 4097, false),
        (1 << 63, (1 << 63) + 1, false),
        (0, 0x1000, false),
        // What is empty is nowhere.
        (0, 0, false),
        (0x1000, 0, false),
        (u64::MAX, 0, false),
    ] {
        let expected = good.then_some(Blob { phys, size }).ok_or(FdtError::Blob);
        for (i, j) in (0..8).flat_map(|i| (0..8).map(move |j| (i, j))) {
            let mut bytes = [0x5a; 40];
            bytes[i..i + 8].copy_from_slice(&phys.to_ne_bytes());
            bytes[20 + j..28 + j].copy_from_slice(&size.to_ne_bytes());
            let data = Some(&bytes[i..i + 8]);
            let size = Some(&bytes[20 + j..28 + j]);
            assert_eq!(Blob::from_properties(data, size), expected, "{phys:#x}");
            assert!(Blob::is_at(data, phys));
            assert!(!Blob::is_at(data, phys ^ 1 << 63));
        }
    }
    let (good, short, long) = ([8u8; 8], [8u8; 7], [8u8; 9]);
    for bad in [None, Some(&short[..]), Some(&long[..]), Some(&[][..])] {
        assert_eq!(Blob::from_properties(bad, Some(&good)), Err(FdtError::Blob));
        assert_eq!(Blob::from_properties(Some(&good), bad), Err(FdtError::Blob));
        assert!(!Blob::is_at(bad, 0));
    }
}
