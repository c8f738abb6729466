"""Log lines on stderr: one format, one level that can change, no secrets.

Redaction is done on the finished line, traceback included, because an exception's text goes
past any look at the message alone.
"""

import logging
import re
import sys
from typing import TextIO

from codex_proxy.errors import Redact

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# A caller's words end up in some messages; with a line break in them they could write lines
# of their own, and with an escape sequence (C1 has a short one) steer a terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class RedactingFormatter(logging.Formatter):
    """Format a record as one line and take secrets out of all of it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if _CONTROL.search(line) is not None:
            return _CONTROL.sub(lambda match: repr(match[0])[1:-1], line)
        return line

    def format(self, record: logging.LogRecord) -> str:
        """Return the finished line, redacted."""
        return Redact.text(super().format(record))


def setup(level: str, stream: TextIO | None = None) -> logging.Handler:
    """Send log lines to *stream* (stderr), and return the handler that does.

    The level is that of our own loggers; libraries speak from WARNING up, whatever it is.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(
        RedactingFormatter("%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old.formatter, RedactingFormatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    # Its lines hold query strings; the proxy writes its own line per turn.
    logging.getLogger("aiohttp.access").disabled = True
    set_level(level)
    return handler


def set_level(level: str) -> None:
    """Make *level* (a word of the setting log-level) count from now on."""
    logging.getLogger("codex_proxy").setLevel(_LEVELS[level])
