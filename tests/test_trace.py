"""The story of a turn: finished once, summed up the same way for everybody."""

from codex_proxy.trace import LOCAL, Attempt, Caller, End, Trace, Usage, UsageSource


def trace() -> Trace:
    return Trace("turn-1", "responses", LOCAL, started=10.0, started_wall=1_800_000_000.0)


def test_a_turn_is_finished_exactly_once() -> None:
    one = trace()
    assert (one.end, one.seconds, one.finished) == (End.OPEN, 0.0, None)
    assert one.finish(End.COMPLETED, 12.5)
    assert (one.end, one.seconds) == (End.COMPLETED, 2.5)
    assert not one.finish(End.FAILED, 99.0)
    assert (one.end, one.seconds) == (End.COMPLETED, 2.5)


def test_a_turn_that_ends_at_once_is_finished_all_the_same() -> None:
    one = trace()
    assert one.finish(End.FAILED, 10.0)
    assert not one.finish(End.COMPLETED, 10.0)
    assert one.seconds == 0.0


def test_turns_share_nothing() -> None:
    one, other = trace(), trace()
    one.attempts.append(Attempt("a", 10.0))
    one.usage.input_tokens = 5
    assert other.attempts == []
    assert other.usage == Usage()


def test_all_tokens_are_those_in_and_out() -> None:
    usage = Usage(100, cached_tokens=80, output_tokens=20, reasoning_tokens=15, source=UsageSource.BACKEND)
    # Cached tokens are a part of the input, reasoning is one of the output.
    assert usage.total_tokens == 120
    assert Usage().source is UsageSource.NONE


def test_the_caller_without_a_key_is_always_the_same() -> None:
    assert Caller("local", "local") == LOCAL
