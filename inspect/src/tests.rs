// SPDX-License-Identifier: GPL-2.0

//! Handovers in dumps that are made here, sound ones and broken ones. The tree is written by an
//! encoder that shares nothing with the code that reads it.

use crate::{
    core::kho_range::Frames,
    dump::Dump,
    print,
    report::{
        find_fdts,
        inspect,
        Report, //
    },
};
use std::{
    io::Write,
    ops::Range, //
};
use tempfile::NamedTempFile;
use vm_fdt::FdtWriter;

const PAGE: u64 = 4096;

/// RAM, with a hole in it.
const RAM: [Range<u64>; 2] = [0x10_0000..0x50_0000, 0x80_0000..0x100_0000];
const FDT: u64 = 0x20_0000;
const ROOT: u64 = 0x20_1000;
/// Nodes are made from here on.
const NODES: u64 = 0x20_2000;
const BLOB: u64 = 0x30_0000;

/// A machine's memory.
struct Memory {
    bytes: Vec<u8>,
    next: u64,
    blob: Option<(u64, u64)>,
}

impl Memory {
    /// A handover of the FDT, a blob of two pages, and `blocks`, each a frame and an order.
    fn new(blocks: &[(u64, u32)]) -> Self {
        let mut memory = Self {
            bytes: vec![0; RAM[1].end as usize],
            next: NODES,
            blob: Some((BLOB, 2 * PAGE)),
        };
        for (pfn, order) in [(FDT / PAGE, 0), (BLOB / PAGE, 0), (BLOB / PAGE + 1, 0)] {
            memory.add(pfn, order);
        }
        for (pfn, order) in blocks {
            memory.add(*pfn, *order);
        }
        memory
    }

    fn word(&mut self, phys: u64) -> &mut [u8; 8] {
        (&mut self.bytes[phys as usize..phys as usize + 8])
            .try_into()
            .unwrap()
    }

    /// The address of the entry for `key` in the table at `level`, and what is in it.
    fn entry(&mut self, key: u64, level: u32) -> (u64, u64) {
        let mut at = ROOT;
        for above in (level..=5).rev() {
            let entry = at + (key >> (15 + 9 * (above - 1)) & 511) * 8;
            let mut child = u64::from_le_bytes(*self.word(entry));
            if above == level {
                return (entry, child);
            }
            if child == 0 {
                child = self.next;
                self.next += PAGE;
                *self.word(entry) = child.to_le_bytes();
            }
            at = child;
        }
        unreachable!()
    }

    fn key(pfn: u64, order: u32) -> u64 {
        1 << (52 - order) | pfn >> order
    }

    fn add(&mut self, pfn: u64, order: u32) {
        let key = Self::key(pfn, order);
        let (entry, mut leaf) = self.entry(key, 1);
        if leaf == 0 {
            leaf = self.next;
            self.next += PAGE;
            *self.word(entry) = leaf.to_le_bytes();
        }
        let word = self.word(leaf + (key & 0x7fff) / 64 * 8);
        *word = (u64::from_le_bytes(*word) | 1 << (key % 64)).to_le_bytes();
    }

    /// Writes a core file: headers in front, RAM behind.
    fn dump(mut self) -> NamedTempFile {
        let mut fdt = FdtWriter::new().unwrap();
        let root = fdt.begin_node("").unwrap();
        fdt.property_string("compatible", "kho-v4").unwrap();
        fdt.property("preserved-memory-map", &ROOT.to_le_bytes())
            .unwrap();
        if let Some((phys, size)) = self.blob {
            let node = fdt.begin_node("LUO").unwrap();
            fdt.property("preserved-data", &phys.to_le_bytes()).unwrap();
            fdt.property("blob-size", &size.to_le_bytes()).unwrap();
            fdt.end_node(node).unwrap();
        }
        fdt.end_node(root).unwrap();
        let fdt = fdt.finish().unwrap();
        self.bytes[FDT as usize..FDT as usize + fdt.len()].copy_from_slice(&fdt);

        let mut file = NamedTempFile::new().unwrap();
        let header = [
            b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".as_slice(),
            &[4, 0, 62, 0, 1, 0, 0, 0],
            &[0; 8],
            &64u64.to_le_bytes(),
            &[0; 8],
            &[
                0,
                0,
                0,
                0,
                64,
                0,
                56,
                0,
                RAM.len() as u8,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
            ],
        ];
        file.write_all(&header.concat()).unwrap();
        let mut offset = PAGE;
        for piece in RAM {
            let size = piece.end - piece.start;
            file.write_all(&[1, 0, 0, 0, 7, 0, 0, 0]).unwrap();
            for number in [offset, 0, piece.start, size, size, 0] {
                file.write_all(&number.to_le_bytes()).unwrap();
            }
            offset += size;
        }
        file.write_all(&vec![0; (PAGE - 64 - 56 * RAM.len() as u64) as usize])
            .unwrap();
        for piece in RAM {
            file.write_all(&self.bytes[piece.start as usize..piece.end as usize])
                .unwrap();
        }
        file
    }

    fn report(self) -> Report {
        let file = self.dump();
        let dump = Dump::open(file.path()).unwrap();
        assert_eq!(find_fdts(&dump), [FDT]);
        inspect(&dump, FDT).unwrap()
    }
}

/// The addresses that violations are about, with the start of what they say.
fn violations(report: &Report) -> Vec<(&str, u64)> {
    let found = report.violations.iter();
    found.map(|(what, phys)| (what.as_str(), *phys)).collect()
}

