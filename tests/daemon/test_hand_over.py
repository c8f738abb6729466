"""A restart of the running process: nobody is refused, nothing is cut, and what cannot come up changes nothing."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy import config as configuration
from codex_proxy import daemon as daemon_module
from codex_proxy import handover
from codex_proxy.accounts import files
from codex_proxy.commands.control import daemon as control_of
from codex_proxy.config import Settings
from codex_proxy.daemon import Daemon
from codex_proxy.errors import ProxyError
from codex_proxy.protocol.sse import Parser
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.simulator import Script, Simulator
from tests.process import Running, client, running, until, write_config

MODEL = "gpt-5.5"
TURN = {"model": MODEL, "input": "hi"}


class Service:
    """A daemon, whichever process it is by now."""

    def __init__(self, folder: Path, first: Running, file: Path) -> None:
        self.folder = folder
        self.first = first
        self.file = file
        self.pids: list[int] = []
        """The processes that took over."""

    @property
    def url(self) -> str:
        return self.first.url

    async def restart(self) -> JsonObject:
        """Ask for a restart, as the command does."""
        async with control_of(Settings(data_dir=self.folder / "data")) as running:
            outcome = await running.restart()
        if outcome["success"]:
            self.pids.append(outcome["pid"])
        return outcome

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send every process that took over a signal."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.asynccontextmanager
async def serving(folder: Path, sim: Simulator, **settings: object) -> AsyncIterator[Service]:
    """Start a daemon in front of *sim*; all that took over from it is gone afterwards."""
    if not (folder / "auths").exists():
        sim.write_auth_files(folder / "auths")
    file = write_config(folder, sim, **settings)
    async with running(file) as first:
        service = Service(folder, first, file)
        try:
            yield service
        finally:
            service.end()
    # They had its stdout as well, and nothing must be left of it.
    stdout = first._process.stdout
    assert stdout is not None
    assert await stdout.read() == b""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def ask(session: aiohttp.ClientSession, *, stream: bool) -> str:
    """Ask once, and say what was wrong with the answer; nothing when it was whole."""
    async with session.post("/v1/responses", json={**TURN, "stream": stream}) as answer:
        body = await answer.read()
    if answer.status != 200:
        return f"status {answer.status}: {body[:200]!r}"
    if stream:
        parser = Parser()
        events = parser.feed(body) + parser.finish()
        return "" if events[-1].type == "response.completed" else f"ended with {events[-1].type}"
    return "" if json.loads(body)["status"] == "completed" else "not completed"


class Load:
    """Callers who ask without a pause, some of them on a connection of their own each time."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self._url = url
        self._headers = headers
        self._is_over = False
        self.answered = 0
        self.wrong: list[str] = []

    async def one(self, *, keeps: bool, stream: bool) -> None:
        connector = aiohttp.TCPConnector(force_close=not keeps)
        async with aiohttp.ClientSession(self._url, connector=connector, headers=self._headers) as session:
            while not self._is_over:
                try:
                    wrong = await ask(session, stream=stream)
                except (aiohttp.ClientError, OSError) as exc:
                    wrong = f"{type(exc).__name__}: {exc}"
                self.answered += 1
                await asyncio.sleep(0.01)
                if wrong:
                    self.wrong.append(wrong)

    @contextlib.asynccontextmanager
    async def running(self, callers: int) -> AsyncIterator["Load"]:
        async with asyncio.TaskGroup() as group:
            for number in range(callers):
                group.create_task(self.one(keeps=number % 2 == 0, stream=number % 4 < 2))
            try:
                yield self
            finally:
                self._is_over = True


