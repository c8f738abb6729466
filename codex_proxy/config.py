"""Settings: frozen snapshots, one table of keys, errors that name the place, hot reload.

`KEYS` is the one table: the settings are built from it, the documentation is rendered from
it, and the example is checked against it. A value comes from, lowest first: the default,
the file, `<key>-file` in the file, `CODEX_PROXY_<KEY>` and `CODEX_PROXY_<KEY>_FILE`.

Code asks `live.current` at the moment of use. A key is `live` (an edit of the file counts
at once) or `restart` (an edit is noticed, said, and waits).
"""

import asyncio
import dataclasses
import difflib
import functools
import hashlib
import ipaddress
import logging
import math
import os
import re
import stat
import sys
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import yaml
from yaml.reader import ReaderError

from codex_proxy import __version__
from codex_proxy.addresses import why_not
from codex_proxy.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_FILE = Path("config.yaml")
PREFIX = "CODEX_PROXY_"
CONFIG_VARIABLE = "CODEX_PROXY_CONFIG"
CONTROL_SOCKET = "control.sock"
"""In data-dir: where commands reach a running daemon; only its owner may open it."""
# Twice a second, and an edit counts when two looks agree: well within the promised 2 s,
# and a file that an editor is still writing is left alone.
POLL_SECONDS = 0.5
# A configuration is a page or two. Past this something else was named by mistake.
MAX_FILE_BYTES = 1024 * 1024
# Longer than any sensible timeout, far below what timers of the operating system refuse.
MAX_SECONDS = 30 * 86_400.0

MIN_ADMIN_KEY = 16
"""How many characters an admin-key has at least: it opens a page that a browser can be made to ask."""

_ABSENT: bytes = b"absent"
"""Stands where a file's digest would be when there is no file."""

_STREAM = "cannot be read again: not a file"
"""What is wrong with a pipe at a second look; stands for its digest at every look."""

# A Kubernetes service called "codex-proxy" puts these into every container of its namespace.
_SERVICE_LINK = re.compile(r"CODEX_PROXY_(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)")


@dataclass(slots=True, frozen=True)
class ApiKey:
    """A client key as we keep it: its name and its digest, never its text."""

    name: str
    digest: bytes = field(repr=False)
    """SHA-256 of the key; compare in constant time."""

    @classmethod
    def of(cls, name: str, key: str) -> "ApiKey":
        """Keep *key* by its digest."""
        return cls(name, hashlib.sha256(key.encode()).digest())


class _Unfit(Exception):
    """A value does not fit its key; the text says why when the range alone would not."""


# --- parsers: what YAML or the environment gave -> the value, or _Unfit


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise _Unfit("not a text (put it in quotes)" if isinstance(value, int | float) else "not a text")
    return value.strip()


def _whole(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise _Unfit("not a whole number")
        if not low <= value <= high:
            raise _Unfit("out of range")
        return value

    return parse


_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")


def _seconds(*, zero: bool, most: float = MAX_SECONDS) -> Callable[[object], float]:
    def parse(value: object) -> float:
        seconds = _number_of_seconds(value)
        if not math.isfinite(seconds) or seconds < 0 or seconds > most or (seconds == 0 and not zero):
            raise _Unfit("out of range")
        return seconds

    return parse


# No timer has it: how long something is kept.
_long_seconds = _seconds(zero=False, most=3650 * 86_400.0)


def _number_of_seconds(value: object) -> float:
    if isinstance(value, str):
        text = value.strip().lower()
        if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", text):
            return float(text)
        if re.fullmatch(f"({_DURATION.pattern})+", text):
            return sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e300 else math.inf
    raise _Unfit("not a time")


_SIZES = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def _size(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str):
            match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([a-z]*)", value.strip().lower())
            if match is None or match[2] not in _SIZES:
                raise _Unfit("not a size")
            value = int(float(match[1]) * _SIZES[match[2]])
        if isinstance(value, bool) or not isinstance(value, int):
            raise _Unfit("not a size")
        if not low <= value <= high:
            raise _Unfit("out of range")
        return value

    return parse


def _choice(*words: str, aliases: Mapping[str, str] | None = None) -> Callable[[object], str]:
    def parse(value: object) -> str:
        word = _string(value).lower()
        word = (aliases or {}).get(word, word)
        if word not in words:
            raise _Unfit("no such choice")
        return word

    return parse


def _off_or(*words: str) -> Callable[[object], str]:
    parse = _choice("off", *words)
    # To YAML an `off` without quotes is false.
    return lambda value: parse("off" if value is False else value)


def _on_or_off(value: object) -> str:
    # To YAML both words without quotes are a switch.
    return _choice("on", "off")({True: "on", False: "off"}[value] if isinstance(value, bool) else value)


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    # The environment has only texts.
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if not isinstance(value, str) or value.strip().lower() not in words:
        raise _Unfit("not a switch")
    return words[value.strip().lower()]


def _folder(value: object) -> Path:
    text = _string(value)
    if not text or "\0" in text:
        raise _Unfit("not a path")
    return Path(text).expanduser()


_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,251}[a-z0-9])?\.?", re.IGNORECASE)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _can_be_asked_for(host: str) -> bool:
    """Tell whether the system can be asked for a name at all: no part of it is empty, or longer than 63 letters."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def _split_listen(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]{1,5})", text)
    if match is None:
        raise _Unfit('not an address with a port (":8080" is every interface)')
    inner, plain, port = match[1], match[2], int(match[3])
    if port > 65_535:
        raise _Unfit("no such port")
    if inner is not None:
        if not _is_address(inner):
            raise _Unfit("no IPv6 address in the brackets")
        return inner, port
    host = "" if plain == "*" else plain
    if host and not (_HOST_NAME.fullmatch(host) and _can_be_asked_for(host)):
        raise _Unfit("not a host name or address")
    return host, port


def _listen(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65_535:
        raise _Unfit(
            f'a port alone: write ":{value}" for every interface or "127.0.0.1:{value}" for this machine'
        )
    text = _string(value)
    _split_listen(text)
    return text


def _split_url(text: str) -> tuple[SplitResult, int | None]:
    """Take a URL apart; text that the library itself stumbles over is unfit too."""
    if re.search(r"[\x00-\x20\x7f]", text):
        raise _Unfit("has a space or a control character in it")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as exc:
        raise _Unfit("not a URL") from exc
    if not _can_be_asked_for(parts.hostname or ""):
        raise _Unfit("not a URL")
    return parts, port


def _url(value: object) -> str:
    text = _string(value)
    parts, _ = _split_url(text)
    if parts.scheme not in {"http", "https"}:
        raise _Unfit("does not begin with http:// or https://")
    if not parts.hostname:
        raise _Unfit("names no host")
    if "@" in parts.netloc:
        raise _Unfit("has a user or password in it")
    if parts.query or parts.fragment:
        raise _Unfit("has a query or a fragment")
    return text.rstrip("/")


_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def _proxy(value: object) -> str:
    text = _string(value)
    if not text:
        return ""
    parts, port = _split_url(text)
    if parts.scheme not in _PROXY_SCHEMES:
        raise _Unfit("unknown kind of proxy" if "://" in text else "does not begin with a scheme")
    if not parts.hostname:
        raise _Unfit("names no host")
    if parts.scheme.startswith("socks") and port is None:
        raise _Unfit("a SOCKS proxy needs its port")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise _Unfit("a proxy has no path")
    return text.rstrip("/")


def mask_url(url: str) -> str:
    """Return *url* without user, password, path and query; `***` for what is no URL."""
    if not url:
        return ""
    try:
        parts, port = _split_url(url)
    except _Unfit:
        return "***"
    if not parts.scheme or not parts.hostname:
        return "***"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    user = "***@" if "@" in parts.netloc else ""
    return f"{parts.scheme}://{user}{host}" + (f":{port}" if port is not None else "")


def _header(pattern: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        text = _string(value)
        if not re.fullmatch(pattern, text):
            raise _Unfit("not fit for a header")
        return text

    return parse


def _version(value: object) -> str:
    text = _string(value)
    if not re.fullmatch(r"[0-9]{1,6}\.[0-9]{1,6}\.[0-9]{1,6}(-[a-z0-9.]{1,30})?", text):
        raise _Unfit("not a version")
    return text


def _hosts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Unfit("not a list")
    hosts: list[str] = []
    for position, item in enumerate(value, 1):
        if not isinstance(item, str):
            raise _Unfit(f"item {position} is not a text")
        host = item.strip().lower().removesuffix(".")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        if not (_is_address(host) or _HOST_NAME.fullmatch(host)):
            raise _Unfit(f"item {position} ({item!r}) is not a host name or address alone")
        if host not in hosts:
            hosts.append(host)
    return tuple(hosts)


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(value: object) -> tuple[Network, ...]:
    if not isinstance(value, list):
        raise _Unfit("not a list")
    networks: list[Network] = []
    for position, item in enumerate(value, 1):
        try:
            networks.append(ipaddress.ip_network(_string(item), strict=False))
        except (_Unfit, ValueError) as exc:
            raise _Unfit(f"item {position} ({item!r}) is not an address or a network") from exc
    return tuple(networks)


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Unfit("not a list")
    names: list[str] = []
    for position, item in enumerate(value, 1):
        if not isinstance(item, str) or not _KEY_NAME.fullmatch(item.strip()):
            raise _Unfit(f"item {position} is no name of a client key")
        if item.strip() not in names:
            names.append(item.strip())
    return tuple(names)


def _profiles(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Unfit("not a mapping")
    for model, profile in value.items():
        if not isinstance(model, str) or not model.strip():
            raise _Unfit(f"{model!r} is no model id (put it in quotes)")
        if profile not in {"standard", "lite"}:
            raise _Unfit(f"model {model!r} has {profile!r}")
    return dict(value)


def _admin_key(value: object) -> ApiKey | None:
    text = _string(value)
    if not text:
        return None
    if not re.fullmatch(r"[!-~]+", text):
        raise _Unfit("has a space or a character that no header can carry")
    if len(text) < MIN_ADMIN_KEY:
        raise _Unfit("too short: it could be guessed")
    return ApiKey.of("admin", text)


_MODEL_NAME = re.compile(r"[!-~]{1,256}")


def _model_map(value: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise _Unfit("not a mapping")
    found: dict[str, tuple[str, ...]] = {}
    lowered: set[str] = set()
    for name, models in value.items():
        if not isinstance(name, str):
            raise _Unfit(f"{name!r} is no model name (put it in quotes)")
        if not _MODEL_NAME.fullmatch(name):
            raise _Unfit(f"{name!r} is no model name (no spaces, not empty)")
        if name.lower() in lowered:
            raise _Unfit(f"{name} is there twice: letters count the same in either case")
        lowered.add(name.lower())
        listed = [models] if isinstance(models, str) else models
        if not isinstance(listed, list) or not listed:
            raise _Unfit(f"{name} has {models!r}, neither a model nor a list of models")
        for model in listed:
            if not isinstance(model, str) or not _MODEL_NAME.fullmatch(model) or "*" in model:
                raise _Unfit(f"{name} has {model!r}, which is no model name")
        found[name] = tuple(listed)
    return found


_KEY_NAME = re.compile(r"[\w.@+-][\w .@+-]{0,63}")


def _api_keys(value: object) -> tuple[ApiKey, ...]:
    keys: list[ApiKey] = []
    for position, (name, text) in enumerate(_named_keys(value), 1):
        # Names of entries are safe to say, their texts are not.
        entry = f"entry {position}" + (f" ({name})" if name else "")
        if not isinstance(text, str):
            raise _Unfit(f"{entry} is not a text: put it in quotes")
        if not text:
            raise _Unfit(f"{entry} is empty")
        if not re.fullmatch(r"[!-~]+", text):
            raise _Unfit(f"{entry} has a space or a character that no header can carry")
        key = ApiKey.of(name or f"key-{position}", text)
        for other in keys:
            if other.digest == key.digest:
                raise _Unfit(f"{entry} is the same key as {other.name}")
            if other.name == key.name:
                raise _Unfit(f"{entry}: the name {key.name!r} is there twice")
        keys.append(key)
    return tuple(keys)


def _named_keys(value: object) -> Iterator[tuple[str, object]]:
    entries: Iterable[object]
    if isinstance(value, dict):
        entries = [{name: key} for name, key in value.items()]
    elif isinstance(value, list):
        entries = value
    else:
        raise _Unfit("neither a list nor a mapping")
    for position, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            # From the environment and from files an entry with a name is a text: `name: key`.
            named = re.fullmatch(r"([^\s:][^:]*):\s+(\S+)", entry) if isinstance(entry, str) else None
            yield (named[1].strip(), named[2]) if named else ("", entry)
            continue
        for name, key in entry.items():
            if not isinstance(name, str) or not _KEY_NAME.fullmatch(name):
                raise _Unfit(f"entry {position} has no usable name (letters, digits, . _ - + @, at most 64)")
            yield name, key


@dataclass(slots=True, frozen=True)
class Webhook:
    """Where alerts are told. Its address holds a secret: show `mask_url` of it."""

    name: str
    shape: str
    """One of `SHAPES`."""
    url: str = field(repr=False)
    chat_id: str = ""
    """Telegram's word for whom it is meant."""
    secret: str = field(default="", repr=False)
    """What Feishu and DingTalk want messages signed with, where a bot asks for it."""


