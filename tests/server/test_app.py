"""Routes, aliases, refusals and the one place where errors become answers, over real sockets."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from codex_proxy.config import ApiKey, Live, Settings
from codex_proxy.errors import KeyRefused, PoolShortage, ProxyError, RequestError
from codex_proxy.protocol.responses import render_error
from codex_proxy.protocol.wire import dumps
from codex_proxy.server.access import Access, Level
from codex_proxy.server.app import (
    IS_CODEX_PATH,
    ROUTE,
    ROUTES,
    SERVER_OPTIONS,
    Route,
    Takes,
    build_app,
)
from codex_proxy.server.body import read_body
from codex_proxy.server.front import CALLER, REQUEST_ID, Handler

KEY = "key-of-alice"
KEYED = Settings(listen=":8080", api_keys=(ApiKey.of("alice", KEY),))
KEYLESS = Settings(listen="127.0.0.1:8080")
ME = {"Authorization": f"Bearer {KEY}"}


def other(error: ProxyError, *, request_id: str) -> tuple[int, dict[str, str], bytes]:
    return error.status, {}, dumps({"type": "error", "request_id": request_id})


class Answer:
    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str]:
        return self.status, self.json["error"]["code"]


class Place:
    """A served application; `port` for those who speak HTTP by hand."""

    def __init__(self, port: int, session: aiohttp.ClientSession) -> None:
        self.port = port
        self._session = session

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        url = URL(f"http://127.0.0.1:{self.port}{path}", encoded=True)
        async with self._session.request(method, url, **options) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def say(self, data: bytes) -> bytes:
        """Send *data* and return all that comes until the connection closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            return await asyncio.wait_for(reader.read(), 5)
        finally:
            writer.close()


@asynccontextmanager
async def served(
    handlers: Mapping[str, Handler] | None = None,
    routes: tuple[Route, ...] = ROUTES,
    settings: Settings = KEYED,
    **options: Any,
) -> AsyncIterator[Place]:
    found = dict(handlers or {})
    for route in routes:
        found.setdefault(route.handler, tell)
    app = build_app(
        Access(Live(settings)), found, {"openai": render_error, "anthropic": other, "other": other}, routes
    )
    runner = web.ServerRunner(app.server(**{**SERVER_OPTIONS, "lingering_time": 0.02, **options}))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Place(runner.addresses[0][1], session)
    finally:
        await runner.cleanup()


async def tell(request: web.Request) -> web.StreamResponse:
    """Say which route was found, and with what."""
    caller = request.get(CALLER)
    return web.json_response({
        "route": f"{request[ROUTE].method} {request[ROUTE].path}",
        "codex": request[IS_CODEX_PATH],
        "caller": None if caller is None else caller.name,
        "model": request.match_info.get("model"),
        "id": request[REQUEST_ID],
    })


def one(handler: Handler, **options: Any) -> dict[str, Any]:
    """Return what `served` needs for one public route at /do."""
    route = Route("POST", "/do", "do", Level.PUBLIC, **options)
    return {"handlers": {"do": handler}, "routes": (route,)}


# --- the table


def test_only_liveness_is_public() -> None:
    public = {route.path for route in ROUTES if route.level is Level.PUBLIC}
    assert public == {"/health", "/livez", "/readyz", "/", "/api/hello"}


def test_what_shows_or_moves_accounts_is_the_owners() -> None:
    owned = {(route.method, route.path) for route in ROUTES if route.level is Level.OWNER}
    assert owned == {
        ("GET", "/stats"),
        ("GET", "/accounts"),
        ("GET", "/requests"),
        ("GET", "/requests/live"),
        ("GET", "/requests/{request_id}"),
        ("GET", "/why/{request_id}"),
        ("POST", "/refresh"),
        ("POST", "/check-quota"),
    }


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_route_that_is_not_public_asks_for_a_key(route: Route) -> None:
    async with served() as place:
        for path in route.paths:
            path = path.replace("{model}", "gpt-5")
            refused = await place.ask(route.method, path)
            if route.level is Level.PUBLIC:
                assert refused.json["caller"] is None
                continue
            if route.dialect == "anthropic":
                assert (refused.status, refused.json["type"]) == (401, "error")
            else:
                assert refused.error == (401, "invalid_api_key")
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            answer = (await place.ask(route.method, path, headers=ME)).json
            assert answer["route"] == f"{route.method} {route.path}"
            assert answer["caller"] == "alice"


