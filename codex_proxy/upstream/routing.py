"""The order of all targets: accounts, which are one member among the upstreams, and the upstreams.

Small priorities come first. Inside one, each conversation has an order of its own (`rendezvous`), so it stays where it
was and moves only when that cannot serve. Whoever cannot serve now is passed over; if nobody can, and there are
upstreams that are only ejected, the one that has the least of that to go is asked all the same.
"""

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import (
    PoolBusy,
    PoolEmpty,
    PoolError,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RequestError,
)
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import Candidate, Decision, Exclusion
from codex_proxy.upstream.backend import AccountRoute, split_turn_state
from codex_proxy.upstream.provider import Blocked, Provider, Way
from codex_proxy.upstream.providers import Providers
from codex_proxy.upstream.rendezvous import order
from codex_proxy.upstream.route import Lease

logger = logging.getLogger(__name__)

ACCOUNTS = "accounts"
"""What the accounts together are called among the upstreams."""

STRATEGY = "upstreams"
"""What stands for a strategy where an upstream was chosen."""

# A lone target in trouble is asked again after this, as long as its turn has retries left.
_AGAIN_SECONDS = 0.5

_MAX_CHAINS = 10_000

# Of the models that there are, so many are named to a caller who asked for another one.
_MAX_NAMED = 30


@dataclass(slots=True)
class _Look:
    """One look at all targets: what was found wrong with whom."""

    candidates: list[Candidate]
    excluded: list[Exclusion]
    blocked: list[tuple[Provider, Way, Blocked]]
    pool: ProxyError | None = None


