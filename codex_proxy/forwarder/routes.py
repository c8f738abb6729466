"""Where a request goes: the route that its path names, and which of the route's upstreams comes first.

Pure. Nothing is remembered: the same caller finds the same upstream because the same numbers come out, on every
relay that has the same upstreams, and when one is taken away only its own callers move.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from codex_proxy.addresses import why_not
from codex_proxy.net.head import Address, Place, address_of

MAX_UID = 999_999_999

# `/u7/v1/...` is route 7, `/v1/...` the default one; a number has one way to be written.
_TARGET = re.compile(r"(?:/u(0|[1-9][0-9]{0,8}))?(/v1(?:[/?][^#]*)?)")

# A segment that many servers take for the folder above, or for none: whole, spelled out, or with what they cut off.
_SLASH, _DOT, _END = r"(?:[/\\]|%2f|%5c)", r"(?:\.|%2e)", r"(?:[;?]|%3b|%3f|%23|%00|$)"
_CLIMBS = re.compile(rf"{_SLASH}{_DOT}{{1,2}}(?={_SLASH}|{_END})", re.IGNORECASE)

# yarl takes more for a host than a name may have.
_TYPED = re.compile(r"[\x21-\x7e]+")

# The names by which clients call one conversation, the most telling first.
_SESSION_FIELDS = (
    b"x-session-affinity",
    b"session-id",
    b"session_id",
    b"thread-id",
    b"conversation_id",
    b"x-session-id",
    b"x-claude-code-session-id",
)
_KEY_FIELDS = (b"authorization", b"x-api-key")


@dataclass(slots=True, frozen=True)
class Upstream:
    """A far server."""

    place: Place
    authority: bytes
    prefix: bytes
    """What stands before `/v1` in its paths."""

    @property
    def name(self) -> str:
        """What it is called in logs: no path, which may hold a secret."""
        return self.authority.decode("ascii")

    @property
    def url(self) -> str:
        """Where it is, without its path."""
        return f"{'https' if self.place.is_tls else 'http'}://{self.name}"


def upstream_of(url: str) -> Upstream:
    """Read the address of an upstream, which may or may not end with `/v1`.

    Raises:
        ValueError: With what is wrong, if it is none.
    """
    try:
        if _TYPED.fullmatch(url) is None:
            raise ValueError
        address: Address = address_of(url)
    except ValueError:
        raise ValueError("is no http:// or https:// address of a server") from None
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise ValueError("holds a name or password, which callers send by themselves")
    if "?" in url or "#" in url:
        raise ValueError("holds a query; an address ends with its path")
    if reason := why_not(address.place.host):
        raise ValueError(f"is {reason}, to which nothing is sent")
    prefix = address.target.rstrip("/").removesuffix("/v1").rstrip("/")
    return Upstream(address.place, address.authority.encode("ascii"), prefix.encode("ascii"))


@dataclass(slots=True, frozen=True)
class Way:
    """What a path asks for."""

    uid: int | None
    target: str
    """From `/v1` on."""

    @property
    def climbs(self) -> bool:
        """Tell whether a server may find itself outside of `/v1` when it follows the path."""
        return _CLIMBS.search(self.target.partition("?")[0]) is not None


def way_of(target: str) -> Way | None:
    """Return what *target* asks for; None when that is nothing of ours. Nothing in it is tidied up."""
    match = _TARGET.fullmatch(target)
    if match is None:
        return None
    return Way(int(match[1]) if match[1] else None, match[2])


@dataclass(slots=True, frozen=True)
class Routes:
    """The upstreams by route."""

    default: tuple[Upstream, ...]
    by_uid: Mapping[int, tuple[Upstream, ...]]

    def upstreams(self, uid: int | None) -> tuple[Upstream, ...]:
        """Return where requests of *uid* go; one without a route of its own goes where all others do."""
        if uid is None:
            return self.default
        return self.by_uid.get(uid) or self.default

    def all(self) -> list[Upstream]:
        """Return each upstream once."""
        every = [self.default, *self.by_uid.values()]
        return list(dict.fromkeys(one for upstreams in every for one in upstreams))


def affinity(uid: int | None, headers: tuple[tuple[bytes, bytes], ...], address: str) -> bytes:
    """Return what keeps requests together: the uid, and the conversation, else the caller's key, else its address."""
    fields = {name.lower(): value for name, value in headers}
    told = next((fields[name] for name in (*_SESSION_FIELDS, *_KEY_FIELDS) if fields.get(name)), b"")
    return b"%d\0%b" % (-1 if uid is None else uid, told or address.encode("utf-8", "surrogateescape"))


def in_order(upstreams: tuple[Upstream, ...], key: bytes) -> list[Upstream]:
    """Return *upstreams*, the one that *key* belongs to first (rendezvous hashing)."""
    return sorted(
        upstreams,
        key=lambda one: hashlib.blake2b(
            one.url.encode("ascii") + one.prefix + b"\0" + key, digest_size=8
        ).digest(),
        reverse=True,
    )
