// SPDX-License-Identifier: GPL-2.0

//! The pure core of kexec handover, from the files that go into the kernel.

#![allow(dead_code)]

use core::sync::atomic;

/// Pages of 4 KiB.
pub(crate) const PAGE_SHIFT: u32 = 12;
pub(crate) const GRAIN_ORDER: u32 = 10;

#[path = "../../kho_check.rs"]
pub(crate) mod kho_check;
#[path = "../../kho_fdt.rs"]
pub(crate) mod kho_fdt;
#[path = "../../kho_grain.rs"]
pub(crate) mod kho_grain;
#[path = "../../kho_key.rs"]
pub(crate) mod kho_key;
#[path = "../../kho_radix.rs"]
pub(crate) mod kho_radix;
#[path = "../../kho_range.rs"]
pub(crate) mod kho_range;
#[path = "../../kho_word.rs"]
pub(crate) mod kho_word;
