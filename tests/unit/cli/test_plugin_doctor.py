"""`outrider plugin list` and `doctor` as processes, with broken plugins installed beside ours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent_core.config import AgentConfig, PluginSettings
from agent_core.plugins import PluginHost
from outrider.plugin_probe import probe
from outrider.steps import CONTRACT
from tests.plugin_fixtures import install
from tests.unit.cli.conftest import OUTRIDER

BROKEN = ("import-error", "exits", "bad-signature", "misspelt-hook", "contract-newer", "hook-raises", "failing-hooks")


def outrider(site: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site), "OUTRIDER_AGENT_CONFIG": "", **environ}
    return subprocess.run([OUTRIDER, *arguments], capture_output=True, text=True, env=env, timeout=300, check=False)


def test_list_says_what_is_broken_why_and_how_to_mend_it(tmp_path: Path) -> None:
    site = install(tmp_path, "good", "prints", *BROKEN)
    done = outrider(site, "plugin", "list")
    assert done.returncode == 1
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[1:]}
    assert rows["good"][1:] == ["outrider-fixture-good", "1.0", "ok", "good.step"]
    assert rows["prints"][3:] == ["ok", "prints.step"]
    for name in set(BROKEN) - {"failing-hooks"}:
        assert rows[name][1:] == [f"outrider-fixture-{name}", "1.0", "error"]
    said = done.stderr.splitlines()
    at = said.index("misspelt-hook: plugin 'misspelt-hook' implements outrider_step_type, and there is no such hook")
    assert said[at + 1] == "  to mend it: did you mean outrider_step_types?"
    assert "Traceback" not in done.stderr


def test_list_notes_what_an_agent_would_note_of_plugins_that_work(tmp_path: Path) -> None:
    site = install(tmp_path, "late-import", "failing-hooks")
    chosen = ["--plugin", "late-import", "--plugin", "failing-hooks", "--limit", "3"]
    done = outrider(site, "plugin", "list", *chosen)
    assert done.returncode == 0, done.stderr
    assert {line.split()[3] for line in done.stdout.splitlines() if "-fixture-" in line} == {"ok"}
    noted = dict(line.split(": ", 1) for line in done.stderr.splitlines())
    assert "s to import; let it import what is heavy where it is used" in noted["late-import"]
    assert "its facts are no JSON object" in noted["failing-hooks"]


def test_doctor_looks_closer_and_survives_what_ends_a_process(tmp_path: Path) -> None:
    site = install(tmp_path, "good", "ends-process", "damaged-entry-points", "failing-hooks")
    metadata = site / "outrider_fixture_good-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "Requires-Dist: pydantic>=99\nRequires-Dist: not-on-this-machine\n")
    chosen = [word for name in ("good", "ends-process", "failing-hooks") for word in ("--plugin", name)]
    done = outrider(site, "plugin", "doctor", "-o", "json", *chosen)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["ok"], found["contract"]) == (False, CONTRACT)
    plugins: dict[str, Any] = {each["name"] or each["distribution"]: each for each in found["plugins"]}
    assert plugins["s3"]["state"] == "disabled"
    assert plugins["good"]["state"] == "ok"
    assert [note.partition(", ")[0] for note in plugins["good"]["notes"]] == [
        "outrider-fixture-good needs pydantic>=99",
        "outrider-fixture-good needs not-on-this-machine",
    ]
    assert plugins["ends-process"]["error"].startswith("plugin 'ends-process' ends the process with exit code 7")
    assert "disabled_plugins: [ends-process]" in plugins["ends-process"]["fix"]
    assert plugins["outrider_fixture_torn-1.0"]["fix"] == "install it anew, or remove that directory"
    assert "no JSON object" in plugins["failing-hooks"]["error"]


def test_what_the_settings_leave_out_is_not_imported(tmp_path: Path) -> None:
    site = install(tmp_path, "good", "ends-process")
    config = tmp_path / "agent.yaml"
    config.write_text("node_id: n7\ndisabled_plugins: [ends-process]\n")
    done = outrider(site, "plugin", "doctor", "--config", str(config), "-o", "json")
    assert done.returncode == 0, done.stderr
    plugins = {each["name"]: each for each in json.loads(done.stdout)["plugins"]}
    assert (plugins["good"]["state"], plugins["ends-process"]["state"]) == ("ok", "disabled")
    for ours in ("s3", "http", "archive", "container"):
        assert (plugins[ours]["state"], plugins[ours]["contract"], plugins[ours]["notes"]) == ("ok", ">=1,<2", [])
    done = outrider(site, "plugin", "list", "--plugin", "good", OUTRIDER_AGENT_CONFIG=str(config))
    assert done.returncode == 0, done.stderr
    assert "ends-process: it is named in `disabled_plugins`" in done.stderr
    assert "s3: `plugins` does not name it" in done.stderr


def test_the_agent_takes_the_same_choice(tmp_path: Path) -> None:
    arguments = ("agent", "config", "--node-id", "n7", "--plugin", "s3", "--plugin", "http", "--disable-plugin", "http")
    done = outrider(tmp_path, *arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)
    assert settings["plugins"] == {"value": ["s3", "http"], "from": "flag"}
    assert settings["disabled_plugins"] == {"value": ["http"], "from": "flag"}


def test_who_looks_at_plugins_knows_the_agents_settings_of_them() -> None:
    for name, field in PluginSettings.model_fields.items():
        theirs = AgentConfig.model_fields[name]
        assert (field.annotation, field.get_default(call_default_factory=True)) == (
            theirs.annotation,
            theirs.get_default(call_default_factory=True),
        )


def test_an_agent_that_a_plugin_ended_comes_back_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = install(tmp_path / "site", "good", "ends-process")
    state = tmp_path / "state"
    state.mkdir()
    load = (
        "import sys; from pathlib import Path; from agent_core.plugins import PluginHost\n"
        f"host = PluginHost.load_surviving(Path({str(state)!r}), ['good', 'ends-process'], [], limit_s=30)\n"
        "print({each.name: (each.state, each.error) for each in host.plugins if each.state != 'disabled'})\n"
        "sys.exit('good.step' not in host.step_types)"
    )

    def start() -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(site)}
        python = str(OUTRIDER.with_name("python"))
        return subprocess.run([python, "-c", load], capture_output=True, text=True, env=env, timeout=300, check=False)

    assert start().returncode == 7
    for _ in range(2):
        again = start()
        assert again.returncode == 0, again.stderr
        assert "'good': ('ok', '')" in again.stdout
        assert "plugin 'ends-process' ends the process with exit code 7" in again.stdout
    (site / "outrider_fixture_ends_process.py").write_text((site / "outrider_fixture_good.py").read_text())
    start()
    assert not (state / "plugins.loading").exists(), "it is mended"


def test_an_agent_that_was_killed_while_it_loaded_loses_no_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install(tmp_path / "site", "good")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    (tmp_path / "plugins.loading").touch()
    host = PluginHost.load_surviving(tmp_path, ["good"], [], limit_s=30)
    assert list(host.step_types) == ["good.step"]
    assert not (tmp_path / "plugins.loading").exists()


def test_of_one_step_type_it_does_not_matter_how_other_plugins_are(tmp_path: Path) -> None:
    site = install(tmp_path, "good", "prints", "ends-process", "hanging-import")
    done = outrider(site, "plugin", "schema", "good.step")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["title"] == "Params"
    done = outrider(site, "plugin", "resolve", "prints.step", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["image"] == "fixture/none:1"
    assert "hello from a plugin" in done.stderr


def test_where_nobody_can_be_named_the_others_are_looked_at_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install(tmp_path, "failing-hooks", "good")
    module = site / "outrider_fixture_failing_hooks.py"
    module.write_text(module.read_text().replace('return {"gpu": object()}', "import os; os.kill(os.getpid(), 9)"))
    monkeypatch.syspath_prepend(site)
    found = probe(["good", "failing-hooks"], facts=True)
    states = {report.name: report.state for report in found.plugins if report.state != "disabled"}
    assert states == {"good": "ok", "failing-hooks": "ok", "": "error"}
    assert found.plugins[-1].error == (
        "one of the step plugins ends the process with SIGKILL when they are asked for facts of this node"
    )
    assert [each["name"] for each in found.step_types] == ["good.step"]
