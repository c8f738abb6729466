"""Answers that a caller may go on from by their id: in memory, for a while, each caller's apart.

Kept are the conversations of callers who neither are Codex clients (they send everything themselves) nor say
`store: false`. Nothing is written to disk, and what is too much goes, the longest unused first.
"""

import dataclasses
import functools
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from codex_proxy.clock import Clock
from codex_proxy.protocol import responses
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.dialect import Decoded, Surroundings
from codex_proxy.protocol.request import BackendRequest, parse_body
from codex_proxy.protocol.responses_request import decode_fields
from codex_proxy.protocol.transcript import (
    PREVIOUS,
    Transcript,
    decode_continued,
    go_on,
    not_found,
    take_previous,
)
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.tasks import Job
from codex_proxy.trace import Caller

# A tool loop goes on within minutes, a person after lunch starts anew or sends all of it.
TTL = 3600.0

# Long agentic conversations measure a megabyte or two; each turn adds only what is new.
MAX_BYTES = 256 * 1024 * 1024
MAX_CALLER_BYTES = 64 * 1024 * 1024
MAX_CALLER_ENTRIES = 2_000

_SWEEP_SECONDS = 60.0

# What an entry costs beside its text.
_ENTRY_BYTES = 512

# Bindings live as long as this process, so that a number is name enough; nobody else guesses the rest.
_OURS = f"chain-{os.urandom(8).hex()}-"
_NUMBERS = itertools.count(1)

_MENTIONED = f'"{PREVIOUS}"'.encode()


@dataclass(slots=True)
class _Shelf:
    """One caller's answers, the longest unused first, and the turns that they hold together."""

    entries: OrderedDict[str, tuple[float, Transcript]] = field(default_factory=OrderedDict)
    holds: dict[Transcript, int] = field(default_factory=dict)
    """How many entries and later turns hold a turn: conversations share their beginnings."""
    size: int = 0

    def put(self, response_id: str, transcript: Transcript, expires: float) -> None:
        self.drop(response_id)
        self.entries[response_id] = (expires, transcript)
        turn: Transcript | None = transcript
        while turn is not None:
            held = self.holds.get(turn, 0)
            self.holds[turn] = held + 1
            if held:
                break
            self.size += turn.own_bytes + _ENTRY_BYTES
            turn = turn.before

    def drop(self, response_id: str) -> None:
        entry = self.entries.pop(response_id, None)
        turn = entry[1] if entry is not None else None
        while turn is not None:
            self.holds[turn] -= 1
            if self.holds[turn]:
                break
            del self.holds[turn]
            self.size -= turn.own_bytes + _ENTRY_BYTES
            turn = turn.before

    def drop_oldest(self) -> None:
        self.drop(next(iter(self.entries)))

    def expire(self, now: float) -> None:
        # Each use renews an entry's life and its place, so the first ones end first.
        while self.entries and next(iter(self.entries.values()))[0] <= now:
            self.drop_oldest()


