"""The parts of a forwarder that need no socket."""

import itertools

import pytest

from codex_proxy.forwarder import limits
from codex_proxy.forwarder.heads import answer_head, chunk
from codex_proxy.forwarder.limits import Limiter, caller_of, network_of, slot_of
from codex_proxy.forwarder.routes import Upstream, affinity, in_order, upstream_of, way_of
from codex_proxy.net.head import CHUNKED, TO_THE_END, BadHead, parse_head
from codex_proxy.net.passing import read_head

# -- where a path leads


@pytest.mark.parametrize(
    ("target", "uid", "rest"),
    [
        ("/v1", None, "/v1"),
        ("/v1/", None, "/v1/"),
        ("/v1?x", None, "/v1?x"),
        ("/v1/chat/completions", None, "/v1/chat/completions"),
        ("/u1/v1/responses?a=b", 1, "/v1/responses?a=b"),
        ("/u0/v1/x", 0, "/v1/x"),
        ("/u999999999/v1/x", 999_999_999, "/v1/x"),
        ("/v1/../../x//y/%2e%2e", None, "/v1/../../x//y/%2e%2e"),
        ("/v1/u1/v1", None, "/v1/u1/v1"),
    ],
)
def test_a_path_that_is_passed_on(target: str, uid: int | None, rest: str) -> None:
    way = way_of(target)
    assert way is not None
    assert (way.uid, way.target) == (uid, rest)


@pytest.mark.parametrize(
    "target",
    [
        "", "/", "*", "/v2/x", "/v1x", "//v1/x", "/u/v1/x", "/u01/v1/x", "/u1x/v1/x", "/u-1/v1/x",
        "/u1234567890/v1/x", "/U1/v1/x", "/u1//v1/x", "/u1/v2/x", "/u1/u2/v1/x", "/u\u0661/v1/x",
        "http://x/v1/y", "x:443", "/x/v1/y",
    ],
)  # fmt: skip
def test_a_path_that_is_not(target: str) -> None:
    assert way_of(target) is None


@pytest.mark.parametrize(
    ("url", "authority", "prefix"),
    [
        ("http://far.test:3000", "far.test:3000", ""),
        ("http://far.test:3000/", "far.test:3000", ""),
        ("https://far.test/v1", "far.test", ""),
        ("https://far.test/api/v1/", "far.test", "/api"),
        ("https://far.test/v1x", "far.test", "/v1x"),
        ("http://[::1]:80/", "[::1]", ""),
    ],
)
def test_an_upstream_may_end_with_the_version(url: str, authority: str, prefix: str) -> None:
    upstream = upstream_of(url)
    assert (upstream.authority.decode(), upstream.prefix.decode()) == (authority, prefix)


