"""Bad input and bad luck: one sentence, the exit code, nothing half-written, everything else unharmed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import island_fast
from island_fast.api import Repository
from island_fast.cli.run import Run, run_to_exit_code
from island_fast.cli.text import printable
from tests.cli.conftest import MIB, Island, one_sentence, pins
from tests.support import qemu

pytestmark = qemu.needs_qemu

PACKAGE = Path(island_fast.__file__).parent

BAD_IMAGES: dict[str, tuple[int, str]] = {
    "missing": (3, "check the path"),
    "empty": (4, "the file is empty"),
    "cut in the header": (6, "ends inside the header"),
    "cut in the tables": (6, "restore it from a good copy"),
    "text": (4, "not a qcow2 image"),
    "folder": (4, "not a regular file"),
    "pipe": (4, "not a regular file"),
    "below a file": (1, "Not a directory"),
    "with a backing file": (4, "backing file"),
}


def spoilt(kind: str, disk: Path) -> Path:
    """An image that cannot be taken a snapshot of."""
    path = disk.with_name("bad.qcow2")
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "cut in the header":
            path.write_bytes(disk.read_bytes()[:50])
        case "cut in the tables":
            qemu.snapshot_create(disk, "one")
            path.write_bytes(disk.read_bytes()[: 300 << 10])
        case "text":
            path.write_text("no image at all\n" * 1000)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "below a file":
            return disk / "below"
        case "with a backing file":
            qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", path)
    return path


def fingerprint(path: Path) -> str:
    """Of a file's bytes, or of all names and bytes below a folder."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = sorted(one for one in path.rglob("*") if one.is_file())
    return " ".join(f"{one.relative_to(path)}:{fingerprint(one)}" for one in found)


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_an_image_that_is_none(island: Island, disk: Path, kind: str) -> None:
    bad = spoilt(kind, disk)
    before = fingerprint(bad) if bad.is_file() else ""
    code, hint = BAD_IMAGES[kind]
    assert hint in island.fails(code, "snapshot", bad)
    assert not island.repository.exists(), "not even an empty repository is left"
    assert (fingerprint(bad) if bad.is_file() else "") == before


def test_an_image_that_went_bad_later(island: Island, disk: Path, tmp_path: Path) -> None:
    first = island.json("snapshot", disk)["snapshot"]
    truth = qemu.content(disk)
    kept = fingerprint(island.repository)
    os.truncate(disk, 300 << 10)
    island.fails(6, "snapshot", disk)
    assert fingerprint(island.repository) == kept
    island("restore", first, tmp_path / "out", "--format", "raw")
    assert (tmp_path / "out").read_bytes() == truth


def test_a_repository_that_is_none(island: Island, disk: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"mine")
    file.write_bytes(b"mine")
    for where, hint in ((folder, "not an island repository"), (file, "not a directory")):
        before = fingerprint(where)
        for verb in (["snapshot", disk], ["list"], ["delete", "aa"], ["sweep"], ["adopt", "disk"]):
            assert hint in island.fails(3, "-r", where, *verb)
        assert fingerprint(where) == before
    assert "does not exist" in island.fails(3, "-r", tmp_path / "nowhere", "list")
    assert "is not a repository address" in island.fails(2, "-r", "s3://bucket", "list")
    assert not pins(disk)


