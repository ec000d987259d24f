// SPDX-License-Identifier: GPL-2.0

//! The outgoing side: the tree and the FDT are set up once, and passed to each image.
//!
//! Also the note that each kernel leaves for the next one, and the places for segments of an image.
//! The functions for images run under the lock that `kexec_file_load()` holds.

use super::kho_libfdt::{
    RootFdt,
    KHO_FDT_MUTEX, //
};
use super::kho_mm;
use super::kho_nodemem::{
    Direct,
    KHO_PRUNE_MUTEX, //
};
use super::kho_pages;
use super::kho_place;
use super::kho_radix::{
    NodeAddr,
    Tree, //
};
use super::kho_range::{
    self,
    Attempts,
    Shortage, //
};
use super::kho_scratch;
use super::kho_state;
use core::mem::size_of;
use kernel::{
    bindings,
    error::to_result,
    prelude::*, //
};

/// What the walk over scratch calls with a resource and the buffer; 1 means that it found a hole.
type FindHole = unsafe extern "C" fn(*mut bindings::resource, *mut c_void) -> c_int;

/// Alignment of the scratch table in the image; a power of two that makes it easy to map.
const TABLE_ALIGN: usize = bindings::SZ_64K as usize;

/// Adds to an image what the next kernel has to know: where the root FDT is, and a copy of the
/// table of scratch areas.
///
/// # Safety
///
/// `image` must point to an image that is being loaded.
pub(crate) unsafe fn fill_image(image: *mut bindings::kimage) -> Result {
    // SAFETY: By the caller's contract.
    let is_crash = unsafe { (*image).type_() } == bindings::KEXEC_TYPE_CRASH;
    if !kho_state::is_enabled() || is_crash {
        return Ok(());
    }
    let fdt = kho_state::out_fdt().ok_or(EAGAIN)?;
    let table = kho_place::scratch();
    let size = core::mem::size_of_val(table);
    let mut buffer = bindings::kexec_buf {
        image,
        buffer: table.as_ptr().cast_mut().cast(),
        bufsz: size,
        mem: bindings::KEXEC_BUF_MEM_UNKNOWN as usize,
        memsz: size,
        buf_align: TABLE_ALIGN,
        buf_max: usize::MAX,
        top_down: true,
        ..Default::default()
    };
    // SAFETY: By the caller's contract; the table stays.
    let error = unsafe { bindings::kexec_add_buffer(&mut buffer) };
    to_result(error)?;
    // SAFETY: By the caller's contract; the segment is the one that was just added.
    unsafe {
        let last = (*image).nr_segments.saturating_sub(1);
        (*image).kho.fdt = fdt;
        (*image).kho.scratch = (&raw mut (*image).segment)
            .cast::<bindings::kexec_segment>()
            .add(last);
    }
    Ok(())
}

/// Looks for a place for a segment in scratch: nothing else is safe from being preserved.
/// [`None`] means that the segment may lie anywhere.
///
/// # Errors
///
/// `EADDRNOTAVAIL` if no area has a hole that is large enough.
///
/// # Safety
///
/// `buffer` must point to a buffer of an image that is being loaded, which `find` knows.
pub(crate) unsafe fn locate_hole(
    buffer: *mut bindings::kexec_buf,
    find: FindHole,
) -> Option<Result> {
    // SAFETY: By the caller's contract.
    let is_crash = unsafe { (*(*buffer).image).type_() } == bindings::KEXEC_TYPE_CRASH;
    if !kho_state::is_enabled() || is_crash {
        return None;
    }
    // SAFETY: By the caller's contract.
    if unsafe { is_kernel(&*buffer) && (*buffer).buf_min == 0 } {
        // SAFETY: See the static.
        unsafe { ATTEMPTS = Attempts::NONE };
    }
    for (start, end) in kho_place::areas() {
        let mut resource = bindings::resource {
            start,
            end: end.saturating_sub(1),
            ..Default::default()
        };
        // SAFETY: By the caller's contract.
        match unsafe { find(&mut resource, buffer.cast()) } {
            0 => {}
            1 => return Some(Ok(())),
            _ => break,
        }
    }
    // SAFETY: By the caller's contract.
    unsafe { report_shortage(&*buffer) };
    Some(Err(EADDRNOTAVAIL))
}

