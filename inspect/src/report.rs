// SPDX-License-Identifier: GPL-2.0

//! A report, as JSON by its fields, as text, and as a drawing.

use serde::Serialize;
use std::io::{
    Result,
    Write, //
};

/// How many places of one kind of violation the text names.
const PLACES: usize = 8;

/// A subtree, the address and size of its blob, and whether that is preserved as a whole.
#[derive(Serialize)]
pub(crate) struct Subtree {
    pub(crate) name: String,
    pub(crate) blob: Option<(u64, u64)>,
    pub(crate) preserved: bool,
}

/// Something that is wrong, and the physical addresses where it is.
#[derive(Serialize)]
struct Violation {
    what: String,
    at: Vec<u64>,
}

/// What there is to say of a handover. Addresses and sizes are in bytes.
#[derive(Default, Serialize)]
pub(crate) struct Report {
    pub(crate) fdt: u64,
    pub(crate) fdt_size: u32,
    /// Where there are others, which were not chosen.
    pub(crate) other_fdts: Vec<u64>,
    page_size: u64,
    pub(crate) root: u64,
    pub(crate) nodes: u64,
    pub(crate) pages: u64,
    pub(crate) lost: u64,
    /// Orders, and how many blocks of each can be taken over.
    pub(crate) orders: Vec<(u32, u64)>,
    pub(crate) subtrees: Vec<Subtree>,
    /// Preserved memory, nodes, and RAM in blocks that cannot be taken over: addresses and sizes.
    pub(crate) ranges: Vec<(u64, u64)>,
    pub(crate) node_ranges: Vec<(u64, u64)>,
    pub(crate) lost_ranges: Vec<(u64, u64)>,
    violations: Vec<Violation>,
}

impl Report {
    pub(crate) fn new(fdt: u64, page_size: u64) -> Self {
        Self {
            fdt,
            page_size,
            ..Self::default()
        }
    }

    /// Returns whether a kernel would take all of it over.
    pub(crate) fn is_valid(&self) -> bool {
        self.violations.is_empty()
    }

    /// Notes a violation.
    pub(crate) fn add(&mut self, what: &str, phys: u64) {
        let known = self.violations.iter_mut().find(|it| it.what == what);
        match known {
            Some(violation) => violation.at.push(phys),
            None => self.violations.push(Violation {
                what: what.to_owned(),
                at: vec![phys],
            }),
        }
    }

    /// Writes lines of text, with all ranges if that is wanted.
    pub(crate) fn write_text(&self, out: &mut impl Write, with_ranges: bool) -> Result<()> {
        let kib = |pages: u64| pages.saturating_mul(self.page_size / 1024);
        writeln!(out, "FDT       {:#x}, {} bytes", self.fdt, self.fdt_size)?;
        for fdt in &self.other_fdts {
            writeln!(out, "          another one, at {fdt:#x}, was not chosen")?;
        }
        writeln!(out, "tree      {:#x}, {} nodes", self.root, self.nodes)?;
        for subtree in &self.subtrees {
            // It may have anything in it that another kernel has left there.
            let name = subtree.name.escape_debug();
            match subtree.blob {
                None => writeln!(out, "subtree   {name}: no blob")?,
                Some((phys, size)) => {
                    let state = ["", ", not preserved"][usize::from(!subtree.preserved)];
                    writeln!(out, "subtree   {name}: {size} bytes at {phys:#x}{state}")?;
                }
            }
        }
        for (order, count) in &self.orders {
            let size = kib(count.saturating_mul(1 << order));
            writeln!(out, "order {order:3} {count} blocks, {size} KiB")?;
        }
        let (pages, ranges) = (self.pages, self.ranges.len());
        writeln!(
            out,
            "preserved {pages} pages, {} KiB, in {ranges} ranges",
            kib(pages)
        )?;
        for (phys, size) in self.ranges.iter().filter(|_| with_ranges) {
            writeln!(out, "range     {phys:#x}-{:#x}", phys.saturating_add(*size))?;
        }
        for violation in &self.violations {
            let (what, places) = (violation.what.escape_debug(), violation.at.len());
            for phys in violation.at.iter().take(PLACES) {
                writeln!(out, "VIOLATION {what} ({phys:#x})")?;
            }
            if places > PLACES {
                writeln!(out, "VIOLATION {what} ({} more: --json)", places - PLACES)?;
            }
        }
        let count: usize = self.violations.iter().map(|it| it.at.len()).sum();
        writeln!(out, "{count} violations")
    }
}

/// Squares of the drawing in a row, and rows.
const COLUMNS: u64 = 128;
const ROWS: u64 = 64;
const SQUARE: u64 = 8;

/// Returns a drawing of physical memory up to `end`: one square for as many pages each as needed,
/// green where all of it is preserved, lighter where less is, blue for nodes, red for what is lost.
pub(crate) fn svg(report: &Report, end: u64) -> String {
    let page = report.page_size;
    let per = (end / page).div_ceil(COLUMNS * ROWS).max(1) * page;
    let sum = |ranges: &[(u64, u64)]| {
        let mut squares = vec![0u64; (COLUMNS * ROWS) as usize];
        for (phys, size) in ranges {
            let (mut at, end) = (*phys, phys.saturating_add(*size));
            while at < end {
                let next = (at / per + 1).saturating_mul(per).min(end);
                squares[(at / per) as usize] += next - at;
                at = next;
            }
        }
        squares
    };
    let (preserved, nodes) = (sum(&report.ranges), sum(&report.node_ranges));
    let lost = sum(&report.lost_ranges);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" \
         viewBox=\"0 0 {0} {1}\">\n<rect width=\"100%\" height=\"100%\" fill=\"#eee\"/>\n",
        COLUMNS * SQUARE,
        ROWS * SQUARE
    );
    for index in 0..COLUMNS * ROWS {
        let at = index as usize;
        let colour = match (lost[at], nodes[at], preserved[at]) {
            (0, 0, 0) => continue,
            (1.., _, _) => "#c00".to_owned(),
            (_, 1.., 0) => "#36c".to_owned(),
            (_, _, size) => format!("hsl(130,50%,{}%)", 80 - 45 * (size / page) / (per / page)),
        };
        let (x, y) = (index % COLUMNS * SQUARE, index / COLUMNS * SQUARE);
        out.push_str(&format!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{0}\" height=\"{0}\" fill=\"{colour}\">\
             <title>{1:#x}: {2} pages preserved</title></rect>\n",
            SQUARE - 1,
            index * per,
            preserved[at] / page
        ));
    }
    out.push_str("</svg>\n");
    out
}
