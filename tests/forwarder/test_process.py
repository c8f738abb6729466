"""The forwarder as a process of its own."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from tests.forwarder.desk import End, far_server
from tests.process import Running, run

on_asyncio = pytest.mark.asyncio(loop_factories=["asyncio"])

GET = b"GET /v1/models HTTP/1.1\r\nHost: near\r\n\r\n"


@contextlib.asynccontextmanager
async def started(*arguments: str, **environ: str) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "codex_proxy", "forward", *arguments,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environ},
    )  # fmt: skip
    forwarder = Running(process)
    try:
        forwarder.url = (await forwarder.logged(r"listening url=(http://\S+)"))[1].replace(
            "0.0.0.0", "127.0.0.1"
        )
        yield forwarder
    finally:
        await forwarder.kill()


async def call(forwarder: Running, data: bytes) -> End:
    reader, writer = await asyncio.open_connection("127.0.0.1", forwarder.port)
    writer.write(data)
    return End(reader, writer)


@on_asyncio
async def test_it_is_told_by_the_environment_and_ends_in_order() -> None:
    async with far_server() as far:
        environ = {"UPSTREAM_SERVER_A": f"http://127.0.0.1:{far.port}", "PORT": "0", "DEBUG_LOG": "1"}
        async with started(**environ, UPSTREAM_TIMEOUT_SEC="30") as forwarder:
            caller = await call(forwarder, GET)
            end = await far.take()
            await end.head()
            end.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
            await caller.until(b"x\r\n")
            forwarder.send(signal.SIGTERM)
            await forwarder.logged("waiting for what is in work requests=1")
            end.write(b"0\r\n\r\n")
            assert await caller.rest() == b"0\r\n\r\n"
            caller.close()
            assert await forwarder.ended() == 0
            assert "forwarded method=GET path=/v1/models uid=- " in forwarder.log
            assert "WARNING" not in forwarder.log


@on_asyncio
async def test_a_second_signal_does_not_wait() -> None:
    async with far_server() as far:
        flags = ["--upstream", f"http://127.0.0.1:{far.port}", "--port", "0", "--host", "0.0.0.0"]
        async with started(*flags) as forwarder:
            await forwarder.logged("everybody who reaches this port can ask")
            caller = await call(forwarder, GET)
            end = await far.take()
            await end.head()
            forwarder.send(signal.SIGTERM)
            await forwarder.logged("waiting")
            forwarder.send(signal.SIGTERM)
            assert await forwarder.ended() == 0
            assert await end.is_over()
            with contextlib.suppress(ConnectionError):
                assert await caller.rest() == b""
            caller.close()


@on_asyncio
async def test_what_is_wrong_is_told_as_usage() -> None:
    code, _, err = await run("forward", "--port", "0")
    assert (code, err.startswith("codex-proxy: there is no upstream")) == (2, True)
    async with far_server() as far:
        code, _, err = await run("forward", "--upstream", "http://far.test", "--port", str(far.port))
        assert (code, "cannot listen on 127.0.0.1" in err) == (1, True)


def test_it_needs_neither_accounts_nor_dialects() -> None:
    code = (
        "import sys, codex_proxy.commands.forward;"
        "print(*sorted(m for m in sys.modules if m.startswith(('codex_proxy.', 'sqlalchemy'))))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    ).stdout.split()
    rooms = {name.split(".")[1] for name in loaded}
    assert not rooms & {
        "accounts",
        "server",
        "upstream",
        "storage",
        "records",
        "ledger",
        "daemon",
        "simulator",
    }
    assert [name for name in loaded if name.startswith("codex_proxy.protocol.")] == [
        "codex_proxy.protocol.wire"
    ]
    assert "sqlalchemy" not in loaded
