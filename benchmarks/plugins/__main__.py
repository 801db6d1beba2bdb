"""`python -m benchmarks.plugins [NAME …]`: measure and print the table."""

from __future__ import annotations

import os
import platform
import sys
from importlib import import_module
from importlib.util import find_spec

from benchmarks.plugins._rig import HEADER

NAMES = ("s3", "http", "archive")


def main(names: list[str]) -> None:
    here = [name for name in NAMES if find_spec(f"benchmarks.plugins.{name}")]
    unknown = [name for name in names if name not in here]
    if unknown:
        raise SystemExit(f"error: no benchmark {', '.join(unknown)}; there are {', '.join(here)}")
    chosen = [import_module(f"benchmarks.plugins.{name}") for name in names or here]
    print(_machine())
    print("; ".join(version for module in chosen for version in module.versions()), end="\n\n")
    print(HEADER)
    for module in chosen:
        for row in module.measure():
            print(row.line(), flush=True)


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"


if __name__ == "__main__":
    main(sys.argv[1:])
