// SPDX-License-Identifier: GPL-2.0

//! The pure core of kexec handover on the host, once for each page size that the kernel has.

#![allow(dead_code)]
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
            #[cfg(test)]
            #[path = "tests/mod.rs"]
            mod tests;
        }
    };
}

core_with_page_shift!(p4k, 12, 10);
core_with_page_shift!(p16k, 14, 11);
core_with_page_shift!(p64k, 16, 13);
