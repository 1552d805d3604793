"""A real Swift on loopback: account, container, object and proxy servers from the `swift` package.

    with SwiftServer() as swift:
        os.environ.update(swift.environment())
        swift.inject(Fault("answer", 503, method="PUT"))

It needs no root, no memcached and nothing in /etc. TempAuth's tokens are signed (fernet), so no server needs
to remember them. In front of every server is a filter, `swift_faults.py`, which injects faults into requests
and records them. Each server is a process that runs `swift_process.py`.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import http.client
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Self

from tests.support.swift_faults import CONTROL, Fault
from tests.support.swift_process import KINDS

_PROGRAM = Path(__file__).with_name("swift_process.py")


# -- the servers


class SwiftServer:
    """The processes, configuration and data of the servers, all below one temporary directory.

    Each of `nodes` nodes has an account, a container and an object server. Everything is stored `replicas`
    times. Servers have names such as "proxy" and "object-1".
    """

    patience = 10.0  # seconds that a request of the tests themselves may take
    user = "test:tester"
    key = secrets.token_hex(16)  # random, so that a test that searches for it finds leaks
    other = ("other:keeper", secrets.token_hex(16))  # user and key of a second account

    def __init__(self, *, nodes: int = 1, replicas: int = 1) -> None:
        self.nodes = nodes
        self.replicas = replicas
        self.root = Path()
        self.ports: dict[str, int] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['proxy']}"

    def environment(self) -> dict[str, str]:
        """Return the variables with which clients sign in."""
        return self._variables(self.user, self.key)

    def other_environment(self) -> dict[str, str]:
        """Return the variables with which clients sign in to the second account."""
        return self._variables(*self.other)

    def _variables(self, user: str, key: str) -> dict[str, str]:
        return {"ST_AUTH": f"{self.url}/auth/v1.0", "ST_USER": user, "ST_KEY": key}

    def __enter__(self) -> Self:
        for tries_left in (2, 1, 0):
            try:
                self._start()
                return self
            except StartError:  # another process can have taken a port that was free
                self.stop()
                if not tries_left:
                    raise
        raise AssertionError

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="swift-", dir=_find_folder_with_xattrs()))
        names = ["proxy", *(f"{kind}-{n}" for n in range(1, self.nodes + 1) for kind in KINDS)]
        self.ports = dict(zip(names, find_free_ports(len(names)), strict=True))
        _write_conf(self.root / "swift.conf", _SWIFT_CONF)
        rings = json.dumps([self.nodes, self.replicas, self.ports])
        subprocess.run([sys.executable, _PROGRAM, "rings", self.root, rings], check=True)
        for name in names:
            self.start_server(name)
        for name in names:
            self._wait_until_ready(name)

    def start_server(self, name: str) -> None:
        """Start one server. It can take a second until it answers."""
        kind, _, node = name.partition("-")
        conf = self.root / f"{name}.conf"
        common = {
            "bind_ip": "127.0.0.1",
            "bind_port": str(self.ports[name]),
            "workers": "0",
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "swift_dir": str(self.root),
            "recon_cache_path": str(self.root),
            "log_level": "WARNING",
        }
        sections = _PROXY if kind == "proxy" else _make_storage_conf(kind, self.root / f"node{node}")
        _write_conf(conf, {**sections, "DEFAULT": {**common, **sections.get("DEFAULT", {})}})
        with open(self.root / f"{name}.log", "ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, _PROGRAM, "serve", kind, conf],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_until_ready(self, name: str) -> None:
        process = self._running[name]
        end = time.monotonic() + 30
        while time.monotonic() < end and process.poll() is None:
            try:
                if self._control("GET", name, "/healthcheck") == b"OK":
                    return
            except OSError:
                time.sleep(0.02)
        log = (self.root / f"{name}.log").read_text(errors="replace")
        raise StartError(f"{name} server did not start (exit {process.poll()}):\n{log[-4000:]}")

    def restart_server(self, name: str) -> None:
        """Start a server that was stopped, and wait until it answers."""
        self.start_server(name)
        self._wait_until_ready(name)

    def stop_server(self, name: str) -> None:
        """End one server at once."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def await_death(self, name: str) -> None:
        """Wait until a server has ended by itself (fault "die")."""
        self._running[name].wait(30)
        del self._running[name]

    def mend(self) -> None:
        """Start every server that is not running, and remove all faults."""
        for name in self.ports:
            if name not in self._running or self._running[name].poll() is not None:
                if name in self._running:
                    self.await_death(name)
                self.restart_server(name)
            self.calm(name)

    def once(self, daemon: str) -> None:
        """Run one of Swift's daemons ("object-updater", "container-replicator") once on every node."""
        kind = daemon.partition("-")[0]
        for node in range(1, self.nodes + 1):
            conf = self.root / f"{kind}-{node}.conf"
            command = [sys.executable, _PROGRAM, "once", daemon, str(self.root), str(conf)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        """End all servers and remove their data."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()
        shutil.rmtree(self.root, ignore_errors=True)

    # -- faults

    def inject(self, *faults: Fault, server: str = "proxy") -> None:
        """Add faults. If several match a request, the one that was added first applies."""
        self._control("POST", server, CONTROL, json.dumps([asdict(f) for f in faults]))

    def revoke_tokens(self) -> None:
        """Make the proxy refuse all tokens that were used so far."""
        self._control("PUT", "proxy", CONTROL)

    def list_requests(self, server: str = "proxy") -> list[dict[str, str]]:
        """Return the requests since the last `calm`: method, path, and headers such as X_NEWEST and RANGE."""
        answer: list[dict[str, str]] = json.loads(self._control("GET", server, CONTROL))
        return answer

    def count(self, method: str, path: str = "") -> int:
        """Count the requests to the proxy with this method and with `path` in their path."""
        return sum(r["method"] == method and path in r["path"] for r in self.list_requests())

    def calm(self, server: str = "proxy") -> None:
        """Remove all faults, and forget the requests."""
        self._control("DELETE", server, CONTROL)

    def _control(self, method: str, name: str, path: str, body: str = "") -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[name], timeout=self.patience)
        try:
            connection.request(method, path, body)
            return connection.getresponse().read()
        finally:
            connection.close()

    # -- what is on the disks

    def find_replicas(self, path: str) -> dict[str, Path]:
        """Return the file of each replica of CONTAINER/OBJECT of the test user, by object server."""
        whole = f"/AUTH_test/{path}{_SWIFT_CONF['swift-hash']['swift_hash_path_suffix']}"
        name = hashlib.md5(whole.encode()).hexdigest()
        files = self.root.glob(f"node*/*/objects/*/*/{name}/*.data")
        return {f"object-{file.relative_to(self.root).parts[0].removeprefix('node')}": file for file in files}

    def rot(self, path: str, at: int, servers: Iterable[str]) -> None:
        """Flip a bit of byte `at` of CONTAINER/OBJECT on the disks of these object servers."""
        found = self.find_replicas(path)
        for server in servers:
            with open(found[server], "r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1]))

    def count_waiting_updates(self) -> int:
        """Count the container updates that the object servers have not delivered yet."""
        return sum(file.is_file() for file in self.root.glob("node*/*/async_pending*/**/*"))

    # -- as an administrator

    def create_container(self, name: str) -> None:
        """Make a container in the test user's account."""
        self.put_raw(name, b"")

    def fill_quota(self, container: str, room: int | None) -> None:
        """Set a container's quota so that `room` bytes are left; with None remove it."""
        url, token = self.sign_in()
        path, who = f"{url.removeprefix(self.url)}/{container}", {"X-Auth-Token": token}
        _, headers = self._request("HEAD", path, who)
        quota = "" if room is None else str(int(headers["X-Container-Bytes-Used"]) + room)
        status, _ = self._request("POST", path, {**who, "X-Container-Meta-Quota-Bytes": quota})
        assert status == 204, status

    def create_other_container(self, name: str) -> None:
        """Make a container in the second account."""
        self.put_raw(name, b"", *self.other)

    def put_raw(self, path: str, body: bytes, user: str = user, key: str = key) -> None:
        """PUT something at CONTAINER[/OBJECT] in a user's account; `path` must be quoted."""
        url, token = self.sign_in(user, key)
        path = f"{url.removeprefix(self.url)}/{path}"
        status, _ = self._request("PUT", path, {"X-Auth-Token": token}, body)
        assert status in (201, 202), status

    def sign_in(self, user: str = user, key: str = key) -> tuple[str, str]:
        """Sign in, and return the user's storage URL and a token."""
        who = {"X-Auth-User": user, "X-Auth-Key": key}
        _, headers = self._request("GET", "/auth/v1.0", who)
        return headers["X-Storage-Url"], headers["X-Auth-Token"]

    def _request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> tuple[int, Mapping[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["proxy"], timeout=self.patience)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            answer.read()
            return answer.status, answer.headers
        finally:
            connection.close()


class StartError(Exception):
    """A server did not start; the text ends with its log."""


def _find_folder_with_xattrs() -> str:
    """Return a directory, in memory if possible, whose files can have attributes as large as Swift's."""
    for folder in ("/dev/shm", tempfile.gettempdir(), os.getcwd()):
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as probe:
                os.setxattr(probe.name, "user.swift.metadata", b"x" * 2000)
            return folder
        except OSError:
            continue
    raise StartError("Swift needs a directory with extended attributes; set TMPDIR to one")


def find_free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


# -- configuration

Conf = Mapping[str, Mapping[str, str]]

_FAULTS = {"paste.filter_factory": "swift_faults:make_fault_filter"}
_HEALTH = {"use": "egg:swift#healthcheck"}
_SWIFT_CONF = {
    "swift-hash": {"swift_hash_path_suffix": "tests"},
    "storage-policy:0": {"name": "plain", "default": "yes"},
}
_PROXY = {
    "pipeline:main": {
        "pipeline": (
            "faults catch_errors gatekeeper healthcheck cache listing_formats tempauth quotas proxy-server"
        )
    },
    "filter:faults": _FAULTS,
    "filter:cache": {"paste.filter_factory": "swift_faults:make_cache_filter"},
    "filter:healthcheck": _HEALTH,
    "filter:catch_errors": {"use": "egg:swift#catch_errors"},
    "filter:quotas": {"use": "egg:swift#container_quotas"},
    "filter:gatekeeper": {"use": "egg:swift#gatekeeper"},
    "filter:listing_formats": {"use": "egg:swift#listing_formats"},
    "filter:tempauth": {
        "use": "egg:swift#tempauth",
        "user_test_tester": f"{SwiftServer.key} .admin",
        "user_test_reader": "reading",
        "user_other_keeper": f"{SwiftServer.other[1]} .admin",
        "fernet_key_1": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "active_fernet_key_id": "1",
    },
    "app:proxy-server": {
        "use": "egg:swift#proxy",
        "account_autocreate": "true",
        # Otherwise the proxy would not use a server for a minute after one failed answer.
        "error_suppression_interval": "0.1",
        # The proxy caches what it knows of a container until the tests end.
        "recheck_container_existence": "3600",
    },
}


def _make_storage_conf(kind: str, devices: Path) -> Conf:
    return {
        "DEFAULT": {"devices": str(devices), "mount_check": "false", "disable_fallocate": "true"},
        "pipeline:main": {"pipeline": f"faults healthcheck {kind}-server"},
        "filter:faults": _FAULTS,
        "filter:healthcheck": _HEALTH,
        f"app:{kind}-server": {"use": f"egg:swift#{kind}"},
        # Options of the daemons of this kind. ssync, unlike rsync, needs no other program.
        f"{kind}-updater": {},
        f"{kind}-replicator": {"sync_method": "ssync"} if kind == "object" else {},
    }


def _write_conf(path: Path, sections: Conf) -> None:
    parser = configparser.RawConfigParser()
    parser.read_dict(sections)
    with open(path, "w") as file:
        parser.write(file)
