"""Counts tokens exactly as o200k_base does, from the ranks that the package ships; also a program.

The program is what `counting.TokenCounter` starts. Building the encoding holds the interpreter
for a fifth of a second and keeps a hundred megabytes, which a process that serves streams should
not bear; in a process of its own neither is felt, and both end with it.

Its one argument is the file of the ranks. It reads requests from its standard input until that
ends: a line with the sizes of the texts in bytes, then the texts, UTF-8, one after the other. It
answers a request with a line that says how many tokens they have. Its very first line is `ready`,
or why it is not. It never downloads, and it imports nothing of the package, so that it starts
fast, wherever the package was started from.
"""

import os
import re
import sys
import zlib
from binascii import a2b_base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from tiktoken import Encoding

RANKS = Path(__file__).parent.parent / "data" / "o200k_base.tiktoken.gz"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
SIZE = 3_613_922

READY = b"ready\n"

# Where o200k_base splits text before it merges. The group around the first five changes
# nothing in what matches; it lets the engine try them in one go, which is a third faster.
PATTERN = (
    r"(?:"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+"
    r")"
    r"|\s+(?!\S)"
    r"|\s+"
)
SPECIAL = {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}

# Pieces keep the lists of tokens short and let two cores share one text. At twice this size a
# piece is cut wherever that is: a run of half a million spaces overflows the engine's stack.
# A power of two, so that long runs of one character come out as if they had not been cut.
PIECE_CHARACTERS = 32_768

# How many counts are remembered; they take two megabytes.
REMEMBERED_PIECES = 16_384

# Between a letter or digit and what ends a word no token ever stretches: a cut there changes
# no count. The apostrophe is missing, for it may belong to the word ("it's").
# The last ones are the comma and the full stop of Chinese and Japanese.
_SEAM = re.compile(r"(?<=[^\W_])(?=[\s!-&(-/:-@\[-`{-~\u3001\u3002\uff0c])")


class DamagedRanksError(ValueError):
    """The shipped ranks are not what they were."""


def load(path: Path = RANKS) -> "Encoding":
    """Build the encoding from the ranks at *path*.

    Raises:
        ImportError: If tiktoken is not there.
        OSError: If the ranks are not.
        DamagedRanksError: If they are not what o200k_base has.
    """
    from tiktoken import Encoding

    try:
        inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        # One byte more than there may be: no file can make us inflate without end.
        raw = inflater.decompress(path.read_bytes(), SIZE + 1)
    except zlib.error as exc:
        raise DamagedRanksError(f"{path.name} is damaged: {exc}") from exc
    if sha256(raw).hexdigest() != SHA256:
        raise DamagedRanksError(f"{path.name} is damaged: its checksum is wrong")
    # What has this checksum is well-formed and has its ranks in order.
    ranks = {token: rank for rank, token in enumerate(map(a2b_base64, raw.split()[::2]))}
    return Encoding("o200k_base", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL)


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut *text* into pieces of *size* to twice *size* characters, at seams if there are any."""
    start, end = 0, len(text)
    while end - start > 2 * size:
        seam = _SEAM.search(text, start + size, start + 2 * size)
        cut = seam.start() if seam is not None else start + 2 * size
        yield text[start:cut]
        start = cut
    yield text[start:]


class Counter:
    """Counts pieces, and knows those it has counted before: a conversation comes whole each time.

    What looks like a special token is text like any other. Of what it has counted it keeps a
    digest and not the words.
    """

    def __init__(self, encoding: "Encoding", limit: int = REMEMBERED_PIECES) -> None:
        self._encoding = encoding
        self._limit = limit
        self._known: dict[bytes, int] = {}

    def count(self, piece: str) -> int:
        """Return how many tokens *piece* has; threads may ask at the same time."""
        key = blake2b(piece.encode("utf-8"), digest_size=16).digest()
        known = self._known.get(key)
        if known is None:
            known = len(self._encoding.encode_ordinary(piece))
            if len(self._known) >= self._limit:
                self._known.clear()
            self._known[key] = known
        return known


def serve(requests: BinaryIO, answers: BinaryIO, path: Path = RANKS) -> int:
    """Answer *requests* until they end; return the exit code."""
    try:
        encoding = load(path)
    except (ImportError, OSError, DamagedRanksError) as exc:
        answers.write(f"{type(exc).__name__}: {exc}".replace("\n", " ").encode("utf-8", "replace") + b"\n")
        answers.flush()
        return 1
    answers.write(READY)
    answers.flush()
    counter = Counter(encoding)
    # The merging itself lets other threads run.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for line in requests:
            texts = [requests.read(int(size)).decode("utf-8", "replace") for size in line.split()]
            cut = (piece for text in texts for piece in pieces(text))
            total = sum(pool.map(counter.count, cut))
            answers.write(b"%d\n" % total)
            answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.stdin.buffer, sys.stdout.buffer, Path(sys.argv[1])))
