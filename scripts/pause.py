"""Measure how long a guest waits while an internal snapshot of its volume is taken, and while one is dropped.

    scripts/pause.py                     the sizes that the Cinder driver chooses, in ten minutes
    scripts/pause.py --volume 1T --cluster 256k --layout scattered --cache covering --runs 5
    scripts/pause.py --volume 1T --cluster 256k --freed 16384 --discard on off

Every volume is wholly mapped, but its data is a hole in the file, so only tables are read and written. A real
qemu-storage-daemon serves it over NBD to a guest that writes 4 KiB at random places, flushes after every
256th write, and records when each request began and ended. Meanwhile QMP takes and drops snapshots. Each run
starts a new daemon with nothing in memory and has four steps: take a first snapshot; take a second one (as
every day, with a pin in the image); drop the first (as every day); drop the second. The wait is that of the
longest request that overlaps the step. Beside it are the daemon's processor time, reads and writes, which
other load on the machine affects less.

`in order` is a mapping as `qemu-img create -o preallocation=metadata` makes it; `scattered` is the same with
all places shuffled, worse than anything in practice. With `--freed N` the guest zeroes N clusters at random
places between the snapshots, so that dropping the first one frees them; each has 4 KiB of real data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from island_fast.qemu.qmp import Qmp  # noqa: E402 (found in the tree that this file is in)
from island_fast.qemu.sizing import cache_sizes, cluster_size  # noqa: E402

BLOCK = 4096
FLUSH_EVERY = 256
STEPS = ("take first", "take", "drop", "drop last")
_OFFSET = 0x00FF_FFFF_FFFF_FE00  # of a table entry, see docs/interop/qcow2 of qemu


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    volume: int
    cluster: int
    layout: str  # "in order" or "scattered"
    cache: str  # "default" or "covering"
    discard: str  # "on": qemu punches holes for freed clusters; "off": it keeps them in the file
    freed: int = 0  # clusters
    extended: bool = False
    direct: bool = True
    piece: int = 0  # bytes of a table that the L2 cache reads and writes at once; 0: qemu's default

    def name(self) -> str:
        """Return the row's first cells."""
        cluster = size_text(self.cluster) + (" ext" if self.extended else "")
        cache = self.cache + (f" {size_text(self.piece)}" if self.piece else "")
        cells = [size_text(self.volume), cluster, self.layout, cache, f"{self.freed}", self.discard]
        return " | ".join(cells)


@dataclass
class Figures:
    """What one command cost: seconds, and bytes that the daemon read and wrote."""

    wait: float
    command: float
    processor: float
    read: int
    written: int


@dataclass
class Guest:
    """A separate process that writes over NBD, from `start` to `stop`."""

    socket_path: str
    volume: int
    _process: multiprocessing.Process | None = None
    _ours: Connection | None = None
    requests: list[tuple[float, float]] = field(default_factory=list)

    def start(self) -> None:
        """Start the process; return when its first write is done."""
        self._ours, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=write_at_random, args=(self.socket_path, self.volume, theirs)
        )
        self._process.start()
        self._ours.recv()

    def stop(self) -> None:
        """End the process; `requests` then holds the start and end of each request (monotonic clock)."""
        assert self._ours is not None
        assert self._process is not None
        self._ours.send(None)
        self.requests = self._ours.recv()
        self._process.join()

    def usual(self, start: float, end: float) -> tuple[int, float]:
        """Return how many requests began and ended between these times, and their median in seconds."""
        inside = [b - a for a, b in self.requests if a >= start and b <= end]
        return len(inside), statistics.median(inside) if inside else 0.0

    def longest(self, start: float, end: float) -> float:
        """Return the seconds of the longest request of those that were in flight from `start` to `end`."""
        return max((b - a for a, b in self.requests if b >= start and a <= end), default=0.0)


class Nbd:
    """An NBD client with the few requests that a guest needs (NetworkBlockDevice's doc/proto.md)."""

    WRITE, DISCONNECT, FLUSH, ZEROES = 1, 2, 3, 6

    def __init__(self, path: str, export: str = "disk") -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        greeting = self._receive(18)
        assert greeting[:16] == b"NBDMAGICIHAVEOPT", greeting
        option = struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(export))  # fixed newstyle, no zeroes
        self._socket.sendall(option + export.encode())
        self._receive(10)  # the export's size and flags

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        """Send a request without waiting for its reply."""
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 0, offset, length) + data)

    def reply(self) -> None:
        """Wait for one reply; raise OSError if it reports an error."""
        magic, error, _ = struct.unpack(">IIQ", self._receive(16))
        if magic != 0x67446698 or error:
            raise OSError(error, f"NBD reply {magic:#x}, error {error}")

    def close(self) -> None:
        """Disconnect from the server."""
        self.ask(self.DISCONNECT)
        self._socket.close()

    def _receive(self, length: int) -> bytes:
        data = self._socket.recv(length, socket.MSG_WAITALL)
        if len(data) != length:
            raise EOFError("the NBD server closed the connection")
        return data


