"""One story per turn: what was asked, what was tried, what it cost, how it ended.

Log line, /stats, metrics and (later) records and money are made from the same `Trace`, so
they cannot disagree. It is filled on the way and finished exactly once.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(slots=True, frozen=True)
class Caller:
    """Who is asking: resolved once per turn from the client key."""

    id: str
    """Stable and safe to show; never the key."""
    name: str


LOCAL = Caller("local", "local")
"""The caller when no key is needed."""


class UsageSource(enum.Enum):
    """Where token numbers come from."""

    NONE = "none"
    BACKEND = "backend"
    ESTIMATE = "estimate"


@dataclass(slots=True)
class Usage:
    """Tokens of one turn; `input_tokens` includes cached ones, `output_tokens` the reasoning."""

    input_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    source: UsageSource = UsageSource.NONE

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def add(self, turn: "Usage") -> None:
        """Add another turn's tokens; the source stays."""
        self.input_tokens += turn.input_tokens
        self.cached_tokens += turn.cached_tokens
        self.cache_write_tokens += turn.cache_write_tokens
        self.output_tokens += turn.output_tokens
        self.reasoning_tokens += turn.reasoning_tokens


@dataclass(slots=True)
class Attempt:
    """One try on one target."""

    alias: str
    """The account's, or the name of the upstream."""
    started: float
    """Monotonic seconds."""
    outcome: str = ""
    """A verdict's word, or "ok"."""
    status: int | None = None
    seconds: float = 0.0
    connected: float | None = None
    """When a connection made for it stood; None on one that was kept."""
    headers: float | None = None
    """When the head of its answer was there, if that was a good one."""
    is_upstream: bool = False
    """Whether `alias` is the name of an HTTP upstream, and not an account's."""


@dataclass(slots=True, frozen=True)
class Candidate:
    """One account that could have served, and what spoke for it."""

    alias: str
    score: float
    """Higher is better; its scale is the strategy's own."""
    parts: tuple[tuple[str, float], ...] = ()
    """What the score is made of."""


@dataclass(slots=True, frozen=True)
class Exclusion:
    """One account that could not serve: the rule, and the evidence for it."""

    alias: str
    rule: str
    evidence: str


@dataclass(slots=True)
class Decision:
    """Why an attempt went where it went. Bounded: the best candidates, some exclusions, counts of all.

    One is made for every attempt and few are looked at, so its parts may be made only then.
    """

    alias: str
    """The account; empty when none could serve."""
    rule: str
    """The rule that picked it."""
    strategy: str
    at: float
    """Wall clock."""
    candidates: Sequence[Candidate] = ()
    """The best few, the best first; empty when the rule needed no comparison."""
    compared: int = 0
    """How many accounts could have served."""
    excluded: Sequence[Exclusion] = ()
    counts: tuple[tuple[str, int], ...] = ()
    """How many accounts each rule excluded."""


@dataclass(slots=True)
class Capture:
    """What was said in a turn, up to a limit: kept only of callers for whom the owner has switched that on."""

    limit_bytes: int
    """Of what was asked, and of what was answered."""
    request: bytes = field(default=b"", repr=False)
    answer: list[bytes] = field(default_factory=list, repr=False)
    is_cut: bool = False
    """More was said than is kept."""
    _room: int = 0

    def ask(self, data: bytes) -> None:
        """Take what was asked."""
        self._room = self.limit_bytes
        self.request = data[: self.limit_bytes]
        self.is_cut = len(data) > self.limit_bytes

    def add(self, data: bytes) -> None:
        """Take more of what is answered."""
        if not self.answer:
            # What stands between two items stands before the first one too.
            data = data.lstrip(b"\n")
        if len(data) > self._room:
            self.is_cut = True
            data = data[: self._room]
        if data:
            self._room -= len(data)
            self.answer.append(data)


class Room(NamedTuple):
    """What is left under one limit."""

    limit: int
    remaining: int
    resets_in: float
    """Seconds until all of it is there again."""


class Allowance(NamedTuple):
    """What a caller may still ask, by the tighter one of its own limits and its user's; None where there is none."""

    requests: Room | None = None
    tokens: Room | None = None


class End(enum.Enum):
    """How a turn ended, seen from the caller."""

    OPEN = "open"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    """The answer ended early by a limit, and says so."""
    FAILED = "failed"
    """An error was answered, before or inside the stream."""
    CALLER_GONE = "caller_gone"


@dataclass(slots=True)
class Trace:
    """The story of one turn. Times are monotonic seconds unless they say otherwise."""

    id: str
    route: str
    caller: Caller
    started: float
    started_wall: float
    model: str = ""
    stream: bool = False
    client: str = ""
    """The kind of client: "codex" or "other"."""
    attempts: list[Attempt] = field(default_factory=list)
    alias: str = ""
    """The account, or the upstream, that served, if one did."""
    upstream: str = ""
    """The name of the HTTP upstream that served; empty when it was an account."""
    is_as_named: bool = False
    """Whether the model that the caller named was asked, and not the one that stands for it here."""
    allowance: Allowance | None = None
    """What the caller may still ask, where there are limits."""
    decision: str = ""
    """Why this account: the rule that picked it."""
    decisions: list[Decision] = field(default_factory=list)
    """One per attempt, and one for a choice that found nobody."""
    binding: str = ""
    """What the conversation was known by, such as `prompt_cache_key`; empty when by nothing."""
    status: int = 0
    """The HTTP status that the caller saw."""
    error: str = ""
    """The code of the error that the caller saw."""
    end: End = End.OPEN
    request_bytes: int = 0
    answer_bytes: int = 0
    read: float | None = None
    """When the request was there, and understood."""
    queued: float | None = None
    """When it began to wait for an account's place, if it had to."""
    queued_seconds: float = 0.0
    """How long it waited for places, in all."""
    first_event: float | None = None
    first_text: float | None = None
    """When the first words of the answer, or of a call's arguments, were passed on."""
    finished: float | None = None
    usage: Usage = field(default_factory=Usage)
    said: Capture | None = None
    """Taken out when the turn goes on record: whoever else keeps a trace keeps none of it."""

    def finish(self, end: End, now: float) -> bool:
        """Close the story; only the first call counts, and says so by True."""
        if self.finished is not None:
            return False
        self.end = end
        self.finished = now
        return True

    @property
    def seconds(self) -> float:
        """How long the turn took; 0 while it runs."""
        return 0.0 if self.finished is None else self.finished - self.started


TraceSink = Callable[[Trace], None]
"""What wants to hear of finished turns; called once per turn, must not block."""
