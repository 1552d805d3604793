"""Signing in to Swift with the credentials that users already have in their environment.

Every way goes through a keystoneauth session, TempAuth ("v1") too. No secret is ever part of a message, a log
line or a repr.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from keystoneauth1 import exceptions, loading, plugin, token_endpoint
from keystoneauth1.session import Session

from island_fast.errors import StoreError
from island_fast.stores.retry import RetryableError, parse_retry_after

__all__ = ["TIMEOUT", "SwiftAuth", "Token", "auth_from_environment", "silence_logger", "walk_causes"]

TIMEOUT = 60.0
"""Seconds without a byte, on any connection, after which an attempt has failed."""

_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # those of the library requests
_HOW = (
    "set ST_AUTH, ST_USER and ST_KEY, or OS_CLOUD, or OS_AUTH_URL with OS_USERNAME, OS_PASSWORD and "
    "OS_PROJECT_NAME (or OS_APPLICATION_CREDENTIAL_ID and _SECRET), or OS_STORAGE_URL and OS_AUTH_TOKEN"
)


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an account, and the URL below which the account's objects are."""

    url: str
    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Service:
    """Which of the object stores in a Keystone catalogue to use. `url` overrides the catalogue."""

    interface: str = "public"
    region: str | None = None
    url: str | None = None


class SwiftAuth:
    """Signs in to one account, and keeps the token that all threads use. Thread-safe.

    `source` names the variables that the user would correct, for messages. `prefix` is the text in front of
    the names of all of them. Owns the session.
    """

    def __init__(self, session: Session, service: Service, source: str) -> None:
        self.source = source
        self.prefix = ""
        self._session = session
        self._service = service
        self._lock = threading.Lock()
        self._token: Token | None = None

    def __repr__(self) -> str:
        return f"<SwiftAuth of {self.source}>"

    @property
    def verify(self) -> bool | str:
        """Return whether to verify the server's certificate, or the file of authorities to verify it with."""
        return True if self._session.verify is None else self._session.verify

    @property
    def cert(self) -> tuple[str | None, str | None]:
        """Return the names of the client's certificate and key files."""
        cert = self._session.cert
        return (cert, None) if isinstance(cert, str) else cert or (None, None)

    def get_token(self) -> Token:
        """Return the current token; the first call signs in.

        `RetryableError` if the identity server does not answer, StoreError if it refuses.
        """
        with self._lock:
            if self._token is None:
                self._token = self._sign_in()
            return self._token

    def renew(self, expired: Token) -> Token:
        """Return a token other than `expired`. If several threads ask at once only the first signs in."""
        with self._lock:
            if self._token is expired or self._token is None:
                self._token = None
                self._session.invalidate()
                self._token = self._sign_in()
            return self._token

    def refusal_error(self) -> StoreError:
        """Return the error for credentials that Swift does not accept."""
        return StoreError(f"Swift does not accept the credentials of {self.source}; correct or renew them")

    def address(self) -> str:
        """Return host and port of Swift, or of the identity server while there is no token; "" if unknown."""
        url = self._token.url if self._token else getattr(self._session.auth, "auth_url", None)
        return urlsplit(url or "").netloc.rpartition("@")[2]

    def _sign_in(self) -> Token:
        try:
            token = self._session.get_token()
            url = self._service.url or self._session.get_endpoint(
                service_type="object-store",
                interface=self._service.interface,
                region_name=self._service.region,
            )
        except (exceptions.Unauthorized, exceptions.Forbidden):
            raise self.refusal_error() from None
        except _SILENCE as error:
            reasons = (cause.strerror for cause in walk_causes(error) if isinstance(cause, OSError))
            reason = next(filter(None, reasons), _short_name(error))
            wait = parse_retry_after(str(getattr(error, "retry_after", "")))
            raise RetryableError(f"{reason} at the sign-in with {self.source}", wait) from None
        except exceptions.SSLError:
            raise StoreError(
                f"the certificate of the server in {self.source} cannot be verified; set "
                f"{self.prefix}OS_CACERT to its authority's file"
            ) from None
        except exceptions.CatalogException:
            url = None
        except exceptions.ClientException as error:
            raise StoreError(
                f"signing in with {self.source} failed ({_short_name(error)}); check these variables"
            ) from None
        if not url or not token:
            where = f" in region {self._service.region}" if self._service.region else ""
            raise StoreError(
                f"the catalogue of {self.source} has no object-store{where}; set {self.prefix}OS_REGION_NAME"
            )
        return Token(url.rstrip("/"), token)


_SILENCE = (
    exceptions.RetriableConnectionFailure,
    exceptions.HttpServerError,
    exceptions.TooManyRequests,
    exceptions.RequestTimeout,
    exceptions.DiscoveryFailure,
    exceptions.UnknownConnectionError,
)


def _short_name(error: Exception) -> str:
    """Return an exception as one or two words. Its own text can quote URLs, which can contain passwords."""
    status = getattr(error, "http_status", None)
    return f"{status} {type(error).__name__}" if status else type(error).__name__


