// SPDX-License-Identifier: GPL-2.0

//! Frames, orders, blocks, and the keys by which the tree knows them.
//!
//! A preserved *block* is `2^order` page frames, aligned to its size. The handover format names it
//! by one number, the *key*: the block's frame number shifted right by its order, under one bit
//! whose place tells the order. With 4 KiB pages:
//!
//! ```text
//!  bit 52                                  0
//!      1 f f f f f f f f f f f f f f f f f f     order 0, f = frame number
//!      0 1 f f f f f f f f f f f f f f f f f     order 1, f = frame number >> 1
//!      0 0 1 f f f f f f f f f f f f f f f f     order 2, f = frame number >> 2
//! ```
//!
//! So the keys of one order are one interval of numbers, sorted by address, and no two blocks
//! share a key. The encoding is ABI:
//! [`include/linux/kho/abi/kexec_handover.h`](srctree/include/linux/kho/abi/kexec_handover.h).

use super::PAGE_SHIFT;

/// Bits in a frame number.
const PFN_BITS: u32 = u64::BITS - PAGE_SHIFT;

/// Bits in a key: a frame number and the bit that tells the order (`KHO_RADIX_KEY_WIDTH`).
pub(crate) const KEY_BITS: u32 = PFN_BITS + 1;

/// The order of a block: it has `2^order` pages.
///
/// # Invariants
///
/// At most [`Order::MAX`], so that shifting a frame number or `1u64` by it never overflows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Order(u8);

impl Order {
    /// The order of a page.
    pub(crate) const ZERO: Self = Self(0);

    /// The order of the block that is all of the address space; its key is 1.
    pub(crate) const MAX: Self = Self(PFN_BITS as u8);

    /// Returns `order` as a type, or [`None`] if no key has room for it.
    #[inline]
    pub(crate) const fn new(order: u32) -> Option<Self> {
        if order > Self::MAX.get() {
            return None;
        }
        // INVARIANT: Checked above.
        // CAST: `PFN_BITS` fits in 8 bits, and so does `order`.
        Some(Self(order as u8))
    }

    /// Returns the number.
    #[inline]
    pub(crate) const fn get(self) -> u32 {
        self.0 as u32
    }

    /// Returns the pages in a block of this order.
    #[inline]
    pub(crate) const fn pages(self) -> u64 {
        1u64.wrapping_shl(self.get())
    }

    /// Returns the bits of a frame number that are 0 in the first frame of a block of this order.
    #[inline]
    pub(crate) const fn mask(self) -> u64 {
        self.pages().saturating_sub(1)
    }

    /// Returns how many blocks of this order start below frame `pfn`.
    #[inline]
    pub(crate) fn blocks_below(self, pfn: u64) -> u64 {
        let whole = pfn.wrapping_shr(self.get());
        whole.saturating_add(u64::from(pfn & self.mask() != 0))
    }

    /// Returns the next smaller order, if there is one.
    #[inline]
    pub(crate) const fn below(self) -> Option<Self> {
        match self.0.checked_sub(1) {
            // INVARIANT: It is smaller than an order.
            Some(order) => Some(Self(order)),
            None => None,
        }
    }

    /// Returns all orders, smallest first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        // INVARIANT: The range ends at the maximum.
        (0..=Self::MAX.0).map(Self)
    }
}

/// A page frame number.
///
/// # Invariants
///
/// Less than `2^PFN_BITS`, so that its physical address fits in 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Pfn(u64);

impl Pfn {
    /// Returns `pfn` as a type, or [`None`] if it has no physical address.
    #[inline]
    pub(crate) const fn new(pfn: u64) -> Option<Self> {
        if pfn >> PFN_BITS != 0 {
            return None;
        }
        // INVARIANT: Checked above.
        Some(Self(pfn))
    }

    /// Returns the frame at `phys`, or [`None`] if `phys` is not the start of one.
    #[inline]
    pub(crate) const fn from_phys(phys: u64) -> Option<Self> {
        if phys & ((1 << PAGE_SHIFT) - 1) != 0 {
            return None;
        }
        Some(Self::containing(phys))
    }

    /// Returns the frame that `phys` lies in.
    #[inline]
    pub(crate) const fn containing(phys: u64) -> Self {
        // INVARIANT: The shift leaves `PFN_BITS` bits.
        Self(phys >> PAGE_SHIFT)
    }

    /// Returns the number.
    #[inline]
    pub(crate) const fn get(self) -> u64 {
        self.0
    }

