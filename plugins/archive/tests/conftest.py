"""The program as it runs: a process with an /outrider directory of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from outrider_step_archive import CreateParams, ExtractParams, resolve_create, resolve_extract

from outrider.steps import StepContext

PROGRAM = Path(__file__).parents[1] / "program"
STEPKIT = Path(__file__).parents[3] / "stepkit"


@dataclass
class Ended:
    """How an attempt ended."""

    code: int
    stderr: str
    outputs: dict[str, Any]
    progress: list[dict[str, Any]]

    @property
    def failure(self) -> tuple[str, str]:
        """The cause that was written down: its code and its sentence."""
        assert self.code == 1, self.stderr
        cause = self.progress[-1]
        assert f"error: {cause['error']}" in self.stderr
        assert "Traceback" not in self.stderr
        return cause["code"], cause["error"]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[str], Path]]:
    """Start a step by its type's own plan: ``start("extract", to=…, **{"from": …})``."""
    count = 0

    def run(command: str, **params: Any) -> tuple[subprocess.Popen[str], Path]:
        nonlocal count
        count += 1
        more = params.pop("envs", {})
        context = StepContext(run_id="r1", step="s", envs=tuple(more))
        if command == "extract":
            plan = resolve_extract(ExtractParams.model_validate(params), context)
        else:
            plan = resolve_create(CreateParams.model_validate(params), context)
        directory = tmp_path / f"outrider-{count}"
        directory.mkdir()
        (directory / "inputs.json").write_text(json.dumps(plan.inputs))
        environ = {**os.environ, **more, "PYTHONPATH": str(STEPKIT), "OUTRIDER_DIRECTORY": str(directory)}
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *plan.args],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, directory

    return run


@pytest.fixture
def step(start: Callable[..., tuple[subprocess.Popen[str], Path]]) -> Callable[..., Ended]:
    """Run a step to its end."""

    def run(command: str, **params: Any) -> Ended:
        process, directory = start(command, **params)
        _, stderr = process.communicate(timeout=60)
        outputs: dict[str, Any] = {}
        if (directory / "outputs").exists():
            for line in (directory / "outputs").read_text().splitlines():
                outputs |= json.loads(line)
        progress = []
        if (directory / "progress").exists():
            progress = [json.loads(line) for line in (directory / "progress").read_text().splitlines()]
        return Ended(process.returncode, stderr, outputs, progress)

    return run


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Where things are unpacked to. Nothing but the target may ever be left in it."""
    path = tmp_path / "volume"
    path.mkdir()
    return path


Member = tuple[tarfile.TarInfo, bytes]


@pytest.fixture
def tar(tmp_path: Path) -> Callable[..., Path]:
    """A tar of any members, however hostile: ``tar(("name", b"content"), ("link", {"type": …, "linkname": …}))``."""

    def make(*members: tuple[str, bytes | dict[str, Any]], mode: str = "w", name: str = "hostile.tar") -> Path:
        path = tmp_path / name
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]  # the mode is the test's
            for member, content in members:
                info = tarfile.TarInfo(member)
                if isinstance(content, bytes):
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                else:
                    for key, value in content.items():
                        setattr(info, key, value)
                    archive.addfile(info)
        return path

    return make
