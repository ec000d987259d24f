// SPDX-License-Identifier: GPL-2.0

//! Kexec handover (KHO): memory that survives a kexec.
//!
//! This is the crate's root: its modules, and what C calls. Entry points only convert arguments
//! and results; the work is done in the modules. Each module uses only those above it here, or
//! beside it on the left:
//!
//! ```text
//!  pure         kho_key kho_word kho_param   frames, orders and keys; words; kho_scratch=
//!               kho_radix kho_range kho_fdt  the tree; ranges; rules for the root FDT
//!               kho_grain kho_check          sets of frames; is the incoming tree sound?
//!  kernel side  kho_log kho_trace            rate-limited warnings; tracepoints
//!               kho_place kho_libfdt         memory that cannot be preserved; FDTs
//!               kho_mm kho_memblock          direct map, struct pages, marks; memblock
//!               kho_nodemem kho_scratch      memory for tree nodes; scratch areas
//!               kho_state kho_struct_pages   what is handed over, in and out; its struct pages
//!               kho_takeover                 memory that is withheld until it is restored
//!  policy       kho_pages kho_vmalloc        preserve and restore memory
//!               kho_summary                  what debugfs shows of it
//!               kho_boot kho_kexec           what happens while booting; images
//!  C            kho_glue.h kho_glue.c        exports, initcalls, inline functions
//!               kho_helpers.c kho_trace.h    those that Rust may inline; tracepoints
//! ```
//!
//! The pure modules use nothing but `core`, have no `unsafe`, and are tested on the host, too.
//! Calls into C are in the kernel-side modules. A policy module, or this file, makes one itself
//! only where there is no rule to keep, and says why it may.
//!
//! Functions that run only while the kernel boots are in `.init.text`, one by one: a crate has no
//! neater way to say so.
//!
//! # Rules for callers
//!
//! A function that may sleep says so. It must not be called from an interrupt, with preemption
//! disabled, with a spinlock held or inside an RCU read-side section; a kernel with
//! `CONFIG_DEBUG_ATOMIC_SLEEP` warns of a caller that does. Mutexes may be held.
//!
//! Functions that preserve something return 0 or one of these errors, and preserve all of it or
//! nothing:
//!
//! - `-EOPNOTSUPP`: KHO is off, or called before its `fs_initcall`.
//! - `-EINVAL`: the arguments name no memory, or memory of which a part lies in a scratch area.
//!   The next kernel boots in there; movable memory has to be pinned before it is preserved.
//! - `-EADDRNOTAVAIL`: a part of the memory was plugged in after this kernel had booted. The next
//!   one does not know of it when it takes over.
//! - `-EEXIST`: exactly this block is preserved already. It stays so, and is the first caller's to
//!   give up.
//! - `-ENOMEM`: there is no memory for nodes of the tree.
//!
//! Preserved memory still belongs to its owner. The owner must keep it allocated and in place for
//! as long as it is preserved. In the next kernel it belongs to nobody until it is restored, and
//! then to the caller that restored it. Regions of `reserve_mem=` that the next kernel asks for,
//! too, are an exception: they are their users' from boot on, and cannot be restored.
//!
//! C headers: [`include/linux/kexec_handover.h`](srctree/include/linux/kexec_handover.h),
//! [`include/linux/kho_radix_tree.h`](srctree/include/linux/kho_radix_tree.h),
//! [`kernel/kexec_internal.h`](srctree/kernel/kexec_internal.h).
//!
//! Reference: <https://docs.kernel.org/core-api/kho/index.html>

use core::{
    ptr,
    sync::atomic::{
        self,
        AtomicBool,
        Ordering, //
    },
};
use kernel::{
    bindings,
    prelude::*,
    warn_on, //
};

