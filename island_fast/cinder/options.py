"""The Cinder driver's options in cinder.conf: where volumes are, and how to sign in to stores.

The options of a store stand in the driver's own section for the repository that it writes to, and in a
section of its own for every other one. They are keystoneauth's, under the names of every OpenStack service.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from keystoneauth1 import loading
from oslo_config import cfg

from island_fast.cinder.island_command import Commands
from island_fast.errors import UsageError

__all__ = ["STORE_OPTIONS", "VOLUME_OPTIONS", "repositories"]

VOLUME_OPTIONS = [
    cfg.StrOpt(
        "island_volumes_dir",
        default="$state_path/island/volumes",
        help="Directory of the volumes, on the host's own disks. Its file system is the capacity reported.",
    ),
    cfg.StrOpt(
        "island_state_dir",
        default="$state_path/island/state",
        help="Directory of this host's local state: its writer id, locks and caches. It must not be shared "
        "between hosts.",
    ),
    cfg.StrOpt(
        "island_run_dir",
        default="/run/island",
        help="Directory of sockets and of the links to block devices that Nova is given. It must be on a "
        "tmpfs: after a reboot a link to a device would lead to another volume.",
    ),
    cfg.ListOpt(
        "island_other_repositories",
        default=[],
        help="Names of repositories of other regions, from which snapshots and volumes may be managed. Each "
        "name is a section of this file with island_repository and how to sign in. They are only read.",
    ),
    cfg.BoolOpt(
        "island_lazy_images",
        default=True,
        help="Make the image of a volume when it is first attached, not when the volume is created.",
    ),
    cfg.IntOpt(
        "island_sweep_interval",
        default=6 * 3600,
        min=60,
        help="Seconds between two sweeps, which remove from the repository what no snapshot needs any more.",
    ),
    cfg.FloatOpt(
        "island_free_space_reserve",
        default=5.0,
        min=0.0,
        max=90.0,
        help="Percent of the file system of island_volumes_dir. With less than that free, pins are dropped, "
        "before a guest runs out of space: the next snapshot of such a volume scans it in full. With less "
        "than half of it, snapshots under way are given up.",
    ),
    cfg.ListOpt(
        "island_connector_hosts",
        default=[],
        help="Further names under which connectors of this host come, beside its host name, my_ip and the "
        "host of the service. Only this host can attach its volumes.",
    ),
]

_PLUGINS = ("password", "v3applicationcredential", "v1password")
_SESSION = ("cafile", "certfile", "keyfile", "insecure")
_ADAPTER = ("region_name", "valid_interfaces", "endpoint_override")


def _sign_in_options() -> list[cfg.Opt]:
    """Keystoneauth's options for the ways to sign in that make sense here, each once."""
    found: dict[str, cfg.Opt] = {}
    groups = [
        [one for one in loading.get_auth_common_conf_options() if one.dest == "auth_type"],
        *(loading.get_auth_plugin_conf_options(name) for name in _PLUGINS),
        [one for one in loading.get_session_conf_options() if one.dest in _SESSION],
        [one for one in loading.get_adapter_conf_options(include_deprecated=False) if one.dest in _ADAPTER],
    ]
    for option in (one for group in groups for one in group):
        named = copy.copy(option)
        named.name = option.dest  # Cinder looks options up by their names, which must not have dashes
        found.setdefault(option.dest, named)
    return list(found.values())


STORE_OPTIONS = [
    cfg.StrOpt(
        "island_repository",
        help="Where snapshots are kept: swift://CONTAINER/PREFIX, or a directory. The container must exist.",
    ),
    cfg.StrOpt(
        "island_cloud",
        help="Name of a cloud in clouds.yaml to sign in to, in place of the options of keystoneauth.",
    ),
    *_sign_in_options(),
]


def repositories(section: Any) -> dict[str, Commands]:
    """The repositories that the options name: the driver's own under "", the others under their names.

    `section` gives the driver's options as attributes. UsageError names what is missing.
    """
    found, sections = {}, {"": section}
    for name in section.island_other_repositories:
        cfg.CONF.register_opts(STORE_OPTIONS, group=name)
        sections[name] = cfg.CONF[name]
    for name, options in sections.items():
        if not options.island_repository:
            where = f"section [{name}]" if name else "the driver's section"
            raise UsageError(f"island_repository is missing in {where} of cinder.conf")
        environment = _credentials(options) | {"ISLAND_STATE": section.island_state_dir}
        found[name] = Commands(options.island_repository, environment, name)
    return found


def _credentials(options: Any) -> dict[str, str]:
    """How the command `island` is told to sign in."""
    if options.island_cloud:
        keys = ("OS_CLIENT_CONFIG_FILE", "OS_CLIENT_SECURE_FILE")
        files = {key: os.environ[key] for key in keys if key in os.environ}
        return {"OS_CLOUD": options.island_cloud, **files}
    kind = options.auth_type or "password"
    if kind == "v1password":
        names = {"ST_AUTH": "auth_url", "ST_USER": "username", "ST_KEY": "password"}
    else:
        plugin = loading.get_auth_plugin_conf_options(kind)
        names = {f"OS_{one.dest.upper()}": one.dest for one in plugin}
    names |= {"OS_REGION_NAME": "region_name", "OS_STORAGE_URL": "endpoint_override"}
    names |= {"OS_CACERT": "cafile", "OS_CERT": "certfile", "OS_KEY": "keyfile", "OS_INSECURE": "insecure"}
    values = {name: _text(getattr(options, dest, None)) for name, dest in names.items()}
    if options.valid_interfaces:
        values["OS_INTERFACE"] = options.valid_interfaces[0]
    given = {name: value for name, value in values.items() if value}
    return given if kind == "v1password" or not options.auth_url else given | {"OS_AUTH_TYPE": kind}


def _text(value: object) -> str:
    if value is None or value is False:
        return ""
    return "true" if value is True else str(value)
