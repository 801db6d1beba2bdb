"""Files go from stores into volumes, into archives and back, whole or not at all, through the real parts."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from tests.e2e.conftest import Dev
from tests.e2e.pipelines import engine_address, pipeline, python, states_of, steps_of

FORMATS = ("7z", "zip", "tar", "tar.gz", "tar.xz", "tar.zst")
TOKEN = "token-of-the-web-server"
WORK = {"work": "/area:rw"}

TREE = """
    import hashlib
    def digest(top):
        total = hashlib.sha256()
        for folder, folders, files in os.walk(top):
            folders.sort()
            for name in sorted(files):
                path = os.path.join(folder, name)
                content = open(path, "rb").read()
                mode = bool(os.stat(path).st_mode & 0o100)
                total.update(repr((os.path.relpath(path, top), mode, hashlib.sha256(content).digest())).encode())
        return total.hexdigest()
"""
MAKE = (
    TREE
    + """
    os.makedirs("/area/tree/maps/deep")
    for name, content in (("server", os.urandom(3_000_000)), ("maps/dm 1.map", b"map" * 100_000),
                          ("maps/deep/größe.txt", b"x"), ("empty", b"")):
        with open(f"/area/tree/{name}", "wb") as file:
            file.write(content)
    os.chmod("/area/tree/server", 0o755)
    out(digest=digest("/area/tree"))
"""
)
COMPARE = TREE + "    out(digests={path: digest(path) for path in sys.argv[1:]})\n"
LIST = """
    found = [os.path.join(folder, name) for folder, folders, files in os.walk("/area") for name in folders + files]
    out(found=sorted(found))
