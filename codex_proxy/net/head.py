"""The heads of HTTP/1.1 messages as bytes: ours are written, the other side's are read strictly.

Nothing is guessed. Whatever two readers could take for two things (folded lines, lone CR or LF,
a length said twice, or beside chunks) is refused: an answer that is framed otherwise than we think
is another request's answer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import yarl

from codex_proxy.net.answer import MAX_HEAD_SIZE

CHUNKED: Final = -1
"""A body in chunks, which say its end themselves."""
TO_THE_END: Final = -2
"""A body that ends with its connection."""

END = b"\r\n\r\n"


class BadHead(Exception):
    """What came is no head of an answer; the text never quotes it."""


# -- requests ----------------------------------------------------------------------------

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_METHOD = re.compile(r"[A-Z]+")
_TARGET = re.compile(r"/[\x21-\x7e]*")

_MAX_NAMES = 1024
"""How many names of fields are remembered as good; callers name some of them."""

# Ours to say: two of them in one request are two requests for somebody.
_FRAMING = frozenset({"content-length", "transfer-encoding"})

_prefixes: dict[str, str] = {}


def _prefix(name: str) -> str:
    if not _NAME.fullmatch(name) or name.lower() in _FRAMING:
        raise ValueError("a header's name cannot be sent")
    if len(_prefixes) >= _MAX_NAMES:
        _prefixes.clear()
    prefix = _prefixes[name] = f"{name}: "
    return prefix


@dataclass(slots=True, frozen=True)
class Place:
    """Where a request goes."""

    is_tls: bool
    host: str
    port: int


@dataclass(slots=True, frozen=True)
class Address:
    """A URL, taken apart."""

    place: Place
    authority: str
    """What the `Host` field says."""
    target: str


def address_of(url: str) -> Address:
    """Take *url* apart.

    Raises:
        ValueError: If it is none that can be called.
    """
    parsed = yarl.URL(url, encoded=True)
    if parsed.scheme not in ("http", "https") or not parsed.raw_host or not parsed.port:
        raise ValueError("not an http or https URL with a host")
    target = parsed.raw_path_qs or "/"
    if not _TARGET.fullmatch(target) or not parsed.raw_host.isascii():
        raise ValueError("a URL with characters that cannot be sent")
    place = Place(parsed.scheme == "https", parsed.raw_host, parsed.port)
    return Address(place, parsed.host_port_subcomponent or parsed.raw_host, target)


def encode_request(method: str, address: Address, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """Return the head of a request; its body is not compressed, and asks for none that is.

    Raises:
        ValueError: If a field cannot be sent: it would end its line, or say where the body ends.
    """
    known = _prefixes
    lines = [f"{method} {address.target} HTTP/1.1"]
    has_host = accepts = False
    for name, value in headers.items():
        lines.append((known.get(name) or _prefix(name)) + value)
        if len(name) == 4:
            has_host = has_host or name.lower() == "host"
        elif len(name) == 15:
            accepts = accepts or name.lower() == "accept-encoding"
    if not has_host:
        lines.append("Host: " + address.authority)
    if not accepts:
        # Compressed streams would sit in a decoder's buffer; nobody gains by them here.
        lines.append("Accept-Encoding: identity")
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    elif method not in _BODILESS:
        lines.append("Content-Length: 0")
    said = "".join(lines)
    if "\n" in said or "\r" in said or "\0" in said:
        raise ValueError("a header's value cannot be sent")
    if method not in _BODILESS and not _METHOD.fullmatch(method):
        raise ValueError("a method that cannot be sent")
    lines += ("", "")
    return "\r\n".join(lines).encode()


_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "DELETE"})


# -- answers -----------------------------------------------------------------------------


@dataclass(slots=True)
class Head:
    """The head of an answer."""

    status: int
    headers: dict[str, str]
    length: int
    """How long the body is, or `CHUNKED`, or `TO_THE_END`."""
    keeps_alive: bool
    """Whether the connection serves another request after this one."""


_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: .*)?", re.DOTALL)
_START = b"HTTP/1."
_LENGTH = re.compile(r"[0-9]{1,18}")
# All of ASCII that no line may hold but CR and LF, which end it, and the tab.
_CONTROLS = bytes(byte for byte in (*range(32), 127) if byte != 9)
_LONE_LF = re.compile(rb"(?<!\r)\n")

_keys: dict[str, str] = {}


def _key(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise BadHead("a field of its head has no name")
    if len(_keys) >= _MAX_NAMES:
        _keys.clear()
    key = _keys[name] = name.lower()
    return key


def check_begun(part: bytes, seen: int) -> None:
    """Look at a head that is not whole yet, and of which *seen* bytes have been looked at before.

    Raises:
        BadHead: If it will never be one.
    """
    if part[: len(_START)] != _START[: len(part)]:
        raise BadHead("what it sent is not HTTP/1")
    if len(part) > MAX_HEAD_SIZE:
        raise BadHead(f"the head of its answer is larger than {MAX_HEAD_SIZE} bytes")
    if _LONE_LF.search(part, seen):
        raise BadHead("a line of its head ends without CR")


def parse_head(raw: bytes, method: str) -> Head:
    """Read the head of an answer to *method*: all before the empty line.

    Raises:
        BadHead: If it is none, or leaves open where the body ends.
    """
    text = raw.decode("utf-8", "surrogateescape")
    lines = text.split("\r\n")
    if len(raw.translate(None, _CONTROLS)) != len(raw) - 2 * (len(lines) - 1):
        raise BadHead("its head holds control characters")
    first = _STATUS_LINE.fullmatch(lines[0])
    if first is None:
        raise BadHead("what it sent is not HTTP/1")
    known, headers = _keys, dict[str, str]()
    del lines[0]
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadHead("a field of its head has no value")
        headers[known.get(name) or _key(name)] = value.strip(" \t")
    status = int(first[2])
    is_old = first[1] == "0"
    says_once = len(headers) == len(lines) or _check_doubles(lines)
    length = _length(headers, is_old)
    if method == "HEAD" or status < 200 or status in (204, 304):
        length = 0
    wish = headers.get("connection")
    words = [word.strip() for word in wish.lower().split(",")] if wish is not None else ()
    stays = "keep-alive" in words if is_old else "close" not in words
    return Head(status, headers, length, stays and says_once and length != TO_THE_END)


def _check_doubles(lines: list[str]) -> bool:
    """Tell whether the fate of the connection is said once at most; what else must be said once is checked."""
    names = [line.partition(":")[0].lower() for line in lines]
    if any(names.count(name) > 1 for name in (*_FRAMING, "content-encoding")):
        raise BadHead("its head says twice how its body is to be read")
    return names.count("connection") <= 1


def _length(headers: dict[str, str], is_old: bool) -> int:
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or is_old or coding.lower() != "chunked":
            raise BadHead("its head leaves open where its body ends")
        return CHUNKED
    if length is None:
        return TO_THE_END
    if not _LENGTH.fullmatch(length):
        raise BadHead("its head says no length of its body")
    return int(length)