mod kho_boot;
mod kho_check;
mod kho_fdt;
mod kho_grain;
mod kho_kexec;
mod kho_key;
mod kho_libfdt;
mod kho_log;
mod kho_memblock;
mod kho_mm;
mod kho_nodemem;
mod kho_pages;
mod kho_param;
mod kho_place;
mod kho_radix;
mod kho_range;
mod kho_scratch;
mod kho_state;
mod kho_struct_pages;
#[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
mod kho_summary;
mod kho_takeover;
mod kho_trace;
mod kho_vmalloc;
mod kho_word;
#[cfg(CONFIG_KEXEC_HANDOVER_RUST_KUNIT_TEST)]
#[path = "kunit/mod.rs"]
mod kunit;

use kho_key::{
    Block,
    Key, //
};
use kho_memblock::Memblock;
use kho_nodemem::Direct;
use kho_radix::{
    Node,
    NodeAddr,
    NodeMem,
    Removal,
    Step,
    Tree,
    Visitor, //
};
use kho_range::Frames;

const __LOG_PREFIX: &[u8] = b"KHO\0";

/// The page size, as a power of two.
const PAGE_SHIFT: u32 = bindings::PAGE_SHIFT;

/// The order of the largest blocks of the page allocator, which are the grains of takeover.
const GRAIN_ORDER: u32 = bindings::KHO_MAX_PAGE_ORDER;

// The ABI's constants and layouts, against ours.
const _: () = {
    use core::mem::{
        offset_of,
        size_of, //
    };
    assert!(kho_key::KEY_BITS == bindings::kho_radix_consts_KHO_RADIX_KEY_WIDTH);
    assert!(kho_radix::TABLE_BITS == bindings::kho_radix_consts_KHO_TABLE_SIZE_LOG2);
    assert!(kho_radix::LEAF_BITS == bindings::kho_radix_consts_KHO_BITMAP_SIZE_LOG2);
    assert!(kho_radix::DEPTH == bindings::kho_radix_consts_KHO_TREE_MAX_DEPTH);
    assert!(size_of::<Node>() == size_of::<bindings::kho_radix_node>());
    assert!(size_of::<Node>() == size_of::<bindings::kho_radix_leaf>());
    assert!(size_of::<Node>() == bindings::PAGE_SIZE);
    assert!(size_of::<bindings::kho_scratch>() == 16);
    assert!(size_of::<bindings::kho_vmalloc_chunk>() == bindings::PAGE_SIZE);
    assert!(offset_of!(bindings::kho_vmalloc_chunk, phys) == 8);
    assert!(size_of::<bindings::kho_vmalloc>() == 16);
    assert!(offset_of!(bindings::kho_vmalloc, total_pages) == 8);
    assert!(offset_of!(bindings::kho_vmalloc, flags) == 12);
    assert!(offset_of!(bindings::kho_vmalloc, order) == 14);
    assert!(size_of::<bindings::kho_kexec_metadata>() == 4 + 65 + 4);
    assert!(bindings::KHO_KEXEC_METADATA_VERSION == 1);
    assert!(matches!(bindings::KHO_FDT_COMPATIBLE, b"kho-v4\0"));
    // Physical addresses and C's `unsigned long` are 64 bits wide wherever there is KHO.
    assert!(size_of::<usize>() == 8);
};

/// Turns a result into an `int` for C.
#[inline]
fn errno(result: Result) -> c_int {
    match result {
        Ok(()) => 0,
        Err(error) => error.to_errno(),
    }
}

// Whether, and with what.

/// Returns whether KHO is on: by `kho=` or the configuration, and unless something failed.
///
/// May be called in any context. The answer is final after the `fs_initcall`s.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn kho_is_enabled() -> bool {
    kho_state::is_enabled()
}

/// Returns whether this kernel was handed something over and could take it.
///
/// May be called in any context. The answer is final after `mm_core_init()`; before
/// `kho_populate()` it is no.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn is_kho_boot() -> bool {
    kho_state::handover().is_some()
}

/// Returns whether any of the `size` bytes at `phys` lies in a scratch area.
///
/// May be called in any context. Before `mm_core_init()` it is true of areas that were handed over
/// only.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn kho_scratch_overlap(phys: u64, size: usize) -> bool {
    kho_place::in_scratch(phys, size as u64)
}