"""


@dataclass
class Web:
    """A web server that wants a token, with what it offers and what it was given."""

    url: str
    offered: dict[str, bytes] = field(default_factory=dict)
    given: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture
def web() -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, content: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            content = made.offered.get(self.path)
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                self.answer(401)
            else:
                self.answer(404) if content is None else self.answer(200, content)

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] == f"Bearer {TOKEN}":
                made.given[self.path] = made.offered[self.path] = content
            self.answer(201 if self.path in made.given else 401)

        def log_message(self, *args: object) -> None:
            """Requests are not shown."""

    with ThreadingHTTPServer((engine_address(), 0), Handler) as server:
        made = Web(f"http://{server.server_address[0]!s}:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield made
        server.shutdown()


@dataclass
class Store:
    endpoint: str
    key: str
    secret: str
    client: Any
    bucket: str

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())


@pytest.fixture(params=["moto", *(["given"] if os.environ.get("OUTRIDER_TEST_S3_ENDPOINT") else [])])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """moto's server, and the endpoint of OUTRIDER_TEST_S3_ENDPOINT where that is set; with a bucket of one's own."""
    moto = None
    if request.param == "moto":
        moto = ThreadedMotoServer(ip_address=engine_address(), port=0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
        endpoint, key, secret = f"http://{host}:{port}", "AKIDOFTHETEST", "s3cret/of+the=end-to-end-test"
    else:
        endpoint = os.environ["OUTRIDER_TEST_S3_ENDPOINT"]
        key = os.environ["OUTRIDER_TEST_S3_ACCESS_KEY_ID"]
        secret = os.environ["OUTRIDER_TEST_S3_SECRET_ACCESS_KEY"]
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    bucket = f"outrider-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    yield Store(endpoint, key, secret, client, bucket)
    for item in client.list_objects_v2(Bucket=bucket).get("Contents", ()):
        client.delete_object(Bucket=bucket, Key=item["Key"])
    client.delete_bucket(Bucket=bucket)
    client.close()
    if moto is not None:
        moto.stop()


def step(name: str, uses: str, with_: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "uses": uses, "with": with_, "volumes": WORK} | more


def failure(run: dict[str, Any], name: str) -> str:
    found = steps_of(run)[name]
    assert (found["state"], found["attempt"]) == ("failed", 1), found
    return str(found["failure"]["message"])


def test_a_tree_goes_through_every_archive_format_and_over_http_and_comes_out_the_same(dev: Dev, web: Web) -> None:
    dev.ok("env", "set", "web", f"TOKEN={TOKEN}")
    token = {"HTTP_TOKEN": "web.TOKEN"}
    steps = [python("make", MAKE, volumes=WORK)]
    for each in FORMATS:
        name = each.replace(".", "-")
        pack = {"from": "/area/tree", "to": f"/area/packed.{each}"}
        steps.append(step(f"pack-{name}", "archive.create", pack, needs=["make"]))
        unpack = {"from": f"/area/packed.{each}", "to": f"/area/{name}"}
        steps.append(step(f"unpack-{name}", "archive.extract", unpack, needs=[f"pack-{name}"]))
    outs = [f"/area/{each.replace('.', '-')}" for each in FORMATS]
    digest = "${{ steps['pack-tar-zst'].outputs.sha256 }}"
    steps += [
        step(
            "send", "http.upload", {"url": f"{web.url}/packed", "from": "/area/packed.tar.zst", "sha256": digest},
            envs=token, needs=["pack-tar-zst"],
        ),
        step(
            "fetch", "http.download", {"url": f"{web.url}/packed", "to": "/area/fetched", "sha256": digest},
            envs=token, needs=["send"],
        ),
        step("open", "archive.extract", {"from": "/area/fetched", "to": "/area/opened"}, needs=["fetch"]),
        python(
            "compare", COMPARE, *outs, "/area/opened", volumes=WORK,
            needs=["open", *(f"unpack-{each.replace('.', '-')}" for each in FORMATS)],
        ),
    ]  # fmt: skip
    run = dev.run(pipeline(*steps, volumes={"work": {}}, envs=[{"set": "web"}]))
    assert set(states_of(run).values()) == {"succeeded"}, run["failure"]
    outputs = {name: each["outputs"] for name, each in steps_of(run).items()}
    assert outputs["compare"]["digests"] == dict.fromkeys([*outs, "/area/opened"], outputs["make"]["digest"])
    packed = web.given["/packed"]
    assert hashlib.sha256(packed).hexdigest() == outputs["pack-tar-zst"]["sha256"] == outputs["fetch"]["sha256"]
    assert outputs["fetch"]["bytes"] == outputs["send"]["bytes"] == len(packed) > 3_000_000
    assert outputs["send"]["status"] == 201
    assert {outputs[f"unpack-{each.replace('.', '-')}"]["format"] for each in FORMATS} == set(FORMATS)


def test_objects_and_folders_go_to_s3_and_back_and_a_wrong_checksum_publishes_nothing(dev: Dev, store: Store) -> None:
    secrets = f"ENDPOINT={store.endpoint}\nKEY={store.key}\nSECRET={store.secret}\n"
    dev.ok("env", "set", "e2e-s3", "--from-file", "-", stdin=secrets)
    envs = {"S3_ENDPOINT": "e2e-s3.ENDPOINT", "S3_ACCESS_KEY_ID": "e2e-s3.KEY", "S3_SECRET_ACCESS_KEY": "e2e-s3.SECRET"}
    one, many = {"bucket": store.bucket, "key": "builds/server"}, {"bucket": store.bucket, "prefix": "tree"}
    digest = "${{ steps['store-one'].outputs.sha256 }}"
    text = pipeline(
        python("make", MAKE, volumes=WORK),
        step("store-one", "s3.upload", one | {"from": "/area/tree/server"}, envs=envs, needs=["make"]),
        step("store-many", "s3.upload", many | {"from": "/area/tree"}, envs=envs, needs=["make"]),
        step(
            "fetch-one", "s3.download", one | {"to": "/area/one/", "sha256": digest},
            envs=envs, needs=["store-one"],
        ),
        # The URL has the endpoint and the account in it, which come from the set as well.
        step("share", "s3.presign", one, envs=envs, needs=["store-one"]),
        step(
            "fetch-many", "s3.download",
            many | {"to": "/area/many", "sha256": "${{ steps['store-many'].outputs.sha256 }}"},
            envs=envs, needs=["store-many"],
        ),
        python(
            "compare", TREE + "    os.chmod('/area/many/server', 0o755)\n    out(many=digest('/area/many'))\n",
            volumes=WORK, needs=["fetch-one", "fetch-many"],
        ),
        volumes={"work": {}},
        envs=[{"set": "e2e-s3"}],
    )  # fmt: skip
    run = dev.run(text)
    assert set(states_of(run).values()) == {"succeeded"}, run["failure"]
    outputs = {name: each["outputs"] for name, each in steps_of(run).items()}
    assert outputs["compare"]["many"] == outputs["make"]["digest"]
    server = store.get("builds/server")
    assert hashlib.sha256(server).hexdigest() == outputs["fetch-one"]["sha256"]
    assert outputs["fetch-one"]["path"] == "/area/one/server"
    assert outputs["fetch-many"]["objects"] == 4
    assert store.get("tree/server") == server
    with urllib.request.urlopen(outputs["share"]["url"], timeout=20) as answer:
        assert answer.read() == server
    assert store.get("tree/maps/deep/größe.txt") == b"x"

    wrong = {"sha256": "0" * 64}
    text = pipeline(
        step("one", "s3.download", one | wrong | {"to": "/area/a/one"}, envs=envs, needs=[], retry={"max": 3}),
        step("many", "s3.download", many | wrong | {"to": "/area/b"}, envs=envs, needs=[], retry={"max": 3}),
        step("none", "s3.download", one | {"key": "no/such", "to": "/area/c"}, envs=envs, needs=[], retry={"max": 3}),
        python("list", LIST, volumes=WORK, needs=["one", "many", "none"], when="always()"),
        volumes={"work": {}},
        envs=[{"set": "e2e-s3"}],
    )
    run = dev.run(text)
    for name in ("one", "many"):
        assert "sha256" in failure(run, name).lower().replace("-", "")
        assert "0" * 64 in failure(run, name)
    assert "no/such" in failure(run, "none")
    assert not any(path.startswith(("/area/a/", "/area/b/", "/area/c")) for path in found(run))


def found(run: dict[str, Any]) -> list[str]:
    return list(steps_of(run)["list"]["outputs"]["found"])


def test_what_is_hostile_damaged_or_not_what_was_asked_for_leaves_nothing_behind(dev: Dev, web: Web) -> None:
    web.offered |= {
        "/file": b"content",
        "/up.tar": tar_of(("good", b"x"), ("../escaped", b"x")),
        "/link.tar": tar_of(("out", "../.."), ("out/escaped", b"x")),
        "/absolute.zip": zip_of(("good", b"x"), ("/area/escaped", b"x")),
        "/cut.tar": tar_of(("big", b"x" * 100_000))[:50_000],
        "/cut.zip": zip_of(("big", os.urandom(100_000)))[:50_000],
        "/text.7z": b"this is no archive",
    }
    archives = [name for name in web.offered if name != "/file"]
    dev.ok("env", "set", "web", f"TOKEN={TOKEN}", "OLD=another-token")
    steps = [
        step(
            "mismatch", "http.download", {"url": f"{web.url}/file", "to": "/area/file", "sha256": "1" * 64},
            envs={"HTTP_TOKEN": "web.TOKEN"}, needs=[], retry={"max": 3},
        ),
        step(
            "unauthorised", "http.download", {"url": f"{web.url}/file", "to": "/area/file"},
            envs={"HTTP_TOKEN": "web.OLD"}, needs=[], retry={"max": 3},
        ),
        step(
            "missing", "http.download", {"url": f"{web.url}/none", "to": "/area/file"},
            envs={"HTTP_TOKEN": "web.TOKEN"}, needs=[], retry={"max": 3},
        ),
    ]  # fmt: skip
    for path in archives:
        name = path[1:].replace(".", "-")
        steps += [
            step(
                f"get-{name}", "http.download", {"url": web.url + path, "to": f"/in{path}"},
                volumes={"in": "/in:rw"}, envs={"HTTP_TOKEN": "web.TOKEN"}, needs=[],
            ),
            step(
                name, "archive.extract", {"from": f"/in{path}", "to": f"/area/{name}"},
                volumes={"in": "/in"} | WORK, needs=[f"get-{name}"],
            ),
        ]  # fmt: skip
    names = ["mismatch", "unauthorised", "missing", *(path[1:].replace(".", "-") for path in archives)]
    steps.append(python("list", LIST, volumes=WORK, needs=names, when="always()"))
    run = dev.run(pipeline(*steps, volumes={"work": {}, "in": {}}, envs=[{"set": "web"}]))
    assert run["state"] == "failed"
    assert "1" * 64 in failure(run, "mismatch")
    assert "401" in failure(run, "unauthorised")
    assert "404" in failure(run, "missing")
    assert "../escaped" in failure(run, "up-tar")
    assert "out" in failure(run, "link-tar")
    assert "/area/escaped" in failure(run, "absolute-zip")
    for name in ("cut-tar", "cut-zip", "text-7z"):
        assert f"/in/{name.replace('-', '.')}" in failure(run, name)
    assert found(run) == []


def tar_of(*members: tuple[str, bytes | str]) -> bytes:
    """A tar of files, and of links where the content is a text."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def zip_of(*members: tuple[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return packed.getvalue()
