"""Names of objects, and the door to stores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.errors import DamagedObjectError, NotFoundError, UsageError
from island_fast.stores.base import MAX_OBJECT, check_name, check_prefix, check_ranges, check_size, is_name
from island_fast.stores.directory import DirectoryStore
from island_fast.stores.open import open_store

LETTERS = st.characters(codec="ascii", categories=["Lu", "Ll", "Nd"], include_characters="._-")
COMPONENT = st.text(LETTERS, min_size=1, max_size=40).filter(lambda part: part not in (".", ".."))


@given(st.lists(COMPONENT, min_size=1, max_size=8))
def test_components_joined_by_slashes_are_a_name(parts: list[str]):
    name = "/".join(parts)
    assert check_name(name) == name
    assert check_prefix(name + "/") == name + "/"
    assert os.path.normpath(name) == name  # no file system reads anything else into it


@given(st.text(max_size=30))
def test_whatever_is_a_name_stays_below_its_folder(text: str):
    if is_name(text):
        assert os.path.normpath(os.path.join("/root", text)) == "/root/" + text
        assert text.isascii()
    else:
        with pytest.raises(UsageError):
            check_name(text)


@pytest.mark.parametrize(
    "name", ["...", "a..b", ".a", "a.", "-", "a/.../b", "x" * 200, "/".join(["y" * 100] * 5)]
)
def test_odd_names_that_are_allowed(name: str):
    assert is_name(name)


@pytest.mark.parametrize("name", ["x" * 201, "/".join(["y" * 100] * 6), "a\n", "..", "a/..", "../a", "a/./b"])
def test_names_that_are_not(name: str):
    assert not is_name(name)


def test_the_top_is_a_prefix():
    assert check_prefix("") == ""


def test_ranges_are_ascending_and_disjoint():
    check_ranges([])
    check_ranges([(0, 1), (1, 0), (1, 5), (9, 1)])
    for wrong in ([(1, 1), (1, 1)], [(0, 2), (1, 1)], [(-1, 5)], [(3, -1)]):
        with pytest.raises(ValueError):
            check_ranges(wrong)


def test_sizes_out_of_bounds_are_damage():
    assert check_size("a", 5, 5) == 5
    assert check_size("a", MAX_OBJECT) == MAX_OBJECT
    for size, needed in ((4, 5), (MAX_OBJECT + 1, 0)):
        with pytest.raises(DamagedObjectError):
            check_size("a", size, needed)


@pytest.mark.parametrize(
    "url", ["", "s3://bucket/x", "file:///tmp", "swift:box", "swift:/box", "http://host/v1"]
)
def test_what_is_no_store(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="swift://CONTAINER"):
        open_store(url, create_ok=True)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_made_by_the_first_put_and_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match=r"new/place.*mounted"):
        open_store("new/place")
    store = open_store("new/place", create_ok=True)
    assert isinstance(store, DirectoryStore)
    assert store.head("a") is None
    assert list(store.list("")) == []
    store.delete("a")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir("/")  # a relative path means what it meant when it was given
    store.put("a", [b"x"])
    assert (tmp_path / "new/place/a").read_bytes() == b"x"
    assert store.location == "new/place"


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("~/place", create_ok=True).put("a", [b"x"])
    assert (tmp_path / "place/a").exists()


def test_a_file_is_no_store(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(NotFoundError, match="file"):
            open_store(str(tmp_path / path), create_ok=True)


def test_without_swift_nobody_waits_for_its_client():
    code = (
        "import sys, island_fast.stores.open as s; s.open_store('/', create_ok=False);"
        "print([m for m in ('swiftclient', 'keystoneauth1', 'requests', 'openstack') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
