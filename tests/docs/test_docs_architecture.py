"""docs/architecture.md shows the tree as it is: every room, every file and every name in it exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "island_fast"
TEXT = (ROOT / "docs/architecture.md").read_text()


def test_the_picture_shows_every_room() -> None:
    picture = TEXT.split("```")[1]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {room for room in rooms if f"{room}/" not in picture} == set()


def test_every_path_exists() -> None:
    paths = set(re.findall(r"`((?:\w+/)*\w+\.pyx?|(?:\w+/)+)`", TEXT))
    assert len(paths) > 20
    missing = {path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()}
    assert missing - {"cli/VERB.py", "operations/VERB.py", "island_fast/"} == set()


def test_every_name_in_the_walks_is_defined_where_they_say() -> None:
    steps = re.findall(r"`((?:\w+/)*\w+\.py)` `(\w+)`", TEXT)
    assert len(steps) > 20
    for path, name in steps:
        defined = [getattr(node, "name", "") for node in ast.parse((PACKAGE / path).read_text()).body]
        assert name in defined, f"{path} does not define {name}"
