"""A long mixed load at half of what the daemon can do: `make bench-soak ARGS="--minutes 60"`.

Streams and collected answers of all three dialects, short ones, bursts and slow ones; callers who leave in the
middle; a backend that refuses, is overloaded, answers nonsense, or breaks off. Every answer's text is
compared with what the backend said. At the end nothing may be left: no turn, no task, no connection, no memory.

Three processes: the backend, the daemon (its own program, with a look at itself every second) and the callers.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from bench.perf.contenders import free_port
from bench.perf.processes import ROOT, Process, cpu_ns, running
from codex_proxy import config, logs
from codex_proxy.daemon import Daemon, new_event_loop
from codex_proxy.simulator import Simulator
from codex_proxy.tasks import Background

KEY = "soak-key-that-opens-nothing-else"
ACCOUNTS = 20
CALLERS = 48
TARGET = 0.5
"""The share of one core that the daemon is kept busy with."""

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}

# How the backend fails, in how many turns of a thousand. Those of the first group come before an answer: the
# caller may not notice them. Those of the second come after it has begun, and end it with the dialect's error.
HIDDEN = {"overloaded": 1, "broken": 6, "garbage": 2, "refused": 2, "early-cut": 4}
SEEN = {"late-cut": 6, "late-failure": 4}
LEAVES = 0.1
"""The share of callers who leave in the middle of a stream."""

GROWTH_MIB = 2.0
"""What the resident memory may be more in the last sixth of the run than in the sixth before it, on average."""
FLAT_MINUTES = 45.0
"""How long a run has to be for that: until then it grows, while what is remembered fills its bounds."""

OWN_FILES = 6
"""What the daemon opens with the first requests: the records' database, its log and its lock."""

SETTLED_LOOKS = 30
"""How often it is looked, a second apart, whether nothing is left."""


# What the backend says -----------------------------------------------------------------------------


_WORDS = ("cache", "naïve", "数据", "a\\b", 'q"uote', "e😀d", "x\ty")


def words(seed: int, count: int) -> list[str]:
    """Return the words of the answer that *seed* stands for."""
    rng = random.Random(seed)
    return [f" {rng.choice(_WORDS)}{rng.randrange(100)}" for _ in range(count)]


def frame(kind: str, **fields: Any) -> bytes:
    """Return one event as the backend writes it."""
    data = json.dumps({"type": kind, **fields}, separators=(",", ":"), ensure_ascii=False)
    return f"event: {kind}\ndata: {data}\n\n".encode()


def answer(seed: int, count: int) -> list[bytes]:
    """Return the events of an answer."""
    said = words(seed, count)
    item = {
        "id": f"msg_{seed}",
        "type": "message",
        "status": "in_progress",
        "content": [],
        "role": "assistant",
    }
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": "".join(said)}
    whole = {**item, "status": "completed", "content": [part]}
    response: dict[str, Any] = {
        "id": f"resp_{seed}", "object": "response", "created_at": 1, "status": "in_progress", "model": "gpt-5.5",
        "output": [], "tools": [], "usage": None,
    }  # fmt: skip
    where = {"item_id": item["id"], "output_index": 0}
    usage = {"input_tokens": 9, "output_tokens": count, "total_tokens": count + 9}
    events = [
        frame("response.created", response=response),
        frame("response.in_progress", response=response),
        frame("response.output_item.added", item=item, output_index=0),
        frame("response.content_part.added", content_index=0, **where, part={**part, "text": ""}),
    ]
    events += [
        frame("response.output_text.delta", content_index=0, delta=word, item_id=item["id"], logprobs=[], output_index=0)
        for word in said
    ]  # fmt: skip
    events += [
        frame("response.output_text.done", content_index=0, **where, logprobs=[], text=part["text"]),
        frame("response.content_part.done", content_index=0, **where, part=part),
        frame("response.output_item.done", item=whole, output_index=0),
        frame("response.completed", response={**response, "status": "completed", "output": [whole], "usage": usage}),
    ]  # fmt: skip
    return events


