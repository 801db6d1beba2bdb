"""The image, run as the agent runs it: read-only root, no capabilities, a user that nobody knows, no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outrider_step_archive import IMAGE, CreateParams, ExtractParams, resolve_create, resolve_extract

from outrider.steps import StepContext, StepPlan

UID = 200001

pytestmark = pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True).returncode != 0,
    reason=f"the image {IMAGE} is not built (make images)",
)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    path.mkdir()
    _own(path)
    return path


def _own(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to the step's user")
    os.chown(path, UID, UID)


@pytest.fixture
def run(tmp_path: Path, volume: Path) -> Callable[..., Any]:
    """Run a plan in its sandbox with ``volume`` at /data; gives exit code, log, outputs, the cause of a failure."""

    def to_end(plan: StepPlan, mode: str = "rw") -> tuple[int, str, dict[str, Any], dict[str, Any]]:
        directory = tmp_path / f"outrider-{uuid.uuid4().hex[:8]}"
        directory.mkdir()
        (directory / "inputs.json").write_text(json.dumps(plan.inputs))
        _own(directory)
        command = ["docker", "run", "--rm", "--name", f"outrider-test-{uuid.uuid4().hex[:12]}"]
        command += ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        command += ["--user", f"{UID}:{UID}", "--network", plan.network, "--memory", "256m", "--pids-limit", "64"]
        command += ["--tmpfs", "/tmp:size=64m,mode=1777", "--env", "HOME=/tmp"]
        command += ["-v", f"{directory}:/outrider:rw", "-v", f"{volume}:/data:{mode}", plan.image, *plan.args]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=90)

        def lines(name: str) -> dict[str, Any]:
            path = directory / name
            found: dict[str, Any] = {}
            for line in path.read_text().splitlines() if path.exists() else ():
                found |= json.loads(line)
            return found

        return ended.returncode, ended.stdout + ended.stderr, lines("outputs"), lines("progress")

    return to_end


def extract(**params: Any) -> StepPlan:
    return resolve_extract(ExtractParams.model_validate(params), StepContext(run_id="r1", step="s"))


def create(**params: Any) -> StepPlan:
    return resolve_create(CreateParams.model_validate(params), StepContext(run_id="r1", step="s"))


@pytest.mark.parametrize("kind", ["7z", "zip", "tar.gz", "tar.xz", "tar.zst"])
def test_every_format_works_in_the_sandbox(run: Callable[..., Any], volume: Path, kind: str) -> None:
    source = volume / "source"
    source.mkdir()
    (source / "map").write_bytes(os.urandom(500_000))
    (source / "link").symlink_to("map")
    code, log, packed, _ = run(create(**{"from": "/data/source"}, to=f"/data/a.{kind}", symlinks="keep"))
    assert code == 0, log
    assert packed["files"] == 1
    code, log, unpacked, _ = run(extract(**{"from": f"/data/a.{kind}"}, to="/data/arena", symlinks="keep"))
    assert code == 0, log
    assert unpacked["bytes"] == 500_000
    assert (volume / "arena" / "map").read_bytes() == (source / "map").read_bytes()
    assert os.readlink(volume / "arena" / "link") == "map"
    assert (volume / "arena" / "map").stat().st_uid == UID


def test_root_of_a_volume_can_be_the_target(run: Callable[..., Any], volume: Path, tmp_path: Path) -> None:
    (volume / "old").write_text("x")
    _archive(volume / "a.tar", {"new/file": b"1"})
    assert run(extract(**{"from": "/data/a.tar"}, to="/data"))[0] == 0
    assert sorted(os.listdir(volume)) == ["a.tar", "new", "old"]
    assert run(extract(**{"from": "/data/a.tar"}, to="/data", existing="refuse"))[3]["code"] == "exists"
    assert run(extract(**{"from": "/data/a.tar"}, to="/data", existing="replace"))[0] == 0
    assert os.listdir(volume) == ["new"]


def test_read_only_volume_is_named(run: Callable[..., Any], volume: Path) -> None:
    _archive(volume / "a.tar", {"f": b"1"})
    code, log, _, cause = run(extract(**{"from": "/data/a.tar"}, to="/data/arena"), mode="ro")
    assert (code, cause["code"]) == (1, "read_only")
    assert "/data/arena can't be written: its volume is read-only for this step" in log
    assert "Traceback" not in log


def test_hostile_archive_leaves_nothing_even_with_locked_directories(run: Callable[..., Any], volume: Path) -> None:
    with tarfile.open(volume / "a.tar", "w") as archive:
        info = tarfile.TarInfo("locked")
        info.type, info.mode = tarfile.DIRTYPE, 0
        archive.addfile(info)
        archive.addfile(tarfile.TarInfo("locked/f"))
        archive.addfile(tarfile.TarInfo("../evil"))
    code, _, _, cause = run(extract(**{"from": "/data/a.tar"}, to="/data/arena"))
    assert (code, cause["code"]) == (1, "archive_unsafe")
    assert os.listdir(volume) == ["a.tar"]


def _archive(path: Path, files: dict[str, bytes]) -> None:
    import io

    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
