"""s3.download, as a process against a store."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Program, Proxy, Store

MIB = 1024**2
BIG = os.urandom(MIB) * 5  # three parts, the last one short


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "build"
    directory.mkdir()
    return directory


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def listing_sha256(files: dict[str, bytes]) -> str:
    lines = [f"{hashlib.sha256(body).hexdigest()}  {name}\n" for name, body in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("body", [b"", b"x", BIG], ids=["empty", "small", "parts"])
def test_object_arrives_with_outputs_and_progress(
    store: Store, proxy: Proxy, program: Program, target: Path, body: bytes
) -> None:
    digest = store.put("arena/1.7z", body)
    to = target / "deep" / "arena.7z"
    params = {"bucket": store.bucket, "key": "arena/1.7z", "to": str(to), "sha256": digest.upper()}
    params |= {"endpoint": proxy.endpoint}
    ended = program.run("download", params, store.env)
    assert ended.code == 0, ended.text
    assert to.read_bytes() == body
    etag = store.client.head_object(Bucket=store.bucket, Key="arena/1.7z")["ETag"].strip('"')
    expected = {"path": str(to), "bytes": len(body), "sha256": digest, "objects": 1, "transferred": 1, "etag": etag}
    assert ended.outputs == expected
    assert proxy.count("GET") == (3 if body == BIG else 1)
    if body:
        last = ended.progress[-1]
        assert (last["done"], last["total"], last["unit"]) == (len(body), len(body), "bytes")


def test_trailing_slash_keeps_the_objects_name(store: Store, program: Program, target: Path) -> None:
    store.put("a/ü b+c%20.txt", b"hello")
    ended = program.run("download", {"bucket": store.bucket, "key": "a/ü b+c%20.txt", "to": f"{target}/"}, store.env)
    assert ended.outputs["path"] == str(target / "ü b+c%20.txt")
    assert (target / "ü b+c%20.txt").read_bytes() == b"hello"


def test_wrong_checksum_publishes_nothing_and_keeps_what_was_there(
    store: Store, program: Program, target: Path
) -> None:
    digest = store.put("k", BIG)
    (target / "k").write_bytes(b"before")
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "sha256": "0" * 64}
    ended = program.run("download", params, store.env)
    assert (ended.code, ended.cause) == (1, "checksum_mismatch")
    assert digest in ended.error
    assert "0" * 64 in ended.error
    assert names(target) == ["k"]
    assert (target / "k").read_bytes() == b"before"
    assert ended.outputs == {}


def test_prefix_arrives_whole(store: Store, program: Program, target: Path) -> None:
    files = {"maps/dm1.map": b"one", "maps/deep/dm2.map": b"", "readme": BIG[: 3 * MIB]}
    for name, body in files.items():
        store.put(f"arena/1.0/{name}", body)
    store.put("arena/1.0-beta/readme", b"not below the folder")
    store.put("arena/1.0/maps/", b"")  # a console's empty folder
    (target / "kept").write_bytes(b"kept")
    params = {"bucket": store.bucket, "prefix": "arena/1.0", "to": str(target), "sha256": listing_sha256(files)}
    ended = program.run("download", params, store.env)
    assert ended.code == 0, ended.text
    assert {name: (target / name).read_bytes() for name in names(target)} == files | {"kept": b"kept"}
    assert ended.outputs == {
        "path": str(target),
        "bytes": sum(map(len, files.values())),
        "sha256": listing_sha256(files),
        "objects": 3,
        "transferred": 3,
    }


def test_prefix_with_wrong_checksum_publishes_nothing(store: Store, program: Program, target: Path) -> None:
    store.put("p/a", b"a")
    store.put("p/b/c", b"c")
    params = {"bucket": store.bucket, "prefix": "p/", "to": str(target), "sha256": "0" * 64}
    ended = program.run("download", params, store.env)
    assert (ended.code, ended.cause) == (1, "checksum_mismatch")
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("keys", [("p/a", "p/a/b"), ("p//b",)], ids=["file-and-folder", "empty-part"])
def test_unsafe_names_below_a_prefix_are_refused_before_anything_is_written(
    store: Store, program: Program, target: Path, keys: tuple[str, ...]
) -> None:
    store.put("p/fine", b"fine")
    for key in keys:
        store.put(key, b"x")
    ended = program.run("download", {"bucket": store.bucket, "prefix": "p", "to": str(target)}, store.env)
    assert (ended.code, ended.cause) == (1, "unsafe_name")
    assert keys[-1] in ended.error
    assert list(target.iterdir()) == []


def test_object_where_a_directory_is_moves_nothing(store: Store, program: Program, target: Path) -> None:
    store.put("p/a", b"a")
    store.put("p/z", b"z")
    (target / "z").mkdir()
    ended = program.run("download", {"bucket": store.bucket, "prefix": "p", "to": str(target)}, store.env)
    assert (ended.code, ended.cause) == (1, "is_a_directory")
    assert names(target) == []


def test_missing_things_are_named(store: Store, program: Program, target: Path) -> None:
    to = str(target / "x")
    ended = program.run("download", {"bucket": store.bucket, "key": "no/such", "to": to}, store.env)
    assert (ended.code, ended.cause) == (1, "no_such_key")
    assert "'no/such'" in ended.error
    assert store.bucket in ended.error
    assert store.endpoint in ended.error
    ended = program.run("download", {"bucket": f"{store.bucket}-not", "key": "k", "to": to}, store.env)
    assert (ended.code, ended.cause) == (1, "no_such_bucket")
    ended = program.run("download", {"bucket": store.bucket, "prefix": "none", "to": to}, store.env)
    assert (ended.code, ended.cause) == (1, "no_such_key")
    assert list(target.iterdir()) == []


def test_cut_connections_are_resumed_where_they_stopped(
    store: Store, proxy: Proxy, program: Program, target: Path
) -> None:
    digest = store.put("k", BIG)
    # Every range that is asked for is cut in half three times; only what is missing may be asked for again.
    proxy.fault = lambda method, path, number: "cut" if method == "GET" and number <= 6 else None
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "sha256": digest, "endpoint": proxy.endpoint}
    ended = program.run("download", params, store.env)
    assert ended.code == 0, ended.text
    assert (target / "k").read_bytes() == BIG
    asked = [request[2].removeprefix("bytes=").split("-") for request in proxy.requests if request[0] == "GET"]
    assert len(asked) == 9
    assert len({start for start, _ in asked}) == 9, "a range was asked for again from its beginning"


def test_silent_store_is_given_up_and_asked_again(store: Store, proxy: Proxy, program: Program, target: Path) -> None:
    store.put("k", BIG[:MIB])
    proxy.fault = lambda method, path, number: "stall" if number == 1 else None
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "endpoint": proxy.endpoint, "idle_timeout_s": 1}
    ended = program.run("download", params, store.env)
    assert ended.code == 0, ended.text
    assert (target / "k").read_bytes() == BIG[:MIB]


@pytest.mark.long
def test_object_replaced_meanwhile_is_never_mixed(store: Store, proxy: Proxy, program: Program, target: Path) -> None:
    store.put("k", BIG)

    def replace_after_the_first(method: str, path: str, number: int) -> str | None:
        if number == 1:
            return "cut"
        store.put("k", BIG[::-1])
        return None

    proxy.fault = replace_after_the_first
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "endpoint": proxy.endpoint}
    ended = program.run("download", params, store.env)
    assert (ended.code, ended.cause) == (75, "changed")
    assert names(target) == []


@pytest.mark.parametrize(
    ("fault", "code", "cause"),
    [
        ("403 SignatureDoesNotMatch", 1, "bad_credentials"),
        ("403 AccessDenied", 1, "denied"),
        ("403 RequestTimeTooSkewed", 1, "clock_skew"),
        ("400 ExpiredToken", 1, "expired_credentials"),
        ("501 NotImplemented", 1, "refused"),
        ("429 TooManyRequests", 75, "store_unavailable"),
        ("500 InternalError", 75, "store_unavailable"),
    ],
)
def test_what_the_store_says_is_classified(
    store: Store, proxy: Proxy, program: Program, target: Path, fault: str, code: int, cause: str
) -> None:
    proxy.fault = lambda method, path, number: fault
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "endpoint": proxy.endpoint}
    ended = program.run("download", params, store.env)
    assert (ended.code, ended.cause) == (code, cause)
    assert proxy.endpoint in ended.error
    assert "'k'" in ended.error
    assert store.bucket in ended.error


def test_store_that_is_overloaded_is_temporary(store: Store, proxy: Proxy, program: Program, target: Path) -> None:
    store.put("k", b"x")
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "endpoint": proxy.endpoint}
    proxy.fault = lambda method, path, number: "503 SlowDown" if number <= 2 else None
    assert program.run("download", params, store.env).code == 0
    proxy.fault = lambda method, path, number: "503 SlowDown" if method == "GET" else None
    (target / "k").unlink()
    ended = program.run("download", params, store.env)
    assert (ended.code, ended.cause) == (75, "store_unavailable")
    assert "SlowDown" in ended.error


def test_unreachable_store_is_temporary(program: Program, target: Path) -> None:
    params = {"bucket": "b-b", "key": "k", "to": f"{target}/k", "endpoint": "http://127.0.0.1:9"}
    ended = program.run("download", params, {})
    assert (ended.code, ended.cause) == (75, "unreachable")
    assert "http://127.0.0.1:9" in ended.error


def test_half_a_key_pair_and_a_bad_endpoint_are_said_without_their_values(program: Program, target: Path) -> None:
    params = {"bucket": "b-b", "key": "k", "to": f"{target}/k"}
    ended = program.run("download", params, {"S3_ACCESS_KEY_ID": "AKIDALONE"})
    assert (ended.code, ended.cause) == (1, "bad_credentials")
    assert "S3_SECRET_ACCESS_KEY" in ended.error
    ended = program.run("download", params, {"S3_ENDPOINT": "http://user:hunter2secret@127.0.0.1:9"})
    assert (ended.code, ended.cause) == (1, "bad_endpoint")
    assert "hunter2secret" not in ended.text + ended.error


def test_cancelled_download_ends_at_once_and_leaves_nothing(
    store: Store, proxy: Proxy, program: Program, target: Path, wait_for: Callable[[Callable[[], object]], None]
) -> None:
    store.put("k", BIG)
    proxy.fault = lambda method, path, number: "stall"
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "endpoint": proxy.endpoint}
    process = program.start("download", params, store.env)
    wait_for(lambda: len(proxy.requests) >= 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    program.end(process)
    assert list(target.iterdir()) == []


def test_what_a_killed_attempt_left_is_removed_by_the_next(
    store: Store, proxy: Proxy, program: Program, target: Path, wait_for: Callable[[Callable[[], object]], None]
) -> None:
    store.put("k", BIG)
    proxy.fault = lambda method, path, number: "stall"
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k"}
    process = program.start("download", params | {"endpoint": proxy.endpoint}, store.env)
    wait_for(lambda: any(target.iterdir()))
    process.kill()
    program.end(process)
    assert [path.name for path in target.iterdir()] != ["k"]
    assert program.run("download", params, store.env).code == 0
    assert [path.name for path in target.iterdir()] == ["k"]


def test_secrets_are_in_no_output_file_or_argument(
    store: Store, proxy: Proxy, program: Program, target: Path, tmp_path: Path
) -> None:
    store.put("k", b"x")
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "endpoint": proxy.endpoint}
    proxy.fault = lambda method, path, number: "503 SlowDown"
    secret = "topsecret/Value+0123456789"
    texts = []
    for endpoint in (proxy.endpoint, store.endpoint):
        env = store.env | {"S3_SECRET_ACCESS_KEY": secret, "S3_SESSION_TOKEN": "session-token-0123456789"}
        texts.append(program.run("download", params | {"endpoint": endpoint}, env).text)
    for contract in tmp_path.glob("outrider-*/*"):
        texts.append(contract.read_text())
    assert secret not in "".join(texts)
    assert "session-token-0123456789" not in "".join(texts)
