"""What the README and the quickstart show is what happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import readme


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_examples_output_is_real(page: Path) -> None:
    text = page.read_text()
    typed = readme.find_commands(text)
    assert any(line.startswith("island restore") for line in typed)
    assert not readme.find_differences(text, readme.insert_output(text, readme.run(typed)))


def test_a_difference_would_be_seen() -> None:
    text = readme.PAGES[0].read_text()
    assert readme.find_differences(text, text.replace("table-diff", "full-scan"))
    assert not readme.is_alike("12.5 KiB sent", "16.5 KiB sent")
    assert readme.is_alike(
        "ab12cd34ef56 2026-01-01T00:00:00Z 0.03 s", "ffffffffffff 2027-01-01T00:00:01Z 0.13 s"
    )
