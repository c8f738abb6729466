"""Records through the whole daemon: what callers do is what the owner can ask for."""

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy.simulator import Script, Simulator
from codex_proxy.storage import store as module
from tests.daemon.test_hand_over import serving
from tests.harness import Stand, question, standing
from tests.process import run


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.01)


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    async with standing(tmp_path, records="on") as made:
        yield made


async def recorded(stand: Stand, count: int, **query: str) -> list[Any]:
    """Wait until so many requests are on record; return them, the newest first."""
    deadline = time.monotonic() + 5.0
    while True:
        text = "&".join(f"{name}={value}" for name, value in query.items())
        answer = await stand.get(f"/requests?{text}")
        assert answer.status == 200, answer.body
        found: list[Any] = answer.json["requests"]
        if len(found) >= count:
            assert len(found) == count
            return found
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)


def marks(detail: Any) -> list[str]:
    return [one["mark"] for one in detail["marks"]]


async def test_a_turn_and_its_whole_story(stand: Stand) -> None:
    stand.sim.script(Script.text("hello there"))
    answer = await stand.ask("hi", headers={"x-request-id": "req_mine"})
    (told,) = await recorded(stand, 1)
    request_id = answer.headers["x-request-id"]
    assert told["id"] == request_id
    assert (told["outcome"], told["status"], told["caller"], told["stream"]) == (
        "completed",
        200,
        "local",
        True,
    )
    assert told["input_tokens"] > 0
    assert told["usage_source"] == "backend"
    whole = (await stand.get(f"/requests/{request_id}")).json
    assert {name: whole[name] for name in told} == told
    assert whole["request_bytes"] > 0
    assert whole["answer_bytes"] > 0
    assert whole["capture"] is None
    assert marks(whole)[:3] == ["received", "read", "picked"]
    assert marks(whole)[-4:] == ["headers", "first_event", "first_text", "end"]
    times = [one["after_seconds"] for one in whole["marks"]]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(told["seconds"], abs=0.0002)
    # One story, whether it is remembered or on record.
    remembered, written = (
        (await stand.get(f"/why/{request_id}")).json,
        await stand.daemon.requests.story(request_id),
    )
    assert written is not None
    assert [step["decision"] for step in written["steps"]] == [
        step["decision"] for step in remembered["steps"]
    ]
    assert {**written, "steps": 0, "marks": 0} == {**remembered, "steps": 0, "marks": 0}


async def test_only_a_new_connection_has_a_mark_for_it(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, records="on", keepalive_interval=0) as stand:
        await stand.daemon.outbound.aclose()
        ids = [(await stand.ask("hi")).headers["x-request-id"] for _ in range(2)]
        await recorded(stand, 2)
        first, second = [(await stand.get(f"/requests/{one}")).json for one in ids]
    assert "connected" in marks(first)
    assert marks(first).index("connected") < marks(first).index("headers")
    assert "connected" not in marks(second)


async def test_a_call_without_words_has_its_first_text(stand: Stand) -> None:
    stand.sim.script(Script.tool("run", {"a": 1}))
    answer = await stand.ask("hi", tools=[{"type": "function", "name": "run", "parameters": {}}])
    await recorded(stand, 1)
    whole = (await stand.get(f"/requests/{answer.headers['x-request-id']}")).json
    assert whole["first_text_seconds"] is not None


async def test_a_request_that_waited_in_the_queue_says_so(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, records="on", max_concurrency=1) as stand:
        stand.sim.script(Script.text("slow", delay=0.04), Script.text("quick"))
        first = asyncio.get_running_loop().create_task(stand.ask("one"))
        await stand.until(lambda: stand.daemon.executor.in_flight == 1)
        second = await stand.ask("two")
        await first
        await recorded(stand, 2)
        whole = (await stand.get(f"/requests/{second.headers['x-request-id']}")).json
    assert marks(whole)[:4] == ["received", "read", "queued", "picked"]
    queued, picked = whole["marks"][2:4]
    assert queued["seconds"] > 0.1
    assert picked["after_seconds"] - queued["after_seconds"] == pytest.approx(queued["seconds"], abs=0.05)


async def test_what_was_refused_before_any_account_is_on_record(stand: Stand) -> None:
    refused = await stand.post("/v1/responses", {"model": 3})
    assert refused.status == 400
    await stand.post("/v1/messages", {"nothing": True})
    unparsed = await stand.post("/v1/chat/completions", [1])
    found = await recorded(stand, 3, outcome="failed")
    assert [one["route"] for one in found] == ["chat", "messages", "responses"]
    assert all(one["status"] == 400 and one["attempts"] == 0 and one["account"] is None for one in found)
    assert (await stand.get(f"/why/{unparsed.headers['x-request-id']}")).json["status"] == 400


