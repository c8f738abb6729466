"""The heads of relayed messages: what belongs to one connection is taken out, the rest stays byte for byte.

Fields keep their order, their spelling and their doubles. Out go what says how this one connection is used
(`Connection` and whatever it names, `Keep-Alive`, `TE`, `Upgrade`, ...) and our own key; how the body is framed
is said anew, as it is read.
"""

from collections.abc import Iterable

from codex_proxy.net.passing import SWITCHING, PassedHead, named_by

OWN_KEY = b"x-forward-key"
"""Shows our own key; it never goes on."""

# What a connection keeps to itself. Credentials for a proxy are for the first one on the way, which is us.
_HOP_BY_HOP = frozenset({
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"proxy-authorization",
    b"te",
    b"transfer-encoding",
    b"upgrade",
})
# Trailers of a request are read away by the server; nothing is to announce them.
_NOT_ASKED_ON = _HOP_BY_HOP | {b"host", b"trailer", OWN_KEY}

RawHeaders = Iterable[tuple[bytes, bytes]]


def request_head(
    method: str,
    target: bytes,
    authority: bytes,
    headers: RawHeaders,
    *,
    is_chunked: bool,
    upgrade: bool,
    version: tuple[int, int],
) -> bytes:
    """Return the head that goes to the far server."""
    dropped: frozenset[bytes] | set[bytes] = _NOT_ASKED_ON
    for name, value in headers:
        if len(name) == 10 and name.lower() == b"connection":
            dropped = dropped | named_by(value)
    lines = [
        # Whoever speaks 1.0 reads no chunks: it is answered as it asked.
        b"%b %b HTTP/1.%d" % (method.encode("ascii"), target, 0 if version < (1, 1) else 1),
        b"Host: " + authority,
    ]
    lines += [b"%b: %b" % field for field in headers if field[0].lower() not in dropped]
    if is_chunked:
        lines.append(b"Transfer-Encoding: chunked")
    if upgrade:
        lines.append(b"Connection: Upgrade\r\nUpgrade: websocket")
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def answer_head(head: PassedHead, *, is_last: bool) -> bytes:
    """Return the head that goes to the caller.

    Args:
        is_last: The connection ends with this answer.
    """
    if head.status == SWITCHING:
        end = b"\r\nConnection: Upgrade\r\n\r\n"
    else:
        end = b"\r\nConnection: close\r\n\r\n" if is_last else b"\r\n\r\n"
    # Whoever spoke 1.0 to us, we speak 1.1.
    return b"HTTP/1.1 %b%b%b" % (head.status_text, head.fields, end)


def chunk(data: bytes, *, is_last: bool = False) -> bytes:
    """Return a part of a body as a chunk, and the end behind it when it is the last one."""
    end = b"0\r\n\r\n" if is_last else b""
    return b"%x\r\n%b\r\n%b" % (len(data), data, end) if data else end
