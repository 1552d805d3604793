"""A qemu process that has images open; internal snapshots are taken there.

How commands reach it is the matter of the classes below `Monitor`: its QMP socket (`qmp.py`), or libvirt
(`libvirt.py`). What it answers may come from a process that a guest has taken over.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from island_fast.errors import IslandError, NotFoundError, RefusedError
from island_fast.qemu.image_lock import open_image, writer_present

__all__ = ["Monitor", "plain"]

_MAX_SAID = 300  # characters of somebody else's words in a message


class Monitor(ABC):
    """The monitor of one qemu process; a context manager. Not for use by several threads at once.

    `who` is what messages call the process, `otherwise` the way out where it does not hold an image.
    """

    who: str
    otherwise: str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End the connection; the process and its images stay as they are."""

    @abstractmethod
    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> object:
        """Give one command and return qemu's answer to it; IslandError in one sentence if it fails."""

    @abstractmethod
    def locate(self, name: str) -> str:
        """The absolute path that leads from here to the file which that process calls `name`."""

    def find_node(self, path: str | os.PathLike[str]) -> str:
        """Return the name of the qcow2 node whose file is the very inode of `path`.

        Where a daemon of ours has a filter in front of that node (`daemon.py` says why), it is the filter's
        name: qemu takes internal snapshots through it, and refuses to take them below it.

        Other nodes over the same file (its protocol node, a raw view, filters) do not count.
        RefusedError if the process has no such node, or several, or if nobody has the file open for
        writing: qemu tells the name that it opened, which may lead to another file by now.
        """
        shown = os.fspath(path)
        fd = open_image(shown)
        try:
            wanted, written = os.fstat(fd), writer_present(fd)
        finally:
            os.close(fd)
        nodes = self.command("query-named-block-nodes", {"flat": True})
        names = [name for name, file in _qcow2_nodes(nodes) if self._is_file(file, wanted)]
        if not names:
            raise RefusedError(f"{self.who} does not hold image {shown!r}; {self.otherwise}")
        if len(names) > 1:
            raise RefusedError(
                f"{self.who} has image {shown!r} open {len(names)} times "
                f"(nodes {', '.join(map(repr, names))}); close all but one"
            )
        if not written:
            raise RefusedError(
                f"{self.who} names image {shown!r}, but nobody has that file "
                f"open for writing; see whether it was replaced while in use, or is open read-only"
            )
        fronts = [name for name, file in _fronts(nodes) if self._is_file(file, wanted)]
        return fronts[0] if len(fronts) == 1 else names[0]

    def snapshot_create(self, node: str, name: str) -> None:
        """Take an internal snapshot of the node's image; on return it is in the file.

        The guest's writes wait meanwhile; what it has not written yet is not in the snapshot, as
        after a power cut. The node must be a root: one under a filter or an overlay is refused by qemu, as
        is a name that is in the table already.
        """
        self.command("blockdev-snapshot-internal-sync", {"device": node, "name": name})

    def snapshot_create_all(self, pins: Sequence[tuple[str, str]]) -> None:
        """Take internal snapshots, each a node and a name, at one moment: all of them or none.

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

    def refused(self, command: str, error: object) -> IslandError:
        """What to raise for the `error` that qemu answered a command with."""
        said = plain(str(error.get("desc")) if isinstance(error, dict) else str(error))
        sentence = f"{self.who} refused {command}: {said}"
        if "does not exist on" in said:
            return NotFoundError(sentence)
        return IslandError(sentence)

    def _is_file(self, name: str, wanted: os.stat_result) -> bool:
        """Tell whether `name`, as that process reports it, is the inode `wanted` seen from here."""
        try:
            return os.path.samestat(os.stat(self.locate(name)), wanted)
        except (OSError, ValueError):
            return False


def plain(said: str) -> str:
    """Words of another program for use inside a sentence: bounded, printable, without a full stop."""
    return "".join(c if c.isprintable() else "?" for c in said).rstrip(".")[:_MAX_SAID]


def _qcow2_nodes(nodes: object) -> Iterator[tuple[str, str]]:
    """Yield node name and file name of every qcow2 node in an answer of query-named-block-nodes."""
    for node in nodes if isinstance(nodes, list) else ():
        if not isinstance(node, dict) or node.get("drv") != "qcow2":
            continue
        name, file = node.get("node-name"), node.get("file")
        if isinstance(name, str) and isinstance(file, str):
            yield name, _protocol_file(file)


def _fronts(nodes: object) -> Iterator[tuple[str, str]]:
    """Yield node name and file name of every blkdebug filter that stands on a qcow2 node."""
    for node in nodes if isinstance(nodes, list) else ():
        if not isinstance(node, dict) or node.get("drv") != "blkdebug":
            continue
        name, file = node.get("node-name"), node.get("file")
        if isinstance(name, str) and isinstance(file, str):
            below = _options(file).get("image")
            if isinstance(below, dict) and below.get("driver") == "qcow2":
                yield name, _bottom(below)


def _protocol_file(name: str) -> str:
    """Return the name of the file at the bottom of a node; "" where it is no file.

    qemu reports a plain name where that says all, else the node's options as JSON, each node's child
    under "file".
    """
    return _bottom(_options(name)) if name.startswith("json:") else name


def _options(name: str) -> dict[str, object]:
    """Return a node's options, where qemu reports it by them."""
    try:
        node = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError):
        return {}
    return node if isinstance(node, dict) else {}


def _bottom(node: object) -> str:
    while isinstance(node, dict) and "filename" not in node:
        node = node.get("file")
    file = node.get("filename") if isinstance(node, dict) else None
    return file if isinstance(file, str) else ""
