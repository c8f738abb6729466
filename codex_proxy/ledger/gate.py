"""The gate of turns: may it begin, may it go on, and what has it cost.

A turn is looked at in this order, and what was taken is given back when a later look refuses it:

| step       | what is asked                                         | refused with                          |
|------------|-------------------------------------------------------|---------------------------------------|
| permission | key and user still good; endpoint; model              | KeyRefused, NotAllowed                |
| place      | turns at a time, of the key, its user, of all         | RateLimited, after a wait in the queue|
| rates      | requests and tokens a minute, of the key and its user | RateLimited                           |
| price      | whether the model has one, where money is taken       | RequestError `model_price_missing`    |
| hold       | balance and budgets                                   | OutOfFunds, BudgetUsedUp, LedgerAway  |

Whoever has no key of the ledger (keys of the configuration, callers on this machine) is the owner: no limits but the
ceiling for all, nothing to pay, usage is kept.
"""

import itertools
import logging
import secrets
from functools import lru_cache

from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import KeyRefused, NotAllowed, OutOfFunds, ProxyError, RateLimited, RequestError
from codex_proxy.ledger.fairness import Ceilings, Crowded, Places
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import (
    NO_LIMITS,
    OWNER_ID,
    AttemptRow,
    Budget,
    Hold,
    Key,
    Limits,
    Settlement,
    User,
)
from codex_proxy.ledger.prices import MILLION, Cost, Price, clamped, cost, estimate, is_plain
from codex_proxy.ledger.pricing import Pricing
from codex_proxy.ledger.rates import Meters
from codex_proxy.patterns import fits
from codex_proxy.protocol.compact import COMPACT
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.tasks import Job
from codex_proxy.trace import End, Trace, Usage, UsageSource

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""The rule of thumb by which texts that nobody has counted are estimated."""

SEPARATOR = "~"
"""Between the id of a request, which a caller may choose, and what makes it ours alone."""

# How the ids of the ledger's keys begin; nobody else's do.
_KEY_ID = "key_"
# A turn that lives so long is taken for left behind, unless it asks for more meanwhile.
_HOLD_MILLISECONDS = 6 * 3_600_000
# How much of a hold may be used up before it grows.
_TOP_UP_AT = 0.8
# How often its caller's limit an answer may be long, by its bytes, until there is more in it than that.
_LIMIT_PASSED_AT = 2
_LOOK_SECONDS = 1.0
_MAX_STANDINGS = 4_096
# Nobody knows when a turn of another ends.
_CROWDED_SECONDS = 2.0

ENDPOINTS = {
    "responses/compact": "compact",
    "alpha/search": "search",
    "images/generations": "images",
    "images/edits": "images",
}
"""How limits call a route where that is not its name."""


# The same few are asked for again and again.
@lru_cache(maxsize=4096)
def may_use(patterns: tuple[str, ...], model: str, asked: str) -> bool:
    """Tell whether a model, by its own name or by what a caller calls it, is one of those that are allowed."""
    return any(fits(pattern, name) for pattern in patterns for name in (model, asked))


class _Standing:
    """What follows for a turn from its key and its user, as long as these are what they are."""

    __slots__ = ("budgets", "choosy", "key", "key_id", "owners", "user")

    def __init__(self, caller_id: str, key: Key | None, user: User) -> None:
        limits = NO_LIMITS if key is None else key.limits
        self.key = key
        self.user = user
        self.key_id = caller_id if key is None else key.id
        both = ((self.key_id, limits), (user.id, user.limits))
        self.owners = both if limits.has_rates or user.limits.has_rates else ()
        self.budgets = tuple([(owner, budget) for owner, one in both for budget in one.budgets])
        self.choosy = tuple([one for _, one in both if one.endpoints or one.models])
        """Limits that are not for every endpoint or model."""


class TurnGate:
    """Lets turns begin as far as keys, users and money allow."""

    def __init__(self, ledger: Ledger, pricing: Pricing, *, live: Live, clock: Clock) -> None:
        self.ledger = ledger
        self.pricing = pricing
        self.live = live
        self.clock = clock
        self.meters = Meters()
        self.places = Places(self._ceilings)
        # What a caller calls its requests is its own business; twice the same must not be one turn.
        self._own = f"{SEPARATOR}{secrets.token_hex(6)}"
        self._numbers = itertools.count(1)
        self._standings: dict[str, _Standing] = {}

    def enter(self, trace: Trace, request: BackendRequest) -> "TurnPassage":
        """Return the turn's passage."""
        return TurnPassage(self, trace, request)

    def jobs(self) -> list[Job]:
        """Return what runs by itself: a look whether a changed limit lets somebody in."""
        return [Job("gate", lambda: _LOOK_SECONDS, self._look)]

    async def _look(self) -> None:
        if self.places.waiting:
            self.places.look()

    def models_of(self, caller_id: str) -> tuple[tuple[str, ...], ...]:
        """Return the patterns of models that a caller may use, its key's and its user's; none for all."""
        key, user = self._who(caller_id)
        return tuple([
            one.models for one in (NO_LIMITS if key is None else key.limits, user.limits) if one.models
        ])

    def count(self, caller_id: str) -> None:
        """Let a caller have tokens counted, which is no turn and costs nothing but time.

        Raises:
            KeyRefused: If its key is not there any more.
            RateLimited: If it has done so too often for its limit of requests, or its user's.
        """
        owners = self.standing(caller_id).owners
        refusal = self.meters.count(owners, self.clock.monotonic()) if owners else None
        if refusal is not None:
            raise RateLimited(
                f"tokens may be counted {refusal.limit} times a minute", retry_after=refusal.seconds
            )

    def request_id(self, trace: Trace) -> str:
        """Return a name for a turn that nothing else in the ledger has."""
        return f"{trace.id}{self._own}{next(self._numbers):x}"

    def _ceilings(self, key_id: str, user_id: str) -> Ceilings:
        directory = self.ledger.directory
        key, user = directory.key(key_id), directory.look_up(user_id)
        return Ceilings(
            None if key is None else key.limits.concurrency,
            None if user is None else user.limits.concurrency,
            self.live.current.max_turns or None,
        )

    def _who(self, caller_id: str) -> tuple[Key | None, User]:
        directory = self.ledger.directory
        key = directory.key(caller_id)
        if key is None and caller_id.startswith(_KEY_ID):
            # Whoever has lost its key is not the owner.
            raise KeyRefused("this key is not there any more")
        user = directory.look_up(OWNER_ID if key is None else key.user_id)
        if user is None:
            raise KeyRefused("the owner of this key is not there any more", code="user_suspended")
        return key, user

    def standing(self, caller_id: str) -> _Standing:
        """Return what is to be known of whoever asks.

        Raises:
            KeyRefused: If that is nobody.
        """
        key, user = self._who(caller_id)
        known = self._standings.get(caller_id)
        if known is None or known.key is not key or known.user is not user:
            if len(self._standings) >= _MAX_STANDINGS:
                self._standings.clear()
            known = self._standings[caller_id] = _Standing(caller_id, key, user)
        return known