/// What has been short while an image is being loaded.
// The lock of kexec is held whenever an image is being loaded.
static mut ATTEMPTS: Attempts = Attempts::NONE;

/// Returns whether a segment is the kernel, which arm64's loader tries to place again and again.
///
/// # Safety
///
/// `buffer` must be of an image that is being loaded.
unsafe fn is_kernel(buffer: &bindings::kexec_buf) -> bool {
    // SAFETY: By the caller's contract.
    let kernel = unsafe { (*buffer.image).kernel_buf };
    cfg!(CONFIG_ARM64) && buffer.buffer == kernel
}

/// Logs by how much scratch is too small for a segment, if the image is not loaded for it.
///
/// # Safety
///
/// `buffer` must be of an image that is being loaded.
#[cold]
unsafe fn report_shortage(buffer: &bindings::kexec_buf) {
    // SAFETY: By the caller's contract.
    let image = unsafe { &*buffer.image };
    let placed = image.segment.iter().take(image.nr_segments);
    let is_kernel_placed = placed.clone().any(|segment| {
        // SAFETY: Both members of the union are pointers, of which any bits are a value.
        let source = unsafe { segment.__bindgen_anon_1.kbuf };
        source == image.kernel_buf
    });
    let placed = placed.map(|segment| (segment.mem as u64, segment.memsz as u64));
    let mut hole = 0;
    for (start, end) in kho_place::areas() {
        let start = start.max(buffer.buf_min as u64);
        let end = end.min((buffer.buf_max as u64).saturating_add(1));
        let free = kho_range::largest_hole(start, end, buffer.buf_align as u64, placed.clone());
        hole = free.max(hole);
    }
    let shortage = Shortage {
        size: buffer.memsz as u64,
        hole,
    };
    let attempts = &raw mut ATTEMPTS;
    // SAFETY: See the static.
    let attempts = unsafe { &mut *attempts };
    // SAFETY: By the caller's contract.
    let shortage = if unsafe { is_kernel(buffer) } {
        attempts.end(shortage, buffer.buf_min == 0)
    } else if cfg!(CONFIG_ARM64) && is_kernel_placed {
        attempts.note(shortage);
        None
    } else {
        Some(shortage)
    };
    let Some(shortage) = shortage else { return };
    // Segments are made of pages, and so are holes.
    pr_err!(
        "no room in scratch for a segment of {} KiB: the largest free piece has {} KiB; \
         boot with a kho_scratch= that is larger by {} KiB\n",
        shortage.size >> 10,
        shortage.hole >> 10,
        shortage.missing() >> 10
    );
}

/// Reads the note of the last kernel, says what it says, and returns how many kexecs there have
/// been since the machine was switched on; 0 if there is none.
#[link_section = ".init.text"]
pub(crate) fn read_metadata() -> u32 {
    type Metadata = bindings::kho_kexec_metadata;

    // SAFETY: The name ends with a NUL.
    let blob = unsafe { kho_state::subtree(bindings::KHO_METADATA_NODE_NAME.as_ptr()) };
    // It is fine to have left none.
    let Ok(blob) = blob else { return 0 };
    if blob.size < size_of::<u32>() as u64 {
        pr_warn!("kexec-metadata blob too small: {} bytes\n", blob.size);
        return 0;
    }
    let metadata = kho_mm::virt::<Metadata>(blob.phys);
    // SAFETY: There is RAM with at least the version, which is all that is looked at.
    let version = unsafe { (&raw const (*metadata).version).read_unaligned() };
    if version != bindings::KHO_KEXEC_METADATA_VERSION {
        pr_warn!("kexec-metadata version {version} not supported\n");
        return 0;
    }
    if blob.size < size_of::<Metadata>() as u64 {
        pr_warn!("kexec-metadata blob too small: {} bytes\n", blob.size);
        return 0;
    }
    // SAFETY: There is RAM that is large enough, and any bytes make the structure.
    let metadata = unsafe { metadata.read_unaligned() };
    let (release, count) = (metadata.previous_release, metadata.kexec_count);
    let release = CStr::from_bytes_until_nul(&release)
        .ok()
        .and_then(|release| release.to_str().ok())
        .unwrap_or("?");
    pr_info!("exec from: {release} (count {count})\n");
    count
}

