"""Signing in to Swift with the credentials that people already have in their environment.

All ways go through a keystoneauth session, TempAuth ("v1") too. No secret is ever part of a
message, a log line or a repr.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keystoneauth1 import exceptions, loading, plugin, token_endpoint
from keystoneauth1.session import Session

from island_fast.errors import StoreError
from island_fast.stores.retry import Again

__all__ = ["TIMEOUT", "Keyring", "Ticket", "from_environment", "quiet"]

TIMEOUT = 60.0
"""Seconds of silence, on any connection, after which an attempt has failed."""

_OF_REQUESTS = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_HOW = (
    "set ST_AUTH, ST_USER and ST_KEY, or OS_CLOUD, or OS_AUTH_URL with OS_USERNAME, OS_PASSWORD and "
    "OS_PROJECT_NAME (or OS_APPLICATION_CREDENTIAL_ID and _SECRET), or OS_STORAGE_URL and OS_AUTH_TOKEN"
)


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where an account's objects are, and the token that opens it."""

    url: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Service:
    """Which of the object stores in a catalogue is meant. `url` overrides the catalogue."""

    interface: str = "public"
    region: str | None = None
    url: str | None = None


class Keyring:
    """The one ticket that all threads use, renewed by one of them when it has expired.

    `source` names the variables that the user would correct; `prefix` is before the names of all of them.
    Owns the session.
    """

    def __init__(self, session: Session, service: Service, source: str) -> None:
        self.source = source
        self.prefix = ""
        self._session = session
        self._service = service
        self._lock = threading.Lock()
        self._ticket: Ticket | None = None

    def __repr__(self) -> str:
        return f"<Keyring of {self.source}>"

    @property
    def verify(self) -> bool | str:
        """Whether to check the server's certificate, or the file of authorities to check it with."""
        return True if self._session.verify is None else self._session.verify

    @property
    def cert(self) -> tuple[str | None, str | None]:
        """The client's certificate and key files."""
        cert = self._session.cert
        return (cert, None) if isinstance(cert, str) else cert or (None, None)

    def ticket(self) -> Ticket:
        """The current ticket; the first call signs in.

        `Again` if the server of identities does not answer, StoreError if it refuses.
        """
        with self._lock:
            if self._ticket is None:
                self._ticket = self._sign_in()
            return self._ticket

    def renew(self, expired: Ticket) -> Ticket:
        """A ticket other than `expired`. Of several threads that ask at once only the first signs in."""
        with self._lock:
            if self._ticket is expired or self._ticket is None:
                self._ticket = None
                self._session.invalidate()
                self._ticket = self._sign_in()
            return self._ticket

    def refused(self) -> StoreError:
        """What to tell the user whose credentials are not accepted."""
        return StoreError(f"Swift does not accept the credentials of {self.source}; correct or renew them")

    def _sign_in(self) -> Ticket:
        try:
            token = self._session.get_token()
            url = self._service.url or self._session.get_endpoint(
                service_type="object-store",
                interface=self._service.interface,
                region_name=self._service.region,
            )
        except (exceptions.Unauthorized, exceptions.Forbidden):
            raise self.refused() from None
        except _SILENCE as error:
            raise Again(f"no answer to the sign-in with {self.source} ({_named(error)})") from None
        except exceptions.SSLError:
            raise StoreError(
                f"the certificate of the server in {self.source} cannot be verified; set "
                f"{self.prefix}OS_CACERT to its authority's file"
            ) from None
        except exceptions.CatalogException:
            url = None
        except exceptions.ClientException as error:
            raise StoreError(
                f"signing in with {self.source} failed ({_named(error)}); check these variables"
            ) from None
        if not url or not token:
            where = f" in region {self._service.region}" if self._service.region else ""
            raise StoreError(
                f"the catalogue of {self.source} has no object-store{where}; set {self.prefix}OS_REGION_NAME"
            )
        return Ticket(url.rstrip("/"), token)


_SILENCE = (
    exceptions.RetriableConnectionFailure,
    exceptions.HttpServerError,
    exceptions.TooManyRequests,
    exceptions.RequestTimeout,
    exceptions.DiscoveryFailure,
    exceptions.UnknownConnectionError,
)


def _named(error: Exception) -> str:
    """An exception in two words. Its own text may quote URLs, and those may hold passwords."""
    status = getattr(error, "http_status", None)
    return f"{status} {type(error).__name__}" if status else type(error).__name__


def from_environment(environ: Mapping[str, str] = os.environ, prefix: str = "") -> Keyring:
    """The keyring that the environment describes; nothing is asked of any server yet.

    Of ours only variables that begin with `prefix` count, without it; messages name them with it.
    """
    found = {key: environ[key] for key in _OF_REQUESTS if key in environ}
    found |= {key.removeprefix(prefix): value for key, value in environ.items() if key.startswith(prefix)}
    try:
        keyring = _keyring(found)
    except StoreError as error:
        raise StoreError(_prefixed(str(error), prefix)) from None
    keyring.source, keyring.prefix = _prefixed(keyring.source, prefix), prefix
    return keyring


def _prefixed(text: str, prefix: str) -> str:
    """`text` with `prefix` before each name of a variable."""
    return re.sub(r"\b(?=(OS|ST)_)", lambda _: prefix, text)


