// SPDX-License-Identifier: GPL-2.0

//! A report as text, JSON and a drawing.

use crate::{
    core::{
        kho_range::Frames,
        PAGE_SHIFT, //
    },
    report::Report, //
};
use serde_json::{
    json,
    Value, //
};
use std::fmt::Write;

fn kib(pages: u64) -> u64 {
    pages << (PAGE_SHIFT - 10)
}

/// Returns the report as lines of text, with all ranges if that is wanted.
pub(crate) fn text(report: &Report, with_ranges: bool) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let mut line = |text: String| {
        let _ = writeln!(out, "{text}");
    };
    let stats = &report.stats;
    line(format!(
        "FDT       {:#x}, {} bytes",
        report.fdt, report.fdt_size
    ));
    line(format!(
        "tree      {:#x}, {} nodes",
        report.root, stats.nodes
    ));
    for subtree in &report.subtrees {
        let name = &subtree.name;
        line(match subtree.blob {
            Ok(blob) => {
                let state = if subtree.is_preserved {
                    ""
                } else {
                    ", not preserved"
                };
                format!(
                    "subtree   {name}: {} bytes at {:#x}{state}",
                    blob.size, blob.phys
                )
            }
            Err(error) => format!("subtree   {name}: {}", error.what()),
        });
    }
    for (order, count) in stats.orders() {
        let pages = count.saturating_mul(order.pages());
        line(format!(
            "order {:3} {count} blocks, {} KiB",
            order.get(),
            kib(pages)
        ));
    }
    line(format!(
        "preserved {} pages, {} KiB, in {} ranges",
        stats.frames,
        kib(stats.frames),
        report.preserved.len()
    ));
    if with_ranges {
        for range in &report.preserved {
            let end = range.phys().saturating_add(range.bytes());
            line(format!("range     {:#x}-{end:#x}", range.phys()));
        }
    }
    for (what, phys) in &report.violations {
        line(format!("VIOLATION {what} ({phys:#x})"));
    }
    line(format!("{} violations", report.violations.len()));
    out
}

/// Returns the report as JSON.
pub(crate) fn json(report: &Report) -> Value {
    let ranges = |ranges: &[Frames]| {
        let each = ranges
            .iter()
            .map(|range| json!([range.phys(), range.bytes()]));
        each.collect::<Vec<_>>()
    };
    let subtrees = report.subtrees.iter().map(|subtree| {
        json!({
            "name": subtree.name,
            "phys": subtree.blob.ok().map(|blob| blob.phys),
            "size": subtree.blob.ok().map(|blob| blob.size),
            "preserved": subtree.is_preserved,
        })
    });
    let orders = report.stats.orders();
    let violations = report.violations.iter();
    json!({
        "fdt": report.fdt,
        "fdt_size": report.fdt_size,
        "root": report.root,
        "nodes": report.stats.nodes,
        "pages": report.stats.frames,
        "lost": report.stats.lost,
        "orders": orders.map(|(order, count)| json!([order.get(), count])).collect::<Vec<_>>(),
        "subtrees": subtrees.collect::<Vec<_>>(),
        "ranges": ranges(&report.preserved),
        "node_ranges": ranges(&report.nodes),
        "violations": violations.map(|(what, phys)| json!([what, phys])).collect::<Vec<_>>(),
    })
}

/// Squares of the drawing in a row, and rows.
const COLUMNS: u64 = 128;
const ROWS: u64 = 64;
const SQUARE: u64 = 8;

/// Returns a drawing of physical memory up to frame `end`: one square for as many frames each as
/// needed, green where all of it is preserved, lighter where less is, blue for nodes, red for what
/// is lost.
pub(crate) fn svg(report: &Report, end: u64) -> String {
    let per = end.div_ceil(COLUMNS * ROWS).max(1);
    let count = |ranges: &[Frames]| {
        let mut squares = vec![0u64; (COLUMNS * ROWS) as usize];
        for range in ranges {
            let mut rest = range.until(end);
            while !rest.is_empty() {
                let square = rest.start() / per;
                let part = rest.until((square + 1) * per);
                squares[square as usize] += part.count();
                rest = rest.from(part.end());
            }
        }
        squares
    };
    let (preserved, nodes, lost) = (
        count(&report.preserved),
        count(&report.nodes),
        count(&report.lost),
    );
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
            (_, _, pages) => format!("hsl(130,50%,{}%)", 80 - 45 * pages.min(per) / per),
        };
        let (x, y) = (index % COLUMNS * SQUARE, index / COLUMNS * SQUARE);
        let phys = (index * per) << PAGE_SHIFT;
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{0}\" height=\"{0}\" fill=\"{colour}\">\
             <title>{phys:#x}: {1} pages preserved</title></rect>",
            SQUARE - 1,
            preserved[at]
        );
    }
    out.push_str("</svg>\n");
    out
}
