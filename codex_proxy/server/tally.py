"""What finished turns come to since the start, in plain integers: what `/metrics` reads.

A metrics library's own counters take a lock and a lookup by label values each time; a turn would pay for a
dozen of them. Here it pays for a few dictionaries, and the labels are made when somebody asks.

Every name that a caller can choose is bounded: models to those that are served, callers to so many.
"""

from bisect import bisect_left
from collections.abc import Callable

from codex_proxy.accounts.tokens import mask_name
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.trace import Trace

OTHER = "other"
"""Stands for all names beyond the bound."""

FIRST_TOKEN_BOUNDS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0)
DURATION_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
LAG_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

# Keys of the configuration are few; one who changes them all day must not fill the memory.
_MAX_CALLERS = 100
# Every account that ever was, by what its attempts came to.
_MAX_ATTEMPTS = 50_000
# The same for upstreams, of which there are a hundred at a time at most, and some come and go.
_MAX_UPSTREAMS = 200
_MAX_UPSTREAM_ATTEMPTS = 3_000
# How many names a caller can make up until their meaning is forgotten.
_MAX_NAMES = 1_000
_MAX_NAME_LENGTH = 256
_MAX_MODELS = 200


class Spread:
    """A histogram: how many values lie up to each bound, and what all come to."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Between the bounds; the last one is beyond all of them."""
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Tokens:
    """Turns and their tokens."""

    __slots__ = ("cached", "input", "output", "reasoning", "turns")

    def __init__(self) -> None:
        self.turns = 0
        self.input = 0
        self.cached = 0
        self.output = 0
        self.reasoning = 0


class Tally:
    """Counts finished turns.

    Args:
        catalog: What there is to serve now.
    """

    def __init__(self, catalog: Callable[[], Catalog]) -> None:
        self._catalog = catalog
        self._served: Catalog | None = None
        self.requests: dict[tuple[str, str, int], int] = {}
        """By route, end and class of the status, where 429 is one of its own."""
        self.clients: dict[str, int] = {}
        self.durations: dict[str, Spread] = {}
        """By route."""
        self.firsts: dict[str, Spread] = {}
        """By model."""
        self.models: dict[str, Tokens] = {}
        self.callers: dict[str, Tokens] = {}
        self.attempts: dict[tuple[str, str], int] = {}
        """By account and outcome."""
        self.upstream_attempts: dict[tuple[str, str], int] = {}
        """The same by upstream."""
        self.upstreams: dict[str, Tokens] = {}
        """By the upstream that served."""
        self.retries: dict[str, int] = {}
        """By the outcome of the attempt before."""
        self.lag = Spread(LAG_BOUNDS)
        self._model_names: dict[str, str] = {}
        self._caller_names: dict[str, str] = {}

    def note(self, trace: Trace) -> None:
        """Count a finished turn."""
        route, usage = trace.route, trace.usage
        status = trace.status
        # A pool at its limit is no mistake of its callers.
        key = (route, trace.end.value, status if status == 429 else status // 100)
        self.requests[key] = self.requests.get(key, 0) + 1
        self.clients[trace.client] = self.clients.get(trace.client, 0) + 1
        spread = self.durations.get(route)
        if spread is None:
            spread = self.durations[route] = Spread(DURATION_BOUNDS)
        spread.add(trace.seconds)
        model = self._model_names.get(trace.model) or self._model(trace.model)
        for tokens in (self._of(self.models, model), self._of(self.callers, self._caller(trace.caller.name))):
            tokens.turns += 1
            tokens.input += usage.input_tokens
            tokens.cached += usage.cached_tokens
            tokens.output += usage.output_tokens
            tokens.reasoning += usage.reasoning_tokens
        first = trace.first_text if trace.first_text is not None else trace.first_event
        if first is not None:
            spread = self.firsts.get(model)
            if spread is None:
                spread = self.firsts[model] = Spread(FIRST_TOKEN_BOUNDS)
            spread.add(first - trace.started)
        before = ""
        if trace.upstream:
            self._add_upstream(trace)
        for attempt in trace.attempts:
            tried = (attempt.alias, attempt.outcome)
            if attempt.is_upstream:
                if (
                    tried not in self.upstream_attempts
                    and len(self.upstream_attempts) >= _MAX_UPSTREAM_ATTEMPTS
                ):
                    tried = (OTHER, attempt.outcome)
                self.upstream_attempts[tried] = self.upstream_attempts.get(tried, 0) + 1
            else:
                if tried not in self.attempts and len(self.attempts) >= _MAX_ATTEMPTS:
                    tried = (OTHER, attempt.outcome)
                self.attempts[tried] = self.attempts.get(tried, 0) + 1
            if before:
                self.retries[before] = self.retries.get(before, 0) + 1
            before = attempt.outcome

    def _add_upstream(self, trace: Trace) -> None:
        name = (
            trace.upstream
            if trace.upstream in self.upstreams or len(self.upstreams) < _MAX_UPSTREAMS
            else OTHER
        )
        tokens, usage = self._of(self.upstreams, name), trace.usage
        tokens.turns += 1
        tokens.input += usage.input_tokens
        tokens.cached += usage.cached_tokens
        tokens.output += usage.output_tokens
        tokens.reasoning += usage.reasoning_tokens

    def _of(self, kept: dict[str, Tokens], name: str) -> Tokens:
        tokens = kept.get(name)
        if tokens is None:
            tokens = kept[name] = Tokens()
        return tokens

    def _caller(self, name: str) -> str:
        known = self._caller_names.get(name)
        if known is None:
            if len(self._caller_names) >= _MAX_CALLERS:
                return OTHER
            # Who names a key after an address does not want it in every dashboard.
            known = self._caller_names[name] = mask_name(name)
        return known

    def _model(self, name: str) -> str:
        """Return the model that a caller's name means, if it is served; a name that nobody serves is anybody's."""
        catalog = self._catalog()
        if catalog is not self._served or len(self._model_names) >= _MAX_NAMES:
            self._served = catalog
            self._model_names.clear()
        slug = catalog.resolve(name).model if name else ""
        is_served = any(facts.slug == slug for facts in catalog.models)
        if not is_served and name in catalog.also:
            slug, is_served = name, True
        if not is_served or (slug not in self.models and len(self.models) >= _MAX_MODELS):
            slug = OTHER
        if len(name) <= _MAX_NAME_LENGTH:
            self._model_names[name] = slug
        return slug

    def look_again(self) -> None:
        """Let names mean what they mean by the catalogue of now."""
        if self._catalog() is not self._served:
            self._model_names.clear()
