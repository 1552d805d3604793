"""A real Swift for the bench alone: account, container, object and proxy servers on loopback, one replica.

It needs the package `swift`, no root, and a file system with extended attributes. Its data lies in memory
where there is room (/dev/shm), so that what is measured is how bytes get there, and no disk.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import http.client
import importlib
import importlib.util
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from island_fast.bench.island_command import environment
from island_fast.bench.swift_process import KINDS
from island_fast.errors import IslandError, NotFoundError

__all__ = ["Account", "serving", "signed_in"]

_USER = "bench:bench"
_KEY = secrets.token_hex(16)
_PATIENCE = 30.0  # seconds until a server answers

Conf = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Account:
    """How clients sign in, by environment variables; and what that gives: port, path and token."""

    variables: Mapping[str, str]
    port: int
    path: str
    token: str


@contextlib.contextmanager
def serving(container: str) -> Iterator[Account]:
    """Run a Swift while the body does, with an empty container.

    NotFoundError if the package is not installed, IslandError if a server does not start.
    """
    if importlib.util.find_spec("swift") is None:
        raise NotFoundError("the package swift is not installed; run: pip install swift")
    root = Path(tempfile.mkdtemp(prefix="island-bench-swift-", dir=_folder()))
    running: list[subprocess.Popen[bytes]] = []
    try:
        ports = _ports()
        _configure(root, ports)
        program = [sys.executable, "-m", "island_fast.bench.swift_process"]
        subprocess.run([*program, "rings", root, json.dumps(ports)], check=True, env=_variables())
        for kind in ("proxy", *KINDS):
            with open(root / f"{kind}.log", "wb") as log:
                command = [*program, "serve", kind, str(root / f"{kind}.conf")]
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=_variables()))
        for kind, server in zip(("proxy", *KINDS), running, strict=True):
            _await(root, kind, ports[kind], server)
        account = _signed_in(ports["proxy"])
        _make_container(account, container)
        yield account
    finally:
        for server in running:
            server.kill()
            server.wait()
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def signed_in(account: Account) -> Iterator[None]:
    """Have this process's clients sign in to this account while the body runs."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("OS_", "ST_")):
            del os.environ[name]
    os.environ.update(account.variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _variables() -> dict[str, str]:
    return {**os.environ, **environment()}


def _folder() -> str:
    """A folder whose files can have extended attributes as large as Swift's."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder) as probe:
            os.setxattr(probe.name, "user.swift.metadata", b"x" * 2000)
            return folder
    raise IslandError("no folder here supports extended attributes, which Swift needs; set TMPDIR to another")


def _ports() -> dict[str, int]:
    """A free port for each server."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(KINDS))]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return dict(zip(("proxy", *KINDS), ports, strict=True))


def _configure(root: Path, ports: Mapping[str, int]) -> None:
    """Write the configuration of every server, and Swift's own."""
    _write(
        root / "swift.conf",
        {
            "swift-hash": {"swift_hash_path_suffix": "bench"},
            "storage-policy:0": {"name": "plain", "default": "yes"},
        },
    )
    for kind, port in ports.items():
        common = {
            "bind_ip": "127.0.0.1",
            "bind_port": str(port),
            "workers": "0",
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "swift_dir": str(root),
            "recon_cache_path": str(root),
            "log_level": "ERROR",
            "devices": str(root / "node"),
            "mount_check": "false",
            "disable_fallocate": "true",
        }
        _write(root / f"{kind}.conf", {"DEFAULT": common, **(_PROXY if kind == "proxy" else _storage(kind))})


_PROXY: Conf = {
    "pipeline:main": {
        "pipeline": "catch_errors gatekeeper healthcheck cache listing_formats tempauth proxy-server"
    },
    "filter:listing_formats": {"use": "egg:swift#listing_formats"},
    "filter:catch_errors": {"use": "egg:swift#catch_errors"},
    "filter:gatekeeper": {"use": "egg:swift#gatekeeper"},
    "filter:healthcheck": {"use": "egg:swift#healthcheck"},
    "filter:cache": {"paste.filter_factory": "island_fast.bench.swift_process:cache"},
    "filter:tempauth": {
        "use": "egg:swift#tempauth",
        "user_bench_bench": f"{_KEY} .admin",
        # Tokens that are signed: no server has to remember them.
        "fernet_key_1": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "active_fernet_key_id": "1",
    },
    "app:proxy-server": {"use": "egg:swift#proxy", "account_autocreate": "true"},
}


def _storage(kind: str) -> Conf:
    return {
        "pipeline:main": {"pipeline": f"healthcheck {kind}-server"},
        "filter:healthcheck": {"use": "egg:swift#healthcheck"},
        f"app:{kind}-server": {"use": f"egg:swift#{kind}"},
    }


def _write(path: Path, sections: Conf) -> None:
    parser = configparser.RawConfigParser()
    parser.read_dict(sections)
    with open(path, "w") as file:
        parser.write(file)


def _await(root: Path, kind: str, port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            if _ask(port, "GET", "/healthcheck", {}).status == 200:
                return
        time.sleep(0.02)
    said = (root / f"{kind}.log").read_text(errors="replace")[-1000:]
    raise IslandError(f"Swift's {kind} server did not start: {said}")


def _ask(port: int, method: str, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Make one request; the answer, without its body."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)) as connection:
        connection.request(method, path, headers=headers)
        with connection.getresponse() as answer:
            return answer


def _signed_in(port: int) -> Account:
    headers = _ask(port, "GET", "/auth/v1.0", {"X-Auth-User": _USER, "X-Auth-Key": _KEY}).headers
    variables = {"ST_AUTH": f"http://127.0.0.1:{port}/auth/v1.0", "ST_USER": _USER, "ST_KEY": _KEY}
    path = urlsplit(headers["X-Storage-Url"] or "").path
    return Account(variables, port, path, headers["X-Auth-Token"] or "")


def _make_container(account: Account, name: str) -> None:
    status = _ask(account.port, "PUT", f"{account.path}/{name}", {"X-Auth-Token": account.token}).status
    if status not in (201, 202):
        raise IslandError(f"the bench's Swift makes no container ({status}); report this fault")
