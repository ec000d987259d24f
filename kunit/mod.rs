// SPDX-License-Identifier: GPL-2.0

//! KUnit suites, run in the kernel at boot, before init.
//!
//! What needs no kernel is tested on the host, see `host/`. Here are the parts that do: nodes from
//! the page allocator, struct pages, vmalloc areas and libfdt. To be restored, memory need not
//! come from another kernel: the tests write the marks that takeover would have written to pages
//! of their own.
//!
//! All suites pass with KHO on and off. What is refused with KHO off is part of the tests; see
//! [`expect`].

use super::kho_key::{
    Block,
    Order, //
};
use super::kho_mm::{
    self,
    Mark,
    Page, //
};
use super::{
    kho_nodemem,
    kho_pages,
    kho_place,
    kho_state,
    PAGE_SHIFT, //
};
use core::sync::atomic::Ordering;
use kernel::{
    bindings,
    error::{
        from_err_ptr,
        to_result, //
    },
    prelude::*, //
};

/// Returns what an operation on preserved memory has to return that would return `result` with
/// KHO on.
fn expect(result: Result) -> c_int {
    let on = kho_state::is_enabled();
    super::errno(if on { result } else { Err(EOPNOTSUPP) })
}

/// Returns a pointer to the struct page of a frame, which is null if it is not online.
fn page_ptr(pfn: u64) -> *mut bindings::page {
    Page::online(pfn).map_or(core::ptr::null_mut(), Page::as_ptr)
}

/// Physically contiguous pages, `2^order` of them, that are given back when this is dropped.
struct Pages {
    phys: u64,
    order: u32,
    free: bool,
}

impl Pages {
    fn new(order: u32) -> Result<Self> {
        // SAFETY: The order is one of the page allocator's.
        let page = unsafe { bindings::alloc_pages(bindings::GFP_KERNEL, order) };
        if page.is_null() {
            return Err(ENOMEM);
        }
        // As takeover leaves single pages: each has a reference, and was allocated by nobody here.
        // SAFETY: The pages are ours, and not a folio.
        unsafe {
            bindings::split_page(page, order);
            bindings::kho_glue_clear_tags(page, 1 << order);
        }
        // SAFETY: There is a page.
        let frames = unsafe { kho_mm::page_frames(page, 1) }.ok_or(EINVAL)?;
        Ok(Self {
            phys: frames.phys(),
            order,
            free: true,
        })
    }

    fn count(&self) -> usize {
        1 << self.order
    }

    fn phys(&self, index: u64) -> u64 {
        self.phys.wrapping_add(index << PAGE_SHIFT)
    }

    fn page(&self, index: u64) -> Result<Page> {
        Page::online(self.phys(index) >> PAGE_SHIFT).ok_or(EINVAL)
    }

    fn ptr(&self, index: u64) -> *mut bindings::page {
        page_ptr(self.phys(index) >> PAGE_SHIFT)
    }

    /// Preserves `count` pages from `index` on.
    fn preserve(&self, index: u64, count: usize) -> c_int {
        // SAFETY: The pages are ours.
        unsafe { crate::kho_preserve_pages(self.ptr(index), count) }
    }

    /// Undoes that.
    fn unpreserve(&self, index: u64, count: usize) {
        // SAFETY: The pages are ours.
        unsafe { crate::kho_unpreserve_pages(self.ptr(index), count) };
    }

    /// Makes a block what takeover leaves of it.
    fn mark(&self, index: u64, order: u32) -> Result {
        let order = Order::new(order).ok_or(EINVAL)?;
        if kho_mm::is_folio(order) {
            // SAFETY: The pages are ours.
            unsafe { bindings::kho_kunit_make_folio(self.ptr(index), order.get()) };
        }
        self.page(index)?.mark(Mark::Preserved, order);
        Ok(())
    }

    /// Returns whether a block of `order` that starts at `index` could be restored.
    fn is_marked(&self, index: u64, order: u32) -> bool {
        self.page(index)
            .ok()
            .and_then(|page| page.order(Mark::Preserved))
            .is_some_and(|found| found.get() == order)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.free {
            for index in 0..self.count() as u64 {
                if let Ok(page) = self.page(index) {
                    page.private().store(0, Ordering::Relaxed);
                    // SAFETY: Each has one reference, which is ours.
                    unsafe { kho_mm::free_page(self.phys(index)) };
                }
            }
        }
    }
}

/// An area of `vmalloc()`, which is freed when this is dropped.
struct Area(*mut c_void);

impl Area {
    fn new(pages: usize) -> Result<Self> {
        // SAFETY: Takes any size.
        Self::at(unsafe { bindings::kho_kunit_vmalloc(pages * bindings::PAGE_SIZE) })
    }

    /// Returns the area at `ptr`, unless that is null.
    fn at(ptr: *mut c_void) -> Result<Self> {
        (!ptr.is_null()).then(|| Self(ptr)).ok_or(ENOMEM)
    }

