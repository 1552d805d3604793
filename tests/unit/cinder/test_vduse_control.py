"""What is said to the kernel to make a VDUSE disk, byte by byte, and who may do what."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from island_fast.cinder.attach import selftest, vduse_control, vduse_devices, vduse_root
from island_fast.cinder.attach.generic_netlink import GenericNetlink
from island_fast.cinder.attach.openers import find_openers, sees_every_process
from island_fast.cinder.attach.vdpa_netlink import VdpaNetlink
from island_fast.cinder.attach.vduse_control import create, destroy, device_name
from island_fast.cinder.attach.vduse_devices import check_vduse_kernel
from island_fast.errors import DamagedError, IslandError

VOLUME = "0b0c9a4e-7c9c-4b55-a6a1-3a0d6a1d5a4e"
BACKING = Path(f"/run/island/{VOLUME}/vduse/0123456789abcdef")
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives rights to others")


# --- what the kernel is sent ---


def test_the_bus_is_asked_as_linux_vdpa_h_says(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, bytes]] = []
    monkeypatch.setattr(GenericNetlink, "__init__", lambda *_: None)
    monkeypatch.setattr(GenericNetlink, "request", lambda _, *words: sent.append(words))
    netlink = VdpaNetlink()
    netlink.add("abc")
    netlink.delete("abc")
    name = struct.pack("=HH", 8, 4) + b"abc\0"
    assert sent == [(3, struct.pack("=HH", 10, 2) + b"vduse\0\0\0" + name), (4, name)]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bytes]]:
    """What /dev/vduse/control would have been asked."""
    asked: list[tuple[int, bytes]] = []

    @contextlib.contextmanager
    def control() -> Iterator[int]:
        yield -1

    monkeypatch.setattr(vduse_control, "_open_control", control)
    monkeypatch.setattr(fcntl, "ioctl", lambda _, number, content: asked.append((number, content)))
    return asked


def test_a_device_is_made_without_a_size_and_is_its_user_s(
    kernel: list[tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    monkeypatch.setattr(vduse_control, "_let_user_open", lambda *words: given.append(words))
    monkeypatch.setattr(os, "chown", lambda *words, **_: given.append(words))
    create("abc", 1234)
    ((number, content),) = kernel
    assert number == 0x41508102  # _IOW(0x81, 2, struct vduse_dev_config)
    assert len(content) == 336 + 60
    assert content[:4] == b"abc\0"
    vendor, kind, features, queues, alignment = struct.unpack_from("=IIQII", content, 256)
    assert (vendor, kind, queues, alignment) == (0, 2, 4, 4096)
    assert struct.unpack_from("=I", content, 332) == (60,)
    wanted = {"flush": 9, "queues": 12, "discard": 13, "zeroes": 14, "version 1": 32, "platform": 33}
    assert all(features >> bit & 1 for bit in wanted.values())
    assert not features >> 5 & 1  # read-only
    config = content[336:]
    assert struct.unpack_from("<Q", config) == (0,)  # sectors: no partition table is looked for
    assert struct.unpack_from("<II", config, 8) == (0, 254)
    assert struct.unpack_from("<I", config, 20) == (512,)
    assert struct.unpack_from("<H", config, 34) == (4,)
    assert struct.unpack_from("<IIIII", config, 36) == (32768, 1, 1, 32768, 1)
    assert given == [(Path("/dev/vduse/control"), 1234), (Path("/dev/vduse/abc"), 1234, -1)]
    destroy("abc")
    assert kernel[1:] == [(0x41008103, b"abc".ljust(256, b"\0"))]  # _IOW(0x81, 3, char[256])


@pytest.mark.parametrize("code, gone", [(errno.EBUSY, False), (errno.EINVAL, True)])
def test_a_device_that_is_served_or_gone_is_not_removed(
    kernel: list[tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch, code: int, gone: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert destroy("abc") is gone


def test_a_name_belongs_to_one_path_alone() -> None:
    others = [
        Path(f"/run/other/{VOLUME}/vduse/0123456789abcdef"),
        Path(f"/run/island/{VOLUME}/vduse/0123456789abcdee"),
        Path(f"/run/island/{VOLUME.replace('0b', '0c')}/vduse/0123456789abcdef"),
    ]
    names = {device_name(path) for path in [BACKING, *others]}
    assert len(names) == 4
    assert device_name(BACKING).startswith(f"island-{VOLUME}-")
    assert max(map(len, names)) < 256


# --- rights ---


@needs_root
def test_a_user_may_open_a_node_and_the_next_one_too(tmp_path: Path) -> None:
    node = tmp_path / "control"
    node.touch(0o600)
    tmp_path.chmod(0o755)

    def may_open(user: int) -> bool:
        words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "test", "-w", str(node)]
        return subprocess.run(words).returncode == 0

    for parent in tmp_path.parents:  # pytest's own are private
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    vduse_control._let_user_open(node, NOBODY)
    assert may_open(NOBODY)
    assert not may_open(NOBODY - 1)
    for _ in range(2):
        vduse_control._let_user_open(node, NOBODY - 1)
    assert may_open(NOBODY)
    assert may_open(NOBODY - 1)
    assert not may_open(NOBODY - 2)
    assert len(os.getxattr(node, "system.posix_acl_access")) == 4 + 8 * 6


def test_who_has_a_device_open_is_found_under_any_name(tmp_path: Path) -> None:
    """A character device stands for a disk: what is compared is the type and the numbers."""
    held = Path("/dev/full")
    with held.open("rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as child:
        (tmp_path / "link").symlink_to(held)
        assert child.pid in find_openers(tmp_path / "link")
        assert os.getpid() not in find_openers(held)
        assert child.pid not in find_openers(Path("/dev/zero"))
        child.kill()


def test_a_namespace_of_processes_is_known_for_one() -> None:
    program = "from island_fast.cinder.attach.openers import sees_every_process as s; print(s())"
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program],
        capture_output=True,
        text=True,
    )
    if done.returncode and "perm" in done.stderr:
        pytest.skip(f"no namespace can be made here: {done.stderr}")
    assert done.stdout == "False\n"
    assert isinstance(sees_every_process(), bool)


# --- the program that root runs ---


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["create"],
        ["create", "{backing}", "4096"],
        ["release", "{backing}", "{backing}"],
        ["release", "/dev/vda"],
        ["release", "island-" + VOLUME],
        ["attach", "{backing}/../../{backing}"],
        ["attach", "run/" + VOLUME + "/vduse/0123456789abcdef"],
        ["attach", "/run/island/" + VOLUME + "/nbd/0123456789abcdef"],
        ["attach", "{backing}0"],
        ["destroy", "{backing}"],
        ["abandon", "{backing}"],
        ["exercise", "{backing}"],
        ["digest", "{backing}"],
        ["bench", "{backing}", "-c", "1", "-d", "1", "-s", "1", "-S", "1"],
    ],
)
def test_root_s_program_takes_nothing_else(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert vduse_root.main([word.format(backing=BACKING) for word in words]) == 2
    assert capsys.readouterr().err.startswith("usage: island-vduse")


def test_root_s_program_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert vduse_root.main(["--help"]) == 0
    assert "The Cinder driver runs this command as root" in capsys.readouterr().out


def test_root_s_program_follows_no_link_and_wants_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[object] = []
    monkeypatch.setattr(vduse_root, "create", lambda *words: made.append(words))
    folder = tmp_path / "run" / VOLUME
    folder.mkdir(parents=True, mode=0o700)
    backing = folder / "vduse" / BACKING.name
    assert vduse_root.main(["create", str(backing)]) == 0
    assert made == [(device_name(backing), os.geteuid())]
    folder.chmod(0o750)
    assert vduse_root.main(["create", str(backing)]) == 1
    assert "not a private folder" in capsys.readouterr().err
    folder.chmod(0o700)
    (tmp_path / "other").symlink_to(tmp_path / "run")
    assert vduse_root.main(["create", str(backing).replace("/run/", "/other/")]) == 1
    assert "symbolic link" in capsys.readouterr().err
    assert len(made) == 1


def test_a_device_that_nobody_serves_is_not_put_on_the_bus_nor_taken_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both would wait for its daemon, for ever."""
    folder = tmp_path / VOLUME
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(vduse_root, "node_of", lambda _: tmp_path / "node")
    monkeypatch.setattr(vduse_root, "find_openers", lambda _: set())
    monkeypatch.setattr(vduse_root, "VdpaNetlink", lambda: pytest.fail("the bus was asked"))
    for verb, on_bus in (("attach", False), ("release", True)):
        monkeypatch.setattr(vduse_root, "is_on_bus", lambda _, on_bus=on_bus: on_bus)
        monkeypatch.setattr(vduse_root, "sees_every_process", lambda: True)
        assert vduse_root.main([verb, str(folder / "vduse" / BACKING.name)]) == 1
        assert "no process serves" in capsys.readouterr().err


