"""What a watcher reads off an answer that passes unchanged, whatever the cuts."""

import random
from typing import Any

import orjson
import pytest

from codex_proxy.errors import BackendFault, PoolShortage, UpstreamError, Verdict
from codex_proxy.protocol import watchers
from codex_proxy.protocol.frames import Frames
from codex_proxy.protocol.watchers import Watcher, watcher_for
from codex_proxy.trace import End, Usage, UsageSource


def now() -> float:
    return 1_800_000_000.0


def sse(*payloads: Any, done: bool = False) -> bytes:
    frames = [b"data: " + orjson.dumps(one) + b"\n\n" for one in payloads]
    return b"".join(frames) + (b"data: [DONE]\n\n" if done else b"")


def chunk(content: str | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}


CHAT_USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 6},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
USAGE = {
    "input_tokens": 20,
    "input_tokens_details": {"cached_tokens": 5},
    "output_tokens": 7,
    "output_tokens_details": {"reasoning_tokens": 3},
}
ITEM = {"type": "reasoning", "id": "rs_1", "encrypted_content": "sealed", "summary": []}

STREAMS: dict[str, tuple[str, bytes]] = {
    "chat": (
        "chat",
        sse(
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
            chunk("héllo "),
            chunk(
                None,
                tool_calls=None,
                choices=[
                    {"index": 0, "delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}}
                ],
            ),
            chunk(None, "stop"),
            {"choices": [], "usage": CHAT_USAGE},
            done=True,
        ),
    ),
    "chat without its mark": ("chat", sse(chunk("a"), chunk(None, "length", usage=CHAT_USAGE))),
    "completions": (
        "completions",
        sse(
            {"choices": [{"index": 0, "text": "ab", "finish_reason": None}]},
            {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}], "usage": CHAT_USAGE},
            done=True,
        ),
    ),
    "responses": (
        "responses",
        sse(
            {"type": "response.created", "response": {"id": "r1"}, "sequence_number": 0},
            {"type": "response.output_item.done", "item": ITEM, "sequence_number": 1},
            {"type": "response.output_text.delta", "delta": "héllo", "sequence_number": 2},
            {
                "type": "response.completed",
                "response": {"id": "r1", "output": [ITEM], "usage": USAGE},
                "sequence_number": 3,
            },
        ),
    ),
    "messages": (
        "messages",
        sse(
            {"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}},
            {"type": "ping"},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "héllo"}},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "max_tokens"},
                "usage": {"output_tokens": 9, "cache_read_input_tokens": 3},
            },
            {"type": "message_stop"},
        ),
    ),
    "an error first": ("chat", sse({"error": {"message": "no", "code": "rate_limit_exceeded"}})),
    "an error later": (
        "messages",
        sse(
            {"type": "content_block_start", "index": 0, "content_block": {}},
            {"type": "error", "error": {"type": "overloaded_error", "message": "full"}},
            {"type": "message_stop"},
        ),
    ),
    "a failure": (
        "responses",
        sse({"type": "response.failed", "response": {"error": {"code": "server_error", "message": "x"}}}),
    ),
}


def report(capability: str, chunks: list[bytes], *, wants_usage: bool = False) -> tuple[Any, ...]:
    """Return all that a watcher says after reading *chunks*, and what it let pass."""
    watcher = watcher_for(capability, now, wants_usage=wants_usage)
    watcher.words = []
    frames, passed = Frames(), b""
    for data in [*chunks, b""]:
        for frame in frames.feed(data) if data else frames.finish():
            if watcher.look(frame):
                passed += frame.raw
    watcher.finish()
    failure = None if watcher.failure is None else (watcher.failure.verdict, watcher.failure.fault)
    told = [(one.type, one.json) for one in watcher.told]
    return (
        watcher.begun,
        failure,
        watcher.ended,
        watcher.usage,
        watcher.delivered,
        "".join(watcher.words),
        told,
        watcher.final,
        passed,
    )


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_gives_the_same_report(name: str) -> None:
    capability, stream = STREAMS[name]
    whole = report(capability, [stream])
    for place in range(1, len(stream)):
        assert report(capability, [stream[:place], stream[place:]]) == whole
    assert report(capability, [stream[i : i + 1] for i in range(len(stream))]) == whole


