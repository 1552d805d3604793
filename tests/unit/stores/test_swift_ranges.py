"""Answers to requests for several ranges, as servers send them and as nobody should."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.stores.base import Range
from island_fast.stores.swift_ranges import (
    Piece,
    is_first_alone,
    join_ranges,
    max_body_size,
    parse_pieces,
    range_header,
    select_ranges,
)

OBJECT = bytes(range(256)) * 8
MULTIPART = {"content-type": "multipart/byteranges;boundary=XYZ"}


def multipart(*parts: tuple[str, bytes], end: bytes = b"--XYZ--") -> memoryview:
    body = b"".join(
        b"--XYZ\r\nContent-Type: x/y\r\nContent-Range: %b\r\n\r\n%b\r\n" % (bounds.encode(), data)
        for bounds, data in parts
    )
    return memoryview(body + end)


def part(start: int, stop: int, total: object = len(OBJECT)) -> tuple[str, bytes]:
    return f"bytes {start}-{stop - 1}/{total}", OBJECT[start:stop]


@st.composite
def ascending(draw: st.DrawFn) -> list[Range]:
    cuts = draw(st.lists(st.integers(0, len(OBJECT)), max_size=300))
    cuts = sorted(cuts[: len(cuts) // 2 * 2])
    return [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]


@given(ascending())
def test_what_is_asked_for_comes_back(ranges: list[Range]):
    """A server that answers each range of the header by the letter."""
    found: list[Piece] = []
    joined = join_ranges(ranges)
    for few in (joined[i : i + 49] for i in range(0, len(joined), 49)):
        bounds = [tuple(map(int, b)) for b in re.findall(r"(\d+)-(\d+)", range_header(few))]
        assert bounds == [(o, o + n - 1) for o, n in few]
        body = multipart(*(part(a, b + 1) for a, b in bounds))
        assert body.nbytes <= max_body_size(few)
        found += parse_pieces(MULTIPART, body)
    assert [bytes(v) for v in select_ranges(found, ranges)] == [OBJECT[o : o + n] for o, n in ranges]


@given(ascending())
def test_joined_ranges_have_gaps_between_them(ranges: list[Range]):
    flat = join_ranges(ranges)
    assert all(length > 0 for _, length in flat)
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(flat))
    assert sum(n for _, n in flat) == sum(n for _, n in ranges)


def test_one_range_comes_without_parts():
    (piece,) = parse_pieces({"content-range": "bytes 5-9/2048"}, memoryview(OBJECT[5:10]))
    assert (piece.start, piece.stop, piece.total, bytes(piece.data)) == (5, 10, 2048, OBJECT[5:10])


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/byteranges; boundary=XYZ",
        'multipart/byteranges;boundary="XYZ"',
        "Multipart/ByteRanges; charset=x; BOUNDARY=XYZ; more=1",
    ],
)
def test_ways_to_write_the_boundary(content_type: str):
    body = multipart(part(0, 3), part(7, 9, "*"))
    with pytest.raises(ValueError, match="disagree"):
        parse_pieces({"content-type": content_type}, body)
    found = parse_pieces(
        {"content-type": content_type}, memoryview(b"\r\n" + bytes(multipart(part(0, 3), part(7, 9))))
    )
    assert [(p.start, p.stop) for p in found] == [(0, 3), (7, 9)]


def test_a_server_may_join_what_was_asked_for():
    found = parse_pieces(MULTIPART, multipart(part(0, 100), part(200, 300)))
    assert select_ranges(found, [(0, 5), (50, 50), (250, 1)]) == [OBJECT[:5], OBJECT[50:100], OBJECT[250:251]]


def test_data_that_looks_like_a_boundary_is_data():
    data = b"\r\n--XYZ--\r\n--XYZ\r\n\r\n"
    (piece,) = parse_pieces(MULTIPART, multipart((f"bytes 0-{len(data) - 1}/100", data)))
    assert piece.data == data


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no b'--XYZ'"),
        (b"--XYZ--", "no parts"),
        (bytes(multipart(part(0, 5), end=b"")), "no b'--XYZ'"),
        (bytes(multipart(part(0, 5)))[:-12], "no b'\\\\r\\\\n'|inside"),
        (bytes(multipart(part(0, 50)))[:-40], "inside a part"),
        (bytes(multipart(part(0, 5), part(4, 9))), "overlap"),
        (bytes(multipart(part(10, 15), part(0, 5))), "overlap"),
        (bytes(multipart(part(0, 5), part(6, 9, 9999))), "disagree"),
        (bytes(multipart(("bytes 5-4/10", b""))), "contradicts"),
        (bytes(multipart(("bytes 5-10/10", b"123456"))), "contradicts"),
        (bytes(multipart(("bytes 0-99999999999999999999/*", b"12"))), "not a valid Content-Range"),
        (bytes(multipart(("octets 0-1/10", b"12"))), "not a valid Content-Range"),
        (b"--XYZ\r\nContent-Type: x\r\n\r\n12\r\n--XYZ--", "no Content-Range"),
        (b"--XYZ\r\nA: b\r\n" + b"x" * 5000, "end of headers"),
        (b"--XYZ\r\nContent-Range: bytes 0-4/9\r\n\r\n123456\r\n--XYZ--", "no b'"),
    ],
)
def test_malformed_parts(body: bytes, says: str):
    with pytest.raises(ValueError, match=says):
        parse_pieces(MULTIPART, memoryview(body))


@pytest.mark.parametrize("content_range", ["", "bytes */10", "bytes 0-9/2048", "bytes 0-3/2048"])
def test_a_single_range_of_another_length(content_range: str):
    with pytest.raises(ValueError):
        parse_pieces({"content-range": content_range}, memoryview(OBJECT[:5]))


def test_a_range_that_did_not_come():
    found = parse_pieces(MULTIPART, multipart(part(10, 20), part(30, 40)))
    for missing in ((0, 5), (5, 10), (15, 10), (20, 5), (35, 6), (50, 1)):
        with pytest.raises(ValueError, match="missing"):
            select_ranges(found, [missing])


def test_the_first_range_alone():
    """As Ceph's gateway answers; whatever else is not what was asked for stays an error."""
    asked = [(5, 5), (20, 10), (40, 1)]

    def alone(headers: dict[str, str], body: memoryview, ranges: list[Range] = asked) -> bool:
        return is_first_alone(headers, parse_pieces(headers, body), ranges)

    first = {"content-range": "bytes 5-9/2048", "content-type": "application/octet-stream"}
    assert alone(first, memoryview(OBJECT[5:10]))
    assert not alone(first, memoryview(OBJECT[5:10]), asked[:1])
    assert not alone({"content-range": "bytes 5-8/2048"}, memoryview(OBJECT[5:9]))
    assert not alone({"content-range": "bytes 5-10/2048"}, memoryview(OBJECT[5:11]))
    assert not alone({"content-range": "bytes 4-9/2048"}, memoryview(OBJECT[4:10]))
    assert not alone({"content-range": "bytes 20-29/2048"}, memoryview(OBJECT[20:30]))
    assert not alone(MULTIPART, multipart(part(5, 10)))
    assert not alone(MULTIPART, multipart(part(5, 10), part(20, 30)))


@given(st.binary(max_size=300))
def test_nothing_but_value_errors(noise: bytes):
    for body in (noise, b"--XYZ" + noise, b"--XYZ\r\nContent-Range: bytes 0-3/9\r\n\r\n" + noise):
        try:
            found = parse_pieces(MULTIPART, memoryview(body))
        except ValueError:
            continue
        assert all(p.data.nbytes == p.stop - p.start for p in found)
