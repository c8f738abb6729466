"""Odd bytes against the whole proxy: an answer in OpenAI's shape, soon, and nothing else harmed."""

import asyncio
import contextlib
import gzip
import io
import json
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import brotli
import pytest

from codex_proxy.server.app import SERVER_OPTIONS
from codex_proxy.server.body import Patience, read_body
from codex_proxy.simulator import Script
from tests.harness import CODEX_HEADERS, STANDARD, Stand, standing

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

JSON_HEADERS = {"Content-Type": "application/json"}


def turn(**fields: object) -> bytes:
    return json.dumps({"model": STANDARD, "input": "hi", **fields}).encode()


GOOD = turn()


def with_input(rest: bytes) -> bytes:
    return b'{"model":"' + STANDARD.encode() + b'","input":' + rest + b"}"


async def send(stand: Stand, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Post raw bytes; an answer comes soon, and a refusal has the shape of one."""
    if isinstance(body, bytes):
        body = io.BytesIO(body)
    begun = time.monotonic()
    async with stand.session.post(path, data=body, headers={**JSON_HEADERS, **headers}) as response:
        answer = json.loads(await response.read())
        status = response.status
    # Milliseconds, a tenth of a second for 10 MB; the rest is for a machine that has much to do.
    assert time.monotonic() - begun < 2.0
    if status >= 400:
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["type"] == "invalid_request_error"
        assert isinstance(answer["error"]["message"], str)
        assert len(answer["error"]["message"]) < 500
        assert response.headers["content-type"].startswith("application/json")
    return status, answer


async def still_serves(stand: Stand) -> None:
    answer = await stand.ask("are you well?", stream=False)
    assert answer.status == 200
    assert (await stand.stats())["summary"]["in_flight"] == 0
    assert stand.daemon.executor.in_flight == 0


class Line:
    """A connection spoken by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)

    async def all(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), 5)

    async def answer(self) -> tuple[bytes, bytes]:
        """Read one answer that says its length."""
        head = await self.head()
        lengths = [
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ]
        return head, await asyncio.wait_for(self.reader.readexactly(lengths[0]), 5)


@contextlib.asynccontextmanager
async def line(stand: Stand) -> AsyncIterator[Line]:
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.daemon.port)
    try:
        yield Line(reader, writer)
    finally:
        writer.close()


def request(
    body: bytes = GOOD, *, path: str = "/v1/responses", version: str = "1.1", more: str = "", length: int = -1
) -> bytes:
    return (
        f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length < 0 else length}\r\n{more}\r\n"
    ).encode() + body


# --- what is no request

