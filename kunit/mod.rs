// SPDX-License-Identifier: GPL-2.0

//! KUnit suites, run in the kernel at boot.
