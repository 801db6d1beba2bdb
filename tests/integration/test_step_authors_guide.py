"""docs/step-authors.md: the plugin that it builds is built, and does what it says."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from outrider.pipeline import load_pipeline
from outrider.steps import StepContext

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "step-authors.md"

needs_images = pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "image", "inspect", "outrider/base:1"], capture_output=True).returncode != 0
    or os.geteuid() != 0,
    reason="the image outrider/base:1 is not built (make images), or this is not root",
)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """The files of the guide, as they stand in it."""
    folder = tmp_path / "manifest"
    blocks = re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for name, text in blocks:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def module(plugin: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("guide_manifest", plugin / "outrider_step_manifest" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["guide_manifest"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "map").write_bytes(b"1")
    (folder / ".hidden").touch()
    return folder


EXPECTED = f"{hashlib.sha256(b'1').hexdigest()}  map\n"


def inputs_of(module: ModuleType, **params: Any) -> tuple[Any, dict[str, Any]]:
    """What the core does with a step: validate, resolve; and the parameters that the program gets."""
    (step_type,) = module.outrider_step_types()
    validated = step_type.params.model_validate(params)
    plan = step_type.resolve(validated, StepContext(run_id="r1", step="list"))
    return plan, validated.model_dump(by_alias=True)


def test_module_describes_and_program_does(module: ModuleType, plugin: Path, data: Path, tmp_path: Path) -> None:
    plan, inputs = inputs_of(module, of=str(data), to=str(tmp_path / "list"))
    directory = tmp_path / "outrider"
    directory.mkdir()
    (directory / "inputs.json").write_text(json.dumps(inputs))
    environ = {**os.environ, "OUTRIDER_DIRECTORY": str(directory), "PYTHONPATH": str(ROOT / "stepkit")}
    subprocess.run([sys.executable, str(plugin / "program"), *plan.args], env=environ, check=True)
    assert (tmp_path / "list").read_text() == EXPECTED
    outputs = module.ManifestOutputs.model_validate_json((directory / "outputs").read_text())
    assert (outputs.files, outputs.sha256) == (1, hashlib.sha256(EXPECTED.encode()).hexdigest())


def test_pipeline_of_the_guide_loads(plugin: Path) -> None:
    assert [step.uses for step in load_pipeline((plugin / "pipeline.yaml").read_text()).steps] == [
        "manifest.create",
        "container.run",
    ]


@needs_images
def test_image_is_built_and_works_in_the_sandbox(module: ModuleType, plugin: Path, data: Path, tmp_path: Path) -> None:
    build = [sys.executable, str(ROOT / "deploy" / "images" / "build.py"), "build", "manifest", "--plugin", str(plugin)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    try:
        plan, inputs = inputs_of(module, of="/data", to="/data/.list")
        log = sandboxed(tmp_path, inputs, [plan.image, *plan.args], data)
        assert (data / ".list").read_text() == EXPECTED, log
    finally:
        subprocess.run(["docker", "image", "rm", "-f", module.IMAGE], capture_output=True)


@needs_images
@pytest.mark.parametrize(
    ("name", "file", "words"), [("arena", "outputs", '"hello arena"'), ("", "progress", "name is empty")]
)
def test_shell_keeps_the_contract_too(
    plugin: Path, data: Path, tmp_path: Path, name: str, file: str, words: str
) -> None:
    log = sandboxed(
        tmp_path, {"name": name}, ["outrider/base:1", "sh", "-c", (plugin / "program.sh").read_text()], data
    )
    assert words in (tmp_path / "outrider" / file).read_text(), log
    json.loads((tmp_path / "outrider" / file).read_text())


def sandboxed(tmp_path: Path, inputs: dict[str, Any], command: list[str], data: Path) -> str:
    """Run an image as the agent does, with ``data`` at /data; gives the log."""
    directory = tmp_path / "outrider"
    directory.mkdir()
    (directory / "inputs.json").write_text(json.dumps(inputs))
    for path in (directory, data):
        os.chown(path, 200001, 200001)
    options = ["--rm", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none"]
    options += ["--user", "200001:200001", "--tmpfs", "/tmp:size=64m", "-v", f"{directory}:/outrider"]
    options += ["-v", f"{data}:/data", "--env", "OUTRIDER_CONTRACT=1"]
    ended = subprocess.run(["docker", "run", *options, *command], capture_output=True, text=True)
    return ended.stdout + ended.stderr
