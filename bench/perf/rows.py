"""What is measured: each row asks every contender in turn, in alternating order, and keeps the median."""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.perf.contenders import STARTERS, Contender, Place, Server
from bench.perf.fixtures import Script, expectation, read_answer, words
from bench.perf.processes import Broken, Kit, Load, Mock, fetch, memory_kb, pause, running, wait_until
from codex_proxy.protocol.wire import JsonObject

# Below this share of its core a proxy was waiting for us, not we for it.
BUSY = 0.80
# Above this share of its core the kit may have been late.
LATE = 0.90

_TRIES = 3

# Fewer say little; a slow machine takes longer for its large bodies.
_AT_LEAST = 30

# What keeps connections opens a few more when many ask at once.
_FEW_ANEW = 0.2

# Conversations that one row asks in, in turn.
_CONVERSATIONS = 256

_PACE = 0.02
_PACED_STREAMS = 100


@dataclass(slots=True, frozen=True)
class Size:
    """How long a run takes."""

    rounds: int
    seconds: float
    warmup: float
    paced_rounds: int
    paced_seconds: float
    streams: int
    levels: tuple[int, ...]


FULL = Size(5, 1.2, 0.3, 5, 2.0, 1000, (1, 4, 8, 16, 32, 64, 128, 256))
QUICK = Size(3, 0.4, 0.15, 2, 0.6, 200, (1, 16, 64))
# Long enough that starting is little of it.
PROFILED = Size(1, 5.0, 0.3, 1, 5.0, 200, (32,))


def scripts(size: Size) -> dict[str, Script]:
    """Return what the mock can play."""
    # As long as it takes until all streams flow, what is measured, and a little more.
    paced = round((1.5 + size.warmup + size.paced_seconds) / _PACE)
    return {
        "small": Script(words(5)),
        "burst": Script(words(200)),
        "paced": Script(words(paced), pace=_PACE),
        "slow": Script(words(600), pace=2.0, ends=False),
        "huge": Script(words(57_400)),
    }


@dataclass(slots=True)
class Figures:
    """What one contender reached in one row."""

    rounds: list[float] = field(default_factory=list)
    extra: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failure: str | None = None
    """Why it did not get to the end of the row."""

    @property
    def value(self) -> float | None:
        """The median of the rounds; None when none of them counts."""
        return statistics.median(self.rounds) if self.rounds else None

    def median(self, name: str) -> float | None:
        """Return the median of something measured on the side."""
        return statistics.median(self.extra[name]) if self.extra.get(name) else None

    def add(self, value: float, **extra: float) -> None:
        """Add a round."""
        self.rounds.append(value)
        for name, one in extra.items():
            self.extra.setdefault(name, []).append(one)

    def note(self, text: str) -> None:
        """Add a remark; a round was lost."""
        self.notes.append(text)

    def fail(self, why: str) -> None:
        """Forget what was measured: a server that errs may be fast because it does."""
        self.rounds, self.extra, self.failure = [], {}, why


Table = dict[str, dict[str, Figures]]
"""Row -> contender -> figures."""


