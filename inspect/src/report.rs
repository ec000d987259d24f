// SPDX-License-Identifier: GPL-2.0

//! What there is to say of a handover.

use crate::{
    core::{
        kho_check::{
            check_tree,
            Machine,
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
        kho_radix::{
            NodeAddr,
            Tree, //
        },
        kho_range::Frames,
        PAGE_SHIFT, //
    },
    dump::Dump,
    memory::Memory, //
};
use fdt_rs::{
    base::{
        DevTree,
        DevTreeNode, //
    },
    prelude::*, //
};

/// A root FDT has one page; more than this is not looked at.
const FDT_MAX: u64 = 128 << 10;

/// The value of `compatible` in the root node.
const COMPATIBLE: &[u8] = b"kho-v4\0";

/// A subtree, and whether its blob is preserved as a whole.
pub(crate) struct Subtree {
    pub(crate) name: String,
    pub(crate) blob: Result<Blob, FdtError>,
    pub(crate) is_preserved: bool,
}

/// What a root FDT says.
struct Root {
    size: u32,
    map: Result<NodeAddr, FdtError>,
    subtrees: Vec<(String, Result<Blob, FdtError>)>,
}

/// All of it.
pub(crate) struct Report {
    pub(crate) fdt: u64,
    pub(crate) fdt_size: u32,
    pub(crate) root: u64,
    pub(crate) stats: Stats,
    pub(crate) subtrees: Vec<Subtree>,
    /// Ranges of preserved frames, of nodes, and of RAM in blocks that cannot be taken over.
    pub(crate) preserved: Vec<Frames>,
    pub(crate) nodes: Vec<Frames>,
    pub(crate) lost: Vec<Frames>,
    /// What is wrong, and the physical address that it is about.
    pub(crate) violations: Vec<(String, u64)>,
}

fn property<'a>(node: &DevTreeNode<'a, 'a>, name: &str) -> Option<&'a [u8]> {
    let mut properties = node.props();
    while let Ok(Some(property)) = properties.next() {
        if property.name() == Ok(name) {
            return Some(property.propbuf());
        }
    }
    None
}

/// Reads the FDT at `phys`.
fn read_fdt(dump: &Dump, phys: u64) -> Result<Root, FdtError> {
    let mut header = [0; HEADER_LEN];
    if !dump.read(phys, &mut header) {
        return Err(FdtError::Magic);
    }
    let size = kho_fdt::total_size(&header, FDT_MAX)?;
    // The parser wants it aligned.
    let mut words = vec![0u32; size.div_ceil(4) as usize];
    let mut bytes = vec![0; size as usize];
    if !dump.read(phys, &mut bytes) {
        return Err(FdtError::Magic);
    }
    for (word, bytes) in words.iter_mut().zip(bytes.chunks(4)) {
        let mut four = [0; 4];
        four[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(four);
    }
    // SAFETY: The words have that many bytes, which live as long.
    let aligned: &[u8] = unsafe { core::slice::from_raw_parts(words.as_ptr().cast(), bytes.len()) };
    // SAFETY: The bytes are aligned, and nobody changes them.
    let tree = unsafe { DevTree::new(aligned) }.map_err(|_| FdtError::Format(0))?;
    let mut nodes = tree.nodes();
    let first = nodes.next().map_err(|_| FdtError::Format(0))?;
    let root = first.ok_or(FdtError::Format(0))?;
    if property(&root, "compatible") != Some(COMPATIBLE) {
        return Err(FdtError::Compatible);
    }
    let map = kho_fdt::memory_map(property(&root, "preserved-memory-map"));
    let mut subtrees = Vec::new();
    while let Some(node) = nodes.next().map_err(|_| FdtError::Format(0))? {
        let blob = Blob::from_properties(
            property(&node, "preserved-data"),
            property(&node, "blob-size"),
        );
        let name = node.name().map_err(|_| FdtError::Format(0))?;
        subtrees.push((name.to_owned(), blob));
    }
    Ok(Root {
        size,
        map,
        subtrees,
    })
}

/// Returns where in the dump there are FDTs of KHO that name a tree. A kernel that was handed over
/// to may have left some of the kernels before.
pub(crate) fn find_fdts(dump: &Dump) -> Vec<u64> {
    const CHUNK: u64 = 1 << 20;
    const PAGE: u64 = 1 << PAGE_SHIFT;
    let mut found = Vec::new();
    let mut buffer = vec![0; CHUNK as usize];
    for (phys, size) in dump.pieces() {
        let mut at = phys.next_multiple_of(PAGE);
        while at < phys + size {
            let len = CHUNK.min(phys + size - at);
            let chunk = &mut buffer[..len as usize];
            if dump.read(at, chunk) {
                for (index, page) in chunk.chunks(PAGE as usize).enumerate() {
                    let addr = at + index as u64 * PAGE;
                    if page.starts_with(&[0xd0, 0x0d, 0xfe, 0xed])
                        && read_fdt(dump, addr).is_ok_and(|root| root.map.is_ok())
                    {
                        found.push(addr);
                    }
                }
            }
            at += len;
        }
    }
    found
}

/// Looks at the handover whose root FDT is at `fdt`.
pub(crate) fn inspect(dump: &Dump, fdt: u64) -> Result<Report, String> {
    let memory = Memory::new(dump);
    let no_memory = |_| "no memory".to_owned();
    let sets = Sets::new(&memory).map_err(no_memory)?;
    let mut violations = Vec::new();
    let root = read_fdt(dump, fdt).and_then(|root| Ok((root.map?, root)));
    let (map, root) = root.map_err(|error| format!("{fdt:#x}: {}", error.what()))?;
    let tree = Tree::from_root(&memory, map);
    let stats = check_tree(&tree, dump, &sets).map_err(no_memory)?;
    if let Some(refusal) = stats.refusal {
        let (what, phys) = refusal.what();
        violations.push((what.to_owned(), phys));
    }
    if stats.lost > 0 {
        let what = format!("{} blocks are not RAM outside scratch", stats.lost);
        violations.push((what, stats.first_lost));
    }
    if let Some(pfn) = stats.overlap {
        violations.push(("memory is preserved twice".to_owned(), pfn << PAGE_SHIFT));
    }
    let is_preserved = |phys, size| {
        Frames::covering(phys, size).is_some_and(|frames| has_frames(&sets.reserved, frames))
    };
    if !is_preserved(fdt, root.size.into()) {
        violations.push(("the FDT is not preserved".to_owned(), fdt));
    }
    let mut subtrees = Vec::new();
    for (name, blob) in root.subtrees {
        let is_preserved = blob.is_ok_and(|blob| is_preserved(blob.phys, blob.size));
        match blob {
            Ok(blob) if !is_preserved => {
                violations.push((format!("the blob of {name} is not preserved"), blob.phys));
            }
            Ok(_) => {}
            Err(error) => violations.push((format!("{name}: {}", error.what()), 0)),
        }
        subtrees.push(Subtree {
            name,
            blob,
            is_preserved,
        });
    }
    let all = Frames::between(0, dump.ram_end());
    Ok(Report {
        fdt,
        fdt_size: root.size,
        root: map.get(),
        stats,
        subtrees,
        preserved: frames_in(&sets.reserved, all).collect(),
        nodes: frames_in(&sets.nodes, all).collect(),
        lost: frames_in(&sets.lost, all).collect(),
        violations,
    })
}
