"""JSON on the wire: strict in, lenient from the backend, nothing lost on the way out."""

import pytest

from codex_proxy.protocol.wire import BadJson, dumps, loads, loads_lenient


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1,]", b"NaN", b'{"a":Infinity}', b'"\xff"', b'{"a":1} x', b"[" * 5000],
    ids=["empty", "cut", "trailing-comma", "nan", "infinity", "bad-utf8", "rest", "too-deep"],
)
def test_a_caller_s_bad_json_is_named_as_such(data: bytes) -> None:
    with pytest.raises(BadJson):
        loads(data)


def test_half_a_surrogate_pair_survives_the_way_through() -> None:
    data = b'{"delta":"\\ud83e"}'
    value = loads_lenient(data)
    assert value == {"delta": "\ud83e"}
    assert dumps(value) == data


def test_a_strict_reader_refuses_half_a_surrogate_pair() -> None:
    with pytest.raises(BadJson):
        loads(b'{"delta":"\\ud83e"}')


def test_integers_beyond_64_bits_are_written_whole() -> None:
    assert dumps({"n": 10**30}) == b'{"n":1000000000000000000000000000000}'


def test_text_is_written_as_utf8_without_spaces() -> None:
    assert dumps({"a": ["Grüße", None, True, 1.5]}) == '{"a":["Grüße",null,true,1.5]}'.encode()


@pytest.mark.parametrize("data", [b"", b"{", b"plain words", b"[" * 100_000])
def test_what_is_no_json_at_all_is_refused_by_the_lenient_reader_too(data: bytes) -> None:
    with pytest.raises(BadJson):
        loads_lenient(data)


def test_bad_utf8_from_the_backend_does_not_lose_the_event() -> None:
    assert loads_lenient(b'{"a":"\xff"}') == {"a": "�"}
