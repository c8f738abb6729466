"""Who may ask: client keys, and without keys the requests that a web page could forge.

A key is compared by digest with every key we know, in constant time. Without keys (on
loopback, or with `auth: none`) the danger is not the network but the browser of whoever sits
here: any page may send requests to 127.0.0.1, and a name that its owner points there (DNS
rebinding) makes them same-origin. What no page can do is choose Host and Origin, or send JSON
across origins without asking first.
"""

import enum
import functools
import hashlib
import hmac
import ipaddress
import logging
import math
import re
import time
from typing import Protocol
from urllib.parse import urlsplit

from aiohttp import web

from codex_proxy.addresses import read_address
from codex_proxy.config import ApiKey, Live, Settings
from codex_proxy.errors import KeyRefused, RequestError, TooManyGuesses
from codex_proxy.server.body import is_json
from codex_proxy.throttle import Throttle
from codex_proxy.trace import LOCAL, Caller

audit = logging.getLogger("codex_proxy.audit")

_ADVICE = (
    "without a client key it may not use this proxy: set api-keys and send one, or serve the page from the proxy's "
    "own address"
)
_ADVICE_FOR_THE_PAGE = "only the proxy's own page may ask for this; a relay in front of the proxy has to pass the header Host on as it came"
_RELAYED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")


class Level(enum.Enum):
    """Who may use a route."""

    PUBLIC = "public"
    """Anyone who reaches us: liveness, and nothing that names an account."""
    KEYED = "keyed"
    """Holders of a client key."""
    OWNER = "owner"
    """Holders of the admin-key; while none is set, of a client key from the configuration."""
    ADMIN = "admin"
    """Holders of the admin-key alone."""
    METRICS = "metrics"
    """Owners; everyone while `metrics` is `open`."""
    SESSION = "session"
    """A browser in which an owner has logged in; what changes something has to show that our page sent it."""
    VISITOR = "visitor"
    """The same, also of one in which the holder of a ledger's key has logged in: it shows nothing but that key's own."""


