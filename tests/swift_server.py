"""A real Swift on loopback: account, container, object and proxy servers from the `swift` package.

    with SwiftServer() as swift:
        os.environ.update(swift.environment())
        swift.inject(Fault("answer", 503, method="PUT"))

It needs no root, no memcached and nothing under /etc. TempAuth's tokens are signed (fernet), so that no
server has to remember them. Every server has a filter in front that makes requests fail as told, and keeps
a list of what it was asked. Run as a script, this file is one of those servers.
"""

from __future__ import annotations

import base64
import configparser
import ctypes
import http.client
import importlib
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

KINDS = ("account", "container", "object")
CONTROL = "/-faults"


# -- what goes wrong, and the filter that does it


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the requests that it matches, or to `times` of them after the first `skip`.

    kind      value
    answer    status: said at once; nothing is done and the body is not read
    lie       status: said after the request was carried out
    drop      -: the connection is cut at once
    lose      -: the connection is cut after the request was carried out
    delay     seconds: before the request is carried out
    truncate  bytes: of the answer's body that get through before the connection is cut
    corrupt   offset: of the byte in the answer's body that gets a bit flipped
    whole     -: the server does not get to see the Range header
    """

    kind: str
    value: float = 0
    method: str = ""
    path: str = ""
    skip: int = 0
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)

    def matches(self, method: str, path: str) -> bool:
        return self.method in ("", method) and re.search(self.path, path) is not None


class FaultFilter:
    """WSGI: carries out the faults. Its own path CONTROL sets them, revokes tokens, tells what was asked."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.faults: list[tuple[Fault, list[int]]] = []
        self.seen: list[dict[str, str]] = []
        self.tokens: set[str] = set()
        self.revoked: set[str] = set()

    def __call__(self, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path = env["REQUEST_METHOD"], env["PATH_INFO"]
        if path == CONTROL:
            return self._control(method, env, start)
        if path == "/healthcheck":
            return self.app(env, start)
        headers = {k[5:]: v for k, v in env.items() if k.startswith("HTTP_") and "TOKEN" not in k}
        self.seen.append({**headers, "method": method, "path": path, "port": env["REMOTE_PORT"]})
        token = env.get("HTTP_X_AUTH_TOKEN", "")
        self.tokens.add(token)
        if token in self.revoked:
            return self._answer(Fault("answer", 401), env, start)
        fault = self._next(method, path)
        return getattr(self, "_" + fault.kind)(fault, env, start) if fault else self.app(env, start)

    def _control(self, method: str, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        answer = b"[]"
        if method == "GET":
            answer = json.dumps(self.seen).encode()
        elif method == "POST":
            faults = json.loads(env["wsgi.input"].read(int(env["CONTENT_LENGTH"])))
            self.faults += [(Fault(**fault), [0]) for fault in faults]
        elif method == "PUT":
            self.revoked = self.tokens - {""}
        else:
            self.faults, self.seen = [], []
        start("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]

    def _next(self, method: str, path: str) -> Fault | None:
        for fault, hits in self.faults:
            if fault.matches(method, path):
                hits[0] += 1
                if fault.skip < hits[0] <= fault.skip + fault.times:
                    return fault
        return None

    def _answer(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        start(f"{fault.value:.0f} Injected", [("Content-Length", "0"), *fault.headers.items()])
        return [b""]

    def _lie(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        self._carry_out(env)
        return self._answer(fault, env, start)

    def _drop(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        env["eventlet.input"].get_socket().shutdown(socket.SHUT_RDWR)
        return self._answer(Fault("answer", 500), env, start)

    def _lose(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        self._carry_out(env)
        return self._drop(fault, env, start)

    def _delay(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        import eventlet

        eventlet.sleep(fault.value)
        return self.app(env, start)

    def _truncate(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterator[bytes]:
        left = int(fault.value)
        for data in self.app(env, start):
            yield data[:left]
            left -= len(data)
            if left <= 0:
                env["eventlet.input"].get_socket().shutdown(socket.SHUT_RDWR)
                return

    def _corrupt(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterator[bytes]:
        at = int(fault.value)
        for data in self.app(env, start):
            spoilt = bytearray(data)
            if 0 <= at < len(data):
                spoilt[at] ^= 1
            at -= len(data)
            yield bytes(spoilt)

    def _whole(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        del env["HTTP_RANGE"]
        return self.app(env, start)

    def _carry_out(self, env: dict[str, Any]) -> None:
        body = self.app(env, lambda *_: None)
        for _ in body:
            pass
        if hasattr(body, "close"):
            body.close()


def fault_filter(_global_conf: Mapping[str, str], **_local_conf: str) -> Any:
    """What paste calls."""
    return FaultFilter


# -- the servers


class SwiftServer:
    """The servers' processes, configuration and data, all below one temporary directory.

    Each of `nodes` nodes has an account, a container and an object server; of everything there are
    `replicas`. Servers are named "proxy", "object-1" and so on.
    """

    user = "test:tester"
    key = "testing"

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
        """The variables by which clients sign in."""
        return {"ST_AUTH": f"{self.url}/auth/v1.0", "ST_USER": self.user, "ST_KEY": self.key}

    def __enter__(self) -> Self:
        for tries_left in (2, 1, 0):
            try:
                self._start()
                return self
            except StartError:  # someone may have taken a port that was free
                self.stop()
                if not tries_left:
                    raise
        raise AssertionError

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="swift-", dir=_folder_with_xattrs()))
        names = ["proxy", *(f"{kind}-{n}" for n in range(1, self.nodes + 1) for kind in KINDS)]
        self.ports = dict(zip(names, _free_ports(len(names)), strict=True))
        _write_conf(self.root / "swift.conf", _SWIFT_CONF)
        rings = json.dumps([self.nodes, self.replicas, self.ports])
        subprocess.run([sys.executable, __file__, "rings", self.root, rings], check=True)
        for name in names:
            self.start_server(name)
        for name in names:
            self._await(name)

    def start_server(self, name: str) -> None:
        """Start one server (again); it may take a second until it answers."""
        kind, _, node = name.partition("-")
        conf = self.root / f"{name}.conf"
        common = {
            "bind_ip": "127.0.0.1",
            "bind_port": str(self.ports[name]),
            "workers": "0",
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "swift_dir": str(self.root),
            "log_level": "WARNING",
        }
        sections = _PROXY if kind == "proxy" else _storage(kind, self.root / f"node{node}")
        _write_conf(conf, {**sections, "DEFAULT": {**common, **sections.get("DEFAULT", {})}})
        with open(self.root / f"{name}.log", "ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, __file__, "serve", kind, conf],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _await(self, name: str) -> None:
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
        self._await(name)

    def stop_server(self, name: str) -> None:
        """End one server at once."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

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
        """Add faults; of several that match a request the earliest counts."""
        self._control("POST", server, CONTROL, json.dumps([asdict(f) for f in faults]))

    def revoke_tokens(self) -> None:
        """The tokens that were used so far are good no more."""
        self._control("PUT", "proxy", CONTROL)

    def seen(self, server: str = "proxy") -> list[dict[str, str]]:
        """What was asked since the last `calm`: method, path, and headers as X_NEWEST, RANGE and so on."""
        answer: list[dict[str, str]] = json.loads(self._control("GET", server, CONTROL))
        return answer

    def count(self, method: str, path: str = "") -> int:
        """How many requests of this method, with a path that `path` is found in, the proxy has seen."""
        return sum(r["method"] == method and path in r["path"] for r in self.seen())

    def calm(self, server: str = "proxy") -> None:
        """No more faults; forget what was seen."""
        self._control("DELETE", server, CONTROL)

    def _control(self, method: str, name: str, path: str, body: str = "") -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[name], timeout=10)
        try:
            connection.request(method, path, body)
            return connection.getresponse().read()
        finally:
            connection.close()

    # -- as an administrator

    def create_container(self, name: str) -> None:
        """Make a container in the test user's account."""
        self.put_raw(name, b"")

    def put_raw(self, path: str, body: bytes) -> None:
        """PUT something at CONTAINER[/OBJECT] in the test user's account; `path` is quoted already."""
        url, token = self.sign_in()
        path = f"{url.removeprefix(self.url)}/{path}"
        status, _ = self._ask("PUT", path, {"X-Auth-Token": token}, body)
        assert status in (201, 202), status

    def sign_in(self) -> tuple[str, str]:
        """The test user's storage URL and a token for it."""
        who = {"X-Auth-User": self.user, "X-Auth-Key": self.key}
        _, headers = self._ask("GET", "/auth/v1.0", who)
        return headers["X-Storage-Url"], headers["X-Auth-Token"]

    def _ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> tuple[int, Mapping[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["proxy"], timeout=10)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            answer.read()
            return answer.status, answer.headers
        finally:
            connection.close()


class StartError(Exception):
    """A server does not come up; the text ends with its log."""


def _folder_with_xattrs() -> str:
    """A directory, in memory if possible, whose files can have the attributes that Swift keeps there."""
    for folder in ("/dev/shm", tempfile.gettempdir(), os.getcwd()):
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as probe:
                os.setxattr(probe.name, "user.swift.metadata", b"x" * 2000)
            return folder
        except OSError:
            continue
    raise StartError("no directory here supports extended attributes, which Swift needs; set TMPDIR")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


# -- configuration

Conf = Mapping[str, Mapping[str, str]]

_FAULTS = {"paste.filter_factory": "swift_server:fault_filter"}
_HEALTH = {"use": "egg:swift#healthcheck"}
_SWIFT_CONF = {
    "swift-hash": {"swift_hash_path_suffix": "tests"},
    "storage-policy:0": {"name": "plain", "default": "yes"},
}
_PROXY = {
    "pipeline:main": {
        "pipeline": "faults catch_errors gatekeeper healthcheck listing_formats tempauth proxy-server"
    },
    "filter:faults": _FAULTS,
    "filter:healthcheck": _HEALTH,
    "filter:catch_errors": {"use": "egg:swift#catch_errors"},
    "filter:gatekeeper": {"use": "egg:swift#gatekeeper"},
    "filter:listing_formats": {"use": "egg:swift#listing_formats"},
    "filter:tempauth": {
        "use": "egg:swift#tempauth",
        "user_test_tester": "testing .admin",
        "user_test_reader": "reading",
        "fernet_key_1": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "active_fernet_key_id": "1",
    },
    "app:proxy-server": {
        "use": "egg:swift#proxy",
        "account_autocreate": "true",
        # One failed answer would otherwise keep a server out of use for a minute.
        "error_suppression_interval": "0.1",
    },
}


def _storage(kind: str, devices: Path) -> Conf:
    return {
        "DEFAULT": {"devices": str(devices), "mount_check": "false", "disable_fallocate": "true"},
        "pipeline:main": {"pipeline": f"faults healthcheck {kind}-server"},
        "filter:faults": _FAULTS,
        "filter:healthcheck": _HEALTH,
        f"app:{kind}-server": {"use": f"egg:swift#{kind}"},
    }


def _write_conf(path: Path, sections: Conf) -> None:
    parser = configparser.RawConfigParser()
    parser.read_dict(sections)
    with open(path, "w") as file:
        parser.write(file)


# -- inside the children


def _make_rings(root: Path, nodes: int, replicas: int, ports: Mapping[str, int]) -> None:
    """Rings in which each node has one device (or as many as it takes for the replicas)."""
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
    """Become one server, which ends when the process that started it does."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    sys.argv = [kind, conf]
    module = {"object": "swift.obj.server"}.get(kind, f"swift.{kind}.server")
    sys.exit(importlib.import_module(module).main())


if __name__ == "__main__":
    if sys.argv[1] == "rings":
        _make_rings(Path(sys.argv[2]), *json.loads(sys.argv[3]))
    else:
        _serve(*sys.argv[2:])
