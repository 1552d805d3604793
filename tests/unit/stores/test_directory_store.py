"""What only a directory does: files, folders, links, permissions, full and vanished disks."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from island_fast import files
from island_fast.errors import (
    ConflictError,
    DamagedObjectError,
    NotFoundError,
    ObjectMissingError,
    RefusedError,
    StoreError,
)
from island_fast.stores.directory import DirectoryStore
from island_fast.stores.directory_reserve import RESERVE

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def store(root: Path) -> DirectoryStore:
    return DirectoryStore(str(root), create_ok=True)


def files_below(folder: Path) -> list[str]:
    """Names of all files but the reserve, which comes with the first put."""
    files = (path for path in folder.rglob("*") if not path.is_dir() and path.name != RESERVE)
    return sorted(str(path.relative_to(folder)) for path in files)


@contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom permissions bind. Root is not bound by any."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_object_is_one_private_file(store: DirectoryStore, root: Path):
    before = os.umask(0)
    try:
        store.put("vol/packs/1", [b"a", b"b"])
    finally:
        os.umask(before)
    assert (root / "vol/packs/1").read_bytes() == b"ab"
    assert files_below(root) == ["vol/packs/1"]
    for path in (root, root / "vol", root / "vol/packs", root / ".tmp~"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "vol/packs/1").stat().st_mode) == 0o600


def test_everything_is_flushed_before_put_returns(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
):
    """By name, in order: content, then the folders that are new, then the folder with the name."""
    flushed: list[str] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        flushed.append(os.path.relpath(path, root.parent) if os.path.isdir(path) else "content")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    store.put("a/b/one", [b"1"])
    assert flushed[:3] == [".", "repository", "content"], "the last is the reserve"
    assert flushed[3:] == ["content", "repository", "repository/a", "repository/a/b"]
    flushed.clear()
    store.put("a/b/two", [b"2"])
    assert flushed == ["content", "repository/a/b"]
    flushed.clear()
    store.put("a/b/two", [b"2"])  # whoever put it first may have died before flushing the folder
    assert flushed[-1] == "repository/a/b"


def test_another_process_relies_on_no_flush_of_ours(store: DirectoryStore, root: Path, monkeypatch):
    (root / "a").mkdir(parents=True)
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")))
    DirectoryStore(str(root)).put("a/one", [b"1"])
    assert str(root) in flushed


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_a_rename_refuses_to_overwrite(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def refuse(*_args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    store.put("a/one", [b"1"])
    store.put("a/one", [b"1"])
    with pytest.raises(ConflictError):
        store.put("a/one", [b"2"])
    assert files_below(root) == ["a/one"]
    assert store.get("a/one") == b"1"


def test_with_neither_of_them_it_says_so(store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args: object) -> None:
        raise OSError(errno.EPERM, "no links")

    class NoRename:
        """A C library without renameat2."""

        def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(files.ctypes, "CDLL", NoRename)
    with pytest.raises(StoreError, match="neither hard links nor a rename"):
        store.put("one", [b"1"])
    assert files_below(root) == []


def test_short_writes_are_continued(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch):
    writev = os.writev
    calls = 0

    def some(fd: int, buffers: list[memoryview]) -> int:
        """Takes 3 bytes, or one buffer and 4 bytes of the next, by turns."""
        nonlocal calls
        calls += 1
        assert all(buffer.nbytes for buffer in buffers)
        few = [buffers[0][:3]] if calls % 2 else [buffers[0], *(b[:4] for b in buffers[1:2])]
        return writev(fd, few)

    monkeypatch.setattr(os, "writev", some)
    store.put("one", [b"12345678", b"9", b"abcdefg", b"h"])
    assert calls > 2
    assert store.get("one") == b"123456789abcdefgh"


def test_old_leftovers_are_cleaned_at_the_first_put_and_young_ones_stay(store: DirectoryStore, root: Path):
    store.put("one", [b"1"])
    for name, age in (("1-dead", 90_000), ("2-alive", 3600)):
        path = root / ".tmp~" / name
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    again = DirectoryStore(str(root))
    assert [info.name for info in again.list("")] == ["one"]
    assert list(again.folders("")) == []
    again.put("two", [b"2"])
    assert files_below(root) == [".tmp~/2-alive", "one", "two"]


def test_a_put_that_dies_leaves_nothing_under_the_name(root: Path):
    code = (
        "import os, sys; from island_fast.stores.directory import DirectoryStore;"
        "os.fsync = lambda fd: os.kill(os.getpid(), 9);"
        f"DirectoryStore({str(root)!r}, create_ok=True).put('a/one', [b'1'])"
    )
    root.mkdir()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    store = DirectoryStore(str(root))
    assert store.head("a/one") is None
    store.put("a/one", [b"another"])
    assert store.get("a/one") == b"another"


def test_an_error_in_mid_write_leaves_no_file(store: DirectoryStore, root: Path):
    store.put("zero", [b"0"])

    class Interrupted(BaseException):
        """As a signal's handler raises it."""

    def interrupt(_fd: int) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(Interrupted):
            store.put("one", [b"1"])
    assert files_below(root) == ["zero"]


