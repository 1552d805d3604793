"""A process is killed while its qemu-img runs, which goes on: at once, or during the next snapshot."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.crash.actor import Hold
from tests.faults.crash.holding import image_is_whole, nothing_is_left, pins, seen_by_a_stranger, sweep_later
from tests.faults.crash.processes import World, wait_until
from tests.faults.crash.watched import BEFORE
from tests.support import qemu

pytestmark = qemu.needs_qemu

SLOW = """#!/bin/sh
case "$*" in
*' {option} '*)
    touch {folder}/reached
    while [ ! -e {folder}/gate ]; do sleep 0.01; done
    {program} "$@"
    touch {folder}/ended
    ;;
*)
    exec {program} "$@"
    ;;
esac
"""


class SlowQemuImg:
    """A folder with a qemu-img that stands still at "snapshot `option`" until it may go on."""

    def __init__(self, folder: Path, option: str) -> None:
        self.folder = folder
        folder.mkdir()
        program = folder / "qemu-img"
        program.write_text(SLOW.format(option=option, folder=folder, program=qemu.QEMU_IMG))
        program.chmod(0o700)

    def reached(self) -> None:
        wait_until((self.folder / "reached").exists, "qemu-img to be started")

    def go_on(self) -> None:
        """Let it go on, and wait for its end."""
        (self.folder / "gate").touch()
        wait_until((self.folder / "ended").exists, "qemu-img to end")


@pytest.mark.parametrize("option", ["-c", "-d"], ids=["taking a pin", "dropping a pin"])
@pytest.mark.parametrize("meanwhile", [False, True], ids=["before the next", "during the next"])
def test_qemu_img_outlives_the_process_that_started_it(world: World, option: str, meanwhile: bool) -> None:
    world.create()
    world.write(0, 8, 1)
    truth = {world.snapshot(): qemu.content(world.image)}
    world.write(2, 3, 2)
    content = qemu.content(world.image)
    slow = SlowQemuImg(world.folder / "programs", option)
    one = world.start("snapshot", image=str(world.image), programs=str(slow.folder))
    slow.reached()
    one.kill()
    truth |= dict.fromkeys(seen_by_a_stranger(world).keys() - truth, content)
    assert len(truth) == (1 if option == "-c" else 2), "the old pin is dropped after the record"
    if meanwhile:
        two = world.start(
            "snapshot", image=str(world.image), holds=(Hold("put", "/manifests/", BEFORE, "put"),)
        )
        two.reached("put")
        slow.go_on()
        two.open("put")
    else:
        slow.go_on()
        two = world.start("snapshot", image=str(world.image))
    truth[two.done()["snapshot"]] = content
    image_is_whole(world)
    assert seen_by_a_stranger(world) == truth
    world.write(4, 3, 3)
    content = qemu.content(world.image)
    three = world.run("snapshot", image=str(world.image))
    truth[three["snapshot"]] = content
    assert (three["rule"], three["notes"], pins(world)) == ("table-diff", [], 1)
    sweep_later(world, "state")
    nothing_is_left(world, "state")
    assert seen_by_a_stranger(world) == truth
    image_is_whole(world)
