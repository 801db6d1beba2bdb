"""A registry on loopback that has what a test puts into it: as much of the OCI distribution API as a pull needs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Registry:
    """``address`` is its part of a reference. ``refusals``: how many requests it answers with 503 from now on."""

    address: str
    manifests: dict[tuple[str, str], bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refusals: int = 0
    gate: Event = field(default_factory=Event)  # set: blobs are sent whole; until then, only their first half

    def put(self, name: str, tag: str, content: bytes) -> tuple[str, str]:
        """An image with one file of this content; its digest, and the id that an engine gives it."""
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as archive:
            entry = tarfile.TarInfo("content")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        packed = gzip.compress(layer.getvalue(), compresslevel=0, mtime=0)
        config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Cmd": ["/content"]},
                "rootfs": {"type": "layers", "diff_ids": [digest_of(layer.getvalue())]},
                "history": [{"created": "2026-01-01T00:00:00Z"}],
            }
        ).encode()

        def described(media: str, data: bytes) -> dict[str, object]:
            self.blobs[digest_of(data)] = data
            return {"mediaType": media, "size": len(data), "digest": digest_of(data)}

        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": described("application/vnd.docker.container.image.v1+json", config),
                "layers": [described("application/vnd.docker.image.rootfs.diff.tar.gzip", packed)],
            }
        ).encode()
        for reference in (tag, digest_of(manifest)):
            self.manifests[name, reference] = manifest
        return digest_of(manifest), digest_of(config)


@contextmanager
def serving() -> Iterator[Registry]:
    """Engines take every address of 127.0.0.0/8 for one that needs no TLS."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            registry.asked.append(f"{self.command} {self.path}")
            parts = self.path.strip("/").split("/")
            if registry.refusals:
                registry.refusals -= 1
                self._answer(503, b"{}", "application/json")
            elif parts == ["v2"]:
                self._answer(200, b"{}", "application/json")
            elif parts[-2] == "manifests" and (found := registry.manifests.get(("/".join(parts[1:-2]), parts[-1]))):
                self._answer(200, found, MANIFEST)
            elif parts[-2] == "blobs" and parts[-1] in registry.blobs:
                self._answer(200, registry.blobs[parts[-1]], "application/octet-stream")
            else:
                errors = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
                self._answer(404, json.dumps(errors).encode(), "application/json")

        def _answer(self, status: int, body: bytes, media: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
            if media == MANIFEST:
                self.send_header("Docker-Content-Digest", digest_of(body))
            self.end_headers()
            if self.command == "HEAD":
                return
            half = len(body) // 2 if len(body) > 2**20 else len(body)
            self.wfile.write(body[:half])
            if half < len(body):
                self.wfile.flush()
                registry.gate.wait(30)
                self.wfile.write(body[half:])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    registry = Registry(f"127.0.0.1:{server.server_address[1]}")
    registry.gate.set()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield registry
    finally:
        registry.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
