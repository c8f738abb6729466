"""What goes over the wire on either side of a forwarder."""

import asyncio
import gzip
import socket
import struct

import pytest

from codex_proxy.forwarder.incoming import SERVER_OPTIONS
from codex_proxy.net import connections
from tests.forwarder.desk import desk, fields, lines, until

GET = b"GET /v1/models HTTP/1.1\r\nHost: near\r\n\r\n"


def post(body: bytes, *more: bytes) -> bytes:
    head = [b"POST /v1/responses HTTP/1.1", b"Host: near", *more, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


# What has to wait waits on one loop.
on_asyncio = pytest.mark.asyncio(loop_factories=["asyncio"])

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


# -- heads ------------------------------------------------------------------------------------


async def test_the_head_of_a_request_goes_on_as_it_is() -> None:
    async with desk() as d:
        _, _, head = await d.ask(
            b"POST /v1/a%20b/.c../c//d%2F?q=1&q=%zz/../ HTTP/1.1\r\nhOsT: near\r\nAuthorization: Bearer theirs\r\n"
            b"X-Two: 1\r\naccept-ENCODING: gzip, br\r\nX-Two:  2  \r\nX-Odd: \xe4\xff\r\nExpect: 100-continue\r\n"
            b"Content-Length: 0\r\n\r\n"
        )
        assert lines(head) == [
            b"POST /v1/a%20b/.c../c//d%2F?q=1&q=%zz/../ HTTP/1.1",
            b"Host: 127.0.0.1:%d" % d.far.port,
            b"Authorization: Bearer theirs",
            b"X-Two: 1",
            b"accept-ENCODING: gzip, br",
            b"X-Two: 2",
            b"X-Odd: \xe4\xff",
            b"Expect: 100-continue",
            b"Content-Length: 0",
        ]


async def test_what_belongs_to_one_connection_does_not_go_on() -> None:
    async with desk() as d:
        _, _, head = await d.ask(
            b"POST /v1/x HTTP/1.1\r\nHost: near\r\nConnection: keep-alive, X-Mine, Content-Length\r\n"
            b"connection: x-also\r\nX-Mine: 1\r\nx-ALSO: 2\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\n"
            b"Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic eDp5\r\nX-Forward-Key: ours\r\n"
            b"Upgrade: h2c\r\nTrailer: X-T\r\nX-Kept: 1\r\nContent-Length: 2\r\n\r\n{}"
        )
        assert lines(head)[2:] == [b"X-Kept: 1", b"Content-Length: 2"]


async def test_the_head_of_an_answer_goes_back_as_it_is() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(
            b"HTTP/1.1 299 Rather Fine\r\nDate: never\r\nSet-Cookie: a=1\r\nx-UPPER:no blank\r\nSet-Cookie: b=2\r\n"
            b"Server: far\r\nX-Odd: \xe4\xff\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nno"
        )
        assert await caller.until(b"\r\n\r\n") == (
            b"HTTP/1.1 299 Rather Fine\r\nDate: never\r\nSet-Cookie: a=1\r\nx-UPPER:no blank\r\nSet-Cookie: b=2\r\n"
            b"Server: far\r\nX-Odd: \xe4\xff\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n"
        )
        assert await caller.read(2) == b"no"


async def test_how_the_far_server_keeps_its_connection_is_its_own_business() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(
            b"HTTP/1.1 200 OK\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=9\r\nUpgrade: h2c\r\n"
            b"Content-Length: 2\r\n\r\nok"
        )
        assert lines(await caller.head()) == [b"HTTP/1.1 200 OK", b"Content-Length: 2"]
        assert await caller.read(2) == b"ok"
        # Theirs is over, ours is not.
        caller.write(GET)
        again = await d.far.take()
        await again.head()
        again.write(OK)
        assert (await caller.head()).startswith(b"HTTP/1.1 200")


async def test_connections_on_both_sides_serve_one_request_after_the_other() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(post(b"{}"))
        for _ in range(3):
            assert await far.read(2) == b"{}"
            far.write(OK)
            await caller.head()
            assert await caller.read(2) == b"ok"
            caller.write(post(b"{}"))
            assert b"POST /v1/responses" in await far.head()
        assert len(d.far.ends) == 1


async def test_requests_that_come_at_once_are_answered_in_their_order() -> None:
    async with desk() as d:
        caller, far, first = await d.ask(GET.replace(b"models", b"one") + GET.replace(b"models", b"two"))
        assert b"/v1/one" in first
        far.write(OK.replace(b"ok", b"11"))
        assert b"/v1/two" in await far.head()
        far.write(OK.replace(b"ok", b"22"))
        for expected in (b"11", b"22"):
            await caller.head()
            assert await caller.read(2) == expected


async def test_two_callers_at_once_have_a_connection_each() -> None:
    async with desk() as d:
        one, far_one, _ = await d.ask(post(b"one"))
        two, far_two, _ = await d.ask(post(b"two"))
        far_two.write(OK.replace(b"ok", b"22"))
        far_one.write(OK.replace(b"ok", b"11"))
        await one.head()
        await two.head()
        assert (await one.read(2), await two.read(2)) == (b"11", b"22")


# -- bodies -----------------------------------------------------------------------------------


async def test_compressed_bodies_stay_as_they_are() -> None:
    data = gzip.compress(b"hello" * 1000)
    async with desk() as d:
        caller, far, head = await d.ask(post(data, b"Content-Encoding: gzip"))
        assert b"Content-Encoding: gzip" in head
        assert await far.read(len(data)) == data
        far.write(
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        assert b"Content-Encoding: gzip" in await caller.head()
        assert await caller.read(len(data)) == data


async def test_chunks_of_an_answer_pass_with_their_extensions_and_trailers() -> None:
    raw = b"5;note=x\r\nhello\r\n3\r\nyou\r\n0\r\nX-Sum: 8\r\nX-Two: 2\r\n\r\n"
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n" + raw)
        assert lines(await caller.head())[1:] == [b"Trailer: X-Sum", b"Transfer-Encoding: chunked"]
        assert await caller.read(len(raw)) == raw
        # It ended there: the connection serves the next one.
        caller.write(GET)
        await far.head()


@pytest.mark.parametrize("cut", range(1, 40, 9))
async def test_it_does_not_matter_how_the_network_cuts_an_answer(cut: int) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw = b"5\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\n"
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        whole = head + raw
        for start in range(0, len(whole), cut):
            await far.send(whole[start : start + cut])
            await asyncio.sleep(0)
        assert await caller.read(len(whole)) == whole
        caller.write(GET)
        await far.head()


async def test_a_body_in_chunks_goes_on_piece_by_piece() -> None:
    async with desk() as d:
        caller, far, head = await d.ask(
            b"POST /v1/x HTTP/1.1\r\nHost: near\r\nTransfer-Encoding: chunked\r\nContent-Encoding: zstd\r\n\r\n"
        )
        assert lines(head)[2:] == [b"Content-Encoding: zstd", b"Transfer-Encoding: chunked"]
        for number in range(3):
            caller.write(b"4\r\npce%d\r\n" % number)
            # It is there before the next one is sent.
            assert await far.until(b"pce%d\r\n" % number) == b"4\r\npce%d\r\n" % number
        caller.write(b"0\r\nX-Trailer: 1\r\n\r\n")
        assert await far.until(b"0\r\n\r\n") == b"0\r\n\r\n"
        far.write(OK)
        assert await caller.until(b"ok") == OK


async def test_a_slow_body_goes_on_as_it_comes() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(b"POST /v1/x HTTP/1.1\r\nHost: near\r\nContent-Length: 6\r\n\r\nab")
        assert await far.read(2) == b"ab"
        for piece in (b"cd", b"ef"):
            caller.write(piece)
            assert await far.read(2) == piece
        far.write(OK)
        assert await caller.until(b"ok") == OK
        caller.write(GET)
        assert b"GET /v1/models" in await far.head()


async def test_each_event_arrives_before_the_next_one_is_sent() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(post(b"{}"))
        far.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        # The head too.
        assert b"text/event-stream" in await caller.head()
        for number in range(5):
            event = b"data: %d\n\n" % number
            far.write(b"%x\r\n%b\r\n" % (len(event), event))
            assert await caller.until(b"\n\n\r\n") == b"%x\r\n%b\r\n" % (len(event), event)
        far.write(b"0\r\n\r\n")
        assert await caller.read(5) == b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 9\r\n\r\n"),
        (b"DELETE", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ],
)
async def test_answers_without_a_body_end_with_their_head(method: bytes, answer: bytes) -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET.replace(b"GET", method))
        far.write(answer)
        assert await caller.head() + b"\r\n\r\n" == answer
        caller.write(GET)
        await far.head()
        far.write(OK)
        assert await caller.until(b"ok") == OK


