"""A volume for all tools alike: generated from a seed, edited, as a qcow2 and as a raw sparse file.

By bytes, the data is 60 % random, 30 % text-like and 10 % zeros, in runs scattered over the volume. An edit
overwrites 1 % of the volume in pieces of 64 KiB to 1 MiB, aligned to 64 KiB, at allocated places. The qcow2
is written through qemu, as a guest would write it.
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

__all__ = ["Volume", "is_same_disk"]

BLOCK = 65536
_LONGEST = MIB // BLOCK  # blocks in the longest piece
_RUN = 8 * MIB  # of allocated data, on average
_SHARES = (("random", 0.6), ("text", 0.3), ("zero", 0.1))
_TEXT = 16 * MIB

Ranges = NDArray[np.int64]
"""Rows of (start, length) in bytes, ascending, not overlapping."""


class Content:
    """Generates data. At any time its shares are as in _SHARES, to within one piece."""

    def __init__(self, seed: Sequence[int]) -> None:
        self._random = np.random.default_rng(seed)
        self._made = dict.fromkeys((kind for kind, _ in _SHARES), 0)
        self._text = _make_text(seed[0])

    def make_piece(self, length: int) -> bytes:
        """Return `length` bytes of the kind that is furthest below its share."""
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
def _make_text(seed: int) -> bytes:
    """Return words, some much more frequent than others; zstd makes them about 2.6 times smaller."""
    random = np.random.default_rng(seed)
    letters = random.integers(97, 123, (4096, 12), np.uint8)
    sizes = random.integers(2, 13, 4096)
    words = [letters[n, : sizes[n]].tobytes() for n in range(4096)]
    often = random.zipf(1.18, _TEXT // 6) % 4096
    return b" ".join([words[n] for n in often.tolist()])[:_TEXT]


def scatter_pieces(random: np.random.Generator, room: int, lengths: NDArray[np.int64]) -> Ranges:
    """Scatter pieces of these lengths over `room`, in their order and without overlap."""
    cuts = np.sort(random.integers(0, room - int(lengths.sum()) + 1, len(lengths)))
    return np.stack([cuts + np.cumsum(lengths) - lengths, lengths], axis=1)


def _draw_lengths(random: np.random.Generator, total: int) -> NDArray[np.int64]:
    """Draw lengths of 1 to 16 blocks with a sum of `total` blocks."""
    drawn = random.integers(1, _LONGEST + 1, total)
    count = int(np.searchsorted(np.cumsum(drawn), total)) + 1
    drawn = drawn[:count]
    drawn[-1] -= int(drawn.sum()) - total
    return drawn.astype(np.int64)


@dataclass(slots=True)
class Volume:
    """One disk as the qcow2 `image`, as more qcow2 files in `copies`, and as the sparse file `raw`.

    It owns these files; the caller of `make` removes their folder. `runs` are the allocated ranges, and
    `last` the ranges that the last edit wrote, as (start, length) in the volume. `edits` counts edits.
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
        """Bytes that one edit overwrites: 1 % of the volume, in whole blocks."""
        return self.size.volume // 100 // BLOCK * BLOCK

    @classmethod
    def make(cls, folder: Path, size: Size, seed: int) -> Volume:
        """Write a volume into an empty folder, and flush it to disk."""
        random = np.random.default_rng([seed, 0])
        runs = _place_runs(random, size)
        volume = cls(size, seed, folder / "disk.qcow2", folder / "disk.raw", [], runs)
        options = ["-q", "-f", "qcow2", "-o", "lazy_refcounts=on"]
        timing.run(["qemu-img", "create", *options, str(volume.image), str(size.volume)])
        with open(volume.raw, "wb") as raw:
            raw.truncate(size.volume)
        total = size.allocated // BLOCK
        lengths = _draw_lengths(random, total) * BLOCK
        starts = np.cumsum(lengths) - lengths
        volume._write(np.stack([starts, lengths], axis=1), Content([seed, 0]))
        return volume

    def edit(self) -> None:
        """Overwrite 1 % of the volume in every file alike, and flush them to disk."""
        self.edits += 1
        seed = [self.seed, self.edits]
        random = np.random.default_rng(seed)
        lengths = _draw_lengths(random, self.edited // BLOCK) * BLOCK
        room = self.size.allocated // BLOCK
        places = scatter_pieces(random, room, lengths // BLOCK) * BLOCK
        self._write(places, Content(seed))

    def _write(self, places: Ranges, content: Content) -> None:
        """Write new content to ranges of the allocated data; their offsets do not count gaps between runs."""
        self.last = pieces = self._locate(places)
        fd = os.open(self.raw, os.O_RDWR)
        try:
            for start, length in pieces:
                os.pwrite(fd, content.make_piece(length), start)
            os.fsync(fd)
            for image in (self.image, *self.copies):
                nbd = image.with_suffix(".nbd")
                with nbd_client.serve_image(image, nbd), nbd_client.NbdClient(nbd) as client:
                    client.write((start, os.pread(fd, length, start)) for start, length in pieces)
                timing.flush_to_disk(image)
        finally:
            os.close(fd)

    def _locate(self, places: Ranges) -> list[tuple[int, int]]:
        """Return where in the volume these ranges of the allocated data are, split where runs end."""
        begins = np.cumsum(self.runs[:, 1]) - self.runs[:, 1]
        cuts = np.union1d(places[:, 0], begins)
        owner = np.searchsorted(places[:, 0], cuts, side="right") - 1
        stops = np.minimum(np.append(cuts[1:], self.size.allocated), places[owner].sum(axis=1))
        kept = (owner >= 0) & (stops > cuts)
        run = np.searchsorted(begins, cuts, side="right") - 1
        starts = self.runs[run, 0] + cuts - begins[run]
        return [(int(a), int(b)) for a, b in zip(starts[kept], (stops - cuts)[kept], strict=True)]


def _place_runs(random: np.random.Generator, size: Size) -> Ranges:
    """Place the allocated data: runs of about 8 MiB, scattered over the volume."""
    total = size.allocated // BLOCK
    count = max(1, size.allocated // _RUN)
    cuts = np.sort(random.choice(np.arange(1, total), count - 1, replace=False))
    lengths = np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)
    return scatter_pieces(random, size.volume // BLOCK, lengths) * BLOCK


def is_same_disk(one: Path, other: Path, formats: tuple[str, str] = ("qcow2", "raw")) -> bool:
    """Return whether two images show a guest the same disk."""
    first, second = formats
    return (
        timing.run_for_status(["qemu-img", "compare", "-q", "-f", first, "-F", second, str(one), str(other)])
        == 0
    )
