"""The gateway on the whole daemon: who may do what over HTTP, on the page and on the control socket."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from codex_proxy.server.access import Level
from codex_proxy.server.app import ACCOUNT_ROUTES, ROUTES, UI_ROUTES, Route
from codex_proxy.server.gateway.holding import HOLDER_ROUTES
from codex_proxy.server.gateway.routes import GATEWAY_ROUTES, GATEWAY_UI_ROUTES
from tests.daemon.test_page import Browser
from tests.harness import Stand, standing
from tests.server.desks import DOCUMENT, holds

ADMIN = "admin-key-0123456789"
OWNER = {"Authorization": f"Bearer {ADMIN}"}
CLIENT = "client-key-of-the-config"

EVERY_ROUTE = (
    *ROUTES,
    *ACCOUNT_ROUTES,
    *UI_ROUTES,
    *GATEWAY_ROUTES,
    *GATEWAY_UI_ROUTES,
    *HOLDER_ROUTES,
)


class Gateway:
    """A daemon with a ledger, and its owner."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand

    async def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        async with self.stand.session.request(
            method, f"/api/admin{path}", json=body, headers=OWNER if headers is None else headers
        ) as answer:
            raw = await answer.read()
            kind = answer.content_type
            return answer.status, json.loads(raw) if kind == "application/json" else raw.decode()

    async def do(self, method: str, path: str, body: Any = None) -> Any:
        status, answer = await self.ask(method, path, body)
        assert status < 300, answer
        return answer

    async def usage(self, count: int) -> list[Any]:
        """Wait until so many turns are settled, and return them."""
        for _ in range(500):
            rows = (await self.do("GET", "/usage"))["usage"]
            if len(rows) >= count:
                return list(rows)
            await asyncio.sleep(0.01)
        raise AssertionError(f"{count} turns were to be settled")

    async def key(self, name: str = "laptop", dollars: str = "5", **fields: Any) -> Any:
        """Make a user with money, and a key."""
        user = await self.do("POST", "/users", {"name": f"user of {name}"})
        if dollars:
            paid = {"amount": dollars, "reason": "to begin with", "idempotency_key": name}
            await self.do("POST", f"/users/{user['id']}/credit", paid)
        return await self.do("POST", "/keys", {"user": user["id"], "name": name, **fields})


@contextlib.asynccontextmanager
async def gateway(folder: Path, ledger: str = "billing", **settings: Any) -> AsyncIterator[Gateway]:
    values: dict[str, Any] = {"accounts": 1, "admin_key": ADMIN, "ledger": ledger, **settings}
    async with standing(folder, **values) as stand:
        yield Gateway(stand)


@contextlib.asynccontextmanager
async def browser(gate: Gateway, key: str) -> AsyncIterator[Browser]:
    """Log in on the page."""
    visitor = Browser(gate.stand.url)
    try:
        assert await visitor.log_in(key) == 200
        yield visitor
    finally:
        await visitor.session.close()


def filled(route: Route) -> str:
    """Return a path of a route."""
    return route.path.replace("{", "").replace("}", "")


# -- who may ask --------------------------------------------------------------------------


async def test_the_admin_api_opens_to_the_admin_key_alone(tmp_path: Path) -> None:
    async with gateway(tmp_path, api_keys=f"[{CLIENT}]") as gate:
        made = await gate.key()
        for headers in (
            {},
            {"Authorization": f"Bearer {CLIENT}"},
            {"Authorization": f"Bearer {made['secret']}"},
        ):
            for route in GATEWAY_ROUTES:
                path = filled(route).removeprefix("/api/admin")
                status, answer = await gate.ask(
                    route.method, path, {} if route.method == "POST" else None, headers
                )
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), route
                holds({"$ref": "#/components/schemas/Error"}, answer)
        # Also by the other header.
        assert (await gate.ask("GET", "/users", None, {"x-api-key": ADMIN}))[0] == 200


