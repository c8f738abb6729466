"""The gateway's commands beside a running daemon: what is typed counts there at once."""

import csv
import io
import json
import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.daemon.test_accounts_command import beside, good, short
from tests.harness import Stand, question, standing

__all__ = ["short"]

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
async def stand(short: Path) -> AsyncIterator[Stand]:
    async with standing(short, accounts=1, ledger="billing", api_keys="[sk-an-owners-own-key]") as one:
        yield one


async def typed(stand: Stand, *arguments: str) -> str:
    """Run a command that succeeds, whatever it says beside its answer."""
    code, out, err = await beside(stand, *arguments)
    assert code == 0, err
    return out


async def test_a_key_and_its_money_from_a_terminal(stand: Stand) -> None:
    assert "alice" in await good(stand, "users", "create", "alice")
    await typed(stand, "users", "credit", "alice", "1.00", "--reason", "start")
    secret = (await typed(stand, "keys", "create", "laptop", "--user", "alice")).strip()
    headers = {"Authorization": f"Bearer {secret}"}

    answer = await stand.post("/v1/responses", question("hello"), headers=headers)
    assert answer.status == 200
    request_id = answer.headers["x-request-id"]
    # Its caller is not kept waiting for what is written down.
    books = stand.daemon.books
    assert books is not None
    await stand.until(lambda: books.ledger.statistics().writer.settled == 1)
    told = await good(stand, "usage", request_id)
    assert "alice with key laptop" in told
    assert ", paid 0." in told
    sums = json.loads(await good(stand, "usage", "--by", "user,key", "--json"))
    (one,) = sums["sums"]
    assert (one["user"], one["key"], one["turns"]) == ("alice", "laptop", 1)
    table = list(csv.DictReader(io.StringIO(await good(stand, "usage", "--csv", "--by", "key"))))
    assert [row["key"] for row in table] == ["laptop"]
    rows = await good(stand, "usage", "--rows", "5", "--user", "alice")
    assert request_id in rows
    assert "All sums agree." in await good(stand, "ledger", "check")
    (user,) = [
        user for user in json.loads(await good(stand, "users", "--json"))["users"] if user["name"] == "alice"
    ]
    assert float(user["balance"]) < 1.0
    assert user["held"] == "0.00"
    entries = await good(stand, "users", "entries", "alice")
    assert "control socket" in entries

    assert await good(stand, "keys", "revoke", "laptop", "--yes") == "laptop: revoked\n"
    assert (await stand.post("/v1/responses", question("again"), headers=headers)).status == 401


async def test_what_the_daemon_refuses_is_said_in_its_words(stand: Stand) -> None:
    code, out, err = await beside(stand, "users", "credit", "owner", "ten", "--reason", "x")
    assert (code, out) == (1, "")
    assert "amount" in err.splitlines()[-1]
    code, out, err = await beside(stand, "usage", "a/b?c=d&e#f")
    assert (code, out) == (1, "")
    assert "no usage of a request 'a/b?c=d&e#f'" in err


def typed_in(document: Path) -> list[list[str]]:
    """Return the commands that a document has its reader type, in their order."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    typed = [shlex.split(line.partition(" > ")[0], comments=True) for line in lines]
    return [words[1:] for words in typed if words[:1] == ["codex-proxy"] and len(words) > 1]


async def test_what_the_guide_says_works_from_its_first_line_to_its_last(short: Path) -> None:
    upstreams = "[{name: sub2api, base-url: 'http://127.0.0.1:9', api-key: sk-of-the-upstream}]"
    async with standing(
        short, accounts=1, ledger="billing", api_keys="[sk-an-owners-own-key]", upstreams=upstreams
    ) as stand:
        commands = typed_in(DOCS / "gateway.md")
        assert len(commands) > 20
        assert {command[0] for command in commands} == {
            "users",
            "keys",
            "usage",
            "upstreams",
            "prices",
            "ledger",
        }
        for command in commands:
            code, out, err = await beside(stand, *command)
            # Nobody is there.
            assert code == (1 if command[:2] == ["upstreams", "check"] else 0), (command, err)
            assert out, command
            assert "sk-of-the-upstream" not in out + err


async def test_upstreams_beside_a_daemon(stand: Stand) -> None:
    assert "There are no upstreams" in await good(stand, "upstreams")
    assert "There are no upstreams" in await good(stand, "upstreams", "check")


async def test_with_the_ledger_off_the_daemon_says_so(short: Path) -> None:
    async with standing(short, accounts=1) as stand:
        code, out, err = await beside(stand, "keys")
        assert (code, out) == (1, "")
        assert "set ledger: personal" in err
