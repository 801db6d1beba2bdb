"""http.download and http.upload against curl, over loopback, from and to nginx."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.plugins._rig import (
    GIB,
    MIB,
    ROUNDS,
    Row,
    Usage,
    compare,
    random_file,
    run,
    run_step,
    scratch,
    settle,
    tool,
    version_of,
)

_SLOW = 32 * MIB  # bytes a second of one connection, where the server is slow
_ALLOWED = {"OUTRIDER_NETWORK_ALLOW": "127.0.0.0/8"}

CONFIG = """
worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; daemon off; {user}
events {{}}
http {{
    access_log off; sendfile on; client_max_body_size 0; client_body_temp_path {folder}/bodies;
    ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.key;
    server {{
        listen 127.0.0.1:{port}; listen 127.0.0.1:{secure_port} ssl; root {folder}/www; server_name localhost;
        location /there/ {{ dav_methods PUT; }}
        location /slow/ {{ alias {folder}/www/; limit_rate {slow}; }}
    }}
}}
"""


def versions() -> list[str]:
    return [version_of(["curl", "--version"]).split(" (")[0], version_of(["nginx", "-v"]).rpartition(": ")[2]]


def measure() -> Iterator[Row]:
    with scratch(4 * GIB) as folder, _nginx(folder) as (plain, secure):
        data = random_file(folder / "www" / "data", GIB)
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
        part = random_file(folder / "www" / "part", 256 * MIB)
        of_part = hashlib.sha256(part.read_bytes()).hexdigest()
        target, theirs = folder / "ours", folder / "theirs"
        ca = (folder / "server.pem").read_text()

        def fetch(url: str, **params: object) -> Usage:
            return run_step("http", "download", {"url": url, "to": str(target), **params}, _ALLOWED | {"HTTP_CA": ca})

        def curl(*more: str) -> Usage:
            return run([curl_path, "--silent", "--fail", "--cacert", str(folder / "server.pem"), *more])

        def checked(path: str = "/data", digest: str = digest) -> Usage:
            script = f'"$1" --silent --fail -o "$2" {plain}{path} && echo "{digest}  $2" | sha256sum --check --status'
            return run(["sh", "-c", script, "sh", curl_path, str(theirs)])

        def forget() -> None:
            for path in (target, theirs):
                path.unlink(missing_ok=True)
            settle()

        def forget_sent() -> None:
            for name in ("ours", "theirs"):
                (folder / "www" / "there" / name).unlink(missing_ok=True)
            settle()

        curl_path = tool("curl", "apt-get install curl")
        into = ("-o", str(theirs))
        rows = (
            (
                "http.download, 1 GiB",
                "curl",
                lambda: fetch(f"{plain}/data", digests=[]),
                lambda: curl(*into, f"{plain}/data"),
            ),
            (
                "http.download, 1 GiB, SHA-256 checked",
                "curl, then sha256sum",
                lambda: fetch(f"{plain}/data", sha256=digest),
                checked,
            ),
            (
                "http.download, 1 GiB over TLS",
                "curl",
                lambda: fetch(f"{secure}/data", digests=[]),
                lambda: curl(*into, f"{secure}/data"),
            ),
            (
                "http.download, 256 MiB, SHA-256 checked, 32 MiB/s a connection",
                "curl, then sha256sum",
                lambda: fetch(f"{plain}/slow/part", sha256=of_part),
                lambda: checked("/slow/part", of_part),
            ),
        )
        for name, against, ours, other in rows:
            rounds = 3 if "a connection" in name else ROUNDS
            yield Row(name, against, compare(ours, other, before=forget, rounds=rounds), at_least=1.0)
        yield Row(
            "http.upload, 1 GiB, with its SHA-256",
            "curl --upload-file",
            compare(
                lambda: run_step("http", "upload", {"url": f"{plain}/there/ours", "from": str(data)}, _ALLOWED),
                lambda: curl("--upload-file", str(data), f"{plain}/there/theirs"),
                before=forget_sent,
            ),
        )


@contextmanager
def _nginx(folder: Path) -> Iterator[tuple[str, str]]:
    """A server of ``folder``/www; its addresses, without TLS and with."""
    nginx = tool("nginx", "apt-get install nginx-light")
    (folder / "www" / "there").mkdir(parents=True)
    (folder / "bodies").mkdir()
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(folder / "server.key"), "-out", str(folder / "server.pem")]
    subprocess.run(command, check=True, capture_output=True)
    port, secure_port = _free_ports()
    user = "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, port=port, secure_port=secure_port, slow=_SLOW, user=user))
    process = subprocess.Popen([nginx, "-c", config, "-p", folder], stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}", f"https://127.0.0.1:{secure_port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


def _wait_for(port: int) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > until:
                raise SystemExit("error: nginx did not start") from None
            time.sleep(0.05)
        else:
            return
