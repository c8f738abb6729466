"""`codex-proxy requests` and `why` on the file alone, and what they print."""

import argparse
import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.cli import main
from codex_proxy.commands.requests import FIELDS, fits, moment, table
from codex_proxy.records.asking import Filter
from codex_proxy.records.story import request_json
from codex_proxy.trace import Caller, End, Usage
from tests.process import write_config
from tests.records.making import AT, database, turn


def odd() -> list[Any]:
    return [
        turn(1),
        turn(2, caller=Caller("k", "phone"), alias="", first_text=None, end=End.FAILED, status=429,
             error="usage_limit_reached", usage=Usage(), model=""),
        turn(3, model="=cmd|x\x1b[2J", end=End.CALLER_GONE, status=0),
    ]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A data-dir with three requests on record, and no daemon."""
    data = tmp_path / "data"
    data.mkdir()
    with database(data / "records.db", odd()):
        pass
    return write_config(tmp_path)


def run(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["-config", str(config), *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_list_for_people(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(config, capsys, "requests")
    assert (code, err) == (0, "")
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines == [
        "TIME            ID     CALLER  MODEL          ACCOUNT  OUTCOME                         FIRST  SECONDS  INPUT"
        "  CACHED  OUTPUT",
        "01-15 08:00:03  req_3  laptop  =cmd|x\\x1b[2J  work     caller_gone                      0.75     2.00   1000"
        "     800      50",
        "01-15 08:00:02  req_2  phone   -              -        failed 429 usage_limit_reached      -     2.00      -"
        "       -       -",
        "01-15 08:00:01  req_1  laptop  gpt-5.5        work     completed                        0.75     2.00   1000"
        "     800      50",
    ]  # fmt: skip


def test_json_lines(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(config, capsys, "requests", "--json", "--limit", "0")
    told = [json.loads(line) for line in out.splitlines()]
    assert told == [request_json(trace) for trace in reversed(odd())]
    assert tuple(told[0]) == FIELDS


def test_csv_has_a_head_and_no_formulas(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(config, capsys, "requests", "--csv")
    head, *rows = csv.reader(io.StringIO(out))
    assert tuple(head) == FIELDS
    told = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["id"] for row in told] == ["req_3", "req_2", "req_1"]
    assert told[0]["model"] == "'=cmd|x\\x1b[2J"
    assert (told[1]["input_tokens"], told[1]["error"], told[2]["input_tokens"]) == (
        "",
        "usage_limit_reached",
        "1000",
    )


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--caller", "phone"], [2]),
        (["--account", "work", "--limit", "1"], [3]),
        (["--outcome", "failed"], [2]),
        (["--model", "gpt-5.5"], [1]),
        (["--route", "chat"], []),
        (["--client", "codex"], [3, 2, 1]),
        (["--search", "limit_reach"], [2]),
        (["--search", "REQ_3"], [3]),
        (["--min-seconds", "2.5"], []),
        (["--since", "2027-01-15T08:00:02+00:00"], [3, 2]),
        (["--until", "2027-01-15T08:00:02"], [1]),
        (["--since", "2h"], [3, 2, 1] if time.time() - 7_200 < AT else []),
    ],
)
def test_filters(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], found: list[int]
) -> None:
    _, out, _ = run(config, capsys, "requests", "--json", *arguments)
    assert [json.loads(line)["id"] for line in out.splitlines()] == [f"req_{number}" for number in found]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--since", "yesterday"],
        ["--since", ""],
        ["--limit", "-1"],
        ["--limit", "²"],
        ["--min-seconds", "nan"],
        ["--outcome", "good"],
        ["--json", "--csv"],
    ],
)
def test_arguments_that_make_no_sense(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(config, capsys, "requests", *arguments)
    assert caught.value.code == 2


def test_nothing_on_record_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(config, capsys, "requests", "--caller", "nobody")
    assert (code, out) == (0, "No such request is on record.\n")


@pytest.mark.parametrize("command", [["requests"], ["why", "req_1"]])
def test_without_a_file_it_says_where_it_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    code, out, err = run(write_config(tmp_path), capsys, *command)
    assert (code, out) == (1, "")
    assert str(tmp_path / "data" / "records.db") in err
    assert not (tmp_path / "data").exists()


def test_a_broken_file_is_an_error_and_stays_as_it_is(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data" / "records.db"
    file.write_bytes(b"no database" * 1_000)
    code, _, err = run(config, capsys, "requests")
    assert code == 1
    assert "not a database" in err
    assert file.read_bytes() == b"no database" * 1_000


def test_why_without_a_daemon(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(config, capsys, "why", "req_1")
    assert code == 0
    assert "answered by work, status 200" in out
    assert "compared 9 accounts" in out
    code, out, err = run(config, capsys, "why", "req_9")
    assert (code, out) == (1, "")
    assert "'req_9'" in err


def test_following_needs_the_daemon(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(config, capsys, "requests", "--follow")
    assert code == 1
    assert "no daemon answers" in err


@pytest.mark.parametrize(
    ("text", "ago"), [("90s", 90), ("2h", 7_200), ("1d12h", 129_600), ("1.5h", 5_400), ("1w", 604_800)]
)
def test_a_time_ago(text: str, ago: float) -> None:
    assert moment(text) == pytest.approx(time.time() - ago, abs=5)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2027-01-15", AT - 28_800),
        ("2027-01-15T08:00", AT),
        ("2027-01-15 08:00:01", AT + 1),
        ("2027-01-15T09:00+01:00", AT),
    ],
)
def test_a_date(text: str, at: float) -> None:
    assert moment(text) == at


@pytest.mark.parametrize("text", ["", "x", "2", "2 hours", "2027-13-01", "-1h", "9" * 400 + "-01-01"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no time"):
        moment(text)


def test_who_follows_sees_what_is_asked_for() -> None:
    request = request_json(turn(1, error="usage_limit"))
    assert fits(request, Filter())
    for wanted in (
        Filter(caller="laptop"), Filter(account="work", model="gpt-5.5"), Filter(q="REQ_"), Filter(q="usage"),
        Filter(since=AT, until=AT + 5), Filter(min_seconds=2.0),
    ):  # fmt: skip
        assert fits(request, wanted)
    for wanted in (
        Filter(caller="phone"), Filter(outcome="failed"), Filter(q="nothing"), Filter(since=AT + 5),
        Filter(until=AT + 1), Filter(min_seconds=2.5), Filter(route="chat"), Filter(client="other"),
    ):  # fmt: skip
        assert not fits(request, wanted)


def test_an_empty_table_has_words() -> None:
    assert table([]) == ["No such request is on record."]
