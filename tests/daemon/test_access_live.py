"""Who gets in, against the whole proxy: keys, pages that forge requests, every path of every route."""

import asyncio
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from codex_proxy.server.access import Level
from codex_proxy.server.app import ROUTES, Route
from codex_proxy.simulator import Simulator
from tests.harness import STANDARD, Stand, standing
from tests.process import client, run, running, write_config

TURN = {"model": STANDARD, "input": "hi"}
JSON = {"Content-Type": "application/json"}


async def ask(
    session: aiohttp.ClientSession, method: str, path: str, **options: Any
) -> tuple[int, str | None]:
    """Send a request; return the status and the error's code."""
    async with session.request(method, path, **options) as answer:
        text = await answer.text()
        if answer.status < 400:
            return answer.status, None
        return answer.status, (await answer.json())["error"]["code"] if '"error"' in text else None


# --- the generated key


async def test_a_network_address_without_keys_gets_a_generated_one(tmp_path: Path) -> None:
    async with Simulator(1) as sim:
        sim.write_auth_files(tmp_path / "auths")
        config = write_config(tmp_path, sim, listen="0.0.0.0:0", log_level="debug")
        code, _, err = await run("key", "-config", str(config))
        assert code == 1
        assert "no generated key" in err
        async with running(config) as daemon, client(daemon.url) as session:
            code, out, err = await run("key", "-config", str(config))
            key = out.strip()
            assert (code, err) == (0, "")
            assert re.fullmatch(r"cp-[\w-]{43}", key)

            async with session.post("/v1/responses", json=TURN) as answer:
                assert answer.status == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                error = (await answer.json())["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert "`codex-proxy key`" in error["message"]
            for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}):
                assert await ask(session, "POST", "/v1/responses", json=TURN, headers=headers) == (200, None)
                assert await ask(session, "GET", "/stats", headers=headers) == (200, None)
            for wrong in (f"Bearer {key}x", f"Bearer {key[:-1]}", f"Basic {key}", "Bearer", key):
                headers = {"Authorization": wrong}
                assert (await ask(session, "GET", "/stats", headers=headers))[0] == 401, wrong
            assert await ask(session, "GET", "/health") == (200, None)
            assert await daemon.stop() == 0

        file = tmp_path / "data" / "client-key"
        assert file.read_text(encoding="ascii") == key + "\n"
        assert file.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "data").stat().st_mode & 0o077 == 0
        assert str(file) in daemon.log
        assert key not in daemon.log
        assert key[3:] not in daemon.log

        # The key stays: clients are not locked out by a restart.
        async with running(config) as daemon, client(daemon.url) as session:
            headers = {"x-api-key": key}
            assert await ask(session, "GET", "/stats", headers=headers) == (200, None)
            assert key not in daemon.log


async def test_keys_of_the_configuration_open_everything_and_nothing_else_does(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, api_keys='[{anna: "key-of-anna-1"}]') as stand:
        for path in ("/stats", "/v1/models"):
            assert await ask(stand.session, "GET", path) == (401, "invalid_api_key")
            headers = {"x-api-key": "key-of-anna-1"}
            assert await ask(stand.session, "GET", path, headers=headers) == (200, None)
        async with stand.session.post("/v1/responses", json=TURN) as answer:
            text = await answer.text()
            assert answer.status == 401
        assert "api-keys" in text
        assert "codex-proxy key" not in text
        assert not stand.sim.requests


# --- without a key, on loopback


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Origin": "https://evil.example"}, 403, "forbidden_origin"),
        ({"Origin": "null"}, 403, "forbidden_origin"),
        ({"Sec-Fetch-Site": "cross-site"}, 403, "forbidden_origin"),
        ({"Sec-Fetch-Site": "same-site"}, 403, "forbidden_origin"),
        ({"Host": "evil.example"}, 403, "forbidden_host"),
        ({"Host": "127.0.0.1.evil.example"}, 403, "forbidden_host"),
        ({"Content-Type": "text/plain"}, 415, "unsupported_content_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_content_type"),
    ],
)
async def test_what_a_page_could_forge_is_refused(
    headers: dict[str, str], status: int, code: str, tmp_path: Path
) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        body = b'{"model":"%s","input":"hi"}' % STANDARD.encode()
        for path in ("/v1/responses", "/refresh", "/check-quota"):
            found = await ask(stand.session, "POST", path, data=body, headers={**JSON, **headers})
            assert found == (status, code), path
        if "Content-Type" not in headers:
            assert await ask(stand.session, "GET", "/stats", headers=headers) == (status, code)
        assert not stand.sim.requests


