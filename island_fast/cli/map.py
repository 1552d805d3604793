"""`island map`: its options, and the text of its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from island_fast.cli.help import WHAT, option, verb
from island_fast.cli.options import FileName, add_common_options, image_format_option
from island_fast.cli.run import Run, enclose

if TYPE_CHECKING:
    from island_fast.qcow2.extents import Extents

__all__ = ["map_"]

_FORMATTED_AT_ONCE = 1 << 14
_CHANGED_JSON = (', "changed": false', ', "changed": true')
_CHANGED_TEXT = ("  no", "  yes")


@verb("Show where an image holds data", name="map")
@click.argument("image", type=FileName())
@option(WHAT, "--snapshot", metavar="NAME",
        help="Show the volume as of this internal snapshot, not its present state.")  # fmt: skip
@option(WHAT, "--since", metavar="NAME", help="Show what can have changed since this internal snapshot.")
@image_format_option("Format of IMAGE.")
@add_common_options
@click.pass_obj
def map_(run: Run, image: Path, snapshot: str | None, since: str | None, image_format: str) -> None:
    """Show where the volume of IMAGE holds data.

    An extent is data, zero (stored as zeros, without data) or hole (nothing is stored; a backing file shows
    through). Starts and lengths are in bytes. No repository is needed. Extents are printed as they are found:
    if the image turns out to be damaged, the list ends there, with an error.

    \b
    Example:
      island map disk.qcow2
      island map disk.qcow2 --snapshot monday --since sunday --json
    """  # noqa: D301
    from island_fast.images.inspect import map_image

    windows = map_image(image, snapshot=snapshot, since=since, image_format=image_format)
    if run.json:
        rows = _format_extents(
            windows, '{{"start": %d, "length": %d, "kind": "{}"{}}}', _CHANGED_JSON, bool(since)
        )
        run.answer_parts(enclose("[", ", ", "]", rows))
    else:
        heading = f"{'START B':>16}  {'LENGTH B':>16}  KIND" + ("  CHANGED" if since else "")
        rows = _format_extents(windows, "%16d  %16d  {}{}", _CHANGED_TEXT, bool(since))
        if run.quiet:
            for _ in rows:
                pass  # an image that cannot be read is an error all the same
        else:
            run.answer_parts(enclose("", "\n", "", chain([heading], rows)))


def _format_extents(
    windows: Iterable[Extents], row: str, changed: Sequence[str], since: bool
) -> Iterator[str]:
    """Yield extents as text, many at a time by one formatting: there can be hundreds of millions.

    `row` is a format for start and length in which {}{} are the kind and, with `since`, one of `changed`.
    """
    import numpy as np

    from island_fast.qcow2.extents import KINDS

    rows = [row.format(kind, flag if since else "") for flag in changed for kind in KINDS]
    between = ", " if row.startswith("{") else "\n"
    for window in windows:
        for first in range(0, len(window.start), _FORMATTED_AT_ONCE):
            part = slice(first, first + _FORMATTED_AT_ONCE)
            which = (window.kind[part] + len(KINDS) * window.changed[part]).tolist()
            places = np.stack([window.start[part], window.length[part]], axis=1).reshape(-1)
            yield between.join([rows[n] for n in which]) % tuple(places.tolist())
