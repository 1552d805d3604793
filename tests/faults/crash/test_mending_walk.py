"""kill -9 wherever mending changes anything: what was whole stays whole, and the next run mends the rest."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Any

from island_fast.errors import DamagedError
from tests.faults.crash.holding import nothing_is_left, opened, sweep_later
from tests.faults.crash.processes import BLOCK, VOLUME, Actors, World
from tests.faults.crash.watched import AFTER, BEFORE, ELSEWHERE, UNNAMED
from tests.support import qemu

pytestmark = qemu.needs_qemu

WORDS: dict[str, Any] = {"verb": "verify", "sample": 1.0, "heal": True}


def rot(path: Path, at: int) -> None:
    """Flip a bit; what is linked to the file elsewhere is spoilt, too."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damaged(world: World) -> dict[str, bytes]:
    """Two snapshots with a rotten pack, one that is gone, a rotten manifest and record; what they held."""
    truth = {}
    world.create(16)
    for first, blocks, seed in ((0, 8, 1), (8, 4, 2)):
        world.write(first, blocks, seed)
        truth[world.snapshot()] = qemu.content(world.image)
    one, two = truth
    folder = world.repository / VOLUME
    rot(folder / f"packs/{one}/0-00000000", -2 * BLOCK)
    (folder / f"packs/{two}/0-00000000").unlink()
    rot(folder / f"manifests/{one}-0", 100)
    rot(folder / "catalog/000000-00000001", 100)
    return truth


def never_wrong(world: World, truth: dict[str, bytes]) -> int:
    """A host that knows nothing gets back what each snapshot held, or finds damage; how many are whole."""
    whole = 0
    with (
        tempfile.TemporaryDirectory(dir=world.folder) as folder,
        opened(world.repository, Path(folder, "none")) as repository,
    ):
        for snapshot, content in truth.items():
            target = Path(folder, snapshot)
            try:
                repository.restore(f"{VOLUME}@{snapshot}", target, image_format="raw")
            except DamagedError:
                continue
            assert target.read_bytes() == content
            whole += 1
    return whole


def is_mended(world: World, truth: dict[str, bytes], *, swept: bool) -> None:
    """A host that knows nothing reads every snapshot; if `swept`, after a late sweep leaves nothing over."""
    if swept:
        sweep_later(world, "state")
        nothing_is_left(world, "state")
        assert world.run(**{**WORDS, "heal": False})["damages"] == []
    assert never_wrong(world, truth) == len(truth)


def test_mending_killed_at_every_change(tmp_path: Path, actors: Actors, walked: list[str]) -> None:
    world = World(tmp_path / "world", actors)
    world.folder.mkdir(exist_ok=True)
    truth = damaged(world)
    assert never_wrong(world, truth) == 0
    world.keep(tmp_path / "start")
    done = world.start(**WORDS)
    assert [one["mended"] for one in done.done()["damages"]] == [True] * 4
    is_mended(world, truth, swept=True)
    changes = [call for call in done.calls() if call.verb in ("put", "delete")]
    points = [(call.number, moment) for call in changes for moment in (BEFORE, AFTER)]
    points += [(call.number, UNNAMED) for call in changes if call.verb == "put"]
    points += [(number + 1, ELSEWHERE) for number in range(done.told()["elsewhere"])]
    begun = 0
    for point in points:
        world.put_back(tmp_path / "start")
        killed = world.start(**WORDS, kill=point)
        assert killed.wait() == -signal.SIGKILL, (point, killed.told())
        begun += never_wrong(world, truth) > 0
        again = world.run(**WORDS)
        assert all(one["mended"] for one in again["damages"]), (point, again)
        is_mended(world, truth, swept=point[1] == UNNAMED)
    assert begun, "killed after something had been mended"
    walked.append(f"mending: {len(points)} points, at {len(changes)} changes of the store and of other files")
