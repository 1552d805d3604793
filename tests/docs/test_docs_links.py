"""Links between pages, and to headings in them, as GitHub and the site make them; no network is asked."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
PARSER = MarkdownIt("commonmark").enable("table")


def pages() -> list[Path]:
    """Every page that is kept, or is new."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    named = [ROOT / name for name in done.stdout.splitlines()] or [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
    ]
    return sorted(path for path in named if path.exists())


def inline(text: str) -> Iterator[Token]:
    """What stands in the text of a page, headings and code aside."""
    for token in PARSER.parse(text):
        yield from token.children or []


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a page; of equal ones the second ends in -1."""
    tokens = PARSER.parse(text)
    titles = [after for token, after in pairwise(tokens) if token.type == "heading_open"]
    plain = ["".join(one.content for one in title.children or []) for title in titles]
    seen: Counter[str] = Counter()
    found = set()
    for title in plain:
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere."""
    targets = [str(one.attrs.get("href") or one.attrs.get("src") or "") for one in inline(text)]
    wrong = []
    for target in filter(None, targets):
        name, _, anchor = unquote(target).partition("#")
        place = (page.parent / name).resolve() if name else None
        if re.match(r"[a-z]+:", target):
            continue
        there = place is None or place.exists()
        if not there or (anchor and anchor not in anchors(place.read_text() if place else text)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_broken(page: Path) -> None:
    assert not broken(page, page.read_text())


def test_a_broken_link_would_be_seen() -> None:
    text = "# One\n\n[a](#one) [b](#two) [c](README.md) [d](nothing.md#x) [e](README.md#nowhere) [f](https://x.test/)"
    assert broken(ROOT / "x.md", text) == ["#two", "nothing.md#x", "README.md#nowhere"]


def test_every_page_of_the_site_can_be_reached_from_the_index() -> None:
    found, left = set(), [ROOT / "docs/index.md"]
    while left:
        page = left.pop()
        if page in found or page.suffix != ".md":
            continue
        found.add(page)
        hrefs = [str(one.attrs.get("href") or "").partition("#")[0] for one in inline(page.read_text())]
        left += [(page.parent / href).resolve() for href in hrefs if href and ":" not in href]
    assert {page for page in pages() if page.is_relative_to(ROOT / "docs")} <= found
