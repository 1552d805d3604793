"""Faults of the tests' Swift: a WSGI filter in front of each of its servers.

The servers import this module by its name (`swift_faults`), because it is in the same folder as their
program. It imports nothing from the tests.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CONTROL", "Fault", "make_cache_filter", "make_fault_filter"]

CONTROL = "/-faults"


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the requests that match, to `times` of them after the first `skip`.

    kind      value
    answer    status: sent at once; the request is not carried out and its body is not read
    lie       status: sent after the request was carried out
    drop      -: the connection is cut at once
    lose      -: the connection is cut after the request was carried out
    choke     bytes of the request's body that the server reads before the connection is cut
    die       bytes of the request's body that the server reads before its process is killed (kill -9)
    delay     seconds before the request is carried out
    hold      -: the request is carried out when all faults have been removed (`calm`)
    sip       seconds before each piece of the request's body is read
    drip      seconds before each byte of the answer's body; after 1000 bytes the rest is sent at once
    truncate  bytes of the answer's body that are sent before the connection is cut
    corrupt   offset of the byte in the answer's body in which a bit is flipped
    whole     -: the Range header is removed, so that the whole object is sent
    first     -: only the first range of the Range header stays, as with Ceph's gateway

    With a `share` less than 1, each request is hit with that probability. The same order of requests always
    gives the same hits.
    """

    kind: str
    value: float = 0
    method: str = ""
    path: str = ""
    skip: int = 0
    times: int = 1
    share: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict)

    def matches(self, method: str, path: str) -> bool:
        return self.method in ("", method) and re.search(self.path, path) is not None


