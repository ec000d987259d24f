# SPDX-License-Identifier: GPL-2.0
# Shared by every script here; to be sourced.  Checks the variables that the
# scripts have in common; sets TOP, CACHE, SRC and TREE; has functions that take
# the cache, and that run a command in the build root.
# shellcheck shell=bash

set -euo pipefail

# What goes on is said on stderr: stdout is for results.
say() { printf '[%6ds] %s\n' "$(($(date +%s) - ${KHO_T0:=$(date +%s)}))" "$*" >&2; }
die() { printf 'kho: %s\n' "$*" >&2; exit 1; }
KHO_T0=${KHO_T0:-$(date +%s)}

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=$(realpath -m -- "${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kho}")
JOBS=${JOBS:-$(nproc)}
[[ ! $CACHE =~ [^[:alnum:]_./,+@=~-] ]] ||
	die "CACHE=$CACHE: the kernel's make takes letters, digits and _./,+@=~- only"
[ ! -e "$CACHE" ] || [ -d "$CACHE" ] || die "CACHE=$CACHE is no directory"

# version_of TREE: as 7.3.4; nothing if that is no kernel with kexec handover.
version_of() {
	[ ! -e "$1/kernel/liveupdate/kexec_handover.c" ] ||
		sed -n '1,6s/^\(VERSION\|PATCHLEVEL\|SUBLEVEL\) = //p' "$1/Makefile" | paste -sd.
}

