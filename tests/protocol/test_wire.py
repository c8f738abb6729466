"""JSON on the wire: strict in, lenient from the backend, nothing lost on the way out."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.protocol.wire import BadJson, Fields, Pieces, dumps, loads, loads_lenient, spell


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


TEXTS = [
    "",
    "plain",
    'a "quote"',
    "back\\slash",
    "\n\t\b\f\r",
    "\x00\x1b",
    "é🦊\u2028",
    "</s>",
    "half \ud83d",
    "\udd8a",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_spelled_as_it_is_rendered(text: str) -> None:
    assert dumps(text) == b'"' + spell(text) + b'"'
    pieces = Pieces([spell(text)])
    assert pieces.text == text
    assert pieces.texts == [text]
    assert bool(pieces) == bool(text)


@given(st.lists(st.text(max_size=4), max_size=4), st.integers(0, 12), st.integers(0, 12))
@settings(derandomize=True, deadline=None, max_examples=200, database=None)
def test_a_part_of_a_text_is_in_the_same_pieces(texts: list[str], start: int, stop: int) -> None:
    pieces = Pieces([spell(text) for text in texts])
    assert pieces.text == "".join(texts)
    assert pieces.texts == texts
    part = pieces.part(start, stop)
    assert part.text == "".join(texts)[start:stop]
    assert "".join(part.texts) == part.text
    ends = [0]
    for text in texts:
        ends.append(ends[-1] + len(text))
    between = [text[max(start - at, 0) : max(stop - at, 0)] for at, text in zip(ends, texts, strict=False)]
    assert part.texts == [text for text in between if text]


@given(st.lists(st.sampled_from(TEXTS[:8]), min_size=1, max_size=3), st.sampled_from(TEXTS[:8]))
@settings(derandomize=True, deadline=None, max_examples=100, database=None)
def test_a_text_goes_into_the_first_piece_of_another_and_into_a_string(texts: list[str], text: str) -> None:
    pieces = Pieces([spell(one) for one in texts])
    after = pieces.after(text)
    assert after.texts == [text + texts[0], *texts[1:]]
    assert after.text == text + "".join(texts)
    assert pieces.nested().texts == [dumps(one)[1:-1].decode() for one in texts]


ODD_OBJECTS = [b'{"a":1,"b":"x","c":[1.0]}', b'{"c":null,"a":"\\ud83d"}', b'{"a":{"b":1}}']


@pytest.mark.parametrize("spelled", [False, True], ids=["read", "spelled"])
@pytest.mark.parametrize("data", ODD_OBJECTS)
def test_fields_are_those_of_the_object(data: bytes, spelled: bool) -> None:
    value = loads_lenient(data)
    raw = {name: msgspec.Raw(dumps(field)) for name, field in value.items()}
    fields = Fields(raw if spelled else dict(value), spelled=spelled)
    assert fields.whole() == value
    assert fields.render() == dumps(value) == data
    assert ("a" in fields, "z" in fields) == (True, False)
    assert fields.get("z") is None
    changes = []
    for new in (value["a"], "é"):
        fields.put("a", new)
        changes.append(fields.is_changed)
    assert changes == [False, True]
    assert fields.get("a") == "é"
    fields.put("z", None)
    assert loads_lenient(fields.render()) == {**value, "a": "é", "z": None}
    fields.drop("z")
    assert "z" not in fields
    assert list(fields.whole()) == list(value)
