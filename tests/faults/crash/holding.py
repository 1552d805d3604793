"""What must hold of a repository and an image whenever a process was killed."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from island_fast.api import Repository
from island_fast.errors import NotFoundError
from island_fast.images.pins import pinned_lineage
from island_fast.qemu.image_lock import writer_present
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import LocalState
from island_fast.stores.directory import DirectoryStore
from island_fast.stores.directory_reserve import RESERVE
from tests.faults.crash.processes import VOLUME, World, copy, set_back, wait_until
from tests.faults.crash.starts import LATER, STRANGER, registrations
from tests.faults.crash.watched import WatchedStore
from tests.support import qemu

_RECORD = re.compile(rf"{VOLUME}/catalog/\d{{6}}-(\d{{8}}|stop)")


@contextlib.contextmanager
def opened(repository: Path, state: Path, older: float = 0.0) -> Iterator[Repository]:
    """The repository with that local state; its objects seem `older` seconds older."""
    store = WatchedStore(DirectoryStore(str(repository)), older=older)
    with Repository(store, LocalState(state)) as found:
        yield found


def restored(repository: Path, state: Path) -> dict[str, bytes]:
    """All live snapshots and what each restores to; none if there is no repository."""
    with tempfile.TemporaryDirectory(dir=repository.parent) as folder, contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(opened(repository, state))
        except NotFoundError:
            return {}
        answer = {}
        for one in found.snapshots():
            target = Path(folder, one.snapshot)
            found.restore(f"{VOLUME}@{one.snapshot}", target, image_format="raw")
            answer[one.snapshot] = target.read_bytes()
        return answer


def live(repository: Path, state: Path) -> set[str]:
    """Ids of all live snapshots."""
    with opened(repository, state) as found:
        return {one.snapshot for one in found.snapshots()}


def seen_by_a_stranger(world: World) -> dict[str, bytes]:
    """The same by a host that has no local state."""
    with tempfile.TemporaryDirectory(dir=world.folder) as state:
        return restored(world.repository, Path(state))


def seen_by_its_host(world: World, state: str) -> dict[str, bytes]:
    """The same with local state, on copies: a record of unknown outcome is settled by looking."""
    with tempfile.TemporaryDirectory(dir=world.folder) as folder:
        for original in (world.repository, world.state(state)):
            if original.exists():
                copy(original, Path(folder, original.name))
        return restored(Path(folder, world.repository.name), Path(folder, state))


def image_is_whole(world: World) -> None:
    """qemu finds no fault in the image, once no process of qemu's works on it any more."""
    fd = os.open(world.image, os.O_RDONLY)
    try:
        wait_until(lambda: not writer_present(fd), f"{world.image} to be free")
    finally:
        os.close(fd)
    qemu.check(world.image)


def pins(world: World, image: Path | None = None) -> int:
    """How many internal snapshots of the (main) image pin the lineage of its name in this repository."""
    image = image or world.image
    names = [one["name"] for one in qemu.info(image).get("snapshots", [])]
    if not names:
        return 0
    with opened(world.repository, world.state()) as repository:
        return sum(pinned_lineage(repository.id, name) == image.stem for name in names)


def sweep_later(world: World, state: str) -> None:
    """Sweep when everything that is there now has become older than any limit."""
    set_back(registrations(world, state), LATER)
    with opened(world.repository, world.state(state), LATER) as repository:
        (swept,) = repository.sweep()
        left = [one.object for one in swept.steps if one.action == "keep"]
        assert state != "state" or all(STRANGER in name for name in left), "it accounts for all it stored"
        repository.sweep(unknown=True)
        (again,) = repository.sweep(dry_run=True)
        assert again.objects_removed == 0, "a sweep leaves nothing to the next one"
        assert again.objects_unknown == 0


def nothing_is_left(world: World, state: str) -> None:
    """After a late sweep: no object, local mark or temporary file is there that no snapshot needs."""
    files = {str(p.relative_to(world.repository)) for p in world.repository.rglob("*") if p.is_file()}
    with opened(world.repository, world.state(state)) as repository:
        (lineage,) = repository.lineages()
        needed = _needed(lineage)
        kept = {name for name in files if not _RECORD.fullmatch(name)} - {RESERVE}
        assert kept - _scratch(files) == needed
        assert not lineage.files.pending.all()
        assert not lineage.files.registrations.all()
    set_back([world.repository / name for name in _scratch(files)], LATER)
    with DirectoryStore(str(world.repository)) as store:
        store.put("repository", [store.get("repository")])  # the first put looks for what was left
    assert not list((world.repository / ".tmp~").iterdir())


def _scratch(files: set[str]) -> set[str]:
    return {name for name in files if name.startswith(".tmp~/")}


def _needed(lineage: Lineage) -> set[str]:
    """Names of all objects of the repository but records; no pack may be more than half dead."""
    packs, state = lineage.state.packs, lineage.state
    assert not (2 * packs.dead > packs.size).any()
    assert not state.dropped
    names = set(lineage.pack_names(packs))
    manifests = {lineage.manifest_name(row) for row in state.live.values()}
    return names | manifests | {"repository"}