# SRC is the tree that is built: a copy of KDIR if that is given, else what
# scripts/source fetched.  TREE is part of the names of what is made from it.
TREE=
if [ -n "${KDIR:-}" ]; then
	[ -d "$KDIR" ] || die "KDIR=$KDIR is no directory"
	KDIR=$(cd -- "$KDIR" && pwd -P)
	[[ $(version_of "$KDIR") = 7.3.* ]] || die "KDIR=$KDIR is no tree of Linux 7.3.x"
	[[ $CACHE/ != "$KDIR"/* ]] || die "CACHE=$CACHE is in KDIR=$KDIR, which is copied there"
	TREE=-tree$(printf %s "$KDIR" | sha256sum | cut -c1-8)
	SRC=$CACHE/linux$TREE
	export KDIR
else
	SRC=$(cat "$CACHE/source.path" 2>/dev/null || :)
fi
# CONFIG is one of the tests' configurations, or a file, one's own.  OWN is part of the names
# of what is made with that.
OWN=
case ${CONFIG:-debug} in
debug | production | kvm | plain | sanitize | rt) ;;
*)
	[ -f "$CONFIG" ] && [ -r "$CONFIG" ] && grep -q '^CONFIG_64BIT=y' "$CONFIG" ||
		die "CONFIG=$CONFIG is no .config of a 64-bit kernel, nor debug, production, kvm, plain, sanitize or rt"
	CONFIG=$(realpath -- "$CONFIG")
	OWN=-own$(printf %s "$CONFIG" | sha256sum | cut -c1-8)
	export CONFIG
	;;
esac
case ${ARCH:-x86_64} in x86_64 | arm64) ;; *) die "ARCH=$ARCH: x86_64 or arm64" ;; esac
case ${LLVM:-} in '' | 1) ;; *) die "LLVM=$LLVM: 1, or nothing for gcc" ;; esac
export TOP CACHE JOBS SRC TREE OWN KHO_T0

# The cache has a marker, which lists the names of what was made in it, where
# they are not always the same, and which is its lock.
MARKER=$CACHE/.kho-cache
FIXED=(kernels guest kunit log deb unpack systemd doc foreign series host-target fuzz mutants bench bench-host.json root.path source.path)

# is_ours: whether the cache was made here.  One of an older version has no
# marker.  It names the tree or the root in it, and has nothing else in it.
is_ours() {
	local path names
	[ ! -e "$MARKER" ] || return 0
	path=$( (grep -hs "^$CACHE/" "$CACHE"/{source,root}.path || :) | head -n 1)
	[ -n "$path" ] || return 1
	[ -e "$path/.kho-package" ] || [ -e "$path/.complete" ] || return 1
	names=$(find "$CACHE" -mindepth 1 -maxdepth 1 -printf '%f\n' | grep -vxF -f <(printf '%s\n' "${FIXED[@]}"))
	! grep -qvE '^(linux|root|build)-' <<<"$names" || return 1
	echo "$names" >"$MARKER"
}

# lock: makes the cache, if there is none, and waits until no other command uses
# it.  Whoever waits gets the right result later, where an error would look like
# a test that failed.  What a locked command calls has the lock as well.
lock() {
	[ "${KHO_LOCK:-}" != "$CACHE" ] || return 0
	while :; do
		mkdir -p "$CACHE"
		is_ours || [ -z "$(ls -A "$CACHE")" ] || [ -e "$MARKER" ] ||
			die "CACHE=$CACHE has files that were not made here: name a new directory or an empty one"
		exec 9>>"$MARKER"
		flock -n 9 || {
			say "another command uses $CACHE: waiting for it"
			flock 9
		}
		# It may have been "clean".
		[ "$MARKER" -ef /dev/fd/9 ] && break
	done
	export KHO_LOCK=$CACHE
}

# made NAME: to be called before something is made in the cache, so that "clean"
# removes it.
made() {
	grep -qxF "$1" "$MARKER" || echo "$1" >>"$MARKER"
}

# run_logged LOG CMD...: runs CMD with its output in LOG and one line of
# progress on the terminal; on failure shows the end of LOG.
run_logged() {
	local log=$1 pid rc=0 last=""
	shift
	mkdir -p "$(dirname "$log")"
	"$@" >"$log" 2>&1 &
	pid=$!
	while kill -0 "$pid" 2>/dev/null; do
		sleep 1
		if [ $((SECONDS % 15)) -eq 0 ] || [ -t 2 ]; then
			last="$(wc -l <"$log") lines, $(tail -n 1 "$log" | cut -c1-60 | tr -d '\r\033')"
			if [ -t 2 ]; then
				printf '\r\033[K          ... %s' "$last" >&2
			else
				printf '          ... %s\n' "$last" >&2
			fi
		fi
	done
	[ ! -t 2 ] || printf '\r\033[K' >&2
	wait "$pid" || rc=$?
	if [ $rc -ne 0 ]; then
		tail -n 40 "$log" >&2
		echo "kho: failed ($rc): $*; log: $log" >&2
	fi
	return $rc
}

# in_root CMD...: runs CMD as root where the toolchain is, which scripts/root has
# found out: "/" when the host's own is good enough, else a Debian root below the
# cache, with the repository and the cache mounted at the paths they have outside
# and the same directory.
in_root() {
	local root=/
	[ -n "${KHO_INSIDE:-}" ] || root=$(cat "$CACHE/root.path" 2>/dev/null) || die "no build root: run scripts/root"
	# A daemon that stays behind must not hold the lock.
	if [ "$root" = / ]; then
		"$@" 9>&-
		return
	fi
	local ns=(unshare --mount --pid --fork --kill-child)
	[ "$(id -u)" = 0 ] || ns+=(--map-auto --map-root-user)
	ROOT=$root HERE=$PWD "${ns[@]}" "$TOP/scripts/root" --enter "$@" 9>&-
}

# check NAME CMD...: one test, as KTAP; what CMD prints goes to $log.
number=0 failed=0
check() {
	local name=$1 status=0
	shift
	number=$((number + 1))
	echo "== $name" >>"$log"
	# Not in a condition: errexit would be off in the whole function.
	set +e
	(set -e; "$@") >>"$log" 2>&1
	status=$?
	set -e
	if [ $status = 0 ]; then
		echo "ok $number $name"
	else
		failed=$((failed + 1))
		echo "not ok $number $name # log: $log"
	fi
}
