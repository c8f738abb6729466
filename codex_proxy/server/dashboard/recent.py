"""What the page shows of finished turns when none are kept on disk: the last ones, from memory."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from codex_proxy.protocol.wire import JsonObject
from codex_proxy.records.asking import Filter, Page
from codex_proxy.records.story import detail_json, request_json, rule_of
from codex_proxy.trace import Trace

_MOST_TOLD = 50

Traces = Callable[[], Iterable[Trace]]
"""Return the turns that are remembered, the newest first."""


class Tail:
    """Turns as they finish, for one page: no more than fit on a screen are kept until they are taken."""

    def __init__(self, close: "Callable[[Tail], None]") -> None:
        self._close = close
        self._waiting: deque[Trace] = deque(maxlen=_MOST_TOLD)
        self._count = 0

    def note(self, trace: Trace) -> None:
        """Take in a finished turn."""
        self._waiting.append(trace)
        self._count += 1

    def take(self) -> tuple[Sequence[JsonObject], int]:
        """Return those since the last call, the newest first, and how many more there were."""
        told = [request_json(trace) for trace in reversed(self._waiting)]
        dropped = self._count - len(told)
        self._waiting.clear()
        self._count = 0
        return told, dropped

    def close(self) -> None:
        """Listen no more."""
        self._close(self)


class Tails:
    """Tells every page that looks on of every turn."""

    def __init__(self) -> None:
        self._tails: list[Tail] = []

    def note(self, trace: Trace) -> None:
        """Take in a finished turn; nothing is done while nobody looks."""
        for tail in self._tails:
            tail.note(trace)

    def open(self) -> Tail:
        """Return what tells of turns from now on."""
        tail = Tail(self._tails.remove)
        self._tails.append(tail)
        return tail


class Recent:
    """Answers for the last turns only."""

    def __init__(self, traces: Traces, tails: Tails) -> None:
        self._traces = traces
        self._tails = tails

    def feed(self) -> Tail:
        """Return what tells of turns as they finish."""
        return self._tails.open()

    async def page(self, page: Page) -> JsonObject:
        """Return some turns, the newest first."""
        known = sorted(self._traces(), key=_key, reverse=True)
        found = [
            trace
            for trace in known
            if (page.before is None or _key(trace) < page.before) and _fits(trace, page.wanted)
        ]
        shown = found[: page.limit]
        return {
            "requests": [request_json(trace) for trace in shown],
            "next": str(_key(shown[-1])) if len(found) > page.limit else None,
            "since": known[-1].started_wall if known else None,
            "callers": sorted({trace.caller.name for trace in known}),
            "accounts": sorted({trace.alias for trace in known if trace.alias}),
            "models": sorted({trace.model for trace in known if trace.model}),
        }

    async def find(self, request_id: str) -> JsonObject | None:
        """Return all that is known of a turn."""
        for trace in self._traces():
            if trace.id == request_id:
                return {**detail_json(trace), "capture": None}
        return None

    async def cache(self, hours: float) -> JsonObject:
        """Return how well caches were hit by what is remembered."""
        turns = list(self._traces())
        newest = turns[0].started_wall if turns else 0.0
        turns = [trace for trace in turns if trace.started_wall >= newest - hours * 3_600.0]
        return {
            "since": turns[-1].started_wall if turns else None,
            "turns": len(turns),
            "input_tokens": sum(trace.usage.input_tokens for trace in turns),
            "cached_tokens": sum(trace.usage.cached_tokens for trace in turns),
            "by_client": _rows(turns, lambda trace: trace.client),
            "by_binding": _rows(turns, lambda trace: trace.binding),
            "by_model": _rows(turns, lambda trace: trace.model),
            "by_account": _rows(turns, lambda trace: trace.alias),
            "by_rule": _rows(turns, lambda trace: rule_of(trace) or ""),
            "series": _series(turns),
        }


def _rows(turns: Sequence[Trace], name_of: Callable[[Trace], str]) -> list[JsonObject]:
    sums: dict[str, list[int]] = {}
    for trace in turns:
        row = sums.setdefault(name_of(trace) or "none", [0, 0, 0])
        row[0] += 1
        row[1] += trace.usage.input_tokens
        row[2] += trace.usage.cached_tokens
    return [
        {
            "name": name,
            "turns": count,
            "input_tokens": sent,
            "cached_tokens": cached,
            "cached_share": round(cached / sent, 4) if sent else None,
        }
        for name, (count, sent, cached) in sorted(sums.items(), key=lambda one: -one[1][1])
    ]


def _series(turns: Sequence[Trace]) -> list[list[float]]:
    """Return input and cached tokens in sixty steps, oldest first."""
    if not turns:
        return []
    first, last = turns[-1].started_wall, turns[0].started_wall
    step = max(60.0, (last - first) / 60)
    sums: dict[int, list[int]] = {}
    for trace in turns:
        row = sums.setdefault(int((trace.started_wall - first) / step), [0, 0])
        row[0] += trace.usage.input_tokens
        row[1] += trace.usage.cached_tokens
    return [[round(first + place * step, 3), sent, cached] for place, (sent, cached) in sorted(sums.items())]


def _key(trace: Trace) -> int:
    """Return the place of a turn among all others: when it came, in microseconds."""
    return int(trace.started_wall * 1_000_000)


def _fits(trace: Trace, wanted: Filter) -> bool:
    equal = (
        (wanted.caller, trace.caller.name),
        (wanted.account, trace.alias),
        (wanted.model, trace.model),
        (wanted.outcome, trace.end.value),
        (wanted.route, trace.route),
        (wanted.client, trace.client),
    )
    if any(value is not None and value != own for value, own in equal):
        return False
    if wanted.q is not None:
        part = wanted.q.lower()
        if part not in trace.id.lower() and part not in trace.error.lower():
            return False
    if wanted.since is not None and trace.started_wall < wanted.since:
        return False
    if wanted.until is not None and trace.started_wall >= wanted.until:
        return False
    return wanted.min_seconds is None or trace.seconds >= wanted.min_seconds
