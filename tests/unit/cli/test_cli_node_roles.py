"""`outrider node role`, and how a node's stand to its role is shown."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from outrider.cli._main import run
from outrider.roles import read_lock
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.unit.cli.conftest import Cli
from tests.wheels import write_wheel

HASH = "--hash=sha256:" + "ab" * 32
LOCK = f"outrider==0.1.0 {HASH}\nx==1.5 {HASH}\n"
Here = Callable[..., tuple[int, str, str]]
NEEDS_UV = pytest.mark.skipif(
    shutil.which("uv") is None and not Path(sys.executable).with_name("uv").exists(), reason="locks are made with uv"
)


@pytest.fixture
def here(cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The command in this process: its exit code, output and errors."""
    for name in os.environ:
        if name.startswith("OUTRIDER_"):
            monkeypatch.delenv(name)
    for name, value in cli.env.items():
        monkeypatch.setenv(name, value)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(each) for each in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def write_role(folder: Path, lock: str | None = LOCK) -> Path:
    file = folder / "game.yaml"
    file.write_text("name: game\ndescription: Games.\nagent: '>=0.1'\nplugins: {x: '>=1,<2'}\n")
    if lock is not None:
        file.with_suffix(".lock").write_text(lock)
    return file


def test_a_role_is_set_with_the_lock_beside_its_file(cli: Cli, here: Here, tmp_path: Path) -> None:
    cli.script["SetNodeRole"] = lambda request: types.NodeRole(name=request.role.name, version=3, nodes=["n1", "n2"])
    code, _, told = here("node", "role", "set", write_role(tmp_path), "--version", "2")
    assert code == 0
    assert told == "node role game has version 3; on each of its 2 nodes: outrider agent plugins sync\n"
    request = cli.script.last(pb.SetNodeRoleRequest)
    assert request.expected_version == 2
    assert request.role.lock.decode() == LOCK
    assert [(each.distribution, each.versions) for each in request.role.plugins] == [("x", ">=1,<2")]


@pytest.mark.parametrize(
    ("lock", "said"),
    [
        (None, "outrider node role lock"),
        (LOCK.replace("1.5", "2.0"), "the lock has x 2.0, and the role wants >=1,<2"),
        (LOCK + "--index-url https://evil.example\n", "line 3 of the lock"),
    ],
)
def test_without_a_lock_that_fits_nothing_is_set(
    cli: Cli, here: Here, tmp_path: Path, lock: str | None, said: str
) -> None:
    code, _, told = here("node", "role", "set", write_role(tmp_path, lock))
    assert code == 4
    assert said in told
    assert cli.script.count(pb.SetNodeRoleRequest) == 0


def test_roles_are_listed_shown_assigned_and_removed(cli: Cli, here: Here) -> None:
    plugin = types.RolePlugin(distribution="x", versions=">=1,<2")
    found = types.NodeRole(name="game", version=2, plugins=[plugin], lock=LOCK.encode(), nodes=["n1"])
    found.updated_at.CopyFrom(Timestamp(seconds=5))
    cli.script["ListNodeRoles"] = lambda _request: pb.ListNodeRolesResponse(roles=[found])
    cli.script["GetNodeRole"] = lambda _request: found
    assert "game  2" in here("node", "role", "list")[1]
    shown = here("node", "role", "show", "game")[1]
    assert "2 packages" in shown
    assert "x             >=1,<2  1.5" in shown
    assert here("node", "role", "show", "game", "--lock")[1] == LOCK
    state = types.RoleState(role="game", drift=True, problem="x is missing")
    cli.script["AssignNodeRole"] = lambda request: types.Node(
        node_id=request.node_id, role=request.role, version=4, role_state=state
    )
    assert here("node", "role", "assign", "n1", "game", "--version", "3")[2] == (
        "node n1 has the role game (version 4)\nx is missing\n"
    )
    request = cli.script.last(pb.AssignNodeRoleRequest)
    assert (request.node_id, request.role, request.expected_version) == ("n1", "game", 3)
    cli.script["RemoveNodeRole"] = lambda _request: pb.RemoveNodeRoleResponse()
    assert here("node", "role", "rm", "game")[0] == 0


def test_a_node_shows_how_it_stands_to_its_role(cli: Cli, here: Here) -> None:
    plugins = [
        types.PluginState(distribution="x", wanted=">=1,<2", locked="1.5", actual="1.4", drift="lock", named=True),
        types.PluginState(distribution="y", actual="7", drift="extra"),
        types.PluginState(distribution="z", locked="1", drift="missing", named=True),
    ]
    node = types.Node(
        node_id="n1",
        role="game",
        version=4,
        role_state=types.RoleState(role="game", role_version=2, drift=True, problem="z is missing", plugins=plugins),
        environment=types.Environment(name="game-2-ab", refused="game-3-cd", refused_reason="its agent ended"),
    )
    cli.script["GetNode"] = lambda _request: node
    cli.script["ListNodes"] = lambda _request: pb.ListNodesResponse(nodes=[node])
    shown = here("node", "show", "n1")[1]
    assert "game: z is missing" in shown
    assert "game-2-ab; game-3-cd was left again: its agent ended" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line[:2] in ("x ", "y ", "z ")}
    assert rows == {
        "x": [">=1,<2", "1.5", "1.4", "not", "the", "locked", "version"],
        "y": ["not", "by", "the", "role", "7", "extra"],
        "z": ["any", "1", "missing", "missing"],
    }
    assert "game (drift)" in here("node", "list")[1]
    node.role = node.role_state.role = ""
    shown = here("node", "show", "n1")[1]
    assert ["y", "7", "extra"] in [line.split() for line in shown.splitlines()]
    assert json.loads(here("node", "show", "n1", "-o", "json")[1])["role_state"]["plugins"][2]["drift"] == "missing"


@NEEDS_UV
def test_a_lock_is_made_from_the_role_with_all_that_it_needs(cli: Cli, here: Here, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "outrider", "0.1.0", {}, requires=["dep>=2"], extras=["agent", "cli"])
    for name, version in (("x", "1.5"), ("x", "2.0"), ("dep", "2.1")):
        write_wheel(wheels, name, version, {})
    file = write_role(tmp_path, lock=None)
    code, _, told = here("node", "role", "lock", file, "--find-links", wheels, "--no-index")
    assert code == 0, told
    text = file.with_suffix(".lock").read_text()
    assert read_lock(text) == {"dep": ("2.1",), "outrider": ("0.1.0",), "x": ("1.5",)}
    assert str(tmp_path) not in text
    write_wheel(wheels, "x", "1.6", {})
    here("node", "role", "lock", file, "--find-links", wheels, "--no-index")
    assert read_lock(file.with_suffix(".lock").read_text())["x"] == ("1.5",)  # what is locked stays
    here("node", "role", "lock", file, "--find-links", wheels, "--no-index", "--upgrade")
    assert read_lock(file.with_suffix(".lock").read_text())["x"] == ("1.6",)
    file.write_text("name: game\nplugins: {nowhere: '>1'}\n")
    code, _, told = here("node", "role", "lock", file, "--find-links", wheels, "--no-index")
    assert code == 4
    assert "nowhere" in told
