"""Count what makes it easy or hard to find one's way in the package.

    scripts/house.py [ROOT]            print a table about ROOT/island_fast; ROOT is this checkout by default
    scripts/house.py [ROOT] --json     print the same figures as JSON
    scripts/house.py [ROOT] --nouns    list docstrings of functions that do not begin with a verb

Modules are all .py files except __init__.py and __main__.py. A room is a folder at the first level with .py
files at any depth. For imports, each module at the first level, compiled or not, is a room too. Imports
inside functions and under TYPE_CHECKING count; names of the package itself, such as __version__, do not.
Floors are the rooms on the longest chain of imports; rooms that import each other count as one.

Functions are those of modules and classes; a function inside a function is part of it. Lines are counted
from `def`, without decorators. A private function is used once if only one place refers to it, outside of
itself, in its own module or in another that neither defines nor assigns the name. References in strings and
in compiled sources are not seen.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "island_fast"
COMPILED = (".pyx", ".pxd", ".pxi")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _split(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text))


# At the beginning of a docstring these are almost always verbs. Before "of" they are nouns, as in "Copy of",
# except those in SPOKEN.
VERBS = _split("""
accept acquire add adjust adopt advance aim align allocate allow announce append apply arrange ask assemble
assert assign assume attach await be become begin bind book borrow break bring build bump calculate call
cancel carry cast catch change check choose claim clamp clean clear climb close collapse collect combine
commit compact compare compile compress compute configure confirm connect consume continue convert copy
create deal decide declare decode decompress define delete deliver demand demote deny derive describe
destroy detach detect determine disable discard disconnect dismiss dispatch divide do drain draw drop dump
duplicate edit emit enable encode encrypt end enforce enlarge ensure enter escape establish estimate
evaluate evict examine exclude execute expand expect explain expose express extend extract fail fetch fill
find finish fix flatten flush fold follow forbid forget fork forward freeze gather generate get give go grow
guess halt halve handle have hear help hide hold identify ignore import include increase inflate inform
inherit insert inspect install interpret interrupt intersect invalidate invert invoke iterate join judge
jump keep kill know launch lay learn leave lend let limp list listen look lose make manage mark match
measure meet mend merge move multiply negotiate normalise normalize note notice notify obey obtain offer
omit open overwrite pad paint parse pass patch pause peek perform permit persist pick poll pop prefer
prepare preserve press prevent print probe proceed produce promise prompt propagate propose protect prove
provide publish pull punch push put quit quote raise reach read rebuild receive reclaim recognise recognize
recompute reconnect recover redirect reduce refer refill refresh refuse register reject relate release
reload rely remember remind remove rename render renew reopen repack repair repeat replace reply reproduce
require reread rescan resend reserve reset resize resolve respect respond restart restore restrict resume
retain retry return reuse revert revoke rewind rewrite roll rotate round run satisfy save say scan scatter
seal search see seek select send serialise serialize serve set settle show shrink shuffle shut simulate skip
sleep sort spawn specify spend splice split spread stand stay stop store strip submit substitute subtract
suggest supply suppress survey suspend swap sweep switch sync take teach tell terminate thaw throttle throw
tidy tolerate touch track transfer transform translate traverse treat trim trust try turn undo unfreeze
unite unlink unload unlock unmap unmount unpack unpin unwrap update upload use validate verify visit wait
wake walk warn watch weigh widen wipe withdraw wrap write yield
""")

SPOKEN = _split("hear tell")

# These are nouns or adjectives as often, so they count as verbs only if an object could follow. In doubt they
# do not count: --nouns lists those, and nothing lists the others.
EITHER = _split("""
access address answer back block bound branch bundle cap cluster complete cost count cover cross cut cycle
date digest display double empty exit export face feed field file filter fit force format frame free group
guard hand hash head index issue key label last level limit line link live load lock log loop lower map
mirror mount name narrow number order own pack page pair pin place plan point pool present process query
queue range rank rate record report request sample scale score seed separate shape share shift sign signal
size slice slot snapshot space spare stage stamp start state step stream sum table tag test text time trace
value vary view volume weight work zero
""")
OBJECTS = _split("""
a an the this these those it its them their his her our us one two three several many more most all both
each every either some any another other everything anything nothing what whatever whether how out up down
off as on only first
""")


@dataclass
class Source:
    """What is counted of one .py file of the package."""

    place: str
    """Path below the package, with slashes."""
    tree: ast.Module
    functions: list[Function]
    named: Counter[str]
    """How often the file refers to each name, as a variable or an attribute."""
    defined: set[str]
    """Names that the file defines or assigns."""

    @property
    def room(self) -> str:
        """The room that the file is in."""
        return self.place.split("/")[0].removesuffix(".py")

    @property
    def is_module(self) -> bool:
        """Whether the file counts as a module."""
        return not self.place.endswith(("__init__.py", "__main__.py"))


def find_functions(node: ast.AST) -> Iterator[Function]:
    """Yield the functions of a module or class, and of classes in it, but not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child
        else:
            yield from find_functions(child)


