"""What `outrider plugin new` makes: built, installed, tested, tried, and run on a node, as its author would do it."""

from __future__ import annotations

import importlib.metadata
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

GUIDE = (Path(__file__).parents[2] / "docs" / "step-authors.md").read_text()
NAME = "manifest"  # as in the guide
IMAGE = f"outrider/step-{NAME}:0.1.0"


def blocks(mark: str) -> list[str]:
    """Commands of the guide, with what they print."""
    return re.findall(rf"^```console {mark}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands, without what stands beside them."""
    return re.findall(r"^\$ (.+?)(?: +# .+)?$", text, re.MULTILINE)


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


@pytest.mark.long
def test_first_commands_of_the_guide_and_those_of_the_readme_work_without_an_engine(
    environment: Environment, tmp_path: Path
) -> None:
    no_engine = {"PYTEST_ADDOPTS": "-p no:asyncio --outrider-engine=off"}
    [first] = blocks("install")
    told = environment.run("\n".join(["set -e", *commands(first)]), tmp_path, **no_engine).stdout
    assert "Successfully installed outrider-step-manifest-0.1.0" in told
    assert "18 passed, 14 skipped" in told

    folder = tmp_path / "outrider-step-manifest"
    readme = commands((folder / "README.md").read_text().partition("## Working on it")[2])
    assert {"pip install -e '.[test]'", "pytest"} <= {*readme}
    # What was done above, what needs an engine and is done below, and what needs an index.
    done = ("pip install", "pytest", "sudo outrider images build", "sudo outrider plugin try")
    rest = [command for command in readme if not command.startswith(done)]
    assert len(rest) == 3
    for command in rest:
        environment.run(command, folder, **no_engine)


@pytest.mark.usefixtures("image")
@pytest.mark.skipif(os.geteuid() != 0, reason="images are built as root")
@pytest.mark.parametrize("language", ["python", pytest.param("sh", marks=pytest.mark.long)])
def test_project_is_built_installed_tested_tried_and_run(
    environment: Environment, tmp_path: Path, language: str
) -> None:
    folder = tmp_path / f"outrider-step-{NAME}"
    environment.run(f"outrider plugin new {NAME} --language {language}", tmp_path)

    steps = yaml.safe_load((folder / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["steps"]
    *checks, build = (step["run"] for step in steps if "run" in step)
    told = [environment.run(command, folder).stdout for command in checks]
    assert "30 passed, 2 skipped" in told[-1], told[-1]

    assert build == "pip install build && python -m build"  # which comes from an index, and asks the backend for this:
    environment.run("hatchling build -t wheel", folder)
    environment.run("pip install --no-deps --force-reinstall dist/*.whl", folder)

    # From here on the project itself is away: what is installed is all that a node has.
    shutil.rmtree(folder / f"outrider_step_{NAME}")
    image, tried, used = (block.replace("/tmp/", f"{tmp_path}/") for block in blocks("engine"))
    environment.run(*commands(image), folder)

    [command], shown = commands(tried), tried.partition("\n")[2]
    done = environment.run(command, folder)
    outputs = re.search(r"^\{.*^\}\n", shown, re.MULTILINE | re.DOTALL)
    assert outputs is not None
    assert re.fullmatch(_looks_like(outputs[0]), done.stdout), done.stdout
    assert re.search(_looks_like(shown.replace(outputs[0], "")), done.stderr), done.stderr
    assert (tmp_path / NAME / "files.txt").read_text().endswith("  pipeline.yaml\n")

    dev: Dev | None = None
    try:
        for command in commands(used):
            if command == "outrider dev":
                dev = start_dev(
                    tmp_path / "dev", command=(str(environment.folder / "bin" / "python"), "-m", "outrider.cli")
                )
                environment.environ |= {"OUTRIDER_CONTEXT": dev.env["OUTRIDER_CONTEXT"]}
            else:
                environment.run(command, folder)
        assert dev is not None
        assert dev.json("object", "get", "game/arena-1")["status"] == {"saved_files": 0}
    finally:
        if dev is not None:
            stop_dev(dev)


def _looks_like(text: str) -> str:
    """A pattern for what a command prints; … stands for what differs, and how long it takes does."""
    return re.escape(text).replace("…", ".+").replace(r"0\.9s", r"\d+\.\ds")