class TurnPassage:
    """One turn's way through the gate."""

    __slots__ = (
        "_budgets", "_covered", "_gate", "_has_place", "_is_billed", "_is_cut", "_is_whole", "_key_id", "_model", "_other", "_owners",
        "_price", "_request", "_reserve", "_step", "_threshold", "_tier", "_tokens", "_trace", "_user_id", "request_id",
    )  # fmt: skip

    def __init__(self, gate: TurnGate, trace: Trace, request: BackendRequest) -> None:
        self._gate = gate
        self._trace = trace
        self._request: BackendRequest | None = request
        self.request_id = ""
        """What the ledger calls the turn; empty until it holds something."""
        self._key_id = self._user_id = ""
        self._owners: tuple[tuple[str, Limits], ...] = ()
        self._budgets: tuple[tuple[str, Budget], ...] = ()
        self._has_place = False
        self._tokens: int | None = None
        """What was counted under the limits of tokens; None when nothing was."""
        self._price: Price | None = None
        self._other: tuple[str, str, Price | None] | None = None
        """The model and the tier that the caller names, and their price, where an upstream may serve those, not `_model` in `_tier`."""
        self._model = request.model
        self._tier = request.service_tier or ""
        self._is_billed = False
        self._is_whole = False
        """More is set aside than a stream would need at first."""
        self._is_cut = False
        """There was no money for it to go on."""
        self._reserve = 0
        """How many tokens of output are set aside at a time."""
        self._covered = 0
        """How many of them the hold covers."""
        self._threshold: float = float("inf")
        """At how many bytes of text it is time for more."""
        self._step = 0
        """What they cost."""

    # -- in --------------------------------------------------------------------------------

    async def admit(self) -> None:
        """Let the turn begin.

        Raises:
            KeyRefused: If its key, or the owner of it, may not be used any more.
            NotAllowed: If its model or endpoint is not for this key.
            RateLimited: If a limit is reached, and the wait for a place was in vain.
            RequestError: If it has to be paid and has no price.
            OutOfFunds: If balance or budgets do not reach.
            LedgerAway: If that cannot be found out.
        """
        try:
            user = self._permit()
            self._has_place = self._gate.places.try_enter(self._key_id, self._user_id)
            if not self._has_place:
                await self._wait_for_place()
                # It may have been changed meanwhile.
                user = self._permit()
            hold = self._reckon(user)
            # Also when this is cancelled: it has to be released then.
            self.request_id = hold.request_id
            asked = self._gate.ledger.begin(hold)
            if asked is not None:
                await self._gate.ledger.ask(asked)
        except ProxyError as exc:
            self.request_id = ""
            self._give_back()
            if self._owners:
                # It has used up nothing.
                self._trace.allowance = self._gate.meters.left(self._owners, self._gate.clock.monotonic())
            if self._is_whole and type(exc) is OutOfFunds:
                words = "as a stream, or with a limit of its output, it needs less at a time"
                raise OutOfFunds(f"{exc.message}; {words}") from exc
            raise
        # The body is not needed, and may be large.
        self._request = None

    def _permit(self) -> User:
        """Return whose turn it is."""
        gate, trace, request = self._gate, self._trace, self._request
        assert request is not None
        standing = gate.standing(trace.caller.id)
        key, user = standing.key, standing.user
        if key is not None:
            if key.status != "active":
                raise KeyRefused("this key was revoked", code="key_revoked")
            if key.expires is not None and key.expires <= gate.clock.now() * 1000:
                raise KeyRefused("this key has expired", code="key_expired")
        if user.status != "active":
            raise KeyRefused("the owner of this key is suspended", code="user_suspended")
        self._key_id, self._user_id = standing.key_id, user.id
        for one in standing.choosy:
            endpoint = ENDPOINTS.get(trace.route, trace.route)
            if one.endpoints and endpoint not in one.endpoints:
                raise NotAllowed(
                    f"this key may not ask for {endpoint}: it may for {', '.join(one.endpoints)}",
                    code="endpoint_not_allowed",
                )
            # A search names no model.
            if one.models and not request.model and endpoint != "search":
                raise NotAllowed(
                    f"this key may not leave the model open, nor name it in a form: it may use {', '.join(one.models)}",
                    code="model_not_allowed",
                    param="model",
                )
            # Where an upstream may serve the model that is named, one that stands for it here allows nothing.
            model = request.asked_model if _may_be_other(request) else request.model
            if one.models and request.model and not may_use(one.models, model, request.asked_model):
                raise NotAllowed(
                    f"this key may not use the model {request.asked_model!r}: it may use {', '.join(one.models)}",
                    code="model_not_allowed",
                    param="model",
                )
        self._owners, self._budgets = standing.owners, standing.budgets
        return user

    async def _wait_for_place(self) -> None:
        gate = self._gate
        try:
            await gate.places.enter(self._key_id, self._user_id, gate.live.current.queue_timeout)
        except Crowded as exc:
            raise RateLimited(_crowded_words(exc), retry_after=_CROWDED_SECONDS) from exc
        self._has_place = True

    def _reckon(self, user: User) -> Hold:
        """Count the turn under its rates, and return what is to be set aside for it."""
        gate, request = self._gate, self._request
        assert request is not None
        read = input_tokens(request)
        self._reserve = reserve = gate.live.current.reserve_tokens
        # Embedding writes nothing.
        most = 0 if self._trace.route == "embeddings" else request.max_output_tokens
        if request.endpoint == COMPACT:
            # It comes whole, and is no longer than what it is made of.
            most = max(read, reserve)
        written = reserve if most is None else min(most, reserve)
        self._take_rates(read + written)
        at = int(gate.clock.now() * 1000)
        price = gate.pricing.book.find(request.model, at, request.service_tier)
        self._price = price
        self._is_billed = user.is_billed and gate.ledger.mode == "billing"
        tier = _tier_elsewhere(request)
        if _may_be_other(request) or tier != request.service_tier:
            model = request.asked_model if _may_be_other(request) else request.model
            named = gate.pricing.book.find(model, at, tier)
            self._other = (model, tier or "", named)
            if named is None or price is None:
                price = None
            else:
                # Who will serve is not known yet.
                price = max(price, named, key=lambda one: estimate(one, read, written))
        if price is None and self._is_billed:
            raise _unpriced(request, tier)
        is_whole = self._is_billed and price is not None and _may_come_whole(request)
        if is_whole and price is not None and (most is None or most > reserve):
            # There is no moment at which more could be set aside, or the answer be cut.
            written = price.most_written if most is None else min(most, price.most_written)
            # A compaction can be had in no other way.
            self._is_whole = written > reserve and request.endpoint != COMPACT
        elif price is not None and written and (self._is_billed or self._budgets):
            # A caller's limit bounds what is said, not what is thought; and an upstream may not keep it at all.
            at_part = _TOP_UP_AT if most is None or most > reserve else _LIMIT_PASSED_AT
            self._covered = written
            self._threshold = written * BYTES_PER_TOKEN * at_part
            self._step = -(-reserve * price.rates(read).output // MILLION)
        return Hold(
            gate.request_id(self._trace),
            self._user_id,
            self._key_id,
            0 if price is None else estimate(price, read, written),
            at,
            at + _HOLD_MILLISECONDS,
            request.model,
            self._budgets,
        )

    def _take_rates(self, tokens: int) -> None:
        if not self._owners:
            return
        gate, now = self._gate, self._gate.clock.monotonic()
        refusal, self._trace.allowance = gate.meters.take(self._owners, tokens, now)
        if refusal is not None:
            whose = "this key" if refusal.owner == self._key_id else "all keys of this user together"
            raise RateLimited(
                f"{whose} may send {refusal.limit} {refusal.what} a minute", retry_after=refusal.seconds
            )
        self._tokens = tokens

    # -- on the way ------------------------------------------------------------------------

    async def top_up(self, text_bytes: int) -> bool:
        """Let the stream go on; asked once per upstream read."""
        if text_bytes < self._threshold:
            return True
        while text_bytes >= self._threshold:
            if await self._gate.ledger.top_up(self.request_id, self._step):
                self._covered += self._reserve
                self._threshold = self._covered * BYTES_PER_TOKEN * _TOP_UP_AT
            elif text_bytes >= (end := self._covered * BYTES_PER_TOKEN):
                self._is_cut = True
                return False
            else:
                # What is set aside may be used up; then it is asked once more.
                self._threshold = end
        return True

    # -- out -------------------------------------------------------------------------------

    def settle(self) -> None:
        """Account for the turn, and give back its place."""
        request_id, self.request_id = self.request_id, ""
        try:
            if request_id:
                self._settle(request_id)
        except Exception:
            logger.exception("turn was not settled id=%s", self._trace.id)
        finally:
            self._give_back()

    def _settle(self, request_id: str) -> None:
        gate, trace = self._gate, self._trace
        if self._other is not None and trace.is_as_named:
            self._model, self._tier, self._price = self._other
        usage, price = _delivered(trace, is_cut=self._is_cut), self._price
        counted: Cost | None = None
        if price is None:
            usage, flags = clamped(usage)
        else:
            counted = cost(price, usage)
            usage, flags = counted.usage, counted.flags
        if self._tokens is not None:
            gate.meters.correct(self._owners, 0, usage.total_tokens - self._tokens, gate.clock.monotonic())
            self._tokens = None
        gate.ledger.settle(
            Settlement(
                request_id=request_id,
                user_id=self._user_id,
                key_id=self._key_id,
                at=int(gate.clock.now() * 1000),
                route=trace.route,
                asked_model=trace.model,
                model=self._model,
                tier=self._tier,
                target=trace.alias,
                upstream=trace.upstream,
                client=trace.client,
                end=trace.end.value,
                status=trace.status,
                error=trace.error,
                input_tokens=usage.input_tokens,
                cached_tokens=usage.cached_tokens,
                cache_write_tokens=usage.cache_write_tokens,
                output_tokens=usage.output_tokens,
                reasoning_tokens=usage.reasoning_tokens,
                source=usage.source,
                flags=flags,
                cost=None if counted is None else counted.nanos,
                is_billed=self._is_billed,
                prices={} if counted is None else counted.prices,
                price_id="" if counted is None else counted.price_id,
                milliseconds=int(trace.seconds * 1000),
                budgets=self._budgets,
                attempts=tuple([
                    AttemptRow(one.alias, one.outcome, one.status, int(one.seconds * 1000))
                    for one in trace.attempts
                ]),
            )
        )

    def _give_back(self) -> None:
        """Give back what the turn has taken and not used."""
        if self._tokens is not None:
            self._gate.meters.correct(self._owners, -1, -self._tokens, self._gate.clock.monotonic())
            self._tokens = None
        if self._has_place:
            self._has_place = False
            self._gate.places.leave(self._key_id, self._user_id)


def input_tokens(request: BackendRequest) -> int:
    """Return about how many tokens a request has: text by its bytes, compacted history by what it is made of."""
    tokens = -(-request.input_bytes // BYTES_PER_TOKEN)
    if request.compacted:
        # Base64 of bytes that only the backend can read.
        tokens += sum(map(len, request.compacted)) * 3 // (4 * BYTES_PER_TOKEN)
    return min(tokens, request.context_window) if request.context_window else tokens


def _may_come_whole(request: BackendRequest) -> bool:
    """Tell whether all of it may come at once."""
    return request.endpoint == COMPACT or (request.native is not None and not request.native.stream)


def _may_be_other(request: BackendRequest) -> bool:
    """Tell whether an upstream may serve the model that the caller names, and accounts another one."""
    return request.native is not None and request.native.is_other


def _tier_elsewhere(request: BackendRequest) -> str | None:
    """Return the tier in which an upstream may serve what it gets as its caller wrote it."""
    asked = request.asked_tier
    # "fast" is another word for what accounts are asked then.
    if request.native is None or is_plain(asked) or asked == "fast":
        return request.service_tier
    return asked


def _delivered(trace: Trace, *, is_cut: bool) -> Usage:
    """Return what is to be paid of a turn: nothing of one that failed before anything of an answer was there.

    Whoever leaves, or whose money is used up, has used what was read and written until then.
    """
    usage = trace.usage
    if trace.end is not End.FAILED or is_cut:
        return usage
    is_something = bool(usage.output_tokens) or usage.source is UsageSource.BACKEND
    return usage if trace.answer_bytes and is_something else Usage()


def _unpriced(request: BackendRequest, tier: str | None) -> RequestError:
    if not request.model:
        words = "this request names no model, so nobody knows what it costs"
    elif tier:
        words = f"there is no price for {request.asked_model!r} in the service tier {tier[:100]!r}"
    else:
        words = f"there is no price for the model {request.asked_model!r}"
    return RequestError(
        f"{words}; the owner of this proxy can set one", code="model_price_missing", param="model"
    )


def _crowded_words(crowded: Crowded) -> str:
    match crowded.whose:
        case "key":
            whose = "this key has"
        case "user":
            whose = "all keys of this user together have"
        case _:
            return "the proxy has as many requests under way as it may have, and others wait too"
    return (
        f"{whose} {crowded.limit} requests under way, which is the limit, and none of them has ended in time"
    )