def count_references(node: ast.AST) -> Counter[str]:
    """Count the names that a node refers to, as variables or attributes."""
    found = (getattr(part, "id", None) or getattr(part, "attr", None) for part in ast.walk(node))
    return Counter(name for name in found if name)


def find_definitions(tree: ast.Module) -> set[str]:
    """Collect the names that a module defines or assigns, those of attributes included."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, Function | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def read_sources(package: Path) -> list[Source]:
    """Read every .py file of the package, in the order of their paths."""
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        place = path.relative_to(package).as_posix()
        found.append(
            Source(place, tree, list(find_functions(tree)), count_references(tree), find_definitions(tree))
        )
    return found


def find_imports(source: Source) -> Iterator[str]:
    """Yield the room, or other first name below the package, of each import of a file."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = [PACKAGE, *source.place.split("/")[:-1]]
            near = here[: len(here) - node.level + 1] if node.level else []
            start = ".".join([*near, *filter(None, [node.module])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE and len(parts) > 1:
                yield parts[1]


Graph = dict[str, set[str]]


def make_graph(sources: list[Source], compiled: list[str]) -> Graph:
    """Map each room to the other rooms that it imports; the package's own __init__ is not a room."""
    rooms = {source.room for source in sources} | {
        name.removesuffix(".pyx") for name in compiled if name.endswith(".pyx") and "/" not in name
    }
    found: Graph = {room: set() for room in sorted(rooms - {"__init__"})}
    for source in sources:
        if source.room in found:
            found[source.room] |= (set(find_imports(source)) & set(found)) - {source.room}
    return found


def group_cycles(edges: Graph) -> list[list[str]]:
    """Group rooms that import each other, directly or through others; most groups are a single room."""

    @cache
    def reached(room: str) -> frozenset[str]:
        seen: set[str] = set()
        left = [room]
        while left:
            new = edges[left.pop()] - seen
            seen |= new
            left += new
        return frozenset(seen)

    groups = {
        tuple(sorted({room} | {other for other in reached(room) if room in reached(other)})) for room in edges
    }
    return [list(group) for group in sorted(groups)]


def find_longest_chain(edges: Graph, groups: list[list[str]]) -> list[list[str]]:
    """Find the longest chain of imports from group to group; of equally long ones, the first by name."""
    group_of = {room: number for number, group in enumerate(groups) for room in group}
    below = [
        sorted({group_of[other] for room in group for other in edges[room]} - {number})
        for number, group in enumerate(groups)
    ]

    @cache
    def way(number: int) -> tuple[int, ...]:
        return (number, *max(map(way, below[number]), key=len, default=()))

    return [groups[number] for number in max(map(way, range(len(groups))), key=len, default=())]


def is_private(name: str) -> bool:
    """Return whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def find_used_once(sources: list[Source]) -> list[str]:
    """List the private functions that only one place in the package uses, as "file:line name"."""
    found = []
    for source in sources:
        for function in source.functions:
            if is_private(function.name):
                uses = source.named[function.name] - count_references(function)[function.name]
                uses += sum(
                    other.named[function.name] for other in sources if function.name not in other.defined
                )
                if uses == 1:
                    found.append(f"{source.place}:{function.lineno} {function.name}")
    return found


def begins_with_verb(text: str) -> bool:
    """Return whether a docstring begins with a verb, as far as word lists can decide."""
    match = re.match(r"([A-Za-z]+)(?![\w'’-])(\W*)([\w']*)", text)
    if not match:
        return False
    word, between, after = match[1].lower(), match[2], match[3].lower()
    if word in EITHER:
        return between.strip() == "`" or (between.isspace() and after in OBJECTS)
    return word in VERBS and (word in SPOKEN or not (between.isspace() and after == "of"))


def list_docstrings(sources: list[Source]) -> Iterator[tuple[str, str]]:
    """Yield "file:line name" and the first line of each function's docstring."""
    for source in sources:
        for function in source.functions:
            text = ast.get_docstring(function)
            if text:
                yield f"{PACKAGE}/{source.place}:{function.lineno} {function.name}", text.splitlines()[0]


def percentage(part: int, whole: int) -> float:
    """Return `part` as a percentage of `whole`, to a tenth."""
    return round(100 * part / whole, 1) if whole else 0.0


def count(root: Path) -> dict[str, Any]:
    """Count everything, and return the figures as a dict for JSON."""
    package = root / PACKAGE
    sources = read_sources(package)
    compiled = sorted(
        path.relative_to(package).as_posix() for path in package.rglob("*") if path.suffix in COMPILED
    )
    top = [source.room for source in sources if source.is_module and "/" not in source.place]
    rooms = {source.room: 0 for source in sources if "/" in source.place}
    for source in sources:
        if source.is_module and "/" in source.place:
            rooms[source.room] += 1
    edges = make_graph(sources, compiled)
    groups = group_cycles(edges)
    chain = find_longest_chain(edges, groups)
    return {
        "modules": len(top),
        "ing": sum(name.endswith("ing") for name in top),
        "compiled": compiled,
        "rooms": rooms,
        "floors": len(chain),
        "chain": chain,
        "cycles": [group for group in groups if len(group) > 1],
        **_count_functions(sources),
    }


def _count_functions(sources: list[Source]) -> dict[str, Any]:
    found = [function for source in sources for function in source.functions]
    lines = sorted((function.end_lineno or 0) - function.lineno + 1 for function in found) or [0]
    private = sum(is_private(function.name) for function in found)
    once = len(find_used_once(sources))
    texts = [text for _, text in list_docstrings(sources)]
    verbs = sum(map(begins_with_verb, texts))
    return {
        "functions": len(found),
        "lines_median": statistics.median(lines),
        "lines_p90": lines[math.ceil(0.9 * len(lines)) - 1],
        "lines_longest": lines[-1],
        "private": private,
        "private_percent": percentage(private, len(found)),
        "private_used_once": once,
        "private_used_once_percent": percentage(once, len(found)),
        "docstrings": len(texts),
        "verbs": verbs,
        "verbs_percent": percentage(verbs, len(texts)),
        "see": sum(text.startswith("See ") for text in texts),
    }


def make_table(found: dict[str, Any]) -> str:
    """Return the figures as lines: what, how many, and a remark."""
    once = f"{found['private_used_once_percent']} % of all functions"
    rows = [
        ("modules in the package itself", found["modules"], "without __init__ and __main__"),
        ('  that end in "ing"', found["ing"], ""),
        ("compiled sources", len(found["compiled"]), ", ".join(found["compiled"])),
        ("rooms", len(found["rooms"]), "modules in each:"),
        *((f"  {name}", number, "") for name, number in found["rooms"].items()),
        ("floors", found["floors"], "rooms on the longest chain of imports, see below"),
        ("cycles of rooms", len(found["cycles"]), "; ".join(map(", ".join, found["cycles"]))),
        ("functions", found["functions"], "with methods, without those inside functions"),
        ("  lines, median", f"{found['lines_median']:g}", ""),
        ("  lines, 90th percentile", found["lines_p90"], ""),
        ("  lines, longest", found["lines_longest"], ""),
        ("  private", found["private"], f"{found['private_percent']} %"),
        ("  private and used once", found["private_used_once"], once),
        ("docstrings of functions", found["docstrings"], ""),
        ("  that begin with a verb", found["verbs"], f"{found['verbs_percent']} %"),
        ('    of these "See ..."', found["see"], ""),
    ]
    wide = max(len(row[0]) for row in rows)
    lines = [f"{what:{wide}}  {number:>6}  {more}".rstrip() for what, number, more in rows]
    chain = [group[0] if len(group) == 1 else "{" + ", ".join(group) + "}" for group in found["chain"]]
    return "\n".join([*lines, "", "chain: " + " > ".join(chain)])


def main(argv: list[str] | None = None) -> None:
    """Print what the command line asks for: the table, the JSON, or the list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("root", type=Path, nargs="?", default=ROOT, help="the checkout (this one)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(
        "--nouns", action="store_true", help="list docstrings of functions that do not begin with a verb"
    )
    options = parser.parse_args(argv)
    if not (options.root / PACKAGE).is_dir():
        parser.error(f"{options.root} has no folder {PACKAGE}")
    if options.nouns:
        for where, text in list_docstrings(read_sources(options.root / PACKAGE)):
            if not begins_with_verb(text):
                print(f"{where}: {text}")
    elif options.json:
        print(json.dumps(count(options.root), indent=2))
    else:
        print(make_table(count(options.root)))


if __name__ == "__main__":
    main()
