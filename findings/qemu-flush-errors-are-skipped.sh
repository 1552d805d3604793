#!/bin/sh
# QEMU 7.2.22, and 10.0.13 alike: its driver blkdebug, which is there to inject errors, does not inject one into a flush
# of a node that nothing was written to since the node was opened. `inject-error` with iotype "flush" and once=off
# should make every flush fail; the first ones succeed, until a write. QEMU skips the flush before it asks the
# driver (block/io.c compares two counters of writes). Who serves a node like that in place of a process that
# died, so that its client sees errors, confirms the client's flush of what died with that process.
# Output seen: the three lines at the end of this script. Needs Debian 12; a second after the download (11 MB).
# Exit 77: it could not be run here.
set -eu
version=1:7.2+dfsg-7+deb12u18+b3
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[ "$(apt-cache policy qemu-utils | awk '/Candidate:/ { print $2 }')" = "$version" ] || exit 77
cd "$folder"
apt-get -qq download "qemu-utils=$version" >/dev/null 2>&1 || exit 77
dpkg-deb -x qemu-utils_*.deb .
usr/bin/qemu-io --version >/dev/null 2>&1 || exit 77 # libraries that it needs are missing here

truncate -s 1M image
rule='{"event":"none","iotype":"flush","errno":5,"once":false}'
node="json:{\"driver\":\"blkdebug\",\"image\":{\"driver\":\"file\",\"filename\":\"$folder/image\"},\"inject-error\":[$rule]}"
flush() {
    usr/bin/qemu-io "$@" "$node" >out 2>&1 && echo "$what: done" || echo "$what: failed"
}
{
    what='flush of a node that was just opened' flush -c flush
    what='the same again and again' flush -c flush -c flush -c flush
    what='flush after a write' flush -c 'write -q 0 512' -c flush
} | tee seen
cmp - seen <<'C'
flush of a node that was just opened: done
the same again and again: done
flush after a write: failed
C
