"""Read or write rows of one buffer at scattered offsets of a file, in few system calls.

A row is `unit` bytes of a flat buffer. Rows that are adjacent in the file share one preadv or pwritev; rows
that are adjacent in memory too share one entry of its vector. So Python takes one step per run, not per row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from island_fast.errors import IslandError

__all__ = ["Transfer", "plan_transfers", "read_transfer", "write_all"]

_VECTOR_LIMIT = 1024
_BYTES_LIMIT = 8 << 20


@dataclass(frozen=True, slots=True)
class Transfer:
    """One read or write: `length` bytes at `offset` of the file, and the memory for them, in order."""

    offset: int
    length: int
    buffers: list[memoryview]


def plan_transfers(
    offsets: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], unit: int, flat: memoryview
) -> Iterator[Transfer]:
    """Yield the transfers that cover all rows, ascending in the file.

    Each joins as many rows that touch in the file as one system call takes.

    offsets: int64[n], the offset of each row in the file, in any order.
    rows: int64[n], its number in `flat`.
    unit: bytes of a row.
    flat: the whole buffer, contiguous bytes.
    """
    order = np.argsort(offsets, kind="stable")
    place, row = offsets[order], rows[order]
    # A run is adjacent in the file and in memory: one entry of a vector.
    near = np.diff(place) == unit
    starts = np.flatnonzero(np.concatenate(([True], ~(near & (np.diff(row) == 1)))))
    lengths = np.diff(starts, append=len(place)) * unit
    runs = zip(place[starts].tolist(), (row[starts] * unit).tolist(), lengths.tolist(), strict=True)
    begin = end = -1
    buffers: list[memoryview] = []
    for offset, at, length in runs:
        full = len(buffers) >= _VECTOR_LIMIT or end - begin + length > _BYTES_LIMIT
        if buffers and (offset != end or full):
            yield Transfer(begin, end - begin, buffers)
            buffers = []
        if not buffers:
            begin = end = offset
        buffers.append(flat[at : at + length])
        end += length
    if buffers:
        yield Transfer(begin, end - begin, buffers)


def read_transfer(fd: int, transfer: Transfer) -> int:
    """Fill the transfer's memory from the file; return the bytes read, fewer only at the end of the file.

    Raises IslandError: the file system failed.
    """
    return _transfer_all(os.preadv, "read", fd, transfer.buffers, transfer.offset)


def write_all(fd: int, buffers: list[memoryview], offset: int) -> None:
    """Write all bytes of at most 1024 buffers at `offset`, in order.

    Raises IslandError: the file system failed, or has no space left.
    """
    _transfer_all(os.pwritev, "write", fd, buffers, offset)


def _transfer_all(
    call: Callable[[int, list[memoryview], int], int],
    verb: str,
    fd: int,
    buffers: list[memoryview],
    offset: int,
) -> int:
    """Repeat the call until all buffers are done or it moves nothing; return the bytes moved."""
    todo = [buffer for buffer in buffers if len(buffer)]
    done = 0
    while todo:
        try:
            moved = call(fd, todo, offset + done)
        except OSError as error:
            raise IslandError(
                f"cannot {verb} the image at byte {offset + done}: {error.strerror};"
                " check the disk and its free space, then try again"
            ) from error
        if moved == 0:
            break
        done += moved
        while todo and moved >= len(todo[0]):
            moved -= len(todo.pop(0))
        if todo:
            todo[0] = todo[0][moved:]
    return done
