// SPDX-License-Identifier: GPL-2.0

//! FDTs in memory, by libfdt: the one that was handed over, and the one to hand over.
//!
//! What the values in them mean is said in [`kho_fdt`].

use super::kho_fdt::{
    self,
    Blob,
    FdtError, //
};
use super::kho_radix::NodeAddr;
use kernel::{
    bindings,
    prelude::*,
    sync::{
        global_lock,
        GlobalGuard, //
    },
};

/// Names of properties.
const MEMORY_MAP: &CStr = terminated(bindings::KHO_FDT_MEMORY_MAP_PROP_NAME);
const DATA: &CStr = terminated(bindings::KHO_SUB_TREE_PROP_NAME);
const SIZE: &CStr = terminated(bindings::KHO_SUB_TREE_SIZE_PROP_NAME);

/// Returns a string constant of C.
const fn terminated(text: &'static [u8]) -> &'static CStr {
    match CStr::from_bytes_with_nul(text) {
        Ok(text) => text,
        Err(_) => panic!(),
    }
}

/// An FDT in memory.
///
/// # Invariants
///
/// The header states a size within which all of it is mapped, and libfdt knows its version.
pub(crate) struct Fdt(*const c_void);

/// A node of an FDT: libfdt's offset.
#[derive(Clone, Copy)]
pub(crate) struct FdtNode(c_int);

impl FdtNode {
    const ROOT: Self = Self(0);

    /// Returns the node that libfdt found, if it did.
    fn found(offset: c_int) -> Option<Self> {
        (offset >= 0).then_some(Self(offset))
    }
}

impl Fdt {
    /// Checks that there is an FDT at `fdt`.
    ///
    /// # Safety
    ///
    /// `len` bytes at `fdt` must be readable for as long as the result is used.
    #[link_section = ".init.text"]
    pub(crate) unsafe fn new(fdt: *const c_void, len: u64) -> Result<Self, FdtError> {
        if len < kho_fdt::HEADER_LEN as u64 {
            return Err(FdtError::Size(len as u32));
        }
        // SAFETY: That many bytes are readable.
        let header = unsafe { fdt.cast::<[u8; kho_fdt::HEADER_LEN]>().read_unaligned() };
        kho_fdt::total_size(&header, len)?;
        // SAFETY: The size covers a header, and is covered by `len`.
        match unsafe { bindings::fdt_check_header(fdt) } {
            // INVARIANT: Checked.
            0 => Ok(Self(fdt)),
            error => Err(FdtError::Format(error)),
        }
    }

    /// Returns an FDT that has been checked before.
    ///
    /// # Safety
    ///
    /// [`Fdt::new`] must have been called on this memory, which must not have changed since.
    pub(crate) unsafe fn checked(fdt: *const c_void) -> Self {
        // INVARIANT: By the caller's contract.
        Self(fdt)
    }

    /// Returns the total size that the header states.
    pub(crate) fn size(&self) -> usize {
        // SAFETY: By the type invariant there is a header.
        let size = unsafe { self.0.cast::<[u8; 4]>().add(1).read_unaligned() };
        u32::from_be_bytes(size) as usize
    }

    fn property(&self, node: FdtNode, name: &CStr) -> Option<&[u8]> {
        let mut len = 0;
        // SAFETY: By the type invariant this is an FDT, in whose size libfdt stays.
        unsafe {
            let value = bindings::fdt_getprop(self.0, node.0, name.as_char_ptr(), &mut len);
            if value.is_null() {
                return None;
            }
            Some(core::slice::from_raw_parts(
                value.cast(),
                usize::try_from(len).ok()?,
            ))
        }
    }

    /// Checks the root node and returns where it says that the tree is.
    #[link_section = ".init.text"]
    pub(crate) fn memory_map(&self) -> Result<NodeAddr, FdtError> {
        // SAFETY: By the type invariant this is an FDT; the string ends with a NUL.
        let error = unsafe {
            bindings::fdt_node_check_compatible(self.0, 0, bindings::KHO_FDT_COMPATIBLE.as_ptr())
        };
        if error != 0 {
            return Err(FdtError::Compatible);
        }
        kho_fdt::memory_map(self.property(FdtNode::ROOT, MEMORY_MAP))
    }

    /// Returns the blob of a subtree.
    #[inline(never)]
    pub(crate) fn blob_at(&self, node: FdtNode) -> Result<Blob, FdtError> {
        Blob::from_properties(self.property(node, DATA), self.property(node, SIZE))
    }

    /// Returns the blob of the subtree `name`.
    ///
    /// # Safety
    ///
    /// `name` must point to a string that ends with a NUL.
    pub(crate) unsafe fn blob(&self, name: *const c_char) -> Result<Blob, FdtError> {
        // SAFETY: By the type invariant this is an FDT; the caller passes a string.
        match unsafe { bindings::fdt_subnode_offset(self.0, 0, name) } {
            node if node >= 0 => self.blob_at(FdtNode(node)),
            _ => Err(FdtError::Absent),
        }
    }

    /// Returns the first subtree, if there is one.
    pub(crate) fn first_subtree(&self) -> Option<FdtNode> {
        // SAFETY: By the type invariant this is an FDT.
        FdtNode::found(unsafe { bindings::fdt_first_subnode(self.0, 0) })
    }

    /// Returns the subtree behind another one, if there is one.
    pub(crate) fn next_subtree(&self, node: FdtNode) -> Option<FdtNode> {
        // SAFETY: By the type invariant this is an FDT; libfdt refuses what is no node of it.
        FdtNode::found(unsafe { bindings::fdt_next_subnode(self.0, node.0) })
    }

    /// Returns the subtrees.
    pub(crate) fn subtrees(&self) -> impl Iterator<Item = FdtNode> + '_ {
        core::iter::successors(self.first_subtree(), |node| self.next_subtree(*node))
    }

    /// Returns the name of a subtree, to be printed.
    #[link_section = ".init.text"]
    pub(crate) fn name(&self, node: FdtNode) -> &str {
        let mut len = 0;
        // SAFETY: By the type invariant this is an FDT, and a name in it has the length that libfdt
        // says.
        let name = unsafe {
            let name = bindings::fdt_get_name(self.0, node.0, &mut len);
            if name.is_null() {
                return "?";
            }
            core::slice::from_raw_parts(name.cast::<u8>(), usize::try_from(len).unwrap_or(0))
        };
        core::str::from_utf8(name).unwrap_or("?")
    }

    /// Takes a subtree out, so that nobody finds it any more. What others there are stays where it
    /// is.
    #[link_section = ".init.text"]
    pub(crate) fn take_out(&mut self, node: FdtNode) {
        // SAFETY: By the type invariant this is an FDT in memory that nobody else has, and libfdt
        // has found the node in it. An error leaves it as it is.
        unsafe { bindings::fdt_nop_node(self.0.cast_mut(), node.0) };
    }
}

