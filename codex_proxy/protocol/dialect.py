"""What a dialect is: a decoder that reads a caller's request, and the encoder that answers it.

Both are pure. A decoder hands over a request for the backend together with the way to make its
encoder, which so knows whatever the decoder learnt (the names of tools, the stop sequences). One
encoder serves streams and collected answers: `encode` renders what comes, `whole` all of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from codex_proxy.errors import ProxyError, UpstreamError
from codex_proxy.protocol.allowance import openai_headers
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.sse import Batch
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import Allowance, End, Usage


class Encoder(Protocol):
    """Turns the backend's events into one caller's bytes; made for one turn."""

    usage: Usage
    """From the terminal event; an estimate after `estimate`."""
    ended: End | None
    """How the answer ended; None while it runs."""
    failure: UpstreamError | None
    """The backend's failure after the answer had begun, for the account's record."""
    ended_early: bool
    """Whether we ended it, at a limit of the caller's own: nothing is wrong with the account."""
    delivered: int
    """About how many bytes of text went out."""

    @property
    def finished(self) -> bool:
        """Whether the caller has its end; nothing more will come."""
        ...

    def encode(self, batch: Batch) -> bytes:
        """Return the bytes for the events of one read; empty when they hold nothing for this caller."""
        ...

    def whole(self) -> bytes:
        """Return the collected answer as JSON, once it has ended well."""
        ...

    def keepalive(self) -> bytes:
        """Return bytes that say nothing but that we are here; fit before the answer's beginning too."""
        ...

    def cut(self, error: ProxyError) -> bytes:
        """Return the dialect's own end for *error*; empty when the answer has already ended."""
        ...

    def estimate(self) -> Usage:
        """Return the usage, estimated from what was sent and delivered unless the backend said it."""
        ...


def _no_limits() -> JsonObject | None:
    return None


def _unchanged(value: str) -> str:
    return value


@dataclass(slots=True)
class Surroundings:
    """What an encoder needs to know of the proxy around it: time and chance come from outside."""

    now: Callable[[], float]
    """The wall clock."""
    unique: str = "unknown"
    """A random text, for the ids of this answer."""
    pool_limits: Callable[[], JsonObject | None] = _no_limits
    """The pool's view for `codex.rate_limits`; None leaves the event out."""
    wrap_turn_state: Callable[[str], str] = _unchanged
    """Binds a turn-state to its account."""
    models_etag: str | None = None
    """The etag of our own model list."""


@dataclass(slots=True, frozen=True)
class Decoded:
    """A caller's request, read."""

    request: BackendRequest
    make_encoder: Callable[[Surroundings], Encoder]
    answered: Callable[[JsonObject], None] | None = None
    """Told `id` and `output` of a Responses answer that passes as it is, once it has ended well; an encoder tells it itself."""


class Decode(Protocol):
    """Reads the body of a request; *headers* have lower-case names, *caller* is `Caller.id`.

    Raises:
        RequestError: With the path of the field that cannot be served.
    """

    def __call__(
        self, raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: str = ""
    ) -> Decoded: ...


class RenderError(Protocol):
    """Says an error in the words of a dialect: status, headers, body."""

    def __call__(self, error: ProxyError, *, request_id: str) -> tuple[int, dict[str, str], bytes]: ...


def as_it_is(error: ProxyError, request: BackendRequest) -> ProxyError:
    """Leave an error in its own words."""
    return error


@dataclass(slots=True, frozen=True)
class Dialect:
    """One way of asking and of being answered."""

    name: str
    """Under which the table of routes knows whose words its errors have."""
    decode: Decode
    render_error: RenderError
    keeps_alive_early: bool = False
    """Whether a stream may open with a sign of life while no account has answered yet."""
    allowance_headers: Callable[[Allowance, float], dict[str, str]] = openai_headers
    """Says what the caller may still ask; the second argument is the wall clock."""
    reword: Callable[[ProxyError, BackendRequest], ProxyError] = as_it_is
    """Says an error with what only the request knows, such as its size."""
