// SPDX-License-Identifier: GPL-2.0

//! kho-inspect on dumps that are made here, of sound handovers and of broken ones. The tree is
//! written by an encoder that shares nothing with the code that reads it.

use serde_json::{
    json,
    Value, //
};
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{
        Path,
        PathBuf, //
    },
    process::Command, //
};
use vm_fdt::FdtWriter;

const MIB: u64 = 1 << 20;
/// RAM, with a hole in it.
const RAM: [(u64, u64); 2] = [(MIB, 4 * MIB), (8 * MIB, 8 * MIB)];
const END: u64 = 16 * MIB;
const FDT: u64 = 2 * MIB;
const ROOT: u64 = FDT + 0x1_0000;
/// Nodes are made from here on.
const NODES: u64 = FDT + 0x2_0000;
const BLOB: u64 = 3 * MIB;
/// Memory that a test may use for something else.
const OTHER: u64 = 0x3f_0000;

const LOST: &str = "block of order 0 is not RAM outside scratch";
const NO_NODE: &str = "tree node outside usable memory, or met twice";
const MISSING: &str = "tree node that the dump does not have";
const NO_FDT: &str = "the FDT is not preserved";
const NO_BLOB: &str = "the blob of LUO is not preserved";
const BAD_BLOB: &str = "LUO: a subtree has no valid preserved-data or blob-size";

/// A segment of a dump: an address, where it is in the file as if that were memory, and how many
/// bytes are in the file and in memory.
type Segment = (u64, u64, u64, u64);

/// A machine's memory.
struct Memory {
    shift: u32,
    bytes: Vec<u8>,
    next: u64,
    notes: &'static str,
}

impl Memory {
    /// A handover of the FDT, a blob of two pages, and `blocks`, each a frame and an order.
    fn with_pages(shift: u32, blocks: &[(u64, u32)]) -> Self {
        let mut memory = Self {
            shift,
            bytes: vec![0; END as usize],
            next: NODES,
            notes: "",
        };
        let (fdt, blob) = (FDT >> shift, BLOB >> shift);
        for block in [(fdt, 0), (blob, 0), (blob + 1, 0)].iter().chain(blocks) {
            memory.add(*block);
        }
        memory.put_fdt(FDT, ROOT, (BLOB, 2 << shift));
        memory
    }

    fn new(blocks: &[(u64, u32)]) -> Self {
        Self::with_pages(12, blocks)
    }

