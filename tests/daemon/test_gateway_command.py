"""The gateway's commands beside a running daemon: what is typed counts there at once."""

import csv
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.daemon.test_accounts_command import beside, good, short
from tests.harness import Stand, question, standing

__all__ = ["short"]


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
    await stand.idle()
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


async def test_upstreams_beside_a_daemon(stand: Stand) -> None:
    assert "There are no upstreams" in await good(stand, "upstreams")
    assert "There are no upstreams" in await good(stand, "upstreams", "check")


async def test_with_the_ledger_off_the_daemon_says_so(short: Path) -> None:
    async with standing(short, accounts=1) as stand:
        code, out, err = await beside(stand, "keys")
        assert (code, out) == (1, "")
        assert "set ledger: personal" in err
