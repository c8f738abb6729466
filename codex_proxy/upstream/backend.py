"""The Codex backend as a target: which headers go there, and what its refusals mean.

Facts: backend contract, sections 2.1, 4 and 5.
"""

import asyncio
import re
from collections.abc import Collection, Mapping
from email.utils import parsedate_to_datetime

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.affinity import digest
from codex_proxy.accounts.pool import TAG_LENGTH, Pool, Want
from codex_proxy.accounts.pool import Lease as PoolLease
from codex_proxy.accounts.quota import MAIN_FAMILY
from codex_proxy.accounts.tokens import Secret
from codex_proxy.accounts.upkeep import Keeper
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import BackendFault, RequestError, UpstreamError, Verdict, classify, fault_of
from codex_proxy.net import Answer, Deadlines, NetError, NetKind, Outbound
from codex_proxy.protocol.request import TURN_STATE, BackendRequest, never
from codex_proxy.protocol.responses import limit_family, read_reset
from codex_proxy.protocol.responses_request import COMPACTIONS
from codex_proxy.protocol.wire import BadJson, JsonObject, loads_lenient
from codex_proxy.upstream.packing import is_worth_packing, packed

# An error is a sentence; a page may be longer, and nobody reads it.
MAX_ERROR_SIZE = 256 * 1024

# What a header can hold, and a server takes.
_TURN_STATE = re.compile(r"[\x21-\x7e]{1,4096}")

# How long a request waits for a token while another account could serve it.
EXCHANGE_PATIENCE = 5.0

BYTES_PER_TOKEN = 4
"""About how much text is a token (toolbox of agents' bodies: 4.0 to 4.4 characters)."""

_LONG_ENDPOINTS = frozenset({"responses/compact", "images/generations", "images/edits"})


class AccountRoute:
    """Picks accounts of the pool."""

    def __init__(self, pool: Pool, keeper: Keeper, *, live: Live, clock: Clock, outbound: Outbound) -> None:
        self._pool = pool
        self._keeper = keeper
        self._live = live
        self._clock = clock
        self._outbound = outbound

    def pick(self, request: BackendRequest, tried: Collection[str]) -> "AccountLease":
        """Take the account that serves best; see `Pool.pick`."""
        try:
            return AccountLease(self, self._pool.pick(self._want(request), tried))
        except RequestError as exc:
            asked = request.asked_model
            if exc.param == "model" and not asked.lower().startswith(request.model.lower()):
                # The caller never wrote that name, and would look for it in vain.
                exc.message = f"{asked[:100]!r} stands for {request.model!r} here; {exc.message}"
            raise

    def limits(self) -> JsonObject | None:
        """Return the pool's own view of its quota; None when that is nobody's business."""
        return self._pool.pool_limits() if self._live.current.pool_limits == "show" else None

    async def wait_for_place(
        self, request: BackendRequest, tried: Collection[str], *, seconds: float, ticket: float
    ) -> None:
        """Wait until an account that could serve *request* has room; see `Pool.wait_for_place`."""
        await self._pool.wait_for_place(self._want(request), tried, seconds=seconds, ticket=ticket)

    @property
    def are_there(self) -> bool:
        """Whether there is any account at all."""
        return len(self._pool) > 0

    def has_written(self, compacted: str) -> bool:
        """Tell whether an account wrote this piece of history, which nobody else can read."""
        return self._pool.owners.get(digest(compacted)) is not None

    def _want(self, request: BackendRequest) -> Want:
        tag, _ = split_turn_state(request.turn_state)
        bound = self._pool.by_tag(tag)
        return Want(
            request.model,
            request.endpoint,
            request.session,
            prefer=bound.key if bound is not None else None,
            compacted=request.compacted,
            encrypted=request.encrypted,
            tokens=request.input_bytes // BYTES_PER_TOKEN,
            is_opening=request.is_opening,
            also=request.binding.also if request.binding is not None else None,
        )