    fn vm(&self) -> &bindings::vm_struct {
        // SAFETY: There is an area.
        unsafe { &*bindings::find_vm_area(self.0) }
    }

    /// Returns how many pages are mapped as one.
    fn step(&self) -> usize {
        // SAFETY: Only reads the area.
        1 << unsafe { bindings::get_vm_area_page_order(core::ptr::from_ref(self.vm()).cast_mut()) }
    }

    /// Returns where the pointer to page `index` is.
    fn page(&self, index: usize) -> *mut *mut bindings::page {
        self.vm().pages.wrapping_add(index)
    }

    /// Returns the first word of page `index`.
    fn word(&self, index: usize) -> u64 {
        let page = self.0.wrapping_byte_add(index * bindings::PAGE_SIZE);
        // SAFETY: The area has that page.
        unsafe { page.cast::<u64>().read() }
    }

    fn preserve(&self, preservation: *mut bindings::kho_vmalloc) -> c_int {
        // SAFETY: The record is the test's.
        unsafe { crate::kho_preserve_vmalloc(self.0, preservation) }
    }

    /// Tries all pages one by one: [`Ok`] if none is preserved.
    fn none_preserved(&self) -> Result {
        let step = self.step();
        for index in (0..self.vm().nr_pages).step_by(step) {
            // SAFETY: The area has these pages.
            unsafe {
                let page = self.page(index).read();
                to_result(crate::kho_preserve_pages(page, step))?;
                crate::kho_unpreserve_pages(page, step);
            }
        }
        Ok(())
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: The area is ours.
        unsafe { bindings::vfree(self.0) };
    }
}

#[kunit_tests(rust_kho_radix)]
mod radix {
    use super::super::kho_key::Key;
    use super::super::kho_nodemem::Direct;
    use super::super::kho_radix::{
        Node,
        NodeAddr,
        NodeMem,
        Removal,
        Step,
        Tree,
        Visitor, //
    };
    use super::*;

    /// Counts nodes and keys.
    #[derive(Default)]
    struct Count {
        nodes: u64,
        keys: u64,
    }

    impl Visitor for Count {
        fn node(&mut self, _addr: NodeAddr, _first: u64, _last: u64) -> Step {
            self.nodes += 1;
            Step::In
        }

        fn leaf(&mut self, _first: u64, leaf: &Node) -> bool {
            self.keys += leaf.runs().map(|(_, count)| count).sum::<u64>();
            true
        }
    }

    fn count(tree: &Tree<Direct>) -> (u64, u64) {
        let mut count = Count::default();
        tree.visit(&mut count);
        (count.nodes, count.keys)
    }

    fn key(key: u64) -> Result<Key> {
        Key::new(key).ok_or(ERANGE)
    }

    fn tree() -> Result<Tree<Direct>> {
        // SAFETY: The tree is made here.
        Tree::new(unsafe { Direct::new() }).map_err(|_| ENOMEM)
    }

    extern "C" fn sum_leaf(key: usize, data: *mut c_void) -> c_int {
        // SAFETY: The test passes a number.
        unsafe { *data.cast::<u64>() += key as u64 };
        0
    }

    extern "C" fn stop_leaf(_key: usize, _data: *mut c_void) -> c_int {
        -7
    }

    /// Where the nodes of a tree are.
    #[derive(Default)]
    struct Nodes {
        at: [u64; 8],
        count: usize,
    }

    extern "C" fn note_node(phys: u64, data: *mut c_void) -> c_int {
        // SAFETY: The test passes such a list.
        let nodes = unsafe { &mut *data.cast::<Nodes>() };
        match nodes.at.get_mut(nodes.count) {
            Some(at) => *at = phys,
            None => return -8,
        }
        nodes.count += 1;
        0
    }

    /// Returns what it takes to have the keys of a tree shown.
    fn keys(
        leaf: unsafe extern "C" fn(usize, *mut c_void) -> c_int,
    ) -> bindings::kho_radix_walk_cb {
        bindings::kho_radix_walk_cb {
            leaf: Some(leaf),
            node: None,
        }
    }

    /// Returns whether the page at `phys` is all zeroes.
    fn is_zero(phys: u64) -> bool {
        let words = kho_mm::virt::<u64>(phys);
        // SAFETY: The test has the page.
        (0..bindings::PAGE_SIZE / 8).all(|i| unsafe { words.add(i).read() } == 0)
    }

    fn clear(phys: u64) {
        // SAFETY: The test has the page.
        unsafe { kho_mm::virt::<u8>(phys).write_bytes(0, bindings::PAGE_SIZE) };
    }

