// SPDX-License-Identifier: GPL-2.0

//! The `kho_scratch=` parameter, and how large scratch gets.
//!
//! Two forms are known, see `Documentation/admin-guide/kernel-parameters.txt`:
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
    #[link_section = ".init.text"]
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let (first, rest) = number(text)?;
        if let [b'%'] = rest {
            // In decimal only: in C a leading 0 means nothing here, but in a size it does.
            let decimal = !matches!(text, [b'0', ..]);
            let percent = u32::try_from(first).ok()?;
            return (decimal && percent != 0).then_some(Self::Scale(percent));
        }
        let (lowmem, rest) = unit(first, rest)?;
        let [b',', rest @ ..] = rest else { return None };
        let (global, rest) = size(rest)?;
        let [b',', rest @ ..] = rest else { return None };
        let (pernode, rest) = size(rest)?;
        let any = lowmem | global | pernode != 0;
        (rest.is_empty() && any).then_some(Self::Sizes {
            lowmem,
            global,
            pernode,
        })
    }
}

/// What early boot has allocated, on one node or on all of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    /// In low memory.
    pub(crate) low: u64,
    /// Anywhere.
    pub(crate) all: u64,
}

// The sizes of the areas; [`None`] if one does not fit in 64 bits. In proportion, what early boot
// has allocated counts once: in the low area if it is low, in the area of its node if it has one,
// and otherwise in the global area.
impl Scratch {
    /// Returns the size of the area in low memory, given what `all` nodes used.
    #[link_section = ".init.text"]
    pub(crate) fn lowmem(self, all: Used, align: u64) -> Option<u64> {
        match self {
            Self::Scale(percent) => scaled(all.low, percent, align),
            Self::Sizes { lowmem, .. } => round_up(lowmem, align),
        }
    }

    /// Returns the size of the area of one of `nodes` nodes with memory, given what it used. If
    /// it is the only one, all areas are its own, and in proportion it has no more of them.
    #[link_section = ".init.text"]
    pub(crate) fn pernode(self, node: Used, nodes: u64, align: u64) -> Option<u64> {
        match self {
            Self::Scale(_) if nodes == 1 => Some(0),
            Self::Scale(percent) => scaled(node.all.saturating_sub(node.low), percent, align),
            Self::Sizes { pernode, .. } => round_up(pernode, align),
        }
    }

    /// Returns the size of the area anywhere, given what `all` nodes used and the size of all
    /// other areas.
    #[link_section = ".init.text"]
    pub(crate) fn global(self, all: Used, others: u64, align: u64) -> Option<u64> {
        match self {
            Self::Scale(percent) => Some(scaled(all.all, percent, align)?.saturating_sub(others)),
            Self::Sizes { global, .. } => round_up(global, align),
        }
    }
}

/// Parses a number as C writes it: hexadecimal after `0x`, octal after `0`, else decimal.
#[link_section = ".init.text"]
#[inline(never)]
fn number(text: &[u8]) -> Option<(u64, &[u8])> {
    let (radix, mut rest) = match text {
        [b'0', b'x' | b'X', hex @ ..] => (16, hex),
        [b'0', ..] => (8, text),
        _ => (10, text),
    };
    let start = rest.len();
    let mut value = 0u64;
    while let [first, tail @ ..] = rest {
        let digit = match first {
            b'0'..=b'9' => first.wrapping_sub(b'0'),
            b'a'..=b'f' => first.wrapping_sub(b'a' - 10),
            b'A'..=b'F' => first.wrapping_sub(b'A' - 10),
            _ => break,
        };
        if digit >= radix {
            break;
        }
        value = value.checked_mul(radix.into())?.checked_add(digit.into())?;
        rest = tail;
    }
    (rest.len() < start).then_some((value, rest))
}

/// Multiplies `value` by the unit that `text` starts with, if it does.
#[link_section = ".init.text"]
#[inline(never)]
fn unit(value: u64, text: &[u8]) -> Option<(u64, &[u8])> {
    let [first, rest @ ..] = text else {
        return Some((value, text));
    };
    let shift = match first | 0x20 {
        b'k' => 10,
        b'm' => 20,
        b'g' => 30,
        b't' => 40,
        b'p' => 50,
        b'e' => 60,
        _ => return Some((value, text)),
    };
    Some((value.checked_mul(1u64 << shift)?, rest))
}

/// Parses a size as `memparse()` does, but takes none that does not fit in 64 bits.
#[link_section = ".init.text"]
fn size(text: &[u8]) -> Option<(u64, &[u8])> {
    let (value, rest) = number(text)?;
    unit(value, rest)
}

/// Returns `percent` of `bytes`, rounded up to a multiple of `align`, a power of two; [`None`] if
/// that does not fit in 64 bits.
#[link_section = ".init.text"]
pub(crate) fn scaled(bytes: u64, percent: u32, align: u64) -> Option<u64> {
    let percent = u64::from(percent);
    let whole = (bytes / 100).checked_mul(percent)?;
    // OVERFLOW: Less than 100 times a 32-bit number.
    let rest = (bytes % 100).wrapping_mul(percent) / 100;
    round_up(whole.checked_add(rest)?, align)
}

/// Rounds `bytes` up to a multiple of `align`, a power of two.
#[link_section = ".init.text"]
pub(crate) fn round_up(bytes: u64, align: u64) -> Option<u64> {
    let mask = align.wrapping_sub(1);
    Some(bytes.checked_add(mask)? & !mask)
}
