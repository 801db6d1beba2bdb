"""What a killed attempt has moved is not moved again, and only differences are."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Program, Proxy, Store
from .small_parts import FETCHED_BYTES

MIB = 1024**2
BIG = os.urandom(MIB) * 5  # three ranges of a download
LARGE = os.urandom(MIB) * 12  # three parts of an upload
Wait = Callable[[Callable[[], object]], None]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "build"
    directory.mkdir()
    return directory


def first_bytes(proxy: Proxy) -> set[int]:
    return {int(match[1]) for _, _, asked in proxy.requests if (match := re.match(r"bytes=(\d+)-", asked))}


def test_killed_download_goes_on_with_the_ranges_that_are_there(
    store: Store, proxy: Proxy, program: Program, target: Path, wait_for: Wait
) -> None:
    digest = store.put("k", BIG)
    # The last range never gets there; the others do.
    proxy.fault = lambda method, path, number: "stall" if method == "GET" and number == 3 else None
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "endpoint": proxy.endpoint, "connections": 1}
    process = program.start("download", params, store.env)
    wait_for(lambda: proxy.count("GET") == 3)
    process.kill()
    program.end(process)
    assert not (target / "k").exists()
    proxy.fault, proxy.requests[:] = lambda method, path, number: None, []
    ended = program.run("download", params | {"sha256": digest}, store.env)
    assert ended.code == 0, ended.text
    assert (target / "k").read_bytes() == BIG
    assert min(first_bytes(proxy)) >= 2 * FETCHED_BYTES, "what was there has been fetched again"
    assert [path.name for path in target.iterdir()] == ["k"]


def test_killed_download_of_an_object_replaced_since_starts_over(
    store: Store, proxy: Proxy, program: Program, target: Path, wait_for: Wait
) -> None:
    store.put("k", BIG)
    proxy.fault = lambda method, path, number: "stall" if method == "GET" and number == 3 else None
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "endpoint": proxy.endpoint, "connections": 1}
    process = program.start("download", params, store.env)
    wait_for(lambda: proxy.count("GET") == 3)
    process.kill()
    program.end(process)
    store.put("k", BIG[::-1])
    proxy.fault = lambda method, path, number: None
    assert program.run("download", params, store.env).code == 0
    assert (target / "k").read_bytes() == BIG[::-1]


def test_killed_download_of_a_prefix_keeps_the_objects_that_are_whole(
    store: Store, proxy: Proxy, program: Program, target: Path, wait_for: Wait
) -> None:
    for name in "abc":
        store.put(f"p/{name}", name.encode() * 1000)
    proxy.fault = lambda method, path, number: "stall" if path.endswith("/p/c") else None
    params = {"bucket": store.bucket, "prefix": "p", "to": f"{target}/p", "endpoint": proxy.endpoint, "connections": 1}
    process = program.start("download", params, store.env)
    wait_for(lambda: any(path.endswith("/p/c") for _, path, _ in proxy.requests))
    process.kill()
    program.end(process)
    assert not (target / "p").exists()
    proxy.fault, proxy.requests[:] = lambda method, path, number: None, []
    assert program.run("download", params, store.env).code == 0
    assert [path for _, path, _ in proxy.requests if "/p/" in path and "list-type" not in path] == [
        f"/{store.bucket}/p/c"
    ]
    assert {path.name: path.read_bytes() for path in (target / "p").iterdir()} == {
        name: name.encode() * 1000 for name in "abc"
    }
    assert [path.name for path in target.iterdir()] == ["p"]


# What Python runs before the program: a signal to itself before the rename of a number.
INTERRUPTING = """
import os, signal
made, real = 0, os.replace
def replace(*args, **more):
    global made
    made += 1
    if made == int(os.environ["NUMBER"]):
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    real(*args, **more)
os.replace = replace
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])  # the journal, and three objects
def test_prefix_interrupted_while_it_is_published_is_there_as_a_whole(
    store: Store, proxy: Proxy, program: Program, target: Path, tmp_path: Path, number: int, name: str
) -> None:
    old, new = {"a": b"old", "mine": b"kept"}, {"a": b"new", "b": b"new", "deep/c": b"new"}
    for key, body in new.items():
        store.put(f"p/{key}", body)
    for path, body in old.items():
        (target / "p").mkdir(exist_ok=True)
        (target / "p" / path).write_bytes(body)
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    params = {"bucket": store.bucket, "prefix": "p", "to": f"{target}/p", "endpoint": proxy.endpoint}
    more = {"PYTHONPATH": str(tmp_path), "NUMBER": str(number), "SIGNAL": name}
    code = program.end(program.start("download", params, store.env | more)).code
    if name == "SIGKILL":
        assert code == -9
        proxy.requests.clear()
        assert program.run("download", params, store.env).code == 0
        assert not [path for _, path, _ in proxy.requests if "/p/" in path], "what was there has been fetched again"
    else:
        assert code == 143
    files = {
        str(path.relative_to(target / "p")): path.read_bytes() for path in (target / "p").rglob("*") if path.is_file()
    }
    assert files == old | new
    assert [path.name for path in target.iterdir()] == ["p"]