SHAPES = ("generic", "slack", "telegram", "feishu", "dingtalk")

_MAX_WEBHOOKS = 20


def _webhooks(value: object) -> tuple[Webhook, ...]:
    entries = [value] if isinstance(value, str | dict) else value
    if not isinstance(entries, list) or len(entries) > _MAX_WEBHOOKS:
        raise _Unfit("not a list" if not isinstance(entries, list) else f"more than {_MAX_WEBHOOKS}")
    found: list[Webhook] = []
    for position, entry in enumerate(entries, 1):
        said = {"url": entry} if isinstance(entry, str) else entry
        # Neither what an entry holds nor how it is misspelled may be shown: a secret is in it.
        if not isinstance(said, dict) or not all(isinstance(name, str) for name in said):
            raise _Unfit(f"entry {position} is neither a URL nor a mapping")
        hook = _webhook(f"entry {position}", position, said)
        if any(hook.name == other.name for other in found):
            raise _Unfit(f"entry {position}: the name {hook.name!r} is there twice")
        found.append(hook)
    return tuple(found)


def _webhook(entry: str, position: int, said: Mapping[str, object]) -> Webhook:
    unknown = sorted(said.keys() - {"url", "shape", "name", "chat-id", "secret"})
    if unknown:
        raise _Unfit(f"{entry} has {unknown[0][:40]!r}, which is none of url, shape, name, chat-id, secret")
    shape = said.get("shape", "generic")
    if not isinstance(shape, str) or shape not in SHAPES:
        raise _Unfit(f"{entry}: shape is none of {', '.join(SHAPES)}")
    name = said.get("name", f"{shape}-{position}")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}", name):
        raise _Unfit(f"{entry}: name is not 1 to 64 letters, digits, spaces and . _ -")
    url, chat_id, secret = said.get("url"), said.get("chat-id", ""), said.get("secret", "")
    if not isinstance(url, str) or not url.strip():
        raise _Unfit(f"{entry} has no url")
    problem = _unfit_for_secrets(url.strip())
    if problem:
        raise _Unfit(f"{entry}: url {problem}")
    if isinstance(chat_id, int) and not isinstance(chat_id, bool):
        chat_id = str(chat_id)
    if not isinstance(chat_id, str) or (shape == "telegram") is not bool(chat_id):
        raise _Unfit(f"{entry}: telegram, and no other shape, has a chat-id")
    if not isinstance(secret, str) or (secret and shape not in ("feishu", "dingtalk")):
        raise _Unfit(f"{entry}: feishu and dingtalk may have a secret, a text")
    return Webhook(name, shape, url.strip(), chat_id, secret)


CAPABILITIES = ("responses", "chat", "completions", "engines", "edits", "embeddings", "messages")
"""What an upstream may speak."""

_DEFAULT_CAPABILITIES = ("responses", "chat", "embeddings")

_MAX_UPSTREAMS = 100


@dataclass(slots=True, frozen=True)
class Upstream:
    """A provider over HTTP beside the accounts, as its owner describes it."""

    name: str
    base_url: str
    """Without a slash or `/v1` at its end."""
    api_key: str = field(default="", repr=False)
    """Empty where none is wanted."""
    priority: int = 10
    """The small ones are asked first; the accounts have `accounts-priority`."""
    weight: float = 1.0
    """Its share of the conversations among those of one priority; the accounts together have 1."""
    max_retries: int = 3
    """Further attempts of one turn there, within `max-retry`."""
    timeout: float = 120.0
    """How long it may be silent before another one is asked."""
    enabled: bool = True
    models: tuple[tuple[str, str], ...] = ()
    """Names or patterns, each with what the model is called there (empty: the same); none: all."""
    capabilities: tuple[str, ...] = _DEFAULT_CAPABILITIES
    """Out of `CAPABILITIES`."""
    on_client_disconnect: str = "drain"
    """`cancel`, or `drain`: go on reading, so that what it has cost is known."""
    api_key_file: str = ""
    """Where the key was read, if in a file."""
    api_key_env: str = ""
    """The same for a variable of the environment."""


