"""Money as the admin API has it, and as the ledger has it."""

from codex_proxy.errors import RequestError
from codex_proxy.ledger.money import format_money, parse_money


def nanos(text: str, param: str) -> int:
    """Return an amount as the ledger keeps it.

    Raises:
        RequestError: If it is none; it names *param*.
    """
    try:
        return parse_money(text)
    except ValueError as exc:
        raise RequestError(f"{param}: {exc}", param=param) from exc


def dollars(amount: int) -> str:
    """Return an amount as it is told."""
    return format_money(amount)