async def test_every_way_to_ask_is_recorded(stand: Stand) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
    ):
        answer = await stand.post(path, {"model": "gpt-5.5", **body})
        assert answer.status == 200
    async with stand.session.ws_connect("/v1/responses") as socket:
        for _ in range(2):
            await socket.send_json({"type": "response.create", "model": "gpt-5.5", "input": "hi"})
            while (await socket.receive_json(timeout=5.0))["type"] != "response.completed":
                pass
        await socket.send_json({"type": "response.create", "model": 7})
        await socket.receive_json(timeout=5.0)
    found = await recorded(stand, 7)
    assert [one["route"] for one in reversed(found)] == [
        "chat",
        "messages",
        "completions",
        *["responses"] * 4,
    ]
    assert {one["outcome"] for one in found} == {"completed", "failed"}
    assert all(one["first_text_seconds"] is not None for one in found[1:])


async def test_a_caller_who_leaves_is_recorded(stand: Stand) -> None:
    stand.sim.script(Script.long_text(500, delay=0.02))
    async with stand.asking("hi"):
        pass
    (told,) = await recorded(stand, 1)
    assert (told["outcome"], told["usage_source"]) == ("caller_gone", "estimate")


async def test_client_keys_appear_by_their_names(tmp_path: Path) -> None:
    async with standing(tmp_path, records="on", api_keys='["laptop: sk-one-1", "phone: sk-two-2"]') as stand:
        for key in ("sk-one-1", "sk-two-2"):
            await stand.ask("hi", headers={"authorization": f"Bearer {key}"})
        stand.session.headers["authorization"] = "Bearer sk-one-1"
        found = await recorded(stand, 2)
        assert [one["caller"] for one in found] == ["phone", "laptop"]
        await recorded(stand, 1, caller="phone")
        assert (await stand.get("/requests")).json["callers"] == ["laptop", "phone"]
        await stand.daemon.stop()
        written = b"".join([path.read_bytes() for path in (tmp_path / "data").iterdir() if path.is_file()])
        assert b"sk-one" not in written
        assert b"sk-two" not in written


async def test_only_the_owner_may_ask(tmp_path: Path) -> None:
    async with standing(
        tmp_path, records="on", api_keys="[sk-one-1]", admin_key="'a-long-key-for-the-owner'"
    ) as stand:
        for path in ("/requests", "/requests/live", "/requests/req_1"):
            assert (await stand.get(path)).status == 401
            assert (await stand.get(path, headers={"authorization": "Bearer sk-one-1"})).status in (401, 403)


@pytest.mark.parametrize("query", ["limit=0", "before=x", "outcome=good", "since=x", "min_seconds=-1"])
async def test_a_question_that_makes_no_sense_names_what_is_wrong(stand: Stand, query: str) -> None:
    answer = await stand.get(f"/requests?{query}")
    assert answer.status == 400
    assert answer.json["error"]["param"] == query.split("=")[0]


@pytest.mark.parametrize("records", ["on", "off"])
async def test_one_that_is_unknown(tmp_path: Path, records: str) -> None:
    async with standing(tmp_path, records=records) as stand:
        for path in ("/requests/req_9", "/why/req_9"):
            answer = await stand.get(path)
            assert answer.status == 404
            assert answer.json["error"]["code"] == "unknown_request"


async def test_switched_off_the_last_ones_are_told_from_memory(tmp_path: Path) -> None:
    async with standing(tmp_path, records="off") as stand:
        answer = await stand.ask("hi")
        await stand.idle()
        (told,) = (await stand.get("/requests")).json["requests"]
        assert told["id"] == answer.headers["x-request-id"]
        assert (await stand.get(f"/requests/{told['id']}")).json["steps"]
        assert not (tmp_path / "data" / "records.db").exists()


async def test_records_outlive_the_daemon(tmp_path: Path) -> None:
    async with standing(tmp_path, records="on") as stand:
        request_id = (await stand.ask("hi")).headers["x-request-id"]
    async with standing(tmp_path, records="on") as stand:
        (told,) = (await stand.get("/requests")).json["requests"]
        assert told["id"] == request_id
        why = (await stand.get(f"/why/{request_id}")).json
        assert why["steps"][0]["decision"]["candidates"]
        assert why["marks"][-1]["mark"] == "end"


