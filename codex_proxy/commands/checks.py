"""What `codex-proxy doctor` looks at: one function for each thing, each told apart by what one would do about it.

No check changes anything that lasts, none costs quota, and tokens go to the configured backend alone.
"""

import asyncio
import contextlib
import errno
import functools
import importlib.util
import math
import os
import platform
import resource
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from codex_proxy import __version__
from codex_proxy.accounts import files, store
from codex_proxy.accounts.account import Account
from codex_proxy.accounts.credential import Credential
from codex_proxy.accounts.tokens import mask_name
from codex_proxy.commands.control import NoDaemon, daemon
from codex_proxy.commands.terminal import span
from codex_proxy.config import CONTROL_SOCKET, Live, Loaded, Settings, mask_url
from codex_proxy.errors import ProxyError
from codex_proxy.net import NetError, NetKind, Outbound, Reply
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.tasks import Slots

T = TypeVar("T")

Level = Literal["ok", "warning", "problem"]

DEADLINE_SECONDS = 15.0
"""How long one check may take."""

_CALL_SECONDS = 10.0

# Below the first a log or a database soon ends the disk; below the second nothing more is written.
_LITTLE_BYTES = 1024 * 1024 * 1024
_TOO_LITTLE_BYTES = 64 * 1024 * 1024

_FEW_INODES = 100

# Two for each stream, and some for files.
_FEW_FILES = 4_096

# Tokens say when they end; a clock this far off refreshes too late, or all the time.
_SKEW_SECONDS = 30.0
_MUCH_SKEW_SECONDS = 300.0

# The path of a Unix socket has no more room.
_MAX_SOCKET_PATH = 107

# Each question takes a moment of the backend's time, and a pool may have thousands.
_MAX_ASKED = 50
_ASKED_AT_A_TIME = 5


@dataclass(slots=True, frozen=True)
class Finding:
    """What a check found."""

    check: str
    level: Level
    text: str
    advice: str = ""
    """What to do; empty when there is nothing."""


@dataclass(slots=True)
class Patient:
    """What is looked at, and what one check learned that another needs."""

    loaded: Loaded
    outbound: Outbound
    is_offline: bool = False
    now: Callable[[], float] = time.time
    accounts: JsonObject | None = None
    """What the running daemon says of its accounts; None when none runs."""
    dates: list[float] = field(default_factory=list)
    """By how much this machine's clock is ahead of those who answered."""
    credentials: Sequence[Credential] = ()

    @property
    def settings(self) -> Settings:
        return self.loaded.settings


Check = Callable[[Patient], AsyncIterator[Finding]]


async def look(patient: Patient) -> AsyncIterator[Finding]:
    """Make all checks, one after the other, and tell of each finding when it is known."""
    for name, check, needs_network in CHECKS:
        if needs_network and patient.is_offline:
            continue
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                async for finding in check(patient):
                    yield finding
        except TimeoutError:
            yield Finding(name, "problem", f"no result within {DEADLINE_SECONDS:g} s", "see why it hangs")
        except (ProxyError, OSError) as exc:
            words = exc.message if isinstance(exc, ProxyError) else files.why(exc)
            yield Finding(name, "problem", words)


