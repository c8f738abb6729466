"""Numbers of the hot path: how fast backend events are taken apart, and what each dialect makes of them.

Run by `make bench-parts`. Times differ from machine to machine and from moment to moment; the ratios of one
run are what counts.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import CHAT
from codex_proxy.protocol.completions import COMPLETIONS
from codex_proxy.protocol.dialect import Dialect, Surroundings
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.responses import RESPONSES
from codex_proxy.protocol.sse import Parser, frame
from codex_proxy.protocol.wire import dumps

ROUNDS = 7
DELTAS = 20_000
DELTA = (
    b"event: response.output_text.delta\n"
    b'data: {"type":"response.output_text.delta","sequence_number":7,"item_id":"msg_1",'
    b'"output_index":0,"content_index":0,"delta":" word"}\n\n'
)
STREAM = DELTA * DELTAS
BIG = b'data: {"type":"response.completed","text":"' + b"x" * (2 * 1024 * 1024) + b'"}\n\n'


def parse(stream: bytes, size: int) -> int:
    """Feed *stream* in reads of *size* bytes and return how many events came out."""
    parser = Parser()
    return sum(len(parser.feed(stream[start : start + size])) for start in range(0, len(stream), size))


def best(work: Callable[[], int]) -> tuple[float, int]:
    """Return the shortest of some rounds, which the rest of the machine disturbed least."""
    shortest, result = float("inf"), 0
    for _ in range(ROUNDS):
        started = time.perf_counter()
        result = work()
        shortest = min(shortest, time.perf_counter() - started)
    return shortest, result


def answer(deltas: int) -> list[bytes]:
    """Return the reads of one answer: how the backend sends a text of so many deltas."""
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": []}
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    usage = {"input_tokens": 9, "output_tokens": deltas, "total_tokens": deltas + 9}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {"id": "resp_1", "created_at": 1, "output": []}},
        {"type": "response.in_progress", "response": {"id": "resp_1", "created_at": 1, "output": []}},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "status": "in_progress"}},
        {"type": "response.content_part.added", **where, "part": {"type": "output_text", "text": ""}},
        *({"type": "response.output_text.delta", **where, "delta": " word"} for _ in range(deltas)),
        {"type": "response.output_text.done", **where, "text": " word" * deltas},
        {"type": "response.output_item.done", "output_index": 0,
         "item": {**item, "content": [{"type": "output_text", "text": " word" * deltas, "annotations": []}]}},
        {"type": "response.completed", "response": {"id": "resp_1", "output": [], "usage": usage}},
    ]  # fmt: skip
    return [
        frame(event["type"], dumps({**event, "sequence_number": number}))
        for number, event in enumerate(events)
    ]


_SAID = [{"role": "user", "content": "hi"}]
ASKS: Mapping[str, tuple[Dialect, dict[str, Any]]] = {
    "responses": (RESPONSES, {"input": "hi"}),
    "chat": (CHAT, {"messages": _SAID}),
    "chat, 4 stops": (CHAT, {"messages": _SAID, "stop": ["STOP", "\n\nHuman:", "word!", "###"]}),
    "messages": (MESSAGES, {"messages": _SAID, "max_tokens": 100_000}),
    "completions": (COMPLETIONS, {"prompt": "hi"}),
}


def encode(dialect: Dialect, ask: dict[str, Any], reads: list[bytes]) -> int:
    """Decode a request, and encode its answer read by read; return the bytes that came out."""
    raw = dumps({"model": "gpt-5.5", "stream": True, **ask})
    encoder = dialect.decode(raw, {}, catalog=CATALOG).make_encoder(AROUND)
    parser = Parser()
    return sum(len(encoder.encode(parser.feed(read))) for read in reads)


CATALOG = Catalog()
AROUND = Surroundings(now=lambda: 1.0, unique="bench")


def main() -> None:
    sys.stdout.write("taking the backend's stream apart\n")
    for name, stream, size in (
        ("deltas, 16 KiB reads", STREAM, 16_384),
        ("deltas, 1 KiB reads", STREAM, 1024),
        ("one 2 MiB event, 4 KiB reads", BIG, 4096),
    ):
        seconds, events = best(lambda stream=stream, size=size: parse(stream, size))  # type: ignore[misc]
        rate = len(stream) / seconds / 1e6
        sys.stdout.write(
            f"  {name:30} {rate:8.1f} MB/s {seconds / events * 1e6:10.2f} us/event {events:6} events\n"
        )
    for title, deltas in (("a small answer, 5 deltas", 5), ("a stream of 200 deltas", 200)):
        sys.stdout.write(f"{title}: request decoded, answer encoded, an event per read\n")
        reads = answer(deltas)
        first = 0.0
        for name, (dialect, ask) in ASKS.items():
            seconds, size = best(lambda dialect=dialect, ask=ask: encode(dialect, ask, reads))  # type: ignore[misc]  # noqa: B023 -- called at once
            first = first or seconds
            sys.stdout.write(
                f"  {name:30} {seconds * 1e6:8.0f} us {seconds / first:10.2f} x responses {size:8} bytes out\n"
            )


if __name__ == "__main__":
    main()