@pytest.mark.parametrize(
    ("restarts", "callers"), [(1, 4), pytest.param(8, 32, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
async def test_under_load_nothing_is_refused_and_no_stream_is_cut(
    restarts: int, callers: int, tmp_path: Path
) -> None:
    """With short turns all the time, a long stream over every restart, and an idle WebSocket."""
    async with Simulator(3) as sim, serving(tmp_path, sim, drain_timeout=120) as service:
        sim.script(Script.long_text(60 * restarts, "word ", delay=0.05))
        async with (
            client(service.url) as session,
            session.post("/v1/responses", json={**TURN, "stream": True}) as long,
            session.ws_connect("/v1/responses") as ws,
            Load(service.url).running(callers) as load,
        ):
            held: list[float] = []
            for _ in range(restarts):
                before = load.answered
                await until(lambda: load.answered > before + 2 * callers, 20)  # noqa: B023
                outcome = await service.restart()
                assert outcome["success"], outcome
                held.append(outcome["held_seconds"])
            goodbye = await ws.receive(5)
            assert (goodbye.type, goodbye.data) == (aiohttp.WSMsgType.CLOSE, 1012)
            parser = Parser()
            events = parser.feed(await long.read())
        assert load.wrong == []
        assert events[-1].type == "response.completed"
        # Hundredths of a second where nothing else runs.
        assert max(held) < 3.0, held
        assert len(set(service.pids)) == restarts
        # The first process ends when its stream has, those between have nothing left.
        service.end(signal.SIGTERM)
        assert await service.first.ended() == 0
        assert "Traceback" not in service.first.log


async def test_what_is_known_goes_over_and_another_address_is_opened_in_time(tmp_path: Path) -> None:
    """Also what the old process learns while it drains: the first turn after the restart is still its own."""
    async with Simulator(2) as sim, serving(tmp_path, sim, records="on") as service:
        homes = {}
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        async with client(service.url) as session:

            async def say(talk: str) -> str | None:
                async with session.post("/v1/responses", json={**TURN, "prompt_cache_key": talk}) as answer:
                    assert answer.status == 200
                return sim.turns[-1].account

            for talk in ("a", "b", "c"):
                homes[talk] = await say(talk)
            text = service.file.read_text(encoding="utf-8")
            service.file.write_text(text.replace("127.0.0.1:0", f"127.0.0.1:{port}"), encoding="utf-8")
            outcome = await service.restart()
            assert outcome["success"], outcome
            # On a connection that the old process has still, which it closes with this answer.
            homes["d"] = await say("d")
        await until(lambda: "process before this one has ended" in service.first.log)
        with pytest.raises(aiohttp.ClientConnectorError):
            async with client(service.url) as session:
                await ask(session, stream=False)
        async with client(f"http://127.0.0.1:{port}") as session:
            for talk, home in homes.items():
                assert await say(talk) == home
            async with session.get("/stats") as answer:
                accounts = (await answer.json())["accounts"]
            assert sum(account["total_requests"] for account in accounts) == 8
            assert sum(account["usage"]["total_completions"] for account in accounts) == 8
            # One of them was written down by a process that might not write any more.
            recorded: list[str] = []
            async with asyncio.timeout(15):
                while len(recorded) < 8:
                    async with session.get("/requests") as answer:
                        recorded = [one["id"] for one in (await answer.json())["requests"]]
                    await asyncio.sleep(0.1)
            assert len(set(recorded)) == 8
        assert not list((tmp_path / "data").glob("*.spool*"))


async def test_a_stream_over_two_restarts_is_counted_and_recorded(tmp_path: Path) -> None:
    """Who has nothing left to do stays to pass on what the process before it has to tell."""
    async with Simulator(1) as sim, serving(tmp_path, sim, records="on", drain_timeout=60) as service:
        sim.script(Script.long_text(100, "word ", delay=0.05))
        async with (
            client(service.url) as session,
            session.post("/v1/responses", json={**TURN, "stream": True}) as long,
        ):
            assert await long.content.readany()
            for _ in range(2):
                assert (await service.restart())["success"]
            # Longer than an idle connection may still have a request on its way.
            await long.read()
            request_id = long.headers["x-request-id"]
        async with client(service.url) as session, asyncio.timeout(15):
            while True:
                async with session.get("/stats") as answer:
                    (account,) = (await answer.json())["accounts"]
                async with session.get("/requests") as answer:
                    recorded = [one["id"] for one in (await answer.json())["requests"]]
                if account["usage"]["total_completions"] and recorded:
                    break
                await asyncio.sleep(0.1)
        assert (account["total_requests"], account["usage"]["total_completions"]) == (1, 1)
        assert recorded == [request_id]


async def test_a_new_process_that_cannot_start_changes_nothing_and_of_two_commands_one_counts(
    tmp_path: Path,
) -> None:
    async with Simulator(1) as sim, serving(tmp_path, sim) as service, client(service.url) as session:
        good = service.file.read_text(encoding="utf-8")
        service.file.write_text(good + "max-retry: many\n", encoding="utf-8")
        outcome = await service.restart()
        assert not outcome["success"]
        assert "exit code 2" in outcome["message"]
        assert any("max-retry" in line for line in outcome["log"]), outcome
        assert await ask(session, stream=True) == ""
        service.file.write_text(good, encoding="utf-8")
        outcomes = await asyncio.gather(service.restart(), service.restart(), return_exceptions=True)
        (refused,) = (outcome for outcome in outcomes if isinstance(outcome, ProxyError))
        assert "under way" in refused.message
        assert len(service.pids) == 1
        assert await ask(session, stream=True) == ""


async def test_the_old_process_killed_while_it_drains_takes_only_its_own_streams(tmp_path: Path) -> None:
    async with Simulator(2) as sim, serving(tmp_path, sim) as service, client(service.url) as session:
        for account in sim.accounts:
            account.set("stall", where="middle")
        async with session.post("/v1/responses", json={**TURN, "stream": True}) as long:
            await long.content.readany()
            assert (await service.restart())["success"]
            for account in sim.accounts:
                account.set("ok")
            service.first.send(signal.SIGKILL)
            with pytest.raises(aiohttp.ClientError):
                await long.read()
        await until(lambda: "process before this one has ended" in service.first.log)
        async with client(service.url) as other:
            assert await ask(other, stream=True) == ""
        assert (tmp_path / "data" / "control.sock").is_socket()


async def test_an_exchange_under_way_is_neither_lost_nor_made_twice(tmp_path: Path) -> None:
    async with Simulator(1) as sim:
        (account,) = sim.accounts
        account.issue(expires_in=-10)
        account.set("ok", refresh="slow", refresh_seconds=1.5)
        async with serving(tmp_path, sim) as service, client(service.url) as session:
            await until(lambda: bool(sim.exchanges))
            asking = asyncio.get_running_loop().create_task(ask(session, stream=True))
            assert (await service.restart())["success"]
            assert await asking == ""
            async with client(service.url) as other:
                assert await ask(other, stream=True) == ""
            assert [exchange.status for exchange in sim.exchanges] == [200]
            assert not account.tokens.login.revoked
            (path,) = (tmp_path / "auths").glob("*.json")
            saved = json.loads(path.read_text(encoding="utf-8"))
            assert saved["refresh_token"] == account.tokens.refresh


@pytest.mark.long
async def test_a_signal_to_end_calls_a_restart_off(tmp_path: Path) -> None:
    async with Simulator(1) as sim, serving(tmp_path, sim) as service:
        asking = asyncio.get_running_loop().create_task(service.restart())
        await asyncio.sleep(0.3)
        service.first.send(signal.SIGTERM)
        with contextlib.suppress(ProxyError):
            outcome = await asking
            assert not outcome["success"] or is_alive(outcome["pid"])
        if not service.pids:
            assert await service.first.ended() == 0
            assert not (tmp_path / "data" / "control.sock").exists()


async def test_one_that_is_called_off_while_it_starts_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would find the channel closed, and take the sockets for its own."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: Any, **kwargs: Any) -> "subprocess.Popen[bytes]":
        started.append(popen(*args, **kwargs))
        return started[-1]

    popen: Any = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        estate = handover.Estate("127.0.0.1:0", False, str(tmp_path), [listening], None)
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        starting = asyncio.get_running_loop().create_task(
            handover.Successor.start(command, os.environ, estate)
        )
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    await until(lambda: bool(started))
    try:
        await until(lambda: started[0].poll() is not None, 2)
    finally:
        started[0].kill()
        started[0].wait()


async def test_the_old_process_killed_before_it_has_handed_over_is_no_end(tmp_path: Path) -> None:
    """The new one has the sockets, and nobody else does."""
    async with Simulator(1) as sim:
        sim.write_auth_files(tmp_path / "auths")
        file = write_config(tmp_path, sim)
        listening = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        estate = handover.Estate("127.0.0.1:0", False, str(tmp_path / "data"), [listening], None)
        command = [sys.executable, "-m", "codex_proxy", "-config", str(file)]
        successor = await handover.Successor.start(command, os.environ, estate)
        listening.close()
        async with client(url) as session:
            asking = asyncio.get_running_loop().create_task(ask(session, stream=True))
            await successor.wait_for("prepared", 30)
            assert not asking.done()
            # All that a kill closes: the channel, and the pipe that the log goes through.
            assert successor._writer is not None
            successor._writer.close()
            asyncio.get_running_loop().remove_reader(successor._log)
            os.close(successor._log)
            assert await asking == ""
            assert await ask(session, stream=False) == ""
        os.kill(successor.pid, signal.SIGTERM)
        assert await asyncio.to_thread(successor._process.wait, 20) == 0


async def test_a_new_process_that_is_told_to_end_does_not_take_over_first(tmp_path: Path) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    estate = handover.Estate("127.0.0.1:0", False, str(tmp_path / "data"), [listening], None)
    command = [sys.executable, "-m", "codex_proxy", "-config", str(write_config(tmp_path))]
    successor = await handover.Successor.start(command, os.environ, estate)
    try:
        await successor.wait_for("prepared", 30)
        os.kill(successor.pid, signal.SIGTERM)
        await asyncio.sleep(0.05)
        successor.go()
        with pytest.raises(handover.NotRestarted, match="ended with exit code 1") as refused:
            await successor.wait_for("ready", 30)
        assert "told to end before it served" in refused.value.lines[-1]
    finally:
        await successor.kill()
        listening.close()


# -- what odd new processes do to the old one ---------------------------------------------


@contextlib.asynccontextmanager
async def with_odd(folder: Path, what: str) -> AsyncIterator[tuple[Simulator, Daemon]]:
    """Start a daemon in this process whose successor does something odd."""
    async with Simulator(1) as sim:
        sim.write_auth_files(folder / "auths")
        file = write_config(folder, sim)
        loaded = configuration.load(file, {})
        command = [sys.executable, "-m", "tests.daemon.odd_successor", what]
        daemon = Daemon(loaded, environ=dict(os.environ), command=command)
        await daemon.start()
        try:
            yield sim, daemon
        finally:
            await daemon.stop()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("ends early", "ended with exit code 3"),
        ("hangs early", "did not get prepared within"),
        ("hangs late", "did not get to serve within"),
        ("is killed late", "ended with signal SIGKILL"),
        ("fails late", "ended with exit code 1"),
    ],
)
async def test_a_new_process_that_comes_to_nothing_leaves_everything_as_it_was(
    what: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "hangs" in what:
        monkeypatch.setattr(handover, f"{'PREPARE' if what == 'hangs early' else 'TAKE'}_SECONDS", 0.7)
    async with with_odd(tmp_path, what) as (_, daemon), Load(daemon.url).running(2) as load:
        await until(lambda: load.answered > 3)
        jobs = dict(daemon._jobs)
        outcome = await daemon.restart()
        assert not outcome["success"]
        assert words in outcome["message"]
        if what != "hangs early":
            assert "odd: began" in outcome["log"]
        if what == "fails late":
            assert outcome["log"][-1] == "ValueError: fails late"
        before = load.answered
        await until(lambda: load.answered > before + 5)
        assert load.wrong == []
        assert daemon.memory.may_write
        assert daemon._jobs.keys() == jobs.keys()
        assert not any(task.done() for _, task in daemon._jobs.values())
        # And it can be tried again.
        again = await daemon.restart()
        assert words in again["message"]


async def test_a_turn_that_ends_while_it_is_written_down_what_is_known_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has it no more, and only what came since the file is told."""
    real = files.write_atomic
    async with with_odd(tmp_path, "hangs late") as (_, daemon):
        account = next(iter(daemon.pool))
        account.total_requests = 5
        ended: list[str] = []

        def write(path: Path, data: bytes, **more: Any) -> bool:
            done = real(path, data, **more)
            if path.name == "state.json":
                account.total_requests += 1
                account.usage.input_tokens += 70
                daemon.pool.affinity.bind("late", account.key, daemon.clock.now())
                ended.append(path.name)
            return done

        monkeypatch.setattr(files, "write_atomic", write)
        await daemon._give_up()
        assert ended == ["state.json"]
        assert daemon._afterwards is not None
        news = daemon._afterwards.news()
        assert news is not None
        assert news["totals"] == {account.key: [1, 0, 0, 70, 0, 0, 0, 0]}
        assert [session for session, *_ in news["conversations"]] == ["late"]
        assert daemon._afterwards.news() is None
        await daemon._take_back()


async def test_whatever_cannot_be_taken_back_newcomers_are_taken_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_odd(tmp_path, "fails late") as (_, daemon):

        async def fail() -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(daemon.records, "take_back", fail)
        with pytest.raises(OSError, match="No space"):
            await daemon.restart()
        async with client(daemon.url) as session, asyncio.timeout(10):
            assert await ask(session, stream=False) == ""
        assert not any(task.done() for _, task in daemon._jobs.values())


async def test_a_command_that_is_not_there_any_more_is_named(tmp_path: Path) -> None:
    async with with_odd(tmp_path, "hangs late") as (_, daemon):
        daemon._command[:] = [str(tmp_path / "python"), "-m", "codex_proxy"]
        outcome = await daemon.restart()
        assert not outcome["success"]
        assert outcome["message"] == (
            f"the new process cannot be started: No such file or directory: {tmp_path / 'python'}"
        )
        async with client(daemon.url) as session:
            assert await ask(session, stream=False) == ""


async def test_tokens_that_no_disk_has_are_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_odd(tmp_path, "hangs late") as (_, daemon):

        async def only_here() -> list[str]:
            return ["work"]

        monkeypatch.setattr(daemon.keeper, "only_here", only_here)
        outcome = await daemon.restart()
        assert not outcome["success"]
        assert outcome["message"].startswith("new tokens of work could not be written")
        assert daemon.memory.may_write


async def test_a_daemon_inside_another_program_is_not_restarted(tmp_path: Path) -> None:
    loaded = configuration.load(write_config(tmp_path), {})
    daemon = Daemon(loaded)
    await daemon.start()
    try:
        outcome = await daemon.restart()
        assert (outcome["success"], outcome["log"]) == (False, [])
        assert "inside another program" in outcome["message"]
        assert daemon._jobs.keys() >= daemon_module._WHILE_DRAINING, "a job was given another name"
    finally:
        await daemon.stop()


# -- where it cannot work -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "pid", "parent", "parent_pid", "words"),
    [
        ({}, 1, "", 0, "recreate the container"),
        ({}, 7, "", 0, "recreate the container"),
        ({}, 7, "tini", 1, "recreate the container"),
        ({}, 7, "sh", 1, "recreate the container"),
        ({}, 70, "supervisord", 12, "supervisord's own means"),
        ({"SYSTEMD_EXEC_PID": "70"}, 70, "systemd", 1, "Type=notify"),
        ({"SYSTEMD_EXEC_PID": "70", "NOTIFY_SOCKET": "/run/x"}, 70, "systemd", 1, None),
        # Inherited from a terminal that systemd runs.
        ({"SYSTEMD_EXEC_PID": "60"}, 70, "bash", 65, None),
        ({}, 70, "systemd", 1, None),
        ({}, 70, "bash", 65, None),
    ],
)
def test_where_it_cannot_work_it_says_what_to_do(
    environ: dict[str, str], pid: int, parent: str, parent_pid: int, words: str | None
) -> None:
    said = handover.obstacle(environ, pid=pid, parent=parent, parent_pid=parent_pid)
    if words is None:
        assert said is None
    else:
        assert said is not None
        assert words in said


async def test_process_1_says_what_to_do_instead(tmp_path: Path) -> None:
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with contextlib.suppress(OSError):
        probe = await asyncio.create_subprocess_exec(*command, "true", stderr=DEVNULL)
        if await probe.wait() == 0:
            process = await asyncio.create_subprocess_exec(
                *command, sys.executable, "-m", "codex_proxy", "-config", str(write_config(tmp_path)),
                stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE,
            )  # fmt: skip
            daemon = Running(process)
            try:
                await daemon.logged("listening url=")
                async with control_of(Settings(data_dir=tmp_path / "data")) as running:
                    outcome = await running.restart()
                assert not outcome["success"]
                assert "recreate the container" in outcome["message"]
            finally:
                await daemon.kill()
            return
    pytest.skip("no process namespace can be made here")


def test_the_command_line_is_our_own() -> None:
    command = handover.own_command()
    assert os.path.isabs(command[0])
    assert command[1:] == sys.orig_argv[1:]


@pytest.mark.parametrize("value", ["", "{}", "[]", '{"channel":99999}', "nonsense"])
def test_a_variable_that_somebody_else_set_is_a_sentence(value: str) -> None:
    with pytest.raises(ProxyError, match="own use"):
        handover.predecessor({handover.VARIABLE: value})
