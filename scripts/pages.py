"""Pages that are made from the code: `python scripts/pages.py` writes those that are out of date.

docs/commands.md and man/*.1 come from the help texts, docs/configuration.md and man/island-config.5 from
the keys of the configuration file, docs/reference.md from the docstrings of the Python API. They are
committed, so that they can be read anywhere and packed without tools; tests/docs fails if one is out of date.
click-man does not write the man pages, because it lets roff take a line that begins with a quote for a
command, fills lines of tables and examples, and leaves out what is below the options.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from island_fast.cli.config import METERED, TABLES, Key
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


def context_of(group: click.Group) -> click.Context:
    """Return a context of `island`, with the names of its option --help."""
    return click.Context(group, info_name="island", **group.context_settings)


def verbs(group: click.Group) -> list[tuple[str, click.Command, click.Context]]:
    """Return each verb: its name, its command, and a context."""
    above = context_of(group)
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
        for name, rows in options(group, context_of(group)).items()
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
    context = context_of(group)
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

_UNBROKEN = (".nh", ".ad l")  # words, and names of options, are not hyphenated, and gaps not stretched
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
        *_UNBROKEN,
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
    yield "island.1", man_page("island", group, context_of(group), version, listing)
    see = [".SH SEE ALSO", "\\fBisland\\fR(1), \\fBisland\\-config\\fR(5)"]
    for name, verb, context in verbs(group):
        yield f"island-{name}.1", man_page(f"island-{name}", verb, context, version, see)


# The configuration file.

_CONFIGURATION = """
    The file holds values for options that every call would repeat. It is in TOML, and need not exist.

    It is the file that ISLAND_CONFIG names, otherwise $XDG_CONFIG_HOME/island/config.toml, otherwise
    ~/.config/island/config.toml. The systemd units read /etc/island/config.toml. All commands of 'island'
    read it except 'island completion'; the Python API and the Cinder driver do not.

    An option on the command line takes precedence over its variable (ISLAND_...), the variable over the file,
    and the file over the default. Each key is looked up by itself.

    Keys that begin with keep- belong below a line [retain]; all others belong at the top, above that line. A
    key that is unknown, misplaced or of another type, a file that ISLAND_CONFIG names and that does not
    exist, and a file that anybody can write to are refused with exit code 2. Credentials do not belong in
    this file: island takes them from the environment, or from clouds.yaml.

    \b
    Example:
      repository = "swift://volumes/host7"
      limit-upload = "10M"
      [retain]
      keep-daily = 7
      keep-weekly = 4
"""


def where_a_key_is(table: str) -> str:
    """Return the heading of the keys of a table of the configuration file."""
    return f"Keys below a line [{table}]" if table else "Keys at the top of the file"


def describe_key(name: str, table: str, key: Key) -> list[tuple[str, str]]:
    """Return what there is to know about a key, as titles and texts."""
    options = {"repository": "-r, --repository, of every verb", "compression": "--compression of snapshot"}
    verbs_of_it = f"of {table}" if table else f"of {', '.join(METERED[:-1])} and {METERED[-1]}"
    return [
        ("value", key.values),
        ("default", key.default),
        ("example", f"{name} = {key.example}"),
        ("option", options.get(name, f"--{name} {verbs_of_it}")),
        ("variable", f"ISLAND_{name.upper().replace('-', '_')}"),
    ]


def configuration() -> str:
    """Return docs/configuration.md."""
    blocks = [
        MADE.format("island_fast/cli/config.py"),
        "# The configuration file",
        "`man island-config` shows the same.",
        *markdown(_CONFIGURATION),
    ]
    for table, keys in TABLES.items():
        blocks.append(f"## {where_a_key_is(table)}")
        for name, key in keys.items():
            blocks += [f"### {name}", plain(key.text)]
            blocks.append("\n".join(f"- {title}: `{it}`" for title, it in describe_key(name, table, key)))
    return "\n\n".join(blocks) + "\n"


def configuration_man_page(version: str) -> str:
    """Return man/island-config.5."""
    description, sections = body(_CONFIGURATION)
    lines = [
        '.\\" Made by scripts/pages.py from island_fast/cli/config.py; change that, and run it.',
        f'.TH ISLAND\\-CONFIG 5 "" "island {version}" "File Formats"',
        *_UNBROKEN,
        ".SH NAME",
        "island\\-config \\- configuration file of the command island",
        ".SH SYNOPSIS",
        roff("~/.config/island/config.toml"),
        ".SH DESCRIPTION",
        *description,
        ".SH OPTIONS",
    ]
    for table, keys in TABLES.items():
        lines.append(f".SS {where_a_key_is(table)}")
        for name, key in keys.items():
            lines += [".TP", f"\\fB{roff(name)}\\fR", roff(key.text)]
            for title, it in describe_key(name, table, key):
                lines += [".br", roff(f"{title}: {it}")]
    lines += [*sections, ".SH SEE ALSO", "\\fBisland\\fR(1), \\fBisland\\-retain\\fR(1)"]
    return "\n".join(lines) + "\n"


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

    made = {
        ROOT / "docs/commands.md": commands(island),
        ROOT / "docs/configuration.md": configuration(),
        ROOT / "docs/reference.md": reference(),
        ROOT / "man/island-config.5": configuration_man_page(__version__),
    }
    return made | {ROOT / "man" / name: text for name, text in man_pages(island, __version__)}


def stale() -> list[Path]:
    """Return pages that are out of date, and man pages of what no longer exists."""
    wanted = pages()
    wrong = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    return wrong + [path for path in (ROOT / "man").glob("*.[15]") if path not in wanted]


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
