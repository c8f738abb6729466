"""Who has logged in to the page: sessions by cookie, against forgery, guessing and theft of the file they are kept in.

A browser gets 256 random bits in a cookie that no script can read and that no other site's
request carries; kept is their hash. What changes something needs a second word, made from the
first one, which only our own page can know. A session ends with what opened it: another
admin-key, and everybody logs in anew.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from codex_proxy.accounts import files
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import KeyRefused, ProxyError, RequestError
from codex_proxy.protocol.wire import BadJson, dumps, loads
from codex_proxy.server import keyfile
from codex_proxy.server.access import Access, address_of, holder, key_of, refuse_other_origins, shown
from codex_proxy.server.body import is_json
from codex_proxy.tasks import Background, Job
from codex_proxy.trace import LOCAL, Caller

logger = logging.getLogger(__name__)
audit = logging.getLogger("codex_proxy.audit")

COOKIE = "codex_proxy_session"
CSRF_HEADER = "x-csrf-token"
FILE = "sessions.json"
"""In data-dir: hashes of the sessions, so that a restart logs nobody out."""

IDLE_SECONDS = 24 * 3600.0
LONGEST_SECONDS = 14 * 86_400.0
MAX_SESSIONS = 200
"""Of owners; the oldest one ends."""
MAX_OF_HOLDERS = 2_000
MAX_OF_ONE_KEY = 10
"""Of the holders of client keys: who logs in again and again puts out only themselves."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
# A time that is a minute off costs no writing.
_TOUCH_SECONDS = 60.0
_SAVE_SECONDS = 30.0


@dataclass(slots=True)
class Session:
    """One browser that has logged in. Times are seconds since the epoch."""

    opened_by: str
    """What it stands and falls with: the digest of an owner's key, `setup` or `local`; `key:`, the id of a ledger's key, `:` and the digest of its text then."""
    name: str
    """Who that is, as it may be shown."""
    made: float
    used: float

    @property
    def key_id(self) -> str | None:
        """The key of the ledger whose holder this is; None of an owner."""
        return self.opened_by.split(":")[1] if self.opened_by.startswith(_HOLDER) else None

    @property
    def key_digest(self) -> str:
        """The digest of the text that a holder logged in with."""
        return self.opened_by.rpartition(":")[2]


_HOLDER = "key:"