async def test_a_coding_of_no_body_is_left_out() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET.replace(b"GET", b"HEAD"))
        far.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: 1\r\n\r\n")
        assert lines(await caller.head()) == [b"HTTP/1.1 200 OK", b"X-A: 1"]


# -- before the body ---------------------------------------------------------------------------


async def test_a_caller_that_waits_for_leave_gets_it_from_the_far_server() -> None:
    async with desk() as d:
        caller, far, head = await d.ask(
            b"POST /v1/x HTTP/1.1\r\nHost: near\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
        )
        assert fields(head)["expect"] == "100-continue"
        far.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await caller.head() == b"HTTP/1.1 100 Continue"
        caller.write(b"body")
        assert await far.read(4) == b"body"
        far.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK)
        assert await caller.head() == b"HTTP/1.1 103 Early Hints\r\nLink: </x>"
        assert await caller.until(b"ok") == OK


async def test_a_caller_that_is_refused_leave_need_not_send_its_body() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(
            b"POST /v1/x HTTP/1.1\r\nHost: near\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
        )
        far.write(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n")
        assert (await caller.head()).startswith(b"HTTP/1.1 417")
        # What was announced and not sent: the connection is of no more use.
        assert await far.is_over()


async def test_an_answer_before_the_end_of_a_large_body_gets_through() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(
            b"POST /v1/x HTTP/1.1\r\nHost: near\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 1000
        )
        far.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        assert (await caller.head()).startswith(b"HTTP/1.1 413")
        assert await caller.read(3) == b"big"
        assert await far.reader.read(2000) == b"x" * 1000


# -- ends that are none ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "begun",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
    ],
)
async def test_an_answer_that_breaks_off_is_broken_for_the_caller_too(begun: bytes) -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(begun)
        await caller.until(b"half")
        far.close()
        # No more bytes: neither the last chunk, nor what would be another answer.
        assert (await caller.reader.read()).strip(b"\r\n") == b""


