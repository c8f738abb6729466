"""Text for a terminal: columns that stand straight, times that a person reads at a glance."""

import io

import pytest

from codex_proxy.commands import terminal
from codex_proxy.errors import ProxyError
from tests.accounts.making import DAY, HOUR, NOW


@pytest.mark.parametrize(
    ("text", "taken"),
    [("", 0), ("work", 4), ("日本", 4), ("\uff57", 2), ("한글", 4), ("é", 1), ("e\u0301", 1), ("a日b", 4)],
)
def test_wide_letters_take_two_columns(text: str, taken: int) -> None:
    assert terminal.width(text) == taken


def test_columns_stand_below_each_other() -> None:
    rows = [("NAME", "N", "WORD"), ("日本", "10", "x"), ("abcdef", "7", "")]
    assert terminal.columns(rows, ("<", ">", "<")) == ["NAME     N  WORD", "日本    10  x", "abcdef   7"]
    assert terminal.columns([], ("<",)) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0.4, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (3_599, "59m"),
        (HOUR, "1h"),
        (2 * HOUR + 600, "2h10m"),
        (DAY, "1d"),
        (3 * DAY + 4 * HOUR, "3d4h"),
        (9.99 * DAY, "9d23h"),
        (10.5 * DAY, "10d"),
    ],
)
def test_a_span_has_two_units_at_most(seconds: float, text: str) -> None:
    assert terminal.span(seconds) == text


@pytest.mark.parametrize(
    ("at", "text"),
    [(NOW, "08:00"), (NOW + 15.9 * HOUR, "23:54"), (NOW + 17 * HOUR, "Sat 01:00"), (NOW + 7 * DAY, "Jan 22")],
)
def test_a_moment_has_its_day_when_that_is_not_today(at: float, text: str) -> None:
    assert terminal.clock(at, NOW) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2027-01-15T08:00:00Z", NOW),
        ("2027-01-15T08:00:00.500Z", NOW + 0.5),
        (None, None),
        ("soon", None),
        (7, None),
    ],
)
def test_a_time_is_read_as_our_json_has_it(text: object, seconds: float | None) -> None:
    assert terminal.seconds_of(text) == seconds


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_whose_owner_does_not_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.has_colour(Screen())
    assert not terminal.has_colour(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.has_colour(Screen())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.has_colour(Screen())
    assert terminal.paint("x", "red", is_on=True) == "\x1b[31mx\x1b[0m"
    assert terminal.paint("x", "red", is_on=False) == "x"


@pytest.mark.parametrize(
    ("typed", "is_meant"),
    [("y\n", True), (" YES \n", True), ("n\n", False), ("\n", False), ("", False), ("yep\n", False)],
)
def test_a_question_is_asked_at_a_terminal(
    typed: str, is_meant: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Screen(typed))
    assert terminal.confirm("Take it out?", is_yes=False) is is_meant
    assert capsys.readouterr().out.startswith("Take it out? [y/N] ")


def test_where_nobody_can_answer_nothing_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ProxyError, match="say --yes"):
        terminal.confirm("Take it out?", is_yes=False)
    assert terminal.confirm("Take it out?", is_yes=True)
    # A daemon's child may have none at all.
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ProxyError, match="say --yes"):
        terminal.confirm("Take it out?", is_yes=False)


def test_what_steers_a_terminal_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say("a\x1b[31mb\x9bc\x7f\nd\re\u202e\udcff", "next")
    terminal.complain("x\x1b]0;t\x07\ny")
    output = capsys.readouterr()
    assert output.out == "a\\x1b[31mb\\x9bc\\x7f\\nd\\re\\u202e\\udcff\nnext\n"
    assert output.err == "codex-proxy: x\\x1b]0;t\\x07\\ny\n"
    terminal.say(terminal.paint("red", "red", is_on=True), is_painted=True)
    assert capsys.readouterr().out == "\x1b[31mred\x1b[0m\n"


def test_json_holds_nothing_that_steers_a_terminal(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    terminal.say_json('{"a": "\x9b2J\x7f日"}'.encode())
    assert capfdbinary.readouterr().out.decode() == '{"a": "\\u009b2J\\u007f日"}\n'


def test_a_long_text_is_wrapped_and_no_word_is_cut() -> None:
    lines = terminal.wrapped("word " * 30 + "x" * 90, indent="  ")
    assert [len(line) <= 78 for line in lines] == [True, True, False]
    assert all(line.startswith("  ") for line in lines)
