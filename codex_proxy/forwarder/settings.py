"""What a forwarder is told: flags first, then the environment, then the defaults."""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codex_proxy.errors import ConfigError
from codex_proxy.forwarder.limits import Network, network_of
from codex_proxy.forwarder.routes import MAX_UID, Routes, Upstream, upstream_of

MAX_RATE = 1_000_000
MAX_SECONDS = 86_400.0
MAX_CONNECTIONS = 1_000_000
DEFAULT_CONNECTIONS = 5_000

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})

VARIABLES: Mapping[str, str] = {
    "upstream": "UPSTREAM_SERVER_A",
    "route": "UPSTREAM_ROUTES",
    "host": "FORWARD_HOST",
    "port": "PORT",
    "timeout": "UPSTREAM_TIMEOUT_SEC",
    "drain_timeout": "FORWARD_DRAIN_SEC",
    "max_connections": "FORWARD_MAX_CONNECTIONS",
    "rate_limit": "FORWARD_RATE_LIMIT",
    "trust": "FORWARD_TRUST",
    "key": "FORWARD_KEY",
    "admin_key": "FORWARD_ADMIN_KEY",
    "debug": "DEBUG_LOG",
}
"""The variables of the environment, by setting; those of keys may end with `_FILE`, and name a file then."""


@dataclass(slots=True, frozen=True)
class Settings:
    """How to forward."""

    routes: Routes
    host: str = "127.0.0.1"
    port: int = 8000
    timeout: float = 300.0
    """How many seconds either side may do nothing."""
    drain_timeout: float = 120.0
    max_connections: int = DEFAULT_CONNECTIONS
    """How many callers are let in at a time."""
    rate_limit: int = 0
    """Requests a minute for each address; 0 is no limit."""
    trust: tuple[Network, ...] = ()
    """Whose word on who asks is taken."""
    key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    debug: bool = False

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine can reach us."""
        if self.host.lower().removesuffix(".") == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load(flags: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """Return the settings of *flags*, by name, None or empty where one was not given.

    Raises:
        ConfigError: If something is wrong, naming the flag or the variable, its value, and what would do.
    """
    given = _Given(flags, environ)
    upstreams = given.many("upstream")
    if not upstreams[1]:
        raise ConfigError(
            "there is no upstream: --upstream http://far.example:3000 would do, or UPSTREAM_SERVER_A=..."
        )
    timeout = given.number("timeout", 300.0, 0.001, MAX_SECONDS)
    return Settings(
        Routes(tuple(_upstream(upstreams[0], one) for one in upstreams[1]), _routes(*given.many("route"))),
        host=given.text("host") or "127.0.0.1",
        port=int(given.number("port", 8000, 0, 65_535, whole=True)),
        timeout=timeout,
        drain_timeout=given.number("drain_timeout", 120.0, 0, MAX_SECONDS),
        max_connections=int(
            given.number("max_connections", DEFAULT_CONNECTIONS, 1, MAX_CONNECTIONS, whole=True)
        ),
        rate_limit=int(given.number("rate_limit", 0, 0, MAX_RATE, whole=True)),
        trust=tuple(_network(given.name("trust"), one) for one in given.many("trust")[1]),
        key=given.secret("key"),
        admin_key=given.secret("admin_key"),
        debug=given.truth("debug"),
    )


class _Given:
    """What was given, and under which name."""

    def __init__(self, flags: Mapping[str, object], environ: Mapping[str, str]) -> None:
        self._flags = flags
        self._environ = environ

    def name(self, setting: str) -> str:
        """Return what to call a setting in an error: the flag, or the variable that it came from."""
        return f"--{setting.replace('_', '-')}" if self._flags.get(setting) else VARIABLES[setting]

    def text(self, setting: str) -> str:
        value = self._flags.get(setting)
        if value is None or value == []:
            value = self._environ.get(VARIABLES[setting], "")
        return str(value).strip()

    def many(self, setting: str) -> tuple[str, list[str]]:
        flags = self._flags.get(setting)
        if isinstance(flags, Sequence) and not isinstance(flags, str) and flags:
            return self.name(setting), [str(one).strip() for one in flags]
        return self.name(setting), self._environ.get(VARIABLES[setting], "").replace(",", " ").split()

    def number(
        self, setting: str, default: float, least: float, most: float, *, whole: bool = False
    ) -> float:
        text = self.text(setting)
        if not text:
            return default
        try:
            value = float(int(text)) if whole else float(text)
        except ValueError:
            value = least - 1
        # Also false for what is no number at all.
        if not least <= value <= most:
            kind = "whole number" if whole else "number"
            raise ConfigError(
                f"{self.name(setting)}: {text[:50]!r} will not do, a {kind} from {least:g} to {most:g} would"
            )
        return value

    def truth(self, setting: str) -> bool:
        if self._flags.get(setting):
            return True
        text = self._environ.get(VARIABLES[setting], "").strip().lower()
        if text not in _TRUE | _FALSE:
            raise ConfigError(f"{VARIABLES[setting]}: {text[:50]!r} will not do, 1 or 0 would")
        return text in _TRUE

    def secret(self, setting: str) -> str | None:
        """Read a secret from a file or the environment; a command line is everybody's to read."""
        variable = VARIABLES[setting]
        flag = f"{setting}_file"
        path = str(self._flags.get(flag) or self._environ.get(f"{variable}_FILE", ""))
        if path:
            named = f"--{flag.replace('_', '-')}" if self._flags.get(flag) else f"{variable}_FILE"
            try:
                text = Path(path).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as exc:
                reason = exc.strerror if isinstance(exc, OSError) else "is no text"
                raise ConfigError(f"{named}: {path!r}: {reason}") from exc
            if not text:
                raise ConfigError(f"{named}: {path!r} is empty; a key of 16 characters or more would do")
            variable = named
        else:
            text = self._environ.get(variable, "").strip()
        if not text:
            return None
        if len(text) < 16 or not text.isascii() or any(ch.isspace() for ch in text):
            raise ConfigError(
                f"{variable}: a key has 16 ASCII characters or more and no blanks; `openssl rand -hex 24` makes one"
            )
        return text


def _upstream(name: str, text: str) -> Upstream:
    try:
        return upstream_of(text)
    except ValueError as exc:
        # Not its text: a password may be in it.
        raise ConfigError(f"{name}: {exc}; http://far.example:3000 would do") from exc


def _routes(name: str, texts: list[str]) -> dict[int, tuple[Upstream, ...]]:
    routes: dict[int, tuple[Upstream, ...]] = {}
    for text in texts:
        uid, equals, url = text.partition("=")
        number = uid.removeprefix("u")
        if not (equals and number.isascii() and number.isdigit() and int(number) <= MAX_UID):
            raise ConfigError(
                f"{name}: {uid[:50]!r} is no route: 1=http://far.example:3000 serves requests below /u1/v1"
            )
        routes[int(number)] = (*routes.get(int(number), ()), _upstream(name, url))
    return routes


def _network(name: str, text: str) -> Network:
    try:
        return network_of(text)
    except ValueError as exc:
        raise ConfigError(f"{name}: {text[:50]!r} will not do, an address or 10.0.0.0/8 would") from exc
