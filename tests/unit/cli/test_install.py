"""The install commands: what they would do to a machine, and what they refuse.

Under a real systemd: tests/faults/test_service.py.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outrider import launcher
from outrider.cli import _install
from outrider.cli._install import Places, plan_agent, plan_server
from outrider.cli._machine import Plan, beneath, may_read, write_file
from outrider.cli._service import act_as_owner
from outrider.errors import Conflict, InvalidInput
from tests.unit.cli.conftest import OUTRIDER

ROOT = Path(__file__).resolve().parents[3]
COMMAND = Path("/usr/bin/env")  # a program that everybody may start
CA = "-----BEGIN CERTIFICATE-----\n"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    (tmp_path / "etc").mkdir()
    (tmp_path / "units").mkdir()
    return Places(tmp_path / "etc", tmp_path / "units", tmp_path / "lib", temporary=())


def agent(places: Places, token: str | None = "orn_1", ca: str | None = CA, **given: Any) -> Plan:
    return plan_agent({"server": None, "node_id": None, "labels": None} | given, token, ca, places, COMMAND)[0]


def files_of(plan: Plan) -> dict[str, str]:
    """File name to the content that would be written."""
    return {
        found[1]: change.content
        for change in plan.changes
        if (found := re.match(r"write \S*/(\S+) \(mode \d+\)", change.words))
    }


def settings_of(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.splitlines():
        if line[:1].isalpha():
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_units_in_deploy_are_those_that_are_installed() -> None:
    for name in (_install.AGENT, _install.SERVER):
        assert (ROOT / "deploy/systemd" / name).read_text() == _install.render(name, {})


def test_a_unit_keeps_the_promises_of_the_service() -> None:
    unit = settings_of(_install.render(_install.AGENT, {}))
    assert unit["Type"] == ["notify"]
    assert unit["KillMode"] == ["process"]
    assert unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert int(unit["WatchdogSec"][0]) > 0
    assert unit["LoadCredential"] == ["token:/etc/outrider/token"]
    assert "Requires" not in unit
    assert "RestrictSUIDSGID" not in unit  # shared volumes are set-group-id
    server = settings_of(_install.render(_install.SERVER, {}))
    assert server["User"] == ["outrider-server"]
    assert server["CapabilityBoundingSet"] == [""]
    assert server["StateDirectoryMode"] == ["0700"]


def test_an_agent_gets_its_settings_its_token_and_its_unit(places: Places) -> None:
    plan = agent(places, server="s.example:8443", node_id="n7", labels={"zone": "eu"})
    written = files_of(plan)
    assert set(written) == {"agent.yaml", "ca.pem", "token", "launcher.py", "outrider-agent.service"}
    assert written["token"] == ""  # never shown
    assert "server: s.example:8443\nnode_id: n7\n" in written["agent.yaml"]
    assert f"ca_file: {places.etc}/ca.pem" in written["agent.yaml"]
    unit = settings_of(written["outrider-agent.service"])
    (start,) = unit["ExecStart"]
    python, _, rest = start.partition(" ")
    assert Path(python).name.startswith("python3")
    assert rest == (
        f"-IS {places.lib}/launcher.py --environments /var/lib/outrider/environments --initial /usr/bin/env"
        f" -- agent run --config {places.etc}/agent.yaml"
    )
    assert written["launcher.py"] == Path(launcher.__file__).read_text()
    assert unit["LoadCredential"] == [f"token:{places.etc}/token"]
    assert plan.missing == []
    for change in plan.changes:
        change.do()
    assert (places.etc / "token").read_text() == "orn_1\n"
    assert (places.etc / "token").stat().st_mode & 0o777 == 0o600
    assert agent(places, server="s.example:8443", node_id="n7", labels={"zone": "eu"}).changes == []
    assert agent(places, None, None).changes == []
    assert [change.words for change in agent(places, "orn_2").changes] == [f"write {places.etc}/token (mode 0600)"]


def test_a_program_of_an_environment_is_not_what_the_launcher_falls_back_to(places: Places, tmp_path: Path) -> None:
    (places.etc / "agent.yaml").write_text(f"server: s:1\nnode_id: n1\nstate_dir: {tmp_path}/state\n")
    inside = tmp_path / "state/environments/game-1/bin/outrider"
    inside.parent.mkdir(parents=True)
    inside.touch()
    given = {"server": None, "node_id": None, "labels": None}
    with pytest.raises(Conflict, match="in an environment that the launcher keeps"):
        plan_agent(given, "orn_1", None, places, inside)
    for change in agent(places, ca=None).changes:
        change.do()
    assert plan_agent(given, None, None, places, inside)[0].changes == []


def test_a_file_that_is_open_to_others_is_closed(places: Places) -> None:
    (places.etc / "token").write_text("orn_1\n")
    (places.etc / "token").chmod(0o644)
    words = [change.words for change in agent(places, server="s:1").changes]
    assert f"write {places.etc}/token (mode 0600)" in words


def test_settings_of_a_person_are_not_overwritten(places: Places) -> None:
    (places.etc / "agent.yaml").write_text("server: mine:1\nnode_id: n1\nca_file: /etc/ssl/mine.pem\n")
    with pytest.raises(Conflict, match=r"agent.yaml is there and says otherwise: node_id is n1"):
        agent(places, server="mine:1", node_id="n2")
    written = files_of(agent(places, ca=None, server="mine:1"))
    assert set(written) == {"token", "launcher.py", "outrider-agent.service"}


def test_what_only_a_person_can_bring_is_named_and_nothing_is_started_without_it(places: Places) -> None:
    with pytest.raises(InvalidInput, match="say which server to dial"):
        agent(places)
    plan, unit = plan_agent({"server": "s:1", "node_id": "n7"}, None, None, places, COMMAND)
    assert "outrider node add n7" in plan.missing[0]
    assert str(places.etc / "token") in plan.missing[0]
    plan.service(unit, start=True)
    assert not [change for change in plan.changes if change.words.startswith("start")]


def test_a_unit_of_somebody_else_is_left_alone(places: Places) -> None:
    (places.units / "outrider-agent.service").write_text("[Service]\nExecStart=/opt/other\n")
    with pytest.raises(Conflict, match="was not written by this command"):
        agent(places, server="s:1")


def test_other_directories_are_opened_to_the_service(places: Places, tmp_path: Path) -> None:
    (places.etc / "agent.yaml").write_text(f"server: s:1\nnode_id: n1\nstate_dir: {tmp_path}/state\n")
    plan = agent(places, ca=None)
    unit = settings_of(files_of(plan)["outrider-agent.service"])
    assert unit["ReadWritePaths"] == [str(tmp_path / "state")]
    assert "StateDirectory" not in unit
    assert f"make {tmp_path}/state (mode 0711)" in [change.words for change in plan.changes]


def test_a_state_directory_among_temporary_files_is_refused(places: Places, tmp_path: Path) -> None:
    (places.etc / "agent.yaml").write_text(f"server: s:1\nnode_id: n1\nstate_dir: {tmp_path}/state\n")
    there = Places(places.etc, places.units, places.lib, temporary=(tmp_path / "state",))
    with pytest.raises(InvalidInput, match=r"state lies where other programs put what is temporary"):
        agent(there, ca=None)


def test_a_program_in_a_home_is_reached_and_that_is_said(places: Places) -> None:
    (places.etc / "agent.yaml").write_text("server: s:1\nnode_id: n1\npolicy_file: /home/me/policy.yaml\n")
    plan = agent(places, ca=None)
    assert settings_of(files_of(plan)["outrider-agent.service"])["ProtectHome"] == ["read-only"]
    assert any("/home/me/policy.yaml" in text or "in somebody's home" in text for text in plan.notes)


@pytest.mark.parametrize("name", ["my state", "50%", "$HOME", 'a"b', "ä"])
def test_a_path_that_systemd_would_read_otherwise_is_refused(places: Places, tmp_path: Path, name: str) -> None:
    (places.etc / "agent.yaml").write_text(f"server: s:1\nnode_id: n1\nstate_dir: '{tmp_path}/{name}'\n")
    with pytest.raises(InvalidInput, match="can't stand in a unit of systemd"):
        agent(places, ca=None)


def test_a_server_gets_a_user_and_waits_to_be_initialised(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_install, "_program", lambda command: [command])
    plan, _unit = plan_server(
        {"data_dir": tmp_path / "data", "listen": "0.0.0.0:443", "names": ("s.example",)}, places, COMMAND
    )
    words = [change.words for change in plan.changes]
    assert "make the system user outrider-server" in words
    assert f"make {tmp_path}/data (mode 0700)" in words
    assert words.index("make the system user outrider-server") < words.index(f"make {tmp_path}/data (mode 0700)")
    written = files_of(plan)
    assert "names:\n- s.example\n" in written["server.yaml"]
    unit = settings_of(written["outrider-server.service"])
    assert unit["AmbientCapabilities"] == ["CAP_NET_BIND_SERVICE"]
    assert unit["ReadWritePaths"] == [str(tmp_path / "data")]
    assert "PrivateUsers" not in unit
    assert "outrider server init" in plan.missing[0]


def test_a_key_that_the_servers_user_can_not_read_is_named(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_install, "_program", lambda command: [command])
    (tmp_path / "key.pem").touch(0o600)
    (places.etc / "server.yaml").write_text(
        f"data_dir: {tmp_path}/data\ntls_cert_file: {COMMAND}\ntls_key_file: {tmp_path}/key.pem\n"
    )
    with pytest.raises(InvalidInput, match=r"outrider-server, which can't read \S*key.pem"):
        plan_server({}, places, COMMAND)


def test_who_may_read_what_is_told_from_modes(tmp_path: Path) -> None:
    assert may_read(Path("/usr/bin/env"), "nobody")
    assert may_read(tmp_path / "not-there", "root")
    (tmp_path / "secret").touch(0o600)
    assert not may_read(tmp_path / "secret", "nobody")
    assert not may_read(tmp_path / "secret", "no-such-user")


def test_links_do_not_hide_where_a_file_lies(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    assert beneath(tmp_path / "link" / "x", [tmp_path / "home"])
    assert beneath(tmp_path / "home", [tmp_path / "home"])
    assert not beneath(tmp_path / "homes", [tmp_path / "home"])


def test_a_secret_is_never_open_to_others_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    seen: list[int] = []
    real: Callable[..., int] = os.open
    before = os.umask(0)
    try:
        os.open = lambda *args, **kwargs: seen.append(args[2]) or real(*args, **kwargs)  # type: ignore[func-returns-value]
        write_file(path, "new", 0o600)
    finally:
        os.open = real
        os.umask(before)
    assert seen == [0o600]
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["token"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("oro_abc\n", "an operator's token"), ("", "holds no token"), ("two words\n", "holds no token")],
)
def test_what_can_not_be_a_nodes_token_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(InvalidInput, match=says):
        _install.read_secret(tmp_path / "token")


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("orn_secret\n")
    command = [OUTRIDER, "agent", "install", "--dry-run", "--token-file", tmp_path / "token"]
    command += ["--command", COMMAND, "--server", "s.example:8443", "--node-id", "n7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if beneath(OUTRIDER, _install.HIDDEN_BY_TMP):  # a checkout that no service could see
        assert "lies where other programs put what is temporary" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "would write /etc/systemd/system/outrider-agent.service" in done.stdout
    assert "--initial /usr/bin/env -- agent run\n" in done.stdout
    assert "would start outrider-agent.service" in done.stdout
    assert "orn_secret" not in done.stdout + done.stderr
    assert not Path("/etc/systemd/system/outrider-agent.service").exists()


@pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="this machine is run by systemd")
def test_a_machine_without_systemd_is_told_what_to_do_instead() -> None:
    done = subprocess.run([OUTRIDER, "agent", "install", "--server", "s:1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "this machine is not run by systemd" in done.stderr
    assert "outrider agent run" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody else")
def test_what_root_does_in_a_servers_directory_belongs_to_the_servers_user(tmp_path: Path) -> None:
    owner = pwd.getpwnam("nobody")
    data = tmp_path / "data"
    data.mkdir()
    os.chown(data, owner.pw_uid, owner.pw_gid)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o001)  # pytest's directories are its user's alone
    with act_as_owner(data):
        (data / "store.db").touch()
        assert os.geteuid() == owner.pw_uid
    assert os.geteuid() == 0
    assert ((data / "store.db").stat().st_uid, (data / "store.db").stat().st_gid) == (owner.pw_uid, owner.pw_gid)
    with act_as_owner(tmp_path / "not-there"):
        assert os.geteuid() == 0