async def test_what_came_before_the_break_is_the_callers() -> None:
    body = b"x" * 300_000
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + body)
        await far.writer.drain()
        far.close()
        await caller.head()
        assert await caller.rest() == body


async def test_a_body_that_ends_with_its_connection_does_so_for_the_caller() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(b"HTTP/1.0 200 OK\r\nX-A: 1\r\n\r\nall of it")
        far.close()
        assert lines(await caller.head()) == [b"HTTP/1.1 200 OK", b"X-A: 1", b"Connection: close"]
        assert await caller.rest() == b"all of it"


async def test_a_body_without_a_length_that_is_reset_is_no_whole_one() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await caller.until(b"half")
        sock = far.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.abort()
        with pytest.raises(ConnectionResetError):
            await caller.rest()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
    ],
)
async def test_an_answer_that_could_be_read_in_two_ways_is_passed_to_nobody(answer: bytes) -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(answer)
        head = await caller.head()
        assert head.startswith(b"HTTP/1.1 502")
        assert b"bad_upstream_answer" in await caller.read(int(fields(head)["content-length"]))
        assert await far.is_over()


@pytest.mark.parametrize("surplus", [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"\r\n", b"x"])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_what_nobody_asked_for_reaches_nobody(surplus: bytes, is_chunked: bool) -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        if is_chunked:
            far.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + surplus)
        else:
            far.write(OK + surplus)
            assert await caller.until(b"ok") == OK
            caller.write(GET)
            # Another connection, without a trace of it.
            again = await d.far.take()
            await again.head()
            again.write(OK.replace(b"ok", b"22"))
            assert await caller.until(b"22") == OK.replace(b"ok", b"22")
        assert await far.is_over()


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"])
async def test_a_caller_who_leaves_ends_the_far_servers_work_at_once(begun: bytes) -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        if begun:
            far.write(begun)
            await caller.until(b"x\r\n")
        caller.abort()
        assert await far.is_over()


