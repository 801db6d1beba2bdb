"""`python -m benchmarks [NAME …]`: measure and print the table."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

NAMES = ("runs", "startup", "rest", "reconnect")


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise SystemExit(f"error: no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    print(_machine(), end="\n\n")
    print("| what | against | measured | aim | medians |\n| --- | --- | --- | --- | --- |")
    for name in names or NAMES:
        for row in import_module(f"benchmarks.{name}").measure():
            print(f"| {row.name} | {row.against} | {row.figure} | {row.aim} | {row.detail} |", flush=True)


def _machine() -> str:
    engine = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"], stdout=subprocess.PIPE, text=True, check=True
    )
    return (
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"grpcio {version('grpcio')}, docker-py {version('docker')}, engine {engine.stdout.strip()}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
