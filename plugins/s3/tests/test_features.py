"""What a store can do beside keeping bytes: versions, conditions, tags, encryption, checksums, addresses."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import outrider_step_s3 as plugin
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from outrider.masking import contains_secret

from .conftest import KEY_ID, SECRET, Program, Proxy, Store

MIB = 1024**2
BIG = os.urandom(MIB) * 6  # two parts of an upload


@pytest.fixture
def here(tmp_path: Path) -> Path:
    directory = tmp_path / "build"
    directory.mkdir()
    return directory


def test_a_version_is_fetched_and_told(store: Store, program: Program, here: Path) -> None:
    store.client.put_bucket_versioning(Bucket=store.bucket, VersioningConfiguration={"Status": "Enabled"})
    try:
        (here / "f").write_bytes(b"old")
        up = {"bucket": store.bucket, "key": "k", "from": f"{here}/f"}
        old = program.run("upload", up, store.env).outputs["version_id"]
        store.put("k", b"new")
        down = {"bucket": store.bucket, "key": "k", "to": f"{here}/g"}
        ended = program.run("download", down | {"version_id": old}, store.env)
        assert (ended.outputs["version_id"], (here / "g").read_bytes()) == (old, b"old")
        assert program.run("download", down, store.env).outputs["version_id"] not in (None, old)
        assert (here / "g").read_bytes() == b"new"
        ended = program.run("download", down | {"version_id": "none-such"}, store.env)
        assert ended.code == 1
        assert ended.cause in {"no_such_key", "refused"}
    finally:
        for item in store.client.list_object_versions(Bucket=store.bucket)["Versions"]:
            store.client.delete_object(Bucket=store.bucket, Key="k", VersionId=item["VersionId"])


@pytest.mark.parametrize("body", [b"mine", BIG], ids=["small", "parts"])
def test_what_is_there_is_not_overwritten_unasked(store: Store, program: Program, here: Path, body: bytes) -> None:
    (here / "f").write_bytes(body)
    params = {"bucket": store.bucket, "key": "k", "from": f"{here}/f", "overwrite": False}
    assert program.run("upload", params, store.env).code == 0
    # Done once more, as after a kill that came before the result was recorded: it is ours, so it is done.
    assert program.run("upload", params, store.env).code == 0
    store.put("k", b"somebody else's")
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (1, "exists")
    assert "overwrite" in ended.error
    assert store.get("k") == b"somebody else's"
    assert store.unfinished() == []


def test_only_the_object_that_is_known_is_replaced(store: Store, proxy: Proxy, program: Program, here: Path) -> None:
    store.put("k", b"known")
    etag = store.client.head_object(Bucket=store.bucket, Key="k")["ETag"].strip('"')
    (here / "f").write_bytes(b"mine")
    params = {"bucket": store.bucket, "key": "k", "from": f"{here}/f", "if_etag": etag, "endpoint": proxy.endpoint}
    assert program.run("upload", params, store.env).code == 0
    assert proxy.headers[-1]["if-match"] == f'"{etag}"'
    proxy.fault = lambda method, path, number: "412 PreconditionFailed" if method == "PUT" else None
    store.put("k", b"somebody else's")
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (1, "not_the_same")
    assert etag in ended.error
    assert store.get("k") == b"somebody else's"


@pytest.mark.parametrize("body", [b"mine", BIG], ids=["small", "parts"])
@pytest.mark.parametrize("before", [b"as it was listed", None], ids=["changed", "new"])
def test_objects_of_a_prefix_that_changed_since_they_were_listed_are_left_alone(
    store: Store, proxy: Proxy, program: Program, here: Path, body: bytes, before: bytes | None
) -> None:
    (here / "f").write_bytes(body)
    listed = hashlib.md5(before).hexdigest() if before is not None else ""
    if before is not None:
        store.put("p/f", before)

    def change(method: str, path: str, number: int) -> str | None:
        if method == "PUT" and number == 1:
            store.put("p/f", b"somebody else's")
        # The store that stands here does not look at this condition when parts are put together; others do.
        together = method == "POST" and "uploadId=" in path and proxy.headers[-1].get("if-match") == f'"{listed}"'
        return "412 PreconditionFailed" if together else None

    params = {"bucket": store.bucket, "prefix": "p", "from": str(here), "if_unchanged": True}
    params |= {"endpoint": proxy.endpoint, "connections": 1}
    proxy.fault = change
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (1, "not_the_same")
    assert "'p/f'" in ended.error
    assert store.get("p/f") == b"somebody else's"
    assert store.unfinished() == []
    proxy.fault = lambda method, path, number: None
    assert program.run("upload", params, store.env).outputs["transferred"] == 1
    assert store.get("p/f") == body
    assert program.run("upload", params, store.env).outputs["transferred"] == 0
    assert program.run("upload", params | {"only_differences": False}, store.env).outputs["transferred"] == 1


def test_store_without_conditions_is_named(store: Store, proxy: Proxy, program: Program, here: Path) -> None:
    (here / "f").write_bytes(b"mine")
    proxy.fault = lambda method, path, number: (
        "501 NotImplemented" if {"if-match", "if-none-match"} & set(proxy.headers[-1]) else None
    )
    params = {"bucket": store.bucket, "prefix": "p", "from": str(here), "endpoint": proxy.endpoint}
    ended = program.run("upload", params | {"if_unchanged": True}, store.env)
    assert (ended.code, ended.cause) == (1, "no_conditions")
    assert "if_unchanged" in ended.error
    assert store.listed() == []
    assert program.run("upload", params, store.env).code == 0


@pytest.mark.parametrize("body", [b"x", BIG], ids=["small", "parts"])
def test_storage_class_tags_and_encryption_are_asked_for(
    store: Store, program: Program, here: Path, body: bytes
) -> None:
    (here / "f").write_bytes(body)
    params = {"bucket": store.bucket, "key": "k", "from": f"{here}/f", "storage_class": "STANDARD_IA"}
    params |= {"tags": {"kind": "backup + more", "ü": ""}, "encryption": "aws:kms", "kms_key_id": "key-1"}
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    found = store.client.head_object(Bucket=store.bucket, Key="k")
    assert (found["StorageClass"], found["ServerSideEncryption"]) == ("STANDARD_IA", "aws:kms")
    assert found["SSEKMSKeyId"].endswith("key-1")
    tags = store.client.get_object_tagging(Bucket=store.bucket, Key="k")["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"kind": "backup + more", "ü": ""}


@pytest.mark.parametrize("body", [b"x", BIG], ids=["small", "parts"])
def test_store_that_drops_the_encryption_is_found_out(
    store: Store, proxy: Proxy, program: Program, here: Path, body: bytes
) -> None:
    (here / "f").write_bytes(body)
    proxy.dropped = "x-amz-server-side-encryption"
    params = {"bucket": store.bucket, "key": "k", "from": f"{here}/f", "encryption": "aws:kms", "kms_key_id": "key-1"}
    ended = program.run("upload", params | {"endpoint": proxy.endpoint}, store.env)
    assert (ended.code, ended.cause) == (1, "encryption")
    assert "aws:kms" in ended.error
    assert store.listed() == []
    assert store.unfinished() == []


def test_own_authority_and_own_encryption_key_over_tls(
    store: Store, tls_proxy: Proxy, program: Program, here: Path
) -> None:
    key = base64.b64encode(b"k" * 32).decode()
    (here / "f").write_bytes(b"secret saves")
    params = {"bucket": store.bucket, "key": "k", "from": f"{here}/f", "endpoint": tls_proxy.endpoint}
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (1, "tls")
    assert "S3_CA" in ended.error
    env = store.env | {"S3_CA": tls_proxy.ca, "S3_SSE_CUSTOMER_KEY": key}
    ended = program.run("upload", params, env)
    assert ended.code == 0, ended.text
    sent = tls_proxy.headers[-1]
    assert sent["x-amz-server-side-encryption-customer-key"] == key
    assert (
        sent["x-amz-server-side-encryption-customer-key-md5"]
        == base64.b64encode(hashlib.md5(b"k" * 32).digest()).decode()
    )
    assert sent["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    down = {"bucket": store.bucket, "key": "k", "to": f"{here}/g", "endpoint": tls_proxy.endpoint}
    ended = program.run("download", down, env)
    assert (ended.code, (here / "g").read_bytes()) == (0, b"secret saves")
    assert all("x-amz-server-side-encryption-customer-key" in headers for headers in tls_proxy.headers[-2:])
    assert key not in ended.text
    # In the open, the key of the customer must not be sent.
    ended = program.run("upload", params | {"endpoint": store.endpoint}, env)
    assert (ended.code, ended.cause) == (1, "tls")
    ended = program.run("upload", params, env | {"S3_SSE_CUSTOMER_KEY": "c2hvcnQ="})
    assert (ended.code, ended.cause) == (1, "bad_customer_key")
    ended = program.run("upload", params, env | {"S3_CA": "no certificate"})
    assert (ended.code, ended.cause) == (1, "bad_ca")


def test_bytes_damaged_on_the_way_are_noticed_without_a_checksum_of_the_caller(
    store: Store, proxy: Proxy, program: Program, here: Path
) -> None:
    store.put("small", b"content")
    store.put("p/large", BIG[: 3 * MIB])
    proxy.fault = lambda method, path, number: "flip" if method == "GET" and "list-type" not in path else None
    params = {"bucket": store.bucket, "key": "small", "to": f"{here}/small", "endpoint": proxy.endpoint}
    ended = program.run("download", params, store.env)
    assert (ended.code, ended.cause) == (75, "damaged")
    ended = program.run("download", params | {"key": "p/large"}, store.env)
    assert (ended.code, ended.cause) == (75, "damaged")
    proxy.fault = lambda method, path, number: "flip" if path.endswith("/p/large") and method == "GET" else None
    many = {"bucket": store.bucket, "prefix": "p", "to": f"{here}/p", "endpoint": proxy.endpoint}
    ended = program.run("download", many, store.env)
    assert (ended.code, ended.cause) == (75, "damaged")
    assert not any(path.is_file() for path in here.rglob("*") if ".outrider-stage" not in str(path))
    proxy.fault = lambda method, path, number: None
    assert program.run("download", many, store.env).code == 0


@pytest.mark.parametrize("checksum", ["sha256", "crc32", "crc32c", "md5"])
def test_checksums_are_checked_by_the_store_and_by_the_next_download(
    store: Store, proxy: Proxy, program: Program, here: Path, checksum: str
) -> None:
    (here / "f").write_bytes(b"content")
    params = {"bucket": store.bucket, "key": "k", "from": f"{here}/f", "checksum": checksum, "endpoint": proxy.endpoint}
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    assert ("content-md5" if checksum == "md5" else f"x-amz-checksum-{checksum}") in proxy.headers[-1]
    down = {"bucket": store.bucket, "key": "k", "to": f"{here}/g", "endpoint": proxy.endpoint}
    assert program.run("download", down, store.env).code == 0


@pytest.mark.parametrize("body", [b"x", BIG], ids=["small", "parts"])
def test_store_that_knows_no_such_checksum_gets_the_object_without(
    store: Store, proxy: Proxy, program: Program, here: Path, body: bytes
) -> None:
    def refuse(method: str, path: str, number: int) -> str | None:
        asks = any("crc64nvme" in f"{name} {value}".lower() for name, value in proxy.headers[-1].items())
        return "501 NotImplemented" if asks else None

    (here / "f").write_bytes(body)
    proxy.fault = refuse
    params = {"bucket": store.bucket, "key": "k", "from": f"{here}/f", "endpoint": proxy.endpoint, "connections": 1}
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    assert store.get("k") == body
    ended = program.run("upload", params | {"checksum": "crc64nvme"}, store.env)
    assert (ended.code, ended.cause) == (1, "refused")


@pytest.mark.parametrize("refused", [False, True], ids=["ignored", "refused"])
@pytest.mark.parametrize("body", [b"x" * 1000, BIG], ids=["small", "parts"])
def test_what_a_store_without_checksums_has_is_compared_by_its_tag(
    store: Store, proxy: Proxy, program: Program, here: Path, body: bytes, refused: bool
) -> None:
    def fault(method: str, path: str, number: int) -> str | None:
        if refused and any("crc64nvme" in f"{name} {value}".lower() for name, value in proxy.headers[-1].items()):
            return "501 NotImplemented"
        return "flip-sent" if method == "PUT" else None

    (here / "f").write_bytes(body)
    proxy.fault = fault
    proxy.dropped = "content-md5"  # nor does it look at that
    params = {"bucket": store.bucket, "key": "k", "from": f"{here}/f", "endpoint": proxy.endpoint, "connections": 1}
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (75, "damaged")
    assert store.listed() == []
    assert store.unfinished() == []
    assert any("content-md5" in headers for headers in proxy.headers) == refused
    if body == BIG and not refused:
        # Once it is known that the store is silent, it is given what even the oldest of them check.
        proxy.fault = lambda method, path, number: None
        assert program.run("upload", params, store.env).code == 0
        assert ["content-md5" in headers for headers in proxy.headers if "x-amz-checksum-crc64nvme" in headers][-1]
        proxy.fault = fault
    # Who asks for no check gets none: not every store's tags are MD5.
    assert program.run("upload", params | {"checksum": "none"}, store.env).code == 0


@pytest.mark.parametrize("body", [b"x" * 1000, BIG], ids=["small", "parts"])
def test_confirmed_checksum_is_compared_and_spares_the_md5(
    store: Store, proxy: Proxy, program: Program, here: Path, body: bytes
) -> None:
    (here / "f").write_bytes(body)
    params = {"bucket": store.bucket, "key": "k", "from": f"{here}/f", "endpoint": proxy.endpoint, "connections": 1}
    proxy.echoed = "x-amz-checksum-"
    assert program.run("upload", params, store.env).code == 0
    assert not any("content-md5" in headers for headers in proxy.headers)
    proxy.said["x-amz-checksum-crc64nvme"] = "AAAAAAAAAAA="
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (75, "damaged")
    assert store.unfinished() == []


def test_patterns_choose_among_the_files(store: Store, program: Program, here: Path) -> None:
    for name in ("maps/a.bsp", "maps/old/b.bsp", "a.log", "deep/b.log", "c.cfg"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(name.encode())
    (here / "link.log").symlink_to("/etc/passwd")  # what is excluded need not be sendable
    params = {"bucket": store.bucket, "prefix": "p", "from": str(here), "exclude": ["*.log"]}
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    assert store.listed() == ["p/c.cfg", "p/maps/a.bsp", "p/maps/old/b.bsp"]
    to = here / "to"
    down = {"bucket": store.bucket, "prefix": "p", "to": str(to), "include": ["maps"], "exclude": ["maps/old/"]}
    assert program.run("download", down, store.env).outputs["objects"] == 1
    assert [path.name for path in to.rglob("*.*")] == ["a.bsp"]
    ended = program.run("download", down | {"include": ["*.exe"]}, store.env)
    assert (ended.code, ended.cause) == (1, "no_such_key")
    assert "include" in ended.error


def test_bandwidth_is_kept_to_over_all_connections(store: Store, program: Program, here: Path) -> None:
    for number in range(4):
        store.put(f"p/{number}", bytes(MIB))
    params = {"bucket": store.bucket, "prefix": "p", "to": f"{here}/p", "limit_bytes_per_s": 2 * MIB}
    started = time.monotonic()
    ended = program.run("download", params, store.env)
    assert ended.code == 0, ended.text
    assert time.monotonic() - started > 1.5
    assert ended.progress[-1]["done"] == 4 * MIB
    assert ended.progress[-1]["message"].endswith("/s")


def test_presigned_urls_do_what_they_say(store: Store, program: Program, here: Path) -> None:
    store.put("a/ü +%.txt", b"content")
    params = {"bucket": store.bucket, "key": "a/ü +%.txt", "expires_s": 600, "file_name": "x y.txt"}
    ended = program.run("presign", params, store.env)
    assert ended.code == 0, ended.text
    with urllib.request.urlopen(ended.outputs["url"], timeout=20) as answer:
        assert answer.read() == b"content"
        assert "x%20y.txt" in answer.headers["Content-Disposition"]
    assert ended.outputs["method"] == "GET"
    assert "X-Amz-Expires=600" in ended.outputs["url"]
    ended = program.run(
        "presign", {"bucket": store.bucket, "key": "new", "action": "put", "to": f"{here}/url"}, store.env
    )
    assert "url" not in ended.outputs
    url = (here / "url").read_text().strip()
    assert (here / "url").stat().st_mode & 0o777 == 0o600
    octets = {"Content-Type": "application/octet-stream"}
    put = urllib.request.Request(url, data=b"sent", method="PUT", headers=octets)
    with urllib.request.urlopen(put, timeout=20) as answer:
        assert answer.status == 200
    assert store.get("new") == b"sent"
    # What the URL has in it, of what may come from an env set, is what the step type says may be shown.
    (presign,) = (each for each in plugin.outrider_step_types() if each.name == "s3.presign")
    ended = program.run("presign", params, store.env)
    told = {name for name, value in store.env.items() if contains_secret(ended.outputs["url"].encode(), [value])}
    assert told - {"S3_ENDPOINT"} == {"S3_ACCESS_KEY_ID"}
    assert told <= set(presign.public_envs)
    temporary = store.env | {"S3_SESSION_TOKEN": "a-token-of-sts"}
    ended = program.run("presign", params, temporary)
    assert (ended.code, ended.cause) == (1, "secret_in_outputs")
    assert "'to'" in ended.error
    assert program.run("presign", params | {"to": f"{here}/url"}, temporary).code == 0
    assert "a-token-of-sts" in (here / "url").read_text()
    ended = program.run("presign", params, {"S3_ENDPOINT": store.endpoint})
    assert (ended.code, ended.cause) == (1, "bad_credentials")


# A resolver for the program alone: who knows this name depends on the machine otherwise.
RESOLVER = """
import socket
known = socket.getaddrinfo
def getaddrinfo(host, *args, **options):
    return known("127.0.0.1" if host.endswith(".s3.test") else host, *args, **options)
