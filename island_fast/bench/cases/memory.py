"""The peak memory of a snapshot and of a restore of a very large volume."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from island_fast.bench import timing
from island_fast.bench.case import MIB, Case, Context
from island_fast.bench.island_command import Island
from island_fast.bench.report import Counter, Row

__all__ = ["CASES"]

_TIB = 1 << 40
_PLACES = 256
_REACH = 150.0  # MiB


def _measure_memory(context: Context) -> Iterator[Row | Counter]:
    volume = (16 if not context.quick else 1) * _TIB
    image, target = context.scratch / "vol.qcow2", context.scratch / "back.qcow2"
    context.show_progress("making a large, sparse volume")
    timing.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, str(volume)])
    piece = context.scratch / "piece"
    piece.write_bytes(np.random.default_rng(context.seed).bytes(MIB))
    writes = [f"write -q -s {piece} {place * volume // _PLACES} 1M" for place in range(_PLACES)]
    commands = [word for write in writes for word in ("-c", write)]
    timing.run(["qemu-io", "-f", "qcow2", "-t", "unsafe", *commands, image])
    island = Island(context.scratch / "ours")
    name = f"memory of a {{}} of {volume // _TIB} TiB, {_PLACES} MiB of data"
    for work, verb, words in (
        ("first snapshot", "snapshot", (str(image),)),
        ("next snapshot", "snapshot", (str(image),)),
        ("restore", "restore", ("vol@latest", str(target))),
    ):
        context.show_progress(work)
        cost, _ = island(verb, *words)
        yield Counter(name.format(work), cost.memory / MIB, "MiB", reach=_REACH, noise=0.1)


CASES = (Case("memory", _measure_memory, ("qemu-img",), lambda scale: 2 << 30),)
