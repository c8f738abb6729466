"""The legacy dialects: what goes upstream for a text completion or an edit, and what comes back."""

import json
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from openai.types import Completion

from codex_proxy.errors import (
    BackendFault,
    KeyRefused,
    PoolEmpty,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RequestError,
    UpstreamError,
    Verdict,
)
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.collect import Collector
from codex_proxy.protocol.completions import (
    COMPLETIONS,
    EDITS,
    LEFT_OUT,
    decode_completion,
    with_engine,
)
from codex_proxy.protocol.dialect import Decoded, Encoder, Surroundings
from codex_proxy.protocol.fields import MAX_STOP_CHARACTERS, MAX_STOPS
from codex_proxy.protocol.sse import Batch, Event, Parser
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.simulator.checks import check_shape
from codex_proxy.trace import End, UsageSource
from tests.protocol.replay import play, replay, variants
from tests.protocol.upstream_body import shown

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "completions"
REQUESTS = sorted(GOLDEN.glob("*.json"))
EDIT_REQUESTS = sorted(GOLDEN.glob("edits/*.json"))
FIXTURES = sorted((HERE / "fixtures").glob("*.sse"))
CATALOG = Catalog()
AROUND = Surroundings(now=lambda: 1_700_000_000.0, unique="0123")


def ask(**fields: Any) -> Decoded:
    body = {"model": "gpt-5.5", "prompt": "Once", **fields}
    return COMPLETIONS.decode(json.dumps(body).encode(), {}, catalog=CATALOG)


def edit(**fields: Any) -> Decoded:
    body = {"model": "gpt-5.5", "instruction": "Shout", "input": "hello", **fields}
    return EDITS.decode(json.dumps(body).encode(), {}, catalog=CATALOG)


def sent(decoded: Decoded) -> dict[str, Any]:
    return shown(decoded.request)


def encoder(**fields: Any) -> Encoder:
    return ask(**{"stream": True, **fields}).make_encoder(AROUND)


def chunks(data: bytes) -> list[JsonObject]:
    return [event.json for event in Parser().feed(data)]


def text_of(data: bytes) -> str:
    return "".join(choice["text"] for chunk in chunks(data) for choice in chunk.get("choices", ()))


def reason_of(data: bytes) -> str | None:
    reasons = [choice["finish_reason"] for chunk in chunks(data) for choice in chunk.get("choices", ())]
    assert all(reason is None for reason in reasons[:-1]), "a reason stands in the last chunk only"
    last: str | None = reasons[-1]
    return last


def events(*pieces: str, end: JsonObject | None = None) -> Batch:
    """Return the events of an answer that says the pieces."""
    usage = {"input_tokens": 9, "output_tokens": 3, "total_tokens": 12}
    return [
        Event.of({"type": "response.created", "response": {"id": "resp_1", "created_at": 1_800_000_000}}),
        Event.of({
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {"type": "message", "id": "msg_1"},
        }),
        *(
            Event.of({"type": "response.output_text.delta", "item_id": "msg_1", "delta": piece})
            for piece in pieces
        ),
        Event.of(end or {"type": "response.completed", "response": {"usage": usage}}),
    ]


def incomplete(reason: str) -> JsonObject:
    return {"type": "response.incomplete", "response": {"incomplete_details": {"reason": reason}}}


def collected(decoded: Decoded, batch: Batch) -> JsonObject:
    collector = Collector(decoded.make_encoder(AROUND))
    collector.feed(batch)
    value: JsonObject = orjson.loads(collector.result())
    return value


# What goes upstream.


