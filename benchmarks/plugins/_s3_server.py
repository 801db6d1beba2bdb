"""A store for measuring against: nginx behind TLS moves the bytes, as fast as C can, and a few lines answer the rest.

Objects are files: GET and HEAD are nginx's own, PUT its WebDAV module's. What begins and ends a multipart upload, and
what lists, is answered here, without putting parts together: that is the store's work, and none of those compared.
Signatures are not looked at, nor checksums, which are said back as by a store that has compared them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit
from xml.sax.saxutils import escape

from benchmarks.plugins._rig import tool

_READY_S = 20.0
_CONFIGURATION = """
daemon off;
{user}
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    default_type application/octet-stream;
    keepalive_requests 1000000;
    client_max_body_size 0;
    client_body_buffer_size 1m;
    client_body_temp_path {folder}/tmp;
    proxy_temp_path {folder}/tmp-proxy;
    fastcgi_temp_path {folder}/tmp-fastcgi;
    uwsgi_temp_path {folder}/tmp-uwsgi;
    scgi_temp_path {folder}/tmp-scgi;
    map "$request_method?$args" $kind {{
        default control;
        "~^PUT\\?.*partNumber=(?<part>\\d+)" part;
        "~^PUT\\?" put;
        "~^(GET|HEAD)\\?(x-id=[A-Za-z]+)?$" get;
    }}
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {folder}/cert.pem;
        ssl_certificate_key {folder}/key.pem;
        location / {{ rewrite ^ /.$kind$uri last; }}
        location /.get/ {{ alias {data}/; }}
        location /.put/ {{
            alias {data}/;
            dav_methods PUT;
            create_full_put_path on;
            add_header ETag '"00"' always;
            add_header x-amz-checksum-crc64nvme $http_x_amz_checksum_crc64nvme always;
        }}
        location /.part/ {{ rewrite ^/.part(.*)$ /.put/.parts$1.$part last; }}
        location /.control/ {{
            rewrite ^/.control(.*)$ $1 break;
            proxy_pass http://127.0.0.1:{control};
        }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running store with one bucket, ``b``."""

    endpoint: str
    ca_file: Path
    objects: Path
    """The folder that is the bucket."""

    @property
    def env(self) -> dict[str, str]:
        """For the steps."""
        return {
            "S3_ENDPOINT": self.endpoint,
            "S3_ACCESS_KEY_ID": "AKIDBENCHMARK",
            "S3_SECRET_ACCESS_KEY": "not-looked-at",
            "S3_CA": self.ca_file.read_text(),
        }

    @property
    def aws_env(self) -> dict[str, str]:
        """For the tools of others."""
        return {
            "AWS_ACCESS_KEY_ID": "AKIDBENCHMARK",
            "AWS_SECRET_ACCESS_KEY": "not-looked-at",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CA_BUNDLE": str(self.ca_file),
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL": self.endpoint,
        }


class _Control(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    data: Path

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = escape(urlsplit(self.path).path.split("/", 2)[2])
        if "uploads" in parse_qs(urlsplit(self.path).query, keep_blank_values=True):
            self._say(f"<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>{key}</Key><UploadId>u1</UploadId>"
                      "</InitiateMultipartUploadResult>")  # fmt: skip
        else:
            self._say(f"<CompleteMultipartUploadResult><Bucket>b</Bucket><Key>{key}</Key><ETag>&quot;00&quot;</ETag>"
                      "</CompleteMultipartUploadResult>")  # fmt: skip

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" not in query:
            self._say("<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>")
            return
        prefix, start = query.get("prefix", [""])[0], int(query.get("continuation-token", ["0"])[0])
        found = sorted(path for path in (self.data / "b" / prefix).rglob("*") if path.is_file())
        page, quoted = found[start : start + 1000], "encoding-type" in query
        items = []
        for path in page:
            key = str(path.relative_to(self.data / "b"))
            info = path.stat()
            items.append(
                f"<Contents><Key>{quote(key) if quoted else escape(key)}</Key><Size>{info.st_size}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>&quot;{int(info.st_mtime):x}-{info.st_size:x}&quot;</ETag></Contents>"
            )
        more = start + 1000 < len(found)
        token = f"<NextContinuationToken>{start + 1000}</NextContinuationToken>" if more else ""
        encoding = "<EncodingType>url</EncodingType>" if quoted else ""
        self._say(f"<ListBucketResult><Name>b</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
                  f"{encoding}<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(items)}"
                  "</ListBucketResult>")  # fmt: skip

    def do_HEAD(self) -> None:
        self._say("")

    def do_DELETE(self) -> None:
        self._say("")

    def _say(self, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A store with its state in ``folder``, until the block ends."""
    nginx = tool("nginx", "apt-get install nginx-light")
    data = folder / "data"
    (data / "b").mkdir(parents=True)
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=benchmark", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem",
            "-out", folder / "cert.pem",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    handler = type("Control", (_Control,), {"data": data})
    control = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=control.serve_forever, daemon=True).start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = _CONFIGURATION.format(
        # The folder is ours alone, so its workers have to be us; only root has a choice to make.
        user="user root;" if os.geteuid() == 0 else "",
        folder=folder,
        data=data,
        port=port,
        control=control.server_port,
    )
    (folder / "nginx.conf").write_text(settings)
    process = subprocess.Popen([nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)])
    try:
        _wait(process, port, folder / "nginx.log")
        yield Server(f"https://127.0.0.1:{port}", folder / "cert.pem", data / "b")
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(60)
        control.shutdown()
        control.server_close()
        shutil.rmtree(data, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"error: nginx did not get ready:\n{log.read_text() if log.exists() else ''}")
