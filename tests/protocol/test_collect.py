"""A collected answer is the stream's own last word."""

import json
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.errors import PoolShortage, ProxyError, UpstreamError, Verdict
from codex_proxy.protocol.collect import Collector
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import Encoder
from codex_proxy.protocol.sse import Event, Parser
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import End, UsageSource

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.sse"))
FAILING = {"failed_late", "error_event"}


def encoder(name: str = "", **fields: Any) -> Encoder:
    return Encoder(
        BackendRequest(
            "responses", "gpt-5.5", "gpt-5.5", b"", was_lite_encoded=name == "lite_tools", **fields
        )
    )


def streamed(path: Path) -> list[JsonObject]:
    """Return what a streaming caller reads, frame by frame, with nothing of ours in between."""
    data = encoder(path.stem).encode(Parser().feed(path.read_bytes())).decode()
    return [json.loads(frame.split("data: ", 1)[1]) for frame in data.split("\n\n") if frame]


@pytest.mark.parametrize("path", [p for p in FIXTURES if p.stem not in FAILING], ids=lambda path: path.stem)
def test_streaming_and_collected_answers_agree(path: Path) -> None:
    events = streamed(path)
    answer = Collector(encoder(path.stem))
    parser = Parser()
    data = path.read_bytes()
    for start in range(0, len(data), 100):
        answer.feed(parser.feed(data[start : start + 100]))
    response = json.loads(answer.result())
    assert response == events[-1]["response"]
    assert response["output"] == [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert response["status"] == ("incomplete" if path.stem == "refusal_incomplete" else "completed")
    # A reader of deltas has the same words.
    deltas = "".join(e["delta"] for e in events if e["type"].endswith(".delta") and "item_id" in e)
    assert deltas == "".join(map(words, response["output"]))


def words(item: JsonObject) -> str:
    parts = [*item.get("summary", []), *item.get("content", [])]
    texts = [part.get("text", "") + part.get("refusal", "") for part in parts]
    return "".join([item.get("arguments", ""), item.get("input", ""), *texts])


@pytest.mark.parametrize("path", [p for p in FIXTURES if p.stem in FAILING], ids=lambda path: path.stem)
def test_a_failed_answer_raises_what_the_stream_says(path: Path) -> None:
    answer = Collector(encoder())
    answer.feed(Parser().feed(path.read_bytes()))
    assert answer.finished
    with pytest.raises(UpstreamError) as caught:
        answer.result()
    assert caught.value is answer.encoder.failure
    assert answer.encoder.ended is End.FAILED


def test_a_broken_stream_is_no_answer() -> None:
    answer = Collector(encoder())
    answer.feed([Event.of({"type": "response.created", "response": {"id": "r"}})])
    assert not answer.finished
    with pytest.raises(UpstreamError) as caught:
        answer.result()
    assert caught.value.verdict is Verdict.CUT


def test_our_own_end_is_what_the_caller_gets() -> None:
    answer = Collector(encoder())
    error = PoolShortage("busy")
    answer.cut(error)
    answer.feed([Event.of({"type": "response.completed", "response": {"id": "r"}})])
    with pytest.raises(ProxyError) as caught:
        answer.result()
    assert caught.value is error


def test_an_answer_that_is_there_cannot_be_cut() -> None:
    answer = Collector(encoder())
    answer.feed([Event.of({"type": "response.completed", "response": {"id": "r", "object": "response"}})])
    answer.cut(PoolShortage("late"))
    assert json.loads(answer.result()) == {"id": "r", "object": "response", "model": "gpt-5.5", "output": []}


def test_a_local_limit_ends_a_collected_answer_too() -> None:
    answer = Collector(encoder(max_output_tokens=1))
    answer.feed(Parser().feed((FIXTURES[0].parent / "text.sse").read_bytes()))
    response = json.loads(answer.result())
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert words(response["output"][0]) == "Hell"
    assert answer.encoder.usage.source is UsageSource.ESTIMATE
