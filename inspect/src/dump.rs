// SPDX-License-Identifier: GPL-2.0

//! A dump of a machine's memory: an ELF core, as QEMU's `dump-guest-memory`, kdump and
//! `/proc/kcore` have it. It is read piece by piece.

use crate::core::{
    kho_check::Machine,
    kho_range::Frames,
    PAGE_SHIFT, //
};
use object::{
    elf,
    read::elf::{
        FileHeader,
        ProgramHeader, //
    },
    LittleEndian, //
};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path, //
};

/// Program headers are looked for in as many bytes at the start of the file.
const HEADERS: usize = 1 << 20;

/// A piece of RAM, in bytes: where it is, how long it is, and where in the file.
struct Segment {
    phys: u64,
    size: u64,
    offset: u64,
}

/// A dump.
///
/// # Invariants
///
/// `segments` are sorted by address, do not overlap, and none wraps around.
pub(crate) struct Dump {
    file: File,
    segments: Vec<Segment>,
    /// Scratch areas, which hold nothing that is preserved.
    scratch: Vec<Frames>,
}

impl Dump {
    /// Opens a dump and reads where it has which memory.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let say = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let file = File::open(path).map_err(|error| say(&error))?;
        let mut head = vec![0; HEADERS];
        let mut len = 0;
        while len < head.len() {
            match file.read_at(&mut head[len..], len as u64) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) => return Err(say(&error)),
            }
        }
        let head = &head[..len];
        let header = elf::FileHeader64::<LittleEndian>::parse(head).map_err(|error| say(&error))?;
        let endian = header.endian().map_err(|error| say(&error))?;
        let programs = header
            .program_headers(endian, head)
            .map_err(|error| say(&error))?;
        let mut segments: Vec<Segment> = programs
            .iter()
            .filter(|program| program.p_type(endian) == elf::PT_LOAD)
            .map(|program| Segment {
                phys: program.p_paddr(endian),
                size: program.p_filesz(endian),
                offset: program.p_offset(endian),
            })
            // In /proc/kcore, what is not the direct map has no physical address.
            .filter(|segment| segment.size > 0 && segment.phys.checked_add(segment.size).is_some())
            .collect();
        segments.sort_by_key(|segment| segment.phys);
        // Memory that is in a dump twice is looked at once.
        let mut end = 0;
        segments.retain(|segment| {
            let is_new = segment.phys >= end;
            if is_new {
                end = segment.phys + segment.size;
            }
            is_new
        });
        if segments.is_empty() {
            return Err(say(&"no memory in it"));
        }
        Ok(Self {
            file,
            segments,
            scratch: Vec::new(),
        })
    }

    /// Notes a scratch area.
    pub(crate) fn add_scratch(&mut self, area: Frames) {
        self.scratch.push(area);
    }

    /// Reads as many bytes as `into` has from a physical address; returns whether all are there.
    pub(crate) fn read(&self, phys: u64, into: &mut [u8]) -> bool {
        let mut done = 0;
        while done < into.len() {
            let Some(at) = phys.checked_add(done as u64) else {
                return false;
            };
            let next = self.segments.partition_point(|segment| segment.phys <= at);
            let Some(segment) = next.checked_sub(1).map(|index| &self.segments[index]) else {
                return false;
            };
            let skip = at - segment.phys;
            if skip >= segment.size {
                return false;
            }
            let len = (segment.size - skip).min((into.len() - done) as u64) as usize;
            let Some(from) = segment.offset.checked_add(skip) else {
                return false;
            };
            if self
                .file
                .read_exact_at(&mut into[done..done + len], from)
                .is_err()
            {
                return false;
            }
            done += len;
        }
        true
    }

    /// Returns the pieces of RAM, ascending, as first address and size.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.segments
            .iter()
            .map(|segment| (segment.phys, segment.size))
    }

    /// Returns the frames of which all bytes are in one piece of RAM.
    fn frames(&self) -> impl Iterator<Item = Frames> + '_ {
        self.pieces().map(|(phys, size)| {
            let page = 1 << PAGE_SHIFT;
            let start = phys.div_ceil(page);
            Frames::between(start, (phys + size) / page)
        })
    }

    /// Returns the first frames of `frames` that are not in a scratch area.
    fn outside_scratch(&self, frames: Frames) -> Frames {
        let mut rest = frames;
        for area in &self.scratch {
            if area.start() <= rest.start() && rest.start() < area.end() {
                return Frames::EMPTY;
            }
            if area.start() > rest.start() {
                rest = rest.until(area.start());
            }
        }
        rest
    }
}

impl Machine for Dump {
    fn ram_end(&self) -> u64 {
        self.frames().map(Frames::end).max().unwrap_or(0)
    }

    fn usable(&self, pfn: u64) -> Option<Frames> {
        let piece = self
            .frames()
            .find(|frames| frames.start() <= pfn && pfn < frames.end())?;
        Some(self.outside_scratch(piece.from(pfn))).filter(|frames| !frames.is_empty())
    }

    fn ram(&self, pfn: u64) -> Option<Frames> {
        let mut pieces = self.frames().map(|frames| frames.from(pfn));
        pieces.find(|frames| !frames.is_empty())
    }
}
