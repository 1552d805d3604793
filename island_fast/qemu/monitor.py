"""The monitor of a qemu process that has images open, which takes internal snapshots of them.

The subclasses of `Monitor` send commands to it: over its QMP socket (`qmp.py`), or through libvirt
(`libvirt.py`). Its answers are not trusted: a guest can have taken over the process.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

from island_fast.errors import IslandError, NotFoundError, RefusedError
from island_fast.qemu.image_lock import open_image, writer_present

__all__ = ["Monitor", "printable"]

_MAX_QUOTED = 300  # characters of another program's words in a message
_FILTERS = frozenset(["blkdebug", "compress", "copy-on-read", "preallocate", "raw", "throttle"])
"""Drivers through which qemu takes internal snapshots of what is below them."""
_FD_SET = "/dev/fdset/"
_OWN_DESCRIPTORS = ("/dev/fd/", "/proc/self/fd/")


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
    def locate(self, name: str) -> Sequence[str]:
        """Return the absolute paths at which the file that qemu calls `name` can be, as seen from here."""

    @abstractmethod
    def processes(self) -> Iterable[int]:
        """Return the pids that the qemu process can have, as this process sees them."""

    def find_node(self, path: str | os.PathLike[str], fd: int = -1) -> str:
        """Return the name of the node to snapshot: the qcow2 over the file of descriptor `fd`, or a filter.

        Without `fd`, the file is that at `path`, which otherwise is only for messages. If there are filters
        above the qcow2 node, such as a throttle or the one of our daemons (`cinder/attach/daemon.py` says
        why), it is the topmost: qemu takes internal snapshots through them, and refuses to take them below.

        Other nodes over the same file (its protocol node, a raw view) do not count. RefusedError, which names
        it, if a running block job works on the image or another node stands on it. RefusedError if the
        process has no such node, or several, or if no process has the file open for writing: qemu reports
        the name that it opened, which can lead to another file by now.
        """
        shown = os.fspath(path)
        opened = open_image(shown) if fd < 0 else fd
        try:
            wanted, written = os.fstat(opened), writer_present(opened)
        finally:
            if fd < 0:
                os.close(opened)
        nodes = self.command("query-named-block-nodes", {"flat": True})
        names = [name for name, file in _find_qcow2_nodes(nodes) if self._is_file(file, wanted)]
        if not names:
            raise RefusedError(f"{self.who} does not hold image {shown!r}; {self.way_out}")
        if len(names) > 1:
            raise RefusedError(
                f"{self.who} has image {shown!r} open {len(names)} times "
                f"(nodes {', '.join(map(repr, names))}); close all but one"
            )
        top = self._find_top(shown, names[0], nodes)
        if not written:
            raise RefusedError(
                f"{self.who} names image {shown!r}, but no process has that file "
                f"open for writing; check whether it was replaced while in use, or is open read-only"
            )
        return top

    def _find_top(self, shown: str, node: str, nodes: object) -> str:
        """Return the topmost of the filters above a node; RefusedError for anything else above it."""
        try:
            graph = _Graph(self.command("x-debug-query-block-graph"))
        except NotFoundError:  # a qemu that has no such command; it refuses what cannot be
            return node
        drivers = dict(_find_drivers(nodes))
        top, passed = node, {node}
        while True:
            above = graph.above(top, "block-driver")
            jobs = {job for one in (top, *above) for job in graph.above(one, "block-job")}
            if jobs:
                raise RefusedError(
                    f"{self.who} runs the block job {printable(min(jobs))!r} on image {shown!r}; wait until "
                    "it has ended, or cancel it"
                )
            if not above:
                return top
            kind = drivers.get(above[0], "unknown")
            if len(above) > 1 or kind not in _FILTERS or above[0] in passed:
                raise RefusedError(
                    f"{self.who} has node {printable(above[0])!r} ({printable(kind)}) on top of image "
                    f"{shown!r}, and qemu takes no internal snapshot below it; name the image on top, or "
                    "remove that node"
                )
            top = above[0]
            passed.add(top)

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
        unknown = isinstance(error, dict) and error.get("class") == "CommandNotFound"
        if unknown or "does not exist on" in said:
            return NotFoundError(sentence)
        return IslandError(sentence)

    def _is_file(self, name: str, wanted: os.stat_result) -> bool:
        """Return whether `name`, as the process reports it, leads from here to the inode `wanted`."""
        return any(_is_same_file(place, wanted) for place in self._places(name))

    def _places(self, name: str) -> Iterator[str]:
        """Iterate over the paths at which the file can be that the process calls `name`."""
        numbers: list[object] = []
        if name.startswith(_FD_SET):
            numbers = [
                number for set_id, number in self._descriptors_in_sets() if name == f"{_FD_SET}{set_id}"
            ]
        for folder in _OWN_DESCRIPTORS:
            if name.startswith(folder):
                numbers = [name.removeprefix(folder)]
        if not numbers:
            yield from self.locate(name)
        for number in numbers:
            for process in self.processes():
                yield f"/proc/{process}/fd/{number}"

    def _descriptors_in_sets(self) -> Iterator[tuple[object, object]]:
        """Iterate over set and number of the descriptors that the process was given in sets (add-fd)."""
        sets = self.command("query-fdsets")
        for one in sets if isinstance(sets, list) else ():
            found = one.get("fds") if isinstance(one, dict) else None
            for each in found if isinstance(found, list) else ():
                if isinstance(each, dict) and isinstance(each.get("fd"), int):
                    yield one.get("fdset-id"), each["fd"]


class _Graph:
    """What stands on what in a qemu process: the answer of x-debug-query-block-graph, which is not trusted.

    qemu has no other command that names the parents of a node; since 10.1, query-named-block-nodes names the
    children.
    """

    def __init__(self, answer: object) -> None:
        graph = answer if isinstance(answer, dict) else {}
        self._nodes: dict[int, tuple[str, str]] = {}
        for node in _dicts(graph.get("nodes")):
            if isinstance(number := node.get("id"), int):
                self._nodes[number] = (str(node.get("type")), str(node.get("name")))
        self._edges = [(edge.get("parent"), edge.get("child")) for edge in _dicts(graph.get("edges"))]

    def above(self, name: str, kind: str) -> list[str]:
        """Return the names of the parents of that kind that the block node `name` has."""
        own = [number for number, node in self._nodes.items() if node == ("block-driver", name)]
        parents = [
            self._nodes[parent]
            for parent, child in self._edges
            if child in own and isinstance(parent, int) and parent in self._nodes
        ]
        return sorted({parent for found, parent in parents if found == kind})


def _dicts(answer: object) -> Iterator[dict[str, object]]:
    """Iterate over the objects in a list of an answer."""
    yield from (one for one in answer if isinstance(one, dict)) if isinstance(answer, list) else ()


def _is_same_file(place: str, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(place), wanted)
    except (OSError, ValueError):
        return False


def printable(said: str) -> str:
    """Return another program's words for use inside a sentence: short, printable, without a full stop."""
    return "".join(c if c.isprintable() else "?" for c in said).rstrip(".")[:_MAX_QUOTED]


def _find_qcow2_nodes(nodes: object) -> Iterator[tuple[str, str]]:
    """Iterate over the name and the file of every qcow2 node in query-named-block-nodes' answer.

    qemu reports the file as a plain name if that is all there is to say, otherwise the node's options.
    """
    for node in _dicts(nodes):
        name, file = node.get("node-name"), node.get("file")
        if node.get("drv") == "qcow2" and isinstance(name, str) and isinstance(file, str):
            yield name, _bottom_file(_parse_options(file)) if file.startswith("json:") else file


def _find_drivers(nodes: object) -> Iterator[tuple[str, str]]:
    """Iterate over the name and the driver of every node in query-named-block-nodes' answer."""
    for node in _dicts(nodes):
        name, driver = node.get("node-name"), node.get("drv")
        if isinstance(name, str) and isinstance(driver, str):
            yield name, driver


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