// Preserving.

/// Preserves a folio, and that it is one of this order.
///
/// It is restored with `kho_restore_folio()`, or given up with `kho_unpreserve_folio()`.
///
/// May sleep. Returns 0 or an error, see [above](crate).
///
/// # Safety
///
/// `folio` must point to a folio that the caller keeps as it is until it is unpreserved.
#[export]
unsafe extern "C" fn kho_preserve_folio(folio: *mut bindings::folio) -> c_int {
    // SAFETY: `folio` is a folio that the caller keeps as it is.
    let place = unsafe { kho_mm::folio_place(folio) };
    // A folio starts at a multiple of its size, so that this need not be checked.
    errno(match place {
        Some((pfn, order)) => kho_pages::preserve(Block::around(pfn, order)),
        None => Err(EINVAL),
    })
}

/// Gives up a folio that `kho_preserve_folio()` has preserved.
///
/// May sleep. A folio that is not preserved gives a line in the log; with KHO off nothing happens.
///
/// # Safety
///
/// `folio` must point to the folio, as it was when it was preserved.
#[export]
unsafe extern "C" fn kho_unpreserve_folio(folio: *mut bindings::folio) {
    // SAFETY: `folio` is a folio that the caller keeps as it is.
    if let Some((pfn, order)) = unsafe { kho_mm::folio_place(folio) } {
        kho_pages::unpreserve(Key::around(pfn, order));
    }
}

/// Preserves `nr_pages` adjacent pages as single ones, of which there may be none.
///
/// They are restored with `kho_restore_pages()`, or given up with `kho_unpreserve_pages()`.
///
/// May sleep. Returns 0 or an error, see [above](crate).
///
/// # Safety
///
/// `page` must point to the first of `nr_pages` pages.
#[export]
unsafe extern "C" fn kho_preserve_pages(page: *mut bindings::page, nr_pages: usize) -> c_int {
    // SAFETY: `page` is a struct page.
    let frames = unsafe { kho_mm::page_frames(page, nr_pages) };
    errno(frames.ok_or(EINVAL).and_then(kho_pages::preserve_frames))
}

/// Gives up pages that `kho_preserve_pages()` or `kho_preserve_phys()` has preserved.
///
/// May sleep. Pages that are not preserved give lines in the log; with KHO off nothing happens.
///
/// # Safety
///
/// As [`kho_preserve_pages`], with the same arguments.
#[export]
unsafe extern "C" fn kho_unpreserve_pages(page: *mut bindings::page, nr_pages: usize) {
    // SAFETY: `page` is a struct page.
    if let Some(frames) = unsafe { kho_mm::page_frames(page, nr_pages) } {
        kho_pages::unpreserve_frames(frames);
    }
}

/// Preserves `size` bytes of RAM at `phys`, as `kho_preserve_pages()` does the pages there.
///
/// They are restored with `kho_restore_pages()`, or given up with `kho_unpreserve_pages()`.
///
/// May sleep. Returns 0 or an error, see [above](crate); also `-EINVAL` unless both are multiples
/// of `PAGE_SIZE` and `size` is not 0, and if part of it is not System RAM that is online, or is in
/// the first MiB on x86.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn kho_preserve_phys(phys: u64, size: usize) -> c_int {
    errno(kho_pages::preserve_phys(phys, size))
}

/// Preserves the area of `vmalloc()` at `ptr`, and writes what it takes to restore it to
/// `preservation`, which may be unaligned. After an error nothing is written.
///
/// It is restored with `kho_restore_vmalloc()`, or given up with `kho_unpreserve_vmalloc()`; the
/// next kernel gets what is in `preservation` from the caller.
///
/// May sleep. Returns 0 or an error, see [above](crate); also `-EINVAL` if there is no area, and
/// `-EOPNOTSUPP` for one that has other flags than `vmalloc()` or `vmalloc_huge()` give it.
///
/// # Safety
///
/// `preservation` must be writable.
#[export]
unsafe extern "C" fn kho_preserve_vmalloc(
    ptr: *mut c_void,
    preservation: *mut bindings::kho_vmalloc,
) -> c_int {
    errno(kho_vmalloc::preserve(ptr).map(|result| {
        // A property of an FDT is aligned to four bytes.
        // SAFETY: The caller lends us the record for writing.
        unsafe { preservation.write_unaligned(result) };
    }))
}

