"""Heads of answers that are passed on: read as strictly as our own, and kept as the bytes they are.

A relay needs little of a head, so no field is taken apart but those that say how the connection is used and where
the body ends. The others are looked at by one pattern, all together.
"""

import re
from dataclasses import dataclass
from typing import Final

from codex_proxy.net.head import CHUNKED, TO_THE_END, BadHead

SWITCHING: Final = 101

_UPGRADE_REQUIRED = 426

_FIRST = re.compile(rb"HTTP/1\.([01]) (([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?)")
_FIELDS = re.compile(rb"(?:\r\n[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*)*")
_TELLING = re.compile(
    rb"\r\n(content-length|transfer-encoding|connection|keep-alive|proxy-connection|te|upgrade):([^\r]*)",
    re.IGNORECASE,
)
_LENGTH = re.compile(rb"[0-9]{1,18}")

# What these name is how a connection is used, and goes with it.
_USES = frozenset({b"close", b"keep-alive", b"upgrade", b""})

# Whoever lists one of these has a message end elsewhere for us than for the next one.
NEVER_NAMED: Final = frozenset({b"content-length", b"transfer-encoding", b"host"})


@dataclass(slots=True)
class PassedHead:
    """The head of an answer to somebody else's request."""

    status: int
    status_text: bytes
    """Number and reason."""
    fields: bytes
    """What goes on, each with the line break before it; the framing of the body among it."""
    length: int
    """How long the body is, or `CHUNKED`, or `TO_THE_END`."""
    keeps_alive: bool
    """Whether the connection serves another request after this one."""


def named_by(value: bytes) -> set[bytes]:
    """Return the fields that a `Connection` field takes with it."""
    return {word.strip(b" \t").lower() for word in value.split(b",")} - NEVER_NAMED


def read_head(raw: bytes, method: str) -> PassedHead:
    """Read the head of an answer to *method*: all before the empty line.

    Raises:
        BadHead: If it is none, or leaves open where the body ends.
    """
    first = _FIRST.match(raw)
    start = first.end() if first is not None else 0
    if first is None or _FIELDS.fullmatch(raw, start) is None:
        raise BadHead("what it sent is no head of HTTP/1")
    is_old, status = first[1] == b"0", int(first[3])
    lengths: list[bytes] = []
    codings: list[bytes] = []
    named: set[bytes] = set()
    kept: list[bytes] = []
    at = start
    for match in _TELLING.finditer(raw, start):
        name = match[1].lower()
        if name == b"content-length":
            lengths.append(match[2].strip(b" \t"))
            continue
        if name == b"transfer-encoding":
            codings.append(match[2].strip(b" \t").lower())
            continue
        if name == b"connection":
            named |= named_by(match[2])
        elif name == b"upgrade" and status in (SWITCHING, _UPGRADE_REQUIRED):
            continue
        kept.append(raw[at : match.start()])
        at = match.end()
    kept.append(raw[at:])
    fields = b"".join(kept) if at != start else raw[start:]
    if not named <= _USES:
        fields = without(fields, named)
    is_bodiless = method == "HEAD" or status < 200 or status in (204, 304)
    length = _length(lengths, codings, is_old)
    if is_bodiless:
        if codings:
            # There is no body whose coding it could be.
            fields = without(fields, {b"transfer-encoding"})
        length = 0
    stays = b"keep-alive" in named if is_old else b"close" not in named
    return PassedHead(status, first[2], fields, length, stays and length != TO_THE_END)


def without(fields: bytes, names: set[bytes]) -> bytes:
    """Return *fields* without those of these names, in lower case."""
    lines = fields.split(b"\r\n")
    return b"\r\n".join([line for line in lines if line[: line.find(b":")].lower() not in names])


def _length(lengths: list[bytes], codings: list[bytes], is_old: bool) -> int:
    if codings:
        if lengths or is_old or codings != [b"chunked"]:
            raise BadHead("its head leaves open where its body ends")
        return CHUNKED
    if not lengths:
        return TO_THE_END
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise BadHead("its head says no length of its body")
    return int(lengths[0])
