"""Pages that are made from the code: `python scripts/pages.py` writes those that are out of date.

docs/commands.md and man/*.1 come from the help texts, docs/reference.md from the docstrings of the Python
API. They are committed, so that they can be read anywhere and packed without tools; tests/docs fails if one
is out of date. click-man does not write the man pages, because it lets roff take a line that begins with a
quote for a command, fills lines of tables and examples, and leaves out what is below the options.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from island_fast.cli.help import VerbGroup, option_groups

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "island_fast"
Part = tuple[bool, list[str]]
"""A paragraph of a help text: whether its lines are kept, and those lines."""


# Help texts.


def parts(text: str) -> Iterator[Part]:
    """Yield the paragraphs of a help text; those whose lines click keeps begin with a backspace."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        kept = paragraph.startswith("\b")
        lines = paragraph.removeprefix("\b").strip("\n").splitlines()
        yield (True, lines) if kept else (False, [" ".join(line.strip() for line in lines)])


def groups(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the parts of a kept paragraph: each line at the margin, and the indented lines below it."""
    title, below = "", []
    for line in lines:
        if line.startswith(" "):
            below.append(line.removeprefix("  "))
        else:
            if title or below:
                yield title, below
            title, below = line, []
    yield title, below


def verbs(group: click.Group) -> list[tuple[str, click.Command, click.Context]]:
    """Return each verb: its name, its command, and a context."""
    above = click.Context(group, info_name="island")
    named = [(name, group.commands[name]) for name in group.list_commands(above)]
    return [(name, verb, click.Context(verb, info_name=name, parent=above)) for name, verb in named]


Options = dict[str, list[tuple[str, str]]]
"""Names with a metavariable, and help texts, by the group that the help lists them in."""


def options(command: click.Command, context: click.Context) -> Options:
    """Return the options of a command as its help shows them, without --help."""
    found = {
        group: [row for row in rows if "--help" not in row[0]]
        for group, rows in option_groups(command, context).items()
    }
    return {group: rows for group, rows in found.items() if rows}


def common(group: click.Group) -> Options:
    """Return the options that every verb has."""
    found = [options(verb, context) for _, verb, context in verbs(group)]
    return {
        name: [row for row in rows if all(row in one.get(name, []) for one in found)]
        for name, rows in options(group, click.Context(group)).items()
    }


def without(found: Options, others: Options) -> Options:
    """Return the options that are not among the others."""
    left = {group: [row for row in rows if row not in others.get(group, [])] for group, rows in found.items()}
    return {group: rows for group, rows in left.items() if rows}


def usage(command: click.Command, context: click.Context) -> str:
    """Return how to write a command."""
    return " ".join([context.command_path, *command.collect_usage_pieces(context)])


def summary(command: click.Command) -> str:
    """Return what a command does, as its line in `island --help` says; of `island`, its first sentence."""
    if command.short_help:
        return command.short_help
    first = next(parts(command.help or ""))[1][0]
    return re.split(r"\.(?:\s|$)", first)[0]


# Markdown.


def plain(text: str) -> str:
    """Return text in which nothing is markup except `code`."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*<])", r"\\\1", p) for p in pieces)


def fenced(lines: Iterable[str], language: str = "text") -> str:
    """Return lines that are shown as they are."""
    return "\n".join([f"```{language}", *lines, "```"])


def markdown(text: str) -> Iterator[str]:
    """Yield the paragraphs of a help text in Markdown."""
    for kept, lines in parts(text):
        for title, below in groups(lines) if kept else [(lines[0], [])]:
            if title:
                yield plain(title)
            if below:
                yield fenced(below, "sh" if title.startswith("Example") else "text")


def listed(found: Options) -> Iterator[str]:
    """Yield each group of options: its name, and a list."""
    for group, rows in found.items():
        yield f"**{group}**"
        yield "\n".join(f"- `{names}`: {plain(' '.join(text.split()))}" for names, text in rows)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


MADE = "<!-- Made by scripts/pages.py from {}; change that, and run it. -->"


def index(group: VerbGroup) -> Iterator[str]:
    """Yield each group of verbs: its name, and a list."""
    for heading, verbs_of_it in group.verb_groups.items():
        yield f"**{heading}**"
        yield "\n".join(
            f"- [{verb.name}](#{slug(f'island {verb.name}')}): {plain(summary(verb))}."
            for verb in verbs_of_it
        )


