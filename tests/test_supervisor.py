"""What systemd tells us and is told, with a parent process that does what systemd does."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import sys
import threading
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from codex_proxy.errors import ProxyError
from codex_proxy.simulator import Simulator
from codex_proxy.supervisor import Supervisor, for_successor, take_sockets
from tests.daemon.test_hand_over import TURN, Service, ask
from tests.process import Running, client, until, write_config


class Listening:
    """The socket that systemd would listen on for what a service says."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)
        self.fileno = self._socket.fileno()
        self.said: list[str] = []

    def hear(self) -> list[str]:
        """Return every line that was said so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.said += self._socket.recv(4096).decode().split("\n")
        return self.said

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
async def systemd(tmp_path: Path) -> AsyncIterator[Listening]:
    listening = Listening(str(tmp_path / "notify"))
    # Always: the queue has room for ten.
    asyncio.get_running_loop().add_reader(listening.fileno, listening.hear)
    yield listening
    asyncio.get_running_loop().remove_reader(listening.fileno)
    listening.close()


# Does what systemd does between fork and exec: puts the sockets where they belong, and names the process.
_EXEC = """
import os, sys
first, *command = sys.argv[1:]
numbers = [int(number) for number in first.split(",") if number]
for place, number in enumerate(numbers, 3):
    os.dup2(number, place + 100)
for place in range(3, 3 + len(numbers)):
    os.dup2(place + 100, place, inheritable=True)
    os.close(place + 100)