async def _aside(work: Callable[[], T]) -> T:
    """Do what blocks in a thread that nobody waits for once it hangs: a folder may be a mount that is gone."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None only beside an error, or as what it is

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as exc:
            error = exc
        # The loop may have ended meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, daemon=True).start()
    return await done


# -- this machine -------------------------------------------------------------------------


async def _version(patient: Patient) -> AsyncIterator[Finding]:
    text = f"codex-proxy {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.platform != "win32" and importlib.util.find_spec("uvloop") is None:
        yield Finding(
            "version", "warning", f"{text}, without uvloop",
            "install uvloop: events reach callers sooner with it",
        )  # fmt: skip
    else:
        yield Finding("version", "ok", text)


async def _config(patient: Patient) -> AsyncIterator[Finding]:
    path = patient.loaded.path
    yield Finding("config", "ok", f"{path}: valid" if path is not None else "no file, the defaults count")
    for warning in patient.loaded.warnings:
        yield Finding("config", "warning", warning, "see docs/configuration.md")
    holds = {"api-keys", "admin-key", "proxy-url"} & patient.loaded.origins.keys()
    if path is None or not holds:
        return
    mode = stat.S_IMODE((await _aside(path.stat)).st_mode)
    if mode & 0o077:
        yield Finding(
            "config",
            "warning",
            f"{path} holds secrets ({', '.join(sorted(holds))}) and others may read it (mode {mode:03o})",
            f"chmod 600 {path}, or name a file with {min(holds)}-file",
        )


async def _folders(patient: Patient) -> AsyncIterator[Finding]:
    settings = patient.settings
    for key, folder in (("auth-dir", settings.auth_dir), ("data-dir", settings.data_dir)):
        try:
            yield await _aside(functools.partial(_folder, key, folder))
        except OSError as exc:
            yield _out_of_sight("folders", key, folder, exc)
    path = str(settings.data_dir / CONTROL_SOCKET)
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        yield Finding(
            "folders", "problem", f"data-dir: the path of the control socket is longer than {_MAX_SOCKET_PATH} bytes,"
            " so commands cannot reach the daemon", "give data-dir a shorter path",
        )  # fmt: skip


def _out_of_sight(check: str, key: str, folder: Path, exc: OSError) -> Finding:
    return Finding(
        check, "problem", f"{key} {folder}: cannot be looked at: {files.why(exc)}",
        f"run this as the user that runs the daemon, or set {key} to another folder",
    )  # fmt: skip


def _folder(key: str, folder: Path) -> Finding:
    if not folder.exists():
        if folder.is_symlink():
            return Finding(
                "folders", "problem", f"{key} {folder}: leads to a folder that is not there",
                "make that folder, or mount what it lies on",
            )  # fmt: skip
        above = next((parent for parent in folder.absolute().parents if parent.exists()), Path("/"))
        if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
            return Finding("folders", "ok", f"{key} {folder}: not there yet, made at the first start")
        return Finding(
            "folders", "problem", f"{key} {folder}: not there, and {above} takes no new folder",
            f"mkdir -p {folder}, as the user that runs the daemon",
        )  # fmt: skip
    if not folder.is_dir():
        return Finding("folders", "problem", f"{key} {folder}: no folder", f"set {key} to a folder")
    try:
        files.probe(folder)
    except OSError as exc:
        return Finding(
            "folders", "problem", f"{key} {folder}: nothing can be written there: {files.why(exc)}",
            "make it writable for the user that runs the daemon: new tokens are saved there",
        )  # fmt: skip
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    # Account files are for their owner only whoever may list them; data-dir is nobody else's business at all.
    what, forbidden = ("put files there", 0o022) if key == "auth-dir" else ("look into it", 0o077)
    if mode & forbidden:
        return Finding(
            "folders",
            "warning",
            f"{key} {folder}: others may {what} (mode {mode:03o})",
            f"chmod 700 {folder}",
        )
    if status.st_uid != os.geteuid():
        return Finding(
            "folders", "warning", f"{key} {folder}: belongs to user {status.st_uid}, and you are {os.geteuid()}",
            "run this as the user that runs the daemon",
        )  # fmt: skip
    return Finding("folders", "ok", f"{key} {folder}: writable")


async def _disk(patient: Patient) -> AsyncIterator[Finding]:
    for finding in await _aside(functools.partial(_disks, patient.settings)):
        yield finding


def _disks(settings: Settings) -> list[Finding]:
    found: list[Finding] = []
    seen: set[int] = set()
    for key, folder in (("data-dir", settings.data_dir), ("auth-dir", settings.auth_dir)):
        # What may not be looked at is not there, for this.
        there = next(
            place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place)
        )
        device = there.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(there).free
        text = f"{key}: {_size(free)} free"
        if free < _TOO_LITTLE_BYTES:
            advice = "make room: tokens that cannot be saved are lost with the daemon"
            found.append(Finding("disk", "problem", text, advice))
        elif free < _LITTLE_BYTES:
            found.append(Finding("disk", "warning", text, "make room, or lower what is kept of requests"))
        else:
            found.append(Finding("disk", "ok", text))
        status = os.statvfs(there)
        if status.f_files and status.f_favail < _FEW_INODES:
            found.append(
                Finding("disk", "problem", f"{key}: hardly any more files fit (inodes)", "remove some")
            )
    return found


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


async def _limits(patient: Patient) -> AsyncIterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = math.inf if hard == resource.RLIM_INFINITY else hard
    if most < _FEW_FILES:
        yield Finding(
            "limits", "warning", f"{hard} open files at most: about {int(most) // 2} streams at a time",
            "raise it: LimitNOFILE in a unit, ulimits in compose, ulimit -Hn in a shell",
        )  # fmt: skip
    else:
        said = "any number of" if most == math.inf else f"{hard}"
        yield Finding("limits", "ok", f"{said} open files (the daemon raises its own limit from {soft})")


# -- the daemon ---------------------------------------------------------------------------


async def _daemon(patient: Patient) -> AsyncIterator[Finding]:
    try:
        async with daemon(patient.settings) as running:
            told = await running.get("/stats?page_size=1")
            patient.accounts = await running.accounts()
    except NoDaemon:
        yield Finding("daemon", "ok", "none runs with this configuration")
        return
    version = told.get("version", "unknown")
    if version != __version__:
        yield Finding(
            "daemon", "warning", f"version {version} runs, and {__version__} is installed",
            "codex-proxy restart takes the new version up without dropping a stream",
        )  # fmt: skip
    else:
        yield Finding("daemon", "ok", f"version {version} runs")


async def _port(patient: Patient) -> AsyncIterator[Finding]:
    settings = patient.settings
    if settings.listen_port == 0:
        yield Finding("port", "ok", f"listen {settings.listen}: any free port")
        return
    try:
        trouble = await _aside(functools.partial(_bind, settings.listen_host, settings.listen_port))
    except socket.gaierror as exc:
        yield Finding(
            "port", "problem", f"listen {settings.listen}: no such host: {exc.strerror}", "correct listen"
        )
        return
    if trouble is None:
        if patient.accounts is not None:
            yield Finding(
                "port", "warning", f"listen {settings.listen}: free, so the daemon that runs listens elsewhere",
                "if listen was edited, codex-proxy restart takes it up",
            )  # fmt: skip
        else:
            yield Finding("port", "ok", f"listen {settings.listen}: free")
    elif trouble.errno == errno.EADDRINUSE:
        if patient.accounts is not None:
            yield Finding("port", "ok", f"listen {settings.listen}: taken by the daemon that runs")
        else:
            yield Finding(
                "port", "problem", f"listen {settings.listen}: another program has it",
                f"find it with `ss -ltnp 'sport = :{settings.listen_port}'`, or set another port",
            )  # fmt: skip
    elif trouble.errno in (errno.EACCES, errno.EPERM):
        yield Finding(
            "port", "problem", f"listen {settings.listen}: not allowed for this user",
            "use a port from 1024 on, or let systemd open it (codex-proxy.socket)",
        )  # fmt: skip
    else:
        yield Finding(
            "port", "problem", f"listen {settings.listen}: {files.why(trouble)}",
            "set listen to an address of this machine",
        )  # fmt: skip


def _bind(host: str | None, port: int) -> OSError | None:
    """Try the address out; return why it cannot be had."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, proto, _, address in found:
        try:
            with socket.socket(family, kind, proto) as probe:
                # As the daemon does it: what is left of ended connections is no hindrance.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen()
        except OSError as exc:
            if exc.errno == errno.EAFNOSUPPORT or (exc.errno == errno.EADDRNOTAVAIL and len(found) > 1):
                continue
            return exc
    return None


