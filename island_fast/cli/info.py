"""`island info`: its options, and the text of its answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from island_fast.cli.help import HOW, option, verb
from island_fast.cli.options import FileName, add_common_options, open_repository, volume_option
from island_fast.cli.run import Run
from island_fast.cli.text import printable, sheet, size

if TYPE_CHECKING:
    from island_fast.results import ImageInfo

__all__ = ["info"]


@verb("Show what an image is, and what a snapshot would do")
@click.argument("image", type=FileName())
@volume_option("The volume that IMAGE's next snapshot would go to.")
@option(HOW, "--backing", metavar="FORMAT:FILE", multiple=True,
        help="A backing file of IMAGE, as for 'island snapshot'.")  # fmt: skip
@add_common_options
@click.pass_obj
def info(run: Run, image: Path, volume: str | None, backing: tuple[str, ...]) -> None:
    """Show what the qcow2 file IMAGE is, and what its next snapshot would do.

    If a repository is named, this includes whether the next snapshot will be a table diff, and if not, why.

    \b
    Example:
      island info disk.qcow2
      island -r /srv/snapshots info disk.qcow2 --json
    """  # noqa: D301
    if run.location:
        with open_repository(run, create=True) as repository:  # only a snapshot would create it
            found = repository.outlook(image, volume=volume, backing=backing)
    else:
        from island_fast.images.inspect import read_image_info

        found = read_image_info(image)
    run.answer(found.as_json(), _format_info(found))


_OVERWRITING = {
    True: "refused by the store",
    False: "not refused by the store; hosts claim what they begin",
    None: "",
}


def _format_info(found: ImageInfo) -> str:
    """Return what an image says of itself, and what its next snapshot would do."""
    rows = [
        ("image", f"{printable(found.image)}, {size(found.file_size)}"),
        ("format", f"qcow2 version {found.version}"),
        ("volume", size(found.volume_size)),
        ("clusters", f"{size(found.cluster_size)}, {found.compression} where compressed"),
        ("features", ", ".join(found.features)),
        ("backing", printable(found.backing_file or "")),
        ("in use", "open for writing in another process" if found.in_use else ""),
    ]
    for one in found.internal_snapshots:
        pin = f", pins {one.pin_of}" if one.pin_of else ""
        rows.append(("internal", f"{printable(one.name)}, {one.created}, {size(one.volume_size)}{pin}"))
    for bitmap in found.bitmaps:
        rows.append(
            ("bitmap", f"{printable(bitmap.name)}, {size(bitmap.granularity)} per bit, {bitmap.state}")
        )
    rule = f"{found.next_rule}: " if found.next_rule else ""
    rows += [
        ("bitmaps", printable(found.bitmap_trouble or "")),
        ("goes to", found.volume or ""),
        ("pinned", found.pinned_base or ""),
        ("next", rule + printable(found.next_reason or "")),
        ("overwriting", _OVERWRITING[found.refuses_overwrites]),
    ]
    return sheet(rows)
