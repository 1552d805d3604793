"""Real services for the tests of the Cinder driver: started once, for the first test that asks for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cinder.services import Services
from tests.conftest import make_swift_server


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that fails shows what the services complained of."""
    outcome: Any = yield
    report = outcome.get_result()
    running = getattr(item, "funcargs", {}).get("services")
    if report.failed and isinstance(running, Services):
        report.sections.append(("errors of the services", running.complaints()))


@pytest.fixture(scope="session")
def services(request: pytest.FixtureRequest) -> Iterator[Services]:
    """RabbitMQ, Cinder, Glance and Swift on loopback, Cinder's services as a user of their own.

    With `--ceph` there is a Ceph in place of Swift.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can make the user that Cinder's services run as")
    for program in ("rabbitmq-server", "sudo"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed; `make test` does it")
    native = request.config.getoption("--native-threads")
    with Services(lambda: make_swift_server(request.config), native_threads=native) as running:
        yield running
