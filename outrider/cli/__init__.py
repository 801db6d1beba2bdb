"""The `outrider` command."""

from __future__ import annotations

import os
import sys

from outrider.cli._tree import help_text


def main() -> int:
    """Run the command line of this process; gives the exit code.

    The two answers that need nothing are given before anything is imported.
    """
    arguments = sys.argv[1:]
    if arguments in (["version"], ["--version"]):
        from outrider import __version__

        sys.stdout.write(f"outrider {__version__}\n")
        return 0
    if arguments in ([], ["--help"], ["-h"], ["help"]) and not _completing():
        sys.stdout.write(help_text())
        return 0
    # Pydantic would read the entry points of every distribution for plugins of its own, and one whose metadata is
    # damaged would stop it, and us.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        from outrider.cli._main import run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        # The base of the distribution is for step authors, and light.
        sys.stderr.write("error: the command line is not installed (pip install 'outrider[cli]')\n")
        return 1
    return run(arguments)


def _completing() -> bool:
    # A shell that asks for completions calls the program with this variable set and without arguments.
    return "_OUTRIDER_COMPLETE" in os.environ
