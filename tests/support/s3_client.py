"""Requests to an S3 API, signed with AWS's Signature Version 4: what tests need of S3 and no more."""

from __future__ import annotations

import hashlib
import hmac
import http.client
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote

from tests.support.ceph_server import CephServer

_REGION = "us-east-1"


def request_s3(
    ceph: CephServer,
    method: str,
    path: str,
    query: Mapping[str, str] | None = None,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Mapping[str, str], bytes]:
    """Send a request as the test user; return the answer's status, headers and body. `path`: /BUCKET/NAME."""
    host = "{}:{}".format(*ceph.s3_address)
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    digest = hashlib.sha256(body).hexdigest()
    signed = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": now, **(headers or {})}
    asked = "&".join(f"{quote(key, '')}={quote(value, '')}" for key, value in sorted((query or {}).items()))
    names = ";".join(sorted(signed))
    lines = [f"{key}:{signed[key]}" for key in sorted(signed)]
    canonical = "\n".join([method, quote(path), asked, *lines, "", names, digest])
    scope = f"{now[:8]}/{_REGION}/s3/aws4_request"
    key = f"AWS4{ceph.s3_secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    signature = hmac.new(key, f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashed}".encode(), "sha256").hexdigest()
    signed["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={ceph.s3_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        connection.request(method, quote(path) + (f"?{asked}" if asked else ""), body, signed)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()