def write_at_random(path: str, volume: int, pipe: Connection) -> None:
    """Write at random places until the pipe has a message; then send each request's start and end."""
    nbd, chance, requests = Nbd(path), random.Random(1), []
    data = os.urandom(BLOCK)
    while not pipe.poll():
        flush = len(requests) % FLUSH_EVERY == FLUSH_EVERY - 1
        offset = chance.randrange(volume // BLOCK) * BLOCK
        start = time.monotonic()
        nbd.ask(*((Nbd.FLUSH,) if flush else (Nbd.WRITE, offset, BLOCK, data)))
        nbd.reply()
        requests.append((start, time.monotonic()))
        if len(requests) == 1:
            pipe.send(None)
    pipe.send(requests)
    nbd.close()


def zero_clusters(path: str, clusters: np.ndarray[Any, Any], size: int) -> None:
    """Zero whole clusters of the volume, 16 at a time, so that it no longer needs the data clusters."""
    nbd, in_flight = Nbd(path), 0
    for number in clusters.tolist():
        nbd.ask(Nbd.ZEROES, number * size, size)
        in_flight += 1
        if in_flight == 16:
            nbd.reply()
            in_flight -= 1
    for _ in range(in_flight):
        nbd.reply()
    nbd.close()


def create(path: Path, case: Case) -> None:
    """Create a wholly mapped image without data."""
    options = f"preallocation=metadata,lazy_refcounts=on,cluster_size={case.cluster}"
    options += ",extended_l2=on" if case.extended else ""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, f"{path}", f"{case.volume}"]
    subprocess.run(command, check=True)
    if case.layout == "scattered" or case.extended:
        change_places(path, case, shuffled=case.layout == "scattered")


def change_places(path: Path, case: Case, shuffled: bool = True) -> np.ndarray[Any, Any]:
    """Shuffle the places of the volume's clusters in the file; return the new places, in guest order.

    Every cluster keeps exactly one reference, so the reference counts stay right. qemu leaves the subclusters
    of extended entries unallocated; here all become data, or a write would have nothing to copy.
    """
    words = 2 if case.extended else 1
    per_table = case.cluster // 8 // words
    with path.open("r+b") as file:
        header = struct.unpack(">4sIQIIQIIQ", file.read(48))
        l1_size, l1_offset = header[7], header[8]
        file.seek(l1_offset)
        l1 = np.frombuffer(file.read(8 * l1_size), ">u8").astype(np.uint64) & np.uint64(_OFFSET)
        tables = np.zeros((l1_size, per_table, words), ">u8")
        for row, offset in enumerate(l1.tolist()):
            if offset:
                file.seek(offset)
                tables[row] = np.frombuffer(file.read(case.cluster), ">u8").reshape(per_table, words)
        mapped = tables[:, :, 0] != 0
        places = tables[:, :, 0][mapped]
        tables[:, :, 1:][mapped] = 0xFFFF_FFFF
        if shuffled:
            np.random.default_rng(1).shuffle(places)
            tables[:, :, 0][mapped] = places
        for row, offset in enumerate(l1.tolist() if shuffled or case.extended else []):
            if offset:
                file.seek(offset)
                file.write(tables[row].tobytes())
    return places.astype(np.uint64) & np.uint64(_OFFSET)


def write_data(path: Path, places: np.ndarray[Any, Any]) -> None:
    """Write 4 KiB into each of these clusters of the file."""
    with path.open("r+b") as file:
        for place in np.sort(places).tolist():
            os.pwrite(file.fileno(), b"d" * BLOCK, place)


