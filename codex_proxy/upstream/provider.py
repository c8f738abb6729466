"""One upstream: what it takes, how it does, and whether it is to be asked now.

Times are seconds of the monotonic clock, passed in. What goes wrong is kept apart by what it means:

| what came back                    | what follows                                                                     |
|-----------------------------------|----------------------------------------------------------------------------------|
| 401                               | its configuration is wrong: nothing goes there until it is another one, or a     |
|                                   | health check passes                                                              |
| 403                               | that request is not for it; the same as 401 when three conversations in a row    |
|                                   | were refused and none was served                                                 |
| 429                               | a rest for that model, until it says that there is room                          |
| no money, a used-up limit         | a rest for all of it                                                             |
| 404                               | it has not that model, or does not speak that dialect: remembered for an hour    |
| 5xx, silence, no connection       | counted for that model; too many, and it is ejected (see `ejection`)             |
| any other 4xx                     | the request's own fault: nothing                                                 |
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from codex_proxy.accounts.pool import TAG_LENGTH
from codex_proxy.accounts.tokens import Secret
from codex_proxy.config import Upstream
from codex_proxy.patterns import fits
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.upstream.ejection import Outlier

LACKING_SECONDS = 3600.0
"""How long it is remembered that a model, or a dialect, is not there."""

LIMITED_SECONDS = 5.0
"""A rest after a 429 that does not say how long."""
EMPTY_SECONDS = 60.0
"""A rest after the word that there is no money, if nothing says how long."""
LONGEST_REST = 24 * 3600.0

DISABLED_SECONDS = 300.0
"""How long one whose key was refused is left alone that has no list of models by which it could be checked."""

DOUBTS = 3
"""How many conversations in a row are refused with 403 until that is thought to be its configuration: some
refuse a single one, for what it says."""

FAILED_CHECKS = 2
"""Health checks in a row that fail until nothing goes there."""

STATES = ("healthy", "degraded", "ejected", "disabled", "unknown")
"""How an upstream may be."""

_MAX_MODELS = 200
_OTHER = "*"
"""Stands for all models beyond so many: callers can make names up."""


@dataclass(slots=True, frozen=True)
class Way:
    """How a request can go to an upstream."""

    is_native: bool
    """As its caller wrote it; else translated into a Responses body."""
    model: str
    """What its model is called there."""
    capability: str
    """What the upstream has to speak for it."""
    is_as_named: bool = field(default=True, compare=False)
    """Whether that is the model that the caller named; else the one that stands for it here."""


@dataclass(slots=True, frozen=True)
class Blocked:
    """Why nothing goes to an upstream now."""

    rule: str
    evidence: str
    until: float
    """When that may be over."""


@dataclass(slots=True, frozen=True)
class Check:
    """What a health check found."""

    at: float
    """Wall clock."""
    is_ok: bool
    """It listed its models."""
    status: int | None
    seconds: float
    message: str
    """In words, for its owner."""
    models: tuple[str, ...] = ()
    is_inconclusive: bool = False
    """It is there, but shows no list of models, which says nothing about its key."""


@dataclass(slots=True)
class Provider:
    """One upstream, with all that is known of it."""

    definition: Upstream
    source: str
    """`config` or `database`."""
    secret: Secret = field(default_factory=Secret)
    outliers: dict[str, Outlier] = field(default_factory=dict)
    """By model."""
    rests: dict[str, tuple[float, str]] = field(default_factory=dict)
    """By model, until when and why; under "" stands all of it."""
    lacks: dict[tuple[str, str], float] = field(default_factory=dict)
    """Capability and model to until when it is believed not to have that."""
    refused: str = ""
    """Why its configuration is thought to be wrong; empty while it is not."""
    refused_at: float = 0.0
    doubts: set[str] = field(default_factory=set)
    """Conversations that were refused with 403 since the last answer, or good check."""
    takes_usage_option: bool = True
    """Whether it knows `stream_options`, as far as it has not refused that."""
    check: Check | None = None
    failed_checks: int = 0
    in_flight: int = 0
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    last_used: float | None = None
    """Wall clock."""

    def __post_init__(self) -> None:
        self.secret = Secret(self.definition.api_key)

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def key(self) -> str:
        """Its identity among all targets."""
        return f"upstream:{self.name}"

    @property
    def tag(self) -> str:
        """What a turn-state is marked with that it issued."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:TAG_LENGTH]

    # -- what it takes ---------------------------------------------------------------------

    def ways(self, request: BackendRequest) -> Iterator[Way]:
        """Yield how *request* could go there, the best first.

        A name that ends in an effort of ours (`-high`) is nobody's model elsewhere: where the upstream speaks
        Responses, the request goes under the model's own name, with the effort in its body.
        """
        native = request.native
        if native is None:
            return
        asked, slug = native.model, request.model
        has_suffix = bool(slug) and len(slug) < len(asked) and asked.lower().startswith(slug.lower())
        speaks = native.capability in self.definition.capabilities and native.is_whole
        there = self._exactly(asked) or (None if has_suffix else self._called(asked))
        if speaks and there is not None:
            yield Way(True, there, native.capability)
        if native.standard is not None and "responses" in self.definition.capabilities:
            exact, own = self._exactly(asked), self._called(slug or asked)
            there = exact or own or self._called(asked)
            if there is not None:
                yield Way(False, there, "responses", is_as_named=there is not own or exact is not None)
        if speaks and has_suffix and (there := self._called(asked)) is not None:
            yield Way(True, there, native.capability)

    def may_serve_as_named(self, request: BackendRequest) -> bool:
        """Tell whether it could be asked for the very model that *request*'s caller names."""
        return self.definition.enabled and any(way.is_as_named for way in self.ways(request))

    def way(self, request: BackendRequest, now: float) -> Way | None:
        """Return how *request* goes there; None when it cannot."""
        if not self.definition.enabled:
            return None
        for way in self.ways(request):
            if self.lacks.get((way.capability, way.model), 0.0) <= now:
                return way
        return None

    def _exactly(self, name: str) -> str | None:
        for own, theirs in self.definition.models:
            if own.lower() == name.lower():
                return theirs or name
        return None

    def _called(self, name: str) -> str | None:
        """Return what the model *name* is called there; None when it is not served."""
        if not self.definition.models:
            return name
        exact = self._exactly(name)
        if exact is not None:
            return exact
        # The longer pattern says more.
        for own, theirs in sorted(self.definition.models, key=lambda entry: -len(entry[0])):
            if "*" in own and fits(own, name):
                return theirs or name
        return None

    def serves(self, theirs: str) -> bool:
        """Tell whether it may serve what is called *theirs* there."""
        return not self.definition.models or any(
            (called or own) == theirs or ("*" in own and not called and fits(own, theirs))
            for own, called in self.definition.models
        )

    def listed(self) -> list[str]:
        """Return the names under which callers can ask for its models."""
        found = self.check.models if self.check is not None else ()
        if not self.definition.enabled:
            return []
        if not self.definition.models:
            return list(found)
        names: list[str] = []
        for own, _ in self.definition.models:
            names += [one for one in found if fits(own, one)] if "*" in own else [own]
        return list(dict.fromkeys(names))

    # -- whether it is to be asked ---------------------------------------------------------

    def blocked(self, model: str, now: float) -> Blocked | None:
        """Return why nothing is to go there for *model* now; None when something may."""
        may_try = self._cannot_be_checked and now >= self.refused_at + DISABLED_SECONDS
        if self.refused and not may_try:
            return Blocked("refused", self.refused, self.refused_at + DISABLED_SECONDS)
        for place in ("", model):
            until, why = self.rests.get(place, (0.0, ""))
            if until > now:
                return Blocked("resting", why, until)
        outlier = self.outliers.get(self._place(model))
        if outlier is not None and outlier.is_ejected(now):
            # While a probe is under way its end is not known.
            return Blocked("ejected", self.last_error, max(outlier.until, now + 1.0))
        if self.failed_checks >= FAILED_CHECKS:
            return Blocked("down", self.check.message if self.check is not None else "", now + 1.0)
        return None

    @property
    def _cannot_be_checked(self) -> bool:
        return self.check is None or self.check.is_inconclusive

    def outlier(self, model: str) -> Outlier:
        """Return how it does with *model*."""
        place = self._place(model)
        found = self.outliers.get(place)
        if found is None:
            found = self.outliers[place] = Outlier()
        return found

    def is_ejected(self, model: str, now: float) -> bool:
        """Tell whether it is ejected for *model*."""
        outlier = self.outliers.get(self._place(model))
        return outlier is not None and outlier.is_ejected(now)

    def _place(self, model: str) -> str:
        return model if model in self.outliers or len(self.outliers) < _MAX_MODELS else _OTHER

    # -- what became of requests -----------------------------------------------------------

    def rest(self, model: str, seconds: float, why: str, now: float) -> None:
        """Send nothing for *model* for a while; "" is all of it."""
        self.rests = {place: entry for place, entry in self.rests.items() if entry[0] > now}
        if len(self.rests) >= _MAX_MODELS:
            model = ""
        until = now + min(max(seconds, 0.0), LONGEST_REST)
        # Two refusals at a time: the later end counts.
        if until > self.rests.get(model, (0.0, ""))[0]:
            self.rests[model] = (until, why)

    def lack(self, way: Way, now: float) -> None:
        """Remember that it has not what *way* needs."""
        self.lacks = {entry: until for entry, until in self.lacks.items() if until > now}
        if len(self.lacks) < _MAX_MODELS:
            self.lacks[way.capability, way.model] = now + LACKING_SECONDS

    def refuse(self, why: str, now: float) -> bool:
        """Take in that its configuration is wrong; tell whether that is news."""
        is_news = not self.refused
        self.refused, self.refused_at = why, now
        return is_news

    def forbid(self, asker: str) -> bool:
        """Take in a 403 for one conversation; tell whether it looks as if it was for all."""
        if len(self.doubts) < DOUBTS:
            self.doubts.add(asker)
        return len(self.doubts) >= DOUBTS

    def checked(self, check: Check) -> None:
        """Take in what a health check found."""
        self.check = check
        if check.is_ok:
            self.failed_checks, self.refused = 0, ""
            self.doubts.clear()
        elif check.is_inconclusive:
            self.failed_checks = 0
        elif check.status != 401:
            self.failed_checks += 1

    def state(self, now: float) -> str:
        """Return how it is: one of `STATES`."""
        if not self.definition.enabled or self.refused:
            return "disabled"
        ejected = [one.is_ejected(now) or one.until > 0.0 for one in self.outliers.values()]
        if self.failed_checks >= FAILED_CHECKS or (ejected and all(ejected)):
            return "ejected"
        is_doubted = bool(self.failed_checks or self.doubts)
        if any(ejected) or is_doubted or any(until > now for until, _ in self.rests.values()):
            return "degraded"
        is_known = self.check is not None and (self.check.is_ok or self.check.is_inconclusive)
        return "healthy" if is_known or self.last_used is not None else "unknown"
