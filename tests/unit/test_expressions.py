"""Expressions: what they come to, what they may not do, and that data stays data."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import InvalidInput, PermanentError
from outrider.expressions import (
    _BUILT_IN,
    MAX_RESULT,
    Reference,
    compile_condition,
    compile_expression,
    evaluate_condition,
    problems_in,
    reference_paths,
    references,
    render,
)

CONTEXT: dict[str, Any] = {
    "args": {"version": "1.4", "slots": 16, "ratio": 0.5, "flag": True, "tags": ["a", "b"], "nothing": None},
    "object": {"kind": "server", "name": "arena-7", "attributes": {"region": "eu"}, "version": 3},
    "node": {"os": "linux"},
    "run": {"id": "r1"},
    "steps": {
        "start": {"outcome": "succeeded", "outputs": {"ports": {"http": 8080}}},
        "opt-in": {"outcome": "skipped"},
    },
    "volumes": {"saves": {"host_path": "/var/lib/x"}},
}


def value(text: str, context: dict[str, Any] = CONTEXT) -> Any:
    return compile_expression(text).evaluate(context)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("args.version", "1.4"),
        ("args.slots + 1", 17),
        ("args.ratio * 2.0", 1.0),
        ("args.slots > 8 && args.flag", True),
        ("args.flag ? 'yes' : 'no'", "yes"),
        ("args.nothing == null", True),
        ("args.tags[1]", "b"),
        ("args['version']", "1.4"),
        ("'version' in args", True),
        ("steps.start.outputs.ports.http", 8080),
        ('steps["opt-in"].outcome', "skipped"),
        ('has(steps["opt-in"].outputs)', False),
        ("has(steps.start.outputs.ports)", True),
        ("has(args.absent) ? args.absent : 'default'", "default"),
        ("string(args.slots) + string(true)", "16true"),
        ("int('12') + 1", 13),
        ("[1, 2] + [3]", [1, 2, 3]),
        ("{'a': args.tags}", {"a": ["a", "b"]}),
        ("args.version.startsWith('1.') && args.version.matches('^[0-9.]+$')", True),
        ("object.name.split('-')[1]", "7"),
        ("join(args.tags, '+').upperAscii()", "A+B"),
        ("args.version.replace('.', '_')", "1_4"),
        ("'  x '.trim()", "x"),
        ("size(args.tags)", 2),
        ("timestamp('2024-01-02T03:04:05Z')", "2024-01-02T03:04:05Z"),
        ("duration('90m')", "5400s"),
        ("'}}' + \"${{\"", "}}${{"),
        ("'ä'", "ä"),
    ],
)
def test_an_expression_comes_to(text: str, expected: Any) -> None:
    result = value(text)
    assert result == expected
    assert type(result) is type(expected)


def test_a_whole_text_keeps_the_type_and_an_embedded_one_is_written_out() -> None:
    tree = {
        "n": "${{ args.slots }}",
        "spaced": "${{args.flag}}",
        "text": "v${{ args.version }}-${{ args.slots }}-${{ args.flag }}-${{ args.tags }}",
        "list": ["${{ args.tags }}", 1, None],
        "braces": "${{ {'a': {'b': 1}} }}",
        "${{ args.slots }}": "a key is never evaluated",
    }
    assert render(tree, CONTEXT) == {
        "n": 16,
        "spaced": True,
        "text": 'v1.4-16-true-["a", "b"]',
        "list": [["a", "b"], 1, None],
        "braces": {"a": {"b": 1}},
        "${{ args.slots }}": "a key is never evaluated",
    }


@given(st.text(max_size=60))
def test_data_is_never_evaluated_again(data: str) -> None:
    hostile = "${{ steps }}" + data + "${{ args.version }}"
    clean = hostile.encode("utf-8", "replace").decode()
    context = {**CONTEXT, "args": {"version": hostile}}
    assert render({"a": "${{ args.version }}", "b": "<${{ args.version }}>"}, context) == {
        "a": clean,
        "b": f"<{clean}>",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("1 +", "is not valid CEL"),
        ("args.a b", "is not valid CEL"),
        ("'abc", "no closing quote"),
        ("args.a; 1", "can't stand there"),
        ("nope", "there is no 'nope' here"),
        ("stpes.a", "did you mean steps?"),
        ("envs.SECRET", "expressions never see envs"),
        ("open('x')", "there is no function open()"),
        ("args.tags.map(x, x)", "map() is not allowed"),
        ("args.tags.all(x, true)", "all() is not allowed"),
        ("[1].exists(x, x == 1)", "exists() is not allowed"),
        ("[1].filter(x, true)", "filter() is not allowed"),
        ("[1].exists_one(x, true)", "exists_one() is not allowed"),
        ("cel.bind(x, 1, x)", "bind() is not allowed"),
        ("(" * 33 + "1" + ")" * 33, "nests deeper than 32"),
        ("[" * 33 + "]" * 33, "nests deeper than 32"),
        ("!" * 40 + "true", "nests deeper than 32"),
        ("true ? 1 : " * 40 + "1", "nests deeper than 32"),
        ("1+" * 300 + "1", "over 400 parts"),
        ("'" + "a" * 2100 + "'", "over 2048 characters"),
        ("has(args)", "is not valid CEL"),
    ],
)
def test_what_is_no_expression_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        compile_expression(text)
    assert said in str(caught.value)
    assert "the expression" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("args.absent", "args has no 'absent'"),
        ("args.slotz", "did you mean slots?"),
        ('steps["opt-in"].outputs.x', "has no 'outputs'"),
        ("args.slots + args.version", "No such overload: the operation is not defined for the given operand types"),
        ("args.slots / 0", "division by zero"),
        ("args.tags[7]", "out of bounds"),
        ("int(args.version)", "parse error"),
        ("args.slots * 9223372036854775807", "overflow"),
        ("1.0 / 0.0", "comes to inf"),
        ("b'abc'", "is not JSON"),
        ("'a'.matches('(')", "not a valid regex"),
        ("args.slots.replace('a', 'b')", "replace() takes texts"),
        ("'a,b'.split('')", "split() needs something"),
        ("join(args.slots)", "join() takes a list"),
        ("string(args.tags)", "string() takes no list"),
        ("max(1, 2)", "there is no function max()"),
    ],
)
def test_an_expression_that_fails_says_which_and_why(text: str, said: str) -> None:
    with pytest.raises(PermanentError) as caught:
        value(text)
    assert said in str(caught.value)


CALLS = {
    "contains": "'ab'.contains('b')", "double": "double(1) == 1.0", "duration": "duration('60s') == duration('1m')",
    "endsWith": "'ab'.endsWith('b')", "has": "has(args.version)", "int": "int(1.5) == 1",
    "matches": "'ab'.matches('^a')",
    "size": "'ab'.size() == 2", "startsWith": "'ab'.startsWith('a')", "string": "string(1.5) == '1.5'",
    "timestamp": "timestamp('2024-01-01T00:00:00Z') < timestamp('2024-01-02T00:00:00Z')", "uint": "uint(1) == 1u",
}  # fmt: skip


def test_each_built_in_function_that_is_let_through_exists() -> None:
    assert set(CALLS) == _BUILT_IN
    for call in CALLS.values():
        assert value(call) is True


@pytest.mark.parametrize("context", [{}, {"object": None}, {"object": {}}])
def test_a_run_without_an_object_says_so(context: dict[str, Any]) -> None:
    for text in ("object.name", "object.attributes.region"):
        with pytest.raises(PermanentError, match="this run has no object"):
            value(text, context)
    assert value("has(object.name) ? object.name : 'none'", context) == "none"


def test_null_within_a_text_is_an_error_not_an_empty_text() -> None:
    with pytest.raises(PermanentError, match="comes to null within a text"):
        render("a-${{ args.nothing }}", CONTEXT)
    assert render("${{ args.nothing }}", CONTEXT) is None


def test_what_the_library_would_get_wrong_does_not_reach_it() -> None:
    with pytest.raises(PermanentError, match="does not fit 64 bits"):
        value("args.big", {"args": {"big": 2**70}})
    deep: Any = 1
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(PermanentError, match="deeper than 64"):
        value("args.deep", {"args": {"deep": deep}})
    assert value("args.odd", {"args": {"odd": "\ud800"}}) == "?"
    # What is not referred to is not looked at, so it can't fail either.
    assert value("args.ok", {"args": {"ok": 1, "deep": deep, "big": 2**70}}) == 1


def test_a_result_is_bounded() -> None:
    context = {"args": {"text": "x" * 60_000}}
    with pytest.raises(PermanentError, match=f"{MAX_RESULT:,} is the most"):
        value("args.text + args.text", context)
    start = time.process_time()
    for text in ("+".join(["args.text"] * 99), "args.text.replace('x', args.text)", "args.text.replace('', args.text)"):
        with pytest.raises(PermanentError):
            value(text, context)
    assert time.process_time() - start < 1


def test_a_panic_of_the_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What PyO3 raises is no Exception."""

    class Panicking:
        def execute(self, context: object) -> object:
            raise PanicException("index out of range")

        def compile(self, text: str) -> object:
            raise PanicException("stack overflow")

    broken = compile_expression("args.slots")
    expression = type(broken)(broken.text, broken.scan, Panicking())
    with pytest.raises(PermanentError, match="index out of range"):
        expression.evaluate(CONTEXT)
    monkeypatch.setattr("outrider.expressions._cel", Panicking)
    with pytest.raises(InvalidInput, match="stack overflow"):
        compile_expression("args.slots + 12345")


