"""The exact encoding: the shipped ranks, the cuts in long texts, and the program that counts."""

import gzip
import importlib
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.server import encoding
from codex_proxy.server.encoding import Counter, DamagedRanksError, load, pieces, serve

ENGLISH = "The quick brown fox jumps over the lazy dog. It's 12:34 o'clock -- they'll say they've WON.\n\n"
CODE = 'def f(x: int) -> str:\n    """Doc."""\n    return f"{x!r:>{10}}"  # ok\n\n\tif (a&&b) { a[i]++; }\r\n'
CHINESE = "今天天气很好\uff0c我们去公园散步。你想一起来吗\uff1f"
JAPANESE = "お誕生日おめでとう"
EMOJI = "👩‍👩‍👧‍👦 🇩🇪 ✨ ok👍🏽"
ACCENTS = "Ärger über naïve cafés; e\u0301 ﬁ ǅ ʰ Ωmega"
SPACES = "a  b\t\tc \u00a0 d\u2028e\x1cf \r\n \n  g   "
SPECIAL = "<|endoftext|> and <|endofprompt|><|im_start|>"
SAMPLES = {
    "english": ENGLISH,
    "code": CODE,
    "chinese": CHINESE,
    "japanese": JAPANESE,
    "emoji": EMOJI,
    "accents": ACCENTS,
    "spaces": SPACES,
    "special": SPECIAL,
    "all": ENGLISH + CODE + CHINESE + JAPANESE + EMOJI + ACCENTS + SPACES + SPECIAL,
    "none": "",
}


@pytest.fixture(scope="module")
def ours() -> tiktoken.Encoding:
    return load()


@pytest.fixture(scope="module")
def theirs(ours: tiktoken.Encoding) -> tiktoken.Encoding:
    """Return o200k_base as tiktoken defines it, but for the download."""
    ranks = ours._mergeable_ranks
    openai_public = importlib.import_module("tiktoken_ext.openai_public")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
        return tiktoken.Encoding(**openai_public.o200k_base())


def count(ours: tiktoken.Encoding, text: str) -> int:
    return sum(map(Counter(ours).count, pieces(text)))


@pytest.mark.parametrize("name", SAMPLES)
def test_the_tokens_are_those_of_tiktoken(
    name: str, ours: tiktoken.Encoding, theirs: tiktoken.Encoding
) -> None:
    expected = theirs.encode_ordinary(SAMPLES[name])
    assert ours.encode_ordinary(SAMPLES[name]) == expected
    assert count(ours, SAMPLES[name]) == len(expected)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("hello world", 2), ("antidisestablishmentarianism", 6), ("2 + 2 = 4", 7), (JAPANESE, 8)],
)
def test_the_tokens_are_those_that_openai_publishes(text: str, tokens: int, ours: tiktoken.Encoding) -> None:
    assert count(ours, text) == tokens


def test_what_looks_like_a_special_token_is_text(ours: tiktoken.Encoding) -> None:
    assert count(ours, "<|endoftext|>") == 7
    assert 199_999 not in ours.encode_ordinary("<|endoftext|>")


LETTERS = st.sampled_from("aZé漢ひʰǅß\u0301")
CHARACTERS = st.one_of(
    LETTERS,
    st.sampled_from("0²Ⅷ٣'sdmtLVE_- \t\n\r/.,;:!?()\u3002\uff0c\u00a0\u2028\x1c\x85\u200b"),
    st.sampled_from(["👍", "\U0001f1e9", "'s", "'LL", " a", "\r\n"]),
    st.characters(exclude_categories=["Cs"]),
)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(text=st.lists(CHARACTERS, max_size=40).map("".join))
def test_a_cut_at_a_seam_changes_no_count(theirs: tiktoken.Encoding, text: str) -> None:
    whole = theirs.encode_ordinary(text)
    for seam in encoding._SEAM.finditer(text):
        left, right = text[: seam.start()], text[seam.start() :]
        halves = [theirs.encode_ordinary(half) for half in (left, right)]
        assert halves[0] + halves[1] == whole


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
def test_pieces_are_the_text(size: int) -> None:
    text = SAMPLES["all"]
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    assert all(len(piece) <= 2 * size for piece in cut)
    assert all(len(piece) >= size for piece in cut[:-1])


