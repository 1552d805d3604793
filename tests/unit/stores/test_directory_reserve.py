"""The reserve of a directory store, on a file system that is full to the last byte, and one with a quota."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from island_fast.errors import StoreError, StoreFullError, StoreRefusedError
from island_fast.stores.directory import DirectoryStore
from island_fast.stores.directory_reserve import RESERVE

ON_A_FULL_DISK = """
import os, subprocess, sys
from island_fast.errors import StoreFullError
from island_fast.stores.directory import DirectoryStore

disk = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], check=True)
DirectoryStore(disk + "/repository", create_ok=True).put("small", [bytes(1000)])
reserve = disk + "/repository/.reserve~"
size = lambda: os.path.getsize(reserve) if os.path.exists(reserve) else 0

def fill():
    with open(disk + "/others", "ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

def put(store, name):
    try:
        store.put(name, [bytes(5000)])
        return "stored"
    except StoreFullError:
        return "full"

print("first", size())
fill()
store = DirectoryStore(disk + "/repository")
print("without", put(store, "vol/record"), store.head("vol/record"), list(store.folders("")))
with store.use_reserve():
    print("with", put(store, "vol/record"))
print("kept", size())
fill()
with store.use_reserve():
    print("again", put(store, "vol/more"))
print("released", store.release_reserve(), store.release_reserve())
print("then", put(DirectoryStore(disk + "/repository"), "vol/last"))
os.truncate(disk + "/others", 0)
print("room", put(DirectoryStore(disk + "/repository"), "vol/room"), size())
print(sorted(info.name for info in store.list("")), os.listdir(disk + "/repository/.tmp~"))
"""


def test_what_frees_room_finds_some_on_a_full_disk(tmp_path: Path):
    inside = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("unshare cannot make a mount namespace here")
    words = [*inside, sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path)]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [
        f"first {1 << 19}",
        "without full None []",
        "with stored",
        f"kept {told[3].split()[1]}",
        "again stored",
        "released True False",
        "then stored",
        f"room stored {1 << 19}",
        "['small', 'vol/last', 'vol/more', 'vol/record', 'vol/room'] []",
    ]
    assert int(told[3].split()[1]) >= 64 << 10


def test_a_quota_counts_like_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """statvfs(3) does not show a quota; here writing a file ends with EDQUOT while there is a reserve."""
    root = tmp_path / "repository"
    store = DirectoryStore(str(root), create_ok=True)
    store.put("one", [b"1"])
    real = os.writev

    def writev(fd: int, buffers: list[memoryview]) -> int:
        if (root / RESERVE).exists() or sum(map(len, buffers)) > 100_000:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(fd, buffers)

    monkeypatch.setattr(os, "writev", writev)
    with pytest.raises(StoreFullError, match="raise the quota"):
        store.put("two", [b"2"])
    with store.use_reserve():
        store.put("two", [b"2"])
    assert store.get("two") == b"2"
    assert 32 << 10 <= (root / RESERVE).stat().st_size <= 100_000, "made again, as large as the quota allows"


def test_only_what_comes_before_the_link_is_certain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = DirectoryStore(str(tmp_path / "repository"), create_ok=True)
    store.put("a/one", [b"1"])

    def after(name: str, code: int, when: bool = True) -> type[StoreError]:
        real = getattr(os, name)

        def broken(*args: object) -> object:
            if when and (name != "fsync" or os.path.isdir(f"/proc/self/fd/{args[0]}")):
                raise OSError(code, os.strerror(code))
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, broken)
            with pytest.raises(StoreError) as caught:
                store.put("a/two", [b"2"])
        return type(caught.value)

    for code in (errno.ENOSPC, errno.EDQUOT):
        assert after("writev", code) is StoreFullError
        assert after("link", code) is StoreFullError
    for code in (errno.EROFS, errno.EACCES):
        assert after("open", code) is StoreRefusedError
        assert after("link", code) is StoreRefusedError
    assert after("writev", errno.EIO) is StoreRefusedError
    for code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        assert after("link", code) is StoreError, "a server may have made the link, or make it yet"
    assert store.head("a/two") is None
    for code in (errno.EIO, errno.ENOSPC, errno.EROFS):
        assert after("fsync", code) is StoreError, "it has its name"
        assert store.head("a/two") is not None
    store.put("a/two", [b"2"])


def test_the_reserve_is_no_object_and_comes_back_when_it_is_lost(tmp_path: Path):
    root = tmp_path / "repository"
    store = DirectoryStore(str(root), create_ok=True)
    assert not store.release_reserve()
    store.put("one", [b"1"])
    assert (root / RESERVE).stat().st_size == 1 << 20
    assert [info.name for info in store.list("")] == ["one"]
    assert list(store.folders("")) == []
    (root / RESERVE).unlink()
    DirectoryStore(str(root)).put("two", [b"2"])
    assert (root / RESERVE).stat().st_size == 1 << 20
