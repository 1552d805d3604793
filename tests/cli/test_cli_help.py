"""`--help` of every verb: groups that hold everything once, lines that fit a terminal, summaries in full."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from island_fast.cli.help import HOW, OUTPUT, REPOSITORY, WHAT, Option
from island_fast.cli.main import island as command
from island_fast.cli.synonyms import SYNONYMS
from tests.cli.conftest import Island

VERBS = [*command.commands]


def test_verbs_are_in_groups_each_once(island: Island) -> None:
    text = island.text("--help")
    listed = re.findall(r"^  ([a-z]+)  +[A-Z]", text, re.MULTILINE)
    assert listed == VERBS == [one.name for group in command.verb_groups.values() for one in group]
    assert len(set(VERBS)) == len(VERBS) == 17
    for heading, verbs in command.verb_groups.items():
        part = text.partition(f"\n{heading}:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  ([a-z]+)", part, re.MULTILINE) == [one.name for one in verbs]
    assert re.findall(r"^    ([0-9])  ", text, re.MULTILINE) == list("0123456")
    assert island.text("-h") == island.text() == text


def test_summaries_are_never_cut(island: Island, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = island.text("--help").splitlines()
    for name, verb in command.commands.items():
        assert verb.short_help
        assert len(verb.short_help) <= 55
        assert f"  {name:10}  {verb.short_help}" in lines


@pytest.mark.parametrize("name", VERBS)
def test_options_are_in_groups(island: Island, name: str) -> None:
    verb = command.commands[name]
    options = [one for one in verb.params if isinstance(one, click.Option)]
    assert all(isinstance(one, Option) for one in options), "an option without a group"
    text = island.text(name, "--help")
    headings = re.findall(r"^([A-Z][a-z]+):$", text, re.MULTILINE)
    assert headings == [group for group in (WHAT, HOW, REPOSITORY, OUTPUT) if group in headings]
    assert {REPOSITORY, OUTPUT} <= set(headings)
    parts = re.split(r"^[A-Z][a-z]+:$", text, flags=re.MULTILINE)[1:]
    for heading, part in zip(headings, parts, strict=True):
        shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", part, re.MULTILINE)
        here = [one for one in options if isinstance(one, Option) and one.group == heading]
        names = [next(word for word in one.opts if word.startswith("--")) for one in here]
        assert shown == names + (["--help"] if heading == OUTPUT else [])
    assert "    island " in text.partition("Example:")[2]
    assert "x>=" not in text


@pytest.mark.parametrize("name", ["", *VERBS])
@pytest.mark.parametrize("columns", [40, 80, 100])
def test_lines_fit_and_break_at_spaces(
    island: Island, monkeypatch: pytest.MonkeyPatch, name: str, columns: int
) -> None:
    words = [name] if name else []
    monkeypatch.setenv("COLUMNS", "400")
    wide = set(island.text(*words, "--help").split())
    monkeypatch.setenv("COLUMNS", str(columns))
    text = island.text(*words, "--help")
    assert columns < 80 or max(map(len, text.splitlines())) <= columns, "examples are never wrapped"
    assert set(text.split()) == wide, "a word is broken"


def test_words_of_other_programs_lead_to_a_verb(island: Island, tmp_path: Path) -> None:
    for word, answer in SYNONYMS.items():
        assert word not in VERBS
        named = re.search(r"'island (--)?(\w+)", answer)
        assert named
        assert named[1] or named[2] in VERBS
        assert island.fails(2, word) == f"no such command {word!r}; {answer}"