def test_a_table_that_does_not_fit_its_handlers_is_refused() -> None:
    access, renderers = Access(Live(KEYED)), {"openai": render_error, "anthropic": other}
    row = Route("GET", "/a", "a")
    build_app(access, {"a": tell}, renderers, [row])
    for handlers, routes, words in (
        ({}, [row], "no handler 'a'"),
        ({"a": tell, "b": tell}, [row], r"without a route: \['b'\]"),
        ({"a": tell}, [row, row], "two routes claim GET /a"),
        ({"a": tell}, [replace(row, path="/v1/x"), replace(row, path="/x")], "two routes claim GET /x"),
        ({"a": tell}, [replace(row, dialect="other")], "no renderer"),
    ):
        with pytest.raises(ValueError, match=words):
            build_app(access, handlers, renderers, routes)


# --- paths


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses", "/responses", "/v1/v1/responses", "/backend-api/codex/responses",
        "/v1/responses/", "/responses//", "//v1/responses", "/v1//responses", "//v1//v1/responses",
        "/v1/responses?api-version=1", "/%761/responses", "//backend-api//codex/responses",
    ],
)  # fmt: skip
async def test_base_urls_of_every_habit_work(path: str) -> None:
    async with served() as place:
        answer = await place.ask("POST", path, headers=ME, json={})
    assert answer.json["route"] == "POST /v1/responses"
    assert answer.json["codex"] is ("backend-api" in path)


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/models/gpt-5.4-high", "gpt-5.4-high"),
        ("/models/gpt-5/", "gpt-5"),
        ("/v1/v1/models/gpt-5", "gpt-5"),
        ("/backend-api/codex/models/gpt-5", "gpt-5"),
        ("/v1/models/openai/gpt-5", "openai/gpt-5"),
        ("/v1/models/openai%2Fgpt-5", "openai/gpt-5"),
        ("/v1/models/a%20b", "a b"),
    ],
)
async def test_an_open_segment_takes_what_is_left(path: str, model: str) -> None:
    async with served() as place:
        answer = (await place.ask("GET", path, headers=ME)).json
    assert answer["route"] == "GET /v1/models/{model}"
    assert answer["model"] == model


async def test_an_open_segment_is_never_empty() -> None:
    async with served() as place:
        assert (await place.ask("GET", "/v1/models/", headers=ME)).json["route"] == "GET /v1/models"


@pytest.mark.parametrize(
    "path",
    [
        "/nothing", "/v1", "/v2/responses", "/v1/v1/v1/responses", "/v1/health", "/v1/backend-api/codex/responses",
        "/backend-api/codex/stats", "/v1/Responses", "/v1/responses/resp_1", "/v1/responses/../stats/x", "/stats%00",
    ],
)  # fmt: skip
async def test_an_unknown_path_is_a_json_404(path: str) -> None:
    async with served() as place:
        answer = await place.ask("POST", path)
    assert answer.error == (404, "unknown_url")
    assert "POST" in answer.json["error"]["message"]
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["x-request-id"]


async def test_a_wrong_method_is_told_the_right_ones() -> None:
    async with served() as place:
        for method, path, allow in (
            ("PUT", "/v1/responses", "GET, HEAD, POST"),
            ("GET", "/refresh", "POST"),
            ("OPTIONS", "/v1/models/gpt-5/", "GET, HEAD"),
        ):
            answer = await place.ask(method, path)
            assert answer.error == (405, "method_not_allowed")
            assert answer.headers["Allow"] == allow


