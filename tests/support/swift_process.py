"""The processes of the tests' Swift: run one of its servers, run a daemon once, or make the rings.

`swift_server.py` starts this as a program. It imports nothing from the tests.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

KINDS = ("account", "container", "object")


def _make_rings(root: Path, nodes: int, replicas: int, ports: Mapping[str, int]) -> None:
    """Make and save rings in which each node has one device, or as many as the replicas need."""
    from swift.common.ring import RingBuilder

    for kind in KINDS:
        builder = RingBuilder(part_power=4, replicas=replicas, min_part_hours=0)
        for number in range(max(nodes, replicas)):
            node, device = number % nodes + 1, f"d{number}"
            (root / f"node{node}" / device).mkdir(parents=True, exist_ok=True)
            address = {"ip": "127.0.0.1", "port": ports[f"{kind}-{node}"]}
            replication = {f"replication_{key}": value for key, value in address.items()}
            place = {"id": number, "region": 1, "zone": number, "device": device, "weight": 1}
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


def _run_once(daemon: str, swift_dir: str, conf: str) -> None:
    """Become a daemon that runs once and ends."""
    from swift.common import constraints, storage_policy, utils

    if utils.set_swift_dir(swift_dir):
        storage_policy.reload_storage_policies()
        constraints.reload_constraints()
    kind, _, task = daemon.partition("-")
    sys.argv = [daemon, conf, "once"]
    module = f"swift.{'obj' if kind == 'object' else kind}.{task}"
    importlib.import_module(module).main()


if __name__ == "__main__":
    if sys.argv[1] == "rings":
        _make_rings(Path(sys.argv[2]), *json.loads(sys.argv[3]))
    elif sys.argv[1] == "once":
        _run_once(*sys.argv[2:])
    else:
        _serve(*sys.argv[2:])
