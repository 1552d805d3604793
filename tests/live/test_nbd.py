"""The NBD kind of device: its root program here, and all of it on a kernel with NBD, in a virtual machine.

The machine is emulated and slow, so it starts once and runs every case; the tests look at what it said.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from island_fast.cinder.attach import nbd_devices, nbd_netlink, nbd_root
from island_fast.cinder.attach.daemon import Daemon
from island_fast.cinder.attach.exports import Exports, State
from island_fast.cinder.attach.nbd_devices import check_kernel
from island_fast.errors import IslandError
from island_fast.qemu.nbd_handshake import shake_hands
from island_fast.qemu.programs import run_program
from tests.live import machine
from tests.live.actor import USER
from tests.live.conftest import SIZE, Host
from tests.live.guest import MARK
from tests.live.test_attach import eventually

CASES = [
    "nbd_cases::it_is_right_and_is_chosen nobody",
    "test_attach::test_a_volume_that_a_guest_has_open_is_not_detached",
    "test_attach::test_a_dead_device_that_a_guest_has_open_gives_way_to_a_new_one",
    "nbd_cases::a_mounted_file_system_is_not_detached_and_outlives_growth",
    "nbd_cases::a_volume_that_is_written_to_is_frozen_and_grows",
    "nbd_cases::growth_that_was_cut_off_is_finished",
    "nbd_cases::a_request_that_a_dead_daemon_took_with_it_fails",
    "nbd_cases::another_program_s_device_is_left_alone",
]


@pytest.fixture(scope="module")
def said() -> str:
    """All that the machine's console saw."""
    if reason := machine.missing():
        pytest.fail(reason)  # it was asked for
    console = machine.run(machine.python_job("tests.live.guest", CASES, {"ISLAND_LIVE_KIND": "nbd"}), 800)
    (machine.GUEST / "console").write_text(console)
    return console


@pytest.mark.attached
@pytest.mark.timeout(900)  # for the first of them, which starts the machine
@pytest.mark.parametrize("case", CASES)
def test_on_a_kernel_with_nbd(said: str, case: str) -> None:
    lines = [line.removeprefix(MARK) for line in said.splitlines() if line.startswith(MARK)]
    answers = {answer["test"]: answer["failed"] for answer in map(json.loads, lines)}
    assert case in answers, f"the machine did not get so far: {said[-4000:]}"
    assert not answers[case], answers[case]


# --- without a kernel that has it ---


@pytest.fixture
def served(root_host: Host) -> Daemon:
    """A daemon with its NBD export, and no device."""
    volume, image = root_host.volume()
    Exports(root_host.run, root_host.links, run_program, "nbd").serve(volume, image)
    daemon = Daemon(root_host.run / volume, run_program)
    daemon.export()
    return daemon


def shaken(path: Path, export: str) -> tuple[int, int]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        client = shake_hands(connection, export)
        return client.size, client.flags


def test_the_daemon_offers_the_volume_and_nothing_else(served: Daemon) -> None:
    size, flags = shaken(served.socket, "volume")
    assert size == SIZE
    assert flags & 0b101111 == 0b101101  # writable; flushes, forced unit access and discards
    with pytest.raises(ConnectionError, match=r"refuses: .*not present"):
        shaken(served.socket, "another")
    with pytest.raises(ConnectionError, match="does not speak the newstyle NBD protocol"):
        shaken(served.control, "volume")
    served.unexport()
    assert not served.socket.exists()
    assert served.backing() == served.disk
    with pytest.raises(FileNotFoundError):
        shaken(served.socket, "volume")


def test_each_export_has_a_name_of_its_own(served: Daemon) -> None:
    first = served.backing()
    served.export()
    assert served.backing() == first
    served.unexport()
    served.export()
    assert served.backing().parent == first.parent == served.socket
    assert served.backing() != first


