// SPDX-License-Identifier: GPL-2.0

//! Takeover on large hosts, computed: what checking the handover takes, how much memory is withheld
//! until late, and how many blocks of 1 GiB are left for `hugepages=`.
//!
//! A host has virtual machines in a part of its memory, as folios of 2 MiB, and metadata of theirs
//! in the rest, as single pages wherever the page allocator had one: that is how LUO lists the
//! folios of a file. All of the check is what the kernel runs; only memblock is missing.

use super::kho_check::{
    self,
    Sets, //
};
use super::kho_grain::{
    self,
    region_limit, //
};
use super::kho_key::{
    Block,
    Key,
    Order,
    Pfn, //
};
use super::kho_radix::{
    Hints,
    Tree, //
};
use super::kho_range::Frames;
use super::{
    timed,
    Arena,
    Cpu,
    PAGE_SHIFT, //
};
use std::{
    collections::BTreeSet,
    time::Duration, //
};

/// The order of the page allocator's largest blocks on x86.
const GRAIN: u32 = 10;
const FOLIO: u32 = 9;
/// Frames in blocks of 1 GiB.
const GIB: u64 = 1 << (30 - PAGE_SHIFT);
const SIZES: [u64; 5] = [64, 256, 1024, 4096, 16384];
const SCATTERED: [u64; 3] = [1000, 5000, 20000];
/// Hundredths of memory that virtual machines have.
const SHARES: [u64; 2] = [0, 80];

struct Machine {
    end: u64,
}

impl kho_check::Machine for Machine {
    fn ram_end(&self) -> u64 {
        self.end
    }

    fn usable(&self, pfn: u64) -> Option<Frames> {
        let all = Frames::new(Pfn::containing(0), self.end)?;
        (pfn < self.end).then_some(all)
    }

    fn ram(&self, pfn: u64) -> Option<Frames> {
        self.usable(pfn)
    }
}

/// What a host has to hand over.
struct Host {
    gib: u64,
    /// Hundredths of memory that virtual machines have.
    share: u64,
    scattered: u64,
}

/// What takeover makes of it.
pub(super) struct Figures {
    host: Host,
    time: Duration,
    /// MiB that the check takes.
    memory: u64,
    regions: usize,
    /// MiB that are withheld although nobody preserved them: for grains, and in all.
    grains: u64,
    withheld: u64,
    /// Blocks of 1 GiB without anything that must stay: for us, and by C's rule.
    free: u64,
    c_free: u64,
}

fn block(pfn: u64, order: u32) -> Key {
    let order = Order::new(order).unwrap();
    Key::of(Block::new(Pfn::new(pfn).unwrap(), order).unwrap())
}

/// Returns the frames of a set of blocks of an order, in runs.
fn runs<'a>(set: &'a Tree<Cpu<'_>>, order: u32) -> impl Iterator<Item = (u64, u64)> + 'a {
    set.runs_between((Key::MIN, Key::MAX))
        .map(move |run| (run.first.get() << order, run.count << order))
}

/// Returns how many blocks of 1 GiB, of `end` frames, none of the runs is in.
fn free_blocks(end: u64, runs: impl Iterator<Item = (u64, u64)>) -> u64 {
    // As the kernel does it: from the end of a run, rounded up, to the start of the next.
    let (mut free, mut from) = (0, 0);
    for (start, count) in runs.chain([(end, 0)]) {
        free += (start / GIB).saturating_sub(from);
        from = (start + count).div_ceil(GIB);
    }
    free
}

