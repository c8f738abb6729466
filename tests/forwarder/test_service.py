"""What a forwarder passes on, to whom, what it says by itself, and how it ends."""

import asyncio
import json
import logging
import socket
from typing import Any

import pytest

from codex_proxy.net.connections import AddrInfo
from tests.forwarder.desk import Desk, desk, far_server, fields, forwarding, lines, until, wanted
from tests.net.peers import unused_port

GET = b"GET /v1/models HTTP/1.1\r\nHost: near\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def get(path: str, *more: str, host: str = "127.0.0.1:8000") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *more, "", ""]).encode()


# -- its own pages ---------------------------------------------------------------------------


async def test_it_says_that_it_is_there() -> None:
    async with desk() as d:
        for method in (b"GET", b"HEAD"):
            caller = await d.call(method + b" / HTTP/1.1\r\nHost: n\r\n\r\n")
            head = await caller.head()
            assert head.startswith(b"HTTP/1.1 200 OK")
            if method == b"GET":
                said = json.loads(await caller.read(int(fields(head)["content-length"])))
                assert said == {"ok": True, "proxy": "codex-proxy forward"}
            # The connection serves the next one.
            caller.write(GET)
            far = await d.far.take()
            await far.head()
            far.abort()
        head, _ = await d.own(b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 2\r\n\r\n{}")
        assert head.startswith(b"HTTP/1.1 405")
        assert fields(head)["allow"] == "GET, HEAD"


async def test_what_it_knows_is_told_on_this_machine_and_holds_no_secret() -> None:
    async with (
        far_server() as far,
        forwarding(wanted(f"http://127.0.0.1:{far.port}/secret-path/v1", route=["3=https://b.test/x"])) as f,
    ):
        d = Desk(far, f)
        head, body = await d.own(get("/debug/info"))
        assert head.startswith(b"HTTP/1.1 200")
        info = json.loads(body)
        assert info["upstreams"] == [f"http://127.0.0.1:{far.port}"]
        assert info["routes"] == {"u3": ["https://b.test"]}
        assert info["in_work"] == 1
        assert "secret-path" not in body.decode()
        d.hang_up()


@pytest.mark.parametrize(
    "more",
    [
        "X-Forwarded-For: 127.0.0.1",
        "Forwarded: for=127.0.0.1",
        "X-Real-IP: 127.0.0.1",
        "Via: 1.1 nginx",
        "Authorization: Bearer wrong",
        "x-admin-key: wrong",
    ],
)
async def test_it_is_not_told_through_a_reverse_proxy_on_this_machine(
    more: str,
) -> None:
    if "wrong" in more:
        more += "\r\nVia: 1.1 nginx"
    async with desk() as d:
        head, _ = await d.own(get("/debug/info", more))
        assert head.startswith(b"HTTP/1.1 403")


async def test_it_is_not_told_to_the_page_of_another_site() -> None:
    async with desk() as d:
        for host, status in (
            ("evil.test", 403), ("localhost:8000", 200), ("[::1]:8000", 200), ("127.0.0.1", 200), ("", 403),
        ):  # fmt: skip
            head, _ = await d.own(get("/debug/info", host=host))
            assert head.startswith(b"HTTP/1.1 %d" % status), host


ADMIN = "admin-key-of-sixteen"


async def test_it_is_told_to_whoever_shows_the_admin_key(tmp_path: Any) -> None:
    (tmp_path / "admin").write_text(ADMIN + "\n")
    async with desk(admin_key_file=tmp_path / "admin") as d:
        for shown in (f"Authorization: Bearer {ADMIN}", f"x-admin-key: {ADMIN}"):
            head, _ = await d.own(get("/debug/info", "Via: 1.1 nginx", shown, host="far.test"))
            assert head.startswith(b"HTTP/1.1 200"), shown


async def test_guesses_at_the_admin_key_become_slow(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "admin").write_text(ADMIN + "\n")
    async with desk(admin_key_file=tmp_path / "admin", trust=["127.0.0.0/8"]) as d:

        async def offer(key: str, address: str = "203.0.113.7", name: str = "x-admin-key") -> bytes:
            asked = get("/debug/info", f"X-Forwarded-For: {address}", f"{name}: {key}", host="far.test")
            return (await d.own(asked))[0]

        # A tool with an old key is one guess, however often it asks.
        for _ in range(10):
            assert (await offer("an-old-key")).startswith(b"HTTP/1.1 403")
        for number in range(4):
            assert (await offer(f"guess-{number}", name="Authorization")).startswith(b"HTTP/1.1 403")
        for key in ("guess", ADMIN):
            head = await offer(key)
            assert head.startswith(b"HTTP/1.1 429"), key
            assert fields(head)["retry-after"] in ("1", "2")
        assert (await offer(ADMIN, "198.51.100.1")).startswith(b"HTTP/1.1 200")
        # Who sits at this machine needs no key, and so guesses none.
        for number in range(10):
            head, _ = await d.own(get("/debug/info", f"x-admin-key: guess-{number}"))
            assert head.startswith(b"HTTP/1.1 200")
    said = [line for line in caplog.messages if "admin key refused" in line]
    assert said == [
        *["admin key refused reason=unknown_key from=203.0.113.7"] * 5,
        "admin key refused reason=throttled from=203.0.113.7",
    ]


# -- our own key --------------------------------------------------------------------------------

KEY = "our-own-key-of-24-letters"


async def test_without_our_own_key_nothing_is_passed_on(tmp_path: Any) -> None:
    (tmp_path / "key").write_text(KEY)
    async with desk(key_file=tmp_path / "key") as d:
        for more in (
            [],
            ["x-forward-key: wrong"],
            [f"x-forward-key: {KEY}x"],
            ["x-forward-key: "],
            [f"Authorization: Bearer {KEY}"],
            [f"x-forward-key: {KEY}", "x-forward-key: other"],
            ["x-forward-key: \xe4"],
        ):
            head, body = await d.own(get("/v1/models", *more))
            assert head.startswith(b"HTTP/1.1 401"), more
            assert KEY not in body.decode()
        assert d.far.ends == []
        # Whoever watches over it asks without one.
        head, _ = await d.own(get("/"))
        assert head.startswith(b"HTTP/1.1 200")


async def test_with_it_the_callers_own_goes_on_and_ours_does_not(tmp_path: Any) -> None:
    (tmp_path / "key").write_text(KEY)
    async with desk(key_file=tmp_path / "key") as d:
        _, _, head = await d.ask(get("/v1/models", f"X-Forward-Key: {KEY}", "Authorization: Bearer theirs"))
        assert lines(head)[2:] == [b"Authorization: Bearer theirs"]


# -- how often --------------------------------------------------------------------------------


async def test_an_address_may_ask_only_so_often() -> None:
    now = [1000.0]
    async with desk(now=lambda: now[0], rate_limit=2) as d:
        caller, far, _ = await d.ask(GET)
        far.write(OK)
        await caller.until(b"ok")
        caller.write(GET)
        await far.head()
        far.write(OK)
        await caller.until(b"ok")
        caller.write(GET)
        head = await caller.head()
        assert head.startswith(b"HTTP/1.1 429")
        assert fields(head)["retry-after"] == "31"
        assert b"rate_limit_exceeded" in await caller.read(int(fields(head)["content-length"]))
        # / is not counted, and the connection goes on.
        now[0] += 31
        caller.write(GET)
        await far.head()


async def test_behind_a_trusted_proxy_each_caller_has_a_count_of_its_own() -> None:
    async with desk(rate_limit=1, trust=["127.0.0.0/8"]) as d:
        for name in ("203.0.113.1", "203.0.113.2", "2001:db8::1"):
            caller, far, _ = await d.ask(get("/v1/x", f"X-Forwarded-For: 198.51.100.9, {name}"))
            far.abort()
            await caller.head()
        head, _ = await d.own(get("/v1/x", "X-Forwarded-For: 203.0.113.1"))
        assert head.startswith(b"HTTP/1.1 429")
        # Of an address of IPv6 everybody has many.
        head, _ = await d.own(get("/v1/x", "X-Forwarded-For: 2001:db8::2"))
        assert head.startswith(b"HTTP/1.1 429")


async def test_what_anybody_else_says_of_who_asks_is_not_believed() -> None:
    async with desk(rate_limit=1) as d:
        caller, far, _ = await d.ask(get("/v1/x", "X-Forwarded-For: 203.0.113.1"))
        far.write(OK)
        await caller.until(b"ok")
        head, _ = await d.own(get("/v1/x", "X-Forwarded-For: 203.0.113.2"))
        assert head.startswith(b"HTTP/1.1 429")


# -- where to ---------------------------------------------------------------------------------


async def test_a_uid_has_its_own_route_and_its_prefix_does_not_go_on() -> None:
    async with far_server() as one, far_server() as two:
        made = wanted(f"http://127.0.0.1:{one.port}", route=[f"7=http://127.0.0.1:{two.port}/base/v1/"])
        async with forwarding(made) as forwarder:
            d = Desk(one, forwarder)
            _, _, head = await d.ask(get("/u1/v1/models?x=1"))
            # Without a route of its own: where all go, without the prefix all the same.
            assert lines(head)[0] == b"GET /v1/models?x=1 HTTP/1.1"
            await d.call(get("/u7/v1/models"))
            far = await two.take()
            head = await far.head()
            assert lines(head)[0] == b"GET /base/v1/models HTTP/1.1"
            assert fields(head)["host"] == f"127.0.0.1:{two.port}"
            d.hang_up()


async def test_one_caller_stays_with_one_of_several_upstreams() -> None:
    async with far_server() as one, far_server() as two:
        made = wanted(f"http://127.0.0.1:{one.port}", f"http://127.0.0.1:{two.port}")
        async with forwarding(made) as forwarder:
            d = Desk(one, forwarder)
            seen: dict[int, set[int]] = {}
            for number in range(24):
                caller = await d.call(get("/v1/x", f"session_id: s{number % 6}", "Connection: close"))
                both = [asyncio.ensure_future(far.take()) for far in (one, two)]  # noqa: TID251 -- a race of two
                done, waiting = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                for task in waiting:
                    task.cancel()
                far = done.pop().result()
                await far.head()
                far.write(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                await caller.rest()
                port = far.writer.get_extra_info("sockname")[1]
                seen.setdefault(number % 6, set()).add(port)
            assert all(len(ports) == 1 for ports in seen.values())
            assert len({port for ports in seen.values() for port in ports}) == 2
            d.hang_up()


async def test_another_upstream_takes_over_for_one_that_cannot_be_reached() -> None:
    async with far_server() as far:
        made = wanted(f"http://127.0.0.1:{await unused_port()}", f"http://127.0.0.1:{far.port}")
        async with forwarding(made) as forwarder:
            d = Desk(far, forwarder)
            for number in range(8):
                data = f"POST /v1/x HTTP/1.1\r\nHost: n\r\nsession_id: s{number}\r\nContent-Length: 2\r\n\r\n{{}}"
                _, end, _ = await d.ask(data.encode())
                assert await end.read(2) == b"{}"
            _, body = await d.own(get("/debug/info"))
            assert len(json.loads(body)["unreachable"]) == 1
            d.hang_up()


async def test_that_nobody_can_be_reached_is_said_in_json() -> None:
    async with far_server() as far, forwarding(wanted(f"http://127.0.0.1:{await unused_port()}")) as f:
        d = Desk(far, f)
        caller = await d.call(GET)
        head = await caller.head()
        assert head.startswith(b"HTTP/1.1 502")
        error = json.loads(await caller.read(int(fields(head)["content-length"])))["error"]
        assert error["code"] == "upstream_unreachable"
        # It is nobody's fault here: the connection goes on.
        caller.write(GET)
        assert (await caller.head()).startswith(b"HTTP/1.1 502")
        d.hang_up()


async def test_nothing_is_sent_to_where_a_cloud_tells_secrets() -> None:
    async with far_server() as far, forwarding(wanted(f"http://far.test:{far.port}")) as f:

        async def resolve(host: str, port: int) -> list[AddrInfo]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", port))]

        f._relays.resolve = resolve
        d = Desk(far, f)
        head, _ = await d.own(GET)
        assert head.startswith(b"HTTP/1.1 502")
        d.hang_up()


# -- how many -----------------------------------------------------------------------------------


async def test_no_more_are_let_in_than_there_may_be(caplog: pytest.LogCaptureFixture) -> None:
    async with desk(max_connections=2) as d:
        callers = [await d.call(get("/")) for _ in range(2)]
        for caller in callers:
            assert (await caller.head()).startswith(b"HTTP/1.1 200")
        for _ in range(2):
            head, body = await d.own(b"")
            assert head.startswith(b"HTTP/1.1 503")
            assert (fields(head)["retry-after"], json.loads(body)["error"]["code"]) == (
                "5",
                "too_many_connections",
            )
        assert caplog.text.count("no more callers are let in") == 1
        callers[0].abort()
        assert d.forwarder._server is not None
        await until(lambda: d.forwarder._server is not None and len(d.forwarder._server.connections) == 1)
        head, body = await d.own(get("/debug/info"))
        info = json.loads(body)
        assert (info["connections"], info["max_connections"]) == (2, 2)


# -- what is said of it --------------------------------------------------------------------------


async def test_a_line_in_the_log_tells_of_a_request_and_of_no_secret(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="codex_proxy")
    async with desk() as d:
        caller, far, _ = await d.ask(
            get("/u42/v1/models?key=sk-very-secret-indeed", "Authorization: Bearer theirs-and-secret")
        )
        far.write(OK)
        await caller.until(b"ok")
        await until(lambda: "forwarded" in caplog.text)
        assert f"method=GET path=/v1/models uid=42 upstream=127.0.0.1:{d.far.port} status=200" in caplog.text
        caller.write(GET)
        await far.head()
        caller.abort()
        await far.is_over()
        await until(lambda: "error=caller_gone" in caplog.text)
        await d.call(b"BROKEN \x00 secret\r\n\r\n")
        await until(lambda: "not a request" in caplog.text)
    assert "secret" not in caplog.text


# -- the end --------------------------------------------------------------------------------------


async def test_at_the_end_what_is_in_work_is_finished_and_nothing_new_begins() -> None:
    async with desk() as d:
        idle = await d.call()
        caller, far, _ = await d.ask(b"POST /v1/x HTTP/1.1\r\nHost: near\r\nContent-Length: 4\r\n\r\nab")
        # One whose turn has not come: its connection is idle.
        await until(lambda: len(d.forwarder._busy) == 1)
        port = d.forwarder.port
        draining = asyncio.ensure_future(d.forwarder.drain(10))  # noqa: TID251 -- awaited below
        assert await idle.is_over()
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)
        caller.write(b"cd")
        assert await far.read(4) == b"abcd"
        far.write(OK)
        assert b"Connection: close" in await caller.head()
        assert await caller.rest() == b"ok"
        await draining


async def test_what_takes_too_long_is_cut_and_does_not_look_finished() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        await caller.until(b"x\r\n")
        await d.forwarder.drain(0.01)
        await d.forwarder.aclose()
        assert b"0\r\n\r\n" not in await caller.rest()
        assert await far.is_over()
