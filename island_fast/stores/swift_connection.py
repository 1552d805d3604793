"""Connections to a Swift account: the renewal of the token, retries, and what a failure means.

A 2xx is an outcome, and so is any 4xx that the caller expects. 401 renews the token; other 4xx are final.
Everything else (408, 409, 425, 429, 498, 499, 5xx, timeouts, broken connections) leaves the outcome unknown,
and the request is repeated until it is known. A write is refused for certain if its last attempt was, and
each one before it either was refused, too, or never reached a server. This is the only module that imports
swiftclient.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPException
from typing import Any, TypeVar

import requests
import urllib3
from swiftclient import client
from swiftclient.exceptions import ClientException as HttpError

from island_fast import __version__
from island_fast.errors import NotFoundError, StoreError, StoreRefusedError
from island_fast.stores.base import PUTS_END
from island_fast.stores.retry import RetryableError, RetryPolicy, parse_retry_after, retry
from island_fast.stores.swift_auth import TIMEOUT, SwiftAuth, Token, silence_logger, walk_causes
from island_fast.stores.swift_pace import PacedAdapter, TooSlow

__all__ = ["BROKEN", "Connection", "HttpError", "SwiftConnectionPool", "is_refusal", "none_if_status"]

T = TypeVar("T")
Connection = Any
"""swiftclient's Connection; it has no types. Its methods raise HttpError for any answer but 2xx."""

Response = Any
"""An answer in swiftclient; it has no types, either."""

BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError)
"""What a connection raises if no answer comes."""

_UNKNOWN = (408, 409, 425, 429, 498, 499)
_UNFRAMED = (None, 408, 499)  # the connection can be in the middle of a message
_MAX_LISTING = 16 << 20  # bytes of a whole answer: 10 000 rows of a listing, with names of a kilobyte
_MAX_ERROR = 64 << 10  # bytes that are read of an answer that is no success
_OPENING = 20.0  # seconds; nobody should wait minutes to learn that a host name is wrong
_HURRY = 5.0  # seconds
_ATTEMPTS = 300.0  # seconds
_BODY = PUTS_END - _ATTEMPTS - 7 * TIMEOUT  # seconds
_UNSENT = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)