    /// Returns the physical address of the frame.
    #[inline]
    pub(crate) const fn phys(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

/// A block of frames that is preserved and restored as one.
///
/// # Invariants
///
/// `pfn` is a multiple of the block's size. The block ends at or below `2^PFN_BITS` frames: both
/// its start and that end are multiples of its size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Block {
    pfn: Pfn,
    order: Order,
}

impl Block {
    /// Returns the block of `order` at `pfn`, or [`None`] if that is not aligned to its size.
    #[inline]
    pub(crate) const fn new(pfn: Pfn, order: Order) -> Option<Self> {
        let bits = order.get();
        if pfn.get().wrapping_shr(bits).wrapping_shl(bits) != pfn.get() {
            return None;
        }
        // INVARIANT: Checked above.
        Some(Self { pfn, order })
    }

    /// Returns the block of `order` at `phys`, or [`None`] if that is not aligned to its size.
    #[inline]
    pub(crate) fn at(phys: u64, order: Order) -> Option<Self> {
        Self::new(Pfn::from_phys(phys)?, order)
    }

    /// Returns the block of `order` that has frame `pfn`.
    #[inline]
    pub(crate) const fn around(pfn: Pfn, order: Order) -> Self {
        // INVARIANT: The low bits are cleared; a smaller number stays a frame number.
        Self {
            pfn: Pfn(pfn.get() & !order.mask()),
            order,
        }
    }

    /// Returns the block of `order` that `self` lies in, or `self` if `order` is not larger.
    #[inline]
    pub(crate) const fn enclosing(self, order: Order) -> Self {
        if order.get() <= self.order.get() {
            return self;
        }
        Self::around(self.pfn, order)
    }

    /// Returns the first frame.
    #[inline]
    pub(crate) const fn pfn(self) -> Pfn {
        self.pfn
    }

    /// Returns the order.
    #[inline]
    pub(crate) const fn order(self) -> Order {
        self.order
    }
}

/// A key of the tree.
///
/// Any number of up to [`KEY_BITS`] bits is a key, as users of `kho_radix_add_key()` may store
/// other things than blocks; [`Key::block`] tells what the preserved memory map means by it.
///
/// # Invariants
///
/// Less than `2^KEY_BITS`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Key(u64);

impl Key {
    /// The smallest key.
    pub(crate) const MIN: Self = Self(0);

    /// The largest key.
    pub(crate) const MAX: Self = Self((1 << KEY_BITS) - 1);

    /// Returns `key` as a type, or [`None`] if it is too wide for the tree.
    #[inline]
    pub(crate) const fn new(key: u64) -> Option<Self> {
        if key > Self::MAX.0 {
            return None;
        }
        // INVARIANT: Checked above.
        Some(Self(key))
    }

    /// Returns the number.
    #[inline]
    pub(crate) const fn get(self) -> u64 {
        self.0
    }

    /// Returns a frame's number, or that of a larger block, as the key it has in a set of such
    /// numbers. Numbers of frames that do not exist wrap around.
    #[inline]
    pub(crate) const fn of_frame(number: u64) -> Self {
        // INVARIANT: The mask leaves `PFN_BITS` bits.
        Self(number & ((1 << PFN_BITS) - 1))
    }

    /// Returns the key of `block`.
    #[inline]
    pub(crate) const fn of(block: Block) -> Self {
        Self::around(block.pfn(), block.order())
    }

    /// Returns the key of the block of `order` that has frame `pfn`.
    #[inline]
    pub(crate) const fn around(pfn: Pfn, order: Order) -> Self {
        let order = order.get();
        // INVARIANT: The order's bit is at most bit `PFN_BITS`, and the shifted frame number lies
        // below it.
        let bit = 1u64.wrapping_shl(PFN_BITS.wrapping_sub(order));
        Self(bit | pfn.get().wrapping_shr(order))
    }

    /// Returns the block that the key names, or [`None`] for 0, which names none.
    #[inline]
    pub(crate) const fn block(self) -> Option<Block> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.ilog2();
        let order = PFN_BITS.wrapping_sub(bit);
        // INVARIANT: By the type invariant `bit` is at most `PFN_BITS`, so `order` is a valid
        // order; what is below the bit has `PFN_BITS - order` bits, so that the shift back makes
        // a frame number whose low `order` bits are 0.
        Some(Block {
            pfn: Pfn((self.0 ^ 1u64.wrapping_shl(bit)).wrapping_shl(order)),
            order: Order(order as u8),
        })
    }

    /// Returns the first and the last key of `order`.
    #[inline]
    pub(crate) const fn bounds(order: Order) -> (Self, Self) {
        let first = 1u64.wrapping_shl(PFN_BITS.wrapping_sub(order.get()));
        // INVARIANT: Twice the largest `first`, less one, is `Key::MAX`.
        (Self(first), Self(first | first.wrapping_sub(1)))
    }
}
