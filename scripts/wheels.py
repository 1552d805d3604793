"""Build what is uploaded, in dist/: an sdist, and manylinux wheels made from it and tested.

    scripts/wheels.py [PYTHON...]    one wheel for each interpreter; default: for the one that runs this

Each wheel is installed into a new environment, only from wheels and without a compiler on PATH, and must pass
tests from a copy of tests/ there. A wheel that does not have libxxhash compiled in, and would hash slowly or
need the system's library, is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
FOREIGN = ("CC", "CFLAGS", "LDFLAGS", "PYTHON", "PYTEST", "ISLAND_", "OS_", "ST_", "VIRTUAL_ENV")
COMPILERS = re.compile(
    r"(.*-)?([cgt]?cc|[cg]\+\+|clang(\+\+)?|c[89]9|cpp|as|ld|cython|python|pip)([-.0-9].*)?"
)
NEEDED_BY_TESTS = ("hypothesis", "pytest", "pytest-benchmark", "pytest-timeout")
TESTS = ("tests/unit", "tests/property", "tests/cli/test_cli_verbs.py")
PROBE = """
import island_fast, numpy as np
from island_fast import _diff
_diff.hash_blocks(np.zeros(65536, np.uint8), 65536, 0, np.empty((1, 16), np.uint8))
with open("/proc/self/maps") as maps:
    loaded = "libxxhash" in maps.read()
print(island_fast.__file__, _diff.__file__, loaded, _diff.HASH_KERNEL, sep="\\n")
"""


def run(
    *argv: str | Path, cwd: Path = ROOT, path: str | None = None, more: Mapping[str, str] | None = None
) -> str:
    """Run a program without variables of Python, compilers or island, and return its standard output."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = usual | {"PATH": here if path is None else path} | (more or {})
    words = [str(word) for word in argv]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\nfailed: {done.stdout}\n{done.stderr}")
    return done.stdout


def pip(
    python: Path, *words: str | Path, path: str | None = None, more: Mapping[str, str] | None = None
) -> None:
    """Run pip in the environment of an interpreter."""
    run(python, "-m", "pip", "--disable-pip-version-check", "-q", *words, path=path, more=more)


def make_environment(python: str, folder: Path) -> Path:
    """Make a virtual environment for an interpreter, and return its own interpreter."""
    run(python, "-m", "venv", folder)
    return folder / "bin/python"


def build_wheel(python: str, sdist: Path, work: Path) -> Path:
    """Build a wheel for an interpreter from only the sdist, with the tags that auditwheel finds."""
    ours = make_environment(python, work / "build")
    # The linker command of some interpreters leaves the path of their own libraries in the module.
    pip(ours, "wheel", "--no-deps", "-w", work / "plain", sdist, more={"LDSHARED": "cc -shared"})
    (plain,) = (work / "plain").iterdir()
    run(sys.executable, "-m", "auditwheel", "repair", "-w", work / "repaired", plain)
    (wheel,) = (work / "repaired").iterdir()
    return wheel


def make_path_without_compilers(folder: Path) -> Path:
    """Make a folder of links to everything on PATH except compilers and other Pythons, and return it."""
    folder.mkdir()
    for place in map(Path, os.get_exec_path()):
        for program in place.iterdir() if place.is_dir() else ():
            if not COMPILERS.fullmatch(program.name) and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return folder


def try_wheel(python: str, sdist: Path, wheel: Path, work: Path) -> str:
    """Install the wheel and test it without a compiler and a source tree; return the result as one line."""
    ours = make_environment(python, work / "clean")
    path = os.pathsep.join([str(ours.parent), str(make_path_without_compilers(work / "programs"))])
    assert not any(shutil.which(name, path=path) for name in ("cc", "gcc", "c++", "clang", "ld"))
    # By name, as from dist/: pip itself must find that this wheel is for this interpreter.
    found = ["--find-links", wheel.parent, f"island-fast=={wheel.name.split('-')[1]}"]
    pip(ours, "install", "--only-binary", ":all:", *found, *NEEDED_BY_TESTS, path=path)

    shutil.unpack_archive(sdist, work / "unpacked", filter="data")
    tests = work / "outside"
    tests.mkdir()
    for name in ("tests", "pyproject.toml"):
        next((work / "unpacked").iterdir()).joinpath(name).rename(tests / name)
    *files, loaded, kernel = run(ours, "-c", PROBE, cwd=tests, path=path).splitlines()
    assert all(file.startswith(str(work / "clean")) for file in files), (
        f"imported from elsewhere, not from the wheel: {files}"
    )
    assert loaded == "False", "the system's libxxhash is loaded"
    assert kernel.startswith("libxxhash "), (
        f"the wheel hashes with {kernel}: xxhash.h was missing when it was built"
    )
    assert kernel in run("island", "--version", cwd=tests, path=path)
    output = run(ours, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, cwd=tests, path=path)
    return f"{kernel} compiled in; {output.splitlines()[-1]}"


def main() -> None:
    """Build, check and test everything; replace dist/ only if nothing fails."""
    pythons = sys.argv[1:] or [sys.executable]
    with tempfile.TemporaryDirectory(prefix="island-wheels-") as folder:
        out = Path(folder) / "sdist"
        run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
        (sdist,) = out.iterdir()
        print(sdist.name, flush=True)
        wheels = []
        for number, python in enumerate(pythons):
            work = Path(folder) / str(number)
            work.mkdir()
            wheels.append(build_wheel(python, sdist, work))
            print(wheels[-1].name, flush=True)
            glibc = ".".join(re.findall(r"manylinux_(\d+)_(\d+)", wheels[-1].name)[0])
            found = try_wheel(python, sdist, wheels[-1], work)
            print(f"    runs with glibc {glibc} or newer; {found}", flush=True)
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, *wheels)
        shutil.rmtree(DIST, ignore_errors=True)
        DIST.mkdir()
        for file in (sdist, *wheels):
            shutil.copy(file, DIST)


if __name__ == "__main__":
    main()
