"""The S3 step types keep the contract, by the kit that every step author has.

Where OUTRIDER_TEST_S3_ENDPOINT names a store, that is the one, and moto's server otherwise.
"""

from __future__ import annotations

import os
import socket
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config

from outrider.testing import Attempted, Example, Failing, StepConformance, Wrong

GIVEN = os.environ.get("OUTRIDER_TEST_S3_ENDPOINT", "")
KEY_ID = os.environ["OUTRIDER_TEST_S3_ACCESS_KEY_ID"] if GIVEN else "AKIDOUTRIDERTEST"
SECRET = os.environ["OUTRIDER_TEST_S3_SECRET_ACCESS_KEY"] if GIVEN else "s3cr3t/Outrider+Test0123456789"
MIB = 1024**2
POLICY = {"networks": {"egress": {"network": "outrider-test-s3-kit", "allow": ["private"]}}}


@dataclass(frozen=True)
class Place:
    """A store with a bucket, as containers reach it."""

    endpoint: str
    bucket: str
    client: Any

    @cached_property
    def big(self) -> str:
        """An object that takes long if it is fetched slowly; only the long forms ask for it."""
        self.client.put_object(Bucket=self.bucket, Key="big", Body=bytes(48 * MIB))
        return "big"

    def envs(self) -> dict[str, str]:
        return {"S3_ENDPOINT": self.endpoint, "S3_ACCESS_KEY_ID": KEY_ID}


@pytest.fixture(scope="module")
def step_environment(request: pytest.FixtureRequest) -> Iterator[Place]:
    endpoint = GIVEN or request.getfixturevalue("moto_endpoint")
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        config=Config(s3={"addressing_style": "path"}),
    )
    bucket = f"outrider-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="p/a", Body=b"one")
    client.put_object(Bucket=bucket, Key="p/deep/b", Body=b"two")
    parts = urlsplit(endpoint)
    if parts.hostname in ("127.0.0.1", "localhost"):
        endpoint = f"{parts.scheme}://{bridge_address()}:{parts.port}"
    yield Place(endpoint, bucket, client)
    for item in client.list_objects_v2(Bucket=bucket).get("Contents", ()):
        client.delete_object(Bucket=bucket, Key=item["Key"])
    client.delete_bucket(Bucket=bucket)
    client.close()


def bridge_address() -> str:
    """This machine as containers of any network reach it: the engine's own bridge."""
    shown = subprocess.run(
        ["docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return shown.stdout.strip() or socket.gethostbyname(socket.gethostname())


def params(**given: Any) -> Any:
    return lambda place: {"bucket": place.bucket, **given}


def envs(place: Place) -> dict[str, str]:
    return place.envs()


SECRETS = {"S3_SECRET_ACCESS_KEY": SECRET}


def has_both_files(attempted: Attempted) -> None:
    target = attempted.volumes["data"] / "to"
    assert ((target / "a").read_bytes(), (target / "deep" / "b").read_bytes()) == (b"one", b"two")


class TestDownload(StepConformance):
    step_type = "s3.download"
    policy = POLICY
    examples = (
        Example(
            "a prefix",
            params(prefix="p", to="/data/to"),
            volumes={"data": "/data:rw"},
            envs=envs,
            secrets=SECRETS,
            outputs={"objects": 2, "bytes": 6},
            varying=("transferred",),
            check=has_both_files,
        ),
    )
    failing = (
        Failing(
            "no such object",
            params(key="none", to="/data/k"),
            volumes={"data": "/data:rw"},
            envs=envs,
            secrets=SECRETS,
            code="no_such_key",
        ),
    )
    wrong = (
        Wrong("neither key nor prefix", {"bucket": "b", "to": "/data/k"}, says="key", volumes={"data": "/data:rw"}),
        Wrong(
            "no speed at all",
            {"bucket": "b", "key": "k", "to": "/data/k", "limit_bytes_per_s": 1},
            says="limit_bytes_per_s",
            volumes={"data": "/data:rw"},
        ),
    )
    long = Example(
        "slowly",
        lambda place: params(key=place.big, to="/data/big", limit_bytes_per_s=MIB)(place),
        volumes={"data": "/data:rw"},
        envs=envs,
        secrets=SECRETS,
    )


class TestUpload(StepConformance):
    step_type = "s3.upload"
    policy = POLICY
    examples = (
        Example(
            "a file",
            params(key="new", **{"from": "/data/f"}),
            volumes={"data": "/data"},
            files={"data/f": b"content"},
            envs=envs,
            secrets=SECRETS,
            outputs={"objects": 1, "bytes": 7},
        ),
    )
    failing = (
        Failing(
            "an object that is there",
            params(key="p/a", overwrite=False, **{"from": "/data/f"}),
            volumes={"data": "/data"},
            files={"data/f": b"content"},
            envs=envs,
            secrets=SECRETS,
            code="exists",
        ),
    )
    wrong = (
        Wrong(
            "a key of no encryption",
            {"bucket": "b", "key": "k", "from": "/data/f", "kms_key_id": "k"},
            volumes={"data": "/data"},
        ),
    )
    long = Example(
        "slowly",
        params(key="slow", limit_bytes_per_s=MIB, **{"from": "/data/f"}),
        volumes={"data": "/data"},
        files={"data/f": 48 * MIB},
        envs=envs,
        secrets=SECRETS,
    )


class TestPresign(StepConformance):
    step_type = "s3.presign"
    policy = POLICY
    progress = False
    quick = "it signs one URL, without a network"
    examples = (
        Example(
            "a URL",
            params(key="k"),
            envs=envs,
            secrets=SECRETS,
            outputs={"method": "GET"},
            varying=("url", "expires_at"),
        ),
    )
    failing = (
        Failing(
            "no key pair",
            params(key="k", to="/data/url"),
            volumes={"data": "/data:rw"},
            envs=lambda place: {"S3_ENDPOINT": place.endpoint},
            code="bad_credentials",
        ),
    )
    wrong = (
        Wrong(
            "for ever",
            {"bucket": "b", "key": "k", "to": "/data/url", "expires_s": 10**9},
            says="expires_s",
            volumes={"data": "/data:rw"},
        ),
    )
