"""Programs as the agent runs them: a process, an /outrider directory, an exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPKIT = Path(__file__).parents[1]
Run = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path) -> Run:
    """Start a program, given as text, with parameters and envs."""

    def begin(code: str, params: Any = None, args: tuple[str, ...] = (), **environ: str) -> subprocess.Popen[str]:
        directory = tmp_path / "outrider"
        directory.mkdir(exist_ok=True)
        (directory / "inputs.json").write_text(json.dumps({} if params is None else params))
        program = tmp_path / "program.py"
        program.write_text(
            "from outrider_stepkit import *\nfrom outrider_stepkit import main, Step\n" + textwrap.dedent(code)
        )
        return subprocess.Popen(
            [sys.executable, "-u", str(program), *args],
            env={
                "PYTHONPATH": str(STEPKIT),
                "OUTRIDER_DIRECTORY": str(directory),
                "PATH": os.environ["PATH"],
                **environ,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


@pytest.fixture
def run(start: Run, tmp_path: Path) -> Run:
    """Run it to its end: (exit code, stdout, stderr, outputs, progress)."""

    def to_end(code: str, params: Any = None, args: tuple[str, ...] = (), **environ: str) -> Any:
        process = start(code, params, args, **environ)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err, lines(tmp_path, "outputs"), lines(tmp_path, "progress")

    return to_end


def lines(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    path = tmp_path / "outrider" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_parameters_come_in_and_outputs_go_out(run: Run) -> None:
    code, _, _, outputs, _ = run(
        """
        def work(step):
            step.output(greeting=f"hello {step.params['name']}", attempt=step.attempt)
            step.output(greeting="changed", run=step.run_id, step=step.name)
        main(work)
        """,
        {"name": "arena"},
        OUTRIDER_ATTEMPT="3",
        OUTRIDER_RUN_ID="r1",
        OUTRIDER_STEP="greet",
    )
    assert code == 0
    assert outputs == [{"greeting": "hello arena", "attempt": 3}, {"greeting": "changed", "run": "r1", "step": "greet"}]


@pytest.mark.parametrize(("temporary", "expected"), [(False, 1), (True, 75)])
def test_failure_is_one_sentence_a_cause_and_an_exit_code(run: Run, temporary: bool, expected: int) -> None:
    code, _, err, _, progress = run(
        f"main(lambda step: step.fail('the bucket\\nis away', code='no_bucket', temporary={temporary}))"
    )
    assert code == expected
    assert err == "error: the bucket is away\n"
    assert progress == [{"error": "the bucket is away", "code": "no_bucket"}]


def test_defect_is_named_and_its_traceback_goes_to_the_log(run: Run) -> None:
    code, _, err, _, progress = run("main(lambda step: 1 / 0)")
    assert code == 1
    assert "Traceback" in err
    assert progress == [{"error": "ZeroDivisionError: division by zero", "code": "defect"}]


def test_errors_of_the_disk_become_sentences(run: Run) -> None:
    code, _, err, _, progress = run("main(lambda step: open('/none/such'))")
    assert (code, progress) == (1, [{"error": "/none/such does not exist", "code": "not_found"}])
    assert "Traceback" not in err


def test_term_cleans_up_and_is_reported_as_cancelled(start: Run, tmp_path: Path) -> None:
    process = start(
        """
        import time
        def work(step):
            try:
                print("ready")
                try:
                    time.sleep(30)
                except Exception:
                    print("swallowed")
            finally:
                open(step.params["mark"], "w").write("cleaned")
        main(work)
        """,
        {"mark": str(tmp_path / "mark")},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (143, "")
    assert (tmp_path / "mark").read_text() == "cleaned"
    assert lines(tmp_path, "progress")[-1]["code"] == "cancelled"


@pytest.mark.parametrize(
    "moment",
    [
        "os.register_at_fork(after_in_parent=term)\n    if os.fork() == 0: os._exit(0)",
        "Dying()",
    ],
    ids=["hook of fork", "finalizer"],
)
def test_term_is_not_lost_where_python_drops_exceptions(run: Run, moment: str) -> None:
    code, out, err, _, progress = run(
        f"""
import os, signal, time
def term():
    os.kill(os.getpid(), signal.SIGTERM)
class Dying:
    def __del__(self):
        term()
def work(step):
    {moment}
    time.sleep(30)
main(work)
"""
    )
    assert (code, out, err) == (143, "", "error: cancelled\n")
    assert progress == [{"error": "cancelled", "code": "cancelled"}]


def test_other_exceptions_that_python_drops_are_shown_as_ever(run: Run) -> None:
    code, _, err, _, _ = run(
        """
        class Dying:
            def __del__(self):
                raise ValueError("odd")
        main(lambda step: Dying() and None)
        """
    )
    assert code == 0
    assert "Exception ignored in" in err
    assert "odd" in err


def test_progress_is_thinned_but_the_end_always_comes(run: Run) -> None:
    started = time.monotonic()
    _, _, _, _, progress = run(
        """
        def work(step):
            for done in range(100_001):
                step.progress(done, 100_000, message="moving")
        main(work)
        """
    )
    assert len(progress) <= 3 + (time.monotonic() - started) / 0.5
    assert progress[-1] == {"done": 100_000, "total": 100_000, "unit": "bytes", "message": "moving"}


def test_secrets_are_masked_in_output_and_in_the_cause(run: Run) -> None:
    code, out, err, _, progress = run(
        """
        import base64, os, sys
        def work(step):
            key = step.secret("LICENCE")
            print("key is", key, "and", base64.b64encode(b"user:" + key.encode()).decode())
            sys.stdout.write(key[:5]); sys.stdout.flush(); sys.stdout.write(key[5:] + "\\n")
            print(os.environ["DB_PASSWORD"])
            raise RuntimeError("denied for " + key)
        main(work)
        """,
        LICENCE="abc-defgh/ijkl",
        DB_PASSWORD="hunter22",
    )
    assert code == 1
    for text in (out, err, json.dumps(progress)):
        assert "abc-defgh" not in text
        assert "hunter22" not in text
    assert out.splitlines()[0].startswith("key is *** and ")
    assert "YWJjLWRlZmdoL2lqa2" not in out
    assert out.splitlines()[1:] == ["***", "***"]
    assert progress[-1]["error"] == "RuntimeError: denied for ***"


@pytest.mark.parametrize(
    ("environ", "words"),
    [({"OUTRIDER_CONTRACT": "2"}, "version"), ({"OUTRIDER_DIRECTORY": "/none"}, "does not exist")],
)
def test_wrong_surroundings_are_said(run: Run, environ: dict[str, str], words: str) -> None:
    code, _, err, _, _ = run("main(lambda step: None)", **environ)
    assert code == 1
    assert words in err


def test_missing_env_says_what_to_write(run: Run) -> None:
    assert "name it in the step's envs" in run("main(lambda step: step.env('S3_ENDPOINT'))")[2]


def test_the_first_argument_chooses_the_function(run: Run) -> None:
    program = "main({'up': lambda step: step.output(way='up'), 'down': lambda step: step.output(way='down')})"
    assert run(program, None, ("down",))[3] == [{"way": "down"}]
    assert "the program has no 'left'; it has up, down" in run(program, None, ("left",))[2]
