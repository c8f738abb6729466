"""What a client key looks like: `sk-`, 256 random bits, and a checksum that finds typing errors.

Only its SHA-256 is kept: what has 256 random bits cannot be guessed from it, so no slow hash is needed.
"""

import hashlib
import re
import zlib

PREFIX = "sk-"
RANDOM_BYTES = 32

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# 62 ** 43 is just more than 2 ** 256, 62 ** 6 more than 2 ** 32.
_LENGTH = 43
_CHECK_LENGTH = 6
_FORM = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{_LENGTH + _CHECK_LENGTH}}}")


def make_key(random: bytes) -> str:
    """Return a key made of 32 *random* bytes."""
    if len(random) != RANDOM_BYTES:
        raise ValueError(f"a key is made of {RANDOM_BYTES} random bytes")
    body = _base62(int.from_bytes(random, "big"), _LENGTH)
    return PREFIX + body + _checksum(body)


def is_well_formed(text: str) -> bool:
    """Tell whether *text* can be a key of ours; one that was mistyped is not."""
    if _FORM.fullmatch(text) is None:
        return False
    body = text[len(PREFIX) : -_CHECK_LENGTH]
    return text[-_CHECK_LENGTH:] == _checksum(body)


def digest_of(text: str) -> bytes:
    """Return what is kept of a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECK_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, rest = divmod(number, 62)
        digits.append(_DIGITS[rest])
    return "".join(reversed(digits))
