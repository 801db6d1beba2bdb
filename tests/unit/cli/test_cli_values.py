"""What people type and what is printed: durations, dotenv, JSON of messages, tables."""

from __future__ import annotations

import click
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from outrider.cli import _dotenv
from outrider.cli._logs import LogWriter
from outrider.cli._output import clean, duration, plain, size, table
from outrider.cli._values import json_or_string, pairs
from outrider.errors import InvalidInput
from outrider.v1 import types_pb2 as types


class Sink:
    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back."""


def test_values_are_json_or_else_text() -> None:
    assert json_or_string("16") == 16
    assert json_or_string("[1, 2]") == [1, 2]
    assert json_or_string('"16"') == "16"
    assert json_or_string("0.7.5") == "0.7.5"
    assert json_or_string("NaN") == "NaN"
    assert json_or_string("2.5") == 2.5
    assert [json_or_string(text) for text in ("1.10", "1e3", "1E400", "-0")] == ["1.10", "1e3", "1E400", "-0"]
    assert json_or_string("true") is True
    assert json_or_string("9007199254740993") == 9007199254740993
    assert json_or_string("[" * 100_000) == "[" * 100_000


def test_a_key_twice_is_refused_and_no_value_is_repeated() -> None:
    with pytest.raises(click.UsageError, match="'a' is given twice"):
        pairs(["a=secret1", "a=secret2"], "a variable")
    with pytest.raises(click.UsageError) as raised:
        pairs(["secret"], "a variable")
    assert "secret" not in raised.value.message


def test_dotenv() -> None:
    text = (
        '# comment\n\nexport A=1\nB = two words # not this\nC=\'$A # \\n\'\nD="x\\n\\"y\\"\\$"\nE=\n'
        "F=a#b\nG='line 1\nline 2'\nH=#\n"
    )
    assert _dotenv.parse(text, "x.env") == {
        "A": "1", "B": "two words", "C": "$A # \\n",
        "D": 'x\n"y"$', "E": "", "F": "a#b", "G": "line 1\nline 2", "H": "",
    }  # fmt: skip


def test_dotenv_says_all_that_is_wrong_and_no_value() -> None:
    with pytest.raises(InvalidInput) as raised:
        _dotenv.parse("A=1\nhunter2\nA=2\nB='x' hunter2\nC='hunter2\n", "x.env")
    problems = [str(problem) for problem in raised.value.problems]
    assert [problem.line for problem in raised.value.problems] == [2, 3, 4, 5]
    assert "hunter2" not in "".join(problems) + str(raised.value)


@given(st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True), st.text(st.characters(codec="utf-8"))))
def test_dotenv_gives_back_what_was_quoted(values: dict[str, str]) -> None:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}
    text = "".join(
        f'{name}="{"".join(escapes.get(character, character) for character in value)}"\n'
        for name, value in values.items()
    )
    assert _dotenv.parse(text, "x.env") == values


def test_messages_become_plain_values() -> None:
    written = types.StatusAttribute(name="port", value_json=b"27960", run_id="r1")
    message = types.Object(
        ref=types.ObjectRef(kind="game", name="a"),
        attributes_json=b'{"big": 9007199254740993}',
        version=9007199254740993,
        status_json=b'{"port": 27960}',
        status=[written],
        created_at=Timestamp(seconds=1),
    )
    answer = plain(message)
    assert answer["ref"] == {"kind": "game", "name": "a"}
    assert answer["attributes"] == {"big": 9007199254740993}
    assert answer["version"] == 9007199254740993
    assert answer["status"] == {"port": 27960}
    assert answer["status_attributes"][0]["value"] == 27960
    assert answer["created_at"] == "1970-01-01T00:00:01Z"
    assert answer["updated_at"] is None
    run = plain(
        types.Run(state=types.RUN_STATE_FAILED, pipeline_sha256=b"\x01\xff", steps=[types.StepStatus(name="a")])
    )
    assert run["state"] == "failed"
    assert run["pipeline_sha256"] == "01ff"
    assert run["steps"][0]["state"] is None
    assert run["object"] is None
    node = plain(types.Node(labels={"zone": "eu"}, brief=types.BriefState(containers={"running": 2})))
    assert node["labels"] == {"zone": "eu"}
    assert node["brief"]["containers"] == {"running": 2}


def test_a_table_is_aligned_and_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    table(("NAME", "STATE"), [("a", "running"), ("日本", "\x1b[31mred")], empty="none")
    table(("NAME",), [], empty="nothing there")
    out = capsys.readouterr()
    assert out.out == "NAME  STATE\na     running\n日本  \ufffd[31mred\n"
    assert out.err == "nothing there\n"
    assert clean("a\x07b\nc") == "a\ufffdb c"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.6, "1m00s"), (7265, "2h01m"), (400000, "4d")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_for_people() -> None:
    assert [size(0), size(1023), size(1024), size(5 * 1024**3)] == ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]


def test_lines_of_several_sources_are_whole() -> None:
    sink = Sink()
    writer = LogWriter(sink, prefixes=True)  # type: ignore[arg-type]
    writer.write("a", "fetch", b"one\ntw")
    writer.write("b", "up", b"\xff\xfe\n")
    writer.write("a", "fetch", b"o\nthree")
    writer.close()
    assert sink.data == b"fetch | one\nup    | \xff\xfe\nfetch | two\nfetch | three\n"


def test_bytes_of_one_source_are_as_they_were() -> None:
    sink = Sink()
    writer = LogWriter(sink, prefixes=False)  # type: ignore[arg-type]
    for part in (b"\xff\x00par", b"t\r\n", b"no end"):
        writer.write("a", "fetch", part)
    writer.close()
    assert sink.data == b"\xff\x00part\r\nno end"
