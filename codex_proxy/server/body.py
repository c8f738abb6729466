"""The caller's body: read by deadline, inflated within a limit, checked to be JSON.

The server hands bodies over as they came (`auto_decompress=False`, see `app.SERVER_OPTIONS`),
because a library that inflates first and counts later is what a bomb is made for. Here both
sizes are limited, the one on the wire and the one inflated, and inflating stops at the limit.
"""

import asyncio
import re
import zlib
from dataclasses import dataclass

from aiohttp import web

from codex_proxy.compression import BROKEN, CODINGS, MULTIPLE, Brotli, Frame, Zlib, Zstd, gzip_frame
from codex_proxy.errors import RequestError

# Below this, inflating costs less than a hop to a thread and back.
INLINE_INPUT_BYTES = 256 * 1024
INLINE_OUTPUT_BYTES = 1024 * 1024

# How much is inflated per step; a step never goes past the limit by more than brotli's own
# 32 KiB of grain.
_STEP_BYTES = 32 * 1024

# Encoders emit a frame per few hundred kilobytes at most. Beyond this it is someone paying
# eight bytes a frame for our time.
_MAX_FRAMES = 4096

# Nobody stacks more than two on purpose.
_MAX_CODINGS = 4


@dataclass(slots=True, frozen=True)
class Patience:
    """How long a body may take; a slow line is welcome, a stalled or a dripping one is not."""

    stall: float = 30.0
    """Seconds without one byte."""
    grace: float = 60.0
    """Seconds before the pace is looked at."""
    pace: float = 4096.0
    """Bytes per second, on average since the start, that are asked for after the grace."""


PATIENCE = Patience()


async def read_body(request: web.Request, *, limit: int, patience: Patience = PATIENCE) -> bytes:
    """Return the body of *request*, inflated, at most *limit* bytes.

    Raises:
        RequestError: 413 past the limit, 408 when it does not come, 415 for a coding we do
            not know, 400 for a broken one.
        ConnectionError: If the caller left.
    """
    codings = content_codings(request.headers.getall("Content-Encoding", []))
    declared = request.content_length
    if declared is not None and declared > limit:
        raise too_large(limit)
    raw = await _read_raw(request, limit, patience)
    if not codings and not _is_deflated(raw):
        return raw
    if len(raw) <= INLINE_INPUT_BYTES:
        if limit <= INLINE_OUTPUT_BYTES:
            return inflate(raw, codings, limit)
        try:
            return inflate(raw, codings, INLINE_OUTPUT_BYTES)
        except RequestError as exc:
            if exc.status != 413:
                raise
    return await asyncio.to_thread(inflate, raw, codings, limit)


async def _read_raw(request: web.Request, limit: int, patience: Patience) -> bytes:
    if not request.body_exists:
        return b""
    if request.headers.get("Expect", "").lower() == "100-continue":
        # Said here and not before the handler runs: a caller whose key or length is refused
        # never sends the body.
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    content = request.content
    try:
        if content.is_eof():
            # Nearly every request: the body came with the head, so no deadline is armed.
            raw = content.read_nowait()
            if len(raw) > limit:
                raise too_large(limit)
            return raw
        parts: list[bytes] = []
        received = 0
        now = asyncio.get_running_loop().time
        started = now()
        async with asyncio.timeout(patience.stall) as deadline:
            while not content.at_eof():
                part = await content.readany()
                received += len(part)
                if received > limit:
                    raise too_large(limit)
                parts.append(part)
                deadline.reschedule(
                    min(now() + patience.stall, started + max(patience.grace, received / patience.pace))
                )
        return b"".join(parts)
    except TimeoutError as exc:
        raise RequestError(
            "the request body came too slowly; send it again", status=408, code="request_timeout"
        ) from exc
    except web.RequestPayloadError as exc:
        # Only the parser in Python says so; with the compiled one the body stalls.
        raise RequestError("the request body's framing is broken", code="invalid_body") from exc


def too_large(limit: int) -> RequestError:
    """Return the 413 that names the limit and the setting behind it."""
    return RequestError(
        f"the request body is larger than {limit} bytes (setting max-body-bytes)",
        status=413,
        code="request_too_large",
    )


def content_codings(headers: list[str]) -> list[str]:
    """Return the codings named by Content-Encoding, in the order they were applied.

    Raises:
        RequestError: 415 for one we do not know.
    """
    if not headers:
        return []
    names = [name.strip().lower() for header in headers for name in header.split(",")]
    codings = [name for name in names if name not in ("", "identity")]
    for name in codings:
        if name not in CODINGS:
            raise RequestError(
                f"content encoding {name[:64]!r} is not supported; use zstd, gzip, br, deflate or none",
                status=415,
                code="unsupported_content_encoding",
            )
    if len(codings) > _MAX_CODINGS:
        raise RequestError("too many content encodings", status=415, code="unsupported_content_encoding")
    return codings