class Backend(asyncio.Protocol):
    """The backend on a connection: reads a request, answers as its prompt says."""

    failing: random.Random
    background: Background

    def __init__(self) -> None:
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        size = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        if len(rest) < size:
            return
        body, self._buffer = rest[:size], rest[size:]
        self._task = self.background.spawn(self._reply(head, body), name="reply")

    async def _reply(self, head: bytes, body: bytes) -> None:
        transport = self._transport
        assert transport is not None
        if b"/responses " not in head.partition(b"\r\n")[0]:
            self._plain(200, b'{"models":[],"plan_type":"plus"}')
            return
        at = body.rindex(b"seed=")
        ask = dict(pair.split("=") for pair in body[at : body.index(b";", at)].decode().split(","))
        events = answer(int(ask["seed"]), int(ask["count"]))
        failure = self._failure()
        if failure in ("overloaded", "broken"):
            # A word of its own, so that no account rests for longer than a moment.
            status, code = (503, "server_is_overloaded") if failure == "overloaded" else (500, "server_error")
            self._plain(status, json.dumps({"error": {"message": failure, "code": code}}).encode())
            return
        if failure == "refused":
            self._plain(
                429,
                b'{"error":{"message":"Rate limit reached, try again in 50ms","code":"rate_limit_exceeded"}}',
            )
            return
        if failure == "garbage":
            transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a chunk\r\n")
            transport.close()
            return
        transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            b"x-codex-plan-type: plus\r\nx-codex-primary-used-percent: 5\r\nx-codex-primary-window-minutes: 300\r\n"
            b"x-codex-primary-reset-after-seconds: 9000\r\n\r\n"
        )
        if failure == "early-cut":
            self._chunk(b"".join(events[:2]))
            transport.close()
            return
        end = len(events) if failure is None else 4 + (len(events) - 8) // 2
        if ask["pace"] == "0":
            self._chunk(b"".join(events[:end]))
        else:
            for event in events[:end]:
                self._chunk(event)
                await asyncio.sleep(float(ask["pace"]))
        if failure == "late-cut":
            transport.close()
            return
        if failure == "late-failure":
            error = {"code": "server_error", "message": "it broke"}
            self._chunk(frame("response.failed", response={"status": "failed", "error": error}))
        transport.write(b"0\r\n\r\n")

    def _failure(self) -> str | None:
        number = self.failing.randrange(1000)
        for name, share in (HIDDEN | SEEN).items():
            number -= share
            if number < 0:
                return name
        return None

    def _chunk(self, data: bytes) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _plain(self, status: int, body: bytes) -> None:
        assert self._transport is not None
        self._transport.write(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )


async def play_backend(port: int, seed: int) -> None:
    """Serve until the process is ended."""
    Backend.failing, Backend.background = random.Random(seed), Background()
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", port)
    await server.serve_forever()


# The daemon ------------------------------------------------------------------------------------------


async def play_daemon(path: Path, looks: Path) -> None:
    """Run the daemon, and write down each second what is alive in it."""
    loaded = config.load(path, {})
    logs.setup(loaded.settings.log_level)
    daemon = Daemon(loaded, environ={})

    async def look() -> None:
        rounds = 0
        while True:
            rounds += 1
            seen = {
                "tasks": len(asyncio.all_tasks()),
                "turns": daemon.executor.in_flight,
                "objects": len(gc.get_objects()) if rounds % 30 == 1 else None,
                "upstream": daemon.outbound.native.statistics(),
            }
            await asyncio.to_thread(_replace, looks, json.dumps(seen))
            await asyncio.sleep(1.0)

    looking = Background().spawn(look(), name="look")
    try:
        await daemon.run_until_signalled()
    finally:
        looking.cancel()


def _replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.rename(path)


# The callers -----------------------------------------------------------------------------------------


class Lost(Exception):
    """An answer that is not what the backend said."""


class Callers:
    """Everybody who asks, and what became of it."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.port = port
        self.rng = rng
        self.counts: Counter[str] = Counter()
        self.events = 0
        """How many deltas were told in answers that were compared whole."""
        self.problems: list[str] = []
        self.pause = 0.02
        self.ending = False
        self._seed = 0

    def _is_over(self) -> bool:
        return self.ending

    async def call_on(self) -> None:
        """Ask again and again, on connections that are kept as clients keep them."""
        while not self._is_over():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
            except OSError as exc:
                self.problems.append(f"no connection: {exc}")
                await asyncio.sleep(1.0)
                continue
            try:
                while await self._ask(reader, writer):
                    await asyncio.sleep(self.rng.expovariate(1.0 / self.pause))
                    if self._is_over():
                        break
            except (OSError, asyncio.IncompleteReadError) as exc:
                self.problems.append(f"connection lost: {exc!r}")
            finally:
                writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Ask once; False when the connection is not to be used again."""
        rng = self.rng
        self._seed += 1
        seed = self._seed
        dialect = rng.choice(tuple(PATHS))
        kind = rng.choices(("small", "burst", "paced"), (80, 10, 10))[0]
        count, pace = {"small": (5, "0"), "burst": (200, "0"), "paced": (rng.randrange(20, 100), "0.02")}[
            kind
        ]
        stream = rng.random() < 0.8
        leaves = stream and rng.random() < LEAVES
        text = f"talk {rng.randrange(2000)} {'long ' * rng.choice((1, 1, 1, 4000))}seed={seed},count={count},pace={pace};"
        writer.write(request(dialect, text, stream=stream))
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if leaves and status == 200:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.readexactly(rng.randrange(1, 400)), rng.random())
            writer.transport.abort()
            self.counts["left"] += 1
            return False
        body = b"".join([part async for part in body_of(reader, head)])
        if status != 200:
            self.counts[f"status {status}"] += 1
            return True
        try:
            said = read_stream(dialect, body) if stream else read_whole(dialect, body)
        except Lost as exc:
            self.problems.append(f"{dialect} seed={seed}: {exc}")
            self.counts["broken"] += 1
            return True
        expected = "".join(words(seed, count))
        if said is None:
            self.counts["told failures"] += 1
        elif said == expected:
            self.counts[f"whole {dialect}"] += 1
            self.events += count
        else:
            self.counts["garbled"] += 1
            self.problems.append(
                f"{dialect} {kind} seed={seed}: {len(said)} characters instead of {len(expected)}"
            )
        return True


