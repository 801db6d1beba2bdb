"""`outrider images` as a process, with the real engine: from one machine's engine to another's, in a file."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

OUTRIDER = Path(sys.executable).with_name("outrider")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "image", "inspect", "outrider/pause:1"], capture_output=True).returncode != 0,
    reason="the image outrider/pause:1 is not built (make images)",
)


def images(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    given: dict[str, object] = {"capture_output": True, "text": True, "timeout": 100, **options}
    return subprocess.run([str(OUTRIDER), "images", *arguments], **given)  # type: ignore[call-overload, no-any-return]


def docker(*arguments: str, data: bytes | None = None) -> str:
    return subprocess.run(["docker", *arguments], input=data, capture_output=True, check=True).stdout.decode().strip()


def id_of(name: str) -> str:
    return docker("image", "inspect", "--format", "{{.Id}}", name)


@pytest.fixture
def game() -> Iterator[str]:
    """An image of this test's own."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        entry = tarfile.TarInfo("map")
        entry.size = 2**20
        archive.addfile(entry, io.BytesIO(secrets.token_bytes(2**20)))
    name = f"outrider-test/game-{secrets.token_hex(4)}:1"
    docker("import", "-", name, data=content.getvalue())
    yield name
    subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True)


def test_a_game_goes_from_one_engine_to_another_in_a_file(game: str, tmp_path: Path) -> None:
    image_id, file = id_of(game), tmp_path / "fleet.images"
    saved = images("save", str(file), game, "-o", "json")
    assert saved.returncode == 0, saved.stderr
    told = json.loads(saved.stdout)
    assert [(each["name"], each["id"]) for each in told["images"]] == [(game, image_id)]
    docker("image", "rm", game)
    loaded = images("load", str(file), "--sha256", told["file_sha256"], "-o", "json")
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout)["loaded"] == [game]
    assert id_of(game) == image_id
    again = images("load", "-", "-o", "json", input=file.read_bytes(), text=False)
    assert json.loads(again.stdout)["loaded"] == []  # it is there already


def test_a_damaged_file_is_refused_before_the_engine_is_given_anything(game: str, tmp_path: Path) -> None:
    file = tmp_path / "fleet.images"
    assert images("save", str(file), game).returncode == 0
    docker("image", "rm", game)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for command in (["load", str(file)], ["list", "--file", str(file)]):
        ended = images(*command)
        assert ended.returncode == 4
        assert f"{file} can't be loaded: its images are not the bytes that were saved" in ended.stderr
    with pytest.raises(subprocess.CalledProcessError):
        id_of(game)
    ended = images("load", str(file), "--sha256", "00")
    assert (ended.returncode, "not 00 (bring it again)" in ended.stderr) == (4, True)


def test_what_can_not_be_saved_is_named(tmp_path: Path) -> None:
    file = str(tmp_path / "f")
    for names, words in (
        (["nonesuch"], "there is no image nonesuch (there are base, pause, "),
        (["no/such:1"], "the engine has no no/such:1: build or pull them first"),
        ([f"a@sha256:{'1' * 64}"], "has no name of its own in a file (give it a tag, and save that)"),
    ):
        ended = images("save", file, *names)
        assert ended.returncode in (1, 4)
        assert words in ended.stderr
        assert "Traceback" not in ended.stderr
    assert not Path(file).exists()
    ended = images("load", file)
    assert (ended.returncode, ended.stderr.strip()) == (4, f"error: there is no file {file}")
    no_engine = os.environ | {"DOCKER_HOST": "unix:///nonexistent.sock"}
    ended = images("save", file, "pause", env=no_engine)
    assert "container engine does not answer" in ended.stderr


SAY = """
import json, sys
sys.path += sys.argv[1:]
from pathlib import Path
from outrider.cli.imagebuild import engine, of_checkout, of_machine
under = engine.Image("sha256:base", {}, 0)
machine, without = of_machine()
checkout = of_checkout(Path(sys.argv[2]))
assert not without, without
print(json.dumps([
    {step.name: [step.tag, workshop._step_content(step, under), str(step.folder)] for step in workshop.steps}
    for workshop in (machine, checkout)
]))
"""


def test_installed_plugins_carry_what_their_images_are_made_of(tmp_path: Path) -> None:
    """From the distributions as anybody installs them, images come out that are those of a checkout, to the byte."""
    names = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
    sources = [str(ROOT / "plugins" / name) for name in names] + [str(ROOT / "stepkit")]
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, *sources], check=True, timeout=100)
    # Without site packages: there, the plugins are installed in editable mode.
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SAY, str(tmp_path), str(ROOT)], capture_output=True, text=True, cwd="/"
    )
    assert said.returncode == 0, said.stderr
    machine, checkout = json.loads(said.stdout)
    assert sorted(machine) == names
    for name in names:
        assert machine[name][:2] == checkout[name][:2]
        assert machine[name][2] == str(tmp_path / f"outrider_step_{name}" / "_context")
