"""What tests of real command lines share: npm, a look at what they send, and no way to anywhere else."""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest


def installed(config: pytest.Config, package: str, version: str) -> Path:
    """Return the folder of modules with *package* in it, installed once for as long as pytest's cache lives."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"there is no npm to install {package} with")
    assert config.cache is not None
    cache = config.cache.mkdir(package.strip("@").replace("/", "-"))
    folder = cache / version
    if not folder.exists():
        # Renamed when it is whole: an install that was broken off is none.
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            made = Path(fresh) / "made"
            options = ("--prefix", str(made), "--no-audit", "--no-fund")
            asyncio.run(_run(npm, "install", *options, f"{package}@{version}"))
            with contextlib.suppress(OSError):
                made.rename(folder)
    return folder / "node_modules"


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()


@dataclass(slots=True)
class Head:
    """The head of a request as the CLI sent it, and what came with it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = field(default=b"", repr=False)


class Tap:
    """Stands between the CLI and the proxy, passes everything on and notes the requests."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._server: asyncio.Server | None = None
        self.heads: list[Head] = []

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def sent(self, method: str, path: str) -> list[Head]:
        return [h for h in self.heads if h.method == method and h.path.partition("?")[0].endswith(path)]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_proxy, to_proxy = await asyncio.open_connection(*self._to)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(_pass(from_proxy, writer), self._requests(reader, to_proxy))
        for end in (writer, to_proxy):
            end.close()

    async def _requests(self, reader: asyncio.StreamReader, to_proxy: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").rstrip().split("\r\n")
                method, path, _ = first.split(" ")
                headers = {
                    name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
                }
                noted = Head(method, path, headers)
                self.heads.append(noted)
                if headers.get("upgrade") == "websocket":
                    # What follows are frames, if the proxy agrees; a CLI that it refuses opens another connection.
                    to_proxy.write(head)
                    await _pass(reader, to_proxy)
                    return
                noted.body = await reader.readexactly(int(headers.get("content-length", "0")))
                to_proxy.write(head + noted.body)
                await to_proxy.drain()
        # The CLI has left, and the proxy has to hear it.
        to_proxy.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def kill(process: asyncio.subprocess.Process) -> None:
    """End the CLI without a chance to say goodbye."""
    os.killpg(process.pid, signal.SIGKILL)
    await process.communicate()


@contextlib.asynccontextmanager
async def no_way_out() -> AsyncIterator[dict[str, str]]:
    """Yield the environment that sends every call to another host to a listener; fail if one came."""
    asked: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    proxy = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    names = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
    try:
        yield {
            **{name: proxy for upper in names for name in (upper, upper.lower())},
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        }
    finally:
        server.close()
    assert asked == []
