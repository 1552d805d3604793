"""The Cinder driver's options in cinder.conf: where volumes are, and how to sign in to stores.

The options of a store are in the driver's section for the repository that the driver writes to, and in a
separate section for every other repository. Those for signing in are keystoneauth's, under the names that
every OpenStack service uses.
"""

from __future__ import annotations

import os
from typing import Any

from oslo_config import cfg

from island_fast.cinder.island_command import IslandCommand
from island_fast.errors import UsageError

__all__ = ["STORE_OPTIONS", "VOLUME_OPTIONS", "read_repositories"]

VOLUME_OPTIONS = [
    cfg.StrOpt(
        "island_volumes_dir",
        default="$state_path/island/volumes",
        help="Directory of the volumes, on the host's own disks. Its file system's capacity is reported.",
    ),
    cfg.StrOpt(
        "island_state_dir",
        default="$state_path/island/state",
        help="Directory of this host's local state: its writer id, locks, caches. Hosts must not share it.",
    ),
    cfg.StrOpt(
        "island_run_dir",
        default="/run/island",
        help="Directory of sockets, and of the links to block devices that Nova uses. It must be on a tmpfs, "
        "because after a reboot a link could lead to another volume's device.",
    ),
    cfg.ListOpt(
        "island_other_repositories",
        default=[],
        help="Names of other regions' repositories, whose snapshots can be managed here. Each name is a "
        "section of this file, with island_repository and options for signing in. They are only read.",
    ),
    cfg.BoolOpt(
        "island_lazy_images",
        default=True,
        help="Create the image of a volume when it is first attached, not when the volume is created.",
    ),
    cfg.IntOpt(
        "island_sweep_interval",
        default=6 * 3600,
        min=60,
        help="Seconds between two sweeps. A sweep removes from the repository what no snapshot needs.",
    ),
    cfg.FloatOpt(
        "island_free_space_reserve",
        default=5.0,
        min=0.0,
        max=90.0,
        help="Percentage of the file system of island_volumes_dir to keep free. With less free space, pins "
        "are dropped before a guest runs out of space, and the next snapshot of such a volume is a full "
        "scan. With less than half of it, running snapshots are aborted.",
    ),
    cfg.ListOpt(
        "island_connector_hosts",
        default=[],
        help="More names by which connectors may call this host, besides its host name, my_ip and the host "
        "of the service. Only this host can attach its volumes.",
    ),
]

_CREDENTIALS = [
    cfg.StrOpt("auth_url", help="Address of Keystone, or of TempAuth for v1password."),
    cfg.StrOpt("username", deprecated_name="user_name", help="Name of the user."),
    cfg.StrOpt("user_id", help="Id of the user."),
    cfg.StrOpt("user_domain_name", help="Name of the user's domain."),
    cfg.StrOpt("user_domain_id", help="Id of the user's domain."),
    cfg.StrOpt("password", secret=True, help="Password of the user."),
    cfg.StrOpt("application_credential_id", help="Id of the application credential."),
    cfg.StrOpt("application_credential_name", help="Name of the application credential."),
    cfg.StrOpt("application_credential_secret", secret=True, help="Secret of the application credential."),
    cfg.StrOpt("project_name", deprecated_name="tenant_name", help="Name of the project to sign in to."),
    cfg.StrOpt("project_id", deprecated_name="tenant_id", help="Id of the project to sign in to."),
    cfg.StrOpt("project_domain_name", help="Name of the project's domain."),
    cfg.StrOpt("project_domain_id", help="Id of the project's domain."),
    cfg.StrOpt("default_domain_name", help="Name of the domain of both the user and the project."),
    cfg.StrOpt("default_domain_id", help="Id of the domain of both the user and the project."),
    cfg.StrOpt("domain_name", help="Name of the domain to sign in to instead of a project."),
    cfg.StrOpt("domain_id", help="Id of the domain to sign in to instead of a project."),
    cfg.StrOpt("system_scope", help="What to sign in to instead of a project: all."),
    cfg.StrOpt("trust_id", help="Id of the trust to sign in with."),
]
"""What keystoneauth's plugins for signing in take, under its names.

These, and the others of `STORE_OPTIONS`, are written out here because the driver also runs where keystoneauth
cannot be asked for them: cinderlib puts an empty module in its place.
"""

STORE_OPTIONS = [
    cfg.StrOpt(
        "island_repository",
        help="Where snapshots are kept: swift://CONTAINER/PREFIX, or a directory. The container must exist.",
    ),
    cfg.StrOpt(
        "island_cloud",
        help="Name of a cloud in clouds.yaml to sign in to, instead of the options of keystoneauth.",
    ),
    cfg.StrOpt(
        "auth_type",
        deprecated_name="auth_plugin",
        help="How to sign in: password (the default), v3applicationcredential or v1password (TempAuth).",
    ),
    *_CREDENTIALS,
    cfg.StrOpt("region_name", help="Region of the store in Keystone's catalogue."),
    cfg.ListOpt("valid_interfaces", help="Interface of the store in the catalogue; the first one counts."),
    cfg.StrOpt("endpoint_override", help="Address of the store, used instead of the catalogue's."),
    cfg.StrOpt("cafile", help="File with the certificates of the authorities that are trusted."),
    cfg.StrOpt("certfile", help="File with this client's certificate."),
    cfg.StrOpt("keyfile", help="File with the key of this client's certificate."),
    cfg.BoolOpt("insecure", default=False, help="Do not verify the certificates of Keystone and the store."),
]


def read_repositories(section: Any) -> dict[str, IslandCommand]:
    """Return the repositories in the options: the driver's own under "", the others under their names.

    `section` has the driver's options as attributes. Raises UsageError if island_repository is missing.
    """
    found, sections = {}, {"": section}
    for name in section.island_other_repositories:
        cfg.CONF.register_opts(STORE_OPTIONS, group=name)
        sections[name] = cfg.CONF[name]
    for name, options in sections.items():
        if not options.island_repository:
            where = f"section [{name}]" if name else "the driver's section"
            raise UsageError(f"island_repository is missing in {where} of cinder.conf")
        environment = _sign_in_environment(options) | {"ISLAND_STATE": section.island_state_dir}
        found[name] = IslandCommand(options.island_repository, environment, name)
    return found


def _sign_in_environment(options: Any) -> dict[str, str]:
    """Return the environment variables by which the command `island` signs in."""
    if options.island_cloud:
        keys = ("OS_CLIENT_CONFIG_FILE", "OS_CLIENT_SECURE_FILE")
        files = {key: os.environ[key] for key in keys if key in os.environ}
        return {"OS_CLOUD": options.island_cloud, **files}
    kind = options.auth_type or "password"
    if kind == "v1password":
        names = {"ST_AUTH": "auth_url", "ST_USER": "username", "ST_KEY": "password"}
    else:
        names = {f"OS_{one.dest.upper()}": one.dest for one in _CREDENTIALS}
    names |= {"OS_REGION_NAME": "region_name", "OS_STORAGE_URL": "endpoint_override"}
    names |= {"OS_CACERT": "cafile", "OS_CERT": "certfile", "OS_KEY": "keyfile", "OS_INSECURE": "insecure"}
    values = {name: _to_text(getattr(options, dest, None)) for name, dest in names.items()}
    if options.valid_interfaces:
        values["OS_INTERFACE"] = options.valid_interfaces[0]
    given = {name: value for name, value in values.items() if value}
    return given if kind == "v1password" or not options.auth_url else given | {"OS_AUTH_TYPE": kind}


def _to_text(value: object) -> str:
    if value is None or value is False:
        return ""
    return "true" if value is True else str(value)