class AccountLease:
    """One exchange with one account."""

    upstream = ""
    is_native = False
    is_as_named = False
    drains = False
    max_retries: int | None = None
    first_byte_timeout: float | None = None

    def __init__(self, route: AccountRoute, lease: PoolLease) -> None:
        self._route = route
        self._lease = lease
        self._account: Account = lease.account
        self._sent: Secret | None = None
        self.key = self._account.key
        self.alias = self._account.alias
        self.decision = lease.decision

    async def open(self, request: BackendRequest) -> Answer:
        """Send the request with the account's token; see `route.Lease.open`."""
        route, account = self._route, self._account
        token = await self._token()
        if token is None:
            raise UpstreamError(
                Verdict.UNAUTHORIZED, BackendFault("no usable access token", code="no_token"), status=401
            )
        self._sent = token
        settings = route._live.current
        first_byte = (
            settings.compact_timeout if request.endpoint in _LONG_ENDPOINTS else settings.first_byte_timeout
        )
        turn_state = self._own_turn_state(request)
        headers = self._headers(request, token, turn_state)
        body = request.body_for(turn_state, self._cannot_read if self._may_meet_foreign else never)
        if settings.compress_uploads == "zstd" and is_worth_packing(request, body):
            body = await packed(request, body)
            headers = {**headers, "content-encoding": "zstd"}
        asked = route._clock.now()
        try:
            answer = await route._outbound.open(
                "POST",
                f"{settings.base_url}/{request.endpoint}",
                headers=headers,
                body=body,
                deadlines=Deadlines(settings.connect_timeout, first_byte, settings.idle_timeout),
                proxy_url=account.proxy_url,
                may_repeat=True,
            )
        except NetError as exc:
            raise net_failure(exc) from exc
        route._pool.read_headers(account, answer.headers, asked=asked)
        if 200 <= answer.status < 300:
            return answer
        try:
            raise await self._refusal(answer)
        finally:
            answer.release()

    async def _token(self, *, refused: Secret | None = None) -> Secret | None:
        """Return a token that can be sent; None when there is none soon enough.

        An exchange takes a moment, or half a minute when the issuer hangs. It goes on without us when
        another account can take over.
        """
        keeper, account = self._route._keeper, self._account
        if refused is None and account.access_is_valid(self._route._clock.now()):
            return account.credential.access
        others = self._route._pool.has_other(self._lease.want, {account.key})
        try:
            async with asyncio.timeout(EXCHANGE_PATIENCE if others else None):
                return await keeper.token(account, refused=refused)
        except TimeoutError:
            return None

    def _headers(self, request: BackendRequest, token: Secret, turn_state: str | None) -> dict[str, str]:
        settings = self._route._live.current
        headers = {
            "originator": settings.originator,
            "user-agent": settings.user_agent,
            "accept": "text/event-stream" if request.endpoint == "responses" else "*/*",
            "content-type": request.content_type,
            **request.headers,
            **self._account.headers(token),
        }
        if turn_state is not None:
            headers[TURN_STATE] = turn_state
        return headers

    def _own_turn_state(self, request: BackendRequest) -> str | None:
        """Return the caller's turn-state when it is this account's; another's is dropped."""
        tag, raw = split_turn_state(request.turn_state)
        return raw if tag and self.key.startswith(tag) else None

    @property
    def _may_meet_foreign(self) -> bool:
        # A conversation that has lived on this account alone holds nothing that it could not read.
        return self._lease.has_moved or self._route._pool.origins.any_refused

    def _cannot_read(self, content: str) -> bool:
        return self._route._pool.cannot_read(self._account, content)

    async def _refusal(self, answer: Answer) -> UpstreamError:
        """Read an answer that is not good as a failure."""
        try:
            body = await answer.read_all(MAX_ERROR_SIZE)
        except NetError:
            body = b""
        return refusal(answer.status, answer.headers, body, now=self._route._clock.now())

    async def recover(self, error: UpstreamError, request: BackendRequest) -> bool:
        """Mend a refused token by an exchange, and unreadable items by leaving them out."""
        if error.verdict is Verdict.UNAUTHORIZED and self._sent is not None:
            return await self._token(refused=self._sent) is not None
        if error.verdict is Verdict.ENCRYPTED:
            return self._leave_out_foreign(request)
        return False

    def _leave_out_foreign(self, request: BackendRequest) -> bool:
        origins, now = self._route._pool.origins, self._route._clock.now()
        sent = [c for c in request.encrypted if not self._cannot_read(c)]
        # All of them when none is known to be foreign: the backend has refused one of them.
        foreign = [c for c in sent if origins.is_foreign(c, self.key, now)] or sent
        for content in foreign:
            origins.refused(content, self.key, now)
        return bool(foreign)

    def wrap_turn_state(self, value: str) -> str:
        """Put the account's tag before a turn-state, so that it comes back to this account only."""
        return f"{self.key[:TAG_LENGTH]}.{value}"

    def observe(self, kind: str, payload: Mapping[str, object]) -> None:
        """Take in quota numbers, and note which account issued the encrypted items of an event or an answer."""
        if kind == "codex.rate_limits":
            self._route._pool.read_event(self._account, payload)
            return
        output = payload.get("output")
        for item in (payload.get("item"), *(output if isinstance(output, list) else ())):
            if isinstance(item, Mapping) and isinstance(item.get("encrypted_content"), str):
                self._route._pool.wrote(
                    self._account, item["encrypted_content"], is_history=item.get("type") in COMPACTIONS
                )

    def ok(self) -> None:
        """Report that the account answered."""
        self._lease.ok()

    def failed(self, error: UpstreamError) -> None:
        """Report a failure."""
        self._lease.failed(error)

    def release(self) -> None:
        """Give the account back."""
        self._lease.release()