    #[test]
    fn nodes_come_and_go() -> Result {
        let tree = tree()?;
        assert_eq!(count(&tree), (1, 0));
        assert!(tree.add(key(5)?) == Ok(true));
        assert!(tree.add(key(5)?) == Ok(false));
        assert_eq!(count(&tree), (6, 1));
        // The same leaf, the next leaf, and one at the other end of the tree.
        assert!(tree.add(key(6)?) == Ok(true));
        assert_eq!(count(&tree), (6, 2));
        assert!(tree.add(key(1 << 15)?) == Ok(true));
        assert_eq!(count(&tree), (7, 3));
        assert!(tree.add(Key::MAX) == Ok(true));
        assert_eq!(count(&tree), (12, 4));

        assert!(tree.remove(key(7)?) == Removal::Absent);
        assert!(tree.remove(key(5)?) == Removal::Removed);
        assert!(tree.remove(key(6)?) == Removal::Emptied);
        assert!(tree.remove(Key::MAX) == Removal::Emptied);
        assert_eq!(count(&tree), (12, 1));
        kho_nodemem::prune(&tree);
        assert_eq!(count(&tree), (6, 1));
        assert!(tree.contains(key(1 << 15)?));
        assert!(tree.remove(key(1 << 15)?) == Removal::Emptied);
        kho_nodemem::prune(&tree);
        assert_eq!(count(&tree), (1, 0));
        tree.destroy();
        Ok(())
    }

    #[test]
    fn hints_do_not_outlive_nodes() -> Result {
        let other = tree()?;
        for _ in 0..3 {
            let tree = tree()?;
            for _ in 0..3 {
                assert!(tree.add(key(5)?) == Ok(true));
                assert!(other.add(key(5)?) == Ok(true));
                assert!(tree.add(key(6)?) == Ok(true));
                assert!(tree.remove(key(5)?) == Removal::Removed);
                assert!(tree.remove(key(6)?) == Removal::Emptied);
                assert!(other.remove(key(5)?) == Removal::Emptied);
                kho_nodemem::prune(&tree);
                assert_eq!(count(&tree), (1, 0));
                assert_eq!(count(&other), (6, 0));
            }
            assert!(tree.add(key(5)?) == Ok(true));
            assert_eq!(count(&tree), (6, 1));
            tree.destroy();
        }
        other.destroy();
        Ok(())
    }

    #[test]
    fn c_api() -> Result {
        let mut c = bindings::kho_radix_tree::default();
        let mut sum = 0u64;
        // SAFETY: The tree is initialised first and destroyed last.
        unsafe {
            let tree = &raw mut c;
            let data = (&raw mut sum).cast();
            assert_eq!(crate::kho_radix_init_tree(tree, core::ptr::null_mut()), 0);
            for key in [1, 2, 3, 1000, 1 << 40] {
                assert_eq!(crate::kho_radix_add_key(tree, key), 0);
            }
            // Adding a key twice is no error here: it is a set.
            assert_eq!(crate::kho_radix_add_key(tree, 2), 0);
            assert_eq!(crate::kho_radix_add_key(tree, 1 << 53), ERANGE.to_errno());
            crate::kho_radix_del_key(tree, 3);
            assert_eq!(crate::kho_radix_walk_tree(tree, &keys(sum_leaf), data), 0);
            assert_eq!(sum, 1 + 2 + 1000 + (1 << 40));
            assert_eq!(crate::kho_radix_walk_tree(tree, &keys(stop_leaf), data), -7);
            crate::kho_radix_destroy_tree(tree);
            assert!((*tree).root.is_null());
        }
        Ok(())
    }

    #[test]
    fn reused_root_starts_anew() -> Result {
        let mut root = Pages::new(0)?;
        clear(root.phys);
        let mut c = bindings::kho_radix_tree::default();
        let mut nodes = Nodes::default();
        let mut sum = 0u64;
        // SAFETY: The tree is initialised first and destroyed last; the pages are ours.
        unsafe {
            let tree = &raw mut c;
            let page = kho_mm::virt(root.phys);
            assert_eq!(crate::kho_radix_init_tree(tree, page), 0);
            assert!(core::ptr::eq((*tree).root, page));
            assert_eq!(crate::kho_radix_add_key(tree, 5), 0);
            let walk = bindings::kho_radix_walk_cb {
                leaf: None,
                node: Some(note_node),
            };
            let data = (&raw mut nodes).cast();
            assert_eq!(crate::kho_radix_walk_tree(tree, &walk, data), 0);
            assert_eq!(nodes.count, 6);
            assert_eq!(nodes.at[0], root.phys);
            let at = nodes.at;
            // What a callback returns ends the walk: there is no room for more nodes.
            nodes.count = 4;
            assert_eq!(crate::kho_radix_walk_tree(tree, &walk, data), -8);

            // The owner takes the nodes back, for something else, and uses the root again.
            for phys in &at[..6] {
                clear(*phys);
            }
            assert_eq!(crate::kho_radix_init_tree(tree, page), 0);
            assert_eq!(crate::kho_radix_add_key(tree, 6), 0);
            for phys in &at[1..6] {
                assert!(is_zero(*phys));
                kho_mm::free_page(*phys);
            }
            let data = (&raw mut sum).cast();
            assert_eq!(crate::kho_radix_walk_tree(tree, &keys(sum_leaf), data), 0);
            assert_eq!(sum, 6);
            crate::kho_radix_destroy_tree(tree);
            root.free = false;
        }
        Ok(())
    }

