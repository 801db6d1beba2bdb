"""The tree of commands: what `outrider --help` says, without importing any of them.

`outrider version` and `outrider --help` must start in a few times the start of a bare interpreter. That
leaves no room even for click, so this module and the two answers that it gives import nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

COMMANDS: dict[str, str] = {
    "dev": "Start server and agent in one process, for a first try and for tests.",
    "server": "The server: init, run, backup, restore, config, install.",
    "agent": "The agent of a node: run, status, doctor, config, install, plugins.",
    "node": "Nodes and their roles: add, list, show, drain, role, rm.",
    "pipeline": "Pipelines: validate, schema.",
    "run": "Run a pipeline on a node and follow it.",
    "runs": "Runs: list, show, cancel, retry, resolve.",
    "logs": "Logs of runs and containers.",
    "container": "Containers of nodes: list, inspect, start, stop, restart, rm.",
    "object": "Objects, their attributes and status: set, get, list, rm.",
    "env": "Env sets, kept encrypted on the server: set, list, rm.",
    "events": "Show what happens on the nodes.",
    "audit": "What operators decided: list, verify.",
    "images": "Images of step plugins: build, list, lock, save, load.",
    "plugin": "Step plugins: list, doctor; for their authors: new, resolve, try, schema.",
    "completion": "Print the script that completes commands in a shell.",
    "version": "Print the version.",
}
"""Name to help line, in the order of `--help`. Each command is `command` in the module of its name."""

OPTIONS: tuple[tuple[str, str], ...] = (
    ("--context NAME|FILE", "A context's name, or a context file instead of ~/.config/outrider/context.yaml"),
    ("", "[env: OUTRIDER_CONTEXT]"),
    ("--debug", "Show the traceback of an unexpected error  [env: OUTRIDER_DEBUG]"),
    ("--version", "Print the version."),
    ("-h, --help", "Show this message, or that of a command."),
)

EPILOG = """\
OUTRIDER_SERVER, OUTRIDER_CA, OUTRIDER_TOKEN and OUTRIDER_NODE win over what the context says.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 failed on some nodes, 4 invalid input, 5 timed out."""


def help_text() -> str:
    """What `outrider --help` prints."""
    return (
        "Usage: outrider [OPTIONS] COMMAND [ARGS]...\n\n"
        "  Outrider runs container pipelines on a fleet of nodes.\n\n"
        f"Options:\n{_columns(OPTIONS)}\n\nCommands:\n{_columns(COMMANDS.items())}\n\n{EPILOG}\n"
    )


def _columns(rows: Iterable[tuple[str, str]]) -> str:
    pairs = list(rows)
    width = max(len(left) for left, _ in pairs)
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in pairs)
