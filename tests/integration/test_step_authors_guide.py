"""docs/step-authors.md: what it shows is what `outrider plugin new` makes, and its commands say what stands there."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from outrider.cli._scaffold import make, render
from outrider.pipeline import load_pipeline
from outrider.testing import Example, Failing, StepConformance

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "step-authors.md").read_text()
BLOCKS = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))
CONSOLE = re.findall(r"^```console ?(\w*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
SNIPPETS = re.findall(r"^```(?:python|sh)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)

needs_base = pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "image", "inspect", "outrider/base:1"], capture_output=True).returncode != 0
    or os.geteuid() != 0,
    reason="the image outrider/base:1 is not built (make images), or this is not root",
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project that the guide makes, and beside it what makes it an installed distribution."""
    folder, _ = make("manifest", tmp_path / "outrider-step-manifest", "python")
    metadata = tmp_path / "installed" / "outrider_step_manifest-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outrider-step-manifest\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[outrider.steps]\nmanifest = outrider_step_manifest\n")
    return folder


def environ(project: Path) -> dict[str, str]:
    """The environment of a shell in which the plugin is installed."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (project, project.parent / "installed", ROOT / "stepkit"))),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def test_files_of_the_guide_are_those_that_are_made() -> None:
    made = render("manifest", "python")
    assert len(BLOCKS) > 5
    for name, text in BLOCKS.items():
        if name != "program.sh":
            assert text == made[name], f"{name} of the guide is not what `outrider plugin new manifest` makes"
    load_pipeline(BLOCKS["examples/pipeline.yaml"])
    tree = re.search(r"^outrider-step-manifest/\n((?:    .*\n)+)", GUIDE, re.MULTILINE)
    assert tree is not None
    named = {line.split()[0].rstrip(",") for line in tree[1].splitlines()} - {"image/requirements.in"}
    assert named - {"examples/"} <= made.keys()


def test_only_what_needs_an_index_is_not_run() -> None:
    """What is marked "install" or "engine" is run in tests/e2e/test_plugin_project.py."""
    assert {mark for mark, _ in CONSOLE} == {"install", "run", "engine", ""}
    assert [block for mark, block in CONSOLE if not mark] == ["$ outrider images lock manifest\n"]
    # Those about managed containers, which tests/unit/node/test_control_docs.py runs, and the one below.
    assert [bool(re.search("control|CONTROL", text)) for text in SNIPPETS] == [True, True, False]


def test_commands_of_the_guide_say_what_stands_there(project: Path, tmp_path: Path) -> None:
    blocks = [block.replace("/tmp/", f"{tmp_path}/") for mark, block in CONSOLE if mark == "run"]
    assert len(blocks) == 2
    for block in blocks:
        for command, expected in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            done = subprocess.run(
                command, shell=True, cwd=project, env=environ(project), capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert re.fullmatch(re.escape(expected).replace("…", ".+"), done.stdout), done.stdout


FETCH = """
import contextlib
import types

import pytest
from outrider.testing import Example, StepConformance
from outrider_step_manifest import *


@contextlib.contextmanager
def file_server():
    yield types.SimpleNamespace(url="http://10.0.0.7:8000/x")
"""
FETCH_TYPE = """
from outrider.steps import StepPlan, StepType, WritePath, hookimpl
from pydantic import BaseModel


class FetchParams(BaseModel, extra="forbid"):
    url: str
    to: WritePath


@hookimpl
def outrider_step_types():
    plan = StepPlan(image="outrider/step-manifest:0.1.0", args=("fetch",), network="egress")
    return [StepType(name="manifest.fetch", params=FetchParams, resolve=lambda params, context: plan, idempotent=True)]
"""


def test_class_whose_parameters_come_from_a_fixture_is_one(project: Path) -> None:
    (project / "outrider_step_manifest" / "__init__.py").write_text(FETCH_TYPE)
    (project / "tests" / "test_conformance.py").write_text(FETCH + SNIPPETS[-1])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:asyncio", "--outrider-engine=off"],
        cwd=project,
        env=environ(project),
        capture_output=True,
        text=True,
    )
    failed, passed = (
        set(re.findall(rf"^{word} .*::(\w+)", done.stdout, re.MULTILINE)) for word in ("FAILED", "PASSED")
    )
    assert failed == {"test_kit_has_what_it_needs"}, done.stdout  # what the page has shown before is left out
    assert {"test_example_is_accepted", "test_resolve_is_pure", "test_plan_holds_no_secret"} <= passed


def test_every_check_and_attribute_of_the_kit_is_explained() -> None:
    checks = {name for name in vars(StepConformance) if name.startswith("test_")}
    body = ast.parse(textwrap.dedent(inspect.getsource(StepConformance))).body[0]
    assert isinstance(body, ast.ClassDef)
    attributes = {
        each.target.id for each in body.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    testing = GUIDE.partition("## Testing it")[2]
    rows = set(re.findall(r"^\| `(\w+)` \| .", testing, re.MULTILINE))
    assert checks | attributes - {"is_step_conformance"} == rows
    fields = {*Example.__dataclass_fields__, *Failing.__dataclass_fields__} - {"name"}
    assert {field for field in fields if f"`{field}`" not in testing} == set()


@needs_base
@pytest.mark.parametrize(
    ("name", "file", "words"), [("arena", "outputs", '"hello arena"'), ("", "progress", "name is empty")]
)
def test_smallest_program_in_shell_keeps_the_contract(tmp_path: Path, name: str, file: str, words: str) -> None:
    log = sandboxed(tmp_path, {"name": name}, ["outrider/base:1", "sh", "-c", BLOCKS["program.sh"]])
    text = (tmp_path / "outrider" / file).read_text()
    assert words in text, log
    json.loads(text)


def sandboxed(tmp_path: Path, inputs: dict[str, Any], command: list[str]) -> str:
    """Run an image with the contract's files and without rights; gives the log."""
    directory = tmp_path / "outrider"
    directory.mkdir()
    (directory / "inputs.json").write_text(json.dumps(inputs))
    os.chown(directory, 200001, 200001)
    options = ["--rm", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none"]
    options += ["--user", "200001:200001", "-v", f"{directory}:/outrider", "--env", "OUTRIDER_CONTRACT=1"]
    ended = subprocess.run(["docker", "run", *options, *command], capture_output=True, text=True)
    return ended.stdout + ended.stderr
