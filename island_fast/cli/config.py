"""The configuration file of the command: its keys, and the options that they give values to.

It is TOML, at $ISLAND_CONFIG, else $XDG_CONFIG_HOME/island/config.toml, else ~/.config/island/config.toml. An
option on the command line wins over its variable (ISLAND_...), that over the file, and that over the default:
click looks them up in this order. Only the command reads the file; the Python API does not.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from island_fast.cli.run import FullUsageError

__all__ = ["COMPRESSIONS", "KEEP_RULES", "parse_rate", "read_config"]

COMPRESSIONS = ("zstd", "none")
"""Values of --compression, ISLAND_COMPRESSION and the key compression; the first is the default."""

KEEP_RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
"""The rules of a retention policy: options --keep-..., variables ISLAND_KEEP_..., keys of [retain]."""

_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([KMG])")
_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_METERED = ("snapshot", "restore", "copy", "verify", "sweep")  # the verbs that move data

_Wanted = type | tuple[str, ...] | re.Pattern[str]  # a type, one of some texts, or a rate
_TABLES: Mapping[str, Mapping[str, _Wanted]] = {
    "": {
        "repository": str,
        "compression": COMPRESSIONS,
        "workers": int,
        "limit-upload": _RATE,
        "limit-download": _RATE,
    },
    "retain": {f"keep-{rule}": int for rule in KEEP_RULES},
}
_TYPES = {str: "a text in quotes", int: "a whole number, 0 or more", dict: "a table"}


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
        raise FullUsageError(f"{path} is not valid TOML ({error})") from error
    values: dict[str, Any] = {}
    for table, keys in _TABLES.items():
        held = found.pop(table, {}) if table else {key: found.pop(key) for key in keys if key in found}
        _check(path, table, held, dict)
        for key, value in held.items():
            name = f"{table}.{key}" if table else key
            if key not in keys:
                raise _unknown(path, name)
            _check(path, name, value, keys[key])
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
    for verb in _METERED if limits else ():
        values[verb] = values.get(verb, {}) | limits
    return values


def _absolute(path: Path, repository: str) -> str:
    """Return the repository's place, which must not depend on the current folder; ~ is the user's home."""
    place = os.path.expanduser(repository) if repository.startswith("~/") else repository
    if not os.path.isabs(place) and "://" not in place:
        raise FullUsageError(
            f"in {path}, repository must be an absolute path, begin with ~/, or be swift://CONTAINER/PREFIX"
        )
    return place


def _check(path: Path, name: str, value: object, wanted: _Wanted) -> None:
    """Raise FullUsageError unless the value is of the type that is wanted."""
    if isinstance(wanted, re.Pattern):
        right = isinstance(value, str) and parse_rate(value) is not None
        what = 'a rate in quotes: one number and K, M or G, without B, such as "10M"'
    elif isinstance(wanted, tuple):
        right, what = value in wanted, " or ".join(f'"{text}"' for text in wanted)
    else:
        right, what = type(value) is wanted and not (isinstance(value, int) and value < 0), _TYPES[wanted]
    if not right:
        raise FullUsageError(f"in {path}, {name} must be {what}")


def _unknown(path: Path, name: str) -> FullUsageError:
    """Return the error for a key that is not known, or is in the wrong place."""
    for table, keys in _TABLES.items():
        if name.rpartition(".")[2] in keys:
            place = f"below a line [{table}]" if table else "at the top of the file, above every [table]"
            return FullUsageError(f"in {path}, {name} belongs {place}")
    known = [f"{table}.{key}" if table else key for table, keys in _TABLES.items() for key in keys]
    return FullUsageError(f"in {path}, {name} is unknown; known are {', '.join(known)}")