class Continuations:
    """What is remembered of each caller's conversations.

    Args:
        clock: Where times come from.
        ttl: How long an answer that nobody goes on from is kept, in seconds.
        max_bytes: How much is kept in all.
        max_caller_bytes: How much is kept for one caller.
        max_caller_entries: How many answers are kept for one caller.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        ttl: float = TTL,
        max_bytes: int = MAX_BYTES,
        max_caller_bytes: int = MAX_CALLER_BYTES,
        max_caller_entries: int = MAX_CALLER_ENTRIES,
    ) -> None:
        self._clock = clock
        self._ttl = ttl
        self._max_bytes = max_bytes
        self._max_caller_bytes = max_caller_bytes
        self._max_caller_entries = max_caller_entries
        self._shelves: dict[str, _Shelf] = {}

    def jobs(self) -> list[Job]:
        """Return what runs by itself: forgetting."""
        return [Job("forget", lambda: _SWEEP_SECONDS, self.sweep)]

    def get(self, caller: Caller, response_id: str) -> Transcript | None:
        """Return the conversation up to an answer that *caller* was given; it is then kept anew."""
        shelf = self._shelves.get(caller.id)
        entry = shelf.entries.get(response_id) if shelf is not None else None
        now = self._clock.monotonic()
        if shelf is None or entry is None or entry[0] <= now:
            return None
        shelf.entries[response_id] = (now + self._ttl, entry[1])
        shelf.entries.move_to_end(response_id)
        return entry[1]

    def put(self, caller: Caller, response_id: str, transcript: Transcript) -> None:
        """Remember a conversation; what is too much for that is forgotten."""
        now = self._clock.monotonic()
        shelf = self._shelves.setdefault(caller.id, _Shelf())
        shelf.expire(now)
        shelf.put(response_id, transcript, now + self._ttl)
        while shelf.size > self._max_caller_bytes or len(shelf.entries) > self._max_caller_entries:
            shelf.drop_oldest()
        while self.size > self._max_bytes:
            # Whoever holds most gives first, so that nobody pushes the others out.
            max(self._shelves.values(), key=lambda one: one.size).drop_oldest()

    async def sweep(self) -> None:
        """Forget what has had its time."""
        now = self._clock.monotonic()
        for caller_id, shelf in list(self._shelves.items()):
            shelf.expire(now)
            if not shelf.entries:
                del self._shelves[caller_id]

    @property
    def size(self) -> int:
        """How many bytes are kept."""
        return sum(shelf.size for shelf in self._shelves.values())

    def __len__(self) -> int:
        return sum(len(shelf.entries) for shelf in self._shelves.values())

    # -- turns ----------------------------------------------------------------------------

    def decode(
        self, raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: Caller, limit: int
    ) -> Decoded:
        """Decode the body of `POST /v1/responses`, which may go on from an answer.

        Args:
            limit: What a whole conversation may measure.

        Raises:
            RequestError: As `responses.decode`; also for an answer that is not remembered.
        """
        before: Transcript | None = None
        # Most bodies name no answer, and are parsed once.
        if _MENTIONED not in raw:
            request = responses.decode(raw, headers, catalog=catalog, caller=caller.id)
        else:
            fields = parse_body(raw)
            response_id = take_previous(fields)
            if response_id is None:
                request = decode_fields(fields, headers, catalog=catalog, caller=caller.id)
            else:
                before = self.get(caller, response_id)
                if before is None:
                    raise not_found(response_id)
                request = decode_continued(
                    fields,
                    headers,
                    catalog=catalog,
                    caller=caller.id,
                    response_id=response_id,
                    before=before,
                    new_bytes=len(raw),
                    limit=limit,
                )
        if not request.keeps or len(raw) > self._max_caller_bytes:
            return Decoded(request, functools.partial(responses.make_encoder, request))
        begin_chain(request)

        def remember(final: JsonObject) -> None:
            self.remember(caller, go_on(request, raw, before, final))

        return answering(request, remember)

    def remember(self, caller: Caller, gone: tuple[str, Transcript] | None) -> None:
        """Remember what `go_on` returned."""
        if gone is not None:
            self.put(caller, *gone)


def begin_chain(request: BackendRequest) -> None:
    """Give a conversation that opens, and names nothing, a name of its own beside how it begins.

    A next turn that goes on from its answer so finds its account, however many begin alike; one that
    brings the whole conversation finds it by how it begins.
    """
    binding = request.binding
    if binding is not None and binding.is_opening:
        request.binding = dataclasses.replace(binding, also=f"{_OURS}{next(_NUMBERS)}")


def answering(request: BackendRequest, answered: Callable[[JsonObject], None]) -> Decoded:
    """Return a request whose encoder tells *answered* of an answer that ended well."""

    def make(around: Surroundings) -> responses.Encoder:
        return responses.make_encoder(request, around, answered)

    return Decoded(request, make, answered)
