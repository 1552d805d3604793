"""Rows to and from scattered places: every byte once, in calls within the system's limits."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.errors import IslandError
from island_fast.qcow2.vectored_io import Transfer, plan_transfers, read_transfer, write_all

UNIT = 512
IOV_MAX = os.sysconf("SC_IOV_MAX")


def plan(offsets, rows, flat, unit=UNIT):
    return list(plan_transfers(np.array(offsets, np.int64), np.array(rows, np.int64), unit, memoryview(flat)))


@given(st.lists(st.integers(0, 40), max_size=30, unique=True), st.randoms())
def test_every_row_goes_to_its_place(places, chance):
    flat = bytearray(chance.randbytes(UNIT * len(places)))
    rows = list(range(len(places)))
    chance.shuffle(rows)
    file = bytearray(41 * UNIT)
    done = plan([p * UNIT for p in places], rows, flat) if places else []
    for transfer in done:
        data = b"".join(transfer.buffers)
        assert len(data) == transfer.length
        file[transfer.offset : transfer.offset + len(data)] = data
    for place, row in zip(places, rows, strict=True):
        assert file[place * UNIT : (place + 1) * UNIT] == flat[row * UNIT : (row + 1) * UNIT]
    assert sum(t.length for t in done) == len(flat)
    # Neighbours in the file share a call: as many calls as runs.
    assert len(done) == sum(p - 1 not in places for p in places)


def test_rows_with_one_place_are_all_read():
    flat = bytearray(3)
    assert sorted(t.offset for t in plan([5, 5, 6], [0, 1, 2], flat, 1)) == [5, 5]


def test_no_call_exceeds_the_systems_limit(tmp_path):
    count = 3 * IOV_MAX + 5
    flat = bytearray(np.random.default_rng(1).integers(0, 256, count * UNIT, np.uint8).tobytes())
    rows = np.arange(count)[::-1]
    done = plan(np.arange(count) * UNIT, rows, flat)
    assert max(len(t.buffers) for t in done) <= IOV_MAX
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    for transfer in done:
        write_all(fd, transfer.buffers, transfer.offset)
    back = bytearray(len(flat))
    for transfer in plan(np.arange(count) * UNIT, rows, back):
        assert read_transfer(fd, transfer) == transfer.length
    os.close(fd)
    assert back == flat


def test_no_call_exceeds_8_mib():
    flat = bytearray(24 << 20)
    done = plan(np.arange(384) << 16, np.arange(384)[::-1], flat, 65536)
    assert [t.length for t in done] == [8 << 20] * 3


def test_reads_stop_at_the_end_and_go_on_after_short_ones(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(250)))
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, b, o: real(f, [b[0][:7]], o))
    buffers = [memoryview(bytearray(n)) for n in (0, 100, 3, 200)]
    assert read_transfer(fd, Transfer(10, 303, buffers)) == 240
    assert b"".join(buffers)[:240] == bytes(range(10, 250))
    os.close(fd)
    with pytest.raises(IslandError, match="cannot read the image at byte 10"):
        read_transfer(fd, Transfer(10, 303, buffers))
