"""scripts/engine.sh: starts an engine where there is none, and never touches one that it did not start.

In namespaces of its own (no engine's socket, no other processes), so that the machine's engine is out of reach.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "engine.sh"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("dockerd") is None or Path("/run/systemd/system").exists(),
    reason="needs root, an installed dockerd and no systemd, whose service the script would start",
)


def alone(tmp_path: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """Run ``commands`` as on a machine without a running engine; ``$engine`` is the script."""
    setup = f"mount -t tmpfs tmpfs /run; ip link set lo up; engine={SCRIPT}\n"
    return subprocess.run(
        ["unshare", "-m", "-p", "-n", "--fork", "--kill-child", "--mount-proc", "bash", "-c", setup + commands],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OUTRIDER_ENGINE_DIR": str(tmp_path / "engine"), "DOCKER_HOST": ""},
    )


def test_starts_finds_and_stops_its_own_engine(tmp_path: Path) -> None:
    ended = alone(
        tmp_path,
        """
        unset DOCKER_HOST
        $engine status; echo "before: $?"
        $engine start && docker info --format 'root {{.DockerRootDir}}'
        $engine start; echo "again: $?"
        $engine status
        $engine stop; echo "stopped: $?"
        docker version >/dev/null 2>&1; echo "answers: $?"
        $engine stop; echo "twice: $?"
        """,
    )
    out = ended.stdout.splitlines()
    assert out[:2] == ["no engine answers", "before: 1"], ended.stderr
    assert out[2:4] == [f"root {tmp_path}/engine/data", "again: 0"], ended.stderr
    assert "started by engine.sh (dockerd)" in out[4]
    assert out[5:] == ["stopped: 0", "answers: 1", "twice: 0"]
    assert "nothing to do" in ended.stderr


def test_what_is_run_with_an_engine_of_its_own_takes_it_along_when_the_last_has_ended(tmp_path: Path) -> None:
    ended = alone(
        tmp_path,
        """
        unset DOCKER_HOST
        answers() { docker version >/dev/null 2>&1; echo "$1: $?"; }
        $engine run bash -c 'touch "$OUTRIDER_ENGINE_DIR/there"; sleep 1.5; exit 3' & first=$!
        until [ -e "$OUTRIDER_ENGINE_DIR/there" ]; do sleep 0.05; done
        $engine run sleep 3 & second=$!
        wait $first; echo "first: $?"
        answers 'beside another'
        wait $second; echo "second: $?"
        answers after
        """,
    )
    said = ended.stdout.splitlines()
    assert said == ["first: 3", "beside another: 0", "second: 0", "after: 1"], ended.stderr


def test_an_engine_that_is_to_stay_outlives_what_is_run_with_it(tmp_path: Path) -> None:
    ended = alone(
        tmp_path,
        """
        unset DOCKER_HOST
        answers() { docker version >/dev/null 2>&1; echo "$1: $?"; }
        $engine run $engine start; answers 'asked for meanwhile'
        $engine run true; answers 'was there before'
        $engine stop; answers stopped
        """,
    )
    said = ended.stdout.splitlines()
    assert said == ["asked for meanwhile: 0", "was there before: 0", "stopped: 1"], ended.stderr


@pytest.mark.skipif(shutil.which("crun") is None, reason="crun comes with the engine that the script installs")
def test_its_engine_offers_a_crun_that_works_and_one_that_is_configured_keeps_its_runtimes(tmp_path: Path) -> None:
    configured = tmp_path / "etc"
    configured.mkdir()
    (configured / "daemon.json").write_text('{"runtimes": {"other": {"path": "/usr/bin/other"}}}')
    ended = alone(
        tmp_path,
        f"""
        unset DOCKER_HOST
        show() {{ docker info --format '{{{{range $name, $_ := .Runtimes}}}}{{{{$name}}}} {{{{end}}}}'; }}
        $engine start && show && $engine stop
        mkdir -p /etc/docker && mount --bind {configured} /etc/docker
        $engine start && show && $engine stop
        """,
    )
    first, second = (line.split() for line in ended.stdout.splitlines())
    assert ("crun" in first, "other" in first) == (True, False), ended.stderr
    assert ("crun" in second, "other" in second) == (False, True), ended.stderr


def test_a_missing_packet_filter_is_told_where_it_can_not_be_installed(tmp_path: Path) -> None:
    hide = 'for each in $(type -ap nft apt-get | xargs realpath | sort -u); do mount --bind /dev/null "$each"; done\n'
    ended = alone(tmp_path, hide + "unset DOCKER_HOST; $engine start && $engine stop; echo $?")
    assert ended.stdout == "0\n", ended.stderr
    assert "nft is missing: install nftables" in ended.stderr


def test_leaves_a_strangers_engine_alone(tmp_path: Path) -> None:
    ended = alone(
        tmp_path,
        f"""
        unset DOCKER_HOST
        dockerd --data-root {tmp_path}/other --exec-root /run/other >/dev/null 2>&1 & other=$!
        until grep -qsx dockerd /proc/$other/comm; do sleep 0.01; done  # it is a copy of this shell at first
        $engine start; echo "start: $?"
        $engine stop; echo "stop: $?"
        docker info --format 'root {{{{.DockerRootDir}}}}'
        kill $other; wait $other
        """,
    )
    assert ended.stdout.splitlines() == ["start: 0", "stop: 0", f"root {tmp_path}/other"], ended.stderr
    assert "no engine was started from here" in ended.stderr


def test_engine_elsewhere_is_not_replaced_by_one_here(tmp_path: Path) -> None:
    ended = alone(tmp_path, "export DOCKER_HOST=tcp://192.0.2.1:2375; $engine start; echo $?")
    assert ended.stdout == "1\n"
    assert "DOCKER_HOST is tcp://192.0.2.1:2375, and no engine answers there" in ended.stderr


def test_engine_that_does_not_come_up_shows_its_log(tmp_path: Path) -> None:
    # Nothing can be made below a file: the engine ends at once.
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "data").touch()
    ended = alone(tmp_path, "unset DOCKER_HOST; $engine start; echo $?")
    assert ended.stdout == "1\n"
    assert "dockerd did not come up" in ended.stderr
