"""Which virtual environment this agent runs in, as far as a launcher keeps them (see `outrider.launcher`)."""

from __future__ import annotations

import sys
from pathlib import Path

from outrider import launcher
from outrider.v1 import types_pb2 as types

DIRECTORY = "environments"
"""Below the state directory."""


def environment(state_dir: Path) -> types.Environment | None:
    """What the server is told; None for an agent that no launcher has started. Read anew each time."""
    home = state_dir / DIRECTORY
    if not launcher.running(home):
        return None
    here = Path(sys.prefix).resolve()
    name = here.name if here.parent == home.resolve() else ""
    about = launcher.read_json(home / name / launcher.ABOUT) if name else {}
    refused = launcher.read_json(home / launcher.STATE).get("refused")
    refused = refused if isinstance(refused, dict) else {}
    return types.Environment(
        name=name,
        role=str(about.get("role", "")),
        role_version=int(about.get("role_version", 0)),
        lock_sha256=bytes.fromhex(about.get("lock_sha256", "")),
        refused=str(refused.get("environment", "")),
        refused_reason=str(refused.get("reason", "")),
    )