def test_it_does_not_remove_where_it_cannot_see_who_has_a_disk_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / VOLUME
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(vduse_root, "sees_every_process", lambda: False)
    assert vduse_root.main(["release", str(folder / "vduse" / BACKING.name)]) == 1
    assert "not the host's PID namespace" in capsys.readouterr().err


# --- which kind is chosen ---


@pytest.mark.parametrize("working", ["vduse", "nbd", "loop", ""])
def test_the_best_kind_that_works_is_chosen_and_refusals_give_their_reasons(
    monkeypatch: pytest.MonkeyPatch, working: str
) -> None:
    tried: list[str] = []

    def check(*words: object) -> None:
        tried.append(str(words[-1]))
        if words[-1] != working:
            raise (DamagedError if words[-1] == "nbd" else IslandError)(f"reason of {words[-1]}")

    monkeypatch.setattr(selftest, "check_data_path", check)
    monkeypatch.setattr(selftest, "_log_speed", lambda *_: None)
    places = Path("run"), Path("links"), Path("images")
    if working:
        assert selftest.choose_kind(*places, lambda *_, **__: None) == working  # type: ignore[arg-type,return-value]
    else:
        reasons = "vduse: reason of vduse; nbd: reason of nbd; loop: reason of loop"
        with pytest.raises(IslandError, match=reasons):
            selftest.choose_kind(*places, lambda *_, **__: None)  # type: ignore[arg-type,return-value]
    order = ["vduse", "nbd", "loop"]
    assert tried == order[: order.index(working or "loop") + 1]


def test_what_the_kernel_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vduse_devices, "_CONTROL", tmp_path / "control")
    monkeypatch.setattr(vduse_devices, "_BUSES", tmp_path)
    monkeypatch.setattr(vduse_devices, "sees_every_process", lambda: False)
    with pytest.raises(IslandError, match="load the module vduse, and give a container the host's /dev"):
        check_vduse_kernel()
    (tmp_path / "control").touch()
    with pytest.raises(IslandError, match="module virtio_vdpa is not loaded"):
        check_vduse_kernel()
    (tmp_path / "vdpa/drivers/virtio_vdpa").mkdir(parents=True)
    with pytest.raises(IslandError, match="module virtio_blk is not loaded"):
        check_vduse_kernel()
    (tmp_path / "virtio/drivers/virtio_blk").mkdir(parents=True)
    with pytest.raises(IslandError, match="PID namespace"):
        check_vduse_kernel()
    monkeypatch.setattr(vduse_devices, "sees_every_process", lambda: True)
    check_vduse_kernel()
