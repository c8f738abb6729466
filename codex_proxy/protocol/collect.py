"""A collected answer: the same events that a stream would have, folded into one response object.

There is no second translation: the encoder's own terminal event holds the answer.
"""

from codex_proxy.errors import BackendFault, ProxyError, UpstreamError, Verdict
from codex_proxy.protocol.responses import Encoder
from codex_proxy.protocol.sse import Batch
from codex_proxy.protocol.wire import dumps
from codex_proxy.trace import End


class Collector:
    """Fold the events of one turn into the body of a plain JSON answer.

    Usage, end and failure are the encoder's; only the terminal event is kept.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._body: bytes | None = None
        self._error: ProxyError | None = None

    @property
    def finished(self) -> bool:
        """Whether the answer, or its failure, is there."""
        return self.encoder.finished or self._error is not None

    def feed(self, batch: Batch) -> None:
        """Take the events of one upstream read."""
        if self._error is not None:
            return
        events = self.encoder.events(batch)
        if self.encoder.ended in (End.COMPLETED, End.INCOMPLETE) and events:
            self._body = dumps(events[-1].json["response"])

    def cut(self, error: ProxyError) -> None:
        """End the answer with *error*, unless it has already ended."""
        if not self.finished:
            self._error = error

    def result(self) -> bytes:
        """Return the response object as JSON.

        Raises:
            ProxyError: What ended the answer instead; render it as an HTTP status.
        """
        if self._body is not None:
            return self._body
        raise (
            self._error
            or self.encoder.failure
            or UpstreamError(Verdict.CUT, BackendFault("the backend's stream ended before its end"))
        )
