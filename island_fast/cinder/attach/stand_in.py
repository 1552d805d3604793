"""The two scripts that keep a VDUSE disk from hanging when its daemon dies.

The kernel waits, without end, for the daemon of a VDUSE device: for one that died too. So somebody has to be
there, also while cinder-volume is not running. Therefore a shell starts the volume's daemon and watches it
(`watch_script`). If it dies, the shell becomes a stand-in (`stand_in_script`): another qemu-storage-daemon,
which serves the same device and answers everything with an I/O error, also the requests that the dead one
took with it. It stays until nobody has the disk open. It is not the volume's next daemon, which would lose
without a word what the dead one had acknowledged and not flushed.

A planned restart is different: a daemon that is asked to quit flushes everything first, and exits with
status 0. Then the shell starts the next one, and the kernel's requests wait for it.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from island_fast.cinder.attach.vduse_control import QUEUE_SIZE, QUEUES, device_name

__all__ = ["PREPARED", "TOKEN", "export_options", "stand_in_script", "stand_in_socket", "watch_script"]

PREPARED = "again"
"""The file, in the volume's folder, with the script of a daemon for a planned restart."""
TOKEN = "token"
"""The file, beside the backing, that says which backing is served, and by which process."""

_SIZE = 1 << 20  # bytes of what the stand-in serves; requests beyond it fail, too


def stand_in_socket(backing: Path) -> Path:
    """Return the QMP socket of the stand-in for a backing."""
    return backing.with_name(f"{backing.name}.s")


def export_options(backing: Path, node: str) -> dict[str, object]:
    """Return the options of the export that serves a backing, as QAPI's BlockExportOptions."""
    return {
        "type": "vduse-blk",
        "id": "device",
        "node-name": node,
        "name": device_name(backing),
        "writable": True,
        "num-queues": QUEUES,
        "queue-size": QUEUE_SIZE,
        "serial": backing.parts[-3][:20],  # all that virtio has room for
    }


def watch_script(folder: Path, program: Path, log: Path) -> str:
    """Return the shell script that runs `program`, a script that becomes the daemon, and watches it.

    A signal to end is for the daemon, which gets it too; after it, a stand-in stays for seconds only, so that
    a host can shut down. If the volume is not exported any more when the daemon ends, this ends too. A daemon
    that could not flush its tables when it quit gets a stand-in and no successor; only QEMU's log says so.
    """
    vduse, prepared = shlex.quote(str(folder / "vduse")), shlex.quote(str(folder / PREPARED))
    daemon = shlex.quote(str(program))
    return f"""\
exec </dev/null >{shlex.quote(str(log))} 2>&1
umask 077
cd /
asked=
trap 'asked=1' HUP INT TERM
run() {{
    /bin/sh {daemon} &
    child=$!
}}
served() {{
    read -r token by <{vduse}/{TOKEN} && [ "$by" = "$child" ]
}} 2>/dev/null
run
while :; do
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        status=$?
    done
    served || exit "$status"
    [ "$status" = 0 ] && [ -e {prepared} ] && ! grep -q "Failed to flush" {shlex.quote(str(log))} || break
    mv {prepared} {daemon}
    run
    echo "$token $child" >{vduse}/{TOKEN}.new
    mv {vduse}/{TOKEN}.new {vduse}/{TOKEN}
done
echo "the daemon ended with status $status; every request is answered with an error now" >&2
[ -n "$asked" ] || exec /bin/sh {vduse}/"$token"
/bin/sh {vduse}/"$token" &
child=$!
for _ in 1 2 3 4 5 6 7 8 9 10; do
    ! kill -0 "$child" 2>/dev/null || sleep 1
done
kill "$child" 2>/dev/null
exit "$status"
"""


def stand_in_script(backing: Path, log: Path) -> str:
    """Return the shell script that becomes the stand-in for a backing, or ends if there is one.

    A flush must fail from the first on. But QEMU skips one of a node that nothing was written to since the
    last flush, even if the node would refuse it. So the node is enlarged before it is exported, which counts
    as written, and no flush of it ever succeeds.
    """
    node = {
        "driver": "blkdebug",
        "node-name": "errors",
        "discard": "unmap",  # else QEMU drops them and reports that they were done
        "image": {"driver": "file", "filename": str(backing.with_name(f"{backing.name}.n"))},
        "inject-error": [{"event": "none", "errno": 5, "once": False, "immediately": True}],
    }
    socket = str(stand_in_socket(backing)).replace(",", ",,")
    command = ["qemu-storage-daemon", "--blockdev", json.dumps(node)]
    command += ["--chardev", f"socket,id=quit,path={socket},server=on,wait=off", "--monitor", "chardev=quit"]
    command += ["--chardev", "stdio,id=input", "--monitor", "chardev=input"]
    steps: list[tuple[str, dict[str, object]]] = [
        ("qmp_capabilities", {}),
        ("block_resize", {"node-name": "errors", "size": _SIZE}),
        ("block-export-add", export_options(backing, "errors")),
    ]
    lines = [json.dumps({"execute": verb, "arguments": options}) for verb, options in steps]
    return "\n".join(
        [
            f"exec </dev/null >>{shlex.quote(str(log))} 2>&1",
            "umask 077",
            "cd /",
            f"exec 9<{shlex.quote(str(backing))}",
            "flock --nonblock 9 || exit 0",
            f": >{shlex.quote(node['image']['filename'])}",  # type: ignore[index]
            f"export TMPDIR={shlex.quote(str(backing.parent))}",  # where requests in flight are noted
            f"exec {shlex.join(command)} <<'end'",
            *lines,
            "end",
            "",
        ]
    )
