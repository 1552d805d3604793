"""Where the service account's password is looked for in vain."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import tests.cinder.guest as guest
from tests.cinder.leftovers import processes
from tests.cinder.programs import wait_for
from tests.cinder.services import Services
from tests.support.swift_faults import Fault

_HOST = "hosts"


def test_no_secret_is_told(services: Services) -> None:
    """Neither in an argument or the environment of any program, nor in a log that says all it can."""
    swift, user = services.swift(), services.account.ids[0]
    cloud = services.run(host=_HOST, backend=services.island(host=_HOST), defaults={"debug": True})
    volume = cloud.create_volume(host=_HOST)
    attached = cloud.attach(volume, cloud.connector(_HOST))
    guest.write(attached.device, 0, guest.noise("secret", 1 << 20))
    _, token = swift.sign_in()
    swift.inject(Fault("delay", 3.0, method="PUT", path="/packs/"))
    snapshot = cloud.snapshot(volume, wait=False)
    seen = []

    def is_taken() -> bool:
        seen[:] = arguments(user)
        seen.extend(environments(user))
        return any("island_fast snapshot" in words and volume.id in words for words in seen)

    wait_for("the snapshot is taken", is_taken, lambda: cloud.why(snapshot))
    cloud.await_snapshot(snapshot, "available")
    with_daemon = [words for words in arguments(user) if "qemu-storage-daemon" in words]
    assert with_daemon
    with_daemon += environments(user)
    child = cloud.create_volume(snapshot_id=snapshot.id)
    cloud.detach(cloud.attach(child, cloud.connector(_HOST)), child)
    guest.write(attached.device, 0, guest.noise("more", 1 << 20))
    cloud.detach(attached, volume)
    swift.inject(Fault("answer", 403, method="PUT", path="/packs/", times=100))
    failed = cloud.snapshot(volume, wait=False)
    wait_for("it failed", lambda: cloud.api.volume_snapshots.get(failed.id).status == "error", lambda: "")
    swift.calm()
    texts = [*seen, *with_daemon, *messages(cloud, failed), *files(services)]
    assert [text for text in texts if " DEBUG " in text and volume.id in text]
    for secret in (swift.key, token):
        assert [text for text in texts if secret in text] == []
    for one in (child, volume):
        cloud.delete_volume(one, cascade=True)


def arguments(user: int) -> list[str]:
    """The arguments of every process of a user."""
    found = []
    for pid in processes(user):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def environments(user: int) -> list[str]:
    """The environment of every process of a user, as it was when the process started."""
    found = []
    for pid in processes(user):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/environ").read_bytes().decode())
    return found


def messages(cloud: Any, thing: Any) -> list[str]:
    return [*cloud.messages(thing), repr(cloud.api.volume_snapshots.get(thing.id).to_dict())]


def files(services: Services) -> list[str]:
    """The lines of all logs, and what the driver keeps in files outside the images."""
    region = services.region()
    found = [line for log in region.folder.glob("*.log") for line in log.read_text().splitlines()]
    folders = [region.folder / _HOST / "island", services.account.run]
    kept = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    kept += (region.folder / _HOST).rglob("*.json")
    return [*found, *(path.read_bytes().decode("latin-1") for path in kept if path.name != "disk")]