def commands(group: VerbGroup) -> str:
    """Return docs/commands.md."""
    context = click.Context(group, info_name="island")
    every = common(group)
    blocks = [
        MADE.format("the help texts"),
        "# The command `island`",
        "`island VERB --help` shows the same, and so do the man pages: `man island-snapshot`. The fields of "
        "`--json` are those of [the Python API's answers](reference.md#answers).",
        *index(group),
        "## island",
        fenced([usage(group, context)]),
        *markdown(group.help or ""),
        *markdown(group.epilog or ""),
        "### Options of every verb",
        "They can also be given before the verb.",
        *listed(every),
        "### Options without a verb",
        *listed(without(options(group, context), every)),
    ]
    for name, verb, own_context in verbs(group):
        blocks += [f"## island {name}", fenced([usage(verb, own_context)])]
        blocks += [*markdown(verb.help or ""), *markdown(verb.epilog or "")]
        if own := without(options(verb, own_context), every):
            blocks += ["Options, beside [those of every verb](#options-of-every-verb):", *listed(own)]
    return "\n\n".join(blocks) + "\n"


# Man pages.

_SECTIONS = {"Example:": "EXAMPLES", "Environment:": "ENVIRONMENT", "Exit codes:": "EXIT STATUS"}


def roff(text: str) -> str:
    """Return a line in which nothing is markup."""
    for plain_text, written in (
        ("\\", "\\e"),
        ("-", "\\-"),
        ("'", "\\(aq"),
        ("`", "\\(ga"),
        ("~", "\\(ti"),
        ("^", "\\(ha"),
    ):
        text = text.replace(plain_text, written)
    return f"\\&{text}" if text.startswith(".") else text


def as_it_is(lines: Iterable[str]) -> list[str]:
    """Return lines that are not filled."""
    return [".EX", *(roff(line) or ".sp" for line in lines), ".EE"]


def body(text: str) -> tuple[list[str], list[str]]:
    """Return what of a help text belongs to DESCRIPTION, and the other sections."""
    description, sections = [], []
    for kept, lines in parts(text):
        if kept and (name := _SECTIONS.get(lines[0])):
            sections += [f".SH {name}", *as_it_is(line.removeprefix("  ") for line in lines[1:])]
        elif kept:
            description += [".PP", *as_it_is(lines)]
        else:
            description += [".PP", roff(lines[0])]
    return description[1:], sections


def tagged(found: Options) -> list[str]:
    """Return groups of options: names bold, metavariables in italics."""
    lines = []
    for group, rows in found.items():
        lines.append(f".SS {group}")
        for names, text in rows:
            shown = ", ".join(
                re.sub(
                    r"^(\S+)(?: (.*))?$",
                    lambda m: f"\\fB{m[1]}\\fR" + (f" \\fI{m[2]}\\fR" if m[2] else ""),
                    roff(one),
                )
                for one in names.split(", ")
            )
            lines += [".TP", shown, roff(" ".join(text.split()))]
    return lines


def man_page(name: str, command: click.Command, context: click.Context, version: str, more: list[str]) -> str:
    """Return a man page; `more` are lines for its end."""
    description, sections = body(command.help or "")
    told, _ = body(command.epilog or "") if command.epilog else ([], [])
    first = summary(command)
    written = usage(command, context).removeprefix(context.command_path).strip()
    lines = [
        '.\\" Made by scripts/pages.py from the help texts; change those, and run it.',
        f'.TH {roff(name.upper())} 1 "" "island {version}" "User Commands"',
        ".SH NAME",
        f"{roff(name)} \\- {roff(first[0].lower() + first[1:])}",
        ".SH SYNOPSIS",
        f"\\fB{roff(context.command_path)}\\fR {roff(written)}",
        ".SH DESCRIPTION",
        *description,
        *([".PP", *told] if told else []),
        ".SH OPTIONS",
        *tagged(options(command, context)),
        *sections,
        *more,
    ]
    return "\n".join(lines) + "\n"


def man_pages(group: VerbGroup, version: str) -> Iterator[tuple[str, str]]:
    """Yield each man page: its name, such as island-list.1, and its text."""
    listing = [".SH COMMANDS"]
    for heading, verbs_of_it in group.verb_groups.items():
        listing.append(f".SS {heading}")
        for verb in verbs_of_it:
            listing += [".TP", f"\\fBisland\\-{verb.name}\\fR(1)", roff(f"{summary(verb)}.")]
    yield "island.1", man_page("island", group, click.Context(group, info_name="island"), version, listing)
    see = [".SH SEE ALSO", "\\fBisland\\fR(1)"]
    for name, verb, context in verbs(group):
        yield f"island-{name}.1", man_page(f"island-{name}", verb, context, version, see)


# The Python API.

_METHODS_BEFORE = ("open", "close", "id")  # of the class that Repository is made from


def parsed(name: str) -> ast.Module:
    """Parse a module of the package, without importing it."""
    return ast.parse((PACKAGE / f"{name}.py").read_text())


