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
        if let [percent @ .., b'%'] = text {
            // As kstrtouint() takes it: decimal, whatever it starts with, and there may be a plus.
            let percent = match percent {
                [b'+', percent @ ..] => percent,
                percent => percent,
            };
            let (percent, rest) = digits(percent, 10)?;
            let percent = u32::try_from(percent).ok()?;
            return (rest.is_empty() && percent != 0).then_some(Self::Scale(percent));
        }
        let (lowmem, rest) = size(text)?;
        let [b',', rest @ ..] = rest else { return None };
        let (global, rest) = size(rest)?;
        let [b',', rest @ ..] = rest else { return None };
        let (pernode, rest) = size(rest)?;
        // No machine has memory for a sum that does not fit in 64 bits.
        let sum = lowmem.checked_add(global)?.checked_add(pernode)?;
        (rest.is_empty() && sum != 0).then_some(Self::Sizes {
            lowmem,
            global,
            pernode,
        })
    }
}

/// What early boot has allocated, on one node or on all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Used {
    /// In low memory.
    pub(crate) low: u64,
    /// Anywhere.
    pub(crate) all: u64,
}

impl Used {
    /// Returns what is left when `size` bytes at `start`, which were allocated as well, do not
    /// count. Low memory ends at `low_limit`.
    #[link_section = ".init.text"]
    pub(crate) fn without(self, start: u64, size: u64, low_limit: u64) -> Self {
        Self {
            low: self
                .low
                .saturating_sub(size.min(low_limit.saturating_sub(start))),
            all: self.all.saturating_sub(size),
        }
    }
}

/// Less than this is never left to a kernel beside scratch.
const LEAST_LEFT: u64 = 64 << 20;

/// Returns how much memory has to be left that is neither scratch nor in use already, given what
/// early boot has allocated: a kernel that took so much to boot takes as much again to do anything.
#[link_section = ".init.text"]
pub(crate) fn floor(used: Used) -> u64 {
    used.all.max(LEAST_LEFT)
}

/// Returns the two parts of a scratch area, each as start and end, that are left in front of a
/// region and behind it. They begin and end at multiples of `align`, a power of two, if the area
/// does; what is empty ends where it starts.
#[link_section = ".init.text"]
pub(crate) fn cut(area: (u64, u64), region: (u64, u64), align: u64) -> [(u64, u64); 2] {
    let (start, end) = area;
    if region.0 >= end || region.1 <= start || region.0 >= region.1 {
        return [area, (end, end)];
    }
    let front = region.0 & !align.saturating_sub(1);
    let behind = round_up(region.1, align).unwrap_or(u64::MAX);
    [
        (start, front.clamp(start, end)),
        (behind.clamp(start, end), end),
    ]
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
fn number(text: &[u8]) -> Option<(u64, &[u8])> {
    match text {
        [b'0', b'x' | b'X', hex @ ..] => digits(hex, 16),
        [b'0', ..] => digits(text, 8),
        _ => digits(text, 10),
    }
}

/// Parses the digits that `text` starts with, at least one.
#[link_section = ".init.text"]
#[inline(never)]
fn digits(text: &[u8], radix: u8) -> Option<(u64, &[u8])> {
    let mut rest = text;
    let start = rest.len();
    let mut value = 0u64;
    while let [first, tail @ ..] = rest {
        let digit = match first {
            b'0'..=b'9' => first - b'0',
            b'a'..=b'f' => first - b'a' + 10,
            b'A'..=b'F' => first - b'A' + 10,
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
    let rest = (bytes % 100).saturating_mul(percent) / 100;
    round_up(whole.checked_add(rest)?, align)
}

/// Rounds `bytes` up to a multiple of `align`, a power of two.
#[link_section = ".init.text"]
pub(crate) fn round_up(bytes: u64, align: u64) -> Option<u64> {
    let mask = align.saturating_sub(1);
    Some(bytes.checked_add(mask)? & !mask)
}
