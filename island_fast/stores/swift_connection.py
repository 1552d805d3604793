"""The way to a Swift account: connections, the renewal of the token, and what a failure means.

A 2xx is an outcome, and so is any 4xx that a verb expects; 401 renews the token; other 4xx are
final; everything else (408, 409, 425, 429, 498, 499, 5xx, timeouts, broken connections) leaves the
outcome unknown, and the request is made again until it is known. The only module that imports
swiftclient.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from typing import Any, TypeVar

import requests
import urllib3
from swiftclient import client
from swiftclient.exceptions import ClientException as Refusal

from island_fast import __version__
from island_fast.errors import StoreError
from island_fast.stores.retry import Again, Patience, persist
from island_fast.stores.swift_auth import TIMEOUT, Keyring, Ticket, quiet
from island_fast.stores.swift_pace import PacedAdapter, TooSlow

__all__ = ["Connection", "Refusal", "Wire", "unless"]

T = TypeVar("T")
Connection = Any
"""swiftclient's Connection; it has no types. Its calls raise Refusal for any answer but 2xx."""

_BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError)
_UNKNOWN = (408, 409, 425, 429, 498, 499)
_UNFRAMED = (None, 408, 499)  # the connection may be in the middle of something


class Wire:
    """Connections to an account, each used by one thread at a time, and the retry loop around them.

    An attempt ends in bounded time: connecting, and each silence, in TIMEOUT seconds; an answer, however
    slowly it drips, as `Patience` says; sending, as `SwiftStore.put` says.

    swiftclient's Connection mixes up answers when threads share it; so each call takes one out of
    the idle ones and puts it back. A connection whose state is in doubt is closed first, and opens
    itself again.
    """

    def __init__(self, keyring: Keyring, patience: Patience) -> None:
        self.patience = patience
        self._keyring = keyring
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        quiet("swiftclient", logging.CRITICAL)

    def ask(self, what: str, action: Callable[[Connection], T], patience: Patience | None = None) -> T:
        """What `action` returns, called again for as long as the outcome is unknown.

        It may raise Refusal and whatever a connection raises, or `Again`, or an error for the user.
        """
        patience = patience or self.patience
        try:
            return persist(lambda: self._attempt(what, action), patience)
        except Again as failure:
            raise StoreError(
                f"{what}: Swift has not answered for {patience.total:.0f} s (last: {failure.reason}), so "
                "the outcome is unknown; run it again when the store is well"
            ) from failure.__cause__

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _attempt(self, what: str, action: Callable[[Connection], T]) -> T:
        ticket = self._keyring.ticket()
        try:
            return self._call(what, action, ticket)
        except _Expired:
            pass
        try:
            return self._call(what, action, self._keyring.renew(ticket))
        except _Expired:
            raise self._keyring.refused() from None

    def _call(self, what: str, action: Callable[[Connection], T], ticket: Ticket) -> T:
        """One try with one connection; failures are sorted into `Again`, `_Expired` and StoreError."""
        connection = self._take(ticket)
        clean = False
        try:
            result = action(connection)
            clean = True
        except Refusal as error:
            clean = error.http_status not in _UNFRAMED
            raise _sorted(what, error) from error
        except _BROKEN as error:
            raise _broken(what, error) from error
        finally:
            if not clean:
                connection.close()
            with self._lock:
                self._idle.append(connection)
        return result

    def _take(self, ticket: Ticket) -> Connection:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            cert, key = self._keyring.cert
            verify = self._keyring.verify
            connection = client.Connection(
                retries=0,
                timeout=TIMEOUT,
                preauthurl=ticket.url,
                preauthtoken=ticket.token,
                insecure=verify is False,
                cacert=verify if isinstance(verify, str) else None,
                cert=cert,
                cert_key=key,
            )
        elif connection.url != ticket.url:
            connection.close()
        connection.url, connection.token = ticket.url, ticket.token
        if connection.http_conn is None:
            connection.http_conn = _dial(connection, self.patience)
        return connection


def _dial(connection: Connection, patience: Patience) -> tuple[Any, Any]:
    """What swiftclient would make, but its answers are paced, and the environment is read once, here."""
    parsed, http = connection.http_connection()
    http.default_user_agent = f"island-fast/{__version__}"
    session = http.request_session
    session.trust_env = False
    session.max_redirects = 0  # the token is for this server only
    session.proxies = requests.utils.get_environ_proxies(connection.url)
    adapter = PacedAdapter(patience)
    for scheme in ("http://", "https://"):
        session.mount(scheme, adapter)
    return parsed, http


class _Expired(Exception):
    """Swift does not know the token (any more)."""


def _sorted(what: str, error: Refusal) -> Exception:
    """What an answer that no verb expects means."""
    status = error.http_status
    shown = f"{status} {error.http_reason}".strip()
    if status == 401:
        return _Expired()
    if status is None:
        return Again("an unreadable answer")
    if status in _UNKNOWN or status >= 500:
        return Again(shown, _retry_after(error.http_response_headers))
    if status == 403:
        return StoreError(f"{what}: Swift refuses ({shown}); ask for a role that may write the container")
    if status == 413:
        return StoreError(f"{what}: Swift refuses ({shown}); raise the quota or free some space")
    return StoreError(f"{what}: Swift refuses ({shown}); its administrator can tell why")


def _retry_after(headers: Mapping[str, str] | None) -> float:
    value = (headers or {}).get("Retry-After", "")
    return float(value) if value.isdecimal() and len(value) < 7 else 0.0


def _broken(what: str, error: Exception) -> Exception:
    """What a connection that failed means. The libraries' own texts are long and may quote the URL."""
    if isinstance(error, requests.exceptions.SSLError) and "certificate verify" in str(error):
        return StoreError(
            f"{what}: the certificate of Swift cannot be verified; set OS_CACERT to its authority's file"
        )
    if isinstance(error, requests.TooManyRedirects):
        return StoreError(f"{what}: the address of Swift only redirects; correct the endpoint in use")
    if isinstance(error, ValueError) and isinstance(error, requests.RequestException):
        return StoreError(f"{what}: the address of Swift is no URL; correct the endpoint in use")
    causes = list(_causes(error))
    if any(isinstance(cause, TooSlow) for cause in causes):
        return Again("a body that came too slowly")
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return Again("a timeout")
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            return Again(cause.strerror)
    return Again("a broken connection")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, what led to it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def unless(status: int, call: Callable[[], T]) -> T | None:
    """What `call` returns, or None where Swift answers `status`."""
    try:
        return call()
    except Refusal as error:
        if error.http_status == status:
            return None
        raise