class MergedRoute:
    """Picks accounts and upstreams."""

    def __init__(self, accounts: AccountRoute, providers: Providers, *, live: Live, clock: Clock) -> None:
        self._accounts = accounts
        self._providers = providers
        self._live = live
        self._clock = clock
        self._chains: OrderedDict[str, str] = OrderedDict()
        """The names under which conversations will go on that have none of their own, and who has them."""

    def limits(self) -> JsonObject | None:
        """Return the accounts' view of their quota; see `AccountRoute.limits`."""
        return self._accounts.limits()

    async def wait_for_place(
        self, request: BackendRequest, tried: Collection[str], *, seconds: float, ticket: float
    ) -> None:
        """Wait until an account has room: upstreams have no places that could be waited for."""
        await self._accounts.wait_for_place(request, tried, seconds=seconds, ticket=ticket)

    def pick(self, request: BackendRequest, tried: Collection[str]) -> Lease:
        """Take the first target in the order of *request*'s conversation that can serve it now.

        Raises:
            PoolError: If there is none now.
            RequestError: If no target can ever serve this.
        """
        able = self._able(request)
        native = request.native
        refusal = native.refusal if native is not None else None
        if not able:
            if refusal is not None:
                raise refusal
            if native is not None and not self._accounts.are_there:
                raise self._nothing_for(native.model)
            return self._accounts.pick(request, tried)
        groups: dict[int, list[tuple[Provider, Way] | None]] = {}
        if refusal is None:
            groups[self._live.current.accounts_priority] = [None]
        for entry in able:
            groups.setdefault(entry[0].definition.priority, []).append(entry)
        look = _Look([], [], [])
        for priority in sorted(groups):
            lease = self._pick_in(priority, groups[priority], request, tried, look)
            if lease is not None:
                return lease
        lease = self._least_bad(request, tried, look)
        if lease is not None:
            return lease
        raise self._nobody(look, able, tried)

    def _nothing_for(self, model: str) -> ProxyError:
        """Say that no upstream serves a model, where there are no accounts."""
        if not self._providers.count()[0]:
            return PoolEmpty("no account is loaded, and every upstream is switched off")
        listed = self._providers.listed()
        names = f"; they serve: {', '.join(listed[:_MAX_NAMED])}" if listed else ""
        return RequestError(
            f"the model {model!r} is not available here: no upstream serves it{names}",
            param="model",
            code="model_not_found",
        )

    def _able(self, request: BackendRequest) -> list[tuple[Provider, Way]]:
        """Return the upstreams that could ever serve *request*."""
        if request.native is None:
            return []
        if request.compacted and self._accounts.has_written(request.compacted[-1]):
            # History that only its account can read.
            return []
        return self._providers.able(request)

    def _pick_in(
        self,
        priority: int,
        group: Sequence[tuple[Provider, Way] | None],
        request: BackendRequest,
        tried: Collection[str],
        look: _Look,
    ) -> Lease | None:
        """Take the first of one priority that can serve."""
        members = {ACCOUNTS if one is None else one[0].key: one for one in group}
        weights = [(key, 1.0 if one is None else one[0].definition.weight) for key, one in members.items()]
        ranked = order(self._name_of(request), weights)
        home = self._home(request, members)
        if home is not None:
            ranked.sort(key=lambda entry: entry[0] != home)
        for key, score in ranked:
            member = members[key]
            alias = ACCOUNTS if member is None else member[0].name
            weight = 1.0 if member is None else member[0].definition.weight
            look.candidates.append(
                Candidate(alias, score, (("priority", float(priority)), ("weight", weight)))
            )
            lease = (
                self._pick_account(request, tried, look)
                if member is None
                else self._pick_provider(*member, request, tried, look, is_home=key == home)
            )
            if lease is not None:
                self._remember(request, key)
                return lease
        return None

    def _pick_account(self, request: BackendRequest, tried: Collection[str], look: _Look) -> Lease | None:
        try:
            return self._accounts.pick(request, tried)
        except PoolBusy as exc:
            if exc.patience is not None:
                # An account is on trial, and its word is a moment away.
                raise
            look.pool = exc
        except (PoolError, RequestError) as exc:
            look.pool = exc
        look.excluded.append(Exclusion(ACCOUNTS, look.pool.code or look.pool.type, look.pool.message[:200]))
        return None

    def _pick_provider(
        self,
        provider: Provider,
        way: Way,
        request: BackendRequest,
        tried: Collection[str],
        look: _Look,
        *,
        is_home: bool,
    ) -> Lease | None:
        now = self._clock.monotonic()
        if provider.key in tried:
            look.excluded.append(Exclusion(provider.name, "tried", provider.last_error))
            return None
        blocked = provider.blocked(way.model, now)
        if blocked is not None:
            look.excluded.append(Exclusion(provider.name, blocked.rule, blocked.evidence))
            look.blocked.append((provider, way, blocked))
            return None
        is_probe = provider.outlier(way.model).is_half_open(now)
        rule = (
            "probe" if is_probe else "failover" if look.excluded else "goes on here" if is_home else "order"
        )
        return self._lease(provider, way, rule, look, is_probe=is_probe)

    def _lease(
        self, provider: Provider, way: Way, rule: str, look: _Look, *, is_probe: bool = False
    ) -> Lease:
        counts: dict[str, int] = {}
        for one in look.excluded:
            counts[one.rule] = counts.get(one.rule, 0) + 1
        decision = Decision(
            provider.name,
            rule if way.is_native else f"{rule}, translated",
            STRATEGY,
            self._clock.now(),
            candidates=tuple(look.candidates),
            compared=len(look.candidates),
            excluded=tuple(look.excluded),
            counts=tuple(counts.items()),
        )
        return self._providers.lease(provider, way, decision, is_probe=is_probe)

    def _least_bad(self, request: BackendRequest, tried: Collection[str], look: _Look) -> Lease | None:
        """Take the ejected upstream that has the least of it to go, because nobody else can serve."""
        ejected = [
            (blocked.until, provider.name, provider, way)
            for provider, way, blocked in look.blocked
            if blocked.rule in ("ejected", "down")
        ]
        if not ejected:
            return None
        _, _, provider, way = min(ejected, key=lambda entry: entry[:2])
        self._remember(request, provider.key)
        return self._lease(provider, way, "least bad", look)

    def _nobody(
        self, look: _Look, able: Sequence[tuple[Provider, Way]], tried: Collection[str]
    ) -> ProxyError:
        """Say that nobody can serve now, and when somebody can."""
        now = self._clock.monotonic()
        waits = [blocked.until - now for _, _, blocked in look.blocked if blocked.rule == "resting"]
        for provider, way in able:
            if provider.key not in tried:
                continue
            blocked = provider.blocked(way.model, now)
            if blocked is None or blocked.rule in ("ejected", "down"):
                waits.append(_AGAIN_SECONDS)
            elif blocked.rule == "resting":
                waits.append(blocked.until - now)
        pool = look.pool
        if isinstance(pool, PoolBusy) or (isinstance(pool, PoolError) and pool.is_for_history):
            # A place on an account is waited for, and all are looked at again meanwhile.
            return pool
        if isinstance(pool, PoolShortage | PoolExhausted):
            waits.append(pool.retry_after)
        error: PoolError
        if isinstance(pool, PoolExhausted) and (not waits or pool.retry_after <= min(waits)):
            error = pool
        elif waits:
            error = PoolShortage(
                "no account and no upstream that could serve this can just now; try again in a moment",
                retry_after=max(0.0, min(waits)),
            )
        else:
            error = PoolEmpty(
                "no upstream that could serve this can without help: its key is refused; its owner's log says more"
            )
        error.decision = Decision(
            "",
            "nobody could serve",
            STRATEGY,
            self._clock.now(),
            excluded=tuple(look.excluded),
        )
        return error

    # -- which conversation lives where ----------------------------------------------------

    def _name_of(self, request: BackendRequest) -> str:
        """Return by what the order of a request is made: its conversation, else its caller."""
        native = request.native
        return request.session or (native.caller if native is not None else "")

    def _home(self, request: BackendRequest, members: Collection[str]) -> str | None:
        """Return who has a conversation that did not come by the order alone; None when nobody has."""
        tag, _ = split_turn_state(request.turn_state)
        if tag:
            for provider in self._providers.all():
                if provider.tag == tag and provider.key in members:
                    return provider.key
        home = self._chains.get(request.session or "")
        return home if home in members else None

    def _remember(self, request: BackendRequest, key: str) -> None:
        """Note who has a conversation that will go on under another name."""
        also = request.binding.also if request.binding is not None else None
        names = [also] if also else []
        if request.session in self._chains:
            names.append(request.session or "")
        for name in names:
            self._chains[name] = key
            self._chains.move_to_end(name)
        while len(self._chains) > _MAX_CHAINS:
            self._chains.popitem(last=False)
