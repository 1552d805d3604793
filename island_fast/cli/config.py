"""The configuration file of the command: its keys, and the options that they give values to.

docs/configuration.md and the man page island-config(5) are made from `TABLES` (scripts/pages.py). The file is
TOML, at $ISLAND_CONFIG, else $XDG_CONFIG_HOME/island/config.toml, else ~/.config/island/config.toml. An
option on the command line wins over its variable (ISLAND_...), that over the file, and that over the default:
click looks them up in this order. Only the command reads the file; the Python API does not.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from island_fast.cli.run import FullUsageError

__all__ = ["COMPRESSIONS", "KEEP_RULES", "METERED", "TABLES", "Key", "parse_rate", "read_config"]

COMPRESSIONS = ("zstd", "none")
"""Values of --compression, ISLAND_COMPRESSION and the key compression; the first is the default."""

KEEP_RULES = {
    "last": "Keep the newest N.",
    "hourly": "Keep the newest of each of the last N hours that have a snapshot.",
    "daily": "The same for days.",
    "weekly": "The same for weeks, which begin on Monday.",
    "monthly": "The same for months.",
    "yearly": "The same for years.",
}
"""The rules of a retention policy, with their help: options --keep-..., variables ISLAND_KEEP_..., keys of
[retain]."""

METERED = ("snapshot", "restore", "copy", "verify", "sweep")
"""The verbs that move data, which have the options --workers and --limit-..."""

_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([KMG])")
_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_HINT = "see 'man island-config'"

_Wanted = type | tuple[str, ...] | re.Pattern[str]  # a type, one of some texts, or a rate


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the file: the values that it can have, what it does, its default, and an example.

    `wanted` is a type, a tuple of texts, or the pattern of a rate; a number is `least` or more. `example` is
    in TOML. The option that it gives a value to has the same name, and so has the variable: ISLAND_WORKERS
    for workers.
    """

    wanted: _Wanted
    text: str
    default: str
    example: str
    least: int = 0

    @property
    def values(self) -> str:
        """Return the values that the key can have, in words, as an error and the man page say it."""
        if isinstance(self.wanted, re.Pattern):
            return 'a rate in quotes: one number and K, M or G, without B, such as "10M"'
        if isinstance(self.wanted, tuple):
            return " or ".join(f'"{text}"' for text in self.wanted)
        return {str: "a text in quotes", int: f"a whole number, {self.least} or more"}[self.wanted]

    def allows(self, value: object) -> bool:
        """Return whether the key can have this value."""
        if isinstance(self.wanted, re.Pattern):
            return isinstance(value, str) and parse_rate(value) is not None
        if isinstance(self.wanted, tuple):
            return value in self.wanted
        return type(value) is self.wanted and not (isinstance(value, int) and value < self.least)


TABLES: Mapping[str, Mapping[str, Key]] = {
    "": {
        "repository": Key(
            str,
            "The repository: an absolute path, a path that begins with ~/, or swift://CONTAINER/PREFIX.",
            "none",
            '"/srv/snapshots"',
        ),
        "compression": Key(
            COMPRESSIONS, "The compression of what 'island snapshot' sends.", '"zstd"', '"none"'
        ),
        "workers": Key(int, "Use at most this many worker threads.", "automatic", "2", least=1),
        "limit-upload": Key(
            _RATE, "Send at most this much per second on average: KiB, MiB or GiB.", "no limit", '"10M"'
        ),
        "limit-download": Key(_RATE, "The same for what is fetched.", "no limit", '"1.5G"'),
    },
    "retain": {
        f"keep-{rule}": Key(int, text, "0, which turns the rule off", str(number))
        for (rule, text), number in zip(KEEP_RULES.items(), (3, 24, 7, 4, 12, 5), strict=True)
    },
}
"""The keys of the file, by the table that they are in: "" is the top of the file."""


def parse_rate(text: str) -> float | None:
    """Return bytes per second, more than 0, of a text such as 500K, 10M or 1.5G (1024 each); else None."""
    match = _RATE.fullmatch(text)
    return (float(match[1]) * _BYTES[match[2]] or None) if match else None


def read_config() -> dict[str, Any]:
    """Read the file and return values for options, as click's `default_map`; {} if there is no file.

    Options of a verb are in a dict under its name. FullUsageError if anything in the file would have no
    effect, or is of another type.
    """
    named = os.environ.get("ISLAND_CONFIG")
    path = Path(named) if named else _default_path()
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except FileNotFoundError as error:
        if named:
            raise FullUsageError(
                f"{path}, which ISLAND_CONFIG names, does not exist; create it, or unset the variable"
            ) from error
        return {}
    except OSError as error:
        raise FullUsageError(
            f"{path} cannot be read ({error.strerror}); mend that, or name another in ISLAND_CONFIG"
        ) from error
    if stat.S_ISREG(mode) and mode & stat.S_IWOTH:
        raise FullUsageError(f"anybody can write to {path}, and redirect snapshots; run 'chmod o-w' on it")
    return _parse(path, text)


def _default_path() -> Path | None:
    """Return the file's default place; None for a user without a home directory."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    place = base if os.path.isabs(base) else os.path.expanduser("~/.config")
    return Path(place, "island/config.toml") if os.path.isabs(place) else None


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    import tomllib

    try:
        found = tomllib.loads(text.decode())
    except ValueError as error:
        raise FullUsageError(f"{path} is not valid TOML ({error}); {_HINT}") from error
    values: dict[str, Any] = {}
    for table, keys in TABLES.items():
        held = found.pop(table, {}) if table else {key: found.pop(key) for key in keys if key in found}
        if not isinstance(held, dict):
            raise FullUsageError(f"in {path}, {table} must be a table, a line [{table}]; {_HINT}")
        for key, value in held.items():
            name = f"{table}.{key}" if table else key
            if key not in keys:
                raise _unknown(path, name)
            if not keys[key].allows(value):
                raise FullUsageError(f"in {path}, {name} must be {keys[key].values}; {_HINT}")
        options = {key.replace("-", "_"): value for key, value in held.items()}
        if "repository" in options:
            options["repository"] = _absolute(path, options["repository"])
        values |= {table: options} if table else options
    for name in found:
        raise _unknown(path, name)
    if "compression" in values:
        values["snapshot"] = {"compression": values.pop("compression")}
    limits = {
        name: values.pop(name) for name in ("workers", "limit_upload", "limit_download") if name in values
    }
    for verb in METERED if limits else ():
        values[verb] = values.get(verb, {}) | limits
    return values


def _absolute(path: Path, repository: str) -> str:
    """Return the repository's place, which must not depend on the current folder; ~ is the user's home."""
    place = os.path.expanduser(repository) if repository.startswith("~/") else repository
    if not os.path.isabs(place) and "://" not in place:
        raise FullUsageError(
            f"in {path}, repository must be an absolute path, begin with ~/, or be "
            f"swift://CONTAINER/PREFIX; {_HINT}"
        )
    return place


def _unknown(path: Path, name: str) -> FullUsageError:
    """Return the error for a key that is not known, or is in the wrong place."""
    for table, keys in TABLES.items():
        if name.rpartition(".")[2] in keys:
            place = f"below a line [{table}]" if table else "at the top of the file, above every [table]"
            return FullUsageError(f"in {path}, {name} belongs {place}; {_HINT}")
    known = "; below a line ".join(
        f"[{table}]: {', '.join(keys)}" if table else ", ".join(keys) for table, keys in TABLES.items()
    )
    return FullUsageError(f"in {path}, {name} is unknown; known are {known}; {_HINT}")