/// Leaves the note for the next kernel.
#[link_section = ".init.text"]
pub(crate) fn write_metadata(count: u32) -> Result {
    let size = size_of::<bindings::kho_kexec_metadata>();
    let metadata = kho_pages::alloc_preserve(size)?.cast::<bindings::kho_kexec_metadata>();
    let mut note = bindings::kho_kexec_metadata {
        version: bindings::KHO_KEXEC_METADATA_VERSION,
        kexec_count: count,
        ..Default::default()
    };
    // SAFETY: The kernel's release is a string that ends with a NUL, and the array is as long as
    // it says.
    unsafe {
        let to = (&raw mut note.previous_release).cast();
        let len = bindings::__NEW_UTS_LEN as usize + 1;
        bindings::sized_strscpy(to, bindings::kho_glue_release(), len);
    }
    // SAFETY: The memory is ours, and large enough.
    unsafe { metadata.write_unaligned(note) };
    // SAFETY: The name ends with a NUL, and the memory is in the direct map.
    let added = unsafe {
        kho_state::add_subtree(
            bindings::KHO_METADATA_NODE_NAME.as_ptr(),
            metadata.cast(),
            size,
        )
    };
    if added.is_err() {
        // SAFETY: It was allocated above.
        unsafe { kho_pages::unpreserve_free(metadata.cast()) };
    }
    added
}

/// Makes the outgoing tree and FDT.
///
/// # Safety
///
/// To be called once, as an `fs_initcall`.
#[link_section = ".init.text"]
pub(crate) unsafe fn init() -> Result {
    // SAFETY: By the caller's contract this is the only call.
    unsafe {
        KHO_FDT_MUTEX.init();
        KHO_PRUNE_MUTEX.init();
    }
    let is_on = kho_state::is_enabled();
    pr_info!(
        "Rust implementation, {}\n",
        if is_on { "on" } else { "off" }
    );
    if !is_on {
        return Ok(());
    }
    let result = init_tree();
    match &result {
        Ok(()) => kho_scratch::open(),
        Err(error) => {
            pr_err!("cannot set up the next handover, disabling kexec handover: {error:?}\n");
            kho_state::set_enabled(false);
            kho_scratch::free();
        }
    }
    result
}

#[link_section = ".init.text"]
fn init_tree() -> Result {
    // SAFETY: The tree is made here.
    let tree = Tree::new(unsafe { Direct::new() }).map_err(|_| ENOMEM)?;
    kho_state::set_out_tree(Some(tree.root()));
    if let Err(error) = init_fdt(tree.root()) {
        kho_state::set_out_fdt(0);
        kho_state::set_out_tree(None);
        tree.destroy();
        return Err(error);
    }
    Ok(())
}

#[link_section = ".init.text"]
fn init_fdt(root: NodeAddr) -> Result {
    let page = kho_pages::alloc_preserve(bindings::PAGE_SIZE)?;
    // SAFETY: The page has just been allocated, and only this function knows it.
    if unsafe { RootFdt::create(page, root) }.is_err() {
        // SAFETY: It came from `alloc_preserve()`, and is not used after this.
        unsafe { kho_pages::unpreserve_free(page) };
        return Err(EINVAL);
    }
    kho_state::set_out_fdt(kho_mm::phys(page));
    kho_state::open_debugfs()?;
    let count = read_metadata();
    // Only a number and a name get lost.
    if let Err(error) = write_metadata(count.saturating_add(1)) {
        pr_warn!("failed to initialize kexec-metadata subtree: {error:?}\n");
    }
    kho_state::show_incoming();
    Ok(())
}