class Sessions:
    """Open, find and end sessions.

    Args:
        path: Where they are kept; None keeps them in memory only.
    """

    def __init__(self, path: Path | None, *, live: Live, clock: Clock, background: Background) -> None:
        self._path = path
        self._live = live
        self._clock = clock
        self._background = background
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        """By the hash of what the cookie says, the oldest first."""
        self._is_changed = False
        self._writing = threading.Lock()
        self._begun = self._written = 0
        """Writes that have begun, and the last of them that is done."""
        self._has_failed = False
        """The last write did; that is told once."""
        self.may_write = True
        """Whether the file is ours: of two daemons on one data-dir one writes it."""
        self._is_given_up = False
        """Another process takes them over: nobody gets in or out here any more."""
        self.access: Access | None = None
        """What knows the keys; set once it is made."""

    def jobs(self) -> list[Job]:
        """Return what runs by itself: what has changed is written, what is over is forgotten."""
        return [Job("sessions", lambda: _SAVE_SECONDS, self.save)]

    # -- a request ------------------------------------------------------------------------

    def resolve(self, request: web.Request, *, is_owner_needed: bool = True) -> Caller:
        """Return who is behind a request of the page.

        Raises:
            KeyRefused: If no session came with it, or one that is over.
            RequestError: 403 if it changes something and our page cannot have sent it, or if it is the owner's
                and the holder of a key asks.
        """
        self.refuse_when_off()
        refuse_other_origins(request)
        token = _cookie(request)
        session = self._find(token)
        if session is None:
            raise KeyRefused("log in: there is no session, or it is over", code="no_session")
        if session.key_id is not None:
            if is_owner_needed:
                raise RequestError(
                    "this is the owner's: a client key opens the page of its own usage only",
                    status=403,
                    code="owner_needed",
                )
            assert self.access is not None
            assert self.access.holders is not None
            # It may be good, and not from there.
            _ = self.access.holders.check(session.key_id, self.address_of(request))
        if request.method not in ("GET", "HEAD"):
            theirs = request.headers.get(CSRF_HEADER, "")
            if not hmac.compare_digest(theirs.encode("utf-8", "replace"), csrf_of(token).encode()):
                raise RequestError(
                    f"the header {CSRF_HEADER} is missing or not of this session; load the page again",
                    status=403,
                    code="forged_request",
                )
            if request.body_exists and not is_json(request):
                raise RequestError(
                    "a body must be JSON and say so: Content-Type: application/json",
                    status=415,
                    code="unsupported_content_type",
                )
        now = self._clock.now()
        if now - session.used > _TOUCH_SECONDS:
            session.used = now
            self._is_changed = True
        return Caller(f"session-{_digest(token)[:8]}", session.name)

    def is_valid(self, request: web.Request) -> bool:
        """Tell whether a request's session is one, and there is a page for it."""
        return self._live.current.ui == "on" and self._find(_cookie(request)) is not None

    def key_of(self, request: web.Request, cookie: str | None = None) -> str | None:
        """Return the id of the key whose holder asks, by the cookie it is given if any; None when that is none."""
        session = self._find(_cookie(request) if cookie is None else cookie)
        return None if session is None else session.key_id

    # -- logging in -----------------------------------------------------------------------

    def look(self, request: web.Request) -> tuple[str | None, str | None]:
        """Return the session that a request has, else a new one if it needs no key: its CSRF word and its cookie.

        The cookie is None when the browser has it already; both are when it has to log in.
        """
        self.refuse_when_off()
        refuse_other_origins(request)
        token = _cookie(request)
        if self._find(token) is not None:
            return csrf_of(token), None
        assert self.access is not None
        if not self.access.is_open_to(request):
            return None, None
        self._refuse_when_given_up()
        return self._open("local", LOCAL.name)

    @property
    def needs_key(self) -> bool:
        """Whether one has to log in."""
        assert self.access is not None
        return bool(self.access.owner_keys()) or not self._live.current.is_loopback

    async def log_in(self, request: web.Request, key: str) -> tuple[str, str]:
        """Open a session for whoever knows *key* or the set-up token; return its CSRF word and its cookie.

        A client key of the ledger opens one for its holder, who is no owner.

        Raises:
            KeyRefused: If it is neither, or one that may not be used any more.
            RequestError: 403 for a page of another site, 429 after too many wrong ones.
        """
        self.refuse_when_off()
        self._refuse_when_given_up()
        refuse_other_origins(request)
        assert self.access is not None
        address = self.address_of(request)
        throttle = self.access.throttle
        self.access.refuse_guesser(address, "login")
        # Noted before anything is awaited: a hundred at once are a hundred guesses.
        throttle.failed(address)
        known = key_of(key, self.access.owner_keys())
        if known is not None:
            opened_by, caller = known.digest.hex(), holder(known)
        elif (found := self._find_holder(key, address)) is not None:
            # With its text: one that is replaced is replaced because somebody else may have it.
            digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
            opened_by, caller = f"{_HOLDER}{found.id}:{digest}", found
        elif self._may_set_up() and await asyncio.to_thread(
            keyfile.take_setup_token, self._live.current.data_dir, key, self._clock.now()
        ):
            opened_by, caller = "setup", Caller("setup", "set-up token")
        else:
            audit.warning("login refused reason=unknown_key from=%s", shown(address))
            raise KeyRefused("this key does not open the page", code="unknown_key")
        throttle.succeeded(address, is_owner=not opened_by.startswith(_HOLDER))
        csrf, cookie = self._open(opened_by, caller.name)
        audit.info("login by=%s from=%s", caller.name, shown(address))
        await self.save()
        return csrf, cookie

    def address_of(self, request: web.Request) -> str:
        """Return where a request comes from; empty when that has no address."""
        return address_of(request, self._live.current) or ""

    async def log_out(self, request: web.Request) -> None:
        """End the session of a request."""
        self._refuse_when_given_up()
        ended = self._sessions.pop(_digest(_cookie(request)), None)
        if ended is not None:
            self._is_changed = True
            audit.info("logout by=%s", ended.name)
            await self.save()

    def _find_holder(self, key: str, address: str) -> Caller | None:
        assert self.access is not None
        if self.access.holders is None:
            return None
        try:
            return self.access.holders.find(key, address)
        except KeyRefused as exc:
            audit.warning("login refused reason=%s from=%s", exc.code, shown(address))
            raise

    def _may_set_up(self) -> bool:
        return keyfile.may_set_up(self._live.current)

    def _open(self, opened_by: str, name: str) -> tuple[str, str]:
        now = self._clock.now()
        token = secrets.token_urlsafe(32)
        session = self._sessions[_digest(token)] = Session(opened_by, name, now, now)
        if session.key_id is None:
            self._keep_newest(MAX_SESSIONS, lambda one: one.key_id is None)
        else:
            self._keep_newest(MAX_OF_ONE_KEY, lambda one: one.key_id == session.key_id)
            self._keep_newest(MAX_OF_HOLDERS, lambda one: one.key_id is not None)
        self._is_changed = True
        return csrf_of(token), token

    def _keep_newest(self, count: int, is_meant: Callable[[Session], bool]) -> None:
        meant = [digest for digest, one in self._sessions.items() if is_meant(one)]
        for digest in meant[: max(0, len(meant) - count)]:
            del self._sessions[digest]

    def _find(self, token: str) -> Session | None:
        if not token:
            return None
        digest = _digest(token)
        session = self._sessions.get(digest)
        if session is None or self._is_good(session):
            return session
        del self._sessions[digest]
        self._is_changed = True
        return None

    def _is_good(self, session: Session) -> bool:
        now = self._clock.now()
        # The clock was ahead then, and has been set back: nobody lasts the longer for it.
        session.made, session.used = min(session.made, now), min(session.used, now)
        if now - session.used > IDLE_SECONDS or now - session.made > LONGEST_SECONDS:
            return False
        assert self.access is not None
        match session.opened_by:
            case "local":
                return not self.needs_key
            case "setup":
                return self._may_set_up()
            case _ if session.key_id is not None:
                holders = self.access.holders
                return holders is not None and holders.is_good(session.key_id, session.key_digest)
            case digest:
                return any(digest == key.digest.hex() for key in self.access.owner_keys())

    def refuse_when_off(self) -> None:
        """Raise if there is no page.

        Raises:
            RequestError: 404.
        """
        if self._live.current.ui == "off":
            raise RequestError("the page is switched off (ui: off)", status=404, code="not_found")

    def _refuse_when_given_up(self) -> None:
        if self._is_given_up:
            raise RequestError("the proxy is being restarted; try again in 1s", status=503, code="restarting")

    # -- the file -------------------------------------------------------------------------

    async def load(self) -> None:
        """Read what is kept; a file that is no use is as good as none."""
        if self._path is not None:
            self._sessions = await asyncio.to_thread(_read, self._path)

    async def save(self) -> None:
        """Forget what is over, and write what has changed."""
        for digest, session in list(self._sessions.items()):
            if not self._is_good(session):
                del self._sessions[digest]
                self._is_changed = True
        if self.access is not None:
            self.access.throttle.forget()
        if not self._is_given_up:
            await self._write()

    async def give_up(self) -> None:
        """Write them once more, for the process that takes over; what would change them is refused from now on."""
        self._is_given_up = True
        await self._write()

    def take_back(self) -> None:
        """Go on as if they had not been given up."""
        self._is_given_up = False

    async def _write(self) -> None:
        if self._path is None or not self._is_changed or not self.may_write:
            return
        self._is_changed = False
        self._begun += 1
        data = dumps({digest: asdict(session) for digest, session in self._sessions.items()})
        try:
            await asyncio.to_thread(self._replace, self._path, data, self._begun)
        except (ProxyError, OSError) as exc:
            # Tried again with the next round: what is there still lets in who has logged out.
            self._is_changed = True
            if not self._has_failed:
                logger.warning("sessions are not kept path=%s reason=%s", self._path, type(exc).__name__)
            self._has_failed = True
        except asyncio.CancelledError:
            # Whoever logged in has left; what becomes of the write nobody will hear.
            self._is_changed = True
            raise
        else:
            self._has_failed = False

    def _replace(self, path: Path, data: bytes, number: int) -> None:
        """Write the file, in a thread; an older state that comes later would bring back who has logged out."""
        with self._writing:
            if number > self._written:
                files.write_atomic(path, data)
                self._written = number


