// SPDX-License-Identifier: GPL-2.0

//! What there is to say of a handover.

use super::{
    kho_check::{
        check_tree,
        is_usable,
        larger_block,
        reaches_ram,
        Machine,
        Refusal,
        Sets,
        Stats, //
    },
    kho_fdt::{
        self,
        Blob,
        FdtError,
        HEADER_LEN, //
    },
    kho_grain::{
        frames_in,
        has_frames, //
    },
    kho_key::Key,
    kho_radix::{
        Node,
        NodeAddr,
        Run,
        Step,
        Tree,
        Visitor, //
    },
    kho_range::Frames,
    memory::Memory,
    PAGE_SHIFT, //
};
use crate::{
    dump::Dump,
    report::{
        Report,
        Subtree, //
    },
};
use dtb::{
    Reader,
    StructItem, //
};
use object::pod::bytes_of_slice_mut;
use std::{
    collections::BTreeSet,
    ops::Range, //
};

const PAGE: u64 = 1 << PAGE_SHIFT;

/// A root FDT has one page; more than this is not looked at.
const FDT_MAX: u64 = 128 << 10;

/// The value of `compatible` in the root node.
const COMPATIBLE: &[u8] = b"kho-v4\0";

/// A machine as a dump shows it: frames of RAM, and those of them outside scratch, ascending.
struct Map {
    ram: Vec<Frames>,
    usable: Vec<Frames>,
}

impl Map {
    fn new(ram: &[Range<u64>], scratch: &[Range<u64>]) -> Self {
        // Of RAM a page counts that is there as a whole, of scratch one that has any of it.
        let ram = ram.iter();
        let ram = ram.map(|it| Frames::between(it.start.div_ceil(PAGE), it.end / PAGE));
        let ram: Vec<_> = ram.filter(|frames| !frames.is_empty()).collect();
        let mut usable = ram.clone();
        for area in scratch {
            let (start, end) = (area.start / PAGE, area.end.div_ceil(PAGE));
            let rest = usable.iter().flat_map(|it| [it.until(start), it.from(end)]);
            usable = rest.filter(|frames| !frames.is_empty()).collect();
        }
        Self { ram, usable }
    }
}

/// Returns the first frames from `pfn` on.
fn next_frames(ranges: &[Frames], pfn: u64) -> Option<Frames> {
    let index = ranges.partition_point(|frames| frames.end() <= pfn);
    ranges.get(index).map(|frames| frames.from(pfn))
}

impl Machine for Map {
    fn ram_end(&self) -> u64 {
        self.ram.last().map_or(0, |frames| frames.end())
    }

    fn usable(&self, pfn: u64) -> Option<Frames> {
        next_frames(&self.usable, pfn).filter(|frames| frames.start() == pfn)
    }

    fn ram(&self, pfn: u64) -> Option<Frames> {
        next_frames(&self.ram, pfn)
    }
}

/// What a root FDT says.
#[derive(Default)]
struct Root {
    size: u32,
    compatible: Option<Vec<u8>>,
    map: Option<Vec<u8>>,
    /// The names of subtrees, their `preserved-data` and `blob-size`.
    subtrees: Vec<(String, [Option<Vec<u8>>; 2])>,
}

