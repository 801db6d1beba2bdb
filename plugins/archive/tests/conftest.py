"""The program as it runs: a process with an /outrider directory of its own."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from outrider_step_archive import CreateParams, ExtractParams, resolve_create, resolve_extract
from outrider_stepkit import main

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
def prepare(tmp_path: Path) -> Callable[..., tuple[list[str], dict[str, str], Path]]:
    """The arguments, the environment and the directory of an attempt, by its step type's own plan."""
    count = 0

    def make(command: str, **params: Any) -> tuple[list[str], dict[str, str], Path]:
        nonlocal count
        count += 1
        envs = params.pop("envs", {})
        context = StepContext(run_id="r1", step="s", envs=tuple(envs))
        if command == "extract":
            plan = resolve_extract(ExtractParams.model_validate(params), context)
        else:
            plan = resolve_create(CreateParams.model_validate(params), context)
        directory = tmp_path / f"outrider-{count}"
        directory.mkdir()
        (directory / "inputs.json").write_text(json.dumps(plan.inputs))
        return [*plan.args], {**envs, "OUTRIDER_DIRECTORY": str(directory)}, directory

    return make


@pytest.fixture
def start(prepare: Callable[..., Any]) -> Callable[..., tuple[subprocess.Popen[str], Path]]:
    """Start a step as a process of its own: ``start("extract", to=…, **{"from": …})``."""

    def run(command: str, **params: Any) -> tuple[subprocess.Popen[str], Path]:
        args, envs, directory = prepare(command, **params)
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *args],
            env={**os.environ, **envs, "PYTHONPATH": str(STEPKIT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, directory

    return run


@pytest.fixture
def process(start: Callable[..., tuple[subprocess.Popen[str], Path]]) -> Callable[..., Ended]:
    """Run a step to its end as a process of its own."""

    def run(command: str, **params: Any) -> Ended:
        process, directory = start(command, **params)
        _, stderr = process.communicate(timeout=60)
        return ended(process.returncode, stderr, directory)

    return run


@pytest.fixture
def step(
    prepare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run a step to its end by the program's own frame, within this process: a hundred times as many in the time."""
    monkeypatch.syspath_prepend(str(PROGRAM))
    actions = {
        "extract": importlib.import_module("archiving.extract").extract,
        "create": importlib.import_module("archiving.create").create,
    }

    def run(command: str, **params: Any) -> Ended:
        args, envs, directory = prepare(command, **params)
        capfd.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            with monkeypatch.context() as inner:
                for name, value in envs.items():
                    inner.setenv(name, value)
                inner.setattr(sys, "argv", ["program", *args])
                with pytest.raises(SystemExit) as exit:
                    main(actions)
        finally:
            signal.signal(signal.SIGTERM, before)
        code = exit.value.code
        assert isinstance(code, int)
        return ended(code, capfd.readouterr().err, directory)

    return run


def ended(code: int, stderr: str, directory: Path) -> Ended:
    """What the directory of an attempt says about its end."""
    outputs: dict[str, Any] = {}
    if (directory / "outputs").exists():
        for line in (directory / "outputs").read_text().splitlines():
            outputs |= json.loads(line)
    progress = []
    if (directory / "progress").exists():
        progress = [json.loads(line) for line in (directory / "progress").read_text().splitlines()]
    return Ended(code, stderr, outputs, progress)


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
