"""The front of the tests' Ceph: a process that injects faults into requests, and forwards the others.

`ceph_server.py` starts this as a program: `ceph_front.py PORT GATEWAY_PORT...`. Of several gateways each gets
a request in turn. The faults are those of the tests' Swift (`swift_faults.py`, in the same folder). It
imports nothing from the tests.
"""

from __future__ import annotations

import ctypes
import http.client
import itertools
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import eventlet
from swift_faults import FaultFilter

_PIECE = 64 << 10  # bytes that are forwarded at a time
_OURS = ("connection", "transfer-encoding", "expect", "keep-alive", "date", "content-length", "range")


def make_forwarder(ports: Sequence[int]) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    """Return a WSGI application that sends each request on to the next of `ports`, on a new connection."""
    turns = itertools.cycle(ports)

    def forward(env: dict[str, Any], start: Any) -> Iterable[bytes]:
        if env["PATH_INFO"] == "/healthcheck":
            start("200 OK", [("Content-Length", "2")])
            return [b"OK"]
        gateway = http.client.HTTPConnection("127.0.0.1", next(turns))
        try:
            _send(gateway, env)
            answer = gateway.getresponse()
        except OSError:  # the gateway is away, or whoever asked is gone
            gateway.close()
            env["eventlet.input"].get_socket().shutdown(socket.SHUT_RDWR)
            start("502 Gateway is away", [("Content-Length", "0")])
            return [b""]
        headers = [(key, value) for key, value in answer.getheaders() if key.lower() not in _OURS]
        headers.append(("Content-Length", answer.headers.get("Content-Length", "0")))
        start(f"{answer.status} {answer.reason}", headers)
        return _receive(gateway, answer)

    return forward


def _send(gateway: http.client.HTTPConnection, env: dict[str, Any]) -> None:
    query = env.get("QUERY_STRING", "")
    target = env["RAW_PATH_INFO"] + (f"?{query}" if query else "")
    gateway.putrequest(env["REQUEST_METHOD"], target, skip_host=True, skip_accept_encoding=True)
    for key, value in env["headers_raw"]:
        if key.lower() not in _OURS:
            gateway.putheader(key, value)
    if "HTTP_RANGE" in env:  # a fault can have changed it
        gateway.putheader("Range", env["HTTP_RANGE"])
    size = int(env.get("CONTENT_LENGTH") or 0)
    if size or env["REQUEST_METHOD"] in ("PUT", "POST"):
        gateway.putheader("Content-Length", str(size))
    gateway.endheaders()
    while size and (piece := env["wsgi.input"].read(min(size, _PIECE))):
        gateway.send(piece)
        size -= len(piece)
    if size:
        raise OSError("the request's body is cut")


def _receive(gateway: http.client.HTTPConnection, answer: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while piece := answer.read(_PIECE):
            yield piece
    finally:
        gateway.close()


def _serve(port: int, *gateway_ports: int) -> None:
    """Serve until the process that started this one ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    from eventlet import wsgi

    listening = eventlet.listen(("127.0.0.1", port), backlog=256)
    wsgi.server(listening, FaultFilter(make_forwarder(gateway_ports)), log_output=False)


if __name__ == "__main__":
    eventlet.monkey_patch()
    _serve(*map(int, sys.argv[1:]))
