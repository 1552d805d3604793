"""The peers of the bench: which program is one and of which version, and the servers that some need."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from island_fast.bench.case import MIB, Scale, Size
from island_fast.bench.cases import archivers
from island_fast.bench.peers import all_peers
from island_fast.bench.peers.all_peers import PEERS, Found
from island_fast.bench.runner import Plan, measure
from island_fast.bench.slow_link import slow_link
from island_fast.bench.swift import run_swift, use_account
from island_fast.stores.swift import SwiftStore

TINY = Scale(Size(16 * MIB, 8 * MIB, 1), None)
LINES = {
    "restic": "restic 0.19.1 compiled with go1.26.4 on linux/amd64",
    "restic-old": "restic 0.14.0 compiled with go1.19.8 on linux/amd64",
    "borg": "borg 1.4.5",
    "borg-old": "borg 1.2.4",
    "borg2": "borg2 2.0.0b25",
    "borg2-by-pip": "borg 2.0.0b23",
    "qemu-img": "qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022",
    "fio": "fio-3.33",
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return two empty folders for programs: that of scripts/peers.py, and the only one in PATH."""
    ours, path = tmp_path / "build", tmp_path / "path"
    ours.mkdir()
    path.mkdir()
    monkeypatch.setattr(all_peers, "PROGRAMS", ours)
    monkeypatch.setenv("PATH", str(path))
    return ours, path


def put(folder: Path, name: str, line: str) -> str:
    """Put a program into a folder that prints this line, and return its path."""
    file = folder / name
    file.write_text(f"#!/bin/sh\nprintf '%s\\n' '{line}'\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    "peer, program, line, version",
    [
        ("restic", "restic", "restic", "0.19.1"),
        ("restic", "restic", "restic-old", "0.14.0"),
        ("borg", "borg", "borg", "1.4.5"),
        ("borg", "borg", "borg-old", "1.2.4"),
        ("borg2", "borg2", "borg2", "2.0.0b25"),
        ("borg2", "borg", "borg2-by-pip", "2.0.0b23"),
        ("qemu-img", "qemu-img", "qemu-img", "7.2.22"),
        ("fio", "fio", "fio", "3.33"),
    ],
)
def test_a_version_is_what_the_program_says(
    folders: tuple[Path, Path], peer: str, program: str, line: str, version: str
) -> None:
    assert PEERS[peer].find() is None
    path = put(folders[1], program, LINES[line])
    assert PEERS[peer].find() == Found(version, path)


@pytest.mark.parametrize("beta, good", [("b2", 0), ("b19", 0), ("b22", 0), ("b23", 1), ("b30", 1), ("", 1)])
def test_betas_of_borg_2_that_the_bench_cannot_run_are_not_taken(
    folders: tuple[Path, Path], beta: str, good: int
) -> None:
    put(folders[1], "borg2", f"borg2 2.0.0{beta}")
    assert bool(PEERS["borg2"].find()) is bool(good)


def test_borg_1_and_borg_2_are_not_taken_for_each_other(folders: tuple[Path, Path]) -> None:
    ours, path = folders
    put(path, "borg", LINES["borg2-by-pip"])
    assert PEERS["borg"].find() is None
    first = put(ours, "borg", LINES["borg"])
    found = PEERS["borg2"].find()
    assert PEERS["borg"].find() == Found("1.4.5", first)
    assert found
    assert found.version == "2.0.0b23"


def test_what_the_project_has_unpacked_goes_before_what_is_installed(folders: tuple[Path, Path]) -> None:
    ours, path = folders
    put(path, "restic", LINES["restic-old"])
    newest = put(ours, "restic", LINES["restic"])
    assert PEERS["restic"].find() == Found("0.19.1", newest)
    Path(newest).write_text("#!/no/such/interpreter\n")
    found = PEERS["restic"].find()
    assert found
    assert found.version == "0.14.0", "what does not run here is not taken"


@pytest.fixture
def echo() -> Iterator[int]:
    """Serve connections that send everything back once the client has ended; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    data = b"".join(iter(lambda: connection.recv(1 << 20), b""))  # noqa: B023
                    connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_slow_link_passes_on_every_byte_and_the_end_but_not_at_once(echo: int) -> None:
    data = bytes(range(256)) * (80 << 12)  # more than it holds
    with slow_link(echo, 0.2) as port:
        for sent in (b"one byte", data):
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", port)) as client:
                threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(1))).start()  # noqa: B023
                got = b"".join(iter(lambda: client.recv(1 << 20), b""))
            assert got == sent
            assert time.monotonic() - began >= 0.4, "setting up and asking are a round trip each"


def test_a_slow_link_to_nothing_ends_the_connection(echo: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nothing = free.getsockname()[1]
    with slow_link(nothing, 0) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(60)
        assert client.recv(1) == b""


@pytest.mark.long
@pytest.mark.timeout(900)  # on a machine that is busy with other work
@pytest.mark.parametrize("peer", ["restic", "borg", "borg2"])
def test_with_delay_every_archiver_has_its_rows(peer: str) -> None:
    """The case compares every restore with the volume."""
    if not PEERS[peer].find():
        assert peer == "borg2", "scripts/install_packages peers"
        pytest.skip("Debian 12 has no Borg 2, and python -m scripts.peers has not unpacked one")
    (case,) = (case for case in archivers.CASES if case.name.startswith("10 ms"))
    found = measure(Plan(["qemu-img", peer], [case], quick=True, swift=True, scale=TINY), lambda text: None)
    assert found.left_out == ()
    assert [row.name for row in found.rows] == [
        f"{work}, 8 MiB of data, 10 ms to the store, against {peer}"
        for work in ("first snapshot, zstd", "increment of 1 %", "restore to raw")
    ]


def test_an_account_is_emptied() -> None:
    with run_swift("bench") as account:
        with use_account(account), SwiftStore.open("bench/deep") as store:
            for number in range(3):
                store.put(f"packs/{number}", [b"data"])
            account.remove_objects("bench")
            assert all(store.head(f"packs/{number}") is None for number in range(3))
        account.remove_objects("bench")
        account.remove_objects("none")
