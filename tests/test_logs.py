"""Log lines: one per record, no secrets in any part, a level that can change."""

import ast
import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import codex_proxy
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

    def say(number: int) -> logs.Said:
        made.append(number)
        return "turn %d key=%s", (number, "sk-0123456789abcdef\nforged")

    later = logs.Later(logger, say)
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
    later: logs.Later[int] = logs.Later(
        logging.getLogger("codex_proxy.test"), lambda number: ("%d", (number,))
    )
    later.add(7)
    assert caplog.messages == ["7"]
    assert stream.getvalue().endswith(" INFO codex_proxy.test 7\n")


# --- JSON


@pytest.fixture
def objects(stream: io.StringIO) -> io.StringIO:
    """The same, as JSON."""
    logs.set_format("json")
    return stream


def said(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


LOG = logging.getLogger("codex_proxy.test")


def test_a_message_is_taken_apart_by_what_it_was_made_of(objects: io.StringIO) -> None:
    LOG.info("account state alias=%s from=%s seconds=%.0f until=%.3f", "a b=c", "ready", 12.6, 1 / 3)
    (one,) = said(objects)
    assert one.pop("time")[-1] == "Z"
    assert one == {
        "level": "info",
        "logger": "codex_proxy.test",
        "event": "account state",
        # A value may look like anything.
        "alias": "a b=c",
        "from": "ready",
        "seconds": 13,
        "until": 0.333,
    }


@pytest.mark.parametrize(
    ("message", "arguments", "expected"),
    [
        ("stopped", (), {"event": "stopped"}),
        ("not started: %s", ("no port",), {"event": "not started: no port"}),
        ("looked at every %.0f s reason=%s", (2.0, "x"), {"event": "looked at every 2 s", "reason": "x"}),
        ("told id=%s name=%s", ("req_1", "-"), {"event": "told", "request_id": "req_1"}),
        ("round done whole=%s none=%s", (True, None), {"event": "round done", "whole": True}),
        ("file mode=%o path=%s", (0o600, Path("/a b")), {"event": "file", "mode": "600", "path": "/a b"}),
        ("half alias=%s reason=it is gone", ("a",), {"event": "half", "alias": "a", "reason": "it is gone"}),
        ("nothing given=none", (), {"event": "nothing given=none"}),
        ("for now path=%s; again later", ("p",), {"event": "for now", "path": "p; again later"}),
        (
            "tries attempts=%s",
            (logs.Words(["a:ok", "b:cut"]),),
            {"event": "tries", "attempts": ["a:ok", "b:cut"]},
        ),
        ("tries attempts=%s", (logs.Words(),), {"event": "tries"}),
        ("odd time=%s level=%s", ("noon", "sea"), {"event": "odd", "time_": "noon", "level_": "sea"}),
        ("100%% done=%d", (5,), {"event": "100%", "done": 5}),
        ("50% of it", (), {"event": "50% of it"}),
    ],
)
def test_what_becomes_of_messages(
    objects: io.StringIO, message: str, arguments: tuple[object, ...], expected: dict[str, object]
) -> None:
    LOG.info(message, *arguments)
    (one,) = said(objects)
    assert {name: one[name] for name in one if name not in ("time", "level", "logger")} == expected


def test_what_others_say_is_an_event_as_it_is(objects: io.StringIO) -> None:
    logging.getLogger("other").warning({"a": 1})
    logging.getLogger("other").warning("%(name)s=%(value)d", {"name": "x", "value": 3})
    assert [one["event"] for one in said(objects)] == ["{'a': 1}", "x=3"]


def test_no_value_of_an_object_shows_a_secret(objects: io.StringIO) -> None:
    for secret in SECRETS:
        try:
            raise ValueError(f"told\n{secret} inside")
        except ValueError:
            LOG.exception("failed %s with=%s", secret, {"key": secret}, stack_info=True)
        # An escape in front of it would hide where it begins.
        LOG.warning("told text=%s", f"first\n{secret}")
        LOG.warning("told words=%s", logs.Words([f"\t{secret}", "x"]))
        LOG.warning("told text=%s", f'Bearer abcdef"{secret}\\')
    shown = objects.getvalue()
    assert not [secret for secret in SECRETS if secret in shown]
    # Each is an object still.
    assert len(said(objects)) == 4 * len(SECRETS)
    assert "ValueError: told\n[token] inside" in said(objects)[0]["traceback"]
    assert said(objects)[0]["stack"].startswith("Stack")


def test_an_object_is_one_line_without_what_steers_a_terminal(
    objects: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    # What the test runner captures goes to another process, which half a character does not survive.
    monkeypatch.setattr(root, "handlers", [one for one in root.handlers if isinstance(one, logs.LineHandler)])
    LOG.info("asked model=%s", "x\n{}\r\x1b[31m\u2028y\x9b2J\x7f\ud800")
    text = objects.getvalue()
    assert text.count("\n") == 1
    assert not any(sign in text for sign in "\r\x1b\u2028\x9b\x7f")
    assert said(objects)[0]["model"].startswith("x\n{}\r\x1b[31m\u2028y\x9b2J\x7f")


def test_the_format_can_change(stream: io.StringIO) -> None:
    LOG.info("first id=%s", 1)
    logs.set_format("json")
    LOG.info("second id=%s", 2)
    logs.set_format("text")
    LOG.info("third id=%s", 3)
    first, second, third = stream.getvalue().splitlines()
    assert first.endswith("first id=1")
    assert json.loads(second)["request_id"] == 2
    assert third.endswith("third id=3")


async def test_objects_for_later_are_those_of_records(
    objects: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [one for one in root.handlers if isinstance(one, logs.LineHandler)])
    said_of: tuple[str, tuple[object, ...]] = (
        "turn id=%s attempts=%s key=%s first=%.3f",
        ("req_1", logs.Words(["a:ok"]), "x\nsk-0123456789abcdef", 0.12345),
    )
    later: logs.Later[int] = logs.Later(LOG, lambda _: said_of)
    later.add(1)
    LOG.info(said_of[0], *said_of[1])
    one, other = said(objects)
    assert one.pop("time") <= other.pop("time")
    assert one == other
    assert one["key"] == "x\n[token]"
    assert (one["attempts"], one["first"]) == (["a:ok"], 0.123)


def messages() -> Iterator[tuple[str, int]]:
    """Yield every message of our own that is logged, and how many arguments stand behind it."""
    for path in Path(codex_proxy.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "logger"):
                continue
            arguments = node.args[1:] if node.func.attr == "log" else node.args
            if arguments and isinstance(arguments[0], ast.Constant):
                yield str(arguments[0].value), len(arguments) - 1


def test_every_message_of_ours_can_be_taken_apart() -> None:
    """Its places are as many as its arguments, and no two of its fields are called the same."""
    found = list(messages())
    assert len(found) > 50
    for message, count in found:
        plan = logs._plan(message)
        assert plan.all_places == plan.places + sum(places for _, _, places, _ in plan.fields) == count, (
            message
        )
        names = [name for name, *_ in plan.fields]
        assert len(set(names)) == len(names), message
        assert not set(names) & logs._OWN, message
