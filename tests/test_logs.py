"""Log lines: one per record, no secrets in any part, a level that can change."""

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from codex_proxy import logs

SECRETS = ("eyJhbGciOi.eyJzdWIi.c2ln", "rt_0123456789abcdef", "jane.doe@example.com", "cp-0123456789abcdef")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Collect what a fresh set-up writes, and undo the set-up."""
    root, ours = logging.getLogger(), logging.getLogger("codex_proxy")
    before = root.level, ours.level
    stream = io.StringIO()
    handler = logs.setup("info", stream)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        ours.setLevel(before[1])
        logging.captureWarnings(False)
        logging.getLogger("aiohttp.access").disabled = False


def test_no_part_of_a_line_shows_a_secret(stream: io.StringIO) -> None:
    logger = logging.getLogger("codex_proxy.test")
    for secret in SECRETS:
        try:
            raise ValueError(f"told {secret} inside")
        except ValueError:
            logger.exception("failed %s and %s", secret, {"key": secret}, stack_info=True)
        logger.warning("plain " + secret)  # noqa: G003 -- a secret in the format itself
    shown = stream.getvalue()
    assert not [secret for secret in SECRETS if secret in shown]
    assert "ValueError: told [token] inside" in shown
    assert shown.count("[email]") >= 4


def test_a_line_break_in_a_value_makes_no_line_of_its_own(stream: io.StringIO) -> None:
    logging.getLogger("codex_proxy.test").info(
        "asked model=%s", "x\n2026-01-01 ERROR forged\r\x1b[31m\u2028y\x9b2J\x7f"
    )
    assert stream.getvalue().count("\n") == 1
    assert r"model=x\n2026-01-01 ERROR forged\r\x1b[31m\u2028y\x9b2J\x7f" in stream.getvalue()


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", "diwe"), ("info", "iwe"), ("warn", "we"), ("warning", "we"), ("error", "e")],
)
def test_the_level_can_change(stream: io.StringIO, level: str, shown: str) -> None:
    logger = logging.getLogger("codex_proxy.test")
    logs.set_level(level)
    for number, letter in zip((10, 20, 30, 40), "diwe", strict=True):
        logger.log(number, "said=%s", letter)
    assert [line[-1] for line in stream.getvalue().splitlines()] == list(shown)


def test_libraries_stay_quiet_at_every_level(stream: io.StringIO) -> None:
    logs.set_level("debug")
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("aiohttp.access").error("GET /?secret=1")
    logging.getLogger("some.library").warning("matters")
    assert [line.rpartition(" ")[2] for line in stream.getvalue().splitlines()] == ["matters"]


def test_a_second_setup_replaces_the_first(stream: io.StringIO) -> None:
    again = io.StringIO()
    handler = logs.setup("info", again)
    try:
        logging.getLogger("codex_proxy.test").info("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert stream.getvalue() == ""
    assert again.getvalue().count("once") == 1


async def test_lines_for_later_are_written_together_and_in_order(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("codex_proxy.test")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [one for one in root.handlers if isinstance(one, logs.LineHandler)])
    made: list[int] = []

    def render(number: int) -> str:
        made.append(number)
        return f"turn {number} key=sk-0123456789abcdef\nforged"

    later = logs.Later(logger, render)
    later.add(1)
    later.add(2)
    assert not made
    assert not stream.getvalue()
    # What is said at once stands after what was said before it.
    logger.warning("third")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1:4] for line in lines] == [
        ["INFO", "codex_proxy.test", "turn"],
        ["INFO", "codex_proxy.test", "turn"],
        ["WARNING", "codex_proxy.test", "third"],
    ]
    assert all(line.endswith(r"key=[token]\nforged") for line in lines[:2])
    assert [line[:10] for line in lines] == [lines[2][:10]] * 3

    later.add(4)
    monkeypatch.setattr(logs, "_LATER_SECONDS", 0.0)
    logging.getLogger().handlers[0].flush()
    assert made == [1, 2, 4]
    later.add(5)
    await asyncio.sleep(0.01)
    assert made == [1, 2, 4, 5]
    for number in range(logs._LATER_MOST):
        later.add(number)
    assert len(made) == 4 + logs._LATER_MOST

    logs.set_level("warn")
    later.add(6)
    logging.getLogger().handlers[0].flush()
    assert 6 not in made[-1:]


async def test_lines_for_later_are_records_when_somebody_else_listens(
    stream: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    logs.Later(logging.getLogger("codex_proxy.test"), str).add(7)
    assert caplog.messages == ["7"]
    assert stream.getvalue().endswith(" INFO codex_proxy.test 7\n")