def walk_causes(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an exception, the one that led to it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def auth_from_environment(environ: Mapping[str, str] = os.environ, prefix: str = "") -> SwiftAuth:
    """Return the `SwiftAuth` that the environment describes. No server is contacted yet.

    Only variables whose names begin with `prefix` count, except those of the library requests. Messages name
    the variables with it.
    """
    found = {key: environ[key] for key in _CA_VARIABLES if key in environ}
    found |= {key.removeprefix(prefix): value for key, value in environ.items() if key.startswith(prefix)}
    try:
        auth = _auth_from_variables(found)
    except StoreError as error:
        raise StoreError(_add_prefix(str(error), prefix)) from None
    auth.source, auth.prefix = _add_prefix(auth.source, prefix), prefix
    return auth


def _add_prefix(text: str, prefix: str) -> str:
    """Return `text` with `prefix` in front of each variable's name."""
    return re.sub(r"\b(?=(OS|ST)_)", lambda _: prefix, text)


def _auth_from_variables(environ: Mapping[str, str]) -> SwiftAuth:
    """Return the `SwiftAuth` of these variables.

    The first of these that is set counts: OS_STORAGE_URL with OS_AUTH_TOKEN; ST_AUTH (TempAuth); OS_CLOUD
    (clouds.yaml, which openstacksdk reads from the process's own environment); OS_AUTH_URL (Keystone, any
    OS_AUTH_TYPE). StoreError that says what to set if credentials are missing or incomplete.
    """
    silence_logger("keystoneauth", logging.ERROR)
    for name in ("OS_STORAGE_URL", "OS_AUTH_URL", "ST_AUTH"):
        _check_url(name, environ.get(name) or "")
    url, token = environ.get("OS_STORAGE_URL"), environ.get("OS_AUTH_TOKEN")
    if url and token:
        _check_printable("OS_AUTH_TOKEN", token)
        auth: plugin.BaseAuthPlugin = token_endpoint.Token(url, token)
        return SwiftAuth(_session(auth, environ), Service(url=url), "OS_STORAGE_URL and OS_AUTH_TOKEN")
    if environ.get("ST_AUTH"):
        return _auth_from_tempauth(environ)
    if environ.get("OS_CLOUD"):
        return _auth_from_cloud(environ["OS_CLOUD"])
    if environ.get("OS_AUTH_URL"):
        return _auth_from_keystone(environ)
    raise StoreError(f"there are no credentials for Swift; {_HOW}")


def _check_url(name: str, url: str) -> None:
    """Raise StoreError, which does not quote it, if a variable's value cannot be a URL."""
    try:
        _ = urlsplit(url).port
    except ValueError:
        raise StoreError(f"{name} is not a valid URL; correct it") from None


def _check_printable(name: str, value: str) -> None:
    """Raise StoreError, which does not quote it, if no HTTP header can hold a variable's value."""
    if not (value.isascii() and value.isprintable()):
        raise StoreError(f"{name} has a line break or another character that no header can hold; correct it")


def _auth_from_tempauth(environ: Mapping[str, str]) -> SwiftAuth:
    missing = [key for key in ("ST_USER", "ST_KEY") if not environ.get(key)]
    if missing:
        raise StoreError(f"ST_AUTH is set without {' and '.join(missing)}; set all three")
    auth: plugin.BaseAuthPlugin = loading.get_plugin_loader("v1password").load_from_options(
        auth_url=environ["ST_AUTH"], username=environ["ST_USER"], password=environ["ST_KEY"]
    )
    service = Service(url=environ.get("OS_STORAGE_URL"))
    return SwiftAuth(_session(auth, environ), service, "ST_AUTH, ST_USER and ST_KEY")


def _auth_from_keystone(environ: Mapping[str, str]) -> SwiftAuth:
    """Return the `SwiftAuth` of any keystoneauth plugin, its options named as in openrc files."""
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
    return SwiftAuth(_session(auth, environ), service, "OS_AUTH_URL and the OS_ variables with it")


def _auth_from_cloud(name: str) -> SwiftAuth:
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
    except (TypeError, ValueError, AttributeError) as error:  # a part of the file has another type
        raise StoreError(
            f"OS_CLOUD {name} cannot be used ({_short_name(error)}); correct clouds.yaml"
        ) from None
    except (ConfigException, exceptions.AuthPluginException) as error:
        raise StoreError(f"OS_CLOUD {name} cannot be used ({error}); correct clouds.yaml") from None
    session.timeout = session.timeout or TIMEOUT
    interface = cloud.get_interface("object-store") or "public"
    service = Service(
        interface=interface if isinstance(interface, str) else interface[0],
        region=cloud.get_region_name("object-store"),
        url=cloud.get_endpoint("object-store"),
    )
    return SwiftAuth(session, service, f"OS_CLOUD {name}")


def _session(auth: plugin.BaseAuthPlugin, environ: Mapping[str, str]) -> Session:
    insecure = environ.get("OS_INSECURE", "").lower() in ("1", "true", "yes", "on")
    # requests reads its own variables, but only for sessions that trust the environment.
    authorities = ("OS_CACERT", *_CA_VARIABLES)
    cacert = next((environ[key] for key in authorities if environ.get(key)), True)
    cert, key = environ.get("OS_CERT"), environ.get("OS_KEY")
    return Session(
        auth=auth,
        verify=False if insecure else cacert,
        cert=(cert, key) if cert and key else cert,
        timeout=TIMEOUT,
    )


def silence_logger(logger: str, level: int) -> None:
    """Hide what a library logs below `level`: its failures have tracebacks and parts of tokens.

    A level that somebody has set for that logger stays.
    """
    log = logging.getLogger(logger)
    if log.level == logging.NOTSET:
        log.setLevel(level)