def test_a_chat_is_read() -> None:
    begun, failure, ended, usage, delivered, words, _, _, passed = report("chat", [STREAMS["chat"][1]])
    assert (begun, failure, ended) == (True, None, End.COMPLETED)
    assert usage == Usage(10, 6, 0, 4, 2, UsageSource.BACKEND)
    assert (words, delivered) == ("héllo f{}", 10)
    # The usage that only we asked for is not passed on; everything else is.
    assert b"prompt_tokens" not in passed
    assert report("chat", [STREAMS["chat"][1]], wants_usage=True)[-1] == STREAMS["chat"][1]


def test_a_response_is_read() -> None:
    *_, words, told, final, passed = report("responses", [STREAMS["responses"][1]])
    assert (words, [kind for kind, _ in told]) == ("héllo", ["response.output_item.done"])
    assert final == {"id": "r1", "output": [ITEM]}
    assert passed == STREAMS["responses"][1]


def test_the_tokens_of_messages_include_the_cached_ones() -> None:
    _, _, ended, usage, *_ = report("messages", [STREAMS["messages"][1]])
    assert ended is End.INCOMPLETE
    assert usage == Usage(8, 3, 0, 9, 0, UsageSource.BACKEND)


def test_greetings_are_no_beginning() -> None:
    for name, count in (("chat", 1), ("responses", 1), ("messages", 2)):
        capability, stream = STREAMS[name]
        frames = stream.split(b"\n\n")[: count + 1]
        assert report(capability, [b"\n\n".join(frames[:count]) + b"\n\n"])[0] is False
        assert report(capability, [b"\n\n".join(frames) + b"\n\n"])[0] is True


def test_an_end_that_did_not_come_is_none() -> None:
    for name in ("chat", "completions", "responses", "messages"):
        capability, stream = STREAMS[name]
        first = stream[: stream.rindex(b"data:")][: len(stream) // 3]
        assert report(capability, [first])[2] is None


def test_a_failure_is_never_passed_on() -> None:
    for name in ("an error first", "an error later", "a failure"):
        capability, stream = STREAMS[name]
        _, failure, ended, *_, passed = report(capability, [stream])
        assert failure is not None
        assert ended is None
        assert b"error" not in passed and b"failed" not in passed  # noqa: PT018 -- one thought
    assert report(*("chat", [STREAMS["an error first"][1]]))[1][0] is Verdict.LIMITED


WHOLE: list[tuple[str, Any, End | None, int]] = [
    (
        "chat",
        {"choices": [{"message": {"content": "abcd"}, "finish_reason": "stop"}], "usage": CHAT_USAGE},
        End.COMPLETED,
        4,
    ),
    ("chat", {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, End.INCOMPLETE, 0),
    ("completions", {"choices": [{"text": "abc", "finish_reason": "stop"}]}, End.COMPLETED, 3),
    ("edits", {"choices": [{"text": "abc"}], "usage": CHAT_USAGE}, End.COMPLETED, 3),
    ("embeddings", {"data": [], "usage": {"prompt_tokens": 3}}, End.COMPLETED, 0),
    (
        "responses",
        {
            "id": "r",
            "status": "incomplete",
            "error": None,
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "ab"}]}],
            "usage": USAGE,
        },
        End.INCOMPLETE,
        2,
    ),
    (
        "messages",
        {
            "content": [{"type": "text", "text": "abc"}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 1},
        },
        End.COMPLETED,
        3,
    ),
]


@pytest.mark.parametrize(("capability", "payload", "ended", "delivered"), WHOLE)
def test_a_plain_answer_is_read(capability: str, payload: Any, ended: End | None, delivered: int) -> None:
    watcher = watcher_for(capability, now)
    watcher.whole(orjson.dumps(payload))
    assert (watcher.begun, watcher.failure, watcher.ended) == (True, None, ended)
    assert watcher.delivered == delivered
    has_usage = "usage" in payload
    assert (watcher.usage.source is UsageSource.BACKEND) is has_usage
    assert watcher.estimate(40).source is (UsageSource.BACKEND if has_usage else UsageSource.ESTIMATE)


@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b'"x"', b'{"a":'])
def test_what_is_no_answer_is_none(data: bytes) -> None:
    for capability in ("chat", "responses", "messages", "embeddings"):
        watcher = watcher_for(capability, now)
        watcher.whole(data)
        assert not watcher.begun