def inflate(raw: bytes, codings: list[str], limit: int) -> bytes:
    """Undo *codings*, last one first, never inflating more than *limit* and one step.

    Labels lie: clients set the header and forget to compress, relays inflate and keep the
    header or drop it and keep the bytes. What the bytes say themselves wins.
    """
    for name in reversed(codings) if codings else ("identity",):
        raw = _undo(raw, name, limit)
    if len(raw) > limit:
        raise too_large(limit)
    return raw


def _undo(raw: bytes, name: str, limit: int) -> bytes:
    if not raw:
        return raw
    if raw[:2] == _GZIP_MAGIC:
        name = "gzip"
    elif _is_zstd(raw):
        name = "zstd"
    elif name == "identity" or (name in ("gzip", "x-gzip", "zstd") and _looks_like_json(raw)):
        return raw
    try:
        return _run(raw, name, limit)
    except BROKEN as exc:
        # brotli and raw deflate have no mark of their own, so the plain reading comes second.
        if _looks_like_json(raw):
            return raw
        raise RequestError(f"the request body is not valid {name}", code="invalid_body") from exc


_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")


def _is_zstd(raw: bytes) -> bool:
    return raw[:4] == _ZSTD_MAGIC or _ZSTD_SKIPPABLE.match(raw) is not None


def _is_deflated(raw: bytes) -> bool:
    return raw[:2] == _GZIP_MAGIC or _is_zstd(raw)


def _looks_like_json(raw: bytes) -> bool:
    return raw[:256].lstrip()[:1] in (b"{", b"[")


def _deflate(raw: bytes) -> Frame:
    # The standard says zlib; half the world sends raw deflate under the same name.
    is_zlib = len(raw) > 1 and raw[0] & 0x0F == 8 and (raw[0] << 8 | raw[1]) % 31 == 0
    return Zlib(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)


def _open(name: str, raw: bytes) -> Frame:
    match name:
        case "zstd":
            return Zstd()
        case "br":
            return Brotli()
        case "deflate":
            return _deflate(raw)
        case _:
            return gzip_frame()


def _run(raw: bytes, name: str, limit: int) -> bytes:
    """Inflate *raw*, frame after frame.

    Input goes in by steps, so that what a frame leaves over is small: handing it all over
    would copy the whole remainder once per frame.
    """
    parts: list[bytes] = []
    total = 0
    frames = 1
    stream = _open(name, raw)
    position = 0
    data = b""
    while True:
        out = stream.step(data, min(_STEP_BYTES, limit + 1 - total))
        total += len(out)
        if total > limit:
            raise too_large(limit)
        if out:
            parts.append(out)
        data = b""
        if stream.has_ended:
            data = stream.rest
            if name in ("gzip", "x-gzip"):
                # Padding with zeros after a member is allowed and meaningless.
                data = data.lstrip(b"\0")
                while not data and position < len(raw):
                    data = raw[position : position + _STEP_BYTES].lstrip(b"\0")
                    position += _STEP_BYTES
            if not data and position >= len(raw):
                return b"".join(parts)
            if name not in MULTIPLE or frames >= _MAX_FRAMES:
                raise EOFError
            frames += 1
            stream = _open(name, raw)
            if not data:
                data = raw[position : position + _STEP_BYTES]
                position += _STEP_BYTES
        elif not out:
            if position >= len(raw):
                raise EOFError
            data = raw[position : position + _STEP_BYTES]
            position += _STEP_BYTES


_JSON_TYPE = re.compile(r"application/(?:json|[\w.!#$&^-]+\+json)", re.IGNORECASE)


def content_type(request: web.Request) -> str:
    """Return the media type as the caller wrote it, without parameters; empty when absent."""
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def is_json(request: web.Request) -> bool:
    """Tell whether the caller calls its body JSON."""
    return _JSON_TYPE.fullmatch(content_type(request)) is not None


def require_json(request: web.Request, *, multipart: bool = False) -> None:
    """Refuse a body that is called something other than JSON; no name at all passes.

    *multipart* lets a form pass too, for the one endpoint that takes files.

    Raises:
        RequestError: 415, with what to send instead.
    """
    kind = content_type(request)
    if not kind or is_json(request) or (multipart and kind == "multipart/form-data"):
        return
    raise RequestError(
        f"content type {kind[:100]!r} is not supported here; send the header Content-Type: application/json",
        status=415,
        code="unsupported_content_type",
    )
