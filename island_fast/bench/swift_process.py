"""The processes of the bench's Swift: run one of its servers, or make its rings.

`swift.py` starts this as a program. It imports nothing that servers do not need.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "make_cache_filter"]

KINDS = ("account", "container", "object")

Opaque = Any
"""Whatever is only passed on."""


def _make_rings(root: Path, ports: Mapping[str, int]) -> None:
    """Make and save the rings, each with one device."""
    from swift.common.ring import RingBuilder

    (root / "node" / "d0").mkdir(parents=True)
    for kind in KINDS:
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
        address = {"ip": "127.0.0.1", "port": ports[kind]}
        replication = {f"replication_{key}": value for key, value in address.items()}
        place = {"id": 0, "region": 1, "zone": 0, "device": "d0", "weight": 1}
        builder.add_dev({**place, **address, **replication})
        builder.rebalance()
        builder.get_ring().save(str(root / f"{kind}.ring.gz"))


def _serve(kind: str, conf: str) -> None:
    """Become one server. It ends when the process that started it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    sys.argv = [kind, conf]
    module = {"object": "swift.obj.server"}.get(kind, f"swift.{kind}.server")
    sys.exit(importlib.import_module(module).main())


class _Cache:
    """A WSGI filter that the proxy uses instead of memcached. That works because there is only one proxy."""

    def __init__(self, app: Opaque) -> None:
        self.app = app
        self._kept: dict[str, tuple[str, float]] = {}

    def __call__(self, env: dict[str, Opaque], start: Opaque) -> Opaque:
        env["swift.cache"] = self
        return self.app(env, start)

    def get(self, key: str, **_: Opaque) -> Opaque:
        """Return the value of a key; None if there is none or its time is over."""
        value, end = self._kept.get(key, ("null", 0.0))
        return json.loads(value) if end > time.monotonic() else None

    def set(self, key: str, value: Opaque, *_: Opaque, time: float = 0, **__: Opaque) -> None:
        """Keep a value for `time` seconds, or for a day."""
        self._kept[key] = json.dumps(value), _now() + (time or 86400)

    def delete(self, key: str, **_: Opaque) -> None:
        """Forget a value."""
        self._kept.pop(key, None)


_now = time.monotonic


def make_cache_filter(_global_conf: Mapping[str, str], **_local_conf: str) -> Callable[[Opaque], _Cache]:
    """Return the filter's factory; paste calls this."""
    return _Cache


if __name__ == "__main__":
    if sys.argv[1] == "rings":
        _make_rings(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        _serve(*sys.argv[2:])
