"""All upstreams over HTTP: those of the configuration and those of the database, and how they do."""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from codex_proxy.accounts.affinity import Origins
from codex_proxy.clock import Clock
from codex_proxy.config import Live, Settings, Upstream, masked_upstream
from codex_proxy.errors import ConfigError, clean, fault_of
from codex_proxy.net import NetError, Outbound, Reply
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.wire import BadJson, JsonObject, loads_lenient
from codex_proxy.tasks import Background, Job
from codex_proxy.trace import Decision
from codex_proxy.upstream.ejection import Outlier
from codex_proxy.upstream.http import ANTHROPIC_VERSION, HttpLease, key_headers
from codex_proxy.upstream.provider import Check, Provider, Way

logger = logging.getLogger(__name__)

Source = Literal["config", "database"]

CHECK_SECONDS = 60.0
"""How often each is asked whether it is well."""
_JITTER = 0.2
"""How much of that earlier or later, so that many are not asked in one moment."""
_LOOK_SECONDS = 5.0

CHECK_TIMEOUT = 10.0
_AT_A_TIME = 8

_MAX_LISTED = 2_000
"""How many models of an upstream's list are kept."""


class Providers:
    """The upstreams, by name.

    Args:
        origins: Which target issued which sealed item; accounts and upstreams share it.
    """

    def __init__(
        self,
        *,
        live: Live,
        clock: Clock,
        background: Background,
        outbound: Outbound,
        origins: Origins,
        rng: random.Random | None = None,
    ) -> None:
        self.live = live
        self.clock = clock
        self.outbound = outbound
        self.origins = origins
        self.via = f"codex-proxy-{secrets.token_hex(6)}"
        """What this process calls itself to upstreams, so that it knows a request of its own that comes back."""
        self.are_there = False
        """Whether there is any: a plain value, for every turn asks it."""
        self.version = 0
        """Grows with every change of what there is to serve."""
        self.catalog_of: Callable[[], Catalog] = Catalog
        self.on_change: Callable[[], None] = lambda: None
        """Called when there are other upstreams than before."""
        self._background = background
        self._rng = rng if rng is not None else random.Random()
        self._defined: dict[Source, tuple[Upstream, ...]] = {"config": (), "database": ()}
        self._all: dict[str, Provider] = {}
        self._due: dict[str, float] = {}
        self._checking: dict[str, asyncio.Task[Check]] = {}

    # -- which there are -------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._all)

    def all(self) -> Sequence[Provider]:
        """Return all of them, in the order of their names."""
        return [self._all[name] for name in sorted(self._all)]

    def get(self, name: str) -> Provider | None:
        """Return the one called *name*."""
        return self._all.get(name)

    @property
    def catalog(self) -> Catalog:
        return self.catalog_of()

    def follow(self, settings: Settings) -> None:
        """Take over what the configuration says of upstreams."""
        if settings.upstreams is not self._defined["config"]:
            self.replace(settings.upstreams, source="config")

    def replace(self, definitions: Iterable[Upstream], *, source: Source) -> None:
        """Let these be the upstreams of *source*; what is known of unchanged ones stays.

        Those of the configuration are its own: one of the database with the same name is left out until it has
        another one.

        Raises:
            ConfigError: If two of them, or one of the database and one of the configuration, have the same name.
        """
        found = tuple(definitions)
        names = [one.name for one in found]
        other = {one.name for one in self._defined["config"]} if source == "database" else set()
        for name in names:
            if names.count(name) > 1 or name in other:
                where = "in the configuration" if name in other else "twice"
                raise ConfigError(
                    f"upstreams: the name {name!r} is there {where}; each needs a name of its own"
                )
        self._defined[source] = found
        before, self._all = self._all, {}
        for kept in ("config", "database"):
            for definition in self._defined[kept]:
                if definition.name in self._all:
                    logger.error(
                        "upstream of the database is left out: the configuration has one of that name name=%s",
                        definition.name,
                    )
                    continue
                self._all[definition.name] = _taken_over(before.get(definition.name), definition, kept)
        now = self.clock.monotonic()
        self._due = {name: self._due.get(name, now) for name in self._all}
        for name in self._all:
            if before.get(name) is not self._all[name]:
                # A new address or key is tried soon.
                self._due[name] = now
        self.version += 1
        self.are_there = bool(self._all)
        self.on_change()

    # -- as targets ------------------------------------------------------------------------

    def lease(self, provider: Provider, way: Way, decision: Decision, *, is_probe: bool = False) -> HttpLease:
        """Return the right to one exchange with *provider*."""
        return HttpLease(self, provider, way, decision, is_probe=is_probe)

    def able(self, request: BackendRequest) -> list[tuple[Provider, Way]]:
        """Return those that could ever serve *request*, and how."""
        now = self.clock.monotonic()
        return [
            (provider, way)
            for provider in self._all.values()
            if (way := provider.way(request, now)) is not None
        ]

    def members(self, model: str) -> tuple[int, int]:
        """Return how many upstreams serve *model*, and how many of them are ejected for it."""
        now = self.clock.monotonic()
        serving = [one for one in self._all.values() if one.definition.enabled and one.serves(model)]
        return len(serving), sum(one.is_ejected(model, now) for one in serving)

    def check_soon(self, provider: Provider) -> None:
        """Have the next health check of *provider* now."""
        if self._all.get(provider.name) is provider:
            self._due[provider.name] = self.clock.monotonic()

    def count(self) -> tuple[int, int]:
        """Return how many are switched on, and how many of those could take a request now."""
        now = self.clock.monotonic()
        on = [one for one in self._all.values() if one.definition.enabled]
        return len(on), sum(one.state(now) not in ("disabled", "ejected") for one in on)

    def listed(self) -> list[str]:
        """Return the names of all models that they serve."""
        names = [name for provider in self.all() for name in provider.listed()]
        return list(dict.fromkeys(names))

    # -- health ----------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """Return what runs by itself: the health checks."""
        return [Job("upstreams", lambda: _LOOK_SECONDS if self._all else 0.0, self._check_due, at_once=True)]

    async def _check_due(self) -> None:
        now = self.clock.monotonic()
        due = [
            provider
            for name, provider in self._all.items()
            if provider.definition.enabled and self._due.get(name, 0.0) <= now
        ]
        await self._check(due)

    async def check_all(self) -> list[JsonObject]:
        """Check all of them now, also those that are switched off; return a result for each, by name.

        Their owner asks for it: what they were found to lack is asked for again.
        """
        providers = self.all()
        for provider in providers:
            provider.lacks.clear()
        await self._check(providers)
        now = self.clock.monotonic()
        return [_result(provider, now) for provider in providers if self._all.get(provider.name) is provider]

    async def check_one(self, name: str) -> JsonObject | None:
        """Check one of them now; None when there is none of that name."""
        provider = self._all.get(name)
        if provider is None:
            return None
        provider.lacks.clear()
        await self._check([provider])
        return _result(provider, self.clock.monotonic())

    async def try_out(self, definition: Upstream) -> JsonObject:
        """Check an upstream that is only being described; nothing is remembered."""
        provider = Provider(definition, "database")
        provider.checked(await self._ask(provider))
        return _result(provider, self.clock.monotonic())

    async def _check(self, providers: Sequence[Provider]) -> None:
        room = asyncio.Semaphore(_AT_A_TIME)

        async def one(provider: Provider) -> None:
            async with room:
                await self._checked(provider)

        await asyncio.gather(*(one(provider) for provider in providers))

    async def _checked(self, provider: Provider) -> None:
        """Check one; who asks meanwhile joins."""
        name = provider.name
        running = self._checking.get(name)
        if running is None:
            running = self._background.spawn(self._ask(provider), name=f"check:{name}")
            self._checking[name] = running
            running.add_done_callback(lambda _: self._checking.pop(name, None))
        check = await asyncio.shield(running)
        if provider.check is check:
            return
        before = provider.state(self.clock.monotonic())
        listed = provider.listed()
        if check.status == 401:
            provider.refuse(check.message, self.clock.monotonic())
        provider.checked(check)
        pause = CHECK_SECONDS * (1.0 + _JITTER * (2.0 * self._rng.random() - 1.0))
        self._due[name] = self.clock.monotonic() + pause
        after = provider.state(self.clock.monotonic())
        if after != before:
            level = logging.INFO if after == "healthy" else logging.WARNING
            logger.log(
                level, "upstream changed name=%s from=%s to=%s: %s", name, before, after, check.message
            )
        if listed != provider.listed():
            self.version += 1

    async def _ask(self, provider: Provider) -> Check:
        """Ask for the list of models, which costs nothing."""
        definition = provider.definition
        capability = "messages" if definition.capabilities == ("messages",) else "responses"
        headers = {
            "accept": "application/json",
            "user-agent": self.live.current.user_agent,
            **({"anthropic-version": ANTHROPIC_VERSION} if capability == "messages" else {}),
            **key_headers(provider, capability),
        }
        began, at = time.perf_counter(), self.clock.now()
        try:
            reply = await self.outbound.fetch(
                "GET",
                f"{definition.base_url}/v1/models",
                headers=headers,
                timeout=min(CHECK_TIMEOUT, definition.timeout),
                is_guarded=True,
            )
        except NetError as exc:
            return Check(at, False, None, time.perf_counter() - began, str(exc))
        return _read_check(reply, at, time.perf_counter() - began)

    # -- for its owner ---------------------------------------------------------------------

    def state(self) -> list[JsonObject]:
        """Return what there is to say of each, keys left out."""
        now = self.clock.monotonic()
        return [_told(provider, now) for provider in self.all()]