def drop_from_cache(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@contextmanager
def serve(path: Path, case: Case, folder: Path) -> Iterator[int]:
    """Serve the image while the body runs; yield the daemon's process id."""
    node = {
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "pass-discard-snapshot": case.discard == "on",
        "file": {
            "driver": "file",
            "filename": f"{path}",
            "discard": "unmap",
            "cache": {"direct": case.direct},
        },
        "cache": {"direct": case.direct},
    }
    if case.cache == "covering":
        caches = cache_sizes(case.volume, case.cluster)
        # 16 bytes an entry, not 8
        node |= {"l2-cache-size": caches.l2 * (1 + case.extended), "refcount-cache-size": caches.refcount}
    if case.piece:
        node["l2-cache-entry-size"] = min(case.piece, case.cluster)
    command = ["qemu-storage-daemon", "--blockdev", json.dumps(node)]
    command += ["--nbd-server", f"addr.type=unix,addr.path={folder}/nbd"]
    command += ["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"]
    command += ["--chardev", f"socket,path={folder}/qmp,server=on,wait=off,id=m", "--monitor", "chardev=m"]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "qmp").exists():
            assert process.poll() is None, "the daemon did not start"
            assert time.monotonic() < deadline, "the daemon does not listen"
            time.sleep(0.05)
        time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()
        for name in ("qmp", "nbd"):
            (folder / name).unlink(missing_ok=True)


def usage(pid: int) -> tuple[float, int, int]:
    """Return the processor seconds of a process, and the bytes that it read and wrote, so far."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    io = dict(re.findall(r"(\w+): (\d+)", Path(f"/proc/{pid}/io").read_text()))
    ticks = int(stat[11]) + int(stat[12])
    return ticks / os.sysconf("SC_CLK_TCK"), int(io["rchar"]), int(io["wchar"])


def peak_memory(pid: int) -> int:
    """Return the most memory that a process has used, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found.group(1)) << 10 if found else 0


