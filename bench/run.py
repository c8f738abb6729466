"""Numbers of the hot path: how fast backend events are taken apart. Run by `make bench`."""

import sys
import time
from collections.abc import Callable

from codex_proxy.protocol.sse import Parser

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


def main() -> None:
    for name, stream, size in (
        ("deltas, 16 KiB reads", STREAM, 16_384),
        ("deltas, 1 KiB reads", STREAM, 1024),
        ("one 2 MiB event, 4 KiB reads", BIG, 4096),
    ):
        seconds, events = best(lambda stream=stream, size=size: parse(stream, size))  # type: ignore[misc]
        rate = len(stream) / seconds / 1e6
        sys.stdout.write(
            f"sse {name:30} {rate:8.1f} MB/s {seconds / events * 1e6:10.2f} us/event {events:6} events\n"
        )


if __name__ == "__main__":
    main()
