# SPDX-License-Identifier: GPL-2.0
# Shared by every script here; to be sourced.  Sets CACHE, TOP and the
# functions that run a command in the build root.
# shellcheck shell=bash

set -euo pipefail

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kho}
mkdir -p "$CACHE"
CACHE=$(cd "$CACHE" && pwd)
JOBS=${JOBS:-$(nproc)}
export TOP CACHE JOBS

say() { printf '[%6ds] %s\n' "$(($(date +%s) - ${KHO_T0:=$(date +%s)}))" "$*"; }
die() { printf 'kho: %s\n' "$*" >&2; exit 1; }
KHO_T0=${KHO_T0:-$(date +%s)}
export KHO_T0

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
		if [ $((SECONDS % 15)) -eq 0 ] || [ -t 1 ]; then
			last="$(wc -l <"$log") lines, $(tail -n 1 "$log" | cut -c1-60 | tr -d '\r\033')"
			if [ -t 1 ]; then
				printf '\r\033[K          ... %s' "$last"
			else
				printf '          ... %s\n' "$last"
			fi
		fi
	done
	[ -t 1 ] && printf '\r\033[K'
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
	local root
	root=$(cat "$CACHE/root.path" 2>/dev/null) || die "no build root: run scripts/root"
	if [ "$root" = / ]; then
		"$@"
		return
	fi
	local ns=(unshare --mount --pid --fork --kill-child)
	[ "$(id -u)" = 0 ] || ns+=(--map-auto --map-root-user)
	ROOT=$root HERE=$PWD "${ns[@]}" "$TOP/scripts/enter-root" "$@"
}
