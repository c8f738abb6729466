"""The last turns, kept so that their decisions can be asked for: bounded in number and in bytes.

A finished trace is kept as it is and rendered only when somebody asks, so that a turn pays
for no more than being counted.
"""

from collections import OrderedDict
from collections.abc import Iterator

from codex_proxy.accounts.telling import text_of
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.records.story import short, story
from codex_proxy.trace import Trace

MAX_TURNS = 1_000
MAX_BYTES = 16 * 1024 * 1024

SHOWN = 20
"""How many of the last ones /stats shows."""

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
            newest.append(short(trace))
        return newest

    def traces(self) -> Iterator[Trace]:
        """Yield the turns themselves, the newest first."""
        return (trace for trace, _ in reversed(self._turns.values()))

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
