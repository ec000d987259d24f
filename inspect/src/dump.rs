// SPDX-License-Identifier: GPL-2.0

//! A dump of a machine's memory: an ELF core, as QEMU's `dump-guest-memory`, kdump and
//! `/proc/kcore` have it. It is read piece by piece.

use object::{
    elf,
    read::{
        elf::{
            FileHeader,
            ProgramHeader, //
        },
        ReadCache, //
    },
    LittleEndian, //
};
use std::{
    error::Error,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path, //
};

/// More notes than any machine has.
const NOTES_MAX: u64 = 1 << 20;

/// What the file has of a piece of RAM: from which address on, how many bytes, and where.
struct Segment {
    phys: u64,
    size: u64,
    offset: u64,
}

/// A dump.
pub(crate) struct Dump {
    file: File,
    /// By address. They may overlap: `/proc/kcore` has the kernel's text twice.
    segments: Vec<Segment>,
    /// RAM, ascending, whether the file has it or not: tools leave out pages.
    pub(crate) ram: Vec<Range<u64>>,
    /// The size of a page, if the kernel said so in its VMCOREINFO.
    pub(crate) page_size: Option<u64>,
}

impl Dump {
    /// Opens a dump and reads where it has which memory.
    pub(crate) fn open(path: &Path) -> Result<Self, Box<dyn Error>> {
        let file = File::open(path)?;
        let (mut segments, mut ram, mut page_size) = (Vec::new(), Vec::new(), None);
        let data = ReadCache::new(&file);
        let header = elf::FileHeader64::<LittleEndian>::parse(&data)?;
        let endian = header.endian()?;
        for program in header.program_headers(endian, &data)? {
            let (phys, size) = (program.p_paddr(endian), program.p_memsz(endian));
            let in_file = program.p_filesz(endian);
            match program.p_type(endian) {
                elf::PT_NOTE if in_file <= NOTES_MAX => {
                    let mut notes = program.notes(endian, &data)?;
                    while let Some(note) = notes.as_mut().and_then(|it| it.next().ok()?) {
                        page_size = page_size.or(page_size_in(note.name(), note.desc()));
                    }
                }
                elf::PT_LOAD => {
                    // In /proc/kcore, what is not the direct map has no physical address.
                    let Some(end) = phys.checked_add(size) else {
                        continue;
                    };
                    ram.push(phys..end);
                    segments.push(Segment {
                        phys,
                        size: in_file.min(size),
                        offset: program.p_offset(endian),
                    });
                }
                _ => {}
            }
        }
        drop(data);
        segments.sort_by_key(|segment| segment.phys);
        let ram = merge(ram);
        if ram.is_empty() {
            return Err("no memory in it".into());
        }
        Ok(Self {
            file,
            segments,
            ram,
            page_size,
        })
    }

    /// Reads from a physical address; returns how many bytes of `into` there are before the first
    /// one that the file does not have.
    pub(crate) fn read(&self, phys: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(at) = phys.checked_add(done as u64).filter(|_| done < into.len()) {
            let rest = &mut into[done..];
            let behind = self.segments.partition_point(|segment| segment.phys <= at);
            // The last one is nearly always the one; not if it is short and lies in another.
            let mut parts = self.segments[..behind].iter().rev().map(|segment| {
                let skip = at - segment.phys;
                let len = segment.size.saturating_sub(skip).min(rest.len() as u64);
                let from = segment.offset.saturating_add(skip);
                self.file.read_at(&mut rest[..len as usize], from)
            });
            match parts.find(|part| part.as_ref().is_ok_and(|len| *len > 0)) {
                Some(Ok(len)) => done += len,
                _ => break,
            }
        }
        done
    }

    /// Returns the memory that the file has, or says that it has, ascending.
    pub(crate) fn pieces(&self) -> Vec<Range<u64>> {
        let pieces = self.segments.iter();
        merge(
            pieces
                .map(|piece| piece.phys..piece.phys + piece.size)
                .collect(),
        )
    }
}

/// Makes one range of those that touch or overlap.
fn merge(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Returns the size of a page that a note says, if it does.
fn page_size_in(name: &[u8], text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text)
        .ok()
        .filter(|_| name == b"VMCOREINFO")?;
    let mut lines = text.lines();
    lines.find_map(|line| line.strip_prefix("PAGESIZE=")?.parse().ok())
}
