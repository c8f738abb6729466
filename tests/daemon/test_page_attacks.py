"""The page's API against who means it no good, or just behaves oddly."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from codex_proxy.accounts import importing
from codex_proxy.accounts.login import device_login
from codex_proxy.server import keyfile, onlooker
from codex_proxy.server.dashboard import logins
from codex_proxy.server.dashboard.recent import Tail
from codex_proxy.server.dashboard.shell import HEADERS
from codex_proxy.server.pulse import Pulse
from codex_proxy.simulator import Simulator
from tests.daemon.test_page import KEY, Browser, first_of, page
from tests.harness import Stand

CANARY = "canary-3f9a1c-never-to-be-seen"


async def exchange(stand: Stand, request: bytes) -> bytes:
    """Send bytes as they are; return what comes until the other end is silent for a moment."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.daemon.port)
    writer.write(request)
    found = b""
    with contextlib.suppress(TimeoutError):
        while part := await asyncio.wait_for(reader.read(65_536), 0.3):
            found += part
    writer.close()
    return found


def head_of(stand: Stand, browser: Browser, line: str, *more: str) -> bytes:
    cookies = "; ".join(f"{one.key}={one.value}" for one in browser.session.cookie_jar)
    lines = [f"{line} HTTP/1.1", f"Host: 127.0.0.1:{stand.daemon.port}", f"Cookie: {cookies}", *more, "", ""]
    return "\r\n".join(lines).encode()


# -- odd requests -------------------------------------------------------------------------


