"""The context file: who it is for, which server is meant, and where a token may go."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from outrider.cli._context import ContextFile, find_target, locate
from outrider.errors import InvalidInput


@pytest.fixture
def file(tmp_path: Path) -> ContextFile:
    ca = tmp_path / "ca.pem"
    ca.touch()
    contexts = ContextFile(tmp_path / "config" / "outrider" / "context.yaml")
    contexts.put("dev", {"server": "a:1", "ca": str(ca), "token": "ta", "node": "dev"}, make_current=False)
    contexts.put("public", {"server": "b:2", "token": "tb"}, make_current=False)
    return contexts


@pytest.fixture
def environ(tmp_path: Path, file: ContextFile) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_it_is_its_owners_alone_and_the_first_context_is_current(file: ContextFile) -> None:
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    again = ContextFile(file.path)
    assert again.current == "dev"
    assert set(again.contexts) == {"dev", "public"}
    assert [path.name for path in file.path.parent.iterdir()] == ["context.yaml"]


def test_which_server_is_meant(environ: dict[str, str], tmp_path: Path) -> None:
    assert find_target(environ, None).server == "a:1"
    assert find_target(environ, None).node == "dev"
    assert find_target(environ, "public").server == "b:2"
    assert find_target(environ, "public").source == f"context 'public' in {tmp_path}/config/outrider/context.yaml"
    other = ContextFile(tmp_path / "other.yaml")
    other.put("x", {"server": "[::1]:3", "token": "tx"}, make_current=True)
    target = find_target(environ, str(tmp_path / "other.yaml"))
    assert (target.host, target.port, target.server) == ("::1", 3, "[::1]:3")


def test_the_environment_wins_field_by_field(environ: dict[str, str], tmp_path: Path) -> None:
    target = find_target(environ | {"OUTRIDER_TOKEN": "te", "OUTRIDER_NODE": "n9"}, None)
    assert (target.server, target.token, target.token_source, target.node) == ("a:1", "te", "OUTRIDER_TOKEN", "n9")
    # The context's own CA is what makes sure that no one else gets its token.
    target = find_target(environ | {"OUTRIDER_SERVER": "c:3"}, None)
    assert (target.server, target.token, target.ca) == ("c:3", "ta", tmp_path / "ca.pem")


def test_a_token_does_not_go_to_just_any_server(environ: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match="OUTRIDER_TOKEN"):
        find_target(environ | {"OUTRIDER_SERVER": "evil.example"}, "public")


def test_a_name_or_a_file(environ: dict[str, str]) -> None:
    assert locate(environ, "dev")[1] == "dev"
    assert locate(environ, "./dev") == (Path("dev"), None)
    assert locate(environ, "dev.yaml") == (Path("dev.yaml"), None)
    assert locate({"HOME": "/home/a"}, None) == (Path("/home/a/.config/outrider/context.yaml"), None)


@pytest.mark.parametrize(
    "text", ["[", "a: 1", "contexts: [1]", "contexts: {a: 1}", "\x00", "- x", "contexts: {a: {}, a: {}}"]
)
def test_a_file_that_is_none_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "context.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=r"context\.yaml"):
        ContextFile(file)


@pytest.mark.parametrize(
    ("entry", "word"),
    [({"token": "t"}, "server"), ({"server": "a:1"}, "token"), ({"server": "a:1", "token": "t\nx"}, "token")],
)
def test_a_context_that_lacks_something(tmp_path: Path, entry: dict[str, str], word: str) -> None:
    ContextFile(tmp_path / "c.yaml").put("x", entry, make_current=True)
    with pytest.raises(InvalidInput, match=word):
        find_target({}, str(tmp_path / "c.yaml"))
