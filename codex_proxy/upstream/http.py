"""An upstream over HTTP as a target: what goes there, and what its refusals mean.

A request in a dialect that it speaks goes out as its caller wrote it; any other one as a Responses body, whose events
are the pivot, as an account's are. Nothing follows a redirect, and nothing goes to an address of a metadata service.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Protocol

from codex_proxy.accounts.affinity import Origins
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import BackendFault, UpstreamError, Verdict
from codex_proxy.net import Answer, Deadlines, NetError, Outbound
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.native import standard_body
from codex_proxy.protocol.request import (
    LITE_HEADER,
    TURN_STATE,
    BackendRequest,
    Refused,
    never,
    without_reasoning,
)
from codex_proxy.trace import Decision
from codex_proxy.upstream.backend import MAX_ERROR_SIZE, net_failure, refusal, split_turn_state
from codex_proxy.upstream.ejection import may_eject
from codex_proxy.upstream.provider import (
    EMPTY_SECONDS,
    LIMITED_SECONDS,
    Provider,
    Way,
)

logger = logging.getLogger(__name__)

ANTHROPIC_VERSION = "2023-06-01"
"""What a Messages request says that names no version."""


class Around(Protocol):
    """What a lease needs of the registry that it comes from."""

    live: Live
    clock: Clock
    outbound: Outbound
    origins: Origins
    via: str

    @property
    def catalog(self) -> Catalog:
        """What is known of models."""
        ...

    def members(self, model: str) -> tuple[int, int]:
        """Return how many upstreams serve *model*, and how many of them are ejected for it."""
        ...

    def check_soon(self, provider: Provider) -> None:
        """Have the next health check of *provider* now."""
        ...


class HttpLease:
    """One exchange with one upstream."""

    def __init__(
        self, around: Around, provider: Provider, way: Way, decision: Decision, *, is_probe: bool
    ) -> None:
        self._around = around
        self._provider = provider
        self._way = way
        self._is_probe = is_probe
        self._is_released = False
        self._asker = ""
        """Whose request it is: a conversation, else a caller."""
        self.key = provider.key
        self.alias = self.upstream = provider.name
        self.decision = decision
        self.is_native = way.is_native
        self.is_as_named = way.is_as_named
        self.max_retries: int | None = provider.definition.max_retries
        self.first_byte_timeout: float | None = provider.definition.timeout
        self.drains = provider.definition.on_client_disconnect == "drain"
        provider.in_flight += 1
        provider.requests += 1
        provider.last_used = around.clock.now()
        if is_probe:
            provider.outlier(way.model).is_probed = True

    async def open(self, request: BackendRequest) -> Answer:
        """Send the request with the upstream's key; see `route.Lease.open`."""
        around, provider, native = self._around, self._provider, request.native
        assert native is not None
        self._asker = request.session or native.caller
        settings, definition = around.live.current, provider.definition
        refused = self._cannot_read if any(map(self._cannot_read, request.encrypted)) else never
        if self._way.is_native:
            path = native.path_for(self._way.model)
            body = native.body_for(self._way.model, may_ask=provider.takes_usage_option)
            if request.has_body_turn_state or refused is not never:
                body = self._of_ours(body, request, refused)
        else:
            path, body = "responses", self._translated(request)
            if refused is not never:
                body = without_reasoning(body, refused)
        try:
            answer = await around.outbound.open(
                "POST",
                f"{definition.base_url}/v1/{path}{native.query}",
                headers=self._headers(request),
                body=body,
                deadlines=Deadlines(settings.connect_timeout, definition.timeout, settings.idle_timeout),
                may_repeat=True,
                is_guarded=True,
            )
        except NetError as exc:
            raise net_failure(exc) from exc
        if 200 <= answer.status < 300:
            return answer
        try:
            error = await self._refusal(answer)
        finally:
            answer.release()
        if self._way.is_native and native.asks_usage and provider.takes_usage_option and _odd_option(error):
            # It was ours, not the caller's: usage is estimated where it cannot be asked for.
            provider.takes_usage_option = False
            try:
                return await self.open(request)
            except UpstreamError:
                # Without it nothing is better: the words were only the caller's own.
                provider.takes_usage_option = True
                raise
        raise error

    def _translated(self, request: BackendRequest) -> bytes:
        native = request.native
        assert native is not None
        standard = native.as_standard()
        thinks = self._around.catalog.known(standard.model)
        body = standard_body(standard, self._way.model, thinks=thinks)
        return self._of_ours(body, standard, never) if standard.has_body_turn_state else body

    def _of_ours(self, body: bytes, request: BackendRequest, refused: Refused) -> bytes:
        """Return *body* with its own turn-state or none, and without what it cannot read."""
        return BackendRequest(
            "responses",
            request.asked_model,
            request.model,
            body,
            encrypted=request.encrypted,
            has_body_turn_state=request.has_body_turn_state,
        ).body_for(self._turn_state(request), refused)

    def _turn_state(self, request: BackendRequest) -> str | None:
        """Return the caller's turn-state when it is this upstream's; another's is dropped."""
        tag, raw = split_turn_state(request.turn_state)
        return raw if tag == self._provider.tag else None

    def _headers(self, request: BackendRequest) -> dict[str, str]:
        native, settings = request.native, self._around.live.current
        assert native is not None
        speaks = self._way.capability
        headers = {"user-agent": settings.user_agent, **native.headers}
        if not self._way.is_native and not native.as_standard().lite:
            headers.pop(LITE_HEADER, None)
        if not self._way.is_native and native.capability != "responses":
            # They are of another dialect.
            headers = {name: value for name, value in headers.items() if not name.startswith("anthropic-")}
        is_stream = native.stream or not self._way.is_native
        headers["accept"] = "text/event-stream" if is_stream else "application/json"
        headers["content-type"] = "application/json"
        # Who comes back to where it has been goes round and round.
        headers["via"] = f"{native.via}, 1.1 {self._around.via}" if native.via else f"1.1 {self._around.via}"
        turn_state = self._turn_state(request)
        if turn_state is not None:
            headers[TURN_STATE] = turn_state
        if speaks == "messages":
            headers.setdefault("anthropic-version", ANTHROPIC_VERSION)
        return headers | key_headers(self._provider, speaks)

    def _cannot_read(self, content: str) -> bool:
        origins, now = self._around.origins, self._around.clock.now()
        if origins.was_refused(content, self.key, now):
            return True
        issuer = origins.of(content, now)
        return issuer is not None and issuer != self.key

    async def _refusal(self, answer: Answer) -> UpstreamError:
        try:
            body = await answer.read_all(MAX_ERROR_SIZE)
        except NetError:
            body = b""
        now = self._around.clock.now()
        error = refusal(answer.status, answer.headers, body, now=now)
        if error.retry_after is None and error.verdict is Verdict.LIMITED:
            error.retry_after = room_in(answer.headers, now)
        error.verdict = _meant(error)
        if 300 <= answer.status < 400:
            error.fault = BackendFault("it sends requests elsewhere, and redirects are not followed")
        return error

    async def recover(self, error: UpstreamError, request: BackendRequest) -> bool:
        """Leave out what it could not read."""
        if error.verdict is not Verdict.ENCRYPTED:
            return False
        origins, now = self._around.origins, self._around.clock.now()
        sent = [content for content in request.encrypted if not self._cannot_read(content)]
        # All of them when none is known to be foreign: it has refused one of them.
        foreign = [content for content in sent if origins.is_foreign(content, self.key, now)] or sent
        for content in foreign:
            origins.refused(content, self.key, now)
        return bool(foreign)

    def wrap_turn_state(self, value: str) -> str:
        """Put the upstream's tag before a turn-state, so that it comes back to this upstream only."""
        return f"{self._provider.tag}.{value}"

    def observe(self, kind: str, payload: Mapping[str, object]) -> None:
        """Note that this upstream issued the sealed items of an event or an answer."""
        output = payload.get("output")
        for item in (payload.get("item"), *(output if isinstance(output, list) else ())):
            if isinstance(item, Mapping) and isinstance(item.get("encrypted_content"), str):
                self._around.origins.issued(item["encrypted_content"], self.key, self._around.clock.now())

    def ok(self) -> None:
        """Report that the upstream answered."""
        provider, now = self._provider, self._around.clock.monotonic()
        outlier = provider.outlier(self._way.model)
        was_ejected = outlier.until > 0.0
        outlier.good(now)
        if was_ejected and outlier.until == 0.0:
            logger.info("upstream is back name=%s model=%s", provider.name, self._way.model)
        self._is_probe = False
        # An answer is worth more than any check.
        provider.refused, provider.failed_checks = "", 0
        provider.doubts.clear()

    def failed(self, error: UpstreamError) -> None:
        """Report a failure."""
        provider, way = self._provider, self._way
        now = self._around.clock.monotonic()
        match error.verdict:
            case Verdict.CALLER | Verdict.ENCRYPTED:
                return
            case Verdict.UNAUTHORIZED:
                self._refuse(f"it refuses its key with status {error.status}", error, now)
            case Verdict.FORBIDDEN:
                if not provider.doubts:
                    # Its list of models tells whether it is the key.
                    self._around.check_soon(provider)
                if provider.forbid(self._asker):
                    why = f"it refuses whoever asks with status {error.status}"
                    self._refuse(why, error, now)
            case Verdict.MODEL:
                provider.lack(way, now)
                logger.warning(
                    "upstream has not what was asked for name=%s model=%s dialect=%s: for an hour not asked for it again; "
                    "see its base-url, models and capabilities",
                    provider.name, way.model, way.capability,
                )  # fmt: skip
            case Verdict.LIMITED:
                wait = error.retry_after if error.retry_after is not None else LIMITED_SECONDS
                provider.rest(way.model, wait, "it has been asked too fast", now)
            case Verdict.EXHAUSTED | Verdict.UNENTITLED:
                wait = error.retry_after if error.retry_after is not None else EMPTY_SECONDS
                is_limit = error.verdict is Verdict.EXHAUSTED
                why = "its usage limit is reached" if is_limit else "it says that there is no money for it"
                provider.rest("", wait, why, now)
                logger.warning("upstream rests name=%s seconds=%.0f: %s", provider.name, wait, why)
            case Verdict.OVERLOADED | Verdict.SERVER | Verdict.PATH | Verdict.SILENT | Verdict.CUT:
                self._count_failure(now)
        provider.errors += 1
        provider.last_error = f"{error.verdict.value}, status {error.status}"

    def _refuse(self, why: str, error: UpstreamError, now: float) -> None:
        if self._provider.refuse(why, now):
            logger.error(
                "upstream is not asked any more until its setting is another one or a health check passes "
                "name=%s status=%d: its key or its base-url is wrong",
                self._provider.name, error.status,
            )  # fmt: skip

    def _count_failure(self, now: float) -> None:
        provider, model = self._provider, self._way.model
        self._is_probe = False
        outlier = provider.outlier(model)
        if not outlier.bad(now):
            return
        members, ejected = self._around.members(model)
        if outlier.until == 0.0 and not may_eject(ejected, members):
            return
        seconds = outlier.eject(now)
        logger.warning(
            "upstream is ejected name=%s model=%s seconds=%.0f times=%d",
            provider.name, model, seconds, outlier.times,
        )  # fmt: skip

    def release(self) -> None:
        """Give the upstream back."""
        if self._is_released:
            return
        self._is_released = True
        self._provider.in_flight -= 1
        if self._is_probe:
            self._provider.outlier(self._way.model).unprobed()