def test_references_are_found_without_evaluating() -> None:
    tree = {
        "a": "${{ args.version }}/${{ steps.fetch.outputs.path }}",
        "b": ["${{ volumes['saves'].host_path }}"],
        "c": 1,
    }
    assert references(tree) == {"args.version", "steps.fetch", "volumes.saves"}
    assert Reference(("steps", "fetch", "outputs", "path")) in reference_paths(tree)
    assert references("${{ args[object.name] }}") == {"args", "object.name"}
    assert references("${{ 'args.nope' + r'steps.x' }}") == set()
    assert references("no ${{") == set()
    assert references("${{ args.version.startsWith(run.id) && has(steps.a.outputs) }}") == {
        "args.version",
        "run.id",
        "steps.a",
    }


SUCCEEDED, FAILED, SKIPPED, UNKNOWN = ["succeeded"], ["succeeded", "failed"], ["skipped"], ["unknown"]


@pytest.mark.parametrize(
    ("condition", "outcomes", "expected"),
    [
        (None, [], True),
        (None, SUCCEEDED, True),
        (None, SKIPPED, True),
        (None, FAILED, False),
        (None, UNKNOWN, False),
        (None, ["cancelled"], False),
        ("always()", FAILED, True),
        ("always()", UNKNOWN, True),
        ("failure()", FAILED, True),
        ("failure()", UNKNOWN, False),
        ("failure()", SUCCEEDED, False),
        ("success()", SUCCEEDED, True),
        ("success() || failure()", FAILED, True),
        ("${{ failure() && args.slots > 8 }}", FAILED, True),
        (" ${{ args.slots > 8 }} ", SUCCEEDED, True),
        ("args.slots > 8", FAILED, False),
        ("args.slots > 80", SUCCEEDED, False),
        ("true", FAILED, False),
    ],
)
def test_a_condition_holds_or_not(condition: str | None, outcomes: list[str], expected: bool) -> None:
    assert evaluate_condition(condition, CONTEXT, outcomes) is expected