def run(path: Path, case: Case, folder: Path, lost: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Take and drop two snapshots of a volume in use; return what each step and a write cost."""
    drop_from_cache(path)
    timed: dict[str, tuple[float, float, tuple[float, ...]]] = {}
    with serve(path, case, folder) as pid, Qmp(folder / "qmp") as qmp:
        guest = Guest(f"{folder}/nbd", case.volume)
        guest.start()

        def step(name: str, snapshot: str) -> None:
            time.sleep(0.5)
            before, start = usage(pid), time.monotonic()
            if name.startswith("take"):
                qmp.snapshot_create("disk", snapshot)
            else:
                qmp.snapshot_delete("disk", "1" if snapshot == "first" else "2", snapshot)
            end = time.monotonic()
            timed[name] = start, end, tuple(b - a for a, b in zip(before, usage(pid), strict=True))

        step("take first", "first")
        after, start = usage(pid), time.monotonic()
        time.sleep(1)
        copied, end = usage(pid)[2] - after[2], time.monotonic()
        if len(lost):
            zero_clusters(f"{folder}/nbd", lost, case.cluster)
        step("take", "second")
        step("drop", "first")
        step("drop last", "second")
        guest.stop()
        memory = peak_memory(pid)
    writes, copying = guest.usual(start, end)
    steps = {name: vars(figures(guest, *found)) for name, found in timed.items()}
    plain = guest.usual(0, timed["take first"][0])[1]
    each = copied / max(1, writes)
    return {"steps": steps, "memory": memory, "plain": plain, "copying": copying, "written": each}


def figures(guest: Guest, start: float, end: float, cost: tuple[float, ...]) -> Figures:
    """Return what one step cost."""
    return Figures(guest.longest(start, end), end - start, cost[0], int(cost[1]), int(cost[2]))


def measure(case: Case, runs: int, folder: Path) -> list[dict[str, Any]]:
    """Run a case `runs` times, print its row, and return all figures."""
    path, results = folder / "image.qcow2", []
    chance = np.random.default_rng(2)
    total = case.volume // case.cluster
    create(path, case)
    for number in range(runs):
        lost = np.empty(0, np.int64)
        if case.freed:
            if number:
                path.unlink()
                create(path, case)
            lost = np.sort(chance.choice(total, min(case.freed, total), replace=False))
            write_data(path, change_places(path, case, shuffled=False)[lost])
        load = os.getloadavg()[0]
        results.append({"case": vars(case), "load": load, **run(path, case, folder, lost)})
    path.unlink()
    print(row(case, results), flush=True)
    return results


def row(case: Case, results: list[dict[str, Any]]) -> str:
    """Return a row of the table: of each step the wait, median and worst, processor time, and MiB."""
    cells = [case.name()]
    for name in STEPS:
        waits = [found["steps"][name]["wait"] for found in results]
        processor = statistics.median(found["steps"][name]["processor"] for found in results)
        moved = [
            statistics.median(found["steps"][name][kind] for found in results) / 2**20
            for kind in ("read", "written")
        ]
        times = f"{statistics.median(waits):.2f} / {max(waits):.2f}"
        cells.append(f"{times} ({processor:.2f}; {moved[0]:.0f}, {moved[1]:.0f})")
    plain, copying, written = (
        statistics.median(found[key] for found in results) for key in ("plain", "copying", "written")
    )
    cells.append(f"{1e3 * plain:.2f}, {1e3 * copying:.2f} ({written / 1024:.0f})")
    cells.append(f"{max(found['memory'] for found in results) / 2**20:.0f}")
    load = [found["load"] for found in results]
    return "| " + " | ".join([*cells, f"{len(results)}", f"{min(load):.1f}-{max(load):.1f}"]) + " |"


LEGEND = """A step: median / worst wait, s (processor s; MiB read, MiB written).
A write: median ms without a snapshot, ms in the second after one (KiB that each made the daemon write)."""
HEADER = (
    "| volume | cluster | mapping | caches | freed | punched | "
    + " | ".join(STEPS)
    + " | write ms | memory MiB | runs | load |\n|"
    + "---|" * 14
)


def flush_times(folder: Path) -> str:
    """Measure how long it takes to write and flush 4 KiB on this disk; return median and worst of 200."""
    times = []
    fd = os.open(folder / "flushed", os.O_RDWR | os.O_CREAT)
    for number in range(200):
        os.pwrite(fd, b"f" * BLOCK, number * BLOCK)
        start = time.monotonic()
        os.fdatasync(fd)
        times.append(1000 * (time.monotonic() - start))
    os.close(fd)
    return f"fdatasync of 4 KiB: median {statistics.median(times):.2f} ms, worst of 200 {max(times):.2f} ms"


def size_bytes(text: str) -> int:
    """Read a size such as 64k or 1T."""
    units = {"k": 10, "m": 20, "g": 30, "t": 40}
    unit = units.get(text[-1].lower())
    return int(text) if unit is None else int(text[:-1]) << unit


def size_text(size: int) -> str:
    """Write a size in the biggest unit that divides it."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} B"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield every combination of the options."""
    for volume in options.volume:
        rest = (options.layout, options.cache, options.discard, options.freed, options.piece)
        for cluster in options.cluster or [cluster_size(volume)]:
            for layout, cache, discard, freed, piece in itertools.product(*rest):
                ways = options.extended, not options.cached, piece
                yield Case(volume, cluster, layout, cache, discard, freed, *ways)


def main() -> int:
    """Measure the cases that the command line selects."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sizes = [10 << 30, 100 << 30, 1 << 40]
    parser.add_argument(
        "--volume",
        type=size_bytes,
        nargs="+",
        default=sizes,
        help="sizes of the volumes [default: 10G 100G 1T]",
    )
    parser.add_argument(
        "--cluster", type=size_bytes, nargs="+", help="cluster sizes [default: as the driver chooses]"
    )
    parser.add_argument("--layout", nargs="+", default=["in order", "scattered"], help="[default: both]")
    parser.add_argument(
        "--cache",
        nargs="+",
        default=["covering"],
        help="default or covering (all tables) [default: covering]",
    )
    parser.add_argument(
        "--freed", type=int, nargs="+", default=[0], help="clusters that the guest zeroes between snapshots"
    )
    parser.add_argument(
        "--discard",
        nargs="+",
        default=["off"],
        help="on or off: punch holes for freed clusters [default: off]",
    )
    parser.add_argument("--piece", type=size_bytes, nargs="+", default=[0], help="qemu's l2-cache-entry-size")
    parser.add_argument("--extended", action="store_true", help="use extended L2 entries")
    parser.add_argument("--cached", action="store_true", help="use the page cache, not O_DIRECT")
    parser.add_argument("--runs", type=int, default=5, help="runs of each case [default: 5]")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where images are made"
    )
    parser.add_argument("--json", type=Path, help="append all figures to this file, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pause-", dir=options.folder) as name:
        folder = Path(name)
        print(f"{flush_times(folder)}\n\n{LEGEND}\n\n{HEADER}", flush=True)
        for case in cases(options):
            for result in measure(case, options.runs, folder):
                if options.json:
                    with options.json.open("a") as log:
                        log.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
