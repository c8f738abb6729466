"""The mock backend and the load generator in Python, where there is no Go: same orders, same reports, far slower.

    python -m bench.perf.fallback mock -plan plan.json
    python -m bench.perf.fallback load

Here the kit is the limit, not the proxy, so only CPU time per request means anything. `kit/` is the one to read:
this follows it.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.perf.fixtures import HOLE
from bench.perf.processes import cpu_ns

JsonObject = dict[str, Any]

_MARKER = re.compile(rb"bench:([a-z0-9]{1,15})\.")
_HEAD_END = b"\r\n\r\n"
_LAST = b"0\r\n\r\n"
# The backend's own, and where a relay asks.
_PATHS = ("/backend-api/codex/responses", "/v1/responses")


# --- HTTP, as little as is needed


def header(head: bytes, name: str) -> bytes | None:
    """Return a header's value."""
    found = re.search(rb"(?im)^" + name.encode() + rb":[ \t]*(.*?)[ \t]*\r?$", head)
    return found[1] if found else None


async def pieces(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    """Yield the content of the body that follows *head*.

    Raises:
        ValueError: If its framing is not understood.
        asyncio.IncompleteReadError: If it ends too early.
    """
    if header(head, "transfer-encoding") is None:
        length = header(head, "content-length")
        if length is None:
            if head.startswith(b"HTTP/"):
                raise ValueError("an answer of unknown length")
            return
        left = int(length)
        while left:
            piece = await reader.read(min(left, 65536))
            if not piece:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(piece)
            yield piece
        return
    while size := int((await reader.readuntil(b"\n")).partition(b";")[0], 16):
        chunk = await reader.readexactly(size + 2)
        if not chunk.endswith(b"\r\n"):
            raise ValueError("bad chunk framing")
        yield chunk[:-2]
    while (await reader.readuntil(b"\n")).strip():
        pass


# --- the mock


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@dataclass(slots=True)
class _Script:
    """What is played, with its bytes made ready."""

    lead: bytes
    steps: list[bytes]
    pace: float

    @classmethod
    def load(cls, one: JsonObject, head: str, *, merged: bool) -> "_Script":
        frames = [frame + b"\n\n" for frame in Path(one["file"]).read_bytes().split(b"\n\n")[:-1]]

        def chunks(some: list[bytes]) -> bytes:
            return b"".join(map(_chunk, [b"".join(some)] if merged and some else some))

        lead = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(frames[: one["lead"]])
        rest = frames[one["lead"] :]
        if not rest:
            return cls(lead + _LAST, [], 0.0)
        middle, tail = rest[: len(rest) - one["tail"]], rest[len(rest) - one["tail"] :]
        return cls(lead, [*map(_chunk, middle), chunks(tail) + _LAST], one["pace"] / 1e6)


class _Mock:
    def __init__(self, plan: JsonObject) -> None:
        self._pages: dict[str, str] = plan["pages"]
        self._scripts = {
            name.encode(): _Script.load(one, plan["head"], merged=plan["merged"])
            for name, one in plan["scripts"].items()
        }
        self._serial = 0
        self._numbers = dict.fromkeys(
            ("connections", "open", "requests", "completed", "aborted", "playing", "refused", "sent_bytes"), 0
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection until it ends."""
        self._numbers["connections"] += 1
        self._numbers["open"] += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._numbers["open"] -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(_HEAD_END)
        body = b"".join([piece async for piece in pieces(reader, head)])
        self._numbers["requests"] += 1
        method, path = head.split(b" ", 2)[:2]
        path = path.partition(b"?")[0]
        page = self._page(path.decode()) if method == b"GET" else None
        named = _MARKER.search(body)
        script = self._scripts.get(named[1]) if named else None
        if page is not None:
            writer.write(_plain("200 OK", page))
        elif method != b"POST" or path.decode() not in _PATHS or script is None:
            self._numbers["refused"] += 1
            writer.write(_plain("404 Not Found", '{"detail":"nothing is played for this"}'))
        else:
            await self._play(script, reader, writer)
        await writer.drain()
        return (header(head, "connection") or b"").lower() != b"close"

    def _page(self, path: str) -> str | None:
        return json.dumps(self._numbers) if path == "/_mock" else self._pages.get(path)

    async def _play(
        self, script: _Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._serial += 1
        self._numbers["playing"] += 1
        completed = False
        try:
            lead = script.lead.replace(HOLE.encode(), b"%012x" % self._serial)
            # In pieces, so that what is sent can be seen to have stopped.
            for start in range(0, len(lead), 65536):
                await self._send(writer, lead[start : start + 65536])
            due = time.monotonic() + self._serial * 0.618034 % 1.0 * script.pace
            for step in script.steps:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + due - time.monotonic()):
                        if not await reader.read(1):
                            raise ConnectionResetError
                await self._send(writer, step)
                due += script.pace
            completed = True
        finally:
            self._numbers["playing"] -= 1
            self._numbers["completed" if completed else "aborted"] += 1

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        self._numbers["sent_bytes"] += len(data)


def _plain(status: str, text: str) -> bytes:
    raw = text.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


async def _run_mock(plan: JsonObject) -> None:
    mock = _Mock(plan)
    server = await asyncio.start_server(mock.serve, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    # Whoever started us is gone when our stdin ends, however it ended.
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)


# --- the load generator


def usage_of(pids: list[int]) -> dict[str, int]:
    """Return CPU time and waiting time of some processes, in nanoseconds."""
    used = {"cpu_ns": 0, "wait_ns": 0}
    for pid in pids:
        with contextlib.suppress(OSError):
            used["cpu_ns"] += cpu_ns(pid)
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                used["wait_ns"] += int(task.read_text(encoding="ascii").split()[1])
    return used


@dataclass(slots=True)
class _Load:
    job: JsonObject
    request: bytes
    measuring: bool = False
    stopping: bool = False
    begun: int = 0
    ended: int = 0
    serial: int = 0
    latencies: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    report: JsonObject = field(
        default_factory=lambda: {
            "requests": 0, "errors": 0, "samples": [], "connects": 0, "seconds": 0.0, "frames": 0,
            "latency_us": {}, "usage": {}, "own": {"cpu_ns": 0, "wait_ns": 0}, "in_flight": 0, "first_us": 0.0,
            "body_bytes": 0, "ended_early": 0,
        }
    )  # fmt: skip

    def fail(self, why: str) -> None:
        self.report["errors"] += 1
        if len(self.report["samples"]) < 5:
            self.report["samples"].append(why)

    async def one(self) -> None:
        """Be one caller."""
        writer: asyncio.StreamWriter | None = None
        reader = asyncio.StreamReader()
        used = False
        try:
            while not self.stopping:
                if writer is None:
                    reader, writer = await self._connect()
                    used = False
                keeps = False
                try:
                    keeps = await self._ask(reader, writer)
                except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as exc:
                    if not used or not (isinstance(exc, asyncio.IncompleteReadError) and not exc.partial):
                        self.ended += 1
                        self.fail(f"lost: {exc}")
                used = True
                if not keeps:
                    writer.close()
                    writer = None
                if self.job["mode"] != "closed" or self.report["errors"] > 100:
                    return
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket()
        sock.setblocking(False)
        stalled = self.job["mode"] == "stalled"
        if stalled:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.job["port"]))
        self.report["connects"] += 1
        # What is not taken stays in the socket, and then with the proxy.
        return await asyncio.open_connection(sock=sock, limit=8192 if stalled else 65536)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        named = b"%012x" % (self.serial % max(1, self.job["conversations"]))
        self.serial += 1
        self.report["in_flight"] += 1
        started = time.perf_counter()
        try:
            writer.write(self.request.replace(HOLE.encode(), named))
            await writer.drain()
            head = await reader.readuntil(_HEAD_END)
            first = time.perf_counter()
            answer = bytearray()
            if not head.startswith(b"HTTP/1.1 200"):
                self.ended += 1
                self.fail(head.partition(b"\r\n")[0].decode(errors="replace"))
                return False
            frames = 0
            async for piece in pieces(reader, head):
                answer += piece
                fresh = answer.count(b"\n\n", max(0, len(answer) - len(piece) - 1))
                if self.measuring:
                    self.report["frames"] += fresh
                    self.report["body_bytes"] += len(piece)
                if not frames and fresh:
                    self.begun += 1
                    if self.job["mode"] == "stalled":
                        await self.go_on.wait()
                frames += fresh
        finally:
            self.report["in_flight"] -= 1
        self.ended += 1
        self._check(bytes(answer), frames)
        if self.measuring:
            self.report["requests"] += 1
            self.latencies.append((time.perf_counter() - started) * 1e6)
            self.firsts.append((first - started) * 1e6)
        return (header(head, "connection") or b"").lower() != b"close"

    def _check(self, answer: bytes, frames: int) -> None:
        expect = self.job["expect"]
        deltas = answer.count(expect["marker"].encode())
        if frames != expect["frames"]:
            self.fail(f"{frames} events instead of {expect['frames']}")
        elif deltas != expect["count"]:
            self.fail(f"{deltas} deltas instead of {expect['count']}")
        elif not answer.endswith(expect["ending"].encode()):
            self.fail("an answer without its end")
        elif expect["bytes"] and len(answer) != expect["bytes"]:
            self.fail(f"{len(answer)} bytes instead of {expect['bytes']}")

    # What is measured when

    async def run(self) -> None:
        """Do the job."""
        async with asyncio.TaskGroup() as group:
            callers = [group.create_task(self.one()) for _ in range(self.job["concurrency"])]
            mode = self.job["mode"]
            if mode in {"slow", "stalled"}:
                await self._hold(callers)
                return
            if mode == "paced":
                await _until(lambda: self.begun >= self.job["concurrency"] or self.report["errors"] > 0, 10)
            await asyncio.sleep(self.job["warmup"])
            await self._window()
            if mode == "paced":
                self.report["ended_early"] = self.ended
            self.stopping = True
            if not await _until(lambda: all(caller.done() for caller in callers), 30):
                self.fail("answers did not end")
                for caller in callers:
                    caller.cancel()

    async def _window(self) -> None:
        watched = {**self.job["watch"], "": [os.getpid()]}
        before = {name: usage_of(pids) for name, pids in watched.items()}
        started, self.measuring = time.perf_counter(), True
        await asyncio.sleep(self.job["seconds"])
        await _until(lambda: self.report["requests"] >= self.job["at_least"], 20)
        self.report["seconds"], self.measuring = time.perf_counter() - started, False
        used = {
            name: {key: value - before[name][key] for key, value in usage_of(pids).items()}
            for name, pids in watched.items()
        }
        self.report["own"] = used.pop("")
        self.report["usage"] = used

    async def _hold(self, callers: list[asyncio.Task[None]]) -> None:
        await _until(lambda: self.begun + self.report["errors"] >= len(callers), 60)
        _print({"held": self.begun})
        command = (await asyncio.to_thread(sys.stdin.readline)).strip()
        self.report["ended_early"] = self.ended
        self.stopping = True
        if command == "drain":
            self.measuring = True
            self.go_on.set()
            if not await _until(lambda: self.ended >= len(callers), 60):
                self.fail("answers did not end")
        else:
            self.report["requests"] = self.begun
        for caller in callers:
            caller.cancel()


async def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.002)
    return True


def _print(value: JsonObject) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def percentiles(values: list[float]) -> dict[str, float]:
    """Return what is told of some times."""
    values.sort()
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}
    return {
        name: values[min(len(values) - 1, int(share * len(values)))]
        for name, share in shares.items()
        if values
    }


async def _run_load(job: JsonObject, request: bytes) -> None:
    load = _Load(job, request)
    await load.run()
    load.report["latency_us"] = percentiles(load.latencies)
    load.report["first_us"] = percentiles(load.firsts).get("p50", 0.0)
    _print(load.report)


def main(arguments: list[str]) -> int:
    """Be the mock or the load generator."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    match arguments:
        case ["mock", "-plan", file]:
            asyncio.run(_run_mock(json.loads(Path(file).read_text(encoding="utf-8"))))
        case ["load"]:
            job = json.loads(sys.stdin.readline())
            asyncio.run(_run_load(job, Path(job["request"]).read_bytes()))
        case _:
            sys.stderr.write("usage: fallback mock -plan FILE | load\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