def csrf_of(token: str) -> str:
    """Return the word that goes with a session's cookie; the page is told it, other sites cannot be."""
    return hmac.new(token.encode(), b"csrf", hashlib.sha256).hexdigest()


def _cookie(request: web.Request) -> str:
    token = request.cookies.get(COOKIE, "")
    return token if _TOKEN.fullmatch(token) else ""


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _read(path: Path) -> "OrderedDict[str, Session]":
    found: OrderedDict[str, Session] = OrderedDict()
    try:
        kept = loads(path.read_bytes()) if path.exists() else {}
    except (OSError, BadJson) as exc:
        logger.warning("sessions are forgotten path=%s reason=%s", path, type(exc).__name__)
        return found
    if not isinstance(kept, dict):
        return found
    for digest, fields in list(kept.items())[: MAX_SESSIONS + MAX_OF_HOLDERS]:
        session = _session(fields)
        if re.fullmatch(r"[0-9a-f]{64}", digest) and session is not None:
            found[digest] = session
    return found


def _session(fields: Any) -> Session | None:
    if not isinstance(fields, Mapping):
        return None
    opened_by, name, made, used = (fields.get(name) for name in ("opened_by", "name", "made", "used"))
    if not isinstance(opened_by, str) or not isinstance(name, str):
        return None
    if not isinstance(made, int | float) or not isinstance(used, int | float):
        return None
    return Session(opened_by, name, float(made), float(used))