    fn get(&self, phys: u64) -> u64 {
        let at = phys as usize;
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn put(&mut self, phys: u64, bytes: &[u8]) {
        self.bytes[phys as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn put_number(&mut self, phys: u64, number: u64) {
        self.put(phys, &number.to_le_bytes());
    }

    /// Writes other bytes where those of `old` are first, `back` bytes before them.
    fn replace(&mut self, old: &[u8], back: u64, new: &[u8]) {
        self.put(position(&self.bytes, old) - back, new);
    }

    /// The key of a block.
    fn key(&self, (pfn, order): (u64, u32)) -> u64 {
        1 << (64 - self.shift - order) | pfn >> order
    }

    /// The address of the entry for a block in the table at `level`. What it leads to is made.
    fn entry(&mut self, block: (u64, u32), level: u32) -> u64 {
        let (table, leaf) = (self.shift - 3, self.shift + 3);
        let top = (65 - self.shift - leaf).div_ceil(table);
        let (key, mut at) = (self.key(block), ROOT);
        for above in (level..=top).rev() {
            let index = key >> (leaf + table * (above - 1)) & ((1 << table) - 1);
            let entry = at + index * 8;
            if self.get(entry) == 0 {
                self.put_number(entry, self.next);
                self.next += 1 << self.shift;
            }
            if above == level {
                return entry;
            }
            at = self.get(entry);
        }
        unreachable!()
    }

    /// The leaf for a block.
    fn leaf(&mut self, block: (u64, u32)) -> u64 {
        let entry = self.entry(block, 1);
        self.get(entry)
    }

    fn add(&mut self, block: (u64, u32)) {
        let (leaf, key) = (self.leaf(block), self.key(block));
        let word = leaf + key % (8 << self.shift) / 64 * 8;
        self.put_number(word, self.get(word) | 1 << (key % 64));
    }

    fn put_fdt(&mut self, at: u64, root: u64, (phys, size): (u64, u64)) {
        let mut fdt = FdtWriter::new().unwrap();
        let mut nodes = vec![fdt.begin_node("").unwrap()];
        fdt.property_string("compatible", "kho-v4").unwrap();
        for (name, number) in [
            ("preserved-memory-map", root),
            ("preserved-data", phys),
            ("blob-size", size),
        ] {
            if name == "preserved-data" {
                nodes.push(fdt.begin_node("LUO").unwrap());
            }
            fdt.property(name, &number.to_le_bytes()).unwrap();
        }
        nodes.push(fdt.begin_node("below").unwrap());
        fdt.property_string("spare", "property").unwrap();
        while let Some(node) = nodes.pop() {
            fdt.end_node(node).unwrap();
        }
        self.put(at, &fdt.finish().unwrap());
    }

    /// Writes a core file: headers, the note, and all memory behind them.
    fn dump_as(&self, segments: &[Segment]) -> PathBuf {
        let text = self.notes.as_bytes();
        let mut notes = [11, text.len() as u32, 0].map(u32::to_le_bytes).concat();
        notes.extend([b"VMCOREINFO\0\0", text, &[0; 4]].concat());
        notes.truncate(notes.len() / 4 * 4);
        let (count, size) = (segments.len() as u64 + 1, notes.len() as u64);
        let at_notes = 64 + count * 56;
        let data = (at_notes + size).next_multiple_of(1 << self.shift);
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
        file.extend([0, 64, 0].map(u64::to_le_bytes).concat());
        let sizes = [0, 0, 64, 56, count as u16, 0, 0, 0];
        file.extend(sizes.map(u16::to_le_bytes).concat());
        let loads = segments.iter();
        let loads = loads.map(|it| (1, it.0, data.wrapping_add(it.1), it.2, it.3));
        for (kind, phys, offset, in_file, in_memory) in
            [(4, 0, at_notes, size, size)].into_iter().chain(loads)
        {
            file.extend([kind, 7].map(u32::to_le_bytes).concat());
            let numbers = [offset, 0, phys, in_file, in_memory, 4];
            file.extend(numbers.map(u64::to_le_bytes).concat());
        }
        file.extend(notes);
        file.resize(data as usize, 0);
        file.extend(&self.bytes);
        // Each test has a thread, and so a file.
        let path = path(std::thread::current().name().unwrap());
        fs::write(&path, file).unwrap();
        path
    }

    fn dump(&self) -> PathBuf {
        self.dump_as(&RAM.map(|(phys, size)| (phys, phys, size, size)))
    }
}

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn position(bytes: &[u8], wanted: &[u8]) -> u64 {
    let mut windows = bytes.windows(wanted.len());
    windows.position(|it| it == wanted).unwrap() as u64
}

/// Runs it; returns its exit status and what it prints.
fn run(dump: &Path, options: &str) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kho-inspect"));
    let command = command.arg(dump).args(options.split_whitespace());
    let output = command.output().unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    (output.status.code().expect("it was killed"), text)
}

/// Expects an exit status, and something of what is printed.
#[track_caller]
fn expect_text(dump: &Path, options: &str, status: i32, wanted: &str) {
    let (found, text) = run(dump, options);
    assert!(found == status && text.contains(wanted), "{found} {text}");
}

/// Expects violations, each with the addresses that it is about, and returns the report.
#[track_caller]
fn expect(dump: &Path, options: &str, violations: &[(&str, &[u64])]) -> Value {
    let (status, text) = run(dump, &format!("--json {options}"));
    let report: Value = serde_json::from_str(&text).expect(&text);
    let expected = violations.iter();
    let expected = expected.map(|(what, at)| json!({"what": what, "at": at}));
    assert_eq!(report["violations"], Value::Array(expected.collect()));
    assert_eq!(status, i32::from(!violations.is_empty()));
    report
}

#[test]
fn sound_handover() {
    for shift in [12, 14, 16] {
        let (page, at) = (1 << shift, (8 * MIB) >> shift);
        let blocks = [(at, 3), (at + 8, 1), (at + 10, 0), (at / 2, 0)];
        let memory = Memory::with_pages(shift, &blocks);
        let report = expect(&memory.dump(), &format!("--page-size={page}"), &[]);
        assert_eq!(report["pages"], 8 + 2 + 2 + 3);
        assert_eq!(report["nodes"], (memory.next - NODES) / page + 1);
        assert_eq!(report["orders"], json!([[0, 5], [1, 1], [3, 1]]));
        let ranges = [(FDT, 1), (BLOB, 2), (4 * MIB, 1), (8 * MIB, 11)];
        let ranges = ranges.map(|(phys, pages)| (phys, pages * page));
        assert_eq!(report["ranges"], json!(ranges));
        let luo = json!([{"name": "LUO", "blob": [BLOB, 2 * page], "preserved": true}]);
        assert_eq!(report["subtrees"], luo, "what is below is none");
    }
    let svg = path("sound.svg");
    let dump = Memory::new(&[(0x800, 9)]).dump();
    let wanted = "\nrange     0x800000-0xa00000\n0 violations\n";
    let options = format!("--ranges --svg={}", svg.display());
    expect_text(&dump, &options, 0, wanted);
    let svg = fs::read_to_string(svg).unwrap();
    let preserved = svg.matches("hsl(130,50%,35%)").count();
    assert_eq!(preserved, 515, "a square for each page");
    assert!(svg.contains("#36c"));
}

#[test]
fn page_size_of_the_dump() {
    let mut memory = Memory::with_pages(14, &[]);
    expect(&memory.dump(), "--page-size=0x4000", &[]);
    expect_text(&memory.dump(), "", 1, "VIOLATION");
    memory.notes = "OSRELEASE=7.3.4\nPAGESIZE=16384\nSYMBOL(a)=0\n";
    expect(&memory.dump(), "", &[]);
    expect_text(&memory.dump(), "--page-size=4096", 1, "VIOLATION");
    expect_text(&memory.dump(), "--page-size=8192", 2, "pages of 8192 bytes");
}

#[test]
fn broken_nodes() {
    let (block, far) = ((0x800, 9), (1 << 30, 0));
    for (level, bad) in [(1, 6 * MIB), (2, NODES + 1), (1, ROOT), (3, 1 << 40)] {
        let mut memory = Memory::new(&[block]);
        let entry = memory.entry(block, level);
        memory.put_number(entry, bad);
        let wanted = format!("VIOLATION {NO_NODE} ({bad:#x})");
        expect_text(&memory.dump(), "", 1, &wanted);
    }
    // All of them are named, also a node for memory behind the end of RAM.
    let mut memory = Memory::new(&[block, far]);
    for (block, bad) in [((FDT >> 12, 0), 6 * MIB), (block, 7 * MIB)] {
        let entry = memory.entry(block, 1);
        memory.put_number(entry, bad);
    }
    let reach = memory.entry(far, 2);
    let violations: &[(&str, &[u64])] = &[
        (NO_FDT, &[FDT]),
        (NO_BLOB, &[BLOB]),
        (NO_NODE, &[7 * MIB, 6 * MIB]),
        ("tree node covers no existing memory", &[memory.get(reach)]),
    ];
    expect(&memory.dump(), "", violations);
}

#[test]
fn broken_blocks() {
    // In the hole, half in it, and twice.
    let dump = Memory::new(&[(0x600, 0)]).dump();
    expect(&dump, "", &[(LOST, &[6 * MIB])]);
    let dump = Memory::new(&[(0x400, 9)]).dump();
    let what = "block of order 9 is not RAM outside scratch";
    let report = expect(&dump, "", &[(what, &[4 * MIB])]);
    assert_eq!(report["lost_ranges"], json!([[4 * MIB, MIB]]));
    let dump = Memory::new(&[(0x900, 3), (0x904, 0), (0x906, 0)]).dump();
    let what = "block of order 0 is preserved twice";
    expect(&dump, "", &[(what, &[0x90_4000, 0x90_6000])]);
    // The text names some of many, and JSON all.
    let pages: Vec<_> = (0x600..0x614).map(|pfn| (pfn, 0)).collect();
    let dump = Memory::new(&pages).dump();
    let at: Vec<_> = pages.iter().map(|(pfn, _)| pfn << 12).collect();
    expect(&dump, "", &[(LOST, &at)]);
    let end = format!("(0x607000)\nVIOLATION {LOST} (12 more: --json)\n20 violations\n");
    expect_text(&dump, "", 1, &end);
}

#[test]
fn broken_blobs() {
    for (phys, size, what, at) in [
        (BLOB, 0x3000, NO_BLOB, BLOB),
        (BLOB + 0x1000, 0x1001, NO_BLOB, BLOB + 0x1000),
        (BLOB, 0, BAD_BLOB, FDT),
        (BLOB, u64::MAX, BAD_BLOB, FDT),
    ] {
        let mut memory = Memory::new(&[]);
        memory.put_fdt(FDT, ROOT, (phys, size));
        expect(&memory.dump(), "", &[(what, &[at])]);
    }
}

#[test]
fn names() {
    let mut memory = Memory::new(&[]);
    memory.replace(b"LUO\0", 0, b"\"\x1b\n\0");
    let dump = memory.dump();
    let report = expect(&dump, "", &[]);
    assert_eq!(report["subtrees"][0]["name"], "\"\x1b\n");
    expect_text(&dump, "", 0, "subtree   \\\"\\u{1b}\\n: 8192 bytes");
}

#[test]
fn scratch() {
    let dump = Memory::new(&[(0x900, 0)]).dump();
    expect(&dump, "--scratch=0x8f0000,0x10001", &[(LOST, &[9 * MIB])]);
    expect(&dump, "--scratch=0x8f0000,0x10000", &[]);
    expect(&dump, "--scratch=0x901000,4096 --scratch=0x700000,1", &[]);
}

#[test]
fn broken_fdts() {
    let mut memory = Memory::new(&[]);
    let dump = memory.dump();
    for at in [ROOT, 0, 6 * MIB, END - 4, u64::MAX] {
        expect(&dump, &format!("--fdt={at}"), &[("no FDT is there", &[at])]);
    }
    // It is found if it says that it is one of KHO.
    memory.put_fdt(FDT, ROOT + 8, (BLOB, 1));
    let what = "the FDT has no valid preserved-memory-map";
    expect(&memory.dump(), "", &[(what, &[FDT])]);
    memory.replace(b"kho-v4", 0, b"kho-v5");
    expect_text(&memory.dump(), "", 2, "no FDT of kexec handover in it");
    let what = "the FDT is not compatible with kho-v4";
    expect(&memory.dump(), "--fdt=0x200000", &[(what, &[FDT])]);
    // One that is not preserved itself.
    let mut memory = Memory::new(&[]);
    let leaf = memory.leaf((FDT >> 12, 0));
    memory.put_number(leaf + FDT / 4096 / 64 * 8, 0);
    expect(&memory.dump(), "", &[(NO_FDT, &[FDT])]);
    // NOPs in the place of a property, and in that of the start of the root.
    let (mut memory, nop) = (Memory::new(&[]), [0, 0, 0, 4]);
    memory.replace(b"property\0", 12, &nop.repeat(6));
    expect(&memory.dump(), "", &[]);
    memory.replace(&[0, 0, 0, 1, 0, 0, 0, 0], 0, &nop.repeat(2));
    let dump = memory.dump();
    expect(&dump, "--fdt=0x200000", &[("the FDT is broken", &[FDT])]);
}

#[test]
fn random_damage_to_the_fdt() {
    let dump = Memory::new(&[]).dump();
    let bytes = fs::read(&dump).unwrap();
    let start = position(&bytes, &[0xd0, 0x0d, 0xfe, 0xed]);
    let sound = &bytes[start as usize..][..400];
    let file = fs::File::options().write(true).open(&dump).unwrap();
    let mut state = 1u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 33) % below
    };
    let count = std::env::var("KHO_FDTS").map_or(500, |count| count.parse().unwrap());
    for _ in 0..count {
        let mut fdt = sound.to_vec();
        for _ in 0..=random(3) {
            let at = random(400) as usize;
            let (flip, any) = (fdt[at] ^ 1 << random(8), random(256) as u8);
            fdt[at] = [1, 2, 3, 9, 0xff, flip, any][random(7) as usize];
        }
        file.write_all_at(&fdt, start).unwrap();
        let (status, text) = run(&dump, "--fdt=0x200000");
        assert!(status < 2, "{status} {text} {fdt:x?}");
    }
}

