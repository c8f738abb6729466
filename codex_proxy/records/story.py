"""A turn told as JSON: in short for lists, whole for whoever asks why. Pure.

What is told of a turn that has just ended and of one that is read back years later is made by the same code:
a row becomes a `Trace` again.
"""

from collections import deque
from datetime import UTC, datetime
from typing import Any, Protocol

from codex_proxy.errors import Verdict
from codex_proxy.protocol.wire import JsonObject, dumps, loads
from codex_proxy.trace import Attempt, Caller, Candidate, Decision, End, Exclusion, Trace, Usage, UsageSource

# What of a name is kept.
_LONGEST = 256

_MENDABLE = frozenset({Verdict.UNAUTHORIZED.value, Verdict.ENCRYPTED.value})


class Columns(Protocol):
    """A row: what it has by name."""

    def __getitem__(self, name: str, /) -> Any: ...


def rule_of(trace: Trace) -> str | None:
    """Return why a turn went where it went."""
    return (trace.decisions[-1].rule if trace.decisions else trace.decision) or None


def request_json(trace: Trace) -> JsonObject:
    """Tell a turn in short; times are seconds since the epoch, or since it came."""
    return request_of(columns(trace), trace.started_wall)


def request_of(row: Columns, at: float) -> JsonObject:
    """Tell in short the turn of a row."""
    return {
        "id": row["id"],
        "at": round(at, 3),
        "route": row["route"],
        "caller": row["caller"],
        "client": row["client"],
        "model": row["model"],
        "account": row["account"],
        "rule": row["rule"],
        "binding": row["binding"],
        "outcome": row["outcome"],
        "status": row["status"],
        "error": row["error"],
        "attempts": row["attempts"],
        "stream": bool(row["stream"]),
        "first_event_seconds": _rounded(row["first_event"]),
        "first_text_seconds": _rounded(row["first_text"]),
        "seconds": _rounded(row["seconds"]),
        "input_tokens": row["input_tokens"],
        "cached_tokens": row["cached_tokens"],
        "output_tokens": row["output_tokens"],
        "reasoning_tokens": row["reasoning_tokens"],
        "usage_source": row["usage_source"],
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def detail_json(trace: Trace) -> JsonObject:
    """Tell all that is known of a turn, but for what it said."""
    return {
        **request_json(trace),
        **({"upstream": trace.upstream} if trace.upstream else {}),
        "request_bytes": trace.request_bytes,
        "answer_bytes": trace.answer_bytes,
        "marks": marks(trace),
        "steps": steps(trace),
    }


def short(trace: Trace) -> JsonObject:
    """Tell a turn in one line of /stats."""
    served = trace.decisions[-1] if trace.decisions else None
    return {
        "id": trace.id,
        "at": _time(trace.started_wall),
        "model": trace.model,
        "account": trace.alias or None,
        **({"upstream": trace.upstream} if trace.upstream else {}),
        "rule": rule_of(trace),
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
    first = _after(trace.first_event, trace)
    return {
        **short(trace),
        "route": trace.route,
        "caller": trace.caller.name,
        "stream": trace.stream,
        "first_event_seconds": None if first is None else round(first, 3),
        "usage": {
            "source": usage.source.value,
            "input_tokens": usage.input_tokens,
            "cached_tokens": usage.cached_tokens,
            "output_tokens": usage.output_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
        }
        if usage.source is not UsageSource.NONE
        else None,
        "marks": marks(trace),
        "steps": steps(trace),
    }


def marks(trace: Trace) -> list[JsonObject]:
    """Return what happened when, in order, for a drawing of it; what did not happen is not there."""
    told: list[tuple[str, float | None, int | None]] = [
        ("received", trace.started, None),
        ("read", trace.read, None),
        ("queued", trace.queued, None),
    ]
    for number, attempt in enumerate(trace.attempts, 1):
        told += [
            ("picked", attempt.started, number),
            ("connected", attempt.connected, number),
            ("headers", attempt.headers, number),
        ]
    last = len(trace.attempts) or None
    told += [
        ("first_event", trace.first_event, last),
        ("first_text", trace.first_text, last),
        ("end", trace.finished, None),
    ]
    happened = sorted(
        ((at - trace.started, mark, attempt) for mark, at, attempt in told if at is not None),
        key=lambda one: one[0],
    )
    return [
        {"mark": mark, "after_seconds": round(after, 4), "attempt": attempt}
        | ({"seconds": round(trace.queued_seconds, 4)} if mark == "queued" else {})
        for after, mark, attempt in happened
    ]


def steps(trace: Trace) -> list[JsonObject]:
    """Give each choice the attempts that were made with it.

    One that found nobody has none; one whose account was mended (a new token, foreign items
    left out) has two.
    """
    attempts = deque(trace.attempts)
    found: list[JsonObject] = []
    for decision in trace.decisions:
        made: list[Attempt] = []
        if decision.alias and attempts:
            made.append(attempts.popleft())
            # After such a refusal the account is never chosen again, so this was the same choice.
            while attempts and made[-1].outcome in _MENDABLE and attempts[0].alias == made[-1].alias:
                made.append(attempts.popleft())
        found.append({"decision": _decision(decision), "attempts": [_attempt(one, trace) for one in made]})
    found += [{"decision": None, "attempts": [_attempt(one, trace)]} for one in attempts]
    return found


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


def _after(at: float | None, trace: Trace) -> float | None:
    return None if at is None else round(at - trace.started, 4)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- as a row, and back


def row_of(trace: Trace, key: int) -> dict[str, Any]:
    """Return a finished turn as a row of the table of turns."""
    return {"key": key, **columns(trace), "story": _packed(trace).decode()}


def columns(trace: Trace) -> dict[str, Any]:
    """Return what of a turn has a column of its own; what is unknown is None."""
    usage, began, first, text = trace.usage, trace.started, trace.first_event, trace.first_text
    is_known = usage.source is not UsageSource.NONE
    return {
        "id": _text(trace.id),
        "route": trace.route,
        "caller": _text(trace.caller.name),
        "client": trace.client or None,
        "model": _text(trace.model) or None,
        "account": _text(trace.alias) or None,
        "rule": rule_of(trace),
        "binding": trace.binding or None,
        "outcome": trace.end.value,
        "status": trace.status or None,
        "error": _text(trace.error) or None,
        "attempts": len(trace.attempts),
        "stream": trace.stream,
        "first_event": None if first is None else first - began,
        "first_text": None if text is None else text - began,
        "seconds": trace.seconds,
        "input_tokens": usage.input_tokens if is_known else None,
        "cached_tokens": usage.cached_tokens if is_known else None,
        "output_tokens": usage.output_tokens if is_known else None,
        "reasoning_tokens": usage.reasoning_tokens if is_known else None,
        "usage_source": usage.source.value if is_known else None,
        "request_bytes": trace.request_bytes,
        "answer_bytes": trace.answer_bytes,
    }


def _text(text: str) -> str:
    """Return *text* as a database holds it: a caller may have written anything, at any length."""
    if len(text) <= _LONGEST and text.isascii():
        return text
    return text[:_LONGEST].encode("utf-8", "replace").decode()


def _packed(trace: Trace) -> bytes:
    """Return what of a turn has no column of its own: lists, because names would be most of it."""
    began = trace.started
    return dumps([
        None if trace.read is None else round(trace.read - began, 6),
        None if trace.queued is None else round(trace.queued - began, 6),
        round(trace.queued_seconds, 6),
        [
            [
                one.alias,
                round(one.started - began, 6),
                one.outcome,
                one.status,
                round(one.seconds, 6),
                None if one.connected is None else round(one.connected - began, 6),
                None if one.headers is None else round(one.headers - began, 6),
                # Only there where it is so: most attempts are on accounts.
                *((True,) if one.is_upstream else ()),
            ]
            for one in trace.attempts
        ],
        [_packed_decision(one) for one in trace.decisions],
    ])


def _packed_decision(decision: Decision) -> list[Any]:
    candidates = decision.candidates
    return [
        decision.alias,
        decision.rule,
        decision.strategy,
        round(decision.at, 6),
        decision.compared,
        # The parts have the same names for all.
        [name for name, _ in candidates[0].parts] if candidates else [],
        [[one.alias, one.score, [value for _, value in one.parts]] for one in candidates],
        [[one.alias, one.rule, one.evidence] for one in decision.excluded],
        decision.counts,
    ]


def _decision_of(packed: list[Any]) -> Decision:
    alias, rule, strategy, at, compared, names, candidates, excluded, counts = packed
    return Decision(
        alias,
        rule,
        strategy,
        at,
        [Candidate(name, score, tuple(zip(names, parts, strict=False))) for name, score, parts in candidates],
        compared,
        [Exclusion(*one) for one in excluded],
        tuple((why, count) for why, count in counts),
    )


def _upstream_of(account: str | None, attempts: list[list[Any]]) -> str:
    """Return the upstream that served, if one did: whoever answered was tried last."""
    last = attempts[-1] if attempts else []
    return account if account and len(last) > _FIELDS_OF_ACCOUNTS and last[0] == account else ""


# What is packed of an attempt on an account.
_FIELDS_OF_ACCOUNTS = 7


def trace_of(row: Columns, at: float) -> Trace:
    """Return a row as the turn it tells of; its times count from 0, the moment at which it came."""
    read, queued, queued_seconds, attempts, decisions = loads(row["story"])
    source = row["usage_source"]
    return Trace(
        row["id"],
        row["route"],
        # The name is all that is kept of it.
        Caller("", row["caller"]),
        0.0,
        at,
        model=row["model"] or "",
        stream=bool(row["stream"]),
        client=row["client"] or "",
        attempts=[Attempt(*one) for one in attempts],
        alias=row["account"] or "",
        upstream=_upstream_of(row["account"], attempts),
        decision=row["rule"] or "",
        decisions=[_decision_of(one) for one in decisions],
        binding=row["binding"] or "",
        status=row["status"] or 0,
        error=row["error"] or "",
        end=End(row["outcome"]),
        request_bytes=row["request_bytes"],
        answer_bytes=row["answer_bytes"],
        read=read,
        queued=queued,
        queued_seconds=queued_seconds,
        first_event=row["first_event"],
        first_text=row["first_text"],
        finished=row["seconds"],
        usage=Usage()
        if source is None
        else Usage(
            row["input_tokens"],
            row["cached_tokens"],
            0,
            row["output_tokens"],
            row["reasoning_tokens"],
            UsageSource(source),
        ),
    )  # fmt: skip
