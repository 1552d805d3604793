"""What tests write to volumes and read from them, through attachments, and what is in repositories."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.cinder.account import ROOT
from tests.cinder.cloud import Attached, Cloud, exceptions
from tests.cinder.services import Services

MIB = 1 << 20


def connector(host: str) -> dict[str, Any]:
    """What Nova on a host says about itself, each host with an address of its own."""
    return {**Cloud.connector(None, host), "ip": f"192.0.2.{sum(host.encode()) % 251}"}  # type: ignore[arg-type]


@contextlib.contextmanager
def attached(cloud: Cloud, volume: Any, host: str) -> Iterator[Attached]:
    """The volume attached to `host`, while the body runs; fails with what the services said."""
    try:
        attachment = cloud.attach(volume, connector(host))
        try:
            yield attachment
        finally:
            cloud.detach(attachment, volume)
    except exceptions.ClientException as error:
        raise AssertionError(f"{error}\n{cloud.why(volume)}") from error


def put(device: Path, data: bytes, at: int = 0) -> None:
    """Write to a device as a guest would, flushed."""
    fd = os.open(device, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, at) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def got(device: Path, size: int, at: int = 0) -> bytes:
    with open(device, "rb") as file:
        file.seek(at)
        return file.read(size)


def write(cloud: Cloud, volume: Any, host: str, data: bytes, at: int = 0) -> None:
    """Write to a volume that is not attached."""
    with attached(cloud, volume, host) as here:
        put(here.device, data, at)


def read(cloud: Cloud, volume: Any, host: str, size: int, at: int = 0) -> bytes:
    """Read a volume that is not attached."""
    with attached(cloud, volume, host) as here:
        return got(here.device, size, at)


def snapshots(services: Services, lineage: str, region: str = "one") -> list[dict[str, Any]]:
    """The snapshots of a lineage in the region's repository, as the command `island` lists them."""
    swift = services.swift(region)
    url = str(services.island(region)["island_repository"])
    with tempfile.TemporaryDirectory() as state:
        env = {"ISLAND_REPOSITORY": url, "ISLAND_STATE": state, **swift.environment()}
        done = island(env, "list", "--volume", lineage)
    if done.returncode:
        assert json.loads(done.stdout)["error"] == "not-found", done.stdout + done.stderr
        return []
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def island(env: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "island_fast", *words, "--json"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )
