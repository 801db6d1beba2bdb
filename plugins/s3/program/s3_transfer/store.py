"""A connection to an S3-compatible store."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from outrider_stepkit import StepFailure
from urllib3.exceptions import HTTPError

from s3_transfer.errors import from_store

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECTIONS = 4
"""How many requests are in flight at once: enough to fill a link of high latency, few enough for memory."""

_TRANSPORT_ERRORS = (BotoCoreError, ClientError, HTTPError, ConnectionError, TimeoutError, ValueError)


class Store:
    """One bucket of one store. ``client`` is botocore's; use it inside ``errors()``."""

    def __init__(self, params: Mapping[str, Any], env: Mapping[str, str]) -> None:
        """Read the endpoint, the region and the credentials. Raises StepFailure if they can't be right."""
        self.bucket: str = params["bucket"]
        endpoint = params.get("endpoint") or env.get("S3_ENDPOINT") or None
        region = params.get("region") or env.get("S3_REGION") or "us-east-1"
        self.endpoint = _shown(endpoint) if endpoint else f"AWS ({region})"
        idle = float(params.get("idle_timeout_s", 60))
        key_id, secret = env.get("S3_ACCESS_KEY_ID"), env.get("S3_SECRET_ACCESS_KEY")
        if bool(key_id) != bool(secret):
            given, missing = "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"
            if secret:
                given, missing = missing, given
            raise StepFailure(
                f"{given} is given without {missing}: allot both to the step, or neither", code="bad_credentials"
            )
        config = Config(
            signature_version="s3v4" if key_id else UNSIGNED,
            s3={"addressing_style": "path"},
            # Checksums that only AWS knows are refused by many stores; integrity comes from Content-MD5 and SHA-256.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=min(10.0, idle),
            read_timeout=idle,
            max_pool_connections=CONNECTIONS + 1,
            retries={"mode": "standard", "total_max_attempts": 4},
            user_agent_extra="outrider-step-s3",
        )
        session = boto3.session.Session(
            aws_access_key_id=key_id,
            aws_secret_access_key=secret,
            aws_session_token=env.get("S3_SESSION_TOKEN") or None,
        )
        with self.errors("the store"):
            self.client: Any = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)

    def object(self, key: str) -> str:
        """What an object is called in a sentence."""
        return f"object {key!r} of bucket {self.bucket!r}"

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Raise StepFailure for whatever goes wrong with the store while ``what`` is transferred."""
        try:
            yield
        except _TRANSPORT_ERRORS as error:
            raise from_store(error, what=what, bucket=self.bucket, endpoint=self.endpoint) from error


def _shown(endpoint: str) -> str:
    """The endpoint as it may be shown: scheme, host and port. Raises StepFailure if it is none."""
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    # Not repeated in the message: it comes from an env, and may hold a password.
    if not usable or parts.username is not None or parts.query or parts.fragment:
        raise StepFailure(
            "the endpoint (S3_ENDPOINT or 'endpoint') has to read like https://host:port, without credentials",
            code="bad_endpoint",
        )
    return f"{parts.scheme}://{parts.netloc}"


class Meter:
    """Bytes moved so far, counted from several threads and reported as progress."""

    def __init__(self, total: int, report: Any) -> None:
        """``report(done, total)`` is called with the lock held; it has to limit its own rate."""
        self._total = total
        self._done = 0
        self._report = report
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._report(self._done, self._total)