    #[test]
    fn empty_nodes_go_by_themselves() -> Result {
        let Some(tree) = kho_state::out_tree() else {
            assert!(!kho_state::is_enabled());
            return Ok(());
        };
        // No block of RAM has this key.
        let (odd, _) = Key::bounds(Order::new(30).ok_or(EINVAL)?);
        // SAFETY: The tree is this kernel's own.
        let direct = unsafe { Direct::new() };
        let is_there = || {
            let _pass = direct.enter();
            tree.find_leaf(odd).is_some()
        };
        assert!(tree.add(odd) == Ok(true));
        assert!(is_there());
        kho_pages::unpreserve(odd);
        // It takes a second and a grace period; a minute is never.
        let mut turns = 0;
        while is_there() && turns < 600 {
            // SAFETY: May be called by anyone who may sleep.
            unsafe { bindings::msleep(100) };
            turns += 1;
        }
        assert!(!is_there());
        Ok(())
    }

    #[test]
    fn outgoing_tree_is_pruned() -> Result {
        let Some(tree) = kho_state::out_tree() else {
            assert!(!kho_state::is_enabled());
            return Ok(());
        };
        kho_state::prune();
        let before = count(&tree);
        // No block of RAM has this key, and it is gone before anyone else looks.
        let (odd, _) = Key::bounds(Order::new(30).ok_or(EINVAL)?);
        assert!(tree.add(odd) == Ok(true));
        assert!(count(&tree).0 > before.0);
        assert!(tree.remove(odd) == Removal::Emptied);
        kho_state::prune();
        assert_eq!(count(&tree), before);
        Ok(())
    }
}

#[kunit_tests(rust_kho_pages)]
mod pages {
    use super::*;

    #[test]
    fn double_preservation_is_noticed() -> Result {
        let pages = Pages::new(2)?;
        assert_eq!(pages.preserve(0, 4), expect(Ok(())));
        assert_eq!(pages.preserve(0, 4), expect(Err(EEXIST)));
        pages.unpreserve(0, 4);
        assert_eq!(pages.preserve(0, 4), expect(Ok(())));
        pages.unpreserve(0, 4);
        Ok(())
    }

    #[test]
    fn failed_preservation_leaves_nothing() -> Result {
        let pages = Pages::new(3)?;
        // Pages 1 to 6 are cut into 1, 2-3, 4-5, 6; the third cut is taken.
        assert_eq!(pages.preserve(4, 2), expect(Ok(())));
        assert_eq!(pages.preserve(1, 6), expect(Err(EEXIST)));
        // What came before it is free again, and it is not.
        assert_eq!(pages.preserve(1, 3), expect(Ok(())));
        assert_eq!(pages.preserve(4, 2), expect(Err(EEXIST)));
        pages.unpreserve(1, 3);
        pages.unpreserve(4, 2);
        Ok(())
    }

    #[test]
    fn scratch_is_refused() -> Result {
        if !kho_state::is_enabled() {
            return Ok(());
        }
        assert!(!kho_place::scratch().is_empty());
        let page = 1u64 << PAGE_SHIFT;
        for (start, end) in kho_place::areas() {
            // Steps that meet all parts of the map, and the last page.
            for step in 0..=(end - start) >> 20 {
                let phys = (start + (step << 20)).min(end - page);
                let block = Block::at(phys, Order::ZERO).ok_or(EINVAL)?;
                assert!(kho_place::may_be_refused(block));
                assert!(kho_place::in_scratch(phys, page));
                // A larger block that starts in memory before the area, or in it.
                let large = block.enclosing(Order::new(15).ok_or(EINVAL)?);
                assert!(kho_place::may_be_refused(large));
            }
            // SAFETY: Always safe to call.
            assert!(unsafe { crate::kho_scratch_overlap(start, 1) });
        }
        // Most of memory is told from scratch at once: these pages, if any.
        // SAFETY: A number that does not change any more.
        let frames = unsafe { bindings::max_pfn } as u64;
        let blocks =
            (0..64).filter_map(|n| Block::at((frames * n / 64) << PAGE_SHIFT, Order::ZERO));
        let other = blocks.filter(|block| !kho_place::may_be_refused(*block));
        assert!(other.count() > 16);
        Ok(())
    }

    /// A page in a scratch area, allocated as the page allocator's users of CMA do.
    struct ScratchPage(u64);

