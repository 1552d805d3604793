"""`island snapshot --domain` of guests that a real libvirt runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import DamagedError, IslandError
from island_fast.formats.manifest import Manifest
from island_fast.operations import snapshot
from island_fast.qemu.libvirt import Domain
from island_fast.repository.lineage import Lineage
from tests.cli.conftest import Done, Island, one_sentence
from tests.cli.test_cli_verbs import KEYS
from tests.guests.session import SIZE, Guest, Libvirt, content_is, file, pins
from tests.support import qemu
from tests.support.daemon import wait_for_socket

K64 = 65536
MIB = 1 << 20


def manifest(island: Island, reference: str) -> Manifest:
    with Repository.open(str(island.repository)) as repository:
        found = repository.find(reference)
        return found.lineage.manifest(found.row)


def restored(island: Island, reference: str) -> Path:
    target = island.repository.parent / "restored.qcow2"
    target.unlink(missing_ok=True)
    island.json("restore", reference, target)
    return target


def image(guest: Guest, part: str) -> Path:
    return guest.libvirt.images / f"{guest.name}-{part}.qcow2"


def words(guest: Guest, *more: object) -> tuple[object, ...]:
    return ("snapshot", "--domain", guest.name, "--connect", guest.libvirt.uri, *more)


def test_the_disks_of_a_guest_that_writes_on(island: Island, guest: Guest) -> None:
    first = island.json(*words(guest, "--label", "one"))
    assert list(first) == ["domain", "group", "consistency", "reason", "snapshots"]
    assert [list(one) for one in first["snapshots"]] == [[*KEYS["snapshot"], "disk", "image"]] * 2
    assert (first["domain"], first["consistency"]) == (guest.name, "crash")
    assert "guest agent is not configured" in first["reason"]
    a, b = first["snapshots"]
    assert (a["disk"], a["volume"], a["label"]) == ("vda", f"{guest.name}-a", "one")
    assert (b["disk"], b["image"]) == ("vdb", str(image(guest, "b")))
    guest.write(0, K64, K64, 9)
    guest.write(1, MIB, K64, 3)
    second = island.json(*words(guest))
    assert [one["rule"] for one in second["snapshots"]] == ["table-diff"] * 2
    assert [one["blocks_changed"] for one in second["snapshots"]] == [1, 1]
    assert [one["parent"] for one in second["snapshots"]] == [a["snapshot"], b["snapshot"]]
    guest.write(0, 0, SIZE, 1)
    for part, taken in zip("ab", second["snapshots"], strict=True):
        (pin,) = pins(image(guest, part))
        assert pin.endswith(taken["snapshot"]), "the old pin is dropped, through libvirt"
    content_is(restored(island, f"{guest.name}-a@latest"), [(0, K64, 7), (K64, K64, 9)])
    content_is(restored(island, f"{guest.name}-b@latest"), [(0, 2 * K64, 8), (MIB, K64, 3)])
    content_is(restored(island, a["snapshot"]), [(0, 2 * K64, 7)])
    assert "libvirt guest with --domain" in island.fails(4, "snapshot", image(guest, "a"))
    guest.stop()
    for part in "ab":
        qemu.check(image(guest, part))
        assert island.json("snapshot", image(guest, part))["rule"] == "table-diff", "it is the same volume"


def test_manifests_tell_what_belongs_together(island: Island, guest: Guest) -> None:
    several = island.json(*words(guest, "--freeze", "never"))
    assert several["reason"] == "no freeze was requested"
    told = [manifest(island, one["snapshot"]) for one in several["snapshots"]]
    assert {one.group for one in told} == {several["group"]}
    assert re.fullmatch("[0-9a-f]{32}", several["group"])
    assert told[0].created == told[1].created
    assert {name: told[1].properties[name] for name in told[1].properties if "libvirt" in name} == {
        "libvirt.domain": guest.name,
        "libvirt.disk": "vdb",
        "libvirt.disks": "vda vdb",
    }
    assert told[0].properties["consistency"] == "crash"
    alone = island.json(*words(guest, "--disk", "vdb"))
    assert alone["group"] is None
    assert manifest(island, alone["snapshots"][0]["snapshot"]).group is None
    shown = island.json("show", told[0].snapshot)
    assert (shown["group"], shown["consistency"]) == (several["group"], "crash")


def test_what_people_read(island: Island, guest: Guest) -> None:
    text = island.text(*words(guest))
    head, *disks = text.split("\n\n")
    found = dict(re.split(r"  +", line, maxsplit=1) for line in head.splitlines())
    assert list(found) == ["domain", "group", "consistency"]
    assert found["consistency"].startswith("crash: its agent did not answer guest-fsfreeze-status (")
    for disk, part in zip(disks, "ab", strict=True):
        lines = disk.splitlines()
        assert lines[0] == f"disk      vd{part}, {image(guest, part)}"
        assert lines[2] == f"volume    {guest.name}-{part}, 16.0 MiB"
    shown = island.text("show", f"{guest.name}-a@latest")
    assert "\nstate     crash: as after a power cut\n" in shown
    assert f"\nguest     domain {guest.name}, disk vda\ngroup     {found['group']}\n" in shown
    assert island.text(*words(guest, "-q")) == ""
    assert len(island.json("list")) == 4


def test_one_transaction_is_all_or_nothing(guest: Guest) -> None:
    with Domain(guest.name, guest.libvirt.uri) as domain:
        nodes = [domain.find_node(image(guest, part)) for part in "ab"]
        domain.snapshot_create(nodes[1], "there")
        with pytest.raises(IslandError, match=r"refused transaction: .*already exists"):
            domain.snapshot_create_all([(nodes[0], "new"), (nodes[1], "there")])
        assert (pins(image(guest, "a")), pins(image(guest, "b"))) == ([], ["there"])
        domain.snapshot_create_all([(node, "new") for node in nodes])
        assert (pins(image(guest, "a")), pins(image(guest, "b"))) == (["new"], ["there", "new"])


def test_a_chosen_disk_goes_to_a_named_volume(island: Island, guest: Guest) -> None:
    assert "choose one with --disk" in island.fails(2, *words(guest, "--volume", "data"))
    taken = island.json(*words(guest, "--disk", "vdb", "--volume", "data"))
    assert [(one["disk"], one["volume"]) for one in taken["snapshots"]] == [("vdb", "data")]
    assert pins(image(guest, "a")) == []
    assert [one["volume"] for one in island.json(*words(guest))["snapshots"]] == [f"{guest.name}-a", "data"]


# --- one disk cannot be stored ---


def block(island: Island, volume: str) -> Path:
    """Let the volume's packs have no place."""
    packs = island.repository / volume / "packs"
    packs.parent.mkdir(parents=True, exist_ok=True)
    packs.touch()
    return packs


