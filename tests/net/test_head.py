"""Heads as bytes."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from codex_proxy.net.answer import MAX_HEAD_SIZE
from codex_proxy.net.head import (
    CHUNKED,
    END,
    TO_THE_END,
    BadHead,
    Head,
    Place,
    address_of,
    check_begun,
    encode_request,
    parse_head,
)

HERE = address_of("http://127.0.0.1:8080/a%2Fb?q=%20")


# -- requests ------------------------------------------------------------------------------


def test_a_request_is_what_it_says() -> None:
    head = encode_request("POST", HERE, {"X-Kind": "Pot", "x": "ä"}, b"{}")
    assert (
        head
        == (
            "POST /a%2Fb?q=%20 HTTP/1.1\r\nX-Kind: Pot\r\nx: ä\r\nHost: 127.0.0.1:8080\r\n"
            "Accept-Encoding: identity\r\nContent-Length: 2\r\n\r\n"
        ).encode()
    )


@pytest.mark.parametrize(
    ("method", "body", "length"),
    [
        ("GET", None, None),
        ("HEAD", None, None),
        ("DELETE", None, None),
        ("POST", None, b"0"),
        ("PUT", None, b"0"),
        ("POST", b"", b"0"),
        ("GET", b"abc", b"3"),
    ],
)
def test_a_length_is_said_where_a_body_may_be(method: str, body: bytes | None, length: bytes | None) -> None:
    said = encode_request(method, HERE, {}, body).partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
    assert (said or None) == length


def test_what_the_caller_says_is_not_said_twice() -> None:
    head = encode_request("GET", HERE, {"HOST": "other", "accept-Encoding": "gzip"}, None).lower()
    assert head.count(b"\r\nhost: ") == head.count(b"\r\naccept-encoding: ") == 1
    assert b"\r\nhost: other\r\n" in head


@pytest.mark.parametrize(
    ("url", "authority", "place", "target"),
    [
        ("http://backend.test", "backend.test", Place(False, "backend.test", 80), "/"),
        ("https://backend.test", "backend.test", Place(True, "backend.test", 443), "/"),
        ("https://backend.test:443/x", "backend.test", Place(True, "backend.test", 443), "/x"),
        ("https://backend.test:80/x", "backend.test:80", Place(True, "backend.test", 80), "/x"),
        ("http://[::1]:81/x?a=b#c", "[::1]:81", Place(False, "::1", 81), "/x?a=b"),
        ("http://user:secret@h.test/x", "h.test", Place(False, "h.test", 80), "/x"),
        ("http://h.test?a", "h.test", Place(False, "h.test", 80), "/?a"),
    ],
)
def test_a_url_is_taken_apart(url: str, authority: str, place: Place, target: str) -> None:
    address = address_of(url)
    assert (address.authority, address.place, address.target) == (authority, place, target)


@given(
    st.dictionaries(st.text(max_size=12), st.text(max_size=30), max_size=4),
    st.sampled_from(["GET", "POST", "G T", "get", "", "GET / HTTP/1.1\r\nX:"]),
)
@example({"x": "a\r\nb: c"}, "GET")
@example({"x": "\r\n\r\nGET / HTTP/1.1"}, "GET")
@example({"x": "a\u2028b\x85c"}, "GET")
def test_a_request_has_the_fields_it_was_given_or_is_none(headers: dict[str, str], method: str) -> None:
    try:
        head = encode_request(method, HERE, headers, b"")
    except ValueError:
        return
    first, *fields = head.removesuffix(END).split(b"\r\n")
    assert first == f"{method} {HERE.target} HTTP/1.1".encode()
    assert fields[: len(headers)] == [f"{name}: {value}".encode() for name, value in headers.items()]
    assert not any(byte in head.replace(b"\r\n", b"") for byte in b"\r\n\0")
    assert len(fields) - len(headers) <= 3


# -- answers -------------------------------------------------------------------------------


def parsed(*lines: str, method: str = "GET") -> Head:
    return parse_head("\r\n".join(("HTTP/1.1 200 OK", *lines)).encode(), method)


@pytest.mark.parametrize(
    ("lines", "length", "keeps_alive"),
    [
        ((), TO_THE_END, False),
        (("Content-Length: 7",), 7, True),
        (("content-length:7",), 7, True),
        (("Transfer-Encoding: chunked",), CHUNKED, True),
        (("Content-Length: 7", "Connection: keep-alive"), 7, True),
        (("Content-Length: 7", "Connection: close"), 7, False),
        (("Content-Length: 7", "Connection: Keep-Alive, CLOSE"), 7, False),
        # Which of two counts is open, so the connection is not used again.
        (("Content-Length: 7", "Connection: close", "Connection: keep-alive"), 7, False),
        (("Content-Length: 7", "Connection: closed"), 7, True),
    ],
)
def test_where_the_body_ends_and_what_comes_after(
    lines: tuple[str, ...], length: int, keeps_alive: bool
) -> None:
    head = parsed(*lines)
    assert (head.length, head.keeps_alive) == (length, keeps_alive)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("status", [100, 199, 204, 304])
def test_some_answers_have_no_body_whatever_they_say(status: int, method: str) -> None:
    head = parse_head(f"HTTP/1.1 {status} X\r\nContent-Length: 5".encode(), method)
    assert (head.length, head.keeps_alive) == (0, True)


@given(st.binary(max_size=200))
def test_whatever_comes_is_a_head_or_refused(noise: bytes) -> None:
    for raw in (noise, b"HTTP/1.1 200 OK\r\n" + noise):
        raw = raw.partition(END)[0]
        try:
            head = parse_head(raw, "GET")
        except BadHead:
            pass
        else:
            assert 100 <= head.status <= 999
            for name, value in head.headers.items():
                assert name == name.lower()
                assert value == value.strip(" \t")
                assert not set("\r\n\0") & set(name + value)


@given(st.binary(max_size=60), st.integers(0, 60))
def test_a_head_that_is_not_whole_may_become_one_or_is_refused_at_once(rest: bytes, seen: int) -> None:
    part = (b"HTTP/1.1 200 OK\r\n" + rest).partition(END)[0]
    lone = part.replace(b"\r\n", b"").count(b"\n")
    try:
        check_begun(part, 0)
    except BadHead:
        assert lone
    else:
        assert not lone
        check_begun(part, min(seen, len(part)))


@pytest.mark.parametrize("part", [b"", b"H", b"HTTP/1", b"HTTP/1.", b"HTTP/1.1 200"])
def test_the_start_of_a_head_is_good(part: bytes) -> None:
    check_begun(part, 0)


@pytest.mark.parametrize("part", [b"h", b"HTTP/2", b"SSH", b"\r\n", b"HTTP/1.1 200 OK\n", b"H" * 8])
def test_what_will_never_be_a_head_is_refused_at_once(part: bytes) -> None:
    with pytest.raises(BadHead):
        check_begun(part, 0)


def test_a_head_has_a_limit() -> None:
    check_begun(b"HTTP/1.1 ".ljust(MAX_HEAD_SIZE, b"a"), MAX_HEAD_SIZE)
    with pytest.raises(BadHead, match="larger than 65536 bytes"):
        check_begun(b"HTTP/1.1 ".ljust(MAX_HEAD_SIZE + 1, b"a"), MAX_HEAD_SIZE)
