"""What the page asks for, as JSON: handlers by the names in `app.ROUTES`.

Everything but the page's own files and the login needs a session. What changes something is
told in the audit log: who, from where, what, to whom.
"""

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from codex_proxy.accounts import importing
from codex_proxy.accounts.account import Account
from codex_proxy.accounts.actions import ACTIONS, Action
from codex_proxy.accounts.outlook import AHEAD_SECONDS, LOOK_SECONDS, Forecast, Outlook
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.quota import SHORT_MINUTES
from codex_proxy.accounts.telling import OF_STATE, evidence_of
from codex_proxy.accounts.upkeep import Keeper
from codex_proxy.clock import Clock
from codex_proxy.config import Live as LiveSettings
from codex_proxy.errors import RequestError
from codex_proxy.net import Outbound
from codex_proxy.protocol.sse import frame
from codex_proxy.protocol.wire import BadJson, JsonObject, dumps, loads
from codex_proxy.server.admin import Admin, Progress, Status, account_json, act_json, item_json
from codex_proxy.server.body import read_body
from codex_proxy.server.dashboard import setup, trial
from codex_proxy.server.dashboard.live import AccountBoard, Feed, Live, Shared
from codex_proxy.server.dashboard.logins import Login, Logins
from codex_proxy.server.dashboard.sessions import COOKIE, LONGEST_SECONDS, Sessions
from codex_proxy.server.dashboard.shell import HEADERS, Shell
from codex_proxy.server.front import CALLER, Handler, Incoming
from codex_proxy.server.public import Public
from codex_proxy.server.pulse import Pulse
from codex_proxy.server.views import STATUS, account_view, window_name
from codex_proxy.tasks import Background, Job

audit = logging.getLogger("codex_proxy.audit")

MAX_BODY_BYTES = 32 * 1024 * 1024
# Who sends it has no session yet, and may be anybody.
MAX_LOGIN_BYTES = 16 * 1024
MAX_FILES = 1_000
MAX_ACCOUNTS = 10_000
"""How many a page brings at a time; a log dropped here by mistake may have millions of lines."""

# Between so many accounts other work gets its turn.
_SLICE = 50
_EXPIRING_TOLD = 12


class Records(Protocol):
    """What is kept of finished turns."""

    async def page(self, query: Mapping[str, str]) -> JsonObject:
        """Return some of them, as the filters in *query* say.

        Raises:
            RequestError: If a filter is none.
        """
        ...

    async def find(self, request_id: str) -> JsonObject | None:
        """Return all that is known of one."""
        ...

    async def cache(self, hours: float) -> JsonObject:
        """Return how well caches were hit."""
        ...

    def feed(self) -> Feed:
        """Return what tells of turns as they finish."""
        ...


class Alerts(Protocol):
    """What is wrong, as the rules see it."""

    def firing(self) -> list[JsonObject]: ...

    def recent(self) -> list[JsonObject]: ...