async def test_a_caller_who_leaves_while_sending_ends_the_request() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(
            b"POST /v1/x HTTP/1.1\r\nHost: near\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"
        )
        assert await far.read(7) == b"2\r\nab\r\n"
        caller.abort()
        # Without a last chunk: nobody takes it for a whole one.
        assert await far.is_over()


async def test_a_body_that_is_none_ends_the_request_and_is_said_to_the_caller() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(
            b"POST /v1/x HTTP/1.1\r\nHost: near\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"
        )
        assert await far.read(7) == b"2\r\nab\r\n"
        caller.write(b"zz\r\n")
        assert (await caller.head()).startswith(b"HTTP/1.1 400")
        assert await far.is_over()


async def test_a_body_that_is_none_before_anybody_looked_at_it_goes_nowhere() -> None:
    async with desk() as d:
        caller = await d.call()
        await until(lambda: d.forwarder._server is not None and len(d.forwarder._server.connections) == 1)
        assert d.forwarder._server is not None
        (connection,) = d.forwarder._server.connections
        # Two reads in one turn of the loop.
        connection.data_received(
            b"POST /v1/x HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"
        )
        connection.data_received(b"zz\r\n")
        assert (await caller.head()).startswith(b"HTTP/1.1 400")
        assert d.far.ends == []


async def test_who_says_nothing_for_too_long_is_left() -> None:
    async with desk(timeout=0.05) as d:
        caller, far, _ = await d.ask(GET)
        head = await caller.head()
        assert head.startswith(b"HTTP/1.1 504")
        assert b"upstream_timeout" in await caller.read(int(fields(head)["content-length"]))
        assert await far.is_over()


@on_asyncio
async def test_who_falls_silent_in_the_middle_is_left() -> None:
    async with desk(timeout=0.4) as d:
        caller, far, _ = await d.ask(GET)
        far.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        assert (await caller.rest()).endswith(b"half")
        assert await far.is_over()


async def test_a_body_that_comes_too_slowly_is_not_waited_for() -> None:
    async with desk(timeout=0.05) as d:
        caller, far, _ = await d.ask(b"POST /v1/x HTTP/1.1\r\nHost: near\r\nContent-Length: 10\r\n\r\nhalf")
        assert (await caller.head()).startswith(b"HTTP/1.1 408")
        assert await far.read(4) == b"half"
        assert await far.is_over()


@on_asyncio
async def test_while_a_body_comes_the_far_server_may_be_silent() -> None:
    async with desk(timeout=0.4) as d:
        caller, far, _ = await d.ask(b"POST /v1/x HTTP/1.1\r\nHost: near\r\nContent-Length: 10\r\n\r\n")
        for number in range(10):
            caller.write(b"%d" % number)
            assert await far.read(1) == b"%d" % number
            await asyncio.sleep(0.06)
        far.write(OK)
        assert await caller.until(b"ok") == OK


# -- connections that were at their end ----------------------------------------------------------


async def test_a_request_that_met_a_connection_at_its_end_is_sent_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("codex_proxy.forwarder.service.STALE_SECONDS", 0.0)
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(OK)
        await caller.until(b"ok")
        caller.write(b"POST /v1/x HTTP/1.1\r\nHost: near\r\nContent-Length: 6\r\n\r\nabc")
        assert b"POST" in await far.head()
        far.abort()
        again = await d.far.take()
        assert b"POST" in await again.head()
        caller.write(b"def")
        # All of it, what the first one got included.
        assert await again.read(6) == b"abcdef"
        again.write(OK)
        assert await caller.until(b"ok") == OK


async def test_a_request_that_was_the_reason_of_the_loss_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connections.STALE_SECONDS > 0.5
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(OK)
        await caller.until(b"ok")
        caller.write(post(b"{}"))
        await far.head()
        far.abort()
        assert (await caller.head()).startswith(b"HTTP/1.1 502")
        assert len(d.far.ends) == 1


async def test_a_new_connection_that_is_lost_is_not_tried_twice() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(post(b"{}"))
        far.abort()
        head = await caller.head()
        assert head.startswith(b"HTTP/1.1 502")
        assert b"upstream_lost" in await caller.read(int(fields(head)["content-length"]))
        assert len(d.far.ends) == 1


# -- callers ------------------------------------------------------------------------------------


