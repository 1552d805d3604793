"""Run Cinder's chunked backup driver in a separate process, as cinder-backup does; `Cinder` starts it.

    python cinder_process.py FOLDER

Each line of standard input is a JSON list: ["back-up", NAME, VOLUME, PARENT or null], or ["restore", NAME,
TARGET]. The answer is a line with the wall and processor seconds of the driver's call, and the peak memory of
the process so far, in bytes. The process ends with its input.

The driver is the posix one, which keeps objects in a folder, with its defaults. As in cinder.backup.manager,
eventlet has patched the process, and the driver gets an open file that works in native threads. Instead of
the database, the few fields of a backup that it needs are kept in FOLDER/NAME.json.
"""

from __future__ import annotations

from cinder import monkey_patch

monkey_patch.patch()

import contextlib  # noqa: E402 (eventlet must patch before anything else is imported)
import json  # noqa: E402
import logging  # noqa: E402
import resource  # noqa: E402
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
    """The part of cinder.objects.Backup that drivers use, without a database."""

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 (a field of any type)
        return getattr(self, name)

    def save(self) -> None:
        """Do nothing: `run_request` writes the fields at the end."""

    def refresh(self) -> None:
        """Do nothing: nobody else changes the fields."""

    @contextlib.contextmanager
    def as_read_deleted(self) -> Iterator[None]:
        """Do nothing: there are no deleted backups."""
        yield


def make_backup(name: str, size: int, parent: str | None) -> Backup:
    """Return a backup that is about to be made."""
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


def load_backup(folder: Path, name: str) -> Backup:
    """Return a backup that was made before."""
    return Backup(**json.loads((folder / f"{name}.json").read_text()))


def make_driver(folder: Path, compress: bool) -> posix.PosixBackupDriver:
    """Return the driver, with all defaults except its folder and the compression."""
    config.CONF([], project="cinder", default_config_files=[])
    config.CONF.set_override("state_path", str(folder))
    config.CONF.set_override("backup_compression_algorithm", "zlib" if compress else "none")
    volume_utils.notify_about_backup_usage = lambda *_, **__: None
    objects.register_all()
    objects.Backup.get_by_id = lambda _, name: load_backup(folder, name)
    made = posix.PosixBackupDriver(context.get_admin_context(), str(folder / "objects"))
    made.db = SimpleNamespace(volume_get=lambda *_: {"size": 1})
    return made


def print_cost(work: Callable[[], object]) -> None:
    """Call `work` and print what it cost."""
    wall, processor = time.monotonic(), time.process_time()
    work()
    wall, processor = time.monotonic() - wall, time.process_time() - processor
    print(wall, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, flush=True)


def run_request(folder: Path, verb: str, name: str, path: str, parent: str | None = None) -> None:
    """Back up or restore, as one line of input asks."""
    # The first, full backup is not measured, and zlib would take minutes for it.
    driver = make_driver(folder, compress=parent is not None)
    if verb == "back-up":
        backup = make_backup(name, Path(path).stat().st_size, parent)
        with open(path, "rb") as volume:
            print_cost(lambda: driver.backup(backup, utils.tpool_wrap(volume), backup_metadata=False))
        (folder / f"{name}.json").write_text(json.dumps(vars(backup)))
    else:
        backup = load_backup(folder, name)
        backup.status = "restoring"
        with open(path, "rb+") as target:
            print_cost(lambda: driver.restore(backup, VOLUME, utils.tpool_wrap(target), True))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for line in sys.stdin:
        run_request(Path(sys.argv[1]), *json.loads(line))
