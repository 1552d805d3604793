from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from island_fast.errors import IslandError, NotFoundError, RefusedError
from island_fast.qemu.qmp import Qmp
from tests.support.daemon import StorageDaemon, create_qcow2, needs_storage_daemon, qemu_io, wait_for_socket

SIZE = 16 << 20
VIRTUAL_MACHINE = "qemu-system-x86_64"

needs_virtual_machine = pytest.mark.skipif(
    shutil.which(VIRTUAL_MACHINE) is None,
    reason=f"{VIRTUAL_MACHINE} (package qemu-system-x86) is not installed",
)


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    return create_qcow2(tmp_path / "disk.qcow2", SIZE)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room in the 107 bytes of a unix socket's path."""
    with tempfile.TemporaryDirectory(prefix="island-qmp-") as folder:
        yield Path(folder)


def snapshots(path: Path) -> list[tuple[str, str]]:
    """The id and name of every internal snapshot on disk, the image being open elsewhere."""
    output = subprocess.check_output(["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", path])
    return [(s["id"], s["name"]) for s in json.loads(output).get("snapshots", [])]


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """A file that is open for writing, by qemu's own sign."""
    path = tmp_path / "disk"
    sign = struct.pack("@hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0)
    with path.open("wb+") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, sign)
        yield path


def content(path: Path) -> bytes:
    output = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, output], check=True)
    return output.read_bytes()


# --- a real qemu-storage-daemon ---


@needs_storage_daemon
def test_snapshots_are_taken_and_deleted_while_a_guest_writes(qcow2: Path) -> None:
    with StorageDaemon(qcow2) as daemon, Qmp(daemon.qmp_socket) as qmp:
        daemon.write(0, 1 << 20, 1)
        node = qmp.find_node(qcow2)
        assert node == "disk"
        qmp.snapshot_create(node, "island-a")
        assert snapshots(qcow2) == [("1", "island-a")]
        daemon.write(65536, 65536, 2)
        qmp.snapshot_create(node, "island-b")
        qmp.snapshot_delete(node, "1", "island-a")
        assert snapshots(qcow2) == [("2", "island-b")]
        daemon.write(131072, 65536, 3)
    assert snapshots(qcow2) == [("2", "island-b")]
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", qcow2], check=True)
    subprocess.run(["qemu-img", "snapshot", "-a", "island-b", qcow2], check=True)
    block = 65536
    assert content(qcow2)[: 4 * block] == b"".join(bytes([n]) * block for n in (1, 2, 1, 1))


@needs_storage_daemon
@pytest.mark.parametrize("id, name", [("1", "other"), ("2", "one"), ("7", "seven")])
def test_a_snapshot_is_deleted_by_id_and_name_together(qcow2: Path, id: str, name: str) -> None:
    with StorageDaemon(qcow2) as daemon, Qmp(daemon.qmp_socket) as qmp:
        qmp.snapshot_create("disk", "one")
        qmp.snapshot_create("disk", "two")
        with pytest.raises(NotFoundError, match="does not exist") as caught:
            qmp.snapshot_delete("disk", id, name)
        assert str(caught.value).isprintable()
        assert snapshots(qcow2) == [("1", "one"), ("2", "two")]


@needs_storage_daemon
def test_a_command_that_qemu_refuses_gives_its_words_and_the_connection_goes_on(
    qcow2: Path,
) -> None:
    with StorageDaemon(qcow2) as daemon, Qmp(daemon.qmp_socket) as qmp:
        with pytest.raises(IslandError, match=r"refused blockdev-snapshot-internal-sync: .*'none'"):
            qmp.snapshot_create("none", "one")
        qmp.snapshot_create("disk", "one")
        with pytest.raises(IslandError, match="already exists"):
            qmp.snapshot_create("disk", "one")
        assert qmp.find_node(qcow2) == "disk"