if numbers:
    os.environ["LISTEN_FDS"] = str(len(numbers))
    os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["SYSTEMD_EXEC_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *command])
"""


@contextlib.asynccontextmanager
async def activated(
    file: Path, sockets: list[socket.socket], systemd: Listening, **environ: str
) -> AsyncIterator[Service]:
    """Start the daemon as systemd would, with *sockets*; all that took over from it is gone afterwards."""
    numbers = [sock.fileno() for sock in sockets]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _EXEC, ",".join(map(str, numbers)), "-m", "codex_proxy", "-config", str(file),
        stdin=DEVNULL, stdout=PIPE, stderr=PIPE, pass_fds=numbers,
        env={**os.environ, "NOTIFY_SOCKET": systemd.address, **environ},
    )  # fmt: skip
    daemon = Running(process)
    service = Service(file.parent, daemon, file)
    try:
        daemon.url = (await daemon.logged(r"listening url=(http://\S+)"))[1]
        yield service
    finally:
        service.end()
        await daemon.kill()
        assert process.stdout is not None
        await process.stdout.read()


async def test_activated_with_two_sockets_and_restarted_under_its_eyes(
    tmp_path: Path, systemd: Listening
) -> None:
    async with Simulator(2) as sim:
        sim.write_auth_files(tmp_path / "auths")
        # What it says of a port is only for showing: nobody listens there.
        file = write_config(tmp_path, sim, listen="127.0.0.1:1")
        four, six = socket.create_server(("127.0.0.1", 0)), None
        with contextlib.suppress(OSError):
            six = socket.create_server(("::1", 0), family=socket.AF_INET6)
        sockets = [four, *([six] if six is not None else [])]
        urls = [f"http://127.0.0.1:{four.getsockname()[1]}"]
        if six is not None:
            urls.append(f"http://[::1]:{six.getsockname()[1]}")
        environ = {"WATCHDOG_USEC": "400000"}
        async with activated(file, sockets, systemd, **environ) as service:
            daemon = service.first
            # Only the daemon has them now, as only systemd and the service would.
            for sock in sockets:
                sock.close()
            assert daemon.url == urls[0]
            await until(lambda: "READY=1" in systemd.hear())
            assert f"STATUS=serving at {urls[0]}" in systemd.said
            await until(lambda: systemd.hear().count("WATCHDOG=1") >= 2)

            good = file.read_text(encoding="utf-8")
            file.write_text(good + "max-body-bytes: 1KiB\n", encoding="utf-8")
            daemon.send(signal.SIGHUP)
            await until(lambda: systemd.hear().count("READY=1") == 2)
            await daemon.logged("configuration read again changed=max-body-bytes")
            at = next(line for line in systemd.said if line.startswith("MONOTONIC_USEC="))
            assert 0 <= time.monotonic() - int(at.partition("=")[2]) / 1e6 < 20
            assert systemd.said[systemd.said.index(at) - 1] == "RELOADING=1"
            async with client(urls[0]) as session:
                async with session.post("/v1/responses", json={**TURN, "input": "x" * 2000}) as answer:
                    assert answer.status == 413
                file.write_text("max-body-bytes: much\n", encoding="utf-8")
                daemon.send(signal.SIGHUP)
                await daemon.logged("configuration is broken, the old settings stay")
                assert await ask(session, stream=False) == ""
            file.write_text(good, encoding="utf-8")

            for _ in range(2):
                outcome = await service.restart()
                assert outcome["success"], outcome
                await until(lambda: f"MAINPID={service.pids[-1]}" in systemd.hear())
                for url in urls:
                    async with client(url) as session:
                        assert await ask(session, stream=True) == ""
            heard = len(systemd.hear())
            await until(lambda: "WATCHDOG=1" in systemd.hear()[heard:])
            assert "STOPPING=1" not in systemd.said
            os.kill(service.pids[-1], signal.SIGTERM)
            assert await daemon.ended() == 0
            assert "STOPPING=1" in systemd.hear()
            assert "setting needs a restart" not in daemon.log


async def test_who_may_ask_without_a_key_depends_on_the_sockets(tmp_path: Path, systemd: Listening) -> None:
    """The file says loopback, the unit says everybody: a key is needed. A path is served as well."""
    file = write_config(tmp_path, listen="127.0.0.1:1")
    path = str(tmp_path / "in")
    with (
        socket.socket(socket.AF_UNIX) as named,
        socket.create_server(("0.0.0.0", 0)) as everybody,
        socket.create_server(("127.0.0.1", 0)) as here,
    ):
        named.bind(path)
        named.listen()
        async with activated(file, [named, here, everybody], systemd) as service:
            async with (
                client(f"http://127.0.0.1:{here.getsockname()[1]}") as session,
                session.post("/v1/responses", json=TURN) as answer,
            ):
                assert answer.status == 401
            assert (tmp_path / "data" / "client-key").exists()
            async with (
                aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(path)) as session,
                session.get("/livez") as answer,
            ):
                assert answer.status == 200
            assert await service.first.stop() == 0
    assert stat.S_ISSOCK(os.stat(path).st_mode), "it is the supervisor's"


# -- the small parts ----------------------------------------------------------------------


def test_sockets_of_another_process_are_not_ours() -> None:
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "OTHER": "y"}
    assert take_sockets(environ) == []
    assert environ == {"OTHER": "y"}


@pytest.mark.parametrize("count", ["", "0", "-1", "x", "1000000"])
def test_a_number_of_sockets_that_makes_no_sense_is_none(count: str) -> None:
    assert take_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}) == []


@pytest.mark.parametrize("what", ["file", "datagram", "connected"])
def test_what_is_handed_over_and_takes_no_connections_is_a_sentence(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        if what == "file":
            number = stack.enter_context(open(tmp_path / "x", "wb")).fileno()
        elif what == "datagram":
            number = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).fileno()
        else:
            number = stack.enter_context(socket.socket()).fileno()
        monkeypatch.setattr("codex_proxy.supervisor._FIRST", number)
        with pytest.raises(ProxyError, match="was handed over and"):
            take_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
        # It is not closed under whoever has it.
        os.fstat(number)


def test_nobody_listens_and_nothing_happens() -> None:
    supervisor = Supervisor({})
    assert not supervisor.is_there
    assert supervisor.sign_of_life_seconds == 0
    supervisor.ready("x")


async def test_the_process_that_has_taken_over_is_given_all_the_time_until_its_next_sign() -> None:
    """Half of it may be over since the last sign of the one before, and its own counted for nothing until now."""
    address = f"@codex-proxy-test-life-{os.getpid()}"
    listening = Listening(address)
    try:
        Supervisor({"NOTIFY_SOCKET": address}).succeeded_by(7, "up")
        assert listening.hear() == ["MAINPID=7", "READY=1", "WATCHDOG=1", "STATUS=up"]
    finally:
        listening.close()


async def test_an_abstract_name_and_lines_that_would_break_in_two() -> None:
    address = f"@codex-proxy-test-{os.getpid()}"
    listening = Listening(address)
    try:
        Supervisor({"NOTIFY_SOCKET": address}).ready("up\nREADY=0")
        assert listening.hear() == ["READY=1", "STATUS=up READY=0"]
    finally:
        listening.close()


async def test_a_full_queue_is_waited_for_but_not_with_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listening = Listening(str(tmp_path / "notify"))
    try:
        monkeypatch.setattr("codex_proxy.supervisor._PATIENCE_SECONDS", 0.1)
        supervisor = Supervisor({"NOTIFY_SOCKET": listening.address})
        for _ in range(600):
            await supervisor.alive()
        assert caplog.records == []
        supervisor.succeeded_by(7, "x")
        assert "supervisor not told what=MAINPID=7" in caplog.text
        room = threading.Timer(0.02, listening.hear)
        room.start()
        supervisor.succeeded_by(8, "x")
        room.join()
        assert "MAINPID=8" in listening.hear()
    finally:
        listening.close()


def test_a_supervisor_that_has_gone_costs_nothing(tmp_path: Path) -> None:
    supervisor = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    supervisor.stopping("x")


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_how_often_a_sign_of_life_is_wanted(environ: dict[str, str], seconds: float) -> None:
    assert Supervisor({"NOTIFY_SOCKET": "/x", **environ}).sign_of_life_seconds == seconds
    assert Supervisor(environ).sign_of_life_seconds == 0


def test_what_is_meant_for_this_process_alone_is_not_passed_on() -> None:
    environ = {
        "LISTEN_PID": "1",
        "LISTEN_FDS": "1",
        "WATCHDOG_PID": "1",
        "WATCHDOG_USEC": "5",
        "PATH": "/bin",
    }
    assert for_successor(environ) == {"WATCHDOG_USEC": "5", "PATH": "/bin"}
