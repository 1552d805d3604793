"""Running guests of a real libvirt, and the command that snapshots them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.cli.conftest import island
from tests.guests.session import Guest, Libvirt, file, missing

__all__ = ["island"]

NUMBERS = itertools.count(1)
K64 = 65536


@pytest.fixture(scope="session")
def libvirt() -> Iterator[Libvirt]:
    if reason := missing():
        pytest.skip(reason)
    with Libvirt() as session:
        yield session


@pytest.fixture
def name(libvirt: Libvirt) -> Iterator[str]:
    """A name that no other guest has; those that run are ended after the test."""
    yield f"web{next(NUMBERS)}"
    for guest in [*libvirt.guests]:
        guest.stop()


@pytest.fixture
def guest(libvirt: Libvirt, name: str) -> Guest:
    """A guest with two disks, NAME-a and NAME-b, the first 128 KiB of each written to."""
    disks = {dev: file(libvirt.image(f"{name}-{part}")) for dev, part in (("vda", "a"), ("vdb", "b"))}
    made = libvirt.make(name, disks)
    made.write(0, 0, 2 * K64, 7)
    made.write(1, 0, 2 * K64, 8)
    return made
