"""Text for a person at a terminal, or for a pipe: columns, times, questions, a little colour."""

import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, TextIO

from codex_proxy.errors import ProxyError

Align = Literal["<", ">"]
_COLOURS = {"green": "32", "yellow": "33", "red": "31", "grey": "90"}

_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400

# What steers a terminal (C0, DEL, C1), breaks or turns a line, or cannot be encoded. It comes
# with the issuer's words, names of files, arguments; nothing of ours has any of it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return *text* as it can be shown in one line of a terminal: what steers it is spelled out."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def say(*lines: str, is_painted: bool = False) -> None:
    """Print lines, at once: somebody may wait for them at the other end of a pipe.

    Args:
        is_painted: They hold our colours, around what is printable already.
    """
    for line in lines or ("",):
        print(line if is_painted else printable(line), flush=True)


def say_json(text: bytes) -> None:
    """Print JSON in a line of its own; what could steer a terminal is spelled as JSON does it."""
    line = _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text.decode())
    sys.stdout.buffer.write(line.encode() + b"\n")
    sys.stdout.flush()


def complain(*lines: str) -> None:
    """Print lines to stderr in the command's name."""
    for line in lines:
        print(f"codex-proxy: {printable(line)}", file=sys.stderr, flush=True)


def wrapped(text: str, columns: int = 78, indent: str = "") -> list[str]:
    """Return *text* as lines of at most so many columns; what is one word is never cut."""
    return textwrap.wrap(
        text, columns, initial_indent=indent, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def width(text: str) -> int:
    """Return how many columns *text* takes."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def pad(text: str, columns: int, align: Align = "<") -> str:
    """Return *text* filled with blanks."""
    blanks = " " * max(0, columns - width(text))
    return blanks + text if align == ">" else text + blanks


def columns(rows: Sequence[Sequence[str]], aligns: Sequence[Align], gap: str = "  ") -> list[str]:
    """Return the rows as lines whose columns stand below each other."""
    widths = [max(width(row[place]) for row in rows) for place in range(len(aligns))] if rows else []
    return [
        gap.join(
            pad(cell, columns, align) for cell, columns, align in zip(row, widths, aligns, strict=True)
        ).rstrip()
        for row in rows
    ]


def has_colour(stream: TextIO) -> bool:
    """Tell whether *stream* is somebody's terminal, who does not object to colour."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, *, is_on: bool) -> str:
    """Return *text* in a colour when that is on."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if is_on and colour else text


def seconds_of(text: object) -> float | None:
    """Read a time as our JSON has it; None for none."""
    if not isinstance(text, str):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def span(seconds: float) -> str:
    """Return a time from now in two units at most: `3d4h`, `2h10m`, `45s`."""
    rest = max(0, int(seconds))
    if rest >= 10 * _DAY:
        return f"{rest // _DAY}d"
    if rest >= _DAY:
        hours = rest % _DAY // _HOUR
        return f"{rest // _DAY}d{hours}h" if hours else f"{rest // _DAY}d"
    if rest >= _HOUR:
        minutes = rest % _HOUR // _MINUTE
        return f"{rest // _HOUR}h{minutes}m" if minutes else f"{rest // _HOUR}h"
    return f"{rest // _MINUTE}m" if rest >= _MINUTE else f"{rest}s"


def clock(at: float, now: float) -> str:
    """Return a moment on this machine's wall clock, with its day when that is not today."""
    there, here = (datetime.fromtimestamp(time, UTC).astimezone() for time in (at, now))
    if there.date() == here.date():
        return f"{there:%H:%M}"
    return f"{there:%a %H:%M}" if abs(at - now) < 6 * _DAY else f"{there:%b %d}"


def confirm(question: str, *, is_yes: bool) -> bool:
    """Ask whether *question* is meant; without a terminal nobody can answer.

    Raises:
        ProxyError: If nobody can be asked and --yes was not given.
    """
    if is_yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise ProxyError(f"{question} Nobody is there to answer: say --yes")
    try:
        answer = input(f"{printable(question)} [y/N] ")
    except EOFError:
        say()
        return False
    return answer.strip().lower() in {"y", "yes"}
