// SPDX-License-Identifier: GPL-2.0

//! What `/sys/kernel/debug/kho/summary` shows: what is handed over, what was, and what of that has
//! not been restored.
//!
//! The figures of takeover are noted once, while the kernel boots. Everything else is counted when
//! the file is read, so that it costs nothing before.

use super::kho_check::Stats;
use super::kho_key::{
    Key,
    Order, //
};
use super::kho_mm::{
    self,
    Mark, //
};
use super::kho_nodemem;
use super::kho_place;
use super::kho_radix::{
    Node,
    NodeAddr,
    Step,
    Visitor, //
};
use super::kho_state;
use super::PAGE_SHIFT;
use kernel::{
    seq_file::SeqFile,
    seq_print,
    sync::SetOnce, //
};

/// Orders that a key can have.
const ORDERS: usize = Order::MAX.get() as usize + 1;

/// Blocks, counted by their order.
struct Blocks([u64; ORDERS]);

impl Blocks {
    const NONE: Self = Self([0; ORDERS]);

    fn add(&mut self, order: Order, count: u64) {
        if let Some(blocks) = self.0.get_mut(order.get() as usize) {
            *blocks = blocks.saturating_add(count);
        }
    }

    /// Prints a line for each order that there are blocks of, and one for all of them.
    fn print(&self, file: &SeqFile, what: &str) {
        let (mut blocks, mut size) = (0u64, 0u64);
        for (order, count) in Order::all().zip(self.0.iter().copied()) {
            if count == 0 {
                continue;
            }
            let kib = count.saturating_mul(order.pages() << PAGE_SHIFT) >> 10;
            seq_print!(
                file,
                "{what} order {}: {count} blocks, {kib} KiB\n",
                order.get()
            );
            blocks = blocks.saturating_add(count);
            size = size.saturating_add(kib);
        }
        seq_print!(file, "{what}: {blocks} blocks, {size} KiB\n");
    }
}

/// What takeover found.
struct Takeover {
    blocks: Blocks,
    nodes: u64,
    lost: u64,
    cycles: u64,
}

static TAKEOVER: SetOnce<Takeover> = SetOnce::new();

/// Notes what was taken over, and how many cycles that took.
#[link_section = ".init.text"]
pub(crate) fn note_takeover(stats: &Stats, cycles: u64) {
    let mut blocks = Blocks::NONE;
    for (order, count) in stats.orders() {
        blocks.add(order, count);
    }
    TAKEOVER.populate(Takeover {
        blocks,
        nodes: stats.nodes,
        lost: stats.lost,
        cycles,
    });
}

/// Why there is no handover, and about what address that is.
static REFUSAL: SetOnce<(&'static str, u64)> = SetOnce::new();

/// Notes why there is no handover. The first reason counts.
#[link_section = ".init.text"]
pub(crate) fn note_refusal(why: (&'static str, u64)) {
    REFUSAL.populate(why);
}

/// Counts the nodes of a tree, and the blocks that its keys name.
struct Count {
    nodes: u64,
    blocks: Blocks,
}

impl Visitor for Count {
    fn node(&mut self, _addr: NodeAddr, _first: u64, _last: u64) -> Step {
        self.nodes = self.nodes.saturating_add(1);
        Step::In
    }

    fn leaf(&mut self, first: u64, leaf: &Node) -> bool {
        // Only the largest orders share a leaf, and no memory has blocks of those.
        let block = Key::new(first).and_then(Key::block);
        if let Some(order) = block.map(|block| block.order()) {
            for (_, count) in leaf.runs() {
                self.blocks.add(order, count);
            }
        }
        true
    }
}

/// Prints all of it.
pub(crate) fn show(file: &SeqFile) {
    let yes = |is: bool| if is { "yes" } else { "no" };
    seq_print!(file, "implementation: rust\n");
    seq_print!(file, "enabled: {}\n", yes(kho_state::is_enabled()));
    let (count, size) = (kho_place::scratch().len(), kho_place::scratch_size());
    seq_print!(file, "scratch: {count} areas, {} KiB\n", size >> 10);
    show_outgoing(file);
    show_incoming(file);
}

fn show_outgoing(file: &SeqFile) {
    let Some(tree) = kho_state::out_tree() else {
        return;
    };
    let mut count = Count {
        nodes: 0,
        blocks: Blocks::NONE,
    };
    kho_nodemem::visit(&tree, &mut count);
    count.blocks.print(file, "out");
    seq_print!(file, "out nodes: {}\n", count.nodes);
    if let Ok((subtrees, bytes)) = kho_state::out_fdt_use() {
        seq_print!(file, "out fdt: {subtrees} subtrees, {bytes} bytes\n");
    }
}

fn show_incoming(file: &SeqFile) {
    if let Some((why, phys)) = REFUSAL.copy() {
        seq_print!(file, "in: refused: {why} ({phys:#x})\n");
        return;
    }
    let Some(takeover) = TAKEOVER.as_ref() else {
        seq_print!(file, "in: nothing\n");
        return;
    };
    takeover.blocks.print(file, "in");
    seq_print!(file, "in nodes: {}\n", takeover.nodes);
    seq_print!(file, "in lost: {} blocks\n", takeover.lost);
    seq_print!(file, "in cycles: {}\n", takeover.cycles);
    let mut left = Blocks::NONE;
    kho_mm::for_each_marked(Mark::Preserved, |order| left.add(order, 1));
    left.print(file, "in not restored");
}
