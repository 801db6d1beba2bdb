"""Building images: what is up to date, what is not, and what a person is told when it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "deploy" / "images" / "build.py"

pytestmark = pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "image", "inspect", "outrider/base:1"], capture_output=True).returncode != 0,
    reason="the image outrider/base:1 is not built (make images)",
)


def build(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BUILD), *arguments], capture_output=True, text=True, timeout=100)


def states(plugin: Path) -> dict[str, str]:
    rows = json.loads(build("list", "--plugin", str(plugin), "-o", "json").stdout)
    return {row["name"]: row["state"] for row in rows}


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    """A stranger's plugin, outside of the checkout, with a program that needs the step kit."""
    folder = tmp_path / f"test-{uuid.uuid4().hex[:8]}"
    (folder / "image").mkdir(parents=True)
    (folder / "program").mkdir()
    (folder / "pyproject.toml").write_text('[project]\nname = "outrider-step-test"\nversion = "7.1"\n')
    (folder / "image" / "Dockerfile").write_text(
        "ARG BASE=outrider/base:1\nFROM ${BASE}\nCOPY lib /opt/outrider/lib\nCOPY program /opt/outrider/program\n"
        'ENTRYPOINT ["python3", "/opt/outrider/program"]\n'
    )
    (folder / "program" / "__main__.py").write_text("import outrider_stepkit; print('hello')\n")
    yield folder
    subprocess.run(["docker", "image", "rm", "-f", f"outrider/step-{folder.name}:7.1"], capture_output=True)


def test_plugin_is_built_once_and_again_when_it_changes(plugin: Path) -> None:
    name, tag = plugin.name, f"outrider/step-{plugin.name}:7.1"
    assert states(plugin)[name] == "absent"
    first = build("build", name, "--plugin", str(plugin))
    assert first.returncode == 0, first.stderr
    assert states(plugin)[name] == "up to date"
    ran = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", "--read-only", "--user", "200001:200001", tag],
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "hello\n", ran.stderr
    again = build("build", name, "--plugin", str(plugin))
    assert (again.returncode, again.stderr) == (0, "")  # nothing to do, nothing said
    (plugin / "program" / "__main__.py").write_text("print('changed')\n")
    assert states(plugin)[name] == "outdated"


def test_failure_says_which_image_and_shows_the_last_words(plugin: Path) -> None:
    dockerfile = plugin / "image" / "Dockerfile"
    dockerfile.write_text(dockerfile.read_text() + 'RUN ["python3", "-c", "raise SystemExit(\'no way\')"]\n')
    ended = build("build", plugin.name, "--plugin", str(plugin))
    assert ended.returncode == 1
    assert f"building outrider/step-{plugin.name}:7.1 failed" in ended.stderr
    assert "no way" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_builds_have_no_network(plugin: Path) -> None:
    dockerfile = plugin / "image" / "Dockerfile"
    program = "import os; assert os.listdir('/sys/class/net') == ['lo'], os.listdir('/sys/class/net')"
    dockerfile.write_text(dockerfile.read_text() + f'RUN ["python3", "-c", "{program}"]\n')
    ended = build("build", plugin.name, "--plugin", str(plugin))
    assert ended.returncode == 0, ended.stderr


def test_package_that_is_not_what_the_lock_says_is_refused(plugin: Path) -> None:
    (plugin / "image" / "requirements.in").write_text("py7zr\n")
    locked = (ROOT / "plugins" / "archive" / "image" / "requirements.lock").read_text()
    start = locked.index("py7zr==")
    (plugin / "image" / "requirements.lock").write_text(
        locked[start:].splitlines()[0].rstrip("\\ ") + " --hash=sha256:" + "0" * 64 + "\n"
    )
    ended = build("build", plugin.name, "--plugin", str(plugin))
    assert ended.returncode == 1
    assert "fetching the packages of" in ended.stderr
    assert states(plugin)[plugin.name] == "absent"


def test_missing_lock_says_how_to_make_it(plugin: Path) -> None:
    (plugin / "image" / "requirements.in").write_text("py7zr\n")
    ended = build("build", plugin.name, "--plugin", str(plugin))
    assert f"outrider images lock {plugin.name}" in ended.stderr


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "pyproject.toml").write_text("[project]\nname = 'x'\n"), "has no version"),
        (lambda folder: (folder / "pyproject.toml").unlink(), "can't be read"),
        (lambda folder: shutil.rmtree(folder / "image"), "is not the folder of a step plugin"),
    ],
)
def test_folder_that_is_no_plugin_is_named(plugin: Path, spoil: object, words: str) -> None:
    assert callable(spoil)
    spoil(plugin)
    ended = build("list", "--plugin", str(plugin))
    assert ended.returncode == 1
    assert words in ended.stderr
    assert str(plugin) in ended.stderr


def test_unknown_image_lists_those_that_there_are() -> None:
    ended = build("build", "nonesuch")
    assert ended.returncode == 1
    assert "there are base, pause, archive" in ended.stderr


def test_no_engine_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    ended = build("build", "pause")
    assert ended.returncode == 1
    assert "run scripts/engine.sh start" in ended.stderr


def test_locks_carry_hashes_and_no_address() -> None:
    for lock in ROOT.glob("plugins/*/image/requirements.lock"):
        text = lock.read_text()
        assert "://" not in text
        names = [line for line in text.splitlines() if "==" in line]
        assert names
        for name in names:
            assert text[text.index(name) :].split("\n")[1].strip().startswith("--hash=sha256:"), name
            assert ";" not in name, "a marker would make the lock mean different things on the two base images"