class BadUpstream(ConfigError):
    """What is said of an upstream does not fit; `field` is its name as the configuration has it."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


def read_upstream(said: Mapping[str, object]) -> Upstream:
    """Read what an owner says of an upstream, in the configuration or elsewhere.

    Raises:
        BadUpstream: If it does not fit; the message names the field, its value, and what would do.
    """
    for name in said:
        if name not in _UPSTREAM_FIELDS:
            known = ", ".join(_UPSTREAM_FIELDS)
            raise BadUpstream(f"{name[:40]!r} is none of {known}", field=name)
    for name in ("name", "base-url"):
        if said.get(name) in (None, ""):
            raise BadUpstream(f"{name} is missing", field=name)
    keys = [name for name in _KEY_SOURCES if said.get(name)]
    if len(keys) > 1:
        raise BadUpstream(f"{keys[0]} and {keys[1]} are both there; want only one of them", field=keys[1])
    values: dict[str, Any] = {}
    for name, (parse, fits) in _UPSTREAM_FIELDS.items():
        value = said.get(name)
        if value is None:
            continue
        try:
            values[name.replace("-", "_")] = parse(value)
        except _Unfit as exc:
            shown = "***" if name in _KEY_SOURCES else _USER_INFO.sub("://***@", repr(value)[:200])
            raise BadUpstream(f"{name} = {shown}: {exc}; want {fits}", field=name) from exc
    return Upstream(**values)


def _upstream_name(value: object) -> str:
    text = _string(value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise _Unfit("no name")
    return text


def _upstream_url(value: object) -> str:
    text = _url(value)
    problem = why_not(urlsplit(text).hostname or "")
    if problem:
        raise _Unfit(f"{problem}, to which nothing is sent")
    while text.endswith("/v1"):
        # Paths are put behind it with their own.
        text = text.removesuffix("/v1").rstrip("/")
    return text


def _key_text(value: object) -> str:
    text = _string(value)
    if text and not re.fullmatch(r"[!-~]+", text):
        raise _Unfit("has a space or a character that no header can carry")
    return text


def _weight(value: object) -> float:
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,4}(\.[0-9]{1,6})?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.001 <= value <= 1000:
        raise _Unfit("no weight")
    return float(value)


def _served_models(value: object) -> tuple[tuple[str, str], ...]:
    entries = [value] if isinstance(value, str | dict) else value
    if not isinstance(entries, list):
        raise _Unfit("neither a list nor a mapping")
    found: dict[str, str] = {}
    for entry in entries:
        pairs = entry.items() if isinstance(entry, dict) else [(entry, None)]
        for name, theirs in pairs:
            if not isinstance(name, str) or not _MODEL_NAME.fullmatch(name):
                raise _Unfit(f"{name!r} is no model name (put it in quotes; no spaces, not empty)")
            theirs = "" if theirs is None else theirs
            if not isinstance(theirs, str) or (
                theirs and ("*" in theirs or not _MODEL_NAME.fullmatch(theirs))
            ):
                raise _Unfit(f"{name} has {theirs!r}, which is no model name")
            if name.lower() in map(str.lower, found):
                raise _Unfit(f"{name} is there twice")
            found[name] = theirs
    return tuple(found.items())


def _capabilities(value: object) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries:
        raise _Unfit("not a list, or an empty one")
    for entry in entries:
        if entry not in CAPABILITIES:
            raise _Unfit(f"{entry!r} is none")
    return tuple(one for one in CAPABILITIES if one in entries)


def _variable(value: object) -> str:
    text = _string(value)
    if text and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", text):
        raise _Unfit("no name of a variable")
    return text


def _path_text(value: object) -> str:
    return str(_folder(value)) if value != "" else ""


_KEY_SOURCES = ("api-key", "api-key-file", "api-key-env")

_UPSTREAM_FIELDS: Mapping[str, tuple[Callable[[object], Any], str]] = {
    "name": (_upstream_name, "1 to 64 letters, digits and . _ -"),
    "base-url": (
        _upstream_url,
        "an http or https URL without user, query and fragment, with or without /v1, and not of a "
        "metadata service",
    ),
    "api-key": (_key_text, "a key without spaces, in quotes"),
    "api-key-file": (_path_text, "the path of a file with the key in it"),
    "api-key-env": (_variable, "the name of a variable of the environment that holds the key"),
    "priority": (_whole(-1000, 1000), "a whole number from -1000 to 1000; small ones are asked first"),
    "weight": (_weight, "a number from 0.001 to 1000"),
    "max-retries": (_whole(0, 10), "a whole number from 0 to 10"),
    "timeout": (_seconds(zero=False), "seconds above 0, or a time such as 90s, 5m, 1h"),
    "enabled": (_switch, "true or false"),
    "models": (
        _served_models,
        "a list of names or patterns (* stands for anything), or a mapping of them to what the model is called there",
    ),
    "capabilities": (_capabilities, "a list out of " + ", ".join(CAPABILITIES)),
    "on-client-disconnect": (_choice("cancel", "drain"), "cancel or drain"),
}
"""What may be said of an upstream, and what fits."""


def _upstreams(value: object) -> tuple[Upstream, ...]:
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or len(entries) > _MAX_UPSTREAMS:
        raise _Unfit("not a list" if not isinstance(entries, list) else f"more than {_MAX_UPSTREAMS}")
    found: dict[str, Upstream] = {}
    for position, entry in enumerate(entries, 1):
        where = f"entry {position}"
        if not isinstance(entry, dict) or not all(isinstance(name, str) for name in entry):
            raise _Unfit(f"{where} is not a mapping")
        name = entry.get("name")
        # Names are safe to say, keys are not.
        if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,64}", name):
            where = f"{where} ({name})"
        try:
            upstream = read_upstream(entry)
        except BadUpstream as exc:
            raise _Unfit(f"{where}: {exc.message}") from exc
        if upstream.name in found:
            raise _Unfit(f"{where}: the name {upstream.name!r} is there twice")
        found[upstream.name] = upstream
    return tuple(found.values())


def _database_url(value: object) -> str:
    url = _string(value)
    if not url:
        return ""
    try:
        parts, _ = _split_url(url)
    except _Unfit as exc:
        raise _Unfit("not a URL") from exc
    if parts.scheme not in {"postgresql", "postgres"}:
        raise _Unfit("neither empty nor a postgresql URL")
    if not parts.path.strip("/") or parts.fragment:
        raise _Unfit("names no database" if not parts.fragment else "has a fragment")
    return url


def _unfit_for_secrets(url: str) -> str:
    """Say why a secret in *url* should not be sent there; empty when it may."""
    try:
        parts, _ = _split_url(url)
    except _Unfit as exc:
        return str(exc)
    host = parts.hostname or ""
    if parts.scheme not in {"http", "https"} or not host:
        return "is no http or https URL"
    if "@" in parts.netloc or parts.fragment:
        return "has a user, a password or a fragment"
    if parts.scheme == "https" or host == "localhost":
        return ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "is plain http: only a loopback or private address may be"
    is_near = address.is_loopback or (address.is_private and not address.is_link_local)
    return "" if is_near else "is plain http: only a loopback or private address may be"


def _part(value: object) -> float:
    """Read a share: 0.2, or 20%."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%\s*", value)
        if match is None:
            raise _Unfit("not a share such as 20% or 0.2")
        value = float(match[1]) / 100
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise _Unfit("not a share such as 20% or 0.2")
    return float(value)


ALERTS: Mapping[str, Mapping[str, tuple[Callable[[object], float], object]]] = {
    "pool-nearly-dry": {"left": (_part, "10%"), "for": (_seconds(zero=True), "5m")},
    "account-needs-login": {"for": (_seconds(zero=True), "1m")},
    "error-share": {
        "above": (_part, "20%"),
        "requests": (_whole(1, 1_000_000), 20),
        "for": (_seconds(zero=True), "2m"),
    },
    "refresh-failing": {"failures": (_whole(1, 100), 3), "for": (_seconds(zero=True), "1m")},
}
"""The built-in alerts, and the options of each with their defaults."""


def _alerts(value: object) -> dict[str, dict[str, float]]:
    if not isinstance(value, dict):
        raise _Unfit("not a mapping")
    for name in value:
        if name not in ALERTS:
            raise _Unfit(f"{name!r} is no alert")
    found: dict[str, dict[str, float]] = {}
    for name, options in ALERTS.items():
        said = value.get(name, {})
        # To YAML an `off` without quotes is false.
        if said is False or said == "off":
            continue
        if said is True or said == "on" or said is None:
            said = {}
        if not isinstance(said, dict):
            raise _Unfit(f"{name} is neither off nor a mapping of its options")
        for option in said:
            if option not in options:
                raise _Unfit(f"{name} has {option!r}, which is none of {', '.join(options)}")
        found[name] = {}
        for option, (parse, default) in options.items():
            try:
                found[name][option] = parse(said.get(option, default))
            except _Unfit as exc:
                raise _Unfit(f"{name}: {option} is {said[option]!r}: {exc}") from exc
    return found


# --- the table

TRANSPORTS = ("native", "aiohttp")
STRATEGIES = ("horizon", "quota-balance", "round-robin", "fill-first", "weighted")
"""What `strategy` may be; `accounts.scheduler` has one class for each."""