/// Gives up an area that `kho_preserve_vmalloc()` has preserved. The area itself stays.
///
/// May sleep.
///
/// # Safety
///
/// `preservation` must be what `kho_preserve_vmalloc()` wrote, and not be used after this.
#[export]
unsafe extern "C" fn kho_unpreserve_vmalloc(preservation: *mut bindings::kho_vmalloc) {
    // SAFETY: The record is one that preserving has written, and is not used again.
    unsafe { kho_vmalloc::unpreserve(preservation.read_unaligned()) };
}

/// Allocates and preserves a folio of zeroes of at least `size` bytes, and returns its address.
///
/// The next kernel restores it with `kho_restore_folio()`, or frees it with `kho_restore_free()`;
/// this one frees it with `kho_unpreserve_free()`.
///
/// May sleep. Returns an `ERR_PTR()` of an error, see [above](crate); also `-EINVAL` for no bytes,
/// `-E2BIG` for more than the page allocator has in one piece, and `-ENOMEM` if there are none, or
/// if only memory that was plugged in is free.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn kho_alloc_preserve(size: usize) -> *mut c_void {
    match kho_pages::alloc_preserve(size) {
        Ok(mem) => mem,
        Err(error) => error.to_ptr(),
    }
}

/// Gives up and frees what `kho_alloc_preserve()` has returned. `NULL` is fine.
///
/// May sleep.
///
/// # Safety
///
/// `mem` must be null or come from `kho_alloc_preserve()`, and not be used after this.
#[export]
unsafe extern "C" fn kho_unpreserve_free(mem: *mut c_void) {
    // SAFETY: `mem` is null or what `kho_alloc_preserve()` returned, and is not used again.
    unsafe { kho_pages::unpreserve_free(mem) };
}

// Restoring.

/// Restores a folio that the last kernel has preserved at `phys`, with its order.
///
/// May be called in any context from `early_initcall` on. Returns the folio, with one reference
/// that is the caller's; `NULL` if no folio was preserved there or it has been restored, which
/// gives a line in the log.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn kho_restore_folio(phys: u64) -> *mut bindings::folio {
    kho_pages::restore_folio(phys).unwrap_or(ptr::null_mut())
}

/// Restores `nr_pages` single pages that the last kernel has preserved from `phys` on, all of them
/// or nothing.
///
/// May be called in any context from `early_initcall` on. Returns the first page, each with one
/// reference that is the caller's; `NULL` if a part was not preserved or has been restored, if a
/// block is cut by an end of the range, or for no pages. That gives a line in the log.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn kho_restore_pages(phys: u64, nr_pages: usize) -> *mut bindings::page {
    let frames = kho_key::Pfn::from_phys(phys).and_then(|pfn| Frames::new(pfn, nr_pages as u64));
    kho_pages::restore_frames(frames, phys).map_or(ptr::null_mut(), kho_mm::Page::as_ptr)
}

/// Maps an area that the last kernel has preserved, all of it or nothing.
///
/// `preservation`, which may be unaligned, is what `kho_preserve_vmalloc()` has written there. It
/// need not be trusted.
///
/// May sleep. Returns the address of the area, which the caller frees with `vfree()`; `NULL` if it
/// was not preserved as it says or there is no memory to map it.
///
/// # Safety
///
/// `preservation` must be readable.
#[export]
unsafe extern "C" fn kho_restore_vmalloc(
    preservation: *const bindings::kho_vmalloc,
) -> *mut c_void {
    // SAFETY: The caller lends us the record for reading.
    let preservation = unsafe { preservation.read_unaligned() };
    kho_vmalloc::restore(preservation).unwrap_or(ptr::null_mut())
}

