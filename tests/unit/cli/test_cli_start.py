"""The command line starts fast, because it imports what it needs when it needs it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from outrider.cli._main import root
from outrider.cli._tree import COMMANDS
from tests.unit.cli.conftest import OUTRIDER, Cli

HEAVY = ["grpc", "google.protobuf", "rich", "pydantic", "yaml", "docker", "sqlalchemy", "stevedore", "uvloop", "cel"]
TIMES_OF_BARE_PYTHON = 10


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_version_and_help_import_not_even_click() -> None:
    for argument in ("version", "--version", "--help"):
        loaded = modules_after(f"import outrider.cli; sys.argv = ['outrider', {argument!r}]; outrider.cli.main()")
        assert not loaded & {"click", "importlib.metadata", *HEAVY}, argument


def test_all_commands_together_import_nothing_heavy() -> None:
    """So that the help and the completion of any of them stay fast, too."""
    names = [f"outrider.cli.{name}" for name in COMMANDS]
    loaded = modules_after(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert not loaded & set(HEAVY)


def seconds(*command: str) -> float:
    best = 9.0
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        best = min(best, time.perf_counter() - started)
    return best


def test_version_and_help_start_in_a_few_times_the_start_of_python() -> None:
    bare = seconds(sys.executable, "-c", "pass")
    for argument in ("version", "--help"):
        assert seconds(str(OUTRIDER), argument) < TIMES_OF_BARE_PYTHON * bare, argument


def test_the_tree_names_the_commands_that_there_are() -> None:
    context = click.Context(root)
    for name in COMMANDS:
        command = root.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert importlib.import_module(f"outrider.cli.{name}").command is command
        assert command.help, name


def every_command(command: click.Command, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    context = click.Context(command)
    found = []
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        found += every_command(child, (*path, name))
    return found


# These print a file for a machine, or serve until they are stopped: there is no result to print in two ways.
WITHOUT_OUTPUT = {
    ("completion",),
    ("dev",),
    ("server", "run"),
    ("agent", "run"),
    ("pipeline", "schema"),
    ("plugin", "schema"),
}


@pytest.mark.parametrize(
    ("path", "command"), every_command(root, ()), ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_has_help_and_json(path: tuple[str, ...], command: click.Command) -> None:
    assert command.help, path
    options = {option for parameter in command.params for option in parameter.opts}
    assert ("-o" in options) is (path not in WITHOUT_OUTPUT)


def test_both_ways_to_the_version_say_the_same(cli: Cli) -> None:
    assert cli("version").stdout == cli("--version").stdout == cli("--debug", "--version").stdout
    answer = json.loads(cli("version", "-o", "json").stdout)
    assert cli("version").stdout == f"outrider {answer['version']}\n"


def test_both_ways_to_the_help_say_the_same(cli: Cli) -> None:
    assert cli().stdout == cli("--help").stdout == cli("--debug", "--help").stdout


def test_completion_completes(cli: Cli) -> None:
    assert "_OUTRIDER_COMPLETE=bash_complete" in cli("completion", "bash").stdout
    done = cli(_OUTRIDER_COMPLETE="bash_complete", COMP_WORDS="outrider runs ca", COMP_CWORD="2")
    assert done.stdout == "plain,cancel\n"


def test_a_group_alone_shows_its_help_as_it_is(cli: Cli) -> None:
    done = cli("node")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: outrider node [OPTIONS] COMMAND [ARGS]...\n\n")
    assert "\n  drain " in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_names_what_a_group_has(name: str) -> None:
    group = root.get_command(click.Context(root), name)
    if isinstance(group, click.Group) and (said := COMMANDS[name].partition(": ")[2]):
        told = set(re.findall(r"[a-z]+", said))
        assert set(group.list_commands(click.Context(group))) <= told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], ["nope", "outrider --help"]),
        (["runs", "nope"], ["nope", "outrider runs --help"]),
        (["node", "add"], ["NODE", "outrider node add --help"]),
        (["runs", "cancel", "r1", "--grace", "soon"], ["'soon'", "10m"]),
        (["object", "get", "arena"], ["'arena'", "KIND/NAME"]),
        (["env", "set", "s", "=hunter2"], ["KEY=VALUE"]),
    ],
)
def test_wrong_usage_is_a_sentence_and_exit_code_2(cli: Cli, arguments: list[str], words: list[str]) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "hunter2" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("path", [path for path, _ in every_command(root, ())], ids="-".join)
def test_every_command_stands_in_the_documentation(path: tuple[str, ...]) -> None:
    text = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith(f"| `{path[0]}")]
    assert rows, path
    assert len(path) == 1 or any(re.search(rf"[ `]{path[1]}[ `]", row) for row in rows), path


@pytest.mark.parametrize(
    ("missing", "arguments", "words"),
    [
        ("click", ["node", "list"], "error: the command line is not installed (pip install 'outrider[cli]')"),
        ("stevedore", ["plugin", "list"], "error: this command needs the package 'stevedore'"),
    ],
)
def test_a_light_installation_says_what_to_install(missing: str, arguments: list[str], words: str) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['outrider', *{arguments!r}]"
    script = f"{hide}\nfrom outrider.cli import main\nsys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == 1
