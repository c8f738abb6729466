"""The accounts together: who serves next, and what a failure means for whom.

Every decision is synchronous: nothing else runs between looking and taking, so there is no
lock. What a failure does to an account is one `match` over its verdict (`Pool.failed`).
"""

import asyncio
import bisect
import dataclasses
import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codex_proxy.accounts.account import (
    BACKOFF,
    REFUSAL_SECONDS,
    REPROBE,
    TRIAL_SECONDS,
    Account,
    Cause,
    Strikes,
)
from codex_proxy.accounts.affinity import Affinity, Origins, Owner, Ownership, OwnersInMemory, digest
from codex_proxy.accounts.crowd import Crowd, Shelf
from codex_proxy.accounts.dues import FEW
from codex_proxy.accounts.leftout import LACKING, LeftOut, Listed, Shelved, Wait
from codex_proxy.accounts.poolview import PoolView
from codex_proxy.accounts.quota import MAIN_FAMILY, reset_time
from codex_proxy.accounts.scheduler import Ask, Choice, Strategy, cost_of, make_strategy
from codex_proxy.accounts.shelves import Shelves
from codex_proxy.accounts.state import SERVING, Signal, State
from codex_proxy.accounts.store import Credential, Problem, Scan
from codex_proxy.accounts.telling import (
    OF_STATE,
    Excluded,
    decision,
    in_words,
)
from codex_proxy.accounts.telling import Rule as Rule
from codex_proxy.clock import Clock
from codex_proxy.config import Settings
from codex_proxy.errors import (
    PoolBusy,
    PoolEmpty,
    PoolError,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RequestError,
    UpstreamError,
    Verdict,
)
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import Decision, Trace, Usage, UsageSource

logger = logging.getLogger(__name__)

# Failures that speak of the way to the backend, seen on several accounts within this time,
# are the way's fault.
EGRESS_WINDOW = 30.0

_CAUSES: dict[Verdict, Cause] = {
    Verdict.LIMITED: Cause.RATE,
    Verdict.OVERLOADED: Cause.OVERLOAD,
    Verdict.SERVER: Cause.SERVER,
    Verdict.FORBIDDEN: Cause.FORBIDDEN,
    Verdict.UNAUTHORIZED: Cause.REJECTED,
    Verdict.SILENT: Cause.SILENT,
    Verdict.CUT: Cause.CUT,
}


# How long a request waits for a place before it looks again by itself.
_LONGEST_LOOK = 5.0

# How long a conversation stays for the word on its own account before it moves.
_STAY_SECONDS = 2.0

_ON_TRIAL = (
    "the account that could serve this has rested, and one request is finding out whether it serves again"
)

TAG_LENGTH = 12
"""How much of an account's identity finds it again among a few thousand."""

# The names of the ways in which conversations are known are the protocol's, and few; whatever
# else comes is counted together.
_MAX_SOURCES = 32


@dataclass(slots=True)
class Want:
    """What a request needs of an account; nobody changes it."""

    model: str
    endpoint: str = "responses"
    session: str | None = None
    """What its conversation is known by, salted with its caller."""
    prefer: str | None = None
    """The key of the account that the caller's turn is bound to."""
    compacted: tuple[str, ...] = ()
    """Encrypted history, which only the account that wrote it can read."""
    encrypted: tuple[str, ...] = ()
    """Encrypted reasoning, which others can do without."""
    tokens: int = 0
    """About how many input tokens it carries."""
    is_opening: bool = False
    """Whether `session` is only to be remembered: many conversations may begin alike."""
    also: str | None = None
    """Another name under which the account is remembered."""

    @property
    def refusal(self) -> str:
        """The name under which an account's "I lack this" is remembered."""
        return f"{self.endpoint} {self.model}"

    @property
    def counted(self) -> str:
        """What a limit is learned for: the model, or the endpoint where a request names none."""
        return self.model or self.endpoint