class Access:
    """Turn a request into its caller, or refuse it.

    Args:
        generated: The key of `keyfile`, which counts while no keys are configured.
        throttle: Makes guessing an owner's key slow, wherever it is offered.
    """

    def __init__(
        self,
        live: Live,
        generated: ApiKey | None = None,
        sessions: "Sessions | None" = None,
        throttle: Throttle | None = None,
    ) -> None:
        self._live = live
        self._generated = generated
        self._sessions = sessions
        self.throttle = throttle or Throttle(time.monotonic)
        self.holders: Holders | None = None
        """The keys of the ledger, where there is one."""

    def admit(self, request: web.Request, level: Level) -> Caller:
        """Return who is asking for what *level* is needed for.

        Raises:
            KeyRefused: If a key or a session is needed, and none that we know came.
            RequestError: 403 or 415 for a request that a web page could have forged.
            TooManyGuesses: If a key came for what is the owner's, after too many wrong ones from there.
        """
        if level is Level.KEYED:
            return self.resolve(request)
        return self._admit_owner(request, level)

    def _admit_owner(self, request: web.Request, level: Level) -> Caller:
        if level in (Level.SESSION, Level.VISITOR):
            if self._sessions is None:
                raise KeyRefused("there are no sessions here")
            return self._sessions.resolve(request, is_owner_needed=level is Level.SESSION)
        settings = self._live.current
        if level is Level.METRICS and settings.metrics == "open":
            _refuse_forged(request, settings)
            return LOCAL
        if settings.admin_key is None:
            if level is Level.ADMIN:
                raise RequestError(
                    "this is changed with the admin-key, and none is set: set admin-key in the configuration, or use the commands "
                    "(`codex-proxy accounts`, `keys`, `users`, `upstreams`) on the machine that runs the proxy",
                    status=403,
                    code="admin_key_needed",
                )
            return self._resolve_owner(request, settings)
        caller = self._find_owner(request, (settings.admin_key,), settings)
        if caller is None:
            what = "this key is not the admin-key" if _presented(request) else "the admin-key is needed"
            raise KeyRefused(f"{what}: send it as 'Authorization: Bearer KEY'; client keys do not open this")
        return caller

    def resolve(self, request: web.Request) -> Caller:
        """Return which client is asking.

        Raises:
            KeyRefused: If a key is needed and none that we know came.
            RequestError: 403 or 415 for a request that a web page could have forged.
        """
        settings = self._live.current
        keys = self._client_keys(settings)
        caller = _find(request, keys) if keys else None
        if caller is None and self.holders is not None:
            caller = self._find_holder(request, self.holders, settings)
        if caller is not None:
            return caller
        needs_key = bool(settings.api_keys) or (self.holders is not None and self.holders.are_there)
        if settings.auth == "none" or (not needs_key and settings.is_loopback):
            _refuse_forged(request, settings)
            return LOCAL
        raise KeyRefused(self._advice(request, settings))

    def _find_holder(self, request: web.Request, holders: "Holders", settings: Settings) -> Caller | None:
        """Return the holder of a key of the ledger; of several keys that came, the first that is one."""
        address = address_of(request, settings)
        for presented in _presented(request):
            caller = holders.find(presented, address)
            if caller is not None:
                return caller
        return None

    def _resolve_owner(self, request: web.Request, settings: Settings) -> Caller:
        """Return the owner, who has no key of its own: holders of the ledger's keys are none."""
        keys = self._client_keys(settings)
        is_open = settings.auth == "none" or (not settings.api_keys and settings.is_loopback)
        # Where no key is needed there is none to guess.
        caller = _find(request, keys) if is_open else self._find_owner(request, keys, settings)
        if caller is not None:
            return caller
        if is_open:
            if self.holders is not None and _presented(request):
                raise KeyRefused(
                    "this key does not open what belongs to the owner; set admin-key, and send that"
                )
            _refuse_forged(request, settings)
            return LOCAL
        raise KeyRefused(self._advice(request, settings))

    def _find_owner(
        self, request: web.Request, keys: tuple[ApiKey, ...], settings: Settings
    ) -> Caller | None:
        """Return the owner whose key came. Each one that came is a try, as one on the page is.

        Raises:
            TooManyGuesses: After too many wrong ones.
        """
        address = address_of(request, settings) or ""
        for presented in _presented(request):
            self.refuse_guesser(address, "owner key")
            found = key_of(presented, keys)
            if found is not None:
                self.throttle.admitted(address)
                return holder(found)
            if not self._is_held(presented, address) and self.throttle.guessed(address, presented):
                audit.warning("owner key refused reason=unknown_key from=%s", shown(address))
        return None

    def _is_held(self, presented: str, address: str) -> bool:
        """Tell whether this is a good key of the ledger: not the owner's, but no guess either."""
        try:
            return self.holders is not None and self.holders.find(presented, address) is not None
        except KeyRefused:
            return False

    def refuse_guesser(self, address: str, what: str) -> None:
        """Refuse another try from where too many were wrong; *what* is how the log calls it.

        Raises:
            TooManyGuesses: Whatever the key would be.
        """
        wait = self.throttle.wait(address)
        if wait > 0:
            if self.throttle.is_news():
                audit.warning("%s refused reason=throttled from=%s", what, shown(address))
            raise TooManyGuesses(f"too many wrong keys; try again in {math.ceil(wait)} s", retry_after=wait)

    def owner_keys(self) -> tuple[ApiKey, ...]:
        """Return the keys that an owner may log in with."""
        settings = self._live.current
        return (settings.admin_key,) if settings.admin_key is not None else self._client_keys(settings)

    def is_open_to(self, request: web.Request) -> bool:
        """Tell whether whoever asks is the owner without any key: sits at this machine, and no key is set.

        A relay in front of us, which makes everybody look like a neighbour, says so by what it adds.

        Raises:
            RequestError: 403 or 415 for a request that a web page could have forged.
        """
        settings = self._live.current
        if not settings.is_loopback or self.owner_keys() or any(name in request.headers for name in _RELAYED):
            return False
        _refuse_forged(request, settings)
        return True

    def _client_keys(self, settings: Settings) -> tuple[ApiKey, ...]:
        if not settings.api_keys and self._generated is not None:
            return (self._generated,)
        return settings.api_keys

    def _advice(self, request: web.Request, settings: Settings) -> str:
        what = "this client key is not known" if _presented(request) else "a client key is needed"
        how = f"{what}: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
        if self.holders is not None and self.holders.are_there:
            return f"{how}; `codex-proxy keys create` makes one"
        if settings.api_keys:
            return f"{how}; the keys are set by api-keys"
        if self._generated is not None:
            return f"{how}; the command `codex-proxy key` prints it on the machine that runs the proxy"
        # Keys were taken out of the file while we listen to a network: closed, not open.
        return f"{how}; none is set now, so restart the proxy to have one generated, or set api-keys"


def _presented(request: web.Request) -> list[str]:
    found = list(request.headers.getall("x-api-key", []))
    for value in request.headers.getall("Authorization", []):
        scheme, _, key = value.strip().partition(" ")
        if scheme.lower() == "bearer":
            found.append(key)
    return [key for key in map(str.strip, found) if key]


def _find(request: web.Request, keys: tuple[ApiKey, ...]) -> Caller | None:
    """Return the caller whose key came; looks at every key, so that time tells nothing."""
    found: ApiKey | None = None
    for presented in _presented(request):
        found = key_of(presented, keys) or found
    return None if found is None else holder(found)


@functools.lru_cache(maxsize=1024)
def holder(key: ApiKey) -> Caller:
    """Return who a key belongs to, as it may be shown."""
    return Caller(f"key-{key.digest.hex()[:8]}", key.name)


