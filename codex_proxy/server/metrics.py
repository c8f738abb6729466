"""`/metrics`, for Prometheus: made at each scrape from what is counted and known anyway.

The library renders what is small, from a registry of its own that nothing else writes into. What there is of
every account is rendered here, line by line and in slices, because of 2,000 accounts there are tens of thousands
of lines: the library would hold every stream up for as long as it takes.
"""

import asyncio
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from aiohttp import web
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from codex_proxy import __version__
from codex_proxy.accounts.account import Account
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.state import State
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import RequestError
from codex_proxy.server.admin import STATUSES
from codex_proxy.server.front import Handler
from codex_proxy.server.pulse import Work
from codex_proxy.server.tally import Spread, Tally
from codex_proxy.server.views import STATUS, window_name
from codex_proxy.tasks import Background
from codex_proxy.upstream.provider import STATES as UPSTREAM_STATES

PREFIX = "codex_proxy"

# Of so many accounts at a time the lines are made, then others get their turn: about a millisecond.
_SLICE = 50

_PHASES = ("starting", "ready", "draining")

_END = b"# EOF\n"


@dataclass(slots=True, frozen=True)
class LedgerFigures:
    """How the ledger does, where there is one."""

    is_away: bool
    holds: int
    spooled: int
    settlements: Mapping[str, int]
    """Turns whose cost was written down, by what came of it."""


@dataclass(slots=True, frozen=True)
class Sources:
    """What other rooms count; each is asked at a scrape."""

    phase: Callable[[], str]
    sockets: Callable[[], int] = lambda: 0
    refreshes: Callable[[], Mapping[str, int]] = dict
    """Token exchanges by what came of them."""
    reloads: Callable[[], Mapping[str, int]] = dict
    """Readings of the configuration by what came of them."""
    dropped_records: Callable[[], int] = lambda: 0
    firing: Callable[[], Mapping[str, int]] = dict
    """Episodes that go on, by rule."""
    messages: Callable[[], Mapping[tuple[str, str], int]] = dict
    """Messages about them, by webhook and what came of them."""
    upstreams: Callable[[], Sequence[tuple[str, str, int]]] = tuple
    """HTTP upstreams: name, state, requests under way."""
    drains: Callable[[], int] = lambda: 0
    """Answers that are read on though their callers have left."""
    traces: Callable[[], Mapping[str, int]] = dict
    """Turns that were to be sent to a collector, by what came of them."""
    ledger: Callable[[], LedgerFigures | None] = lambda: None


@dataclass(slots=True, frozen=True)
class _Family:
    """One metric that every account has."""

    name: str
    kind: str
    doc: str
    lines: list[str] = field(default_factory=list)

    @property
    def sample(self) -> str:
        return f"{PREFIX}_{self.name}_total" if self.kind == "counter" else f"{PREFIX}_{self.name}"

    def head(self, encode: "Encode") -> bytes:
        """Return what says what the lines are, in the words of the format."""
        return _without_end(encode(_Only([Metric(f"{PREFIX}_{self.name}", self.doc, self.kind)])))


Encode = Callable[[Collector], bytes]


