"""`codex-proxy keys`, `users`, `usage`, `prices`, `upstreams` and `ledger` on the database alone."""

import argparse
import asyncio
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.cli import main
from codex_proxy.commands import gateway, usage
from codex_proxy.storage.lock import StoreLock
from tests.process import write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, ledger="billing")


@pytest.fixture(scope="module")
def new_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a ledger with nothing in it: making one takes longer than copying it."""
    folder = tmp_path_factory.mktemp("ledger")
    assert main(["-config", str(write_config(folder, ledger="billing")), "ledger"]) == 0
    return folder / "data"


class Terminal:
    """Somebody who types commands."""

    def __init__(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.config = config
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        try:
            code = main(["-config", str(self.config), *arguments])
        except SystemExit as exc:
            code = int(str(exc.code))
        out, err = self._capsys.readouterr()
        return code, out, err

    def good(self, *arguments: str) -> str:
        code, out, err = self.run(*arguments)
        assert code == 0, err
        return out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.good(*arguments, "--json"))

    def bad(self, *arguments: str) -> str:
        code, out, err = self.run(*arguments)
        assert (code, out) == (1, "")
        return err


@pytest.fixture
def terminal(new_ledger: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> Terminal:
    shutil.copytree(new_ledger, config.parent / "data")
    capsys.readouterr()
    return Terminal(config, capsys)


def test_a_key_from_its_making_to_its_end(terminal: Terminal) -> None:
    assert "There is no such key" in terminal.good("keys")
    code, text, err = terminal.run(
        "keys", "create", "laptop", "--requests", "60", "--tokens", "10000", "--concurrency", "4",
        "--budget", "day=1.50", "--budget", "month=20", "--model", "gpt-5*", "--endpoint", "responses",
        "--network", "192.0.2.0/24", "--expires", "30d",
    )  # fmt: skip
    assert code == 0
    # Nothing but the key is on stdout.
    secret = text.strip()
    assert secret.startswith("sk-")
    assert len(text.splitlines()) == 1
    assert "shown this once" in err
    (key,) = terminal.json("keys")["keys"]
    assert secret not in json.dumps(key)
    assert key["limits"] == {
        "requests_per_minute": 60,
        "tokens_per_minute": 10_000,
        "concurrency": 4,
        "budgets": [{"window": "day", "amount": "1.50"}, {"window": "month", "amount": "20.00"}],
        "models": ["gpt-5*"],
        "endpoints": ["responses"],
        "networks": ["192.0.2.0/24"],
    }
    assert (datetime.fromisoformat(key["expires_at"]) - datetime.now(UTC)).days in (29, 30)
    shown = terminal.good("keys")
    assert "60 requests/min, 10000 tokens/min, 4 at a time, $1.50 per day, $20.00 per month, gpt-5*" in shown
    assert secret not in shown

    assert terminal.good("keys", "limits", "laptop").startswith("laptop: 60 requests/min")
    # All of them are replaced, by what is said, or by none.
    assert terminal.good("keys", "limits", key["hint"], "--budget", "5h=3") == "laptop: $3.00 per 5h\n"
    assert terminal.good("keys", "limits", key["id"], "--none") == "laptop: none\n"

    made = terminal.json("keys", "rotate", "laptop", "--grace", "10m")
    assert made["secret"] != secret
    assert made["key"]["id"] == key["id"]
    assert terminal.good("keys", "revoke", "laptop", "--yes") == "laptop: revoked\n"
    assert terminal.json("keys", "--status", "active")["keys"] == []
    assert "revoked" in terminal.bad("keys", "rotate", "laptop")


def test_a_key_is_named_so_that_one_is_meant(terminal: Terminal) -> None:
    first = terminal.json("keys", "create", "twin")["key"]["id"]
    second = terminal.json("keys", "create", "twin")["key"]["id"]
    err = terminal.bad("keys", "limits", "twin", "--none")
    assert first in err
    assert second in err
    terminal.good("keys", "revoke", first, "--yes")
    # The one that still works is meant then.
    assert terminal.json("keys", "limits", "twin")["id"] == second
    assert "there is no key 'other'" in terminal.bad("keys", "revoke", "other", "--yes")
    text = terminal.json("keys", "rotate", second)["secret"]
    err = terminal.bad("keys", "revoke", text, "--yes")
    assert "by its id or name" in err
    assert text not in err


def test_whose_a_key_is_can_be_said_before_the_action(terminal: Terminal) -> None:
    terminal.good("users", "create", "alice")
    assert terminal.json("keys", "--user", "alice", "create", "one")["key"]["user"] == "alice"
    assert terminal.json("keys", "create", "two")["key"]["user"] == "owner"


def test_nothing_is_ended_that_nobody_confirms(terminal: Terminal) -> None:
    terminal.good("keys", "create", "laptop")
    assert "say --yes" in terminal.bad("keys", "revoke", "laptop")
    assert terminal.json("keys")["keys"][0]["status"] == "active"


def test_a_user_and_its_money(terminal: Terminal) -> None:
    assert "balance 0.00" in terminal.good("users", "create", "alice", "--budget", "month=25")
    assert "alice: $25.00 per month" in terminal.good("users", "limits", "alice")
    code, out, err = terminal.run("users", "credit", "alice", "10", "--reason", "start")
    assert (code, out) == (0, "alice: credit 10.00, balance 10.00\n")
    key = err.split("idempotency key: ")[1].strip()
    # Once more after all, by the one who did not see its end.
    assert terminal.good(
        "users", "credit", "alice", "10", "--reason", "start", "--idempotency-key", key
    ).endswith("balance 10.00\n")
    assert "balance 7.50" in terminal.good("users", "adjust", "alice", "-2.50", "--reason", "typing error")
    # Another one without a key is another one.
    assert "balance 5.00" in terminal.good("users", "adjust", "alice", "-2.50", "--reason", "again")
    entries = [json.loads(line) for line in terminal.good("users", "entries", "alice", "--json").splitlines()]
    assert [(one["kind"], one["amount"], one["reason"]) for one in entries] == [
        ("adjust", "-2.50", "again"), ("adjust", "-2.50", "typing error"), ("credit", "10.00", "start"),
    ]  # fmt: skip
    assert {one["actor"] for one in entries} == {gateway.ACTOR}
    assert "typing error" in terminal.good("users", "entries", "alice")
    assert "suspended" in terminal.good("users", "suspend", "alice")
    assert "active" in terminal.good("users", "resume", "alice")
    assert "not billed" in terminal.good("users", "create", "bob", "--unbilled")
    assert [user["name"] for user in terminal.json("users")["users"]] == ["alice", "bob", "owner"]
    assert "5.00" in terminal.good("users")
    assert terminal.good("ledger", "check") == "All sums agree.\n"
    assert terminal.json("ledger")["balance"] == "5.00"


REFUSED = [
    (["users", "credit", "owner", "ten", "--reason", "x"], "amount"),
    (["users", "credit", "owner", "-1", "--reason", "x"], "must be more than 0"),
    (["users", "credit", "nobody", "1", "--reason", "x"], "there is no user 'nobody'"),
    (["users", "adjust", "owner", "-1", "--reason", "x"], "0.00"),
    (["users", "create", "  "], "name"),
    (["users", "create", "a\udcff"], "is no text"),
    (["users", "create", "owner"], "owner"),
    (["keys", "create", "x", "--network", "here"], "networks.0"),
    (["keys", "create", "x", "--user", "nobody"], "there is no user 'nobody'"),
    (["keys", "create", "x", "--budget", "day=lots"], "amount"),
    (["keys", "create", "x", "--expires", "2020-01-01"], "expires_at"),
    (["usage", "req_none"], "no usage of a request"),
    (["usage", "--since", "2026-02-01", "--until", "2026-01-01"], "until"),
    (["prices", "set", "m", "--input", "x", "--output", "1"], "input"),
    (["prices", "end", "77"], "price"),
    (["upstreams", "check", "nowhere"], "nowhere"),
]


def test_what_cannot_be_done_is_said(terminal: Terminal) -> None:
    # One database for all: making one takes longer than asking it.
    for arguments, words in REFUSED:
        assert words in terminal.bad(*arguments), arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ["keys", "create", "x", "--budget", "hour=1"],
        ["keys", "create", "x", "--requests", "0"],
        ["keys", "create", "x", "--endpoint", "nowhere"],
        ["keys", "create", "x", "--expires", "soon"],
        ["keys", "rotate", "x", "--grace", "long"],
        ["users", "adjust", "alice", "-1"],
        ["usage", "--by", "hour"],
        ["usage", "--json", "--csv"],
        ["usage", "--rows", "0"],
        ["usage", "--rows", "5", "--by", "user"],
        ["usage", "req_1", "--csv"],
        ["usage", "req_1", "--user", "alice"],
        ["usage", ""],
        ["usage", "--since", "999999w"],
        ["keys", "create", "x", "--expires", "999999w"],
        ["keys", "limits", "x", "--none", "--requests", "1"],
        ["users", "limits", "x", "--none", "--model", "m"],
        ["upstreams", "check", ""],
        ["prices", "set", "m"],
        ["prices", "rerate", "--since", "7d"],
        ["ledger", "repair"],
    ],
    ids=" ".join,
)
def test_what_is_no_command_is_said(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    terminal = Terminal(config, capsys)
    code, out, err = terminal.run(*arguments)
    assert (code, out) == (2, "")
    assert "usage: " in err
    assert not (terminal.config.parent / "data").exists()


def test_prices(terminal: Terminal) -> None:
    listed = terminal.good("prices", "--model", "gpt-5")
    assert "gpt-5  standard   1.25   0.125" in listed
    assert "has a price" in terminal.good("prices", "--model", "unheard-of")
    terminal.good(
        "prices", "set", "unheard-of", "--input", "1", "--cached", "0.1", "--output", "2.5", "--since", "1d"
    )
    (own,) = terminal.json("prices", "--model", "unheard-of")["prices"]
    assert (own["source"], own["input"], own["cached"], own["output"]) == ("own", "1.00", "0.10", "2.50")
    assert "number 2" in terminal.good("prices", "end", own["own_id"])
    dry = terminal.good("prices", "rerate", "--since", "7d", "--reason", "new prices")
    assert "0 of 0 requests would change" in dry
    assert "say --apply" in dry
    assert "0 of 0 requests changed" in terminal.good(
        "prices", "rerate", "--since", "7d", "--reason", "new prices", "--apply"
    )


def test_usage_of_nobody(terminal: Terminal) -> None:
    assert terminal.good("usage") == "Nothing was used.\n"
    assert terminal.good("usage", "--rows") == "Nothing was used.\n"
    assert terminal.json("usage", "--by", "user,model")["total"]["turns"] == 0
    (head,) = csv.reader(io.StringIO(terminal.good("usage", "--csv", "--by", "key,day")))
    assert head[:3] == ["key_id", "key", "day"]


class Tables:
    """A gateway that has a table of five."""

    async def ask(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: object = None
    ) -> bytes:
        return b"id,model\r\n" + b"".join(b'%d,"a, ""b"""\r\n' % number for number in range(5))