async def test_without_an_admin_key_nobody_changes_money_over_the_network(tmp_path: Path) -> None:
    async with gateway(tmp_path, admin_key='""', api_keys=f"[{CLIENT}]") as gate:
        for headers in ({}, {"Authorization": f"Bearer {CLIENT}"}):
            status, answer = await gate.ask("GET", "/users", None, headers)
            assert (status, answer["error"]["code"]) == (403, "admin_key_needed")


async def test_with_the_ledger_off_it_says_what_to_set(tmp_path: Path) -> None:
    async with gateway(tmp_path, "off") as gate:
        status, answer = await gate.ask("GET", "/users")
        assert (status, answer["error"]["code"]) == (404, "ledger_off")
        assert await gate.do("GET", "/upstreams") == {"upstreams": [], "can_add": False}
        status, answer = await gate.ask("POST", "/upstreams", {"name": "a", "base_url": "http://127.0.0.1:1"})
        assert (status, answer["error"]["code"]) == (404, "ledger_off")
        assert (await gate.do("POST", "/upstreams/health/check"))["results"] == []
        assert not (gate.stand.folder / "data" / "ledger.db").exists()


async def test_what_is_wrong_is_told_as_everywhere_here(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        status, answer = await gate.ask("POST", "/users", {"name": "a", "limits": {"rpm": 1}})
        assert (status, answer["error"]["param"], answer["error"]["type"]) == (
            400,
            "limits.rpm",
            "invalid_request_error",
        )
        holds({"$ref": "#/components/schemas/Error"}, answer)
        status, answer = await gate.ask("POST", "/users", {"name": "a" * 300_000})
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
        async with gate.stand.session.post("/api/admin/users", data=b"name=a", headers=OWNER) as said:
            assert said.status == 415
        status, answer = await gate.ask("DELETE", "/users")
        assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
        assert (await gate.do("GET", "/openapi.json")) == json.loads(json.dumps(DOCUMENT))


async def test_commands_reach_it_on_the_control_socket_without_a_key(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        path = str(gate.stand.folder / "data" / "control.sock")
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session,
            session.post("http://daemon/api/admin/users", json={"name": "ann"}) as answer,
        ):
            assert answer.status == 201
        (row,) = (await gate.do("GET", "/audit"))["entries"]
        assert (row["actor"], row["action"]) == ("control socket", "user.create")


# -- keys at work -------------------------------------------------------------------------


async def test_a_key_that_was_made_here_asks_pays_and_ends(tmp_path: Path) -> None:
    async with gateway(tmp_path, records="on") as gate:
        made = await gate.key(limits={"models": ["gpt-5*"]})
        me = {"Authorization": f"Bearer {made['secret']}"}
        answer = await gate.stand.ask("hello", headers=me)
        assert answer.status == 200
        (row,) = await gate.usage(1)
        assert (row["key"], row["user"], row["request_id"]) == (
            "laptop",
            "user of laptop",
            answer.headers["x-request-id"],
        )
        user = await gate.do("GET", f"/users/{row['user_id']}")
        assert float(user["balance"]) == pytest.approx(5 - float(row["cost"]))
        assert user["held"] == "0.00"
        # One request's story has what it cost.
        told = (await gate.stand.get(f"/requests/{row['request_id']}", headers=OWNER)).json
        assert told["ledger"]["cost"] == row["cost"]
        assert told["ledger"]["attempts"][0]["outcome"] == "ok"
        await gate.do("POST", f"/keys/{made['key']['id']}/revoke")
        assert (await gate.stand.ask("again", headers=me)).status == 401
        assert await gate.do("POST", "/ledger/check") == {"ok": True, "problems": []}


async def test_a_key_of_the_configuration_is_told_by_its_name(tmp_path: Path) -> None:
    async with gateway(tmp_path, "personal", api_keys=f"[{{alice: {CLIENT}}}]") as gate:
        await gate.stand.ask("hello", headers={"Authorization": f"Bearer {CLIENT}"})
        (row,) = await gate.usage(1)
        assert (row["user"], row["key"], row["is_billed"]) == ("owner", "alice", False)


async def test_two_who_pay_at_once_pay_once(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        user = await gate.do("POST", "/users", {"name": "ann"})
        paid = {"amount": "3", "reason": "twice pressed", "idempotency_key": "one"}
        path = f"/users/{user['id']}/credit"
        answers = await asyncio.gather(*(gate.do("POST", path, paid) for _ in range(20)))
        assert {one["id"] for one in answers} == {answers[0]["id"]}
        for other in ({"amount": "4"}, {"reason": "something else"}):
            status, answer = await gate.ask("POST", path, paid | other)
            assert (status, answer["error"]["code"]) == (409, "idempotency_conflict")
        assert (await gate.do("GET", f"/users/{user['id']}"))["balance"] == "3.00"


async def test_the_log_says_who_did_what_and_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with upstream() as url, gateway(tmp_path, log_level="debug") as gate:
        made = await gate.key()
        rotated = await gate.do("POST", f"/keys/{made['key']['id']}/rotate", {"grace_seconds": 60})
        await gate.do("POST", "/upstreams", {"name": "far", "base_url": url, "api_key": UPSTREAM_KEY})
        await gate.ask("POST", "/upstreams", {"name": "far", "base_url": url, "api_key": UPSTREAM_KEY})
        await gate.do("POST", "/upstreams/health/check")
        async with browser(gate, rotated["secret"]) as holder:
            await holder.get("/own")
        told = [record.getMessage() for record in caplog.records if record.name == "codex_proxy.audit"]
        assert (
            f"gateway action=rotate-key target={made['key']['id']} success=True by=admin from=127.0.0.1"
            in told
        )
        assert "gateway action=add-upstream target=- success=False by=admin from=127.0.0.1" in told
        assert "login by=laptop from=127.0.0.1" in told
        for secret in (made["secret"], rotated["secret"], UPSTREAM_KEY, ADMIN):
            assert secret not in caplog.text


# -- the page -----------------------------------------------------------------------------


async def test_the_page_of_an_owner_has_it_all(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate, browser(gate, ADMIN) as owner:
        session = await owner.look()
        assert (session["role"], session["ledger"]) == ("owner", "billing")
        status, user, headers = await owner.ask("POST", "/admin/users", {"name": "ann"})
        assert (status, user["name"]) == (201, "ann")
        assert headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        status, _, headers = await owner.ask("GET", "/admin/usage.csv")
        assert (status, headers["Content-Disposition"]) == (200, 'attachment; filename="usage.csv"')
        assert headers["Content-Type"].startswith("text/csv")
        (row,) = (await owner.get("/admin/audit"))["entries"]
        assert row["actor"] == "admin"
        # What changes something is signed by our page.
        owner.csrf = "0" * 64
        status, answer, _ = await owner.ask("POST", "/admin/users", {"name": "bob"})
        assert (status, answer["error"]["code"]) == (403, "forged_request")


async def test_every_route_of_the_page_needs_a_session(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        visitor = Browser(gate.stand.url)
        for route in EVERY_ROUTE:
            if route.level in (Level.SESSION, Level.VISITOR):
                status, answer, _ = await visitor.ask(route.method, filled(route).removeprefix("/ui/api"))
                assert (status, answer["error"]["code"]) == (401, "no_session"), route
        await visitor.session.close()


async def test_the_holder_of_a_key_opens_nothing_of_the_owners(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        made = await gate.key()
        async with browser(gate, made["secret"]) as holder:
            seen = set()
            for route in EVERY_ROUTE:
                if not route.path.startswith("/ui/api/") or route.level is Level.PUBLIC:
                    continue
                seen.add(route.level)
                if route.level is Level.VISITOR:
                    continue
                body: Any = {} if route.method in ("POST", "PATCH") else None
                status, answer, _ = await holder.ask(
                    route.method, filled(route).removeprefix("/ui/api"), body
                )
                assert (status, answer["error"]["code"]) == (403, "owner_needed"), route
            assert seen == {Level.SESSION, Level.VISITOR}
            # Its cookie is good for nothing outside of the page.
            cookie = {"Cookie": "; ".join(f"{one.key}={one.value}" for one in holder.session.cookie_jar)}
            for route in EVERY_ROUTE:
                if route.level in (Level.OWNER, Level.ADMIN):
                    async with gate.stand.session.request(
                        route.method, filled(route), headers=cookie
                    ) as said:
                        assert said.status == 401, route


async def test_the_holder_of_a_key_sees_its_own(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        mine = await gate.key(
            "mine", limits={"budgets": [{"window": "day", "amount": "2"}], "models": ["gpt-5.5"]}
        )
        theirs = await gate.key("theirs")
        for made in (mine, theirs, theirs):
            answer = await gate.stand.ask("hello", headers={"Authorization": f"Bearer {made['secret']}"})
            assert answer.status == 200
        await gate.usage(3)
        async with browser(gate, mine["secret"]) as holder:
            session = await holder.look()
            assert (session["role"], session["needs_key"]) == ("holder", True)
            told = await holder.get("/own")
            holds({"$ref": "#/components/schemas/Key"}, told["key"])
            assert (told["key"]["name"], told["total"]["turns"]) == ("mine", 1)
            assert (
                told["user"]["balance"]
                == (await gate.do("GET", f"/users/{mine['key']['user_id']}"))["balance"]
            )
            (budget,) = told["budgets"]
            assert (budget["of"], budget["amount"], budget["spent"]) == ("key", "2.00", told["total"]["cost"])
            assert [one["model"] for one in told["models"]] == ["gpt-5.5"]
            (row,) = (await holder.get("/own/usage"))["usage"]
            # Which account served is none of its business.
            assert (row["key"], row["target"], row["upstream"]) == ("mine", "", "")
            setup = await holder.get("/own/setup")
            assert (setup["models"], setup["needs_key"]) == (["gpt-5.5"], True)
            everything = json.dumps([told, row, setup])
            for secret in (
                "theirs",
                theirs["key"]["id"],
                mine["secret"],
                gate.stand.daemon.pool.accounts()[0].alias,
            ):
                assert secret not in everything
            status, answer, _ = await holder.ask("GET", "/own/usage?limit=0")
            assert (status, answer["error"]["param"]) == (400, "limit")
            assert (await holder.ask("DELETE", "/session"))[0] == 200
            assert (await holder.ask("GET", "/own"))[0] == 401


async def test_an_owner_has_no_page_of_a_key(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate, browser(gate, ADMIN) as owner:
        for path in ("/own", "/own/usage", "/own/setup", "/own/live"):
            status, answer, _ = await owner.ask("GET", path)
            assert (status, answer["error"]["code"]) == (401, "no_client_key")


async def test_a_key_that_ends_ends_its_page_within_a_second(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        made = await gate.key()
        async with browser(gate, made["secret"]) as holder:
            response = await holder.session.get("/ui/api/own/live", headers=holder.headers)
            assert (await response.content.readuntil(b"\n\n")).startswith(b"event: own")
            began = asyncio.get_running_loop().time()
            await gate.do("POST", f"/keys/{made['key']['id']}/revoke")
            rest = await response.content.read()
            assert asyncio.get_running_loop().time() - began < 1.0
            assert rest.endswith(b"event: end\ndata: {}\n\n")
            status, answer, _ = await holder.ask("GET", "/own")
            assert (status, answer["error"]["code"]) == (401, "no_session")
            assert await holder.log_in(made["secret"]) == 401


@pytest.mark.parametrize(
    "change",
    [
        ("key", {"expires_at": "2020-01-01T00:00:00Z"}),
        ("user", {"status": "suspended"}),
        ("key", {"limits": {"networks": ["192.0.2.0/24"]}}),
        ("user", {"limits": {"networks": ["192.0.2.0/24"]}}),
    ],
    ids=["expired", "suspended", "from elsewhere", "user from elsewhere"],
)
async def test_a_key_that_may_not_ask_has_no_page(tmp_path: Path, change: tuple[str, Any]) -> None:
    async with gateway(tmp_path) as gate:
        made = await gate.key()
        async with browser(gate, made["secret"]) as holder:
            kind, body = change
            path = f"/keys/{made['key']['id']}" if kind == "key" else f"/users/{made['key']['user_id']}"
            await gate.do("PATCH", path, body)
            assert (await holder.ask("GET", "/own"))[0] == 401
            assert await holder.log_in(made["secret"]) == 401


async def test_sessions_of_holders_outlive_the_daemon(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        made = await gate.key()
        async with browser(gate, made["secret"]) as holder:
            cookies = {one.key: one.value for one in holder.session.cookie_jar}
    kept = (tmp_path / "data" / "sessions.json").read_text(encoding="utf-8")
    assert made["secret"] not in kept
    async with gateway(tmp_path) as gate:
        visitor = Browser(gate.stand.url)
        visitor.session.cookie_jar.update_cookies(cookies)
        assert (await visitor.look())["role"] == "holder"
        await visitor.session.close()


async def test_addresses_that_people_know_lead_to_the_page(tmp_path: Path) -> None:
    async with gateway(tmp_path, "off") as gate:
        for path, place in (
            ("/admin/upstreams", "/ui#/gateway/upstreams"),
            ("/admin//upstreams/", "/ui#/gateway/upstreams"),
            ("/admin/settings", "/ui#/setup"),
            ("/dashboard", "/ui"),
        ):
            async with gate.stand.session.get(path, allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (302, place)


# -- upstreams ----------------------------------------------------------------------------

UPSTREAM_KEY = "sk-of-the-upstream-0123"


@contextlib.asynccontextmanager
async def upstream(key: str = UPSTREAM_KEY) -> AsyncIterator[str]:
    """Serve a list of models to whoever has the key."""

    async def models(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": {"message": "no such key"}}, status=401)
        return web.json_response({"object": "list", "data": [{"id": "far-model"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_an_upstream_is_added_checked_changed_and_removed(tmp_path: Path) -> None:
    async with upstream() as url, gateway(tmp_path) as gate:
        added = await gate.do(
            "POST",
            "/upstreams",
            {
                "name": "far",
                "base_url": f"{url}/v1",
                "api_key": UPSTREAM_KEY,
                "weight": 0.5,
                "models": ["gpt-5*", {"mine": "far-model"}],
            },
        )
        holds({"$ref": "#/components/schemas/Upstream"}, added)
        assert (added["base_url"], added["effective_url"], added["has_key"], added["is_editable"]) == (
            url,
            f"{url}/v1",
            True,
            True,
        )
        assert added["models"] == ["gpt-5*", {"mine": "far-model"}]
        checked = await gate.do("POST", "/upstreams/health/check")
        holds({"$ref": "#/components/schemas/HealthCheck"}, checked)
        assert (checked["checked"], checked["total"], checked["results"][0]["state"]) == (1, 1, "normal")
        # As the Codex Gateway has it.
        assert (await gate.do("POST", "/codex/upstreams/health/check"))["results"][0]["name"] == "far"
        assert (await gate.do("GET", "/codex/upstreams/health"))["results"][0]["state"] == "normal"
        assert (await gate.ask("POST", "/upstreams", {"name": "far", "base_url": url}))[0] == 409
        changed = await gate.do("PATCH", "/upstreams/far", {"priority": 3, "api_key": "sk-wrong"})
        assert (changed["priority"], changed["weight"], changed["models"]) == (
            3,
            0.5,
            ["gpt-5*", {"mine": "far-model"}],
        )
        bad = await gate.do("POST", "/upstreams/far/check")
        assert (bad["state"], bad["status"], bad["standing"]) == ("abnormal", 401, "disabled")
        # Nor does a server that is put in its place.
        status, answer = await gate.ask("PATCH", "/upstreams/far", {"base_url": "http://127.0.0.1:9"})
        assert (status, answer["error"]["param"]) == (400, "api_key")
        # Nothing tells the key again.
        told = json.dumps([
            await gate.do("GET", "/upstreams"),
            await gate.do("GET", "/audit"),
            added,
            changed,
        ])
        assert UPSTREAM_KEY not in told
        assert "sk-wrong" not in told
        assert [one["action"] for one in (await gate.do("GET", "/audit", None))["entries"]] == [
            "upstream.update",
            "upstream.add",
        ]
        moved = await gate.do(
            "PATCH", "/upstreams/far", {"base_url": "http://127.0.0.1:9", "api_key": "sk-other"}
        )
        assert moved["base_url"] == "http://127.0.0.1:9"
        file = gate.stand.folder / "data" / "ledger.db"
        assert (await asyncio.to_thread(file.stat)).st_mode & 0o077 == 0
        await gate.do("DELETE", "/upstreams/far")
        assert (await gate.do("GET", "/upstreams"))["upstreams"] == []
        assert (await gate.ask("DELETE", "/upstreams/far"))[0] == 404


async def test_an_upstream_that_was_added_is_there_after_a_restart(tmp_path: Path) -> None:
    async with upstream() as url:
        async with gateway(tmp_path) as gate:
            await gate.do("POST", "/upstreams", {"name": "far", "base_url": url, "api_key": UPSTREAM_KEY})
        async with gateway(tmp_path) as gate:
            assert (await gate.do("POST", "/upstreams/far/check"))["state"] == "normal"
        # The configuration comes first.
        mine = f'[{{name: far, base-url: "{url}", api-key: sk-other}}]'
        async with gateway(tmp_path, upstreams=mine) as gate:
            (one,) = (await gate.do("GET", "/upstreams"))["upstreams"]
            assert one["is_editable"] is False
            for method, body in (("PATCH", {"priority": 1}), ("DELETE", None)):
                status, answer = await gate.ask(method, "/upstreams/far", body)
                assert (status, answer["error"]["code"]) == (409, "read_only")


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"name": "a b", "base_url": "http://127.0.0.1:1"}, "name"),
    ({"name": "health", "base_url": "http://127.0.0.1:1"}, "name"),
    ({"name": "a", "base_url": "ftp://127.0.0.1"}, "base_url"),
    ({"name": "a", "base_url": "http://169.254.169.254/v1"}, "base_url"),
    ({"name": "a", "base_url": "http://metadata.google.internal"}, "base_url"),
    ({"name": "a", "base_url": "http://127.0.0.1:1", "api_key": "two words"}, "api_key"),
    ({"name": "a", "base_url": "http://127.0.0.1:1", "api_key_file": "/etc/passwd"}, "api_key_file"),
    ({"name": "a", "base_url": "http://127.0.0.1:1", "weight": 0}, "weight"),
    ({"name": "a", "base_url": "http://127.0.0.1:1", "timeout": -1}, "timeout"),
    ({"name": "a", "base_url": "http://127.0.0.1:1", "max_retries": 100}, "max_retries"),
    ({"name": "a", "base_url": "http://127.0.0.1:1", "capabilities": ["video"]}, "capabilities.0"),
    ({"name": "a", "base_url": "http://127.0.0.1:1", "capabilities": []}, "capabilities"),
    ({"name": "a", "base_url": "http://127.0.0.1:1", "models": [{"a": 1}]}, "models.0"),
    ({"base_url": "http://127.0.0.1:1"}, "name"),
]


async def test_an_upstream_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        for body, param in MISFITS:
            status, answer = await gate.ask("POST", "/upstreams", body)
            assert (status, (answer["error"]["param"] or "").removesuffix(".a")) == (400, param), body
            assert "two words" not in answer["error"]["message"]
        assert (await gate.do("GET", "/upstreams"))["upstreams"] == []


async def test_a_change_does_not_bring_back_an_upstream_that_was_removed_at_the_same_time(
    tmp_path: Path,
) -> None:
    async with upstream() as url, gateway(tmp_path) as gate:
        await gate.do("POST", "/upstreams", {"name": "far", "base_url": url})
        answers = await asyncio.gather(
            gate.ask("DELETE", "/upstreams/far"), gate.ask("PATCH", "/upstreams/far", {"priority": 3})
        )
        assert answers[0][0] == 200
        assert answers[1][0] in (200, 404)
        assert (await gate.do("GET", "/upstreams"))["upstreams"] == []


async def test_a_moment_before_all_is_refused_by_its_own_name(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        made = await gate.key()
        for at in ("1970-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00"):
            status, answer = await gate.ask("PATCH", f"/keys/{made['key']['id']}", {"expires_at": at})
            assert (status, answer["error"]["param"]) == (400, "expires_at")