    impl ScratchPage {
        fn new() -> Option<Self> {
            kho_place::areas()
                .flat_map(|(start, end)| (start..end).step_by(2 << 20))
                .map(|phys| phys >> PAGE_SHIFT)
                // SAFETY: Takes any page that has a struct page, and may fail.
                .find(|pfn| unsafe { bindings::kho_kunit_take_page(*pfn as usize) })
                .map(Self)
        }

        fn phys(&self) -> u64 {
            self.0 << PAGE_SHIFT
        }

        fn ptr(&self) -> *mut bindings::page {
            page_ptr(self.0)
        }
    }

    impl Drop for ScratchPage {
        fn drop(&mut self) {
            // SAFETY: Allocated like that.
            unsafe { bindings::free_contig_range(self.0 as usize, 1) };
        }
    }

    #[test]
    fn scratch_is_refused_at_every_door() -> Result {
        if !kho_state::is_enabled() {
            return Ok(());
        }
        let page = ScratchPage::new().ok_or(EBUSY)?;
        let size = bindings::PAGE_SIZE;
        let einval = EINVAL.to_errno();
        let area = Area::new(4)?;
        let mut preservation = bindings::kho_vmalloc::default();
        // SAFETY: The page is ours, and so is the area; the name ends with a NUL.
        unsafe {
            assert!(crate::kho_scratch_overlap(page.phys(), 1));
            assert_eq!(crate::kho_preserve_folio(page.ptr().cast()), einval);
            assert_eq!(crate::kho_preserve_pages(page.ptr(), 1), einval);
            // Pages that end in scratch; none of them stays preserved.
            assert_eq!(crate::kho_preserve_pages(page.ptr(), 5), einval);
            assert_eq!(crate::kho_preserve_phys(page.phys(), size), einval);
            let (name, blob) = (c"kunit-scratch".as_char_ptr(), kho_mm::virt(page.phys()));
            assert_eq!(crate::kho_add_subtree(name, blob, 1), einval);
            crate::kho_remove_subtree(blob);

            let own = area.page(2).replace(page.ptr());
            let result = area.preserve(&mut preservation);
            area.page(2).write(own);
            assert_eq!(result, einval);
        }
        Ok(())
    }

    #[test]
    fn memory_that_came_back_is_preserved() -> Result {
        let pages = Pages::new(1)?;
        // It was there at boot, wherever it has been meanwhile.
        // SAFETY: Always safe to call.
        unsafe { crate::kho_rs_plug((pages.phys >> PAGE_SHIFT) as usize, 1) };
        let block = Block::at(pages.phys, Order::ZERO).ok_or(EINVAL)?;
        assert!(kho_place::may_be_refused(block));
        for count in 1..=2 {
            assert_eq!(pages.preserve(0, count), expect(Ok(())));
            pages.unpreserve(0, count);
        }
        Ok(())
    }

    #[test]
    fn preserve_phys_checks_its_arguments() -> Result {
        let pages = Pages::new(1)?;
        let phys = pages.phys;
        let size = bindings::PAGE_SIZE;
        let einval = EINVAL.to_errno();
        // SAFETY: Always safe to call; of RAM only the pages are preserved, which are ours.
        let preserve = |phys, size| unsafe { crate::kho_preserve_phys(phys, size) };
        assert_eq!(preserve(phys + 1, size), einval);
        assert_eq!(preserve(phys, size - 1), einval);
        assert_eq!(preserve(phys, size + 1), einval);
        assert_eq!(preserve(phys, 0), einval);
        assert_eq!(preserve(0u64.wrapping_sub(size as u64), 2 * size), einval);
        // No RAM is there.
        assert_eq!(preserve(1 << 51, size), einval);
        // The last page of RAM, and one that is none; with mem= nothing at all is there.
        // SAFETY: A number that does not change any more.
        let end = unsafe { bindings::max_pfn * size } as u64;
        assert_eq!(preserve(end - size as u64, 2 * size), einval);
        // The next kernel's trampoline goes there.
        if cfg!(CONFIG_X86) {
            assert_eq!(preserve(0x1_0000, size), einval);
        }
        assert_eq!(preserve(phys, 2 * size), expect(Ok(())));
        assert_eq!(preserve(phys, 2 * size), expect(Err(EEXIST)));
        pages.unpreserve(0, 2);
        Ok(())
    }

    #[test]
    fn alloc_preserve_checks_its_size() -> Result {
        // SAFETY: Always safe to call.
        let alloc = |size| from_err_ptr(unsafe { crate::kho_alloc_preserve(size) });
        assert!(alloc(0) == Err(EINVAL));
        assert!(alloc(bindings::PAGE_SIZE << 20) == Err(E2BIG));
        match alloc(3 * bindings::PAGE_SIZE) {
            Ok(mem) => {
                assert!(kho_state::is_enabled());
                // SAFETY: It is a folio, which is ours.
                unsafe {
                    let folio = bindings::kho_glue_folio(bindings::kho_glue_virt_to_folio(mem));
                    assert_eq!(folio.order, 2);
                    crate::kho_unpreserve_free(mem);
                }
            }
            Err(error) => assert_eq!(error.to_errno(), expect(Ok(()))),
        }
        Ok(())
    }

