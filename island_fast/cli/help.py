"""`--help`: groups of verbs and options, lines that fit the terminal, and a suggestion for a wrong verb.

A verb declares itself with `@verb` and each of its options with `@option(GROUP, ...)`; all else follows, the
man pages and docs/commands.md included (scripts/pages.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from island_fast.cli.run import FullUsageError
from island_fast.cli.synonyms import SYNONYMS

if TYPE_CHECKING:
    from click.types import OptionHelpExtra

__all__ = [
    "HOW",
    "OUTPUT",
    "REPOSITORY",
    "WHAT",
    "Option",
    "Verb",
    "VerbGroup",
    "option",
    "option_groups",
    "verb",
]

WHAT, HOW, REPOSITORY, OUTPUT = "What", "How", "Repository", "Output"
"""The groups of options, in the order of every help: what a verb works on, how, where, and what it prints."""

_NAME_COLUMNS = 26  # names of options that are longer get a line of their own
_NARROW = 4  # that column, in a terminal that is too narrow for both
_MARGINS = 4  # before the names, and between them and the texts
_HARD_HYPHEN, _HARD_SPACE = "\N{NON-BREAKING HYPHEN}", "\N{NO-BREAK SPACE}"


def verb(
    summary: str, *, name: str | None = None, epilog: str | None = None
) -> Callable[[Callable[..., Any]], Verb]:
    """Make a function a verb. `summary` is its line in `island --help`, at most 55 characters."""
    return click.command(name, cls=Verb, short_help=summary, epilog=epilog)


def option(
    group: str, *names: str, **attributes: object
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add an option to a verb, as `click.option` does, in this group of its help."""
    return click.option(*names, cls=Option, group=group, **attributes)


class Option(click.Option):
    """An option in a group of the help. A text as `show_default` is shown as it is."""

    def __init__(self, *arguments: Any, group: str, **attributes: Any) -> None:  # noqa: ANN401 (click's own)
        super().__init__(*arguments, **attributes)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """See click.Option. Leaves out ranges such as x>=1, which only an error needs to name."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


def option_groups(command: click.Command, context: click.Context) -> dict[str, list[tuple[str, str]]]:
    """Return the options of a command by group: names with a metavariable, and help texts."""
    groups: dict[str, list[tuple[str, str]]] = {name: [] for name in (WHAT, HOW, REPOSITORY, OUTPUT)}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record:
            groups[getattr(parameter, "group", OUTPUT)].append(record)  # click makes --help
    return {name: rows for name, rows in groups.items() if rows}


class _Formatter(click.HelpFormatter):
    """Wraps lines at spaces only; click would break --dry-run after its last hyphen."""

    def write_text(self, text: str) -> None:
        """See click.HelpFormatter."""
        super().write_text(_harden(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """See click.HelpFormatter."""
        super().write_dl([(name, _harden(text)) for name, text in rows], col_max, col_spacing)

    def write_groups(self, groups: dict[str, list[tuple[str, str]]], col_max: int) -> None:
        """Write groups of names and texts under headings; all texts begin in one column."""
        rows_of_all = [row for rows in groups.values() for row in rows]
        width = min(col_max, max(len(name) for name, _ in rows_of_all))
        longest = max(len(word) for _, text in rows_of_all for word in _harden(text).split(" "))
        if longest > self.width - _MARGINS - width:
            width = _NARROW  # so each text begins on a line of its own, where its words have room
        for heading, rows in groups.items():
            with self.section(heading):
                self.write_dl([(name.ljust(width), text) for name, text in rows], width)

    def getvalue(self) -> str:
        """See click.HelpFormatter."""
        return super().getvalue().replace(_HARD_HYPHEN, "-").replace(_HARD_SPACE, " ")


def _harden(text: str) -> str:
    return text.replace("-", _HARD_HYPHEN).replace("[env var: ", f"[env{_HARD_SPACE}var:{_HARD_SPACE}")


class _Context(click.Context):
    formatter_class = _Formatter


class Verb(click.Command):
    """A verb, whose help lists its options in groups."""

    context_class = _Context

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click.Command."""
        assert isinstance(formatter, _Formatter)
        formatter.write_groups(option_groups(self, ctx), _NAME_COLUMNS)


class VerbGroup(Verb, click.Group):
    """The command `island`: its help lists verbs in groups, after its options."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:  # noqa: ANN401 (click's own)
        super().__init__(*arguments, **attributes)
        self.verb_groups: dict[str, list[click.Command]] = {}

    def add_verbs(self, heading: str, *verbs: click.Command) -> None:
        """Add verbs under a heading."""
        self.verb_groups[heading] = [*verbs]
        for one in verbs:
            self.add_command(one)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See click.Group. The order is that of the help."""
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click.Command."""
        super().format_options(ctx, formatter)
        assert isinstance(formatter, _Formatter)
        formatter.write_groups(
            {
                heading: [(one.name or "", one.get_short_help_str()) for one in verbs]
                for heading, verbs in self.verb_groups.items()
            },
            _NAME_COLUMNS,
        )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See click.Group. Suggests one verb for a word that is none, if there is one that fits."""
        word = args[0]
        if word in self.commands or word.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        raise FullUsageError(f"no such command {word!r}; {self._suggestion(word)}")

    def _suggestion(self, word: str) -> str:
        from difflib import get_close_matches

        if word in SYNONYMS:
            return SYNONYMS[word]
        if near := get_close_matches(word, self.commands, n=1):
            return f"did you mean '{near[0]}'? See 'island {near[0]} --help'"
        return "see 'island --help'"