/// Restores and frees what the last kernel's `kho_alloc_preserve()` has returned. `NULL` is fine.
///
/// May be called in any context from `early_initcall` on. Warns if there is nothing to restore.
///
/// # Safety
///
/// `mem` must be null or an address in the direct map.
#[export]
unsafe extern "C" fn kho_restore_free(mem: *mut c_void) {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if mem.is_null() {
        return;
    }
    match kho_pages::restore_folio(kho_mm::phys(mem)) {
        // SAFETY: The folio was just made, with one reference.
        Some(folio) => unsafe { bindings::kho_glue_folio_put(folio) },
        None => {
            // Which memory it was is in the log already.
            if !WARNED.swap(true, Ordering::Relaxed) {
                warn_on!(true);
            }
        }
    }
}

// Subtrees.

/// Hands over `size` bytes at `blob` under `name`, which `kho_retrieve_subtree()` finds in the next
/// kernel.
///
/// To preserve them is the caller's task, before or after this: the next kernel ignores a subtree
/// whose blob is not preserved as a whole.
///
/// May sleep. Returns 0; `-EINVAL` if there are no bytes, or if a part of them is not RAM in the
/// direct map that is online, or lies in a scratch area; `-EADDRNOTAVAIL` if a part was plugged in
/// after this kernel had booted; `-EOPNOTSUPP` with KHO off; `-EEXIST` if there is that name;
/// `-ENOMEM` if the FDT is full, which has one page.
///
/// # Safety
///
/// `name` must be a string that ends with a NUL.
#[export]
unsafe extern "C" fn kho_add_subtree(name: *const c_char, blob: *mut c_void, size: usize) -> c_int {
    // SAFETY: `name` is a string that ends with a NUL.
    errno(unsafe { kho_state::add_subtree(name, blob, size) })
}

/// Takes the subtree back whose blob is at `blob`. If there is none, nothing happens.
///
/// May sleep.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn kho_remove_subtree(blob: *mut c_void) {
    kho_state::remove_subtree(blob);
}

/// Finds the blob that the last kernel has handed over under `name`, and writes where it is to
/// `phys` and its size to `size`, unless that is null.
///
/// The memory is preserved, and can be read; it is the caller's to restore.
///
/// May be called in any context from `mm_core_init_early()` on, `early_param()`s excepted. Returns
/// 0; `-ENOENT` if nothing was handed over or nothing under this name; `-EINVAL` if `phys` is null
/// or the entry is broken.
///
/// # Safety
///
/// `name` must be a string that ends with a NUL; `phys` and `size` must be null or writable.
#[export]
unsafe extern "C" fn kho_retrieve_subtree(
    name: *const c_char,
    phys: *mut u64,
    size: *mut usize,
) -> c_int {
    // SAFETY: `name` is a string that ends with a NUL.
    let blob = unsafe { kho_state::subtree(name) };
    errno(blob.and_then(|blob| {
        if phys.is_null() {
            return Err(EINVAL);
        }
        // SAFETY: Each pointer is null or may be written to.
        unsafe {
            phys.write(blob.phys);
            if !size.is_null() {
                size.write(blob.size as usize);
            }
        }
        Ok(())
    }))
}

// Booting.

/// Looks at what was handed over, and has memblock allocate from scratch only.
///
/// # Safety
///
/// Called once, from `setup_arch()`.
#[export]
#[link_section = ".init.text"]
unsafe extern "C" fn kho_populate(
    fdt_phys: u64,
    fdt_len: u64,
    scratch_phys: u64,
    scratch_len: u64,
) {
    // SAFETY: `setup_arch()` runs on one CPU, long before `kho_memory_init_late()`.
    let memblock = unsafe { Memblock::get() };
    kho_boot::populate(memblock, (fdt_phys, fdt_len), (scratch_phys, scratch_len));
}

