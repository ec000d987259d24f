// SPDX-License-Identifier: GPL-2.0

//! Tree nodes: those of the dump, and those of the sets that a check fills.

use crate::{
    core::{
        kho_radix::{
            Guard,
            Hints,
            Node,
            NodeAddr,
            NodeMem,
            WORDS, //
        },
        PAGE_SHIFT, //
    },
    dump::Dump, //
};
use elsa::FrozenMap;
use std::cell::Cell;

/// Addresses from here on are those of sets; no machine has memory there.
const SETS: u64 = 1 << 62;

/// Nodes by their address. Those of the dump are read when they are looked at, and stay.
pub(crate) struct Memory<'a> {
    dump: &'a Dump,
    nodes: FrozenMap<u64, Box<Page>>,
    next: Cell<u64>,
    hints: Hints,
}

/// A node as it is read: [`Node`] has the same layout, and any bits are a node.
#[repr(C, align(8))]
struct Page([u64; WORDS as usize]);

impl<'a> Memory<'a> {
    pub(crate) fn new(dump: &'a Dump) -> Self {
        Self {
            dump,
            nodes: FrozenMap::new(),
            next: Cell::new(SETS),
            hints: Hints::default(),
        }
    }

    fn page(&self, phys: u64) -> &Page {
        if let Some(page) = self.nodes.get(&phys) {
            return page;
        }
        let mut bytes = vec![0; 1 << PAGE_SHIFT];
        // What cannot be read has no keys. The check lets only nodes be looked at that are RAM.
        let is_there = phys < SETS && self.dump.read(phys, &mut bytes);
        let mut page = Page([0; WORDS as usize]);
        if is_there {
            for (word, bytes) in page.0.iter_mut().zip(bytes.chunks_exact(8)) {
                *word = bytes.try_into().map_or(0, u64::from_le_bytes);
            }
        }
        self.nodes.insert(phys, Box::new(page))
    }
}

/// Only this thread uses the trees.
pub(crate) struct Alone<'a>(&'a Hints);

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