# -- the way out --------------------------------------------------------------------------


async def _dns(patient: Patient) -> AsyncIterator[Finding]:
    settings = patient.settings
    # With a proxy, names of the other side are its business.
    urls = [settings.proxy_url] if settings.proxy_url else [settings.base_url, settings.oauth_issuer]
    for host in dict.fromkeys(urlsplit(url).hostname or "" for url in urls):
        try:
            found = await _aside(functools.partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM))
        except socket.gaierror as exc:
            yield Finding(
                "dns",
                "problem",
                f"{host}: no address: {exc.strerror}",
                "see /etc/resolv.conf, or set proxy-url",
            )
        else:
            families = {"IPv6" if family == socket.AF_INET6 else "IPv4" for family, *_ in found}
            yield Finding("dns", "ok", f"{host}: {' and '.join(sorted(families))}")


_WORDS = {
    NetKind.DNS: ("its name has no address", "see the DNS of this machine"),
    NetKind.CONNECT: ("nobody answers", "see the firewall and the way to the internet, or set proxy-url"),
    NetKind.PROXY: ("the proxy does not let us through", "see proxy-url: host, port, user and password"),
    NetKind.TLS: (
        "its certificate is not trusted, or something in between answers",
        "see the clock, the CA certificates (SSL_CERT_FILE), and proxies that look into TLS",
    ),
    NetKind.TIMEOUT: ("no answer in time", "see the firewall and the way to the internet, or set proxy-url"),
    NetKind.CUT: ("it ended the connection", "see what stands between: a proxy, a firewall"),
}