def _keyring(environ: Mapping[str, str]) -> Keyring:
    """The keyring of these variables.

    The first of these that is there counts: OS_STORAGE_URL with OS_AUTH_TOKEN; ST_AUTH (TempAuth);
    OS_CLOUD (clouds.yaml, read by openstacksdk from the process's own environment); OS_AUTH_URL
    (Keystone, any OS_AUTH_TYPE). Incomplete or missing credentials are a StoreError that says what
    to set.
    """
    quiet("keystoneauth", logging.ERROR)
    url, token = environ.get("OS_STORAGE_URL"), environ.get("OS_AUTH_TOKEN")
    if url and token:
        auth: plugin.BaseAuthPlugin = token_endpoint.Token(url, token)
        return Keyring(_session(auth, environ), Service(url=url), "OS_STORAGE_URL and OS_AUTH_TOKEN")
    if environ.get("ST_AUTH"):
        return _from_tempauth(environ)
    if environ.get("OS_CLOUD"):
        return _from_cloud(environ["OS_CLOUD"])
    if environ.get("OS_AUTH_URL"):
        return _from_keystone(environ)
    raise StoreError(f"there are no credentials for Swift; {_HOW}")


def _from_tempauth(environ: Mapping[str, str]) -> Keyring:
    missing = [key for key in ("ST_USER", "ST_KEY") if not environ.get(key)]
    if missing:
        raise StoreError(f"ST_AUTH is set and {' and '.join(missing)} not; set all three")
    auth: plugin.BaseAuthPlugin = loading.get_plugin_loader("v1password").load_from_options(
        auth_url=environ["ST_AUTH"], username=environ["ST_USER"], password=environ["ST_KEY"]
    )
    service = Service(url=environ.get("OS_STORAGE_URL"))
    return Keyring(_session(auth, environ), service, "ST_AUTH, ST_USER and ST_KEY")


def _from_keystone(environ: Mapping[str, str]) -> Keyring:
    """Any plugin of keystoneauth, its options under the names that openrc files give them."""
    kind = environ.get("OS_AUTH_TYPE")
    if not kind:
        by_credential = environ.get("OS_APPLICATION_CREDENTIAL_SECRET")
        kind = "v3applicationcredential" if by_credential else "password"
    try:
        loader: loading.BaseLoader[Any] = loading.get_plugin_loader(kind)
        values = {
            option.dest: value
            for option in loader.get_options()
            for name in (option, *option.deprecated)
            if (value := environ.get("OS_" + name.dest.upper()))
        }
        auth = loader.load_from_options(**values)
    except exceptions.MissingRequiredOptions as error:
        names = ", ".join("OS_" + option.dest.upper() for option in error.options)
        raise StoreError(f"{names} must be set for OS_AUTH_TYPE {kind}") from None
    except exceptions.AuthPluginException as error:
        raise StoreError(f"OS_AUTH_TYPE {kind} cannot be used ({error}); {_HOW}") from None
    service = Service(
        interface=environ.get("OS_INTERFACE") or environ.get("OS_ENDPOINT_TYPE") or "public",
        region=environ.get("OS_REGION_NAME"),
        url=environ.get("OS_STORAGE_URL"),
    )
    return Keyring(_session(auth, environ), service, "OS_AUTH_URL and the OS_ variables with it")


def _from_cloud(name: str) -> Keyring:
    try:
        from openstack.config import OpenStackConfig
        from openstack.exceptions import ConfigException
    except ImportError:
        raise StoreError(
            "OS_CLOUD needs openstacksdk to read clouds.yaml; run 'pip install openstacksdk' in the same "
            "environment"
        ) from None
    try:
        cloud = OpenStackConfig().get_one(cloud=name)
        session = cloud.get_session()
    except (ConfigException, exceptions.AuthPluginException) as error:
        raise StoreError(f"OS_CLOUD {name} cannot be used ({error}); correct clouds.yaml") from None
    session.timeout = session.timeout or TIMEOUT
    interface = cloud.get_interface("object-store") or "public"
    service = Service(
        interface=interface if isinstance(interface, str) else interface[0],
        region=cloud.get_region_name("object-store"),
        url=cloud.get_endpoint("object-store"),
    )
    return Keyring(session, service, f"OS_CLOUD {name}")


def _session(auth: plugin.BaseAuthPlugin, environ: Mapping[str, str]) -> Session:
    insecure = environ.get("OS_INSECURE", "").lower() in ("1", "true", "yes", "on")
    # requests looks for its own by itself, but only on the sessions that trust the environment.
    authorities = ("OS_CACERT", *_OF_REQUESTS)
    cacert = next((environ[key] for key in authorities if environ.get(key)), True)
    cert, key = environ.get("OS_CERT"), environ.get("OS_KEY")
    return Session(
        auth=auth,
        verify=False if insecure else cacert,
        cert=(cert, key) if cert and key else cert,
        timeout=TIMEOUT,
    )


def quiet(logger: str, level: int) -> None:
    """Keep a library's own account of failures (tracebacks, parts of tokens) out of sight.

    Not if someone has asked for it, by setting that logger's level.
    """
    log = logging.getLogger(logger)
    if log.level == logging.NOTSET:
        log.setLevel(level)