class Holders(Protocol):
    """What is needed of `holders` here."""

    @property
    def are_there(self) -> bool: ...

    def find(self, text: str, address: str | None) -> Caller | None: ...

    def check(self, key_id: str, address: str | None) -> Caller: ...

    def is_good(self, key_id: str, digest: str) -> bool: ...


class Sessions(Protocol):
    """What is needed of `dashboard.sessions` here."""

    def resolve(self, request: web.Request, *, is_owner_needed: bool) -> Caller: ...


def key_of(text: str, keys: tuple[ApiKey, ...]) -> ApiKey | None:
    """Return which of *keys* this text is; looks at all of them, so that time tells nothing."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    found: ApiKey | None = None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found


def address_of(request: web.Request, settings: Settings) -> str | None:
    """Return the address that a request came from; None when there is none, as on a Unix socket.

    What a relay says of who asked it is believed only of those in `trusted-proxies`, from the last one on.
    """
    address = request.remote
    if not settings.trusted_proxies:
        return address
    passed = [
        _without_port(one.strip())
        for line in request.headers.getall("X-Forwarded-For", [])
        for one in line.split(",")
    ]
    while passed and address is not None and _is_trusted(address, settings):
        address = passed.pop()
    return address


def shown(address: str) -> str:
    """Return an address as the log may have it: a relay's word for it is anybody's text."""
    return re.sub(r"[^0-9A-Fa-f.:%a-z]", "?", address)[:64] or "unknown"


# Some relays add the port, which is another one for each connection: no network has it, no guesses add up under it.
_WITH_PORT = re.compile(r"(?P<four>[0-9.]+):[0-9]{1,5}|\[(?P<six>[^\]]*)\](?::[0-9]{1,5})?")


def _without_port(text: str) -> str:
    match = _WITH_PORT.fullmatch(text)
    return text if match is None else match["four"] or match["six"]


def _is_trusted(address: str, settings: Settings) -> bool:
    found = read_address(address)
    return found is not None and any(found in network for network in settings.trusted_proxies)


def refuse_other_origins(request: web.Request) -> None:
    """Refuse what a page of another site sent.

    Raises:
        RequestError: 403.
    """
    hosts = request.headers.getall("Host", [])
    _refuse_origins(request, hosts[0].strip().lower() if hosts else "", _ADVICE_FOR_THE_PAGE)


def _refuse_forged(request: web.Request, settings: Settings) -> None:
    headers = request.headers
    hosts = headers.getall("Host", [])
    host = hosts[0].strip().lower() if hosts else ""
    if len(hosts) > 1 or (settings.is_loopback and host and not _is_ours(host, settings)):
        raise RequestError(
            f"host {host[:100]!r} is not ours; add its name to allowed-hosts if it is meant to reach this proxy",
            status=403,
            code="forbidden_host",
        )
    _refuse_origins(request, host)
    if request.body_exists and not is_json(request):
        raise RequestError(
            "without a client key a body must be JSON and say so: send the header "
            "Content-Type: application/json, or set api-keys and send a key",
            status=415,
            code="unsupported_content_type",
        )


def _refuse_origins(request: web.Request, host: str, advice: str = _ADVICE) -> None:
    headers = request.headers
    for origin in headers.getall("Origin", []):
        if not _same_place(origin.strip().lower(), host):
            raise RequestError(
                f"a web page of another origin sent this; {advice}", status=403, code="forbidden_origin"
            )
    if any(v.strip().lower() not in ("same-origin", "none") for v in headers.getall("Sec-Fetch-Site", [])):
        raise RequestError(
            f"a browser sent this for a page of another site; {advice}", status=403, code="forbidden_origin"
        )


_HOST = re.compile(r"(?P<name>\[[0-9a-f:.%]+\]|[^\[\]:/@\s]*)(?::(?P<port>[0-9]{1,5}))?")


def _split_host(host: str) -> tuple[str, str] | None:
    """Split a Host value into name (without brackets and final dot) and port; None if it is none."""
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    return match["name"].strip("[]").removesuffix("."), match["port"] or ""


def _is_ours(host: str, settings: Settings) -> bool:
    split = _split_host(host)
    if split is None:
        return False
    name = split[0]
    if name == "localhost" or name == (settings.listen_host or "").lower() or name in settings.allowed_hosts:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


_DEFAULT_PORTS = {"http": "80", "https": "443"}


def _same_place(origin: str, host: str) -> bool:
    """Tell whether *origin* is the place that *host* names; `null` is nowhere."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default = _DEFAULT_PORTS.get(parts.scheme)
    there, here = _split_host(parts.netloc), _split_host(host)
    if default is None or there is None or here is None or not there[0]:
        return False
    return there[0] == here[0] and (there[1] or default) == (here[1] or default)
