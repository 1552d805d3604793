"""Running guests of a real libvirt, and the command that snapshots them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.cli.conftest import island
from tests.guests.session import Libvirt, missing

__all__ = ["island"]

NUMBERS = itertools.count(1)


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