socket.getaddrinfo = getaddrinfo
"""


def test_bucket_stands_before_the_name_of_the_host(store: Store, proxy: Proxy, program: Program, here: Path) -> None:
    if store.key_id != KEY_ID:
        pytest.skip("it looks at signatures, and those are for the host that the proxy stands for")
    resolver = here.parent / "resolver"
    resolver.mkdir()
    (resolver / "sitecustomize.py").write_text(RESOLVER)
    proxy.domain, port = "s3.test", proxy.endpoint.rpartition(":")[2]
    env = store.env | {"PYTHONPATH": str(resolver)}
    where = {"bucket": store.bucket, "addressing": "virtual", "endpoint": f"http://s3.test:{port}"}
    (here / "a ü").write_bytes(b"small")
    (here / "large").write_bytes(BIG)
    ended = program.run("upload", where | {"prefix": "p", "from": str(here)}, env)
    assert ended.code == 0, ended.text
    assert (store.get("p/a ü"), store.get("p/large")) == (b"small", BIG)
    ended = program.run("download", where | {"prefix": "p", "to": f"{here}/back"}, env)
    assert (ended.code, (here / "back" / "large").read_bytes()) == (0, BIG)
    assert len(proxy.requests) > 8
    assert {headers["host"] for headers in proxy.headers} == {f"{store.bucket}.s3.test:{port}"}
    assert not any(store.bucket in path for _, path, _ in proxy.requests)
    for (method, path, _), headers in zip(proxy.requests, proxy.headers, strict=True):
        assert headers["authorization"] == _as_botocore_signs(method, path, headers)


def _as_botocore_signs(method: str, path: str, headers: dict[str, str]) -> str:
    class Received(S3SigV4Auth):  # type: ignore[misc]
        def payload(self, request: Any) -> str:
            return headers["x-amz-content-sha256"]

    names = re.search(r"SignedHeaders=([^,]*)", headers["authorization"])
    assert names is not None
    signed = {name: headers[name] for name in names[1].split(";") if name not in {"host", "x-amz-date"}}
    request = AWSRequest(method, f"http://{headers['host']}{path}", headers=signed)
    now = datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    with mock.patch("botocore.auth.get_current_datetime", return_value=now):
        Received(Credentials(KEY_ID, SECRET), "s3", "us-east-1").add_auth(request)
    return str(request.headers["Authorization"])


def test_bucket_elsewhere_is_said_with_what_to_set(store: Store, proxy: Proxy, program: Program, here: Path) -> None:
    proxy.fault = lambda method, path, number: "301 PermanentRedirect"
    params = {"bucket": store.bucket, "key": "k", "to": f"{here}/k", "endpoint": proxy.endpoint}
    ended = program.run("download", params, store.env)
    assert (ended.code, ended.cause) == (1, "wrong_region")
    assert "region" in ended.error


def test_what_is_no_store_is_said(program: Program, here: Path, proxy: Proxy) -> None:
    proxy.fault = lambda method, path, number: "200 Html"
    params = {"bucket": "b-b", "prefix": "p", "to": f"{here}/k", "endpoint": proxy.endpoint}
    ended = program.run("download", params, {})
    assert ended.code == 1
    assert ended.cause in {"refused", "not_s3"}