def _taken_over(before: Provider | None, definition: Upstream, source: Source) -> Provider:
    if before is None or before.source != source:
        return Provider(definition, source)
    if before.definition == definition:
        return before
    old = before.definition
    if (old.base_url, old.api_key) != (definition.base_url, definition.api_key):
        # Another place, or another key: what is known of the old one says nothing.
        return Provider(definition, source)
    before.definition = definition
    before.lacks.clear()
    before.doubts.clear()
    before.refused = ""
    return before


def _read_check(reply: Reply, at: float, seconds: float) -> Check:
    status = reply.status
    try:
        payload: Any = loads_lenient(reply.body)
    except BadJson:
        payload = None
    if 200 <= status < 300:
        models = _models_in(payload)
        if models is None:
            return Check(
                at,
                False,
                status,
                seconds,
                "what it answers at /v1/models is no list of models; is base-url right?",
            )
        return Check(
            at,
            True,
            status,
            seconds,
            f"it lists {len(models)} model{'' if len(models) == 1 else 's'}",
            models,
        )
    if status == 401:
        return Check(at, False, status, seconds, f"it refuses the key: status {status}")
    if status == 403:
        # A key may be good for answers alone.
        words = "this key may not list its models (status 403), which does not matter if it may ask"
        return Check(at, False, status, seconds, words, is_inconclusive=True)
    if status in (404, 405, 501):
        words = f"it has no list of models at /v1/models (status {status}); is base-url right?"
        return Check(at, False, status, seconds, words, is_inconclusive=True)
    if 300 <= status < 400:
        return Check(
            at,
            False,
            status,
            seconds,
            f"it sends requests elsewhere (status {status}); redirects are not followed",
        )
    words = clean(fault_of(payload, f"status {status}").message)
    return Check(
        at, False, status, seconds, f"status {status}: {words}" if words != f"status {status}" else words
    )