async def test_a_caller_of_old_is_answered_as_it_asked() -> None:
    async with desk() as d:
        caller, far, head = await d.ask(b"GET /v1/x HTTP/1.0\r\n\r\n")
        assert lines(head)[0] == b"GET /v1/x HTTP/1.0"
        far.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello")
        far.close()
        assert b"Connection: close" in await caller.head()
        assert await caller.rest() == b"hello"


async def test_a_caller_of_old_is_not_given_chunks() -> None:
    async with desk() as d:
        caller, far, _ = await d.ask(b"GET /v1/x HTTP/1.0\r\n\r\n")
        far.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        assert (await caller.head()).startswith(b"HTTP/1.1 502")


async def test_a_caller_who_wants_the_connection_closed_gets_that() -> None:
    async with desk() as d:
        caller, far, head = await d.ask(b"GET /v1/x HTTP/1.1\r\nHost: near\r\nConnection: close\r\n\r\n")
        assert b"Connection" not in head
        far.write(OK)
        assert b"Connection: close" in await caller.head()
        assert await caller.rest() == b"ok"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET http://elsewhere.test/v1/x HTTP/1.1\r\nHost: near\r\n\r\n", 400),
        (b"CONNECT elsewhere.test:443 HTTP/1.1\r\nHost: near\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: near\r\n\r\n", 400),
        (b"CONNECT /v1/x HTTP/1.1\r\nHost: near\r\nContent-Length: 5\r\n\r\nhello", 400),
        (b"POST /v1/x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /v1/x#y HTTP/1.1\r\nHost: near\r\n\r\n", 404),
        (b"GET /v1#/../x HTTP/1.1\r\nHost: near\r\n\r\n", 404),
        (b"GET //elsewhere.test/v1/x HTTP/1.1\r\nHost: near\r\n\r\n", 404),
        (b"GET /elsewhere HTTP/1.1\r\nHost: near\r\n\r\n", 404),
        (b"GET /v1x HTTP/1.1\r\nHost: near\r\n\r\n", 404),
        (b"GET /v1/x HTTP/1.1\r\n\r\n", 400),
        (b"POST /v1/x HTTP/1.1\r\nHost: n\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/x HTTP/1.1\r\nHost: n\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde", 400),
        (b"POST /v1/x HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST /v1/x HTTP/1.1\r\nHost: n\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /v1/x HTTP/1.1\r\nHost: n\r\nX: a\r\n b\r\n\r\n", 400),
        (b"GET /v1/x HTTP/1.1\r\nHost: n\r\nX-Large: " + b"a" * 70_000 + b"\r\n\r\n", 400),
        (b"GET /v1/" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: n\r\n\r\n", 400),
        (b"GET /v1/x HTTP/1.1\r\nHost: n\r\n" + b"X-A: b\r\n" * 300 + b"\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"POST /v1/x HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)  # fmt: skip
async def test_what_is_no_request_for_the_far_server_does_not_get_there(data: bytes, status: int) -> None:
    async with desk() as d:
        head, body = await d.own(data)
        assert head.startswith(b"HTTP/1.1 %d" % status)
        assert fields(head)["content-type"].startswith("application/json")
        assert b'"error"' in body
        assert d.far.ends == []


@pytest.mark.parametrize(
    "path",
    ["..", "../", "../api/admin/users", "x/../../ui", "%2e%2E/ui", ".%2e%2fui", "x%2F..%5Cui", "..\\ui", "..;a=b/ui", "./x", "..?q"],
)  # fmt: skip
async def test_no_path_leads_out_of_what_is_passed_on(path: str) -> None:
    async with desk() as d:
        for start in ("/v1/", "/u7/v1/"):
            head, body = await d.own(f"GET {start}{path} HTTP/1.1\r\nHost: near\r\n\r\n".encode())
            assert head.startswith(b"HTTP/1.1 400")
            assert b"bad_path" in body
        assert d.far.ends == []


async def test_large_heads_pass_in_both_directions() -> None:
    async with desk() as d:
        caller, far, head = await d.ask(
            b"GET /v1/" + b"p" * 10_000 + b" HTTP/1.1\r\nHost: n\r\nX-Large: " + b"a" * 60_000 + b"\r\n\r\n"
        )
        assert fields(head)["x-large"] == "a" * 60_000
        far.write(b"HTTP/1.1 200 OK\r\nX-Large: " + b"b" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n")
        assert fields(await caller.head())["x-large"] == "b" * 60_000


async def test_a_head_that_trickles_in_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "codex_proxy.forwarder.service.SERVER_OPTIONS", {**SERVER_OPTIONS, "keepalive_timeout": 0.1}
    )
    async with desk() as d:
        caller = await d.call(b"GET /v1/x HT")
        assert await caller.is_over()
        assert d.far.ends == []


@on_asyncio
async def test_a_head_without_an_end_is_not_collected() -> None:
    begun = b"GET /v1/x HTTP/1.1\r\nHost: n\r\n" + b"".join(
        b"X-%d: %b\r\n" % (n, b"a" * 43_000) for n in range(3)
    )
    async with desk() as d:
        caller = await d.call(begun)
        await asyncio.sleep(0.02)
        caller.write(b"X-4: " + b"a" * 4_000)
        assert (await caller.head()).startswith(b"HTTP/1.1 431")
        assert b"head_too_large" in await caller.rest()
        # Also behind a request that is answered meanwhile.
        caller, far, _ = await d.ask(GET)
        caller.write(begun + b"X-4: " + b"a" * 4_000)
        assert await far.is_over()
        assert await caller.is_over()


@on_asyncio
async def test_who_asks_and_reads_nothing_is_answered_no_more() -> None:
    async with desk() as d:
        caller = await d.call()
        await until(lambda: d.forwarder._server is not None and len(d.forwarder._server.connections) == 1)
        assert d.forwarder._server is not None
        (connection,) = d.forwarder._server.connections
        wire = connection.transport
        assert wire is not None
        sock = wire.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        asked = b"GET / HTTP/1.1\r\nHost: n\r\n\r\n"
        for _ in range(300):
            caller.write(asked * 100)
            await asyncio.sleep(0.001)
        assert wire.get_write_buffer_size() < 128 * 1024
        assert d.forwarder._counts["requests"] < 30_000


# -- those who are slow ----------------------------------------------------------------------------

LARGE = 12 * 1024 * 1024


async def test_a_caller_who_reads_slowly_slows_the_far_server_down() -> None:
    block = bytes(range(256)) * 256
    async with desk() as d:
        caller, far, _ = await d.ask(GET)
        far.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE)
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        written = 0
        while written < LARGE:
            far.write(block)
            written += len(block)
        # What is not in the kernel's buffers is still here.
        await asyncio.sleep(0.1)
        (connection,) = d.forwarder._relays._all
        assert connection._is_paused
        assert far.writer.transport.get_write_buffer_size() > 0
        caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await caller.head()
        assert await caller.read(LARGE) == block * (LARGE // len(block))
        caller.write(GET)
        await far.head()


async def test_a_caller_who_reads_nothing_at_all_is_left() -> None:
    async with desk(timeout=0.1) as d:
        caller, far, _ = await d.ask(GET)
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        far.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE + b"x" * LARGE)
        assert await far.is_over()
        await until(lambda: not d.forwarder._busy)


