#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# First process of every kernel of a test.  The host shares a directory over
# 9p: the kernels, this initramfs, a script for each kernel (stage1.sh, ...) and
# "result", where the answers go.  $kho_stage and $kho_break come from the
# kernel's command line.
# shellcheck shell=dash disable=SC1090,SC2154
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 kho /mnt || poweroff -f

# report WORD...: one line for the host, and one in the log.
report() {
	echo "$kho_stage $*" >>/mnt/result
	echo "GUEST $kho_stage: $*"
}

# check CMD...: reports what CMD prints; its failure ends the test.
check() {
	rm -f /failed
	{ "$@" 2>&1 || touch /failed; } | while read -r line; do
		report "$line"
	done
	[ ! -e /failed ] || fail "$*"
}

fail() {
	report "failed $*"
	poweroff -f
}

# save NAME FILE: hands FILE to the host as NAME.STAGE, if there is one.
save() {
	[ ! -e "$2" ] || cat "$2" >"/mnt/$1.$kho_stage"
}

# What a script may have done when the next kernel is loaded.
loaded() { :; }

# next_kernel IMAGE [ARG...]: kexec into IMAGE of the shared directory.
next_kernel() {
	image=$1
	shift
	report "step kexec"
	check kho-guest load "/mnt/$image" /mnt/initrd \
		"$(cat /mnt/cmdline) kho_stage=$((kho_stage + 1)) $*"
	loaded
	report "done"
	umount /mnt
	kho-guest kexec
	echo "kexec returned"
	poweroff -f
}

report "step userspace"
. "/mnt/stage$kho_stage.sh"
report "done"
poweroff -f
