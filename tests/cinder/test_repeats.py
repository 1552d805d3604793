"""Calls that are made twice, as when the message queue delivers one again."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cinder.services import Services

_HOST = "twice"
_PROGRAM = Path(__file__).with_name("twice.py")


def test_every_call_can_be_repeated(services: Services) -> None:
    region = services.region()
    folder = services.account.folder("twice")
    region.configure(_HOST, services.island(host=_HOST, island_repository=folder))
    said = services.account.call("python", "-c", _PROGRAM.read_text(), region.conf(_HOST), _HOST)
    calls = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
    assert [name for name, *_ in calls][-3:] == ["delete_volume"] * 3
    assert [call for call in calls if call[1] != call[-1]] == []
    records = region.folder / _HOST / "volumes"
    assert [path.name for path in records.iterdir()] == ["owner.json"], "whose folder it is"