def test_killed_upload_sends_only_the_parts_that_are_missing(
    store: Store, proxy: Proxy, program: Program, target: Path, wait_for: Wait
) -> None:
    (target / "f").write_bytes(LARGE)
    proxy.fault = lambda method, path, number: "hang" if "partNumber=3" in path else None
    params = {"bucket": store.bucket, "key": "k", "from": f"{target}/f", "endpoint": proxy.endpoint, "connections": 2}
    process = program.start("upload", params, store.env)
    wait_for(lambda: any("partNumber=3" in path for _, path, _ in proxy.requests))
    process.kill()
    program.end(process)
    proxy.fault, proxy.requests[:] = lambda method, path, number: None, []
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    sent = [re.findall(r"partNumber=(\d)", path) for method, path, _ in proxy.requests if method == "PUT"]
    assert ["3"] in sent
    assert ["1"] not in sent  # the second may have been on its way when the program was killed
    assert store.get("k") == LARGE
    assert ended.outputs["sha256"] == hashlib.sha256(LARGE).hexdigest()


def test_parts_of_another_file_are_not_taken_for_ours(
    store: Store, proxy: Proxy, program: Program, target: Path
) -> None:
    (target / "f").write_bytes(LARGE)
    params = {"bucket": store.bucket, "key": "k", "from": f"{target}/f", "endpoint": proxy.endpoint}
    proxy.fault = lambda method, path, number: "503 SlowDown" if "partNumber=2" in path else None
    assert program.run("upload", params, store.env).code == 75
    proxy.fault = lambda method, path, number: None
    other = LARGE[::-1]
    (target / "f").write_bytes(other)
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    assert store.get("k") == other


def test_upload_of_another_run_is_left_alone(
    store: Store, proxy: Proxy, program: Program, target: Path, wait_for: Wait
) -> None:
    (target / "f").write_bytes(LARGE)
    held = threading.Event()

    def hold(method: str, path: str, number: int) -> None:
        if "partNumber=3" in path:
            held.wait(30)

    proxy.fault = hold
    params = {"bucket": store.bucket, "key": "k", "from": f"{target}/f", "endpoint": proxy.endpoint, "connections": 1}
    first = program.start("upload", params, store.env)
    contract = program.runs
    wait_for(lambda: any("partNumber=3" in path for _, path, _ in proxy.requests))
    direct, program.run_id = params | {"endpoint": store.endpoint}, "rother"
    ended = program.run("upload", direct, store.env)
    assert ended.code == 0, ended.text
    assert store.unfinished() == ["k"]  # the other's
    ended = program.run("upload", direct | {"sha256": "0" * 64}, store.env)
    assert ended.cause == "checksum_mismatch"
    assert store.unfinished() == ["k"]
    held.set()
    program.runs = contract
    ended = program.end(first)
    assert ended.code == 0, ended.text
    assert store.get("k") == LARGE
    assert store.unfinished() == []


