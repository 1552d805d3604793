"""Rows of one buffer to and from scattered places of a file, in few system calls.

A row is `unit` bytes of a flat buffer. Rows that are neighbours in the file go in one preadv or
pwritev, and rows that are neighbours in memory as well share one entry of its vector, so the work
in Python is one step per run and not per row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from island_fast.errors import IslandError

__all__ = ["Transfer", "read_transfer", "transfers", "write_all"]

_VECTOR_LIMIT = 1024
_BYTES_LIMIT = 8 << 20


@dataclass(frozen=True, slots=True)
class Transfer:
    """One system call: `length` bytes at `offset` of the file, and the memory for them in order."""

    offset: int
    length: int
    buffers: list[memoryview]


def transfers(
    offsets: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], unit: int, flat: memoryview
) -> Iterator[Transfer]:
    """The transfers that cover all rows, ascending in the file.

    offsets: int64[n], where each row stands in the file, in any order.
    rows: int64[n], which row of `flat` it is.
    unit: bytes of a row.
    flat: the whole buffer, contiguous bytes.
    """
    order = np.argsort(offsets, kind="stable")
    place, row = offsets[order], rows[order]
    # A run is adjacent in the file and in memory: one entry of a vector.
    near = np.diff(place) == unit
    starts = np.flatnonzero(np.concatenate(([True], ~(near & (np.diff(row) == 1)))))
    stops = np.append(starts[1:], len(place))
    yield from _gathered(place[starts].tolist(), row[starts].tolist(), (stops - starts).tolist(), unit, flat)


def read_transfer(fd: int, transfer: Transfer) -> int:
    """Fill the transfer's memory from the file; returns the bytes read, fewer only at its end.

    Raises IslandError: the file system failed.
    """
    return _move(os.preadv, "read", fd, transfer.buffers, transfer.offset)


def write_all(fd: int, buffers: list[memoryview], offset: int) -> None:
    """Write every byte of the buffers at `offset`, in order; at most 1024 buffers.

    Raises IslandError: the file system failed, or has no space left.
    """
    _move(os.pwritev, "write", fd, buffers, offset)


def _gathered(
    places: list[int], rows: list[int], counts: list[int], unit: int, flat: memoryview
) -> Iterator[Transfer]:
    """Join runs that touch in the file, within the limits of one system call."""
    begin = at = -1
    buffers: list[memoryview] = []
    for place, row, count in zip(places, rows, counts, strict=True):
        length = count * unit
        full = len(buffers) >= _VECTOR_LIMIT or at - begin + length > _BYTES_LIMIT
        if buffers and (place != at or full):
            yield Transfer(begin, at - begin, buffers)
            buffers = []
        if not buffers:
            begin = at = place
        buffers.append(flat[row * unit : row * unit + length])
        at += length
    if buffers:
        yield Transfer(begin, at - begin, buffers)


def _move(
    call: Callable[[int, list[memoryview], int], int],
    verb: str,
    fd: int,
    buffers: list[memoryview],
    offset: int,
) -> int:
    """Repeat the call until every buffer is done or it moves nothing."""
    todo = [buffer for buffer in buffers if len(buffer)]
    done = 0
    while todo:
        try:
            moved = call(fd, todo, offset + done)
        except OSError as error:
            raise IslandError(
                f"cannot {verb} the image at byte {offset + done}: {error.strerror};"
                " check the disk and its free space, then run it again"
            ) from error
        if moved == 0:
            break
        done += moved
        while todo and moved >= len(todo[0]):
            moved -= len(todo.pop(0))
        if todo:
            todo[0] = todo[0][moved:]
    return done
