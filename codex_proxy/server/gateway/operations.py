"""The admin API as one table: from it come the routes, the document, and what commands call.

It names the handlers and nothing more: what they need is imported with the first call, because most daemons
have no ledger and are never asked. What an operation takes and gives stands in the annotations of its handler,
so that what is decoded, what mypy checks and what the document says are the same.
"""

import importlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.server.gateway.desk import Call, Desk

BASE = "/api/admin"


@dataclass(slots=True, frozen=True)
class Answered:
    """What came of a call."""

    status: int
    content_type: str
    body: bytes
    file: str | None = None
    """What a browser should call it."""


@dataclass(slots=True, frozen=True)
class Operation:
    """One row: what is asked for where, and who answers."""

    method: str
    path: str
    """Below `BASE`; at most one segment is open."""
    function: str
    """Module and function in this package."""
    summary: str
    status: int = 200
    needs_ledger: bool = True
    is_alias: bool = False
    """A name that people know from elsewhere; it is not in the document."""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.function.rpartition(".")[2]

    @property
    def has_body(self) -> bool:
        """Whether a body is read."""
        return self.method not in ("GET", "DELETE")

    def handler(self) -> Callable[[Desk, Call[Any, Any]], Awaitable[Any]]:
        """Return who answers."""
        module, _, name = self.function.rpartition(".")
        found: Callable[[Desk, Call[Any, Any]], Awaitable[Any]] = getattr(
            importlib.import_module(f"{__package__}.{module}"), name
        )
        return found

    async def perform(
        self, desk: Desk, name: str, query: Mapping[str, str], body: bytes, actor: str
    ) -> Answered:
        """Decode what was asked, do it, and encode what came of it.

        Raises:
            ProxyError: What keeps it from being done.
        """
        if self.needs_ledger:
            # Whoever has none is told so first of all.
            _ = desk.ledger
        performing = importlib.import_module(f"{__package__}.performing")
        answered: Answered = await performing.perform(self, desk, name, query, body, actor)
        return answered


OPERATIONS: tuple[Operation, ...] = (
    Operation("GET", "/openapi.json", "openapi.describe_api", "This description", needs_ledger=False),
    Operation("GET", "/ledger", "ledgers.ledger_status", "How the ledger does"),
    Operation("POST", "/ledger/check", "ledgers.ledger_check", "Whether the money adds up"),
    Operation("GET", "/users", "people.list_users", "Users"),
    Operation("POST", "/users", "people.create_user", "Make a user", status=201),
    Operation("POST", "/users/{id}/credit", "people.credit_user", "Add to a balance", status=201),
    Operation("POST", "/users/{id}/adjust", "people.adjust_user", "Correct a balance", status=201),
    Operation("GET", "/users/{id}/entries", "people.list_entries_of_user", "Changes of one balance"),
    Operation("GET", "/users/{id}/budgets", "people.budgets_of_user", "How its budgets stand"),
    Operation("GET", "/users/{id}", "people.get_user", "One user"),
    Operation("PATCH", "/users/{id}", "people.update_user", "Change a user"),
    Operation("GET", "/entries", "people.list_entries", "Changes of all balances"),
    Operation("GET", "/keys", "people.list_keys", "Keys"),
    Operation("POST", "/keys", "people.create_key", "Make a key", status=201),
    Operation("POST", "/keys/{id}/rotate", "people.rotate_key", "Replace a key's text"),
    Operation("POST", "/keys/{id}/revoke", "people.revoke_key", "End a key"),
    Operation("GET", "/keys/{id}/budgets", "people.budgets_of_key", "How its budgets stand"),
    Operation("GET", "/keys/{id}", "people.get_key", "One key"),
    Operation("PATCH", "/keys/{id}", "people.update_key", "Change a key"),
    Operation("GET", "/usage", "usage.list_usage", "What requests have used"),
    Operation("GET", "/usage/sums", "usage.sum_usage", "Usage added up"),
    Operation("GET", "/usage.csv", "usage.usage_csv", "What requests have used, as a table"),
    Operation("GET", "/usage/sums.csv", "usage.sums_csv", "Usage added up, as a table"),
    Operation("GET", "/usage/{request_id}", "usage.get_usage", "What one request has used"),
    Operation("GET", "/audit", "audit.list_audit", "What owners did"),
    Operation("GET", "/upstreams", "upstreams.list_upstreams", "Upstreams", needs_ledger=False),
    Operation(
        "POST", "/upstreams", "upstreams.add_upstream", "Add an upstream", status=201, needs_ledger=False
    ),
    Operation(
        "GET",
        "/upstreams/health",
        "upstreams.upstreams_health",
        "What the last checks found",
        needs_ledger=False,
    ),
    Operation(
        "POST", "/upstreams/health/check", "upstreams.check_upstreams", "Check all now", needs_ledger=False
    ),
    Operation(
        "POST", "/upstreams/{name}/check", "upstreams.check_upstream", "Check one now", needs_ledger=False
    ),
    Operation("GET", "/upstreams/{name}", "upstreams.get_upstream", "One upstream", needs_ledger=False),
    Operation(
        "PATCH", "/upstreams/{name}", "upstreams.update_upstream", "Change an upstream", needs_ledger=False
    ),
    Operation(
        "DELETE", "/upstreams/{name}", "upstreams.remove_upstream", "Remove an upstream", needs_ledger=False
    ),
    # As the Codex Gateway has them.
    Operation(
        "GET", "/codex/upstreams/health", "upstreams.upstreams_health", "", needs_ledger=False, is_alias=True
    ),
    Operation(
        "POST",
        "/codex/upstreams/health/check",
        "upstreams.check_upstreams",
        "",
        needs_ledger=False,
        is_alias=True,
    ),
    Operation("GET", "/prices", "prices.list_prices", "Prices"),
    Operation("POST", "/prices", "prices.set_price", "Set a price", status=201),
    Operation("POST", "/prices/rerate", "prices.rerate", "Price history again"),
    Operation("DELETE", "/prices/{id}", "prices.end_price", "End a price"),
)
"""Of two rows that fit a path the first counts, so what ends in a word stands before what ends in an open segment."""


async def perform(
    desk: Desk, method: str, path: str, *, query: Mapping[str, str], body: bytes, actor: str
) -> Answered:
    """Do what a request for *path*, below `BASE`, would do; for those who have no HTTP.

    Raises:
        ProxyError: What keeps it from being done.
    """
    for one in OPERATIONS:
        name = segment_of(one.path, path)
        if one.method == method and name is not None:
            return await one.perform(desk, name, query, body, actor)
    raise RequestError(f"there is no {method} {path[:200]}", status=404, code="unknown_url")


def segment_of(pattern: str, path: str) -> str | None:
    """Return what stands in the open segment, empty where there is none; None if the path does not fit."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return "" if path == pattern else None
    tail = rest.partition("}")[2]
    name = path[len(head) : len(path) - len(tail)]
    return name if name and path == f"{head}{name}{tail}" and "/" not in name else None
