"""The monitor of a qemu process that has images open, which takes internal snapshots of them.

The subclasses of `Monitor` send commands to it: over its QMP socket (`qmp.py`), or through libvirt
(`libvirt.py`). Its answers are not trusted: a guest can have taken over the process.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from island_fast.errors import IslandError, NotFoundError, RefusedError
from island_fast.qemu.image_lock import open_image, writer_present

__all__ = ["Monitor", "printable"]

_MAX_QUOTED = 300  # characters of another program's words in a message


class Monitor(ABC):
    """The monitor of one qemu process; a context manager. Not for use by several threads at once.

    `who` is what messages call the process. `way_out` is their advice if it does not have an image open.
    """

    who: str
    way_out: str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End the connection; the process and its images stay as they are."""

    @abstractmethod
    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> object:
        """Send one command and return qemu's answer; IslandError in one sentence if it fails."""

    @abstractmethod
    def locate(self, name: str) -> str:
        """Return the absolute path, from here, of the file that the qemu process calls `name`."""

    def find_node(self, path: str | os.PathLike[str]) -> str:
        """Return the name of the qcow2 node whose file is the same inode as `path`.

        If a daemon of ours has a filter in front of that node (`cinder/attach/daemon.py` says why), return
        the filter's name: qemu takes internal snapshots through it, and refuses to take them below it.

        Other nodes over the same file (its protocol node, a raw view, filters) do not count. RefusedError if
        the process has no such node, or several, or if no process has the file open for writing: qemu reports
        the name that it opened, which can lead to another file by now.
        """
        shown = os.fspath(path)
        fd = open_image(shown)
        try:
            wanted, written = os.fstat(fd), writer_present(fd)
        finally:
            os.close(fd)
        nodes = self.command("query-named-block-nodes", {"flat": True})
        names = [name for name, file in _find_qcow2_nodes(nodes) if self._is_file(file, wanted)]
        if not names:
            raise RefusedError(f"{self.who} does not hold image {shown!r}; {self.way_out}")
        if len(names) > 1:
            raise RefusedError(
                f"{self.who} has image {shown!r} open {len(names)} times "
                f"(nodes {', '.join(map(repr, names))}); close all but one"
            )
        if not written:
            raise RefusedError(
                f"{self.who} names image {shown!r}, but no process has that file "
                f"open for writing; check whether it was replaced while in use, or is open read-only"
            )
        fronts = [name for name, file in _find_filters(nodes) if self._is_file(file, wanted)]
        return fronts[0] if len(fronts) == 1 else names[0]

    def snapshot_create(self, node: str, name: str) -> None:
        """Take an internal snapshot of the node's image; on return it is in the file.

        The guest's writes wait meanwhile. What it has not written yet is not in the snapshot, as after a
        power cut. The node must be a root: qemu refuses one under a filter or an overlay, and a name that is
        already in the snapshot table.
        """
        self.command("blockdev-snapshot-internal-sync", {"device": node, "name": name})

    def snapshot_create_all(self, pins: Sequence[tuple[str, str]]) -> None:
        """Take internal snapshots at one moment, all of them or none; each pin is a node and a name.

        What `snapshot_create` says holds for each.
        """
        actions = [
            {"type": "blockdev-snapshot-internal-sync", "data": {"device": node, "name": name}}
            for node, name in pins
        ]
        self.command("transaction", {"actions": actions})

    def snapshot_delete(self, node: str, id: str, name: str) -> None:
        """Delete the internal snapshot that has this id and this name; NotFoundError if there is none."""
        self.command("blockdev-snapshot-delete-internal-sync", {"device": node, "id": id, "name": name})

    def refusal_error(self, command: str, error: object) -> IslandError:
        """Return the exception for the `error` with which qemu answered a command."""
        said = printable(str(error.get("desc")) if isinstance(error, dict) else str(error))
        sentence = f"{self.who} refused {command}: {said}"
        if "does not exist on" in said:
            return NotFoundError(sentence)
        return IslandError(sentence)

    def _is_file(self, name: str, wanted: os.stat_result) -> bool:
        """Return whether `name`, as the process reports it, leads from here to the inode `wanted`."""
        try:
            return os.path.samestat(os.stat(self.locate(name)), wanted)
        except (OSError, ValueError):
            return False


def printable(said: str) -> str:
    """Return another program's words for use inside a sentence: short, printable, without a full stop."""
    return "".join(c if c.isprintable() else "?" for c in said).rstrip(".")[:_MAX_QUOTED]


def _find_nodes(nodes: object, driver: str) -> Iterator[tuple[str, str]]:
    """Iterate over the nodes of one driver in query-named-block-nodes' answer: node name and file.

    The file is a plain name if that is all there is to say, otherwise the node's options as JSON.
    """
    for node in nodes if isinstance(nodes, list) else ():
        if not isinstance(node, dict) or node.get("drv") != driver:
            continue
        name, file = node.get("node-name"), node.get("file")
        if isinstance(name, str) and isinstance(file, str):
            yield name, file


def _find_qcow2_nodes(nodes: object) -> Iterator[tuple[str, str]]:
    """Iterate over the node name and file name of every qcow2 node."""
    for name, file in _find_nodes(nodes, "qcow2"):
        yield name, _bottom_file(_parse_options(file)) if file.startswith("json:") else file


def _find_filters(nodes: object) -> Iterator[tuple[str, str]]:
    """Iterate over the node name and file name of every blkdebug filter on top of a qcow2 node."""
    for name, file in _find_nodes(nodes, "blkdebug"):
        below = _parse_options(file).get("image")
        if isinstance(below, dict) and below.get("driver") == "qcow2":
            yield name, _bottom_file(below)


def _parse_options(name: str) -> dict[str, object]:
    """Parse a node's options, if qemu reports them instead of a name; {} if not."""
    try:
        node = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError):
        return {}
    return node if isinstance(node, dict) else {}


def _bottom_file(node: object) -> str:
    """Return the file name below a node, whose options have each child under "file"; "" if there is none."""
    while isinstance(node, dict) and "filename" not in node:
        node = node.get("file")
    file = node.get("filename") if isinstance(node, dict) else None
    return file if isinstance(file, str) else ""
