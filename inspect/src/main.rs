// SPDX-License-Identifier: GPL-2.0

//! Looks at a kexec handover in a dump of a machine's memory.

mod dump;
mod report;

use crate::dump::Dump;
use clap::Parser;
use std::{
    error::Error,
    io::{
        BufWriter,
        Write, //
    },
    ops::Range,
    path::PathBuf,
    process::ExitCode, //
};

/// The pure core of kexec handover, from the files that go into the kernel, and what uses it here:
/// once for each page size that a kernel has.
macro_rules! core_with_page_shift {
    ($name:ident, $shift:literal, $grain:literal) => {
        #[allow(dead_code, clippy::duplicate_mod)]
        #[path = "."]
        mod $name {
            use core::sync::atomic;
            pub(crate) const PAGE_SHIFT: u32 = $shift;
            pub(crate) const GRAIN_ORDER: u32 = $grain;
            pub(crate) mod handover;
            #[path = "../../kho_check.rs"]
            pub(crate) mod kho_check;
            #[path = "../../kho_fdt.rs"]
            pub(crate) mod kho_fdt;
            #[path = "../../kho_grain.rs"]
            pub(crate) mod kho_grain;
            #[path = "../../kho_key.rs"]
            pub(crate) mod kho_key;
            #[path = "../../kho_radix.rs"]
            pub(crate) mod kho_radix;
            #[path = "../../kho_range.rs"]
            pub(crate) mod kho_range;
            #[path = "../../kho_word.rs"]
            pub(crate) mod kho_word;
            mod memory;
        }
    };
}

core_with_page_shift!(p4k, 12, 10);
core_with_page_shift!(p16k, 14, 11);
core_with_page_shift!(p64k, 16, 13);

/// Looks at a kexec handover in a dump of a machine's memory, as the next kernel would.
///
/// The dump is an ELF core: QEMU's dump-guest-memory, kdump's, or /proc/kcore. Other formats of
/// kdump are not read; makedumpfile -E writes ELF. RAM is what the dump has as memory, which may be
/// more than the kernel uses. The exit status is 0 if a kernel would take all of the handover over,
/// 1 if something is wrong with it, and 2 if there is none or the dump cannot be read.
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
    scratch: Vec<Range<u64>>,
    /// The size of a page, 4096, 16384 or 65536: else what the dump says (VMCOREINFO), or 4096.
    #[arg(long, value_name = "BYTES", value_parser = number)]
    page_size: Option<u64>,
    /// Print all ranges of preserved memory.
    #[arg(long)]
    ranges: bool,
    /// Print JSON instead of text, with all ranges and all violations.
    #[arg(long)]
    json: bool,
    /// Draw physical memory.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn number(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

fn area(text: &str) -> Result<Range<u64>, Box<dyn Error + Send + Sync>> {
    let (addr, size) = text.split_once(',').ok_or("not ADDRESS,SIZE")?;
    let addr = number(addr)?;
    let end = addr.checked_add(number(size)?);
    Ok(addr..end.ok_or("behind the end of memory")?)
}

/// Returns whether a kernel would take all of it over.
fn run(options: &Options) -> Result<bool, Box<dyn Error>> {
    let dump = Dump::open(&options.dump)?;
    let inspect = match options.page_size.or(dump.page_size).unwrap_or(4096) {
        0x1000 => p4k::handover::inspect,
        0x4000 => p16k::handover::inspect,
        0x1_0000 => p64k::handover::inspect,
        size => return Err(format!("no kernel has pages of {size} bytes").into()),
    };
    let report = inspect(&dump, options.fdt, &options.scratch)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    if options.json {
        serde_json::to_writer(&mut out, &report)?;
        writeln!(out)?;
    } else {
        report.write_text(&mut out, options.ranges)?;
    }
    out.flush()?;
    if let Some(path) = &options.svg {
        let end = dump.ram.last().map_or(0, |ram| ram.end);
        std::fs::write(path, report::svg(&report, end))
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(report.is_valid())
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("kho-inspect: {}: {error}", options.dump.display());
            ExitCode::from(2)
        }
    }
}
