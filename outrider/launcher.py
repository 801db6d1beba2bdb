"""Starts the agent from the current environment, and goes back to the former one if a new one does not get well.

`outrider agent install` copies this file out of the package: it stands outside of every environment, imports nothing
but the standard library, and is the main process of the agent's service. Below the directory of environments stand:

    NAME/            a whole virtual environment, made by `outrider agent plugins sync`, never changed afterwards
    wanted.json      which one is to be tried; written by `sync` alone
    state.json       which one is current, which was before it, and what was refused; written by the launcher alone
    launcher.lock    held, with the launcher's process id in it, for as long as it runs
    initial.json     what `sync` found out of the program that the agent was installed with
    current          a link to the current environment, for people

The environment "" is the program that the agent was installed with. A wanted environment is on trial until its agent
has said that it is ready (sd_notify) and has stayed for `--steady` seconds. If it is not ready in time, or ends by
itself as often as `--tries` says, it is refused, and the current one is started again. The journal decides whether that
can be: an older agent does not read a newer one's, and then the new environment is kept and the reason is told.

Where the agent of the current environment has been connected to the server, one on trial has to connect, too (it says
so in X_OUTRIDER_CONNECTED; one that says nothing of it is judged by the rest). Its time for that, `--connect-within`,
only runs while the server's port can be reached: a server that is away is no fault of the environment. Then the trial
goes on, for `--away` seconds at most; after that the environment which is known to connect is taken again.

SIGHUP: look at wanted.json. SIGTERM, SIGINT, SIGABRT are handed on to the agent; whatever runs on the node goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WANTED, STATE, LOCK, LINK, ABOUT = "wanted.json", "state.json", "launcher.lock", "current", "environment.json"
INITIAL_ABOUT = "initial.json"
READY_WITHIN_S, STEADY_S, TRIES, GRACE_S, PAUSE_S = 120.0, 30.0, 3, 30.0, 1.0
CONNECT_WITHIN_S, AWAY_S = 180.0, 86400.0
_BEAT_S = 5.0
_SILENT_START_S = 90.0
_PR_SET_PDEATHSIG = 1
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid (unix(7))
_CONNECTED = "X_OUTRIDER_CONNECTED="  # as in outrider.sdnotify
_DIAL = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
_DIAL_EVERY_S, _DIAL_ENDS_S = 15.0, 10.0
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT, signal.SIGCHLD)


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty where there is none, or nothing that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace ``path``, whole and durably."""
    draft = path.with_name(f".{path.name}.new")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.chmod(0o644)
    draft.replace(path)


def journal_form(path: Path) -> int:
    """The form of the agent's journal at ``path``; 0 where there is none, or where nobody can say."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as db:
            return int(db.execute("PRAGMA user_version").fetchone()[0])
    except (sqlite3.Error, TypeError):
        return 0


def spoken(name: str) -> str:
    """An environment's name in a sentence."""
    return f"environment {name}" if name else "the environment of the installation"


