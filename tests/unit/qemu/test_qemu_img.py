from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from island_fast.errors import ImageInUseError, IslandError, NotFoundError, UsageError
from island_fast.qemu.programs import run_program
from island_fast.qemu.qemu_img import QemuImg
from tests.support.daemon import StorageDaemon, create_qcow2, needs_qemu, needs_storage_daemon, qemu_io

SIZE = 16 << 20

HOSTILE_NAMES = [
    "plain.qcow2",
    "nbd:x",
    "file:x",
    "-c",
    'json:{"driver":"null-co"}',
    "comma,driver=raw,,size=1",
    "quote\"back\\slash '%s %p",
    'line\nFailed to get "write" lock\nNo space left on device: snapshot not found',
    "ünïcödé 🏝",
]


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    return create_qcow2(tmp_path / "disk.qcow2", SIZE)


def snapshot_names(path: Path) -> list[str]:
    node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    result = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", "json:" + json.dumps(node)],
        check=True,
        capture_output=True,
    )
    return [snapshot["name"] for snapshot in json.loads(result.stdout).get("snapshots", [])]


def snapshot_create(path: Path | str, name: str, *how: Any, **more: Any) -> None:
    with open(path, "rb") as file:
        QemuImg(file.fileno(), path, *how, **more).snapshot_create(name)


def snapshot_delete(path: Path | str, name: str, *how: Any, **more: Any) -> None:
    with open(path, "rb") as file:
        QemuImg(file.fileno(), path, *how, **more).snapshot_delete(name)


def file_at(path: Path) -> Path:
    path.touch()
    return path


