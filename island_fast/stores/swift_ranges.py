"""Several ranges of an object in one request: the header that asks, and the answer taken apart.

RFC 9110, sections 14.2 and 14.6. A server may answer with the ranges as asked, join neighbours, or
send the whole object; all three are understood. Anything else is a ValueError that says what is
wrong. No I/O.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from island_fast.stores.base import Range, Views

__all__ = ["RANGES_PER_REQUEST", "Piece", "pick", "pieces", "range_header", "room", "split_ranges"]

RANGES_PER_REQUEST = 49
"""Swift answers 50 at most (swift.common.swob, MAX_RANGES)."""

_PART_OVERHEAD = 2048
"""More than the delimiter and headers of one part take, in bytes."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_BOUNDARY = re.compile(r'multipart/byteranges\s*;(?:.*;)?\s*boundary="?([^\s";]{1,70})"?\s*(?:;.*)?', re.I)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of an object from `start` on, of `total` altogether (None: the server does not say)."""

    start: int
    data: memoryview
    total: int | None

    @property
    def stop(self) -> int:
        """The offset after the last byte."""
        return self.start + self.data.nbytes


def split_ranges(ranges: Sequence[Range]) -> list[list[Range]]:
    """Ascending disjoint ranges as requests: empty ones dropped, touching ones joined, 49 to a request."""
    joined: list[Range] = []
    for offset, length in ranges:
        if joined and length and offset == sum(joined[-1]):
            joined[-1] = joined[-1][0], joined[-1][1] + length
        elif length:
            joined.append((offset, length))
    step = RANGES_PER_REQUEST
    return [joined[i : i + step] for i in range(0, len(joined), step)]


def range_header(ranges: Sequence[Range]) -> str:
    """The value of the Range header for ranges of at least one byte each."""
    return "bytes=" + ",".join(f"{offset}-{offset + length - 1}" for offset, length in ranges)


def room(ranges: Sequence[Range]) -> int:
    """The most bytes that a 206 to these ranges can have, be they joined over the gaps between them."""
    return sum(ranges[-1]) - ranges[0][0] + (len(ranges) + 1) * _PART_OVERHEAD


def pieces(headers: Mapping[str, str], body: memoryview) -> list[Piece]:
    """The pieces of a 206 answer, ascending and disjoint; they are views of `body`.

    `headers` has lower-case keys.
    """
    boundary = _BOUNDARY.fullmatch(headers.get("content-type", "").strip())
    if boundary:
        found = _parts(body, boundary[1].encode())
    else:
        found = [_piece(headers.get("content-range", ""), body)]
    if not found:
        raise ValueError("it has no parts")
    for before, after in itertools.pairwise(found):
        if after.start < before.stop or after.total != before.total:
            raise ValueError("its parts overlap or disagree")
    return found


def _piece(content_range: str, data: memoryview) -> Piece:
    """A piece from its Content-Range header, and the bytes that must be exactly of that length."""
    start, stop, total = _bounds(content_range)
    if data.nbytes != stop - start:
        raise ValueError(f"{data.nbytes} bytes came as {content_range!r}")
    return Piece(start, data, total)


def _bounds(content_range: str) -> tuple[int, int, int | None]:
    match = _CONTENT_RANGE.fullmatch(content_range.strip())
    if not match:
        raise ValueError(f"{content_range[:80]!r} is no Content-Range")
    start, stop = int(match[1]), int(match[2]) + 1
    total = None if match[3] == "*" else int(match[3])
    if start >= stop or (total is not None and stop > total):
        raise ValueError(f"{content_range!r} contradicts itself")
    return start, stop, total


def _parts(body: memoryview, boundary: bytes) -> list[Piece]:
    """The parts of a multipart body, by the length that each states: never by looking for a boundary."""
    delimiter = b"--" + boundary
    at = 2 if bytes(body[:2]) == b"\r\n" else 0
    found: list[Piece] = []
    while True:
        at = _expect(body, at, delimiter)
        if bytes(body[at : at + 2]) == b"--":
            return found
        at, start, stop, total = _part_head(body, at)
        end = at + stop - start
        if end > body.nbytes:
            raise ValueError("it ends inside a part")
        found.append(Piece(start, body[at:end], total))
        at = _expect(body, end, b"\r\n")


def _part_head(body: memoryview, at: int) -> tuple[int, int, int, int | None]:
    """A part's headers: where its bytes begin in the body, and its bounds."""
    head = bytes(body[at : at + _PART_OVERHEAD])
    end = head.find(b"\r\n\r\n")
    if end < 0:
        raise ValueError("a part has no end of headers")
    for line in head[:end].split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-range":
            return at + end + 4, *_bounds(value.decode("latin-1"))
    raise ValueError("a part has no Content-Range")


def _expect(body: memoryview, at: int, token: bytes) -> int:
    if body[at : at + len(token)] != token:
        raise ValueError(f"there is no {token!r} at byte {at}")
    return at + len(token)


def pick(found: Sequence[Piece], ranges: Sequence[Range]) -> Views:
    """The bytes of each range out of ascending pieces; ValueError where a range is not all there."""
    starts = [piece.start for piece in found]
    chosen = []
    for offset, length in ranges:
        if not length:
            chosen.append(memoryview(b""))
            continue
        i = bisect.bisect_right(starts, offset) - 1
        if i < 0 or found[i].stop < offset + length:
            raise ValueError(f"bytes {offset} to {offset + length} are missing")
        begin = offset - found[i].start
        chosen.append(found[i].data[begin : begin + length])
    return chosen
