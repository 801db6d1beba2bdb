"""`outrider pipeline schema`: of the server's nodes where there is a server, else of this machine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from outrider.errors import NotFound
from outrider.v1 import control_service_pb2 as pb
from tests.unit.cli.conftest import Cli

PAGE = (Path(__file__).parents[3] / "docs" / "pipeline.md").read_text(encoding="utf-8")
EDITORS = PAGE.partition("## Editors\n")[2].partition("\n## ")[0]
ALONE = {"OUTRIDER_SERVER": "", "OUTRIDER_CA": "", "OUTRIDER_TOKEN": ""}


def test_the_server_is_asked_where_one_is_known(cli: Cli) -> None:
    cli.script["GetPipelineSchema"] = lambda _: pb.PipelineSchema(schema_json=b'{"title": "theirs"}', nodes=3)
    for arguments, node, role in (
        ((), "", ""),
        (("--node", "n7"), "n7", ""),
        (("--server", "--role", "game"), "", "game"),
    ):
        result = cli("pipeline", "schema", *arguments)
        assert (json.loads(result.stdout), result.stderr) == ({"title": "theirs"}, "")
        asked = cli.script.last(pb.GetPipelineSchemaRequest)
        assert (asked.node_id, asked.role) == (node, role)
    result = cli("pipeline", "schema", "--local")
    assert json.loads(result.stdout)["title"] == "Outrider pipeline"
    assert cli.script.count(pb.GetPipelineSchemaRequest) == 3


def test_a_file_is_replaced_whole_or_stays_as_it_is(cli: Cli) -> None:
    cli.script["GetPipelineSchema"] = lambda _: pb.PipelineSchema(schema_json=b'{"title": "theirs"}', nodes=0)
    file = cli.folder / "pipeline.schema.json"
    result = cli("pipeline", "schema", "--file", file)
    assert (result.returncode, result.stdout) == (0, "")
    assert f"# yaml-language-server: $schema={file}" in result.stderr
    assert "the server has no nodes yet" in result.stderr
    assert json.loads(file.read_text()) == {"title": "theirs"}

    def refuse(_: object) -> object:
        raise NotFound("there is no node 'n9'", hint="the nodes are n1")

    cli.script["GetPipelineSchema"] = refuse
    result = cli("pipeline", "schema", "--file", file, "--node", "n9")
    assert (result.returncode, result.stderr) == (4, "error: there is no node 'n9' (the nodes are n1)\n")
    assert json.loads(file.read_text()) == {"title": "theirs"}
    result = cli("pipeline", "schema", "--local", "--file", cli.folder / "none" / "x")
    assert (result.returncode, "x can't be written: No such file or directory" in result.stderr) == (1, True)


def test_without_a_server_it_is_of_this_machine_unless_one_was_meant(cli: Cli) -> None:
    result = cli("pipeline", "schema", **ALONE)
    assert "s3.download" in json.loads(result.stdout)["definitions"]
    assert result.stderr == "no server is known, so this is with the step plugins installed here\n"
    for arguments in (("--server",), ("--node", "n1")):
        result = cli("pipeline", "schema", *arguments, **ALONE)
        assert (result.returncode, "no server is known" in result.stderr) == (4, True)
    for arguments in (("--node", "a", "--role", "b"), ("--local", "--node", "a")):
        assert cli("pipeline", "schema", *arguments).returncode == 2


def test_the_commands_for_editors_write_the_file_that_a_pipeline_names(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.script["GetPipelineSchema"] = lambda _: pb.PipelineSchema(schema_json=b'{"title": "theirs"}', nodes=3)
    monkeypatch.chdir(cli.folder)
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^\$ outrider (.+)$", EDITORS, re.MULTILINE)]
    for command in commands:
        assert cli(*command).returncode == 0, command
    assert len({file.name for file in cli.folder.glob("*.schema.json")}) == len(commands)
    named = set(re.findall(r"^# yaml-language-server: \$schema=(.+)$", EDITORS, re.MULTILINE))
    named |= set(re.findall(r"`# yaml-language-server: \$schema=(.+)`", PAGE))
    assert named
    assert [name for name in sorted(named) if not (cli.folder / name).exists()] == []
    assert "**When to fetch it again.**" in EDITORS