fn take_over(host: Host, repeat: u32) -> Figures {
    let end = host.gib * GIB;
    let machine = Machine { end };
    // The first virtual machine starts behind what the kernel keeps for itself.
    let vms = (end * (100 - host.share) / 100) >> FOLIO;
    let mut pages = BTreeSet::new();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    while (pages.len() as u64) < host.scattered {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pages.insert(state % (vms << FOLIO));
    }

    let arena = Arena::new(((end >> (FOLIO + 15)) + (end >> 15) + 1024) as usize);
    let hints = Hints::default();
    let cpu = Cpu {
        arena: &arena,
        hints: &hints,
    };
    let tree = Tree::new(cpu).unwrap();
    for folio in vms..end >> FOLIO {
        tree.add(block(folio << FOLIO, FOLIO)).unwrap();
    }
    for pfn in &pages {
        tree.add(block(*pfn, 0)).unwrap();
    }

    let grain = Order::new(GRAIN).unwrap();
    let mut best: Option<Figures> = None;
    for _ in 0..repeat {
        let memory = Arena::new(((end >> 15) + 4096) as usize);
        let hints = Hints::default();
        let cpu = Cpu {
            arena: &memory,
            hints: &hints,
        };
        let sets = Sets::new(cpu).unwrap();
        let (nodes, reserved) = (&sets.nodes, &sets.reserved);
        let pending = &Tree::new(cpu).unwrap();
        let last = Key::of_frame(end - 1);
        let check = timed(|| {
            let stats = kho_check::check_tree(&tree, &machine, &sets).unwrap();
            assert!(stats.refusal.is_none() && stats.lost == 0);
            for (pfn, count) in runs(nodes, 0) {
                let frames = Frames::new(Pfn::new(pfn).unwrap(), count).unwrap();
                kho_grain::add_frames(reserved, frames).unwrap();
            }
            kho_grain::add_grains(reserved, last, grain, pending).unwrap();
        });
        let count = |set, order| runs(set, order).map(|(_, count)| count).sum::<u64>();
        let before = count(pending, GRAIN);
        let last = Key::of_frame((end - 1) >> GRAIN);
        let coarsen =
            timed(|| kho_grain::coarsen(pending, last, grain, region_limit(end)).unwrap());
        let mib = |frames: u64| frames >> (20 - PAGE_SHIFT);
        let kept = count(reserved, 0);
        let now = Figures {
            host: Host { ..host },
            time: check + coarsen,
            memory: mib(memory.used() as u64),
            regions: runs(pending, GRAIN).count(),
            grains: mib(before - kept),
            withheld: mib(count(pending, GRAIN) - kept),
            free: free_blocks(end, runs(pending, GRAIN)),
            c_free: free_blocks(end, runs(reserved, 0)),
        };
        if best.as_ref().is_none_or(|best| now.time < best.time) {
            best = Some(now);
        }
    }
    best.unwrap()
}

/// Computes all of it and prints a table.
pub(super) fn all(repeat: u32) -> Vec<Figures> {
    println!(
        "takeover on large hosts: virtual machines in folios of 2 MiB, and scattered single pages\n\
         {:>9}{:>6}{:>8}{:>10}{:>9}{:>9}{:>10}{:>10}{:>11}{:>9}",
        "GiB", "VMs", "pages", "check ms", "its MiB", "regions", "grains", "withheld", "free GiB", "in C"
    );
    let mut lines = Vec::new();
    for share in SHARES {
        for (gib, scattered) in SIZES
            .into_iter()
            .flat_map(|gib| SCATTERED.map(|n| (gib, n)))
        {
            let host = Host {
                gib,
                share,
                scattered,
            };
            let it = take_over(host, repeat);
            println!(
                "{gib:>9}{share:>5}%{scattered:>8}{:>10.2}{:>9}{:>9}{:>10}{:>10}{:>11}{:>9}",
                it.time.as_secs_f64() * 1e3,
                it.memory,
                it.regions,
                it.grains,
                it.withheld,
                it.free,
                it.c_free
            );
            lines.push(it);
        }
    }
    println!();
    lines
}

impl Figures {
    pub(super) fn json(&self) -> String {
        format!(
            r#"    {{"gib": {}, "vm_share": {}, "scattered": {}, "check_ms": {:.2}, "check_mib": {}, "regions": {}, "grains_mib": {}, "withheld_mib": {}, "free_gib": {}, "c_free_gib": {}}}"#,
            self.host.gib,
            self.host.share,
            self.host.scattered,
            self.time.as_secs_f64() * 1e3,
            self.memory,
            self.regions,
            self.grains,
            self.withheld,
            self.free,
            self.c_free
        )
    }
}