@pytest.mark.parametrize("broken, stored", [("a", "vdb"), ("b", "vda")])
def test_the_other_disk_is_stored_and_told(
    island: Island, guest: Guest, libvirt: Libvirt, broken: str, stored: str
) -> None:
    island.json("snapshot", libvirt.image(f"{guest.name}-other"))  # makes the repository
    packs = block(island, f"{guest.name}-{broken}")
    done: Done = island(*words(guest), "--json")
    assert done.code == 4
    assert f"disk vd{broken} of domain '{guest.name}' is not stored: " in done.err.splitlines()[-1]
    told = json.loads(done.out)
    assert list(told) == ["domain", "group", "consistency", "reason", "snapshots"]
    assert [one["disk"] for one in told["snapshots"]] == [stored]
    whole = "b" if broken == "a" else "a"
    volumes = [one["volume"] for one in island.json("list")]
    assert volumes == [f"{guest.name}-{whole}", f"{guest.name}-other"]
    assert pins(image(guest, broken)) == []
    assert len(pins(image(guest, whole))) == 1
    packs.unlink()
    again = island.json(*words(guest))["snapshots"]
    assert [one["blocks_changed"] for one in again] == ([2, 0] if broken == "a" else [0, 2])
    assert [len(pins(image(guest, part))) for part in "ab"] == [1, 1]


def test_a_disk_that_is_another_volume_s_is_left_out(island: Island, guest: Guest, libvirt: Libvirt) -> None:
    other = libvirt.image(f"{guest.name}-other")
    island.json("snapshot", other, "--volume", f"{guest.name}-a")
    done: Done = island(*words(guest), "--json")
    assert done.code == 4
    assert [one["disk"] for one in json.loads(done.out)["snapshots"]] == ["vdb"]
    told = one_sentence(done.err)
    assert told.startswith(f"disk vda of domain '{guest.name}' is not stored: ")
    assert told.endswith("; --volume needs --disk vda alone, or leave it out with --disk vdb")
    assert [len(pins(image(guest, part))) for part in "ab"] == [0, 1]
    alone = island.fails(4, *words(guest, "--disk", "vda"))
    assert "leave it out" not in alone