async def test_a_far_server_that_reads_slowly_slows_the_caller_down() -> None:
    block = bytes(range(256)) * 256
    async with desk() as d:
        caller, far, _ = await d.ask(
            b"POST /v1/x HTTP/1.1\r\nHost: near\r\nContent-Length: %d\r\n\r\n" % LARGE
        )
        far.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(LARGE // len(block)):
            caller.write(block)
        await asyncio.sleep(0.1)
        # What is not in the kernel's buffers is still with the caller.
        (connection,) = d.forwarder._relays._all
        assert connection.is_full
        assert connection._wire is not None
        assert connection._wire.get_write_buffer_size() < 2 * 1024 * 1024
        far.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert await far.read(LARGE) == block * (LARGE // len(block))
        far.write(OK)
        assert await caller.until(b"ok") == OK


@on_asyncio
async def test_a_far_server_that_reads_nothing_at_all_is_left() -> None:
    async with desk(timeout=0.5) as d:
        caller, far, _ = await d.ask(
            b"POST /v1/x HTTP/1.1\r\nHost: near\r\nContent-Length: %d\r\n\r\n" % LARGE
        )
        far.writer.transport.pause_reading()  # type: ignore[attr-defined]
        caller.write(b"x" * LARGE)
        assert (await caller.head()).startswith(b"HTTP/1.1 504")
