// SPDX-License-Identifier: GPL-2.0

//! The `kho_scratch=` parameter, and how large scratch gets.
//!
//! Two forms are known, see
//! [`Documentation/admin-guide/kernel-parameters.txt`](srctree/Documentation/admin-guide/kernel-parameters.txt):
//!
//! - `kho_scratch=N%`: in proportion to what early boot has allocated;
//! - `kho_scratch=LOWMEM,GLOBAL,PERNODE`: sizes in bytes, with K, M, G, T, P or E behind them.

/// How large the scratch areas are to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scratch {
    /// Percent of what early boot has allocated, not 0.
    Scale(u32),
    /// Bytes of each area; not all of them 0.
    Sizes {
        /// In low memory.
        lowmem: u64,
        /// Anywhere.
        global: u64,
        /// On each node with memory.
        pernode: u64,
    },
}

impl Scratch {
    /// What is used when the parameter is absent or wrong: twice what this kernel needed.
    pub(crate) const DEFAULT: Self = Self::Scale(200);

    /// Parses the value of the parameter. [`None`] means that it is in neither form.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        if let Some(digits) = text.strip_suffix(b"%") {
            let (percent, rest) = digits_of(digits, 10)?;
            let percent = u32::try_from(percent).ok()?;
            return (rest.is_empty() && percent != 0).then_some(Self::Scale(percent));
        }
        let (lowmem, rest) = size(text)?;
        let (global, rest) = size(rest.strip_prefix(b",")?)?;
        let (pernode, rest) = size(rest.strip_prefix(b",")?)?;
        let any = lowmem | global | pernode != 0;
        (rest.is_empty() && any).then_some(Self::Sizes {
            lowmem,
            global,
            pernode,
        })
    }
}

/// Parses digits of `radix` and returns their value and what follows; at least one digit.
fn digits_of(text: &[u8], radix: u32) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let Some(digit) = char::from(*first).to_digit(radix) else {
            break;
        };
        value = value.checked_mul(radix.into())?.checked_add(digit.into())?;
        rest = tail;
    }
    (rest.len() < text.len()).then_some((value, rest))
}

/// Parses a size as `memparse()` does, but takes none that does not fit in 64 bits.
fn size(text: &[u8]) -> Option<(u64, &[u8])> {
    let (value, rest) = match text {
        [b'0', b'x' | b'X', hex @ ..] => digits_of(hex, 16)?,
        [b'0', b'0'..=b'7', ..] => digits_of(text, 8)?,
        _ => digits_of(text, 10)?,
    };
    let (shift, rest) = match rest {
        [b'K' | b'k', tail @ ..] => (10, tail),
        [b'M' | b'm', tail @ ..] => (20, tail),
        [b'G' | b'g', tail @ ..] => (30, tail),
        [b'T' | b't', tail @ ..] => (40, tail),
        [b'P' | b'p', tail @ ..] => (50, tail),
        [b'E' | b'e', tail @ ..] => (60, tail),
        _ => (0, rest),
    };
    Some((value.checked_mul(1u64 << shift)?, rest))
}

/// Returns `percent` of `bytes`, rounded up to a multiple of `align`, a power of two; [`None`] if
/// that does not fit in 64 bits.
pub(crate) fn scaled(bytes: u64, percent: u32, align: u64) -> Option<u64> {
    let percent = u64::from(percent);
    let whole = (bytes / 100).checked_mul(percent)?;
    // OVERFLOW: Less than 100 times a 32-bit number.
    let rest = (bytes % 100).wrapping_mul(percent) / 100;
    round_up(whole.checked_add(rest)?, align)
}

/// Rounds `bytes` up to a multiple of `align`, a power of two.
pub(crate) fn round_up(bytes: u64, align: u64) -> Option<u64> {
    let mask = align.wrapping_sub(1);
    Some(bytes.checked_add(mask)? & !mask)
}
