"""A real Ceph with its object gateway on loopback, behind the faults of the tests' Swift.

    with CephServer() as ceph:
        os.environ.update(ceph.environment())

One mon, one osd that keeps everything in memory, a radosgw or several, no cephx: about ten seconds. It can
stand in for a `SwiftServer` of one node. Programs are this machine's, or those of the root folder that the
environment variable CEPH_ROOT names (see `make ceph`).
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from tests.support.swift_server import StartError, SwiftServer, find_free_ports

_FRONT = Path(__file__).with_name("ceph_front.py")
_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")


def missing() -> str:
    """Return which programs a `CephServer` lacks, in words; "" if it lacks none."""
    root = os.environ.get("CEPH_ROOT", "")
    path = os.pathsep.join(f"{root}/{folder}" for folder in ("usr/bin", "usr/sbin")) if root else None
    lacking = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    return f"{', '.join(lacking)}: run scripts/install_packages ceph" if lacking else ""


class CephServer(SwiftServer):
    """The processes, configuration and data of a Ceph, all below one temporary directory.

    The server "proxy" is the front with the faults; "mon", "osd", "gateway" and with several `gateways`
    "gateway-2" and so on are behind it, and each gateway gets a request in turn. The test user is the same as
    in Swift. `s3_key` and `s3_secret` are its credentials for S3 at `s3_address`. `options` are settings of
    the gateways.
    """

    patience = 60.0  # for half a minute after a gateway was killed, others wait for it to confirm changes
    s3_key = "tester"
    s3_secret = uuid.uuid4().hex

    def __init__(self, gateways: int = 1, options: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._system = os.environ.get("CEPH_ROOT", "")
        self._gateways = ["gateway", *(f"gateway-{number}" for number in range(2, gateways + 1))]
        self._options = options or {}

    @property
    def s3_address(self) -> tuple[str, int]:
        """Host and port of the first gateway itself, without faults."""
        return "127.0.0.1", self.ports["gateway"]

    @property
    def _inside(self) -> Path:
        """The temporary directory as Ceph's programs see it."""
        return Path("/", self.root.relative_to(self._system or "/"))

    def _command(self, *argv: str) -> list[str]:
        conf = ["-c", f"{self._inside}/ceph.conf"] if argv[0] != "monmaptool" else []
        command = [argv[0], *conf, *argv[1:]]
        if not self._system:
            return command
        # Mounts of these namespaces end with their processes.
        mounts = 'mount --rbind /dev "$0/dev"; mount -t proc proc "$0/proc"; exec chroot "$0" "$@"'
        return ["unshare", "--mount", "sh", "-c", mounts, self._system, *command]

    def _run(self, *argv: str) -> str:
        """Run one of Ceph's programs to its end, and return what it prints."""
        env = {**os.environ, "LC_ALL": "C.UTF-8", "CEPH_CONF": f"{self._inside}/ceph.conf"}
        done = subprocess.run(
            self._command(*argv), capture_output=True, text=True, timeout=60, check=False, env=env
        )
        if done.returncode:
            raise StartError(f"{' '.join(argv)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def admin(self, *argv: str) -> str:
        """Run radosgw-admin, and return what it prints."""
        return self._run("radosgw-admin", *argv)

    def await_server(self, name: str) -> None:
        """Wait until a server that was started answers."""
        self._wait_until_ready(name)

    def set_option(self, name: str, value: object) -> None:
        """Change a setting of the running gateways, such as rgw_swift_token_expiration."""
        for gateway in self._gateways:
            self._ask_gateway(gateway, "config", "set", name, str(value))

    def count_served(self) -> list[int]:
        """Return how many requests each gateway has had since it was started."""
        dumps = [json.loads(self._ask_gateway(gateway, "perf", "dump")) for gateway in self._gateways]
        return [int(dump["rgw"]["req"]) for dump in dumps]

    def _ask_gateway(self, name: str, *command: str) -> str:
        return self._run("ceph", "daemon", f"{self._inside}/client.rgw.{name}.asok", *command)

    def version(self) -> str:
        """Return the version, such as 16.2.15."""
        return self._run("radosgw", "--version").split()[2]

    def _start(self) -> None:
        if lacking := missing():
            raise StartError(lacking)
        folder = f"{self._system}/tmp" if self._system else tempfile.gettempdir()
        self.root = Path(tempfile.mkdtemp(prefix="ceph-", dir=folder))
        names = ["proxy", "mon", "mon-v1", *self._gateways]
        self.ports = dict(zip(names, find_free_ports(len(names)), strict=True))
        address = f"v2:127.0.0.1:{self.ports['mon']},v1:127.0.0.1:{self.ports['mon-v1']}"
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        self._write_conf(fsid, address)
        for name in ("mon", "osd", *self._gateways):
            (self.root / name).mkdir()
        monmap = f"{self._inside}/monmap"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[{address}]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self.start_server("mon")
        self._run("ceph", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.start_server("osd")
        for name in self._gateways:
            self.start_server(name)
            self._wait_until_ready(name)
        self._make_user(self.user, self.key, "--access-key", self.s3_key, "--secret-key", self.s3_secret)
        self._make_user(*self.other)
        self.restart_server("proxy")

    def _make_user(self, user: str, key: str, *options: str) -> None:
        uid = user.partition(":")[0]
        self.admin("user", "create", "--uid", uid, "--display-name", uid, *options)
        swift = ["--subuser", user, "--key-type", "swift", "--secret-key", key, "--access", "full"]
        self.admin("subuser", "create", "--uid", uid, *swift)

    def _write_conf(self, fsid: str, address: str) -> None:
        inside = self._inside
        sections = {
            "global": {
                "fsid": fsid,
                "mon host": f"[{address}]",
                "public network": "127.0.0.0/8",
                # Without this the gateway asks the mon for the secure mode, which needs cephx.
                "ms mon client mode": "crc",
                **{f"auth {who} required": "none" for who in ("cluster", "service", "client")},
                "osd pool default size": "1",
                "osd pool default min size": "1",
                "osd pool default pg num": "2",
                "osd pool default pg autoscale mode": "off",
                "osd crush chooseleaf type": "0",
                "osd objectstore": "memstore",
                "memstore device bytes": str(3 << 30),
                "mon max pg per osd": "1000",
                "mon data": f"{inside}/mon",
                "osd data": f"{inside}/osd",
                "mon data avail crit": "1",
                "log file": f"{inside}/$name.log",
                "run dir": str(inside),
                "admin socket": f"{inside}/$name.asok",
            },
            "client": {
                # Quotas are enforced by numbers that would be ten minutes old.
                "rgw bucket quota ttl": "0",
                "rgw user quota bucket sync interval": "0",
                **self._options,
            },
            **{
                f"client.rgw.{name}": {
                    "rgw frontends": f"beast endpoint=127.0.0.1:{self.ports[name]}",
                    "rgw data": f"{inside}/{name}",
                }
                for name in self._gateways
            },
        }
        with open(self.root / "ceph.conf", "w") as file:
            for name, settings in sections.items():
                file.write(f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))

    def start_server(self, name: str) -> None:
        """Start one of the servers. It can take seconds until it answers."""
        daemons = {
            "mon": ("ceph-mon", "-f", "-i", "a"),
            "osd": ("ceph-osd", "-f", "-i", "0"),
            **{name: ("radosgw", "-f", "-n", f"client.rgw.{name}") for name in self._gateways},
        }
        if name == "proxy":
            ports = [str(self.ports[one]) for one in ("proxy", *self._gateways)]
            command = [sys.executable, str(_FRONT), *ports]
        else:
            command = ["setpriv", "--pdeathsig", "KILL", *self._command(*daemons[name])]
        with open(self.root / f"{name}.out", "ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _wait_until_ready(self, name: str) -> None:
        process = self._running[name]
        end = time.monotonic() + 90
        path = "/healthcheck" if name == "proxy" else "/swift/healthcheck"
        while time.monotonic() < end and process.poll() is None:
            try:
                self._control("GET", name, path)
                return
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
        log = (self.root / f"{name}.out").read_text(errors="replace")
        raise StartError(f"{name} did not start (exit {process.poll()}):\n{log[-4000:]}")

    def mend(self) -> None:
        """Start every server that is not running, and remove all faults."""
        for name in ("mon", "osd", *self._gateways, "proxy"):
            if name not in self._running or self._running[name].poll() is not None:
                self.restart_server(name)
        self.calm()

    def stop(self) -> None:
        """End all servers and remove their data. Nothing of it is needed, so they need not tidy up."""
        for process in self._running.values():
            process.kill()
        super().stop()