async def test_head_is_get_without_its_body() -> None:
    async with served() as place:
        answer = await place.ask("HEAD", "/health")
        assert (answer.status, answer.body) == (200, b"")
        assert int(answer.headers["Content-Length"]) > 0
        assert (await place.ask("HEAD", "/stats")).status == 401


# --- bodies that are not JSON


@pytest.mark.parametrize(
    ("takes", "kind", "status"),
    [
        (Takes.JSON, "application/json", 200),
        (Takes.JSON, "Application/JSON; charset=utf-8", 200),
        (Takes.JSON, "application/vnd.api+json", 200),
        (Takes.JSON, "", 200),
        (Takes.JSON, "text/plain", 415),
        (Takes.JSON, "application/x-www-form-urlencoded", 415),
        (Takes.JSON, "multipart/form-data; boundary=x", 415),
        (Takes.JSON, "application/jsonp", 415),
        (Takes.FORM, "multipart/form-data; boundary=x", 200),
        (Takes.FORM, "application/json", 200),
        (Takes.FORM, "text/plain", 415),
        (Takes.NOTHING, "text/plain", 200),
    ],
)
async def test_a_body_is_what_its_route_takes(takes: Takes, kind: str, status: int) -> None:
    async with served(**one(tell, takes=takes)) as place:
        answer = await place.ask("POST", "/do", data=b"{}", headers={"Content-Type": kind})
    assert answer.status == status
    if status == 415:
        assert answer.error == (415, "unsupported_content_type")
        assert "application/json" in answer.json["error"]["message"]


async def test_an_unnamed_body_passes_with_a_key_and_an_empty_one_needs_no_name() -> None:
    async with served() as place:
        unnamed = {"data": b"{}", "skip_auto_headers": ["Content-Type"]}
        assert (await place.ask("POST", "/v1/responses", headers=ME, **unnamed)).status == 200
        text = ME | {"Content-Type": "text/plain"}
        assert (await place.ask("POST", "/v1/responses", headers=text)).status == 200


async def test_without_keys_a_page_gets_nothing_and_curl_does() -> None:
    async with served(settings=KEYLESS) as place:
        assert (await place.ask("POST", "/refresh")).json["caller"] == "local"
        assert (await place.ask("POST", "/v1/responses", json={})).json["caller"] == "local"
        assert (await place.ask("POST", "/refresh", data=b"x=1")).status == 415
        foreign = await place.ask("GET", "/stats", headers={"Host": "evil.example"})
        assert foreign.error == (403, "forbidden_host")
        foreign = await place.ask("POST", "/refresh", headers={"Origin": "http://evil.example"})
        assert foreign.error == (403, "forbidden_origin")
        assert (await place.ask("GET", "/health", headers={"Host": "evil.example"})).status == 200


# --- errors


async def test_errors_are_said_in_the_words_of_the_route() -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        raise PoolShortage("try again")

    async with served(**one(refuse)) as place:
        answer = await place.ask("POST", "/do")
        assert answer.error == (429, "rate_limit_exceeded")
        assert answer.headers["Retry-After"] == "1"
    async with served(**one(refuse, dialect="other")) as place:
        answer = await place.ask("POST", "/do", headers={"x-request-id": "mine"})
        assert answer.json == {"type": "error", "request_id": "mine"}
        assert answer.headers["Content-Type"] == "application/json"
        # A path that is no route has no dialect of its own.
        assert (await place.ask("POST", "/nowhere")).error == (404, "unknown_url")


