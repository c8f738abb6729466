"""Money: whole nanodollars inside, decimal texts of dollars at the edges.

A price of $0.005 for a million tokens is 5 nanodollars a token, so nothing is ever rounded but a
price that has more than nine places. A 64-bit number holds nine billion dollars.
"""

import re

NANOS = 1_000_000_000
"""In a dollar."""

MOST = 9_000_000_000 * NANOS
"""What an amount may be at most: two of them cannot be added beyond what a database holds."""

_AMOUNT = re.compile(r"([+-]?)([0-9]{1,10})(?:\.([0-9]{1,9}))?")


def parse_money(text: str) -> int:
    """Return the nanodollars that a text such as "-12.5" says.

    Raises:
        ValueError: If it is no decimal number of dollars, has more than nine places, or is too large.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError("not an amount of dollars such as '12.50', with nine decimal places at most")
    sign, whole, places = match.groups()
    nanos = int(whole) * NANOS + int((places or "").ljust(9, "0"))
    if nanos > MOST:
        raise ValueError("an amount is nine billion dollars at most")
    return -nanos if sign == "-" else nanos


def format_money(nanos: int) -> str:
    """Return *nanos* as a decimal text of dollars, exact, with two places at least."""
    whole, rest = divmod(abs(nanos), NANOS)
    places = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanos < 0 else ''}{whole}.{places}"
