"""Debian packages of a step's image: what its list may say, and what is installed of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from outrider.cli.imagebuild.images import install_command, package_lines
from outrider.cli.imagebuild.shell import BuildError


def test_a_line_may_have_alternatives(tmp_path: Path) -> None:
    listed = tmp_path / "packages.txt"
    listed.write_text("# what it needs\n7zip-standalone | 7zip  # 7zz\n\nzstd\n")
    assert package_lines(listed) == [["7zip-standalone", "7zip"], ["zstd"]]


@pytest.mark.parametrize("text", ["7zip |\n", "a b\n", "$(reboot)\n", "-y\n"])
def test_what_is_no_name_is_refused(tmp_path: Path, text: str) -> None:
    listed = tmp_path / "packages.txt"
    listed.write_text(text)
    with pytest.raises(BuildError, match="is not the name of a Debian package"):
        package_lines(listed)


@pytest.mark.parametrize(
    ("known", "installed"),
    [
        ("7zip zstd", "7zip zstd"),
        ("7zip-standalone 7zip zstd", "7zip-standalone zstd"),
        ("zstd", "7zip zstd"),  # apt-get then says that there is no 7zip
    ],
)
def test_the_first_that_the_distribution_has_is_installed(tmp_path: Path, known: str, installed: str) -> None:
    _program(tmp_path / "apt-cache", f'case " {known} " in *" $2 "*) ;; *) exit 100 ;; esac')
    _program(tmp_path / "apt-get", 'echo "$@"')
    command = install_command([["7zip-standalone", "7zip"], ["zstd"]])
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(["sh", "-c", command], env=environ, capture_output=True, text=True, check=True).stdout
    assert said == f"install -yq --no-install-recommends {installed}\n"


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