def test_a_table_has_as_many_rows_as_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    usage.add_arguments(parser)
    asyncio.run(usage._show(Tables(), parser.parse_args(["--rows", "2", "--csv"])))
    assert capsys.readouterr().out == 'id,model\n0,"a, ""b"""\n1,"a, ""b"""\n'


def test_upstreams_are_checked_from_here_when_no_daemon_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unused_tcp_port: int
) -> None:
    upstreams = (
        f"[{{name: near, base-url: 'http://127.0.0.1:{unused_tcp_port}/v1', api-key: sk-theirs-and-secret}}]"
    )
    terminal = Terminal(write_config(tmp_path, upstreams=upstreams), capsys)
    listed = terminal.good("upstreams")
    assert f"near  http://127.0.0.1:{unused_tcp_port}" in listed
    for arguments in (["upstreams", "check"], ["upstreams", "check", "near"]):
        code, out, err = terminal.run(*arguments)
        assert (code, err) == (1, "")
        assert "[1/1] near: abnormal" in out
        assert "secret" not in out + listed


def test_without_a_ledger_it_is_said_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(write_config(tmp_path), capsys)
    for command in ("keys", "users", "usage", "prices", "ledger"):
        assert "set ledger: personal" in terminal.bad(command)
    # Those of the configuration need none.
    assert "There are no upstreams" in terminal.good("upstreams")
    assert not (tmp_path / "data").exists()


def test_with_the_ledger_off_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from codex_proxy.cli import main;"
        f"main(['-config', {str(write_config(tmp_path))!r}, 'upstreams']);"
        "print(*[m for m in sys.modules if m.startswith('codex_proxy.ledger.') or m.startswith('alembic')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    assert done.stdout.splitlines()[1:] == [""]


def test_a_database_that_another_process_writes_is_left_alone(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codex_proxy.ledger.ledger._LOCK_SECONDS", 0.0)
    terminal.good("users")
    lock = StoreLock(terminal.config.parent / "data")
    assert lock.acquire("another")
    try:
        code, out, err = terminal.run("users", "create", "alice")
    finally:
        lock.release("another")
    assert (code, out) == (2, "")
    assert "ledger = billing" in err