def test_a_volume_that_was_exported_otherwise_stays_as_it_is(root_host: Host) -> None:
    """As after the module was loaded: the kind of new devices is another, and the old ones live on."""
    volume, image = root_host.volume()
    link = root_host.exports.attach(volume, image)
    later = Exports(root_host.run, root_host.links, run_program, "nbd")
    assert later.state(volume) is State.ATTACHED
    before = link.readlink()
    assert later.attach(volume, image).readlink() == before
    later.detach(volume)
    assert later.attach(volume, image).readlink().name.startswith("loop")
    later.grow(volume, 2 * SIZE)
    later.stop(volume)
    assert root_host.devices() == []


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["connect"],
        ["connect", "{backing}"],
        ["connect", "{backing}", "-1"],
        ["connect", "{backing}", "4096", "4096"],
        ["release", "{backing}", "4096"],
        ["release", "/dev/nbd0"],
        ["abandon", "{backing}/../../{backing}"],
        ["destroy", "{backing}"],
        ["exercise", "{backing}"],
        ["bench", "{backing}", "-c", "1", "-d", "1", "-s", "1", "-S", "1"],
    ],
)
def test_root_s_program_takes_nothing_else(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    backing = "/run/island/0b0c9a4e-7c9c-4b55-a6a1-3a0d6a1d5a4e/nbd/0123456789abcdef"
    assert nbd_root.main([word.format(backing=backing) for word in words]) == 2
    assert capsys.readouterr().err.startswith("usage: island-nbd")


def test_root_s_program_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert nbd_root.main(["--help"]) == 0
    assert "The Cinder driver runs this command as root" in capsys.readouterr().out


def test_root_s_program_connects_to_the_folder_s_owner_alone(
    served: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chown(served.folder, USER, USER)
    try:
        assert nbd_root.main(["connect", str(served.backing()), str(SIZE)]) == 1
        assert "another user" in capsys.readouterr().err
    finally:
        os.chown(served.folder, 0, 0)
    (tmp_path / served.folder.name).symlink_to(served.folder)
    other = tmp_path / served.folder.name / "nbd" / served.backing().name
    assert nbd_root.main(["connect", str(other), str(SIZE)]) == 1
    assert "symbolic link" in capsys.readouterr().err
    assert nbd_root.main(["connect", str(served.backing()), str(SIZE + 512)]) == 1
    assert f"has {SIZE} bytes" in capsys.readouterr().err


def test_a_size_is_set_only_over_a_connection_that_answers(
    served: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux 6.9 and later waits for all requests before it sets a size: over a broken one, they fail."""
    done: list[str] = []
    monkeypatch.setattr(nbd_root, "devices_over", lambda _: ["nbd0"])
    monkeypatch.setattr(nbd_root, "NbdNetlink", lambda: Recorder(done))
    monkeypatch.setattr(nbd_root, "_OFFER_EVERY", 0.01)

    def read(_: str, answers: list[str]) -> None:
        assert eventually(lambda: done.count("reconnect") > 2)
        done.append("answered")
        answers.append("")

    monkeypatch.setattr(nbd_root, "_read_first_page", read)
    assert nbd_root.main(["resume", str(served.backing()), str(SIZE)]) == 0
    assert [step for step in done if step != "reconnect"] == ["answered", "set_size", "set_timeouts"]
    assert done[-2:] == ["set_size", "set_timeouts"]


class Recorder:
    """Stands for the kernel's NBD driver, which takes everything."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: self._done.append(name)


def test_a_kernel_without_the_driver_is_named(
    served: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nbd_netlink, "_DRIVER", "none-such")
    assert nbd_root.main(["connect", str(served.backing()), str(SIZE)]) == 1
    assert "module none-such is not loaded, or" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, more",
    [
        ("loop_root", []),
        (
            "vduse_root",
            [
                "island_fast.cinder.attach.openers",
                "island_fast.cinder.attach.generic_netlink",
                "island_fast.cinder.attach.vdpa_netlink",
                "island_fast.cinder.attach.vduse_control",
            ],
        ),
        (
            "nbd_root",
            [
                "island_fast.cinder.attach.generic_netlink",
                "island_fast.qemu",
                "island_fast.qemu.nbd_handshake",
                "island_fast.cinder.attach.nbd_netlink",
            ],
        ),
    ],
)
def test_the_program_that_root_runs_needs_little(module: str, more: list[str]) -> None:
    """It starts for every attach and detach: the standard library, and none of the layers above."""
    program = (
        f"import sys; sys.path.insert(0, {str(machine.ROOT)!r}); import island_fast.cinder.attach.{module};"
        "print([m for m in sys.modules if 'island' in m or 'numpy' in m])"
    )
    done = subprocess.check_output([sys.executable, "-I", "-S", "-c", program], text=True)
    names = [
        "island_fast",
        "island_fast.cinder",
        "island_fast.cinder.attach",
        "island_fast.files",
        "island_fast.cinder.attach.block_device",
        "island_fast.errors",
        "island_fast.cinder.attach.exercise",
        "island_fast.cinder.attach.fuse_export",
        *more,
        f"island_fast.cinder.attach.{module}",
    ]
    assert done.strip() == str(names)


def test_a_kernel_that_does_not_do_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_devices, "_MODULE", tmp_path / "nbd")
    with pytest.raises(IslandError, match="module nbd is not loaded"):
        check_kernel()
    parameters = tmp_path / "nbd/parameters"
    parameters.mkdir(parents=True)
    (parameters / "max_part").write_text("16\n")
    with pytest.raises(IslandError, match="load it with max_part=0"):
        check_kernel()
    (parameters / "max_part").write_text("0\n")
    old = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*old[:2], "5.10.0-30-amd64", *old[3:])))
    with pytest.raises(IslandError, match=r"before 5\.14"):
        check_kernel()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*old[:2], "6.1.0-56-amd64", *old[3:])))
    check_kernel()
