"""Several ranges of an object in one request: writing its Range header, and parsing the answer.

RFC 9110, sections 14.2 and 14.6. A server can send the ranges as asked, join neighbours, or send the whole
object; all three are accepted. Ceph's gateway sends the first range and says nothing of the others, which
`is_first_alone` recognizes. Anything else is a ValueError that says what is wrong. No I/O.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from island_fast.stores.base import Range, Views

__all__ = [
    "RANGES_PER_REQUEST",
    "Piece",
    "is_first_alone",
    "join_ranges",
    "max_body_size",
    "parse_pieces",
    "range_header",
    "select_ranges",
]

RANGES_PER_REQUEST = 49
"""Swift accepts at most 50 (swift.common.swob, MAX_RANGES)."""

_PART_OVERHEAD = 2048
"""Upper limit for the delimiter and headers of one part, in bytes."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_BOUNDARY = re.compile(r'multipart/byteranges\s*;(?:.*;)?\s*boundary="?([^\s";]{1,70})"?\s*(?:;.*)?', re.I)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of an object from offset `start` on. `total` is the object's size; None if it is not given."""

    start: int
    data: memoryview
    total: int | None

    @property
    def stop(self) -> int:
        """Return the offset after the last byte."""
        return self.start + self.data.nbytes


def join_ranges(ranges: Sequence[Range]) -> list[Range]:
    """Return ascending disjoint ranges without empty ones, and with touching ones joined."""
    joined: list[Range] = []
    for offset, length in ranges:
        if joined and length and offset == sum(joined[-1]):
            joined[-1] = joined[-1][0], joined[-1][1] + length
        elif length:
            joined.append((offset, length))
    return joined


def range_header(ranges: Sequence[Range]) -> str:
    """Return the value of the Range header for ranges of at least one byte each."""
    return "bytes=" + ",".join(f"{offset}-{offset + length - 1}" for offset, length in ranges)


def max_body_size(ranges: Sequence[Range]) -> int:
    """Return the most bytes of a valid 206 answer to these ranges, even with the gaps between them."""
    return sum(ranges[-1]) - ranges[0][0] + (len(ranges) + 1) * _PART_OVERHEAD


def parse_pieces(headers: Mapping[str, str], body: memoryview) -> list[Piece]:
    """Parse a 206 answer into pieces, ascending and disjoint; they are views of `body`.

    `headers` has lower-case keys.
    """
    boundary = _BOUNDARY.fullmatch(headers.get("content-type", "").strip())
    if boundary:
        found = _parse_multipart(body, boundary[1].encode())
    else:
        content_range = headers.get("content-range", "")
        start, stop, total = _parse_content_range(content_range)
        if body.nbytes != stop - start:
            raise ValueError(f"{body.nbytes} bytes came as {content_range!r}")
        found = [Piece(start, body, total)]
    if not found:
        raise ValueError("it has no parts")
    for before, after in itertools.pairwise(found):
        if after.start < before.stop or after.total != before.total:
            raise ValueError("its parts overlap or disagree")
    return found


def is_first_alone(headers: Mapping[str, str], found: Sequence[Piece], ranges: Sequence[Range]) -> bool:
    """Return whether a 206 answer to several ranges is that to the first of them, to the byte.

    `found` is what `parse_pieces` returns for it.
    """
    several = _BOUNDARY.fullmatch(headers.get("content-type", "").strip())
    return (
        not several
        and len(ranges) > 1
        and [(piece.start, piece.data.nbytes) for piece in found] == [ranges[0]]
    )


def _parse_content_range(content_range: str) -> tuple[int, int, int | None]:
    match = _CONTENT_RANGE.fullmatch(content_range.strip())
    if not match:
        raise ValueError(f"{content_range[:80]!r} is not a valid Content-Range")
    start, stop = int(match[1]), int(match[2]) + 1
    total = None if match[3] == "*" else int(match[3])
    if start >= stop or (total is not None and stop > total):
        raise ValueError(f"{content_range!r} contradicts itself")
    return start, stop, total


def _parse_multipart(body: memoryview, boundary: bytes) -> list[Piece]:
    """Parse a multipart body by the length that each part states, never by searching for a boundary."""
    delimiter = b"--" + boundary
    at = 2 if bytes(body[:2]) == b"\r\n" else 0
    found: list[Piece] = []
    while True:
        at = _expect(body, at, delimiter)
        if bytes(body[at : at + 2]) == b"--":
            return found
        at, start, stop, total = _parse_part_head(body, at)
        end = at + stop - start
        if end > body.nbytes:
            raise ValueError("it ends inside a part")
        found.append(Piece(start, body[at:end], total))
        at = _expect(body, end, b"\r\n")


def _parse_part_head(body: memoryview, at: int) -> tuple[int, int, int, int | None]:
    """Parse a part's headers; return where its bytes begin in the body, and its start, stop and total."""
    head = bytes(body[at : at + _PART_OVERHEAD])
    end = head.find(b"\r\n\r\n")
    if end < 0:
        raise ValueError("a part has no end of headers")
    for line in head[:end].split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-range":
            return at + end + 4, *_parse_content_range(value.decode("latin-1"))
    raise ValueError("a part has no Content-Range")


def _expect(body: memoryview, at: int, token: bytes) -> int:
    """Return the offset after `token`, which must be at offset `at`."""
    if body[at : at + len(token)] != token:
        raise ValueError(f"there is no {token!r} at byte {at}")
    return at + len(token)


def select_ranges(found: Sequence[Piece], ranges: Sequence[Range]) -> Views:
    """Return the bytes of each range, taken from ascending pieces; ValueError if a range is incomplete."""
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
