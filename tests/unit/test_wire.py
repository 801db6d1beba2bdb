"""Errors and values across the wire."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider import errors, tls, wire
from outrider.errors import InvalidInput, OutriderError, Problem, Unavailable
from outrider.retry import FOREVER, MAX_HINT_S

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, OutriderError) and kind is not OutriderError
]


class FakeRpcError(grpc.RpcError):
    """A refused call, as grpc.aio gives it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, bytes], ...] = ()) -> None:
        self._answer = (code, details, trailers)

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._answer[2]


def over_the_wire(error: BaseException) -> OutriderError:
    status = wire.to_status(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return wire.from_rpc_error(
        FakeRpcError(code, status.message, ((wire.STATUS_DETAILS_KEY, status.SerializeToString()),))
    )


@pytest.mark.parametrize("code", ["", "some_code_of_its_own"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_error_arrives_as_what_it_was(kind: type[OutriderError], code: str) -> None:
    error = kind("it failed", code=code, hint="do this")
    back = over_the_wire(error)
    assert (back.message, back.code, back.hint) == (error.message, error.code, error.hint)
    assert back.error_class is error.error_class
    if not code:
        assert type(back) is kind


def test_problems_arrive_in_order_and_never_in_a_size_that_breaks_the_call() -> None:
    few = [Problem("no", path="steps[0]", line=3, column=5, hint="yes"), Problem("ä")]
    back = over_the_wire(InvalidInput("wrong", few))
    assert isinstance(back, InvalidInput)
    assert list(back.problems) == few
    many = InvalidInput("wrong", [Problem("x" * 500)] * 10_000)
    assert len(wire.to_status(many).SerializeToString()) < tls.MAX_METADATA_BYTES / 2
    assert "more problems" in over_the_wire(many).problems[-1].message  # type: ignore[attr-defined]


def test_unforeseen_error_tells_nothing_of_its_innards() -> None:
    back = over_the_wire(ValueError("password=hunter2"))
    assert back.code == "internal"
    assert "hunter2" not in str(back)
    assert "hunter2" not in str(wire.to_status(ValueError("password=hunter2")))


@pytest.mark.parametrize(
    ("code", "details", "kind", "part"),
    [
        (grpc.StatusCode.UNAVAILABLE, "x: CERTIFICATE_VERIFY_FAILED: y", errors.Unavailable, "not signed by the CA"),
        (grpc.StatusCode.UNAVAILABLE, "Connection refused", errors.Unavailable, "nothing listens at h:1"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", errors.OperationTimeout, "did not answer"),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", errors.PermanentError, "does not know this call"),
        (grpc.StatusCode.INTERNAL, "boom", OutriderError, "boom"),
    ],
)
def test_errors_on_the_way_are_sentences(
    code: grpc.StatusCode, details: str, kind: type[OutriderError], part: str
) -> None:
    error = wire.from_rpc_error(FakeRpcError(code, details), target="h:1")
    assert isinstance(error, kind)
    assert part in str(error)


def test_failure_of_an_agent_comes_back_as_its_error() -> None:
    for error in (errors.EngineUnavailable("down"), errors.NotFound("gone"), errors.OperationTimeout("late")):
        back = wire.error_of(wire.failure_of(error))
        assert type(back) is type(error)


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(_JSON.filter(lambda value: "\\ud" not in repr(value)))
def test_values_are_the_same_on_the_other_side(value: Any) -> None:
    assert wire.load_json(wire.dump_json(value)) == value


@pytest.mark.parametrize("text", [b"{", b"NaN", b"[Infinity]", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidInput):
        wire.load_json(text)


def test_times_keep_their_microseconds() -> None:
    moment = datetime(2026, 7, 1, 12, 30, 0, 123456, tzinfo=UTC)
    stamp = wire.timestamp(moment)
    assert stamp is not None
    assert wire.moment(stamp) == moment
    duration = wire.duration(1.25)
    assert duration is not None
    assert wire.seconds(duration) == 1.25


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", ("host", 8443)),
        ("host:1", ("host", 1)),
        ("https://host:99/", ("host", 99)),
        ("[::1]:5", ("::1", 5)),
        ("[::1]", ("::1", 8443)),
        ("::1", ("::1", 8443)),
    ],
)
def test_addresses_are_read(text: str, expected: tuple[str, int]) -> None:
    assert tls.parse_server(text) == expected


@pytest.mark.parametrize("text", ["", ":1", "host:0", "host:x", "host:70000", "[::1", "a b", "user@host", "h/path"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="not the address of a server"):
        tls.parse_server(text)


def test_ca_file_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="can't be read"):
        tls.read_ca(tmp_path / "nowhere")
    for text in (b"", b"hello", b"\xff"):
        (tmp_path / "ca.pem").write_bytes(text)
        with pytest.raises(InvalidInput, match="holds no PEM certificate"):
            tls.read_ca(tmp_path / "ca.pem")


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "é"])
def test_token_that_cannot_be_sent_is_told(token: str) -> None:
    with pytest.raises(InvalidInput, match="the token is empty or has characters"):
        tls.check_token(token)


def test_clients_never_ping_more_often_than_the_server_allows() -> None:
    client, server = dict(tls.CLIENT_OPTIONS), dict(tls.SERVER_OPTIONS)
    allowed = server["grpc.http2.min_ping_interval_without_data_ms"]
    assert int(client["grpc.keepalive_time_ms"]) > 2 * int(allowed)


def test_how_long_to_wait_travels_with_the_refusal_and_lengthens_the_backoff() -> None:
    refused = Unavailable("the server is stopping", code="server_stopping", retry_after_s=2.5)
    status = wire.to_status(refused)
    trailers = ((wire.STATUS_DETAILS_KEY, status.SerializeToString()),)
    back = wire.from_rpc_error(FakeRpcError(grpc.StatusCode.UNAVAILABLE, "", trailers))
    assert (type(back), back.code, back.retry_after_s) == (Unavailable, "server_stopping", 2.5)
    waits = [FOREVER.obeying(0.1, back) for _ in range(200)]
    assert min(waits) >= 2.5
    assert max(waits) <= 3.0
    assert max(waits) - min(waits) > 0.1  # those who were told the same do not come together
    assert FOREVER.obeying(30.0, back) == 30.0
    assert FOREVER.obeying(0.1, Unavailable("away")) == 0.1
    assert FOREVER.obeying(0.1, Unavailable("for a year", retry_after_s=3e7)) <= MAX_HINT_S * 1.2


def test_details_that_are_no_status_are_passed_over() -> None:
    trailers = ((wire.STATUS_DETAILS_KEY, b"\xff\xff"),)
    error = wire.from_rpc_error(FakeRpcError(grpc.StatusCode.UNAVAILABLE, "away", trailers))
    assert isinstance(error, Unavailable)
    assert error.retry_after_s is None
