"""Log lines on stderr: text for people or JSON for machines, one level that can change, no secrets.

Redaction is done on the finished line, traceback included, because an exception's text goes
past any look at the message alone.

Messages are written event first, then `key=%s`. So JSON is made of a message's own parts (`_Plan`): the
words before the first key, and each key with the very argument that was given for it. Nobody takes a text
apart, and a value may hold blanks or what looks like another key.

Lines that come with every request go through `Later`: made and written a moment afterwards, many at once.
"""

import asyncio
import functools
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TextIO, TypeVar

from codex_proxy.errors import Redact
from codex_proxy.protocol.wire import dumps

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
# Those of them that JSON lets stand.
_UNESCAPED = re.compile(r"[\x7f-\x9f\u2028\u2029]")


_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s"
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"

# How long a line may wait for others to be written with.
_LATER_SECONDS = 0.2
_LATER_MOST = 512


class Words(tuple[str, ...]):
    """Several words as one value: a list in JSON, joined in a text."""

    __slots__ = ()

    def __str__(self) -> str:
        return ",".join(self) or "-"


# --- text


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


# --- JSON


class JsonFormatter(RedactingFormatter):
    """Format a record as one JSON object and take secrets out of every value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the finished line."""
        fields: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            **_fields(record.msg, record.args, record),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return _in_json(fields)


def _in_json(fields: dict[str, Any]) -> str:
    """Render an object, secrets taken out of its values.

    Before it is rendered: an escape such as `\\n` in front of a secret would hide where it begins.
    """
    # One look at all of them; no pattern goes past the character between them.
    together = "\0".join([str(value) for value in fields.values() if type(value) in _TEXTS])
    if Redact.text(together) != together:
        fields = {name: _redacted(value) for name, value in fields.items()}
    line = dumps({
        name: list(value) if type(value) is Words else value for name, value in fields.items()
    }).decode("utf-8", "replace")
    if _UNESCAPED.search(line) is not None:
        line = _UNESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", line)
    return line


def _redacted(value: object) -> object:
    if isinstance(value, Words):
        return Words(map(Redact.text, value))
    return Redact.text(value) if isinstance(value, str) else value


def _utc(at: float) -> str:
    return f"{_second(int(at))}.{int(at * 1000) % 1000:03d}Z"


@functools.lru_cache(maxsize=4)
def _second(at: int) -> str:
    return time.strftime(_TIME_FORMAT, time.gmtime(at))


_TEXTS = frozenset({str, Words})
_PLAIN = frozenset({str, int, float, bool, Words, type(None)})
"""What stays as it is."""


_Field = tuple[str, str, int, int | None]
"""One `key=...` of a message: its name, what stands behind the `=`, and how many arguments that takes. For a single
one, also how many of its decimals count, -1 where it stays as it is; None makes a text of it."""


@dataclass(slots=True, frozen=True)
class _Plan:
    """A message taken apart, once for all records that have it."""

    event: str
    places: int
    """How many arguments stand in the event's words."""
    all_places: int
    fields: tuple[_Field, ...]


_PLACE = re.compile(r"%(?:[-+# 0]*[0-9]*(?:\.[0-9]+)?[a-zA-Z]|%)")
_KEY = re.compile(r"(?:^|(?<=\s))([a-z][a-z0-9_]*)=")
_NUMBER = re.compile(r"%(?:s|d|[0-9]*\.([0-9]+)f)")

# What every object has beside the fields of its message.
_OWN = frozenset({"time", "level", "logger", "event", "traceback", "stack"})
# In a text it stands behind its event, in an index beside everything else's ids.
_NAMES = {"id": "request_id", **{name: f"{name}_" for name in _OWN}}


@functools.lru_cache(maxsize=512)
def _plan(template: str) -> _Plan:
    keys = list(_KEY.finditer(template))
    ends = [*[key.start() for key in keys], len(template)]
    head = template[: ends[0]].strip()
    fields: list[_Field] = []
    for key, end in zip(keys, ends[1:], strict=True):
        part = template[key.end() : end].rstrip()
        number = _NUMBER.fullmatch(part)
        digits = None if number is None else int(number[1]) if number[1] else -1
        fields.append((_NAMES.get(key[1], key[1]), part, _places(part), digits))
    return _Plan(head.rstrip(":"), _places(head), _places(template), tuple(fields))


def _places(template: str) -> int:
    return sum(match[0] != "%%" for match in _PLACE.finditer(template))