def request(dialect: str, text: str, *, stream: bool) -> bytes:
    """Return a request as bytes."""
    asked: dict[str, Any] = {"model": "gpt-5.5", "stream": stream}
    if dialect == "responses":
        asked["input"] = text
    else:
        asked["messages"] = [{"role": "user", "content": text}]
    if dialect == "messages":
        asked["max_tokens"] = 100_000
    body = json.dumps(asked).encode()
    return (
        f"POST {PATHS[dialect]} HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def body_of(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    """Read a body in chunks or of a stated length."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            yield await reader.readexactly(int(line[15:]))
            return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


def read_stream(dialect: str, body: bytes) -> str | None:
    """Return the text of a stream; None for one that ended with an error.

    Raises:
        Lost: If it has no end at all.
    """
    said: list[str] = []
    for line in body.split(b"\n"):
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]":
            return "".join(said)
        event = json.loads(line[6:])
        kind = event.get("type")
        if kind in ("error", "response.failed") or "error" in event:
            return None
        if dialect == "chat":
            said += [choice["delta"].get("content") or "" for choice in event["choices"]]
        elif dialect == "responses":
            if kind == "response.output_text.delta":
                said.append(event["delta"])
            elif kind == "response.completed":
                return "".join(said)
        elif kind == "content_block_delta":
            said.append(event["delta"].get("text", ""))
        elif kind == "message_stop":
            return "".join(said)
    raise Lost("a stream without an end")


def read_whole(dialect: str, body: bytes) -> str:
    """Return the text of a collected answer."""
    whole = json.loads(body)
    if dialect == "chat":
        return str(whole["choices"][0]["message"]["content"])
    if dialect == "responses":
        return "".join(part["text"] for item in whole["output"] for part in item["content"])
    return "".join(part["text"] for part in whole["content"])


# The run ---------------------------------------------------------------------------------------------