global_lock! {
    // SAFETY: `kho_kexec::init()` initialises it before it makes the page that it is for.
    /// Held while a [`RootFdt`] exists.
    pub(crate) unsafe(uninit) static KHO_FDT_MUTEX: Mutex<()> = ();
}

/// The root FDT that this kernel hands over: one page, complete at every moment but those of a
/// change.
///
/// # Invariants
///
/// The page holds an FDT that libfdt wrote; only the holder of a `RootFdt` writes it.
pub(crate) struct RootFdt {
    page: *mut c_void,
    _lock: GlobalGuard<KHO_FDT_MUTEX>,
}

impl RootFdt {
    /// Returns the FDT at `page`, which nobody else has until this is dropped.
    ///
    /// # Safety
    ///
    /// `page` must be the page that [`RootFdt::create`] was called on.
    pub(crate) unsafe fn lock(page: *mut c_void) -> Self {
        // INVARIANT: By the caller's contract and the lock.
        Self {
            page,
            _lock: KHO_FDT_MUTEX.lock(),
        }
    }

    /// Writes an FDT without subtrees that names `map`.
    ///
    /// # Safety
    ///
    /// `page` must be a page that nobody else uses.
    pub(crate) unsafe fn create(page: *mut c_void, map: NodeAddr) -> Result<(), FdtError> {
        let map = map.get().to_ne_bytes();
        let compatible = bindings::KHO_FDT_COMPATIBLE;
        // SAFETY: The page is writable, `fdt_create()` is told its size, and all that is written
        // is as long as said. After an error the rest does nothing.
        let error = unsafe {
            bindings::fdt_create(page, bindings::PAGE_SIZE as c_int)
                | bindings::fdt_finish_reservemap(page)
                | bindings::fdt_begin_node(page, c"".as_char_ptr())
                | bindings::fdt_property(
                    page,
                    c"compatible".as_char_ptr(),
                    compatible.as_ptr().cast(),
                    compatible.len() as c_int,
                )
                | bindings::fdt_property(
                    page,
                    MEMORY_MAP.as_char_ptr(),
                    map.as_ptr().cast(),
                    map.len() as c_int,
                )
                | bindings::fdt_end_node(page)
                | bindings::fdt_finish(page)
        };
        if error != 0 {
            return Err(FdtError::Format(error));
        }
        Ok(())
    }

    /// Returns the FDT for reading.
    pub(crate) fn read(&self) -> Fdt {
        // INVARIANT: By the type invariant.
        Fdt(self.page)
    }

    /// Adds the subtree `name` for `blob`, all of it or nothing.
    ///
    /// # Safety
    ///
    /// `name` must point to a string that ends with a NUL.
    pub(crate) unsafe fn add(&mut self, name: *const c_char, blob: Blob) -> Result<(), FdtError> {
        let set = |node: c_int, name: &CStr, value: u64| {
            let value = value.to_ne_bytes();
            // SAFETY: By the type invariant this is an FDT, and only we write it.
            unsafe {
                bindings::fdt_setprop_namelen(
                    self.page,
                    node,
                    name.as_char_ptr(),
                    name.to_bytes().len() as c_int,
                    value.as_ptr().cast(),
                    value.len() as c_int,
                )
            }
        };
        // SAFETY: The page is as long as libfdt is told. Removing the node that was added last
        // and packing cannot fail.
        unsafe {
            if bindings::fdt_open_into(self.page, self.page, bindings::PAGE_SIZE as c_int) < 0 {
                return Err(FdtError::Full);
            }
            let node = bindings::fdt_add_subnode(self.page, 0, name);
            let result = if node == -(bindings::FDT_ERR_EXISTS as c_int) {
                Err(FdtError::Exists)
            } else if node < 0 {
                Err(FdtError::Full)
            } else if set(node, DATA, blob.phys) < 0 || set(node, SIZE, blob.size) < 0 {
                bindings::fdt_del_node(self.page, node);
                Err(FdtError::Full)
            } else {
                Ok(())
            };
            bindings::fdt_pack(self.page);
            result
        }
    }

    /// Removes the subtree whose blob is at `phys`; returns whether there was one.
    pub(crate) fn remove(&mut self, phys: u64) -> bool {
        let fdt = self.read();
        let found = fdt
            .subtrees()
            .find(|node| Blob::is_at(fdt.property(*node, DATA), phys));
        let Some(node) = found else { return false };
        // SAFETY: By the type invariant this is an FDT, and libfdt has just found the node in it.
        unsafe {
            bindings::fdt_del_node(self.page, node.0);
            bindings::fdt_pack(self.page);
        }
        true
    }
}
