"""Signature version 4, as the reference of Amazon S3 describes it under "Authenticating Requests".

By hand, because the one library that has it needs longer to import than a thousand small objects need to arrive; the
tests compare it with that library's, request for request.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from urllib.parse import quote

from s3_transfer.settings import Credentials, Settings

UNSIGNED = "UNSIGNED-PAYLOAD"
_ALGORITHM = "AWS4-HMAC-SHA256"
_UNQUOTED = "-_.~"
# What has to be signed and no more, beside the host: proxies may touch the rest.
_SIGNED = ("x-amz-", "content-type", "content-md5")

Clock = Callable[[], datetime]


def canonical(query: Mapping[str, str]) -> str:
    """A query as it is to be signed: sorted, everything quoted, an equals sign even without a value."""
    pairs = sorted((quote(name, safe=_UNQUOTED), quote(value, safe=_UNQUOTED)) for name, value in query.items())
    return "&".join(f"{name}={value}" for name, value in pairs)


class Signer:
    """Signs requests for one bucket. The key of a day is derived once."""

    def __init__(self, credentials: Credentials, region: str, clock: Clock = lambda: datetime.now(UTC)) -> None:
        self._credentials, self._region, self._clock = credentials, region, clock
        self._derived: tuple[str, bytes] = ("", b"")

    def headers(self, method: str, url: Settings, key: str, query: str, sent: dict[str, str], payload: str) -> None:
        """Add to ``sent`` what authenticates the request; ``payload`` is its body's SHA-256, or ``UNSIGNED``."""
        now = self._clock().strftime("%Y%m%dT%H%M%SZ")
        sent |= {"X-Amz-Date": now, "X-Amz-Content-SHA256": payload}
        if self._credentials.token:
            sent["X-Amz-Security-Token"] = self._credentials.token
        signed = {name.lower(): value for name, value in sent.items() if name.lower().startswith(_SIGNED)}
        signed["host"] = url.host
        names, signature = self._sign(method, url.path(key), query, signed, payload, now)
        sent["Authorization"] = (
            f"{_ALGORITHM} Credential={self._credentials.key_id}/{self._scope(now)}, SignedHeaders={names}, "
            f"Signature={signature}"
        )

    def query(self, method: str, url: Settings, key: str, query: Mapping[str, str], expires_s: int) -> str:
        """The query that lets anybody make the request, for ``expires_s`` seconds from now."""
        now = self._clock().strftime("%Y%m%dT%H%M%SZ")
        wanted = dict(query) | {
            "X-Amz-Algorithm": _ALGORITHM,
            "X-Amz-Credential": f"{self._credentials.key_id}/{self._scope(now)}",
            "X-Amz-Date": now,
            "X-Amz-Expires": str(expires_s),
            "X-Amz-SignedHeaders": "host",
        }
        if self._credentials.token:
            wanted["X-Amz-Security-Token"] = self._credentials.token
        text = canonical(wanted)
        _, signature = self._sign(method, url.path(key), text, {"host": url.host}, UNSIGNED, now)
        return f"{text}&X-Amz-Signature={signature}"

    def _scope(self, now: str) -> str:
        return f"{now[:8]}/{self._region}/s3/aws4_request"

    def _sign(
        self, method: str, path: str, query: str, headers: Mapping[str, str], payload: str, now: str
    ) -> tuple[str, str]:
        """The names of the signed headers, and the signature."""
        order = sorted(headers)
        names = ";".join(order)
        lines = "".join(f"{name}:{' '.join(headers[name].split())}\n" for name in order)
        request = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{payload}"
        text = f"{_ALGORITHM}\n{now}\n{self._scope(now)}\n{hashlib.sha256(request.encode()).hexdigest()}"
        return names, hmac.new(self._key(now[:8]), text.encode(), hashlib.sha256).hexdigest()

    def _key(self, day: str) -> bytes:
        known, key = self._derived
        if known != day:
            key = f"AWS4{self._credentials.secret}".encode()
            for part in (day, self._region, "s3", "aws4_request"):
                key = hmac.new(key, part.encode(), hashlib.sha256).digest()
            self._derived = day, key
        return key