def split_turn_state(value: str | None) -> tuple[str, str | None]:
    """Return the tag and the raw value of a wrapped turn-state; ('', None) when it is not ours."""
    if value is None:
        return "", None
    tag, dot, raw = value.partition(".")
    # It came from the caller, in its body perhaps, and becomes a header: one that cannot be sent
    # would look like an account's trouble.
    if not dot or len(tag) != TAG_LENGTH or not _TURN_STATE.fullmatch(raw):
        return "", None
    return tag, raw


def net_failure(error: NetError) -> UpstreamError:
    """Say as a verdict what a lost call means."""
    verdict = (
        Verdict.PATH
        if error.kind.is_path
        else Verdict.SILENT
        if error.kind is NetKind.TIMEOUT
        else Verdict.CUT
    )
    return UpstreamError(
        verdict, BackendFault(f"the backend was not reached: {error}", code=error.kind.value)
    )


def refusal(status: int, headers: Mapping[str, str], body: bytes, *, now: float) -> UpstreamError:
    """Turn a refusing answer into a failure with all that the next decision needs."""
    is_page = body.lstrip()[:1] == b"<"
    payload: object = None
    if not is_page:
        try:
            payload = loads_lenient(body) if body else None
        except BadJson:
            payload = None
    fault = fault_of(payload, f"the backend answered with status {status}")
    family = limit_family(headers.get("x-codex-active-limit"))
    resets_at: float | None = None
    wait: float | None = None
    if isinstance(payload, Mapping):
        resets_at, wait = read_reset(payload, now=now)
    retry_after = _retry_after(headers, now)
    return UpstreamError(
        classify(status, fault, is_page=is_page),
        fault,
        status=status,
        retry_after=retry_after if retry_after is not None else wait,
        resets_at=resets_at,
        limit_family=family if family != MAIN_FAMILY else None,
    )


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    for name, scale in (("retry-after-ms", 0.001), ("x-ms-retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if not value:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - now
            except (TypeError, ValueError):
                continue
        if 0.0 <= seconds < 1e9:
            return seconds
    return None