async def test_a_head_has_no_body(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        for path in ("/ui", "/ui/api/live?topic=now", "/ui/api/session", "/requests/live"):
            asked = head_of(stand, browser, f"HEAD {path}") + head_of(stand, browser, "GET /livez")
            head, _, rest = (await exchange(stand, asked)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), path
            assert rest.startswith(b"HTTP/1.1 200 "), path
            assert rest.endswith(b'{"status":"ok"}'), path


async def test_who_has_no_session_may_send_no_more_than_a_key(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (_, browser):
        for body in ({"key": "x" * 100_000}, {"key": "x", "more": ["y" * 1_000] * 100}):
            status, said, _ = await browser.ask("POST", "/session", body)
            assert (status, said["error"]["code"]) == (413, "request_too_large")
            assert "max-body-bytes" not in said["error"]["message"]
        assert await browser.log_in(KEY) == 200


@pytest.mark.parametrize(
    "body", [b"[]", b"7", b"{", b"[" * 15_000, b'{"key": 7}', b'{"key": ""}', b"\xff", b'{"key": "\\ud800"}']
)
async def test_a_login_that_is_none_is_refused(tmp_path: Path, body: bytes) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (_, browser):
        headers = {**browser.headers, "Content-Type": "application/json"}
        async with browser.session.post("/ui/api/session", data=body, headers=headers) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["message"]


async def test_a_refusal_is_as_well_kept_to_itself_as_an_answer(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (_, browser):
        for path in ("/setup", "/requests/req_1", "/nothing"):
            status, _, headers = await browser.ask("GET", path)
            assert status in (401, 404)
            assert headers.items() >= {**HEADERS, "Cache-Control": "no-store"}.items()


async def test_behind_a_relay_that_hides_the_host_the_refusal_says_what_to_do(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (_, browser):
        status, body, _ = await browser.ask("POST", "/session", {"key": KEY}, Origin="https://proxy.example")
        assert (status, body["error"]["code"]) == (403, "forbidden_origin")
        assert "pass the header Host on" in body["error"]["message"]


# -- who does not read --------------------------------------------------------------------


@contextlib.contextmanager
def who_never_reads(stand: Stand, browser: Browser, path: str) -> Any:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        sock.connect(("127.0.0.1", stand.daemon.port))
        sock.sendall(head_of(stand, browser, f"GET {path}"))
        yield sock


STREAMS = ["/ui/api/live?topic=now", "/requests/live"]


@contextlib.asynccontextmanager
async def much_to_tell(folder: Path, **settings: Any) -> AsyncIterator[tuple[Stand, Browser]]:
    real = Pulse.now
    # More than the kernel takes in for who does not read.
    pad = "x" * 12_000_000
    with (
        mock.patch.object(Pulse, "now", lambda self, since=None: {**real(self, since), "pad": pad}),
        mock.patch.object(Tail, "take", return_value=([{"pad": pad}], 0)),
    ):
        async with page(folder, accounts=1, **settings) as (stand, browser):
            await browser.look()
            yield stand, browser


def is_stuck(stand: Stand) -> bool:
    return any(
        transport.get_write_buffer_size() > 65_536 for transport in stand.daemon._listener._transports()
    )


@pytest.mark.parametrize("path", STREAMS)
async def test_who_reads_nothing_is_cut_off(tmp_path: Path, path: str) -> None:
    with mock.patch.object(onlooker, "_STALL_SECONDS", 0.2):
        async with much_to_tell(tmp_path) as (stand, browser):
            with who_never_reads(stand, browser, path):
                await stand.until(lambda: is_stuck(stand))
                await stand.until(lambda: not is_stuck(stand))
                assert stand.daemon._listener.in_work == 0


@pytest.mark.parametrize("path", STREAMS)
async def test_who_reads_nothing_does_not_hold_the_end_up(tmp_path: Path, path: str) -> None:
    async with much_to_tell(tmp_path, drain_timeout=60) as (stand, browser):
        with who_never_reads(stand, browser, path):
            await stand.until(lambda: is_stuck(stand))
            async with asyncio.timeout(3.0):
                await stand.daemon.stop()


# -- accounts -----------------------------------------------------------------------------


async def test_files_are_read_where_they_hold_nobody_up(tmp_path: Path) -> None:
    """A file of megabytes takes seconds to read."""
    threads: list[int] = []
    real = importing.read_text

    def note(path: Path, text: str) -> Any:
        threads.append(threading.get_ident())
        return real(path, text)

    async with page(tmp_path, accounts=1) as (_, browser):
        await browser.look()
        with mock.patch.object(importing, "read_text", note):
            await browser.post("/import", {"files": [{"name": "a.json", "content": "[7]"}]})
    assert threads
    assert threading.get_ident() not in threads


async def test_what_spends_quota_and_what_breaks_off_a_login_is_in_the_audit_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="codex_proxy.audit")
    async with page(tmp_path, accounts=1) as (_, browser):
        await browser.look()
        await browser.ask("POST", "/try", {"dialect": "chat", "model": "gpt-5.5"})
        begun = await browser.post("/login")
        await browser.ask("DELETE", f"/login/{begun['id']}")
    told = [record.getMessage() for record in caplog.records if record.name == "codex_proxy.audit"]
    assert [line.split()[1] for line in told] == ["action=try", "action=login", "action=cancel-login"]


async def test_no_address_and_no_token_of_a_file_comes_back(tmp_path: Path) -> None:
    mail = f"{CANARY}@example.test"
    contents = [
        json.dumps({"refresh_token": CANARY, "email": mail, "alias": mail, "priority": mail}),
        json.dumps({"refresh_token": f"{CANARY}-2", "proxy_url": f"http://{mail}:{CANARY}@nowhere"}),
        json.dumps({"email": mail, mail: CANARY}),
        f'{{"refresh_token": "{CANARY}", {mail}',
        f"{mail}\n{CANARY}",
    ]
    async with page(tmp_path, accounts=1) as (_, browser):
        await browser.look()
        names = [f"{mail}.json", f"{mail}/{mail}.json", mail, f"x\n{mail}", f"..\0{mail}.jsonl"]
        files = [{"name": name, "content": text} for name, text in zip(names, contents, strict=True)]
        told = json.dumps(await browser.post("/import", {"files": files}))
        async with browser.live("accounts") as events:
            seen = [await anext(events) for _ in range(2)]
    assert CANARY not in told
    assert CANARY not in json.dumps(seen)


async def test_many_files_come_in_at_once(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        files = [
            {"name": "auth.json", "content": json.dumps({"tokens": {"refresh_token": f"token-{n}"}})}
            for n in range(150)
        ]
        told = await browser.post("/import", {"files": files})
        assert {one["outcome"] for one in told["results"]} == {"imported"}
        assert len(stand.daemon.pool) == 151
        told = await browser.post("/import", {"files": files})
        assert {one["outcome"] for one in told["results"]} == {"already there"}
        assert len(stand.daemon.pool) == 151


async def test_a_log_that_was_taken_for_accounts_is_refused_as_a_whole(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        text = '{"refresh_token": "the-only-one"}\n' + '{"line": 1}\n' * 10_000
        status, said, _ = await browser.ask(
            "POST", "/import", {"files": [{"name": "log.jsonl", "content": text}]}
        )
        assert (status, said["error"]["param"]) == (400, "files")
        assert len(stand.daemon.pool) == 1


# -- logins -------------------------------------------------------------------------------


async def test_a_login_whose_tokens_are_here_is_not_cancelled(tmp_path: Path) -> None:
    going, go = asyncio.Event(), asyncio.Event()

    async def held(*arguments: Any, **named: Any) -> Any:
        named["sleep"] = lambda _: asyncio.sleep(0.01)
        tokens = await device_login(*arguments, **named)
        going.set()
        return tokens

    async with page(tmp_path, accounts=1, auths=lambda sim, folder: None) as (stand, browser):
        await browser.look()
        real = stand.daemon.keeper.follow_files

        async def slow() -> None:
            await go.wait()
            await real()

        with (
            mock.patch.object(logins, "device_login", held),
            mock.patch.object(stand.daemon.keeper, "follow_files", slow),
        ):
            begun = await browser.post("/login")
            stand.sim.approve_device(begun["user_code"])
            async with asyncio.timeout(15.0):
                await going.wait()
            status, told, _ = await browser.ask("DELETE", f"/login/{begun['id']}")
            assert (status, told["state"]) == (200, "waiting")
            go.set()
            await stand.until(lambda: len(stand.daemon.pool) == 1)
        told = await browser.get(f"/login/{begun['id']}")
        assert (told["state"], told["alias"]) == ("done", stand.daemon.pool.accounts()[0].alias)


async def test_a_login_that_waits_is_not_forgotten_for_others(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (_, browser):
        await browser.look()
        first = await browser.post("/login")
        for _ in range(40):
            begun = await browser.post("/login")
            await browser.ask("DELETE", f"/login/{begun['id']}")
        assert (await browser.get(f"/login/{first['id']}"))["state"] == "waiting"


async def test_whoever_leaves_before_the_code_is_there_leaves_no_login_behind(tmp_path: Path) -> None:
    reached = asyncio.Event()

    async def never(*_: Any, **__: Any) -> Any:
        reached.set()
        await asyncio.Event().wait()

    def waiting() -> int:
        return sum(task.get_name() == "page-login" for task in asyncio.all_tasks())

    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        with mock.patch.object(logins, "device_login", never):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(browser.post("/login"), 0.2)
            assert reached.is_set()
            await stand.until(lambda: waiting() == 0)


# -- the test request ---------------------------------------------------------------------


@pytest.mark.parametrize("model", ["no-such-model", "x" * 5_000, "a\nb", "🜚", "gpt-5.5\0"])
async def test_a_test_request_for_any_model_comes_to_an_end(tmp_path: Path, model: str) -> None:
    async with page(tmp_path, accounts=1) as (_, browser):
        await browser.look()
        for dialect in ("chat", "responses", "messages"):
            status, raw, _ = await browser.ask("POST", "/try", {"dialect": dialect, "model": model})
            if status == 200:
                assert b'event: done\ndata: {"ok":' in raw
            else:
                assert status in (400, 404)


async def test_a_test_request_with_no_account_or_only_resting_ones_says_so(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, auths=lambda sim, folder: None) as (_, browser):
        await browser.look()
        _, raw, _ = await browser.ask("POST", "/try", {"dialect": "messages", "model": "claude-sonnet-4-5"})
        assert b'"ok":false' in raw
        assert raw.rpartition(b"event: ")[2].startswith(b"done")


# -- handing over, and a full disk ---------------------------------------------------------


async def test_while_it_hands_over_nobody_gets_in_or_out(tmp_path: Path) -> None:
    """The process that takes over has read who is in; it would not hear of it."""
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (stand, browser):
        assert await browser.log_in(KEY) == 200
        await stand.daemon._give_up()
        status, body, _ = await browser.ask("DELETE", "/session")
        assert (status, body["error"]["code"]) == (503, "restarting")
        assert await browser.get("/alerts")
        await stand.daemon._take_back()
        assert (await browser.ask("DELETE", "/session"))[0] == 200
        assert (await browser.ask("GET", "/alerts"))[0] == 401


@pytest.mark.parametrize("path", ["/ui/api/live?topic=accounts", "/requests/live"])
async def test_a_stream_that_is_asked_for_while_it_drains_ends_at_once(tmp_path: Path, path: str) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        reader, writer = await asyncio.open_connection("127.0.0.1", stand.daemon.port)
        writer.write(head_of(stand, browser, "GET /livez"))
        assert b"200 OK" in await reader.readuntil(b"}")
        await stand.daemon._listener.retire()
        writer.write(head_of(stand, browser, f"GET {path}"))
        async with asyncio.timeout(3.0):
            assert b"200 OK" in await reader.read()
        writer.close()


async def test_without_room_for_a_set_up_token_it_serves_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, key: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    settings = {"accounts": 1, "listen": '"0.0.0.0:0"', "auth": "none"}
    with mock.patch.object(keyfile, "_write", full):
        async with page(tmp_path, **settings) as (stand, browser):
            assert (await stand.get("/livez")).status == 200
            browser.url = stand.url
            assert await browser.log_in("setup-") == 401
    assert "no set-up token for the page" in caplog.text
    async with page(tmp_path, **settings, ui="off"):
        assert (tmp_path / "data" / "setup-token").read_text("utf-8") == ""


# -- who guesses, what is written ---------------------------------------------------------


async def test_what_was_said_at_the_door_is_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]", log_level="debug") as (stand, browser):
        answers = [await browser.ask("POST", "/session", {"key": CANARY})]
        answers.append(await browser.ask("POST", f"/session?key={CANARY}", {"key": CANARY, CANARY: CANARY}))
        answers.append(await browser.ask("GET", "/setup", Cookie=f"codex_proxy_session={CANARY}"))
        browser.csrf = CANARY
        await browser.log_in(KEY)
        answers.append(await browser.ask("POST", "/check-quota", **{"x-csrf-token": CANARY}))
        cookie = next(iter(browser.session.cookie_jar)).value
        secrets = [CANARY, KEY, cookie, browser.csrf]
        assert not [one for one in secrets if one in str(answers)]
        await stand.ask("hello")
    written = "\n".join([record.getMessage() for record in caplog.records]) + str(capfd.readouterr())
    kept = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    written += "".join([path.read_text("utf-8", "replace") for path in kept])
    assert not [one for one in secrets if one in written]


async def test_without_windows_or_with_one_the_horizon_is_told(tmp_path: Path) -> None:
    sim = Simulator(accounts=3)
    async with page(tmp_path, simulator=sim) as (stand, browser):
        await browser.look()
        now = stand.daemon.clock.now()
        stand.known(sim.accounts[0]).quota.read_headers(
            {
                "x-codex-primary-used-percent": "30",
                "x-codex-primary-window-minutes": "10080",
                "x-codex-primary-reset-after-seconds": "86400",
            },
            now,
        )
        async with browser.live("horizon") as events:
            told = await first_of("horizon", events)
        windows = {one["alias"]: [w["window"] for w in one["windows"]] for one in told["accounts"]}
        assert windows[stand.known(sim.accounts[0]).alias] == ["week"]
        assert len(windows) == 3