async def _issuer(patient: Patient) -> AsyncIterator[Finding]:
    yield await _reach(patient, "issuer", patient.settings.oauth_issuer)


async def _backend(patient: Patient) -> AsyncIterator[Finding]:
    yield await _reach(patient, "backend", patient.settings.base_url)


async def _reach(patient: Patient, check: str, url: str) -> Finding:
    """Ask for nothing in particular, without a token: any answer will do."""
    settings = patient.settings
    way = f" through {mask_url(settings.proxy_url)}" if settings.proxy_url else ""
    before = patient.now()
    try:
        reply = await patient.outbound.fetch(
            "HEAD", f"{url}/", headers={"user-agent": settings.user_agent}, timeout=_CALL_SECONDS
        )
    except NetError as exc:
        words, advice = _WORDS[exc.kind]
        return Finding(check, "problem", f"{mask_url(url)}{way}: {words}", advice)
    _note_date(patient, reply, (before + patient.now()) / 2)
    if reply.status >= 500:
        return Finding(
            check, "warning", f"{mask_url(url)}{way}: answers {reply.status}", "it may be down for a moment"
        )
    return Finding(check, "ok", f"{mask_url(url)}{way}: answers")


def _note_date(patient: Patient, reply: Reply, at: float) -> None:
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        patient.dates.append(at - parsedate_to_datetime(reply.headers.get("date", "")).timestamp())


async def _clock(patient: Patient) -> AsyncIterator[Finding]:
    if not patient.dates:
        yield Finding("clock", "warning", "nobody answered, so the clock cannot be compared")
        return
    # The least: an answer may have been on its way for long, or come out of a cache.
    skew = min(patient.dates, key=abs)
    # Dates have no fractions.
    if abs(skew) <= _SKEW_SECONDS:
        yield Finding("clock", "ok", "agrees with those who answered")
        return
    where = "ahead of" if skew > 0 else "behind"
    yield Finding(
        "clock", "problem" if abs(skew) > _MUCH_SKEW_SECONDS else "warning",
        f"{span(abs(skew))} {where} those who answered: tokens are taken for {'over' if skew > 0 else 'good'} too"
        f" {'soon' if skew > 0 else 'long'}",
        "set the clock, and keep it set: systemd-timesyncd, chrony, or the host's clock for a container",
    )  # fmt: skip


