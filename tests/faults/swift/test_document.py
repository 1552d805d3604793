"""docs/reliability.md names a test for each of its claims; here, that these tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_every_test_that_the_document_names_exists():
    text = (ROOT / "docs/reliability.md").read_text()
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
    assert len(named) > 20
    for path, name in named:
        functions = [
            n.name for n in ast.parse((ROOT / path).read_text()).body if isinstance(n, ast.FunctionDef)
        ]
        assert name in functions, f"{path}::{name}"
