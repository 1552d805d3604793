"""The driver against Cinder's interface and compliance suite, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMPLIANCE = """
import os, sys, unittest
import cinder
os.chdir(os.path.dirname(os.path.dirname(cinder.__file__)))  # the suite walks a relative path
from cinder import objects
objects.register_all()
import island_fast.driver
from cinder.tests.compliance import test_volume_drivers as suite
names = [driver.class_fqn for driver in suite.VOLUME_DRIVERS]
assert "island_fast.driver.IslandDriver" in names, names
unittest.main(module=suite, argv=["compliance"])
"""

OPTIONS = """
from cinder import objects
objects.register_all()
from island_fast.driver import IslandDriver
for option in IslandDriver.get_driver_options():
    assert option.help, option.name
    assert not ({"password", "secret"} & set(option.dest.split("_"))) or option.secret, option.name
    print(option.dest)
"""


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_signatures_are_those_that_cinder_calls() -> None:
    done = python("tests/cinder/interface.py")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_answers_that_cinder_relies_on() -> None:
    done = python("tests/cinder/answers.py")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_cinders_own_compliance_suite() -> None:
    done = python("-c", COMPLIANCE)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split("Ran ")[1].split()[0]) > 100, done.stderr


def test_every_option_has_a_help_text_and_secrets_are_secret() -> None:
    done = python("-c", OPTIONS)
    assert done.returncode == 0, done.stderr
    assert {"island_repository", "island_volumes_dir", "password", "auth_url"} <= set(done.stdout.split())


def test_the_document_names_every_option_of_the_drivers_own() -> None:
    options = set(re.findall(r'"(island_\w+)"', (ROOT / "island_fast" / "cinder" / "options.py").read_text()))
    told = set(re.findall(r"^\| `(island_\w+)`", (ROOT / "docs" / "cinder.md").read_text(), re.MULTILINE))
    assert options == told
