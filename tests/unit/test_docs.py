"""The documents name things that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from agent_core.agent import _EVENTS
from agent_core.diskwatch import Level
from outrider.pipeline import load_pipeline
from server_core.store.events import OWN

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *ROOT.glob("plugins/*/README.md"),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)")
FENCE = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not broken


def test_the_architecture_page_names_files_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"\b((?:agent_core|server_core|outrider|tests)/[\w/]+\.(?:py|proto))\b", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_event_is_explained_and_no_node_can_forge_one_of_the_servers() -> None:
    of_the_server = _strings(r"events\.add\([^\"]*\"([a-z_]+\.[a-z_]+)\"", "server_core")
    of_the_server |= _strings(r"\"(node\.(?:online|offline|draining|drain_ended))\"", "server_core")
    of_agents = _strings(r"(?:emit|\.event)\(\s*f?\"([a-z_]+\.[a-z_]+)\"", "agent_core")
    of_agents |= {f"disk.{level}" for level in get_args(Level)} | set(_EVENTS.values())
    text = (ROOT / "docs/operations.md").read_text()
    rows = re.findall(r"^\| (`[a-z_.`, ]+`) \|", text[text.index("| event | it says |") :].partition("\n\n")[0], re.M)
    explained = set(re.findall(r"`([a-z_.]+)`", " ".join(rows)))
    assert explained == of_the_server | of_agents
    assert of_the_server == OWN


def _strings(pattern: str, package: str) -> set[str]:
    return {found for file in (ROOT / package).rglob("*.py") for found in re.findall(pattern, file.read_text())}


@pytest.mark.parametrize("page", ["README.md"])
def test_pipelines_in_the_documents_are_valid(page: str) -> None:
    pipelines = [text for text in FENCE.findall((ROOT / page).read_text()) if text.startswith("name:")]
    assert pipelines
    for text in pipelines:
        load_pipeline(text)


@pytest.mark.parametrize("plugin", sorted(path.parent.name for path in ROOT.glob("plugins/*/README.md")))
def test_snippets_of_the_plugins_can_be_pasted_into_a_pipeline(plugin: str) -> None:
    snippets = FENCE.findall((ROOT / "plugins" / plugin / "README.md").read_text())
    assert snippets
    for text in snippets:
        rest = text if text.startswith(("envs:", "steps:")) else "steps:\n" + text
        volumes = "".join(f"  {name}: {{}}\n" for name in sorted(set(re.findall(r'(\w+): "?/\w+(?::rw)?"?[,}]', text))))
        args = "".join(f"  {name}: {{}}\n" for name in sorted(set(re.findall(r"\bargs\.(\w+)", text))))
        load_pipeline("name: pasted\n" + (f"args:\n{args}" if args else "") + f"volumes:\n{volumes}" + rest)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda file: file.name)
def test_example_pipelines_are_valid(file: Path) -> None:
    load_pipeline(file.read_text())