@pytest.mark.parametrize("path", REQUESTS, ids=lambda path: path.stem)
def test_the_turn_that_goes_upstream_for_a_completion(path: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    decoded = COMPLETIONS.decode(dumps(case["request"]), {}, catalog=CATALOG)
    assert sent(decoded) == case["sent"]


@pytest.mark.parametrize("path", EDIT_REQUESTS, ids=lambda path: path.stem)
def test_the_turn_that_goes_upstream_for_an_edit(path: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    decoded = EDITS.decode(dumps(case["request"]), {}, catalog=CATALOG)
    assert sent(decoded) == case["sent"]


@pytest.mark.parametrize("path", [*REQUESTS, *EDIT_REQUESTS], ids=lambda path: path.stem)
def test_the_strict_backend_takes_what_goes_upstream(path: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    dialect = EDITS if path in EDIT_REQUESTS else COMPLETIONS
    decoded = dialect.decode(dumps(case["request"]), {}, catalog=CATALOG)
    assert check_shape(sent(decoded), decoded.request.headers, "strict") is None


def test_the_callers_words_go_upstream_whole() -> None:
    """Whatever they look like: nothing is trimmed, and odd characters stay."""
    prompt, suffix = '  \n\u0000 {"a": 1} \ud83d end \r\n', "\t</s>\n"
    body = json.loads(ask(prompt=prompt, suffix=suffix).request.body)
    parts = [part["text"] for item in body["input"] for part in item["content"]]
    assert parts[1:] == [suffix, prompt]
    assert body["instructions"] == ""


@pytest.mark.parametrize("key", sorted(LEFT_OUT))
def test_each_knob_is_left_out_whatever_it_holds(key: str) -> None:
    for value in (None, 0, "auto", {"a": 1}, [1]):
        assert sent(ask(**{key: value})) == sent(ask())
        assert sent(edit(**{key: value})) == sent(edit())


@pytest.mark.parametrize("value", [None, False, True, 0, 1.5, "", [], {}])
def test_an_unknown_field_that_holds_no_words_is_left_out(value: Any) -> None:
    assert sent(ask(of_another_server=value)) == sent(ask())
    assert sent(edit(of_another_server=value)) == sent(edit())


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_an_output_limit_is_kept_here_and_not_sent(key: str) -> None:
    for decoded, without in ((ask(**{key: 5}), ask()), (edit(**{key: 5}), edit())):
        assert decoded.request.max_output_tokens == 5
        assert sent(decoded) == sent(without)


def test_without_a_limit_there_is_none() -> None:
    """The old default of 16 would cut every answer of a model that thinks."""
    assert ask().request.max_output_tokens is None
    assert ask(max_tokens=None).request.max_output_tokens is None


def test_a_suffix_of_the_model_says_the_effort_and_the_answer_names_what_was_asked() -> None:
    decoded = ask(model="gpt-5.5-high-fast")
    assert (decoded.request.model, sent(decoded)["reasoning"]) == ("gpt-5.5", {"effort": "high"})
    assert sent(decoded)["service_tier"] == "priority"
    assert collected(decoded, events("x"))["model"] == "gpt-5.5-high-fast"


def test_the_engine_in_the_path_is_the_model() -> None:
    raw = json.dumps({"prompt": "Once"}).encode()
    assert with_engine("gpt-5.5-low").decode(raw, {}, catalog=CATALOG).request.asked_model == "gpt-5.5-low"
    other = json.dumps({"prompt": "Once", "model": "gpt-6-sol"}).encode()
    decoded = decode_completion(other, {}, catalog=CATALOG, engine="gpt-5.5")
    assert (decoded.request.model, sent(decoded)["model"]) == ("gpt-5.5", "gpt-5.5")
    with pytest.raises(RequestError) as caught:
        with_engine("no name\n").decode(raw, {}, catalog=CATALOG)
    assert caught.value.param == "model"


# What is refused.

COMPLETION_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": None}, "model", "missing"),
    ({"model": 5}, "model", "no model name"),
    ({"prompt": ["a", "b"]}, "prompt", "one by one"),
    ({"prompt": [1, 2, 3]}, "prompt", "token numbers"),
    ({"prompt": [1]}, "prompt", "token numbers"),
    ({"prompt": [[1, 2], [3]]}, "prompt", "token numbers"),
    ({"prompt": [{}]}, "prompt.0", "a string"),
    ({"prompt": [None]}, "prompt.0", "a string"),
    ({"prompt": {"text": "a"}}, "prompt", "a string"),
    ({"prompt": 5}, "prompt", "a string"),
    ({"suffix": ["a"]}, "suffix", "a string"),
    ({"echo": "yes"}, "echo", "a boolean"),
    ({"stream": 1}, "stream", "a boolean"),
    ({"n": 2}, "n", "one answer"),
    ({"n": 0}, "n", "one answer"),
    ({"n": "1"}, "n", "an integer"),
    ({"n": True}, "n", "an integer"),
    ({"best_of": 3}, "best_of", "one answer"),
    ({"best_of": 1.5}, "best_of", "an integer"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -1}, "max_tokens", "at least 1"),
    ({"max_tokens": "9"}, "max_tokens", "an integer"),
    ({"max_tokens": 1.5}, "max_tokens", "an integer"),
    ({"stop": 5}, "stop", "a string"),
    ({"stop": "a" * (MAX_STOP_CHARACTERS + 1)}, "stop", "characters in all"),
    ({"stop": {"a": 1}}, "stop", "a string"),
    ({"stop": ["a", "b" * MAX_STOP_CHARACTERS]}, "stop", "characters in all"),
    ({"stop": ["a", 1]}, "stop.1", "a string"),
    ({"stop": ["a"] * (MAX_STOPS + 1)}, "stop", "there may be"),
    ({"stream_options": True}, "stream_options", "an object"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "a boolean"),
    ({"reasoning_effort": 3}, "reasoning_effort", "a string"),
    ({"service_tier": 3}, "service_tier", "a string"),
    ({"prompt_cache_key": {}}, "prompt_cache_key", "a string"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "not known"),
    ({"input": "hi"}, "input", "not known"),
    ({"tools": [{"type": "function"}]}, "tools", "not known"),
    ({"grammar": "root ::= x"}, "grammar", "not known"),
    ({"x" * 5000: "words"}, "x" * 100, "not known"),
]

EDIT_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": None}, "model", "missing"),
    ({"instruction": None}, "instruction", "missing"),
    ({"instruction": ""}, "instruction", "missing"),
    ({"instruction": ["a"]}, "instruction", "a string"),
    ({"input": 7}, "input", "a string"),
    ({"input": [{"type": "text"}]}, "input", "a string"),
    ({"n": 2}, "n", "one answer"),
    ({"stream": True}, "stream", "not streamed"),
    ({"stream": "no"}, "stream", "a boolean"),
    ({"max_tokens": []}, "max_tokens", "an integer"),
    ({"prompt": "x"}, "prompt", "not known"),
    ({"stop": "x"}, "stop", "not known"),
]