def test_a_long_text_counts_like_its_whole(ours: tiktoken.Encoding, theirs: tiktoken.Encoding) -> None:
    text = SAMPLES["all"] * 500
    assert len(list(pieces(text))) > 3
    assert count(ours, text) == len(theirs.encode_ordinary(text))


LONG = 1_000_000


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        pytest.param("a" * LONG, 125_000, id="letter"),
        # As one run it overflows the stack of the engine.
        pytest.param(" " * LONG, 7_813, id="spaces"),
        pytest.param(" " * LONG + "x", 7_814, id="spaces-and-a-letter"),
        pytest.param("\u00a0" * LONG, 125_000, id="hard-spaces"),
        pytest.param("\n" * LONG, 62_500, id="lines"),
        pytest.param("!" * LONG, 62_500, id="marks"),
        pytest.param("7" * LONG, 333_344, id="digits"),
        pytest.param("漢" * LONG, 1_000_000, id="ideographs"),
        pytest.param("👍" * LONG, 1_000_000, id="emoji"),
    ],
)
def test_a_monstrous_run_neither_hangs_nor_overflows(text: str, tokens: int, ours: tiktoken.Encoding) -> None:
    started = time.perf_counter()
    assert count(ours, text) == pytest.approx(tokens, rel=0.001)
    # Half a second where this was written.
    assert time.perf_counter() - started < 10.0


# -- the shipped ranks --------------------------------------------------------------------


def test_the_ranks_are_shipped_and_packed_reproducibly() -> None:
    packed = encoding.RANKS.read_bytes()
    assert packed[3:8] == b"\0\0\0\0\0", "gzip -n: no name and no time"
    raw = gzip.decompress(packed)
    assert len(raw) == encoding.SIZE


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda packed: packed[:-5000],
    "flipped": lambda packed: packed[:5000] + bytes([packed[5000] ^ 1]) + packed[5001:],
    "longer": lambda packed: gzip.compress(gzip.decompress(packed) + b"YQ== 199998\n", 1),
    "other": lambda _: gzip.compress(b"YQ== 0\n"),
    "plain": lambda _: b"YQ== 0\n",
    "empty": lambda _: b"",
}


def damaged(tmp_path: Path, how: str) -> Path:
    path = tmp_path / "ranks.gz"
    path.write_bytes(DAMAGES[how](encoding.RANKS.read_bytes()))
    return path


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_ranks_are_found_out(how: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedRanksError, match="damaged"):
        load(damaged(tmp_path, how))


# -- the program --------------------------------------------------------------------------


def run(requests: bytes, path: Path = encoding.RANKS) -> tuple[int, list[bytes]]:
    answers = io.BytesIO()
    return serve(io.BytesIO(requests), answers, path), answers.getvalue().splitlines()


def test_the_program_answers_each_request_with_a_line() -> None:
    japanese = JAPANESE.encode()
    request = b"11 0 %d\nhello world%b" % (len(japanese), japanese)
    assert run(request + b"\n" + b"1\n\xff" + b"3\nabc") == (0, [b"ready", b"10", b"0", b"1", b"1"])


def test_what_was_counted_before_is_remembered_within_limits(ours: tiktoken.Encoding) -> None:
    counter = Counter(ours, limit=3)
    for _ in range(3):
        for text in SAMPLES.values():
            assert [counter.count(text), counter.count(text)] == [count(ours, text)] * 2
            assert len(counter._known) <= 3
    assert not any(text.encode() in counter._known for text in SAMPLES.values())


def test_the_program_says_why_it_cannot_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = run(b"1\na", damaged(tmp_path, "flipped"))
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith(b"DamagedRanksError: ranks.gz is damaged")

    code, lines = run(b"1\na", tmp_path / "missing")
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith(b"FileNotFoundError")

    monkeypatch.setitem(sys.modules, "tiktoken", None)
    code, lines = run(b"1\na")
    assert (code, len(lines)) == (1, 1)
    assert b"tiktoken" in lines[0]