NO_JSON: dict[str, bytes] = {
    "nothing": b"",
    "spaces": b"  \n",
    "cut off": GOOD[:-5],
    "a tail": GOOD + b"x",
    "two documents": GOOD + GOOD,
    "a list": b"[" + GOOD + b"]",
    "null": b"null",
    "a number": b"1",
    "a string": b'"x"',
    "a page": b"<html></html>",
    "NaN": turn(top_k=float("nan")),
    "Infinity": turn(top_k=float("-inf")),
    "too many digits": with_input(b'"hi","seed":' + b"9" * 5000),
    "no UTF-8": with_input(b'"\xff\xfe"'),
    "an overlong form": with_input(b'"\xc0\xaf"'),
    "half a pair as bytes": with_input(b'"\xed\xa0\x80"'),
    "UTF-16": GOOD.decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "a bare NUL": with_input(b'"a\x00b"'),
    "100,000 lists deep": with_input(b"[" * 100_000 + b"]" * 100_000),
    "100,000 objects deep": with_input(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a million open lists": b"[" * 1_000_000,
}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses",
        "/v1/responses/compact",
        "/v1/responses/input_tokens",
        "/v1/alpha/search",
        "/v1/images/generations",
        "/v1/images/edits",
    ],
)
async def test_what_is_no_json_object_is_a_400_everywhere(path: str, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        found = {name: (await send(stand, path, body))[0] for name, body in NO_JSON.items()}
        assert found == dict.fromkeys(NO_JSON, 400)
        assert not stand.sim.requests
        await still_serves(stand)


WRONG: dict[str, dict[str, object]] = {
    "model": {"model": 1},
    "input": {"input": 1},
    "input.0": {"input": [1]},
    "input.0.role": {"input": [{"role": 5, "content": "x"}]},
    "input.0.content": {"input": [{"role": "user", "content": 5}]},
    "input.0.content.0": {"input": [{"role": "user", "content": [5]}]},
    "stream": {"stream": "yes"},
    "instructions": {"instructions": ["x"]},
    "tools": {"tools": "x"},
    "tools.0": {"tools": [1]},
    "reasoning": {"reasoning": "high"},
    "reasoning.effort": {"reasoning": {"effort": 5}},
    "max_output_tokens": {"max_output_tokens": "many"},
    "service_tier": {"service_tier": 5},
    "include": {"include": "x"},
    "prompt_cache_key": {"prompt_cache_key": 5},
    "text": {"text": 5},
}


async def test_a_value_of_the_wrong_type_is_a_400_that_names_its_path(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        found = {}
        for param, fields in WRONG.items():
            status, answer = await send(stand, "/v1/responses", turn(**fields))
            found[param] = (status, answer["error"]["param"])
        assert found == {param: (400, param) for param in WRONG}
        assert not stand.sim.requests
        await still_serves(stand)


async def test_odd_but_right_values_reach_the_backend_as_they_are(tmp_path: Path) -> None:
    odd = {
        "a NUL": "a\x00b",
        "beyond the basic plane": "😀",
        "controls": "\x01\x1b[31m\x7f\u2028",
        "10 MB": "x" * 10_000_000,
    }
    async with standing(tmp_path, accounts=1) as stand:
        for name, text in odd.items():
            status, _ = await send(stand, "/v1/responses", turn(input=text))
            assert status == 200, name
            (item,) = stand.sim.turns[-1].json["input"]
            assert item["content"][0]["text"] == text, name


async def test_half_a_pair_of_surrogates_is_passed_on(tmp_path: Path) -> None:
    """JavaScript callers cut strings there; what it is worth is the backend's to say."""
    async with standing(tmp_path, accounts=1) as stand:
        await send(stand, "/v1/responses", with_input(b'"a\\ud83d b"'))
        assert b"a\\ud83d b" in stand.sim.turns[-1].body
        await still_serves(stand)


# --- size


async def test_a_declared_length_past_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, max_body_bytes="1KiB") as stand, line(stand) as hand:
        await hand.say(request(b"", length=1025))
        head, body = await hand.answer()
        assert head.startswith(b"HTTP/1.1 413 ")
        error = json.loads(body)["error"]
        assert (error["code"], error["type"]) == ("request_too_large", "invalid_request_error")
        assert "1024 bytes" in error["message"]
        assert "max-body-bytes" in error["message"]
        exact = turn(input="x" * (1024 - len(turn(input=""))))
        assert len(exact) == 1024
        assert (await send(stand, "/v1/responses", exact))[0] == 200


async def test_a_chunked_body_past_the_limit_is_refused_while_it_comes(tmp_path: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'{"model":"x","input":"'
        while True:
            sent += 1
            yield b"y" * 512

    async with standing(tmp_path, accounts=1, max_body_bytes="4KiB") as stand:
        # The caller may see its own pipe break before it reads the answer.
        with contextlib.suppress(aiohttp.ClientConnectionError):
            status, answer = await asyncio.wait_for(send(stand, "/v1/responses", endless()), 8)
            assert (status, answer["error"]["code"]) == (413, "request_too_large")
        async with line(stand) as hand:
            head = request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            await hand.say(head + b"1001\r\n" + b"y" * 4097 + b"\r\n")
            assert (await hand.head()).startswith(b"HTTP/1.1 413 ")
        assert not stand.sim.requests
        await still_serves(stand)


# --- codings


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstd.compress,
    "br": brotli.compress,
    "deflate": zlib.compress,
}


async def test_every_coding_is_read_and_goes_on_without_it(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        for name, pack in {**PACKERS, "deflate": raw_deflate}.items():
            headers = {"Content-Encoding": name}
            assert (await send(stand, "/v1/responses", pack(GOOD), **headers))[0] == 200, name
            received = stand.sim.turns[-1]
            assert "content-encoding" not in received.headers
            assert received.json["input"][0]["content"][0]["text"] == "hi"


async def test_a_wrong_label_does_no_harm(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        for name in PACKERS:
            # The label without the coding, another coding than the label, the coding without a label.
            for body in (GOOD, gzip.compress(GOOD), zstd.compress(GOOD)):
                headers = {"Content-Encoding": name}
                assert (await send(stand, "/v1/responses", body, **headers))[0] == 200, name
        assert (await send(stand, "/v1/responses", gzip.compress(GOOD)))[0] == 200
        status, answer = await send(stand, "/v1/responses", GOOD, **{"Content-Encoding": "snappy"})
        assert (status, answer["error"]["code"]) == (415, "unsupported_content_encoding")


async def test_a_coding_that_is_cut_or_broken_is_a_400(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        for name, pack in PACKERS.items():
            packed = pack(GOOD * 20)
            for body in (packed[:-6], packed[: len(packed) // 2], packed[:4] + b"\xff" * 40):
                headers = {"Content-Encoding": name}
                status, answer = await send(stand, "/v1/responses", body, **headers)
                assert (status, answer["error"]["code"]) in {(400, "invalid_body"), (400, None)}, name
        assert not stand.sim.requests
        await still_serves(stand)


@pytest.mark.parametrize("coding", PACKERS)
async def test_a_bomb_is_a_413(coding: str, tmp_path: Path) -> None:
    bomb = PACKERS[coding](b"0" * 30_000_000)
    assert len(bomb) < 200_000
    async with standing(tmp_path, accounts=1, max_body_bytes="8MiB") as stand:
        status, answer = await send(stand, "/v1/responses", bomb, **{"Content-Encoding": coding})
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
        await still_serves(stand)


# --- time


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait 50 ms for a body instead of half a minute."""
    assert read_body.__kwdefaults__ is not None
    monkeypatch.setitem(read_body.__kwdefaults__, "patience", Patience(stall=0.05))


@pytest.mark.usefixtures("hurried")
async def test_a_body_that_does_not_come_is_a_408_and_the_end_of_its_connection(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand, line(stand) as hand:
        await hand.say(request(GOOD[:10], length=len(GOOD)))
        answer = await hand.all()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"request_timeout"' in answer
        assert not stand.sim.requests
        await still_serves(stand)


async def test_a_head_that_does_not_end_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVER_OPTIONS, "keepalive_timeout", 0.1)
    async with standing(tmp_path, accounts=1) as stand, line(stand) as hand, line(stand) as dripping:
        await hand.say(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nx-slow: ")

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                await dripping.say(b"GET /health HTTP/1.1\r\n")
                while not dripping.reader.at_eof():
                    await dripping.say(b"x-more: 1\r\n")
                    await asyncio.sleep(0.01)

        task = asyncio.get_running_loop().create_task(drip())
        assert await hand.all() == b""
        with contextlib.suppress(ConnectionError):
            assert await dripping.all() == b""
        await asyncio.wait_for(task, 2)
        await still_serves(stand)


# --- connections


async def test_requests_sent_ahead_are_answered_in_their_order(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand, line(stand) as hand:
        stand.sim.script("one", "two")
        ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        await hand.say(request() + ask + request(b"[]") + request() + ask)
        answers = [await hand.answer() for _ in range(5)]
        assert [head.split(b" ")[1] for head, _ in answers] == [b"200", b"200", b"400", b"200", b"200"]
        assert b'"one"' in answers[0][1]
        assert json.loads(answers[1][1])["status"] == "ok"
        assert b'"two"' in answers[3][1]


async def test_http_1_0_gets_its_stream_until_the_connection_ends(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand, line(stand) as hand:
        stand.sim.script(Script.text("hello there"))
        await hand.say(request(turn(stream=True), version="1.0"))
        head, _, body = (await hand.all()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200 ")
        assert b"transfer-encoding" not in head.lower()
        assert body.startswith(b"event: response.created\n")
        assert body.rstrip().rpartition(b"event: ")[2].startswith(b"response.completed")
        await still_serves(stand)


async def test_head_has_the_headers_and_no_body(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand, line(stand) as hand:
        for path in ("/health", "/v1/models", "/stats", "/nowhere"):
            async with stand.session.get(path) as whole:
                length = len(await whole.read())
            await hand.say(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head = await hand.head()
            assert head.startswith(f"HTTP/1.1 {whole.status} ".encode())
            if path == "/v1/models":
                assert f"content-length: {length}\r\n".encode() in head.lower()
        # The next answer begins where the last head ended.
        await hand.say(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await hand.head()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("kind", ["half-closed", "closed", "reset"])
async def test_a_caller_who_leaves_frees_the_account_at_once(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        stand.accounts[0].set("stall", where="middle", times=1)
        async with line(stand) as hand:
            await hand.say(request(turn(stream=True)))
            await hand.head()
            match kind:
                case "half-closed":
                    # Who sends no more reads no more: many clients and relays leave this way.
                    hand.writer.write_eof()
                case "closed":
                    hand.writer.close()
                case _:
                    hand.writer.transport.abort()
            await stand.until(lambda: stand.daemon.executor.in_flight == 0)
            await asyncio.wait_for(stand.sim.turns[0].closed.wait(), 2)
        assert stand.sim.turns[0].cancelled
        stats = await stand.stats()
        assert (stats["summary"]["active"], stats["summary"]["in_flight"]) == (1, 0)
        await still_serves(stand)
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]


async def test_a_connection_dropped_in_the_middle_of_a_body_asks_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        for _ in range(20):
            async with line(stand) as hand:
                await hand.say(request(GOOD[:20], length=len(GOOD)))
        await still_serves(stand)
        assert len(stand.sim.turns) == 1
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]


async def test_a_form_of_pictures_goes_to_the_backend_as_it_came(tmp_path: Path) -> None:
    form = aiohttp.FormData()
    form.add_field("model", "gpt-image-2")
    form.add_field("prompt", "a cat")
    form.add_field("image", b"\x89PNG\x00\xff", filename="a.png", content_type="image/png")
    # A form is what a web page could send, so it needs a key.
    headers = {"Authorization": "Bearer some-client-key-1"}
    async with standing(tmp_path, accounts=1, api_keys="[some-client-key-1]") as stand:
        async with stand.session.post("/v1/images/edits", data=form, headers=headers) as answer:
            await answer.read()
        received = stand.sim.requests[-1]
        assert received.headers["content-type"].startswith("multipart/form-data; boundary=")
        assert b"\x89PNG\x00\xff" in received.body
        other = aiohttp.FormData({"model": "x"})
        async with stand.session.post("/v1/responses", data=other, headers=headers) as answer:
            assert answer.status == 415


async def test_a_codex_client_gets_the_same_shape_for_its_broken_body(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        status, answer = await send(stand, "/backend-api/codex/responses", b"{", **CODEX_HEADERS)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
