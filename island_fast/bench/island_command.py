"""Run and measure the command `island` as whole processes, with a separate repository and local state."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from island_fast.bench import timing
from island_fast.bench.timing import Measurement

__all__ = ["Island", "make_child_environment"]


def make_child_environment() -> dict[str, str]:
    """Return variables with which a child process imports the package that this process runs.

    It also writes and uses .pyc files, as an installed package would.
    """
    folder = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""}


@dataclass(slots=True)
class Island:
    """A repository below `folder`, or at `location` if that is given; its local state is below `folder`.

    `compression` is "zstd", "none" or "" for the default.
    """

    folder: Path
    compression: str = ""
    location: str = ""

    def __call__(self, verb: str, *words: str | Path) -> tuple[Measurement, Any]:
        """Run one verb; return its measurement and its JSON answer."""
        variables = make_child_environment() | {
            "ISLAND_REPOSITORY": self.location or str(self.folder / "repository"),
            "ISLAND_STATE": str(self.folder / "state"),
        }
        if self.compression:
            variables["ISLAND_COMPRESSION"] = self.compression
        command = [sys.executable, "-m", "island_fast", verb, *words, "--json"]
        measured = timing.run(command, env=variables)
        return measured, json.loads(measured.output)

    def remove(self) -> None:
        """Remove the local state, and the repository if it is below `folder`."""
        shutil.rmtree(self.folder, ignore_errors=True)
