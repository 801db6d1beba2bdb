"""Virtual environments for the agent of this machine: made whole from a lock, checked, and handed to the launcher.

What is made is never changed afterwards; see `outrider.launcher` for the directory that they stand in.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider import launcher
from outrider.cli._output import note
from outrider.errors import Conflict, InvalidInput, NotFound, OutriderError, PermissionDenied, Unavailable
from outrider.locking import take_lock
from outrider.roles import AGENT, Installed, Role, compare, read_lock

_MAKING = ".being-made"
_COMMAND_S = 1800
_FORM = "from agent_core.state import migrations; print(len(migrations()))"


@dataclass(frozen=True, slots=True)
class Source:
    """Where packages come from. ``find_links``: a directory of wheels, and then nothing else unless an index is given;
    with neither, the tool's own index."""

    find_links: Path | None = None
    index_url: str | None = None

    def options(self) -> list[str]:
        options = ["--find-links", str(self.find_links.absolute())] if self.find_links else []
        if self.index_url:
            return [*options, "--index-url", self.index_url]
        return [*options, "--no-index"] if self.find_links else options


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an environment is to be: a role as the server has it."""

    role: Role
    version: int
    lock: str
    python: Path

    @property
    def name(self) -> str:
        """The same for the same contents, so that what is there is not made again."""
        given = f"{self.lock}\n{self.python}\n{sys.version_info[:2]}"
        return f"{self.role.name}-{hashlib.sha256(given.encode()).hexdigest()[:12]}"


@dataclass(slots=True)
class Environments:
    """The environments of one agent. ``settings`` and ``config`` (their file): with what its settings are read."""

    home: Path
    settings: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    tell: Callable[[str], None] = note
    config: Path | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else makes or removes environments meanwhile. Raises Conflict if somebody does, PermissionDenied."""
        try:
            self.home.mkdir(parents=True, exist_ok=True, mode=0o711)
            descriptor = os.open(self.home / "sync.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except PermissionError as error:
            raise PermissionDenied(
                f"{self.home} is not yours to write", code="needs_root", hint="run it with sudo"
            ) from error
        try:
            try:
                take_lock(descriptor)
            except BlockingIOError as error:
                raise Conflict(f"somebody else makes environments in {self.home} now", code="sync_running") from error
            yield
        finally:
            os.close(descriptor)

    def state(self) -> dict[str, Any]:
        """What the launcher has written down; empty before its first start."""
        return launcher.read_json(self.home / launcher.STATE)

    def about(self, name: str) -> dict[str, Any]:
        """What an environment is; empty for one that is not whole."""
        return launcher.read_json(self.home / name / launcher.ABOUT)

    def make(self, wanted: Wanted, source: Source) -> str:
        """The environment, made unless it is there; its name. What fails leaves nothing behind.

        Raises Unavailable where packages can't be had, InvalidInput where the environment does not pass its checks.
        """
        target = self.home / wanted.name
        if self.about(wanted.name):
            self.tell(f"environment {wanted.name} is there already; it is checked")
            self._check(target, wanted)
            return wanted.name
        self._remove(target)
        target.mkdir(mode=0o755)
        (target / _MAKING).touch()
        try:
            self.tell(f"making the environment {wanted.name}")
            lock = target / "requirements.lock"
            lock.write_text(wanted.lock, encoding="ascii")
            _install(target, lock, wanted.python, source)
            self.tell("checking it")
            form = self._check(target, wanted)
            about = {
                "name": wanted.name,
                "role": wanted.role.name,
                "role_version": wanted.version,
                "lock_sha256": hashlib.sha256(wanted.lock.encode()).hexdigest(),
                "packages": {name: versions[0] for name, versions in read_lock(wanted.lock).items()},
                "python": str(wanted.python),
                "journal_form": form,
                "made_at": int(time.time()),
            }
            (target / _MAKING).unlink()
            launcher.write_json(target / launcher.ABOUT, about)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        return wanted.name

    def switch(self, name: str, *, wait: bool = True) -> bool:
        """Let the launcher try the environment, and wait for what becomes of it.

        Returns whether it is the current one now: not where no launcher runs, whose next start will try it. Raises
        Unavailable if it was refused: then the former one runs again.
        """
        state = self.state()
        if state.get("current", "") == name and not state.get("trial"):
            self.tell(f"{launcher.spoken(name)} is the current one")
            return True
        self._note_initial(state)
        request = uuid.uuid4().hex
        launcher.write_json(self.home / launcher.WANTED, {"environment": name, "request": request})
        pid = launcher.running(self.home)
        if not pid:
            self.tell("no launcher runs here: the environment is tried when it is started (`outrider agent install`)")
            return False
        os.kill(pid, signal.SIGHUP)
        self.tell("the agent is restarted; what runs on the node goes on")
        return wait and self._until_settled(name, request)

    def prune(self) -> list[str]:
        """Remove what is neither current, former, nor to be tried; the names."""
        state, wanted = self.state(), launcher.read_json(self.home / launcher.WANTED)
        kept = {state.get("current"), state.get("former"), wanted.get("environment")}
        kept.add((state.get("trial") or {}).get("environment"))
        gone = []
        for each in sorted(self.home.iterdir()):
            ours = (each / launcher.ABOUT).is_file() or (each / _MAKING).is_file()
            if each.is_dir() and not each.is_symlink() and ours and each.name not in kept:
                self._remove(each)
                gone.append(each.name)
        return gone

    def _until_settled(self, name: str, request: str) -> bool:
        limit = (launcher.READY_WITHIN_S + launcher.STEADY_S + launcher.GRACE_S) * launcher.TRIES + launcher.GRACE_S
        limit += launcher.CONNECT_WITHIN_S
        deadline = time.monotonic() + limit
        said = ""
        while time.monotonic() < deadline:
            state = self.state()
            trial, refused = state.get("trial") or {}, state.get("refused") or {}
            if refused.get("request") == request:
                raise Unavailable(
                    f"{launcher.spoken(name)} was tried and left again: {refused.get('reason')}",
                    code="environment_refused",
                    hint="the former one runs again; the agent's log has more",
                )
            if state.get("current") == name and not trial:
                return True
            news = (
                trial.get("waits")
                or trial.get("said")
                or ("its agent is ready, and has to stay so" if trial.get("ready") else "")
            )
            if trial.get("request") == request and news and news != said:
                said = news
                self.tell(news)
            if not launcher.running(self.home):
                raise Unavailable(
                    "the launcher ended", code="launcher_ended", hint="its log has the reason; it goes on when started"
                )
            time.sleep(0.2)
        raise Unavailable(
            f"nothing became of {launcher.spoken(name)} within {limit:g} s{said and f': {said}'}",
            code="switch_timeout",
            hint="the launcher goes on with it; `outrider agent plugins list` says what becomes of it",
        )

    def _check(self, target: Path, wanted: Wanted) -> int:
        """Ask the environment itself; the form of journal that its agent writes. Raises InvalidInput."""
        program = target / "bin" / "outrider"
        if not os.access(program, os.X_OK):
            raise InvalidInput(
                f"the lock of role {wanted.role.name} makes an environment without the program `outrider`",
                code="environment_bad",
                hint="make it anew: outrider node role lock FILE",
            )
        config = [] if self.config is None else ["--config", str(self.config)]
        # Its exit code tells of plugins that are broken; which, and why, stands in what it prints.
        _, text, words = self._ask([program, "plugin", "doctor", "-o", "json", *config])
        try:
            told = json.loads(text)
            there = [Installed(AGENT, told["outrider"])]
            there += [
                Installed.reported(
                    each["distribution"],
                    each["version"],
                    ok=each["ok"],
                    state=each["state"],
                    error=each["error"],
                    notes=each["notes"],
                )
                for each in told["plugins"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"the plugins of the environment can't be checked: {words or text[-500:]}", code="environment_bad"
            ) from error
        stands = compare(wanted.role, read_lock(wanted.lock), there)
        wrong = [each.words for each in stands if each.drift and each.drift != "extra"]
        wrong += [each.error for each in there if each.error and not each.distribution]
        if wrong:
            raise InvalidInput(
                f"the environment of role {wanted.role.name} is not well: {'; '.join(wrong)}", code="environment_bad"
            )
        code, _, words = self._ask([program, "agent", "config", "-o", "json", *config, *self.settings])
        if code != 0:
            raise InvalidInput(f"the agent's settings are not right for it: {words}", code="environment_bad")
        return self._form(target / "bin" / "python")

    def _form(self, python: Path) -> int:
        code, text, words = self._ask([python, "-c", _FORM])
        if code != 0 or not text.strip().isdecimal():
            raise InvalidInput(f"the environment has no agent that starts: {words}", code="environment_bad")
        return int(text)

    def _note_initial(self, state: Mapping[str, Any]) -> None:
        """Which journal the program of the installation reads: the launcher asks before it goes back to it."""
        if not state.get("initial"):
            return
        python = Path(state["initial"]).resolve().with_name("python")
        with contextlib.suppress(OutriderError):
            launcher.write_json(self.home / launcher.INITIAL_ABOUT, {"journal_form": self._form(python)})

    def _ask(self, command: Sequence[object]) -> tuple[int, str, str]:
        """Run a program of an environment: exit code, output, and its last words on stderr."""
        environ = {name: value for name, value in self.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            done = subprocess.run(
                list(map(str, command)), capture_output=True, text=True, timeout=120, env=environ, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return 1, "", str(error)
        return done.returncode, done.stdout, _last_words(done.stderr)

    @staticmethod
    def _remove(target: Path) -> None:
        """An environment that is half removed is no environment: what says so goes first."""
        (target / launcher.ABOUT).unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)


def base_python() -> Path:
    """The interpreter that environments are made from: never one of an environment itself."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def _install(target: Path, lock: Path, python: Path, source: Source) -> None:
    """Put exactly what the lock says into a new environment at ``target``, each file checked against its hash."""
    chosen = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(lock), *source.options()]
    into = str(target / "bin" / "python")
    uv = _uv()
    if uv:
        _run([*uv, "venv", "--quiet", "--no-config", "--allow-existing", "--python", str(python), str(target)], lock)
        _run([*uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", into, *chosen], lock)
        _run([*uv, "pip", "check", "--quiet", "--python", into], lock)
        return
    if importlib.util.find_spec("ensurepip") is None:
        raise NotFound(
            "environments are made with uv, or with pip and Python's venv module, and neither is here",
            code="tools_missing",
            hint="pip install uv, or on Debian: apt install python3-venv",
        )
    _run([str(python), "-m", "venv", str(target)], lock)
    pip = [into, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    _run([*pip, "install", *chosen], lock)
    _run([*pip, "check"], lock)


def _uv() -> list[str]:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    return [found] if found else []


def _run(command: Sequence[str], lock: Path) -> None:
    """Run a tool. Raises Unavailable with its last words."""
    environ = os.environ | {"UV_LINK_MODE": "copy", "PIP_ROOT_USER_ACTION": "ignore"}
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=_COMMAND_S, env=environ, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} did not work: {error}", code="environment_not_made") from error
    if done.returncode != 0:
        words = _last_words(done.stderr or done.stdout)
        raise Unavailable(
            f"the packages of {lock.parent.name} can't be installed: {words}",
            code="environment_not_made",
            hint="the lock names every file by its hash; are they where you look (--find-links, --index-url)?",
        )


def _last_words(text: str) -> str:
    return " ".join(text.split())[-1200:]
