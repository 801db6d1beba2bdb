"""What the install commands see and change of this machine: files, one user, systemd. Nothing is done until told.

A `Plan` is a list of changes that are still needed, each in words and as a function; none are left the second time.
"""

from __future__ import annotations

import functools
import grp
import os
import pwd
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from outrider.cli._output import note, output_option
from outrider.errors import Conflict, InvalidInput, NotFound, PermissionDenied, Unavailable

UNIT_DIR = Path("/etc/systemd/system")
HIDDEN_BY_HOME = tuple(map(Path, ("/home", "/root", "/run/user")))
"""What ProtectHome= keeps from a service."""
HIDDEN_BY_TMP = tuple(map(Path, ("/tmp", "/var/tmp")))  # noqa: S108 - named, not used
_LAST_WORDS = 15
_SYSTEMCTL_S = 300


F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class How:
    """The options that both install commands have."""

    uninstall: bool
    dry_run: bool
    start: bool
    command: Path | None


def install_options(function: F) -> F:
    """Add the options of `How`, and ``-o``; the command gets ``how`` and ``as_json``."""

    @functools.wraps(function)
    def packed(uninstall: bool, dry_run: bool, start: bool, program: Path | None, **rest: Any) -> Any:
        return function(how=How(uninstall, dry_run, start, program), **rest)

    packed = output_option(packed)
    for option in reversed(
        [
            click.option("--dry-run", is_flag=True, help="Only say what would be done, and show the files."),
            click.option("--start/--no-start", default=True, help="Start the service, or restart it, if need be."),
            click.option("--uninstall", is_flag=True, help="Stop the service and remove its unit; its data stays."),
            click.option(
                "--command",
                "program",
                type=click.Path(path_type=Path, exists=True, dir_okay=False),
                help="The `outrider` to be started, if it is not this one.",
            ),
        ]
    ):
        packed = option(packed)
    return cast("F", packed)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that the machine lacks: in words, what a file is to contain (empty where it is a secret), the doing."""

    words: str
    do: Callable[[], None]
    content: str = ""


@dataclass(slots=True)
class Plan:
    """The changes that are needed, in order; what only a person can bring; and what a person should know."""

    changes: list[Change] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, words: str, do: Callable[[], None], content: str = "") -> None:
        self.changes.append(Change(words, do, content))

    def file(self, path: Path, content: str, mode: int, *, secret: bool = False) -> bool:
        """Let ``path`` have this content and mode, owned by root. Returns whether that is a change."""
        try:
            there = path.read_text(encoding="utf-8")
            as_wanted = there == content and stat.S_IMODE(path.stat().st_mode) == mode
        except FileNotFoundError:
            as_wanted = False
        except PermissionError as error:
            raise needs_root() from error
        if not as_wanted:
            shown = "" if secret else content
            self.add(f"write {path} (mode {mode:04o})", lambda: write_file(path, content, mode), shown)
        return not as_wanted

    def directory(self, path: Path, mode: int, owner: str = "root") -> None:
        """Let ``path`` be a directory; an existing one is left as it is, but for its owner where that is not root."""
        if not path.is_dir():
            self.add(f"make {path} (mode {mode:04o})", lambda: _make_directory(path, mode, owner))
        elif owner != "root" and _other_owner(path, owner):
            self.add(f"give {path} and what is in it to {owner}", lambda: _give(path, owner))

    def user(self, name: str, home: Path) -> None:
        """Let there be a system user and group of this name that nobody can log in as."""
        try:
            pwd.getpwnam(name)
        except KeyError:
            command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", str(home)]
            command += ["--shell", "/usr/sbin/nologin", "--comment", "Outrider", name]
            self.add(f"make the system user {name}", lambda: run(command, f"making the user {name}"))

    def service(self, unit: Unit, *, start: bool) -> None:
        """Let ``unit`` be enabled and, if nothing is missing, run with what has changed. To be called last."""
        if self.changes:
            self.add("let systemd read its units anew", lambda: systemctl("daemon-reload"))
        if not unit.enabled:
            self.add(f"enable {unit.name}", lambda: systemctl("enable", unit.name))
        if start and not self.missing and (self.changes or not unit.active):
            verb = "restart" if unit.active else "start"
            self.add(f"{verb} {unit.name}", lambda: unit.start(verb))

    def carry_out(self) -> None:
        """Do it. Raises what the first change that fails raises; a second call then begins where this one ended."""
        if self.changes and os.geteuid() != 0:
            raise needs_root()
        for change in self.changes:
            note(change.words)
            change.do()


class Unit:
    """A unit of this machine's systemd."""

    def __init__(self, name: str, directory: Path = UNIT_DIR) -> None:
        self.name = name
        self.path = directory / name

    def check_ours(self, mark: str) -> None:
        """Raise Conflict if the unit's file is somebody else's: its first line is not that of ours."""
        try:
            first = self.path.read_text(encoding="utf-8").partition("\n")[0]
        except FileNotFoundError:
            return
        if first != mark.partition("\n")[0]:
            raise Conflict(
                f"{self.path} was not written by this command",
                code="unit_not_ours",
                hint=f"move it away, or put what it changes into a drop-in (systemctl edit {self.name})",
            )

    @property
    def active(self) -> bool:
        """Whether it runs, or is on its way to."""
        return self._ask("ActiveState") in ("active", "activating", "reloading")

    @property
    def enabled(self) -> bool:
        return self._ask("UnitFileState") == "enabled"

    def _ask(self, what: str) -> str:
        if shutil.which("systemctl") is None:
            return ""
        command = ["systemctl", "show", "--property", what, "--value", self.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SYSTEMCTL_S)
        return done.stdout.strip()

    def start(self, verb: str = "start") -> None:
        """Start, or restart, it, and wait until it says that it is ready. Raises Unavailable; its log is then shown."""
        began = int(time.time())
        done = _systemctl(verb, self.name)
        if done.returncode == 0:
            # Started is not yet well: a node without its engine starts, too.
            note(f"  {self._ask('StatusText')}")
            return
        command = ["journalctl", "--no-pager", "--output", "cat", "--unit", self.name]
        command += ["--since", f"@{began}", "--lines", str(_LAST_WORDS)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=_SYSTEMCTL_S)
        for line in told.stdout.splitlines():
            note(f"  {line}")
        raise Unavailable(
            f"{self.name} did not start", code="service_not_started", hint=f"`journalctl -u {self.name}` has it all"
        )


