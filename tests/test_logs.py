"""Log lines: one per record, no secrets in any part, a level that can change."""

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