@needs_storage_daemon
def test_the_qcow2_node_is_told_from_others_over_its_file(qcow2: Path) -> None:
    other = create_qcow2(qcow2.with_name("other.qcow2"), SIZE)
    views = [
        *["--blockdev", f"driver=file,node-name=file-only,filename={qcow2},read-only=on"],
        *["--blockdev", f"driver=qcow2,node-name=other,file.driver=file,file.filename={other}"],
        *["--blockdev", "driver=raw,node-name=raw-view,file=file-only,read-only=on"],
    ]
    with StorageDaemon(qcow2, options=views) as daemon, Qmp(daemon.qmp_socket) as qmp:
        assert qmp.find_node(qcow2) == "disk"
        assert qmp.find_node(other) == "other"


@needs_storage_daemon
def test_a_node_is_found_by_inode_through_any_name(qcow2: Path) -> None:
    hard, link = qcow2.with_name("hard"), qcow2.with_name("link")
    hard.hardlink_to(qcow2)
    link.symlink_to(qcow2)
    with StorageDaemon(link) as daemon, Qmp(str(daemon.qmp_socket)) as qmp:
        assert {qmp.find_node(path) for path in (qcow2, hard, str(link))} == {"disk"}


@needs_storage_daemon
@pytest.mark.parametrize("name", ["nbd:x", "file:x", 'json:{"file": "x"}', "a,b", 'quote"ünï\\', "new\nline"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_hostile_file_name_is_only_a_name(qcow2: Path, name: str, relative: bool) -> None:
    path = qcow2.rename(qcow2.with_name(name))
    image = name if relative else path
    with StorageDaemon(image, cwd=path.parent) as daemon, Qmp(daemon.qmp_socket) as qmp:
        if name.startswith("json:") and relative:  # reported as options; not found is safe
            with pytest.raises(RefusedError):
                qmp.find_node(path)
        else:
            assert qmp.find_node(path) == "disk"


@needs_storage_daemon
def test_a_relative_name_is_the_daemons_and_not_ours(qcow2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = qcow2.parent / "elsewhere"
    elsewhere.mkdir()
    same_name = create_qcow2(elsewhere / "disk.qcow2", SIZE)
    monkeypatch.chdir(elsewhere)
    with StorageDaemon("disk.qcow2", cwd=qcow2.parent) as daemon, Qmp(daemon.qmp_socket) as qmp:
        with pytest.raises(RefusedError):
            qmp.find_node("disk.qcow2")
        with pytest.raises(RefusedError):
            qmp.find_node(same_name)
        assert qmp.find_node(qcow2) == "disk"


@needs_storage_daemon
def test_a_node_with_options_is_found_in_what_qemu_reports_of_it(qcow2: Path) -> None:
    limit = ["--object", "throttle-group,id=group"]
    below = f"driver=throttle,throttle-group=group,file.driver=file,file.filename={qcow2}"
    deep = ["--blockdev", f"{below},node-name=slow", "--blockdev", "driver=qcow2,node-name=top,file=slow"]
    other = create_qcow2(qcow2.with_name("other.qcow2"), SIZE)
    with StorageDaemon(other, options=[*limit, *deep]) as daemon, Qmp(daemon.qmp_socket) as qmp:
        assert qmp.find_node(qcow2) == "top"
        qmp.snapshot_create("top", "one")
        assert snapshots(qcow2) == [("1", "one")]


@needs_storage_daemon
@pytest.mark.parametrize("kinds", [["throttle"], ["copy-on-read"], ["raw"], ["copy-on-read", "throttle"]])
def test_a_snapshot_goes_through_the_filters_above_the_image(qcow2: Path, kinds: list[str]) -> None:
    other = create_qcow2(qcow2.with_name("other.qcow2"), SIZE)
    options = [
        *["--object", "throttle-group,id=group"],
        *["--blockdev", f"driver=qcow2,node-name=n0,file.driver=file,file.filename={qcow2}"],
    ]
    for number, kind in enumerate(kinds):
        more = ",throttle-group=group" if kind == "throttle" else ""
        options += ["--blockdev", f"driver={kind},node-name=n{number + 1},file=n{number}{more}"]
    with StorageDaemon(other, options=options) as daemon, Qmp(daemon.qmp_socket) as qmp:
        node = qmp.find_node(qcow2)
        assert node == f"n{len(kinds)}"
        qmp.snapshot_create(node, "one")
        assert snapshots(qcow2) == [("1", "one")]
        qmp.snapshot_delete(node, "1", "one")
    assert snapshots(qcow2) == []


@needs_storage_daemon
@pytest.mark.parametrize("what", ["mirror", "backup", "overlay"])
def test_what_works_or_stands_on_the_image_is_named(qcow2: Path, what: str) -> None:
    other = create_qcow2(qcow2.with_name("other.qcow2"), SIZE)
    qemu_io(qcow2, "write -q -P 1 0 8M")
    options = ["--blockdev", f"driver=qcow2,node-name=top,file.driver=file,file.filename={other}"]
    with StorageDaemon(qcow2, options=options) as daemon, Qmp(daemon.qmp_socket) as qmp:
        if what == "overlay":
            qmp.command("blockdev-snapshot", {"node": "disk", "overlay": "top"})
        else:
            job = {"job-id": "job7", "device": "disk", "target": "top", "sync": "full", "speed": 1}
            qmp.command(f"blockdev-{what}", job)
        told = r"'top' \(qcow2\) on top" if what == "overlay" else "block job 'job7'.*wait until it has ended"
        with pytest.raises(RefusedError, match=told):
            qmp.find_node(qcow2)


@needs_storage_daemon
@needs_virtual_machine
@pytest.mark.parametrize("name", ["/dev/fdset/7", "/dev/fd/{fd}", "/proc/self/fd/{fd}"])
def test_an_image_that_was_given_as_a_descriptor_is_found(qcow2: Path, short_folder: Path, name: str) -> None:
    other = create_qcow2(qcow2.with_name("other.qcow2"), SIZE)
    monitor = short_folder / "qmp"
    with qcow2.open("r+b") as file, other.open("r+b") as second:
        words = [
            *[VIRTUAL_MACHINE, "-machine", "none", "-nodefaults", "-display", "none"],
            *["-add-fd", f"fd={second.fileno()},set=6"],
            *(["-add-fd", f"fd={file.fileno()},set=7"] if "set" in name else []),
            *["-blockdev", f"driver=file,node-name=f,filename={name.format(fd=file.fileno())},locking=on"],
            *["-blockdev", "driver=qcow2,node-name=v,file=f"],
            *["-qmp", f"unix:{monitor},server=on,wait=off"],
        ]
        machine = subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=[file.fileno(), second.fileno()])
        try:
            wait_for_socket(machine, monitor)
            with Qmp(monitor) as qmp:
                qmp.snapshot_create(qmp.find_node(qcow2), "one")
                with pytest.raises(RefusedError, match="does not hold"):
                    qmp.find_node(other)
            assert snapshots(qcow2) == [("1", "one")]
        finally:
            machine.terminate()
            machine.wait()


@needs_storage_daemon
def test_an_image_that_the_process_does_not_hold_is_refused(qcow2: Path) -> None:
    copy = Path(shutil.copy(qcow2, qcow2.with_name("copy.qcow2")))
    with StorageDaemon(qcow2) as daemon, Qmp(daemon.qmp_socket) as qmp:
        with pytest.raises(RefusedError, match=r"does not hold image .*copy.qcow2"):
            qmp.find_node(copy)
        with pytest.raises(NotFoundError, match="no image"):
            qmp.find_node(qcow2.with_name("none"))


@needs_storage_daemon
def test_an_image_that_was_replaced_while_in_use_is_refused(qcow2: Path) -> None:
    copy = Path(shutil.copy(qcow2, qcow2.with_name("copy.qcow2")))
    with StorageDaemon(qcow2) as daemon, Qmp(daemon.qmp_socket) as qmp:
        os.replace(copy, qcow2)  # the daemon still holds the file that had this name
        with pytest.raises(RefusedError, match="replaced while in use"):
            qmp.find_node(qcow2)


@needs_storage_daemon
def test_an_image_that_is_open_read_only_is_refused(qcow2: Path) -> None:
    with (
        StorageDaemon(qcow2, read_only=True) as daemon,
        Qmp(daemon.qmp_socket) as qmp,
        pytest.raises(RefusedError, match="open read-only"),
    ):
        qmp.find_node(qcow2)


@needs_storage_daemon
def test_an_image_that_is_open_twice_is_refused(qcow2: Path) -> None:
    again = ["--blockdev", f"driver=qcow2,node-name=again,file.driver=file,file.filename={qcow2}"]
    again[1] += ",read-only=on"
    with (
        StorageDaemon(qcow2, read_only=True, options=again) as daemon,
        Qmp(daemon.qmp_socket) as qmp,
        pytest.raises(RefusedError, match="open 2 times"),
    ):
        qmp.find_node(qcow2)


@needs_storage_daemon
def test_a_second_client_gets_no_greeting_and_says_so(qcow2: Path) -> None:
    with StorageDaemon(qcow2) as daemon:
        with Qmp(daemon.qmp_socket), pytest.raises(IslandError, match="another client"):
            Qmp(daemon.qmp_socket, timeout=0.3)
        with Qmp(daemon.qmp_socket) as qmp:
            assert qmp.find_node(qcow2) == "disk"


@needs_storage_daemon
def test_a_daemon_that_ends_ends_the_connection_in_one_sentence(qcow2: Path) -> None:
    daemon = StorageDaemon(qcow2)
    daemon.start()
    with Qmp(daemon.qmp_socket) as qmp:
        daemon.kill()
        with pytest.raises(IslandError, match="ended the connection"):
            qmp.snapshot_create("disk", "one")
    with pytest.raises(NotFoundError, match="no QMP socket"):
        Qmp(daemon.qmp_socket)
    qemu_io(qcow2, "read -q 0 512")  # the helper's own promise: after kill the image is free


# --- a real virtual machine ---


@needs_storage_daemon
@needs_virtual_machine
@pytest.mark.parametrize(
    "disk",
    [
        "-blockdev driver=qcow2,node-name=fmt,file.driver=file,file.filename={}",
        "-blockdev driver=file,node-name=prot,filename={} -blockdev driver=qcow2,node-name=fmt,file=prot",
        "-drive if=none,id=drive0,format=qcow2,file={}",
        "-drive if=none,id=drive0,format=qcow2,file=file:{}",
        "-M none,memory-backend=ram -object memory-backend-ram,id=ram,size=1M "
        "-drive if=none,id=drive0,driver=qcow2,file={},cache=none,discard=unmap,detect-zeroes=on",
    ],
)
def test_a_virtual_machine_takes_snapshots_of_its_disks(qcow2: Path, short_folder: Path, disk: str) -> None:
    monitor = short_folder / "qmp"
    other = create_qcow2(qcow2.with_name("other.qcow2"), SIZE)
    words = [
        *[VIRTUAL_MACHINE, "-machine", "none", "-nodefaults", "-display", "none"],
        *["-blockdev", f"driver=qcow2,node-name=z,file.driver=file,file.filename={other}"],
        *disk.format(*[qcow2] * disk.count("{}")).split(),
        *["-qmp", f"unix:{monitor},server=on,wait=off"],
    ]
    machine = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_socket(machine, monitor)
        with Qmp(monitor) as qmp:
            node = qmp.find_node(qcow2)
            qmp.snapshot_create(node, "one")
            qmp.snapshot_create(node, "two")
            qmp.snapshot_delete(node, "1", "one")
            assert snapshots(qcow2) == [("2", "two")]
        assert snapshots(other) == []
    finally:
        machine.terminate()
        machine.wait()


# --- a process that answers as it likes ---

GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'
Script = Callable[[socket.socket], None]


@pytest.fixture
def serve(short_folder: Path) -> Iterator[Callable[[Script], Path]]:
    """Runs a script, once, on the server's side of a connection to the path that comes back."""
    threads: list[threading.Thread] = []
    listeners: list[socket.socket] = []

    def start(script: Script) -> Path:
        path = short_folder / "qmp"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        listeners.append(listener)

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                try:
                    script(connection)
                except (BrokenPipeError, ConnectionResetError):
                    return

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return path

    yield start
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for listener in listeners:
        listener.close()


def answer(connection: socket.socket, *replies: str) -> None:
    """Greet, then answer each command with the reply that is its turn; "%d" stands for its id."""
    connection.sendall(GREETING)
    with connection.makefile("rb") as commands:
        for reply in ('{"return": {}, "id": %d}\n', *replies):
            number = json.loads(commands.readline())["id"]
            connection.sendall(reply.replace("%d", str(number)).encode())
        commands.read()  # until the client has gone


def answering(*replies: str) -> Script:
    return lambda connection: answer(connection, *replies)


def test_events_and_stale_answers_are_passed_by(serve: Callable[[Script], Path]) -> None:
    event = '{"event": "STOP", "data": {"return": 1}, "timestamp": {}}\r\n'
    stale = '{"return": {}, "id": 77}\n{"error": {"desc": "old"}, "id": 78}\n'
    path = serve(answering(event + stale + '{"error": {"desc": "new"}, "id": %d}\r\n'))
    with Qmp(path) as qmp, pytest.raises(IslandError, match=r"refused .*: new"):
        qmp.snapshot_create("disk", "one")


def test_an_answer_in_pieces_and_two_in_one_piece_are_read(
    serve: Callable[[Script], Path], written: Path
) -> None:
    nodes = json.dumps([{"node-name": "n", "drv": "qcow2", "file": str(written)}])

    def script(connection: socket.socket) -> None:
        # the answer to the second command is there before it is asked
        connection.sendall(GREETING + b'{"return": {}, "id": 1}\n{"return": ' + nodes[:9].encode())
        time.sleep(0.05)
        for byte in (nodes[9:] + ', "id": 2}').encode():
            connection.sendall(bytes([byte]))
        time.sleep(0.05)
        connection.sendall(b"\n")
        connection.recv(65536)
        connection.sendall(b'{"return": {"nodes": [], "edges": []}, "id": 3}\n')
        connection.recv(1)

    with Qmp(serve(script)) as qmp:
        assert qmp.find_node(written) == "n"


def test_an_error_without_an_id_is_ours(serve: Callable[[Script], Path]) -> None:
    path = serve(answering('{"error": {"class": "GenericError", "desc": "bad\\nJSON."}}\n'))
    with Qmp(path) as qmp, pytest.raises(IslandError, match=r"bad\?JSON$"):
        qmp.snapshot_create("disk", "one")


@pytest.mark.parametrize(
    "greeting",
    [b"SSH-2.0-OpenSSH\r\n", b"[]\n", b"{}\n", b'{"return": {}}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"],
)
def test_another_protocol_is_refused(serve: Callable[[Script], Path], greeting: bytes) -> None:
    path = serve(lambda connection: connection.sendall(greeting))
    with pytest.raises(IslandError, match="does not speak QMP"):
        Qmp(path)


def test_an_endless_message_is_given_up_at_its_bound(serve: Callable[[Script], Path]) -> None:
    sent = 0

    def script(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(GREETING + b'{"return": "')
        while True:
            sent += connection.send(b"x" * 65536)

    path = serve(script)
    with pytest.raises(IslandError, match="over 16 MiB"):
        Qmp(path)
    assert sent < 18 << 20


def test_an_endless_flow_of_events_is_given_up_in_time(serve: Callable[[Script], Path]) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        while True:
            connection.sendall(b'{"event": "RTC_CHANGE"}\n' * 100)

    started = time.monotonic()
    with pytest.raises(IslandError, match="did not answer in time"):
        Qmp(serve(script), timeout=0.3)
    assert time.monotonic() - started < 10


def test_silence_is_given_up_in_time(serve: Callable[[Script], Path]) -> None:
    path = serve(answering())
    silent = pytest.raises(IslandError, match=r"did not answer in time .blockdev-snapshot-internal")
    with Qmp(path, timeout=0.3) as qmp, silent:
        qmp.snapshot_create("disk", "one")


def test_a_connection_that_ends_is_one_sentence(serve: Callable[[Script], Path]) -> None:
    with pytest.raises(IslandError, match=r"ended the connection .its greeting"):
        Qmp(serve(lambda _: None))


@pytest.mark.parametrize(
    "nodes",
    [
        "{}",
        "null",
        "[1, null, []]",
        '[{"drv": "qcow2"}]',
        '[{"drv": "qcow2", "node-name": 1, "file": 2}]',
        '[{"drv": "qcow2", "node-name": "n", "file": ""}]',
        '[{"drv": "qcow2", "node-name": "n", "file": "/\\u0000"}]',
        '[{"drv": "qcow2", "node-name": "n", "file": "json:"}]',
        '[{"drv": "qcow2", "node-name": "n", "file": "json:{\\"file\\": {\\"file\\": 7}}"}]',
        '[{"drv": "qcow2", "node-name": "n", "file": "json:{\\"filename\\": []}"}]',
        '[{"drv": "raw", "node-name": "n", "file": "%s"}]',
    ],
)
def test_a_list_of_nodes_that_says_nothing_finds_nothing(
    serve: Callable[[Script], Path], written: Path, nodes: str
) -> None:
    path = serve(answering('{"return": ' + nodes.replace("%s", str(written)) + ', "id": %d}\n'))
    with Qmp(path) as qmp, pytest.raises(RefusedError, match="does not hold"):
        qmp.find_node(written)


def test_a_deeply_nested_file_name_finds_nothing(serve: Callable[[Script], Path], written: Path) -> None:
    nodes = [{"drv": "qcow2", "node-name": "n", "file": "json:" + '{"file":' * 100_000}]
    path = serve(answering('{"return": ' + json.dumps(nodes) + ', "id": %d}\n'))
    with Qmp(path) as qmp, pytest.raises(RefusedError, match="does not hold"):
        qmp.find_node(written)


# --- sockets that are none ---


def test_a_socket_that_cannot_be_connected_to_gives_one_sentence(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("island_fast.qemu.qmp._HANDSHAKE_TIMEOUT", 0.2)
    with pytest.raises(NotFoundError, match="no QMP socket"):
        Qmp(short_folder / "none")
    dead = short_folder / "dead"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    with pytest.raises(IslandError, match="nothing listens"):
        Qmp(dead)
    with pytest.raises(IslandError, match="too long"):
        Qmp(short_folder / ("x" * 200))
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as waiting:
        full.bind(str(short_folder / "full"))
        full.listen(0)
        waiting.connect(str(short_folder / "full"))
        with pytest.raises(IslandError, match=r"busy|did not answer"):
            Qmp(short_folder / "full", timeout=0.3)


def test_every_failure_closes_the_socket(short_folder: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(NotFoundError):
            Qmp(short_folder / "none")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_folder / "mute"))
        listener.listen(5)
        with pytest.raises(IslandError):
            Qmp(short_folder / "mute", timeout=0.1)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "graph",
    [
        "null",
        '{"nodes": 7, "edges": [1]}',
        '{"nodes": [{"id": 1, "type": "block-driver", "name": "n"}], "edges": [{"parent": 1, "child": 1}]}',
        '{"nodes": [{"id": 1, "type": "block-driver", "name": "n"}, {"id": 2, "type": "block-driver", "name":'
        ' "m"}], "edges": [{"parent": 1, "child": 2}, {"parent": 2, "child": 1}]}',
    ],
)
def test_a_graph_without_sense_or_end_is_no_trap(
    serve: Callable[[Script], Path], written: Path, graph: str
) -> None:
    nodes = [
        {"drv": "qcow2", "node-name": "n", "file": str(written)},
        {"drv": "throttle", "node-name": "m", "file": str(written)},
    ]
    replies = [f'{{"return": {one}, "id": %d}}\n' for one in (json.dumps(nodes), graph)]
    with Qmp(serve(answering(*replies))) as qmp:
        if "edges" in graph and "7" not in graph:
            with pytest.raises(RefusedError, match="on top of image"):
                qmp.find_node(written)
        else:
            assert qmp.find_node(written) == "n"


def test_a_qemu_that_shows_no_graph_is_asked_for_the_node_itself(
    serve: Callable[[Script], Path], written: Path
) -> None:
    nodes = json.dumps([{"drv": "qcow2", "node-name": "n", "file": str(written)}])
    replies = [f'{{"return": {nodes}, "id": %d}}\n', '{"error": {"class": "CommandNotFound"}, "id": %d}\n']
    with Qmp(serve(answering(*replies))) as qmp:
        assert qmp.find_node(written) == "n"
