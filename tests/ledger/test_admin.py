"""The admin API on both databases: what it writes is what it reads, and another daemon sees it."""

import asyncio
import json
from pathlib import Path

from tests.ledger.conftest import Database
from tests.server.desks import desk

KEY = "sk-of-the-upstream-0123"


async def test_it_works_on_both_databases(database: Database) -> None:
    async with desk(database.folder, database_url=database.url) as api:
        ann = await api.user("ann", "5", limits={"budgets": [{"window": "day", "amount": "4"}]})
        key = await api.key(ann)
        await api.spend(key, "r1", 1_000_000)
        await api.spend(key, "r2", None, model="nobody-knows")
        sums = await api.ask("GET", "/usage/sums", by="user,key,model,day")
        assert sums["total"]["cost"] == "0.001"
        assert len(sums["sums"]) == 2
        assert [row["request_id"] for row in (await api.ask("GET", "/usage", limit="1"))["usage"]] == ["r2"]
        assert (await api.ask("GET", "/usage/r1"))["debit"] == "0.001"
        (budget,) = (await api.ask("GET", f"/users/{ann['id']}/budgets"))["budgets"]
        assert budget["spent"] == "0.001"
        entries = (await api.ask("GET", f"/users/{ann['id']}/entries"))["entries"]
        assert [one["kind"] for one in entries] == ["debit", "credit"]
        own = await api.ask("POST", "/prices", {"model": "nobody-knows", "input": "1", "output": "1"})
        await api.ask("DELETE", f"/prices/{own['id']}")
        found = await api.ask("GET", "/audit", target="nobody", limit="1")
        assert found["entries"][0]["action"] == "price.end"
        assert (await api.ask("GET", "/audit", target="nobody", before=found["next"]))["entries"]
        assert await api.ask("POST", "/ledger/check") == {"ok": True, "problems": []}


async def test_upstreams_are_kept_in_both_databases(database: Database) -> None:
    async with desk(database.folder, database_url=database.url) as api:
        body = {"name": "far", "base_url": "http://127.0.0.1:9/v1", "api_key": KEY, "models": ["a*"]}
        await api.ask("POST", "/upstreams", body)
        await api.ask("PATCH", "/upstreams/far", {"weight": 2.5})
        assert (await api.refusal("POST", "/upstreams", body))[:2] == (409, "name")
    async with desk(database.folder, database_url=database.url) as api:
        provider = api.desk.providers.get("far")
        assert provider is not None
        definition = provider.definition
        assert (definition.api_key, definition.weight, definition.models) == (KEY, 2.5, (("a*", ""),))
        told = json.dumps([await api.ask("GET", "/upstreams"), await api.ask("GET", "/audit")])
        assert KEY not in told
        assert await api.ask("DELETE", "/upstreams/far") == {}
        assert (await api.ask("GET", "/upstreams"))["upstreams"] == []


async def test_another_daemon_takes_over_what_was_added(postgres: Database, tmp_path: Path) -> None:
    other = tmp_path / "other"
    await asyncio.to_thread(other.mkdir)
    async with (
        desk(postgres.folder, database_url=postgres.url) as here,
        desk(other, database_url=postgres.url) as there,
    ):
        (look,) = there.desk.kept.jobs()
        for change, wanted in (("POST", ["far"]), ("DELETE", [])):
            body = {"name": "far", "base_url": "http://127.0.0.1:9", "api_key": KEY}
            path = "/upstreams" if change == "POST" else "/upstreams/far"
            await here.ask(change, path, body if change == "POST" else None)
            names: list[str] = ["?"]
            for _ in range(300):
                await look.run()
                names = [one["name"] for one in (await there.ask("GET", "/upstreams"))["upstreams"]]
                if names == wanted:
                    break
                await asyncio.sleep(0.01)
            assert names == wanted