#[test]
fn several_fdts() {
    // A stale one, whose tree is gone, beside one with more violations.
    let mut memory = Memory::new(&[(0x600, 0), (0x602, 0)]);
    memory.put_fdt(FDT - 0x1000, OTHER, (BLOB, 1));
    let report = expect(&memory.dump(), "", &[(LOST, &[0x60_0000, 0x60_2000])]);
    assert_eq!(report["other_fdts"], json!([FDT - 0x1000]));
    // One that is not valid, as it is not preserved, and two that are.
    let mut memory = Memory::new(&[]);
    memory.put_fdt(FDT - 0x1000, ROOT, (BLOB, 1));
    expect(&memory.dump(), "", &[]);
    let mut memory = Memory::new(&[(OTHER >> 12, 0)]);
    memory.put_fdt(OTHER, ROOT, (BLOB, 1));
    let dump = memory.dump();
    expect_text(&dump, "", 2, "valid: --fdt 0x200000 or --fdt 0x3f0000\n");
    expect(&dump, "--fdt 0x3f0000", &[]);
}

#[test]
fn memory_that_is_not_in_the_dump() {
    // A leaf that lies behind the end of the file.
    let (block, last) = ((0x800, 9), END - 0x1000);
    let mut memory = Memory::new(&[block]);
    let (entry, leaf) = (memory.entry(block, 1), memory.leaf(block) as usize);
    memory.bytes.copy_within(leaf..leaf + 0x1000, last as usize);
    memory.put_number(entry, last);
    let dump = memory.dump();
    expect(&dump, "", &[]);
    let file = fs::File::options().write(true).open(&dump).unwrap();
    let size = file.metadata().unwrap().len();
    file.set_len(size - 1).unwrap();
    expect(&dump, "", &[(MISSING, &[last])]);
    // One that the tool left out; memory that is preserved may be.
    let dump = |size| memory.dump_as(&[(MIB, MIB, size, END - MIB)]);
    expect(&dump(END - MIB), "", &[]);
    expect(&dump(4 * MIB), "", &[(MISSING, &[last])]);
    // A page of which the last byte is not there.
    memory.add((0xffe, 0));
    let dump = memory.dump_as(&[(MIB, MIB, END, END - MIB - 0x1001)]);
    let lost = (LOST, &[0xff_e000][..]);
    expect(&dump, "", &[(NO_NODE, &[last]), lost]);
}