@pytest.mark.parametrize(
    "url", ["", "far.test", "ftp://far.test", "http://", "http://me:pw@far.test", "http://far.test?k=1", "http://a b"]
)  # fmt: skip
def test_what_is_no_upstream(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        upstream_of(url)


UPSTREAMS = tuple(upstream_of(f"http://far{number}.test") for number in range(5))


def test_callers_are_shared_evenly_and_only_those_of_a_lost_upstream_move() -> None:
    keys = [b"caller %d" % number for number in range(2000)]
    first = [in_order(UPSTREAMS, key)[0] for key in keys]
    shares = [first.count(one) for one in UPSTREAMS]
    assert min(shares) > 300
    fewer = UPSTREAMS[:2] + UPSTREAMS[3:]
    for key, before in zip(keys, first, strict=True):
        after = in_order(fewer, key)[0]
        assert after == before if before != UPSTREAMS[2] else after == in_order(UPSTREAMS, key)[1]


def test_the_order_does_not_depend_on_how_they_are_listed() -> None:
    for listed in itertools.permutations(UPSTREAMS[:3]):
        assert in_order(listed, b"key") == in_order(UPSTREAMS[:3], b"key")


def test_what_keeps_requests_together() -> None:
    key = ((b"Authorization", b"Bearer one"),)
    session = (*key, (b"Session_ID", b"s"))
    assert affinity(None, key, "a") == affinity(None, key, "b")
    assert affinity(None, session, "a") != affinity(None, key, "a")
    assert affinity(1, session, "a") != affinity(2, session, "a")
    assert affinity(None, (), "a") != affinity(None, (), "b")


# -- who asks, and how often


def test_so_many_at_once_and_then_one_at_a_time() -> None:
    limiter = Limiter(3)
    assert [limiter.admit("a", 100.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert limiter.admit("a", 100.0) == pytest.approx(20.0)
    # What was refused does not count.
    assert limiter.admit("a", 119.9) == pytest.approx(0.1)
    assert limiter.admit("b", 119.9) == 0.0
    assert limiter.admit("a", 120.0) == 0.0
    assert limiter.admit("a", 120.0) == pytest.approx(20.0)
    assert [limiter.admit("a", 1000.0) for _ in range(4)][:3] == [0.0, 0.0, 0.0]


def test_a_minute_holds_no_more_than_its_number_over_time() -> None:
    limiter = Limiter(60)
    admitted = [now for step in range(6000) if limiter.admit("a", now := step / 10) == 0.0]
    assert len(admitted) <= 60 + 600
    assert len(admitted) >= 600


def test_only_so_many_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ADDRESSES", 100)
    limiter = Limiter(1)
    for number in range(1000):
        assert limiter.admit(str(number), 0.0) == 0.0
        assert len(limiter) <= 101
    assert limiter.admit("999", 0.0) > 0


@pytest.mark.parametrize(
    ("peer", "told", "trusted", "who"),
    [
        ("10.0.0.1", ["1.1.1.1"], [], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1"], ["10.0.0.0/8"], "1.1.1.1"),
        ("10.0.0.1", ["6.6.6.6, 1.1.1.1"], ["10.0.0.0/8"], "1.1.1.1"),
        ("10.0.0.1", ["6.6.6.6", "1.1.1.1, 10.0.0.2"], ["10.0.0.0/8"], "1.1.1.1"),
        ("10.0.0.1", ["6.6.6.6, nonsense"], ["10.0.0.0/8"], "10.0.0.1"),
        ("10.0.0.1", [], ["10.0.0.0/8"], "10.0.0.1"),
        ("2.2.2.2", ["1.1.1.1"], ["10.0.0.0/8"], "2.2.2.2"),
        ("::ffff:10.0.0.1", ["1.1.1.1"], ["10.0.0.0/8"], "1.1.1.1"),
        ("", ["1.1.1.1"], ["10.0.0.0/8"], ""),
    ],
)
def test_who_asks(peer: str, told: list[str], trusted: list[str], who: str) -> None:
    assert caller_of(peer, told, [network_of(one) for one in trusted]) == who


def test_whose_count_a_request_is() -> None:
    assert slot_of("2001:db8::1") == slot_of("2001:db8::ffff") != slot_of("2001:db8:0:1::1")
    assert slot_of("::ffff:1.2.3.4") == slot_of("1.2.3.4") != slot_of("1.2.3.5")
    assert slot_of("") == ""


# -- heads


HEADS = [
    b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 5",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close",
    b"HTTP/1.1 200\r\ntransfer-encoding:CHUNKED",
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1",
    b"HTTP/1.0 200 OK\r\nContent-Length: 1",
    b"HTTP/1.1 204 x\r\nContent-Length: 9",
    b"HTTP/1.1 304 x\r\nTransfer-Encoding: chunked",
    b"HTTP/1.1 200 OK",
    b"HTTP/1.1 100 Continue",
    b"HTTP/1.1 200 OK\r\nX: \xff\xfe",
    # none
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip",
    b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0x5",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5",
    b"HTTP/1.1 200 OK\r\nContent-Length:",
    b"HTTP/1.1 200 OK\r\nContent-Length : 5",
    b"HTTP/1.1 200 OK\r\n folded: 1",
    b"HTTP/1.1 200 OK\r\nNoColon",
    b"HTTP/1.1 200 OK\r\n: nameless",
    b"HTTP/1.1 200 OK\r\nA: b\x00c",
    b"HTTP/1.1 200 OK\r\nA: b\rc",
    b"HTTP/1.1 200 OK\r\nA: b\nContent-Length: 5",
    b"HTTP/1.1 2000 OK",
    b"HTTP/1.1 099 OK",
    b"HTTP/2 200 OK",
    b"HTTP/1.1  200 OK",
    b"http/1.1 200 OK",
    b"",
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("raw", HEADS)
def test_a_head_is_read_as_our_own_calls_read_theirs(raw: bytes, method: str) -> None:
    try:
        expected = parse_head(raw, method)
    except BadHead:
        with pytest.raises(BadHead):
            read_head(raw, method)
        return
    found = read_head(raw, method)
    assert (found.status, found.length, found.keeps_alive) == (
        expected.status,
        expected.length,
        expected.keeps_alive,
    )


def test_how_a_body_ends_is_said_in_the_head_that_goes_on() -> None:
    head = read_head(b"HTTP/1.1 200 OK\r\nA: 1\r\nTransfer-Encoding: chunked\r\nKeep-Alive: x\r\nB: 2", "GET")
    assert head.length == CHUNKED
    assert answer_head(head, is_last=True) == (
        b"HTTP/1.1 200 OK\r\nA: 1\r\nTransfer-Encoding: chunked\r\nB: 2\r\nConnection: close\r\n\r\n"
    )
    assert read_head(b"HTTP/1.1 200 OK\r\nA: 1", "GET").length == TO_THE_END


def test_a_field_that_the_connection_takes_with_it_is_not_the_length() -> None:
    head = read_head(
        b"HTTP/1.1 200 OK\r\nConnection: content-length, x-a\r\nX-A: 1\r\nContent-Length: 2", "GET"
    )
    assert head.fields == b"\r\nContent-Length: 2"


def test_chunks() -> None:
    assert chunk(b"hello world, hello") == b"12\r\nhello world, hello\r\n"
    assert chunk(b"x", is_last=True) == b"1\r\nx\r\n0\r\n\r\n"
    assert chunk(b"", is_last=True) == b"0\r\n\r\n"
    assert chunk(b"") == b""


def test_an_upstream_is_called_by_its_host_alone() -> None:
    upstream: Upstream = upstream_of("https://far.test/a-secret/v1")
    assert (upstream.name, upstream.url) == ("far.test", "https://far.test")