@dataclass(slots=True, frozen=True)
class Key:
    """One setting: all that code and documents know about it."""

    name: str
    default: object
    """As one would write it in the file."""
    live: bool
    """An edit counts at once; otherwise it needs a restart."""
    doc: str
    """One line: what it is, and why one would change it."""
    range: str
    """What fits, in words: ends every error about it."""
    parse: Callable[[object], Any]
    kind: Literal["scalar", "list", "mapping"] = "scalar"
    secret: bool = False
    """Its value appears nowhere."""

    @property
    def field(self) -> str:
        """The name of the field in `Settings`."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """The name of the environment variable."""
        return PREFIX + self.field.upper()

    @property
    def takes_effect(self) -> str:
        return "at once" if self.live else "restart"


_POSITIVE = "seconds above 0, or a time such as 90s, 5m, 1h"
_ZERO_OFF = "seconds from 0, or a time such as 90s, 5m, 1h; 0 is off"

KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        Key(
            "listen", ":8080", False,
            "Where clients connect; without `api-keys` anything but loopback gets a generated key.",
            'host:port, ":8080" for every interface, "[::1]:8080" for IPv6', _listen,
        ),
        Key(
            "auth-dir", "./auths", False,
            "Folder of the account files, one JSON file per account; files may come and go at any time.",
            "a path", _folder,
        ),
        Key(
            "data-dir", "./data", False,
            "Folder for what the daemon itself keeps, such as the generated client key.",
            "a path", _folder,
        ),
        Key(
            "base-url", "https://chatgpt.com/backend-api/codex", False,
            "The Codex backend; the simulator's address to try things without spending quota.",
            "an http or https URL without user, query and fragment", _url,
        ),
        Key(
            "oauth-issuer", "https://auth.openai.com", False,
            "Where accounts log in and tokens are refreshed; the simulator's address together with `base-url`.",
            "an http or https URL without user, query and fragment", _url,
        ),
        Key(
            "proxy-url", "", True,
            "Proxy for everything that goes out; empty is a direct connection, nothing is taken from HTTP_PROXY.",
            "empty, or http://, https://, socks5:// or socks5h:// with host and port", _proxy, secret=True,
        ),
        Key(
            "upstream-transport", "native", True,
            "What carries calls that go out without a proxy: our own transport, or aiohttp's, which costs several times as much and is more lenient, for odd environments; proxies are always aiohttp's.",
            "native or aiohttp", _choice(*TRANSPORTS),
        ),
        Key(
            "upstreams", [], True,
            "Providers over HTTP beside the accounts, such as Sub2API, OpenAI or another codex-proxy; see docs/upstreams.md.",
            "a list of mappings with name, base-url and, if you like, " + ", ".join(list(_UPSTREAM_FIELDS)[2:]),
            # From the environment or a file it is YAML too, because one entry has several parts.
            _upstreams, kind="mapping", secret=True,
        ),
        Key(
            "accounts-priority", 0, True,
            "Where the accounts stand in the order of upstreams, of which those with small priorities are asked first; with the same one they share.",
            "a whole number from -1000 to 1000", _whole(-1000, 1000),
        ),
        Key(
            "log-level", "info", True,
            "How much is logged; debug adds every answer and what failed in the background.",
            "debug, info, warn or error", _choice("debug", "info", "warn", "error", aliases={"warning": "warn"}),
        ),
        Key(
            "log-format", "text", True,
            "How log lines look: text for people, or json, one object a line with its fields taken apart, for what collects logs.",
            "text or json", _choice("text", "json"),
        ),
        Key(
            "metrics", "keyed", True,
            "Who may read /metrics: holders of an owner's key, everyone who reaches the port (account names and numbers, no secrets), or nobody.",
            "keyed, open or off", _off_or("keyed", "open"),
        ),
        Key(
            "telemetry", "off", False,
            "Send a trace of each turn to an OpenTelemetry collector, without what was said; needs the extra `codex-proxy[otel]`.",
            "off or otlp", _off_or("otlp"),
        ),
        Key(
            "telemetry-endpoint", "http://127.0.0.1:4318", False,
            "The collector's address for OTLP over HTTP; /v1/traces is put behind it unless it is there.",
            "an http or https URL without user, query and fragment", _url,
        ),
        Key(
            "alerts", {}, True,
            "When the page and the webhooks tell of trouble: the built-in alerts with other thresholds, or off.",
            "a mapping of " + ", ".join(f"{name} ({', '.join(options)})" for name, options in ALERTS.items()) + " to off or their options",
            _alerts, kind="mapping",
        ),
        Key(
            "alert-webhooks", [], True,
            "Where alerts are told, once when they begin and once when they end; `codex-proxy alert-test` tries them.",
            "a list of URLs, or of mappings with url, shape (" + ", ".join(SHAPES) + "), name, chat-id (telegram) and secret (feishu, dingtalk); http only to loopback or private addresses",
            # From the environment or a file it is YAML too, because one entry has several parts.
            _webhooks, kind="mapping", secret=True,
        ),
        Key(
            "refresh-interval", 3000, True,
            "How often all tokens are looked over, beside a timer for each; one that is still good is never rotated.",
            _POSITIVE, _seconds(zero=False),
        ),
        Key(
            "max-retry", 2, True,
            "Further attempts after a passing fault; leaving an account that is used up does not count.",
            "a whole number from 0 to 10", _whole(0, 10),
        ),
        Key(
            "health-check-interval", 300, True,
            "How often accounts whose numbers are old are asked for their quota; 0 switches it off.",
            _ZERO_OFF, _seconds(zero=True),
        ),
        Key(
            "health-check-max-failures", 3, True,
            "Refusals in a row until an account is taken out; it is never deleted.",
            "a whole number from 1 to 100", _whole(1, 100),
        ),
        Key(
            "health-check-concurrency", 5, True,
            "How many accounts are checked at a time.",
            "a whole number from 1 to 1000", _whole(1, 1000),
        ),
        Key(
            "refresh-concurrency", 50, True,
            "How many token exchanges run at a time.",
            "a whole number from 1 to 1000", _whole(1, 1000),
        ),
        Key(
            "api-keys", [], True,
            "Keys that clients send, with or without a name; while no `admin-key` is set they also open the page, /stats, /accounts, /requests, /why, /metrics, /refresh and /check-quota.",
            'a list of keys, a list of "name: key", or a mapping of names to keys, each in quotes', _api_keys,
            kind="list", secret=True,
        ),
        Key(
            "admin-key", "", True,
            "Opens the page, /stats, /accounts, /requests, /why, /metrics, /refresh and /check-quota, and the routes that change an account; from then on `api-keys` do not.",
            f"empty, or at least {MIN_ADMIN_KEY} characters without spaces, in quotes", _admin_key, secret=True,
        ),
        Key(
            "ui", "on", True,
            "The page at /ui; it asks for a key wherever clients need one.",
            "on or off", _on_or_off,
        ),
        Key(
            "auth", "keys", False,
            "`none` lets everyone in who reaches the port; only for a network that is closed otherwise.",
            "keys or none", _choice("keys", "none"),
        ),
        Key(
            "allowed-hosts", [], True,
            "More host names under which clients on loopback without a key may call us.",
            "a list of host names or addresses, without scheme, port and path", _hosts, kind="list",
        ),
        Key(
            "trusted-proxies", [], True,
            "Relays in front of the proxy whose `X-Forwarded-For` is believed, where it matters from which address a request comes.",
            "a list of addresses or networks such as 10.0.0.0/8", _networks, kind="list",
        ),
        Key(
            "connect-timeout", 10, True,
            "How long a connection to the backend may take; raise it behind a slow proxy.",
            _POSITIVE, _seconds(zero=False),
        ),
        Key(
            "first-byte-timeout", 120, True,
            "How long an attempt may stay silent before another account is tried.",
            _POSITIVE, _seconds(zero=False),
        ),
        Key(
            "compact-timeout", 600, True,
            "The same for compaction, which answers only when it is done.",
            _POSITIVE, _seconds(zero=False),
        ),
        Key(
            "idle-timeout", 300, True,
            "How long a stream may pause between two events before it is given up.",
            _POSITIVE, _seconds(zero=False),
        ),
        Key(
            "keep-alive-after", 15, True,
            "Silence after which a waiting client gets a sign of life; lower it behind an impatient proxy.",
            _POSITIVE, _seconds(zero=False),
        ),
        Key(
            "hold-created", 60, True,
            "How long a Responses client waits for its status: until then another account may still take over.",
            _POSITIVE, _seconds(zero=False),
        ),
        Key(
            "max-body-bytes", "64MiB", True,
            "Largest request body, counted after decompression too.",
            "bytes or a size such as 64MiB, from 1KiB to 4GiB", _size(2**10, 2**32),
        ),
        Key(
            "compress-uploads", "off", True,
            "Whether turns of 64 KiB and more go to the backend compressed, as the Codex CLI sends its own: a quarter of the bytes, for 6 ms of CPU per MB.",
            "off or zstd", _off_or("zstd"),
        ),
        Key(
            "enable-websocket", True, True,
            "Serve Responses over WebSocket; false where something in front of the proxy breaks them, and clients use HTTP.",
            "true or false", _switch,
        ),
        Key(
            "strategy", "horizon", True,
            "Which account serves a new conversation; `horizon` spends first what expires first, see docs/scheduling.md.",
            "horizon, quota-balance, round-robin, fill-first or weighted", _choice(*STRATEGIES),
        ),
        Key(
            "max-concurrency", 0, True,
            "How many requests one account carries at a time, unless its file says it; 0 is any number.",
            "a whole number from 0 to 10000; 0 is any number", _whole(0, 10_000),
        ),
        Key(
            "queue-timeout", 30, True,
            "How long a request waits while every account that could serve it carries its `max-concurrency`, or while its key may have no more under way; 0 refuses at once.",
            "seconds from 0, or a time such as 90s, 5m, 1h", _seconds(zero=True),
        ),
        Key(
            "session-affinity", True, True,
            "Keep a conversation on its account, so that its prompt cache is hit; false spreads every request anew.",
            "true or false", _switch,
        ),
        Key(
            "session-affinity-ttl", "6h", True,
            "How long after its last turn a conversation's account is remembered.",
            _POSITIVE, _seconds(zero=False),
        ),
        Key(
            "pool-limits", "show", True,
            "Whether Codex clients see the pool's quota in headers and events, or no quota at all.",
            "show or hide", _choice("show", "hide"),
        ),
        Key(
            "keepalive-interval", 60, True,
            "How often a connection to the backend is kept warm, so that the next request need not wait for one; 0 switches it off.",
            _ZERO_OFF, _seconds(zero=True),
        ),
        Key(
            "drain-timeout", 120, True,
            "How long a stopping daemon lets running streams end.",
            "seconds from 0, or a time such as 90s, 5m, 1h", _seconds(zero=True),
        ),
        Key(
            "originator", "codex_proxy", True,
            "How we name ourselves to the backend for clients other than the Codex CLI.",
            "1 to 64 letters, digits, spaces and . _ - /", _header(r"[A-Za-z0-9][A-Za-z0-9 ._/-]{0,63}"),
        ),
        Key(
            "user-agent", f"codex-proxy/{__version__}", True,
            "The User-Agent that goes with `originator`.",
            "1 to 200 printable ASCII characters", _header(r"[!-~]([ -~]{0,198}[!-~])?"),
        ),
        Key(
            "model-profiles", {}, True,
            "Wire shape of a model where the backend's own list is wrong or silent.",
            "a mapping of model ids to standard or lite", _profiles, kind="mapping",
        ),
        Key(
            "model-map", {}, True,
            "Names that stand for your models, such as `claude-*`; goes before the built-in map of Claude's names.",
            "a mapping of names (* stands for anything) to a model, with an effort if you like, or to a list of models of which the first that is served counts",
            _model_map, kind="mapping",
        ),
        Key(
            "models-client-version", "0.169.0", True,
            "The client version for which the backend's model list is asked; newer models may need a newer one.",
            "a version such as 0.169.0, in quotes", _version,
        ),
        Key(
            "records", "on", True,
            "Keep what became of each request, never what was said, in `records.db` in data-dir; off keeps the last ones in memory alone.",
            "on or off", _on_or_off,
        ),
        Key(
            "records-max-age", "30d", True,
            "How long a request's record is kept.",
            f"{_POSITIVE}, up to 3650d", _long_seconds,
        ),
        Key(
            "records-max-size", "512MiB", True,
            "How large records.db may grow; past it the oldest records go.",
            "bytes or a size such as 512MiB, from 4MiB to 1024GiB", _size(2**22, 2**40),
        ),
        Key(
            "capture", [], True,
            "Names of client keys whose prompts and answers are stored too, with their records: everything that they say is then in a file on this machine.",
            "a list of names out of `api-keys`; `local` is who needs no key", _names, kind="list",
        ),
        Key(
            "capture-limit", "64KiB", True,
            "How much is stored of each prompt and of each answer.",
            "bytes or a size such as 64KiB, from 1KiB to 1MiB", _size(2**10, 2**20),
        ),
        Key(
            "capture-max-age", "1d", True,
            "How long prompts and answers are stored.",
            f"{_POSITIVE}, up to 3650d", _long_seconds,
        ),
        Key(
            "ledger", "off", False,
            "Client keys with owners, limits and usage in `ledger.db` in data-dir: `personal` counts what each uses, `billing` also takes what it costs from its user's balance.",
            "off, personal or billing", _off_or("personal", "billing"),
        ),
        Key(
            "database-url", "", False,
            "A PostgreSQL database for the ledger, in the place of `ledger.db`; needs `pip install 'codex-proxy[postgres]'`.",
            "empty, or a URL such as postgresql://user:password@host/name", _database_url, secret=True,
        ),
        Key(
            "max-turns", 0, True,
            "How many requests may be under way at a time with a `ledger`, of all callers together; more wait up to `queue-timeout`, and who has the fewest goes first.",
            "a whole number from 0 to 100000; 0 is any number", _whole(0, 100_000),
        ),
        Key(
            "reserve-tokens", 8192, True,
            "How many tokens of an answer are set aside from a balance or a budget before a request begins, and again each time they are nearly used up.",
            "a whole number from 256 to 1000000", _whole(256, 1_000_000),
        ),
    )
}  # fmt: skip


def _default(name: str) -> Any:
    key = KEYS[name]
    return key.parse(key.default)


@dataclass(slots=True, frozen=True)
class Settings:
    """All settings at one moment; `Settings()` is the defaults. Times are seconds."""

    listen: str = _default("listen")
    auth_dir: Path = field(default_factory=lambda: _default("auth-dir"))
    data_dir: Path = field(default_factory=lambda: _default("data-dir"))
    base_url: str = _default("base-url")
    """Without a slash at the end."""
    oauth_issuer: str = _default("oauth-issuer")
    proxy_url: str = field(default=_default("proxy-url"), repr=False)
    """May hold a password: show `mask_url` of it."""
    upstream_transport: str = _default("upstream-transport")
    """One of `TRANSPORTS`."""
    upstreams: tuple[Upstream, ...] = _default("upstreams")
    accounts_priority: int = _default("accounts-priority")
    log_level: str = _default("log-level")
    """One of debug, info, warn, error."""
    log_format: str = _default("log-format")
    """`text` or `json`."""
    metrics: str = _default("metrics")
    """`keyed`, `open` or `off`."""
    telemetry: str = _default("telemetry")
    """`off` or `otlp`."""
    telemetry_endpoint: str = _default("telemetry-endpoint")
    alerts: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: _default("alerts"))
    """The options of each alert that is on; shares are 0..1, times seconds."""
    alert_webhooks: tuple[Webhook, ...] = _default("alert-webhooks")
    refresh_interval: float = _default("refresh-interval")
    max_retry: int = _default("max-retry")
    health_check_interval: float = _default("health-check-interval")
    health_check_max_failures: int = _default("health-check-max-failures")
    health_check_concurrency: int = _default("health-check-concurrency")
    refresh_concurrency: int = _default("refresh-concurrency")
    api_keys: tuple[ApiKey, ...] = _default("api-keys")
    admin_key: ApiKey | None = None
    ui: str = _default("ui")
    """`on` or `off`."""
    auth: str = _default("auth")
    """`keys` or `none`."""
    allowed_hosts: tuple[str, ...] = _default("allowed-hosts")
    """Lower case, without brackets and port."""
    trusted_proxies: tuple[Network, ...] = _default("trusted-proxies")
    connect_timeout: float = _default("connect-timeout")
    first_byte_timeout: float = _default("first-byte-timeout")
    compact_timeout: float = _default("compact-timeout")
    idle_timeout: float = _default("idle-timeout")
    keep_alive_after: float = _default("keep-alive-after")
    hold_created: float = _default("hold-created")
    max_body_bytes: int = _default("max-body-bytes")
    compress_uploads: str = _default("compress-uploads")
    """`off` or `zstd`."""
    enable_websocket: bool = _default("enable-websocket")
    strategy: str = _default("strategy")
    """One of `STRATEGIES`."""
    max_concurrency: int = _default("max-concurrency")
    queue_timeout: float = _default("queue-timeout")
    session_affinity: bool = _default("session-affinity")
    session_affinity_ttl: float = _default("session-affinity-ttl")
    pool_limits: str = _default("pool-limits")
    """`show` or `hide`."""
    keepalive_interval: float = _default("keepalive-interval")
    drain_timeout: float = _default("drain-timeout")
    originator: str = _default("originator")
    user_agent: str = _default("user-agent")
    model_profiles: Mapping[str, str] = field(default_factory=lambda: _default("model-profiles"))
    model_map: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _default("model-map"))
    """Model id to `standard` or `lite`."""
    models_client_version: str = _default("models-client-version")
    records: str = _default("records")
    """`on` or `off`."""
    records_max_age: float = _default("records-max-age")
    records_max_size: int = _default("records-max-size")
    capture: tuple[str, ...] = _default("capture")
    """Names of callers."""
    capture_limit: int = _default("capture-limit")
    capture_max_age: float = _default("capture-max-age")
    ledger: str = _default("ledger")
    """`off`, `personal` or `billing`."""
    database_url: str = field(default=_default("database-url"), repr=False)
    """May hold a password."""
    max_turns: int = _default("max-turns")
    """0 is any number."""
    reserve_tokens: int = _default("reserve-tokens")

    @property
    def listen_host(self) -> str | None:
        """The host to bind; None is every interface, as asyncio understands it."""
        return _split_listen(self.listen)[0] or None

    @property
    def listen_port(self) -> int:
        """The port to bind; 0 is any free one."""
        return _split_listen(self.listen)[1]

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine can reach us."""
        host = self.listen_host
        return host is not None and _is_loopback(host)