    #[test]
    fn folio_is_restored_once() -> Result {
        let mut pages = Pages::new(2)?;
        // SAFETY: The pages are ours, and given away as a folio.
        unsafe {
            assert!(crate::kho_restore_folio(pages.phys).is_null());
            pages.mark(0, 2)?;
            // Neither inside the block nor unaligned.
            assert!(crate::kho_restore_folio(pages.phys(1)).is_null());
            let folio = crate::kho_restore_folio(pages.phys);
            assert!(!folio.is_null());
            pages.free = false;
            let found = bindings::kho_glue_folio(folio);
            assert_eq!(found.order, 2);
            assert_eq!(found.pfn as u64, pages.phys >> PAGE_SHIFT);
            assert!(crate::kho_restore_folio(pages.phys).is_null());
            bindings::kho_glue_folio_put(folio);
        }
        Ok(())
    }

    #[test]
    fn huge_block_is_no_folio() -> Result {
        let pages = Pages::new(0)?;
        pages.mark(0, 40)?;
        // SAFETY: Always safe to call.
        assert!(unsafe { crate::kho_restore_folio(pages.phys) }.is_null());
        assert!(pages.is_marked(0, 40));
        Ok(())
    }

    #[test]
    fn pages_are_restored_as_they_were_cut() -> Result {
        let mut pages = Pages::new(2)?;
        // As on two nodes: four pages would be one block, but are two of order 0 and one of order
        // 1, and the last one of them is missing at first.
        pages.mark(0, 0)?;
        pages.mark(1, 0)?;
        // SAFETY: The pages are ours, and given away one by one.
        unsafe {
            assert!(crate::kho_restore_pages(pages.phys, 4).is_null());
            // Nothing was taken.
            assert!(pages.is_marked(0, 0));
            assert!(pages.is_marked(1, 0));
            pages.mark(2, 1)?;
            // Not in the middle of a block either, and not nothing.
            assert!(crate::kho_restore_pages(pages.phys, 3).is_null());
            assert!(crate::kho_restore_pages(pages.phys, 0).is_null());
            assert!(crate::kho_restore_pages(pages.phys + 8, 1).is_null());
            assert!(pages.is_marked(2, 1));

            let page = crate::kho_restore_pages(pages.phys, 4);
            assert!(core::ptr::eq(page, pages.ptr(0)));
            pages.free = false;
            assert!(crate::kho_restore_pages(pages.phys, 4).is_null());
            // Each has a reference of its own now.
            for index in 0..4 {
                kho_mm::free_page(pages.phys(index));
            }
        }
        Ok(())
    }
}

#[kunit_tests(rust_kho_vmalloc)]
mod vmalloc {
    use super::*;

    #[test]
    fn failed_preservation_leaves_nothing() -> Result {
        // SAFETY: Takes any size.
        let huge = unsafe { bindings::kho_kunit_vmalloc_huge(1024 * bindings::PAGE_SIZE) };
        for area in [Area::new(4)?, Area::at(huge)?] {
            let mut preservation = bindings::kho_vmalloc::default();
            let result = area.preserve(&mut preservation);
            assert_eq!(result, expect(Ok(())));
            if result != 0 {
                continue;
            }
            // SAFETY: The area is ours, and so is the record of it.
            unsafe {
                crate::kho_unpreserve_vmalloc(&mut preservation);
                assert!(area.none_preserved().is_ok());

                // The last pages cannot be preserved: somebody else has.
                let step = area.step();
                let last = area.page(area.vm().nr_pages - step).read();
                assert_eq!(crate::kho_preserve_pages(last, step), 0);
                assert_eq!(area.preserve(&mut preservation), EEXIST.to_errno());
                crate::kho_unpreserve_pages(last, step);
                assert!(area.none_preserved().is_ok());
            }
        }
        Ok(())
    }

    /// Bytes of which a pointer into them is aligned to 4 and not to 8, as a property of an FDT is.
    #[repr(C, align(8))]
    struct Unaligned([u8; 24]);

    impl Unaligned {
        fn ptr(&mut self) -> *mut bindings::kho_vmalloc {
            self.0.as_mut_ptr().wrapping_add(4).cast()
        }
    }

