"""The last turns: what is kept, what is forgotten, and what is told of one."""

import pytest

from codex_proxy.records.story import story
from codex_proxy.server.decisions import Decisions
from codex_proxy.trace import (
    LOCAL,
    Attempt,
    Candidate,
    Decision,
    End,
    Exclusion,
    Trace,
    Usage,
    UsageSource,
)

AT = 1_800_000_000.0


def turn(number: int = 1, decisions: tuple[Decision, ...] = (), attempts: tuple[Attempt, ...] = ()) -> Trace:
    trace = Trace(f"req_{number}", "responses", LOCAL, 100.0, AT, model="gpt-5.5")
    trace.decisions.extend(decisions)
    trace.attempts.extend(attempts)
    trace.finish(End.COMPLETED, 102.5)
    return trace


def chose(alias: str, rule: str = "expires first") -> Decision:
    return Decision(alias, rule, "horizon", AT)


def tried(alias: str, outcome: str = "ok", *, after: float = 0.0) -> Attempt:
    return Attempt(alias, 100.0 + after, outcome, 200 if outcome == "ok" else 429, 0.5)


# --- what is kept


def test_the_last_turns_are_kept_and_the_first_ones_forgotten() -> None:
    kept = Decisions(limit=3)
    for number in range(5):
        kept.note(turn(number))
    assert len(kept) == 3
    assert kept.find("req_1") is None
    assert [one["id"] for one in kept.last()] == ["req_4", "req_3", "req_2"]
    assert [one["id"] for one in kept.last(2)] == ["req_4", "req_3"]


def test_turns_with_much_to_tell_are_fewer() -> None:
    """A pool of thousands says more of each choice: it is the bytes that count."""
    excluded = tuple(Exclusion(f"acct-{n}", "cooling", "e" * 200) for n in range(100))
    large = Decision("acct-1", "rule", "horizon", AT, excluded=excluded)
    kept = Decisions(limit=1_000, limit_bytes=100_000)
    for number in range(50):
        kept.note(turn(number, (large,)))
    assert 1 <= len(kept) <= 3
    assert kept.find("req_49") is not None
    for number in range(50, 150):
        kept.note(turn(number))
    assert 50 <= len(kept) <= 100
    assert kept.find("req_49") is None


def test_one_that_is_larger_than_all_may_be_is_not_kept() -> None:
    kept = Decisions(limit_bytes=100)
    kept.note(turn())
    assert len(kept) == 0
    kept.note(turn(2))
    assert kept.last() == []


def test_an_id_that_comes_again_means_the_new_turn() -> None:
    """Callers may choose their ids."""
    kept = Decisions(limit=2)
    first, again = turn(1), turn(1)
    again.model = "gpt-6-sol"
    for trace in (first, turn(2), again):
        kept.note(trace)
    assert len(kept) == 2
    assert [(one["id"], one["model"]) for one in kept.last()] == [
        ("req_1", "gpt-6-sol"),
        ("req_2", "gpt-5.5"),
    ]


# --- what is told


def test_a_turn_is_told_in_short() -> None:
    trace = turn(1, (chose("a"), chose("b")), (tried("a", "exhausted"), tried("b")))
    trace.alias, trace.status, trace.binding = "b", 200, "prompt_cache_key"
    kept = Decisions()
    kept.note(trace)
    assert kept.last() == [
        {
            "id": "req_1",
            "at": "2027-01-15T08:00:00.000Z",
            "model": "gpt-5.5",
            "account": "b",
            "rule": "expires first",
            "strategy": "horizon",
            "binding": "prompt_cache_key",
            "attempts": 2,
            "outcome": "completed",
            "status": 200,
            "error": None,
            "seconds": 2.5,
        }
    ]


def test_a_choice_is_told_with_its_candidates_and_with_who_was_left_out() -> None:
    decision = Decision(
        "a",
        "expires first",
        "horizon",
        AT,
        candidates=(Candidate("a", 1.23456, (("week", 1.0), ("room", 0.23456))), Candidate("b", -1.0)),
        compared=7,
        excluded=(Exclusion("c", "cooling", "usage limit until 09:00"),),
        counts=(("cooling", 3),),
    )
    (step,) = story(turn(1, (decision,), (tried("a", after=0.25),)))["steps"]
    assert step == {
        "decision": {
            "account": "a",
            "rule": "expires first",
            "strategy": "horizon",
            "at": "2027-01-15T08:00:00.000Z",
            "compared": 7,
            "candidates": [
                {"account": "a", "score": 1.2346, "parts": {"week": 1.0, "room": 0.2346}},
                {"account": "b", "score": -1.0, "parts": {}},
            ],
            "excluded": [{"account": "c", "rule": "cooling", "evidence": "usage limit until 09:00"}],
            "excluded_counts": {"cooling": 3},
        },
        "attempts": [{"account": "a", "after_seconds": 0.25, "seconds": 0.5, "outcome": "ok", "status": 200}],
    }


def pairs(trace: Trace) -> list[tuple[str | None, list[str]]]:
    """Return who was chosen, and how each attempt with it ended."""
    return [
        (
            step["decision"]["account"] if step["decision"] is not None else "no choice",
            [attempt["outcome"] for attempt in step["attempts"]],
        )
        for step in story(trace)["steps"]
    ]


@pytest.mark.parametrize("refusal", ["unauthorized", "encrypted"])
def test_an_account_that_was_mended_was_chosen_once_and_tried_twice(refusal: str) -> None:
    trace = turn(1, (chose("a"), chose("b")), (tried("a", refusal), tried("a", "server"), tried("b")))
    assert pairs(trace) == [("a", [refusal, "server"]), ("b", ["ok"])]


def test_an_account_that_is_chosen_again_after_a_rest_was_chosen_twice() -> None:
    trace = turn(1, (chose("a"), chose(""), chose("a")), (tried("a", "overloaded"), tried("a")))
    assert pairs(trace) == [("a", ["overloaded"]), (None, []), ("a", ["ok"])]


def test_a_turn_that_found_nobody_has_no_attempts() -> None:
    assert pairs(turn(1, (chose("", "nobody could serve"),))) == [(None, [])]
    assert pairs(turn(1)) == []


def test_an_attempt_without_a_choice_is_told_all_the_same() -> None:
    trace = turn(1, (chose("a"),), (tried("a"), Attempt("b", 100.0)))
    assert pairs(trace) == [("a", ["ok"]), ("no choice", ["unfinished"])]


@pytest.mark.parametrize("source", list(UsageSource))
def test_tokens_that_nobody_counted_are_unknown(source: UsageSource) -> None:
    trace = turn()
    trace.usage = Usage(10, 4, 0, 3, 1, source)
    told = story(trace)["usage"]
    if source is UsageSource.NONE:
        assert told is None
    else:
        assert told == {
            "source": source.value,
            "input_tokens": 10,
            "cached_tokens": 4,
            "output_tokens": 3,
            "reasoning_tokens": 1,
        }


def test_when_the_answer_began_is_told_from_the_request_on() -> None:
    trace = turn()
    assert story(trace)["first_event_seconds"] is None
    trace.first_event = 100.75
    assert story(trace)["first_event_seconds"] == 0.75