@functools.lru_cache(maxsize=8)
def _is_loopback(host: str) -> bool:
    if host.lower().removesuffix(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def masked_upstream(upstream: Upstream) -> dict[str, object]:
    """Return what is said of an upstream as one would write it, without its key."""
    shown: dict[str, object] = {
        name: getattr(upstream, name.replace("-", "_")) for name in _UPSTREAM_FIELDS if name != "models"
    }
    shown["api-key"] = "***" if upstream.api_key else ""
    shown["models"] = [name if not theirs else {name: theirs} for name, theirs in upstream.models]
    shown["capabilities"] = list(upstream.capabilities)
    return shown


def masked(settings: Settings) -> dict[str, object]:
    """Return the settings by key as one would write them, secrets masked."""
    shown: dict[str, object] = {}
    for key in KEYS.values():
        value = getattr(settings, key.field)
        if key.name == "api-keys":
            value = [{entry.name: "***"} for entry in settings.api_keys]
        elif key.name == "admin-key":
            value = "***" if settings.admin_key is not None else ""
        elif key.name == "proxy-url":
            value = mask_url(settings.proxy_url)
        elif key.name == "alert-webhooks":
            value = [
                {"name": one.name, "shape": one.shape, "url": mask_url(one.url)}
                for one in settings.alert_webhooks
            ]
        elif key.name == "upstreams":
            value = [masked_upstream(one) for one in settings.upstreams]
        elif key.name == "alerts":
            value = {name: settings.alerts.get(name, "off") for name in ALERTS}
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = dict(value)
        shown[key.name] = value
    return shown


# --- keys of the Go daemon that we do not have: they warn, and say what to do

_LOGS = "logs go to stderr, as text or as JSON (log-format); let systemd, Docker or a redirection keep and rotate them"
_DATABASE = "accounts are files in auth-dir; move database accounts there with the Go daemon's -tojson first"
_POOL = "outbound connections are kept and sized by the daemon itself"
_INBOUND = "slow and idle clients are closed by built-in deadlines"
_POLICY = "what follows from a refusal is decided by one table of states, and no account file is ever deleted"
_REFRESH = (
    "a token is refreshed by its own timer, one exchange at a time; refresh-concurrency bounds them all"
)
_PROMPT = "prompts and reported usage are passed on as they are"
_SCAN = "auth-dir is watched and loaded without tuning"

_GO_KEYS: tuple[tuple[str, str], ...] = (
    ("accounts", "the Go daemon never read it either; put account files into auth-dir"),
    (
        "db-enabled db-driver db-host db-port db-user db-password db-name db-sslmode db-dsn "
        "db-max-open-conns db-max-idle-conns db-conn-max-lifetime-sec",
        _DATABASE,
    ),
    ("backend-domain", "write the whole address as base-url"),
    ("backend-resolve-address", "use proxy-url, or name the address in the hosts file of the machine"),
    (
        "log-color log-report-caller log-dir log-max-size-mb log-max-backups log-max-age-days "
        "log-compress log-separate-error-file",
        _LOGS,
    ),
    (
        "debug-upstream-stream debug-ws-stream",
        "bodies are never logged; each turn has a line that says what was tried and why",
    ),
    (
        "enable-healthy-retry empty-retry-max",
        "another account is tried until something of an answer came; see max-retry",
    ),
    ("selector", "use strategy: round-robin, or quota-balance for what quota-first meant"),
    (
        "enable-429-concurrent-retry concurrent-retry-429-timeout-sec",
        "a used-up account is left at once for the next one, without racing them",
    ),
    ("quota-precheck", "quota is read from every answer, so asking before a request is not needed"),
    ("disable-auth-401-remove", "always on: no account file is ever deleted"),
    ("auth-401-sync-refresh-concurrency", _REFRESH),
    ("refresh-single-timeout-sec refresh-batch-size", _REFRESH),
    ("cooldown-401-sec cooldown-429-sec", "cooldowns follow what the backend says, else a growing pause"),
    (
        "refresh-http-429-action quota-http-429-action quota-http-status-actions refresh-http-status-policy "
        "quota-http-status-policy",
        _POLICY,
    ),
    ("quota-check-concurrency", "health-check-concurrency bounds quota questions"),
    ("quota-check-cache-ttl-sec", "quota has an age and is renewed by every answer"),
    ("disabled-recovery-interval-sec", "resting accounts are asked again each health-check-interval"),
    (
        "health-check-start-delay health-check-batch-size health-check-request-timeout",
        "checks cost no tokens; see health-check-interval and health-check-concurrency",
    ),
    (
        "startup-async-load startup-load-retry-interval startup-load-batch-size auth-scan-interval save-workers",
        _SCAN,
    ),
    ("shutdown-timeout", "it had no effect in the Go daemon; ours is drain-timeout"),
    (
        "max-conns-per-host max-idle-conns max-idle-conns-per-host enable-http2 http2-max-conns-per-host-cap "
        "upstream-idle-conn-timeout-sec upstream-pool-auto-scale upstream-pool-max-cap",
        _POOL,
    ),
    ("upstream-tls-handshake-timeout-sec", "it is part of connect-timeout"),
    ("upstream-response-header-timeout-sec", "use first-byte-timeout"),
    (
        "listen-read-header-timeout-sec listen-idle-timeout-sec listen-tcp-keepalive-sec listen-max-header-bytes "
        "listen-concurrency",
        _INBOUND,
    ),
    (
        "enable-listen-h2c h2-max-concurrent-streams",
        "it had no effect in the Go daemon; clients speak HTTP/1.1 to us",
    ),
    ("enable-model-suffix-fast", "the -fast suffix is always on"),
    ("enable-model-suffix-1m", "the -1m suffix changed nothing in the Go daemon"),
    ("enable-model-suffix-image", "use /v1/images/generations, or the image_generation tool"),
    (
        "oauth-callback-port oauth-no-browser enable-codex-login",
        "use codex-proxy login; its callback ports are those that the issuer knows",
    ),
    (
        "cache-spoof-enabled prompt-cache-optimize-enabled prompt-cache-tag prompt-cache-normalize-whitespace "
        "prompt-cache-merge-repeated-blocks prompt-cache-replacements",
        _PROMPT,
    ),
    (
        "codex-fingerprint-mode codex-fingerprint-seed",
        "the proxy says what it is; see originator and user-agent",
    ),
)
GO_KEYS: dict[str, str] = {name: sentence for names, sentence in _GO_KEYS for name in names.split()}
"""Key of the Go daemon -> what replaced it, or why it is not needed."""


# --- reading


@dataclass(slots=True, frozen=True)
class Loaded:
    """Settings with their story."""

    settings: Settings
    warnings: list[str]
    """For the log at start, and for `check`."""
    path: Path | None
    """The configuration file that was read, None when there was none."""
    origins: dict[str, str]
    """Where each key that is not at its default came from."""
    digests: tuple[bytes, ...] = ()
    """What was read, so that a watcher knows whether it changed since."""
    is_blank: bool = True
    """There was no file, or nothing in it."""


@dataclass(slots=True)
class _Reading:
    """One reading of all sources; collects everything that is wrong instead of the first thing."""

    path: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)
    """By field, parsed."""
    origins: dict[str, str] = field(default_factory=dict)
    """By key, broken ones too."""
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """Files that values were read from, beside the configuration file."""
    digests: list[bytes] = field(default_factory=lambda: [_ABSENT])
    """Of the configuration file, then of `files`."""
    is_blank: bool = True
    """The file says nothing at all."""
    again: bool = False
    """Not the first reading: a pipe, which says everything once, says nothing now."""

    def read(self, path: Path | None, environ: Mapping[str, str]) -> None:
        self.path = _which(path, environ)
        if self.path is not None:
            self._read_file(self.path)
        self._read_environment(environ)
        if self.values.get("upstreams"):
            self.values["upstreams"] = tuple([
                self._with_key(one, environ) for one in self.values["upstreams"]
            ])

    def finish(self) -> Loaded:
        """Return what was read.

        Raises:
            ConfigError: With one line for each thing that is wrong.
        """
        if self.errors:
            raise ConfigError("\n".join(self.errors))
        settings = Settings(**self.values)
        warnings = self.warnings + _doubts(settings)
        return Loaded(settings, warnings, self.path, self.origins, tuple(self.digests), self.is_blank)

    def _read_file(self, path: Path) -> None:
        try:
            text, self.digests[0] = _read_text(path, again=self.again)
        except _Unfit as exc:
            self.digests[0] = _digest_of(exc)
            self.errors.append(f"{path}: {exc}")
            return
        self.is_blank = not text.strip()
        try:
            loader = yaml.SafeLoader(text)
            self._read_entries(path, loader, loader.get_single_node())
        except yaml.YAMLError as exc:
            self.errors.append(_yaml_error(path, text, exc))
        except RecursionError:
            self.errors.append(f"{path}: nested too deeply")

    def _read_entries(self, path: Path, loader: yaml.SafeLoader, root: yaml.Node | None) -> None:
        if root is None or (isinstance(root, yaml.ScalarNode) and root.tag.endswith(":null")):
            return
        if not isinstance(root, yaml.MappingNode):
            self.errors.append(
                f"{path}:{_line(root)}: not a mapping of keys to values; want lines like `listen: :8080`"
            )
            return
        lines: dict[str, int] = {}
        for name_node, node in root.value:
            line = _line(name_node)
            if not isinstance(name_node, yaml.ScalarNode):
                self.errors.append(f"{path}:{line}: a key must be a word")
                continue
            name = name_node.value
            if name in lines:
                self.errors.append(
                    f"{path}:{line}: {name} is there twice, in line {lines[name]} and in line {line}"
                )
                continue
            lines[name] = line
            self._read_entry(path, loader, name, node, line)

    def _read_entry(self, path: Path, loader: yaml.SafeLoader, name: str, node: yaml.Node, line: int) -> None:
        where = f"{path}:{line}"
        key = KEYS.get(name) or KEYS.get(name.removesuffix("-file"))
        if key is None:
            if name in GO_KEYS:
                self.warnings.append(
                    f"{where}: {name} is a key of the Go daemon and has no effect: {GO_KEYS[name]}"
                )
            else:
                self.errors.append(f"{where}: unknown key {name!r}{_suggest_key(name)}")
            return
        twice = _duplicate(node)
        if twice is not None:
            self.errors.append(f"{where}: {name}: line {twice} repeats a name that is there already")
            return
        try:
            value = loader.construct_document(node)
        except (yaml.YAMLError, ValueError) as exc:
            # The library quotes what it read, which may be a key that begins with ! or *.
            why = f" ({exc.problem})" if isinstance(exc, yaml.MarkedYAMLError) and not key.secret else ""
            self.errors.append(f"{where}: {name}: not a plain value{why}; put it in quotes; want {key.range}")
            return
        # `api-keys:` with everything below it commented out: as if it were not there.
        if value is not None:
            self._set(key, name, value, where)

    def _read_environment(self, environ: Mapping[str, str]) -> None:
        names = {key.variable: key for key in KEYS.values()}
        names |= {f"{key.variable}_FILE": key for key in KEYS.values()}
        from_environment: dict[str, str] = {}
        for variable in sorted(environ):
            if (
                not variable.startswith(PREFIX)
                or variable == CONFIG_VARIABLE
                or _SERVICE_LINK.fullmatch(variable)
            ):
                continue
            where = f"environment: {variable}"
            key = names.get(variable)
            if key is None:
                self.errors.append(
                    f"{where}: unknown key{_suggest_variable(variable, [*names, CONFIG_VARIABLE])}"
                )
                continue
            text = environ[variable].strip()
            # Compose files and units pass on variables that nobody set as empty ones.
            if not text:
                continue
            if key.name in from_environment:
                self.errors.append(f"{where}: {from_environment[key.name]} is set too; want only one of them")
                continue
            from_environment[key.name] = variable
            if variable == key.variable:
                self._set_text(key, text, where, separator=",")
            else:
                self._set_from_file(key, text, where)

    def _set(self, key: Key, name: str, value: object, where: str) -> None:
        """Take a value of the file; `<key>` and `<key>-file` exclude each other."""
        if key.name in self.origins:
            self.errors.append(
                f"{where}: {key.name} and {key.name}-file are both there; want only one of them"
            )
        elif name == key.name:
            self._take(key, value, where)
        elif isinstance(value, str) and value.strip():
            self._set_from_file(key, value.strip(), where)
        else:
            self.errors.append(f"{where}: {name}: want the path of a file")

    def _set_from_file(self, key: Key, name: str, where: str) -> None:
        path = Path(name).expanduser()
        self.files.append(path)
        try:
            text, digest = _read_text(path, again=self.again)
        except _Unfit as exc:
            self.digests.append(_digest_of(exc))
            self.errors.append(f"{where}: {key.name} from {path}: {exc}")
            return
        self.digests.append(digest)
        text = text.strip()
        if not text:
            # One that somebody is just writing, or forgot to.
            self.errors.append(f"{where}: {key.name} from {path}: is empty")
            return
        self._set_text(key, text, f"{where}: {path}", separator="\n")

    def _with_key(self, upstream: Upstream, environ: Mapping[str, str]) -> Upstream:
        """Read the key of *upstream* where it says that it stands; a changed file counts like a changed setting."""
        where = f"{self.origins['upstreams']}: upstreams: {upstream.name}"
        if upstream.api_key_file:
            source, named = f"api-key-file {upstream.api_key_file}", Path(upstream.api_key_file)
            self.files.append(named)
            try:
                text, digest = _read_text(named, again=self.again)
            except _Unfit as exc:
                self.digests.append(_digest_of(exc))
                self.errors.append(f"{where}: {source}: {exc}; want a file with the key in it")
                return upstream
            self.digests.append(digest)
        elif upstream.api_key_env:
            source, text = f"api-key-env {upstream.api_key_env}", environ.get(upstream.api_key_env, "")
        else:
            return upstream
        try:
            key = _key_text(text)
            if not key:
                raise _Unfit("is empty or not set")
        except _Unfit as exc:
            self.errors.append(f"{where}: {source}: {exc}; want a key without spaces")
            return upstream
        return dataclasses.replace(upstream, api_key=key)

    def _set_text(self, key: Key, text: str, where: str, *, separator: str) -> None:
        """Take a value that is text: a scalar, a list cut at *separator*, a mapping as YAML."""
        value: object = text
        if key.kind == "list":
            items = [item.strip() for item in text.split(separator)]
            value = [item for item in items if item and not (separator == "\n" and item.startswith("#"))]
        elif key.kind == "mapping":
            try:
                value = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError, RecursionError) as exc:
                self.errors.append(f"{where}: {key.name}: not YAML ({type(exc).__name__}); want {key.range}")
                return
        self._take(key, value, where)

    def _take(self, key: Key, value: object, where: str) -> None:
        self.origins[key.name] = where
        try:
            self.values[key.field] = key.parse(value)
        except _Unfit as exc:
            problem = f"{key.name} = {_shown(key, value)}: {exc}"
            self.errors.append(f"{where}: {_USER_INFO.sub('://***@', problem)}; want {key.range}")