# -- accounts -----------------------------------------------------------------------------


async def _accounts(patient: Patient) -> AsyncIterator[Finding]:
    settings = patient.settings
    try:
        scan, modes = await _aside(functools.partial(_scan, settings.auth_dir))
    except OSError as exc:
        yield _out_of_sight("accounts", "auth-dir", settings.auth_dir, exc)
        return
    patient.credentials = scan.credentials
    for problem in scan.problems:
        yield Finding(
            "accounts",
            "problem" if problem.skipped else "warning",
            f"{problem.name}: {problem.reason}",
            "mend the file, take it away, or log that account in again" if problem.skipped else "",
        )
    upstreams = [one.name for one in settings.upstreams if one.enabled]
    if not scan.credentials and upstreams:
        yield Finding(
            "accounts", "ok", f"no account in {settings.auth_dir}; upstreams serve: {', '.join(upstreams)}"
        )
    elif not scan.credentials:
        yield Finding(
            "accounts",
            "problem",
            f"no account in {settings.auth_dir}",
            "codex-proxy login, or codex-proxy import FILE",
        )
    told = _told(patient.accounts)
    for credential, mode in zip(scan.credentials, modes, strict=True):
        alias = _alias(credential)
        yield _account(credential, patient.now(), told.get(alias))
        if mode & 0o077:
            yield Finding(
                "accounts",
                "warning",
                f"{alias}: others may read its file (mode {mode:03o})",
                f"chmod 600 {mask_name(credential.path.name)} in auth-dir",
            )


def _scan(folder: Path) -> tuple[store.Scan, list[int]]:
    """Read auth-dir; and the modes of its files."""
    if not folder.exists():
        return store.Scan([], []), []
    # Without data-dir: that would put tokens which wait there into their files.
    scan = store.scan(folder)
    return scan, [stat.S_IMODE(credential.target.stat().st_mode) for credential in scan.credentials]


def _told(accounts: JsonObject | None) -> dict[str, JsonObject]:
    listed = accounts.get("accounts") if accounts is not None else None
    return {account["alias"]: account for account in listed or []}


def _alias(credential: Credential) -> str:
    return credential.alias or credential.default_alias


def _account(credential: Credential, now: float, told: JsonObject | None) -> Finding:
    alias = _alias(credential)
    login = f"codex-proxy accounts relogin {alias}"
    if credential.disabled:
        return Finding("accounts", "ok", f"{alias}: disabled by its owner")
    status = None if told is None else told.get("status")
    reason = None if told is None else told.get("reason")
    if status == "needs_login":
        return Finding("accounts", "problem", f"{alias}: needs a login: {reason or 'unknown'}", login)
    if status == "unavailable":
        return Finding("accounts", "warning", f"{alias}: {reason or 'not served by the backend'}")
    if status == "cooldown":
        return Finding("accounts", "ok", f"{alias}: rests: {reason or 'a limit'}")
    if credential.interrupted is not None:
        return Finding(
            "accounts",
            "warning",
            f"{alias}: an exchange of its token was cut off; the daemon tries the token once",
            login,
        )
    expires = credential.expires_at
    if expires is None or expires > now:
        until = "" if expires is None else f" for {span(expires - now)}"
        if credential.refresh:
            return Finding("accounts", "ok", f"{alias}: its token is good{until}")
        return Finding(
            "accounts", "warning", f"{alias}: its token is good{until}, and cannot be refreshed then", login
        )
    if credential.refresh:
        return Finding("accounts", "ok", f"{alias}: its token is over, the daemon exchanges it at its start")
    return Finding("accounts", "problem", f"{alias}: its token is over and cannot be refreshed", login)


