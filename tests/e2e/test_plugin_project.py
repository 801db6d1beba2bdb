"""What `outrider plugin new` makes: built, installed, tested, tried, and run on a node, as its author would do it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Dev, start_dev, stop_dev

pytestmark = pytest.mark.timeout(300)

NAME = "e2e_notes"
IMAGE = f"outrider/step-{NAME}:0.1.0"


class Environment:
    """A virtual environment with all that this one has, and what is installed into it beside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.packages = next((folder / "lib").glob("python*")) / "site-packages"
        here = sysconfig.get_path("purelib")
        # By a function and not as a plain path: what is installed here in editable mode is found through .pth files.
        (self.packages / "everything.pth").write_text(f"import site; site.addsitedir({here!r})\n")

    def install(self, wheel: Path) -> None:
        """Unpack a wheel, as pip does with one that has no scripts."""
        shutil.unpack_archive(wheel, self.packages, "zip")

    def run(self, *command: object, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a module of this environment's Python."""
        done = subprocess.run(
            [self.folder / "bin" / "python", "-m", *map(str, command)], cwd=cwd, capture_output=True, text=True
        )
        assert not ok or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    yield Environment(tmp_path / "venv")
    subprocess.run(["docker", "image", "rm", "-f", IMAGE], capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="images are built as root")
@pytest.mark.parametrize("language", ["python", pytest.param("sh", marks=pytest.mark.long)])
def test_project_is_built_installed_tested_tried_and_run(
    environment: Environment, tmp_path: Path, language: str
) -> None:
    folder = tmp_path / "project"
    outrider = ("outrider.cli",)
    environment.run(*outrider, "plugin", "new", NAME, "--directory", folder, "--language", language, cwd=tmp_path)

    built = tmp_path / "dist"
    environment.run("hatchling", "build", "-t", "wheel", "-d", built, cwd=folder)
    (wheel,) = built.glob("*.whl")
    environment.install(wheel)

    tested = environment.run(
        "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "--outrider-engine=require", cwd=folder
    )
    assert "30 passed, 2 skipped" in tested.stdout, tested.stdout

    # From here on the project itself is away: what is installed is all that a node has.
    shutil.rmtree(folder / f"outrider_step_{NAME}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "with.yaml").write_text("of: /saves\nto: /out/list\n")
    (elsewhere / "saves").mkdir()
    (elsewhere / "saves" / "world").write_bytes(b"22")
    tried = environment.run(
        *outrider, "plugin", "try", f"{NAME}.list", "--with", "with.yaml",
        "--volume", "saves=saves", "--volume", "out=out", cwd=elsewhere,
    )  # fmt: skip
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
