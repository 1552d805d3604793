"""Cinder's chunked backup driver in a process of its own, as cinder-backup runs it.

`cinder.Cinder` starts this file:

    python cinder_process.py back-up FOLDER NAME VOLUME [PARENT]
    python cinder_process.py restore FOLDER NAME TARGET

The driver is the posix one, which keeps objects in a folder, with its defaults, in a process that eventlet
has patched, given an open file that works in native threads, as cinder.backup.manager does. In the place of
the database stand the few fields that it keeps of a backup, in FOLDER/NAME.json. Prints wall and processor
seconds of the driver's call alone: cinder-backup is a service, which is there already.
"""

from __future__ import annotations

from cinder import monkey_patch

monkey_patch.patch()

import contextlib  # noqa: E402 (eventlet has to patch before anything else is imported)
import json  # noqa: E402
import logging  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

from cinder import context, objects, utils  # noqa: E402
from cinder.backup.drivers import posix  # noqa: E402
from cinder.common import config  # noqa: E402
from cinder.volume import volume_utils  # noqa: E402

VOLUME = "volume"
GIB = 1 << 30


class Backup(SimpleNamespace):
    """What drivers use of cinder.objects.Backup, without a database."""

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 (a field of any type)
        return getattr(self, name)

    def save(self) -> None:
        """Keep nothing: `remember` does at the end."""

    def refresh(self) -> None:
        """Nobody else changes it."""

    @contextlib.contextmanager
    def as_read_deleted(self) -> Iterator[None]:
        """As if the database was asked for deleted ones, too."""
        yield


def new(name: str, size: int, parent: str | None) -> Backup:
    """A backup that is about to be made."""
    return Backup(
        id=name,
        volume_id=VOLUME,
        parent_id=parent,
        size=-(-size // GIB),
        container=None,
        service_metadata=None,
        object_count=0,
        status="creating",
        display_name=name,
        display_description="",
        created_at="2026-01-01",
    )


def known(folder: Path, name: str) -> Backup:
    """A backup that was made."""
    return Backup(**json.loads((folder / f"{name}.json").read_text()))


def driver(folder: Path, compress: bool) -> posix.PosixBackupDriver:
    """The driver, with all defaults but its folder."""
    config.CONF([], project="cinder", default_config_files=[])
    config.CONF.set_override("state_path", str(folder))
    if not compress:
        config.CONF.set_override("backup_compression_algorithm", "none")
    volume_utils.notify_about_backup_usage = lambda *_, **__: None
    objects.register_all()
    objects.Backup.get_by_id = lambda _, name: known(folder, name)
    made = posix.PosixBackupDriver(context.get_admin_context(), str(folder / "objects"))
    made.db = SimpleNamespace(volume_get=lambda *_: {"size": 1})
    return made


def timed(work: Callable[[], object]) -> None:
    """Do it and print what it took."""
    wall, processor = time.monotonic(), time.process_time()
    work()
    print(time.monotonic() - wall, time.process_time() - processor)


def main(verb: str, folder: Path, name: str, path: str, parent: str | None = None) -> None:
    """Do what the command line says."""
    logging.disable(logging.WARNING)
    # The whole first one is not measured, and zlib would take minutes for it.
    used = driver(folder, compress=parent is not None)
    if verb == "back-up":
        backup = new(name, Path(path).stat().st_size, parent)
        with open(path, "rb") as volume:
            timed(lambda: used.backup(backup, utils.tpool_wrap(volume), backup_metadata=False))
        (folder / f"{name}.json").write_text(json.dumps(vars(backup)))
        return
    backup = known(folder, name)
    backup.status = "restoring"
    with open(path, "rb+") as target:
        timed(lambda: used.restore(backup, VOLUME, utils.tpool_wrap(target), True))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