async def test_the_unforeseen_says_nothing_but_its_id(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: web.Request) -> web.StreamResponse:
        raise RuntimeError("inner words about /home/me")

    async with served(**one(fail)) as place:
        answer = await place.ask("POST", "/do?key=in-the-query", headers={"x-request-id": "id-7"})
    assert answer.status == 500
    assert answer.json["error"]["type"] == "server_error"
    assert "id-7" in answer.json["error"]["message"]
    for word in ("inner", "home", "Runtime", "Traceback"):
        assert word not in answer.body.decode()
    assert "id=id-7" in caplog.text
    assert "inner words" in caplog.text
    assert "in-the-query" not in caplog.text


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError("upstream"), KeyError("x")])
async def test_no_kind_of_failure_escapes(error: Exception) -> None:
    async def fail(request: web.Request) -> web.StreamResponse:
        raise error

    async with served(**one(fail)) as place:
        answer = await place.ask("POST", "/do")
    assert (answer.status, answer.json["error"]["type"]) == (500, "server_error")


async def test_the_frameworks_own_refusals_are_said_in_json_too() -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        raise web.HTTPConflict(text="<b>words of a library</b>")

    async def move(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("/elsewhere")

    async with served(**one(refuse)) as place:
        answer = await place.ask("POST", "/do")
        assert (answer.status, answer.json["error"]["message"]) == (409, "conflict")
    async with served(**one(move)) as place:
        moved = await place.ask("POST", "/do", allow_redirects=False)
        assert (moved.status, moved.headers["Location"]) == (302, "/elsewhere")
        assert moved.headers["x-request-id"]


@pytest.mark.parametrize("error", [RuntimeError("late"), RequestError("late"), KeyRefused("late")])
@pytest.mark.parametrize("written", [b"", b"half of it"])
async def test_an_answer_that_breaks_never_looks_whole(
    error: Exception, written: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        if written:
            await response.write(written)
            await asyncio.sleep(0.005)
        raise error

    async with served(**one(fail)) as place:
        with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
            await place.ask("POST", "/do")
    assert "answer cut" in caplog.text
    assert "Error handling request" not in caplog.text


# --- ids


@pytest.mark.parametrize(
    ("theirs", "kept"),
    [
        ("abc-1.2_3", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a\tb", False),
        ("caf\u00e9", False),
        ('"><script>', False),
    ],
)
async def test_a_request_has_one_id_everywhere(theirs: str, kept: bool) -> None:
    async with served() as place:
        for path in ("/health", "/nowhere", "/stats"):
            answer = await place.ask("GET", path, headers={"x-request-id": theirs})
            found = answer.headers["x-request-id"]
            assert (found == theirs) is kept
            assert kept or re.fullmatch(r"req_[0-9a-f]{32}", found)
            if path == "/health":
                assert answer.json["id"] == found


async def test_a_stream_carries_the_id_and_not_the_server_software() -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        return response

    async with served(**one(stream)) as place:
        answer = await place.ask("POST", "/do", headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["Server"] == "codex-proxy"


# --- the log


async def test_only_a_turn_that_never_began_is_worth_an_info_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def refuse(request: web.Request) -> web.StreamResponse:
        raise RequestError("told by the handler")

    async with served({"responses": refuse}) as place:
        await place.ask("GET", "/health")
        await place.ask("GET", "/nowhere")
        await place.ask("GET", "/stats")
        # Its handler ran, and tells of it itself.
        await place.ask("POST", "/v1/responses", headers=ME)
        assert not caplog.records
        await place.ask("POST", "/v1/responses?token=in-the-query")
    assert [record.getMessage().partition(" id=")[0] for record in caplog.records] == ["answered"]
    assert "status=401 code=invalid_api_key" in caplog.text
    assert "in-the-query" not in caplog.text


async def test_every_request_can_be_seen_while_looking_for_trouble(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "codex_proxy")
    async with served() as place:
        await place.ask("GET", "/health?q=in-the-query", headers={"x-request-id": "id-1"})
        await place.ask("GET", "/nowhere", headers={"x-request-id": "id-2"})
    assert "id=id-1 method=GET path=/health status=200" in caplog.text
    assert "id=id-2 method=GET path=/nowhere status=404 code=unknown_url" in caplog.text
    assert "in-the-query" not in caplog.text


# --- HTTP by hand


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET /health HTTP/1.1\r\nx-api-key: secret-in-a-header\x00\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon secret-in-a-header\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"POST /do HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /do HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /do HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12",
    ],
    ids=["tls", "nul", "no-colon", "version", "two-framings", "negative", "two-lengths"],
)
async def test_what_is_no_http_is_a_400_and_no_traceback(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "codex_proxy")
    async with served(**one(tell)) as place:
        answer = await place.say(data)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert b"Traceback" not in answer
    assert "secret-in-a-header" not in caplog.text
    assert [record.levelname for record in caplog.records if "bad request" in record.getMessage()] == [
        "DEBUG"
    ]
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.DEBUG]


async def test_a_key_of_odd_bytes_is_just_unknown() -> None:
    async with served() as place:
        answer = await place.say(
            b"GET /stats HTTP/1.1\r\nHost: x\r\nx-api-key: \xff\xfe\r\nConnection: close\r\n\r\n"
        )
    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_a_path_of_odd_bytes_is_just_unknown() -> None:
    async with served() as place:
        for path in (b"/%ff%fe", b"/%00", b"/" + b"x" * 9000):
            answer = await place.say(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 404 ")
            assert len(answer) < 1500


async def test_heads_that_never_end_are_closed_by_deadline() -> None:
    async with served(keepalive_timeout=0.03) as place:
        assert await place.say(b"GET /health HTTP/1.1\r\nHost: x\r\nx-slow: ") == b""
        assert await place.say(b"") == b""


async def test_a_caller_who_waits_with_a_wrong_key_is_not_asked_for_the_body() -> None:
    async with served() as place:
        head = b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
        answer = await place.say(head)
    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_a_refused_body_leaves_the_connection_usable() -> None:
    async with served() as place:
        refused = b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123456789"
        answer = await place.say(refused + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"HTTP/1.1 200 " in answer


async def test_long_headers_of_codex_clients_pass() -> None:
    async with served() as place:
        answer = await place.ask("GET", "/health", headers={"x-codex-turn-metadata": "m" * 60_000})
    assert answer.status == 200


async def test_a_head_that_has_no_end_is_not_collected() -> None:
    """Each of its fields would do; together they would be megabytes before anybody has shown a key."""
    begun = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(
        b"X-%d: %b\r\n" % (number, b"a" * 60_000) for number in range(3)
    )
    async with served() as place:
        head, _, body = (await place.say(begun)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        assert b"Connection: close" in head
        assert json.loads(body)["error"]["code"] == "head_too_large"
        # What came before it counts for nothing, a large body least of all.
        asked = b"POST /do HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n\r\n" + b"b" * 400_000
        answer = await place.say(asked + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.count(b"HTTP/1.1 ") == 2
        assert b"HTTP/1.1 431 " not in answer


async def test_bodies_come_as_they_are_sent() -> None:
    """The server must not inflate before we count."""

    async def raw(request: web.Request) -> web.StreamResponse:
        assert request.headers["Content-Encoding"] == "gzip"
        read = await request.content.read()
        return web.Response(body=read)

    async with served(**one(raw)) as place:
        answer = await place.ask(
            "POST", "/do", data=b"\x1f\x8bnot inflated", headers={"Content-Encoding": "gzip"}
        )
    assert answer.body == b"\x1f\x8bnot inflated"


async def test_an_oversized_body_is_refused_in_the_words_of_the_route() -> None:
    async def read(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await read_body(request, limit=10))

    async with served(**one(read)) as place:
        assert (await place.ask("POST", "/do", data=b"x" * 11)).error == (413, "request_too_large")
        assert (await place.ask("POST", "/do", data=b"x" * 10)).body == b"x" * 10
