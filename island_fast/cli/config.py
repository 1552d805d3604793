"""The configuration file of the command: what it may say, and what options it gives values to.

TOML, at $ISLAND_CONFIG, else $XDG_CONFIG_HOME/island/config.toml, else ~/.config/island/config.toml. An
option on the command line goes before its variable (ISLAND_...), that before the file, that before the
default: click looks them up in this order. Only the command reads it; the Python API does not.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

__all__ = ["COMPRESSIONS", "KEEP_RULES", "configured", "rate"]

COMPRESSIONS = ("zstd", "none")
"""What --compression, ISLAND_COMPRESSION and the key compression may be; the first is the default."""

KEEP_RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
"""The rules of a retention policy: options --keep-..., variables ISLAND_KEEP_..., keys of [retain]."""

_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([KMG])")
_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_METERED = ("snapshot", "restore", "copy", "verify", "sweep")  # the verbs that move data

_Wanted = type | tuple[str, ...] | re.Pattern[str]  # a type, or some texts, or a rate
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
_NAMES = {str: "a text in quotes", int: "a whole number, 0 or more", dict: "a table"}


def rate(text: str) -> float | None:
    """Bytes in a second, more than 0, from a text such as 500K, 10M or 1.5G (of 1024 each); else None."""
    match = _RATE.fullmatch(text)
    return (float(match[1]) * _BYTES[match[2]] or None) if match else None


def configured() -> dict[str, Any]:
    """Values for options, as click's `default_map`: those of verbs below their names. Empty without a file.

    click.UsageError if there is anything in the file that would have no effect, or is of another type.
    """
    named = os.environ.get("ISLAND_CONFIG")
    path = Path(named) if named else _usual()
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except FileNotFoundError as error:
        if named:
            raise click.UsageError(f"{path}, which ISLAND_CONFIG names, does not exist") from error
        return {}
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read ({error.strerror})") from error
    if stat.S_ISREG(mode) and mode & stat.S_IWOTH:
        raise click.UsageError(f"anybody may write to {path}, and redirect snapshots; run 'chmod o-w' on it")
    return _parsed(path, text)


def _usual() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.config"), "island/config.toml")


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    import tomllib

    try:
        found = tomllib.loads(text.decode())
    except ValueError as error:
        raise click.UsageError(f"{path} is not TOML ({error})") from error
    values: dict[str, Any] = {}
    for table, keys in _TABLES.items():
        held = found.pop(table, {}) if table else {key: found.pop(key) for key in keys if key in found}
        _check(path, table, held, dict)
        for key, value in held.items():
            name = f"{table}.{key}" if table else key
            if key not in keys:
                _refuse(path, name)
            _check(path, name, value, keys[key])
        options = {key.replace("-", "_"): value for key, value in held.items()}
        if "repository" in options:
            options["repository"] = _place(path, options["repository"])
        values |= {table: options} if table else options
    for name in found:
        _refuse(path, name)
    if "compression" in values:
        values["snapshot"] = {"compression": values.pop("compression")}
    limits = {
        name: values.pop(name) for name in ("workers", "limit_upload", "limit_download") if name in values
    }
    for verb in _METERED if limits else ():
        values[verb] = values.get(verb, {}) | limits
    return values


def _place(path: Path, repository: str) -> str:
    """A repository that is the same one in whatever folder the command is called; ~ is the user's home."""
    place = os.path.expanduser(repository) if repository.startswith("~/") else repository
    if not os.path.isabs(place) and "://" not in place:
        raise click.UsageError(
            f"in {path}, repository must be an absolute path, begin with ~/, or be swift://CONTAINER/PREFIX"
        )
    return place


def _check(path: Path, name: str, value: object, wanted: _Wanted) -> None:
    if isinstance(wanted, re.Pattern):
        right, told = isinstance(value, str) and rate(value) is not None, 'a rate in quotes, such as "10M"'
    elif isinstance(wanted, tuple):
        right, told = value in wanted, " or ".join(f'"{text}"' for text in wanted)
    else:
        right, told = type(value) is wanted and not (isinstance(value, int) and value < 0), _NAMES[wanted]
    if not right:
        raise click.UsageError(f"in {path}, {name} must be {told}")


def _refuse(path: Path, name: str) -> None:
    known = [f"{table}.{key}" if table else key for table, keys in _TABLES.items() for key in keys]
    raise click.UsageError(f"in {path}, {name} is unknown; known are {', '.join(known)}")