def classes(name: str) -> dict[str, ast.ClassDef]:
    """Return the public classes of a module, by name."""
    found = [node for node in parsed(name).body if isinstance(node, ast.ClassDef)]
    return {node.name: node for node in found if not node.name.startswith("_")}


def documented(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    """Return the paragraphs of a docstring."""
    text = ast.get_docstring(node) or ""
    told = [plain(" ".join(paragraph.split())) for paragraph in re.split(r"\n\s*\n", text) if paragraph]
    return [re.sub(r"docs/(\w+\.md)", r"[\1](\1)", paragraph) for paragraph in told]


def signature(method: ast.FunctionDef) -> str:
    """Return how to call a method, an argument to a line if there are many."""
    arguments = ast.unparse(method.args)
    arguments = re.sub(r"^(self|cls)(, )?", "", arguments).replace("=", " = ")
    decorators = {ast.unparse(one) for one in method.decorator_list}
    if "property" in decorators:
        return f"{method.name}: {ast.unparse(method.returns)}" if method.returns else method.name
    answer = f" -> {ast.unparse(method.returns)}" if method.returns else ""
    line = f"{method.name}({arguments}){answer}"
    if len(line) <= 100:
        return line
    inner = re.sub(r", (?![^\[(]*[\])])", ",\n    ", arguments)
    return f"{method.name}(\n    {inner},\n){answer}"


def methods(node: ast.ClassDef, names: Iterable[str] | None = None) -> Iterator[str]:
    """Yield public methods and properties of a class: those in `names`, or all."""
    found = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
    for name in names or [name for name in found if not name.startswith("_")]:
        yield f"### Repository.{name}" if names or node.name == "Repository" else f"### {node.name}.{name}"
        yield fenced([signature(found[name])], "python")
        yield from documented(found[name])


def fields(node: ast.ClassDef) -> str:
    """Return the fields of a dataclass, in Python."""
    rows = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
    return fenced(
        [f"class {node.name}({', '.join(map(ast.unparse, node.bases))}):", *(f"    {row}" for row in rows)],
        "python",
    )


def reference() -> str:
    """Return docs/reference.md."""
    repository, opening = classes("api")["Repository"], classes("repository/open")["RepositoryBase"]
    progress = parsed("progress").body
    told = next(
        one.value.value
        for one in progress[3:]
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
    )
    keep = classes("operations/retain")["Keep"]
    blocks = [
        MADE.format("the docstrings"),
        "# Reference of the Python API",
        "How it is used, with examples: [api.md](api.md). Only what stands here is kept stable.",
        "## Repository",
        "`from island_fast import Repository`",
        *documented(repository),
        *documented(opening)[1:],
        *methods(opening, _METHODS_BEFORE),
        *methods(repository),
        "## Keep",
        "`from island_fast import Keep`",
        *documented(keep),
        fields(keep).replace("class Keep():", "class Keep:"),
        *methods(keep),
        "## Progress",
        "`from island_fast.progress import Progress`",
        fenced(["Progress = Callable[[str, int, int], None]"], "python"),
        *(plain(" ".join(paragraph.split())) for paragraph in told.split("\n\n")),
        "## Answers",
        "`from island_fast.results import Restored`, and so on. `as_json()` gives one as plain types, which "
        "is what `--json` prints. Sizes are in bytes, `seconds` is how long the work took, and `created` is "
        "ISO 8601 in UTC, such as 2026-01-31T12:00:00Z. A `lineage` is named by its volume.",
    ]
    for name, node in {**classes("results_base"), **classes("results")}.items():
        if name != "Answer":
            blocks += [f"### {name}", *documented(node), fields(node)]
    blocks += [
        "## Errors",
        "`from island_fast.errors import NotFoundError`, and so on. The message is one sentence, with the "
        "cause and the way out. `exit_code` is that of the command.",
    ]
    for name, node in classes("errors").items():
        blocks += [f"### {name}", f"A kind of `{ast.unparse(node.bases[0])}`.", *documented(node)]
    return "\n\n".join(blocks) + "\n"


def pages() -> dict[Path, str]:
    """Return what each page should be."""
    from island_fast import __version__
    from island_fast.cli.main import island

    made = {ROOT / "docs/commands.md": commands(island), ROOT / "docs/reference.md": reference()}
    return made | {ROOT / "man" / name: text for name, text in man_pages(island, __version__)}


def stale() -> list[Path]:
    """Return pages that are out of date, and man pages of verbs that no longer exist."""
    wanted = pages()
    wrong = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    return wrong + [path for path in (ROOT / "man").glob("*.1") if path not in wanted]


def main() -> None:
    """Write the pages that are out of date."""
    wanted = pages()
    for path in stale():
        print(path.relative_to(ROOT))
        if path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()


if __name__ == "__main__":
    main()
