// SPDX-License-Identifier: GPL-2.0

//! Looks at a kexec handover in a dump of a machine's memory.

mod core;
mod dump;
mod memory;
mod print;
mod report;
#[cfg(test)]
mod tests;

use crate::{
    core::{
        kho_check::Machine,
        kho_range::Frames, //
    },
    dump::Dump, //
};
use clap::Parser;
use std::{
    path::PathBuf,
    process::ExitCode, //
};

/// Looks at a kexec handover in a dump of a machine's memory, as the next kernel would.
///
/// The dump is an ELF core: QEMU's dump-guest-memory, kdump's, or /proc/kcore. The exit status is 0
/// if a kernel would take all of it over, 1 if something is wrong with it, and 2 if there is no
/// handover or the dump cannot be read.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The dump.
    dump: PathBuf,
    /// Where the root FDT is; else it is looked for.
    #[arg(long, value_name = "ADDRESS", value_parser = number)]
    fdt: Option<u64>,
    /// A scratch area, in which nothing can be preserved; may be given several times.
    #[arg(long, value_name = "ADDRESS,SIZE", value_parser = area)]
    scratch: Vec<Frames>,
    /// Print all ranges of preserved memory.
    #[arg(long)]
    ranges: bool,
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
    /// Draw physical memory.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| error.to_string())
}

fn area(text: &str) -> Result<Frames, String> {
    let (addr, size) = text.split_once(',').ok_or("not ADDRESS,SIZE")?;
    Frames::exact(number(addr)?, number(size)?).ok_or_else(|| "not made of pages".to_owned())
}

/// Returns whether a kernel would take all of it over.
fn run(options: &Options) -> Result<bool, String> {
    let mut dump = Dump::open(&options.dump)?;
    for area in &options.scratch {
        dump.add_scratch(*area);
    }
    let candidates = match options.fdt {
        Some(fdt) => vec![fdt],
        None => report::find_fdts(&dump),
    };
    // A kernel before this one may have left its FDT, whose tree is gone; the sound one counts.
    let mut reports = Vec::new();
    for fdt in &candidates {
        reports.push(report::inspect(&dump, *fdt)?);
    }
    if reports.len() > 1 {
        for report in &reports {
            let count = report.violations.len();
            eprintln!("kho-inspect: FDT at {:#x}, {count} violations", report.fdt);
        }
    }
    reports.sort_by_key(|report| report.violations.len());
    let report = reports.first().ok_or("no FDT of kexec handover in it")?;
    if options.json {
        println!("{:#}", print::json(report));
    } else {
        print!("{}", print::text(report, options.ranges));
    }
    if let Some(path) = &options.svg {
        std::fs::write(path, print::svg(report, dump.ram_end()))
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(report.violations.is_empty())
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("kho-inspect: {error}");
            ExitCode::from(2)
        }
    }
}
