"""Python packages for the images: locked, fetched and unpacked outside of the image build."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from outrider.cli.imagebuild.shell import BuildError, Progress, run

PYTHONS = ("3.11", "3.12")
"""The Pythons that a base image can have: Debian 12's, and that of python:3.12-slim. A lock serves both."""
QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "PIP_NO_INPUT": "1"}


def install(
    lock: Path, into: Path, wheelhouse: Path, python: Mapping[str, str], tools: Path, progress: Progress
) -> None:
    """Unpack the packages of ``lock`` into ``into`` for the ``python`` of the base image (see engine.python_of).

    Every file is checked against the lock's hashes. What is in ``wheelhouse`` already is not fetched again, so a
    second build needs no package index.
    """
    wheelhouse.mkdir(parents=True, exist_ok=True)
    pip = _pip(tools, progress)
    chosen = [*_target(python), "--no-deps", "--require-hashes", "--requirement", str(lock)]
    unpack = [*pip, "install", *chosen, "--no-index", "--find-links", str(wheelhouse), "--no-compile"]
    unpack += ["--target", str(into)]
    try:
        run(unpack, what=f"unpacking the packages of {lock}", env=QUIET)
    except BuildError:
        shutil.rmtree(into, ignore_errors=True)
        run(
            [*pip, "download", *chosen, "--dest", str(wheelhouse)],
            what=f"fetching the packages of {lock}",
            on_line=progress.note,
            env=QUIET,
        )
        run(unpack, what=f"unpacking the packages of {lock}", env=QUIET)
    shutil.rmtree(into / "bin", ignore_errors=True)  # commands for a person, with this machine's Python in them


def lock(source: Path, target: Path, *, upgrade: bool) -> None:
    """Resolve ``source`` (requirements.in) into ``target`` with the hash of every file that any machine could need.

    Resolved for each of PYTHONS; a lock that would differ between them is refused, so that one file serves both bases.
    """
    uv = [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") else [shutil.which("uv") or ""]
    if not uv[0]:
        raise BuildError("locks are made with uv, which is not installed: pip install uv")
    results: dict[str, str] = {}
    for python in PYTHONS:
        output = target.with_name(f".{target.name}.{python}")
        try:
            if target.exists() and not upgrade:
                shutil.copyfile(target, output)  # what is locked stays, unless it has to move
            options = ["--python-version", python, "--python-platform", "linux", "--only-binary", ":all:"]
            options += ["--generate-hashes", "--no-header", "--no-annotate", "--no-config"]
            options += ["--no-emit-index-url", "--no-emit-find-links"]
            run(
                [*uv, "pip", "compile", source.name, "--output-file", output.name, *options],
                what=f"locking {source} for Python {python}",
                cwd=str(source.parent),
            )
            results[python] = output.read_text()
        finally:
            output.unlink(missing_ok=True)
    if len(set(results.values())) != 1:
        raise BuildError(
            f"{source} resolves to other packages on Python {' than on '.join(PYTHONS)}: choose versions for both"
        )
    header = f"# Made from {source.name} by: outrider images lock. Change that file, not this one.\n"
    target.write_text(header + results[PYTHONS[0]])


def _target(python: Mapping[str, str]) -> list[str]:
    machine = python["machine"]
    minor = int(python["libc"].partition(".")[2] or 17)
    # A wheel for an older C library runs on a newer one; pip has to be told each by name.
    platforms = [f"manylinux_2_{number}_{machine}" for number in range(minor, 4, -1)]
    platforms += [f"manylinux{year}_{machine}" for year in ("2014", "2010", "1")]
    options = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python["version"]]
    for platform in platforms:
        options += ["--platform", platform]
    return options


def _pip(tools: Path, progress: Progress) -> list[str]:
    """pip's command: that of this Python, else one in a virtual environment of our own beneath ``tools``."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    python = tools / "bin" / "python"
    if not (tools / "bin" / "pip").exists():
        progress.note("making a virtual environment for pip")
        try:
            run([sys.executable, "-m", "venv", "--clear", str(tools)], what="making a virtual environment for pip")
        except BuildError as error:
            raise BuildError(
                f"pip is needed and this Python has none (on Debian: apt install python3-venv): {error}"
            ) from error
    return [str(python), "-m", "pip"]