async def test_a_client_on_this_machine_needs_nothing(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        port = stand.daemon.port
        for headers in (
            {},
            {"Authorization": "Bearer whatever-the-sdk-wants"},
            {"Host": f"localhost:{port}"},
            {"Host": "[::1]"},
            {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"},
        ):
            found = await ask(stand.session, "POST", "/v1/responses", json=TURN, headers=headers)
            assert found == (200, None), headers


@pytest.mark.parametrize("path", ["/refresh", "/check-quota"])
async def test_curl_without_a_body_works(path: str, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=2) as stand:
        for body in (b"", b"Content-Length: 0\r\n"):
            # What `curl -X POST` sends: neither a body nor a content type.
            reader, writer = await asyncio.open_connection("127.0.0.1", stand.daemon.port)
            writer.write(
                f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{stand.daemon.port}\r\nUser-Agent: curl/8.5.0\r\n".encode()
                + b"Accept: */*\r\nConnection: close\r\n"
                + body
                + b"\r\n"
            )
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.count(b"event: item") == 2
            assert answer.count(b"event: done") == 1


# --- every path of every route

CHAT: dict[str, Any] = {"model": STANDARD, "messages": [{"role": "user", "content": "hi"}]}
FOR_CODEX = ("responses", "alpha", "images", "models")

ASK: dict[str, tuple[dict[str, Any], int]] = {
    "health": ({}, 200),
    "livez": ({}, 200),
    "readyz": ({}, 200),
    "stats": ({}, 200),
    "accounts": ({}, 200),
    "why": ({}, 404),
    "metrics": ({}, 200),
    "requests": ({}, 200),
    "request": ({}, 404),
    "requests_live": ({}, 200),
    "refresh": ({}, 200),
    "check_quota": ({}, 200),
    "usage": ({}, 200),
    "responses": ({"json": TURN}, 200),
    "responses_socket": ({}, 426),
    "compact": ({"json": {**TURN, "input": []}}, 200),
    "input_tokens": ({"json": TURN}, 200),
    "alpha_search": ({"json": {"commands": {}}}, 200),
    "images_generations": ({"json": {"model": "gpt-image-2", "prompt": "a cat"}}, 200),
    "images_edits": ({"json": {"model": "gpt-image-2", "prompt": "a cat"}}, 200),
    "chat": ({"json": CHAT}, 200),
    "completions": ({"json": {"model": STANDARD, "prompt": "hi"}}, 200),
    "engine_completions": ({"json": {"prompt": "hi"}}, 200),
    "edits": ({"json": {"model": STANDARD, "instruction": "shorten"}}, 200),
    "embeddings": ({"json": {"model": STANDARD, "input": "hi"}}, 404),
    "messages": ({"json": {**CHAT, "max_tokens": 100}}, 200),
    "count_tokens": ({"json": CHAT}, 200),
    "hello": ({}, 200),
    "models": ({}, 200),
    "model": ({}, 200),
}


def prefixes(route: Route) -> list[str]:
    """Return the base URLs under which people ask, written out: not as the table makes them."""
    if not route.path.startswith("/v1/"):
        return [route.path]
    rest = route.path.removeprefix("/v1")
    found = [f"/v1{rest}", rest, f"/v1/v1{rest}", f"/v1{rest}/", f"//v1{rest}"]
    return [*found, f"/backend-api/codex{rest}"] if rest.strip("/").startswith(FOR_CODEX) else found


async def served(stand: Stand, route: Route, path: str) -> tuple[int, bytes]:
    options, _ = ASK[route.handler]
    url = URL(stand.url + path.replace("{model}", STANDARD).replace("{engine}", STANDARD), encoded=True)
    async with stand.session.request(route.method, url, **options) as answer:
        is_endless = route.handler == "requests_live" and answer.status == 200
        return answer.status, b"" if is_endless else await answer.read()


async def test_every_route_answers_under_every_base_url(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        assert {route.handler for route in ROUTES} == ASK.keys()
        for route in ROUTES:
            # The owner's own rounds go once over all accounts; two routes, no aliases.
            for path in prefixes(route):
                status, body = await served(stand, route, path)
                assert status == ASK[route.handler][1], f"{route.method} {path}: {status} {body[:200]!r}"


async def test_no_route_but_the_public_ones_answers_without_a_key(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, api_keys="[some-client-key-1]") as stand:
        for route in ROUTES:
            for path in prefixes(route):
                status, _ = await served(stand, route, path)
                assert status == (200 if route.level is Level.PUBLIC else 401), f"{route.method} {path}"
        assert not stand.sim.requests


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("GET", "/nothing", 404, "unknown_url", None),
        ("GET", "/v2/responses", 404, "unknown_url", None),
        ("POST", "/v1/embeddings", 404, "model_not_found", None),
        ("POST", "/v1/v1/v1/responses", 404, "unknown_url", None),
        ("GET", "/stats/../etc", 404, "unknown_url", None),
        ("GET", "/v1/../stats%2e", 404, "unknown_url", None),
        ("PUT", "/v1/responses", 405, "method_not_allowed", "GET, HEAD, POST"),
        ("GET", "/refresh", 405, "method_not_allowed", "POST"),
        ("POST", "/stats", 405, "method_not_allowed", "GET, HEAD"),
        ("DELETE", "/v1/models", 405, "method_not_allowed", "GET, HEAD"),
        ("OPTIONS", "/v1/responses", 405, "method_not_allowed", "GET, HEAD, POST"),
        ("PROPFIND", "/health", 405, "method_not_allowed", "GET, HEAD"),
    ],
)
async def test_what_is_not_served_is_said_in_json(
    method: str, path: str, status: int, code: str, allow: str | None, tmp_path: Path
) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        url = URL(stand.url + path, encoded=True)
        async with stand.session.request(method, url) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["type"]) == (status, code, "invalid_request_error")
            assert answer.headers.get("allow") == allow
            assert "access-control-allow-origin" not in answer.headers