class Page:
    """The page's side of the daemon."""

    def __init__(
        self,
        *,
        pool: Pool,
        keeper: Keeper,
        admin: Admin,
        sessions: Sessions,
        public: Public,
        pulse: Pulse,
        records: Records,
        alerts: Alerts,
        live: LiveSettings,
        clock: Clock,
        background: Background,
        outbound: Outbound,
    ) -> None:
        self._pool = pool
        self._keeper = keeper
        self._admin = admin
        self._sessions = sessions
        self._public = public
        self._records = records
        self._alerts = alerts
        self._settings = live
        self._clock = clock
        self._shell = Shell()
        self._outlook = Outlook()
        self._logins = Logins(
            live=live, clock=clock, background=background, outbound=outbound, follow_files=keeper.follow_files
        )
        self._live = Live(
            clock=clock,
            pulse=pulse.now,
            board=AccountBoard(clock, self._accounts),
            problems=lambda: [dataclasses.asdict(problem) for problem in admin.problems()],
            horizon=Shared(clock, 9.0, self._horizon),
            feed=records.feed,
            alerts=alerts.firing,
        )

    def jobs(self) -> list[Job]:
        """Return what runs by itself: how fast the pool spends is watched, sessions are kept."""
        return [*self._sessions.jobs(), Job("outlook", self._outlook_seconds, self._watch, at_once=True)]

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by the names in `app.ROUTES`."""
        return {
            "ui": self.page,
            "ui_static": self.static,
            "ui_session": self.session,
            "ui_log_in": self.log_in,
            "ui_log_out": self.log_out,
            "ui_live": self.live,
            "ui_requests": self.requests,
            "ui_request": self.request,
            "ui_cache": self.cache,
            "ui_setup": self.setup,
            "ui_try": self.try_out,
            "ui_refresh": self.refresh,
            "ui_check_quota": self.check_quota,
            "ui_import": self.bring,
            "ui_login": self.begin_login,
            "ui_login_state": self.login_state,
            "ui_login_cancel": self.cancel_login,
            "ui_alerts": self.alerts,
            **{f"ui_account_{action}": self._acting(action) for action in ACTIONS},
        }

    # -- the page itself ------------------------------------------------------------------

    async def page(self, request: web.Request) -> web.StreamResponse:
        """Serve the page."""
        self._sessions.refuse_when_off()
        return self._shell.serve(request, "index.html")

    async def static(self, request: web.Request) -> web.StreamResponse:
        """Serve one of its files."""
        self._sessions.refuse_when_off()
        return self._shell.serve(request, request.match_info["file"])

    # -- sessions -------------------------------------------------------------------------

    async def session(self, request: web.Request) -> web.StreamResponse:
        """Tell whether somebody is logged in; where no key is needed, somebody is from now on."""
        csrf, cookie = self._sessions.look(request)
        return self._session(request, csrf, cookie)

    async def log_in(self, request: web.Request) -> web.StreamResponse:
        """Open a session with a key or the set-up token."""
        body = await self._body(request, MAX_LOGIN_BYTES)
        csrf, cookie = await self._sessions.log_in(request, _text(body, "key"))
        return self._session(request, csrf, cookie)

    async def log_out(self, request: web.Request) -> web.StreamResponse:
        """End the session."""
        await self._sessions.log_out(request)
        response = self._session(request, None, None)
        response.del_cookie(COOKIE, path="/ui")
        return response

    def _session(self, request: web.Request, csrf: str | None, cookie: str | None) -> web.Response:
        is_holder = self._sessions.key_of(request, cookie) is not None
        response = _json({
            "authenticated": csrf is not None,
            "role": None if csrf is None else "holder" if is_holder else "owner",
            "csrf": csrf,
            "needs_key": self._sessions.needs_key or is_holder,
            "is_setup": len(self._pool) > 0,
            "ledger": None if csrf is None else self._settings.current.ledger,
        })
        if cookie is not None:
            response.set_cookie(
                COOKIE,
                cookie,
                path="/ui",
                max_age=int(LONGEST_SECONDS),
                httponly=True,
                samesite="Strict",
                # Over plain HTTP a browser would not send it back.
                secure=_is_secure(request),
            )
        return response

    # -- what is going on -----------------------------------------------------------------

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Stream what the visible screen shows."""
        assert isinstance(request, Incoming)
        return await self._live.serve(request, lambda: self._sessions.is_valid(request))

    async def _accounts(self) -> AsyncIterator[tuple[str, JsonObject]]:
        now = self._clock.now()
        for place, account in enumerate(sorted(self._pool.accounts(), key=lambda one: one.alias), 1):
            yield account.alias, {**account_json(account_view(account, now)), "state": _state(account, now)}
            if place % _SLICE == 0:
                await asyncio.sleep(0)

    async def requests(self, request: web.Request) -> web.StreamResponse:
        """List finished turns."""
        return _json(await self._records.page(request.query))

    async def request(self, request: web.Request) -> web.StreamResponse:
        """Tell the story of one turn."""
        request_id = request.match_info["request_id"]
        told = await self._records.find(request_id)
        if told is None:
            raise RequestError(
                f"no turn with the id {request_id[:100]!r} is kept", status=404, code="unknown_request"
            )
        return _json(told)

    async def cache(self, request: web.Request) -> web.StreamResponse:
        """Tell how well caches were hit."""
        text = request.query.get("hours", "24")
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 24 * 366):
            raise RequestError("hours must be a whole number from 1 to 8784", param="hours")
        return _json(await self._records.cache(float(text)))

    async def alerts(self, request: web.Request) -> web.StreamResponse:
        """Tell what is wrong, and what was."""
        return _json({"firing": self._alerts.firing(), "recent": self._alerts.recent()})

    # -- what is to come ------------------------------------------------------------------

    def _outlook_seconds(self) -> float:
        return LOOK_SECONDS if self._settings.current.ui == "on" else 0.0

    async def _watch(self) -> None:
        self._outlook.note(self._pool.accounts(), self._clock.now())

    async def _horizon(self) -> bytes:
        now = self._clock.now()
        accounts = sorted(self._pool.accounts(), key=lambda one: one.alias)
        # Accounts change while a thread looks at them, so they are looked at here; what is made of that takes
        # a tenth of a second for thousands of them.
        statuses = {account.alias: STATUS[account.state] for account in accounts}
        play = self._outlook.begin(accounts, now)
        return await asyncio.to_thread(lambda: dumps(_horizon_json(statuses, play())))

    # -- setting up -----------------------------------------------------------------------

    async def setup(self, request: web.Request) -> web.StreamResponse:
        """Tell what to paste into clients."""
        settings = self._settings.current
        holders = None if self._sessions.access is None else self._sessions.access.holders
        needs_key = (
            bool(settings.api_keys)
            or (holders is not None and holders.are_there)
            or (settings.auth == "keys" and not settings.is_loopback)
        )
        return _json(self._setup_json(request, needs_key=needs_key))

    def holders_setup(self, request: web.Request, may_use: Callable[[str], bool]) -> JsonObject:
        """Return what to paste into clients for whoever holds a key that may use some models."""
        return self._setup_json(request, needs_key=True, may_use=may_use)

    def _setup_json(
        self, request: web.Request, *, needs_key: bool, may_use: Callable[[str], bool] = lambda _: True
    ) -> JsonObject:
        listed = (facts.slug for facts in self._public.catalog.models if not facts.hidden)
        models = [name for name in listed if may_use(name)]
        base_url = f"{'https' if _is_secure(request) else 'http'}://{request.host}"
        return {
            "base_url": base_url,
            "needs_key": needs_key,
            "models": models,
            "clients": setup.clients(base_url, models[0] if models else "gpt-5.5", needs_key=needs_key),
        }

    async def try_out(self, request: web.Request) -> web.StreamResponse:
        """Send a test request, and tell each step."""
        body = await self._body(request)
        events = trial.steps(
            self._public,
            self._clock,
            dialect=_text(body, "dialect"),
            model=_text(body, "model"),
            caller=request[CALLER],
        )
        # What is wrong with the request itself is a status yet.
        first = await anext(events)
        self._audit(request, "try", _text(body, "dialect"), True)
        response = _stream()
        try:
            await response.prepare(request)
            await response.write(frame(first[0], dumps(first[1])))
            async for name, told in events:
                await response.write(frame(name, dumps(told)))
        finally:
            await events.aclose()
        return response

    # -- accounts -------------------------------------------------------------------------

    def _acting(self, action: Action) -> Handler:
        async def act(request: web.Request) -> web.StreamResponse:
            alias = request.match_info["alias"]
            done = await act_json(self._admin, alias, action)
            self._audit(request, action, alias, bool(done["success"]))
            return _json(done)

        return act

    async def refresh(self, request: web.Request) -> web.StreamResponse:
        """Exchange all tokens, told as it goes."""
        self._audit(request, "refresh-all", "-", True)
        return await _tell(request, self._admin.refresh_all())

    async def check_quota(self, request: web.Request) -> web.StreamResponse:
        """Ask for all quotas, told as it goes."""
        self._audit(request, "check-quota", "-", True)
        return await _tell(request, self._admin.check_quota())

    async def bring(self, request: web.Request) -> web.StreamResponse:
        """Bring account files into the pool."""
        body = await self._body(request)
        named = body.get("files")
        if not isinstance(named, list) or not 1 <= len(named) <= MAX_FILES:
            raise RequestError(f"files must be a list of 1 to {MAX_FILES} files", param="files")
        texts: list[tuple[Path, str]] = []
        for place, file in enumerate(named):
            if not isinstance(file, dict):
                raise RequestError(f"files.{place} must be an object", param=f"files.{place}")
            name, content = _text(file, "name", f"files.{place}."), _text(file, "content", f"files.{place}.")
            # A name, and never a path.
            texts.append((Path(Path(name).name or "pasted.json"), content))
        auth_dir = self._settings.current.auth_dir

        def bring() -> list[importing.Brought]:
            # Read here too: megabytes of it would hold up everybody else.
            found = (item for name, content in texts for item in importing.read_text(name, content))
            items = list(itertools.islice(found, MAX_ACCOUNTS + 1))
            if len(items) > MAX_ACCOUNTS:
                raise RequestError(
                    f"files hold more than {MAX_ACCOUNTS} accounts or lines; bring so many with `codex-proxy import`",
                    param="files",
                )
            return list(importing.bring(items, auth_dir, now=self._clock.now()))

        brought = await asyncio.to_thread(bring)
        await self._keeper.follow_files()
        results = [_brought_json(one) for one in brought]
        good = sum(1 for one in results if one["success"])
        self._audit(request, "import", f"{good} of {len(results)}", good > 0)
        return _json({"results": results})

    async def begin_login(self, request: web.Request) -> web.StreamResponse:
        """Begin a login with a code that is typed elsewhere."""
        login = await self._logins.begin()
        self._audit(request, "login", "-", True)
        assert login.device is not None
        return _json({
            "id": login.id,
            "url": login.device.url,
            "user_code": login.device.user_code,
            "expires_at": login.expires_at,
        })

    async def login_state(self, request: web.Request) -> web.StreamResponse:
        """Tell how a login stands."""
        return _json(_login_json(self._logins.find(request.match_info["login_id"])))

    async def cancel_login(self, request: web.Request) -> web.StreamResponse:
        """Break a login off."""
        login_id = request.match_info["login_id"]
        self._logins.cancel(login_id)
        self._audit(request, "cancel-login", "-", True)
        return _json(_login_json(self._logins.find(login_id)))

    def _audit(self, request: web.Request, action: str, target: str, is_good: bool) -> None:
        caller = request[CALLER]
        audit.info(
            "page action=%s target=%s success=%s by=%s session=%s from=%s",
            action, target[:100], is_good, caller.name, caller.id, self._sessions.address_of(request) or "-",
        )  # fmt: skip

    async def _body(self, request: web.Request, limit: int = MAX_BODY_BYTES) -> Mapping[str, Any]:
        try:
            raw = await read_body(request, limit=limit)
        except RequestError as exc:
            if exc.status != 413:
                raise
            # No setting moves these limits.
            raise RequestError(
                f"the body is larger than {limit} bytes; larger files come in with `codex-proxy import`",
                status=413,
                code=exc.code,
            ) from None
        try:
            body = loads(raw) if raw else {}
        except BadJson as exc:
            raise RequestError(f"the body is not JSON: {exc}", code="invalid_json") from None
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object", code="invalid_json")
        return body


