"""s3.upload, as a process against a store."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Program, Proxy, Store

MIB = 1024**2
BIG = os.urandom(MIB) * 6  # two parts


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "saves"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("body", [b"", b"x", BIG], ids=["empty", "small", "parts"])
def test_file_becomes_an_object(store: Store, program: Program, source: Path, body: bytes) -> None:
    path = source / "world.7z"
    path.write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    params = {"bucket": store.bucket, "key": "backup/ü 1.7z", "from": str(path), "sha256": digest}
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    assert store.get("backup/ü 1.7z") == body
    etag = store.client.head_object(Bucket=store.bucket, Key="backup/ü 1.7z")["ETag"].strip('"')
    assert etag.endswith("-2") == (body == BIG), "it was to be sent in parts and was not, or the other way round"
    expected = {"path": str(path), "bytes": len(body), "sha256": digest, "objects": 1, "transferred": 1, "etag": etag}
    assert ended.outputs == expected
    assert store.unfinished() == []
    if body:
        assert (ended.progress[-1]["done"], ended.progress[-1]["total"]) == (len(body), len(body))


@pytest.mark.parametrize("body", [b"x", BIG], ids=["small", "parts"])
def test_wrong_checksum_makes_no_object(store: Store, program: Program, source: Path, body: bytes) -> None:
    (source / "f").write_bytes(body)
    params = {"bucket": store.bucket, "key": "k", "from": f"{source}/f", "sha256": "0" * 64}
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (1, "checksum_mismatch")
    assert store.listed() == []
    assert store.unfinished() == []


def test_directory_becomes_a_prefix_whose_checksum_sha256sum_can_tell(
    store: Store, program: Program, source: Path
) -> None:
    files = {"world/level.dat": b"level", "world/region/r.0.0": BIG[: 5 * MIB], "a b": b"", "ü": b"u", "Z": b"z"}
    for name, body in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(body)
    script = "find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"
    expected = subprocess.run(script, shell=True, cwd=source, capture_output=True, text=True, check=True).stdout[:64]
    params = {"bucket": store.bucket, "prefix": "backup/1", "from": str(source), "sha256": expected}
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    assert {key.removeprefix("backup/1/"): store.get(key) for key in store.listed()} == files
    assert ended.outputs["sha256"] == expected
    assert ended.outputs["objects"] == 5
    assert ended.outputs["bytes"] == sum(map(len, files.values()))
    wrong = program.run("upload", params | {"prefix": "backup/2", "sha256": "0" * 64}, store.env)
    assert (wrong.code, wrong.cause) == (1, "checksum_mismatch")
    assert not [key for key in store.listed() if key.startswith("backup/2")]


def test_links_and_special_files_are_refused_before_anything_is_sent(
    store: Store, program: Program, source: Path
) -> None:
    (source / "a").write_bytes(b"a")
    (source / "link").symlink_to("/etc/passwd")
    params = {"bucket": store.bucket, "prefix": "p", "from": str(source)}
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (1, "not_a_file")
    assert "link" in ended.error
    (source / "link").unlink()
    os.mkfifo(source / "pipe")
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (1, "not_a_file")
    ended = program.run("upload", {"bucket": store.bucket, "key": "p", "from": f"{source}/pipe"}, store.env)
    assert (ended.code, ended.cause) == (1, "not_a_file")
    assert store.listed() == []


def test_what_can_not_be_sent_is_said(store: Store, program: Program, source: Path) -> None:
    def run(**params: str) -> tuple[int, str, str]:
        ended = program.run("upload", {"bucket": store.bucket} | params, store.env)
        return ended.code, ended.cause, ended.error

    code, cause, error = run(key="k", **{"from": f"{source}/none"})
    assert (code, cause) == (1, "not_found")
    assert f"{source}/none" in error
    assert run(key="k", **{"from": str(source)})[:2] == (1, "is_a_directory")
    assert run(prefix="p", **{"from": str(source)})[:2] == (1, "nothing_to_send")
    (source / "f").write_bytes(b"f")
    assert run(prefix="p", **{"from": f"{source}/f"})[:2] == (1, "not_a_directory")
    assert run(key="k", bucket=f"{store.bucket}-not", **{"from": f"{source}/f"})[:2] == (1, "no_such_bucket")


def test_overloaded_store_is_asked_again(store: Store, proxy: Proxy, program: Program, source: Path) -> None:
    (source / "f").write_bytes(BIG)
    proxy.fault = lambda method, path, number: "503 SlowDown" if number == 1 else None
    params = {"bucket": store.bucket, "key": "k", "from": f"{source}/f", "endpoint": proxy.endpoint}
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    assert store.get("k") == BIG


def test_upload_that_failed_for_now_is_gone_on_with(store: Store, proxy: Proxy, program: Program, source: Path) -> None:
    (source / "f").write_bytes(BIG)
    proxy.fault = lambda method, path, number: "503 SlowDown" if "partNumber=2" in path else None
    params = {"bucket": store.bucket, "key": "k", "from": f"{source}/f", "endpoint": proxy.endpoint}
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (75, "store_unavailable")
    assert store.listed() == []
    assert store.unfinished() == ["k"]
    proxy.fault, proxy.requests[:] = lambda method, path, number: None, []
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    assert [path for method, path, _ in proxy.requests if method == "PUT" and "partNumber=1&" in path] == []
    assert store.get("k") == BIG
    assert ended.outputs["sha256"] == hashlib.sha256(BIG).hexdigest()
    assert store.unfinished() == []


def test_upload_that_is_refused_leaves_no_parts(store: Store, proxy: Proxy, program: Program, source: Path) -> None:
    (source / "f").write_bytes(BIG)
    proxy.fault = lambda method, path, number: "403 AccessDenied" if "partNumber=2" in path else None
    params = {"bucket": store.bucket, "key": "k", "from": f"{source}/f", "endpoint": proxy.endpoint}
    ended = program.run("upload", params, store.env)
    assert (ended.code, ended.cause) == (1, "denied")
    assert store.listed() == []
    assert store.unfinished() == []


def test_lost_answer_to_the_completion_counts_as_done(
    store: Store, proxy: Proxy, program: Program, source: Path
) -> None:
    (source / "f").write_bytes(BIG)
    proxy.fault = lambda method, path, number: (
        "cut" if method == "POST" and "uploadId=" in path and number == 1 else None
    )
    params = {"bucket": store.bucket, "key": "k", "from": f"{source}/f", "endpoint": proxy.endpoint}
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    assert store.get("k") == BIG


def test_cancelled_upload_ends_at_once_and_is_aborted(
    store: Store, proxy: Proxy, program: Program, source: Path, wait_for: Callable[[Callable[[], object]], None]
) -> None:
    (source / "f").write_bytes(BIG)
    proxy.fault = lambda method, path, number: "hang" if "partNumber=" in path else None
    params = {"bucket": store.bucket, "key": "k", "from": f"{source}/f", "endpoint": proxy.endpoint}
    process = program.start("upload", params, store.env)
    wait_for(lambda: proxy.count("PUT") >= 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    program.end(process)
    assert store.listed() == []
    assert store.unfinished() == []
