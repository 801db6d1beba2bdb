"""Nodes, objects, env sets, containers, events: what is sent, what is printed, what is never shown."""

from __future__ import annotations

import json
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from outrider.errors import Conflict, NotFound, Unavailable
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.unit.cli.conftest import Cli


def test_node_add_prints_the_token_alone_or_keeps_it_in_a_private_file(cli: Cli, tmp_path: Path) -> None:
    cli.script["AddNode"] = lambda request: pb.AddNodeResponse(node=types.Node(node_id=request.node_id), token="t0ken")
    done = cli("node", "add", "n1", "--label", "zone=eu", "--role", "game")
    assert done.stdout == "t0ken\n"
    assert "outrider agent run" in done.stderr
    request = cli.script.last(pb.AddNodeRequest)
    assert (request.node_id, dict(request.labels), request.role) == ("n1", {"zone": "eu"}, "game")
    assert json.loads(cli("node", "add", "n1", "-o", "json").stdout)["token"] == "t0ken"
    file = tmp_path / "n1.token"
    done = cli("node", "add", "n1", "--token-file", file, "-o", "json")
    assert "t0ken" not in done.stdout + done.stderr
    assert file.read_text() == "t0ken\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_token_file_that_is_there_is_kept_and_no_node_is_made(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "n1.token"
    file.write_text("precious")
    done = cli("node", "add", "n1", "--token-file", file)
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert file.read_text() == "precious"
    assert cli.script.count(pb.AddNodeRequest) == 0

    def refuse(_request: pb.AddNodeRequest) -> pb.AddNodeResponse:
        raise Conflict("there is a node n1 already")

    cli.script["AddNode"] = refuse
    fresh = tmp_path / "fresh.token"
    assert cli("node", "add", "n1", "--token-file", fresh).returncode == 1
    assert not fresh.exists()


def test_nodes_are_listed_and_shown(cli: Cli) -> None:
    brief = types.BriefState(engine_ok=False, engine_error="the socket is gone", memory_total_bytes=8 * 1024**3)
    kind = types.StepTypeInfo(name="s3.download", distribution="outrider-step-s3", version="0.1.0")
    broken = types.Plugin(name="bad", distribution="bad-steps", error="No module named 'x'; reinstall it")
    node = types.Node(
        node_id="n1", online=True, brief=brief, step_types=[kind], plugins=[broken], last_seen=Timestamp(seconds=5),
        facts_json=b'{"arch": "x86_64"}',
    )  # fmt: skip
    cli.script["ListNodes"] = lambda _request: pb.ListNodesResponse(nodes=[node, types.Node(node_id="n2")])
    cli.script["GetNode"] = lambda _request: node
    lines = cli("node", "list").stdout.splitlines()
    assert lines[1].split()[:2] == ["n1", "online"]
    assert lines[2].split()[:2] == ["n2", "offline"]
    shown = cli("node", "show", "n1").stdout
    for word in ("the socket is gone", "s3.download", "outrider-step-s3", "reinstall it", "x86_64"):
        assert word in shown
    assert json.loads(cli("node", "show", "n1", "-o", "json").stdout)["facts"] == {"arch": "x86_64"}
    listed = cli("plugin", "list", "--node", "n1")
    assert listed.returncode == 1
    assert "bad-steps" in listed.stdout
    assert "reinstall it" in listed.stderr