/// Checks what was handed over, and gives memblock more memory to allocate from.
///
/// # Safety
///
/// Called once, from `mm_core_init_early()`.
#[export]
#[link_section = ".init.text"]
unsafe extern "C" fn kho_memory_init_early() {
    // SAFETY: `mm_core_init_early()` runs on one CPU, long before `kho_memory_init_late()`.
    kho_boot::init_early(unsafe { Memblock::get() });
}

/// Keeps preserved memory from the page allocator, or reserves scratch on a cold boot.
///
/// # Safety
///
/// Called once, from `mm_core_init()`.
#[export]
#[link_section = ".init.text"]
unsafe extern "C" fn kho_memory_init() {
    // SAFETY: `mm_core_init()` runs on one CPU, long before `kho_memory_init_late()`.
    kho_boot::init(unsafe { Memblock::get() });
}

/// Gives back what lies between preserved memory, as far as that cannot wait.
///
/// # Safety
///
/// Called once, from `mm_core_init()`.
#[export]
#[link_section = ".init.text"]
unsafe extern "C" fn kho_memory_init_free() {
    kho_takeover::init_free();
}

/// Gives back the rest of it.
///
/// # Safety
///
/// Called once, from `page_alloc_init_late()`.
#[export]
#[link_section = ".init.text"]
unsafe extern "C" fn kho_memory_init_late() {
    kho_takeover::init_late();
}

/// Reads `kho=`.
///
/// # Safety
///
/// `arg` must be null or a string that ends with a NUL.
#[export]
#[link_section = ".init.text"]
unsafe extern "C" fn kho_rs_parse_enable(arg: *mut c_char) -> c_int {
    let mut on = false;
    // SAFETY: By the caller's contract; null gives an error.
    let error = unsafe { bindings::kstrtobool(arg, &mut on) };
    if error == 0 {
        kho_state::set_enabled(on);
    }
    error
}

/// Reads `kho_scratch=`.
///
/// # Safety
///
/// `arg` must be null or a string that ends with a NUL.
#[export]
#[link_section = ".init.text"]
unsafe extern "C" fn kho_rs_parse_scratch(arg: *mut c_char) -> c_int {
    // SAFETY: An `early_param()` is read on one CPU, long before `kho_memory_init_late()`.
    let memblock = unsafe { Memblock::get() };
    // SAFETY: `arg` is null or a string that ends with a NUL.
    unsafe { kho_scratch::parse(memblock, arg) };
    // `parse()` has reported a bad value.
    0
}

/// Draws the map of memory that has to be refused, before any can be plugged in.
///
/// # Safety
///
/// Called once, as a `core_initcall`.
#[export]
#[link_section = ".init.text"]
unsafe extern "C" fn kho_rs_map() -> c_int {
    if kho_state::is_enabled() {
        // The map has what is left of scratch.
        kho_scratch::cut();
    }
    kho_place::draw_map();
    0
}

/// Notes memory that is going online.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn kho_rs_plug(pfn: usize, nr_pages: usize) {
    if let Some(frames) =
        kho_key::Pfn::new(pfn as u64).and_then(|pfn| Frames::new(pfn, nr_pages as u64))
    {
        kho_place::plug(frames);
    }
}

/// Makes what this kernel hands over: the tree and the FDT.
///
/// # Safety
///
/// Called once, as an `fs_initcall`.
#[export]
#[link_section = ".init.text"]
unsafe extern "C" fn kho_rs_init() -> c_int {
    // SAFETY: By the caller's contract.
    errno(unsafe { kho_kexec::init() })
}

/// Frees the nodes of the outgoing tree that have become empty. May sleep.
///
/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
unsafe extern "C" fn kho_rs_prune() {
    kho_state::prune();
}

/// Prints the summary for debugfs. May sleep.
///
/// # Safety
///
/// `file` must be a file that is being read, by nobody else.
#[cfg(CONFIG_KEXEC_HANDOVER_DEBUGFS)]
#[export]
unsafe extern "C" fn kho_rs_summary(file: *mut bindings::seq_file) {
    // SAFETY: `file` is being read, by nobody else.
    kho_summary::show(unsafe { kernel::seq_file::SeqFile::from_raw(file) });
}