def program(path: Path, *lines: str) -> str:
    """A stand-in for qemu-img at `path`, made of shell lines."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def sentence(caught: pytest.ExceptionInfo[IslandError]) -> str:
    text = str(caught.value)
    assert text.isprintable()
    assert not text.endswith(".")
    return text


@needs_qemu
def test_a_snapshot_is_created_and_deleted(qcow2: Path) -> None:
    qemu_io(qcow2, "write -q -P 1 0 1M")
    snapshot_create(qcow2, "island-a-1")
    qemu_io(qcow2, "write -q -P 2 0 1M")
    snapshot_create(qcow2, "island-a-2")
    assert snapshot_names(qcow2) == ["island-a-1", "island-a-2"]
    size = qcow2.stat().st_size
    snapshot_delete(qcow2, "island-a-1")
    assert snapshot_names(qcow2) == ["island-a-2"]
    qemu_io(qcow2, "write -q -P 3 0 1M")
    assert qcow2.stat().st_size <= size + (64 << 10), "the old clusters were not used again"
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", qcow2], check=True)


@needs_qemu
@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("relative", [False, True])
def test_a_file_name_is_nothing_but_a_file_name(
    qcow2: Path, name: str, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = qcow2.rename(qcow2.with_name(name))
    monkeypatch.chdir(qcow2.parent)
    given = name if relative else str(path)
    snapshot_create(given, "one")
    assert snapshot_names(path) == ["one"]
    snapshot_delete(given, "one")
    assert snapshot_names(path) == []
    assert os.listdir(qcow2.parent) == [name]


@needs_qemu
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_file_name_cannot_choose_the_error(qcow2: Path, name: str) -> None:
    path = qcow2.with_name(name)
    path.write_bytes(b"no image" * 1000)
    with pytest.raises(IslandError) as caught:
        snapshot_create(path, "one")
    assert type(caught.value) is IslandError
    assert sentence(caught).endswith("Image is not in qcow2 format")


@needs_qemu
def test_a_path_is_what_the_caller_said_it_is(qcow2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = qcow2.parent / "deep" / "er"
    folder.mkdir(parents=True)
    (qcow2.parent / "link").symlink_to(folder)
    shutil.move(qcow2, folder.parent / "disk.qcow2")
    monkeypatch.chdir(qcow2.parent)
    snapshot_create("link/../disk.qcow2", "one")  # the kernel's "..", not the text's
    assert snapshot_names(folder.parent / "disk.qcow2") == ["one"]


@needs_qemu
def test_a_backing_file_in_the_header_is_not_opened(tmp_path: Path) -> None:
    backing = create_qcow2(tmp_path / "secret.qcow2", SIZE)
    overlay = create_qcow2(tmp_path / "disk.qcow2", SIZE, backing_file=backing, backing_fmt="qcow2")
    backing.unlink()
    os.mkfifo(backing)  # opening it would hang, or fail
    snapshot_create(overlay, "one", partial(run_program, timeout=20))
    backing.unlink()
    create_qcow2(backing, SIZE)
    assert snapshot_names(overlay) == ["one"]


@needs_qemu
def test_a_missing_snapshot_is_not_found(qcow2: Path) -> None:
    snapshot_create(qcow2, "one")
    for absent in ("two", "1"):  # "1" is the id of "one", and an id is not a name
        with pytest.raises(NotFoundError, match=f"snapshot '{absent}'.*snapshot not found"):
            snapshot_delete(qcow2, absent)
    assert snapshot_names(qcow2) == ["one"]


@needs_storage_daemon
def test_an_image_in_use_is_told_from_other_failures(qcow2: Path) -> None:
    with StorageDaemon(qcow2):
        for change in (snapshot_create, snapshot_delete):
            with pytest.raises(ImageInUseError, match='Failed to get "write" lock') as caught:
                change(qcow2, "one")
            assert "QMP socket" in sentence(caught)
    assert snapshot_names(qcow2) == []


@needs_qemu
def test_a_file_that_may_not_be_written_gives_one_sentence(qcow2: Path) -> None:
    qcow2.chmod(0o444)
    command: list[str] = []
    if os.geteuid() == 0:  # root without the right to override
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    with pytest.raises(IslandError, match="Permission denied") as caught:
        snapshot_create(qcow2, "one", lambda words, **how: run_program([*command, *words], **how))
    sentence(caught)


@needs_qemu
def test_a_full_file_system_gives_one_sentence(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=448k", "island-test", room], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system needs root")
    try:
        image = create_qcow2(room / "disk.qcow2", SIZE)
        qemu_io(image, "write -q 0 64k")
        (room / "rest").write_bytes(bytes(os.statvfs(room).f_bavail * os.statvfs(room).f_bsize))
        with pytest.raises(IslandError, match=r"file system is full.*No space left") as caught:
            snapshot_create(image, "one")
        sentence(caught)
        (room / "rest").unlink()
        assert snapshot_names(image) == []
    finally:
        subprocess.run(["umount", room], check=True)


def test_a_missing_program_names_the_package_and_the_way_out(tmp_path: Path) -> None:
    image = file_at(tmp_path / "disk.qcow2")
    with pytest.raises(IslandError, match=r"missing.*qemu-utils.*--no-pin") as caught:
        snapshot_create(image, "one", program=str(tmp_path / "qemu-img"))
    sentence(caught)


def test_a_program_that_cannot_start_gives_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IslandError, match=r"could not be started.*Permission denied") as caught:
        snapshot_create(file_at(tmp_path / "disk.qcow2"), "one", program=str(tmp_path))
    sentence(caught)


@pytest.mark.parametrize("line", ["kill -SEGV $$", "exit 139"])
def test_a_crash_is_named_by_its_signal(tmp_path: Path, line: str) -> None:
    crasher = program(tmp_path / "crasher", "echo 'snapshot not found' >&2", line)
    with pytest.raises(IslandError, match=r"ended by SIGSEGV.*qemu-img check") as caught:
        snapshot_delete(file_at(tmp_path / "disk.qcow2"), "one", program=crasher)
    assert type(caught.value) is IslandError
    sentence(caught)


def test_what_qemu_says_becomes_one_bounded_line_without_warnings(tmp_path: Path) -> None:
    talker = program(
        tmp_path / "talker",
        r"printf 'qemu-img: warning: old age\nqemu-img: Could not do it: \033[31m\377bad\n' >&2",
        "printf 'qemu-img: Then this: %10000d\\n' 0 >&2",
        "exit 1",
    )
    with pytest.raises(IslandError, match=r"disk': Could not do it: \?\[31m") as caught:
        snapshot_create(file_at(tmp_path / "disk"), "one", program=talker)
    assert "old age" not in sentence(caught)
    assert "; Then this" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_silent_failure_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(IslandError, match="no reason"):
        snapshot_create(file_at(tmp_path / "d"), "one", program=program(tmp_path / "p", "exit 1"))


def test_a_program_that_hangs_is_given_up(tmp_path: Path) -> None:
    sleeper = program(tmp_path / "sleeper", f"echo $$ > {tmp_path}/pid", "exec sleep 60")
    with pytest.raises(IslandError, match=r"did not take internal snapshot .* stopped") as caught:
        snapshot_create(file_at(tmp_path / "disk"), "one", partial(run_program, timeout=0.5), sleeper)
    sentence(caught)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 256, "é" * 128, "\udcff"])
def test_a_name_that_qemu_would_cut_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="internal snapshot's name"):
        snapshot_create(file_at(tmp_path / "disk"), name, _never)


@needs_qemu
def test_a_path_that_is_not_utf_8_is_only_a_path(qcow2: Path) -> None:
    path = qcow2.rename(os.fsdecode(bytes(qcow2.parent) + b"/\xff"))
    snapshot_create(path, "one")
    assert snapshot_names(path.rename(qcow2)) == ["one"]


@needs_qemu
def test_what_a_name_leads_to_by_then_does_not_matter(qcow2: Path) -> None:
    other = create_qcow2(qcow2.with_name("other.qcow2"), SIZE)
    away = qcow2.with_name("away")

    def swap_and_run(command: Sequence[str], **how: Any) -> subprocess.CompletedProcess[str]:
        qcow2.rename(away)
        qcow2.symlink_to(other)
        return run_program(command, **how)

    snapshot_create(qcow2, "one", swap_and_run)
    assert (snapshot_names(away), snapshot_names(other)) == (["one"], [])


@needs_qemu
def test_the_longest_name_is_kept_whole(qcow2: Path) -> None:
    snapshot_create(qcow2, "x" * 255)
    assert snapshot_names(qcow2) == ["x" * 255]


@needs_qemu
def test_a_name_is_no_option(qcow2: Path) -> None:
    snapshot_create(qcow2, "-l")
    assert snapshot_names(qcow2) == ["-l"]


def test_another_runner_gets_the_whole_command(tmp_path: Path) -> None:
    commands: list[Sequence[str]] = []

    def record(command: Sequence[str], /, files: Sequence[int]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (fd,) = files
        given.append(os.fstat(fd))
        assert fd > 2, "none of the program's standard streams"
        assert json.loads(command[-1][5:])["file"]["filename"] == f"/proc/self/fd/{fd}"
        return subprocess.CompletedProcess(command, 0)

    given: list[os.stat_result] = []
    with open(file_at(tmp_path / "disk"), "rb") as file:
        QemuImg(file.fileno(), tmp_path / "disk", record).snapshot_create("one")
        assert os.path.samestat(os.fstat(file.fileno()), given[0])
    ((*words, node),) = commands
    assert words == ["qemu-img", "snapshot", "-q", "-c", "one"]
    said = json.loads(node.removeprefix("json:"))
    assert said["file"]["driver"] == "file"
    assert said["driver"] == "qcow2"
    assert said["backing"] is None


def test_the_program_has_no_input_the_c_locale_and_a_session_of_its_own(tmp_path: Path) -> None:
    script = "import os, sys; print(os.environ['LC_ALL'], os.getsid(0) == os.getpid(), sys.stdin.read())"
    result = run_program([sys.executable, "-c", script])
    assert result.stdout.split() == ["C", "True"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C works, also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_program(tmp_path: Path) -> None:
    slow = program(tmp_path / "slow", "sleep 1", f"touch {tmp_path}/done")

    def press_twice() -> None:
        for _ in range(2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press_twice)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        run_program([slow])
    assert (tmp_path / "done").exists()
    presser.join()


@needs_qemu
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_terminal_leaves_a_whole_snapshot(qcow2: Path) -> None:
    folder = qcow2.parent
    slow = program(folder / "slow", f"touch {folder}/started", "sleep 0.5", 'exec qemu-img "$@"')
    script = (
        "import sys; from island_fast.qemu.qemu_img import QemuImg\n"
        "file = open(sys.argv[2])\n"
        "QemuImg(file.fileno(), sys.argv[2], program=sys.argv[1]).snapshot_create('one')\n"
        "print('not reached')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, slow, qcow2],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not (folder / "started").exists():
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)  # as the terminal does: everyone in the foreground group
    output, complaints = child.communicate()
    assert (child.returncode, output) == (-signal.SIGINT, b"")
    assert complaints.rstrip().endswith(b"KeyboardInterrupt")
    assert snapshot_names(qcow2) == ["one"]


def _never(command: Sequence[str], /, **_: object) -> subprocess.CompletedProcess[str]:
    raise AssertionError(f"{command} was run")