class Watched:
    """A process as the kernel sees it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def seconds(self) -> float:
        """Return the processor time so far."""
        return cpu_ns(self._pid) / 1e9

    def mib(self) -> float:
        """Return the resident memory."""
        with open(f"/proc/{self._pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def files(self) -> int:
        """Return how many files and sockets are open."""
        return len(os.listdir(f"/proc/{self._pid}/fd"))


def write_place(folder: Path, backend_port: int, port: int) -> Path:
    """Write the configuration and the accounts."""
    auths = folder / "auths"
    Simulator(ACCOUNTS).write_auth_files(auths)
    path = folder / "config.yaml"
    path.write_text(
        f"listen: 127.0.0.1:{port}\nauth-dir: {auths}\ndata-dir: {folder / 'data'}\n"
        f"base-url: http://127.0.0.1:{backend_port}/backend-api/codex\noauth-issuer: http://127.0.0.1:{backend_port}\n"
        f'api-keys: ["soak: {KEY}"]\n',
        encoding="utf-8",
    )
    return path


async def soak(minutes: float, seed: int, folder: Path) -> bool:
    """Run it all; True when nothing was lost and nothing is left."""
    backend_port, port = free_port(), free_port()
    path, looks = write_place(folder, backend_port, port), folder / "looks.json"
    with (
        running(_program("backend", folder, str(backend_port), str(seed))),
        running(_program("daemon", folder, str(path), str(looks))) as daemon,
    ):
        # It ends what is still running in order.
        daemon.patience = 20.0
        if not await reachable(port):
            say(daemon.said())
            return False
        return await observe(Watched(daemon.pid), looks, port, minutes, seed, daemon.log)


def _program(name: str, folder: Path, *arguments: str) -> Process:
    command = [sys.executable, "-m", "bench.soak", name, *arguments]
    return Process(name, command, cores=frozenset(), log=folder / f"{name}.log", cwd=ROOT)


async def _read(path: Path) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads(await asyncio.to_thread(path.read_text, encoding="utf-8"))
    return seen


async def reachable(port: int) -> bool:
    """Wait until somebody listens; False when nobody does for half a minute."""
    for _ in range(300):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return True
    return False


async def observe(watched: Watched, looks: Path, port: int, minutes: float, seed: int, log: Path) -> bool:
    """Call for *minutes*, and tell what is seen meanwhile and afterwards."""
    callers = Callers(port, random.Random(seed))
    await asyncio.sleep(2.0)
    before = await _read(looks)
    files_before = watched.files()
    background = Background()
    calling = [background.spawn(callers.call_on(), name="caller") for _ in range(CALLERS)]
    started, busy = time.monotonic(), watched.seconds()
    # What is kept for later (conversations, decisions, connections) fills its bounds first.
    sixth = minutes * 10
    sizes: list[float] = []
    ends, told = started + minutes * 60, started
    while (now := time.monotonic()) < ends:
        await asyncio.sleep(1.0)
        spent = watched.seconds()
        load = (spent - busy) / (time.monotonic() - now)
        busy = spent
        callers.pause = min(2.0, max(0.001, callers.pause * (1.05 if load > TARGET else 0.97)))
        sizes.append(watched.mib())
        if now - told >= max(10.0, minutes * 3):
            told = now
            say(
                f"{(now - started) / 60:5.1f} min  {watched.mib():6.1f} MiB  {watched.files():4d} files  load {load:.0%}  {tell(callers.counts)}"
            )
    callers.ending = True
    await asyncio.wait(calling, timeout=60)
    for task in calling:
        task.cancel()
    count = max(1, round(len(sizes) * sixth / (minutes * 60)))
    last, before_that = (
        statistics.fmean(sizes[-count:]),
        statistics.fmean(sizes[-2 * count : -count] or sizes),
    )
    # What it sees of itself is a second old.
    await asyncio.sleep(3.0)
    after, files = await _read(looks), watched.files()
    for _ in range(SETTLED_LOOKS):
        if _is_settled(before, after, files_before, files):
            break
        await asyncio.sleep(1.0)
        after, files = await _read(looks), watched.files()
    text = await asyncio.to_thread(log.read_text, encoding="utf-8")
    faults = [line for line in text.splitlines() if " ERROR " in line or "Traceback" in line]
    found = {
        "no answer garbled or without an end": not callers.problems,
        "no turn left": after["turns"] == 0,
        "no task left": after["tasks"] <= before["tasks"],
        "no connection left but the idle ones to the backend": _is_settled(
            before, after, files_before, files
        ),
        f"memory flat in the last third (within {GROWTH_MIB:g} MiB)": minutes < FLAT_MINUTES
        or last - before_that <= GROWTH_MIB,
        "nothing in the log that nobody foresaw": not faults,
    }
    say(f"{minutes:g} minutes: {tell(callers.counts)}; {callers.events} deltas compared")
    say(
        f"memory {sizes[0]:.1f} MiB at first, {before_that:.1f} in the fifth sixth, {last:.1f} in the last; tasks {before['tasks']} -> {after['tasks']}, "
        f"files {files_before} -> {files}, to the backend {before['upstream']} -> {after['upstream']}"
    )
    for name, holds in found.items():
        if minutes < FLAT_MINUTES and name.startswith("memory"):
            say(f"   -   {name}: that takes {FLAT_MINUTES:g} minutes")
        else:
            say(f"  {'yes' if holds else 'NO '}  {name}")
    for line in (*callers.problems[:10], *faults[:10]):
        say(f"      {line[:300]}")
    return all(found.values())


def _is_settled(before: dict[str, Any], after: dict[str, Any], files_before: int, files: int) -> bool:
    """Tell whether only idle connections to the backend are left; a round that asks for quota uses one now and then."""
    there, here = before["upstream"], after["upstream"]
    return bool(
        here["open"] == here["idle"] and files - here["open"] <= files_before - there["open"] + OWN_FILES
    )


def say(line: str) -> None:
    """Write a line, seen at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tell(counts: Counter[str]) -> str:
    """Return the counts as text."""
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))


def main(arguments: Sequence[str]) -> int:
    """Run one of the three processes; return the exit code."""
    match list(arguments):
        case ["backend", port, seed]:
            with (
                contextlib.suppress(KeyboardInterrupt),
                asyncio.Runner(loop_factory=new_event_loop()) as runner,
            ):
                runner.run(play_backend(int(port), int(seed)))
            return 0
        case ["daemon", path, looks]:
            with asyncio.Runner(loop_factory=new_event_loop()) as runner:
                runner.run(play_daemon(Path(path), Path(looks)))
            return 0
        case _:
            pass
    parser = argparse.ArgumentParser(prog="bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        asyncio.Runner(loop_factory=new_event_loop()) as runner,
    ):
        return 0 if runner.run(soak(asked.minutes, asked.seed, Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
