"""What programs that read images find in their environment."""

from __future__ import annotations

import pytest

from island_fast.qemu.programs import make_environment, run_program

SECRET = "hunter2secret"
CREDENTIALS = [
    *("OS_PASSWORD", "OS_AUTH_TOKEN", "OS_APPLICATION_CREDENTIAL_SECRET", "OS_CLOUD", "ST_KEY"),
    *("ISLAND_TO_OS_PASSWORD", "ISLAND_TO_ST_KEY", "AWS_SECRET_ACCESS_KEY", "RESTIC_PASSWORD"),
    *("GITHUB_TOKEN", "https_proxy", "HTTP_PROXY"),
]


def test_credentials_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CREDENTIALS:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    seen = run_program(["env"], env={"MORE": "1"}).stdout
    assert SECRET not in seen
    for line in ("LD_LIBRARY_PATH=/opt/lib", "LC_ALL=C", "MORE=1"):
        assert line in seen.splitlines()
    assert {"PATH"} <= set(make_environment())
