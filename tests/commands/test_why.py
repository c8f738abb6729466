"""The story of a request, as a person reads it; the traces are made by hand."""

import pytest

from codex_proxy.commands.why import render
from codex_proxy.records.story import story
from codex_proxy.trace import Attempt, Caller, Candidate, Decision, End, Exclusion, Trace, Usage, UsageSource
from tests.accounts.making import NOW


def turn(end: End = End.COMPLETED) -> Trace:
    trace = Trace("req_1", "messages", Caller("k", "laptop"), 100.0, NOW, model="gpt-6-sol", stream=True)
    trace.finish(end, 103.25)
    return trace


def test_a_request_that_moved_is_told_step_by_step() -> None:
    trace = turn()
    trace.alias, trace.status, trace.binding = "home", 200, "prompt_cache_key"
    trace.usage = Usage(1_000, 800, 0, 50, 20, UsageSource.BACKEND)
    trace.decisions += [
        Decision("work", "conversation", "horizon", NOW, compared=1),
        Decision(
            "home",
            "expires first",
            "horizon",
            NOW + 1,
            candidates=(
                Candidate("home", 4.25, (("week", 3.0), ("room", 1.25))),
                Candidate("日本", -0.5, (("week", -0.5),)),
            ),
            compared=9,
            excluded=(
                Exclusion("work", "tried for this request", "exhausted"),
                Exclusion("old", "cooling", "usage limit until 09:00"),
                Exclusion("off", "disabled", ""),
            ),
            counts=(("tried for this request", 1), ("cooling", 1), ("disabled", 1)),
        ),
    ]
    trace.attempts += [
        Attempt("work", 100.0, "exhausted", 429, 0.25),
        Attempt("home", 100.5, "ok", 200, 2.75),
    ]
    assert render(story(trace), NOW + 60) == [
        "req_1: messages for gpt-6-sol, streamed, asked by laptop at 08:00",
        "  answered by home, status 200 after 3.25 s, 2 attempts",
        "  its conversation was known by: prompt_cache_key",
        "  1000 input tokens, 800 of them cached; 50 output tokens",
        "",
        "1. work: conversation (horizon)",
        "   -> work: exhausted, status 429 (0 s after the request came, took 0.25 s)",
        "",
        "2. home: expires first (horizon)",
        "   -> home: ok, status 200 (0.5 s after the request came, took 2.75 s)",
        "   compared 9 accounts, the best first:",
        "     home  4.25  week 3, room 1.25",
        "     日本  -0.5  week -0.5",
        "     and 7 more",
        "   left out 3: 1 tried for this request, 1 cooling, 1 disabled",
        "     work  tried for this request: exhausted",
        "     old   cooling: usage limit until 09:00",
        "     off   disabled",
    ]


def test_a_request_that_nobody_could_serve_says_who_was_left_out() -> None:
    trace = turn(End.FAILED)
    trace.status, trace.error, trace.stream = 429, "usage_limit_reached", False
    trace.decisions.append(
        Decision(
            "",
            "nobody could serve",
            "horizon",
            NOW,
            excluded=(Exclusion("work", "cooling", "usage limit until 09:00"),),
            counts=(("cooling", 250),),
        )
    )
    assert render(story(trace), NOW) == [
        "req_1: messages for gpt-6-sol, plain, asked by laptop at 08:00",
        "  failed, status 429 (usage_limit_reached) after 3.25 s, 0 attempts",
        "",
        "1. nobody: nobody could serve",
        "   left out 250: 250 cooling",
        "     work  cooling: usage limit until 09:00",
    ]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (End.COMPLETED, "answered after"),
        (End.INCOMPLETE, "answered up to a limit after"),
        (End.FAILED, "failed after"),
        (End.CALLER_GONE, "its caller left after"),
    ],
)
def test_every_end_has_words(end: End, words: str) -> None:
    assert render(story(turn(end)), NOW)[1].strip().startswith(words)


def test_a_request_that_was_refused_before_any_account_was_asked() -> None:
    trace = turn(End.FAILED)
    trace.model = ""
    lines = render(story(trace), NOW)
    assert "for no model" in lines[0]
    assert lines[-1] == "No account was asked for."


def test_an_account_that_was_mended_and_an_attempt_without_a_choice() -> None:
    trace = turn()
    trace.decisions.append(Decision("work", "turn state", "horizon", NOW))
    trace.attempts += [
        Attempt("work", 100.0, "unauthorized", 401, 0.1),
        Attempt("work", 100.2, "ok", 200, 1.0),
        Attempt("other", 102.0),
    ]
    trace.usage = Usage(5, source=UsageSource.ESTIMATE)
    lines = render(story(trace), NOW)
    assert "  5 input tokens, 0 of them cached; 0 output tokens, estimated" in lines
    assert [line for line in lines if "->" in line] == [
        "   -> work: unauthorized, status 401 (0 s after the request came, took 0.1 s)",
        "   -> work: ok, status 200 (0.2 s after the request came, took 1 s)",
        "   -> other: unfinished (2 s after the request came, took 0 s)",
    ]
    assert "2. tried without a choice" in lines
