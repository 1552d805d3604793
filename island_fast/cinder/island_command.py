"""The command `island` on one repository, one process for each call.

It reads the answer of the command line's --json, and turns an error back into the class that it had in the
process. Credentials are passed through a pipe, so that neither arguments nor the environment in /proc shows
them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from island_fast import errors
from island_fast.cinder.child_process import run_child
from island_fast.cinder.records import SnapshotRef
from island_fast.errors import ConflictError, IslandError, NotFoundError

__all__ = ["IslandCommand"]

_LOG = logging.getLogger(__name__)
_PROGRESS_EVERY = 30.0  # seconds between two lines of progress in the log
_SETTINGS = ("OS_", "ST_", "ISLAND_")  # those of the service's own environment are not passed on
_ERROR_CLASSES = {  # by the codes of --json: "image-in-use" for ImageInUseError
    re.sub(r"(?<=.)(?=[A-Z])", "-", name.removesuffix("Error")).lower(): getattr(errors, name)
    for name in errors.__all__
    if name.endswith("Error")
}


@dataclass(frozen=True, slots=True)
class IslandCommand:
    """Runs `island` on one repository.

    `name` is "" for the host's own repository. `environment` holds the credentials and ISLAND_STATE; the rest
    of a command's environment is this process's own.
    """

    url: str
    environment: Mapping[str, str] = field(repr=False)
    name: str = ""

    def snapshot(
        self, image: Path, lineage: str, label: str, qmp: Path, cancelled: Callable[[], bool]
    ) -> SnapshotRef:
        """Take a snapshot of an image that the process at the socket `qmp` has open."""
        words = [image, "--volume", lineage, "--label", label, "--qmp", qmp]
        answer = self._run("snapshot", *words, cancelled=cancelled)
        for note in answer["notes"]:
            _LOG.warning("snapshot %s: %s", answer["snapshot"], note)
        _LOG.info(
            "snapshot %s of volume %s: %s (%s), %d of %d blocks changed, %d B read, %d B stored in %.1f s",
            *(answer[key] for key in ("snapshot", "lineage", "rule", "reason", "blocks_changed")),
            *(answer[key] for key in ("blocks_candidate", "bytes_read", "bytes_stored", "seconds")),
        )
        return SnapshotRef(answer["lineage"], answer["snapshot"], self.name)

    def restore(self, snapshot: SnapshotRef, target: Path, *, pin: bool) -> None:
        """Write a snapshot's volume to the new file `target`."""
        answer = self._run("restore", snapshot.reference, target, *([] if pin else ["--no-pin"]))
        _LOG.info(
            "restored snapshot %s: %d B read, %d B written in %.1f s",
            *(answer[key] for key in ("snapshot", "bytes_read", "bytes_written", "seconds")),
        )

    def delete(self, snapshot: SnapshotRef) -> None:
        """Delete a snapshot; do nothing if it does not exist."""
        try:
            self._run("delete", snapshot.reference)
        except NotFoundError as error:
            _LOG.info("nothing to delete: %s", error)

    def volume_size(self, snapshot: SnapshotRef) -> int:
        """Return the size of a snapshot's volume in bytes; raise NotFoundError if it does not exist."""
        return int(self._run("show", snapshot.reference)["volume_size"])

    def list_snapshots(self, lineage: str | None = None) -> list[dict[str, Any]]:
        """Return the snapshots of one lineage, or of all, as `island list --json` shows them.

        The list is empty if the lineage or the repository does not exist.
        """
        try:
            return list(self._run("list", *(["--volume", lineage] if lineage else [])))
        except NotFoundError:
            return []

    def require_stored(self, snapshot: SnapshotRef) -> None:
        """Raise an IslandError unless the store has everything that another host needs of a snapshot.

        It is looked for with an empty local state, as by that other host: the records of the catalog and the
        manifest are read from the store, and every pack must be there with its size.
        """
        with tempfile.TemporaryDirectory(prefix="island-check-") as state:
            stranger = replace(self, environment={**self.environment, "ISLAND_STATE": state})
            stranger._run("verify", snapshot.reference)

    def find_by_label(self, lineage: str, label: str) -> list[SnapshotRef]:
        """Return the snapshots of a lineage that have this label."""
        rows = [row for row in self.list_snapshots(lineage) if row["label"] == label]
        return [SnapshotRef(row["lineage"], row["snapshot"], self.name) for row in rows]

    def adopt(self, lineage: str) -> None:
        """Make this host the owner of a lineage; do nothing if the lineage has no catalog yet."""
        try:
            self._run("adopt", lineage)
        except NotFoundError as error:
            _LOG.info("nothing to adopt: %s", error)

    def unpin(self, image: Path, qmp: Path, *, orphans: bool) -> int:
        """Drop an image's pins, or only the orphans among them, and return their number."""
        return len(self._run("unpin", image, "--qmp", qmp, *(["--orphans"] if orphans else []))["pins"])

    def sweep(self) -> None:
        """Remove what no snapshot needs any more from every lineage that this host owns; it can be none."""
        try:
            swept = self._run("sweep")
        except ConflictError as error:
            _LOG.info("nothing to sweep: %s", error)
            return
        for one in swept:
            if one["objects_removed"]:
                _LOG.info(
                    "swept volume %s: %d objects removed, %d B freed",
                    *(one[key] for key in ("volume", "objects_removed", "bytes_freed")),
                )
            if one["objects_unknown"]:
                _LOG.warning(
                    "volume %s: kept %d objects (%d B) that no record names and this host did not store; see "
                    "them with 'island sweep --dry-run', remove them with 'island sweep --unknown'",
                    *(one[key] for key in ("volume", "objects_unknown", "bytes_unknown")),
                )

    def _run(self, verb: str, *words: object, cancelled: Callable[[], bool] = lambda: False) -> Any:  # noqa: ANN401
        """Run `island VERB --json` and return its answer, or raise the error that it ended with."""
        command = [sys.executable, "-m", "island_fast", verb, *map(str, words), "--json", "--json-progress"]
        log = _StderrLog(" ".join([verb, *map(str, words[:1])]))
        env = {key: value for key, value in os.environ.items() if not key.startswith(_SETTINGS)}
        env["ISLAND_ENVIRONMENT"] = "stdin"
        settings = {"ISLAND_CONFIG": os.devnull, "ISLAND_REPOSITORY": self.url, **self.environment}
        try:
            done = run_child(command, env, log, cancelled, json.dumps(settings).encode())
        except OSError as error:
            raise IslandError(f"'island {verb}' did not start: {error}") from error
        answer = _parse_json(done.stdout)
        if not done.returncode:
            return answer
        if isinstance(answer, dict) and isinstance(answer.get("message"), str):
            raise _ERROR_CLASSES.get(str(answer.get("error")), IslandError)(answer["message"])
        last = f": {log.last_line}" if log.last_line else ""
        raise IslandError(f"'island {verb}' ended with status {done.returncode}{last}")


class _StderrLog:
    """Logs each line of a process's standard error: progress every 30 s, everything else at once."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._logged = time.monotonic()
        self.last_line = ""

    def __call__(self, line: str) -> None:
        progress = _parse_json(line) if line.startswith("{") else None
        if not isinstance(progress, dict):
            self.last_line = line
            _LOG.warning("%s: %s", self._task, line.removeprefix("island: "))
        elif time.monotonic() - self._logged >= _PROGRESS_EVERY:
            self._logged = time.monotonic()
            _LOG.info("%s: %s, %s of %s B", self._task, *map(progress.get, ("phase", "done", "total")))


def _parse_json(text: str) -> Any:  # noqa: ANN401 (whatever the text holds)
    """Return the value of a JSON text, or None if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None