    #[test]
    fn long_list_is_preserved_and_given_up() -> Result {
        const ENTRIES: usize = bindings::KHO_VMALLOC_SIZE;
        // A chunk that is full is followed by another one.
        for (count, chunks) in [
            (ENTRIES - 1, 1),
            (ENTRIES, 2),
            (ENTRIES + 1, 2),
            (2 * ENTRIES + 7, 3),
        ] {
            let area = Area::new(count)?;
            let mut place = Unaligned([0x55; 24]);
            let preservation = place.ptr();
            let result = area.preserve(preservation);
            assert_eq!(result, expect(Ok(())));
            if result == 0 {
                // SAFETY: The area is ours, and the list is one that was just made.
                unsafe {
                    let found = preservation.read_unaligned();
                    assert_eq!(found.total_pages as usize, count);
                    let (mut next, mut met, mut listed) = (found.first.phys, 0, 0);
                    while next != 0 {
                        let chunk = kho_mm::virt::<bindings::kho_vmalloc_chunk>(next);
                        met += 1;
                        for phys in (*chunk).phys.iter().filter(|phys| **phys != 0) {
                            let page = area.page(listed).read();
                            let frames = kho_mm::page_frames(page, 1).ok_or(EINVAL)?;
                            assert_eq!(frames.phys(), *phys);
                            listed += 1;
                        }
                        next = (*chunk).hdr.next.phys;
                    }
                    assert_eq!(met, chunks);
                    assert_eq!(listed, count);
                    crate::kho_unpreserve_vmalloc(preservation);
                    assert!(area.none_preserved().is_ok());
                }
            }
            // Nothing around it was written.
            assert!(place.0[..4] == [0x55; 4] && place.0[20..] == [0x55; 4]);
        }
        Ok(())
    }

    /// Describes an area of `pages` pages, whose first chunk is at `first`.
    fn record(first: u64, pages: u32) -> bindings::kho_vmalloc {
        let mut record = bindings::kho_vmalloc::default();
        record.first.phys = first;
        record.flags = 1;
        record.total_pages = pages;
        record
    }

    #[test]
    fn long_list_is_restored() -> Result {
        const ENTRIES: usize = bindings::KHO_VMALLOC_SIZE;
        const COUNT: usize = 2 * ENTRIES + 3;
        let mut chunks = KVec::new();
        let mut pages = KVec::new();
        for _ in 0..3 {
            chunks.push(Pages::new(0)?, GFP_KERNEL)?;
        }
        for _ in 0..COUNT {
            pages.push(Pages::new(0)?, GFP_KERNEL)?;
        }
        let mut place = Unaligned([0; 24]);
        let preservation = place.ptr();
        // SAFETY: The pages are ours, and given away as an area and its chunks.
        unsafe {
            let mut next = 0;
            for (n, page) in chunks.iter().enumerate().rev() {
                let chunk = kho_mm::virt::<bindings::kho_vmalloc_chunk>(page.phys);
                chunk.cast::<u8>().write_bytes(0, bindings::PAGE_SIZE);
                (*chunk).hdr.next.phys = next;
                next = page.phys;
                for (entry, page) in (*chunk).phys.iter_mut().zip(pages.iter().skip(n * ENTRIES)) {
                    *entry = page.phys;
                }
                page.mark(0, 0)?;
            }
            for (n, page) in pages.iter().enumerate() {
                kho_mm::virt::<u64>(page.phys).write(n as u64);
                page.mark(0, 0)?;
            }
            preservation.write_unaligned(record(next, COUNT as u32));

            // A page of the last chunk is missing, then the last chunk itself.
            for missing in [&pages[COUNT - 1], &chunks[2]] {
                missing.page(0)?.private().store(0, Ordering::Relaxed);
                assert!(crate::kho_restore_vmalloc(preservation).is_null());
                missing.mark(0, 0)?;
                assert!(
                    Iterator::chain(chunks.iter(), pages.iter()).all(|page| page.is_marked(0, 0))
                );
            }

            let area = Area::at(crate::kho_restore_vmalloc(preservation))?;
            for page in Iterator::chain(chunks.iter_mut(), pages.iter_mut()) {
                page.free = false;
            }
            for n in 0..COUNT {
                assert_eq!(area.word(n), n as u64);
            }
        }
        Ok(())
    }

    #[test]
    fn what_cannot_be_preserved_is_refused() -> Result {
        let pages = Pages::new(0)?;
        let mut preservation = bindings::kho_vmalloc::default();
        // SAFETY: Takes any address. The direct map is no area.
        let result =
            unsafe { crate::kho_preserve_vmalloc(kho_mm::virt(pages.phys), &mut preservation) };
        assert_eq!(result, EINVAL.to_errno());
        Ok(())
    }

