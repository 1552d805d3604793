"""What a host must have: without it the service does not start, and its log says what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from island_fast.cinder.attach.selftest import VOLUME
from tests.cinder import leftovers
from tests.cinder.disks import small_disk
from tests.cinder.programs import Program
from tests.cinder.services import Services

MIB = 1 << 20
HOST = "refused"


def refusal(services: Services, **changed: object) -> str:
    """What the service says when it refuses to start; fails if it does start, or leaves anything."""
    backend = services.island(host=HOST, **changed)
    services.region().configure(HOST, backend)
    program = services.region().service(f"volume-{HOST}")
    begun = len(program.text())
    try:
        with pytest.raises(AssertionError, match="VolumeDriverException"):
            services.start_volume(host=HOST)
    finally:
        program.stop()
    folders = [Path(str(backend[f"island_{name}_dir"])) for name in ("run", "volumes")]
    assert leftovers.loops(folders) == leftovers.mounts(folders, []) == []
    assert not list(folders[0].rglob(VOLUME))
    assert list(folders[1].iterdir()) == []
    return program.text()[begun:]


def test_links_that_would_outlive_a_reboot(services: Services) -> None:
    folder = services.account.folder("disk")
    small_disk(folder, 16 * MIB, services.account.ids)
    said = refusal(services, island_run_dir=folder)
    assert f"the folder of links '{folder}/island/devices' is on ext4 and outlives a reboot" in said


@contextmanager
def without_filters(services: Services) -> Iterator[None]:
    """Rootwrap lets root do nothing for our driver."""
    path = services.account.home / "lib/island_fast/etc/rootwrap.d/island.filters"
    aside = services.account.home / path.name
    path.rename(aside)
    try:
        yield
    finally:
        aside.rename(path)


def test_filters_that_are_not_installed(services: Services) -> None:
    with without_filters(services):
        said = refusal(services)
    assert "island-loop could not be started to make a loop device over" in said
    assert "(no filter matched); put island.filters where rootwrap looks for filters" in said


def test_a_fuse_that_lets_nobody_else_in(services: Services, tmp_path: Path) -> None:
    """In a mount namespace where /etc/fuse.conf is another file, as the machine's own is everybody's."""
    conf = tmp_path / "fuse.conf"
    conf.write_text("#user_allow_other\n")
    program = services.region().service(f"volume-{HOST}")
    with elsewhere(program, f"mount --bind {conf} /etc/fuse.conf"):
        said = refusal(services)
    assert "add a line user_allow_other to /etc/fuse.conf" in said


@contextmanager
def elsewhere(program: Program, prepare: str) -> Iterator[None]:
    """Start the program, as its user, in a mount namespace of its own that a shell as root has prepared."""
    command, user = program.command, program.user
    assert user is not None
    switch = f"exec setpriv --reuid={user[0]} --regid={user[1]} --clear-groups"
    program.command = ["unshare", "--mount", "sh", "-ec", f'{prepare}; {switch} "$@"', "sh", *command]
    program.user = None
    try:
        yield
    finally:
        program.command, program.user = command, user
