"""Under eventlet, as in cinder-volume: everything works, and the service's other work goes on meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.live.actor import ROOT
from tests.live.conftest import Host

SCRIPT = """
import eventlet
eventlet.monkey_patch()
import json, sys
from pathlib import Path
from island_fast.qemu.programs import run_program
from island_fast.cinder.attach.exports import Exports

run, links, volume, image = sys.argv[1:]
beats = 0

def beat():
    global beats
    while True:
        beats += 1
        eventlet.sleep(0.01)

def slowly(command, /, *, root=False, env=None):
    return run_program(["sh", "-c", 'sleep 0.5; exec "$@"', "sh", *command], root=root, env=env)

def counted(call, *arguments):
    before = beats
    call(*arguments)
    return beats - before

eventlet.spawn(beat)
exports = Exports(Path(run), Path(links), slowly, "loop")
told = {"attach": counted(exports.attach, volume, Path(image))}
together = [eventlet.spawn(exports.attach, volume, Path(image)) for _ in range(4)]
told["links"] = sorted({str(one.wait()) for one in together})
told["grow"] = counted(exports.grow, volume, 128 << 20)
told["state"] = exports.state(volume).value
told["stop"] = counted(exports.stop, volume)
told["left"] = exports.state(volume).value
print(json.dumps(told))
"""


def test_green_threads_go_on_while_a_volume_is_attached(root_host: Host) -> None:
    volume, image = root_host.volume()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-P", "-c", SCRIPT, root_host.run, root_host.links, volume, image],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["links"] == [str(root_host.links / volume)]
    assert (told["state"], told["left"]) == ("attached", "none")
    # blocked for the whole of a call it would beat once or not at all
    assert min(told["attach"], told["grow"], told["stop"]) >= 5, told
