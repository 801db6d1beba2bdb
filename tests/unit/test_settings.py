"""What is said about a configuration that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_core.config import AgentConfig
from outrider import settings
from outrider.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "node_id: is missing"),
        ("node_id: n1\nsever: a:1", "sever: there is no such setting (did you mean server?; from {file})"),
        ("node_id: [n1]", "node_id: should be text (from {file})"),
    ],
)
def test_the_sentence_is_for_who_wrote_the_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        settings.load(AgentConfig, env_prefix="X_", environ={}, file=file)
    assert said.format(file=file) in str(caught.value)