def test_upload_begun_with_other_wishes_is_not_gone_on_with(
    store: Store, proxy: Proxy, program: Program, target: Path
) -> None:
    (target / "f").write_bytes(LARGE)
    params = {"bucket": store.bucket, "key": "k", "from": f"{target}/f", "endpoint": proxy.endpoint}
    proxy.fault = lambda method, path, number: "503 SlowDown" if "partNumber=2" in path else None
    assert program.run("upload", params, store.env).code == 75
    assert store.unfinished() == ["k"]
    proxy.fault = lambda method, path, number: None
    params |= {"encryption": "aws:kms", "kms_key_id": "key-1", "tags": {"a": "b"}}
    ended = program.run("upload", params, store.env)
    assert ended.code == 0, ended.text
    found = store.client.head_object(Bucket=store.bucket, Key="k")
    assert (found["ServerSideEncryption"], found["SSEKMSKeyId"][-5:]) == ("aws:kms", "key-1")
    assert store.client.get_object_tagging(Bucket=store.bucket, Key="k")["TagSet"] == [{"Key": "a", "Value": "b"}]


def test_only_differences_are_downloaded(store: Store, proxy: Proxy, program: Program, target: Path) -> None:
    for name in ("a", "b", "deep/c", "d"):
        store.put(f"p/{name}", name.encode() * 1000)
    params = {"bucket": store.bucket, "prefix": "p", "to": str(target), "endpoint": proxy.endpoint}
    assert program.run("download", params, store.env).outputs["transferred"] == 4
    store.put("p/b", b"new")
    (target / "deep" / "c").write_bytes(b"X" * 6000)  # of the same size, by somebody else
    (target / "d").unlink()
    proxy.requests.clear()
    ended = program.run("download", params, store.env)
    assert (ended.outputs["objects"], ended.outputs["transferred"]) == (4, 3)
    assert not [path for method, path, _ in proxy.requests if path.endswith("/p/a")]
    assert (target / "deep" / "c").read_bytes() == b"deep/c" * 1000
    assert (target / "b").read_bytes() == b"new"
    # A copy has no mark of ours; its content speaks for it.
    (target / "a").rename(target / "moved")
    shutil.copy(target / "moved", target / "a")
    assert program.run("download", params, store.env).outputs["transferred"] == 0
    again = program.run("download", params | {"only_differences": False}, store.env)
    assert again.outputs["transferred"] == 4


def test_object_that_is_there_already_is_not_fetched_again(
    store: Store, proxy: Proxy, program: Program, target: Path
) -> None:
    digest = store.put("k", BIG)
    params = {"bucket": store.bucket, "key": "k", "to": f"{target}/k", "endpoint": proxy.endpoint, "sha256": digest}
    assert program.run("download", params, store.env).outputs["transferred"] == 1
    proxy.requests.clear()
    ended = program.run("download", params, store.env)
    assert (ended.outputs["transferred"], ended.outputs["sha256"]) == (0, digest)
    assert [request[0] for request in proxy.requests] == ["HEAD"]
    with (target / "k").open("r+b") as file:
        file.write(b"!")
    assert program.run("download", params, store.env).outputs["transferred"] == 1
    assert (target / "k").read_bytes() == BIG


def test_only_differences_are_uploaded(store: Store, proxy: Proxy, program: Program, target: Path) -> None:
    for name in ("a", "b", "deep/c"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(name.encode() * 1000)
    (target / "large").write_bytes(LARGE[: 6 * MIB])
    params = {"bucket": store.bucket, "prefix": "p", "from": str(target), "endpoint": proxy.endpoint}
    assert program.run("upload", params, store.env).outputs["transferred"] == 4
    (target / "b").write_bytes(b"B" * 1000)
    proxy.requests.clear()
    ended = program.run("upload", params, store.env)
    assert (ended.outputs["objects"], ended.outputs["transferred"]) == (4, 1)
    assert [path for method, path, _ in proxy.requests if method == "PUT"] == [f"/{store.bucket}/p/b"]
    assert store.get("p/b") == b"B" * 1000
    program.run_id = "rother"  # whose parts would be of another size
    assert program.run("upload", params, store.env).outputs["transferred"] == 0
