"""Internal snapshots of an image that no process has open, taken and deleted by qemu-img.

qemu-img has no format option for its snapshot command (7.2), so the image is named as a whole node in
JSON: format and protocol are stated and nothing is probed, no character of the file's name means
anything, and a backing file that a hostile header names is not opened. See "blockdev options" in
qemu's docs/tools/qemu-img.rst and BlockdevOptionsQcow2 in qapi/block-core.json.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess

from island_fast.errors import ImageInUseError, IslandError, NotFoundError, UsageError
from island_fast.qemu.programs import Execute, run_to_the_end

__all__ = ["QemuImg"]

_MAX_NAME_BYTES = 255  # qemu cuts longer names off in silence
_MAX_SAID = 300  # characters of qemu's own words in a message

# Both commands go through every L2 table and look up a refcount for every cluster. With qemu's default
# of four refcount blocks, clusters that lie scattered cost a block read each: 32 GiB took 24 s to
# snapshot and 95 s to delete, with a cache for them all 0.05 s. Memory is only taken as it is used. An odd
# number of places in the refcount cache, and no holes punched for the clusters that a deletion frees:
# host/sizing.py says why. The file keeps their space and uses it again before it grows.
_L2_CACHE_BYTES = 256 << 20
_REFCOUNT_CACHE_BYTES = (64 << 20) - 1


class QemuImg:
    """Takes and deletes internal snapshots of qcow2 images that no process has open for writing.

    `execute` runs the program; another one may run it elsewhere or under other rights. A qemu-img that is
    refused because a process has the image open is an ImageInUseError. Every other failure is an
    IslandError (NotFoundError where the image or the snapshot is not there) of one sentence that ends in
    qemu's own words.
    """

    def __init__(self, execute: Execute = run_to_the_end, program: str = "qemu-img") -> None:
        self._execute = execute
        self._program = program

    def snapshot_create(self, path: str | os.PathLike[str], name: str) -> None:
        """Take an internal snapshot of the whole image; on return it is in the file.

        qemu-img does not mind that a snapshot of this name is there already: the name must be unique.
        """
        self._snapshot("-c", path, name, f"take internal snapshot {name!r} in")

    def snapshot_delete(self, path: str | os.PathLike[str], name: str) -> None:
        """Delete the internal snapshot of this name; NotFoundError if there is none.

        Of several with one name qemu-img deletes the first: look at ids and times before calling this.
        """
        self._snapshot("-d", path, name, f"delete internal snapshot {name!r} of")

    def _snapshot(self, option: str, path: str | os.PathLike[str], name: str, task: str) -> None:
        shown = os.fspath(path)
        task = f"{task} image {shown!r}"
        node = _node(shown)
        command = [self._program, "snapshot", "-q", option, _checked_name(name), node]
        try:
            result = self._execute(command)
        except FileNotFoundError as error:
            raise IslandError(
                f"the program {self._program!r}, which would {task}, is missing; "
                f"install the package qemu-utils, or go without a pinned base (--no-pin)"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise IslandError(
                f"qemu-img did not {task} within {error.timeout:.0f} s and was stopped; "
                f"run `qemu-img check` on the image"
            ) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise IslandError(
                f"qemu-img could not be started to {task} ({reason}); check {self._program!r}"
            ) from error
        if result.returncode:
            raise _failure(task, result.returncode, _said(result.stderr or "", shown, node))


def _checked_name(name: str) -> str:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= _MAX_NAME_BYTES or "\0" in name:
        raise UsageError(
            f"{name!r} cannot be an internal snapshot's name; it must be text of 1 to {_MAX_NAME_BYTES} bytes"
        )
    return name


def _node(path: str) -> str:
    """Name a file to qemu so that all of its name is taken literally (see the module's docstring).

    JSON is UTF-8, so a name that is not cannot be said.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the path {path!r} is not UTF-8, so qemu cannot be told of it; "
            f"rename it, or go without a pinned base (--no-pin)"
        ) from error
    node = {
        "driver": "qcow2",
        "backing": None,
        "l2-cache-size": _L2_CACHE_BYTES,
        "refcount-cache-size": _REFCOUNT_CACHE_BYTES,
        "pass-discard-snapshot": False,
        "file": {"driver": "file", "filename": path},
    }
    return "json:" + json.dumps(node)


def _said(stderr: str, path: str, node: str) -> str:
    """Return all that qemu complained of, as one line without the image's name.

    The name goes because our messages have it already, and because whoever chose it could otherwise
    choose what `_failure` reads.
    """
    for quoted in (f"'{node}'", f"'{path}'", f"[{path}]"):
        stderr = stderr.replace(quoted, "''")
    lines = [line.removeprefix("qemu-img: ") for line in stderr.splitlines()]
    complaints = [line for line in lines if line and not line.startswith("warning: ")]
    said = "; ".join(complaints).replace("Could not open '': ", "")
    return "".join(c if c.isprintable() else "?" for c in said) or "it gave no reason"


def _failure(task: str, returncode: int, said: str) -> IslandError:
    """Translate a failed run into the error that the caller can act on."""
    if returncode < 0 or returncode > 128:
        number = -returncode if returncode < 0 else returncode - 128
        return IslandError(
            f"qemu-img was ended by {_signal_name(number)} before it could {task}; "
            f"run `qemu-img check` on the image"
        )
    if 'Failed to get "' in said and '" lock' in said:
        return ImageInUseError(
            f"qemu-img could not {task}, because another process has the image open "
            f"({said[:_MAX_SAID]}); stop that process, or name its QMP socket"
        )
    said = said.rstrip(".")[:_MAX_SAID]
    if "snapshot not found" in said or "No such file or directory" in said:
        return NotFoundError(f"qemu-img could not {task}: {said}")
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return IslandError(f"qemu-img could not {task}, because its file system is full; make room: {said}")
    return IslandError(f"qemu-img could not {task}: {said}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
