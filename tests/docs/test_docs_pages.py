"""The pages that are made from the code are up to date, and can be read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib

import pytest

from island_fast.cli.main import island
from scripts import pages

MAN = shutil.which("man")
"""Of some systems that were made small it only says that there are no pages."""
REAL = MAN and "man" in subprocess.run([MAN, "--version"], capture_output=True, text=True).stdout.split()


def test_no_page_is_stale() -> None:
    stale = [str(path.relative_to(pages.ROOT)) for path in pages.stale()]
    assert not stale, "run 'make pages'"


def test_every_verb_and_option_is_on_the_page_and_in_its_man_page() -> None:
    text = (pages.ROOT / "docs/commands.md").read_text()
    for name, verb, context in pages.verbs(island):
        page = (pages.ROOT / f"man/island-{name}.1").read_text().replace("\\-", "-")
        part = text.partition(f"\n## island {name}\n")[2].partition("\n## ")[0]
        found, common = pages.options(verb, context), pages.common(island)
        assert sorted(common) == ["Output", "Repository"]
        for group, rows in found.items():
            assert f".SS {group}\n" in page
            for names, _ in rows:
                assert all(name in page for name in re.findall(r"--[\w-]+", names))
        for group, rows in pages.without(found, common).items():
            assert f"\n**{group}**\n" in part
            for names, _ in rows:
                assert f"- `{names}`: " in part


def test_every_key_of_the_configuration_file_is_on_the_page_and_in_its_man_page() -> None:
    page = (pages.ROOT / "docs/configuration.md").read_text()
    man = (pages.ROOT / "man/island-config.5").read_text().replace("\\-", "-")
    found = {name: (verb, context) for name, verb, context in pages.verbs(island)}
    for table, keys in pages.TABLES.items():
        below = page.partition(f"\n## {pages.where_a_key_is(table)}\n")[2].partition("\n## ")[0]
        for name, key in keys.items():
            told = dict(pages.describe_key(name, table, key))
            assert f"\n### {name}\n" in below
            assert f"\\fB{name}\\fR\n" in man
            assert all(f"- {title}: `{text}`\n" in page for title, text in told.items())
            assert tomllib.loads(told["example"]).keys() == {name}
            assert key.allows(tomllib.loads(told["example"])[name])
            verbs = [verb for verb in found if re.search(rf"\b{verb}\b", told["option"].partition(" of ")[2])]
            for verb in verbs or found:
                rows = [row for rows in pages.options(*found[verb]).values() for row in rows]
                (text,) = [text for names, text in rows if f"--{name} " in f"{names} "]
                assert f"[env var: {told['variable']}" in text


def test_what_is_markup_in_a_man_page_is_escaped() -> None:
    assert pages.roff(".x -y 'z' \\") == "\\&.x \\-y \\(aqz\\(aq \\e"
    description, sections = pages.body("One.\n\n\b\nExample:\n  a --b\n\n'Two'.")
    assert description == ["One.", ".PP", "\\(aqTwo\\(aq."]
    assert sections == [".SH EXAMPLES", ".EX", "a \\-\\-b", ".EE"]


@pytest.mark.skipif(not REAL, reason="man is not installed")
@pytest.mark.parametrize("page", sorted((pages.ROOT / "man").glob("*.[15]")), ids=lambda page: page.name)
def test_man_shows_it_without_a_complaint(page: pages.Path) -> None:
    command = [str(MAN), "--warnings=w", "-E", "ascii", "-l", str(page)]
    environment = os.environ | {"MANWIDTH": "100", "LC_ALL": "C", "MAN_KEEP_FORMATTING": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert not re.search(r"[a-z]-\n", done.stdout.replace("keep-\n", "")), "a word is hyphenated"
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES"} <= set(done.stdout.splitlines())
    assert f"{page.stem} - " in " ".join(done.stdout.split())
