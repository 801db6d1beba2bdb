"""Environments for the agent: what is made, what is refused, what is kept; with programs that answer as told."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outrider import launcher
from outrider.cli import _environments
from outrider.cli._agent_plugins import plugins
from outrider.cli._environments import Environments, Source, Wanted, base_python
from outrider.errors import Conflict, InvalidInput, Unavailable
from outrider.roles import Role
from tests.wheels import lock_of, write_wheel

HASH = "--hash=sha256:" + "ab" * 32
ROLE = Role(name="game", agent=">=0.1", plugins={"outrider-step-s3": ">=0.1"})
LOCK = f"outrider==0.1.0 {HASH}\noutrider-step-s3==0.1.0 {HASH}\n"
S3 = {"distribution": "outrider-step-s3", "version": "0.1.0", "ok": True, "state": "ok", "error": "", "notes": []}
BROKEN = {"ok": False, "state": "error", "error": "no module x"}
DISABLED = {"ok": False, "state": "disabled", "notes": ["it is named in `disabled_plugins`", "it needs y"]}


def wanted(version: int = 1, lock: str = LOCK) -> Wanted:
    return Wanted(ROLE, version, lock, base_python())


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environments:
    """With an installer that puts in programs which say that all is well, or what `doctor.json` beside them says."""

    def install(target: Path, _lock: Path, _python: Path, _source: Source) -> None:
        (target / "bin").mkdir()
        well = json.dumps({"outrider": "0.1.0", "plugins": [S3]})
        told = tmp_path / "doctor.json"
        (target / "doctor.json").write_text(told.read_text() if told.exists() else well)
        plugin = f'plugin) echo "$@" > {tmp_path}/asked; cat {target}/doctor.json;;'
        program = f'#!/bin/sh\ncase "$1" in {plugin} agent) {tmp_path}/config "$@";; esac\n'
        for name, text in (("outrider", program), ("python", "#!/bin/sh\necho 11\n")):
            (target / "bin" / name).write_text(text)
            (target / "bin" / name).chmod(0o755)

    config = tmp_path / "config"
    config.write_text("#!/bin/sh\nexit 0\n")
    config.chmod(0o755)
    monkeypatch.setattr(_environments, "_install", install)
    (tmp_path / "environments").mkdir()
    environ, config = {"PATH": "/usr/bin:/bin"}, tmp_path / "agent.yaml"
    return Environments(tmp_path / "environments", ["--node-id", "n1"], environ, lambda _text: None, config)


def make(environments: Environments, *given: Any) -> str:
    with environments.held():
        return environments.make(wanted(*given), Source())


def test_what_is_made_says_what_it_is_and_is_not_made_twice(made: Environments) -> None:
    name = make(made)
    about = made.about(name)
    assert name.startswith("game-")
    assert about["packages"] == {"outrider": "0.1.0", "outrider-step-s3": "0.1.0"}
    assert (about["role"], about["role_version"], about["journal_form"]) == ("game", 1, 11)
    before = (made.home / name).stat().st_ino
    assert make(made) == name
    assert (made.home / name).stat().st_ino == before
    assert make(made, 2) == name  # nothing of what it is made of has changed
    assert make(made, 2, LOCK + f"x==1 {HASH}\n") != name


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"outrider": "0.1.0", "plugins": []}, "outrider-step-s3 is missing (wanted: >=0.1)"),
        ({"outrider": "0.0.9", "plugins": [S3]}, "outrider is 0.0.9 (wanted: >=0.1)"),
        ({"outrider": "0.1.0", "plugins": [S3 | BROKEN]}, "s3 0.1.0 can't be used: no module x"),
        ({"outrider": "0.1.0", "plugins": [S3 | BROKEN, S3]}, "s3 0.1.0 can't be used: no module x"),
        ({"outrider": "0.1.0", "plugins": [S3 | DISABLED]}, "is there and disabled (it is named in `dis"),
        (
            {"outrider": "0.1.0", "plugins": [S3, S3 | BROKEN | {"distribution": "torn-1.0", "version": ""}]},
            "torn-1-0 can't be used: no module x",
        ),
        (
            {"outrider": "0.1.0", "plugins": [S3, S3 | BROKEN | {"distribution": "", "version": ""}]},
            "is not well: no module x",
        ),
        (
            {"outrider": "0.1.0", "plugins": [S3 | {"version": "0.2"}]},
            "s3 is 0.2, and the lock has 0.1.0",
        ),
        ({"plugins": [S3]}, "can't be checked"),
        ([], "can't be checked"),
    ],
)
def test_one_that_is_not_well_is_refused_and_leaves_nothing_behind(made: Environments, told: Any, said: str) -> None:
    (made.home.parent / "doctor.json").write_text(json.dumps(told))
    with pytest.raises(InvalidInput) as caught:
        make(made)
    assert said in str(caught.value)
    assert [each.name for each in made.home.iterdir()] == ["sync.lock"]


def test_its_plugins_are_looked_at_with_the_agents_own_settings(made: Environments) -> None:
    make(made)
    asked = (made.home.parent / "asked").read_text().split()
    assert asked == ["plugin", "doctor", "-o", "json", "--config", str(made.home.parent / "agent.yaml")]


def test_settings_that_it_does_not_take_are_found_before_the_agent_is_restarted(made: Environments) -> None:
    (made.home.parent / "config").write_text('#!/bin/sh\necho "error: no setting $*" >&2\nexit 4\n')
    with pytest.raises(InvalidInput, match=r"settings are not right for it: error: no setting agent config .* n1"):
        make(made)


def test_what_an_installer_that_was_killed_left_is_made_anew(made: Environments) -> None:
    half = made.home / wanted().name
    (half / "bin").mkdir(parents=True)
    (half / ".being-made").touch()
    name = make(made)
    assert half.name == name
    assert made.about(name)


def test_only_what_nobody_needs_is_removed(made: Environments) -> None:
    names = [make(made, 1, LOCK + f"x=={number} {HASH}\n") for number in range(5)]
    (made.home / "of-somebody").mkdir()
    launcher.write_json(
        made.home / launcher.STATE, {"current": names[0], "former": names[1], "trial": {"environment": names[2]}}
    )
    launcher.write_json(made.home / launcher.WANTED, {"environment": names[3], "request": "r"})
    (made.home / launcher.LINK).symlink_to(names[0])
    with made.held():
        assert made.prune() == [names[4]]
    assert (made.home / "of-somebody").is_dir()
    assert (made.home / launcher.LINK / launcher.ABOUT).is_file()


def test_two_can_not_make_environments_at_once(made: Environments) -> None:
    with made.held(), pytest.raises(Conflict, match="somebody else makes environments"), made.held():
        pass
    with made.held():
        pass


def test_without_a_launcher_the_next_start_tries_it(made: Environments) -> None:
    name = make(made)
    assert not made.switch(name)
    assert launcher.read_json(made.home / launcher.WANTED)["environment"] == name


def test_going_back_while_an_environment_is_on_trial_is_to_the_current_one(made: Environments) -> None:
    launcher.write_json(made.home / launcher.STATE, {"current": "b", "former": "a", "trial": {"environment": "c"}})
    given = ["--node-id", "n1", "--state-dir", str(made.home.parent), "-o", "json"]
    done = CliRunner().invoke(plugins, ["back", *given], catch_exceptions=False)
    assert json.loads(done.stdout) == {"environment": "b", "current": False}
    assert launcher.read_json(made.home / launcher.WANTED)["environment"] == "b"


@pytest.mark.parametrize("tool", [pytest.param("pip", marks=pytest.mark.long), "uv"])
def test_exactly_the_locked_files_are_installed_from_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    if tool == "pip":
        monkeypatch.setattr(_environments, "_uv", list)
    elif shutil.which("uv") is None and not Path(sys.executable).with_name("uv").exists():
        pytest.skip("uv is not installed")
    wheel = write_wheel(tmp_path, "good", "1.0", {"good.py": "X = 1\n"})
    good, lock = wheel.read_bytes(), tmp_path / "lock"
    lock.write_text(lock_of(wheel))
    write_wheel(tmp_path, "good", "1.0", {"good.py": "X = 'evil'\n"})
    for name in ("evil", "env"):
        (tmp_path / name).mkdir()
    with pytest.raises(Unavailable, match="can't be installed"):
        _environments._install(tmp_path / "evil", lock, base_python(), Source(tmp_path))
    wheel.write_bytes(good)
    _environments._install(tmp_path / "env", lock, base_python(), Source(tmp_path))
    (module,) = (tmp_path / "env").glob("lib/python*/site-packages/good.py")
    assert module.read_text() == "X = 1\n"