def test_names_that_the_store_does_not_give_are_passed_over(store: DirectoryStore, root: Path):
    store.put("one", [b"1"])
    (root / "lost+found").mkdir(mode=0)
    (root / "holiday photo.jpg").write_bytes(b"x")
    os.mkfifo(root / "pipe")
    os.symlink("one", root / "same")
    os.symlink("nowhere", root / "broken")
    os.symlink("round", root / "round")
    assert [info.name for info in store.list("")] == ["one"]
    assert list(store.folders("")) == []


def test_a_folder_that_was_moved_away_and_left_a_link_is_not_passed_over(
    store: DirectoryStore, root: Path, tmp_path: Path
):
    """Whoever lists, verifies or copies everything must not leave a volume out in silence."""
    store.put("vol/one", [b"1"])
    (root / "vol").rename(tmp_path / "elsewhere")
    (root / "vol").symlink_to(tmp_path / "elsewhere")
    assert list(store.folders("")) == ["vol"]
    assert [info.name for info in store.list("vol/")] == ["vol/one"]
    assert store.get("vol/one") == b"1"


def test_links_and_pipes_in_place_of_an_object_are_refused(store: DirectoryStore, root: Path):
    store.put("one", [b"1"])
    os.symlink("/etc/passwd", root / "link")
    os.mkfifo(root / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(RefusedError, match=name):
            store.get(name)
        with pytest.raises(RefusedError, match=name):
            store.get_ranges(name, [(0, 1)])
        assert store.head(name) is None
        with pytest.raises(RefusedError):
            store.put(name, [b"mine"])
    assert not stat.S_ISLNK((root / "one").lstat().st_mode)


def test_a_link_in_place_of_a_folder_is_not_written_through(
    store: DirectoryStore, root: Path, tmp_path: Path
):
    store.put("one", [b"1"])
    (tmp_path / "outside").mkdir()
    os.symlink(tmp_path / "outside", root / "vol")
    with pytest.raises(RefusedError, match="vol"):
        store.put("vol/one", [b"1"])
    with pytest.raises(RefusedError, match="one"):
        store.put("one/below", [b"1"])
    assert files_below(tmp_path / "outside") == []
    assert files_below(root) == ["one"]


def test_an_age_counts_from_the_later_of_writing_and_naming(store: DirectoryStore, root: Path):
    store.put("one", [b"1"])
    os.utime(root / "one", (1.0, 1.0))  # as a copy that keeps times has it
    info = store.head("one")
    assert info is not None
    assert info.age < 60
    os.utime(root / "one", (time.time() + 1000,) * 2)
    assert next(store.list("")).age == 0.0


def test_a_directory_that_vanished_holds_no_missing_objects(store: DirectoryStore, root: Path):
    """Else an unmounted disk would look like a repository from which everything was deleted."""
    store.put("a/one", [b"1"])
    root.rename(root.parent / "elsewhere")
    for make in (lambda: None, root.mkdir):
        make()
        for call in (
            lambda: store.head("a/one"),
            lambda: store.get("a/one"),
            lambda: store.delete("a/one"),
            lambda: list(store.list("a/")),
            lambda: list(store.folders("b/")),
            lambda: store.put("a/two", [b"2"]),
            lambda: store.put("b/one", [b"1"]),
        ):
            with pytest.raises(StoreError, match="mounted"):
                call()
    assert files_below(root) == []
    shutil.rmtree(root)
    (root.parent / "elsewhere").rename(root)
    assert store.get("a/one") == b"1"


def test_permissions(tmp_path: Path):
    home = tmp_path / "open"
    home.mkdir()
    made_by_pytest = [one for one in tmp_path.parents if "pytest" in str(one)]
    for folder in (home, tmp_path, *made_by_pytest):
        folder.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(home, NOBODY, NOBODY)
    with without_privileges():
        store = DirectoryStore(str(home))
        store.put("vol/one", [b"1"])
        (home / "vol").chmod(0o500)
        with pytest.raises(StoreError, match=r"permission denied at .*owner"):
            store.put("vol/two", [b"2"])
        with pytest.raises(StoreError, match="permission denied"):
            store.delete("vol/one")
        (home / "vol").chmod(0)
        for call in (
            lambda: store.get("vol/one"),
            lambda: store.head("vol/one"),
            lambda: list(store.list("vol/")),
            lambda: list(store.folders("vol/")),
        ):
            with pytest.raises(StoreError, match="permission denied"):
                call()
        (home / "vol").chmod(0o700)
        (home / "vol/one").chmod(0)
        with pytest.raises(StoreError, match="permission denied"):
            store.get("vol/one")
        assert files_below(home) == ["vol/one"]


IN_A_SMALL_DISK = """
import os, subprocess, sys
from island_fast.errors import StoreError
from island_fast.stores.directory import DirectoryStore

disk = sys.argv[1]
run = lambda *words: subprocess.run(words, check=True)
run("mount", "-t", "tmpfs", "-o", "size=1m", "none", disk)
store = DirectoryStore(disk + "/repository", create_ok=True)
store.put("small", [bytes(1000)])
try:
    store.put("new/large", [bytes(4 << 20)])
except StoreError as error:
    print(error)
print(sorted(i.name for i in store.list("")), list(store.folders("")), os.listdir(disk + "/repository/.tmp~"))
store.put("new/fits", [bytes(1000)])
run("mount", "-o", "remount,ro", disk)
for call in (lambda: store.put("other", [b"x"]), lambda: store.delete("small")):
    try:
        call()
    except StoreError as error:
        print(error)
print(len(store.get("small")))
"""


def test_a_full_and_a_read_only_disk(tmp_path: Path):
    inside = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("unshare cannot make a mount namespace here")
    words = [*inside, sys.executable, "-c", IN_A_SMALL_DISK, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    full, left, *read_only, size = done.stdout.splitlines()
    assert "no space is left" in full
    assert left == "['small'] [] []"
    assert len(read_only) == 2
    assert all("read-only" in line for line in read_only)
    assert size == "1000"


def test_reading_in_pieces(store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch):
    """One pread(2) returns 2 GiB at most; here 3 bytes."""
    store.put("one", [b"0123456789"])
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 3), at))
    assert store.get("one") == b"0123456789"
    assert store.get_ranges("one", [(1, 8)]) == [b"12345678"]


def test_an_object_of_impossible_size_is_not_read(store: DirectoryStore, root: Path):
    store.put("one", [b"1"])
    os.truncate(root / "one", 1 << 42)
    with pytest.raises(DamagedObjectError, match="more than the 1073741824 that it can have"):
        store.get("one")
    os.truncate(root / "one", 10)
    with pytest.raises(DamagedObjectError, match="has 10 bytes, more than the 9 that"):
        store.get("one", limit=9)
    assert len(store.get("one", limit=10)) == 10


def test_errors_are_of_the_tree(store: DirectoryStore):
    assert issubclass(ObjectMissingError, NotFoundError)
    with pytest.raises(ObjectMissingError, match="deleted or never written"):
        store.get("none")