async def _logins(patient: Patient) -> AsyncIterator[Finding]:
    """Ask the usage of accounts with their own tokens, where those are good: it costs nothing, and proves them."""
    settings = patient.settings
    parts = urlsplit(settings.base_url)
    if parts.scheme == "http" and not _is_here(parts.hostname or ""):
        yield Finding(
            "logins",
            "problem",
            "base-url is not encrypted, so no token is sent there",
            "use https in base-url",
        )
        return
    now = patient.now()
    usable = [
        one for one in patient.credentials
        if one.access and not one.disabled and (one.expires_at is None or one.expires_at > now)
    ]  # fmt: skip
    slots = Slots(lambda: _ASKED_AT_A_TIME)

    async def ask(credential: Credential) -> Finding:
        async with slots:
            return await _login(patient, credential)

    asked: list[Awaitable[Finding]] = [ask(credential) for credential in usable[:_MAX_ASKED]]
    for finding in await asyncio.gather(*asked):
        yield finding
    if len(usable) > _MAX_ASKED:
        yield Finding(
            "logins", "ok", f"{len(usable) - _MAX_ASKED} more were not asked for; see codex-proxy accounts"
        )


def _is_here(host: str) -> bool:
    return Settings(listen=f"[{host}]:1" if ":" in host else f"{host}:1").is_loopback


async def _login(patient: Patient, credential: Credential) -> Finding:
    settings, alias = patient.settings, _alias(credential)
    account = Account(credential, alias)
    way = " through its proxy" if credential.proxy_url is not None else ""
    try:
        reply = await patient.outbound.fetch(
            "GET",
            f"{settings.base_url.removesuffix('/codex')}/wham/usage",
            headers={
                **account.headers(credential.access),
                "originator": settings.originator,
                "user-agent": settings.user_agent,
                "accept": "application/json",
            },
            timeout=_CALL_SECONDS,
            proxy_url=account.proxy_url,
        )
    except NetError as exc:
        words, advice = _WORDS[exc.kind]
        return Finding("logins", "problem", f"{alias}{way}: {words}", advice)
    if reply.status == 200:
        return Finding("logins", "ok", f"{alias}{way}: the backend knows its token")
    if reply.status == 401:
        advice = (
            f"codex-proxy accounts refresh {alias}; if that fails, codex-proxy accounts relogin {alias}"
            if credential.refresh else f"codex-proxy accounts relogin {alias}"
        )  # fmt: skip
        return Finding("logins", "problem", f"{alias}{way}: the backend refuses its token", advice)
    if reply.status == 403:
        return Finding(
            "logins", "warning", f"{alias}{way}: the backend answers 403",
            "the workspace may be deactivated, or this machine's address is not liked: try it in a browser, or a proxy",
        )  # fmt: skip
    return Finding(
        "logins", "warning", f"{alias}{way}: the backend answers {reply.status}", "try again later"
    )


CHECKS: tuple[tuple[str, Check, bool], ...] = (
    ("version", _version, False),
    ("config", _config, False),
    ("folders", _folders, False),
    ("disk", _disk, False),
    ("limits", _limits, False),
    ("daemon", _daemon, False),
    ("port", _port, False),
    ("dns", _dns, True),
    ("issuer", _issuer, True),
    ("backend", _backend, True),
    ("clock", _clock, True),
    ("accounts", _accounts, False),
    ("logins", _logins, True),
)
"""Name, check, whether it talks to others; in the order of what depends on what."""


@contextlib.asynccontextmanager
async def patient(
    loaded: Loaded, *, is_offline: bool = False, now: Callable[[], float] = time.time
) -> AsyncIterator[Patient]:
    """Make ready what the checks need."""
    outbound = Outbound(Live(loaded.settings))
    try:
        yield Patient(loaded, outbound, is_offline, now)
    finally:
        await outbound.aclose()


def summary(findings: Sequence[Finding]) -> Mapping[Level, int]:
    """Count findings by level."""
    found: dict[Level, int] = {"ok": 0, "warning": 0, "problem": 0}
    for finding in findings:
        found[finding.level] += 1
    return found
