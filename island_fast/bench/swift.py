"""A real Swift for the bench: account, container, object and proxy servers on loopback, with one replica.

It needs the package `swift` and a file system with extended attributes, but not root. Its data is in memory
(/dev/shm) if possible, so that a measurement shows the cost of the client and not that of a disk.
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
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urlsplit

from island_fast.bench.island_command import make_child_environment
from island_fast.bench.swift_process import KINDS
from island_fast.errors import IslandError, NotFoundError

__all__ = ["Account", "find_folder_in_memory", "run_swift", "use_account"]

_USER = "bench:bench"
_KEY = secrets.token_hex(16)
_TIMEOUT = 180.0  # seconds until a server answers; on a busy machine that takes long

Conf = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Account:
    """How clients sign in (environment variables), and an account that is signed in: port, path and token."""

    variables: Mapping[str, str]
    port: int
    path: str
    token: str

    def through(self, port: int) -> Account:
        """Return the same account for clients that reach it by another port, such as that of a proxy."""
        return replace(self, variables={**self.variables, "ST_AUTH": _make_auth_url(port)})

    def remove_objects(self, container: str) -> None:
        """Remove what is in a container, if it exists. Raises IslandError if an object cannot be removed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT)
        headers = {"X-Auth-Token": self.token}
        with contextlib.closing(connection):
            while True:
                connection.request("GET", f"{self.path}/{container}", headers=headers)
                answer = connection.getresponse()
                names = answer.read().decode().splitlines()
                if answer.status != 200:  # 204 if it is empty, 404 if there is none
                    return
                for name in names:
                    connection.request("DELETE", f"{self.path}/{container}/{quote(name)}", headers=headers)
                    answer = connection.getresponse()
                    answer.read()
                    if answer.status not in (204, 404):  # a listing can be behind
                        raise IslandError(f"the bench's Swift refused to remove an object ({answer.status})")


@contextlib.contextmanager
def run_swift(container: str) -> Iterator[Account]:
    """Run a Swift with an empty container while the body runs.

    Raises NotFoundError if the package is not installed, IslandError if a server does not start.
    """
    if importlib.util.find_spec("swift") is None:
        raise NotFoundError("the package swift is not installed; run: pip install swift")
    root = Path(tempfile.mkdtemp(prefix="island-bench-swift-", dir=find_folder_in_memory()))
    running: list[subprocess.Popen[bytes]] = []
    try:
        ports = _find_free_ports()
        _configure(root, ports)
        program = [sys.executable, "-m", "island_fast.bench.swift_process"]
        variables = {**os.environ, **make_child_environment()}
        subprocess.run([*program, "rings", root, json.dumps(ports)], check=True, env=variables)
        for kind in ("proxy", *KINDS):
            with open(root / f"{kind}.log", "wb") as log:
                command = [*program, "serve", kind, str(root / f"{kind}.conf")]
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=variables))
        for kind, server in zip(("proxy", *KINDS), running, strict=True):
            _wait_until_ready(root, kind, ports[kind], server)
        account = _sign_in(ports["proxy"])
        _make_container(account, container)
        yield account
    finally:
        for server in running:
            server.kill()
            server.wait()
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def use_account(account: Account) -> Iterator[None]:
    """Set the environment so that clients of this process sign in to this account while the body runs."""
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


def find_folder_in_memory() -> str:
    """Return a folder, in memory if possible, whose files can have attributes as large as those of Swift."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder) as probe:
            os.setxattr(probe.name, "user.swift.metadata", b"x" * 2000)
            return folder
    raise IslandError(
        "Swift needs extended attributes, and neither /dev/shm nor TMPDIR supports them; set TMPDIR"
    )


def _find_free_ports() -> dict[str, int]:
    """Return a free port for each server."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(KINDS))]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return dict(zip(("proxy", *KINDS), ports, strict=True))


def _configure(root: Path, ports: Mapping[str, int]) -> None:
    """Write swift.conf and the configuration of every server."""
    _write_conf(
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
        _write_conf(
            root / f"{kind}.conf",
            {"DEFAULT": common, **(_PROXY if kind == "proxy" else _make_storage_conf(kind))},
        )


_PROXY: Conf = {
    "pipeline:main": {
        "pipeline": "catch_errors gatekeeper healthcheck cache listing_formats tempauth proxy-server"
    },
    "filter:listing_formats": {"use": "egg:swift#listing_formats"},
    "filter:catch_errors": {"use": "egg:swift#catch_errors"},
    "filter:gatekeeper": {"use": "egg:swift#gatekeeper"},
    "filter:healthcheck": {"use": "egg:swift#healthcheck"},
    "filter:cache": {"paste.filter_factory": "island_fast.bench.swift_process:make_cache_filter"},
    "filter:tempauth": {
        "use": "egg:swift#tempauth",
        "user_bench_bench": f"{_KEY} .admin",
        # With signed tokens, no server needs to remember them.
        "fernet_key_1": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "active_fernet_key_id": "1",
    },
    "app:proxy-server": {"use": "egg:swift#proxy", "account_autocreate": "true"},
}


def _make_storage_conf(kind: str) -> Conf:
    return {
        "pipeline:main": {"pipeline": f"healthcheck {kind}-server"},
        "filter:healthcheck": {"use": "egg:swift#healthcheck"},
        f"app:{kind}-server": {"use": f"egg:swift#{kind}"},
    }


def _write_conf(path: Path, sections: Conf) -> None:
    parser = configparser.RawConfigParser()
    parser.read_dict(sections)
    with open(path, "w") as file:
        parser.write(file)


def _wait_until_ready(root: Path, kind: str, port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers. Raises IslandError with its last output if it does not."""
    end = time.monotonic() + _TIMEOUT
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            if _request(port, "GET", "/healthcheck", {}).status == 200:
                return
        time.sleep(0.02)
    output = (root / f"{kind}.log").read_text(errors="replace")[-1000:]
    raise IslandError(f"Swift's {kind} server did not start; its last output: {output}")


def _request(port: int, method: str, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Make one request; return the response, without its body."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)) as connection:
        connection.request(method, path, headers=headers)
        with connection.getresponse() as answer:
            return answer


def _make_auth_url(port: int) -> str:
    return f"http://127.0.0.1:{port}/auth/v1.0"


def _sign_in(port: int) -> Account:
    headers = _request(port, "GET", "/auth/v1.0", {"X-Auth-User": _USER, "X-Auth-Key": _KEY}).headers
    variables = {"ST_AUTH": _make_auth_url(port), "ST_USER": _USER, "ST_KEY": _KEY}
    path = urlsplit(headers["X-Storage-Url"] or "").path
    return Account(variables, port, path, headers["X-Auth-Token"] or "")


def _make_container(account: Account, name: str) -> None:
    status = _request(account.port, "PUT", f"{account.path}/{name}", {"X-Auth-Token": account.token}).status
    if status not in (201, 202):
        raise IslandError(f"the bench's Swift refused to create a container ({status}); report this fault")