def key_headers(provider: Provider, capability: str) -> dict[str, str]:
    """Return the headers with the upstream's key, where that dialect has it."""
    if not provider.secret:
        return {}
    key = provider.secret.reveal()
    return {"x-api-key": key} if capability == "messages" else {"authorization": f"Bearer {key}"}


_OF_ITS_KEY = re.compile(
    r"(?i)(?:api key (?:not valid|expired|not found)|(?:invalid|incorrect) api key)\b"
).match
_OF_ITS_PURSE = re.compile(r"(?i)your (?:credit balance is too low|account is not active)\b").match
_OF_THE_REQUEST = re.compile(
    r"(?i)(?:no such |(?:item|file|previous response|prompt|conversation|container|vector store)\b)"
).match


def _meant(error: UpstreamError) -> Verdict:
    """Return whose fault a refusal is, where a provider's status or code says something else than its words.

    Only the beginning of the words counts: further on they may repeat what a caller wrote.
    """
    verdict, fault = error.verdict, error.fault
    if verdict is Verdict.CALLER and error.status == 400:
        # Anthropic's word for an empty purse and Google's for a wrong key.
        if _OF_ITS_PURSE(fault.message):
            return Verdict.UNENTITLED
        if _OF_ITS_KEY(fault.message):
            return Verdict.UNAUTHORIZED
    if verdict is Verdict.MODEL and error.status == 404 and fault.code not in ("model_not_found",):
        # What the request refers to is not there: a file, an item of an older answer.
        is_model = fault.param in (None, "model") and not _OF_THE_REQUEST(fault.message)
        return verdict if is_model else Verdict.CALLER
    return verdict