class Lease:
    """The right to send one request with one account; reported once, released once."""

    __slots__ = ("_pool", "_released", "_reported", "account", "decision", "has_moved", "started", "want")

    def __init__(
        self,
        pool: "Pool",
        account: Account,
        want: Want,
        decision: Decision,
        *,
        has_moved: bool,
        started: float,
    ) -> None:
        self._pool = pool
        self._released = False
        self._reported = False
        self.account = account
        self.want = want
        self.decision = decision
        self.has_moved = has_moved
        """Whether its conversation may hold what another account has encrypted."""
        self.started = started
        """Monotonic seconds."""

    @property
    def why(self) -> str:
        """The rule that picked the account."""
        return self.decision.rule

    def ok(self) -> None:
        """Report that the account answered."""
        if not self._reported:
            self._reported = True
            self._pool.succeeded(self)
            if self.want.compacted or self.want.encrypted:
                # Nobody asks again, and a long stream need not hold a long conversation's items.
                self.want = dataclasses.replace(self.want, compacted=(), encrypted=())

    def failed(self, error: UpstreamError) -> None:
        """Report a failure; one that follows an `ok` (a late one) counts too."""
        self._reported = True
        self._pool.failed(self, error)

    def release(self) -> None:
        """Give the account back; only the first call counts."""
        if not self._released:
            self._released = True
            self._pool.released(self)


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request that waits for a place."""

    ticket: float
    number: int
    want: Want
    exclude: frozenset[str]
    place: asyncio.Future[Account | None]
    """Set when it should look again; to the account that has room, where one has."""

    def order(self) -> tuple[float, int]:
        return (self.ticket, self.number)


@dataclass(slots=True)
class Bindings:
    """What the turns had whose conversations were known by one kind of name."""

    turns: int = 0
    usage: Usage = field(default_factory=Usage)


class Pool:
    """All accounts, by identity.

    Args:
        clock: Where times come from.
        jitter: Where randomness comes from; 0..1.
        strategy: How one of several good accounts is chosen.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        rng: random.Random | None = None,
        strategy: Strategy | None = None,
        owners: Ownership | None = None,
    ) -> None:
        self._clock = clock
        self._rng = rng if rng is not None else random.Random()
        defaults = Settings()
        self._strategy: Strategy = strategy if strategy is not None else make_strategy(defaults.strategy)
        self._max_concurrency = defaults.max_concurrency
        self._keeps_sessions = defaults.session_affinity
        self._accounts: dict[str, Account] = {}
        self._aliases: dict[str, Account] = {}
        self._places = itertools.count()
        self.few = FEW
        """Up to so many accounts are each looked at for a choice; of more only those that may be the best."""
        self._shelves: Shelves | None = None
        """Where the accounts are many."""
        self._kin: dict[str, list[Account]] | None = None
        """By workspace; made when somebody asks, until an account comes, goes or changes its own."""
        self._tags: dict[str, list[Account]] = {}
        """By the first letters of the identity."""
        self.arrivals: list[list[Account]] = []
        """Lists that every account which comes is put on."""
        self.affinity = Affinity()
        self.origins = Origins()
        self.owners: Ownership = owners if owners is not None else OwnersInMemory()
        self.bindings: dict[str, Bindings] = {}
        """By the kind of name that conversations were known by; '' for those known by none."""
        self._waiting: list[_Waiter] = []
        """By ticket, the smallest first."""
        self._tickets = itertools.count()
        self.learned_families: dict[str, str] = {}
        """Which limit a model (or an endpoint without one) counts on, learned from refusals."""
        self._listed: frozenset[str] = frozenset()
        self._lists: list[list[JsonObject]] = []
        self._slugs: dict[frozenset[str], frozenset[str]] = {}
        """The models of each list, once."""
        self._path_faults: dict[str, float] = {}
        self._egress_told = float("-inf")
        self._view = PoolView()
        self.on_added: Callable[[Account], object] = _do_nothing
        """Told of each account that comes, before it can serve: what was known of it may be put back."""
        self.problems: list[Problem] = []
        self.lists_version = 0
        """Moves when any account's model list does."""

    def __iter__(self) -> Iterator[Account]:
        return iter(list(self._accounts.values()))

    def __len__(self) -> int:
        return len(self._accounts)

    def accounts(self) -> list[Account]:
        """Return all accounts, their states brought up to date."""
        now = self._clock.now()
        if self._shelves_of_many(now) is None:
            for account in self._accounts.values():
                self._settle(account, now)
        return list(self._accounts.values())

    def get(self, key: str) -> Account | None:
        """Return the account of that identity."""
        return self._accounts.get(key)

    def by_alias(self, alias: str) -> Account | None:
        """Return the account of that name."""
        return self._aliases.get(alias)

    def by_tag(self, tag: str) -> Account | None:
        """Return the account whose identity starts with *tag*."""
        if len(tag) == TAG_LENGTH:
            return next(iter(self._tags.get(tag, ())), None)
        return next((a for a in self._accounts.values() if a.key.startswith(tag)), None) if tag else None

    def _of_workspace(self, workspace: str) -> Sequence[Account]:
        """Return the accounts of a workspace, in their order."""
        if self._kin is None:
            self._kin = {}
            for account in self._accounts.values():
                self._kin.setdefault(account.workspace, []).append(account)
        return self._kin.get(workspace, ())

    def apply_settings(self, settings: Settings) -> None:
        """Follow the settings; a strategy that stays keeps what it has learned."""
        if self._shelves is not None:
            # Who is full, and the orders that a strategy keeps, are made anew.
            self._shelves.clear()
        if settings.strategy != self._strategy.name:
            self._strategy = make_strategy(settings.strategy)
        self._max_concurrency = settings.max_concurrency
        self._keeps_sessions = settings.session_affinity
        self.affinity.ttl = settings.session_affinity_ttl
        self._look_again()

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._waiting)

    @property
    def strategy_name(self) -> str:
        """The name of the strategy that chooses."""
        return self._strategy.name

    # -- loading --------------------------------------------------------------------------

    def apply(self, scan: Scan) -> None:
        """Make the accounts what the files say: new ones come, changed ones follow, gone ones go.

        A file that cannot be read now is not gone: somebody may be writing it, and what is
        known of its account (tokens, cooldowns, quota) would be lost.
        """
        self.problems = list(scan.problems)
        seen: set[str] = set()
        for credential in scan.credentials:
            seen.add(credential.key)
            account = self._accounts.get(credential.key)
            if account is None:
                self._add(credential)
            else:
                # Also while its token is exchanged: a save reads the file again before it writes.
                self.adopt(account, credential)
        gone = [key for key in self._accounts if key not in seen]
        may_come_back = _unknown_places(scan) if gone else frozenset()
        removed = False
        for key in gone:
            account = self._accounts[key]
            path = account.credential.path
            if path in may_come_back or path.parent in may_come_back:
                # The next look at the folder decides.
                continue
            self._remove(account)
            removed = True
            logger.info("account removed alias=%s in_flight=%d", account.alias, account.in_flight)
        if removed:
            self._relist()
        for credential in scan.credentials:
            self._name(self._accounts[credential.key], credential)
        self._look_again()

    def _remove(self, account: Account) -> None:
        key = account.key
        account.removed = True
        del self._accounts[key]
        self._aliases.pop(account.alias, None)
        self._kin = None
        tagged = self._tags[key[:TAG_LENGTH]]
        tagged.remove(account)
        if not tagged:
            del self._tags[key[:TAG_LENGTH]]
        if self._shelves is not None:
            self._shelves.remove(account)
        self._strategy.forget(key)
        account.touch()

    def adopt(self, account: Account, credential: Credential) -> bool:
        """Take over what the account's file says; True when its tokens are other ones."""
        old = account.credential
        if credential is old:
            return False
        if credential.refresh and credential.refresh.digest() in old.superseded:
            # The file, or a look at it before our save, still shows what we have spent.
            return False
        if credential.refresh == old.refresh and account.unsaved and not credential.is_unsaved:
            # The exchange brought an access token only, and the file could not take it.
            return False
        # What no file says goes on being known.
        credential.superseded |= old.superseded
        account.unsaved = credential.is_unsaved
        account.credential = credential
        account.touch()
        if credential.workspace != old.workspace:
            self._kin = None
        now = self._clock.now()
        if credential.disabled != (account.state is State.DISABLED):
            self._signal(account, Signal.SWITCHED_OFF if credential.disabled else Signal.SWITCHED_ON, now)
        if _same_tokens(old, credential):
            return False
        self.refreshed(account)
        logger.info("account tokens changed in its file alias=%s", account.alias)
        return True

    def _add(self, credential: Credential) -> None:
        account = Account(credential, credential.default_alias, place=next(self._places))
        self._name(account, credential)
        account.unsaved = credential.is_unsaved
        account.quota.plan = credential.identity.plan
        self._accounts[credential.key] = account
        self._tags.setdefault(credential.key[:TAG_LENGTH], []).append(account)
        self._kin = None
        self.on_added(account)
        for newcomers in self.arrivals:
            newcomers.append(account)
        if self._shelves is not None:
            self._shelves.add(account)
        if credential.disabled:
            account.signal(Signal.SWITCHED_OFF)
        self._settle(account, self._clock.now())
        logger.info("account loaded alias=%s state=%s", account.alias, account.state.value)

    def _name(self, account: Account, credential: Credential) -> None:
        """Call an account what its file says, or else after its identity; no two are called the same."""
        wish = credential.alias or credential.default_alias
        alias, number = wish, 2
        while self._aliases.get(alias, account) is not account:
            alias, number = f"{wish}-{number}", number + 1
        if self._aliases.get(account.alias) is account:
            del self._aliases[account.alias]
        account.alias = alias
        self._aliases[alias] = account

    # -- choosing -------------------------------------------------------------------------

    def pick(self, want: Want, exclude: Collection[str] = ()) -> Lease:
        """Take an account for one request.

        The account of the caller's turn comes first, then the one that wrote the compacted history,
        which nobody else can read; then the strategy chooses, the conversation's account among others.

        Raises:
            PoolError: If none can serve now; it says when one can.
            RequestError: If no account ever can: all lack the model, or the history's owner is gone.
        """
        now = self._clock.now()
        homes = self._homes(want, now)
        bound = self._bound(want, exclude, homes, now)
        account, decision = bound if bound is not None else self._best(want, exclude, homes, now)
        account.in_flight += 1
        account.total_requests += 1
        account.last_used = now
        account.stir()
        started = self._clock.monotonic()
        if account.on_trial and account.trial_since is None:
            account.trial_since = started
        has_moved = homes != (account.key,) or self._has_foreign(want, account, now)
        return Lease(self, account, want, decision, has_moved=has_moved, started=started)

    def _has_foreign(self, want: Want, account: Account, now: float) -> bool:
        """Tell whether the reasoning in a request may be of several accounts: its first and its last item say."""
        if not want.encrypted:
            return False
        ends = {want.encrypted[0], want.encrypted[-1]}
        return any(self.origins.is_foreign(content, account.key, now) for content in ends)

    def _homes(self, want: Want, now: float) -> tuple[str, ...]:
        """Name the accounts on which the conversation has lived, the last one first."""
        if not self._keeps_sessions:
            return ()
        homes = self.affinity.homes(want.session, now) if not want.is_opening else ()
        if not homes and want.encrypted:
            # A conversation that we have forgotten, or that goes by no name, still carries its last account's reasoning.
            issuer = self.origins.of(want.encrypted[-1], now)
            homes = (issuer,) if issuer is not None else ()
        return homes

    def _bound(
        self, want: Want, exclude: Collection[str], homes: tuple[str, ...], now: float
    ) -> tuple[Account, Decision] | None:
        """Choose the account that a request belongs to, without a look at all the others."""
        turn = self._accounts.get(want.prefer) if want.prefer is not None else None
        if turn is not None and self._obstacle(turn, want, exclude, now) is None:
            return turn, self._decision(turn, "turn state", now)
        owner = self.owners.get(digest(want.compacted[-1])) if want.compacted else None
        if owner is not None:
            return self._historian(owner, want, exclude, now)
        if not homes:
            return None
        self._stay_for_trial(homes, want, exclude, now)
        home = self._first_able(homes, want, exclude, now)
        if home is None:
            return None
        rule = self._strategy.stays(self._ask(want, home), now)
        return (home, self._decision(home, rule, now)) if rule is not None else None

    def _stay_for_trial(
        self, homes: tuple[str, ...], want: Want, exclude: Collection[str], now: float
    ) -> None:
        """Have a conversation wait for the word on its own account: a move would cost it its cache.

        Raises:
            PoolBusy: While the trial is young.
        """
        home = self._accounts.get(homes[0])
        if home is None or not home.on_trial or self._obstacle(home, want, exclude, now) is not Rule.ON_TRIAL:
            return
        young = _STAY_SECONDS - (TRIAL_SECONDS - home.trial_left(self._clock.monotonic()))
        if young > 0.0:
            # However late it is for the request: then another account takes over.
            raise self._with_decision(
                PoolBusy(_ON_TRIAL, retry_after=young, patience=math.inf),
                Listed([(home, Rule.ON_TRIAL)]),
                now,
            )

    def _first_able(
        self, keys: Iterable[str], want: Want, exclude: Collection[str], now: float
    ) -> Account | None:
        for key in keys:
            account = self._accounts.get(key)
            if account is not None and self._obstacle(account, want, exclude, now) is None:
                return account
        return None

    def _historian(
        self, owner: Owner, want: Want, exclude: Collection[str], now: float
    ) -> tuple[Account, Decision]:
        """Choose the account that wrote the history, else one of its workspace, which may read it too."""
        account = self._accounts.get(owner.account)
        if account is not None and self._obstacle(account, want, exclude, now) is None:
            return account, self._decision(account, "compacted history", now)
        kin = [*self._of_workspace(owner.workspace)]
        if account is not None and account not in kin:
            # Logged in again for another workspace: what it wrote before may still be its own to read.
            kin.append(account)
        ready, excluded = self._look_at(kin, want, exclude, now)
        if ready:
            choice = self._choose(ready, self._ask(want, None), now)
            return choice.account, self._told(
                choice, "workspace of the compacted history", Listed(excluded), now, compared=len(ready)
            )
        raise self._history_waits(account, excluded, want, now)

    def _history_waits(
        self, owner: Account | None, excluded: list[Excluded], want: Want, now: float
    ) -> ProxyError:
        """Say why none of the accounts that could read the history can serve."""
        left = Listed(excluded)
        wait = left.wait(self._wait(want, now))
        if wait.is_any:
            error = _shortage(wait)
            # Those that were tried in vain have had their say: that they could not read it, perhaps.
            error.is_for_history = wait.is_untried
            return self._with_decision(error, left, now)
        if any(rule in (Rule.LACKS_MODEL, Rule.NOT_ALLOWED) for _, rule in excluded):
            return RequestError(
                f"this conversation's history was compacted by an account that does not serve {want.model!r}, and no "
                "other can read it; go on with the model it was compacted with, or start a new conversation",
                param="model",
                code="model_not_found",
            )
        if excluded:
            one, rule = next((e for e in excluded if e[0] is owner), excluded[0])
            return self._with_decision(
                PoolEmpty(
                    f"this conversation's history can be read by the account {one.alias} only, which cannot serve "
                    f"without help: {rule.value}; see `codex-proxy accounts`"
                ),
                left,
                now,
            )
        return RequestError(
            "this conversation's history was compacted by an account that is not here any more, and no other "
            "can read it; log that account in again, or start a new conversation",
            param="input",
            code="compaction_owner_gone",
        )

    def _best(
        self, want: Want, exclude: Collection[str], homes: tuple[str, ...], now: float
    ) -> tuple[Account, Decision]:
        shelves = self._shelves_of_many(now)
        # Who wrote a history is asked of each: that is rare, and a question of workspaces.
        if shelves is not None and not want.compacted:
            return self._best_of_many(shelves, want, exclude, homes, now)
        ready, excluded = self._look_at(self._accounts.values(), want, exclude, now)
        if not ready:
            raise self._nobody(want, Listed(excluded), now)
        home = next((a for key in homes for a in ready if a.key == key), None)
        candidates = self._first_rank(ready, home, want, excluded, now)
        choice = self._choose(candidates, self._ask(want, home), now)
        rule = _rule_of(choice, homes, home)
        return choice.account, self._told(choice, rule, Listed(excluded), now, compared=len(candidates))

    def _look_at(
        self, accounts: Iterable[Account], want: Want, exclude: Collection[str], now: float
    ) -> tuple[list[Account], list[Excluded]]:
        """Return which of some accounts could serve, and which could not."""
        ready: list[Account] = []
        excluded: list[Excluded] = []
        for account in accounts:
            rule = self._obstacle(account, want, exclude, now)
            if rule is None:
                ready.append(account)
            else:
                excluded.append((account, rule))
        return ready, excluded

    def _choose(self, candidates: Sequence[Account], ask: Ask, now: float) -> Choice:
        """Have each of some accounts compared."""
        if self._shelves is not None:
            # What the strategy keeps of them in its orders would be another thing afterwards.
            for account in candidates:
                self._shelves.lift(account)
        return self._strategy.choose(candidates, ask, now)

    def _first_rank(
        self,
        ready: list[Account],
        home: Account | None,
        want: Want,
        excluded: list[Excluded],
        now: float,
    ) -> list[Account]:
        """Keep those of the best priority, and of these the ones whose token is good now, if any is.

        The conversation's own account stays among them: its cache is worth more than a rank.
        """
        best = min(account.credential.priority for account in ready)
        ranked = [account for account in ready if account.credential.priority == best]
        kept = [account for account in ranked if account.access_is_valid(now)] or ranked
        if want.compacted and home is not None:
            # Nobody knows who wrote the history: most likely one of the workspace it has lived in.
            kin = [account for account in kept if account.workspace == home.workspace]
            kept = kin or kept
        if home is not None and home not in kept:
            kept = [*kept, home]
        if len(kept) < len(ready):
            chosen = {account.key for account in kept}
            excluded += [
                (a, Rule.LESSER_PRIORITY if a.credential.priority != best else Rule.RENEWING)
                for a in ready
                if a.key not in chosen
            ]
        return kept

    # -- choosing among many --------------------------------------------------------------

    def _shelves_of_many(self, now: float) -> Shelves | None:
        """Return the accounts on their shelves, as they are now; None where they are few."""
        if len(self._accounts) <= self.few:
            if self._shelves is not None:
                self._shelves.clear()
                self._shelves = None
            return None
        if self._shelves is None:
            self._shelves = Shelves(self._settle, self._most)
            for account in self._accounts.values():
                self._shelves.add(account)
        self._shelves.refresh(now, self._clock.monotonic())
        return self._shelves

    def _best_of_many(
        self, shelves: Shelves, want: Want, exclude: Collection[str], homes: tuple[str, ...], now: float
    ) -> tuple[Account, Decision]:
        """Choose as `_best` does, by whole shelves."""
        is_listed, family = self._is_listed(want), self._family(want)
        tried = self._tried(shelves, want, exclude) if exclude else {}
        able: list[Shelf] = []
        closed: list[tuple[Shelf, Rule]] = []
        for shelf in shelves:
            profile = shelf.profile
            rule = profile.lacks(want, is_listed=is_listed) or profile.refuses(family)
            if rule is not None:
                closed.append((shelf, rule))
            elif not tried or any(place not in tried for place in shelf.places):
                able.append(shelf)
        if not able:
            raise self._nobody(want, Shelved(closed, tried), now)
        best = min(shelf.profile.priority for shelf in able)
        ranked = [shelf for shelf in able if shelf.profile.priority == best]
        kept = [shelf for shelf in ranked if shelf.profile.is_fresh] or ranked
        home = self._home_among(shelves, able, tried, homes) if homes else None
        guest = home if home is not None and shelves.of(home) not in kept else None
        lesser = [
            (shelf, Rule.LESSER_PRIORITY if shelf.profile.priority != best else Rule.RENEWING)
            for shelf in able
            if shelf not in kept
        ]
        without = [place for place in tried if any(place in shelf.members for shelf in kept)]
        if guest is not None:
            shelves.lift(guest)
        crowd = Crowd(kept, without, guest)
        choice = self._strategy.pick(crowd, self._ask(want, home), now)
        left = Shelved(closed, tried, lesser, guest)
        rule = _rule_of(choice, homes, home)
        return choice.account, self._told(choice, rule, left, now, compared=len(crowd))

    def _is_listed(self, want: Want) -> bool:
        return bool(want.model) and want.model in self._listed

    def _family(self, want: Want) -> str | None:
        """Return the limit that counts for a request beside the main one, if there is one."""
        return self.learned_families.get(want.counted) if self.learned_families else None

    def _tried(self, shelves: Shelves, want: Want, exclude: Collection[str]) -> dict[int, Account]:
        """Return those that could serve but for having been tried for the request, by place."""
        found: dict[int, Account] = {}
        is_listed = self._is_listed(want)
        for key in exclude:
            account = self._accounts.get(key)
            if account is not None and not shelves.of(account).profile.lacks(want, is_listed=is_listed):
                found[account.place] = account
        return found

    def _home_among(
        self,
        shelves: Shelves,
        able: Collection[Shelf],
        tried: Mapping[int, Account],
        homes: tuple[str, ...],
    ) -> Account | None:
        """Return the first account on which the conversation has lived that could serve it."""
        for key in homes:
            home = self._accounts.get(key)
            if home is not None and home.place not in tried and shelves.of(home) in able:
                return home
        return None

    def _ask(self, want: Want, home: Account | None) -> Ask:
        idle = self.affinity.idle(want.session, self._clock.now()) if home is not None else 0.0
        return Ask(self._family(want), home, want.tokens, idle)

    def _obstacle(self, account: Account, want: Want, exclude: Collection[str], now: float) -> Rule | None:
        """Return the rule by which an account cannot serve a request; None when it can."""
        # Asked for every request, so what nearly no account has is asked in passing.
        before = account.state
        if account.settle(now):
            self._note(account, before, now)
        if account.state is not State.READY:
            return OF_STATE[account.state]
        credential = account.credential
        if (credential.models_allowed or credential.models_denied) and not account.serves(want.model):
            return Rule.NOT_ALLOWED
        if (account.models is not None or account.refusals) and not self._has(account, want, now):
            return Rule.LACKS_MODEL
        if exclude and credential.key in exclude:
            return Rule.TRIED
        if account.family_holds and self._family_hold(account, want, now) is not None:
            return Rule.FAMILY_LIMIT
        most = self._most(account)
        if most and account.in_flight >= most:
            return Rule.BUSY
        if account.on_trial and account.trial_left(self._clock.monotonic()) > 0.0:
            return Rule.ON_TRIAL
        return None

    def _is_on_trial(self, account: Account) -> bool:
        """Tell whether one request is finding out about an account; time ends that, whoever looks."""
        if account.on_trial:
            _ = account.trial_left(self._clock.monotonic())
        return account.on_trial

    def _most(self, account: Account) -> int:
        """Return how many requests an account may carry at a time; 0: any number."""
        own = account.credential.max_concurrency
        return own if own is not None else self._max_concurrency

    def _has(self, account: Account, want: Want, now: float) -> bool:
        if account.refusals and account.lacks(want.refusal, now):
            return False
        return (
            not want.model
            or account.models is None
            or want.model in account.models
            # What no list names may still be served: lists lag behind.
            or want.model not in self._listed
        )

    def _family_hold(self, account: Account, want: Want, now: float) -> float | None:
        family = self._family(want)
        until = account.family_holds.get(family) if family is not None else None
        return until if until is not None and until > now else None

    # -- telling why ----------------------------------------------------------------------

    def _decision(self, account: Account, rule: str, now: float) -> Decision:
        return Decision(account.alias, rule, self._strategy.name, now, compared=1)

    def _told(self, choice: Choice, rule: str, left: LeftOut, now: float, *, compared: int) -> Decision:
        if not left:
            return decision(choice, rule, self._strategy.name, now, compared=compared)
        return decision(
            choice,
            rule,
            self._strategy.name,
            now,
            compared=compared,
            excluded=left.some(),
            counts=left.counts(),
        )

    def _with_decision(self, error: PoolError, left: LeftOut, now: float) -> PoolError:
        error.decision = decision(
            None,
            "nobody could serve",
            self._strategy.name,
            now,
            compared=0,
            excluded=left.some(),
            counts=left.counts(),
        )
        return error

    # -- when nobody can ------------------------------------------------------------------

    def _nobody(self, want: Want, left: LeftOut, now: float) -> PoolError | RequestError:
        """Say why nobody can serve a request, and whether that will change by itself."""
        wait = left.wait(self._wait(want, now))
        error = self._why_nobody(want, left, wait)
        if not isinstance(error, PoolError):
            return error
        # Nobody knows who wrote the history: one that has not been asked yet may have.
        error.is_for_history = bool(want.compacted) and wait.is_untried
        return self._with_decision(error, left, now)

    def _why_nobody(self, want: Want, left: LeftOut, wait: Wait) -> PoolError | RequestError:
        if not left:
            return PoolEmpty(
                "no account is loaded: run `codex-proxy login`, or put account files into the auth-dir"
            )
        if wait.is_any:
            return _shortage(wait)
        if any(rule in LACKING for rule, _ in left.counts()):
            if any(want.model in (one.models or ()) for one in left.others()):
                return PoolEmpty(f"no account that has the model {want.model!r} can serve without help")
            return self._no_model(want)
        counts = Counter(one.state.value for one in left.others())
        states = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
        return PoolEmpty(f"no account can serve without help: {states}; see /stats for the reasons")

    def _wait(self, want: Want, now: float) -> Wait:
        return Wait(now, self._clock.monotonic(), self._family(want))

    def _no_model(self, want: Want) -> RequestError:
        if not want.model:
            return RequestError(f"no account's backend serves {want.endpoint}", code="not_supported")
        served = sorted(self._listed - {want.model})
        names = f"; they serve: {', '.join(served)}" if served else ""
        return RequestError(
            f"the model {want.model!r} is not available on any of the accounts{names}",
            param="model",
            code="model_not_found",
        )

    def has_other(self, want: Want, exclude: Collection[str]) -> bool:
        """Tell whether another account could serve a request now."""
        now = self._clock.now()
        shelves = self._shelves_of_many(now)
        if shelves is None:
            return any(self._obstacle(one, want, exclude, now) is None for one in self._accounts.values())
        is_listed, family = self._is_listed(want), self._family(want)
        places = {one.place for key in exclude if (one := self._accounts.get(key)) is not None}
        return any(
            shelf.profile.lacks(want, is_listed=is_listed) is None
            and shelf.profile.refuses(family) is None
            and any(place not in places for place in shelf.places)
            for shelf in shelves
        )

    async def wait_for_place(
        self, want: Want, exclude: Collection[str], *, seconds: float, ticket: float
    ) -> None:
        """Wait until an account that could serve *want* has room; *seconds* at most.

        A place goes to the smallest ticket that it is good for: whoever asked first is served first.
        """
        place: asyncio.Future[Account | None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(ticket, next(self._tickets), want, frozenset(exclude), place)
        bisect.insort(self._waiting, waiter, key=_Waiter.order)
        try:
            async with asyncio.timeout(seconds):
                await place
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            offered = place.result() if place.done() and not place.cancelled() else None
            if offered is not None:
                # It came, and its caller has just left.
                self._offer(offered)
            raise
        finally:
            self._forget(waiter)

    def _forget(self, waiter: "_Waiter") -> None:
        at = bisect.bisect_left(self._waiting, waiter.order(), key=_Waiter.order)
        if at < len(self._waiting) and self._waiting[at] is waiter:
            del self._waiting[at]

    def _offer(self, account: Account) -> bool:
        """Tell the first for whom *account* could serve; False when that is nobody."""
        now = self._clock.now()
        for waiter in self._waiting:
            # One that is done has left, and is about to go from the list.
            if waiter.place.done():
                continue
            if self._obstacle(account, waiter.want, waiter.exclude, now) is None:
                self._forget(waiter)
                waiter.place.set_result(account)
                return True
        return False

    def _open(self, account: Account) -> None:
        """Tell as many as *account* has room for now, after it had none for anybody."""
        for _ in range(self._room(account)):
            if not self._offer(account):
                return

    def _room(self, account: Account) -> int:
        most = self._most(account)
        return max(0, most - account.in_flight) if most else len(self._waiting)

    def _look_again(self) -> None:
        """Let all who wait look again, once: nobody knows for whom what has changed is good."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.place.done():
                waiter.place.set_result(None)

    # -- what happened --------------------------------------------------------------------

    def released(self, lease: Lease) -> None:
        """Note that a request is over."""
        account = lease.account
        account.in_flight -= 1
        account.stir()
        if self._is_on_trial(account) and account.trial_since == lease.started:
            # Its caller left before the account could show anything: the next one tries.
            account.trial_since = None
        if self._waiting:
            self._offer(account)

    def succeeded(self, lease: Lease) -> None:
        """Note that an account answered: its conversation stays, old failures are forgotten."""
        account, now = lease.account, self._clock.now()
        before, was_on_trial = account.state, account.on_trial
        account.succeeded(lease.started)
        self._note(account, before, now)
        account.last_error = ""
        self._path_faults.clear()
        if self._keeps_sessions:
            for session in (lease.want.session, lease.want.also):
                if session is not None:
                    self.affinity.bind(session, account.key, now)
        for content in lease.want.compacted:
            # It could read that: it wrote it, also before we were started, or one of its workspace did.
            name = digest(content)
            if self.owners.get(name) is None:
                self.owners.add(name, account.key, account.workspace, now)
        if was_on_trial and not account.on_trial:
            self._open(account)

    def wrote(self, account: Account, content: str, *, is_history: bool) -> None:
        """Note that *account* issued an encrypted item; history can be read by nobody else, and for ever."""
        now = self._clock.now()
        if is_history:
            self.owners.add(digest(content), account.key, account.workspace, now)
        else:
            self.origins.issued(content, account.key, now)

    def cannot_read(self, account: Account, content: str) -> bool:
        """Tell whether *account* is known not to read an item: it refused it, or another workspace issued it."""
        now = self._clock.now()
        if self.origins.was_refused(content, account.key, now):
            return True
        issuer = self.origins.of(content, now)
        if issuer is None or issuer == account.key:
            return False
        other = self._accounts.get(issuer)
        return other is None or other.workspace != account.workspace

    def count_turn(self, trace: Trace) -> None:
        """Add a finished turn to the numbers of its account, and of the way its conversation was known."""
        if trace.usage.source is UsageSource.NONE or trace.upstream:
            return
        last = trace.attempts[-1] if trace.attempts else None
        alias = trace.alias or (last.alias if last is not None and not last.is_upstream else "")
        account = self.by_alias(alias)
        if account is None:
            return
        account.completions += 1
        account.usage.add(trace.usage)
        source = (
            trace.binding if len(self.bindings) < _MAX_SOURCES or trace.binding in self.bindings else "other"
        )
        group = self.bindings.get(source)
        if group is None:
            group = self.bindings[source] = Bindings()
        group.turns += 1
        group.usage.add(trace.usage)
        usage = trace.usage
        self.spent(account, cost_of(usage.input_tokens, usage.cached_tokens, usage.output_tokens))

    def relieve(self, account: Account, family: str = MAIN_FAMILY) -> None:
        """Note that the backend gives an account quota again before its limit was to end."""
        if family != MAIN_FAMILY:
            if account.family_holds.pop(family, None) is not None:
                account.touch()
                self._open(account)
            return
        account.strikes.pop(Cause.LIMIT, None)
        if account.holds.pop(Cause.LIMIT, None) is None:
            return
        account.begin_trial()
        self._settle(account, self._clock.now())
        self._offer(account)

    def entitle(self, account: Account) -> None:
        """Let one request try an account that was told it is not entitled: its plan or its purse has changed."""
        if account.unavailable_until <= self._clock.now():
            return
        account.unavailable_until = 0.0
        account.begin_trial()
        self._settle(account, self._clock.now())
        self._offer(account)

    def plan_changed(self, account: Account) -> None:
        """Note that an account has another plan: what it lacked before says nothing any more."""
        account.refusals.clear()
        account.touch()
        self.entitle(account)
        self._open(account)

    def reset(self, account: Account) -> None:
        """Forget what keeps an account from serving, as its owner wishes: cooldowns, numbers, and what was learned."""
        account.reset()
        self._path_faults.pop(account.key, None)
        if self._shelves is not None:
            self._shelves.lift(account)
        self._strategy.forget(account.key)
        self._settle(account, self._clock.now())
        self._open(account)

    def spent(self, account: Account, cost: float) -> None:
        """Note what a turn on *account* cost, in uncached input tokens' worth."""
        self._strategy.spent(account, cost, self._clock.now())

    def failed(self, lease: Lease, error: UpstreamError) -> None:
        """Draw the consequences of a failure for its account, and for nobody else."""
        account, now = lease.account, self._clock.now()
        if (
            self._is_on_trial(account)
            and account.trial_since is not None
            and lease.started >= account.trial_since
        ):
            # What it met speaks below; if it does not cool, the next one may try.
            account.trial_since = None
            account.touch()
            self._look_again()
        match error.verdict:
            case Verdict.CALLER | Verdict.ENCRYPTED:
                return
            case Verdict.MODEL:
                account.refuse(lease.want.refusal, now + REFUSAL_SECONDS, now)
                logger.info("account lacks model alias=%s model=%s", account.alias, lease.want.model)
                return
            case Verdict.UNENTITLED:
                self._unentitled(account, lease, error, now)
            case Verdict.EXHAUSTED:
                self._exhausted(account, lease, error, now)
            case Verdict.LIMITED if _says_nothing(error) and account.quota.is_spent(now):
                # A bare 429 is what the account's own numbers say it is.
                self._exhausted(account, lease, error, now)
            case Verdict.PATH:
                self._path_fault(account, lease, error, now)
            case (
                Verdict.LIMITED
                | Verdict.OVERLOADED
                | Verdict.SERVER
                | Verdict.FORBIDDEN
                | Verdict.UNAUTHORIZED
                | Verdict.SILENT
                | Verdict.CUT
            ):
                self._cool(account, _CAUSES[error.verdict], lease, error, now)
        account.total_errors += 1
        account.last_error = f"{error.verdict.value} {error.fault.code or error.fault.type or error.status}"

    def _exhausted(self, account: Account, lease: Lease, error: UpstreamError, now: float) -> None:
        family = error.limit_family or MAIN_FAMILY
        until = reset_time(error.resets_at, None, now)
        if until is None:
            known = account.quota.families.get(family)
            until = known.spent_until(now) if known is not None else None
        if family != MAIN_FAMILY:
            self.learned_families[lease.want.counted] = family
            if until is None:
                until = now + (error.retry_after or BACKOFF[Cause.LIMIT].seconds(1, self._rng.random()))
            account.family_holds[family] = max(until, account.family_holds.get(family, 0.0))
            account.touch()
            logger.info("account limit alias=%s family=%s seconds=%.0f", account.alias, family, until - now)
            return
        self._cool(account, Cause.LIMIT, lease, error, now, until)

    def _unentitled(self, account: Account, lease: Lease, error: UpstreamError, now: float) -> None:
        before = account.state
        if account.unavailable_until <= now:
            account.unavailable_count += 1
        pause = REPROBE.seconds(account.unavailable_count, self._rng.random())
        account.unavailable_until = max(account.unavailable_until, now + pause)
        account.unavailable_reason = error.fault.code or error.fault.type or f"status {error.status}"
        account.touch()
        account.signal(Signal.UNENTITLED)
        self._note(account, before, now)

    def _cool(
        self,
        account: Account,
        cause: Cause,
        lease: Lease,
        error: UpstreamError,
        now: float,
        until: float | None = None,
    ) -> None:
        strikes = account.strikes.setdefault(cause, Strikes())
        counted = strikes.add(lease.started, self._clock.monotonic())
        is_named = until is not None
        if until is None and error.retry_after is not None:
            until = reset_time(None, error.retry_after, now)
        if until is None:
            if not counted and cause in account.holds:
                # One of many that failed together: the first has said it all.
                return
            until = now + BACKOFF[cause].seconds(strikes.count, self._rng.random())
        before = account.state
        # A reset that the backend named by the clock stays where it is; a pause counts from now.
        account.hold(cause, until, length=None if is_named else until - now)
        self._note(account, before, now)

    def _path_fault(self, account: Account, lease: Lease, error: UpstreamError, now: float) -> None:
        self._path_faults = {k: t for k, t in self._path_faults.items() if now - t < EGRESS_WINDOW}
        self._path_faults[account.key] = now
        if len(self._path_faults) > 1 or not any(
            one is not account and one.state in SERVING for one in self._accounts.values()
        ):
            # The same failure from several accounts (or from the only one): the way there is
            # broken, and resting accounts would not mend it.
            for key in self._path_faults:
                other = self._accounts.get(key)
                if other is not None:
                    before = other.state
                    other.absolve(Cause.PATH)
                    self._note(other, before, now)
                    self._open(other)
            if self._clock.monotonic() - self._egress_told >= EGRESS_WINDOW:
                # Not once per attempt: then every attempt of every caller fails so.
                self._egress_told = self._clock.monotonic()
                logger.warning("the way to the backend fails accounts=%d", len(self._path_faults))
            return
        self._cool(account, Cause.PATH, lease, error, now)

    def refreshed(self, account: Account) -> None:
        """Note that an account has new tokens; its cooldowns stay."""
        before = account.state
        account.login_lost = ""
        account.rejected = ""
        account.refresh_after = 0.0
        account.refresh_failures = 0
        account.holds.pop(Cause.REJECTED, None)
        account.touch()
        account.signal(Signal.REFRESHED)
        account.settle(self._clock.now())
        self._note(account, before, self._clock.now())
        self._open(account)

    def login_lost(self, account: Account, reason: str) -> None:
        """Note that an account's refresh token is dead; its access token may serve to its end."""
        account.login_lost = reason
        account.touch()
        logger.warning("account login lost alias=%s reason=%s", account.alias, reason)
        self._settle(account, self._clock.now())

    def reject(self, account: Account) -> None:
        """Note that the backend refused an account's access token."""
        account.rejected = account.credential.access.digest()
        account.touch()
        self._settle(account, self._clock.now())

    def read_headers(
        self, account: Account, headers: Mapping[str, str], *, asked: float | None = None
    ) -> None:
        """Take quota and model-list news from an answer's headers; *asked* is when its request was sent."""
        if account.quota.read_headers(headers, self._clock.now(), asked=asked):
            self.plan_changed(account)
        etag = headers.get("x-models-etag")
        if etag and etag != account.models_etag:
            if account.models_etag:
                # The list changed since we read it.
                account.models_at = None
                account.touch()
            account.models_etag = etag

    def read_event(self, account: Account, event: Mapping[str, object]) -> None:
        """Take what a `codex.rate_limits` event tells."""
        if account.quota.read_event(event, self._clock.now()):
            self.plan_changed(account)

    def set_models(self, account: Account, objects: list[JsonObject]) -> None:
        """Note an account's model list.

        Most accounts have the same one, which is large: it is kept once, and only a list that
        nobody has had makes the catalogue anew.
        """
        known = next((one for one in self._lists if one == objects), None)
        is_news = known is None or (account.models is not None and account.model_objects is not known)
        account.model_objects = objects if known is None else known
        models = frozenset(o["slug"] for o in objects if isinstance(o.get("slug"), str))
        account.models = models = self._slugs.setdefault(models, models)
        account.models_at = self._clock.now()
        if is_news:
            self._relist()
        if account.refusals:
            for name in models:
                account.refusals.pop(f"responses {name}", None)
        account.touch()

    def _relist(self) -> None:
        self.lists_version += 1
        accounts = self._accounts.values()
        self._slugs = {a.models: a.models for a in accounts if a.models is not None}
        self._listed = frozenset().union(*self._slugs)
        self._lists = list(
            {id(a.model_objects): a.model_objects for a in accounts if a.model_objects}.values()
        )

    def model_lists(self) -> list[list[JsonObject]]:
        """Return the model lists that accounts have, each once."""
        return self._lists

    def pool_limits(self) -> JsonObject | None:
        """Return the pool's quota as one `codex.rate_limits` event; None when nothing is known."""
        return self._view.event(self._accounts.values(), self._clock.now())

    def usage_page(self) -> JsonObject:
        """Return the pool's quota in the shape of the backend's usage endpoint."""
        return self._view.page(self.accounts(), self._clock.now())

    # -- helpers --------------------------------------------------------------------------

    def _settle(self, account: Account, now: float) -> None:
        before = account.state
        if account.settle(now):
            self._note(account, before, now)

    def _signal(self, account: Account, signal: Signal, now: float) -> None:
        before = account.state
        account.signal(signal)
        account.settle(now)
        self._note(account, before, now)

    def _note(self, account: Account, before: State, now: float) -> None:
        if account.state is before:
            return
        until = account.cooling_until() if account.state is State.COOLING else None
        logger.info(
            "account state alias=%s from=%s to=%s reason=%s seconds=%.0f",
            account.alias,
            before.value,
            account.state.value,
            account.reason() or "-",
            until - now if until is not None else 0.0,
        )


def _unknown_places(scan: Scan) -> frozenset[Path]:
    """Return the files, and perhaps the folder, of which nobody could tell what they hold."""
    return frozenset(one.path for one in scan.problems if one.skipped and not one.is_final)


def _says_nothing(error: UpstreamError) -> bool:
    return error.fault.code is None and error.fault.type is None and error.retry_after is None


def _do_nothing(_: Account) -> None:
    pass


def _same_tokens(one: Credential, other: Credential) -> bool:
    return one.access == other.access and one.refresh == other.refresh


def _shortage(wait: Wait) -> PoolError:
    """Say what those wait for who could be served later."""
    now, soonest = wait.now, wait.passing
    if wait.is_full or wait.is_on_trial:
        return PoolBusy(
            "every account that could serve this carries all it may at a time; try again in a moment"
            if wait.is_full
            else _ON_TRIAL,
            # A place that comes free is told of; only what comes back by time alone is not.
            retry_after=min(_LONGEST_LOOK, max(0.05, soonest - now)),
            patience=None if wait.is_full else TRIAL_SECONDS,
        )
    if soonest < math.inf and soonest <= wait.limit:
        return PoolShortage(
            "every account that could serve this is busy or in passing trouble; try again in a moment",
            retry_after=max(0.0, soonest - now),
        )
    return PoolExhausted(
        "the usage limit of every account that could serve this has been reached; "
        f"the first is free again in {in_words(wait.limit - now)}",
        resets_at=wait.limit,
        retry_after=max(0.0, wait.limit - now),
    )


def _rule_of(choice: Choice, homes: tuple[str, ...], home: Account | None) -> str:
    """Say by which rule an account was chosen, and whether a conversation had to leave its own for it."""
    return f"{choice.rule}, its own cannot serve" if homes and home is None else choice.rule