/// Reads the FDT at `phys`.
fn read_fdt(dump: &Dump, phys: u64) -> Result<Root, FdtError> {
    let mut header = [0; HEADER_LEN];
    if dump.read(phys, &mut header) < HEADER_LEN {
        return Err(FdtError::Magic);
    }
    let size = kho_fdt::total_size(&header, FDT_MAX)?;
    // The parser wants it aligned.
    let mut words = vec![0u64; size.div_ceil(8) as usize];
    let bytes = &mut bytes_of_slice_mut(&mut words)[..size as usize];
    let broken = FdtError::Format(0);
    if dump.read(phys, bytes) < bytes.len() {
        return Err(broken);
    }
    let mut items = Reader::read(bytes).map_err(|_| broken)?.struct_items();
    let (mut root, mut depth) = (Root::default(), 0u32);
    root.size = size;
    loop {
        match items.next_item() {
            Ok(StructItem::BeginNode { name }) => {
                depth += 1;
                // A blob may have a tree below its node; that is no subtree of KHO.
                if depth == 2 {
                    root.subtrees.push((name.to_owned(), [None, None]));
                }
            }
            Ok(StructItem::EndNode) => {
                depth = depth.checked_sub(1).ok_or(broken)?;
                if depth == 0 {
                    break;
                }
            }
            Ok(StructItem::Property { name, value }) => {
                let last = root.subtrees.last_mut();
                let place = match (depth, name, last) {
                    (0, ..) => return Err(broken),
                    (1, "compatible", _) => &mut root.compatible,
                    (1, "preserved-memory-map", _) => &mut root.map,
                    (2, "preserved-data", Some((_, [data, _]))) => data,
                    (2, "blob-size", Some((_, [_, size]))) => size,
                    _ => continue,
                };
                place.get_or_insert_with(|| value.to_owned());
            }
            Err(_) => return Err(broken),
        }
    }
    match root.compatible.as_deref() {
        Some(COMPATIBLE) => Ok(root),
        _ => Err(FdtError::Compatible),
    }
}

/// Returns where in the dump there are FDTs of KHO. A kernel that was handed over to may have left
/// some of the kernels before.
fn find_fdts(dump: &Dump) -> Vec<u64> {
    const CHUNK: u64 = 1 << 20;
    let mut found = Vec::new();
    let mut buffer = vec![0; CHUNK as usize];
    for piece in dump.pieces() {
        let mut next = piece.start.checked_next_multiple_of(PAGE);
        while let Some(at) = next.filter(|at| *at < piece.end) {
            let len = dump.read(at, &mut buffer[..CHUNK.min(piece.end - at) as usize]);
            for (page, addr) in buffer[..len]
                .chunks(PAGE as usize)
                .zip((at..).step_by(PAGE as usize))
            {
                if page.starts_with(&[0xd0, 0x0d, 0xfe, 0xed]) && read_fdt(dump, addr).is_ok() {
                    found.push(addr);
                }
            }
            // What cannot be read is left out page by page.
            next = at.checked_add((len as u64 / PAGE * PAGE).max(PAGE));
        }
    }
    found
}

/// Looks at the handover whose root FDT is at `fdt`, or at the one that there is.
pub(crate) fn inspect(
    dump: &Dump,
    fdt: Option<u64>,
    scratch: &[Range<u64>],
) -> Result<Report, String> {
    if let Some(fdt) = fdt {
        return check(dump, fdt, scratch);
    }
    // A kernel before this one may have left its FDT. Its tree has become something else since.
    let (mut best, mut valid) = (None, Vec::new());
    let found = find_fdts(dump);
    for fdt in &found {
        let report = check(dump, *fdt, scratch)?;
        if report.is_valid() {
            valid.push(format!("--fdt {fdt:#x}"));
        }
        let rank = |report: &Report| (report.is_valid(), report.nodes);
        if best.as_ref().is_none_or(|best| rank(&report) > rank(best)) {
            best = Some(report);
        }
    }
    if valid.len() > 1 {
        return Err(format!(
            "several handovers are valid: {}",
            valid.join(" or ")
        ));
    }
    let mut best = best.ok_or("no FDT of kexec handover in it")?;
    best.other_fdts = found.into_iter().filter(|fdt| *fdt != best.fdt).collect();
    Ok(best)
}