def _fields(template: object, arguments: object, record: logging.LogRecord | None = None) -> dict[str, Any]:
    """Return the event and the fields of a message; what is not there (`-`) is left out."""
    if isinstance(template, str) and isinstance(arguments, tuple) and arguments:
        plan = _plan(template)
        if len(arguments) == plan.all_places:
            found: dict[str, Any] = {"event": plan.event % arguments[: plan.places]}
            at = plan.places
            for name, part, places, digits in plan.fields:
                value: object
                if digits is None:
                    value = part % arguments[at : at + places]
                else:
                    value = arguments[at]
                    kind = type(value)
                    if kind is float and digits >= 0:
                        value = round(value, digits)  # type: ignore[call-overload]  # a float, as was just seen
                    elif kind not in _PLAIN:
                        value = str(value)
                at += places
                if value != "-" and value is not None and value != ():
                    found[name] = value
            return found
    # Words alone, or another library's way to say things.
    return {"event": record.getMessage() if record is not None else str(template)}


# --- writing


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

    def write_lines(self, lines: str) -> None:
        """Write finished lines, out of which secrets have been taken."""
        try:
            self.stream.write(f"{lines}\n")
            self.stream.flush()
        except (OSError, ValueError):
            # As for any record: nobody can be told that the log cannot be written.
            return


T = TypeVar("T")

Said = tuple[str, tuple[object, ...]]
"""A message and its arguments."""


class Later(Generic[T]):
    """Lines of one logger at level INFO, made of what is given to `add`, and written a moment later.

    When somebody else listens to the log too, each line is a record of its own, at once.
    """

    def __init__(self, logger: logging.Logger, say: Callable[[T], Said]) -> None:
        self._logger = logger
        self._say = say
        self._items: list[tuple[float, T]] = []

    def add(self, item: T) -> None:
        """Have a line written about *item*, which does not change any more."""
        if not self._logger.isEnabledFor(logging.INFO):
            return
        handler, loop = _only_handler(), _running_loop()
        if handler is None or loop is None:
            self._log(item)
            return
        self._items.append((time.time(), item))
        if len(self._items) == 1:
            handler.waiting.append(self._write)
            loop.call_later(_LATER_SECONDS, handler.catch_up)
        elif len(self._items) >= _LATER_MOST:
            handler.catch_up()

    def _log(self, item: T) -> None:
        message, arguments = self._say(item)
        self._logger.info(message, *arguments)

    def _write(self) -> None:
        items, self._items = self._items, []
        handler = _only_handler()
        if handler is None:
            for _, item in items:
                self._log(item)
        elif isinstance(handler.formatter, JsonFormatter):
            handler.write_lines("\n".join([self._object(at, item) for at, item in items]))
        else:
            handler.write_lines(Redact.text("\n".join(self._texts(items))))

    def _texts(self, items: list[tuple[float, T]]) -> list[str]:
        lines: list[str] = []
        second, prefix = 0, ""
        for at, item in items:
            if int(at) != second:
                second = int(at)
                prefix = time.strftime(_TIME_FORMAT, time.localtime(second))
            message, arguments = self._say(item)
            text = _in_one_line(message % arguments if arguments else message)
            lines.append(f"{prefix}.{int(at * 1000) % 1000:03d} INFO {self._logger.name} {text}")
        return lines

    def _object(self, at: float, item: T) -> str:
        fields = {"time": _utc(at), "level": "info", "logger": self._logger.name}
        return _in_json({**fields, **_fields(*self._say(item))})


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


def setup(level: str, stream: TextIO | None = None, *, form: str = "text") -> logging.Handler:
    """Send log lines to *stream* (stderr), and return the handler that does.

    The level is that of our own loggers; libraries speak from WARNING up, whatever it is.
    """
    handler = LineHandler(stream if stream is not None else sys.stderr)
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old.formatter, RedactingFormatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    # Its lines hold query strings; the proxy writes its own line per turn.
    logging.getLogger("aiohttp.access").disabled = True
    set_level(level)
    set_format(form)
    return handler


def set_level(level: str) -> None:
    """Make *level* (a word of the setting log-level) count from now on."""
    logging.getLogger("codex_proxy").setLevel(_LEVELS[level])


def set_format(form: str) -> None:
    """Write lines as *form* (a word of the setting log-format) from now on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LineHandler):
            handler.catch_up()
            made = JsonFormatter if form == "json" else RedactingFormatter
            handler.setFormatter(made(_FORMAT, _TIME_FORMAT))
