"""One request on its way to its answer: what came, and how the answer is written."""

import asyncio
import gzip
import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import brotli
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from codex_proxy.protocol.wire import BadJson, loads
from codex_proxy.simulator.account import SimAccount
from codex_proxy.simulator.checks import seal
from codex_proxy.simulator.compose import Turn
from codex_proxy.simulator.faults import Reply
from codex_proxy.simulator.quota import quota_headers
from codex_proxy.simulator.script import Script

if TYPE_CHECKING:
    from codex_proxy.simulator.server import Simulator

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@dataclass(slots=True, eq=False)
class Received:
    """One request as it arrived, and what became of it."""

    method: str
    path: str
    query: str
    headers: CIMultiDictProxy[str]
    wire: bytes
    """The body as it was sent, compressed if it was."""
    body: bytes
    """The body without its compression."""
    time: float
    account: str | None = None
    status: int | None = None
    """What was answered; None while nothing is, and when the connection was closed instead."""
    finished: bool = False
    """The answer was given to its end."""
    cancelled: bool = False
    """The peer left before that."""
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nothing more will happen."""

    @property
    def json(self) -> Any:
        """The body as JSON, or None when it is none."""
        try:
            return loads(self.body)
        except BadJson:
            return None


class Exchange:
    """One request on its way to its answer."""

    def __init__(self, sim: "Simulator", request: web.Request, received: Received, serial: int) -> None:
        self.sim = sim
        self.serial = serial
        self.request = request
        self.received = received
        self.path = request.path.removeprefix("/backend-api")
        self.account: SimAccount | None = None
        self.script: Script | None = None
        self.response: web.StreamResponse | None = None
        self.aborted = False
        self._turn_state: str | None = None

    def parse(self) -> tuple[Any, Reply | None]:
        """Return the JSON of the body, or the refusal of what is none."""
        if self.sim.strict and not self.request.content_type.startswith("application/json"):
            return None, Reply.json({"detail": "Unsupported content type"}, 400)
        try:
            return loads(self.received.body), None
        except BadJson:
            return None, Reply.json({"detail": "Invalid JSON"}, 400)

    def form(self) -> dict[str, str]:
        """Return the fields of the body, form-encoded or JSON."""
        if self.request.content_type == "application/x-www-form-urlencoded":
            return dict(parse_qsl(self.received.body.decode("utf-8", "replace"), keep_blank_values=True))
        value = self.received.json
        return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}

    def turn_state(self, turn: Turn) -> str | None:
        """Return the turn state to hand out: one per turn, none when the request came with it."""
        if "x-codex-turn-state" in self.request.headers:
            return None
        if self._turn_state is None:
            self._turn_state = seal(turn.tag, k="turn", n=turn.serial)
        return self._turn_state

    def state_headers(self, account: SimAccount, serial: int) -> dict[str, str]:
        """Return the header that binds the next request to the account."""
        if "x-codex-turn-state" in self.request.headers:
            return {}
        return {"x-codex-turn-state": seal(account.tag, k="turn", n=serial)}

    async def send(self, reply: Reply) -> None:
        """Send an answer that is no stream."""
        if self.aborted:
            return
        headers = self._headers()
        headers.update(reply.headers)
        if reply.content_type is not None:
            headers["content-type"] = reply.content_type
        body = reply.body if reply.content_type is not None else None
        self.received.status = reply.status
        self.response = web.Response(status=reply.status, headers=headers, body=body)
        await self.response.prepare(self.request)
        await self.response.write_eof()
        self.received.finished = True

    async def open_stream(self, turn: Turn) -> None:
        """Send the head of a stream; it names no content type, as the real one does not."""
        headers = self._headers()
        headers["openai-model"] = turn.served_model
        headers["x-models-etag"] = self.account.etag() if self.account is not None else ""
        state = self.turn_state(turn)
        if state is not None:
            headers["x-codex-turn-state"] = state
        self.received.status = 200
        self.response = web.StreamResponse(headers=headers)
        await self.response.prepare(self.request)

    async def write(self, buffer: bytearray, sizes: Iterator[int] | None) -> None:
        """Send and empty *buffer*, cut into *sizes* if there are any."""
        assert self.response is not None
        if sizes is None:
            if buffer:
                await self.response.write(bytes(buffer))
        else:
            start = 0
            while start < len(buffer):
                size = max(1, next(sizes))
                await self.response.write(bytes(buffer[start : start + size]))
                await asyncio.sleep(0)
                start += size
        buffer.clear()

    async def close_stream(self) -> None:
        """End the stream as HTTP has it."""
        assert self.response is not None
        await self.response.write_eof()

    def abort(self, *, reset: bool = False) -> None:
        """Close the connection as it is; with *reset*, so that the peer sees a reset."""
        self.aborted = True
        transport = self.request.transport
        if transport is None:
            return
        if reset:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    def _headers(self) -> CIMultiDict[str]:
        headers = CIMultiDict({
            "server": "cloudflare",
            "x-oai-request-id": f"{self.serial:032x}",
            "cf-ray": f"{self.serial:016x}-SIM",
            "cf-cache-status": "DYNAMIC",
            "x-content-type-options": "nosniff",
            "strict-transport-security": "max-age=31536000; includeSubDomains; preload",
            "alt-svc": 'h3=":443"; ma=86400',
            "set-cookie": "__cf_bm=simulated; path=/; HttpOnly; Secure",
        })
        if self.account is not None:
            headers.update(quota_headers(self.account))
        return headers


def decompress(wire: bytes, encoding: str) -> tuple[bytes, Reply | None]:
    """Return the body without its compression, or the refusal of one that cannot be read."""
    try:
        match encoding.strip().lower():
            case "" | "identity":
                return wire, None
            case "zstd":
                return zstd.decompress(wire), None
            case "gzip" | "x-gzip":
                return gzip.decompress(wire), None
            case "br":
                return brotli.decompress(wire), None
            case "deflate":
                try:
                    return zlib.decompress(wire), None
                except zlib.error:
                    # Some clients send the bare stream without its wrapper.
                    return zlib.decompress(wire, -zlib.MAX_WBITS), None
            case _:
                return wire, Reply.json({"detail": "Unsupported content encoding"}, 415)
    except (zstd.ZstdError, OSError, EOFError, zlib.error, brotli.error):
        return wire, Reply.json({"detail": "Invalid compressed body"}, 400)


async def silence(seconds: Any) -> None:
    """Wait for *seconds*; None waits until the peer or the simulator ends it."""
    if seconds is None:
        await asyncio.Event().wait()
    else:
        await asyncio.sleep(float(seconds))
