"""What bad input gets: one clear sentence, the exit code as designed, nothing started, nothing half-written."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Dev

FAILED, USAGE, INVALID = 1, 2, 4

HELLO = """
name: hello
steps:
  - {name: greet, uses: container.run, with: {image: "outrider/base:1", args: ["true"]}}
"""


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command said why in a sentence that has all these words, and no traceback."""
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "error" in done.stderr or code == INVALID
    for word in words:
        assert word in done.stderr + done.stdout, f"{word!r} is not in:\n{done.stderr}\n{done.stdout}"


@pytest.fixture(autouse=True)
def nothing_was_started(dev: Dev, request: pytest.FixtureRequest) -> Iterator[None]:
    """A refused pipeline leaves no run behind."""
    before = {run["run_id"] for run in dev.json("runs", "list")}
    yield
    after = {run["run_id"] for run in dev.json("runs", "list")}
    if "starts_a_run" not in request.keywords:
        assert after == before


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("not a pipeline", "- just\n- a list\n", ("mapping",)),
        ("not YAML", "name: [unclosed\nsteps: {", ("not valid YAML",)),
        ("unknown key", HELLO + "stepz: []\n", ("stepz", "steps")),
        ("duplicate key", HELLO + "name: again\n", ("name", "twice")),
        ("alias bomb", "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
        ), ("alias",)),
        ("10,000 levels", "name: x\nsteps: " + "[" * 10_000 + "]" * 10_000, ("deep",)),
        ("unknown step type", HELLO.replace("container.run", "s3.downlod"), ("s3.downlod", "s3.download")),
        (
            "wrong parameters, all of them",
            "name: x\nvolumes: {b: {}}\nsteps:\n  - name: get\n    uses: s3.download\n    volumes: {b: '/b:rw'}\n"
            "    with: {bukket: builds, to: /b/x, sha256: 7}\n",
            ("bukket", "bucket", "sha256"),
        ),
        (
            "writes to a read-only volume",
            "name: x\nvolumes: {b: {}}\nsteps:\n  - name: get\n    uses: s3.download\n    volumes: {b: /b}\n"
            "    with: {bucket: builds, key: k, to: /b/x}\n",
            ("read-only", "/b:rw"),
        ),
        (
            "a volume that it was not given",
            "name: x\nvolumes: {b: {}}\nsteps:\n  - name: get\n    uses: s3.download\n"
            "    with: {bucket: builds, key: k, to: /b/x}\n",
            ("/b/x", "volume"),
        ),
        (
            "a volume that does not exist",
            HELLO.rstrip().replace("}}", "}, volumes: {nope: /n}}") + "\n",
            ("nope",),
        ),
    ],
)  # fmt: skip
def test_a_wrong_pipeline_is_refused_with_and_without_a_server(
    dev: Dev, name: str, text: str, words: tuple[str, ...]
) -> None:
    file = dev.pipeline(text, "wrong.yaml")
    refused(dev.outrider("pipeline", "validate", file), INVALID, *words)
    refused(dev.outrider("run", file, "--node", "dev"), INVALID, *words)


def test_an_unknown_step_type_names_the_plugin_that_has_it(dev: Dev) -> None:
    text = HELLO.replace("container.run", "steam.install")
    refused(dev.outrider("run", dev.pipeline(text), "--node", "dev"), INVALID, "steam.install", "dev")


def test_a_missing_file(dev: Dev) -> None:
    for command in (["pipeline", "validate"], ["run", "--node", "dev"]):
        refused(dev.outrider(*command, dev.folder / "missing.yaml"), INVALID, "missing.yaml")


def test_a_file_of_100_megabytes_is_refused_unread(dev: Dev) -> None:
    file = dev.folder / "huge.yaml"
    with file.open("wb") as huge:
        huge.truncate(100_000_000)
    refused(dev.outrider("pipeline", "validate", file), INVALID, "1 MiB")
    refused(dev.outrider("run", file, "--node", "dev"), INVALID, "1 MiB")


def test_an_env_set_that_does_not_exist(dev: Dev) -> None:
    text = HELLO + "envs: [{set: nothing-here}]\n"
    refused(dev.outrider("run", dev.pipeline(text), "--node", "dev"), INVALID, "nothing-here", "env set")


def test_an_object_that_does_not_exist(dev: Dev) -> None:
    refused(dev.outrider("run", dev.pipeline(HELLO), "--node", "dev", "--object", "game/none"), INVALID, "game/none")
    refused(dev.outrider("object", "get", "game/none"), INVALID, "game/none")


def test_an_unknown_node_and_one_that_is_offline(dev: Dev) -> None:
    refused(dev.outrider("run", dev.pipeline(HELLO), "--node", "n99"), INVALID, "n99")
    dev.ok("node", "add", "never-there")
    done = dev.outrider("run", dev.pipeline(HELLO), "--node", "never-there")
    refused(done, FAILED, "never-there", "never connected")
    dev.ok("node", "rm", "never-there")


def test_wrong_token_wrong_authority_wrong_port(dev: Dev, tmp_path: Path) -> None:
    refused(dev.outrider("node", "list", OUTRIDER_TOKEN="not-the-token"), FAILED, "token")
    other = tmp_path / "other.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=other",
        "-days",
        "2",
    ]
    subprocess.run([*command, "-keyout", tmp_path / "key.pem", "-out", other], check=True, capture_output=True)
    refused(dev.outrider("node", "list", OUTRIDER_CA=str(other)), FAILED, "certificate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(dev.outrider("node", "list", OUTRIDER_SERVER=f"127.0.0.1:{port}"), FAILED, str(port))


def test_a_port_that_is_taken(dev: Dev, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = dev.outrider(
            "dev", "--data-dir", tmp_path / "state", "--listen", f"127.0.0.1:{port}",
            OUTRIDER_CONTEXT=str(tmp_path / "context.yaml"),
        )  # fmt: skip
    refused(done, FAILED, str(port))
    assert not (tmp_path / "context.yaml").exists()


@pytest.mark.starts_a_run
def test_an_image_that_does_not_exist(dev: Dev) -> None:
    done = dev.outrider(
        "run", dev.pipeline(HELLO.replace("outrider/base:1", "outrider/no-such-image:9")), "--node", "dev"
    )
    refused(done, FAILED, "outrider/no-such-image:9")