class FaultFilter:
    """A WSGI filter that injects faults. Its path CONTROL sets them, revokes tokens, and lists requests."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.faults: list[tuple[Fault, list[int]]] = []
        self.seen: list[dict[str, str]] = []
        self.tokens: set[str] = set()
        self.revoked: set[str] = set()
        self.chance = random.Random(0)

    def __call__(self, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path = env["REQUEST_METHOD"], env["PATH_INFO"]
        if path == CONTROL:
            return self._control(method, env, start)
        if path == "/healthcheck":
            return self.app(env, start)
        headers = {k[5:]: v for k, v in env.items() if k.startswith("HTTP_") and "TOKEN" not in k}
        self.seen.append({**headers, "method": method, "path": path, "port": env["REMOTE_PORT"]})
        token = env.get("HTTP_X_AUTH_TOKEN", "")
        self.tokens.add(token)
        if token in self.revoked:
            return self._answer(Fault("answer", 401), env, start)
        fault = self._next(method, path)
        return getattr(self, "_" + fault.kind)(fault, env, start) if fault else self.app(env, start)

    def _control(self, method: str, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        answer = b"[]"
        if method == "GET":
            answer = json.dumps(self.seen).encode()
        elif method == "POST":
            faults = json.loads(env["wsgi.input"].read(int(env["CONTENT_LENGTH"])))
            self.faults += [(Fault(**fault), [0]) for fault in faults]
        elif method == "PUT":
            self.revoked = self.tokens - {""}
        else:
            self.faults, self.seen = [], []
        start("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]

    def _next(self, method: str, path: str) -> Fault | None:
        for fault, hits in self.faults:
            if fault.matches(method, path) and (fault.share == 1 or self.chance.random() < fault.share):
                hits[0] += 1
                if fault.skip < hits[0] <= fault.skip + fault.times:
                    return fault
        return None

    def _answer(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        start(f"{fault.value:.0f} Injected", [("Content-Length", "0"), *fault.headers.items()])
        return [b""]

    def _lie(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        self._carry_out(env)
        return self._answer(fault, env, start)

    def _drop(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        env["eventlet.input"].get_socket().shutdown(socket.SHUT_RDWR)
        return self._answer(Fault("answer", 500), env, start)

    def _lose(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        self._carry_out(env)
        return self._drop(fault, env, start)

    def _choke(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        def count(size: int) -> None:
            if body.size > fault.value:
                env["eventlet.input"].get_socket().shutdown(socket.SHUT_RDWR)
                raise OSError("choked")

        body = env["wsgi.input"] = _Watched(env["wsgi.input"], count)
        return self.app(env, start)

    def _die(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        def count(size: int) -> None:
            if body.size > fault.value:
                os.kill(os.getpid(), signal.SIGKILL)

        body = env["wsgi.input"] = _Watched(env["wsgi.input"], count)
        return self.app(env, start)

    def _sip(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        import eventlet

        env["wsgi.input"] = _Watched(env["wsgi.input"], lambda _: eventlet.sleep(fault.value))
        return self.app(env, start)

    def _drip(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterator[bytes]:
        env["eventlet.minimum_write_chunk_size"] = 1  # otherwise it collects 4 KiB before it sends anything
        return self._dripping(fault.value, self.app(env, start))

    def _dripping(self, pause: float, body: Iterable[bytes]) -> Iterator[bytes]:
        import eventlet

        left = 1000
        for data in body:
            for at in range(min(left, len(data))):
                eventlet.sleep(pause)
                yield data[at : at + 1]
            yield data[left:]
            left = max(0, left - len(data))

    def _delay(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        import eventlet

        eventlet.sleep(fault.value)
        return self.app(env, start)

    def _hold(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        import eventlet

        while any(known is fault for known, _ in self.faults):
            eventlet.sleep(0.05)
        return self.app(env, start)

    def _truncate(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterator[bytes]:
        left = int(fault.value)
        for data in self.app(env, start):
            yield data[:left]
            left -= len(data)
            if left <= 0:
                env["eventlet.input"].get_socket().shutdown(socket.SHUT_RDWR)
                return

    def _corrupt(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterator[bytes]:
        at = int(fault.value)
        for data in self.app(env, start):
            spoilt = bytearray(data)
            if 0 <= at < len(data):
                spoilt[at] ^= 1
            at -= len(data)
            yield bytes(spoilt)

    def _whole(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        del env["HTTP_RANGE"]
        return self.app(env, start)

    def _first(self, fault: Fault, env: dict[str, Any], start: Any) -> Iterable[bytes]:
        if "HTTP_RANGE" in env:
            env["HTTP_RANGE"] = env["HTTP_RANGE"].partition(",")[0]
        return self.app(env, start)

    def _carry_out(self, env: dict[str, Any]) -> None:
        body = self.app(env, lambda *_: None)
        for _ in body:
            pass
        if hasattr(body, "close"):
            body.close()


class _Watched:
    """A request's body that calls `after(size)` for each piece that was read."""

    def __init__(self, body: Any, after: Callable[[int], object]) -> None:
        self.size = 0
        self._body = body
        self._after = after

    def read(self, *args: Any) -> bytes:
        data: bytes = self._body.read(*args)
        self.size += len(data)
        self._after(len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class MemoryCache:
    """A WSGI filter that the proxy uses instead of memcached, mainly to remember containers."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._kept: dict[str, tuple[Any, float]] = {}

    def __call__(self, env: dict[str, Any], start: Any) -> Any:
        env["swift.cache"] = self
        return self.app(env, start)

    def get(self, key: str, **_: Any) -> Any:
        value, end = self._kept.get(key, (None, 0.0))
        return value if end > time.monotonic() else None

    def set(self, key: str, value: Any, *_: Any, time: float = 0, **__: Any) -> None:
        self._kept[key] = json.loads(json.dumps(value)), _now() + (time or 86400)

    def incr(self, key: str, delta: int = 1, time: float = 0, **_: Any) -> int:
        value = (self.get(key) or 0) + delta
        self.set(key, value, time=time)
        return int(value)

    def delete(self, key: str, **_: Any) -> None:
        self._kept.pop(key, None)


def make_cache_filter(_global_conf: Mapping[str, str], **_local_conf: str) -> Any:
    """Return the filter's factory; paste calls this."""
    return MemoryCache


_now = time.monotonic


def make_fault_filter(_global_conf: Mapping[str, str], **_local_conf: str) -> Any:
    """Return the filter's factory; paste calls this."""
    return FaultFilter
