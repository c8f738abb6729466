"""Log lines on stderr: one format, one level that can change, no secrets.

Redaction is done on the finished line, traceback included, because an exception's text goes
past any look at the message alone.

Lines that come with every request go through `Later`: made and written a moment afterwards, many at once.
"""

import asyncio
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Generic, TextIO, TypeVar

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


_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s"
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"

# How long a line may wait for others to be written with.
_LATER_SECONDS = 0.2
_LATER_MOST = 512


class RedactingFormatter(logging.Formatter):
    """Format a record as one line and take secrets out of all of it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _in_one_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """Return the finished line, redacted."""
        return Redact.text(super().format(record))


def _in_one_line(text: str) -> str:
    if _CONTROL.search(text) is not None:
        return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
    return text


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes records as they come, after whatever waits to be written."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.waiting: list[Callable[[], None]] = []
        """What writes the lines that still wait; each is called once."""

    def emit(self, record: logging.LogRecord) -> None:
        self.catch_up()
        super().emit(record)

    def flush(self) -> None:
        self.catch_up()
        super().flush()

    def catch_up(self) -> None:
        """Write what waits, so that lines stand in the order of their times."""
        waiting, self.waiting = self.waiting, []
        for write in waiting:
            write()

    def write_lines(self, lines: list[str]) -> None:
        """Write finished lines, redacted."""
        try:
            self.stream.write(Redact.text("\n".join(lines)) + "\n")
            self.stream.flush()
        except (OSError, ValueError):
            # As for any record: nobody can be told that the log cannot be written.
            return


T = TypeVar("T")


class Later(Generic[T]):
    """Lines of one logger at level INFO, made of what is given to `add`, and written a moment later.

    When somebody else listens to the log too, each line is a record of its own, at once.
    """

    def __init__(self, logger: logging.Logger, render: Callable[[T], str]) -> None:
        self._logger = logger
        self._render = render
        self._items: list[tuple[float, T]] = []

    def add(self, item: T) -> None:
        """Have a line written about *item*, which does not change any more."""
        if not self._logger.isEnabledFor(logging.INFO):
            return
        handler, loop = _only_handler(), _running_loop()
        if handler is None or loop is None:
            self._logger.info("%s", self._render(item))
            return
        self._items.append((time.time(), item))
        if len(self._items) == 1:
            handler.waiting.append(self._write)
            loop.call_later(_LATER_SECONDS, handler.catch_up)
        elif len(self._items) >= _LATER_MOST:
            handler.catch_up()

    def _write(self) -> None:
        items, self._items = self._items, []
        handler = _only_handler()
        if handler is None:
            for _, item in items:
                self._logger.info("%s", self._render(item))
            return
        lines: list[str] = []
        second, prefix = 0, ""
        for at, item in items:
            if int(at) != second:
                second = int(at)
                prefix = time.strftime(_TIME_FORMAT, time.localtime(second))
            text = _in_one_line(self._render(item))
            lines.append(f"{prefix}.{int(at * 1000) % 1000:03d} INFO {self._logger.name} {text}")
        handler.write_lines(lines)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _only_handler() -> LineHandler | None:
    """Return our handler if nobody else listens."""
    handlers = logging.getLogger().handlers
    if len(handlers) == 1 and isinstance(handlers[0], LineHandler):
        return handlers[0]
    return None


def setup(level: str, stream: TextIO | None = None) -> logging.Handler:
    """Send log lines to *stream* (stderr), and return the handler that does.

    The level is that of our own loggers; libraries speak from WARNING up, whatever it is.
    """
    handler = LineHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(RedactingFormatter(_FORMAT, _TIME_FORMAT))
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
