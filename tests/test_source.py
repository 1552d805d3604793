"""The rules of the code that a machine can check: rooms, words, linting, types."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import mutants

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "island_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The rooms of the package from the top; a room is a folder or a module beside them. A module may import from
# its own room and from the rows below it, never from above or beside.
ROOMS: list[tuple[list[str], str]] = [
    (["__main__"], "starts the command, and nothing starts it"),
    (["bench"], "measures everything from outside; nothing needs it"),
    (["cli"], "words in, text out; the verbs are behind the API"),
    (["api"], "the one face of the verbs, for people's programs and for the command"),
    (["driver"], "Cinder's names; a volume's life is below it"),
    (
        ["operations", "cinder"],
        "verbs, and a host's volumes, which run the verbs as processes: neither imports the other",
    ),
    (
        ["repository", "images"],
        "objects and lineages; sources and targets of blocks: neither knows the other",
    ),
    (["formats"], "bytes to values and back, without I/O"),
    (["qemu"], "programs that have images open"),
    (["qcow2", "stores"], "files in a format, objects in a place: each usable alone"),
    (["results", "dirtymap"], "values that rooms hand to each other"),
    (["memory"], "what this process may still take"),
    (
        ["_diff", "arrays", "errors", "files", "progress", "results_base"],
        "the ground: it imports nothing of ours",
    ),
]
LEVEL = {name: len(ROOMS) - row for row, (names, _) in enumerate(ROOMS) for name in names}

# Who alone may import what.
CINDER = ["driver.py", "cinder/options.py", "cinder/errors.py", "cinder/database.py"]
ONLY = {
    "swiftclient": ["stores/"],
    "swift": ["bench/"],
    "keystoneauth1": ["stores/"],
    "openstack": ["stores/"],
    "cinder": [*CINDER, "bench/peers/"],
    "oslo_config": CINDER,
    "oslo_concurrency": CINDER,
    "oslo_log": CINDER,
    "oslo_service": CINDER,
    "oslo_utils": CINDER,
    "libvirt": ["qemu/"],
    "libvirt_qemu": ["qemu/"],
    "subprocess": ["qemu/", "cinder/", "bench/"],
    "matplotlib": ["bench/"],
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "island_fast" and here != "__init__":
            target = rest.split(".")[0]
            allowed = target in ("__version__", here) or LEVEL[target] < LEVEL[here]
            assert allowed, f"{here} imports {target}, which is not below it"
        allowed_in = ONLY.get(top, [""])
        relative = str(path.relative_to(PACKAGE))
        assert any(relative.startswith(place) for place in allowed_in), f"{relative} may not import {top}"


def test_the_layer_test_would_notice() -> None:
    """The order is total: the top is above the bottom, and every module has a place."""
    assert LEVEL["cli"] > LEVEL["repository"] > LEVEL["formats"] > LEVEL["qcow2"] > LEVEL["errors"]
    assert {room(path) for path in MODULES} - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_says_what_it_is_for(path: Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "manager", "common", "misc")


def test_the_ground_floor_is_small() -> None:
    """A stranger who lists the package sees its rooms, and a handful of files."""
    assert len([*PACKAGE.glob("*.py")]) <= 14


def test_rooms_say_what_they_are_for_and_import_nothing() -> None:
    """Start-up time and the root helper of NBD depend on it."""
    for path in PACKAGE.glob("*/**/__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_words_are_ours(path: Path) -> None:
    foreign = re.compile(r"\b(chunks?|segments?|prune[sd]?|backends?|backups?)\b", re.IGNORECASE)
    rooms = set(path.relative_to(PACKAGE).parts)
    if not {"driver.py", "synonyms.py", "cinder", "peers"} & rooms:  # these speak other programs' words, too
        lines = [line.strip() for line in path.read_text().splitlines()]
        found = [line for line in lines if foreign.search(line) and not line.startswith("from ")]
        assert not found


def test_at_most_eight_kernels() -> None:
    text = (PACKAGE / "_diff.pyx").read_text()
    public = re.findall(r"^def ([a-z]\w*)", text, re.MULTILINE)
    assert 1 <= len(public) <= 8


def tool(*argv: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_has_nothing_to_say() -> None:
    tool("ruff", "check")


def test_the_format_is_ruffs() -> None:
    tool("ruff", "format", "--check")


def test_mypy_strict_has_nothing_to_say() -> None:
    tool("mypy")


def test_every_mistake_that_can_be_planted_has_its_place() -> None:
    for name, edits in (mutants.MISTAKES | mutants.MISTAKES_OF_COPIES).items():
        for file, text, _ in edits:
            assert (PACKAGE / file).read_text().count(text) == 1, f"{name}: {file}"
