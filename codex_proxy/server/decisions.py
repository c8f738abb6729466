"""The last turns, kept so that their decisions can be asked for: bounded in number and in bytes.

A finished trace is kept as it is and rendered only when somebody asks, so that a turn pays
for no more than being counted.
"""

from collections import OrderedDict, deque
from datetime import UTC, datetime

from codex_proxy.accounts.telling import text_of
from codex_proxy.errors import Verdict
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import Attempt, Decision, Trace, UsageSource

MAX_TURNS = 1_000
MAX_BYTES = 16 * 1024 * 1024

SHOWN = 20
"""How many of the last ones /stats shows."""

_MENDABLE = frozenset({Verdict.UNAUTHORIZED.value, Verdict.ENCRYPTED.value})

# What the objects of a turn and of a part of it weigh in memory, about, beside their texts.
_TURN_BYTES = 1_200
_PART_BYTES = 200
_PARTS_OF_A_SCORE = 5


class Decisions:
    """The last finished turns, by request id."""

    def __init__(self, *, limit: int = MAX_TURNS, limit_bytes: int = MAX_BYTES) -> None:
        self.limit = limit
        self._limit_bytes = limit_bytes
        self._turns: OrderedDict[str, tuple[Trace, int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._turns)

    def note(self, trace: Trace) -> None:
        """Keep a finished turn; a caller that uses an id again means the new one."""
        self._drop(trace.id)
        size = _size(trace)
        self._turns[trace.id] = (trace, size)
        self._bytes += size
        while self._turns and (len(self._turns) > self.limit or self._bytes > self._limit_bytes):
            self._drop(next(iter(self._turns)))

    def find(self, request_id: str) -> JsonObject | None:
        """Return the story of a turn; None when it is unknown or forgotten."""
        kept = self._turns.get(request_id)
        return None if kept is None else story(kept[0])

    def last(self, count: int = SHOWN) -> list[JsonObject]:
        """Return the last turns in short, the newest first."""
        newest: list[JsonObject] = []
        for trace, _ in reversed(self._turns.values()):
            if len(newest) == count:
                break
            newest.append(_short(trace))
        return newest

    def _drop(self, request_id: str) -> None:
        kept = self._turns.pop(request_id, None)
        if kept is not None:
            self._bytes -= kept[1]


def _size(trace: Trace) -> int:
    parts = len(trace.attempts)
    texts = len(trace.id) + len(trace.model) + len(trace.error) + len(trace.client)
    for decision in trace.decisions:
        parts += 1 + len(decision.candidates) + len(decision.excluded) + len(decision.counts)
        parts += _PARTS_OF_A_SCORE * len(decision.candidates)
        if decision.excluded:
            texts += text_of(decision.excluded)
    return _TURN_BYTES + parts * _PART_BYTES + texts


def _short(trace: Trace) -> JsonObject:
    served = trace.decisions[-1] if trace.decisions else None
    return {
        "id": trace.id,
        "at": _time(trace.started_wall),
        "model": trace.model,
        "account": trace.alias or None,
        "rule": served.rule if served is not None else trace.decision or None,
        "strategy": served.strategy if served is not None else None,
        "binding": trace.binding or None,
        "attempts": len(trace.attempts),
        "outcome": trace.end.value,
        "status": trace.status,
        "error": trace.error or None,
        "seconds": round(trace.seconds, 3),
    }


def story(trace: Trace) -> JsonObject:
    """Return all that is known of a turn: why which account was tried, and what came of it."""
    usage = trace.usage
    return {
        **_short(trace),
        "route": trace.route,
        "caller": trace.caller.name,
        "stream": trace.stream,
        "first_event_seconds": (
            None if trace.first_event is None else round(trace.first_event - trace.started, 3)
        ),
        "usage": {
            "source": usage.source.value,
            "input_tokens": usage.input_tokens,
            "cached_tokens": usage.cached_tokens,
            "output_tokens": usage.output_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
        }
        if usage.source is not UsageSource.NONE
        else None,
        "steps": _steps(trace),
    }


def _steps(trace: Trace) -> list[JsonObject]:
    """Give each choice the attempts that were made with it.

    One that found nobody has none; one whose account was mended (a new token, foreign items
    left out) has two.
    """
    attempts = deque(trace.attempts)
    steps: list[JsonObject] = []
    for decision in trace.decisions:
        made: list[Attempt] = []
        if decision.alias and attempts:
            made.append(attempts.popleft())
            # After such a refusal the account is never chosen again, so this was the same choice.
            while attempts and made[-1].outcome in _MENDABLE and attempts[0].alias == made[-1].alias:
                made.append(attempts.popleft())
        steps.append({"decision": _decision(decision), "attempts": [_attempt(one, trace) for one in made]})
    steps += [{"decision": None, "attempts": [_attempt(one, trace)]} for one in attempts]
    return steps


def _decision(decision: Decision) -> JsonObject:
    return {
        "account": decision.alias or None,
        "rule": decision.rule,
        "strategy": decision.strategy,
        "at": _time(decision.at),
        "compared": decision.compared,
        "candidates": [
            {
                "account": candidate.alias,
                "score": round(candidate.score, 4),
                "parts": {name: round(value, 4) for name, value in candidate.parts},
            }
            for candidate in decision.candidates
        ],
        "excluded": [
            {"account": one.alias, "rule": one.rule, "evidence": one.evidence} for one in decision.excluded
        ],
        "excluded_counts": dict(decision.counts),
    }


def _attempt(attempt: Attempt, trace: Trace) -> JsonObject:
    return {
        "account": attempt.alias,
        "after_seconds": round(attempt.started - trace.started, 3),
        "seconds": round(attempt.seconds, 3),
        "outcome": attempt.outcome or "unfinished",
        "status": attempt.status,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
