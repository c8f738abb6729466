"""The kit of `make bench`: what it plays and asks, what it refuses to count, and how it ends what it started."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.perf import cli, fixtures, processes, rows
from bench.perf.contenders import CONTENDERS, Contender, Place, Server
from bench.perf.fixtures import HOLE, PATHS, ask, expectation, read_answer
from bench.perf.processes import Broken, Cores, Kit, Load, Mock, Process, fetch, running, wait_until
from bench.perf.report import judge, ratio, render
from bench.perf.rows import FULL, QUICK, Bench, Figures, scripts
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import CHAT
from codex_proxy.protocol.dialect import Dialect, Surroundings
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.responses import RESPONSES
from codex_proxy.protocol.sse import Parser
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.simulator import Simulator

DIALECTS: dict[str, Dialect] = {"responses": RESPONSES, "chat": CHAT, "messages": MESSAGES}
SLOW_KIT = Kit((sys.executable, "-m", "bench.perf.fallback"), is_slow=True)
ANYWHERE = Cores(frozenset(), frozenset(), frozenset())


# --- what is played


@pytest.mark.parametrize(("name", "events"), [("small", 13), ("burst", 208)])
def test_a_script_has_the_events_that_the_table_names(name: str, events: int) -> None:
    script = scripts(QUICK)[name]
    raw = script.render()
    assert raw.count(b"\n\n") == script.events == events
    assert script.plan("x")["lead"] == events


def test_a_delta_looks_as_the_backend_writes_it() -> None:
    frame = scripts(QUICK)["small"].render().split(b"\n\n")[4].decode()
    line, data = frame.split("\n")
    assert line == "event: response.output_text.delta"
    delta = json.loads(data.removeprefix("data: "))
    assert list(delta) == [
        "type", "content_index", "delta", "item_id", "logprobs", "obfuscation", "output_index", "sequence_number",
    ]  # fmt: skip
    assert (len(delta["delta"]) + len(delta["obfuscation"])) % 16 == 0
    assert '", "' not in data


def test_a_paced_script_is_longer_than_what_is_measured_of_it() -> None:
    for size in (QUICK, FULL):
        script = scripts(size)["paced"]
        assert len(script.deltas) * script.pace > size.warmup + size.paced_seconds + 1.0
        plan = script.plan("x")
        assert plan["lead"] + plan["tail"] < script.events


def test_a_stalled_reader_is_offered_more_than_kernels_swallow() -> None:
    assert len(scripts(QUICK)["huge"].render()) > 15_000_000


# --- what is asked, and what comes back


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("size", [0, 98_000])
def test_a_request_is_one_that_the_proxy_translates_and_the_mock_recognises(dialect: str, size: int) -> None:
    raw = ask(dialect, "small", size=size)
    assert not size or abs(len(raw) - size) < 0.03 * size
    assert HOLE.encode() in raw
    body = DIALECTS[dialect].decode(raw, {}, catalog=Catalog()).request.body
    assert b"bench:small." in body
    assert HOLE.encode() in body
    assert len(body) > 0.8 * size


@pytest.mark.parametrize("dialect", DIALECTS)
def test_our_own_answers_are_recognised_and_cut_ones_are_not(dialect: str) -> None:
    script = scripts(QUICK)["small"]
    decoded = DIALECTS[dialect].decode(ask(dialect, "small"), {}, catalog=Catalog())
    encoder = decoded.make_encoder(Surroundings(now=lambda: 1.0))
    raw = encoder.encode(Parser().feed(script.render()))
    assert read_answer(dialect, raw) == script.text
    assert expectation(dialect, raw)["count"] == 5
    frames = raw.split(b"\n\n")
    for cut in (b"", b"\n\n".join(frames[:-2]) + b"\n\n", b"\n\n".join(frames[:3]) + b"\n\n"):
        with pytest.raises(ValueError, match="an answer that"):
            read_answer(dialect, cut)


def test_an_answer_that_ends_without_a_delta_is_not_to_be_expected() -> None:
    with pytest.raises(ValueError, match="nobody would recognise"):
        expectation("chat", b"data: [DONE]\n\n")


# --- the mock and the load generator, in Python: what needs no compiler is what can be tested everywhere


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, ANYWHERE, 0, Simulator(1))


@contextlib.contextmanager
def playing(place: Place, *rows_: str) -> Iterator[Mock]:
    """Have the mock, with the scripts of some rows."""
    answers = cli.answers_of(place.simulator.accounts[0])
    plan = {"merged": False, **answers, "scripts": rows.write_scripts(place.folder, QUICK, rows_)}
    mock = Mock(SLOW_KIT, ANYWHERE, place.folder, plan)
    with running(mock.process):
        place.backend_port = mock.port
        yield mock


DIRECT = CONTENDERS[0]


def bench_of(place: Place, mock: Mock) -> Bench:
    server = Server("direct", mock.port, None)
    return Bench(SLOW_KIT, place, mock, {"direct": server}, [DIRECT], QUICK, lambda _text: None)


def test_the_mock_answers_what_it_is_asked_for_and_refuses_the_rest(place: Place) -> None:
    with playing(place, "small") as mock:
        script = scripts(QUICK)["small"]
        first, second = (fetch(mock.port, DIRECT.request("small")) for _ in range(2))
        assert read_answer("backend", first) == script.text
        assert first != second
        assert HOLE.encode() not in first
        models = json.loads(
            fetch(mock.port, b"GET /backend-api/codex/models?client_version=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        )
        assert models["models"]
        for wrong in (
            DIRECT.request("burst"),
            fixtures.request(PATHS["chat"], ask("chat", "small"), {}),
            b"GET /elsewhere HTTP/1.1\r\nHost: x\r\n\r\n",
        ):
            with pytest.raises(Broken, match="404"):
                fetch(mock.port, wrong)
        statistics = mock.statistics()
        assert (statistics["completed"], statistics["refused"], statistics["playing"]) == (2, 3, 0)


def test_a_run_counts_every_answer_and_reads_the_clocks(place: Place) -> None:
    with playing(place, "small") as mock:
        bench = bench_of(place, mock)
        job = bench.job(DIRECT, "small", mode="closed", concurrency=4, seconds=0.1, warmup=0.0, at_least=10)
        report = bench.run({**job, "watch": {"proxy": [mock.process.pid], "mock": []}})
        assert report["requests"] >= 10
        assert report["connects"] == 4
        assert report["usage"]["proxy"]["cpu_ns"] > 0
        assert 0 < report["latency_us"]["p50"] <= report["latency_us"]["p99"]


@pytest.mark.parametrize(
    "wrong", [{"frames": 12}, {"count": 6}, {"ending": "data: [DONE]\n\n"}, {"bytes": 10}], ids=str
)
def test_a_run_with_an_answer_that_is_not_as_expected_does_not_count(place: Place, wrong: JsonObject) -> None:
    with playing(place, "small") as mock:
        bench = bench_of(place, mock)
        expect = {**bench.expect(DIRECT, "small"), **wrong}
        job = bench.job(
            DIRECT, "small", expect=expect, mode="closed", concurrency=1, seconds=0.05, warmup=0.0
        )
        with pytest.raises(Broken, match="bad answers"):
            bench.run(job)


def test_a_script_whose_answer_lacks_its_end_is_noticed_at_the_first_look(place: Place) -> None:
    with playing(place, "small") as mock:
        pass
    whole = scripts(QUICK)["small"].render()
    (place.folder / "small.sse").write_bytes(whole[: whole.rindex(b"event: response.completed")])
    plan = json.loads((place.folder / "plan.json").read_text(encoding="utf-8"))
    mock = Mock(SLOW_KIT, ANYWHERE, place.folder, plan)
    with running(mock.process), pytest.raises(Broken, match="answers small badly"):
        bench_of(place, mock).expect(DIRECT, "small")


def test_slow_streams_are_held_until_they_are_left_and_the_mock_sees_them_go(place: Place) -> None:
    with playing(place, "slow") as mock:
        bench = bench_of(place, mock)
        load = bench.load(bench.job(DIRECT, "slow", mode="slow", concurrency=5, expect=rows.ANY))
        try:
            assert load.read() == {"held": 5}
            assert mock.statistics()["playing"] == 5
            load.say("close")
            assert load.read()["ended_early"] == 0
        finally:
            load.stop()
        wait_until(lambda: mock.statistics()["playing"] == 0, "the mock to see them go")
        assert mock.statistics()["aborted"] == 5


def test_a_stalled_reader_stops_the_stream_and_gets_all_of_it_later(place: Place) -> None:
    with playing(place, "stalled") as mock:
        bench = bench_of(place, mock)
        whole = len(scripts(QUICK)["huge"].render())
        load = bench.load(bench.job(DIRECT, "huge", mode="stalled", concurrency=1))
        try:
            assert load.read() == {"held": 1}
            assert mock.statistics()["playing"] == 1
            load.say("drain")
            report = load.read()
        finally:
            load.stop()
        assert (report["errors"], report["requests"]) == (0, 1)
        assert report["body_bytes"] > whole // 2


# --- what does not count


def report(busy: float, requests: int = 100, errors: int = 0) -> JsonObject:
    used = {"cpu_ns": round(busy * 1e9), "wait_ns": 0}
    return {
        "requests": requests, "errors": errors, "samples": ["short"], "seconds": 1.0, "frames": 100,
        "latency_us": {"p50": 1.0, "p99": 2.0}, "own": {"cpu_ns": 10, "wait_ns": 0},
        "usage": {"proxy": used, "mock": {"cpu_ns": 10, "wait_ns": 0}},
    }  # fmt: skip


class Scripted(Bench):
    """A bench whose runs were made up."""

    def __init__(self, reports: list[JsonObject], contenders: list[Contender]) -> None:
        self.reports = reports
        self.contenders = contenders
        self.table = {}
        self.size = QUICK
        self.say = lambda _text: None

    def run(self, job: JsonObject) -> JsonObject:
        return rows.checked(self.reports.pop(0))


NGINX, GO = CONTENDERS[1], CONTENDERS[2]


def test_a_run_in_which_the_generator_was_the_limit_is_tried_again_and_then_discarded() -> None:
    figures = Figures()
    assert Scripted([report(0.5), report(0.9)], []).busy_run(NGINX, figures, {}) == report(0.9)
    assert not figures.notes
    assert Scripted([report(0.5)] * 3, []).busy_run(NGINX, figures, {}) is None
    assert "generator-limited, discarded" in figures.notes[0]


def test_waiting_for_the_core_counts_as_busy() -> None:
    crowded = report(0.4)
    crowded["usage"]["proxy"]["wait_ns"] = 500_000_000
    assert rows.busy(crowded) == pytest.approx(0.9)


def test_one_that_errs_loses_its_row_and_the_others_go_on() -> None:
    asked: list[str] = []

    def measure(bench: Bench, contender: Contender, figures: Figures) -> None:
        asked.append(contender.name)
        if contender is NGINX and len(asked) > 2:
            raise Broken("a short answer")
        figures.add(1.0)

    bench = Scripted([], [NGINX, GO])
    rows.Row(measure, lambda _size: 3).run(bench, "small")
    assert asked == ["nginx", "go", "go", "nginx", "go"]
    assert bench.table["small"]["nginx"].value is None
    assert bench.table["small"]["go"].rounds == [1.0, 1.0, 1.0]
    assert cli.failures_of(bench.table) == ["nginx in small: a short answer"]


def test_the_order_of_contenders_alternates() -> None:
    names = [one.name for one in Scripted([], [NGINX, GO]).alternating(3)]
    assert names == ["nginx", "go", "go", "nginx", "nginx", "go"]


# --- the report


def figures_of(*rounds: float, **extra: list[float]) -> Figures:
    return Figures(list(rounds), dict(extra))


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    # A machine that was three times slower in the second round says nothing about the two.
    assert ratio(figures_of(10, 30, 11), figures_of(20, 60, 20)) == pytest.approx(0.5)
    assert ratio(figures_of(10), figures_of()) is None
    assert ratio(figures_of(10), figures_of(-1)) is None
    assert ratio(figures_of(10, 20), figures_of(30)) == pytest.approx(0.5)


def test_a_stand_in_that_costs_too_much_makes_the_run_void() -> None:
    assert judge({"small": {"nginx": figures_of(20), "go": figures_of(139)}}) == []
    assert "DOES NOT COUNT" in judge({"small": {"nginx": figures_of(20), "go": figures_of(141)}})[0]


def table() -> rows.Table:
    return {
        "small": {"direct": figures_of(0), "nginx": figures_of(20), "go": figures_of(120), "ours-chat": figures_of(60)},
        "latency": {
            "direct": figures_of(100, p99=[200.0], first=[50.0]),
            "nginx": figures_of(150, p99=[260.0], first=[50.0]),
            "ours-chat": figures_of(180, p99=[320.0], first=[50.0]),
        },
        "frontier": {"ours-chat": figures_of(900, p5=[800.0], p10=[900.0], p50=[900.0])},
    }  # fmt: skip


def test_the_report_has_figures_ratios_and_what_is_added_to_direct() -> None:
    text = render(table(), CONTENDERS, FULL)
    lines = [line.split() for line in text.splitlines() if line.startswith("codex-proxy, chat")]
    assert lines[0][-3:] == ["60.0", "80.0", "120"]
    assert lines[1][-3:] == ["0.50", "-", "-"]
    assert lines[2][-3:] == ["3.00", "1.60", "2.00"]
    assert lines[3][-3:] == ["180", "320", "50.0"]
    assert lines[4][-3:] == ["800", "900", "900"]


def test_goals_are_judged_where_they_were_measured() -> None:
    lines = [line for line in render(table(), CONTENDERS, FULL).splitlines() if "reached" in line]
    assert lines == [
        "reached: small 0.50 x go (at most 1.2)",
        "reached: added p50 1.60 x nginx (at most 1.6)",
    ]
    slow = {"slow": {"ours-chat": figures_of(41)}}
    assert "not reached: slow stream 41.0 KB (at most 40)\n" in render(slow, CONTENDERS, FULL)


def test_markdown_is_the_same_as_tables() -> None:
    text = render(table(), CONTENDERS, FULL, markdown=True)
    assert "| codex-proxy, chat | 60.0 | 80.0 | 120 |\n" in text
    assert "|---|--:|--:|--:|\n" in text


def test_what_was_discarded_is_said() -> None:
    made = table()
    made["small"]["nginx"].note("generator-limited, discarded")
    made["small"]["go"].fail("it lies")
    text = render(made, CONTENDERS, FULL)
    assert "small, nginx: generator-limited, discarded\n" in text
    assert "small, go: FAILED" in text


# --- arguments


def test_rows_and_contenders_can_be_chosen() -> None:
    args = cli.parser().parse_args(["--only", "small,paced", "--contenders", "go,ours", "--rounds", "2"])
    chosen, contenders, size = cli.choose(args)
    assert chosen == ["small", "paced"]
    assert [one.name for one in contenders] == ["go", "ours-responses", "ours-chat", "ours-messages"]
    assert (size.rounds, size.paced_rounds) == (2, 2)


@pytest.mark.parametrize(
    "arguments", [["--only", "smal"], ["--contenders", "apache"], ["--contenders", "other"]], ids=str
)
def test_a_name_that_is_none_is_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 1
    assert "no such" in capsys.readouterr().err


# --- processes


def test_cores_are_shared_only_where_they_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*found: int) -> tuple[set[int], set[int], set[int]]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(found))
        cores = Cores.choose()
        return set(cores.proxy), set(cores.mock), set(cores.load)

    assert choose(3) == (set(), set(), set())
    assert choose(0, 1) == ({1}, {0}, {0})
    assert choose(2, 4, 5, 7) == ({7}, {2}, {5})


def test_a_process_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    process = Process("thing", command, cores=frozenset(), log=tmp_path / "log")
    with running(process), pytest.raises(Broken, match="thing ended: no such thing"):
        process.read_line()


def test_a_process_that_will_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE);"
        "print(child.pid, flush=True); signal.pause()"
    )
    process = Process("stubborn", [sys.executable, "-c", code], cores=frozenset(), log=tmp_path / "log")
    process.patience = 0.1
    child = int(process.read_line())
    processes.stop_all()
    assert not process.is_running
    wait_until(
        lambda: (
            not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()
        ),
        "the child to be gone",
    )


def test_settings_of_the_environment_do_not_reach_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CODEX_PROXY_LISTEN", "GOMAXPROCS", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "9")
    code = "import os; print([n for n in ('CODEX_PROXY_LISTEN', 'GOMAXPROCS', 'HTTPS_PROXY') if n in os.environ])"
    with running(
        Process("env", [sys.executable, "-c", code], cores=frozenset(), log=tmp_path / "log")
    ) as process:
        assert process.read_line() == "[]"


# --- all of it


def test_a_whole_run_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(rows, "BUSY", 0.0)
    file = tmp_path / "figures.json"
    arguments = [
        "--quick",
        "--only",
        "small,latency",
        "--contenders",
        "direct,go,bare,ours-chat",
        "--rounds",
        "1",
    ]
    code = cli.main([*arguments, "--json", str(file)])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "GO IS NOT INSTALLED" in err
    assert "go is not installed here" in err
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert figures["small"]["ours-chat"]["rounds"][0] > 0
    assert figures["latency"]["bare-chat"]["extra"]["p99"][0] > 0
    assert "codex-proxy, chat" in out
    assert not processes._ALL


def test_loads_are_ended_when_they_say_nothing(place: Place) -> None:
    with playing(place, "slow") as mock:
        bench = bench_of(place, mock)
        load: Load = bench.load(bench.job(DIRECT, "slow", mode="slow", concurrency=1, expect=rows.ANY))
        load.read()
        with pytest.raises(Broken, match="said nothing in time"):
            load.read(patience=0.05)
        load.stop()
