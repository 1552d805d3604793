"""Answers to a shell that completes a command line: its script, and the words that can come next.

click knows verbs, options and their values; this adds names of snapshots, and what is special about bash.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    shell_complete,
    split_arg_string,
)

from island_fast.cli.config import read_config
from island_fast.cli.run import Run
from island_fast.cli.text import SHORT_ID, printable
from island_fast.errors import IslandError

__all__ = ["VARIABLE", "complete", "script", "snapshot_names"]

VARIABLE = "_ISLAND_COMPLETE"
"""The variable by which a shell asks, with a value such as bash_complete; click's convention."""


class _Bash(BashComplete):
    """bash ends words at @ : = too, so it gets only what follows the last of them.

    click's own script passes bash's words, which make three of disk@latest.
    """

    source_template = """\
%(complete_func)s() {
    local completion
    while IFS= read -r completion; do
        case $completion in
        plain,*) COMPREPLY+=("${completion#plain,}") ;;
        dir,*) compopt -o dirnames ;;
        file,*) compopt -o default ;;
        esac
    done < <(COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_BREAKS=$COMP_WORDBREAKS \\
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def source(self) -> str:
        """See ShellComplete. Unlike click's, it does not test for bash 4.4, of 2016, which it needs."""
        return self.source_template % self.source_vars()

    def get_completion_args(self) -> tuple[list[str], str]:
        """See ShellComplete."""
        line, breaks = os.environ["COMP_WORDS"], os.environ.get("COMP_BREAKS", "")
        words = split_arg_string(line)[1:]
        last = "" if not words or line[-1:].isspace() else words.pop()
        ends = max((last.rfind(mark) for mark in breaks), default=-1) + 1
        self._typed = last[:ends]
        return words, last

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """See ShellComplete."""
        return f"{item.type},{str(item.value).removeprefix(self._typed)}"


add_completion_class(_Bash)


def complete(command: click.Command, run: Run, instruction: str) -> None:
    """Print what a shell asks for with `instruction`, such as bash_complete or zsh_source."""
    logger = logging.getLogger("island_fast")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a warning would appear in the line that is being typed
    try:
        if shell_complete(command, {"obj": run}, "island", VARIABLE, instruction):
            raise click.UsageError(
                f"{VARIABLE} is {instruction!r}, which is not a valid value; leave it unset"
            )
    finally:
        logger.setLevel(level)


def script(shell: str, command: click.Command) -> str:
    """Return the script with which `shell` completes `command`: "bash", "zsh" or "fish"."""
    shell_class = get_completion_class(shell)
    assert shell_class is not None  # click knows all three
    return shell_class(command, {}, "island", VARIABLE).source()


def snapshot_names(context: click.Context, typed: str) -> list[CompletionItem[str]]:
    """Return names of snapshots that begin with `typed`, newest first, of a repository in a directory.

    One in Swift is not asked: a key press would wait for the sign-in. Whatever fails gives no names.
    """
    run = context.find_object(Run)
    found: list[CompletionItem[str]] = []
    with contextlib.suppress(IslandError, OSError, click.ClickException):
        location = (run.location if run else None) or read_config().get("repository", "")
        if location and "://" not in location:
            found = [one for one in _iter_names(location, typed) if one.value.startswith(typed)]
    return found


def _iter_names(location: str, typed: str) -> Iterator[CompletionItem[str]]:
    from island_fast.api import Repository

    volume, at, _ = typed.rpartition("@")
    with Repository.open(location) as repository:
        for name in [volume] if at else sorted(repository.store.folders("")):
            lineage = repository.lineage(name)
            if lineage.files.pending.all():  # recovery can take long: no task for a key press
                continue
            lineage.refresh()
            rows = lineage.state.live.values()
            if rows:
                yield CompletionItem(f"{name}@latest", help=f"the newest snapshot of {name}")
            for row in reversed([*rows]):
                yield CompletionItem(f"{name}@{row.id[:SHORT_ID]}", help=printable(row.label) or None)
                if typed and not at:
                    yield CompletionItem(row.id[:SHORT_ID], help=printable(row.label) or None)
