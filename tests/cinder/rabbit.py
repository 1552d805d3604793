"""A RabbitMQ of its own on loopback, with its own epmd: nothing that runs on the machine is disturbed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pwd
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.cinder.programs import Program, free_ports, listening, wait_for

_SERVER = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # the one in sbin insists on a login shell


class Rabbit:
    """One node, as user rabbitmq, with a virtual host for each cloud. Use as a context.

    `folder` is made here and is the node's whole world: configuration, data, log, cookie.
    """

    def __init__(self, folder: Path, clouds: Sequence[str]) -> None:
        self.folder = folder
        self._clouds = clouds
        self._secret = secrets.token_hex(8)
        account = pwd.getpwnam("rabbitmq")
        self._user = (account.pw_uid, account.pw_gid)
        self._epmd_port, self._node_port, self.port = free_ports(3)
        self._epmd = self._program("epmd", ["epmd", "-address", "127.0.0.1", "-port", str(self._epmd_port)])
        self._server = self._program("rabbit", [_SERVER])

    def url(self, cloud: str) -> str:
        """The transport_url of one cloud."""
        return f"rabbit://cloud:{self._secret}@127.0.0.1:{self.port}/{cloud}"

    def _program(self, name: str, command: list[str]) -> Program:
        env = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.folder),
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"island-{self._secret}@localhost",
            "RABBITMQ_DIST_PORT": str(self._node_port),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": "/nonexistent",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
        }
        return Program(name, command, self.folder / f"{name}.log", env, self._user)

    def _write(self) -> None:
        self.folder.mkdir()
        salt = secrets.token_bytes(4)
        hashed = base64.b64encode(salt + hashlib.sha256(salt + self._secret.encode()).digest()).decode()
        everything = {"user": "cloud", "configure": ".*", "write": ".*", "read": ".*"}
        definitions = {
            "users": [{"name": "cloud", "password_hash": hashed, "tags": ""}],
            "vhosts": [{"name": cloud} for cloud in self._clouds],
            "permissions": [{"vhost": cloud, **everything} for cloud in self._clouds],
        }
        (self.folder / "definitions.json").write_text(json.dumps(definitions))
        (self.folder / "plugins").write_text("[].\n")
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"load_definitions = {self.folder}/definitions.json\n"
            "disk_free_limit.absolute = 1MB\n"
        )
        for path in (self.folder, *self.folder.iterdir()):
            os.chown(path, *self._user)
            path.chmod(0o700)

    def start(self) -> None:
        """Begin to start it: `await_start` returns when it serves."""
        self._write()
        self._epmd.start()
        wait_for("epmd listens", lambda: listening(self._epmd_port), self._epmd.text)
        self._server.start()

    def await_start(self) -> None:
        """Return when it serves all clouds."""
        ready = "Server startup complete"
        wait_for("RabbitMQ serves", lambda: ready in self._server.text(), self._server.text)

    def stop(self) -> None:
        """End it at once; its data are for nobody."""
        self._server.kill()
        self._epmd.kill()

    def __enter__(self) -> Self:
        self.start()
        self.await_start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
