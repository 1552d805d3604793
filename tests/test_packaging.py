"""What is uploaded: the sdist is the whole tree; wheels built from it need neither tree nor compiler."""

from __future__ import annotations

import email
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from island_fast import __version__
from island_fast._diff import HASH_KERNEL

ROOT = Path(__file__).resolve().parent.parent
MADE_BY_SETUPTOOLS = ("PKG-INFO", "setup.cfg", "island_fast.egg-info/")
MAN_PAGES = [*(ROOT / "man").glob("*.[15]")]
SLOW = {"CPPFLAGS": "-DISLAND_FAST_PYTHON_XXHASH"}  # what a build is without xxhash.h


def tree() -> set[str]:
    """Names of the project's files: git's, or in an unpacked sdist its own."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines()
    names = names or (ROOT / "island_fast.egg-info/SOURCES.txt").read_text().splitlines()
    return {name for name in names if not name.startswith((".", *MADE_BY_SETUPTOOLS))}


def run(*words: str | Path, cwd: Path, **more: str) -> None:
    """Run a module of this Python, with nothing of it and of island in the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ISLAND_"))}
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=kept | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of the tree. The wheel that was built from it lies beside it."""
    source = tmp_path_factory.mktemp("tree")
    for name in tree():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    (source / "island_fast/_diff.so").touch()  # what an earlier build left is no part of it
    built = tmp_path_factory.mktemp("built")
    run("build", "-o", built, source, cwd=built)
    return next(built.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that was built from the sdist."""
    return next(sdist.parent.glob("*.whl"))


class Installed:
    """A wheel in a virtual environment, which borrows what the wheel needs from the one that runs the tests.

    Nothing else is on PATH.
    """

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.folder = folder
        venv = folder / "venv"
        folder.mkdir()
        run("venv", "--without-pip", venv, cwd=folder)
        self.programs = venv / "bin"
        run("pip", "--python", self.programs / "python", "install", "-q", "--no-deps", wheel, cwd=folder)
        (site,) = venv.glob("lib/*/site-packages")
        borrowed = [path for path in sys.path if path.endswith("-packages")]
        (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")

    def __call__(self, program: str, *words: object) -> str:
        """Run a program of the environment; its standard output."""
        environment = {
            "PATH": str(self.programs),
            "ISLAND_CONFIG": os.devnull,
            "ISLAND_REPOSITORY": str(self.folder.parent / "repository"),
            "ISLAND_STATE": str(self.folder / "state"),
        }
        command = [str(self.programs / program), *map(str, words)]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def test_the_sdist_is_the_whole_tree(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in inside if not name.startswith(MADE_BY_SETUPTOOLS)} == tree()


def test_the_wheel_holds_the_package_and_its_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        (described,) = (name for name in inside if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(described))
    about = described.removesuffix("METADATA")
    package = {name for name in tree() if name.startswith("island_fast/")}
    package -= {name for name in package if name.endswith((".pyx", ".pxi"))}
    (kernel,) = (name for name in inside if name.endswith(".so"))
    share = f"{about.removesuffix('dist-info/')}data/data/share/"
    pages = {f"{share}man/man{page.suffix[1:]}/{page.name}" for page in MAN_PAGES}
    assert pages
    rescue = {f"{share}island/{name}" for name in ("format.md", "rescue.py")}
    assert {name for name in inside if not name.startswith(about)} == package | pages | rescue | {kernel}
    assert {f"{about}licenses/LICENSE", f"{about}licenses/licenses/xxHash.txt"} <= inside
    assert metadata["Version"] == __version__
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(extras)


def test_wheels_take_snapshots_without_tree_and_compiler(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    """One as built here, and one as built where xxhash.h is not: each restores what the other stored."""
    run("pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "slow", sdist, cwd=tmp_path, **SLOW)
    (slow,) = (tmp_path / "slow").iterdir()
    volume = random.Random(7).randbytes(1 << 20) + bytes(1 << 20)
    (tmp_path / "disk.raw").write_bytes(volume)
    islands = [Installed(wheel, tmp_path / "one"), Installed(slow, tmp_path / "two")]
    for number, island in enumerate(islands):
        place = island("python", "-c", "from island_fast import _diff; print(_diff.__file__)")
        assert place.startswith(str(island.folder))
        taken = ("snapshot", "../disk.raw", "--format", "raw", "--volume", number)
        assert island("island", *taken, "--quiet") == ""
    assert islands[0]("island", "--version") == f"island {__version__}, digests by {HASH_KERNEL}\n"
    assert islands[1]("island", "--version") == f"island {__version__}, digests by python-xxhash\n"
    for number, island in enumerate(reversed(islands)):
        island("island", "restore", f"{number}@latest", "back.raw", "--format", "raw")
        assert (island.folder / "back.raw").read_bytes() == volume
