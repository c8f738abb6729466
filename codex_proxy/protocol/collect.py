"""A collected answer: the same events that a stream would have, folded into one body.

There is no second translation: the encoder that renders the stream knows the whole answer too.
"""

from codex_proxy.errors import BackendFault, ProxyError, UpstreamError, Verdict
from codex_proxy.protocol.dialect import Encoder
from codex_proxy.protocol.sse import Batch
from codex_proxy.trace import End


class Collector:
    """Fold the events of one turn into the body of a plain JSON answer.

    Usage, end and failure are the encoder's.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._error: ProxyError | None = None

    @property
    def finished(self) -> bool:
        """Whether the answer, or its failure, is there."""
        return self.encoder.finished or self._error is not None

    def feed(self, batch: Batch) -> None:
        """Take the events of one upstream read."""
        if self._error is None:
            self.encoder.encode(batch)

    def cut(self, error: ProxyError) -> None:
        """End the answer with *error*, unless it has already ended."""
        if not self.finished:
            self._error = error

    def result(self) -> bytes:
        """Return the whole answer as JSON.

        Raises:
            ProxyError: What ended the answer instead; render it as an HTTP status.
        """
        if self.encoder.ended in (End.COMPLETED, End.INCOMPLETE):
            return self.encoder.whole()
        raise (
            self._error
            or self.encoder.failure
            or UpstreamError(Verdict.CUT, BackendFault("the backend's stream ended before its end"))
        )