class SwiftConnectionPool:
    """Connections to an account, each used by one thread at a time, and the retry loop around them.

    An attempt ends in bounded time: connecting, and each silence, after TIMEOUT seconds; an answer, however
    slowly it comes, as `RetryPolicy` says; sending, as `SwiftStore.put` says.

    swiftclient's Connection mixes up answers when threads share it, so each call takes one out of the idle
    ones and puts it back. A connection whose state is in doubt is closed first, and opens itself again.
    """

    def __init__(self, auth: SwiftAuth, policy: RetryPolicy) -> None:
        self.policy = policy
        self._pace_of_answers = policy
        self._auth = auth
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        silence_logger("swiftclient", logging.CRITICAL)

    def call(self, what: str, action: Callable[[Connection], T], *, writes: bool = False) -> T:
        """Return the result of `action`, which is repeated while its outcome is unknown.

        `action` can raise HttpError and whatever a connection raises, or `RetryableError`, or an error for
        the user. `what` names the request in messages. With `writes`, a StoreRefusedError says that nothing
        was done, and any other StoreError that the outcome is unknown.
        """
        doubtful = False  # an attempt may have done something

        def attempt() -> T:
            nonlocal doubtful
            try:
                return self._call_with_token(what, action)
            except RetryableError as error:
                doubtful = doubtful or not error.unsent
                raise

        try:
            return retry(attempt, self.policy)
        except RetryableError as error:
            unknown = ", so the outcome is unknown" if writes and doubtful else ""
            kind = StoreRefusedError if writes and not doubtful else StoreError
            raise kind(f"{what}: {self._explain_silence(error, unknown)}") from error.__cause__
        except (StoreRefusedError, NotFoundError) as error:
            if writes and doubtful:
                raise StoreError(
                    f"{error}; an earlier attempt can have succeeded, so the outcome is unknown"
                ) from error
            if isinstance(error, NotFoundError) or writes:
                raise
            raise StoreError(str(error)) from error.__cause__

    def _explain_silence(self, error: RetryableError, unknown: str = "") -> str:
        """Return what Swift did instead of answering, `unknown`, and when to try again."""
        if error.wait > self.policy.total:
            asked = f"asks to come back in {_in_words(error.wait)} ({error.reason})"
            return f"Swift{self._where()} {asked}{unknown}; run the command again then"
        silent = f"has not answered for {self.policy.total:.0f} s (last: {error.reason})"
        return f"Swift{self._where()} {silent}{unknown}; run the command again when it does"

    def call_first(self, what: str, action: Callable[[Connection], T]) -> T:
        """Return the result of `action`, a store's first request, which changes nothing. See `call`.

        It is given up sooner: whoever typed a wrong host name should not wait for minutes.
        """
        policy = replace(self.policy, total=min(self.policy.total, _OPENING))
        try:
            return retry(lambda: self._call_with_token(what, action), policy)
        except RetryableError as error:
            if error.wait > self.policy.total:
                raise StoreError(f"{what}: {self._explain_silence(error)}") from error.__cause__
            raise StoreError(
                f"cannot reach Swift{self._where()} ({error.reason}, tried for {policy.total:.0f} s); "
                "nothing was changed"
            ) from error.__cause__
        except StoreRefusedError as error:
            raise StoreError(str(error)) from error.__cause__

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Give up within seconds while the body runs. Not thread-safe."""
        usual = self.policy
        self.policy = replace(usual, total=min(usual.total, _HURRY))
        try:
            yield
        finally:
            self.policy = usual

    @contextmanager
    def bound_bodies(self) -> Iterator[None]:
        """Give each body that is sent while this context lasts _BODY seconds, whatever its size.

        Each call of the context ends within PUTS_END seconds then. Its last attempt begins within _ATTEMPTS
        seconds. Besides its body it waits for TIMEOUT seconds at most six times: to connect and for an answer
        when it signs in, looks, and stores. Not thread-safe.
        """
        usual = self.policy
        total = min(usual.total, _ATTEMPTS)
        self.policy = replace(usual, total=total, allowance=_BODY, rate=math.inf)
        try:
            yield
        finally:
            self.policy = usual

    def account_url(self) -> str:
        """Return the address of the account, which the sign-in gave."""
        return self._auth.get_token().url

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _where(self) -> str:
        address = self._auth.address()
        return f" at {address}" if address else ""

    def _call_with_token(self, what: str, action: Callable[[Connection], T]) -> T:
        """Call `action` once, and once more with a new token if Swift does not accept the old one."""
        token = _sign_in(self._auth.get_token)
        try:
            return self._call_once(what, action, token)
        except _TokenExpired:
            pass
        token = _sign_in(lambda: self._auth.renew(token))
        try:
            return self._call_once(what, action, token)
        except _TokenExpired:
            raise StoreRefusedError(str(self._auth.refusal_error())) from None

    def _call_once(self, what: str, action: Callable[[Connection], T], token: Token) -> T:
        """Call `action` with a connection; raise RetryableError, _TokenExpired or StoreError if it fails."""
        connection = self._take_connection(token)
        clean = False
        try:
            result = action(connection)
            clean = True
        except HttpError as error:
            clean = error.http_status not in _UNFRAMED
            raise _error_for_answer(what, error) from error
        except _TooLong:
            raise StoreError(
                f"{what}: Swift's answer has more than {_MAX_LISTING >> 20} MiB; check its address, and the "
                "proxies between it and this host"
            ) from None
        except BROKEN as error:
            raise _error_for_failure(what, error) from error
        finally:
            if not clean:
                connection.close()
            with self._lock:
                self._idle.append(connection)
        return result

    def _take_connection(self, token: Token) -> Connection:
        """Take an idle connection, or make one; give it the token."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            cert, key = self._auth.cert
            verify = self._auth.verify
            connection = client.Connection(
                retries=0,
                timeout=TIMEOUT,
                preauthurl=token.url,
                preauthtoken=token.value,
                insecure=verify is False,
                cacert=verify if isinstance(verify, str) else None,
                cert=cert,
                cert_key=key,
            )
        elif connection.url != token.url:
            connection.close()
        connection.url, connection.token = token.url, token.value
        if connection.http_conn is None:
            connection.http_conn = _make_http(connection, self._pace_of_answers)
        return connection