// Loading the next kernel.

/// Has an image take along where the FDT and the scratch areas are.
///
/// May sleep. Returns 0; `-EAGAIN` if KHO is on, but not up yet; else what adding a segment to the
/// image returns.
///
/// # Safety
///
/// `image` must point to an image that is being loaded.
#[export]
unsafe extern "C" fn kho_fill_kimage(image: *mut bindings::kimage) -> c_int {
    // SAFETY: `image` is an image that is being loaded.
    errno(unsafe { kho_kexec::fill_image(image) })
}

/// Finds a place in scratch for a segment of an image.
///
/// May sleep. Returns 0; 1 if the segment may lie anywhere; `-EADDRNOTAVAIL` if no hole is large
/// enough, or if `func` fails.
///
/// # Safety
///
/// `kbuf` must point to a buffer of an image that is being loaded, which `func` knows.
#[export]
unsafe extern "C" fn kho_locate_mem_hole(
    kbuf: *mut bindings::kexec_buf,
    func: Option<unsafe extern "C" fn(*mut bindings::resource, *mut c_void) -> c_int>,
) -> c_int {
    let Some(func) = func else {
        return EINVAL.to_errno();
    };
    // SAFETY: `kbuf` is a buffer of an image that is being loaded, which `func` knows.
    match unsafe { kho_kexec::locate_hole(kbuf, func) } {
        None => 1,
        Some(result) => errno(result),
    }
}

// Radix trees of other users.

/// Returns the tree that `tree` describes, if it has been initialised.
///
/// # Safety
///
/// `tree` must point to a tree that `kho_radix_init_tree()` was called for; its root is null or
/// that of a sound tree, which is not destroyed during the call.
unsafe fn radix(tree: *const bindings::kho_radix_tree) -> Option<Tree<Direct>> {
    // SAFETY: `tree` is a tree that stays while this runs.
    let root = unsafe { (*tree).root };
    if warn_on!(root.is_null()) {
        return None;
    }
    let root = NodeAddr::new(kho_mm::phys(root))?;
    // SAFETY: By the caller's contract the tree is sound.
    Some(Tree::from_root(unsafe { Direct::new() }, root))
}

/// Adds `key` to a tree. To add a key that is there is no error.
///
/// May sleep. Several callers may add and delete keys at once, without a lock. Returns 0; `-ERANGE`
/// for a key that is wider than `KHO_RADIX_KEY_WIDTH`; `-ENOMEM`; `-EINVAL` for a tree that was not
/// initialised.
///
/// # Safety
///
/// As [`radix`].
#[export]
unsafe extern "C" fn kho_radix_add_key(tree: *mut bindings::kho_radix_tree, key: usize) -> c_int {
    // SAFETY: `tree` was initialised, and is not destroyed during the call.
    let Some(tree) = (unsafe { radix(tree) }) else {
        return EINVAL.to_errno();
    };
    errno(Key::new(key as u64).ok_or(ERANGE).and_then(|key| {
        tree.add(key).map_err(|_| ENOMEM)?;
        Ok(())
    }))
}

/// Deletes `key` from a tree. A key that is not there gives a line in the log.
///
/// May sleep. Nodes stay, also those that become empty. Several callers may add and delete keys at
/// once, without a lock.
///
/// # Safety
///
/// As [`radix`].
#[export]
unsafe extern "C" fn kho_radix_del_key(tree: *mut bindings::kho_radix_tree, key: usize) {
    // SAFETY: `tree` was initialised, and is not destroyed during the call.
    if let (Some(tree), Some(key)) = (unsafe { radix(tree) }, Key::new(key as u64)) {
        if tree.remove(key) == Removal::Absent {
            kho_log::complain(kho_log::Complaint::NoKey, key.get());
        }
    }
}

