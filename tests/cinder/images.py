"""A real Glance on loopback, without Keystone: images are files, records in SQLite."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.cinder.programs import Program, free_ports, listening, wait_for, write_conf

_PROCESS = Path(__file__).with_name("images_process.py")
# Without Keystone nobody has a role, which is what the default rules ask for.
_ALLOWED = (
    *(f"{verb}_image" for verb in ("add", "get", "modify", "delete", "publicize", "upload", "download")),
    *("get_images", "get_image_location", "set_image_location"),
)


class Glance:
    """One glance-api, run by whoever runs the tests, with everything below `folder`. Use as a context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        [self.port] = free_ports(1)
        env = {"PATH": os.environ["PATH"], "OS_GLANCE_CONFIG_DIR": str(folder), "PYTHONWARNINGS": "ignore"}
        self._env = env
        self._program = Program(
            "glance", [sys.executable, _PROCESS, str(self.port)], folder / "glance.log", env
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _write(self) -> None:
        for place in (self.folder, self.folder / "images", self.folder / "staging", self.folder / "tasks"):
            place.mkdir(parents=True)
        shutil.copy(Path(sys.prefix) / "etc" / "glance" / "glance-api-paste.ini", self.folder)
        (self.folder / "policy.yaml").write_text("".join(f'"{rule}": ""\n' for rule in _ALLOWED))
        database = f"sqlite:///{self.folder}/glance.sqlite?timeout=30"
        sections = {
            "DEFAULT": {
                "enabled_backends": "files:file",
                "enabled_import_methods": "[]",
                "worker_self_reference_url": self.url,
            },
            "database": {"connection": database, "sqlite_synchronous": "False"},
            "glance_store": {"default_backend": "files"},
            "files": {"filesystem_store_datadir": self.folder / "images"},
            "os_glance_staging_store": {"filesystem_store_datadir": self.folder / "staging"},
            "os_glance_tasks_store": {"filesystem_store_datadir": self.folder / "tasks"},
            "oslo_concurrency": {"lock_path": self.folder},
            "oslo_policy": {
                "policy_file": self.folder / "policy.yaml",
                "enforce_scope": False,
                "enforce_new_defaults": False,
            },
        }
        write_conf(self.folder / "glance-api.conf", sections)

    def start(self) -> None:
        """Begin to start it: `await_start` returns when it answers."""
        self._write()
        command = [sys.executable, Path(sys.prefix) / "bin" / "glance-manage"]
        conf = ["--config-file", self.folder / "glance-api.conf"]
        done = subprocess.run(
            [*command, *conf, "db_sync"], capture_output=True, text=True, check=False, env=self._env
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self._program.start()

    def await_start(self) -> None:
        """Return when it answers."""

        def up() -> bool:
            assert self._program.running, self._program.text()[-4000:]
            return listening(self.port)

        wait_for("Glance answers", up, self._program.text)

    def stop(self) -> None:
        self._program.kill()

    def __enter__(self) -> Self:
        self.start()
        self.await_start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- images

    def upload(self, name: str, data: bytes, disk_format: str = "raw") -> str:
        """Make an image of these bytes; its id."""
        body = {"name": name, "disk_format": disk_format, "container_format": "bare", "visibility": "public"}
        made = json.loads(self._ask("POST", "/v2/images", json.dumps(body).encode(), "application/json"))
        self._ask("PUT", f"/v2/images/{made['id']}/file", data, "application/octet-stream")
        return str(made["id"])

    def download(self, image: str) -> bytes:
        return self._ask("GET", f"/v2/images/{image}/file")

    def show(self, image: str) -> dict[str, object]:
        answer: dict[str, object] = json.loads(self._ask("GET", f"/v2/images/{image}"))
        return answer

    def _ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status < 300, f"{method} {path}: {answer.status} {data!r}\n{self._program.text()}"
            return data
        finally:
            connection.close()