@pytest.mark.parametrize("broken, left", [("a", "vdb"), ("b", "vda")])
def test_a_disk_that_fails_before_its_pin_gets_none(
    island: Island, guest: Guest, monkeypatch: pytest.MonkeyPatch, broken: str, left: str
) -> None:
    def interrupted(lineage: Lineage) -> object:
        if lineage.name == f"{guest.name}-{broken}":
            raise DamagedError("its registration cannot be read")
        return real(lineage)

    real = snapshot.find_interrupted
    monkeypatch.setattr(snapshot, "find_interrupted", interrupted)
    done: Done = island(*words(guest), "--json")
    assert done.code == 6
    assert [one["disk"] for one in json.loads(done.out)["snapshots"]] == [left]
    assert f"disk vd{broken} of domain '{guest.name}' is not stored: its registration" in done.err
    assert [len(pins(image(guest, part))) for part in "ab"] == [part != broken for part in "ab"]
    monkeypatch.setattr(snapshot, "find_interrupted", real)
    assert len(island.json(*words(guest))["snapshots"]) == 2


def test_no_disk_is_stored(island: Island, guest: Guest, libvirt: Libvirt) -> None:
    island.json("snapshot", libvirt.image(f"{guest.name}-other"))
    for part in "ab":
        block(island, f"{guest.name}-{part}")
    done: Done = island(*words(guest))
    for disk in ("vda", "vdb"):
        assert f"disk {disk} of domain '{guest.name}' is not stored: " in done.err
    assert [pins(image(guest, part)) for part in "ab"] == [[], []]


def test_an_interruption_leaves_what_is_stored_and_no_other_pin(
    island: Island, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def send(*words: object, **options: object) -> object:
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*words, **options)

    real = snapshot.send_blocks
    monkeypatch.setattr(snapshot, "send_blocks", send)
    done: Done = island(*words(guest))
    assert done.code == 130
    assert "'island list' shows which are stored" in done.err
    assert [one["volume"] for one in island.json("list")] == [f"{guest.name}-a"]
    assert [len(pins(image(guest, part))) for part in "ab"] == [1, 0]


def test_a_guest_that_ends_while_it_is_stored(
    island: Island, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*words: object, **options: object) -> object:
        if guest in guest.libvirt.guests:
            guest.stop()
        return real(*words, **options)

    island.json(*words(guest))
    guest.write(1, MIB, K64, 3)
    real = snapshot.send_blocks
    monkeypatch.setattr(snapshot, "send_blocks", send)
    done: Done = island(*words(guest), "--json")
    assert [one["blocks_changed"] for one in json.loads(done.out)["snapshots"]] == [0, 1]
    for disk, told in zip(("vda", "vdb"), done.err.splitlines(), strict=True):
        assert told.startswith(f"island: disk {disk}: the old pin island-")
        assert " stays until the next snapshot: libvirt could not pass on " in told
    for part in "ab":
        assert len(pins(image(guest, part))) == 2
        assert island.json("snapshot", image(guest, part))["rule"] == "table-diff"
        assert len(pins(image(guest, part))) == 1


# --- images of other kinds ---


def test_an_overlay_is_stored_with_what_is_below_it(island: Island, libvirt: Libvirt, name: str) -> None:
    base = libvirt.image(f"{name}-base")
    qemu.io(base, qemu.write(0, MIB, 5))
    overlay = libvirt.image(name, backing_file=base, backing_fmt="qcow2")
    guest = libvirt.make(name, {"vda": file(overlay)})
    guest.write(0, K64, K64, 6)
    first = island.json(*words(guest))["snapshots"][0]
    guest.write(0, 2 * MIB, K64, 4)
    second = island.json(*words(guest))["snapshots"][0]
    assert (first["blocks_changed"], second["rule"], second["blocks_changed"]) == (16, "table-diff", 1)
    expected = [(0, K64, 5), (K64, K64, 6), (2 * K64, MIB - 2 * K64, 5), (2 * MIB, K64, 4)]
    content_is(restored(island, second["snapshot"]), expected)


def test_disks_that_a_guest_may_not_write_to_are_left_out(
    island: Island, libvirt: Libvirt, name: str
) -> None:
    cdrom = "type='file' device='cdrom'><driver name='qemu' type='raw'/>"
    read_only = file(libvirt.image(f"{name}-tools")) + "<readonly/>"
    disks = {"sda": cdrom, "vdb": read_only, "vdc": file(libvirt.image(f"{name}-c"))}
    guest = libvirt.make(name, disks)
    assert [one["disk"] for one in island.json(*words(guest))["snapshots"]] == ["vdc"]
    assert "has no disk 'sda'; it has vdb, vdc" in island.fails(3, *words(guest, "--disk", "sda"))
    assert "open read-only" in island.fails(4, *words(guest, "--disk", "vdb"))