/// Checks the handover whose root FDT is at `fdt`.
fn check(dump: &Dump, fdt: u64, scratch: &[Range<u64>]) -> Result<Report, String> {
    let mut report = Report::new(fdt, PAGE);
    let no_memory = |_| "no memory".to_owned();
    let parsed = read_fdt(dump, fdt).and_then(|root| {
        report.fdt_size = root.size;
        Ok((kho_fdt::memory_map(root.map.as_deref())?, root))
    });
    let (addr, root) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            report.add(error.what(), fdt);
            return Ok(report);
        }
    };
    let memory = Memory::new(dump);
    let machine = Map::new(&dump.ram, scratch);
    let tree = Tree::from_root(&memory, addr);
    let sets = Sets::new(&memory).map_err(no_memory)?;
    let stats = check_tree(&tree, &machine, &sets).map_err(no_memory)?;
    report.root = addr.get();
    report.nodes = stats.nodes;
    report.pages = stats.frames;
    report.lost = stats.lost;
    let orders = stats.orders().map(|(order, count)| (order.get(), count));
    report.orders = orders.collect();
    let ranges = |set| {
        let ranges = frames_in(set, Frames::between(0, machine.ram_end()));
        ranges.map(|it| (it.phys(), it.bytes())).collect()
    };
    report.ranges = ranges(&sets.reserved);
    report.node_ranges = ranges(&sets.nodes);
    report.lost_ranges = ranges(&sets.lost);

    let is_preserved = |phys, size| {
        Frames::covering(phys, size).is_some_and(|frames| has_frames(&sets.reserved, frames))
    };
    if !is_preserved(fdt, root.size.into()) {
        report.add(Refusal::Fdt(fdt).what().0, fdt);
    }
    for (name, [data, size]) in root.subtrees {
        let blob = Blob::from_properties(data.as_deref(), size.as_deref());
        let preserved = blob.is_ok_and(|blob| is_preserved(blob.phys, blob.size));
        match blob {
            Ok(_) if preserved => {}
            Ok(blob) => report.add(&format!("the blob of {name} is not preserved"), blob.phys),
            Err(error) => report.add(&format!("{name}: {}", error.what()), fdt),
        }
        report.subtrees.push(Subtree {
            name,
            blob: blob.ok().map(|blob| (blob.phys, blob.size)),
            preserved,
        });
    }
    // The check counts, and knows the first of what is wrong. This names all of it.
    if stats.refusal.is_some() || stats.lost > 0 || stats.overlap.is_some() {
        tree.visit(&mut Finder {
            tree: &tree,
            machine: &machine,
            stats: &stats,
            seen: BTreeSet::new(),
            report: &mut report,
        });
    }
    for phys in memory.missing.borrow().iter() {
        report.add("tree node that the dump does not have", *phys);
    }
    Ok(report)
}

/// Names what is wrong with a tree.
struct Finder<'a> {
    tree: &'a Tree<&'a Memory<'a>>,
    machine: &'a Map,
    stats: &'a Stats,
    seen: BTreeSet<u64>,
    report: &'a mut Report,
}

impl Visitor for Finder<'_> {
    fn node(&mut self, addr: NodeAddr, first: u64, last: u64) -> Step {
        let phys = addr.get();
        let is_node = Frames::exact(phys, PAGE).is_some_and(|it| is_usable(self.machine, it));
        let refusal = if !is_node || !self.seen.insert(phys) {
            Refusal::Node(phys)
        } else if !reaches_ram(first, last, self.machine.ram_end()) {
            Refusal::Reach(phys)
        } else {
            return Step::In;
        };
        self.report.add(refusal.what().0, phys);
        Step::Over
    }

    fn leaf(&mut self, first: u64, leaf: &Node) -> bool {
        for (bit, count) in leaf.runs() {
            let Some(first) = Key::new(first | bit) else {
                continue;
            };
            for key in (Run { first, count }).keys() {
                let Some(block) = key.block() else {
                    self.report.add("key 0, which is no block", 0);
                    continue;
                };
                let order = block.order().get();
                if !is_usable(self.machine, Frames::of_block(block)) {
                    let what = format!("block of order {order} is not RAM outside scratch");
                    self.report.add(&what, block.pfn().phys());
                } else if self.stats.overlap.is_some()
                    && larger_block(self.tree, self.stats, self.machine, block).is_some()
                {
                    let what = format!("block of order {order} is preserved twice");
                    self.report.add(&what, block.pfn().phys());
                }
            }
        }
        true
    }
}
