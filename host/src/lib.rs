// SPDX-License-Identifier: GPL-2.0

//! The pure core of kexec handover on the host, once for each page size that the kernel has.

#![allow(dead_code)]
// A fuzzer uses some of what the tests do.
#![cfg_attr(fuzzing, allow(unused_imports))]
// Each file is compiled for three page sizes.
#![allow(clippy::duplicate_mod)]

macro_rules! core_with_page_shift {
    ($name:ident, $shift:literal, $grain:literal) => {
        #[path = "."]
        pub mod $name {
            use core::sync::atomic;
            pub(crate) const PAGE_SHIFT: u32 = $shift;
            pub(crate) const GRAIN_ORDER: u32 = $grain;
            #[path = "../../kho_check.rs"]
            pub(crate) mod kho_check;
            #[path = "../../kho_fdt.rs"]
            pub(crate) mod kho_fdt;
            #[path = "../../kho_grain.rs"]
            pub(crate) mod kho_grain;
            #[path = "../../kho_key.rs"]
            pub(crate) mod kho_key;
            #[path = "../../kho_param.rs"]
            pub(crate) mod kho_param;
            #[path = "../../kho_radix.rs"]
            pub(crate) mod kho_radix;
            #[path = "../../kho_range.rs"]
            pub(crate) mod kho_range;
            #[path = "../../kho_word.rs"]
            pub(crate) mod kho_word;
            #[cfg(any(test, fuzzing))]
            #[path = "tests/mod.rs"]
            pub mod tests;
        }
    };
}

core_with_page_shift!(p4k, 12, 10);
core_with_page_shift!(p16k, 14, 11);
core_with_page_shift!(p64k, 16, 13);

/// Does what the bytes say to a target of that name, with the page size that the first one says.
#[cfg(fuzzing)]
pub fn fuzz(name: &str, data: &[u8]) {
    let Some((size, rest)) = data.split_first() else {
        return;
    };
    let targets = match size {
        0 => p64k::tests::fuzz::TARGETS,
        1 => p16k::tests::fuzz::TARGETS,
        _ => p4k::tests::fuzz::TARGETS,
    };
    let of_name = |target: &&(&str, fn(&[u8]))| target.0 == name;
    targets.iter().find(of_name).unwrap().1(rest);
}
