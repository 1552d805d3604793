"""`island info`: its options, and what a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from island_fast.cli import text
from island_fast.cli.options import FileName, common, opened
from island_fast.cli.run import Run

if TYPE_CHECKING:
    from island_fast.results import ImageInfo

__all__ = ["info"]


@click.command("info")
@click.argument("image", type=FileName())
@click.option("--volume", metavar="NAME", help="The volume that IMAGE's next snapshot would go to.")
@click.option("--backing", metavar="FORMAT:FILE", multiple=True, help="As for 'island snapshot'.")
@common
@click.pass_obj
def info(run: Run, image: Path, volume: str | None, backing: tuple[str, ...]) -> None:
    """Tell what the qcow2 file IMAGE is, and what its next snapshot would do.

    With a repository, it is told whether the next snapshot will be a table diff, or why not.

    \b
    Example:
      island info disk.qcow2
      island -r /srv/snapshots info disk.qcow2 --json
    """  # noqa: D301
    if run.location:
        with opened(run, create=True) as repository:  # which only a snapshot would make
            found = repository.outlook(image, volume=volume, backing=backing)
    else:
        from island_fast.images.inspect import read_image_info

        found = read_image_info(image)
    run.answer(found.as_json(), _described(found))


def _described(found: ImageInfo) -> str:
    clusters = f"{text.size(found.cluster_size)}, {found.compression} where compressed"
    following = f"{found.next_rule}: " if found.next_rule else ""
    rows = [
        ("image", f"{text.printable(found.image)}, {text.size(found.file_size)}"),
        ("format", f"qcow2 version {found.version}"),
        ("volume", text.size(found.volume_size)),
        ("clusters", clusters),
        ("features", ", ".join(found.features)),
        ("backing", text.printable(found.backing_file or "")),
        ("in use", "open for writing in another process" if found.in_use else ""),
    ]
    for one in found.internal_snapshots:
        pin = f", pins {one.pin_of}" if one.pin_of else ""
        rows.append(
            ("internal", f"{text.printable(one.name)}, {one.created}, {text.size(one.volume_size)}{pin}")
        )
    for bitmap in found.bitmaps:
        rows.append(
            (
                "bitmap",
                f"{text.printable(bitmap.name)}, {text.size(bitmap.granularity)} a bit, {bitmap.state}",
            )
        )
    rows += [
        ("bitmaps", text.printable(found.bitmap_trouble or "")),
        ("goes to", found.volume or ""),
        ("pinned", found.pinned_base or ""),
        ("next", following + text.printable(found.next_reason or "")),
    ]
    return text.sheet(rows)
