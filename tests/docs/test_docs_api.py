"""What docs/api.md shows is what happens, on a real image in a directory of its own."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

from island_fast import Keep, Repository
from island_fast.errors import UsageError
from island_fast.repository.local_state import LocalState
from tests.support import qemu

PAGE = Path(__file__).resolve().parents[2] / "docs/api.md"
MIB = 1 << 20


def session() -> str:
    """The examples of the page, each line where it stands there."""
    page = PAGE.read_text()
    kept = {
        n for block in re.finditer(r"^```python\n(.*?)^```$", page, re.M | re.S) for n in _lines(page, block)
    }
    return "\n".join(line if n in kept else "" for n, line in enumerate(page.splitlines()))


def _lines(page: str, block: re.Match[str]) -> range:
    first = page.count("\n", 0, block.start(1))
    return range(first, first + block[1].count("\n"))


@qemu.needs_qemu
def test_the_examples_of_the_api_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISLAND_STATE", str(tmp_path / "state"))
    image = qemu.create("web1.qcow2", 1024 * MIB, lazy_refcounts="on")
    qemu.noise(image, 0, 4 * MIB)
    test = doctest.DocTestParser().get_doctest(session(), {"__name__": "__main__"}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 60
    shown: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert not runner.run(test, out=shown.append, clear_globs=True).failed, "".join(shown)


@qemu.needs_qemu
def test_calls_that_the_command_would_not_let_through_are_refused(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", MIB)
    with Repository.open(tmp_path / "repository", state=LocalState(tmp_path / "state"), create=True) as ours:
        with pytest.raises(UsageError, match="vmdk"):
            ours.snapshot(image, image_format="vmdk")
        assert not (tmp_path / "repository").exists()
        taken = ours.snapshot(image)
        with pytest.raises(UsageError, match="vmdk"):
            ours.restore(taken.snapshot, tmp_path / "out", image_format="vmdk")
        with pytest.raises(UsageError, match="share"):
            ours.verify(sample=5)
        with pytest.raises(UsageError, match="rule"):
            ours.retain(Keep())
        assert not (tmp_path / "out").exists()
        assert len(ours.snapshots()) == 1


def test_names_of_the_package_are_imported_only_when_asked_for() -> None:
    program = (
        "import sys, island_fast; assert not {'numpy', 'island_fast.api'} & set(sys.modules); "
        "from island_fast import Keep, Repository; assert 'numpy' in sys.modules; "
        "print(sorted(set(island_fast.__all__) - set(dir(island_fast))), hasattr(island_fast, 'Nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['Keep',", "'Repository']", "False"]


@qemu.needs_qemu
def test_one_text_is_no_list(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", MIB)
    state = LocalState(tmp_path / "state")
    with (
        Repository.open(tmp_path / "repository", state=state, create=True) as ours,
        Repository.open(tmp_path / "elsewhere", state=state, create=True) as other,
    ):
        taken = ours.snapshot(image)
        for call in (lambda: ours.delete(taken.snapshot), lambda: ours.copy(other, taken.snapshot)):
            with pytest.raises(UsageError, match=r"give a list of snapshots, such as \[reference\], not one"):
                call()
        assert [one.snapshot for one in ours.snapshots()] == [taken.snapshot]
        with pytest.raises(UsageError, match="give a list of disks"):
            ours.snapshot_domain("web1", disks="vda")
        for asked in (ours.snapshot, ours.outlook):
            with pytest.raises(UsageError, match="give a list of backing files"):
                asked(image, backing="qcow2:base.qcow2")
        with pytest.raises(UsageError, match="give a list of backing files"):
            ours.verify(taken.snapshot, against=image, backing="qcow2:base.qcow2")
