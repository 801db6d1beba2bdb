"""The plugin's image, inside the sandbox of a step. Needs the container engine and the built image."""

from __future__ import annotations

import hashlib
import os
import re

from .conftest import Container, Store

MIB = 1024**2


def env_for(store: Store, container: Container) -> dict[str, str]:
    """The store's envs as a container needs them: this machine's loopback is not the container's."""
    endpoint = re.sub(r"//(127\.0\.0\.1|localhost|\[::1\])", f"//{container.host}", store.endpoint)
    return store.env | {"S3_ENDPOINT": endpoint}


def test_download_and_upload_in_the_sandbox(store: Store, container: Container) -> None:
    # Larger than the memory that the container has, and two parts.
    body = os.urandom(MIB) * 90
    digest = hashlib.sha256(body).hexdigest()
    (container.volume / "k").write_bytes(body)
    env = env_for(store, container)
    params = {"bucket": store.bucket, "key": "deep/k", "sha256": digest}
    ended = container.run("upload", params | {"from": "/build/k"}, env, mount="ro")
    assert ended.code == 0, ended.text
    assert ended.outputs["etag"].endswith("-2")
    ended = container.run("download", params | {"to": "/build/new/k"}, env)
    assert ended.code == 0, ended.text
    assert (container.volume / "new/k").read_bytes() == body
    assert (ended.outputs["path"], ended.outputs["sha256"]) == ("/build/new/k", digest)


def test_prefix_to_the_root_of_a_volume(store: Store, container: Container) -> None:
    store.put("p/a", b"a")
    store.put("p/b/c", b"c")
    params = {"bucket": store.bucket, "prefix": "p", "to": "/build"}
    ended = container.run("download", params, env_for(store, container))
    assert ended.code == 0, ended.text
    assert sorted(path.name for path in container.volume.rglob("*")) == ["a", "b", "c"]


def test_read_only_volume_is_said(store: Store, container: Container) -> None:
    store.put("k", b"x")
    params = {"bucket": store.bucket, "key": "k", "to": "/build/k"}
    ended = container.run("download", params, env_for(store, container), mount="ro")
    assert (ended.code, ended.cause) == (1, "read_only")
    assert "/build" in ended.error


def test_full_volume_is_said(store: Store, container: Container) -> None:
    store.put("k", bytes(5 * MIB))
    params = {"bucket": store.bucket, "key": "k", "to": "/build/k"}
    ended = container.run("download", params, env_for(store, container), mount="tiny")
    assert (ended.code, ended.cause) == (1, "volume_full")
