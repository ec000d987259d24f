// SPDX-License-Identifier: GPL-2.0

//! The incoming and the outgoing handover, and whether KHO is on.
//!
//! The statics are this file's. While booting they are set by [`kho_boot`](super::kho_boot) and
//! [`kho_kexec`](super::kho_kexec); after that only the contents of the outgoing tree and FDT
//! change. The FDT is changed under its mutex, see [`RootFdt`].

use super::kho_fdt::{
    Blob,
    FdtError, //
};
use super::kho_libfdt::{
    Fdt,
    RootFdt, //
};
use super::kho_log;
use super::kho_mm;
use super::kho_nodemem::{
    self,
    Direct, //
};
use super::kho_place;
use super::kho_radix::{
    NodeAddr,
    Tree, //
};
use core::sync::atomic::{
    AtomicBool,
    AtomicU64,
    Ordering, //
};
use kernel::{
    bindings,
    prelude::*, //
};

/// Whether KHO is on: `kho=`, unless something fails.
#[link_section = ".data..ro_after_init"]
static ENABLED: AtomicBool = AtomicBool::new(cfg!(CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT));

/// Returns whether KHO is on.
#[inline]
pub(crate) fn is_enabled() -> bool {
    ENABLED.load(Ordering::Relaxed)
}

/// Turns KHO on or off, while booting.
pub(crate) fn set_enabled(on: bool) {
    ENABLED.store(on, Ordering::Relaxed);
}

/// Physical address of the FDT that was handed over; 0 if there was none, or none that could be
/// used.
static IN_FDT: AtomicU64 = AtomicU64::new(0);

/// Says what was handed over, or with 0 that nothing was.
pub(crate) fn set_handover(fdt: u64) {
    IN_FDT.store(fdt, Ordering::Relaxed);
}

/// Returns the physical address of the FDT that was handed over.
pub(crate) fn handover() -> Option<u64> {
    Some(IN_FDT.load(Ordering::Relaxed)).filter(|phys| *phys != 0)
}

/// Returns the FDT that was handed over. It must have been checked where it is, see
/// `kho_boot::init_early()`.
fn in_fdt() -> Option<Fdt> {
    let fdt = kho_mm::virt(handover()?);
    // SAFETY: It was checked before anybody could ask, and found to be preserved: nobody else has
    // this memory.
    Some(unsafe { Fdt::checked(fdt) })
}

/// Physical address of the outgoing tree's root; 0 until there is one.
static OUT_TREE: AtomicU64 = AtomicU64::new(0);

/// Physical address of the outgoing FDT's page; 0 until there is one.
static OUT_FDT: AtomicU64 = AtomicU64::new(0);

/// Sets where the root of the outgoing tree is, or that there is none.
#[link_section = ".init.text"]
pub(crate) fn set_out_tree(root: Option<NodeAddr>) {
    OUT_TREE.store(root.map_or(0, NodeAddr::get), Ordering::Release);
}

/// Sets where the outgoing FDT is; 0 for none. `RootFdt::create()` must have made an FDT there.
#[link_section = ".init.text"]
pub(crate) fn set_out_fdt(phys: u64) {
    OUT_FDT.store(phys, Ordering::Release);
}

/// Returns the tree of what this kernel preserves, if KHO is on and up.
#[inline(always)]
pub(crate) fn out_tree() -> Option<Tree<Direct>> {
    let root = NodeAddr::new(OUT_TREE.load(Ordering::Acquire))?;
    // SAFETY: The tree is this kernel's own.
    Some(Tree::from_root(unsafe { Direct::new() }, root))
}

/// Returns the physical address of the FDT to hand over, if KHO is on and up.
pub(crate) fn out_fdt() -> Option<u64> {
    Some(OUT_FDT.load(Ordering::Acquire)).filter(|phys| *phys != 0)
}

/// Returns the outgoing FDT, locked.
fn lock_fdt() -> Result<RootFdt> {
    let page = out_fdt().ok_or(EOPNOTSUPP)?;
    // SAFETY: `RootFdt::create()` made an FDT there, see `set_out_fdt()`.
    Ok(unsafe { RootFdt::lock(kho_mm::virt(page)) })
}

/// Whether there is a place in debugfs; there is none with `debugfs=off`, and KHO works without.
static DEBUGFS: AtomicBool = AtomicBool::new(false);

