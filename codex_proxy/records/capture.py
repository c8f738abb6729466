"""What was asked and answered, kept for callers for whom the owner has switched that on."""

from dataclasses import dataclass
from typing import Any

from codex_proxy.trace import Capture, Trace


@dataclass(slots=True)
class Captured:
    """A finished turn, and what was said in it."""

    trace: Trace
    said: Capture

    def row(self, key: int) -> dict[str, Any]:
        """Return what was said as a row of the table of captures."""
        return {
            "key": key,
            "request": _text(self.said.request),
            "answer": _text(b"".join(self.said.answer)),
            "is_cut": self.said.is_cut,
        }


def _text(data: bytes) -> str:
    # Cut in the middle of a character, perhaps; some databases have no NUL in a text.
    return data.decode("utf-8", "replace").replace("\0", "\ufffd")
