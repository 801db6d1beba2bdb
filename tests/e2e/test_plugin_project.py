"""What `outrider plugin new` makes: built, installed, tested, tried, and run on a node, as its author would do it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .conftest import Dev, start_dev, stop_dev

pytestmark = pytest.mark.timeout(300)

NAME = "e2e_notes"
IMAGE = f"outrider/step-{NAME}:0.1.0"


class Environment:
    """A virtual environment with all that this one has, in which an author works as in a shell of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        packages = next((folder / "lib").glob("python*")) / "site-packages"
        here = sysconfig.get_path("purelib")
        # By a function and not as a plain path: what is installed here in editable mode is found through .pth files.
        (packages / "everything.pth").write_text(f"import site; site.addsitedir({here!r})\n")
        for name in ("pip", "pytest", "outrider", "hatchling"):
            (found,) = importlib.metadata.entry_points(group="console_scripts", name=name)
            script = folder / "bin" / name
            script.write_text(
                f"#!{folder}/bin/python\nfrom {found.module} import {found.attr} as main\nraise SystemExit(main())\n"
            )
            script.chmod(0o755)
        # No index, and the build backend that is here. pip means the opposite: it is the value of build_isolation.
        self.environ = os.environ | {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull}
        self.environ["PATH"] = os.pathsep.join((f"{folder}/bin", sysconfig.get_path("scripts"), os.environ["PATH"]))
        # What the checkout's tests are set to is nothing of the project's.
        self.environ["PYTEST_ADDOPTS"] = "-p no:cacheprovider -p no:asyncio"

    def run(self, command: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a line as it stands in a document; whoever runs these tests is as much root as is needed."""
        done = subprocess.run(
            ["bash", "-c", f'sudo() {{ "$@"; }}\n{command}'],
            cwd=cwd,
            env=self.environ | environ,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


@pytest.fixture
def image() -> Iterator[None]:
    yield
    subprocess.run(["docker", "image", "rm", "-f", IMAGE], capture_output=True)


def test_commands_of_the_readme_work_where_there_is_no_engine(environment: Environment, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    environment.run(f"outrider plugin new {NAME} --directory {folder}", tmp_path)
    working = (folder / "README.md").read_text().partition("## Working on it")[2]
    commands = re.findall(r"^\$ (.+?)(?: +# .+)?$", working, re.MULTILINE)
    # What needs an engine is done below; what needs an index is not.
    elsewhere = ("sudo outrider images build", "sudo outrider plugin try", "pip install build")
    told = {
        command: environment.run(command, folder, PYTEST_ADDOPTS="-p no:asyncio --outrider-engine=off").stdout
        for command in commands
        if not command.startswith(elsewhere)
    }
    assert len(told) == len(commands) - len(elsewhere) == 5
    assert "Successfully installed outrider-step-e2e-notes-0.1.0" in told["pip install -e '.[test]'"]
    assert f"{NAME}.list" in told["outrider plugin doctor"]
    assert "18 passed, 14 skipped" in told["pytest"]


@pytest.mark.usefixtures("image")
@pytest.mark.skipif(os.geteuid() != 0, reason="images are built as root")
@pytest.mark.parametrize("language", ["python", pytest.param("sh", marks=pytest.mark.long)])
def test_project_is_built_installed_tested_tried_and_run(
    environment: Environment, tmp_path: Path, language: str
) -> None:
    folder = tmp_path / "project"
    environment.run(f"outrider plugin new {NAME} --directory {folder} --language {language}", tmp_path)

    steps = yaml.safe_load((folder / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["steps"]
    *commands, build = (step["run"] for step in steps if "run" in step)
    told = [environment.run(command, folder).stdout for command in commands]
    assert "30 passed, 2 skipped" in told[-1], told[-1]

    assert build == "pip install build && python -m build"  # which comes from an index, and asks the backend for this:
    environment.run("hatchling build -t wheel", folder)
    environment.run("pip install --no-deps --force-reinstall dist/*.whl", folder)

    # From here on the project itself is away: what is installed is all that a node has.
    shutil.rmtree(folder / f"outrider_step_{NAME}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "with.yaml").write_text("of: /saves\nto: /out/list\n")
    (elsewhere / "saves").mkdir()
    (elsewhere / "saves" / "world").write_bytes(b"22")
    tried = environment.run(
        f"outrider plugin try {NAME}.list --with with.yaml --volume saves=saves --volume out=out", elsewhere
    )
    assert json.loads(tried.stdout)["files"] == 1
    assert (elsewhere / "out" / "list").read_text().endswith("  world\n")
    assert "succeeded in" in tried.stderr

    dev = start_dev(tmp_path / "dev", command=(str(environment.folder / "bin" / "python"), "-m", "outrider.cli"))
    try:
        _runs_on_a_node(dev, (folder / "examples" / "pipeline.yaml").read_text())
    finally:
        stop_dev(dev)


def _runs_on_a_node(dev: Dev, pipeline: str) -> None:
    dev.ok("object", "set", "game/notes-1")
    run = dev.run(pipeline, "--object", "game/notes-1")
    assert run["state"] == "succeeded", run
    (listed,) = run["steps"]
    assert listed["image"] == IMAGE
    assert dev.json("object", "get", "game/notes-1")["status"] == {"saved_files": 0}