def test_no_repository_at_all(island: Island, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISLAND_REPOSITORY")
    assert "no repository is named" in island.fails(2, "list")
    monkeypatch.setenv("ISLAND_REPOSITORY", "")
    assert "no repository is named" in island.fails(2, "list"), "an empty variable is none"
    assert "-r names no repository" in island.fails(2, "-r", "", "snapshot", "disk.qcow2")


def test_damaged_objects(island: Island, disk: Path, tmp_path: Path) -> None:
    island("snapshot", disk)
    (pack,) = (island.repository / "disk/packs").rglob("0-*")
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    island.fails(6, "restore", "disk@latest", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.qcow2", "repository", "state"]
    (island.repository / "repository").write_bytes(b"\0" * 100)
    island.fails(6, "list")


def test_a_snapshot_that_is_not_there(island: Island, disk: Path, tmp_path: Path) -> None:
    taken = island.json("snapshot", disk)["snapshot"]
    other = "0" if taken[0] != "0" else "1"
    for name in (other, "disk@" + other, "latest", "disk@", taken + "0", "disk@../repository"):
        for verb in (["show", name], ["restore", name, tmp_path / "out"], ["delete", name]):
            assert "see 'island list'" in island.fails(3, *verb)
    for verb in (["show", "disk"], ["restore", "disk", tmp_path / "out"], ["delete", "disk"]):
        assert island.fails(3, *verb) == "disk is a volume; write disk@latest or disk@ID"
    assert "other has no snapshots" in island.fails(3, "show", "other@latest")
    assert "other has no snapshots" in island.fails(3, "list", "--volume", "other")
    assert "other has no snapshots" in island.fails(3, "adopt", "other")
    island.fails(3, "delete", taken, other)
    assert island.text("list", "-q").split() == [taken], "all are found before the first is deleted"
    assert not (tmp_path / "out").exists()


def test_an_image_that_may_not_be_read(island: Island, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as place:  # which anybody can enter, unlike tmp_path
        folder = Path(place)
        folder.chmod(0o755)
        image = qemu.create(folder / "disk.qcow2", MIB)
        monkeypatch.setenv("XDG_CONFIG_HOME", place)
        island.text("map", image)  # imports what another user may not be able to
        image.chmod(0)
        user, access = os.geteuid(), os.access
        monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode, effective_ids=True))
        os.seteuid(user or 65534)
        try:
            told = island.fails(1, "map", image)
        finally:
            os.seteuid(user)
        assert told == f"permission denied at '{image}'; run as a user who may read it"


def test_an_ambiguous_beginning(island: Island, disk: Path) -> None:
    seen: set[str] = set()
    while (first := island.json("snapshot", disk)["snapshot"][0]) not in seen:
        seen.add(first)
    assert "give more of the id" in island.fails(2, "show", first)
    assert "give more of the id" in island.fails(2, "delete", f"disk@{first}")


@pytest.mark.parametrize("what", ["file", "folder", "link", "nowhere", "."])
def test_a_target_that_will_not_do(island: Island, disk: Path, tmp_path: Path, what: str) -> None:
    island("snapshot", disk)
    target = tmp_path / "target"
    if what == "file":
        target.write_bytes(b"precious")
    elif what == "folder":
        target.mkdir()
    elif what == "link":
        target.symlink_to("dangling")
    elif what == "nowhere":
        target = tmp_path / "nowhere/target"
    else:
        target = Path(".")
    before = sorted(tmp_path.iterdir())
    sentence = island.fails(3 if what == "nowhere" else 4, "restore", "disk@latest", target)
    assert ("already exists" in sentence) == (what != "nowhere")
    assert sorted(tmp_path.iterdir()) == before
    assert what != "file" or target.read_bytes() == b"precious"


def test_a_name_that_another_image_has(island: Island, disk: Path, tmp_path: Path) -> None:
    first = island.json("snapshot", disk)["snapshot"]
    other = tmp_path / "other/disk.qcow2"
    other.parent.mkdir()
    qemu.create(other, 8 * MIB)
    sentence = island.fails(4, "snapshot", other)
    assert "--volume" in sentence
    assert "island adopt disk" in sentence
    assert not pins(other)
    assert island.json("snapshot", other, "--volume", "other")["parent"] is None
    assert island.text("list", "-q", "--volume", "disk").split() == [first]


def test_usage(island: Island, disk: Path) -> None:
    for words, hint in {
        ("frob",): "no such command 'frob'; see 'island --help'",
        ("lst",): "no such command 'lst'; did you mean 'list'? See 'island list --help'",
        ("ls",): "no such command 'ls'; 'island list' lists snapshots",
        ("forget",): "no such command 'forget'; 'island retain' deletes the snapshots that no rule keeps",
        ("mount",): "no such command 'mount'; 'island restore' writes a snapshot to a file",
        ("help",): "no such command 'help'; run 'island --help'",
        ("snapshot", "--lable", "x"): "no such option '--lable'; did you mean '--label'? See 'island snap",
        ("retain", "--keep-last", "-1"): "must be at least 0, not -1; see 'island retain --help'",
        (
            "completion",
        ): "missing argument '{bash|zsh|fish}'. Choose from: bash, zsh, fish; see 'island compl",
        ("retain", "--keep-last", "x"): "'x' is not a whole number; see 'island retain --help'",
        ("snapshot",): "missing argument 'IMAGE', or --domain for a running libvirt guest; see 'island snap",
        ("snapshot", str(disk), "--frob"): "no such option",
        ("snapshot", str(disk), "extra"): "unexpected extra argument",
        ("snapshot", str(disk), "--volume", "a/b"): "cannot name a volume",
        ("snapshot", str(disk), "--volume", "repository"): "cannot name a volume",
        ("snapshot", str(disk), "--no-pin", "--qmp", "socket"): "leave out --no-pin",
        ("restore", "disk@latest", "out", "--format", "vmdk"): "'vmdk' is not one of",
        ("restore", "disk@latest"): "with --onto",
        ("restore", "disk@latest", "out", "--onto", "disk"): "with --onto",
        ("restore", "disk@latest", "out", "--dry-run"): "--dry-run goes with --onto",
        ("restore", "disk@latest", "--onto", "disk", "--no-pin"): "leave out --no-pin",
        ("sweep", "--grace", "5"): "not a valid time span",
        ("sweep", "--limit-upload", "10"): "not a valid rate; write one number",
        ("copy", "--limit-download", "0K"): "not a valid rate; write one number",
        ("sweep", "--grace", "-1s"): "not a valid time span",
        ("sweep", "--grace", ""): "not a valid time span",
        ("list", "--volume"): "requires an argument",
        ("list", "-r", ""): "-r names no repository",
        ("--repository", "", "list"): "-r names no repository",
        ("snapshot", ""): "name a file",
        ("snapshot", str(disk), "--qmp", ""): "name a file",
        ("restore", "disk@latest", ""): "name a file",
        ("restore", "disk@latest", "--onto", ""): "name a file",
        ("info", ""): "name a file",
        ("delete",): "missing argument",
    }.items():
        assert hint in island.fails(2, *words), words
    assert not island.repository.exists()
    assert island("snapshot", disk, "--label", "--json").code == 0, "an option's value is no option"


def test_at_a_snapshot_that_is_not_in_the_image(island: Island, disk: Path) -> None:
    assert "no internal snapshot 'monday'" in island.fails(3, "snapshot", disk, "--at", "monday")
    assert not island.repository.exists()


def test_without_qemu_img(island: Island, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    sentence = island.fails(1, "snapshot", disk)
    assert "qemu-utils" in sentence
    assert "--no-pin" in sentence
    assert island.json("snapshot", disk, "--no-pin")["blocks_changed"] == 48


def test_local_state_that_cannot_be_used(island: Island, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISLAND_STATE", str(disk))
    assert "set ISLAND_STATE" in island.fails(1, "snapshot", disk)
    assert not pins(disk)


# Full disks: real ones.

SmallDisk = Callable[[str, int], Path]


def fill(place: Path) -> None:
    """Leave not a byte free."""
    with open(place / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def test_advice_about_targets_can_be_followed(island: Island, disk: Path, tmp_path: Path) -> None:
    island("snapshot", disk)
    top = tmp_path / "top.qcow2"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", top)
    sentence = island.fails(4, "restore", "disk@latest", "--onto", top)
    assert "has a backing file" in sentence
    assert "--backing" not in sentence, "restore has no such option"
    for place in ("/dev/no-such-disk", "/dev/../dev/no-such-disk"):
        assert "no such device" in island.fails(4, "restore", "disk@latest", place, "--format", "raw")
        assert not os.path.lexists("/dev/no-such-disk")


def test_a_device_is_no_file_to_remove(island: Island, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    island("snapshot", disk)
    monkeypatch.setattr(Path, "is_block_device", lambda self: self.name == "sdz")
    sentence = island.fails(4, "restore", "disk@latest", "/dev/sdz", "--format", "raw")
    assert "--onto /dev/sdz" in sentence
    assert "remove" not in sentence


def test_a_user_without_a_home(island: Island, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: neither HOME nor an account, and a folder called ~ where it is run."""

    def nobody(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "ISLAND_STATE", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "ISLAND_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    folder = disk.parent / "here"
    (folder / "~/.config/island").mkdir(parents=True)
    (folder / "~/.config/island/config.toml").write_text('repository = "/nowhere/at/all"')
    monkeypatch.chdir(folder)
    assert "set ISLAND_STATE" in island.fails(2, "snapshot", disk)
    assert "no home directory" in island.fails(3, "-r", "~/repository", "list")
    monkeypatch.setenv("ISLAND_STATE", str(disk.parent / "state"))
    monkeypatch.delenv("ISLAND_REPOSITORY")
    assert "no repository is named" in island.fails(2, "list")


def test_a_full_repository(island: Island, disk: Path, tmp_path: Path, small_disk: SmallDisk) -> None:
    place = small_disk("small", 4 * MIB)
    first = island.json("-r", place, "snapshot", disk)["snapshot"]
    truth = qemu.content(disk)
    qemu.noise(disk, 8 * MIB, 2 * MIB)
    before = pins(disk)
    assert "no space is left" in island.fails(5, "-r", place, "snapshot", disk)
    qemu.check(disk)
    assert pins(disk) == before
    assert island.text("-r", place, "list", "-q").split() == [first]
    island("-r", place, "restore", first, tmp_path / "out", "--format", "raw")
    assert (tmp_path / "out").read_bytes() == truth
    small_disk("small", 16 * MIB)
    again = island.json("-r", place, "snapshot", disk)
    assert (again["rule"], again["parent"], again["blocks_changed"]) == ("table-diff", first, 32)


def test_a_full_repository_can_be_freed(
    island: Island, disk: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    """To the last byte, by what others have there, too."""
    place = small_disk("small", 24 * MIB)
    repository = place / "repository"
    taken = [island.json("-r", repository, "snapshot", disk)["snapshot"]]
    for seed in (2, 3):
        qemu.noise(disk, MIB, 3 * MIB, seed)
        taken.append(island.json("-r", repository, "snapshot", disk)["snapshot"])
    fill(place)
    done = island("-r", repository, "delete", taken[0])
    assert (done.code, done.out) == (5, "")
    assert "run the command again at once" in done.err
    assert island.text("-r", repository, "list", "-q").split() == taken, "a refusal is an outcome"
    island.text("-r", repository, "restore", "disk@latest", tmp_path / "out", "-q")
    assert island.json("-r", repository, "delete", taken[0])[0]["snapshot"] == taken[0]
    fill(place)
    assert island.json("-r", repository, "retain", "--keep-last", "1")[0]["deleted"] == 1
    assert island.text("-r", repository, "list", "-q").split() == taken[2:]
    assert island.json("-r", repository, "sweep")[0]["bytes_freed"] > 5 * MIB
    qemu.noise(disk, MIB, 3 * MIB, 4)
    island.json("-r", repository, "snapshot", disk)
    assert (repository / ".reserve~").stat().st_size == MIB


def test_a_repository_that_became_read_only(
    island: Island, disk: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    place = small_disk("small", 24 * MIB)
    repository = place / "repository"
    taken = [island.json("-r", repository, "snapshot", disk)["snapshot"] for _ in range(2)]
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    for verb in (["delete", "disk@latest"], ["retain", "--keep-last", "1"]):
        assert "read-only" in island.fails(5, "-r", repository, *verb)
    assert island.text("-r", repository, "list", "-q").split() == taken
    island.text("-r", repository, "restore", "disk@latest", tmp_path / "out", "-q")
    island.text("-r", repository, "verify", "--all", "-q")
    subprocess.run(["mount", "-o", "remount,rw", place], check=True)
    assert island.text("-r", repository, "list", "-q").split() == taken


def test_a_full_target(island: Island, disk: Path, small_disk: SmallDisk) -> None:
    island("snapshot", disk)
    place = small_disk("small", 2 * MIB)
    for image_format in ("qcow2", "raw"):
        sentence = island.fails(1, "restore", "disk@latest", place / "out", "--format", image_format)
        assert "No space left on device" in sentence
        assert list(place.iterdir()) == []


def test_full_local_state(
    island: Island, disk: Path, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = small_disk("small", 64 << 10)
    monkeypatch.setenv("ISLAND_STATE", str(place / "state"))
    fill(place)
    assert "No space left on device" in island.fails(1, "snapshot", disk)
    qemu.check(disk)
    assert not pins(disk)


def test_a_full_disk_under_the_image(island: Island, tmp_path: Path, small_disk: SmallDisk) -> None:
    place = small_disk("small", 3 * MIB)
    disk = qemu.create(place / "disk.qcow2", 64 * MIB)
    qemu.noise(disk, MIB, MIB)
    fill(place)
    assert "file system is full" in island.fails(1, "snapshot", disk)
    qemu.check(disk)
    assert not pins(disk)
    (place / "filler").unlink()
    assert island.json("snapshot", disk)["blocks_changed"] == 16


# What nobody foresaw.


@pytest.mark.parametrize(
    "error, name, hint",
    [
        (
            OSError(5, "Input/output error", "/dev/sda"),
            "system",
            "/dev/sda: Input/output error; check that disk",
        ),
        (
            PermissionError(13, "Permission denied", b"/x\xff"),
            "system",
            "/x\udcff: Permission denied; run it as",
        ),
        (OSError("strange"), "system", "strange; mend that"),
        (MemoryError(), "memory", "not enough memory"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "no"), "text", "is not UTF-8"),
        (
            KeyError("x\ny"),
            "unexpected",
            "unexpected KeyError ('x\\ny'), a fault of this program; run it again",
        ),
    ],
)
def test_the_unforeseen(
    island: Island, monkeypatch: pytest.MonkeyPatch, error: Exception, name: str, hint: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Repository, "open", fail)
    assert printable(hint) in island.fails(1, "list")
    assert json.loads(island("list", "--json").out)["error"] == name
    monkeypatch.setenv("ISLAND_DEBUG", "1")
    shown = island("list").err
    assert "Traceback" in shown
    assert one_sentence(shown.splitlines(keepends=True)[-1])


def test_error_names_are_those_of_the_errors(island: Island, disk: Path) -> None:
    def name(*words: object) -> str:
        return str(json.loads(island(*words, "--json").out)["error"])

    assert name("snapshot", "nowhere") == "not-found"
    assert name("snapshot", disk.parent) == "refused"
    assert name("snapshot") == name("snapshot", disk, "--volume", "a/b") == "usage"
    assert name("-r", "swift://box/x", "list") == "store"
    disk.write_bytes(b"")
    assert name("snapshot", disk) == "unsupported-image"
    disk.write_bytes(b"QFI\xfb")
    assert name("snapshot", disk) == "damaged-image"


def test_an_image_that_may_not_be_written(
    island: Island, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write to all
    told = island.fails(1, "snapshot", disk)
    assert told == f"{disk} cannot be written, so it cannot hold a pin; run as its owner, or give --no-pin"
    assert pins(disk) == []
    island.json("snapshot", disk, "--no-pin")


def test_a_directory_that_may_not_be_written(
    island: Island, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = island.repository.parent / "ro"
    folder.mkdir()
    make = os.mkdir

    def mkdir(path: str, mode: int = 0o777) -> None:
        if os.path.dirname(path) == str(folder):
            raise PermissionError(13, "Permission denied", path)
        make(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    for place in (folder, folder / "new"):
        told = island.fails(5, "-r", place, "snapshot", disk)
        assert told == f"{folder} cannot be written; use -r to name a directory that you can write to"


def test_a_target_in_no_folder(island: Island, disk: Path, tmp_path: Path) -> None:
    island.json("snapshot", disk)
    told = island.fails(3, "restore", "disk@latest", tmp_path / "nodir/x.qcow2")
    assert told.endswith(f"there is no folder {tmp_path / 'nodir'}; create it or name another target")


def test_a_copy_to_nowhere(island: Island, disk: Path) -> None:
    island.json("snapshot", disk)
    assert "--to names no repository" in island.fails(2, "copy", "--all", "--to", "")


@pytest.mark.parametrize(
    "value", ["hunter2secret", "hunter2secret\nsecond line"], ids=["plain", "with a break"]
)
def test_a_traceback_that_is_asked_for_shows_no_credentials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    """Libraries quote what they were given, as it is or as Python writes it; URLs hold passwords too."""
    monkeypatch.setenv("ISLAND_DEBUG", "1")
    for name in ("OS_PASSWORD", "ISLAND_TO_ST_KEY"):
        monkeypatch.setenv(name, value)
        capsys.readouterr()

        def fail(_: Run) -> None:
            raise ValueError(
                f"Invalid header {value.encode()!r} for {value}, http://u:{'p4ss' + 'w0rd'}@swift/"
            )

        run_to_exit_code(fail)
        said = capsys.readouterr().err
        assert "Traceback" in said
        assert "hunter2secret" not in said
        assert "p4ssw0rd" not in said
        monkeypatch.delenv(name)


@pytest.mark.parametrize("words", [["--version"], ["list"]])
def test_source_without_its_compiled_module(words: list[str], island: Island, tmp_path: Path) -> None:
    """As in the clone after `pip install .`, whose module is in another place: the source hides it."""
    clone = tmp_path / "my clone"
    for path in PACKAGE.rglob("*.py"):
        copied = clone / path.relative_to(PACKAGE.parent)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    command = [sys.executable, "-S", "-m", "island_fast", *words]  # without site, no editable installation
    places = os.pathsep.join([str(clone), *(path for path in sys.path if path.endswith("-packages"))])
    environment = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    sentence = one_sentence(done.stderr)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{clone}/island_fast is source without a compiled module for Python " in sentence
    assert f"in another folder, or build the module with pip install -e '{clone}'" in sentence
