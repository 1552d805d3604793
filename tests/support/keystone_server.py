"""A server with the part of Keystone's API that signing in needs; its tokens are those of a real Swift.

It knows one user and one application credential. Its catalogue has an object store for each given region.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.support.swift_server import SwiftServer

USER, PASSWORD = "tester", "correct horse"
CREDENTIAL, SECRET = "credential-id", "battery staple"


class KeystoneServer:
    """A context manager. `issued` counts tokens; `asked` has the bodies of the requests for them."""

    def __init__(self, swift: SwiftServer, regions: tuple[str, ...] = ("one", "two")) -> None:
        self.swift = swift
        self.regions = regions
        self.issued = 0
        self.asked: list[dict[str, Any]] = []
        handler = type("Handler", (_Handler,), {"keystone": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def environment(self) -> dict[str, str]:
        """Return the variables of an openrc file for the user."""
        return {
            "OS_AUTH_URL": self.url,
            "OS_USERNAME": USER,
            "OS_PASSWORD": PASSWORD,
            "OS_PROJECT_NAME": "test",
            "OS_USER_DOMAIN_NAME": "Default",
            "OS_PROJECT_DOMAIN_ID": "default",
            "OS_IDENTITY_API_VERSION": "3",
            "OS_REGION_NAME": "two",
        }

    def describe_versions(self) -> dict[str, Any]:
        """Return the document at the root and at /v3."""
        link = {"rel": "self", "href": f"{self.url}/v3"}
        version = {"id": "v3.14", "status": "stable", "links": [link], "media-types": []}
        return {"versions": {"values": [version]}}

    def issue(self, body: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
        """Answer a request to sign in: return status, token and document."""
        self.asked.append(body)
        identity = body["auth"]["identity"]
        user = identity.get("password", {}).get("user", {})
        credential = identity.get("application_credential", {})
        if (user.get("name"), user.get("password")) != (USER, PASSWORD) and (
            credential.get("id"),
            credential.get("secret"),
        ) != (CREDENTIAL, SECRET):
            return 401, "", {"error": {"code": 401, "title": "Unauthorized", "message": "no"}}
        self.issued += 1
        url, token = self.swift.sign_in()
        return 201, token, {"token": self._document(url)}

    def _document(self, url: str) -> dict[str, Any]:
        endpoints = [
            {"id": f"{region}-{interface}", "interface": interface, "region": region, "region_id": region}
            | {"url": url if (region, interface) == ("two", "public") else "http://127.0.0.1:9/wrong"}
            for region in self.regions
            for interface in ("public", "internal")
        ]
        service = {"type": "object-store", "name": "swift", "id": "s", "endpoints": endpoints}
        return {
            "methods": ["password"],
            "expires_at": "2999-01-01T00:00:00.000000Z",
            "issued_at": "2020-01-01T00:00:00.000000Z",
            "user": {"id": "u", "name": USER, "domain": {"id": "default", "name": "Default"}},
            "project": {"id": "p", "name": "test", "domain": {"id": "default", "name": "Default"}},
            "roles": [{"id": "r", "name": "member"}],
            "catalog": [service] if self.regions else [],
        }


class _Handler(BaseHTTPRequestHandler):
    keystone: KeystoneServer

    def do_GET(self) -> None:
        self._reply(300 if self.path == "/" else 200, self.keystone.describe_versions())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, token, document = self.keystone.issue(body)
        self._reply(status, document, {"X-Subject-Token": token})

    def _reply(self, status: int, document: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""
