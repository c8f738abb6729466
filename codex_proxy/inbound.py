"""What all our servers ask of a connection beyond aiohttp's: that the head of a request is bounded as a whole.

The parser bounds the lines of a head and how many there are, and what it has read of them it keeps: megabytes for each
connection, before anybody has shown a key.
"""

import asyncio
from typing import Any

from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

MAX_HEAD_SIZE = 128 * 1024
"""Bytes of a whole head. Codex clients send turn metadata in fields of up to 64 KiB."""


class BoundedHeads(RequestHandler):
    """A connection that ends when a head grows too large."""

    __slots__ = ("_head_size", "_last_body")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_size = 0
        self._last_body: StreamReader | None = None

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        known, body = self._request_count, self._last_body
        is_in_head = not self._messages and not self._upgraded and (body is None or body.is_eof())
        super().data_received(data)
        if self._request_count != known:
            self._head_size = 0
            if self._messages:
                self._last_body = self._messages[-1][1]
            return
        if not is_in_head:
            self._head_size = 0
            return
        self._head_size += len(data)
        if self._head_size > MAX_HEAD_SIZE and self.transport is not None:
            if self._current_request is None:
                self.refuse(self.transport, self.too_large())
            else:
                # The one before it has not been answered yet.
                self.force_close()

    def too_large(self) -> bytes:
        """Return the whole answer to a head that is too large; nothing else is known of its request."""
        raise NotImplementedError

    def refuse(self, transport: asyncio.Transport, answer: bytes) -> None:
        """Answer, and read nothing more."""
        transport.write(answer)
        self.force_close()
        transport.close()
