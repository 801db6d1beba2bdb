"""What a step's program may try on the agent that reads its files: none of it breaks, fools or fills anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agent_core.policy import NodePolicy
from agent_core.stepfiles import MAX_DIRECTORY_BYTES, StepDirectory
from agent_core.telemetry.logs import configure_logging
from outrider.errors import PolicyViolation, StepFailed
from outrider.masking import mask_text
from outrider.steps import StepPlan


def prepared(tmp_path: Path) -> StepDirectory:
    directory = StepDirectory(tmp_path / "run" / "step" / "1" / "outrider")
    directory.prepare(b"{}", os.geteuid(), os.getegid())
    return directory


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_a_step_can_write_to_its_two_files_and_make_no_others(tmp_path: Path) -> None:
    """Files of its own would be a place of any size: one in a subdirectory, or one without a name, is not counted."""
    directory = StepDirectory(tmp_path / "outrider")
    directory.prepare(b"{}", 200_001, 200_001)
    found = directory.path.stat()
    assert (found.st_uid, found.st_mode & 0o777) == (0, 0o755)
    for name in ("outputs", "progress"):
        assert (directory.path / name).stat().st_uid == 200_001


def test_what_lies_in_subdirectories_counts_too(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    deep = directory.path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "big").write_bytes(b"x" * (MAX_DIRECTORY_BYTES + 1))
    assert directory.size() > MAX_DIRECTORY_BYTES


def test_half_a_surrogate_pair_in_progress_and_errors_is_replaced(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    (directory.path / "progress").write_text(
        '{"done": 1, "total": 2, "unit": "\\udc00", "message": "at \\ud800"}\n{"error": "bad \\ud800 thing"}\n'
    )
    directory.read_progress()
    assert directory.progress is not None
    assert directory.error is not None
    for text in (directory.progress.unit, directory.progress.message, directory.error.message):
        assert text.encode(), text


@pytest.mark.parametrize("value", ['["\\ud800"]', "1e999", "NaN"])
def test_outputs_that_nobody_can_write_again_are_refused_in_one_sentence(tmp_path: Path, value: str) -> None:
    directory = prepared(tmp_path)
    (directory.path / "outputs").write_text(f'{{"a": {value}}}\n')
    with pytest.raises(StepFailed, match="line 1 of /outrider/outputs"):
        directory.read_outputs()


def test_any_text_can_be_masked() -> None:
    assert mask_text("\ud800 hunter22 \udcff", ["hunter22"]).count("***") == 1


def test_a_traceback_in_the_log_shows_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    import structlog

    secret = "-".join(("hunter2", "topsecret"))
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    try:
        configure_logging("info", "text")

        def breaks(env: dict[str, str]) -> None:
            raise ValueError(len(env))

        try:
            breaks({"TOPS": secret})
        except ValueError:
            structlog.get_logger().exception("it broke")
            logging.getLogger("foreign").exception("it broke there")
    finally:
        root.handlers[:], root.level = before
        structlog.reset_defaults()
    said = capsys.readouterr().err
    assert "in breaks" in said
    assert secret not in said


@pytest.mark.parametrize("user", ["+0", "-0", "+00:1000", "0x0", " 0", "root:1000", "steam"])
def test_no_other_way_to_write_root_is_taken_for_another_user(user: str) -> None:
    """The engine reads "+0" as 0, and a name means what the image's own /etc/passwd says."""
    with pytest.raises(PolicyViolation):
        NodePolicy().check_plan(StepPlan(image="x", user=user))


def test_progress_is_cut_after_masking_not_before(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    secret = "abcdefghijklmnopqrstuvwxyz012345"
    lines = [{"message": "m" * 180 + secret, "unit": secret}, {"error": "e" * 1990 + secret, "code": secret}]
    (directory.path / "progress").write_text("".join(json.dumps(line) + "\n" for line in lines))
    directory.read_progress((secret,))
    assert directory.progress is not None
    assert directory.error is not None
    said = f"{directory.progress} {directory.error}"
    assert secret[:8] not in said
