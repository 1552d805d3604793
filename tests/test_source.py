"""The rules of the code that a machine can check: layers, sizes, words, linting, types."""

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

# A module may import from its own package (folder) and from the rows below its own, never from above.
LAYERS = [
    ["__main__"],
    ["cli", "driver", "bench"],
    ["driver_database", "driver_errors", "driver_options"],
    ["volumes"],
    ["elsewhere", "looking", "proving", "returning", "running", "weighing"],
    ["options"],
    ["completing"],
    ["configuration"],
    ["outcome"],
    ["show"],
    ["unpinning"],
    ["repository"],
    ["domains"],
    ["verifying"],
    ["remedying"],
    ["checking"],
    ["healing"],
    ["retaining"],
    [
        *["comparing", "copying", "deleting", "inspecting", "measuring", "overwriting", "restoring"],
        *["sweeping", "taking"],
    ],
    ["opening", "storing"],
    ["carrying", "examining", "matching", "resuming"],
    ["choosing", "health"],
    ["pipeline", "reclaim"],
    ["packreader"],
    ["lineage"],
    ["local"],
    ["catalog"],
    ["manifest"],
    ["pack", "runs"],
    ["columns", "frame", "slots", "targets"],
    ["source"],
    ["host"],
    ["qcow2", "stores"],
    ["dirtymap", "retention"],
    ["results"],
    ["_diff", "answer", "durable", "errors", "progress"],
]
LEVEL = {name: len(LAYERS) - row for row, names in enumerate(LAYERS) for name in names}

# Who alone may import what.
ONLY = {
    "swiftclient": ["stores/"],
    "swift": ["bench/"],
    "keystoneauth1": ["stores/", "driver"],
    "openstack": ["stores/"],
    "cinder": ["driver", "bench/peers/"],
    "oslo_config": ["driver"],
    "oslo_concurrency": ["driver"],
    "oslo_log": ["driver"],
    "oslo_service": ["driver"],
    "oslo_utils": ["driver"],
    "libvirt": ["host/"],
    "libvirt_qemu": ["host/"],
    "subprocess": ["host/", "bench/"],
    "matplotlib": ["bench/"],
}


def layer(path: Path) -> str:
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
    here = layer(path)
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
    assert LEVEL["cli"] > LEVEL["repository"] > LEVEL["catalog"] > LEVEL["qcow2"] > LEVEL["errors"]
    assert {layer(path) for path in MODULES} - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize(
    "path", [*MODULES, *PACKAGE.glob("*.px*")], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_files_and_functions_stay_small(path: Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "manager", "common", "misc")
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_words_are_ours(path: Path) -> None:
    foreign = re.compile(r"\b(chunks?|segments?|prune[sd]?|backends?|backups?)\b", re.IGNORECASE)
    if not path.name.startswith("driver") and "peers" not in path.parts:  # theirs are other words
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
    for name, edits in mutants.MISTAKES.items():
        for file, text, _ in edits:
            assert (PACKAGE / file).read_text().count(text) == 1, f"{name}: {file}"
