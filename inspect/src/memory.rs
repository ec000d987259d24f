// SPDX-License-Identifier: GPL-2.0

//! Tree nodes: those of the dump, and those of the sets that a check fills.

use super::{
    kho_radix::{
        Guard,
        Hints,
        Node,
        NodeAddr,
        NodeMem,
        WORDS, //
    },
    PAGE_SHIFT, //
};
use crate::dump::Dump;
use elsa::FrozenMap;
use object::pod::bytes_of_slice_mut;
use std::cell::{
    Cell,
    RefCell, //
};

/// Addresses from here on are those of sets; no machine has memory there.
const SETS: u64 = 1 << 62;

/// Nodes by their address. Those of the dump are read when they are looked at, and stay.
pub(super) struct Memory<'a> {
    dump: &'a Dump,
    nodes: FrozenMap<u64, Box<Page>>,
    next: Cell<u64>,
    hints: Hints,
    /// Where nodes were looked at that the dump does not have.
    pub(super) missing: RefCell<Vec<u64>>,
}

/// A node as it is read: [`Node`] has the same layout, and any bits are a node.
#[repr(C, align(8))]
struct Page([u64; WORDS as usize]);

impl<'a> Memory<'a> {
    pub(super) fn new(dump: &'a Dump) -> Self {
        Self {
            dump,
            nodes: FrozenMap::new(),
            next: Cell::new(SETS),
            hints: Hints::default(),
            missing: RefCell::default(),
        }
    }

    fn page(&self, phys: u64) -> &Page {
        if let Some(page) = self.nodes.get(&phys) {
            return page;
        }
        let mut page = Box::new(Page([0; WORDS as usize]));
        if phys < SETS {
            let bytes = bytes_of_slice_mut(&mut page.0);
            if self.dump.read(phys, bytes) < bytes.len() {
                // What is there of it does not count.
                bytes.fill(0);
                self.missing.borrow_mut().push(phys);
            }
            for word in &mut page.0 {
                *word = u64::from_le(*word);
            }
        }
        self.nodes.insert(phys, page)
    }
}

/// Only this thread uses the trees.
pub(super) struct Alone<'a>(&'a Hints);

impl Guard for Alone<'_> {
    fn hints(&self) -> &Hints {
        self.0
    }

    fn generation(&self) -> u64 {
        0
    }
}

impl NodeMem for &Memory<'_> {
    type Guard<'b>
        = Alone<'b>
    where
        Self: 'b;

    fn enter(&self) -> Alone<'_> {
        Alone(&self.hints)
    }

    fn new_generation(&self) {}

    fn alloc(&self) -> Option<NodeAddr> {
        let addr = self.next.get();
        self.next.set(addr.checked_add(1 << PAGE_SHIFT)?);
        NodeAddr::new(addr)
    }

    fn free(&self, _node: NodeAddr) {}

    fn node(&self, addr: NodeAddr) -> &Node {
        let page: *const Page = self.page(addr.get());
        const _: () = assert!(size_of::<Page>() == size_of::<Node>());
        // SAFETY: The page lives as long as the map, and is never moved or written but through the
        // atomic words of a `Node`, for which any bits are valid and whose alignment it has. `Page`
        // is not looked at any more once it is in the map.
        unsafe { &*page.cast() }
    }
}