@pytest.mark.parametrize(("fields", "param", "words"), COMPLETION_REFUSALS)
def test_what_cannot_be_completed_is_refused_by_its_path(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


@pytest.mark.parametrize(("fields", "param", "words"), EDIT_REFUSALS)
def test_what_cannot_be_edited_is_refused_by_its_path(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        edit(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


@pytest.mark.parametrize("dialect", [COMPLETIONS, EDITS, with_engine("gpt-5.5")])
@pytest.mark.parametrize(
    "raw",
    [b"", b"nonsense", b"null", b"[]", b'"text"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 200_000,
     b'{"prompt": ' + b"[" * 200_000, b'{"model": "gpt-5.5", "prompt": "x", "a": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001],
)  # fmt: skip
def test_a_hostile_body_is_a_request_error(dialect: Any, raw: bytes) -> None:
    with pytest.raises(RequestError):
        dialect.decode(raw, {}, catalog=CATALOG)


@pytest.mark.parametrize("value", [None, True, 0, 1.5, "", "x", [], [[]], [{}], {}, {"a": []}, 10**30])
def test_no_value_in_any_field_breaks_a_decoder(value: Any) -> None:
    keys = ("model", "prompt", "suffix", "echo", "max_tokens", "stop", "n", "best_of", "stream", "logprobs",
            "stream_options", "instruction", "input", "reasoning_effort", "service_tier", "of_tomorrow")  # fmt: skip
    for key in keys:
        for decode in (ask, edit):
            try:
                body = sent(decode(**{key: value}))
            except RequestError as error:
                assert error.param is not None  # noqa: PT017 -- most values are refused, some are fine
            else:
                assert check_shape(body, {}, "standard") is None or key in ("model", "reasoning_effort")


LARGE: list[tuple[dict[str, Any], bool]] = [
    ({"prompt": 'a\u0000\\"' * 1_000_000, "echo": True}, True),
    ({"suffix": "\ud83d" + "ä" * 1_700_000}, True),
    ({"stop": ["x"] * 1_000_000}, False),
    ({"stop": "x" * 10_000_000}, False),
    ({"prompt": ["x"] * 1_000_000}, False),
    ({"prompt": list(range(1_000_000))}, False),
    ({**{f"field_{number}": number for number in range(100_000)}, "last": "words"}, False),
]


@pytest.mark.parametrize(("fields", "is_served"), LARGE, ids=range(len(LARGE)))
def test_a_large_body_is_read_in_good_time(fields: dict[str, Any], is_served: bool) -> None:
    raw = json.dumps({"model": "gpt-5.5", **fields}).encode()
    started = time.process_time()
    try:
        decoded: Decoded | None = COMPLETIONS.decode(raw, {}, catalog=CATALOG)
    except RequestError:
        decoded = None
    assert time.process_time() - started < 1
    assert (decoded is not None) is is_served


# What comes back.


def test_the_bytes_of_a_stream() -> None:
    stream = (HERE / "fixtures" / "text.sse").read_bytes()
    out = play(encoder(prompt="Say it: ", echo=True, stream_options={"include_usage": True}), [stream])
    assert out == (GOLDEN / "text.echo.sse").read_bytes()


def test_the_bytes_of_a_whole_answer() -> None:
    answer = collected(ask(), events("Hel", "lo"))
    assert answer == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1_800_000_000,
        "model": "gpt-5.5",
        "choices": [{"text": "Hello", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_the_bytes_of_an_edit() -> None:
    assert collected(edit(), events("HEL", "LO")) == {
        "object": "edit",
        "created": 1_800_000_000,
        "choices": [{"text": "HELLO", "index": 0, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_streamed_and_collected_answers_agree(path: Path) -> None:
    parser = Parser()
    batch = parser.feed(path.read_bytes()) + parser.finish()
    streaming = encoder(prompt="Once", echo=True, stream_options={"include_usage": True})
    data = streaming.encode(batch)
    collector = Collector(ask(prompt="Once", echo=True).make_encoder(AROUND))
    collector.feed(batch)
    if streaming.ended is End.FAILED:
        with pytest.raises(UpstreamError):
            collector.result()
        return
    whole = orjson.loads(collector.result())
    *parts, costs = chunks(data)
    assert text_of(data) == whole["choices"][0]["text"]
    assert reason_of(data) == whole["choices"][0]["finish_reason"]
    assert (costs["choices"], costs["usage"]) == ([], whole["usage"])
    for part in [*parts, costs]:
        assert {key: part[key] for key in ("id", "object", "created", "model")} == {
            key: whole[key] for key in ("id", "object", "created", "model")
        }
    for one in (parts[-1], costs, whole):
        Completion.model_validate(one, strict=True)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_the_way_the_network_cuts_and_dresses_a_stream_never_matters(path: Path) -> None:
    stream = path.read_bytes()
    fields: dict[str, Any] = {
        "stop": ["wor", "never"],
        "echo": True,
        "stream_options": {"include_usage": True},
    }
    decoded = ask(stream=True, **fields)
    expected = play(decoded.make_encoder(AROUND), [stream])
    assert expected
    for out in replay(lambda: decoded.make_encoder(AROUND), variants(stream)):
        assert out == expected


def test_usage_that_the_backend_does_not_tell_is_estimated() -> None:
    batch = events("x" * 40, end={"type": "response.completed", "response": {"usage": None}})
    for decoded in (ask(), edit()):
        usage = collected(decoded, batch)["usage"]
        assert usage["completion_tokens"] == 10
        assert usage["prompt_tokens"] == -(-decoded.request.input_bytes // 4)


def test_an_answer_without_a_greeting_has_an_id_all_the_same() -> None:
    data = encoder(stream_options={"include_usage": True}).encode(events("x")[1:])
    assert {chunk["id"] for chunk in chunks(data)} == {"cmpl-0123"}


def test_usage_is_shown_in_a_stream_only_when_asked_for() -> None:
    plain = chunks(encoder().encode(events("a")))
    assert all("usage" not in chunk for chunk in plain)
    asked = chunks(encoder(stream_options={"include_usage": True}).encode(events("a")))
    assert [chunk["usage"] is None for chunk in asked] == [True, True, False]
    assert [len(chunk["choices"]) for chunk in asked] == [1, 1, 0]


@pytest.mark.parametrize("stream", [True, False])
def test_the_prompt_is_given_back_first_and_no_limit_looks_at_it(stream: bool) -> None:
    prompt = "stop here, " * 50
    decoded = ask(prompt=[prompt], echo=True, stop="stop", max_tokens=2, stream=stream)
    batch = events("and ", "on it goes")
    if stream:
        data = decoded.make_encoder(AROUND).encode(batch)
        text, reason = text_of(data), reason_of(data)
    else:
        choice = collected(decoded, batch)["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == (f"{prompt}and on i", "length")


def test_an_empty_prompt_is_not_given_back_as_ours() -> None:
    assert collected(ask(prompt="", echo=True), events("x"))["choices"][0]["text"] == "x"


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_sequence_ends_the_text_in_front_of_it(stream: bool) -> None:
    decoded = ask(stop=["END", "\n\n"], stream=stream)
    made = decoded.make_encoder(AROUND)
    data = made.encode(events("one E", "N", "D two", "three"))
    if stream:
        assert (text_of(data), reason_of(data)) == ("one ", "stop")
        assert data.endswith(b"data: [DONE]\n\n")
    else:
        assert orjson.loads(made.whole())["choices"][0] == {
            "text": "one ", "index": 0, "logprobs": None, "finish_reason": "stop",
        }  # fmt: skip
    assert (made.ended, made.ended_early) == (End.COMPLETED, True)
    assert made.usage.source is UsageSource.ESTIMATE


def test_an_empty_stop_sequence_stands_nowhere() -> None:
    for stop in ("", [""], [], None):
        assert text_of(encoder(stop=stop).encode(events("one ", "two"))) == "one two"


def test_what_only_began_like_a_stop_sequence_is_kept_back_and_then_told() -> None:
    out = encoder(stop="END")
    first = out.encode(events("one E", "N")[:-1])
    assert text_of(first) == "one "
    assert text_of(out.encode(events()[-1:])) == "EN"


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (None, "stop"),
        (incomplete("max_output_tokens"), "length"),
        (incomplete("max_tokens"), "length"),
        (incomplete("content_filter"), "content_filter"),
        (incomplete("steered"), "stop"),
    ],
)
def test_the_end_in_the_callers_words(end: JsonObject | None, reason: str) -> None:
    batch = events("x", end=end)
    assert reason_of(encoder().encode(batch)) == reason
    assert collected(ask(), batch)["choices"][0]["finish_reason"] == reason
    assert collected(edit(), batch)["choices"][0]["finish_reason"] == reason


def test_a_refusal_is_text_and_the_end_says_what_it_is() -> None:
    batch = events()
    refusal = {"type": "response.refusal.delta", "item_id": "msg_1", "delta": "I cannot."}
    batch.insert(-1, Event.of(refusal))
    data = encoder().encode(batch)
    assert (text_of(data), reason_of(data)) == ("I cannot.", "content_filter")
    assert collected(edit(), batch)["choices"][0]["finish_reason"] == "content_filter"


def test_reasoning_is_not_shown() -> None:
    batch = events("seen")
    for number, kind in enumerate(("reasoning_summary_text", "reasoning_text")):
        thought = {"type": f"response.{kind}.delta", "output_index": 5 + number, "delta": "hidden"}
        batch.insert(1, Event.of(thought))
    assert text_of(encoder().encode(batch)) == "seen"
    assert collected(ask(), batch)["choices"][0]["text"] == "seen"


def test_nothing_but_a_comment_keeps_a_stream_alive() -> None:
    """It may come before the beginning too, and no client takes it for an answer."""
    assert COMPLETIONS.keeps_alive_early
    out = encoder()
    alive = out.keepalive()
    assert alive.startswith(b":")
    assert Parser().feed(alive) == []
    assert text_of(alive + out.encode(events("x"))) == "x"
    assert not EDITS.keeps_alive_early


# Failures.

FAILURES: list[ProxyError] = [
    RequestError("bad", param="prompt"),
    KeyRefused("no key"),
    PoolExhausted("all used up", resets_at=1_800_000_060.0, retry_after=60.0),
    PoolShortage("busy", retry_after=2.0),
    PoolEmpty("no account"),
    UpstreamError(Verdict.CALLER, BackendFault("too long", code="context_length_exceeded"), status=400),
    UpstreamError(Verdict.SERVER, BackendFault("broke"), status=500),
    UpstreamError(Verdict.CUT, BackendFault("the stream ended before its end")),
    UpstreamError(Verdict.SILENT, BackendFault("nothing came")),
    ProxyError("the proxy is stopping"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("dialect", [COMPLETIONS, EDITS, with_engine("gpt-5.5")])
def test_a_failure_before_the_answer_is_a_status_in_openais_shape(dialect: Any, error: ProxyError) -> None:
    status, headers, body = dialect.render_error(error, request_id="req_1")
    assert 400 <= status <= 599
    assert (headers["content-type"], headers["x-request-id"]) == ("application/json", "req_1")
    assert {"message", "type", "param", "code"} <= set(json.loads(body)["error"])


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("told", [0, 1, 3])
def test_a_failure_in_a_stream_is_its_last_word(error: ProxyError, told: int) -> None:
    out = encoder(stop="par", echo=True)
    out.encode(events("part", "pa")[:told])
    data = out.cut(error)
    assert out.ended is End.FAILED or told == 3
    if out.ended is End.FAILED:
        (last,) = chunks(data)
        assert last["error"]["message"]
        assert b"[DONE]" not in data
    assert out.cut(error) == b""
    assert out.encode(events("more")) == b""


@pytest.mark.parametrize("name", ["failed_late", "error_event"])
def test_the_backends_failure_ends_a_stream_without_done(name: str) -> None:
    out = encoder(stream_options={"include_usage": True})
    data = play(out, [(HERE / "fixtures" / f"{name}.sse").read_bytes()])
    last = chunks(data)[-1]
    assert set(last) == {"error"}
    assert b"[DONE]" not in data
    assert reason_of(data) is None
    assert out.failure is not None


def test_a_cut_stream_never_looks_like_a_finished_one() -> None:
    out = encoder()
    batch = events("part")[:-1]
    data = out.encode(batch) + out.cut(UpstreamError(Verdict.CUT, BackendFault("cut")))
    assert text_of(data) == "part"
    assert reason_of(data) is None
    collector = Collector(ask().make_encoder(AROUND))
    collector.feed(batch)
    with pytest.raises(UpstreamError):
        collector.result()