def _make_http(connection: Connection, policy: RetryPolicy) -> tuple[Any, Any]:
    """Make what swiftclient would make, but with paced answers, and read the environment only once, here."""
    parsed, http = connection.http_connection()
    http.default_user_agent = f"island-fast/{__version__}"
    http.getresponse = _bound_bodies(http.getresponse)
    session = http.request_session
    session.trust_env = False
    session.max_redirects = 0  # the token is for this server only
    session.proxies = requests.utils.get_environ_proxies(connection.url)
    adapter = PacedAdapter(policy)
    for scheme in ("http://", "https://"):
        session.mount(scheme, adapter)
    return parsed, http


class _TooLong(Exception):
    """An answer that is read whole has more bytes than any has."""


def _bound_bodies(get_response: Callable[[], Response]) -> Callable[[], Response]:
    """Return `get_response`, swiftclient's, with a limit for what it reads whole: listings, and errors.

    Of an error, the rest is left, and its connection closed.
    """

    def bounded() -> Response:
        response = get_response()
        read = response.read
        success = 200 <= response.status < 300
        most = _MAX_LISTING if success else _MAX_ERROR

        def read_bounded(size: int | None = None) -> bytes:
            if size is not None:
                return bytes(read(size))
            body = bytes(read(most))
            if len(body) == most:
                response.close()
                if success:
                    raise _TooLong
            return body

        response.read = read_bounded
        return response

    return bounded


class _TokenExpired(Exception):
    """Swift does not know the token, or not any more."""


def is_refusal(status: int | None) -> bool:
    """Return whether an answer that is no success says that nothing was done, and nothing will be."""
    return status is not None and status < 500 and status not in (401, *_UNKNOWN)


def _error_for_answer(what: str, error: HttpError) -> Exception:
    """Return the exception for an answer that the caller does not expect."""
    status = error.http_status
    shown = f"{status} {error.http_reason}".strip()
    if status == 401:
        return _TokenExpired()
    if status is None:
        return RetryableError("an unreadable answer")
    if not is_refusal(status):
        headers = error.http_response_headers or {}
        return RetryableError(shown, parse_retry_after(headers.get("Retry-After", "")))
    hint = "ask its administrator for the reason"
    if status == 403:
        hint = "ask for a role that can write to the container"
    return StoreRefusedError(f"{what}: Swift refuses ({shown}); {hint}")


def _sign_in(get: Callable[[], Token]) -> Token:
    """Return the token of `get`. If it fails, the request that needs the token is certainly not made."""
    try:
        return get()
    except RetryableError as error:
        error.unsent = True
        raise
    except StoreError as error:
        raise StoreRefusedError(str(error)) from error.__cause__


def _in_words(seconds: float) -> str:
    """Return a long time in minutes or hours, rounded up."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{math.ceil(seconds / 3600)} h"


def _error_for_failure(what: str, error: Exception) -> Exception:
    """Return the exception for a failed connection. The libraries' texts are long and can quote the URL."""
    if isinstance(error, requests.exceptions.SSLError) and "certificate verify" in str(error):
        return StoreRefusedError(
            f"{what}: the certificate of Swift cannot be verified; set OS_CACERT to its authority's file"
        )
    if isinstance(error, requests.TooManyRedirects):
        return StoreRefusedError(f"{what}: the address of Swift only redirects; correct the endpoint in use")
    if isinstance(error, ValueError) and isinstance(error, requests.RequestException):
        return StoreRefusedError(
            f"{what}: the address of Swift is not a valid URL; correct the endpoint in use"
        )
    causes = list(walk_causes(error))
    unsent = any(isinstance(cause, _UNSENT) for cause in causes)
    if any(isinstance(cause, TooSlow) for cause in causes):
        return RetryableError("a body that came too slowly")
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return RetryableError("a timeout", unsent=unsent)
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            return RetryableError(cause.strerror, unsent=unsent)
    return RetryableError("a broken connection", unsent=unsent)


def none_if_status(status: int, call: Callable[[], T]) -> T | None:
    """Return the result of `call`, or None if Swift answers `status`."""
    try:
        return call()
    except HttpError as error:
        if error.http_status == status:
            return None
        raise
