"""What a turn costs, counted: calls, writes and parses do not depend on the machine or on what else it does.

A bound is what it takes today and a little more; who passes it has made every request dearer, perhaps for a reason.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.simulator import Script
from tests.counting import OURS, Calls
from tests.harness import Stand, standing

NOT_MEASURED = str(Path(OURS, "simulator"))
WARM = 5
TURNS = 20

CHAT = {"model": "gpt-5.5", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
MESSAGES = {**CHAT, "max_tokens": 10_000}
RESPONSES = {"model": "gpt-5.5", "stream": True, "input": "hi"}


def named(calls: Calls) -> Counter[str]:
    """Return the counts of the package's functions by name, those of the simulator left out."""
    found: Counter[str] = Counter()
    for code, count in calls.ours().items():
        if not code.co_filename.startswith(NOT_MEASURED):
            found[f"{Path(code.co_filename).name}:{code.co_qualname}"] += count
    return found


async def calls_of(stand: Stand, turn: Callable[[], Awaitable[Any]]) -> Counter[str]:
    """Return how often each function is called in a turn, on average."""
    for _ in range(WARM):
        await turn()
    with Calls() as calls:
        for _ in range(TURNS):
            await turn()
        # What follows an answer is part of its turn.
        await asyncio.sleep(0)
    return Counter({name: -(-count // TURNS) for name, count in named(calls).items()})


def worst(calls: Counter[str]) -> str:
    """Return what there is to look at when a bound does not hold."""
    return "\n".join(f"{count:5d}  {name}" for name, count in calls.most_common(40))


@pytest.mark.parametrize(
    ("path", "body", "bound"),
    [
        ("/v1/chat/completions", CHAT, 720),
        ("/v1/messages", MESSAGES, 740),
        ("/v1/responses", RESPONSES, 720),
    ],
)
async def test_a_small_turn_takes_so_many_calls(
    tmp_path: Path, path: str, body: dict[str, Any], bound: int
) -> None:
    async with standing(tmp_path) as stand:
        for account in stand.accounts:
            # Windows in use, as they nearly always are: those that nobody has begun are read more closely.
            account.use(primary=20.0, secondary=20.0)
        stand.sim.script(*[Script.text("hello there") for _ in range(WARM + TURNS)])
        calls = await calls_of(stand, lambda: stand.post(path, body))
    assert calls.total() <= bound, worst(calls)
