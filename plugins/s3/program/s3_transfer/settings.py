"""Where the store is and how to speak to it: parameters of the step, variables of its environment."""

from __future__ import annotations

import base64
import binascii
import hashlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlsplit

from outrider_stepkit import StepFailure

_SAFE = "-_.~"  # what AWS leaves as it is in a path, beside letters and digits; slashes separate


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key pair, and the token that temporary ones come with."""

    key_id: str
    secret: str
    token: str | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that requests to one bucket have in common."""

    scheme: str
    host: str
    """As in the Host header: with the port where it is not the scheme's own."""
    base: str
    """The path before every key, not quoted yet: empty, or beginning with a slash and ending without one."""
    bucket: str
    region: str
    credentials: Credentials | None
    idle_s: float
    ca_pem: str | None = None
    customer_key: bytes | None = None
    """The key of SSE-C: 32 bytes."""
    shown: str = ""
    """The endpoint in sentences."""

    @classmethod
    def read(cls, params: Mapping[str, Any], env: Mapping[str, str]) -> Settings:
        """Raises StepFailure for what can't be right, without repeating what may be a secret."""
        bucket, region = params["bucket"], params.get("region") or env.get("S3_REGION") or "us-east-1"
        given = params.get("endpoint") or env.get("S3_ENDPOINT") or None
        suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        endpoint = _endpoint(given or f"https://s3.{region}.{suffix}")
        style = params.get("addressing", "auto")
        # AWS serves new buckets by host only; of others, path-style is what every one of them understands. A dot in a
        # bucket's name breaks the wildcard of the certificate.
        virtual = style == "virtual" or (style == "auto" and given is None and "." not in bucket)
        host, base = endpoint.netloc, endpoint.path.rstrip("/")
        if virtual:
            host = f"{bucket}.{host}"
        else:
            base += f"/{bucket}"
        return cls(
            scheme=endpoint.scheme,
            host=host,
            base=base,
            bucket=bucket,
            region=region,
            credentials=_credentials(env),
            idle_s=float(params.get("idle_timeout_s", 60)),
            ca_pem=env.get("S3_CA") or None,
            customer_key=_customer_key(env),
            shown=f"{endpoint.scheme}://{endpoint.netloc}" if given else f"AWS ({region})",
        )

    @property
    def secure(self) -> bool:
        return self.scheme == "https"

    def path(self, key: str = "") -> str:
        """The path of an object, or of the bucket, quoted as it goes over the wire and into signatures."""
        return quote(f"{self.base}/{key}", safe=f"/{_SAFE}")

    def url(self, key: str = "", query: str = "") -> str:
        return f"{self.scheme}://{self.host}{self.path(key)}" + (f"?{query}" if query else "")

    def object(self, key: str) -> str:
        """What an object is called in a sentence."""
        return f"object {key!r} of bucket {self.bucket!r}"

    @cached_property
    def customer_headers(self) -> dict[str, str]:
        """What every request for an object needs that is encrypted with a key of the customer's."""
        if self.customer_key is None:
            return {}
        if not self.secure:
            raise StepFailure("S3_SSE_CUSTOMER_KEY must not travel without TLS: use an https endpoint", code="tls")
        return {
            "x-amz-server-side-encryption-customer-algorithm": "AES256",
            "x-amz-server-side-encryption-customer-key": base64.b64encode(self.customer_key).decode(),
            "x-amz-server-side-encryption-customer-key-MD5": base64.b64encode(
                hashlib.md5(self.customer_key, usedforsecurity=False).digest()
            ).decode(),
        }

    def tls(self) -> ssl.SSLContext:
        """Public authorities, and the one of S3_CA. Raises StepFailure if that is no certificate."""
        context = ssl.create_default_context()
        if self.ca_pem:
            try:
                context.load_verify_locations(cadata=self.ca_pem)
            except ssl.SSLError as error:
                raise StepFailure(
                    "the env S3_CA has to hold the certificate of an authority as PEM text", code="bad_ca"
                ) from error
        return context


def _endpoint(text: str) -> Any:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    # Not repeated in the message: it comes from an env, and may hold a password.
    if not usable or parts.username is not None or parts.query or parts.fragment:
        raise StepFailure(
            "the endpoint (S3_ENDPOINT or 'endpoint') has to read like https://host:port, without credentials",
            code="bad_endpoint",
        )
    if parts.port == {"http": 80, "https": 443}[parts.scheme]:
        parts = parts._replace(netloc=parts.netloc.rpartition(":")[0])
    return parts


def _credentials(env: Mapping[str, str]) -> Credentials | None:
    key_id, secret = env.get("S3_ACCESS_KEY_ID"), env.get("S3_SECRET_ACCESS_KEY")
    if key_id and secret:
        return Credentials(key_id, secret, env.get("S3_SESSION_TOKEN") or None)
    if not key_id and not secret:
        return None
    given, missing = "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"
    if secret:
        given, missing = missing, given
    raise StepFailure(f"{given} is given without {missing}: allot both to the step, or neither", code="bad_credentials")


def _customer_key(env: Mapping[str, str]) -> bytes | None:
    if not env.get("S3_SSE_CUSTOMER_KEY"):
        return None
    try:
        key = base64.b64decode(env["S3_SSE_CUSTOMER_KEY"], validate=True)
    except binascii.Error:
        key = b""
    if len(key) != 32:
        raise StepFailure("the env S3_SSE_CUSTOMER_KEY has to hold 32 bytes as base64", code="bad_customer_key")
    return key
