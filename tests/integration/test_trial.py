"""`outrider plugin try`, on the engine: a node's sandbox, directories of the person's own, and nothing left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agent_core.runtimes.base import LABEL_NODE
from agent_core.runtimes.docker import DockerRuntime
from agent_core.trial import trial
from outrider.errors import EngineUnavailable

OUTRIDER = Path(sys.executable).with_name("outrider")
UID = 61001

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or subprocess.run(["docker", "image", "inspect", "outrider/base:1"], capture_output=True).returncode != 0,
    reason="the image outrider/base:1 is not built (make images), or this is not root",
)


def command(tmp_path: Path, script: str, *options: object, network: str = "none") -> list[str]:
    """`outrider plugin try container.run` with a script for the base image."""
    file = tmp_path / "with.yaml"
    params: dict[str, Any] = {"image": "outrider/base:1", "entrypoint": ["sh", "-c"], "args": [script]}
    file.write_text(json.dumps({**params, "network": network}))
    return [str(OUTRIDER), "plugin", "try", "container.run", "--with", str(file), *map(str, options)]


def listed(*arguments: str) -> list[str]:
    """The words of what the engine's own command lists."""
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.split()


def node_of(volume: Path) -> str:
    """The node that the trial is which runs a step with this volume, once it does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        label = f'{{{{.Label "{LABEL_NODE}"}}}}'
        if found := listed("ps", "--filter", f"volume={volume}", "--format", label):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no step has {volume}")


def test_step_runs_as_the_owner_of_its_volume_and_its_log_is_masked(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    os.chown(mine, UID, UID)
    script = (
        "until [ -e /out/go ]; do sleep 0.05; done; "
        "id -u; echo $TOKEN; touch /out/made /etc/made; grep CapEff /proc/self/status; ip addr 2>/dev/null; exit 75"
    )
    options = ("--volume", f"out={mine}:/out:rw", "--secret", "TOKEN", "-o", "json")
    with subprocess.Popen(
        command(tmp_path, script, *options, network="egress"),
        env={**os.environ, "TOKEN": "hunter2-hunter2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        node = node_of(mine)
        (mine / "go").touch()
        out, err = process.communicate(timeout=60)
    told = json.loads(out)
    assert process.returncode == 1
    assert (told["state"], told["exit_code"], told["error_class"]) == ("failed", 75, "temporary")
    assert f"{UID}\n***\n" in err
    assert "Read-only file system" in err
    assert "CapEff:\t0000000000000000" in err.replace(" ", "\t")
    assert "hunter2" not in out + err
    assert (mine / "made").stat().st_uid == UID
    assert listed("ps", "--all", "--quiet", "--filter", f"label={LABEL_NODE}={node}") == []
    assert listed("network", "ls", "--quiet", "--filter", f"label={LABEL_NODE}={node}") == []


def test_directory_of_root_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = subprocess.run(
        command(tmp_path, "true", "--volume", f"out={tmp_path / 'full'}:/out:rw"), capture_output=True, text=True
    )
    assert done.returncode == 4
    assert "a step never runs as root (give it away (chown" in done.stderr


def test_ctrl_c_cancels_the_step(tmp_path: Path) -> None:
    script = "trap 'echo stopping; touch /out/stopped; exit 3' TERM; echo ready; sleep 60 & wait"
    trying = subprocess.Popen(
        command(tmp_path, script, "--volume", f"out={tmp_path / 'out'}:/out:rw"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert trying.stderr is not None
    assert trying.stderr.readline() == "ready\n"
    began = time.monotonic()
    trying.send_signal(signal.SIGINT)
    _, said = trying.communicate(timeout=100)
    assert trying.returncode == 1
    assert "cancelling the step" in said
    assert "cancelled after" in said
    assert (tmp_path / "out" / "stopped").exists()
    assert time.monotonic() - began < 60


async def test_engine_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    runtime = DockerRuntime(str(tmp_path / "none.sock"))
    try:
        with pytest.raises(EngineUnavailable, match=r"none\.sock can't be reached"):
            async with trial(plugins=[], runtime=runtime):
                raise AssertionError("there is no engine to try anything on")
    finally:
        await runtime.aclose()
