"""The command `island` on one repository, as a process for each call.

Its answers are those of the command line with --json; its errors become the same classes of the one tree
again. Credentials go by the environment, never as arguments.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from island_fast import errors
from island_fast.cinder.child import run_child
from island_fast.cinder.records import Origin
from island_fast.errors import IslandError, NotFoundError

__all__ = ["Commands"]

_LOG = logging.getLogger(__name__)
_TELL_EVERY = 30.0  # seconds between two lines of progress in the log
_OURS = ("OS_", "ST_", "ISLAND_")  # the settings of whoever started the service say nothing to the command


@dataclass(frozen=True, slots=True)
class Commands:
    """One repository, as the command `island` is told of it.

    `name` is "" for one's own repository. `environment` holds the credentials and ISLAND_STATE; of this
    process's own a command gets the rest.
    """

    url: str
    environment: Mapping[str, str] = field(repr=False)
    name: str = ""

    def snapshot(
        self, image: Path, lineage: str, label: str, qmp: Path, cancelled: Callable[[], bool]
    ) -> Origin:
        """Take a snapshot of an image that the process behind `qmp` has open."""
        words = [image, "--volume", lineage, "--label", label, "--qmp", qmp]
        answer = self._run("snapshot", *words, cancelled=cancelled)
        for note in answer["notes"]:
            _LOG.warning("snapshot %s: %s", answer["snapshot"], note)
        _LOG.info(
            "snapshot %s of volume %s: %s (%s), %d of %d blocks changed, %d B read, %d B stored in %.1f s",
            *(answer[key] for key in ("snapshot", "lineage", "rule", "reason", "blocks_changed")),
            *(answer[key] for key in ("blocks_candidate", "bytes_read", "bytes_stored", "seconds")),
        )
        return Origin(answer["lineage"], answer["snapshot"], self.name)

    def restore(self, origin: Origin, target: Path, *, pin: bool) -> None:
        """Write a snapshot's volume to the new file `target`."""
        answer = self._run("restore", origin.reference, target, *([] if pin else ["--no-pin"]))
        _LOG.info(
            "restored snapshot %s: %d B read, %d B written in %.1f s",
            *(answer[key] for key in ("snapshot", "bytes_read", "bytes_written", "seconds")),
        )

    def delete(self, origin: Origin) -> None:
        """Delete a snapshot; nothing happens if it is not there."""
        try:
            self._run("delete", origin.reference)
        except NotFoundError as error:
            _LOG.info("nothing to delete: %s", error)

    def size(self, origin: Origin) -> int:
        """The size of a snapshot's volume, in bytes; NotFoundError if the snapshot is not there."""
        return int(self._run("show", origin.reference)["volume_size"])

    def listed(self, lineage: str | None = None) -> list[dict[str, Any]]:
        """The snapshots of a lineage, or of all, as `island list --json` tells them; none where it is not."""
        try:
            return list(self._run("list", *(["--volume", lineage] if lineage else [])))
        except NotFoundError:
            return []

    def labelled(self, lineage: str, label: str) -> list[Origin]:
        """The snapshots of a lineage that have this label."""
        rows = [row for row in self.listed(lineage) if row["label"] == label]
        return [Origin(row["lineage"], row["snapshot"], self.name) for row in rows]

    def adopt(self, lineage: str) -> None:
        """Make this host the owner of a lineage; nothing happens if it has no catalog yet."""
        try:
            self._run("adopt", lineage)
        except NotFoundError as error:
            _LOG.info("nothing to adopt: %s", error)

    def unpin(self, image: Path, qmp: Path, *, orphans: bool) -> int:
        """Drop an image's pins, or only the orphans among them; how many."""
        return len(self._run("unpin", image, "--qmp", qmp, *(["--orphans"] if orphans else []))["pins"])

    def sweep(self) -> None:
        """Remove what no snapshot needs any more, from every lineage that this host owns."""
        for one in self._run("sweep"):
            if one["steps"]:
                _LOG.info(
                    "swept volume %s: %d objects removed, %d B freed",
                    *(one[key] for key in ("volume", "objects_removed", "bytes_freed")),
                )

    def _run(self, verb: str, *words: object, cancelled: Callable[[], bool] = lambda: False) -> Any:  # noqa: ANN401
        """The answer of `island VERB --json`, or the error that it ended with."""
        command = [sys.executable, "-m", "island_fast", verb, *map(str, words), "--json", "--json-progress"]
        told = _Told(" ".join([verb, *map(str, words[:1])]))
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)}
        env = inherited | {"ISLAND_CONFIG": os.devnull, "ISLAND_REPOSITORY": self.url, **self.environment}
        try:
            done = run_child(command, env, told, cancelled)
        except OSError as error:
            raise IslandError(f"'island {verb}' did not start: {error}") from error
        answer = _decoded(done.stdout)
        if done.returncode:
            raise _error(verb, answer, done.returncode, told.last)
        return answer


class _Told:
    """Logs what a process says: its progress now and then, all else at once."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._logged = time.monotonic()
        self.last = ""

    def __call__(self, line: str) -> None:
        progress = _decoded(line) if line.startswith("{") else None
        if not isinstance(progress, dict):
            self.last = line
            _LOG.warning("%s: %s", self._what, line.removeprefix("island: "))
        elif time.monotonic() - self._logged >= _TELL_EVERY:
            self._logged = time.monotonic()
            _LOG.info("%s: %s, %s of %s B", self._what, *map(progress.get, ("phase", "done", "total")))


def _decoded(text: str) -> Any:  # noqa: ANN401 (whatever the text says)
    try:
        return json.loads(text)
    except ValueError:
        return None


_KINDS = {
    re.sub(r"(?<=.)(?=[A-Z])", "-", name.removesuffix("Error")).lower(): getattr(errors, name)
    for name in errors.__all__
    if name.endswith("Error")
}


def _error(verb: str, answer: object, status: int, last: str) -> IslandError:
    """The error that the process told, as the class that it was there."""
    if isinstance(answer, dict) and isinstance(answer.get("message"), str):
        kind = _KINDS.get(str(answer.get("error")), IslandError)
        error: IslandError = kind(answer["message"])
        return error
    return IslandError(f"'island {verb}' ended with status {status}{': ' if last else ''}{last}")
