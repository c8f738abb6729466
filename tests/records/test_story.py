"""A turn told: the same when it has just ended as when it is read back."""

import pytest

from codex_proxy.protocol.wire import dumps, loads
from codex_proxy.records.story import detail_json, marks, request_json, request_of, row_of, story, trace_of
from codex_proxy.trace import LOCAL, Attempt, Caller, Decision, End, Trace, Usage
from tests.records.making import AT, turn

REQUEST = [
    "id",
    "at",
    "route",
    "caller",
    "client",
    "model",
    "account",
    "rule",
    "binding",
    "outcome",
    "status",
    "error",
    "attempts",
    "stream",
    "first_event_seconds",
    "first_text_seconds",
    "seconds",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
    "usage_source",
]


def refused() -> Trace:
    trace = Trace("req_2", "chat", LOCAL, 5.0, AT)
    trace.status, trace.error = 400, "invalid_value"
    trace.finish(End.FAILED, 5.25)
    return trace


def moved() -> Trace:
    trace = turn(3, queued=1_000.01, queued_seconds=0.5)
    trace.attempts.insert(0, Attempt("old", 1_000.001, "unauthorized", 401, 0.1))
    trace.attempts.insert(1, Attempt("old", 1_000.1, "exhausted", 429, 0.2))
    trace.decisions.insert(0, Decision("old", "conversation", "horizon", AT, compared=1))
    trace.decisions.insert(1, Decision("", "nobody could serve", "horizon", AT))
    return trace


TURNS = [turn(), refused(), moved(), turn(4, end=End.CALLER_GONE, status=0, first_text=None)]


@pytest.mark.parametrize("trace", TURNS, ids=lambda trace: trace.id)
def test_a_record_tells_what_was_told_at_once(trace: Trace) -> None:
    row = loads(dumps(row_of(trace, 7)))
    back = trace_of(row, trace.started_wall)
    assert story(back) == story(trace)
    assert detail_json(back) == detail_json(trace)
    assert request_of(row, trace.started_wall) == request_json(trace)
    assert list(request_json(trace)) == REQUEST


def test_what_is_unknown_is_null() -> None:
    told = request_json(refused())
    unknown = {name for name, value in told.items() if value is None}
    assert unknown == set(REQUEST) - {
        "id", "at", "route", "caller", "outcome", "status", "error", "attempts", "stream", "seconds",
    }  # fmt: skip
    gone = turn(end=End.CALLER_GONE, status=0, usage=Usage())
    assert request_json(gone)["status"] is None
    assert request_json(gone)["input_tokens"] is None


def test_marks_are_in_order_and_only_those_that_happened() -> None:
    assert [(one["mark"], one["after_seconds"], one["attempt"]) for one in marks(turn())] == [
        ("received", 0.0, None),
        ("read", 0.001, None),
        ("picked", 0.002, 1),
        ("connected", 0.1, 1),
        ("headers", 0.25, 1),
        ("first_event", 0.5, 1),
        ("first_text", 0.75, 1),
        ("end", 2.0, None),
    ]
    assert [one["mark"] for one in marks(refused())] == ["received", "end"]


def test_marks_of_a_turn_that_moved_name_the_attempt() -> None:
    told = marks(moved())
    assert [(one["mark"], one["attempt"]) for one in told] == [
        ("received", None), ("read", None), ("picked", 1), ("picked", 3), ("queued", None), ("picked", 2),
        ("connected", 3), ("headers", 3), ("first_event", 3), ("first_text", 3), ("end", None),
    ]  # fmt: skip
    assert next(one["seconds"] for one in told if one["mark"] == "queued") == 0.5


def test_marks_of_a_kept_connection_have_no_connecting() -> None:
    trace = turn()
    trace.attempts[0].connected = None
    assert "connected" not in {one["mark"] for one in marks(trace)}


@pytest.mark.parametrize(
    ("text", "kept"),
    [("a" * 1_000, "a" * 256), ("\ud800x", "?x"), ("ü" * 300, "ü" * 256), ("日本", "日本"), ("\0", "\0")],
)
def test_whatever_a_caller_wrote_can_be_kept(text: str, kept: str) -> None:
    trace = turn(model=text, caller=Caller("k", text))
    row = row_of(trace, 1)
    assert (row["model"], row["caller"]) == (kept, kept)
    assert all(not isinstance(value, str) or value.encode() for value in row.values())