def test_an_error_in_a_plain_answer_is_a_failure() -> None:
    for capability in ("chat", "completions", "responses", "messages", "embeddings"):
        watcher = watcher_for(capability, now)
        watcher.whole(b'{"error":{"message":"too many","code":429}}')
        assert watcher.failure is not None
        assert watcher.failure.verdict is Verdict.LIMITED
    watcher = watcher_for("responses", now)
    watcher.whole(b'{"status":"failed","error":{"code":"invalid_prompt","message":"m"}}')
    assert watcher.failure is not None
    assert watcher.failure.verdict is Verdict.CALLER


@pytest.mark.parametrize("usage", [-1, 1e30, True, "7", None, [], 2**60])
def test_absurd_numbers_count_as_none(usage: Any) -> None:
    watcher = watcher_for("chat", now)
    watcher.whole(orjson.dumps({"choices": [{}], "usage": {"prompt_tokens": usage, "completion_tokens": 3}}))
    assert (watcher.usage.input_tokens, watcher.usage.output_tokens) == (0, 3)


@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages"])
def test_every_dialect_is_broken_off_in_its_own_words_once(name: str) -> None:
    capability, stream = STREAMS[name]
    watcher = watcher_for(capability, now)
    for frame in Frames().feed(stream[: stream.index(b"\n\n") + 2]):
        watcher.look(frame)
    error = UpstreamError(Verdict.CUT, BackendFault("lost"))
    end = watcher.cut(error)
    assert watcher.ended is End.FAILED
    assert b"lost" in end
    assert end.endswith(b"\n\n")
    assert watcher.cut(error) == b""
    payload = orjson.loads(end.rstrip().splitlines()[-1].removeprefix(b"data: "))
    match capability:
        case "responses":
            assert (payload["type"], payload["response"]["id"], payload["sequence_number"]) == (
                "response.failed",
                "r1",
                1,
            )
        case "messages":
            assert end.startswith(b"event: error\n")
            assert payload["error"]["type"] == "api_error"
        case _:
            assert payload["error"]["message"] == "lost"


def test_each_says_in_its_own_words_that_it_waits() -> None:
    for capability, before, after in (
        ("chat", b": keep-alive\n\n", b": keep-alive\n\n"),
        ("responses", b": keep-alive\n\n", b'data: {"type":"keepalive"}\n\n'),
        ("messages", b'event: ping\ndata: {"type": "ping"}\n\n', b'event: ping\ndata: {"type": "ping"}\n\n'),
    ):
        watcher = watcher_for(capability, now)
        assert watcher.keepalive() == before
        for frame in Frames().feed(STREAMS[capability][1]):
            watcher.look(frame)
        assert watcher.keepalive() == after


def test_an_end_before_anything_came_is_one_too() -> None:
    for capability in ("chat", "responses", "messages"):
        watcher: Watcher = watcher_for(capability, now)
        assert watcher.cut(PoolShortage("busy"))


def test_what_has_no_usage_is_estimated_by_its_length() -> None:
    watcher = watcher_for("chat", now)
    for frame in Frames().feed(sse(chunk("x" * 41))):
        watcher.look(frame)
    watcher.cut(PoolShortage("busy"))
    assert watcher.estimate(401) == Usage(101, output_tokens=11, source=UsageSource.ESTIMATE)
    # What was told before the break counts, and the text if that is more.
    watcher = watcher_for("messages", now)
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}
    block = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "x" * 40}}
    for frame in Frames().feed(sse(start, block)):
        watcher.look(frame)
    assert watcher.estimate(4000) == Usage(5, output_tokens=10, source=UsageSource.ESTIMATE)


TEXTS = (
    "",
    "word",
    " a b ",
    'quo"te',
    "back\\slash",
    "line\nbreak",
    "日本",
    "\U0001f600",
    "</x>",
    '","delta":"',
    "  ",
)


def random_stream(capability: str, rng: random.Random) -> bytes:
    """Return a stream as a provider might write it: with padding, extra fields, in varying order."""
    out: list[bytes] = []
    for number in range(rng.randrange(1, 30)):
        text = rng.choice(TEXTS)
        padding = "x" * rng.randrange(5)
        match capability:
            case "chat":
                payload = chunk(text, rng.choice((None, None, None, "stop")), id="c", usage=None)
                if rng.random() < 0.1:
                    payload["usage"] = CHAT_USAGE
                if rng.random() < 0.1:
                    payload["choices"].append({"index": 1, "delta": {"content": "more"}})
                payload["obfuscation"] = padding
            case "messages":
                kind = rng.choice(("text_delta", "text_delta", "text_delta", "thinking_delta"))
                payload = {
                    "type": "content_block_delta",
                    "index": rng.randrange(2),
                    "delta": {"type": kind, kind.removesuffix("_delta"): text},
                }
            case _:
                payload = {
                    "type": f"response.{rng.choice(('output_text', 'reasoning_text'))}.delta",
                    "sequence_number": number,
                    "item_id": "m_1",
                    "output_index": 0,
                    "delta": text,
                    "logprobs": [],
                    "obfuscation": padding,
                }
                if rng.random() < 0.1:
                    payload["odd"] = {"delta": "not this"}
        data = orjson.dumps(payload)
        if capability == "messages":
            data = data[:-1] + b" " * rng.randrange(4) + b"}"
        out.append(b"data: " + data + b"\n\n")
    return b"".join(out)


