"""`outrider plugin new`, `resolve` and `schema`: they need neither server nor agent nor engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import yaml

from outrider.cli._main import run
from outrider.cli._scaffold import make, render
from outrider.errors import Conflict, InvalidInput
from outrider.pipeline import load_pipeline

GOOD = {"url": "https://files.example.org/maps.zip", "to": "/build/maps.zip"}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process."""

    def call(*arguments: object) -> Done:
        code = run([str(each) for each in arguments])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def params(tmp_path: Path) -> Path:
    file = tmp_path / "with.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    return file


def test_resolve_shows_the_plan_without_an_engine(cli: Cli, params: Path) -> None:
    done = cli("plugin", "resolve", "http.download", "--with", params, "-o", "json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["plan"]["image"].startswith("outrider/step-http:")
    assert told["volumes"] == {"build": "/build:rw"}
    assert told["inputs"]["url"] == GOOD["url"]
    assert yaml.safe_load(cli("plugin", "resolve", "http.download", "--with", params).out)["plan"] == told["plan"]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("to: relative\nurl: https://h/x", (), "with.to"),
        ("to: /build/x\nurl: https://h/x\ncolour: red", (), "colour"),
        ("to: /build/x\nurl: https://h/x", ("--volume", "b=/tmp:/build:ro"), "read-only"),
        ("to: /build/x\nurl: https://h/x", ("--volume", "b=/tmp:/elsewhere"), "below no volume"),
        ("to: '/build/${{ args.x }}'\nurl: https://h/x", (), "expression"),
        ("[1, 2]", (), "mapping of parameters"),
        ("to: /a\nto: /b", (), "to"),
        ("to: [", (), "line"),
    ],
)
def test_wrong_parameters_are_one_sentence(
    cli: Cli, tmp_path: Path, text: str, options: tuple[str, ...], words: str
) -> None:
    file = tmp_path / "with.yaml"
    file.write_text(text)
    done = cli("plugin", "resolve", "http.download", "--with", file, *options)
    assert (done.code, done.out) == (4, "")
    assert words in done.err
    assert "Traceback" not in done.err


def test_wrong_parameters_are_named_as_they_stand_in_the_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "with.yaml"
    file.write_text("to: /build/x\n\nurl: https://h/x\ncolour: red\nconnections: many")
    done = cli("plugin", "resolve", "http.download", "--with", file)
    assert done.code == 4
    assert done.err.startswith("error: a step http.download can't be made of this: with.colour: unknown parameter")
    assert "; with.connections: must be a whole number" in done.err
    # Of the pipeline that carries the step, which is not the author's, nothing is said.
    assert "steps[0]" not in done.err
    assert "line " not in done.err


def test_unknown_step_type_names_the_near_one(cli: Cli) -> None:
    done = cli("plugin", "resolve", "http.downlaod")
    assert done.code == 4
    assert "did you mean http.download" in done.err


@pytest.mark.parametrize("text", ["novalue", "=x", "name=", "a=/x"])
def test_volume_that_is_none_is_wrong_usage(cli: Cli, params: Path, text: str) -> None:
    done = cli("plugin", "resolve", "http.download", "--with", params, "--volume", text, "--volume", "a=/y")
    assert done.code == 2
    assert "--volume" in done.err


def test_schema_of_one_and_of_all(cli: Cli) -> None:
    schema = json.loads(cli("plugin", "schema", "http.download").out)
    jsonschema.validate(GOOD, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"url": "x"}, schema)
    outputs = json.loads(cli("plugin", "schema", "http.download", "--outputs").out)
    assert "sha256" in outputs["properties"]
    everything = json.loads(cli("plugin", "schema").out)
    assert everything["http.download"]["params"] == schema
    assert everything["http.download"]["distribution"] == "outrider-step-http"


@pytest.mark.parametrize("name", ["Foo", "foo-bar", "1x", "", "import", "x" * 50, "../x"])
def test_name_that_no_step_type_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        make(name, tmp_path / "x", "python")
    assert not (tmp_path / "x").exists()


def test_name_of_a_plugin_that_there_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="outrider-step-s3"):
        make("s3", tmp_path / "x", "python")


def test_nothing_that_is_there_is_overwritten(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("dear")
    with pytest.raises(Conflict):
        make("manifest", tmp_path, "python")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    done = cli("plugin", "new", "manifest", "--directory", tmp_path)
    assert (done.code, "not empty" in done.err) == (1, True)


@pytest.mark.parametrize("language", ["python", "sh"])
def test_project_is_whole_formatted_and_without_placeholders(cli: Cli, tmp_path: Path, language: str) -> None:
    folder = tmp_path / "made"
    done = cli("plugin", "new", "fleet_notes", "--directory", folder, "--language", language)
    assert done.code == 0, done.err
    told = [Path(line) for line in done.out.splitlines()]
    assert sorted(told) == sorted(path for path in folder.rglob("*") if path.is_file())
    assert not [path for path in told if re.search(r"@[A-Z]+@", path.read_text() + str(path))]
    for command in (["check"], ["format", "--check"]):
        ruff = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=folder, capture_output=True, text=True)
        assert ruff.returncode == 0, ruff.stdout
    load_pipeline((folder / "examples" / "pipeline.yaml").read_text())
    yaml.safe_load((folder / ".github" / "workflows" / "ci.yml").read_text())
    if language == "sh":
        subprocess.run(["sh", "-n", folder / "program" / "main.sh"], check=True)


def test_the_commands_of_ci_are_those_of_the_readme() -> None:
    made = render("x", "python")
    steps = yaml.safe_load(made[".github/workflows/ci.yml"])["jobs"]["test"]["steps"]
    plain = {'sudo "$(command -v python)" -m pytest': "pytest", '"$(command -v outrider)"': "outrider"}
    commands = [step["run"].replace(" --outrider-engine=require", "") for step in steps if "run" in step]
    for written, meant in plain.items():
        commands = [command.replace(written, meant) for command in commands]
    readme = re.findall(r"^\$ (.+?)(?: +# .+)?$", made["README.md"].partition("## Working on it")[2], re.MULTILINE)
    assert len(commands) > 5
    assert [command for command in readme if command in commands] == commands


def test_both_languages_take_and_give_the_same() -> None:
    python, sh = render("x", "python"), render("x", "sh")
    models = [text["outrider_step_x/__init__.py"].partition("def resolve_list")[0] for text in (python, sh)]
    assert models[0] == models[1]
    assert python["tests/test_conformance.py"] == sh["tests/test_conformance.py"]