#[test]
fn sound_handover() {
    let memory = Memory::new(&[(0x800, 9), (0xa00, 3), (0x400, 0), (0xa08, 0)]);
    let nodes = (memory.next - NODES) / PAGE + 1;
    let report = memory.report();
    assert_eq!(violations(&report), []);
    assert_eq!(
        (report.stats.frames, report.stats.nodes),
        (512 + 8 + 2 + 3, nodes)
    );
    let orders: Vec<_> = report
        .stats
        .orders()
        .map(|(of, count)| (of.get(), count))
        .collect();
    assert_eq!(orders, [(0, 5), (3, 1), (9, 1)]);
    let ranges: Vec<_> = report
        .preserved
        .iter()
        .map(|it| (it.start(), it.end()))
        .collect();
    assert_eq!(
        ranges,
        [
            (0x200, 0x201),
            (0x300, 0x302),
            (0x400, 0x401),
            (0x800, 0xa09)
        ]
    );
    assert!(report
        .subtrees
        .iter()
        .all(|it| it.name == "LUO" && it.is_preserved));
    let text = print::text(&report, true);
    assert!(text.contains("range     0x800000-0xa09000\n") && text.ends_with("0 violations\n"));
    let json = print::json(&report);
    assert_eq!(json["ranges"][3], serde_json::json!([0x80_0000, 0x20_9000]));
    assert_eq!(json["subtrees"][0]["size"], 2 * PAGE);
    let svg = print::svg(&report, RAM[1].end / PAGE);
    assert_eq!(
        svg.matches("hsl(130,50%,35%)").count(),
        525,
        "a square for each page"
    );
    assert!(svg.contains("#36c"));
}

#[test]
fn broken_nodes() {
    let key = Memory::key(0x800, 9);
    for (level, bad) in [(1, 0x60_0000), (2, NODES + 1), (1, ROOT), (3, 1 << 40)] {
        let mut memory = Memory::new(&[(0x800, 9)]);
        let (entry, _) = memory.entry(key, level);
        *memory.word(entry) = u64::to_le_bytes(bad);
        let report = memory.report();
        let what = "tree node outside usable memory, or met twice";
        assert_eq!(violations(&report)[0], (what, bad), "level {level}");
    }
    // A node for memory behind the end of RAM.
    let mut memory = Memory::new(&[]);
    memory.add(1 << 30, 0);
    let what = violations(&memory.report())[0].0.to_owned();
    assert_eq!(what, "tree node covers no existing memory");
}

#[test]
fn broken_blocks() {
    // In the hole, half in it, and twice.
    let report = Memory::new(&[(0x600, 0)]).report();
    assert_eq!(
        violations(&report),
        [("1 blocks are not RAM outside scratch", 0x60_0000)]
    );
    let report = Memory::new(&[(0x400, 9)]).report();
    assert_eq!(
        violations(&report),
        [("1 blocks are not RAM outside scratch", 0x40_0000)]
    );
    assert_eq!(report.lost.iter().map(|it| it.count()).sum::<u64>(), 0x100);
    let report = Memory::new(&[(0x900, 3), (0x904, 0)]).report();
    assert_eq!(
        violations(&report),
        [("memory is preserved twice", 0x90_4000)]
    );
}

#[test]
fn broken_blobs() {
    for (blob, what) in [
        ((BLOB, 3 * PAGE), "the blob of LUO is not preserved"),
        ((BLOB + PAGE, PAGE + 1), "the blob of LUO is not preserved"),
        (
            (BLOB, 0),
            "LUO: a subtree has no valid preserved-data or blob-size",
        ),
        (
            (BLOB, u64::MAX),
            "LUO: a subtree has no valid preserved-data or blob-size",
        ),
    ] {
        let mut memory = Memory::new(&[]);
        memory.blob = Some(blob);
        assert_eq!(violations(&memory.report())[0].0, what, "{blob:x?}");
    }
}

#[test]
fn scratch_and_fdt() {
    let file = Memory::new(&[(0x900, 0)]).dump();
    let mut dump = Dump::open(file.path()).unwrap();
    dump.add_scratch(Frames::between(0x8f0, 0x910));
    let report = inspect(&dump, FDT).unwrap();
    assert_eq!(
        violations(&report),
        [("1 blocks are not RAM outside scratch", 0x90_0000)]
    );
    // There is no FDT at other places, nor one that reaches beyond RAM.
    for at in [ROOT, 0, 0x60_0000, RAM[1].end - 4] {
        assert!(inspect(&dump, at).is_err(), "{at:#x}");
    }
    // An FDT that is not preserved itself.
    let mut memory = Memory::new(&[]);
    let (_, leaf) = memory.entry(Memory::key(FDT / PAGE, 0), 1);
    let word = leaf + FDT / PAGE / 64 * 8;
    *memory.word(word) = [0; 8];
    assert_eq!(
        violations(&memory.report()),
        [("the FDT is not preserved", FDT)]
    );
}

#[test]
fn no_dumps() {
    let mut file = NamedTempFile::new().unwrap();
    assert!(Dump::open(file.path()).is_err(), "an empty file");
    file.write_all(&[0x5a; 5000]).unwrap();
    assert!(Dump::open(file.path()).is_err(), "no ELF");
    assert!(Dump::open(std::path::Path::new("/nowhere")).is_err());
}
