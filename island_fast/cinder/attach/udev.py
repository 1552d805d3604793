"""Make sure that this host's udev leaves alone what tenants write to attached volumes.

The rule that sees to it is shipped as etc/udev/rules.d/59-island.rules. udev keeps what its rules said of
each device in /run/udev/data (systemd's device-private.c writes it); the rule leaves a property there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from island_fast.errors import IslandError

__all__ = ["RULE", "require_rule"]

RULE = Path(__file__).resolve().parents[2] / "etc/udev/rules.d/59-island.rules"
"""The rule that is shipped."""
_RUN = Path("/run/udev")
_PROPERTY = "E:ISLAND_VOLUME=1"
_PATIENCE = 10.0  # seconds for udev to handle the device's events
_STEP = 0.05  # seconds


def require_rule(device: Path) -> None:
    """Raise IslandError if udev runs on this host and its rules do not know a volume's device for one.

    Where no udev can be seen, there is nothing to ask, and this does nothing.
    """
    if not (_RUN / "control").exists():
        return
    number = os.stat(device).st_rdev
    record = _RUN / "data" / f"b{os.major(number)}:{os.minor(number)}"
    deadline = time.monotonic() + _PATIENCE
    while _PROPERTY not in _read_lines(record):
        if time.monotonic() > deadline:
            raise IslandError(
                "udev on this host reads what tenants write to attached volumes, and makes links to it or "
                f"activates it; copy {RULE} to /etc/udev/rules.d and run 'udevadm control --reload'"
            )
        time.sleep(_STEP)


def _read_lines(record: Path) -> list[str]:
    try:
        return record.read_text(errors="replace").splitlines()
    except OSError:  # no event of the device has been handled yet
        return []
