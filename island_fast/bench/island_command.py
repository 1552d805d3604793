"""The command `island` as it is measured: whole processes, with a repository and local state of their own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from island_fast.bench import timing
from island_fast.bench.timing import Measured

__all__ = ["Island", "environment"]


def environment() -> dict[str, str]:
    """Variables with which Python imports the package that this process runs, compiled as if installed."""
    place = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [place, os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""}


@dataclass(slots=True)
class Island:
    """A repository below `folder`, or where `location` says, with local state below `folder`.

    `compression` is "zstd", "none" or "" for the default.
    """

    folder: Path
    compression: str = ""
    location: str = ""

    def __call__(self, verb: str, *words: str | Path) -> tuple[Measured, Any]:
        """Run one verb; what it cost and what it answered."""
        variables = environment() | {
            "ISLAND_REPOSITORY": self.location or str(self.folder / "repository"),
            "ISLAND_STATE": str(self.folder / "state"),
        }
        if self.compression:
            variables["ISLAND_COMPRESSION"] = self.compression
        command = [sys.executable, "-m", "island_fast", verb, *words, "--json"]
        measured = timing.run(command, env=variables)
        return measured, json.loads(measured.output)

    def forget(self) -> None:
        """Remove the repository in its directory, and the local state."""
        shutil.rmtree(self.folder, ignore_errors=True)
