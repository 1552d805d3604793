"""Calls each method of the driver twice, as Cinder does when an answer was lost.

Run by test_repeats.py in a process of its own, as the services' user: python twice.py CONF HOST. CONF is a
host's configuration whose volume service does not run. Prints what each first and second call returned.
"""

import json
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

from cinder import objects
from cinder.cmd import volume as _patched  # noqa: F401 (it patches what must be patched, before all else)
from oslo_config import cfg
from oslo_log import log as logging

objects.register_all()

from cinder.volume import configuration, manager  # noqa: E402

from island_fast.driver import IslandDriver  # noqa: E402

GIB = 1 << 30


class Kept(SimpleNamespace):
    """A volume or a snapshot as the driver sees it: a row of the database."""

    def update(self, values):
        vars(self).update(values)

    def save(self):
        """Kept in memory is kept enough."""


def volume(**more):
    identity = str(uuid.uuid4())
    known = {"id": identity, "name_id": identity, "size": 1, "status": "available", "encryption_key_id": None}
    return Kept(**known, provider_id=None, provider_location=None, host="twice@island#island", **more)


def snapshot(of):
    return Kept(id=str(uuid.uuid4()), volume=of, provider_id=None)


class Calls:
    """Calls of a driver, each made twice; but `manage_existing`: its reference is gone then."""

    def __init__(self, driver):
        self._driver = driver

    def __call__(self, name, thing, *more, times=2):
        """All answers go to standard output; of a thing that is told about, the last is kept."""
        answers = [getattr(self._driver, name)(*more_before(name), thing, *more) for _ in range(times)]
        print(json.dumps([name, *answers]))
        if isinstance(answers[-1], dict) and name.startswith(("create_", "manage_")):
            thing.update(answers[-1])
        return answers[-1]


def more_before(name):
    """Some methods are given a context first, of which the driver makes no use."""
    return [None] if name in {"create_export", "ensure_export", "remove_export", "revert_to_snapshot"} else []


def walk(call, connector):
    first = volume()
    call("create_volume", first)
    call("create_export", first, connector)
    path = call("initialize_connection", first, connector)["data"]["device_path"]
    assert int(Path("/sys/block", Path(path).resolve().name, "size").read_text()) == GIB // 512
    call("ensure_export", first)
    call("extend_volume", first, 2)
    first.size = 2
    taken = snapshot(first)
    call("create_snapshot", taken)
    failed = snapshot(first)
    clone, child = volume(), volume()
    clone.size = child.size = 2
    call("create_cloned_volume", clone, first)
    call("terminate_connection", first, connector)
    call("remove_export", first)
    call("create_volume_from_snapshot", child, taken)
    call("create_export", child, connector)
    call("remove_export", child)
    call("revert_to_snapshot", first, taken)
    for one in (failed, taken):
        call("delete_snapshot", one)
    call("unmanage", clone)
    managed = volume()
    call("manage_existing_get_size", managed, {"source-name": clone.id})
    call("manage_existing", managed, {"source-name": clone.id}, times=1)
    for one in (first, child, managed):
        call("delete_volume", one)


def main(conf, host):
    cfg.CONF(["--config-file", conf], project="cinder")
    logging.setup(cfg.CONF, "cinder")
    options = configuration.Configuration(manager.volume_backend_opts, config_group="island")
    driver = IslandDriver(configuration=options, host=f"{host}@island")
    driver.do_setup(None)
    driver.check_for_setup_error()
    walk(Calls(driver), {"host": host, "ip": "127.0.0.1"})


if __name__ == "__main__":
    main(*sys.argv[1:])