def _text(body: Mapping[str, Any], name: str, place: str = "") -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{place}{name} must be a text, and not empty", param=f"{place}{name}")
    return value


def _is_secure(request: web.Request) -> bool:
    """Tell whether the browser speaks TLS, to us or to the relay in front of us."""
    return request.secure or request.headers.get("X-Forwarded-Proto", "").strip().lower() == "https"


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=dumps(value),
        content_type="application/json",
        headers={**HEADERS, "Cache-Control": "no-store"},
    )


def _stream() -> web.StreamResponse:
    return web.StreamResponse(
        headers={
            **HEADERS,
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
    )


async def _tell(request: web.Request, progress: Progress) -> web.StreamResponse:
    """Stream a round over all accounts; the page may leave, the round does not care."""
    response = _stream()
    await response.prepare(request)
    current = good = 0
    async for item in progress.listen():
        if item is None:
            await response.write(b": keep-alive\n\n")
            continue
        current += 1
        good += item.success
        await response.write(frame("item", dumps(item_json(item, current, progress.total))))
    told = {"total": progress.total, "success_count": good, "failed_count": current - good}
    await response.write(frame("done", dumps({**told, "whole": progress.is_whole})))
    return response


def _state(account: Account, now: float) -> JsonObject:
    rule = OF_STATE.get(account.state)
    return {
        "name": account.state.value,
        "rule": None if rule is None else rule.value,
        "evidence": None if rule is None else evidence_of(account, rule, now) or None,
        "since": None,
        "until": account.cooling_until()
        or (account.unavailable_until if account.unavailable_until > now else None),
    }


def _horizon_json(statuses: Mapping[str, Status], forecast: Forecast) -> JsonObject:
    now = forecast.at
    rows: list[JsonObject] = []
    expiring: list[JsonObject] = []
    for alias, status in statuses.items():
        windows: list[JsonObject] = []
        for ahead in forecast.windows.get(alias, ()):
            window = ahead.window
            is_over = window.is_over(now)
            name = window_name(window.minutes) or "window"
            windows.append({
                "window": name,
                "limit": "codex",
                "minutes": window.minutes,
                "used_percent": None if is_over else window.used_percent,
                "resets_at": None if is_over else window.resets_at,
                "age_seconds": round(max(0.0, now - window.seen_at), 1),
                "projected_exhaustion": ahead.exhausted_at,
                "projected_unused_percent": None
                if ahead.unused_percent is None
                else round(ahead.unused_percent, 1),
            })
            is_long = window.minutes is not None and window.minutes > SHORT_MINUTES
            if is_long and ahead.unused_percent is not None and ahead.unused_percent >= 1.0:
                expiring.append({
                    "alias": alias,
                    "window": name,
                    "resets_at": window.resets_at,
                    "unused_percent": round(ahead.unused_percent, 1),
                })
        rows.append({"alias": alias, "status": status, "windows": windows})
    expiring.sort(key=lambda one: one["resets_at"] or 0.0)
    return {
        "at": now,
        "until": now + AHEAD_SECONDS,
        "accounts": rows,
        "pool": {
            "is_known": forecast.is_known,
            "percent_per_hour": {
                "short": round(forecast.spent_per_hour[0], 2),
                "long": round(forecast.spent_per_hour[1], 2),
            },
            "dry_at": forecast.dry_at,
            "next_reset": forecast.next_reset,
            "back_at": forecast.back_at,
        },
        "expiring": expiring[:_EXPIRING_TOLD],
    }


def _brought_json(brought: importing.Brought) -> JsonObject:
    credential = brought.credential
    message = brought.reason or "; ".join((brought.outcome, *brought.notes))
    return {
        "name": brought.item.place,
        "success": credential is not None,
        "alias": None if credential is None else credential.alias or credential.default_alias,
        "outcome": brought.outcome,
        "message": message,
    }


def _login_json(login: Login) -> JsonObject:
    return {"state": login.state, "message": login.message, "alias": login.alias}
