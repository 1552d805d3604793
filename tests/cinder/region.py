"""A cloud region's Cinder: its own API, scheduler, database and messages, and hosts that hold volumes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.cinder.account import NATIVE_THREADS, Account
from tests.cinder.images import Glance
from tests.cinder.programs import Program, free_ports, wait_for, write_conf
from tests.cinder.rabbit import Rabbit

PROJECT = "0123456789abcdef0123456789abcdef"
BACKEND = "island"  # the section of the driver in every cinder.conf, its volume_backend_name and its type
_FILTERS = "AvailabilityZoneFilter,CapacityFilter,CapabilitiesFilter,JsonFilter"

_KEY_MANAGER = "cinder.keymgr.conf_key_mgr.ConfKeyManager"
_WAL = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('PRAGMA journal_mode=WAL')"

Sections = dict[str, dict[str, object]]


class Region:
    """One whole Cinder, whose services are started one by one.

    Services are named "api", "scheduler", "volume-HOST" and "backup-HOST"; `service(name)` is the Program, to
    be killed and started. Each host has a cinder.conf, a state folder and, below the account's `run`, a
    folder of its own on a tmpfs. `configure` changes what a host's cinder.conf says.
    """

    def __init__(self, name: str, account: Account, rabbit: Rabbit, glance: Glance) -> None:
        self.name = name
        self.account = account
        self._rabbit = rabbit
        self._glance = glance
        self.folder = account.folder(f"region-{name}")
        [self.port] = free_ports(1)
        self._programs: dict[str, Program] = {}
        self._written: dict[str, Sections] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/v3"

    def service(self, name: str) -> Program:
        """The program by this name, started or not."""
        if name not in self._programs:
            kind, _, host = name.partition("-")
            command = [
                self.account.bin / f"cinder-{kind}",
                "--config-file",
                self.conf(host or "control"),
            ]
            log = self.folder / f"{name}.log"
            env = self.account.environment()
            if kind == "api":  # the server of its own that it starts here needs eventlet
                env = {name: value for name, value in env.items() if name not in NATIVE_THREADS}
            self._programs[name] = Program(name, command, log, env, self.account.ids)
        return self._programs[name]

    def conf(self, host: str) -> Path:
        return self.account.home / "etc" / f"cinder-{self.name}-{host}.conf"

    def run_folder(self, host: str) -> Path:
        """A host's folder on a tmpfs, which everyone can look into."""
        folder = self.account.run / f"{self.name}-{host}"
        if not folder.exists():
            folder.mkdir(0o755)
            shutil.chown(folder, *self.account.ids)
        return folder

    # -- starting and stopping

    def prepare(self) -> None:
        """Make its database. Its services can be started then, API and scheduler first."""
        self._write("control", {})
        self.manage("db", "sync")
        # It is kept in the file: those who read do not wait for those who write.
        self.account.call("python", "-c", _WAL, self._database)

    @property
    def _database(self) -> Path:
        return self.folder / "cinder.sqlite"

    def manage(self, *words: str) -> str:
        """What `cinder-manage WORDS` prints."""
        return self.account.call("cinder-manage", "--config-file", self.conf("control"), *words)

    def configure(
        self,
        host: str,
        backend: Mapping[str, object],
        defaults: Mapping[str, object] | None = None,
        more: Sections | None = None,
    ) -> bool:
        """Write a host's cinder.conf: the driver's section, what else [DEFAULT] says, `more` sections.

        True if it has changed; services read it when they start.
        """
        driver = {"volume_backend_name": BACKEND, **backend}
        sections: Sections = {**(more or {}), BACKEND: driver, "DEFAULT": dict(defaults or {})}
        changed = self._written.get(host) != sections
        self._write(host, sections)
        return changed

    def stop(self) -> None:
        """End all its services at once."""
        for program in self._programs.values():
            program.kill()

    def complaints(self) -> str:
        """The last errors of each of its logs."""
        return "\n".join(f"-- {name}\n{one.complaints()}" for name, one in self._programs.items())

    def await_line(self, name: str, text: str, after: int = 0) -> None:
        """Return when a service has said `text`, in its log after this many characters."""
        program = self.service(name)
        wait_for(f"{name} says {text!r}", lambda: text in program.text()[after:], program.complaints)

    # -- configuration

    def _write(self, host: str, sections: Sections) -> None:
        self._written[host] = sections
        state = self.account.folder(f"region-{self.name}/{host}")
        common: dict[str, object] = {**self._common(), "host": host, "state_path": state}
        common["backup_posix_path"] = state / "backups"
        common["image_conversion_dir"] = state / "conversion"
        database = f"sqlite:///{self._database}?timeout=60"
        known: Sections = {
            "DEFAULT": common,
            "database": {"connection": database, "sqlite_synchronous": "False"},
            "oslo_concurrency": {"lock_path": state},
            # It lets there be encrypted volume types.
            "key_manager": {"backend": _KEY_MANAGER, "fixed_key": "00" * 32},
        }
        path = self.conf(host)
        names = {**known, **sections}
        write_conf(path, {name: {**known.get(name, {}), **sections.get(name, {})} for name in names})
        shutil.chown(path, 0, self.account.ids[1])
        path.chmod(0o640)  # passwords are in it

    def _common(self) -> dict[str, object]:
        """What every cinder.conf says. Timers are as short as Cinder allows, quotas none."""
        etc = self.account.cinder_etc
        return {
            "auth_strategy": "noauth",
            "api_paste_config": etc / "api-paste.ini",
            "resource_query_filters_file": etc / "resource_filters.json",
            "rootwrap_config": self.account.rootwrap,
            "osapi_volume_listen": "127.0.0.1",
            "osapi_volume_listen_port": self.port,
            "osapi_volume_workers": 1,
            "my_ip": "127.0.0.1",
            "transport_url": self._rabbit.url(self.name),
            "rpc_response_timeout": 120,
            "enabled_backends": BACKEND,
            "default_volume_type": BACKEND,
            "storage_availability_zone": "nova",
            "scheduler_default_filters": _FILTERS,
            "scheduler_driver_init_wait_time": 1,
            "backend_stats_polling_interval": 3,
            "report_interval": 1,
            "service_down_time": 20,
            "periodic_interval": 5,
            "periodic_fuzzy_delay": 0,
            "glance_api_servers": self._glance.url,
            "verify_glance_signatures": "disabled",
            "enable_force_upload": True,
            "backup_driver": "cinder.backup.drivers.posix.PosixBackupDriver",
            "backup_compression_algorithm": "zstd",
            "backup_use_same_host": True,
            "snapshot_same_host": True,
            "quota_volumes": -1,
            "quota_snapshots": -1,
            "quota_backups": -1,
            "quota_gigabytes": -1,
            "quota_backup_gigabytes": -1,
        }
