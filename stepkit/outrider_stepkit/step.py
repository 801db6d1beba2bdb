"""An attempt of a step, as the program that carries it out sees it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from outrider_stepkit.control import ControlClient

CONTRACT = "1"
DIRECTORY = "/outrider"
_MAX_INPUTS = 16 * 1024**2
_MAX_SENTENCE = 2000
_INTERVAL_S = 0.5


class StepFailure(Exception):
    """The step can't be done. ``str()`` of it is one sentence for a person.

    ``code`` is the cause for programs (snake_case). ``temporary`` says that it may work when tried again.
    """

    def __init__(self, message: str, *, code: str = "failed", temporary: bool = False) -> None:
        super().__init__(" ".join(message.split())[:_MAX_SENTENCE])
        self.code = code
        self.temporary = temporary


class Cancelled(BaseException):
    """Raised in the main thread by SIGTERM: the run was cancelled or timed out. Clean up, and let it pass.

    Not an ``Exception``, so that a broad ``except`` doesn't swallow it.
    """


class Step:
    """What the program was given, and the way to give something back."""

    def __init__(self, params: Mapping[str, Any], directory: Path, environ: Mapping[str, str], args: Sequence[str]):
        self.params: dict[str, Any] = dict(params)
        """The validated parameters, defaults filled in."""
        self.args = tuple(args)
        """The plan's arguments."""
        self.directory = directory
        self.run_id = environ.get("OUTRIDER_RUN_ID", "")
        self.name = environ.get("OUTRIDER_STEP", "")
        self.attempt = int(environ.get("OUTRIDER_ATTEMPT", "1"))
        self.secrets: set[str] = set()
        """Values that are masked in what this process prints."""
        self._environ = environ
        self._started = time.monotonic()
        self._last_progress = float("-inf")

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, args: Sequence[str] | None = None) -> Step:
        """Read the contract's files and variables. Raises StepFailure where they are missing or not as agreed.

        ``OUTRIDER_DIRECTORY`` stands for /outrider where the program is tried outside of a container.
        """
        environ = os.environ if environ is None else environ
        contract = environ.get("OUTRIDER_CONTRACT", CONTRACT)
        if contract != CONTRACT:
            raise StepFailure(
                f"this image speaks version {CONTRACT} of the step contract and the agent version {contract}:"
                " choose an image made for it",
                code="contract_version",
            )
        directory = Path(environ.get("OUTRIDER_DIRECTORY", DIRECTORY))
        path = directory / "inputs.json"
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_INPUTS + 1)
            params = json.loads(text)
        except FileNotFoundError:
            raise StepFailure(
                f"{path} does not exist: this program is started by Outrider as a step of a pipeline", code="no_inputs"
            ) from None
        except (OSError, ValueError) as error:
            raise StepFailure(f"{path} can't be read: {error}", code="bad_inputs") from error
        if not isinstance(params, dict):
            raise StepFailure(f"{path} must hold a JSON object", code="bad_inputs")
        return cls(params, directory, environ, sys.argv[1:] if args is None else args)

    def output(self, **values: Any) -> None:
        """Give JSON values back to the pipeline. Called again, the values are merged in order."""
        try:
            line = json.dumps(values, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StepFailure(f"an output is not a JSON value: {error}", code="bad_output") from error
        self._append("outputs", line)

    def progress(
        self, done: float, total: float | None = None, *, unit: str = "bytes", message: str = "", force: bool = False
    ) -> None:
        """Say how far the step is. May be called as often as one likes: what comes too soon after the last is dropped.

        The last one (``done`` reaches ``total``) and ``force`` are always written.
        """
        now = time.monotonic()
        # Ever rarer, so that even a step of days keeps the file small: /outrider holds a few megabytes.
        interval = max(_INTERVAL_S, (now - self._started) / 1000)
        if not force and now - self._last_progress < interval and not (total is not None and done >= total):
            return
        self._last_progress = now
        entry: dict[str, Any] = {"done": done, "total": total, "unit": unit}
        if message:
            entry["message"] = message
        self._append("progress", json.dumps(entry))

    def fail(self, message: str, *, code: str = "failed", temporary: bool = False) -> NoReturn:
        """End the step with the sentence ``message``; see StepFailure."""
        raise StepFailure(message, code=code, temporary=temporary)

    def env(self, name: str, default: str | None = None) -> str:
        """The value of an allotted env. Without it and without a ``default`` the step fails with what to write."""
        value = self._environ.get(name, default)
        if value is None:
            raise StepFailure(
                f"the step needs the env {name}, which it was not allotted: name it in the step's envs",
                code="env_missing",
            )
        return value

    def secret(self, name: str, default: str | None = None) -> str:
        """Like ``env``, and the value is masked in what this process prints from now on."""
        value = self.env(name, default)
        self.secrets.add(value)
        return value

    def control(self, *, patience_s: float = 60.0) -> ControlClient:
        """The control socket of this attempt. Fails where the step type's plan did not ask for it.

        ``patience_s``: how long it may be away (the agent restarts) before a call fails; ``math.inf`` leaves that to
        the step's timeout.
        """
        from outrider_stepkit.control import ControlClient

        path = self._environ.get("OUTRIDER_CONTROL")
        if not path:
            raise StepFailure(
                'this step has no control socket: its plan must say control="containers"', code="no_control"
            )
        return ControlClient(path, patience_s=patience_s)

    def report_failure(self, failure: StepFailure) -> None:
        """Write down the cause of a failure, for the agent. ``main`` calls it."""
        self._append("progress", json.dumps({"error": str(failure), "code": failure.code}))

    def _append(self, name: str, line: str) -> None:
        # One write, to the end: several threads or processes of a step may report without tearing lines.
        descriptor = os.open(self.directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, line.encode() + b"\n")
        finally:
            os.close(descriptor)
