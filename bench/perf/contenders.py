"""What is measured beside each other: each a process on the proxy's core, in front of the same mock backend."""

import asyncio
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.perf.fixtures import PATHS, ask, request
from bench.perf.processes import ROOT, Broken, Cores, Process, build, wait_until
from codex_proxy.clock import SystemClock
from codex_proxy.ledger.changes import create_key
from codex_proxy.ledger.keys import digest_of
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import NO_LIMITS
from codex_proxy.simulator import Simulator
from codex_proxy.storage.lock import StoreLock

KEY = "sk-bench-0123456789abcdef"
"""What callers show; it opens nothing but the daemon under test."""


@dataclass(slots=True)
class Place:
    """Where contenders run and whom they face."""

    folder: Path
    cores: Cores
    backend_port: int
    simulator: Simulator
    """Never started: it makes account files and the pages that tell of them."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Lines for the daemon's configuration."""
    against: Path | None = None
    """Another checkout, measured beside this one."""
    is_profiled: bool = False
    """Whether Python's own contenders run under its profiler, which makes them several times slower."""
    profiles: dict[str, Path] = field(default_factory=dict)
    """Where the profiles will be, by the name of the server."""

    @property
    def backend(self) -> str:
        return f"http://127.0.0.1:{self.backend_port}/backend-api/codex"

    def own_folder(self, name: str) -> Path:
        """Return a new folder for a process of that name."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def python(self, name: str, *arguments: str) -> list[str]:
        """Return the command for a module of Python."""
        if not self.is_profiled:
            return [sys.executable, "-m", *arguments]
        self.profiles[name] = self.own_folder(name) / "profile"
        return [sys.executable, "-m", "cProfile", "-o", str(self.profiles[name]), "-m", *arguments]


@dataclass(slots=True)
class Server:
    """A proxy that is up; without a process it is the mock itself."""

    name: str
    port: int
    process: Process | None

    @property
    def pids(self) -> list[int]:
        return [self.process.pid] if self.process is not None else []

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.stop()


@dataclass(slots=True, frozen=True)
class Contender:
    """A server asked in one dialect: a line of the table."""

    name: str
    title: str
    server: str
    dialect: str
    path: str = ""
    """Where it is asked, when not where its dialect is."""

    def request(self, script: str, *, size: int = 0) -> bytes:
        """Return a whole request for *script*."""
        headers = {"Authorization": f"Bearer {KEY}"}
        return request(self.path or PATHS[self.dialect], ask(self.dialect, script, size=size), headers)


CONTENDERS = (
    Contender("direct", "direct, no proxy", "direct", "backend"),
    Contender("nginx", "nginx, forwards bytes", "nginx", "backend"),
    Contender("go", "Go stand-in, chat", "go", "chat"),
    Contender("forward", "codex-proxy forward, forwards bytes", "forward", "backend", "/v1/responses"),
    Contender("bare-chat", "bare, chat", "bare", "chat"),
    Contender("ours-responses", "codex-proxy, responses", "ours", "responses"),
    Contender("ours-chat", "codex-proxy, chat", "ours", "chat"),
    Contender("ours-messages", "codex-proxy, messages", "ours", "messages"),
)
ASKED_FOR = (
    Contender("personal-responses", "with a ledger (personal), responses", "personal", "responses"),
    Contender("billing-responses", "with a ledger (billing), responses", "billing", "responses"),
)
"""Measured only when they are named: what a ledger adds."""
AGAINST = tuple(
    Contender(f"other-{dialect}", f"other checkout, {dialect}", "other", dialect)
    for dialect in ("responses", "chat", "messages")
)


# --- how each is started


def _direct(place: Place) -> Server:
    return Server("direct", place.backend_port, None)


_NGINX = """
daemon off;
master_process off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  keepalive_timeout 300s;
  client_max_body_size 64m;
  client_body_buffer_size 4m;
  tcp_nodelay on;
  upstream backend {{
    server 127.0.0.1:{backend};
    keepalive 2048;
    keepalive_requests 100000000;
    keepalive_timeout 300s;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""


def _nginx(place: Place) -> Server | None:
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        return None
    folder = place.own_folder("nginx")
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, backend=place.backend_port, port=port), encoding="utf-8")
    process = Process(
        "nginx",
        [binary, "-p", str(folder), "-c", str(config), "-e", str(folder / "start.log")],
        cores=place.cores.proxy,
        log=folder / "log",
    )
    return _when_listening(Server("nginx", port, process))


def _go(place: Place) -> Server | None:
    binary = build("standin")
    if binary is None:
        return None
    return _that_tells_its_port(place, "go", [str(binary), "-backend", f"{place.backend}/responses"])


