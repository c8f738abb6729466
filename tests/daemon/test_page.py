"""The page's API on the whole daemon: who gets in, what is shown, what may be changed."""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy.accounts.login import device_login
from codex_proxy.protocol.sse import Parser
from codex_proxy.server.app import UI_ROUTES
from codex_proxy.server.dashboard import logins
from codex_proxy.server.dashboard.sessions import COOKIE
from codex_proxy.server.dashboard.shell import CSP
from codex_proxy.simulator import Simulator
from tests.harness import Stand, standing

KEY = "client-key-of-the-owner"
ADMIN = "admin-key-0123456789"


class Browser:
    """What a browser does, as far as the proxy sees it: keeps cookies, says where it comes from."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = aiohttp.ClientSession(url, cookie_jar=aiohttp.CookieJar(unsafe=True))
        self.csrf = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Origin": self.url, "Sec-Fetch-Site": "same-origin", "x-csrf-token": self.csrf}

    async def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, Mapping[str, str]]:
        async with self.session.request(
            method, f"/ui/api{path}", json=body, headers={**self.headers, **headers}
        ) as answer:
            raw = await answer.read()
            return answer.status, json.loads(raw) if raw.startswith((b"{", b"[")) else raw, answer.headers

    async def get(self, path: str) -> Any:
        status, body, _ = await self.ask("GET", path)
        assert status == 200, body
        return body

    async def post(self, path: str, body: Any = None) -> Any:
        status, said, _ = await self.ask("POST", path, body)
        assert status == 200, said
        return said

    async def look(self) -> Any:
        """Ask for the session, as the page does first of all."""
        found = await self.get("/session")
        self.csrf = found["csrf"] or ""
        return found

    async def log_in(self, key: str) -> int:
        status, body, _ = await self.ask("POST", "/session", {"key": key})
        self.csrf = body.get("csrf") or ""
        return status

    @contextlib.asynccontextmanager
    async def live(self, topic: str) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
        response = await self.session.get(f"/ui/api/live?topic={topic}", headers=self.headers)
        assert response.status == 200, await response.read()

        async def events() -> AsyncIterator[tuple[str, Any]]:
            waiting = b""
            async for chunk in response.content.iter_any():
                waiting += chunk
                while b"\n\n" in waiting:
                    block, _, waiting = waiting.partition(b"\n\n")
                    lines = dict(line.split(b": ", 1) for line in block.split(b"\n"))
                    yield lines[b"event"].decode(), json.loads(lines[b"data"])

        try:
            yield events()
        finally:
            response.close()


async def first_of(kind: str, events: AsyncIterator[tuple[str, Any]]) -> Any:
    """Return the next event of that kind."""
    async for name, told in events:
        if name == kind:
            return told
    raise AssertionError(f"no {kind} came")


def alias_of(stand: Stand) -> str:
    return stand.daemon.pool.accounts()[0].alias


@contextlib.asynccontextmanager
async def page(folder: Path, **settings: Any) -> AsyncIterator[tuple[Stand, Browser]]:
    async with standing(folder, **settings) as stand:
        browser = Browser(stand.url)
        try:
            yield stand, browser
        finally:
            await browser.session.close()


# -- who gets in --------------------------------------------------------------------------


async def test_on_this_machine_without_keys_the_page_just_opens(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        assert await browser.look() == {
            "authenticated": True, "role": "owner", "csrf": browser.csrf, "needs_key": False, "is_setup": True,
            "ledger": "off",
        }  # fmt: skip
        assert (await browser.get("/setup"))["needs_key"] is False
        assert (await browser.post(f"/accounts/{alias_of(stand)}/check")).keys() >= {"success", "message"}


async def test_behind_a_relay_the_page_asks_for_a_key_all_the_same(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (_, browser):
        status, body, headers = await browser.ask("GET", "/session", **{"X-Forwarded-For": "203.0.113.7"})
        assert (status, body["authenticated"]) == (200, False)
        assert "Set-Cookie" not in headers


@pytest.mark.parametrize("key", [KEY, ADMIN])
async def test_a_key_opens_the_page_and_its_cookie_is_kept_from_scripts(tmp_path: Path, key: str) -> None:
    settings = {"api_keys": f"[{KEY}]"} if key == KEY else {"admin_key": ADMIN, "api_keys": f"[{KEY}]"}
    async with page(tmp_path, accounts=1, **settings) as (_, browser):
        assert not (await browser.look())["authenticated"]
        status, _, _ = await browser.ask("GET", "/setup")
        assert status == 401
        status, body, headers = await browser.ask("POST", "/session", {"key": key})
        assert (status, body["authenticated"]) == (200, True)
        cookie = headers["Set-Cookie"]
        assert {"HttpOnly", "Path=/ui", "SameSite=Strict"} <= set(cookie.split("; "))
        assert key not in cookie
        assert (await browser.get("/setup"))["clients"]


async def test_with_an_admin_key_client_keys_open_nothing_of_the_owners(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]", admin_key=ADMIN) as (stand, browser):
        assert await browser.log_in(KEY) == 401
        bearer, owner = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {ADMIN}"}
        for path in ("/stats", "/accounts", "/why/req_1"):
            assert (await stand.get(path, headers=bearer)).status == 401
            assert (await stand.get(path, headers=owner)).status in (200, 404)
        assert (await stand.post("/check-quota", headers=bearer)).status == 401
        assert (await stand.post(f"/accounts/{alias_of(stand)}/disable", headers=bearer)).status == 401
        done = await stand.post(f"/accounts/{alias_of(stand)}/disable", headers=owner)
        assert (done.status, done.json["success"]) == (200, True)
        # It is no client's key.
        assert (await stand.get("/v1/models", headers=owner)).status == 401
        assert (await stand.get("/v1/models", headers=bearer)).status == 200


async def test_without_an_admin_key_accounts_are_changed_on_the_machine_or_on_the_page_only(
    tmp_path: Path,
) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (stand, browser):
        refused = await stand.post(
            f"/accounts/{alias_of(stand)}/disable", headers={"Authorization": f"Bearer {KEY}"}
        )
        assert (refused.status, refused.json["error"]["code"]) == (403, "admin_key_needed")
        assert await browser.log_in(KEY) == 200
        assert (await browser.post(f"/accounts/{alias_of(stand)}/disable"))["account"]["status"] == "disabled"


async def test_every_route_of_the_page_needs_a_session(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (_, browser):
        for route in UI_ROUTES:
            if route.handler in ("ui", "ui_static", "ui_session", "ui_log_in"):
                continue
            path = route.path.removeprefix("/ui/api").replace("{alias}", "acct-1")
            status, body, _ = await browser.ask(route.method, path, {} if route.method == "POST" else None)
            assert (status, body["error"]["code"]) == (401, "no_session"), route


async def test_a_change_needs_the_word_that_only_the_page_knows(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        word = browser.csrf
        for wrong in ("", "0" * 64, word[:-1], word.upper() if word.upper() != word else "x"):
            browser.csrf = wrong
            status, body, _ = await browser.ask("POST", f"/accounts/{alias_of(stand)}/disable")
            assert (status, body["error"]["code"]) == (403, "forged_request")
        browser.csrf = word
        for headers in (
            {"Origin": "https://elsewhere.test"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ):
            status, body, _ = await browser.ask("POST", f"/accounts/{alias_of(stand)}/disable", **headers)
            assert (status, body["error"]["code"]) == (403, "forbidden_origin")
        async with browser.session.post(
            "/ui/api/import", data=b'{"files":[]}', headers={**browser.headers, "Content-Type": "text/plain"}
        ) as answer:
            assert answer.status == 415


async def test_another_word_of_a_second_session_is_no_good(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        other = Browser(stand.url)
        await other.look()
        assert other.csrf != browser.csrf
        browser.csrf = other.csrf
        assert (await browser.ask("POST", "/check-quota"))[0] == 403
        await other.session.close()


async def test_guessing_is_slow(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (_, browser):
        statuses = await asyncio.gather(*(browser.log_in(f"guess-{n}") for n in range(20)))
        assert sorted(set(statuses)) == [401, 429]
        assert statuses.count(401) == 5
        status, body, headers = await browser.ask("POST", "/session", {"key": KEY})
        assert (status, body["error"]["code"]) == (429, "too_many_guesses")
        assert int(headers["Retry-After"]) >= 1


async def test_guessing_is_as_slow_with_a_key_in_a_header(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]", admin_key=ADMIN, metrics="keyed") as (
        stand,
        browser,
    ):
        right = {"Authorization": f"Bearer {ADMIN}"}
        assert await browser.log_in(ADMIN) == 200
        paths = ("/stats", "/metrics", "/accounts", "/api/admin/users", "/requests", "/why/x")
        for number, path in enumerate(paths):
            answer = await stand.get(path, headers={"x-api-key": f"guess-{number}"})
            assert answer.status == (429 if number == 5 else 401)
        for path in ("/stats", "/metrics", "/api/admin/users"):
            answer = await stand.get(path, headers=right)
            assert (answer.status, answer.json["error"]["code"]) == (429, "too_many_guesses")
            assert int(answer.headers["retry-after"]) >= 1
        answer = await stand.get("/stats", headers={**right, "anthropic-version": "2023-06-01"})
        assert (answer.status, answer.json["type"]) == (429, "error")
        assert int(answer.headers["retry-after"]) >= 1
        answer = await stand.post(f"/accounts/{alias_of(stand)}/disable", headers=right)
        assert answer.status == 429
        assert await browser.log_in(ADMIN) == 429
        # Who is in stays in, and clients are none of it.
        assert (await browser.ask("GET", "/setup"))[0] == 200
        assert (await stand.get("/v1/models", headers={"x-api-key": KEY})).status == 200


async def test_a_session_ends_with_what_opened_it(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (stand, browser):
        assert await browser.log_in(KEY) == 200
        file = stand.folder / "config.yaml"
        text = await asyncio.to_thread(file.read_text, encoding="utf-8")
        await asyncio.to_thread(file.write_text, f"{text}admin-key: {ADMIN}\n", encoding="utf-8")
        await stand.until(lambda: stand.daemon.live.current.admin_key is not None)
        assert (await browser.ask("GET", "/setup"))[0] == 401
        assert await browser.log_in(ADMIN) == 200


async def test_logging_out_ends_the_session_and_its_stream(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (_, browser):
        assert await browser.log_in(KEY) == 200
        async with browser.live("now") as events:
            assert (await anext(events))[0] == "now"
            assert (await browser.ask("DELETE", "/session"))[0] == 200
            assert [name async for name, _ in events][-1] == "end"
        assert (await browser.ask("GET", "/setup"))[0] == 401


async def test_sessions_outlive_the_daemon_and_their_file_opens_nothing(tmp_path: Path) -> None:
    settings = {"accounts": 1, "api_keys": f"[{KEY}]"}
    async with page(tmp_path, **settings) as (_, browser):
        assert await browser.log_in(KEY) == 200
        cookies = [(cookie.key, cookie.value) for cookie in browser.session.cookie_jar]
    kept = tmp_path / "data" / "sessions.json"
    text = await asyncio.to_thread(kept.read_text, encoding="utf-8")
    assert cookies[0][0] == COOKIE
    assert cookies[0][1] not in text
    assert KEY not in text
    assert (await asyncio.to_thread(kept.stat)).st_mode & 0o077 == 0
    async with page(tmp_path, **settings) as (_, browser):
        browser.session.cookie_jar.update_cookies(dict(cookies))
        assert (await browser.look())["authenticated"]


async def test_a_set_up_token_opens_the_page_once(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, listen='"0.0.0.0:0"') as (stand, browser):
        browser.url = stand.url
        assert await browser.look() == {
            "authenticated": False, "role": None, "csrf": None, "needs_key": True, "is_setup": True, "ledger": None,
        }  # fmt: skip
        file = tmp_path / "data" / "setup-token"
        token = (await asyncio.to_thread(file.read_text, encoding="utf-8")).strip()
        assert (await asyncio.to_thread(file.stat)).st_mode & 0o077 == 0
        assert await browser.log_in(token[:-1]) == 401
        statuses = await asyncio.gather(*(browser.log_in(token) for _ in range(3)))
        assert sorted(statuses) == [200, 401, 401]
        assert not await asyncio.to_thread(file.exists)
    # Not written again by a later start.
    async with page(tmp_path, accounts=1, listen='"0.0.0.0:0"'):
        assert not await asyncio.to_thread(file.exists)


async def test_an_old_set_up_token_is_none(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, listen='"0.0.0.0:0"') as (_, browser):
        file = tmp_path / "data" / "setup-token"
        token = (await asyncio.to_thread(file.read_text, encoding="utf-8")).strip()
        long_ago = time.time() - 90_000
        await asyncio.to_thread(os.utime, file, (long_ago, long_ago))
        assert await browser.log_in(token) == 401


async def test_the_page_can_be_switched_off(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, ui="off") as (stand, browser):
        assert (await stand.get("/ui")).status == 404
        assert (await browser.ask("GET", "/session"))[0] == 404


async def test_a_person_who_opens_the_address_is_led_to_the_page_and_a_client_is_not(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, _):
        person = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
        async with stand.session.get("/", headers=person, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (302, "/ui")
        assert (await stand.get("/", headers={"Accept": "*/*"})).body == b"codex-proxy\n"
        assert (await stand.get("/api/hello")).status == 200


async def test_the_page_and_its_files_run_nothing_that_is_not_theirs(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (stand, _):
        for path in ("/ui", "/ui/", "/ui/static/app.js"):
            answer = await stand.get(path)
            assert answer.status == 200
            assert answer.headers["content-security-policy"] == CSP
            assert answer.headers["x-content-type-options"] == "nosniff"
            again = await stand.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status, again.body) == (304, b"")
        shell = (await stand.get("/ui")).body.decode()
        assert "style=" not in shell
        assert "<script>" not in shell
        for path in ("/ui/static/../api.py", "/ui/static/%2e%2e/api.py", "/ui/static/nothing.js"):
            assert (await stand.get(path)).status == 404


# -- what is shown ------------------------------------------------------------------------


async def test_now_tells_what_was_served(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=2) as (stand, browser):
        await browser.look()
        await stand.ask("hello")
        async with browser.live("now") as events:
            name, now = await anext(events)
        assert name == "now"
        assert now["accounts"]["active"] == 2
        assert now["requests_per_second"] > 0
        assert now["alerts"] == []


async def test_accounts_are_told_whole_and_then_what_changes(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=2) as (stand, browser):
        await browser.look()
        async with browser.live("accounts") as events:
            first = [await anext(events) for _ in range(2)][1]
            assert first[0] == "accounts"
            assert first[1]["all"] is True
            aliases = [account["alias"] for account in first[1]["accounts"]]
            assert len(aliases) == 2
            assert first[1]["accounts"][0]["state"] == {
                "name": "ready", "rule": None, "evidence": None, "since": None, "until": None,
            }  # fmt: skip
            done = await browser.post(f"/accounts/{aliases[1]}/disable")
            assert done["success"] is True
            async for name, told in events:
                if name == "accounts":
                    assert told["all"] is False
                    assert [one["alias"] for one in told["accounts"]] == [aliases[1]]
                    assert told["accounts"][0]["state"]["rule"] == "disabled"
                    break
            file = next(path for path in sorted(stand.auths.iterdir()) if path.suffix == ".json")
            await asyncio.to_thread(file.unlink)
            async for name, told in events:
                if name == "accounts" and told["gone"]:
                    assert len(told["gone"]) == 1
                    break


async def test_requests_are_told_as_they_finish_and_looked_up_afterwards(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=2) as (stand, browser):
        await browser.look()
        async with browser.live("requests") as events:
            await anext(events)
            answer = await stand.ask("hello")
            told = await first_of("requests", events)
            request_id = answer.headers["x-request-id"]
            assert [one["id"] for one in told["requests"]] == [request_id]
            assert told["dropped"] == 0
        listed = await browser.get("/requests")
        assert [one["id"] for one in listed["requests"]] == [request_id]
        assert listed["next"] is None
        detail = await browser.get(f"/requests/{request_id}")
        assert detail["marks"][0]["mark"] == "received"
        assert detail["marks"][-1]["mark"] == "end"
        assert detail["steps"][0]["decision"]["account"] == detail["account"]
        assert "hello" not in json.dumps(detail)
        assert (await browser.ask("GET", "/requests/req_unknown"))[0] == 404
        assert (await browser.get(f"/requests?account={detail['account']}"))["requests"]
        assert not (await browser.get("/requests?account=nobody"))["requests"]
        for wrong in ("limit=x", "limit=100000", "since=now", "min_seconds=-1"):
            assert (await browser.ask("GET", f"/requests?{wrong}"))[0] == 400, wrong


async def test_the_cache_screen_adds_up(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        for _ in range(3):
            await stand.ask("hello", prompt_cache_key="one")
        told = await browser.get("/cache?hours=24")
        assert told["turns"] == 3
        for rows in ("by_client", "by_binding", "by_model", "by_account", "by_rule"):
            assert sum(row["turns"] for row in told[rows]) == 3
            assert sum(row["input_tokens"] for row in told[rows]) == told["input_tokens"]
        assert [row["name"] for row in told["by_binding"]] == ["prompt_cache_key"]
        for wrong in ("0", "-1", "x", "1.5", "99999999999"):
            assert (await browser.ask("GET", f"/cache?hours={wrong}"))[0] == 400


async def test_the_horizon_shows_every_window(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=2) as (stand, browser):
        await browser.look()
        stand.in_order()
        async with browser.live("horizon") as events:
            told = await first_of("horizon", events)
        assert [one["alias"] for one in told["accounts"]] == sorted(
            account.alias for account in stand.daemon.pool.accounts()
        )
        windows = {window["window"] for one in told["accounts"] for window in one["windows"]}
        assert windows == {"5h", "week"}
        assert told["pool"]["is_known"] is False
        assert told["pool"]["dry_at"] is None
        assert told["pool"]["next_reset"] > told["at"]


async def test_the_set_up_texts_name_this_proxy(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, api_keys=f"[{KEY}]") as (stand, browser):
        await browser.log_in(KEY)
        told = await browser.get("/setup")
        assert told["base_url"] == stand.url
        assert told["needs_key"] is True
        assert {
            "claude-code",
            "codex",
            "openai-python",
            "anthropic-python",
            "opencode",
            "aider",
            "cursor",
        } <= {client["id"] for client in told["clients"]}
        for client in told["clients"]:
            text = "".join(step["text"] for step in client["steps"])
            assert stand.url in text
            assert "YOUR_KEY" in text
            assert KEY not in text


@pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])
async def test_the_test_request_tells_each_step(tmp_path: Path, dialect: str) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        status, raw, _ = await browser.ask("POST", "/try", {"dialect": dialect, "model": "gpt-5.5"})
        assert status == 200
        events = [(event.type, event.json) for event in Parser().feed(raw)]
        names = [told["step"] for name, told in _named(raw) if name == "step"]
        assert names == ["read", "picked", "answer", "end"], events
        name, done = _named(raw)[-1]
        assert (name, done["ok"]) == ("done", True)
        assert done["text"]
        assert len(stand.sim.turns) == 1
        assert (await browser.get(f"/requests/{done['request_id']}"))["route"] == f"try:{dialect}"


async def test_a_test_request_that_fails_says_why(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        await browser.post(f"/accounts/{alias_of(stand)}/disable")
        _, raw, _ = await browser.ask("POST", "/try", {"dialect": "chat", "model": "gpt-5.5"})
        told = _named(raw)
        assert told[-1][1]["ok"] is False
        assert [one["ok"] for name, one in told if name == "step" and one["step"] == "picked"] == [False]
        for body, param in (
            ({"dialect": "smoke", "model": "gpt-5.5"}, "dialect"),
            ({"dialect": "chat"}, "model"),
            ({"dialect": 1, "model": "gpt-5.5"}, "dialect"),
        ):
            status, said, _ = await browser.ask("POST", "/try", body)
            assert (status, said["error"]["param"]) == (400, param)
        assert not stand.sim.turns


def _named(raw: bytes) -> list[tuple[str, Any]]:
    found = []
    for block in raw.decode().strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines["event"], json.loads(lines["data"])))
    return found


# -- accounts -----------------------------------------------------------------------------


async def test_account_files_are_brought_in(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=2, auths=lambda sim, folder: None) as (stand, browser):
        assert (await browser.look())["is_setup"] is False
        spare = tmp_path / "spare"
        await asyncio.to_thread(spare.mkdir)
        await asyncio.to_thread(stand.sim.write_auth_files, spare)
        contents = [
            await asyncio.to_thread(path.read_text, encoding="utf-8") for path in sorted(spare.iterdir())
        ]
        told = await browser.post(
            "/import",
            {
                "files": [
                    {"name": "../../elsewhere/one.json", "content": contents[0]},
                    {"name": "broken.json", "content": "{"},
                    {"name": "all.json", "content": f"[{contents[1]}, 7]"},
                ]
            },
        )
        assert [one["success"] for one in told["results"]] == [True, False, True, False]
        assert len(stand.daemon.pool) == 2
        assert (await asyncio.to_thread(lambda: [path.parent for path in tmp_path.rglob("one*")])) == [
            stand.auths
        ]
        assert (await browser.look())["is_setup"] is True
        answer = await stand.ask("hello")
        assert answer.status == 200
        no_files: list[Any] = [
            {},
            {"files": []},
            {"files": "x"},
            {"files": [1]},
            {"files": [{"name": "a", "content": 1}]},
        ]
        for wrong in no_files:
            assert (await browser.ask("POST", "/import", wrong))[0] == 400


async def test_a_login_with_a_code_brings_an_account_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def soon(*arguments: Any, **named: Any) -> Any:
        return await device_login(*arguments, **{**named, "sleep": lambda _: asyncio.sleep(0.01)})

    monkeypatch.setattr(logins, "device_login", soon)
    async with page(tmp_path, accounts=1, auths=lambda sim, folder: None) as (stand, browser):
        await browser.look()
        begun = await browser.post("/login")
        assert begun["url"]
        assert (await browser.get(f"/login/{begun['id']}"))["state"] == "waiting"
        stand.sim.approve_device(begun["user_code"])
        await stand.until(lambda: len(stand.daemon.pool) == 1, 15.0)
        told = await browser.get(f"/login/{begun['id']}")
        assert told["state"] == "done"
        assert stand.daemon.pool.by_alias(told["alias"]) is not None


async def test_a_login_can_be_cancelled_and_too_many_are_refused(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (_, browser):
        await browser.look()
        begun = [await browser.post("/login") for _ in range(8)]
        assert (await browser.ask("POST", "/login"))[0] == 429
        status, told, _ = await browser.ask("DELETE", f"/login/{begun[0]['id']}")
        assert (status, told["state"]) == (200, "failed")
        await browser.post("/login")
        assert (await browser.ask("GET", "/login/nothing"))[0] == 404


async def test_a_login_that_the_issuer_refuses_is_told(tmp_path: Path) -> None:
    sim = Simulator(accounts=1)
    async with page(tmp_path, simulator=sim, oauth_issuer="http://127.0.0.1:9") as (_, browser):
        await browser.look()
        status, body, _ = await browser.ask("POST", "/login")
        assert (status, body["error"]["code"]) == (502, "login_failed")


async def test_rounds_are_told_as_they_go(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=2) as (_, browser):
        await browser.look()
        status, raw, _ = await browser.ask("POST", "/check-quota")
        assert status == 200
        told = _named(raw)
        assert [name for name, _ in told] == ["item", "item", "done"]
        assert told[-1][1]["success_count"] == 2


# -- it is in nobody's way ----------------------------------------------------------------


async def test_an_open_page_does_not_hold_the_end_up(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1, drain_timeout=60) as (stand, browser):
        await browser.look()
        async with browser.live("now") as events:
            await anext(events)
            async with asyncio.timeout(10.0), asyncio.TaskGroup() as group:
                _ = group.create_task(stand.daemon.stop())
                assert [name async for name, _ in events][-1] == "end"


async def test_what_is_done_on_the_page_is_told_in_the_audit_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="codex_proxy.audit")
    async with page(tmp_path, accounts=1, api_keys=f"{{laptop: {KEY}}}") as (stand, browser):
        await browser.log_in("wrong-key-of-somebody")
        await browser.log_in(KEY)
        await browser.post(f"/accounts/{alias_of(stand)}/disable")
    lines = [record.getMessage() for record in caplog.records if record.name == "codex_proxy.audit"]
    assert lines[0] == "login refused reason=unknown_key from=127.0.0.1"
    assert lines[1] == "login by=laptop from=127.0.0.1"
    assert re.fullmatch(
        r"page action=disable target=acct-\w+ success=True by=laptop session=session-\w+ from=127.0.0.1",
        lines[2],
    )
    assert not [line for line in lines if KEY in line or "wrong-key" in line]


async def test_the_pages_of_a_list_join_although_more_turns_come_meanwhile(tmp_path: Path) -> None:
    async with page(tmp_path, accounts=1) as (stand, browser):
        await browser.look()
        ids = [(await stand.ask("hello")).headers["x-request-id"] for _ in range(5)]
        first = await browser.get("/requests?limit=2")
        await stand.ask("in between")
        second = await browser.get(f"/requests?limit=2&before={first['next']}")
        third = await browser.get(f"/requests?limit=2&before={second['next']}")
        told = [one["id"] for part in (first, second, third) for one in part["requests"]]
        assert told == ids[::-1]
        assert third["next"] is None
        assert (await browser.ask("GET", "/requests?acount=nobody"))[0] == 400
