"""The main job on real input: a real game server deployed from S3 and HTTP, played, backed up and stopped.

Everything is real: the Teeworlds server from the distribution's packages, an S3 endpoint and an HTTP
server on this machine, and `outrider dev` with its own certificate authority. What a person would type is
printed before it is run. Nothing is left running.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import psutil
import py7zr
import zstandard
from moto.server import ThreadedMotoServer
from player import ask

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / ".build" / "demo"
OUTRIDER = Path(sys.executable).with_name("outrider")
GAME_IMAGE = "outrider/base:1"  # the game brings its own program; it needs nothing but a C++ library
S3_KEY, S3_SECRET = "demo-access-key", "demo-secret-key-that-never-shows"
NODE = "demo"  # a name of its own: an `outrider dev` that runs here already keeps its containers to itself
NETWORK = "outrider-demo"
VERSION = "0.7.5"
READY_TIMEOUT_S = 30


class Demo:
    """One demonstration, with the environment in which the `outrider` commands of it run."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.env = os.environ | {"OUTRIDER_CONTEXT": str(WORK / "context.yaml")}
        for name in ("OUTRIDER_SERVER", "OUTRIDER_CA", "OUTRIDER_TOKEN"):
            self.env.pop(name, None)

    def outrider(self, *args: str, stdin: str | None = None) -> None:
        """Run one command in sight; a failure ends the demonstration."""
        show("outrider", *args)
        done = subprocess.run(
            [OUTRIDER, *args], env=self.env, cwd=ROOT, input=stdin, text=stdin is not None, check=False
        )
        if done.returncode:
            raise SystemExit(f"error: 'outrider {args[0]}' ended with exit code {done.returncode}")

    def read(self, *args: str) -> Any:
        """The JSON that a command answers with."""
        out = subprocess.run(
            [OUTRIDER, *args, "-o", "json"], env=self.env, cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        return json.loads(out.stdout)


def main() -> None:
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    title("Packing a real game server")
    builds = pack_builds()
    with ExitStack() as stack:
        demo = Demo(engine_address())
        s3_endpoint = stack.enter_context(s3_server(demo.address, builds))
        maps_url = stack.enter_context(http_server(demo.address, builds["maps"].parent)) + "/" + builds["maps"].name
        print(f"S3 at {s3_endpoint}, HTTP at {maps_url}")

        title("Starting a server and an agent")
        stack.enter_context(outrider_dev(demo))
        demo.outrider("node", "list")

        title("Deploying the game server")
        attributes = {
            "version": VERSION,
            "server_sha256": sha256(builds["server"]),
            "maps_url": maps_url,
            "maps_sha256": sha256(builds["maps"]),
            "image": GAME_IMAGE,
            "title": "Outrider arena",
            "max_players": 12,
        }
        demo.outrider("object", "set", "game/arena-1", *(f"{name}={value}" for name, value in attributes.items()))
        secrets = f"ENDPOINT={s3_endpoint}\nKEY={S3_KEY}\nSECRET={S3_SECRET}\n"
        demo.outrider("env", "set", "builds-s3", "--from-file", "-", stdin=secrets)
        stack.callback(remove_game, demo)
        demo.outrider("run", "examples/arena/deploy.yaml", "--node", NODE, "--object", "game/arena-1")

        title("Playing on it")
        status = demo.read("object", "get", "game/arena-1")["status"]
        info = ask("127.0.0.1", int(status["game_port"]))
        print(
            f"the server on udp port {status['game_port']} answers: '{info.name}', Teeworlds {info.version}, "
            f"map {info.map}, {info.game_type}, {info.players}/{info.max_players} players, {info.ping_ms:.1f} ms"
        )
        demo.outrider("object", "get", "game/arena-1")
        demo.outrider("container", "list", NODE)

        title("Backing it up and stopping it")
        demo.outrider("run", "examples/arena/backup.yaml", "--node", NODE, "--object", "game/arena-1")
        show_backup(s3_endpoint)
        demo.outrider("run", "examples/arena/stop.yaml", "--node", NODE, "--object", "game/arena-1")
        demo.outrider("runs", "list")
        title("Cleaning up")
    print(f"done in {time.monotonic() - started:.0f} s; nothing is left running")


def title(text: str) -> None:
    print(f"\n── {text} " + "─" * max(0, 90 - len(text)), flush=True)


def show(*command: str) -> None:
    """The command as a person would type it; a long one over several lines."""
    words = [shlex.quote(word) for word in command]
    if sum(len(word) + 1 for word in words) > 120:
        head = next((n for n, word in enumerate(words) if "=" in word), len(words))
        words = [" ".join(words[:head]), *words[head:]]
        line = " \\\n    ".join(words)
    else:
        line = " ".join(words)
    print(f"\n\033[1m$ {line}\033[0m" if sys.stdout.isatty() else f"\n$ {line}", flush=True)


def pack_builds() -> dict[str, Path]:
    """The game server as a .7z and its maps as a .tar.zst, from the distribution's packages; kept for next time."""
    builds = WORK / "builds"
    server, maps = builds / f"server-{VERSION}.7z", builds / "maps.tar.zst"
    if server.exists() and maps.exists():
        print(f"already there: {server.name}, {maps.name}")
        return {"server": server, "maps": maps}
    debs, tree = WORK / "debs", WORK / "tree"
    for folder in (builds, debs, tree):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    run("apt-get", "update", "-qq")
    run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "teeworlds-server", "teeworlds-data", cwd=debs)
    for deb in sorted(debs.glob("*.deb")):
        run("dpkg-deb", "--extract", str(deb), str(tree))
    with py7zr.SevenZipFile(server, "w") as archive:
        archive.write(tree / "usr/games/teeworlds-server", "teeworlds-server")
    partial_maps = maps.with_suffix(".partial")
    with (
        partial_maps.open("wb") as raw,
        zstandard.ZstdCompressor(level=3).stream_writer(raw) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        # The package links one font to another package's; a link that leads out of an archive is refused at unpacking.
        tar.add(tree / "usr/share/games/teeworlds/data", "data", filter=lambda entry: None if entry.issym() else entry)
    partial_maps.rename(maps)
    for path in (server, maps):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    return {"server": server, "maps": maps}


def engine_address() -> str:
    """The address under which containers reach this machine: that of the engine's bridge."""
    template = '{{index .Options "com.docker.network.bridge.name"}}'
    found = subprocess.run(
        ["docker", "network", "inspect", "bridge", "--format", template], stdout=subprocess.PIPE, text=True, check=True
    )
    for address in psutil.net_if_addrs().get(found.stdout.strip(), []):
        if address.family is socket.AF_INET:
            return address.address
    raise SystemExit("error: the container engine has no bridge with an IPv4 address")


@contextmanager
def s3_server(address: str, builds: dict[str, Path]) -> Iterator[str]:
    """An S3 endpoint that has the build of the server in the bucket `builds`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # requests are not shown: the run's progress is
    server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        s3 = s3_client(endpoint)
        for bucket in ("builds", "backups"):
            s3.create_bucket(Bucket=bucket)
        s3.upload_file(str(builds["server"]), "builds", f"arena/{builds['server'].name}")
        yield endpoint
    finally:
        server.stop()


def s3_client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=S3_KEY,
        aws_secret_access_key=S3_SECRET,
        region_name="us-east-1",
    )


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Requests are not shown: the run's progress is."""


@contextmanager
def http_server(address: str, folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer((address, 0), partial(QuietHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{address}:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def outrider_dev(demo: Demo) -> Iterator[None]:
    """`outrider dev` with a state of its own, until the end of the demonstration."""
    state = WORK / "state"
    shutil.rmtree(state, ignore_errors=True)
    Path(demo.env["OUTRIDER_CONTEXT"]).unlink(missing_ok=True)
    state.mkdir(parents=True)
    command = [str(OUTRIDER), "dev", "--data-dir", str(state), "--listen", "127.0.0.1:0", "--node-id", NODE]
    # Steps don't reach this machine, nor private networks, unless the node's policy says so; its stores are here.
    policy = WORK / "policy.yaml"
    policy.write_text(f"networks: {{egress: {{network: {NETWORK}, allow: [private]}}}}\n")
    command += ["--policy-file", str(policy)]
    show("outrider", *command[1:])
    log = (WORK / "dev.log").open("w")
    process = subprocess.Popen(command, env=demo.env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_ready(process, demo)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def wait_until_ready(process: subprocess.Popen[bytes], demo: Demo) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        probe = subprocess.run(
            [OUTRIDER, "node", "list", "-o", "json"],
            env=demo.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if probe.returncode == 0 and any(node.get("online") for node in json.loads(probe.stdout)):
            return
        time.sleep(0.2)
    raise SystemExit(f"error: 'outrider dev' did not get ready:\n{(WORK / 'dev.log').read_text()}")


def remove_game(demo: Demo) -> None:
    """Also after a failure, or Ctrl-C: then a run may be under way, and there may be no game yet."""
    for run in demo.read("runs", "list", "--state", "queued", "--state", "dispatched", "--state", "running"):
        demo.outrider("runs", "cancel", run["run_id"], "--wait")
    if any(container["name"] == "arena-1" for container in demo.read("container", "list", NODE)):
        demo.outrider("container", "rm", NODE, "arena-1", "--force")


def show_backup(endpoint: str) -> None:
    for item in s3_client(endpoint).list_objects_v2(Bucket="backups").get("Contents", []):
        print(f"the backup is there: s3://backups/{item['Key']}, {item['Size'] / 1e6:.1f} MB")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stdout}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("error: interrupted") from None