def _bare(place: Place) -> Server:
    return _that_tells_its_port(place, "bare", place.python("bare", "bench.perf.bare", place.backend))


def _that_tells_its_port(place: Place, name: str, command: list[str]) -> Server:
    log = place.own_folder(name) / "log"
    process = Process(name, command, cores=place.cores.proxy, log=log, cwd=ROOT)
    try:
        return Server(name, int(process.read_line()), process)
    except BaseException:
        process.stop()
        raise


def _forward(place: Place) -> Server:
    """Start the forwarder as anybody does, with its log into a file."""
    command = [
        "codex_proxy",
        "forward",
        "--upstream",
        f"http://127.0.0.1:{place.backend_port}",
        "--port",
        "0",
    ]
    process = Process(
        "forward",
        place.python("forward", *command),
        cores=place.cores.proxy,
        log=place.own_folder("forward") / "log",
        cwd=ROOT,
    )
    return _when_it_says_where("forward", process)


def _ours(place: Place) -> Server:
    return _daemon(place, "ours", ROOT, place.settings)


def _with_ledger(mode: str) -> Callable[[Place], Server | None]:
    def start(place: Place) -> Server:
        return _daemon(place, mode, ROOT, {**place.settings, "ledger": mode}, _open_account)

    return start


def _open_account(data: Path) -> None:
    """Have whoever shows `KEY` be somebody with money."""
    data.mkdir(mode=0o700)
    asyncio.run(_opened(data))


async def _opened(data: Path) -> None:
    ledger = Ledger(data, mode="billing", clock=SystemClock(), lock=StoreLock(data))
    await ledger.start()
    user = await ledger.create_user("bench", is_billed=True, actor="bench")
    await ledger.credit(user.id, 10**18, reason="bench", idempotency_key="bench", actor="bench")
    await ledger.write(
        lambda connection: create_key(
            connection, id="key_bench", user_id=user.id, name="bench", digest=digest_of(KEY), hint="sk-...",
            limits=NO_LIMITS, expires=None, actor="bench", at=1,
        )
    )  # fmt: skip
    await ledger.aclose()


def _other(place: Place) -> Server | None:
    # It may not know a setting of today.
    return None if place.against is None else _daemon(place, "other", place.against, {})


def _daemon(
    place: Place,
    name: str,
    checkout: Path,
    more: Mapping[str, str],
    prepare: Callable[[Path], None] | None = None,
) -> Server:
    """Start the whole daemon: accounts from files, a key, and the log as it is by default, into a file.

    With *prepare*, what it does to the data-dir makes the key a good one.
    """
    folder = place.own_folder(name)
    place.simulator.write_auth_files(folder / "auths")
    settings = {
        "listen": "127.0.0.1:0", "auth-dir": str(folder / "auths"), "data-dir": str(folder / "data"),
        "base-url": place.backend, "oauth-issuer": f"http://127.0.0.1:{place.backend_port}",
        "api-keys": f"[{KEY if prepare is None else 'sk-of-nobody-here'}]", **more,
    }  # fmt: skip
    if prepare is not None:
        prepare(folder / "data")
    config = folder / "config.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()), encoding="utf-8")
    process = Process(
        name,
        place.python(name, "codex_proxy", "-config", str(config)),
        cores=place.cores.proxy,
        log=folder / "log",
        cwd=checkout,
    )
    return _when_it_says_where(name, process)


def _when_it_says_where(name: str, process: Process) -> Server:
    found: list[re.Match[str]] = []

    def has_said_where() -> bool:
        if not process.is_running:
            raise Broken(f"{name} ended: {process.said()}")
        # Only the beginning: the log grows by a line for each request.
        with process.log.open(encoding="utf-8", errors="replace") as log:
            match = re.search(r"listening url=http://\S+:(\d+)", log.read(65536))
        found.extend([match] if match else [])
        return bool(found)

    try:
        wait_until(has_said_where, f"{name} to listen")
    except BaseException:
        process.stop()
        raise
    return Server(name, int(found[0][1]), process)


STARTERS: Mapping[str, Callable[[Place], Server | None]] = {
    "direct": _direct,
    "nginx": _nginx,
    "go": _go,
    "bare": _bare,
    "forward": _forward,
    "ours": _ours,
    "personal": _with_ledger("personal"),
    "billing": _with_ledger("billing"),
    "other": _other,
}
"""By the name of the server; None where what it needs is not installed."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _when_listening(server: Server) -> Server:
    process = server.process
    assert process is not None

    def answers() -> bool:
        if not process.is_running:
            raise Broken(f"{server.name} ended: {process.said()}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", server.port)) == 0

    try:
        wait_until(answers, f"{server.name} to listen")
    except BaseException:
        process.stop()
        raise
    return server