    #[test]
    fn area_is_restored_whole_or_not_at_all() -> Result {
        let mut pages = Pages::new(2)?;
        let chunk: *mut bindings::kho_vmalloc_chunk = kho_mm::virt(pages.phys);
        // SAFETY: The pages are ours, and given away as an area of three and a chunk.
        unsafe {
            chunk.cast::<u8>().write_bytes(0, bindings::PAGE_SIZE);
            for index in 1..4 {
                (*chunk).phys[index as usize - 1] = pages.phys(index);
                kho_mm::virt::<u64>(pages.phys(index)).write(index);
            }
            let whole = record(pages.phys, 3);
            let restore = |record| crate::kho_restore_vmalloc(&record);

            // The last page is missing.
            for index in 0..3 {
                pages.mark(index, 0)?;
            }
            assert!(restore(whole).is_null());
            pages.mark(3, 0)?;
            // There are more or fewer than said.
            assert!(restore(record(pages.phys, 4)).is_null());
            assert!(restore(record(pages.phys, 2)).is_null());
            // The list never ends.
            (*chunk).hdr.next.phys = pages.phys;
            assert!(restore(whole).is_null());
            (*chunk).hdr.next.phys = 0;
            // The order is none.
            assert!(restore(bindings::kho_vmalloc { order: 60, ..whole }).is_null());
            // After all that, nothing is lost.
            for index in 0..4 {
                assert!(pages.is_marked(index, 0));
            }

            let area = Area::at(restore(whole))?;
            pages.free = false;
            for index in 0..3 {
                assert_eq!(area.word(index), index as u64 + 1);
            }
            assert!(restore(whole).is_null());
        }
        Ok(())
    }
}

#[kunit_tests(rust_kho_subtree)]
mod subtree {
    use super::*;

    /// Names of subtrees that nobody else has.
    fn name(index: usize) -> [u8; 16] {
        let mut name = *b"kunit-subtree--\0";
        name[13] = b'a' + (index / 26) as u8;
        name[14] = b'a' + (index % 26) as u8;
        name
    }

    fn add(index: usize, blob: *mut c_void, size: usize) -> c_int {
        // SAFETY: The name ends with a NUL.
        unsafe { crate::kho_add_subtree(name(index).as_ptr(), blob, size) }
    }

    fn remove(blob: *mut c_void) {
        // SAFETY: Always safe to call.
        unsafe { crate::kho_remove_subtree(blob) };
    }

    #[test]
    fn full_fdt_stays_whole() -> Result {
        let pages = Pages::new(0)?;
        let blob = kho_mm::virt::<c_void>(pages.phys);
        let at = |index| blob.wrapping_byte_add(index);
        // Each subtree takes about 80 of the page's 4096 bytes.
        let mut added = 0;
        let result = loop {
            let result = add(added, at(added), 1);
            if result != 0 || added > 500 {
                break result;
            }
            added += 1;
        };
        assert_eq!(result, expect(Err(ENOMEM)));
        assert!(added > 10 || !kho_state::is_enabled());
        // The one that did not fit left nothing behind, and the others are still known.
        let result = add(0, blob, 1);
        assert!(result == ENOMEM.to_errno() || result == expect(Err(EEXIST)));
        for index in 0..added {
            remove(at(index));
        }
        assert_eq!(add(0, blob, 1), expect(Ok(())));
        assert_eq!(add(0, blob, 1), expect(Err(EEXIST)));
        remove(blob);
        // Once more, and never there: nothing happens.
        remove(blob);
        Ok(())
    }

    #[test]
    fn what_cannot_be_handed_over_is_refused() -> Result {
        let pages = Pages::new(0)?;
        let blob = kho_mm::virt::<c_void>(pages.phys);
        let size = bindings::PAGE_SIZE;
        let area = Area::new(1)?;
        // SAFETY: A number that does not change any more.
        let ram = unsafe { bindings::max_pfn } * size;
        // Beyond all RAM.
        let end = kho_mm::virt::<c_void>(ram as u64);
        for (blob, size) in [
            (core::ptr::null_mut(), 1),
            (core::ptr::null_mut(), 0),
            // No memory at all, and none of the direct map.
            (0x1000 as *mut c_void, 100),
            (area.0, 100),
            (area.0, 0),
            // Nothing, or more than there is, or than there can be.
            (blob, 0),
            (blob, ram),
            (blob, usize::MAX),
            (end, 1),
            (end.wrapping_byte_sub(size), size + 1),
        ] {
            assert_eq!(add(0, blob, size), EINVAL.to_errno());
            remove(blob);
        }
        // Nothing of the name was left behind; a blob may be any part of its pages.
        let blob = blob.wrapping_byte_add(24);
        assert_eq!(add(0, blob, size - 24), expect(Ok(())));
        remove(blob);
        Ok(())
    }

    #[test]
    fn what_was_not_handed_over_is_not_found() -> Result {
        let mut phys = 0;
        // SAFETY: The name ends with a NUL.
        let result = unsafe {
            crate::kho_retrieve_subtree(name(0).as_ptr(), &mut phys, core::ptr::null_mut())
        };
        assert_eq!(result, ENOENT.to_errno());
        Ok(())
    }
}