class _Only(Collector):
    """Some metrics, as the library wants to be given them."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


class Metrics(Collector):
    """Answers a scrape."""

    def __init__(
        self,
        tally: Tally,
        pool: Pool,
        work: Work,
        background: Background,
        sources: Sources,
        *,
        live: Live,
        clock: Clock,
    ) -> None:
        self._tally = tally
        self._pool = pool
        self._work = work
        self._background = background
        self._sources = sources
        self._live = live
        self._clock = clock
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by the names in `app.ROUTES`."""
        return {"metrics": self.metrics}

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Show everything that is counted, in the format that is asked for.

        Raises:
            RequestError: If nobody is to see it (`metrics: off`).
        """
        if self._live.current.metrics == "off":
            raise RequestError("this proxy shows no metrics", code="not_found", status=404)
        encode, content_type = choose_encoder(", ".join(request.headers.getall("Accept", [])))
        body = await self.render(encode)
        return web.Response(body=body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    async def render(self, encode: Encode) -> bytes:
        """Return one scrape; others get their turn meanwhile."""
        whole = encode(self.registry)
        parts = [_without_end(whole)]
        for family in await self._of_accounts():
            if family.lines:
                parts += (family.head(encode), "".join(family.lines).encode())
        if whole.endswith(_END):
            parts.append(_END)
        return b"".join(parts)

    # -- what there is once ---------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """Yield what does not grow with the accounts."""
        tally, sources, work = self._tally, self._sources, self._work
        tally.look_again()
        yield InfoMetricFamily(
            f"{PREFIX}_build",
            "What runs.",
            {"version": __version__, "python": platform.python_version()},
        )
        yield _counter(
            "requests",
            "Finished turns by route, by how they ended (completed, incomplete, failed, caller_gone) and by the class of the status, of which 429 is one of its own.",
            ("route", "outcome", "status"),
            [((route, end, _class(status)), n) for (route, end, status), n in tally.requests.items()],
        )
        yield _counter(
            "client_requests",
            "Finished turns by kind of client.",
            ("client",),
            [((client or "unknown",), n) for client, n in tally.clients.items()],
        )
        yield _histogram(
            "request_duration_seconds", "How long turns took, to their end.", "route", tally.durations
        )
        yield _histogram(
            "first_token_seconds",
            "How long until an answer began, from the request's first byte, waiting and failed attempts included.",
            "model",
            tally.firsts,
        )
        yield _counter(
            "tokens",
            "Tokens by model and kind; cached is a part of input, reasoning a part of output.",
            ("model", "kind"),
            [
                ((model, kind), n)
                for model, tokens in tally.models.items()
                for kind, n in (
                    ("input", tokens.input),
                    ("cached", tokens.cached),
                    ("output", tokens.output),
                    ("reasoning", tokens.reasoning),
                )
            ],
        )
        yield _counter(
            "caller_requests",
            "Finished turns by the name of the client key.",
            ("caller",),
            [((caller,), tokens.turns) for caller, tokens in tally.callers.items()],
        )
        yield _counter(
            "caller_tokens",
            "Tokens by the name of the client key and kind.",
            ("caller", "kind"),
            [
                ((caller, kind), n)
                for caller, tokens in tally.callers.items()
                for kind, n in (
                    ("input", tokens.input),
                    ("cached", tokens.cached),
                    ("output", tokens.output),
                )
            ],
        )
        yield _counter(
            "retries",
            "Further attempts of a turn, by the outcome of the attempt before.",
            ("after",),
            [((after,), n) for after, n in tally.retries.items()],
        )
        yield _gauge("requests_in_flight", "Turns under way.", work.in_flight)
        yield _gauge("streams_in_flight", "Turns under way that are answered as a stream.", work.streams)
        yield _gauge("websockets_open", "Open WebSocket connections.", sources.sockets())
        yield _gauge("queue_length", "Turns that wait for an account with room.", self._pool.waiting)
        yield _gauge("retries_in_flight", "Retries under way after a passing fault.", work.retrying)
        phase = sources.phase()
        yield _gauges(
            "phase",
            "1 for the phase of the process's life that it is in.",
            ("phase",),
            [((name,), float(name == phase)) for name in _PHASES],
        )
        yield _counter(
            "token_refreshes",
            "Token exchanges by result; passing, limited and uncertain ones are tried again.",
            ("result",),
            [((result,), n) for result, n in sources.refreshes().items()],
        )
        yield _histogram(
            "loop_lag_seconds", "How late the event loop was, ten times a second.", "", {"": tally.lag}
        )
        yield _counter(
            "dropped_records",
            "Request records that were not kept, because the disk was slow or full.",
            (),
            [((), sources.dropped_records())],
        )
        yield _counter(
            "config_reloads",
            "Edits of the configuration that were read: applied, or broken and left alone.",
            ("result",),
            [((result,), n) for result, n in sources.reloads().items()],
        )
        yield _gauges(
            "alerts_firing",
            "Episodes that go on, by rule.",
            ("alert",),
            [((name,), n) for name, n in sources.firing().items()],
        )
        yield _counter(
            "alert_messages",
            "Messages to webhooks by result.",
            ("webhook", "result"),
            [(names, n) for names, n in sources.messages().items()],
        )
        yield _counter(
            "telemetry_turns",
            "Turns whose traces were sent to a collector, were not, or were dropped because too many waited.",
            ("result",),
            [((result,), n) for result, n in sources.traces().items()],
        )
        yield from _ledger(sources.ledger())
        yield from self._of_upstreams()
        alive = self._background.statistics()
        yield _gauge("background_tasks", "Tasks that the process owns.", sum(alive.values()))
        yield from self._pool_as_a_whole()

    def _of_upstreams(self) -> Iterable[Metric]:
        """Yield what there is of HTTP upstreams, of which there are few; nothing where there are none."""
        tally, now = self._tally, self._sources.upstreams()
        if not now and not tally.upstream_attempts:
            return
        yield _gauges(
            "upstream_state",
            "1 for the state that an HTTP upstream is in.",
            ("upstream", "state"),
            [((name, one), float(one == state)) for name, state, _ in now for one in UPSTREAM_STATES],
        )
        yield _gauges(
            "upstream_requests_in_flight",
            "Requests under way on an HTTP upstream.",
            ("upstream",),
            [((name,), float(count)) for name, _, count in now],
        )
        yield _counter(
            "upstream_attempts",
            "Attempts by HTTP upstream and outcome: ok, or why it failed.",
            ("upstream", "outcome"),
            [((name, outcome or "open"), n) for (name, outcome), n in tally.upstream_attempts.items()],
        )
        yield _counter(
            "upstream_requests",
            "Turns that an HTTP upstream served.",
            ("upstream",),
            [((name,), tokens.turns) for name, tokens in tally.upstreams.items()],
        )
        yield _counter(
            "upstream_tokens",
            "Tokens of an HTTP upstream by kind.",
            ("upstream", "kind"),
            [
                ((name, kind), n)
                for name, tokens in tally.upstreams.items()
                for kind, n in (
                    ("input", tokens.input),
                    ("cached", tokens.cached),
                    ("output", tokens.output),
                )
            ],
        )
        yield _gauge(
            "drains_open",
            "Answers of HTTP upstreams that are read on though their callers have left.",
            self._sources.drains(),
        )

    def _pool_as_a_whole(self) -> Iterable[Metric]:
        limits = self._pool.pool_limits()
        windows = [
            window for window in (limits or {}).get("rate_limits", {}).values() if isinstance(window, dict)
        ]
        yield _gauges(
            "pool_quota_used_ratio",
            "The mean use of a window over the accounts that serve; 1 when all of them rest at their limit.",
            ("window",),
            [((_window_name(one),), one["used_percent"] / 100) for one in windows if "used_percent" in one],
        )
        yield _gauges(
            "pool_quota_reset_timestamp_seconds",
            "When the first of the accounts gets its window anew.",
            ("window",),
            [((_window_name(one),), float(one["reset_at"])) for one in windows if one.get("reset_at")],
        )

    # -- what there is of every account ---------------------------------------------------

    async def _of_accounts(self) -> Sequence[_Family]:
        """Return the metrics of the accounts, their lines made in slices."""
        now = self._clock.now()
        status = _Family("account_status", "gauge", "1 for the status that an account has.")
        in_flight = _Family("account_requests_in_flight", "gauge", "Requests under way on an account.")
        tokens = _Family("account_tokens", "counter", "Tokens of an account by kind, kept over restarts.")
        used = _Family(
            "account_quota_used_ratio", "gauge", "How much of a window is used; left out while unknown."
        )
        age = _Family("account_quota_age_seconds", "gauge", "How old the numbers of a window are.")
        reset = _Family("account_quota_reset_timestamp_seconds", "gauge", "When a window starts again.")
        expiry = _Family("account_token_expiry_timestamp_seconds", "gauge", "When an access token ends.")
        attempts = _Family("attempts", "counter", "Attempts by account and outcome: ok, or why it failed.")
        counts = dict.fromkeys(State, 0)
        for number, account in enumerate(self._pool.accounts(), 1):
            counts[account.state] += 1
            name = f'account="{_escaped(account.alias)}"'
            mine = STATUS[account.state]
            status.lines.append(
                "".join([
                    f'codex_proxy_account_status{{{name},status="{one}"}} {1 if one is mine else 0}\n'
                    for one in STATUSES
                ])
            )
            in_flight.lines.append(f"{in_flight.sample}{{{name}}} {account.in_flight}\n")
            usage = account.usage
            tokens.lines.append(
                f'{tokens.sample}{{{name},kind="input"}} {usage.input_tokens}\n'
                f'{tokens.sample}{{{name},kind="cached"}} {usage.cached_tokens}\n'
                f'{tokens.sample}{{{name},kind="output"}} {usage.output_tokens}\n'
            )
            if account.ends_at is not None:
                expiry.lines.append(f"{expiry.sample}{{{name}}} {account.ends_at}\n")
            _add_windows(account, name, now, used, age, reset)
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        for number, ((alias, outcome), count) in enumerate(list(self._tally.attempts.items()), 1):
            attempts.lines.append(
                f'{attempts.sample}{{account="{_escaped(alias)}",outcome="{outcome or "open"}"}} {count}\n'
            )
            if number % (10 * _SLICE) == 0:
                await asyncio.sleep(0)
        total = _Family("accounts", "gauge", "Accounts by status.")
        for state, count in counts.items():
            total.lines.append(f'{total.sample}{{status="{STATUS[state]}"}} {count}\n')
        return (total, status, in_flight, tokens, used, age, reset, expiry, attempts)


def _add_windows(
    account: Account, name: str, now: float, used: _Family, age: _Family, reset: _Family
) -> None:
    for family in account.quota.families.values():
        for place, window in family.windows():
            labels = f'{name},limit="{_escaped(family.id)}",window="{window_name(window.minutes) or place}"'
            age.lines.append(f"{age.sample}{{{labels}}} {max(0.0, now - window.seen_at):.3f}\n")
            if window.is_over(now):
                # Unknown, not empty.
                continue
            used.lines.append(f"{used.sample}{{{labels}}} {window.used_percent / 100:.4g}\n")
            if window.resets_at is not None:
                reset.lines.append(f"{reset.sample}{{{labels}}} {window.resets_at}\n")


def _window_name(window: Mapping[str, object]) -> str:
    minutes = window.get("window_minutes")
    return (window_name(minutes) if isinstance(minutes, int) else None) or "unknown"


def _class(status: int) -> str:
    if status == 429:
        return "429"
    return f"{status}xx" if status else "none"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _without_end(data: bytes) -> bytes:
    return data.removesuffix(_END)


_Rows = Iterable[tuple[Sequence[str], float]]


def _ledger(figures: LedgerFigures | None) -> Iterable[Metric]:
    if figures is None:
        return
    yield _gauge("ledger_up", "1 while the ledger can be written.", float(not figures.is_away))
    yield _gauge("ledger_holds", "Turns under way that have something set aside, or may.", figures.holds)
    yield _gauge("ledger_spooled", "Settlements that wait in a file for the database.", figures.spooled)
    yield _counter(
        "ledger_settlements",
        "Turns whose cost was written down; unpaid: it was more than there was, lost: nobody settled it, refused: it was not.",
        ("result",),
        [((result,), n) for result, n in figures.settlements.items()],
    )


def _counter(name: str, doc: str, labels: Sequence[str], rows: _Rows) -> Metric:
    return _filled(CounterMetricFamily(f"{PREFIX}_{name}", doc, labels=labels), rows)


def _gauges(name: str, doc: str, labels: Sequence[str], rows: _Rows) -> Metric:
    return _filled(GaugeMetricFamily(f"{PREFIX}_{name}", doc, labels=labels), rows)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, rows: _Rows) -> Metric:
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _gauge(name: str, doc: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", doc, value=value)


def _histogram(name: str, doc: str, label: str, spreads: Mapping[str, Spread]) -> Metric:
    family = HistogramMetricFamily(f"{PREFIX}_{name}", doc, labels=[label] if label else [])
    for value, spread in spreads.items():
        bounds = [*map(str, spread.bounds), "+Inf"]
        buckets = [(bound, float(n)) for bound, n in zip(bounds, accumulate(spread.counts), strict=True)]
        family.add_metric([value] if label else [], buckets, spread.sum)
    return family