def _models_in(payload: Any) -> tuple[str, ...] | None:
    """Return the ids in a list of models, in OpenAI's shape or Anthropic's; None when it is none."""
    if not isinstance(payload, dict):
        return None
    entries = payload.get("data", payload.get("models"))
    if not isinstance(entries, list):
        return None
    ids = [
        name
        for entry in entries[:_MAX_LISTED]
        if isinstance(entry, dict)
        and isinstance(name := entry.get("id", entry.get("slug")), str)
        and 0 < len(name) <= 256
        and name.isprintable()
    ]
    return tuple(dict.fromkeys(ids))


def _result(provider: Provider, now: float) -> JsonObject:
    check = provider.check
    return {
        "name": provider.name,
        "state": provider.state(now),
        "ok": check is not None and check.is_ok,
        "status": None if check is None else check.status,
        "seconds": None if check is None else round(check.seconds, 3),
        "message": "it was not asked yet" if check is None else check.message,
        "models": 0 if check is None else len(check.models),
        "checked_at": None if check is None else check.at,
    }


def _told(provider: Provider, now: float) -> JsonObject:
    definition = provider.definition
    shown = {
        name.replace("-", "_"): value
        for name, value in masked_upstream(definition).items()
        if name not in ("api-key-file", "api-key-env")
    }
    return {
        **shown,
        "effective_url": f"{definition.base_url}/v1",
        "source": provider.source,
        "is_read_only": provider.source == "config",
        "state": provider.state(now),
        "reason": _reason(provider, now),
        "check": _result(provider, now),
        "served_models": provider.listed(),
        "in_flight": provider.in_flight,
        "requests": provider.requests,
        "errors": provider.errors,
        "last_error": provider.last_error or None,
        "last_used_at": provider.last_used,
        "ejected": [
            _ejection(model, outlier, now)
            for model, outlier in provider.outliers.items()
            if outlier.until > 0.0
        ],
        "resting": [
            {"model": model or None, "seconds": round(until - now, 1), "why": why}
            for model, (until, why) in provider.rests.items()
            if until > now
        ],
        "lacking": [
            {"capability": capability, "model": model, "seconds": round(until - now, 1)}
            for (capability, model), until in provider.lacks.items()
            if until > now
        ],
    }


def _ejection(model: str, outlier: Outlier, now: float) -> JsonObject:
    return {
        "model": model,
        "seconds": round(max(0.0, outlier.until - now), 1),
        "times": outlier.times,
        "is_half_open": outlier.is_half_open(now) or outlier.is_probed,
    }


def _reason(provider: Provider, now: float) -> str | None:
    """Say in words why it is not simply healthy."""
    if not provider.definition.enabled:
        return "its owner has switched it off"
    if provider.refused:
        return provider.refused
    if provider.failed_checks and provider.check is not None:
        return provider.check.message
    if provider.doubts:
        return provider.last_error
    resting = [why for until, why in provider.rests.values() if until > now]
    if resting:
        return resting[0]
    return provider.last_error if any(one.until > 0.0 for one in provider.outliers.values()) else None