def _odd_option(error: UpstreamError) -> bool:
    """Tell whether a refusal is about the way in which the usage of a stream is asked for."""
    said = f"{error.fault.param} {error.fault.message}"
    return error.verdict is Verdict.CALLER and ("stream_options" in said or "include_usage" in said)


_ROOM = (
    ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"),
    ("anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-reset"),
    ("anthropic-ratelimit-input-tokens-remaining", "anthropic-ratelimit-input-tokens-reset"),
    ("anthropic-ratelimit-output-tokens-remaining", "anthropic-ratelimit-output-tokens-reset"),
    ("x-ratelimit-remaining", "x-ratelimit-reset"),
)
"""What says how much is left, and what says when all of it is there again."""

_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

# A number past this is a time of the clock.
_EPOCH_FROM = 1e9


def room_in(headers: Mapping[str, str], now: float) -> float | None:
    """Return in how many seconds there is room again, by the limits that have none left; None when nothing says it."""
    waits = [
        wait
        for left, reset in _ROOM
        if headers.get(left, "0").strip() in ("0", "0.0") and reset in headers
        for wait in _seconds_in(headers[reset].strip(), now)
    ]
    return max(waits, default=None)


def _seconds_in(value: str, now: float) -> Iterator[float]:
    """Yield what *value* says, which is a span (`6m0s`), a number of seconds, a time of the clock or a date; or nothing."""
    if re.fullmatch(rf"(?:{_SPAN.pattern})+", value):
        yield sum(float(number) * _UNITS[unit] for number, unit in _SPAN.findall(value))
    elif re.fullmatch(r"\d{1,13}(\.\d+)?", value):
        number = float(value)
        yield max(0.0, number - now) if number >= _EPOCH_FROM else number
    else:
        with contextlib.suppress(ValueError):
            yield max(0.0, datetime.fromisoformat(value).timestamp() - now)