def systemctl(*arguments: str) -> None:
    """Run systemctl. Raises Unavailable with what it says."""
    done = _systemctl(*arguments)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"systemctl {' '.join(arguments)} failed: {last}", code="systemctl_failed")


def _systemctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=_SYSTEMCTL_S)


def check_systemd() -> None:
    """Raise InvalidInput unless systemd runs this machine."""
    if shutil.which("systemctl") is None or not Path("/run/systemd/system").is_dir():
        raise InvalidInput(
            "this machine is not run by systemd",
            code="no_systemd",
            hint="let your service manager run `outrider agent run`; --dry-run shows the unit as an example",
        )


def needs_root() -> PermissionDenied:
    """The error for whoever may not change this machine."""
    return PermissionDenied("a service is installed by root", code="needs_root", hint="run it with sudo")


def run(command: Sequence[str], what: str) -> None:
    """Run a program of the system. Raises Unavailable with its last words."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=_SYSTEMCTL_S)
    except FileNotFoundError as error:
        raise NotFound(f"{what} needs the program {command[0]!r}, which is not installed") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"{what} failed: {last}")


def write_file(path: Path, content: str, mode: int) -> None:
    """Replace ``path`` at once, never half; nobody else can read a secret at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    draft.replace(path)


def this_command() -> Path:
    """The `outrider` that a service is to start: the one that runs now, by the name under which upgrades replace it."""
    given = Path(sys.argv[0])
    named = (
        given if given.is_absolute() else Path(shutil.which(sys.argv[0]) or Path(sys.executable).with_name("outrider"))
    )
    if named.name != "outrider":
        named = Path(sys.executable).with_name("outrider")
    public = Path("/usr/local/bin/outrider")
    return public if public.exists() and public.resolve() == named.resolve() else named.absolute()


def beneath(path: Path, roots: Sequence[Path]) -> bool:
    """Whether ``path``, or what it links to, lies beneath one of ``roots``."""
    return any(each.is_relative_to(root) for each in (path.absolute(), path.resolve()) for root in roots)


def may_read(path: Path, user: str) -> bool:
    """Whether ``user`` can reach and read ``path``, by owner, group and mode. A user still to be made is a stranger."""
    try:
        uid = pwd.getpwnam(user).pw_uid
        gids = {group.gr_gid for group in grp.getgrall() if user in group.gr_mem} | {pwd.getpwnam(user).pw_gid}
    except KeyError:
        uid, gids = -1, set()
    if uid == 0:
        return True

    def allows(each: Path, bit: int) -> bool:
        info = each.stat()
        shift = 6 if info.st_uid == uid else 3 if info.st_gid in gids else 0
        return bool(info.st_mode >> shift & bit)

    real = path.resolve()
    try:
        return all(allows(parent, 0o1) for parent in real.parents) and allows(real, 0o5 if real.is_dir() else 0o4)
    except OSError:
        return False


def _make_directory(path: Path, mode: int, owner: str) -> None:
    path.mkdir(parents=True, exist_ok=True, mode=mode)
    path.chmod(mode)
    if owner != "root":
        _give(path, owner)


def _other_owner(path: Path, owner: str) -> bool:
    try:
        wanted = pwd.getpwnam(owner).pw_uid
    except KeyError:
        return True  # still to be made
    return any(each.lstat().st_uid != wanted for each in (path, *path.rglob("*")))


def _give(path: Path, owner: str) -> None:
    wanted = pwd.getpwnam(owner)
    for each in (path, *path.rglob("*")):
        os.chown(each, wanted.pw_uid, wanted.pw_gid, follow_symlinks=False)
