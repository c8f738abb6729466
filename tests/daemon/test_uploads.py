"""Bodies that go up compressed: the backend reads what it would have read, whichever way a turn takes."""

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.simulator import Script
from codex_proxy.simulator.exchange import Received
from codex_proxy.upstream import packing
from tests.harness import CODEX_HEADERS, Answer, standing

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Some words more than the smallest body that is compressed, and than the largest that is compressed at once.
WORTH_IT = "words of an agent, " * 4000
LONG = "words of an agent, " * 20_000


class Packer:
    """The compressor, watched: how often it was asked, and in which thread."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def compress(self, data: bytes, level: int) -> bytes:
        self.threads.append(threading.get_ident())
        return zstd.compress(data, level)


@pytest.fixture
def packer(monkeypatch: pytest.MonkeyPatch) -> Packer:
    watched = Packer()
    monkeypatch.setattr(packing, "zstd", watched)
    return watched


def is_packed(received: Received) -> bool:
    """Tell whether a turn came compressed; both what it says and what it is must agree."""
    says = received.headers.get("content-encoding") == "zstd"
    assert says is (received.wire[:4] == b"\x28\xb5\x2f\xfd")
    assert received.headers["content-length"] == str(len(received.wire))
    assert says is (len(received.wire) < len(received.body))
    return says


@pytest.mark.parametrize("codex", [False, True])
async def test_a_long_turn_goes_up_compressed_and_a_short_one_as_it_is(
    tmp_path: Path, packer: Packer, codex: bool
) -> None:
    async with standing(tmp_path, compress_uploads="zstd") as stand:
        for text, packed in ((WORTH_IT, True), ("hi", False), (LONG, True)):
            answer = await stand.ask(text, codex=codex, prompt_cache_key="talk")
            assert answer.status == 200
            received = stand.sim.turns[-1]
            assert is_packed(received) is packed
            assert received.json["input"][-1]["content"][0]["text"] == text
        # The loop goes on while a long one is compressed.
        here = threading.get_ident()
        assert [thread == here for thread in packer.threads] == [True, False]


async def test_nothing_is_compressed_unless_the_owner_says_so(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        assert (await stand.ask(LONG)).status == 200
        assert not is_packed(stand.sim.turns[-1])


async def test_what_was_sent_compressed_to_us_goes_on_in_our_own_compression(tmp_path: Path) -> None:
    body = b'{"model":"gpt-5.5","input":[{"type":"message","role":"user","content":"%s"}]}' % LONG.encode()
    async with standing(tmp_path, compress_uploads="zstd") as stand:
        headers = {**CODEX_HEADERS, "content-type": "application/json", "content-encoding": "zstd"}
        data = zstd.compress(body, 19)
        async with stand.session.post("/v1/responses", data=data, headers=headers) as response:
            assert response.status == 200
        received = stand.sim.turns[-1]
        assert is_packed(received)
        assert received.wire != data
        assert received.json["input"][0]["content"] == LONG


async def test_a_retry_sends_the_same_bytes_and_compresses_nothing_again(
    tmp_path: Path, packer: Packer
) -> None:
    async with standing(tmp_path, compress_uploads="zstd") as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("overloaded")
        assert (await stand.ask(WORTH_IT)).status == 200
        assert stand.tried() == [first.name, second.name]
        failed, served = stand.sim.turns
        assert is_packed(served)
        assert failed.wire == served.wire
        assert len(packer.threads) == 1


async def test_what_is_left_out_for_another_account_is_not_in_the_compressed_body_either(
    tmp_path: Path, packer: Packer
) -> None:
    async with standing(tmp_path, compress_uploads="zstd") as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        stand.sim.script(Script.reasoning())
        start = await stand.ask("think", prompt_cache_key="talk")
        first.set("usage_limit")
        answer = await stand.ask(input=_going_on(start), prompt_cache_key="talk")
        assert answer.status == 200
        whole, served = stand.sim.turns[-2:]
        assert stand.tried()[1:] == [first.name, second.name]
        assert is_packed(whole)
        assert is_packed(served)
        kinds = [item["type"] for item in whole.json["input"]]
        assert "reasoning" in kinds
        assert [item["type"] for item in served.json["input"]] == [k for k in kinds if k != "reasoning"]
        assert len(packer.threads) == 2


async def test_endpoints_of_which_nothing_is_known_get_what_they_always_got(tmp_path: Path) -> None:
    async with standing(tmp_path, compress_uploads="zstd") as stand:
        body = {"model": "gpt-5.5", "input": [{"type": "message", "role": "user", "content": LONG}]}
        assert (await stand.post("/v1/responses/compact", body)).status == 200
        assert not is_packed(stand.sim.requests[-1])


async def test_every_dialect_goes_up_compressed(tmp_path: Path) -> None:
    said = [{"role": "user", "content": WORTH_IT}]
    async with standing(tmp_path, compress_uploads="zstd") as stand:
        for path, body in (
            ("/v1/chat/completions", {"messages": said}),
            ("/v1/messages", {"messages": said, "max_tokens": 100}),
            ("/v1/completions", {"prompt": WORTH_IT}),
        ):
            assert (await stand.post(path, {"model": "gpt-5.5", **body})).status == 200
            received = stand.sim.turns[-1]
            assert is_packed(received)
            assert received.json["input"][-1]["content"][0]["text"] == WORTH_IT


def _going_on(start: Answer) -> list[dict[str, Any]]:
    output = start.events[-1].json["response"]["output"] or [
        event.json["item"] for event in start.events if event.type == "response.output_item.done"
    ]
    return [
        {"type": "message", "role": "user", "content": "think"},
        *output,
        {"type": "message", "role": "user", "content": WORTH_IT},
    ]
