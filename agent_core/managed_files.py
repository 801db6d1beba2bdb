"""Files that managed containers are given: made by the agent, mounted read-only, gone with their container.

They lie on the node's disk, because a game must be able to start again without the agent, and are readable by the
container's user alone (mode 0400); root's directory around them keeps everybody else out. Beside them lie the secrets
that are in them, so that these are masked in the container's log also when the run that knew them is long over.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from agent_core.container_spec import FileSpec, substitute
from agent_core.room import disk_errors
from agent_core.runtimes.base import Mount
from outrider.masking import contains_secret

_SECRETS = "secrets.json"
_NUMBERS = re.compile(r"([0-9]+)(?::([0-9]+))?", re.ASCII)


class ManagedFiles:
    """Below ``root``: a directory for each container and digest of its specification. Blocking."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def mounts(self, name: str, digest: str, files: Mapping[str, FileSpec]) -> tuple[Mount, ...]:
        """How they are mounted, once they are written."""
        directory = self._directory(name, digest)
        return tuple(Mount(str(directory / str(number)), target) for number, target in enumerate(sorted(files)))

    def write(
        self,
        name: str,
        digest: str,
        files: Mapping[str, FileSpec],
        *,
        ports: Mapping[str, int],
        user: str,
        secrets: Sequence[str],
    ) -> None:
        """Make them, in place of what a former attempt at the same specification left.

        ``user``: the container's; where it is a name, which only its image knows, everybody in the container may read.
        """
        if not files:
            return
        directory = self._directory(name, digest)
        numbers = _NUMBERS.fullmatch(user)
        with disk_errors(f"write the files of the container {name}"):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True, mode=0o700)
            os.chmod(self._root, 0o700)
            contained: set[str] = set()
            for number, target in enumerate(sorted(files)):
                data = substitute(files[target].text, ports).encode()
                contained |= {secret for secret in secrets if contains_secret(data, [secret])}
                readable, executable = (0o400, 0o500) if numbers else (0o444, 0o555)
                with _new_file(directory / str(number), executable if files[target].executable else readable) as file:
                    file.write(data)
                    if numbers and os.geteuid() == 0:
                        os.fchown(file.fileno(), int(numbers[1]), int(numbers[2] or numbers[1]))
            with _new_file(directory / _SECRETS, 0o600) as file:
                file.write(json.dumps(sorted(contained)).encode())

    def secrets(self, name: str, digest: str) -> tuple[str, ...]:
        """The secrets that are in the files of a container."""
        try:
            found = json.loads((self._directory(name, digest) / _SECRETS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ()
        return tuple(str(each) for each in found)

    def keep(self, name: str, digests: Collection[str]) -> None:
        """Remove the files of ``name`` but for those of these digests."""
        directory = self._root / name
        kept = {digest[:32] for digest in digests}
        if not directory.is_dir():
            return
        for entry in directory.iterdir():
            if entry.name not in kept:
                shutil.rmtree(entry, ignore_errors=True)
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)

    def names(self) -> list[str]:
        """The containers that have, or had, files."""
        return [entry.name for entry in self._root.iterdir()] if self._root.is_dir() else []

    def _directory(self, name: str, digest: str) -> Path:
        return self._root / name / digest[:32]


@contextmanager
def _new_file(path: Path, mode: int) -> Iterator[IO[bytes]]:
    """A file that nobody could open before it had its mode; on the disk when the context is left."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        yield file
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