def test_object_set_takes_values_from_everywhere(cli: Cli, tmp_path: Path) -> None:
    cli.script["SetObject"] = lambda request: types.Object(ref=request.ref, version=4)
    (tmp_path / "a.json").write_text('{"a": 1, "b": 2}')
    done = cli(
        "object", "set", "game/arena", "version=0.7.5", "slots=16", 'text="16"', "--json", '{"b": 3}',
        "--from-file", tmp_path / "a.json", "--unset", "old", "--version", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    request = cli.script.last(pb.SetObjectRequest)
    assert json.loads(request.attributes_json) == {
        "a": 1, "b": 3, "version": "0.7.5", "slots": 16, "text": "16", "old": None,
    }  # fmt: skip
    assert request.expected_version == 3
    assert cli("object", "set", "game/arena", "--from-file", "-", stdin='{"z": 1}').returncode == 0
    request = cli.script.last(pb.SetObjectRequest)
    assert json.loads(request.attributes_json) == {"z": 1}
    assert not request.HasField("expected_version")
    for wrong in ("[1]", "{", "\xff".encode("latin-1")):
        assert cli("object", "set", "game/arena", "--from-file", "-", stdin=wrong).returncode == 4


def test_an_object_is_shown_with_who_wrote_its_status(cli: Cli) -> None:
    cli.script["GetObject"] = lambda request: types.Object(
        ref=request.ref,
        version=2,
        attributes_json=b'{"version": "0.7.5"}',
        status_json=b'{"port": 27960}',
        status=[types.StatusAttribute(name="port", value_json=b"27960", run_id="r1")],
    )
    shown = cli("object", "get", "game/arena").stdout
    assert [line.split() for line in shown.splitlines() if "port" in line] == [["port", "27960", "r1"]]
    answer = json.loads(cli("object", "get", "game/arena", "-o", "json").stdout)
    assert (answer["attributes"], answer["status"]) == ({"version": "0.7.5"}, {"port": 27960})


def test_secrets_come_by_stdin_and_are_never_shown(cli: Cli, tmp_path: Path) -> None:
    cli.script["SetEnvSet"] = lambda request: pb.EnvSet(name=request.name, names=sorted(request.values), version=1)
    done = cli("env", "set", "s3", "REGION=eu-1", "--from-file", "-", stdin="KEY='hunter2'\nexport SECRET=hunter3\n")
    assert done.returncode == 0, done.stderr
    request = cli.script.last(pb.SetEnvSetRequest)
    assert dict(request.values) == {"REGION": "eu-1", "KEY": "hunter2", "SECRET": "hunter3"}
    assert "hunter" not in done.stdout + done.stderr
    assert done.stderr == "env set s3 has version 1: KEY, REGION, SECRET\n"

    done = cli("env", "set", "s3", "KEY", "--unset", "OLD", stdin="hunter2\n")
    assert done.returncode == 0
    request = cli.script.last(pb.SetEnvSetRequest)
    assert (dict(request.values), list(request.remove)) == ({"KEY": "hunter2"}, ["OLD"])

    assert cli("env", "set", "s3", "A", "B", stdin="x").returncode == 2
    assert cli("env", "set", "s3").returncode == 2
    done = cli("env", "set", "s3", "--from-file", "-", stdin="hunter2")
    assert done.returncode == 4
    assert "line 1" in done.stderr
    assert "hunter2" not in done.stderr

    cli.script["ListEnvSets"] = lambda _request: pb.ListEnvSetsResponse(env_sets=[pb.EnvSet(name="s3", names=["KEY"])])
    assert cli("env", "list").stdout.splitlines()[1].split() == ["s3", "0", "KEY"]


def containers(request: pb.ListContainersRequest) -> pb.ListContainersResponse:
    if request.node_id == "n2":
        raise Unavailable("n2 is offline since 12:00")
    port = types.ContainerPort(name="game", container=27960, host=20001, protocol="udp")
    found = types.Container(name=f"arena-{request.node_id}", image="g:1", state="exited", exit_code=3, ports=[port])
    return pb.ListContainersResponse(containers=[found])


def test_containers_of_several_nodes_and_one_that_is_away(cli: Cli) -> None:
    cli.script["ListContainers"] = containers
    cli.script["ListNodes"] = lambda _request: pb.ListNodesResponse(
        nodes=[types.Node(node_id="n1", online=True), types.Node(node_id="n9")]
    )
    done = cli("container", "list")
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].split()[:6] == ["n1", "arena-n1", "exited", "(3)", "g:1", "game:20001→27960/udp"]
    assert len(done.stdout.splitlines()) == 2
    done = cli("container", "list", "n1", "n2", "-o", "json")
    assert done.returncode == 3
    assert [item["node_id"] for item in json.loads(done.stdout)] == ["n1"]
    assert "n2 is offline since 12:00" in done.stderr
    assert cli("container", "list", "n2").returncode == 1


def test_actions_on_containers(cli: Cli) -> None:
    def remove(request: pb.ContainerRequest) -> pb.RemoveContainerResponse:
        if request.name == "b":
            raise NotFound("n1 has no container b")
        return pb.RemoveContainerResponse()

    cli.script["RemoveContainer"] = remove
    cli.script["StopContainer"] = lambda request: types.Container(name=request.name, state="exited")
    assert cli("container", "rm", "n1", "a", "--force").returncode == 0
    request = cli.script.last(pb.ContainerRequest)
    assert (request.node_id, request.name, request.force) == ("n1", "a", True)
    assert cli("container", "rm", "n1", "b").returncode == 4
    done = cli("container", "rm", "n1", "a", "b", "-o", "json")
    assert done.returncode == 3
    assert [item["error"] and item["error"]["code"] for item in json.loads(done.stdout)] == [None, "not_found"]
    assert cli("container", "stop", "n1", "a", "--grace", "30s").returncode == 0
    assert cli.script.last(pb.ContainerRequest).grace.seconds == 30


@pytest.mark.parametrize(("arguments", "after"), [([], -1), (["-f"], 0), (["--after", "7"], 7)])
def test_events(cli: Cli, arguments: list[str], after: int) -> None:
    def stream(_request: pb.SubscribeEventsRequest) -> Iterator[types.Event]:
        yield types.Event(sequence=1, node_id="n1", type="run.finished", subject="r1", data_json=b'{"state": "failed"}')

    cli.script["SubscribeEvents"] = stream
    done = cli("events", *arguments, "--type", "run.", "--node", "n1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[2:] == ["n1", "run.finished", "r1", "state=failed"]
    request = cli.script.last(pb.SubscribeEventsRequest)
    assert (list(request.filter.types), request.filter.node_id, request.after) == (["run."], "n1", after)


def test_ctrl_c_leaves_what_is_followed_without_a_word(cli: Cli) -> None:
    def stream(_request: pb.SubscribeEventsRequest) -> Iterator[types.Event]:
        yield types.Event(sequence=1, node_id="n1", type="node.online")
        assert over.wait(20)

    over = threading.Event()
    cli.script["SubscribeEvents"] = stream
    process = cli.start("events", "-f")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "node.online" in line, process.communicate(timeout=20)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    over.set()
    assert time.monotonic() - started < 3
    assert process.returncode == 130
    assert errors.strip() == ""