#[test]
fn segments_that_overlap() {
    let memory = Memory::new(&[(0x800, 9)]);
    let [low, high] = RAM.map(|(phys, size)| (phys, phys, size, size));
    let short = (MIB, 0, 0x1000, 0x1000);
    let middle = (FDT - 0x1000, FDT - 0x1000, 0x2000, 0x2000);
    let head = (MIB, MIB, MIB + 0x800, MIB + 0x800);
    let tail = (FDT, FDT, 3 * MIB, 3 * MIB);
    // One without an address, and others at the end of all.
    let none = (u64::MAX, 0, 0x1000, 0x1000);
    let past = (u64::MAX - 1, 0, 1, 1);
    let wraps = (1 << 63, 0, 1 << 63, 1 << 63);
    for segments in [
        vec![short, low, high],
        vec![low, short, high],
        vec![low, middle, high, none],
        vec![tail, high, head],
        vec![low, high, past, wraps],
        // A page that cannot be read before the FDT.
        vec![(FDT - 0x1000, 2 * END, 0x1000, 0x1000), tail, high],
        // More headers than fit into a MiB.
        [vec![(MIB, MIB, 0, 0); 20_000], vec![low, high]].concat(),
    ] {
        expect(&memory.dump_as(&segments), "", &[]);
    }
}

#[test]
fn no_dumps() {
    let dump = Memory::new(&[]).dump_as(&[]);
    expect_text(&dump, "", 2, "no memory in it");
    let head = fs::read(&dump).unwrap()[..100].to_vec();
    for bytes in [vec![], vec![0x5a; 5000], head] {
        fs::write(&dump, bytes).unwrap();
        expect_text(&dump, "", 2, "kho-inspect: ");
    }
    expect_text(Path::new("/nowhere"), "", 2, "No such file");
}