def test_a_raw_disk_is_refused_by_name(island: Island, libvirt: Libvirt, name: str) -> None:
    raw = libvirt.image(f"{name}-raw")
    os.truncate(raw, 0)
    os.truncate(raw, MIB)
    guest = libvirt.make(name, {"vda": file(libvirt.image(name)), "vdb": file(raw, "raw")})
    sentence = island.fails(4, *words(guest))
    assert sentence == (
        f"disk vdb of domain '{name}' has format 'raw', and only qcow2 files can be snapshotted while in "
        "use; name others with --disk: vda"
    )
    assert len(island.json(*words(guest, "--disk", "vda"))["snapshots"]) == 1


def test_a_disk_on_the_network_is_refused_by_name(island: Island, libvirt: Libvirt, name: str) -> None:
    served = libvirt.image(f"{name}-served")
    place = libvirt.folder / f"{name}.nbd"
    command = ["qemu-nbd", "--socket", place, "--format", "raw", "--persistent", served]
    with subprocess.Popen(command) as server:
        try:
            wait_for_socket(server, place)
            os.chmod(place, 0o777)
            source = f"<source protocol='nbd'><host transport='unix' socket='{place}'/></source>"
            guest = libvirt.make(name, {"vda": f"type='network'><driver name='qemu' type='qcow2'/>{source}"})
            sentence = island.fails(4, *words(guest))
            guest.stop()
        finally:
            server.terminate()
    assert f"disk vda of domain '{name}' is not a file but of type 'network', and only" in sentence
    assert sentence.endswith("; it has no other disk")


def test_two_new_images_of_one_name_are_not_mixed(island: Island, libvirt: Libvirt, name: str) -> None:
    one, other = libvirt.image(name), libvirt.image(f"sub-{name}")
    folder = libvirt.images / name
    folder.mkdir()
    folder.chmod(0o777)
    other = Path(shutil.move(other, folder / f"{name}.qcow2"))
    guest = libvirt.make(name, {"vda": file(one), "vdb": file(other)})
    assert f"disks vda and vdb would both be volume {name}" in island.fails(4, *words(guest))
    assert (pins(one), pins(other), [*island.repository.glob("*/*")]) == ([], [], [])
    island.json(*words(guest, "--disk", "vdb", "--volume", f"{name}-data"))
    assert [one["volume"] for one in island.json(*words(guest))["snapshots"]] == [name, f"{name}-data"]


# --- what cannot be had ---


def test_a_guest_that_is_not_there_or_not_running(island: Island, libvirt: Libvirt, name: str) -> None:
    at = ("--connect", libvirt.uri)
    sentence = island.fails(3, "snapshot", "--domain", "nobody", *at)
    assert sentence.startswith(f"there is no domain 'nobody' at {libvirt.uri}; ")
    libvirt.make(name, {"vda": file(libvirt.image(name))}, start=False)
    sentence = island.fails(4, "snapshot", "--domain", name, *at)
    assert sentence == f"domain '{name}' is not running; use 'island snapshot IMAGE' for its images"
    assert not island.repository.exists()


def test_a_libvirt_that_cannot_be_used(island: Island, libvirt: Libvirt, tmp_path: Path) -> None:
    def fails(code: int, uri: str) -> str:
        return island.fails(code, "snapshot", "--domain", "web1", "--connect", uri)

    assert "cannot be reached at qemu:///session?socket=" in fails(1, f"qemu:///session?socket={tmp_path}/no")
    assert "check whether libvirtd runs" in fails(1, f"qemu:///session?socket={tmp_path}/no")
    assert "has no qemu guests" in fails(2, "test:///default")
    assert island.repository.exists() is False


def test_another_host_s_libvirt_is_refused(libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    import libvirt as module

    monkeypatch.setattr(module.virConnect, "getURI", lambda _: "qemu+ssh://far/system")
    with pytest.raises(IslandError, match=r"qemu\+ssh://far/system is on another host; run island there"):
        Domain("web1", libvirt.uri)


def test_without_libvirt_python(island: Island, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    sentence = island.fails(1, "snapshot", "--domain", "web1")
    assert sentence == "--domain needs libvirt-python; pip install it in the same environment"


@pytest.mark.parametrize(
    "given, said",
    [
        (["--domain", "web1", "disk.qcow2"], "leave out IMAGE"),
        (["--domain", "web1", "--qmp", "x", "--no-pin"], "leave out --qmp, --no-pin"),
        (["--domain", "web1", "--format", "raw"], "leave out --format"),
        (["--domain", "web1", "--freeze", "maybe"], "is not one of 'auto', 'require', 'never'"),
        (["disk.qcow2", "--disk", "vda"], "--disk, --freeze and --connect belong to --domain"),
        ([], "missing argument 'IMAGE', or --domain"),
    ],
)
def test_what_does_not_go_together(island: Island, given: list[str], said: str) -> None:
    assert said in island.fails(2, "snapshot", *given)
