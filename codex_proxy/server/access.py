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
import re
from urllib.parse import urlsplit

from aiohttp import web

from codex_proxy.config import ApiKey, Live, Settings
from codex_proxy.errors import KeyRefused, RequestError
from codex_proxy.server.body import is_json
from codex_proxy.trace import LOCAL, Caller


class Level(enum.Enum):
    """Who may use a route."""

    PUBLIC = "public"
    """Anyone who reaches us: liveness, and nothing that names an account."""
    KEYED = "keyed"
    """Holders of a client key."""
    OWNER = "owner"
    """Holders of a key from the configuration. All keys are such today."""


class Access:
    """Turn a request into its caller, or refuse it.

    *generated* is the key of `keyfile`, which counts while no keys are configured.
    """

    def __init__(self, live: Live, generated: ApiKey | None = None) -> None:
        self._live = live
        self._generated = generated

    def resolve(self, request: web.Request) -> Caller:
        """Return who is asking.

        Raises:
            KeyRefused: If a key is needed and none that we know came.
            RequestError: 403 or 415 for a request that a web page could have forged.
        """
        settings = self._live.current
        keys = settings.api_keys
        if not keys and self._generated is not None:
            keys = (self._generated,)
        caller = _find(request, keys) if keys else None
        if caller is not None:
            return caller
        if settings.auth == "none" or (not settings.api_keys and settings.is_loopback):
            _refuse_forged(request, settings)
            return LOCAL
        raise KeyRefused(self._advice(request, settings))

    def _advice(self, request: web.Request, settings: Settings) -> str:
        what = "this client key is not known" if _presented(request) else "a client key is needed"
        how = f"{what}: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
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
    caller: Caller | None = None
    for presented in _presented(request):
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        for key in keys:
            if hmac.compare_digest(digest, key.digest):
                caller = _holder(key)
    return caller


@functools.lru_cache(maxsize=1024)
def _holder(key: ApiKey) -> Caller:
    return Caller(f"key-{key.digest.hex()[:8]}", key.name)


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
    for origin in headers.getall("Origin", []):
        if not _same_place(origin.strip().lower(), host):
            raise RequestError(
                "a web page of another origin may not use this proxy without a client key; set api-keys "
                "and send one, or serve the page from the proxy's own address",
                status=403,
                code="forbidden_origin",
            )
    if any(v.strip().lower() not in ("same-origin", "none") for v in headers.getall("Sec-Fetch-Site", [])):
        raise RequestError(
            "a browser sent this for a page of another site, which may not use this proxy without a client "
            "key; set api-keys and send one",
            status=403,
            code="forbidden_origin",
        )
    if request.body_exists and not is_json(request):
        raise RequestError(
            "without a client key a body must be JSON and say so: send the header "
            "Content-Type: application/json, or set api-keys and send a key",
            status=415,
            code="unsupported_content_type",
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
