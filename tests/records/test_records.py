"""The records of one daemon: on and off, answered and not."""

import asyncio
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.clock import SystemClock
from codex_proxy.config import Live, Settings
from codex_proxy.records.asking import Page, no_cache, no_listing
from codex_proxy.records.records import Records, Unavailable
from codex_proxy.storage import store as module
from tests.records.making import AT, turn

ALL = Page.of({})


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.01)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come true"
        await asyncio.sleep(0.005)


@pytest.fixture
def live() -> Live:
    return Live(Settings())


@pytest.fixture
async def records(tmp_path: Path, live: Live) -> AsyncIterator[Records]:
    made = Records(tmp_path, live=live, clock=SystemClock())
    made.may_write = True
    yield made
    await made.aclose()


def switch(live: Live, **settings: Any) -> None:
    live.replace(dataclasses.replace(live.current, **settings))


async def test_what_is_noted_can_be_asked_for(records: Records) -> None:
    await records.look()
    for number in range(3):
        records.note(turn(number))
    await until(lambda: records.statistics().written == 3)
    listing = await records.page(ALL)
    assert [one["id"] for one in listing["requests"]] == ["req_2", "req_1", "req_0"]
    assert (listing["next"], listing["since"]) == (None, AT)
    assert (listing["callers"], listing["accounts"], listing["models"]) == (["laptop"], ["work"], ["gpt-5.5"])
    found = await records.find("req_1")
    assert found is not None
    assert found.trace.id == "req_1"
    assert await records.find("req_9") is None


async def test_the_cursor_leads_to_the_next_page(records: Records) -> None:
    for number in range(25):
        records.note(turn(number))
    await records.look()
    await until(lambda: records.statistics().written == 25)
    seen: list[str] = []
    query = {"limit": "10"}
    while True:
        listing = await records.page(Page.of(query))
        seen += [one["id"] for one in listing["requests"]]
        if listing["next"] is None:
            break
        assert isinstance(listing["next"], str)
        query["before"] = listing["next"]
    assert seen == [f"req_{number}" for number in reversed(range(25))]


async def test_before_anything_was_written_there_is_nothing(records: Records) -> None:
    assert await records.page(ALL) == no_listing()
    assert await records.cache(24) == no_cache()
    assert await records.find("req_1") is None


async def test_it_is_switched_off_and_on_while_it_runs(records: Records, live: Live, tmp_path: Path) -> None:
    await records.look()
    records.note(turn(1))
    await until(lambda: records.statistics().written == 1)
    switch(live, records="off")
    await records.look()
    # Closed in order.
    assert sorted(os.listdir(tmp_path)) == ["records.db", "store.lock"]
    records.note(turn(2))
    assert records.statistics().waiting == 0
    assert await records.page(ALL) == no_listing()
    switch(live, records="on")
    records.note(turn(3))
    await records.look()
    await until(lambda: records.statistics().written == 1)
    assert [one["id"] for one in (await records.page(ALL))["requests"]] == ["req_3", "req_1"]


async def test_a_short_life_is_recorded_too(tmp_path: Path, live: Live) -> None:
    short = Records(tmp_path, live=live, clock=SystemClock())
    short.may_write = True
    short.note(turn(1))
    await short.aclose()
    again = Records(tmp_path, live=live, clock=SystemClock())
    assert [one["id"] for one in (await again.page(ALL))["requests"]] == ["req_1"]
    await again.aclose()


async def test_one_that_must_not_write_writes_nothing_and_reads(
    records: Records, tmp_path: Path, live: Live
) -> None:
    await records.look()
    records.note(turn(1))
    await until(lambda: records.statistics().written == 1)
    other = Records(tmp_path, live=live, clock=SystemClock())
    await other.look()
    other.note(turn(2))
    await asyncio.sleep(0.05)
    assert [one["id"] for one in (await other.page(ALL))["requests"]] == ["req_1"]
    records.may_write = False
    other.may_write = True
    await until(lambda: other.statistics().written == 1)
    await other.aclose()


async def test_a_database_that_cannot_be_read_says_so(records: Records, tmp_path: Path) -> None:
    (tmp_path / "records.db").write_bytes(b"no database" * 1_000)
    records.may_write = False
    with pytest.raises(Unavailable, match="not a database"):
        await records.page(ALL)


async def test_a_question_does_not_hold_up_the_loop(records: Records) -> None:
    records.note(turn(1))
    await records.look()
    await until(lambda: records.statistics().written == 1)
    assert records._store is not None
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(connection: Any) -> int:
        loop.call_soon_threadsafe(asked.set)
        time.sleep(0.2)  # noqa: TID251 -- a database that takes its time
        return 1

    question = loop.run_in_executor(None, records._store.read, slow)
    await asked.wait()
    began = time.monotonic()
    await asyncio.sleep(0.01)
    assert time.monotonic() - began < 0.15
    assert await question == 1


OFF = """
import asyncio, pathlib, sys
from tests.harness import standing

async def main():
    async with standing(pathlib.Path(sys.argv[1]), accounts=1, records=sys.argv[2]) as stand:
        await stand.ask("hi")
        assert (await stand.get("/requests")).json["requests"]
        assert (await stand.get("/why/" + (await stand.get("/requests")).json["requests"][0]["id"])).status == 200
        await asyncio.sleep(0.1)

asyncio.run(main())
print(sorted(name for name in ("sqlalchemy", "alembic", "sqlite3") if name in sys.modules))
"""


def test_switched_off_nothing_is_imported_and_nothing_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFF, str(tmp_path), "off"],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert not list((tmp_path / "data").glob("*.db*"))
    assert not (tmp_path / "data" / "store.lock").exists()