/// Initialises `tree` with the root node `root`, or with a new one if that is null.
///
/// A caller that has taken nodes of a tree back, other than by `kho_radix_destroy_tree()`, must
/// call this before the tree or its root is used again: only then is it certain that no CPU
/// remembers where a leaf was.
///
/// May sleep if `root` is null, and be called in any context if not. Returns 0 or `-ENOMEM`.
///
/// # Safety
///
/// `tree` must be writable; `root` must be null or the root of a sound tree.
#[export]
unsafe extern "C" fn kho_radix_init_tree(
    tree: *mut bindings::kho_radix_tree,
    root: *mut bindings::kho_radix_node,
) -> c_int {
    let mut root = root;
    if root.is_null() {
        // SAFETY: The tree is made here.
        let Ok(new) = Tree::new(unsafe { Direct::new() }) else {
            return ENOMEM.to_errno();
        };
        root = kho_mm::virt(new.root().get());
    }
    // The page may have been the root of another tree, whose nodes its owner has taken back: no CPU
    // may go where a leaf of that tree was.
    // SAFETY: No node is looked at.
    unsafe { Direct::new() }.new_generation();
    // SAFETY: By the caller's contract. The mutex is there for the caller: the tree needs none.
    unsafe {
        bindings::kho_glue_mutex_init(&raw mut (*tree).lock);
        (*tree).root = root;
    }
    0
}

/// Frees all nodes of a tree, the root too. If it has none, nothing happens.
///
/// May be called in any context. All nodes must come from the page allocator, each one page.
///
/// # Safety
///
/// As [`radix`]; nobody may be using the tree.
#[export]
unsafe extern "C" fn kho_radix_destroy_tree(tree: *mut bindings::kho_radix_tree) {
    // SAFETY: `tree` was initialised, and nobody else is using it.
    unsafe {
        if !(*tree).root.is_null() {
            if let Some(nodes) = radix(tree) {
                nodes.destroy();
            }
            (*tree).root = ptr::null_mut();
        }
    }
}

/// Shows all keys of a tree, and all of its nodes, to the callbacks, until one returns something
/// else than 0, which is then returned.
///
/// May be called in any context that the callbacks may be; no lock is held. They may use the tree.
/// Returns 0 at the end, `-EINVAL` for a tree that was not initialised.
///
/// # Safety
///
/// As [`radix`]; the callbacks must be safe to call with what they are documented to get and
/// `data`.
#[export]
unsafe extern "C" fn kho_radix_walk_tree(
    tree: *mut bindings::kho_radix_tree,
    cb: *const bindings::kho_radix_walk_cb,
    data: *mut c_void,
) -> c_int {
    // SAFETY: `tree` was initialised, and is not destroyed during the call.
    let Some(tree) = (unsafe { radix(tree) }) else {
        return EINVAL.to_errno();
    };
    let mut walk = CWalk {
        // SAFETY: The callbacks stay during the call, as `data` does.
        cb: unsafe { &*cb },
        data,
        stopped: 0,
    };
    tree.visit(&mut walk);
    walk.stopped
}

/// Callbacks in C, and what they are given.
struct CWalk<'a> {
    cb: &'a bindings::kho_radix_walk_cb,
    data: *mut c_void,
    /// What the callback returned that stopped the walk.
    stopped: c_int,
}

impl Visitor for CWalk<'_> {
    fn node(&mut self, addr: NodeAddr, _first: u64, _last: u64) -> Step {
        if let Some(node) = self.cb.node {
            // SAFETY: By the contract of `kho_radix_walk_tree()`.
            self.stopped = unsafe { node(addr.get(), self.data) };
        }
        if self.stopped == 0 {
            Step::In
        } else {
            Step::Stop
        }
    }

    fn leaf(&mut self, first: u64, leaf: &Node) -> bool {
        let Some(callback) = self.cb.leaf else {
            return true;
        };
        for (bit, count) in leaf.runs() {
            for i in 0..count {
                let key = first | bit.saturating_add(i);
                // SAFETY: By the contract of `kho_radix_walk_tree()`.
                self.stopped = unsafe { callback(key as usize, self.data) };
                if self.stopped != 0 {
                    return false;
                }
            }
        }
        true
    }
}
