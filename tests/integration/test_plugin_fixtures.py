"""The fixtures of tests/plugins are what an installer makes of them; `tests.plugin_fixtures.install` is no other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin_fixtures import FIXTURES, NAMES, install

pytestmark = pytest.mark.long  # the installer fetches what builds them


@pytest.mark.parametrize("name", [name for name in NAMES if (FIXTURES / name / "pyproject.toml").exists()])
def test_a_fixture_installed_for_real_is_the_same(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / name, source)
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "pip", "install", "--python", sys.executable, "--no-deps", "--target", tmp_path / "real", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = install(tmp_path / "ours", name)
    for module in FIXTURES.joinpath(name).glob("*.py"):
        assert (tmp_path / "real" / module.name).read_text() == (ours / module.name).read_text()
    (info,) = ours.glob("*.dist-info")
    real = tmp_path / "real" / info.name
    assert (real / "entry_points.txt").read_text().strip() == (info / "entry_points.txt").read_text().strip()
    told = (real / "METADATA").read_text().splitlines()
    assert {"Name: outrider-fixture-" + name, "Version: 1.0", "Requires-Dist: outrider"} <= set(told)
