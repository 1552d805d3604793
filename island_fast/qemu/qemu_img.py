"""Internal snapshots of an image that no process has open, taken and deleted by qemu-img.

qemu-img has no format option for its snapshot command (7.2), so the image is named as a whole node in JSON:
format and protocol are given and nothing is probed, and a backing file that a hostile header names is not
opened. See "blockdev options" in qemu's docs/tools/qemu-img.rst and BlockdevOptionsQcow2 in
qapi/block-core.json.

The file is not given by its name, which can lead to another file by now, but as the descriptor that the
caller has locked: qemu-img inherits it and opens /proc/self/fd/N, which the kernel resolves to that very
file. (/dev/fdset/N is not possible: only a monitor can fill such a set.)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence

from island_fast.errors import ImageInUseError, IslandError, NotFoundError, UsageError
from island_fast.qemu.programs import (
    PACKAGES,
    ProgramResult,
    copy_for_program,
    descriptor_path,
    run_program,
)

__all__ = ["QemuImg"]

_MAX_NAME_BYTES = 255  # qemu cuts longer names off silently
_MAX_QUOTED = 300  # characters of qemu's own words in a message

# Both commands go through every L2 table and look up a refcount for every cluster. With qemu's default of
# four refcount blocks, scattered clusters cost a block read each: 32 GiB took 24 s to snapshot and 95 s to
# delete, with a cache for all blocks 0.05 s. qemu takes the memory only as it uses it. sizing.py says why the
# refcount cache has an odd number of places, and why no holes are punched for clusters that a deletion frees:
# the file keeps their space and reuses it before it grows.
_L2_CACHE_BYTES = 256 << 20
_REFCOUNT_CACHE_BYTES = (64 << 20) - 1


class QemuImg:
    """Takes and deletes internal snapshots of one qcow2 file that no process has open for writing.

    `fd` is the file, open for reading, and stays the caller's; `path` is what messages call it. `execute`
    runs the program, like `run_program`. ImageInUseError if a process has the image open. Every other failure
    is an IslandError (NotFoundError if the snapshot does not exist) of one sentence that ends in qemu's own
    words.
    """

    def __init__(
        self,
        fd: int,
        path: str | os.PathLike[str],
        execute: Callable[..., ProgramResult] = run_program,
        program: str = "qemu-img",
    ) -> None:
        self._fd = fd
        self._path = os.fspath(path)
        self._execute = execute
        self._program = program

    def snapshot_create(self, name: str) -> None:
        """Take an internal snapshot of the whole image; on return it is in the file.

        qemu-img accepts a name that another snapshot already has, so the caller must pass a unique one.
        """
        self._snapshot("-c", name, f"take internal snapshot {name!r} in")

    def snapshot_delete(self, name: str) -> None:
        """Delete the internal snapshot of this name; NotFoundError if there is none.

        Of several with one name qemu-img deletes the first: check ids and times before calling this.
        """
        self._snapshot("-d", name, f"delete internal snapshot {name!r} of")

    def _snapshot(self, option: str, name: str, task: str) -> None:
        task = f"{task} image {self._path!r}"
        with copy_for_program(self._fd) as fd:
            name_there = descriptor_path(fd)
            node = _image_node(name_there)
            result = self._run([self._program, "snapshot", "-q", option, _check_name(name), node], fd, task)
        if result.returncode:
            raise _qemu_img_error(task, result.returncode, _error_text(result.stderr or "", name_there, node))

    def _run(self, command: Sequence[str], fd: int, task: str) -> ProgramResult:
        """Run qemu-img, which shall `task` and inherits `fd`; IslandError if it does not run to its end."""
        try:
            return self._execute(command, files=[fd])
        except FileNotFoundError as error:
            raise IslandError(
                f"the program {self._program!r}, which would {task}, is missing; "
                f"install the package {PACKAGES['qemu-img']}, or go without a pinned base (--no-pin)"
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


def _check_name(name: str) -> str:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= _MAX_NAME_BYTES or "\0" in name:
        raise UsageError(
            f"{name!r} cannot be an internal snapshot's name; it must be text of 1 to {_MAX_NAME_BYTES} bytes"
        )
    return name


def _image_node(path: str) -> str:
    """Return the node that names a file to qemu literally (see the module's docstring)."""
    node = {
        "driver": "qcow2",
        "backing": None,
        "l2-cache-size": _L2_CACHE_BYTES,
        "refcount-cache-size": _REFCOUNT_CACHE_BYTES,
        "pass-discard-snapshot": False,
        "file": {"driver": "file", "filename": path},
    }
    return "json:" + json.dumps(node)


def _error_text(stderr: str, path: str, node: str) -> str:
    """Return qemu's errors as one line without the image's name.

    The name is removed because our messages have it already, and because `_qemu_img_error` reads this text:
    whoever chose the name could otherwise choose the error.
    """
    for quoted in (f"'{node}'", f"'{path}'", f"[{path}]"):
        stderr = stderr.replace(quoted, "''")
    lines = [line.removeprefix("qemu-img: ") for line in stderr.splitlines()]
    errors = [line for line in lines if line and not line.startswith("warning: ")]
    text = "; ".join(errors).replace("Could not open '': ", "")
    return "".join(c if c.isprintable() else "?" for c in text) or "it gave no reason"


def _qemu_img_error(task: str, returncode: int, text: str) -> IslandError:
    """Return the exception for a failed run, of a class that the caller can act on."""
    if returncode < 0 or returncode > 128:
        number = -returncode if returncode < 0 else returncode - 128
        return IslandError(
            f"qemu-img was ended by {_signal_name(number)} before it could {task}; "
            f"run `qemu-img check` on the image"
        )
    if 'Failed to get "' in text and '" lock' in text:
        return ImageInUseError(
            f"qemu-img could not {task}, because another process has the image open "
            f"({text[:_MAX_QUOTED]}); stop that process, or name its QMP socket"
        )
    text = text.rstrip(".")[:_MAX_QUOTED]
    if "snapshot not found" in text or "No such file or directory" in text:
        return NotFoundError(f"qemu-img could not {task}: {text}")
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return IslandError(
            f"qemu-img could not {task}, because its file system is full; free some space: {text}"
        )
    return IslandError(f"qemu-img could not {task}: {text}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