@pytest.mark.parametrize("capability", ["chat", "messages", "responses"])
def test_what_is_known_at_a_glance_is_what_reading_it_would_say(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [random_stream(capability, random.Random(seed)) for seed in range(150)]
    at_a_glance = [report(capability, [stream]) for stream in streams]
    monkeypatch.setattr(watchers._Glance, "text", lambda *_: None)
    monkeypatch.setattr(watchers, "_DELTA", lambda _: None)
    assert [report(capability, [stream]) for stream in streams] == at_a_glance


def test_a_long_text_is_mostly_known_at_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    original = watchers._object

    def counted(data: bytes) -> Any:
        nonlocal read
        read += 1
        return original(data)

    monkeypatch.setattr(watchers, "_object", counted)
    report("chat", [sse(*(chunk(f"word{n} ", id="c", usage=None) for n in range(500)))])
    report(
        "responses", [sse(*({"type": "response.output_text.delta", "delta": f"w{n}"} for n in range(500)))]
    )
    delta = {"type": "content_block_delta", "index": 0}
    report(
        "messages", [sse(*({**delta, "delta": {"type": "text_delta", "text": f"w{n}"}} for n in range(500)))]
    )
    assert read <= 4


OPENING: dict[str, bytes] = {
    "chat": sse(chunk("hello world")),
    "messages": sse({
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": "hello world"},
    }),
    "responses": sse({"type": "response.output_text.delta", "delta": "hello world"}),
}


@pytest.mark.parametrize("capability", list(OPENING))
@pytest.mark.parametrize(
    "frame",
    [
        b'data: {"error":{"message":"canary","code":502}}\n\n',
        b'data: {"type":"error","message":"canary"}\n\n',
        b'event: error\ndata: {"message":"canary","code":"odd"}\n\n',
        b"event: error\r\ndata: canary\r\n\r\n",
    ],
)
def test_an_error_is_one_in_whatever_shape_it_comes(capability: str, frame: bytes) -> None:
    watcher = watcher_for(capability, now)
    passed = [one for one in Frames().feed(OPENING[capability] + frame) if watcher.look(one)]
    assert len(passed) == 1
    assert watcher.failure is not None
    assert watcher.finish() is None


def test_an_error_beside_a_choice_or_as_its_reason_is_one_too() -> None:
    # As OpenRouter and vLLM say it.
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    for payload in (
        {"error": {"code": 502, "message": "canary"}, "choices": [choice]},
        {"choices": [choice]},
        {"object": "error", "message": "canary", "type": "InternalServerError", "code": 500},
    ):
        watcher = watcher_for("chat", now)
        for frame in Frames().feed(OPENING["chat"] + sse(payload)):
            watcher.look(frame)
        assert watcher.failure is not None
        assert watcher.failure.verdict is Verdict.SERVER


@pytest.mark.parametrize(
    "capability", ["chat", "completions", "edits", "responses", "messages", "embeddings"]
)
def test_what_says_something_else_with_status_200_is_no_answer(capability: str) -> None:
    for payload in (
        {},
        {"code": 401, "msg": "no"},
        {"detail": "no"},
        {"base_resp": {"status_code": 1004}, "choices": None},
    ):
        watcher = watcher_for(capability, now)
        watcher.whole(orjson.dumps(payload))
        assert not watcher.begun


def test_usage_may_be_called_and_written_otherwise() -> None:
    watcher = watcher_for("chat", now)
    watcher.whole(orjson.dumps({"choices": [{}], "usage": {"input_tokens": 7.0, "output_tokens": 2.5}}))
    assert (watcher.usage.input_tokens, watcher.usage.output_tokens) == (7, 0)