async def follow(stand: Stand, seen: list[Any]) -> None:
    async with stand.session.get("/requests/live") as answer:
        assert answer.status == 200
        while line := await answer.content.readline():
            if line.startswith(b"data: "):
                seen.append(json.loads(line[6:]))


async def test_who_follows_hears_of_each_that_ends(stand: Stand) -> None:
    seen: list[Any] = []
    following = asyncio.get_running_loop().create_task(follow(stand, seen))
    await stand.until(lambda: bool(stand.daemon.tails._tails))
    answer = await stand.ask("hi")
    # Nor is one left out that no account ever saw.
    refused = await stand.post("/v1/responses", {"model": 7, "input": "hi"})
    assert refused.status == 400
    await stand.until(lambda: sum(len(one["requests"]) for one in seen) == 2)
    told = {one["id"] for batch in seen for one in batch["requests"]}
    assert told == {one.headers["x-request-id"] for one in (answer, refused)}
    assert seen[0]["dropped"] == 0
    # A daemon that ends does not wait for who looks on.
    began = time.monotonic()
    await stand.daemon.stop()
    assert time.monotonic() - began < 4.0
    await following


async def test_two_daemons_on_one_data_dir(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    data = tmp_path / "data"
    async with standing(tmp_path / "a", records="on", data_dir=data) as first:
        one = (await first.ask("hi")).headers["x-request-id"]
        await recorded(first, 1)
        async with standing(tmp_path / "b", records="on", data_dir=data) as second:
            two = (await second.ask("hi")).headers["x-request-id"]
            await asyncio.sleep(0.2)
            # It sees the records of the first one, and does not write its own.
            assert [told["id"] for told in await recorded(second, 1)] == [one]
            await first.daemon.stop()
            await second.daemon._take_control()
            await second.until(lambda: second.daemon.records.statistics().is_writing)
            assert [told["id"] for told in await recorded(second, 2)] == [two, one]


async def test_handing_over_loses_no_record(stand: Stand, tmp_path: Path) -> None:
    before = (await stand.ask("hi")).headers["x-request-id"]
    await stand.daemon._give_up()
    await stand.daemon._listener.resume()
    during = (await stand.ask("hi")).headers["x-request-id"]
    await stand.until(lambda: stand.daemon.records.statistics().written == 2)
    assert list((tmp_path / "data").glob("records-*.spool"))
    await stand.daemon._take_back()
    after = (await stand.ask("hi")).headers["x-request-id"]
    found = await recorded(stand, 3)
    assert [told["id"] for told in found] == [after, during, before]


async def test_how_caches_were_hit(stand: Stand) -> None:
    for _ in range(2):
        await stand.ask("hi", prompt_cache_key="one")
    await recorded(stand, 2)
    told = await stand.daemon.requests.cache(24)
    assert told["turns"] == 2
    assert told["by_binding"][0]["name"] == "prompt_cache_key"


async def test_the_command_follows_and_lists_beside_a_running_daemon(stand: Stand, tmp_path: Path) -> None:
    config = str(tmp_path / "config.yaml")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "codex_proxy", "-config", config, "requests", "--follow", "--json", "--route", "chat",
        stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    await stand.until(lambda: bool(stand.daemon.tails._tails), 20.0)
    await stand.ask("hi")
    chat = await stand.post(
        "/v1/chat/completions", {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}
    )
    async with asyncio.timeout(20.0):
        line = json.loads(await process.stdout.readline())
    assert line["id"] == chat.headers["x-request-id"]
    process.kill()
    await process.wait()
    await recorded(stand, 2)
    code, out, err = await run("-config", config, "requests", "--json")
    assert (code, err) == (0, "")
    assert [json.loads(line)["route"] for line in out.splitlines()] == ["chat", "responses"]


# --- what was said


async def captured(tmp_path: Path, **settings: Any) -> AsyncIterator[Stand]:
    keys = '["laptop: sk-one-1", "phone: sk-two-2"]'
    async with standing(tmp_path, records="on", api_keys=keys, **settings) as stand:
        stand.session.headers["authorization"] = "Bearer sk-one-1"
        yield stand


@pytest.fixture
async def listening(tmp_path: Path) -> AsyncIterator[Stand]:
    """A daemon that keeps what `laptop` says, 1 KiB of it."""
    async for stand in captured(tmp_path, capture="[laptop]", capture_limit="1KiB"):
        yield stand


async def said(stand: Stand, request_id: str) -> Any:
    return (await stand.get(f"/requests/{request_id}")).json["capture"]


async def test_nothing_is_kept_of_what_was_said_unless_that_is_switched_on(tmp_path: Path) -> None:
    async for stand in captured(tmp_path):
        stand.sim.script(Script.text("a secret answer"))
        answer = await stand.ask("a secret question")
        await recorded(stand, 1)
        assert await said(stand, answer.headers["x-request-id"]) is None
    for path in (tmp_path / "data").iterdir():
        assert not path.is_file() or b"secret" not in path.read_bytes(), path


async def test_what_one_caller_says_is_kept_and_of_others_nothing(
    listening: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    listening.sim.script(Script.text("a loud answer"), Script.text("a loud answer"))
    heard = await listening.ask("a loud question")
    other = await listening.ask("a loud question", headers={"authorization": "Bearer sk-two-2"})
    await recorded(listening, 2)
    kept = await said(listening, heard.headers["x-request-id"])
    assert json.loads(kept["request"])["input"][0]["content"][0]["text"] == "a loud question"
    assert (kept["answer"], kept["is_cut"]) == ("a loud answer", False)
    assert await said(listening, other.headers["x-request-id"]) is None
    assert "loud" not in caplog.text
    # Nowhere else either.
    for path in ("/requests", "/stats", f"/why/{heard.headers['x-request-id']}"):
        assert b"loud" not in (await listening.get(path)).body
    assert all(trace.said is None for trace in listening.daemon.decisions.traces())


async def test_what_is_long_is_cut_and_says_so(listening: Stand) -> None:
    listening.sim.script(Script.text("ü" * 3_000))
    answer = await listening.ask("x" * 5_000)
    await recorded(listening, 1)
    kept = await said(listening, answer.headers["x-request-id"])
    assert (len(kept["request"]), kept["answer"], kept["is_cut"]) == (1_024, "ü" * 512, True)


async def test_calls_and_sockets_and_refusals_are_kept_too(listening: Stand) -> None:
    listening.sim.script(Script.tool("run", {"a": 1}), Script.reasoning("thinking", "spoken"))
    tools = [{"type": "function", "name": "run", "parameters": {}}]
    call = await listening.ask("hi", tools=tools)
    refused = await listening.post("/v1/responses", {"model": 3, "input": "loud"})
    async with listening.session.ws_connect("/v1/responses") as socket:
        await socket.send_json({"type": "response.create", "model": "gpt-5.5", "input": "through a socket"})
        while (await socket.receive_json(timeout=5.0))["type"] != "response.completed":
            pass
    (third, *_) = await recorded(listening, 3)
    assert (await said(listening, call.headers["x-request-id"]))["answer"] == '[run] {"a":1}'
    kept = await said(listening, refused.headers["x-request-id"])
    assert json.loads(kept["request"]) == {"model": 3, "input": "loud"}
    kept = await said(listening, third["id"])
    assert json.loads(kept["request"])["input"] == "through a socket"
    assert kept["answer"] == "spoken"


async def test_it_is_switched_on_and_off_while_the_daemon_runs(tmp_path: Path) -> None:
    async for stand in captured(tmp_path):
        for names, is_kept in ((("laptop",), True), ((), False)):
            stand.daemon.live.replace(dataclasses.replace(stand.daemon.live.current, capture=names))
            answer = await stand.ask("hi")
            await stand.idle()
            deadline = time.monotonic() + 5.0
            while (await stand.daemon.requests.story(answer.headers["x-request-id"])) is None:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            assert ((await said(stand, answer.headers["x-request-id"])) is not None) is is_kept


# --- a restart


async def test_a_restart_loses_no_record(tmp_path: Path) -> None:
    async with Simulator(accounts=2) as sim:
        sim.script(*[Script.text("pong")] * 3, Script.long_text(60, delay=0.02), *[Script.text("pong")] * 3)
        async with serving(tmp_path, sim, records="on") as service:
            async with aiohttp.ClientSession(service.url) as session:

                async def asked() -> str:
                    async with session.post("/v1/responses", json=question()) as answer:
                        await answer.read()
                        return answer.headers["x-request-id"]

                ids = [await asked() for _ in range(3)]
                # This one ends in the old process, when the new one has the database.
                slow = await session.post("/v1/responses", json=question())
                assert (await service.restart())["success"]
                ids += [await asked() for _ in range(3)]
                await slow.read()
                ids.append(slow.headers["x-request-id"])
                deadline = time.monotonic() + 10.0
                while True:
                    async with session.get("/requests") as answer:
                        found = {one["id"]: one["outcome"] for one in (await answer.json())["requests"]}
                    if len(found) == len(ids):
                        break
                    assert time.monotonic() < deadline, (found, ids)
                    await asyncio.sleep(0.1)
            assert found == dict.fromkeys(ids, "completed")
