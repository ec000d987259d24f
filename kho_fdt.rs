// SPDX-License-Identifier: GPL-2.0

//! The rules for the root FDT that is handed over.
//!
//! ```text
//!  / {
//!      compatible = "kho-v4";
//!      preserved-memory-map = <u64>;      physical address of the tree's root node
//!
//!      NAME {                             one for each kho_add_subtree()
//!          preserved-data = <u64>;        physical address of the blob
//!          blob-size = <u64>;             its size in bytes
//!      };
//!  };
//! ```
//!
//! Numbers are in the byte order of the machine, not in that of the device tree format, and stand
//! at any 4-byte boundary. Parsing and editing the format itself is left to libfdt, which stays
//! within the size that the header states; the rules for that size are here.
//!
//! The format is ABI:
//! [`include/linux/kho/abi/kexec_handover.h`](srctree/include/linux/kho/abi/kexec_handover.h).

use super::kho_radix::NodeAddr;
use super::kho_range::Frames;
use super::PAGE_SHIFT;

/// The bytes of an FDT header that say what it is and how long: magic and total size.
pub(crate) const HEADER_LEN: usize = 8;

/// The magic number of an FDT.
const MAGIC: u32 = 0xd00d_feed;

/// The least an FDT can have: a header of version 17.
const LEAST: u32 = 40;

/// What is wrong with an FDT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FdtError {
    /// It does not start with the magic number.
    Magic,
    /// Its header states this size, which is not what was handed over.
    Size(u32),
    /// libfdt does not take it; its error number.
    Format(i32),
    /// It has another format, or another version of it.
    Compatible,
    /// It has no address of the tree, or none where a tree can be.
    Map,
    /// A subtree has no address or size, or none that a blob can have.
    Blob,
    /// There is no such subtree.
    Absent,
    /// There is such a subtree already.
    Exists,
    /// The page is full.
    Full,
}

impl FdtError {
    /// Returns what to tell the user.
    #[link_section = ".init.text"]
    pub(crate) const fn what(self) -> &'static str {
        match self {
            Self::Magic => "no FDT is there",
            Self::Size(_) => "the FDT does not have the size that was handed over",
            Self::Format(_) => "the FDT is broken",
            Self::Compatible => "the FDT is not compatible with kho-v4",
            Self::Map => "the FDT has no valid preserved-memory-map",
            Self::Blob => "a subtree has no valid preserved-data or blob-size",
            Self::Absent => "there is no such subtree",
            Self::Exists => "there is such a subtree already",
            Self::Full => "the root FDT is full",
        }
    }
}

/// Checks the start of an FDT that was handed over as `len` bytes, and returns its total size.
#[link_section = ".init.text"]
pub(crate) fn total_size(header: &[u8; HEADER_LEN], len: u64) -> Result<u32, FdtError> {
    let [a, b, c, d, rest @ ..] = *header;
    if u32::from_be_bytes([a, b, c, d]) != MAGIC {
        return Err(FdtError::Magic);
    }
    let size = u32::from_be_bytes(rest);
    if size < LEAST || u64::from(size) > len {
        return Err(FdtError::Size(size));
    }
    Ok(size)
}

/// Reads a number, which may stand at any address.
fn number(property: &[u8]) -> Option<u64> {
    Some(u64::from_ne_bytes(property.try_into().ok()?))
}

/// Reads `preserved-memory-map`: where the root of the tree is.
#[link_section = ".init.text"]
pub(crate) fn memory_map(property: Option<&[u8]>) -> Result<NodeAddr, FdtError> {
    property
        .and_then(number)
        .filter(|phys| phys & ((1 << PAGE_SHIFT) - 1) == 0)
        .and_then(NodeAddr::new)
        .ok_or(FdtError::Map)
}

/// A blob that a subtree names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Blob {
    /// Its physical address, not 0.
    pub(crate) phys: u64,
    /// Its size in bytes, not 0: what is empty would be found anywhere.
    pub(crate) size: u64,
}

impl Blob {
    /// Reads `preserved-data` and `blob-size`.
    pub(crate) fn from_properties(
        data: Option<&[u8]>,
        size: Option<&[u8]>,
    ) -> Result<Self, FdtError> {
        let read = || {
            let phys = number(data?)?;
            let size = number(size?)?;
            Frames::covering(phys, size)?;
            (phys != 0 && size != 0).then_some(Self { phys, size })
        };
        read().ok_or(FdtError::Blob)
    }

    /// Returns whether `preserved-data` names `phys`.
    pub(crate) fn is_at(data: Option<&[u8]>, phys: u64) -> bool {
        data.and_then(number) == Some(phys)
    }
}
