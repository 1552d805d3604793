"""The targets of the Makefile: `make help` lists each, and pages name no other."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def list_targets() -> dict[str, str]:
    """Return the targets that `make help` lists, each with its description."""
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [re.fullmatch(r"make ([a-z]+) +(\S.*)", line) for line in done.stdout.splitlines()]
    return {row[1]: row[2] for row in rows if row}


def test_help_lists_every_target_with_a_description() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert list(list_targets()) == phony[1].split()


def test_pages_name_targets_that_exist() -> None:
    targets = list_targets()
    for page in PAGES:
        named = re.findall(r"(?:^    |`)make ([a-z]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= set(targets), page.name
