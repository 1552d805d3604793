"""The answer of every verb in JSON, as programs read it: tests/cli/golden.json.

What differs from run to run is a name there, such as <id 1> or <time>. GOLDEN_WRITE=1 writes the file anew:
any change of it is one that users' programs notice.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from island_fast.cli.main import island as command
from tests.cli.conftest import MIB, Island
from tests.support import qemu

GOLDEN = Path(__file__).with_name("golden.json")
UNSTEADY = {  # as manifests have ids and times in them, file systems their own mind, and samples are drawn
    *("bytes", "bytes_freed", "bytes_read", "bytes_removed", "bytes_rewritten", "bytes_stored"),
    *("blocks_sampled", "bytes_unreferenced", "file_size", "size"),
}
APART = {"completion"}  # which answers with a script

pytestmark = qemu.needs_qemu


class Steady:
    """Takes what differs from run to run out of answers: ids become numbers in the order of their coming."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._ids: dict[str, str] = {}

    def of(self, value: Any, key: str = "") -> Any:
        """The same with names for what is not steady."""
        if isinstance(value, dict):
            return {name: self.of(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [self.of(one, key) for one in value]
        if isinstance(value, str):
            value = value.replace(self._folder, "<folder>")
            value = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "<time>", value)
            return re.sub("[0-9a-f]{8,}", lambda found: self._name(found[0]), value)
        if isinstance(value, float) or (key in UNSTEADY and value):
            return f"<{type(value).__name__}>"
        return value

    def _name(self, found: str) -> str:
        return self._ids.setdefault(found, f"<id {len(self._ids) + 1}>")


def answers(island: Island, folder: Path) -> dict[str, Any]:
    """What each verb answers in the life of one volume."""
    disk, back, far = folder / "disk.qcow2", folder / "back.qcow2", folder / "far"
    qemu.create(disk, 4 * MIB)
    qemu.noise(disk, 0, MIB)
    told = {"snapshot": island.json("snapshot", disk, "--label", "one")}
    qemu.noise(disk, 0, 2 << 16)
    told["snapshot, the second"] = island.json("snapshot", disk)
    told["info"] = island.json("info", disk)
    told["map"] = island.json("map", disk)
    told["list"] = island.json("list")
    told["show"] = island.json("show", "disk@latest")
    told["diff"] = island.json("diff", told["list"][0]["snapshot"], "disk@latest")
    told["usage"] = island.json("usage")
    told["verify"] = island.json("verify", "--all")
    told["verify --against"] = island.json("verify", "disk@latest", "--against", disk)
    told["copy"] = island.json("copy", "--all", "--to", far)
    told["restore"] = island.json("restore", "disk@latest", back)
    qemu.noise(back, 0, 1 << 16)
    told["restore --onto --dry-run"] = island.json("restore", "disk@latest", "--onto", back, "--dry-run")
    told["restore --onto"] = island.json("restore", "disk@latest", "--onto", back)
    told["retain --dry-run"] = island.json("retain", "--keep-last", 1, "--dry-run")
    told["keep"] = island.json("keep", "disk@latest")
    told["keep --release"] = island.json("keep", "disk@latest", "--release")
    told["delete --dry-run"] = island.json("delete", "disk@latest", "--dry-run")
    told["delete"] = island.json("delete", told["list"][0]["snapshot"])
    told["sweep --dry-run"] = island.json("sweep", "--dry-run")
    told["sweep"] = island.json("sweep")
    told["adopt"] = island.json("adopt", "disk")
    told["unpin"] = island.json("unpin", disk)
    return told


def test_every_verb_answers_as_it_did(island: Island, tmp_path: Path) -> None:
    told = answers(island, tmp_path)
    found = Steady(tmp_path).of(told)
    if os.environ.get("GOLDEN_WRITE"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())
    assert {name.partition(" ")[0].rstrip(",") for name in told} == {*command.commands} - APART