/// Makes the directory in debugfs, if there is debugfs, and shows the outgoing FDT.
#[link_section = ".init.text"]
pub(crate) fn open_debugfs() -> Result {
    // SAFETY: Called once, while booting.
    let error = unsafe { bindings::kho_glue_debugfs_init() };
    if error == 0 {
        DEBUGFS.store(true, Ordering::Relaxed);
    } else {
        pr_warn!("not in debugfs: error {error}\n");
    }
    // All of its page, as the FDT will grow. Were the file made anew at each change, a change would
    // have to wait for whoever is reading.
    let page = out_fdt().ok_or(EOPNOTSUPP)?;
    // SAFETY: The page stays for ever.
    unsafe {
        show(
            c"fdt".as_char_ptr(),
            kho_mm::virt(page),
            bindings::PAGE_SIZE,
            true,
        )
    };
    Ok(())
}

/// Shows in debugfs what was handed over.
#[link_section = ".init.text"]
pub(crate) fn show_incoming() {
    if let Some(phys) = handover().filter(|_| DEBUGFS.load(Ordering::Relaxed)) {
        // SAFETY: It is an FDT, all of whose subtrees name memory.
        unsafe { bindings::kho_glue_debugfs_in(kho_mm::virt(phys)) };
    }
}

/// Shows a blob in debugfs.
///
/// # Safety
///
/// `name` must be a string that ends with a NUL; `blob` must have `size` bytes until [`hide`].
unsafe fn show(name: *const c_char, blob: *const c_void, size: usize, root: bool) {
    if DEBUGFS.load(Ordering::Relaxed) {
        // SAFETY: By the caller's contract.
        let error = unsafe { bindings::kho_glue_debugfs_add(name, blob, size, root) };
        if error != 0 {
            kho_log::complain(kho_log::Complaint::NotShown, kho_mm::phys(blob.cast_mut()));
        }
    }
}

/// Takes a blob out of debugfs, if it is there.
fn hide(blob: *mut c_void) {
    if DEBUGFS.load(Ordering::Relaxed) {
        // SAFETY: An address that is not shown is ignored.
        unsafe { bindings::kho_glue_debugfs_remove(blob) };
    }
}

/// Hands over `size` bytes at `blob` under `name`. Preserving them is the caller's task, before or
/// after this.
///
/// # Errors
///
/// `EINVAL` if there are no bytes, or not all of them are RAM in the direct map; `EOPNOTSUPP` with
/// KHO off, `EEXIST` if there is such a name, `ENOMEM` if the FDT is full; else as
/// [`kho_place::check_place`], as what cannot be preserved cannot be handed over.
///
/// # Safety
///
/// `name` must point to a string that ends with a NUL.
pub(crate) unsafe fn add_subtree(name: *const c_char, blob: *mut c_void, size: usize) -> Result {
    let frames = kho_mm::direct_frames(blob, size).ok_or(EINVAL)?;
    kho_place::check_place(frames)?;
    let record = Blob {
        phys: kho_mm::phys(blob),
        size: size as u64,
    };
    let mut fdt = lock_fdt()?;
    // SAFETY: By the caller's contract.
    match unsafe { fdt.add(name, record) } {
        Ok(()) => {}
        Err(FdtError::Exists) => return Err(EEXIST),
        Err(_) => return Err(ENOMEM),
    }
    // SAFETY: By the caller's contract.
    unsafe { show(name, blob, size, false) };
    Ok(())
}

/// Returns how many subtrees the outgoing FDT has, and how many bytes.
///
/// # Errors
///
/// `EOPNOTSUPP` with KHO off.
#[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
pub(crate) fn out_fdt_use() -> Result<(u64, usize)> {
    let fdt = lock_fdt()?;
    let subtrees = fdt
        .read()
        .subtrees()
        .fold(0, |count: u64, _| count.saturating_add(1));
    Ok((subtrees, fdt.read().size()))
}

/// Undoes [`add_subtree`]. With KHO off there is nothing to undo.
pub(crate) fn remove_subtree(blob: *mut c_void) {
    // Any byte of it would do: it is the address that counts.
    let Some(phys) = kho_mm::direct_frames(blob, 1).map(|_| kho_mm::phys(blob)) else {
        return;
    };
    if let Ok(mut fdt) = lock_fdt() {
        if fdt.remove(phys) {
            hide(blob);
        }
    }
}

/// Returns the blob that the last kernel handed over under `name`.
///
/// # Errors
///
/// `ENOENT` if there is none, `EINVAL` if it is broken.
///
/// # Safety
///
/// `name` must point to a string that ends with a NUL.
pub(crate) unsafe fn subtree(name: *const c_char) -> Result<Blob> {
    let fdt = in_fdt().ok_or(ENOENT)?;
    // SAFETY: By the caller's contract.
    match unsafe { fdt.blob(name) } {
        Ok(blob) => Ok(blob),
        Err(FdtError::Absent) => Err(ENOENT),
        Err(_) => Err(EINVAL),
    }
}

/// Gives back the nodes of the outgoing tree that have become empty.
pub(crate) fn prune() {
    if let Some(tree) = out_tree() {
        kho_nodemem::prune(&tree);
    }
}