class Ended(Exception):
    """The launcher is to end, with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Reach:
    """Whether a port, ``address``, can be reached, asked every ``every_s`` seconds.

    In a process of its own: a name that nobody resolves, or a packet that nobody answers, must hold up nothing here.
    """

    def __init__(self, address: str, every_s: float) -> None:
        self.address = address
        self.known = False
        self.since = 0.0  # it has been reached each time since then (`time.monotonic`); 0: not the last time
        self._every_s, self._next_at, self._ends_at = every_s, 0.0, 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def look(self, now: float) -> None:
        """Take up an answer, and ask again when it is time."""
        if self._process is not None:
            if self._process.poll() is None and now < self._ends_at:
                return
            self.known, self.since = True, (self.since or now) if self._process.poll() == 0 else 0.0
            self.close()
        elif now >= self._next_at:
            host, _, port = self.address.rpartition(":")
            self._next_at, self._ends_at = now + self._every_s, now + _DIAL_ENDS_S
            dial = [sys.executable, "-IS", "-c", _DIAL, host.strip("[]"), port]
            null = subprocess.DEVNULL
            with contextlib.suppress(OSError):  # a machine that has no room for a process: nothing is known then
                self._process = subprocess.Popen(dial, stdin=null, stdout=null, stderr=null)

    def close(self) -> None:
        """Ask no more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Launcher:
    """One launcher; see the module. ``command``: what stands behind the environment's program."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.home: Path = options.environments
        self.initial: Path = options.initial
        self.command: list[str] = options.command
        self.ready_within_s: float = options.ready_within
        self.steady_s: float = options.steady
        self.tries: int = options.tries
        self.grace_s: float = options.grace
        self.pause_s: float = options.pause
        self.connect_within_s: float = options.connect_within
        self.away_s: float = options.away
        self.manager = os.environ.get("NOTIFY_SOCKET", "")
        self.child: subprocess.Popen[bytes] | None = None
        self.asked_to_end = False
        self.wanted_news = False
        self.was_ready = False  # some agent of this launcher; from then on the service counts as up
        self.woken, self.wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self.line.bind(b"\0outrider-launcher-" + os.urandom(8).hex().encode())
        self.line.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def run(self) -> int:
        """Until the agent has ended; the exit code."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o711)
        lock = self._lock()
        for number in _HANDLED:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        self._save(initial=str(self.initial))  # for who asks what it is
        try:
            while True:
                self._serve(self._choose())
        except Ended as end:
            return end.code
        finally:
            os.close(lock)

    # Which environment.

    def _choose(self) -> str | None:
        """What is to be started: the name of an environment on trial, or None for the current one."""
        state, wanted = self._state(), read_json(self.home / WANTED)
        name, request = wanted.get("environment"), wanted.get("request")
        self.wanted_news = False
        if not isinstance(name, str) or name == state["current"] or request == state["refused"].get("request"):
            if state["trial"]:
                self._save(trial={})
            return None
        trial = state["trial"]
        if trial.get("request") != request:
            trial = {"environment": name, "request": request, "starts": 0, "said": ""}
        if trial["starts"] >= self.tries:
            self._refuse(trial, trial.get("said") or f"it was started {trial['starts']} times, and ended")
            return None
        if not os.access(self._program(name), os.X_OK):
            self._refuse(trial, f"there is no program {self._program(name)}")
            return None
        # Counted before it is started: an environment that takes the whole machine down must not be tried for ever.
        self._save(trial=trial | {"starts": trial["starts"] + 1, "ready": False, "waits": ""})
        return name

    def _refuse(self, trial: dict[str, Any], why: str) -> None:
        """Go back from an environment on trial, or keep it where the way back is closed."""
        current, name = self._state()["current"], trial["environment"]
        have, reads = journal_form(self.home.parent / "journal.db"), self._about(current).get("journal_form", 0)
        if reads and have > reads:
            self._say(
                f"{spoken(name)} does not get well ({why}), but the former one can't read the journal any more "
                f"(form {have}, it knows {reads}): the new one is kept"
            )
            self._confirm(trial)
            return
        self._say(f"{spoken(name)} did not get well and is left again: {why}")
        told = {"environment": name, "request": trial["request"], "reason": why, "time": int(time.time())}
        self._save(trial={}, refused=told)

    def _confirm(self, trial: dict[str, Any], server: str = "") -> None:
        draft = self.home / f".{LINK}.new"
        with contextlib.suppress(OSError):  # for people only
            draft.unlink(missing_ok=True)
            draft.symlink_to(trial["environment"] or self.initial.parent.parent)
            draft.replace(self.home / LINK)
        self._save(current=trial["environment"], former=self._state()["current"], server=server, trial={})
        self._say(f"{spoken(trial['environment'])} is the current one from now on")

    def _state(self) -> dict[str, Any]:
        found = read_json(self.home / STATE)
        return {
            "initial": str(found.get("initial", "")),
            "current": found["current"] if isinstance(found.get("current"), str) else "",
            "server": found["server"] if isinstance(found.get("server"), str) else "",
            "former": found["former"] if isinstance(found.get("former"), str) else None,
            "trial": found["trial"] if isinstance(found.get("trial"), dict) else {},
            "refused": found["refused"] if isinstance(found.get("refused"), dict) else {},
        }

    def _save(self, **changes: Any) -> None:
        write_json(self.home / STATE, self._state() | changes)

    def _program(self, name: str) -> Path:
        return self.home / name / "bin" / "outrider" if name else self.initial

    def _about(self, name: str) -> dict[str, Any]:
        return read_json(self.home / name / ABOUT if name else self.home / INITIAL_ABOUT)

    def _current_program(self) -> Path:
        """That of the current environment; where it is gone, of the former one, else of the installation."""
        state = self._state()
        for name in (state["current"], state["former"], ""):
            if name is not None and os.access(self._program(name), os.X_OK):
                if name != state["current"]:
                    self._say(f"{spoken(state['current'])} is gone, {spoken(name)} is taken")
                return self._program(name)
        return self.initial

    # One life of an agent.

    def _serve(self, trial: str | None) -> None:
        """Start an agent and see it through; returns when another is to be started. Raises `Ended`."""
        program = self._current_program() if trial is None else self._program(trial)
        try:
            self._start(program)
        except OSError as error:
            if trial is None:
                self._say(f"{program} can't be started: {error.strerror}")
                raise Ended(1) from None
            self._note_trial(f"{program} can't be started: {error.strerror}")
            return
        began, ready_at = time.monotonic(), 0.0
        alive_until, beat_at, killed_at = began + _SILENT_START_S, 0.0, 0.0
        ending, failure = False, ""  # ``ending``: it was told to end, by whomever
        link: str | None = None  # the server that it is connected to; empty: to none yet; None: it says nothing of it
        needed = self._state()["server"]  # what the agent of the current environment has been connected to
        reach = Reach(needed, min(_DIAL_EVERY_S, self.connect_within_s / 10))
        assert self.child is not None
        while (status := self.child.poll()) is None:
            self._wait(0.2 if trial is not None or ending else 1.0 if not ready_at else _BEAT_S)
            now = time.monotonic()
            for lines in self._messages():
                for word in lines:
                    if word == "READY=1" and not ready_at:
                        ready_at, self.was_ready = now, True
                        if trial is not None:
                            self._save(trial=self._state()["trial"] | {"ready": True})
                    elif word.startswith(_CONNECTED):
                        link = word.removeprefix(_CONNECTED)
                        if trial is None and link and link != self._state()["server"]:
                            self._save(server=link)
                    elif word.startswith("EXTEND_TIMEOUT_USEC=") and word[20:].isdecimal():
                        alive_until = now + int(word[20:]) / 1e6
                # A change of environments is no end of the service.
                self._notify(*(word for word in lines if word != "STOPPING=1" or self.asked_to_end))
            if not ready_at and self.was_ready and now < alive_until and now >= beat_at:
                beat_at = now + _BEAT_S
                self._notify("WATCHDOG=1")  # between two agents nobody else says that
            if trial is not None and not ending:
                if ready_at and needed and link == "":
                    reach.look(now)
                    failure = self._unconnected(reach, now, ready_at)
                    ending = bool(failure)
                elif ready_at and now - ready_at >= self.steady_s:
                    self._confirm(self._state()["trial"], link or "")
                    trial = None
                elif not ready_at and now - began >= self.ready_within_s:
                    ending, failure = True, f"it was not ready within {self.ready_within_s:g} s"
                elif not ready_at and now >= beat_at:
                    beat_at = now + _BEAT_S
                    self._notify(f"EXTEND_TIMEOUT_USEC={int((self.ready_within_s + self.grace_s) * 1e6)}")
            if self.wanted_news and not ending and not self.asked_to_end:
                self.wanted_news = False
                ending = self._is_news(trial)
            if ending and not killed_at:
                killed_at = now + self.grace_s
                self.child.terminate()
            elif ending and now >= killed_at:
                self.child.kill()
        reach.close()
        self._ended(status, trial, ending=ending, failure=failure)

    def _unconnected(self, reach: Reach, now: float, ready_at: float) -> str:
        """Why an agent on trial that is ready, and not connected, is given up; empty: it is waited for."""
        if reach.since and now - reach.since >= self.connect_within_s:
            return f"it did not connect to the server {reach.address} within {self.connect_within_s:g} s"
        if now - ready_at >= self.away_s:
            return f"the server {reach.address} could not be reached for {self.away_s:g} s, so it could not connect"
        if reach.known and now - ready_at >= self.steady_s:
            waits = "its agent is ready, and has yet to connect to the server"
            if not reach.since:
                waits = f"the server {reach.address} can't be reached: the trial goes on until it can"
            trial = self._state()["trial"]
            if waits != trial.get("waits"):
                self._say(f"{spoken(trial.get('environment', ''))} on trial: {waits}")
                self._save(trial=trial | {"waits": waits})
        return ""

    def _is_news(self, trial: str | None) -> bool:
        """Whether wanted.json asks for something else than what runs."""
        state, wanted = self._state(), read_json(self.home / WANTED)
        name, request = wanted.get("environment"), wanted.get("request")
        if not isinstance(name, str) or request == state["refused"].get("request"):
            return False
        return bool(name != state["current"] if trial is None else request != state["trial"].get("request"))

    def _ended(self, status: int, trial: str | None, *, ending: bool, failure: str) -> None:
        """What the end of an agent means. Raises `Ended` where it is that of the launcher, too."""
        self.child = None
        how = f"with exit code {status}" if status >= 0 else f"by signal {-status} ({signal.strsignal(-status)})"
        code = status if status >= 0 else 128 - status
        if self.asked_to_end:
            if -status in (signal.SIGTERM, signal.SIGINT):
                code = 0  # it had not come to the point of listening yet
            if trial is not None:  # it had no chance to show how it is
                state = self._state()["trial"]
                self._save(trial=state | {"starts": max(0, state.get("starts", 1) - 1), "ready": False})
            raise Ended(code)
        if failure:
            self._note_trial(failure, last=True)
        elif ending:
            return
        elif trial is not None:
            self._note_trial(f"its agent ended {how}")
            self._pause()
        else:
            self._say(f"the agent ended {how}")
            raise Ended(code or 1)  # the service manager starts it again, with its own patience

    def _note_trial(self, said: str, *, last: bool = False) -> None:
        trial = self._state()["trial"]
        self._say(f"{spoken(trial.get('environment', ''))} on trial: {said}")
        self._save(trial=trial | {"said": said} | ({"starts": self.tries} if last else {}))

    def _pause(self) -> None:
        until = time.monotonic() + self.pause_s
        while not self.asked_to_end and (left := until - time.monotonic()) > 0:
            self._wait(left)
        if self.asked_to_end:
            raise Ended(0)

    # Processes, signals, messages.

    def _start(self, program: Path) -> None:
        env = os.environ | {"NOTIFY_SOCKET": "@" + self.line.getsockname()[1:].decode()}
        env.pop("WATCHDOG_PID", None)  # it is this process's
        parent = os.getpid()

        def die_with_parent() -> None:
            # An agent that outlived its launcher would hold the state directory, and no service manager would know it.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        self.child = subprocess.Popen([str(program), *self.command], env=env, preexec_fn=die_with_parent)

    def _wait(self, seconds: float) -> None:
        """Until a message or a signal comes, or so long; hands signals on."""
        ready, _, _ = select.select([self.line.fileno(), self.woken], [], [], max(0.0, seconds))
        if self.woken not in ready:
            return
        for number in os.read(self.woken, 4096):
            if number == signal.SIGHUP:
                self.wanted_news = True
            elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGABRT):
                self.asked_to_end = True
                if self.child is not None:
                    self.child.send_signal(number)
                    self.child.send_signal(signal.SIGCONT)  # a frozen one hears nothing

    def _messages(self) -> list[list[str]]:
        """What the agent has said since; what anybody else said is dropped."""
        found: list[list[str]] = []
        while True:
            try:
                data, ancillary, _, _ = self.line.recvmsg(8192, socket.CMSG_SPACE(_CREDENTIALS.size))
            except BlockingIOError:
                return found
            senders = [
                _CREDENTIALS.unpack(given[: _CREDENTIALS.size])[0]
                for level, kind, given in ancillary
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
            ]
            if self.child is not None and senders == [self.child.pid]:
                found.append(data.decode("utf-8", "replace").split("\n"))

    def _notify(self, *lines: str) -> None:
        if not self.manager or not lines:
            return
        address = "\0" + self.manager[1:] if self.manager.startswith("@") else self.manager
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.setblocking(False)
            line.sendto("\n".join(lines).encode(), address)

    def _lock(self) -> int:
        descriptor = os.open(self.home / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        for tries_left in reversed(range(20)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not tries_left:
                    self._say(f"another launcher has {self.home}")
                    raise SystemExit(1) from None
                time.sleep(0.05)  # somebody may only be looking whether there is one, see `running`
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor

    def _say(self, text: str) -> None:
        print(f"launcher: {text}", file=sys.stderr, flush=True)


def running(home: Path) -> int:
    """The process id of the launcher that serves ``home``; 0: there is none."""
    try:
        descriptor = os.open(home / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdecimal() else 0
    finally:
        os.close(descriptor)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Start Outrider's agent from the environment that is current.")
    parser.add_argument("--environments", type=Path, required=True, help="the directory of environments")
    parser.add_argument("--initial", type=Path, required=True, help="the program that the agent was installed with")
    parser.add_argument("--ready-within", type=float, default=READY_WITHIN_S, help="seconds for a new one to be ready")
    parser.add_argument("--steady", type=float, default=STEADY_S, help="seconds that it then has to stay")
    parser.add_argument("--tries", type=int, default=TRIES, help="how often a new one may end by itself")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds for an agent to end")
    parser.add_argument("--pause", type=float, default=PAUSE_S, help="seconds between two tries")
    within, away = "seconds to connect to a server that can be reached", "seconds to wait for one that can't be"
    parser.add_argument("--connect-within", type=float, default=CONNECT_WITHIN_S, help=within)
    parser.add_argument("--away", type=float, default=AWAY_S, help=away)
    parser.add_argument("command", nargs="+", help="the command of the program, after --: agent run …")
    return Launcher(parser.parse_args(arguments)).run()


if __name__ == "__main__":
    sys.exit(main())
