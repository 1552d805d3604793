"""The driver against Cinder's interface and compliance suite, each in a process of its own."""

from __future__ import annotations

import json
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

SIGN_IN = """
from keystoneauth1 import loading
from island_fast.cinder.options import STORE_OPTIONS
ours = {one.dest: one for one in STORE_OPTIONS}
groups = {kind: loading.get_auth_plugin_conf_options(kind) for kind in sys.argv[1:]}
for kind, options in groups.items():
    for theirs in options:
        assert theirs.dest in ours, (kind, theirs.dest)
        assert ours[theirs.dest].secret == theirs.secret, theirs.dest
common = [*loading.get_session_conf_options(), *loading.get_adapter_conf_options(include_deprecated=False)]
extra = set(ours) - {one.dest for one in [*common, *(one for options in groups.values() for one in options)]}
print(*sorted(extra))
"""

NO_SERVICE = """
import json, sys
from cinder import objects
objects.register_all()
from cinder.image import image_utils
from cinder.volume import configuration, driver
from oslo_config import cfg
sys.modules |= {name: None for name in sys.modules if name.startswith("keystoneauth1")}  # no import succeeds
from island_fast.driver import IslandDriver
for section in sys.argv[2:]:
    cfg.CONF(["--config-file", sys.argv[1]], project="cinder")
    cfg.CONF.register_group(cfg.OptGroup(section))
    options = configuration.Configuration([], config_group=section)
    driver = IslandDriver(configuration=options, host=f"here@{section}")
    driver.do_setup(None)
    found = driver._repositories
    print(json.dumps({name: {"url": one.url, **one.environment} for name, one in found.items()}))
"""

CONF = """
[DEFAULT]
state_path = /nowhere
[backend_defaults]
island_repository = swift://box/all
auth_url = https://keystone/v3
cafile = /etc/authority.pem
[by-password]
username = cinder
password = xyzzy
project_name = service
user_domain_name = Default
region_name = two
valid_interfaces = internal,public
insecure = true
[by-credential]
island_repository = swift://box/own
auth_type = v3applicationcredential
application_credential_id = 4cb3
application_credential_secret = xyzzy
island_other_repositories = plain
[plain]
island_repository = swift://box/theirs
auth_type = v1password
auth_url = http://swift/auth/v1.0
username = test:tester
password = xyzzy
endpoint_override = http://swift/v1/AUTH_test
[by-cloud]
island_cloud = ours
[folder]
island_repository = /srv/repository
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
    assert int(done.stderr.split("Ran ")[1].split()[0]) > 70, (
        done.stderr
    )  # a test for each driver; Cinder 26 has 78


def test_every_option_has_a_help_text_and_secrets_are_secret() -> None:
    done = python("-c", OPTIONS)
    assert done.returncode == 0, done.stderr
    assert {"island_repository", "island_volumes_dir", "password", "auth_url"} <= set(done.stdout.split())


def test_the_options_for_signing_in_are_keystoneauths() -> None:
    done = python("-c", f"import sys{SIGN_IN}", "password", "v3applicationcredential", "v1password")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["auth_type", "island_cloud", "island_repository"]


def test_where_there_is_no_service_every_option_is_there(tmp_path: Path) -> None:
    """In a process of cinderlib's no service has registered any, and keystoneauth cannot be asked."""
    (tmp_path / "cinder.conf").write_text(CONF)
    sections = ("by-password", "by-credential", "by-cloud", "folder")
    done = python("-c", NO_SERVICE, str(tmp_path / "cinder.conf"), *sections)
    assert done.returncode == 0, done.stderr
    found = dict(zip(sections, map(json.loads, done.stdout.splitlines()), strict=True))
    state = {"ISLAND_STATE": "/nowhere/island/state"}
    keystone = {"OS_AUTH_URL": "https://keystone/v3", "OS_CACERT": "/etc/authority.pem"}
    credential = {"OS_APPLICATION_CREDENTIAL_ID": "4cb3", "OS_APPLICATION_CREDENTIAL_SECRET": "xyzzy"}
    user = {"OS_USERNAME": "cinder", "OS_PASSWORD": "xyzzy", "OS_USER_DOMAIN_NAME": "Default"}
    where = {"OS_PROJECT_NAME": "service", "OS_REGION_NAME": "two", "OS_INTERFACE": "internal"}
    by_password = {"OS_AUTH_TYPE": "password", "OS_INSECURE": "true", **keystone, **user, **where}
    by_credential = {"OS_AUTH_TYPE": "v3applicationcredential", **keystone, **credential}
    plain = {"ST_AUTH": "http://swift/auth/v1.0", "ST_USER": "test:tester", "ST_KEY": "xyzzy"}
    assert found["by-password"] == {"": {"url": "swift://box/all", **by_password, **state}}
    assert found["by-credential"] == {
        "": {"url": "swift://box/own", **by_credential, **state},
        "plain": {
            "url": "swift://box/theirs",
            "OS_STORAGE_URL": "http://swift/v1/AUTH_test",
            **plain,
            **state,
        },
    }
    assert found["by-cloud"] == {"": {"url": "swift://box/all", "OS_CLOUD": "ours", **state}}
    assert found["folder"] == {
        "": {"url": "/srv/repository", "OS_AUTH_TYPE": "password", **keystone, **state}
    }


def test_the_document_names_every_option_of_the_drivers_own() -> None:
    options = set(re.findall(r'"(island_\w+)"', (ROOT / "island_fast" / "cinder" / "options.py").read_text()))
    told = set(re.findall(r"^\| `(island_\w+)`", (ROOT / "docs" / "cinder.md").read_text(), re.MULTILINE))
    assert options == told
