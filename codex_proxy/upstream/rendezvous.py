"""Weighted rendezvous hashing: each conversation has its own order of all members, and keeps it.

Whoever knows the names and the weights comes to the same order, without a table. A member that goes moves only
its own conversations, one whose weight grows only takes some from the others.
"""

import hashlib
import math
from collections.abc import Iterable

Weighted = tuple[str, float]
"""A member's name, and its weight, which is above 0."""


def score(key: str, name: str, weight: float) -> float:
    """Return how far up *name* stands for *key*; higher is better, and 0 the lower bound."""
    data = f"{len(key)}:{key}{name}".encode("utf-8", "surrogatepass")
    # As many bits as a float holds beside the half: the fraction is never 0 and never 1.
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 12
    return -weight / math.log((number + 0.5) / 2.0**52)


def order(key: str, members: Iterable[Weighted]) -> list[tuple[str, float]]:
    """Return the members with their scores, the first choice for *key* first."""
    scored = [(name, score(key, name, weight)) for name, weight in members]
    return sorted(scored, key=lambda entry: (-entry[1], entry[0]))