def load(path: Path | None, environ: Mapping[str, str]) -> Loaded:
    """Read the settings from all sources.

    Without *path* the file is what `CODEX_PROXY_CONFIG` names, else `./config.yaml` if it is there.

    Raises:
        ConfigError: With one line for each thing that is wrong: place, key, value, what would do.
    """
    reading = _Reading()
    reading.read(path, environ)
    return reading.finish()


def _which(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    if path is not None:
        return path
    if environ.get(CONFIG_VARIABLE, "").strip():
        return Path(environ[CONFIG_VARIABLE].strip()).expanduser()
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def _read_text(path: Path, *, again: bool) -> tuple[str, bytes]:
    """Return what a file says, and its digest.

    Read once for both: a pipe (`-config <(decrypt config)`) gives its contents only once. One
    met *again* is unfit, and opening it must not wait for a writer who never comes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if again else 0))
        with open(descriptor, "rb") as file:
            is_stream = not stat.S_ISREG(os.fstat(descriptor).st_mode)
            if is_stream and again:
                raise _Unfit(_STREAM)
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise _Unfit(f"cannot be read: {exc.strerror or type(exc).__name__}") from exc
    except ValueError as exc:
        raise _Unfit("cannot be read: not a path") from exc
    if len(content) > MAX_FILE_BYTES:
        raise _Unfit("cannot be read: larger than 1 MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise _Unfit(f"line {line} is not UTF-8") from exc
    return text, _STREAM.encode() if is_stream else hashlib.sha256(text.encode()).digest()


def _digest(path: Path) -> bytes:
    try:
        return _read_text(path, again=True)[1]
    except _Unfit as exc:
        return _digest_of(exc)


def _digest_of(problem: _Unfit) -> bytes:
    return str(problem).encode()


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def _duplicate(root: yaml.Node) -> int | None:
    """Return the line of a name that a mapping in *root* has twice; YAML itself lets the last one win."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            names: set[Hashable] = set()
            for name_node, value_node in node.value:
                if isinstance(name_node, yaml.ScalarNode):
                    if name_node.value in names:
                        return _line(name_node)
                    names.add(name_node.value)
                waiting.append(value_node)
    return None


def _yaml_error(path: Path, text: str, exc: yaml.YAMLError) -> str:
    if isinstance(exc, ReaderError):
        line = text.count("\n", 0, exc.position) + 1
        return f"{path}:{line}: not YAML: has a control character in it"
    if not isinstance(exc, yaml.MarkedYAMLError) or exc.problem_mark is None:
        return f"{path}: not YAML"
    mark = exc.problem_mark
    problem = exc.problem or "cannot be read"
    # An unquoted client key that begins with * or & is taken for a name, which we must not show.
    if "alias" in problem or "anchor" in problem or "tag" in problem:
        problem = re.sub(r"'.*'", "***", problem) + " (a value that begins with * & or ! needs quotes)"
    if "\\t" in problem:
        problem += " (indent with spaces, not tabs)"
    return f"{path}:{mark.line + 1}:{mark.column + 1}: not YAML: {problem}"


def _suggest_key(name: str) -> str:
    return _suggest(name, [f"{key}-file" for key in KEYS] if "fil" in name.lower() else KEYS)


def _suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown key: the nearest one that we know."""
    plain = {entry.lower().replace("_", "-"): entry for entry in known}
    near = difflib.get_close_matches(name.lower().replace("_", "-"), plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[near[0]]}?" if near else "; docs/configuration.md lists the known keys"


def _suggest_variable(name: str, known: Iterable[str]) -> str:
    # The prefix, which all share, would make everything look alike.
    bare = _suggest(name.removeprefix(PREFIX), [entry.removeprefix(PREFIX) for entry in known])
    return bare.replace("mean ", f"mean {PREFIX}")


# In an address that should have none, or where no address belongs; a password may hold nearly anything.
_USER_INFO = re.compile(r"://\S*@")


def _shown(key: Key, value: object) -> str:
    if key.name == "proxy-url" and isinstance(value, str):
        return repr(mask_url(value))
    if key.secret:
        return "***"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _doubts(settings: Settings) -> list[str]:
    """Return what is allowed but probably not meant."""
    doubts = []
    if settings.auth == "none":
        who = "every program on this machine" if settings.is_loopback else "everyone who reaches the port"
        doubts.append(f"auth: none: {who} can use your accounts")
        if settings.api_keys:
            doubts.append("auth: none: api-keys are not asked for")
    if settings.admin_key is not None and any(
        key.digest == settings.admin_key.digest for key in settings.api_keys
    ):
        doubts.append("admin-key: it is one of api-keys too, so whoever has that one is an administrator")
    if settings.ledger != "off" and settings.admin_key is None:
        whose = "holders of api-keys" if settings.api_keys else "who reaches the page without a key"
        doubts.append(
            f"ledger: {settings.ledger}: without an admin-key it is {whose} who own the page, and the money on it"
        )
    if settings.database_url and settings.ledger == "off":
        doubts.append("database-url: nothing is kept there while the ledger is off")
    if settings.capture:
        names = ", ".join(settings.capture)
        doubts.append(
            f"capture: prompts and answers of {names} are stored in data-dir"
            + ("" if settings.records == "on" else ", but not while records are off")
        )
        known = {key.name for key in settings.api_keys} | {"local", "generated"}
        doubts += [
            f"capture: {name} is no name of a client key, so nothing is stored of it"
            for name in settings.capture
            if name not in known
        ]
    for name, url in (("base-url", settings.base_url), ("oauth-issuer", settings.oauth_issuer)):
        parts = urlsplit(url)
        if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            doubts.append(f"{name}: {url} is not encrypted: tokens can be read on the way")
    for upstream in settings.upstreams:
        if upstream.api_key and _unfit_for_secrets(upstream.base_url):
            doubts.append(
                f"upstreams: {upstream.name}: {upstream.base_url} is not encrypted: its key, and what is asked, can be "
                "read on the way"
            )
    return doubts


# --- live settings

Subscriber = Callable[[Settings, Settings], None]


class Live:
    """Hold the settings that count now.

    Ask `current` at the moment of use and keep no copy: that is what makes an edit count.
    """

    def __init__(self, settings: Settings) -> None:
        self.current = settings
        self._subscribers: list[Subscriber] = []
        self._announced: dict[str, object] = {}
        self.readings: dict[str, int] = {"applied": 0, "broken": 0}
        """How many edits were read, by what came of them."""
        self._pinned: set[str] = set()

    def pin(self, name: str, value: Any) -> None:
        """Have *value* count for a key whatever the file says, then and later: something else decides it."""
        pinned: dict[str, Any] = {KEYS[name].field: value}
        self.current = dataclasses.replace(self.current, **pinned)
        self._pinned.add(name)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call *callback* with old and new settings after a change; the result unsubscribes."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def replace(self, new: Settings) -> list[str]:
        """Take over the live keys of *new* and return the names of those that changed.

        A changed key that needs a restart is named in the log, once per new value.
        """
        old = self.current
        changed: dict[str, Any] = {}
        for key in KEYS.values():
            value = getattr(new, key.field)
            if key.name in self._pinned:
                continue
            if value == getattr(old, key.field):
                self._announced.pop(key.name, None)
            elif key.live:
                changed[key.name] = value
            elif self._announced.get(key.name) != value:
                self._announced[key.name] = value
                logger.warning("setting needs a restart key=%s", key.name)
        if changed:
            self.current = dataclasses.replace(
                old, **{KEYS[name].field: value for name, value in changed.items()}
            )
            for callback in list(self._subscribers):
                callback(old, self.current)
        return list(changed)


@dataclass(slots=True)
class Watcher:
    """Follow the edits of the configuration file and of the files that it names.

    Looks at contents, not at times: that sees an editor that renames over the file, a
    mounted folder, and two edits within one tick of the file system's clock.
    """

    live: Live
    path: Path | None
    environ: Mapping[str, str]
    since: InitVar[Loaded | None] = None
    """What `live` was made from; an edit made since then counts too."""
    _files: tuple[Path, ...] = ()
    _applied: tuple[bytes, ...] = ()
    _seen: tuple[bytes, ...] = ()
    _had_content: bool = False
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self, since: Loaded | None) -> None:
        reading = self._read()
        self._had_content = not reading.is_blank
        if since is not None:
            self._applied = since.digests
            self._had_content = not since.is_blank

    def look(self, *, at_once: bool = False) -> Loaded | None:
        """Return settings to apply when the files have changed and are at rest, else None.

        A broken edit is logged, once per content, and changes nothing.

        Args:
            at_once: Somebody says that they are: what they say counts.
        """
        digests = self._digests()
        settled, self._seen = digests == self._seen, digests
        if not at_once and (digests == self._applied or not settled):
            return None
        reading = self._read()
        try:
            if self._had_content and reading.is_blank and not reading.errors:
                raise ConfigError(f"{reading.path or self.path or DEFAULT_FILE}: is empty or gone")
            loaded = reading.finish()
        except ConfigError as exc:
            self.live.readings["broken"] += 1
            for line in exc.message.splitlines():
                logger.error("configuration is broken, the old settings stay: %s", line)
            return None
        self._had_content = not reading.is_blank
        return loaded

    async def follow(self, *, at_once: bool = False) -> None:
        """Look, in a thread, because the folder may be a network mount that hangs; apply what is new."""
        async with self._looking:
            loaded = await asyncio.to_thread(self.look, at_once=at_once)
            if loaded is not None:
                self.apply(loaded)

    def apply(self, loaded: Loaded) -> list[str]:
        """Put *loaded* into effect and log what changed."""
        for warning in loaded.warnings:
            logger.warning("configuration: %s", warning)
        changed = self.live.replace(loaded.settings)
        self.live.readings["applied"] += 1
        logger.info("configuration read again changed=%s", ",".join(changed) or "nothing")
        return changed

    def _read(self) -> _Reading:
        reading = _Reading(again=True)
        reading.read(self.path, self.environ)
        self._files = tuple(reading.files)
        self._applied = self._seen = tuple(reading.digests)
        return reading

    def _digests(self) -> tuple[bytes, ...]:
        main = _which(self.path, self.environ)
        return (_ABSENT if main is None else _digest(main), *map(_digest, self._files))


async def watch(
    live: Live,
    path: Path | None,
    environ: Mapping[str, str],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    *,
    since: Loaded | None = None,
) -> None:
    """Follow edits until cancelled; with *since* those between that reading and now too."""
    await keep_following(await asyncio.to_thread(Watcher, live, path, environ, since), sleep)


async def keep_following(watcher: Watcher, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Follow edits with *watcher* until cancelled."""
    while True:
        await sleep(POLL_SECONDS)
        try:
            await watcher.follow()
        except Exception:
            logger.exception("following the configuration failed")


# --- documentation, made from the tables


def render_keys() -> str:
    """Return the table of all keys in Markdown."""
    lines = ["| key | default | what fits | an edit counts | what it is |", "|---|---|---|---|---|"]
    for key in KEYS.values():
        default = "empty" if key.default in ("", [], {}) else f"`{key.default}`"
        if isinstance(key.default, bool):
            default = f"`{str(key.default).lower()}`"
        if key.name == "user-agent":
            default = "`codex-proxy/<version>`"
        lines.append(f"| `{key.name}` | {default} | {key.range} | {key.takes_effect} | {key.doc} |")
    return "\n".join(lines)


def render_go_keys() -> str:
    """Return the table of the Go daemon's keys in Markdown."""
    lines = ["| key of the Go daemon | instead |", "|---|---|"]
    for names, sentence in _GO_KEYS:
        lines.append(f"| {', '.join(f'`{name}`' for name in names.split())} | {sentence} |")
    return "\n".join(lines)


def render_docs(text: str) -> str:
    """Return a document with its generated tables renewed.

    They stand between `<!-- keys -->` or `<!-- go-keys -->` and `<!-- end -->`.
    """
    for name, table in (("keys", render_keys()), ("go-keys", render_go_keys())):
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda match, table=table: f"{match[1]}{table}\n{match[2]}",  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        document = Path(argument)
        document.write_text(render_docs(document.read_text(encoding="utf-8")), encoding="utf-8")
