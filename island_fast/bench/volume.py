"""A volume that is the same for everyone: seeded content and edits, as a qcow2 and as a raw sparse file.

The data is by bytes 60 % random, 30 % text-like and 10 % zeros, in runs scattered over the volume. An edit
writes over 1 % of the volume, in pieces of 64 KiB to 1 MiB, aligned to 64 KiB, at places that are allocated.
A qcow2 is written through qemu, as a guest would.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from island_fast.bench import nbd_client, timing
from island_fast.bench.case import MIB, Size

__all__ = ["Volume", "is_same"]

BLOCK = 65536
_LONGEST = MIB // BLOCK  # blocks in one piece
_RUN = 8 * MIB  # of allocated data, on average
_SHARES = (("random", 0.6), ("text", 0.3), ("zero", 0.1))
_TEXT = 16 * MIB

Ranges = NDArray[np.int64]
"""Rows of (start, length), in bytes, ascending and apart."""


class Content:
    """Makes data: the wanted shares hold at any moment, to within one piece."""

    def __init__(self, seed: Sequence[int]) -> None:
        self._random = np.random.default_rng(seed)
        self._made = dict.fromkeys((kind for kind, _ in _SHARES), 0)
        self._text = _text(seed[0])

    def piece(self, length: int) -> bytes:
        """Return that many bytes of the kind that is furthest behind its share."""
        total = sum(self._made.values()) + length
        kind = max(_SHARES, key=lambda one: one[1] * total - self._made[one[0]])[0]
        self._made[kind] += length
        if kind == "random":
            return self._random.bytes(length)
        if kind == "zero":
            return bytes(length)
        start = int(self._random.integers(len(self._text) - length))
        return self._text[start : start + length]


@functools.lru_cache(1)
def _text(seed: int) -> bytes:
    """Words, some much more often than others; zstd makes it about 2.6 times smaller."""
    random = np.random.default_rng(seed)
    letters = random.integers(97, 123, (4096, 12), np.uint8)
    sizes = random.integers(2, 13, 4096)
    words = [letters[n, : sizes[n]].tobytes() for n in range(4096)]
    often = random.zipf(1.18, _TEXT // 6) % 4096
    return b" ".join([words[n] for n in often.tolist()])[:_TEXT]


def scatter(random: np.random.Generator, room: int, lengths: NDArray[np.int64]) -> Ranges:
    """Place pieces of these lengths in their order, apart, anywhere in `room`."""
    cuts = np.sort(random.integers(0, room - int(lengths.sum()) + 1, len(lengths)))
    return np.stack([cuts + np.cumsum(lengths) - lengths, lengths], axis=1)


def _lengths(random: np.random.Generator, total: int) -> NDArray[np.int64]:
    """Lengths of 1 to 16 blocks that make up `total` blocks."""
    drawn = random.integers(1, _LONGEST + 1, total)
    count = int(np.searchsorted(np.cumsum(drawn), total)) + 1
    drawn = drawn[:count]
    drawn[-1] -= int(drawn.sum()) - total
    return drawn.astype(np.int64)


@dataclass(slots=True)
class Volume:
    """The same disk as the qcow2 `image`, as others in `copies`, and as the sparse file `raw`.

    Owns all of them; whoever made it removes its folder. `edited` is how many bytes one edit writes; `last`
    is what was written last, as (start, length) in the volume.
    """

    size: Size
    seed: int
    image: Path
    raw: Path
    copies: list[Path]
    runs: Ranges
    edits: int = 0
    last: list[tuple[int, int]] = field(default_factory=list)

    @property
    def edited(self) -> int:
        """Bytes that each edit writes over: 1 % of the volume, in whole blocks."""
        return self.size.volume // 100 // BLOCK * BLOCK

    @classmethod
    def make(cls, folder: Path, size: Size, seed: int) -> Volume:
        """Write one into an empty folder, and wait until it is on disk."""
        random = np.random.default_rng([seed, 0])
        runs = _runs(random, size)
        volume = cls(size, seed, folder / "disk.qcow2", folder / "disk.raw", [], runs)
        options = ["-q", "-f", "qcow2", "-o", "lazy_refcounts=on"]
        timing.run(["qemu-img", "create", *options, str(volume.image), str(size.volume)])
        with open(volume.raw, "wb") as raw:
            raw.truncate(size.volume)
        total = size.allocated // BLOCK
        lengths = _lengths(random, total) * BLOCK
        starts = np.cumsum(lengths) - lengths
        volume._write(np.stack([starts, lengths], axis=1), Content([seed, 0]))
        return volume

    def edit(self) -> None:
        """Write over 1 % of the volume, the same everywhere, and wait until it is on disk."""
        self.edits += 1
        seed = [self.seed, self.edits]
        random = np.random.default_rng(seed)
        lengths = _lengths(random, self.edited // BLOCK) * BLOCK
        room = self.size.allocated // BLOCK
        places = scatter(random, room, lengths // BLOCK) * BLOCK
        self._write(places, Content(seed))

    def _write(self, places: Ranges, content: Content) -> None:
        """Write new content to these ranges of the allocated data, counted without what lies between it."""
        self.last = pieces = self._pieces(places)
        fd = os.open(self.raw, os.O_RDWR)
        try:
            for start, length in pieces:
                os.pwrite(fd, content.piece(length), start)
            os.fsync(fd)
            for image in (self.image, *self.copies):
                where = image.with_suffix(".nbd")
                with nbd_client.serving(image, where), nbd_client.Client(where) as client:
                    client.write((start, os.pread(fd, length, start)) for start, length in pieces)
                timing.until_on_disk(image)
        finally:
            os.close(fd)

    def _pieces(self, places: Ranges) -> list[tuple[int, int]]:
        """Where in the volume these ranges of its allocated data lie, cut where runs end."""
        begins = np.cumsum(self.runs[:, 1]) - self.runs[:, 1]
        cuts = np.union1d(places[:, 0], begins)
        owner = np.searchsorted(places[:, 0], cuts, side="right") - 1
        stops = np.minimum(np.append(cuts[1:], self.size.allocated), places[owner].sum(axis=1))
        kept = (owner >= 0) & (stops > cuts)
        run = np.searchsorted(begins, cuts, side="right") - 1
        starts = self.runs[run, 0] + cuts - begins[run]
        return [(int(a), int(b)) for a, b in zip(starts[kept], (stops - cuts)[kept], strict=True)]


def _runs(random: np.random.Generator, size: Size) -> Ranges:
    """Where the allocated data lies: runs of about 8 MiB."""
    total = size.allocated // BLOCK
    count = max(1, size.allocated // _RUN)
    cuts = np.sort(random.choice(np.arange(1, total), count - 1, replace=False))
    lengths = np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)
    return scatter(random, size.volume // BLOCK, lengths) * BLOCK


def is_same(one: Path, other: Path, formats: tuple[str, str] = ("qcow2", "raw")) -> bool:
    """Whether two images show a guest the same disk."""
    first, second = formats
    return timing.status(["qemu-img", "compare", "-q", "-f", first, "-F", second, str(one), str(other)]) == 0
