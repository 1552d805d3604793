"""Write to the device of the self-test in every way that a guest or a file system has, and compare it.

This runs as root, in `loop_root.py` and `nbd_root.py`: no other user ever gets a device that belongs to the
kernel's common pool. What it leaves is described by digests, which the self-test compares with the image.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

from island_fast.cinder.attach.block_device import BlockDevice
from island_fast.errors import DamagedError

__all__ = ["BLOCK", "DAMAGED", "SIZE", "TESTS", "VOLUME", "digest", "exercise", "fits_test", "run_test"]

VOLUME = "5e1f7e57-0000-4000-8000-000000000000"
"""The volume of every self-test. No other volume's device is ever exercised."""
SIZE = 32 << 20
"""The bytes of that volume."""
BLOCK = 1 << 16
"""The bytes that each digest is of."""
DAMAGED = 4
"""The exit status if data differs from what was written."""
TESTS = ("exercise", "digest", "bench")
"""The commands that both of root's programs have for the device of the self-test."""

# number, depth, length and step of the requests
_BENCH_OPTIONS = re.compile(r"-c [0-9]{1,9} -d [0-9]{1,4} -s [0-9]{1,8} -S [0-9]{1,9}")
_STEPS = 400
_LONGEST = 256 << 10  # bytes of one request
_SECTOR = 512  # bytes


def fits_test(command: str, options: Sequence[str], volume: str) -> bool:
    """Return whether `command` is one of TESTS, takes these options, and may be used on this volume."""
    if command not in TESTS or volume != VOLUME:
        return False
    return _BENCH_OPTIONS.fullmatch(" ".join(options)) is not None if command == "bench" else not options


def run_test(
    command: str, own_device: AbstractContextManager[tuple[Path, int]], options: Sequence[str]
) -> int:
    """Run one of TESTS on the device, and a descriptor of it, that `own_device` yields; print the digests.

    The device stays that of the self-test while it is used. Returns the exit status; `bench` does not return.
    Raises DamagedError if the device holds other data than was written.
    """
    with own_device as (path, device):
        if command == "bench":
            os.set_inheritable(device, True)
            _become_bench(path, options)
        print(*(exercise(path) if command == "exercise" else _read_digests(path)))
    return 0


def exercise(path: Path) -> list[str]:
    """Send random requests to a device of `SIZE` zero bytes, and return the digests of what it must hold.

    Raises DamagedError if it holds anything else.
    """
    dice, model = random.Random(1), bytearray(SIZE)
    with BlockDevice(path) as device:
        for step in range(_STEPS):
            _change_at_random(device, model, dice)
            if step % 16 == 0:
                begin = dice.randrange(SIZE - _LONGEST) // _SECTOR * _SECTOR
                found = device.read_direct(begin, _LONGEST)
                _require_equal(found, model[begin : begin + _LONGEST], begin, "while it was written")
        device.flush()
        _require_equal(device.read_direct(0, SIZE), model, 0, "without the page cache")
    return digest(model)


def _read_digests(path: Path) -> list[str]:
    """Return the digests of a device's content."""
    with BlockDevice(path) as device:
        return digest(device.read(0, SIZE))


def digest(data: bytes | bytearray) -> list[str]:
    """Return the digest of each block, 16 hex digits."""
    view = memoryview(data)
    parts = (view[begin : begin + BLOCK] for begin in range(0, len(view), BLOCK))
    return [hashlib.sha256(part).hexdigest()[:16] for part in parts]


def _become_bench(path: Path, options: Sequence[str]) -> NoReturn:
    """Become `qemu-img bench`, which overwrites the device; `options` say how much of it, and how."""
    command = ["qemu-img", "bench", *options, "-w", "--pattern", "165", "-t", "none", "-f", "raw", str(path)]
    os.execvp(command[0], command)


def _change_at_random(device: BlockDevice, model: bytearray, dice: random.Random) -> None:
    """Send one random request to the device, and make the same change to the model."""
    way = dice.choice(["write", "write", "direct", "direct", "zero", "hole", "discard", "flush"])
    length = dice.choice([_SECTOR, 4096, 65536, _LONGEST, dice.randrange(1, _LONGEST)])
    begin = dice.randrange(SIZE - length)
    if way != "write":
        begin, length = begin // _SECTOR * _SECTOR, -(-length // _SECTOR) * _SECTOR
    stop = begin + length
    if way in ("write", "direct"):
        data = dice.randbytes(length)
        (device.write if way == "write" else device.write_direct)(begin, data)
        model[begin:stop] = data
    elif way == "zero":
        device.zero(begin, length)
        model[begin:stop] = bytes(length)
    elif way == "hole":
        if device.punch(begin, length):
            model[begin:stop] = bytes(length)
    elif way == "discard":
        if device.discard(begin, length):
            model[begin:stop] = _check_discarded(device.read_direct(begin, length), model[begin:stop])
    else:
        device.flush()


def _check_discarded(now: bytes, before: bytes | bytearray) -> bytes:
    """Return what a discard left: in each sector old data or zeros; raise DamagedError if anything else."""
    for begin in range(0, len(now), _SECTOR):
        sector = now[begin : begin + _SECTOR]
        if any(sector) and sector != before[begin : begin + _SECTOR]:
            raise DamagedError("a discard changed data into other data")
    return now


def _require_equal(found: bytes, wanted: bytes | bytearray, begin: int, where: str) -> None:
    if found == wanted:
        return
    at = begin + next(n for n in range(len(wanted)) if found[n] != wanted[n])
    raise DamagedError(f"data from byte {at} on differs from what was written ({where})")