class Bench:
    """A run: the mock, the servers that are up, and what was measured so far."""

    def __init__(
        self, kit: Kit, place: Place, mock: Mock, servers: Mapping[str, Server], contenders: Sequence[Contender],
        size: Size, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.kit = kit
        self.place = place
        self.mock = mock
        self.servers = servers
        self.contenders = contenders
        self.size = size
        self.say = say
        self.scripts = scripts(size)
        self.table: Table = {}
        self._expected: dict[tuple[str, str, int], JsonObject] = {}

    def figures(self, row: str, contender: Contender) -> Figures:
        """Return where the results of *contender* in *row* are kept."""
        return self.table.setdefault(row, {}).setdefault(contender.name, Figures())

    def alternating(self, rounds: int, contenders: Sequence[Contender] | None = None) -> Iterator[Contender]:
        """Go through the contenders again and again, every other time backwards."""
        chosen = self.contenders if contenders is None else contenders
        for number in range(rounds):
            yield from chosen if number % 2 == 0 else reversed(chosen)

    # One answer, looked at closely

    def expect(self, contender: Contender, script: str, size: int = 0) -> JsonObject:
        """Ask once, check every word of the answer, and return what all others must be like."""
        key = (contender.name, script, size)
        if key not in self._expected:
            try:
                raw = fetch(self.servers[contender.server].port, contender.request(script, size=size))
            except (Broken, OSError) as exc:
                process = self.servers[contender.server].process
                said = process.said() if process is not None else ""
                raise Broken(f"{contender.name} does not answer {script}: {exc}\n{said}") from exc
            try:
                text = read_answer(contender.dialect, raw)
                expected = expectation(contender.dialect, raw)
            except (ValueError, KeyError, TypeError) as exc:
                raise Broken(f"{contender.name} answers {script} badly: {exc}") from exc
            if text != self.scripts[script].text:
                raise Broken(f"{contender.name} answers {script} with another text than the backend's")
            self._expected[key] = expected
        return self._expected[key]

    @contextlib.contextmanager
    def fresh(self, contender: Contender) -> Iterator[Server]:
        """Have a server of its own that has served a little, so that its memory tells of nothing else."""
        server = STARTERS[contender.server](self.place)
        assert server is not None
        assert server.process is not None
        with running(server.process):
            self.run(self.job(contender, "small", server=server, mode="closed", concurrency=8, seconds=0.3))
            yield server

    # One run of the load generator

    def job(
        self, contender: Contender, script: str, *, size: int = 0, server: Server | None = None,
        expect: JsonObject | None = None, **more: Any,
    ) -> JsonObject:  # fmt: skip
        """Return what the load generator is told."""
        file = self.place.folder / f"request-{contender.name}-{script}-{size}"
        if not file.exists():
            file.write_bytes(contender.request(script, size=size))
        server = server or self.servers[contender.server]
        return {
            "port": server.port, "request": str(file), "conversations": _CONVERSATIONS,
            "expect": self.expect(contender, script, size) if expect is None else expect,
            "watch": {"proxy": server.pids, "mock": [self.mock.process.pid]},
            "warmup": self.size.warmup, "seconds": self.size.seconds, "at_least": 0, **more,
        }  # fmt: skip

    def load(self, job: JsonObject) -> Load:
        return Load(self.kit, self.place.cores, self.place.folder, job)

    def run(self, job: JsonObject) -> JsonObject:
        """Run the load generator to its end.

        Raises:
            Broken: If any answer was not as it must be.
        """
        load = self.load(job)
        try:
            report = load.read(patience=120)
        finally:
            load.stop()
        return checked(report)

    def busy_run(self, contender: Contender, figures: Figures, job: JsonObject) -> JsonObject | None:
        """Run until the proxy was the limit and not the kit; None, with a note, when it never is."""
        report: JsonObject = {}
        for _ in range(_TRIES):
            report = self.run(job)
            if contender.server == "direct" or busy(report) >= BUSY:
                return report
        figures.note("generator-limited, discarded: the proxy had time to spare")
        return None


def checked(report: JsonObject) -> JsonObject:
    """Return *report*.

    Raises:
        Broken: If it tells of a bad answer.
    """
    if report["errors"]:
        raise Broken(f"{report['errors']} bad answers, such as: {report['samples']}")
    return report


def busy(report: JsonObject) -> float:
    """Return for how much of the time the proxy ran, or would have had its core been free."""
    used = report["usage"]["proxy"]
    return float((used["cpu_ns"] + used["wait_ns"]) / 1e9 / report["seconds"])


def kit_share(report: JsonObject) -> float:
    """Return how much of a core the mock and the load generator used together."""
    return float((report["usage"]["mock"]["cpu_ns"] + report["own"]["cpu_ns"]) / 1e9 / report["seconds"])


# --- the rows

Measure = Callable[[Bench, Contender, Figures], None]


@dataclass(slots=True, frozen=True)
class Row:
    """How one contender is measured once, and how often that is done."""

    measure: Measure
    rounds: Callable[[Size], int]
    scripts: tuple[str, ...] = ("small",)
    """What the mock has to play for it."""
    of_processes: bool = False
    """Whether it says something only of a process in between."""

    def run(self, bench: Bench, name: str) -> None:
        """Measure all contenders; one that breaks is left out of the row, and the row says why."""
        broken: set[str] = set()
        for contender in bench.alternating(self.rounds(bench.size)):
            if contender.name in broken or (self.of_processes and not bench.servers[contender.server].pids):
                continue
            figures = bench.figures(name, contender)
            bench.say(f"{name}: {contender.title} ...")
            try:
                self.measure(bench, contender, figures)
            except Broken as exc:
                broken.add(contender.name)
                figures.fail(str(exc))


def _closed(script: str, concurrency: int, *, size: int = 0) -> Measure:
    """Make a row of requests that follow each other on so many connections: CPU time for each."""

    def measure(bench: Bench, contender: Contender, figures: Figures) -> None:
        job = bench.job(
            contender, script, size=size, mode="closed", concurrency=concurrency, at_least=_AT_LEAST
        )
        before = bench.mock.statistics()
        report = bench.busy_run(contender, figures, job)
        after = bench.mock.statistics()
        anew = (after["connections"] - before["connections"]) / (after["requests"] - before["requests"])
        if contender.server != "direct" and anew > _FEW_ANEW:
            figures.note("opens a new connection to the backend for many requests")
        if report is None:
            return
        if not report["requests"]:
            raise Broken(f"{contender.name} answered nothing")
        figures.add(
            report["usage"]["proxy"]["cpu_ns"] / 1e3 / report["requests"],
            rate=report["requests"] / report["seconds"],
            p50=report["latency_us"]["p50"],
            p99=report["latency_us"]["p99"],
            kit=kit_share(report),
        )

    return measure


def _paced(bench: Bench, contender: Contender, figures: Figures) -> None:
    """Measure many streams that tick: CPU time per event."""
    seconds = bench.size.paced_seconds
    wanted = _PACED_STREAMS / _PACE * seconds
    job = bench.job(contender, "paced", mode="paced", concurrency=_PACED_STREAMS, seconds=seconds)
    report: JsonObject = {}
    for _ in range(_TRIES):
        report = bench.run(job)
        in_time = report["frames"] >= 0.97 * wanted and not report["ended_early"]
        if in_time and kit_share(report) < LATE:
            figures.add(report["usage"]["proxy"]["cpu_ns"] / 1e3 / report["frames"], kit=kit_share(report))
            return
    figures.note("discarded: not all events came in time")


def _latency(bench: Bench, contender: Contender, figures: Figures) -> None:
    """Measure one request at a time; the report takes off what direct takes."""
    report = bench.run(bench.job(contender, "small", mode="closed", concurrency=1))
    took = report["latency_us"]
    figures.add(took["p50"], p99=took["p99"], first=report["first_us"])


def _slow(bench: Bench, contender: Contender, figures: Figures) -> None:
    """Measure what an open stream that says little costs in memory, and what is left when they are gone."""
    count = bench.size.streams
    with bench.fresh(contender) as server:
        pid = server.pids[0]
        job = bench.job(contender, "slow", server=server, mode="slow", concurrency=count, expect=ANY)
        before, held, kept = memory_kb(pid), [], []
        for _ in range(2):
            load = bench.load(job)
            try:
                if load.read(patience=90)["held"] != count:
                    load.say("close")
                    raise Broken(f"{contender.name} does not hold {count} streams: {load.read()['samples']}")
                pause(0.5)
                held.append(memory_kb(pid))
                load.say("close")
                report = checked(load.read())
                if report["ended_early"]:
                    raise Broken(f"{contender.name} ended {report['ended_early']} streams by itself")
            finally:
                load.stop()
            wait_until(
                lambda: bench.mock.statistics()["playing"] == 0,
                f"{contender.name} to leave streams whose callers left",
            )
            pause(0.3)
            kept.append(memory_kb(pid))
    figures.add(
        (held[0] - before) / count, base=before, kept_once=kept[0] - before, kept_twice=kept[1] - before
    )


ANY: JsonObject = {"frames": 0, "marker": "x", "count": 0, "ending": "", "bytes": 0}
_STALLED = 20


def _stalled(bench: Bench, contender: Contender, figures: Figures) -> None:
    """Measure what is held for callers who do not read a large answer, which then must arrive whole."""
    with bench.fresh(contender) as server:
        pid = server.pids[0]
        job = bench.job(contender, "huge", server=server, mode="stalled", concurrency=_STALLED)
        before = memory_kb(pid)
        load = bench.load(job)
        try:
            if load.read(patience=90)["held"] != _STALLED:
                raise Broken(f"{contender.name} does not begin {_STALLED} large answers")
            sent = [-1]

            def is_stuck() -> bool:
                pause(0.25)
                last, sent[0] = sent[0], bench.mock.statistics()["sent_bytes"]
                return last == sent[0]

            wait_until(is_stuck, "the stream to come to a stop", patience=60)
            held = memory_kb(pid) - before
            load.say("drain")
            checked(load.read(patience=120))
        finally:
            load.stop()
    figures.add(held / 1024 / _STALLED)


LIMITS_MS = (5, 10, 50)


def _frontier(bench: Bench, contender: Contender, figures: Figures) -> None:
    """Measure how many requests a second are answered with a p99 below some limits, at rising concurrency."""
    best = {f"p{limit}": 0.0 for limit in LIMITS_MS}
    for level in bench.size.levels:
        seconds = min(1.0, bench.size.seconds)
        report = bench.run(bench.job(contender, "small", mode="closed", concurrency=level, seconds=seconds))
        rate, p99 = report["requests"] / report["seconds"], report["latency_us"]["p99"] / 1000
        for limit in LIMITS_MS:
            if p99 < limit:
                best[f"p{limit}"] = max(best[f"p{limit}"], rate)
        if p99 > LIMITS_MS[-1]:
            break
    figures.add(max(best.values()), **best)


def _often(size: Size) -> int:
    return size.rounds


def _some(size: Size) -> int:
    return min(3, size.rounds)


def _once(_size: Size) -> int:
    return 1


ROWS: Mapping[str, Row] = {
    "small": Row(_closed("small", 32), _often),
    "burst": Row(_closed("burst", 16), _often, ("burst",)),
    "paced": Row(_paced, lambda size: size.paced_rounds, ("paced",)),
    "body98k": Row(_closed("small", 8, size=98_000), _some),
    "body2m": Row(_closed("small", 4, size=2_000_000), _some),
    "latency": Row(_latency, _some),
    "slow": Row(_slow, _once, ("small", "slow"), of_processes=True),
    "stalled": Row(_stalled, _once, ("small", "huge"), of_processes=True),
    "frontier": Row(_frontier, _once),
}

IN_QUICK = ("small", "burst", "paced", "body98k", "latency", "slow")


def write_scripts(folder: Path, size: Size, rows: Sequence[str]) -> JsonObject:
    """Write what the mock plays for *rows*, and return its part of the plan."""
    made: JsonObject = {}
    known = scripts(size)
    for name in sorted({name for row in rows for name in ROWS[row].scripts}):
        script = known[name]
        file = folder / f"{name}.sse"
        file.write_bytes(script.render())
        made[name] = script.plan(str(file))
    return made


def start_servers(
    stack: ExitStack, place: Place, contenders: Sequence[Contender]
) -> tuple[dict[str, Server], dict[str, str]]:
    """Start what *contenders* need; return what is up, and why something that is here is not."""
    servers: dict[str, Server] = {}
    failures: dict[str, str] = {}
    for name in dict.fromkeys(one.server for one in contenders):
        try:
            server = STARTERS[name](place)
        except Broken as exc:
            failures[name] = str(exc)
        else:
            if server is not None:
                servers[name] = server
                stack.callback(server.stop)
    return servers, failures