def test_a_condition_takes_outcomes_from_the_context_if_none_are_given() -> None:
    assert evaluate_condition(None, CONTEXT) is True
    failed = {**CONTEXT, "steps": {"a": {"outcome": "failed"}}}
    assert evaluate_condition(None, failed) is False
    assert evaluate_condition("steps.a.outcome == 'failed'", failed, implied_success=False) is True
    assert evaluate_condition(None, failed, implied_success=False) is True


def test_a_condition_that_is_not_true_or_false_is_an_error() -> None:
    with pytest.raises(PermanentError, match="comes to 16"):
        evaluate_condition("args.slots", CONTEXT)
    with pytest.raises(InvalidInput, match="a condition is one expression"):
        compile_condition("${{ true }} && ${{ true }}")


def test_status_functions_mean_something_only_in_conditions() -> None:
    assert "if:" in str(problems_in("${{ failure() }}")[0])
    assert problems_in("failure()", condition=True) == []
    assert problems_in("${{ args.a }}-${{ 1 }}") == []


TOKENS = [
    *(
        "args",
        ".",
        "x",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "1",
        "'a'",
        '"',
        "'",
        "+",
        "-",
        "!",
        "?",
        ":",
        "&&",
        "==",
        ",",
        " ",
    ),
    *("has", "size", "r'", "\\", "0x", "1e", "in", "null", "steps", "string", "$", "{{", "}}", "b'", '"""', "//", "\n"),
]


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=30).map("".join) | st.text(max_size=80))
def test_any_text_is_an_expression_or_a_clear_refusal(text: str) -> None:
    try:
        expression = compile_expression(text)
    except InvalidInput:
        return
    try:
        expression.evaluate({"args": {"x": 1}, "steps": {}})
    except PermanentError:
        return


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["${{", "}}", "{", "}", "'", '"', "args.x", " ", "a", "\\"]), max_size=12).map("".join))
def test_any_text_renders_or_is_refused(text: str) -> None:
    try:
        result = render(text, {"args": {"x": "${{ args.x }}"}})
    except (InvalidInput, PermanentError):
        return
    if "${{" not in text:
        assert result == text
