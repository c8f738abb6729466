"""Who may import whom: the table of docs/ARCHITECTURE.md, held true."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import codex_proxy

PACKAGE = Path(codex_proxy.__file__).parent

BASE = {"errors", "tasks", "clock"}
SERVER = BASE | {
    "config",
    "logs",
    "trace",
    "protocol",
    "net",
    "storage",
    "accounts",
    "records",
    "ledger",
    "upstream",
    "compression",
    "patterns",
    "addresses",
    "inbound",
    "throttle",
    "alerts",
}
DAEMON = SERVER | {"server", "forwarder", "supervisor", "handover", "telemetry"}
ALL = DAEMON | {"daemon", "demo", "commands", "cli", "simulator"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "tasks": set(),
    "clock": set(),
    "supervisor": {"errors"},
    "handover": {"errors", "supervisor"},
    "patterns": set(),
    "compression": set(),
    "addresses": set(),
    "throttle": {"addresses"},
    "config": {"errors", "addresses"},
    "telemetry": {"errors", "config", "trace"},
    # JSON is rendered in one place.
    "logs": {"errors", "protocol.wire"},
    # An encoder says how a turn ended and what it used, in the words of the trace.
    "protocol": {"errors", "trace", "patterns"},
    "trace": {"errors"},
    "net": BASE | {"config", "compression", "addresses"},
    "inbound": set(),
    "storage": BASE | {"config"},
    # JSON is read in one place; the rest of `protocol` is none of the accounts' business.
    "accounts": BASE | {"config", "net", "trace", "patterns", "protocol.wire"},
    "records": BASE | {"config", "trace", "protocol", "storage"},
    "ledger": BASE | {"config", "trace", "protocol", "storage", "patterns"},
    # A file is written as an account's is, a time told as a refusal tells it.
    "alerts": BASE | {"config", "net", "protocol.wire", "accounts.files", "accounts.telling"},
    "upstream": BASE | {"config", "trace", "protocol", "net", "accounts", "compression", "patterns"},
    # Its log lines are redacted as the daemon's are.
    "forwarder": {"errors", "config", "tasks", "net", "logs", "addresses", "inbound", "throttle"},
    "server": SERVER,
    "simulator": {"tasks", "protocol.wire", "protocol.sse"},
    "daemon": DAEMON,
    # A command does what the daemon does, or asks it; nothing of the simulator is in it.
    "commands": DAEMON | {"daemon"},
    "demo": ALL,
    "cli": ALL,
    "__main__": ALL,
}
"""Room (a folder or a module of the package) -> what it may import; its own modules always."""

PURE_ROOMS = ("protocol",)
PURE_MODULES = (
    "throttle",
    "accounts.account",
    "accounts.state",
    "accounts.quota",
    "accounts.poolview",
    "accounts.affinity",
    "accounts.scheduler",
    "accounts.ceilings",
    "accounts.crowd",
    "accounts.dues",
    "accounts.leftout",
    "accounts.outlook",
    "accounts.shelves",
    "accounts.telling",
    "alerts.rules",
    "alerts.episodes",
    "alerts.shapes",
    "records.story",
    "ledger.book",
    "ledger.cleaning",
    "ledger.keys",
    "ledger.model",
    "ledger.money",
    "ledger.prices",
    "ledger.rates",
    "ledger.windows",
    "upstream.ejection",
    "upstream.rendezvous",
    "net.head",
    "net.passing",
    "forwarder.heads",
    "forwarder.limits",
    "forwarder.routes",
)
IMPURE = {"asyncio", "time", "random", "secrets", "socket", "threading", "subprocess", "aiohttp"}

INBOUND = ("server.", "simulator.", "forwarder.", "accounts.login", "inbound")
"""Where inbound HTTP is known."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts), ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Yield the dotted name of everything that a module imports, wherever in it."""
    here = ["codex_proxy", *name.split(".")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def ours(name: str, tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports of this package, without the package's own name."""
    for imported in imports(name, tree):
        head, _, rest = imported.partition(".")
        # The package itself has only the version.
        if head == "codex_proxy" and rest and not rest.startswith("__version__"):
            yield rest


def at_run_time(tree: ast.Module) -> ast.Module:
    """Return a module without what it imports for its annotations alone."""
    kept = [
        node
        for node in tree.body
        if not (
            isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        )
    ]
    return ast.Module(body=kept, type_ignores=[])


def trespasses(name: str, tree: ast.Module) -> list[str]:
    room = name.split(".")[0]
    allowed = MAY_IMPORT[room] | {room}
    return [
        imported
        for imported in ours(name, tree)
        if not any(imported == entry or imported.startswith(f"{entry}.") for entry in allowed)
    ]


def impurities(name: str, tree: ast.Module) -> list[str]:
    """Return what a pure module must not have: time, chance, waiting, the network; logs too in a pure room."""
    in_room = name.split(".")[0] in PURE_ROOMS
    if not (in_room or name in PURE_MODULES):
        return []
    banned = IMPURE | ({"logging"} if in_room else set())
    found = [imported for imported in imports(name, at_run_time(tree)) if imported.split(".")[0] in banned]
    found += [
        type(node).__name__ for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef | ast.Await)
    ]
    return found


def speaks_inbound_http(name: str, tree: ast.Module) -> bool:
    imported = any(
        entry == "aiohttp.web" or entry.startswith("aiohttp.web.") for entry in imports(name, tree)
    )
    attribute = any(
        isinstance(node, ast.Attribute)
        and node.attr == "web"
        and isinstance(node.value, ast.Name)
        and node.value.id == "aiohttp"
        for node in ast.walk(tree)
    )
    return imported or attribute


MODULES = dict(modules())


def test_every_module_belongs_to_a_room() -> None:
    rooms = {name.split(".")[0] for name in MODULES} - {"__init__"}
    assert rooms <= set(MAY_IMPORT), (
        "a new room: say in MAY_IMPORT and docs/ARCHITECTURE.md what it may import"
    )


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_point_downwards(name: str) -> None:
    assert trespasses(name, MODULES[name]) == []


@pytest.mark.parametrize("name", MODULES)
def test_pure_modules_are_pure(name: str) -> None:
    assert impurities(name, MODULES[name]) == []


@pytest.mark.parametrize("name", MODULES)
def test_inbound_http_is_known_to_few(name: str) -> None:
    assert name.startswith(INBOUND) or not speaks_inbound_http(name, MODULES[name])


def test_the_package_itself_imports_nothing() -> None:
    assert list(imports("__init__", MODULES["__init__"])) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("protocol.chat", "from codex_proxy.accounts import pool", ["accounts.pool"]),
        ("protocol.chat", "from ..accounts.pool import Pool", ["accounts.pool.Pool"]),
        ("protocol.chat", "def f():\n    import codex_proxy.server.app", ["server.app"]),
        ("accounts.pool", "from codex_proxy import upstream", ["upstream"]),
        (
            "simulator.server",
            "from codex_proxy.protocol.chat import ChatEncoder",
            ["protocol.chat.ChatEncoder"],
        ),
        ("simulator.server", "from codex_proxy.protocol import wire, chat", ["protocol.chat"]),
        ("daemon", "import codex_proxy.simulator", ["simulator"]),
        ("errors", "from codex_proxy.errors_too import x", ["errors_too.x"]),
        ("accounts.pool", "from codex_proxy import __version__, errors\nfrom .state import State", []),
        (
            "simulator.server",
            "from codex_proxy.protocol.sse import Parser\nfrom codex_proxy import tasks",
            [],
        ),
    ],
)
def test_a_trespass_is_found(name: str, source: str, found: list[str]) -> None:
    assert trespasses(name, ast.parse(source)) == found


@pytest.mark.parametrize(
    ("name", "source", "is_found"),
    [
        ("protocol.chat", "import time", True),
        ("protocol.chat", "from asyncio import Queue", True),
        ("protocol.chat", "import logging", True),
        ("protocol.chat", "async def f(): ...", True),
        ("protocol.chat", "import re", False),
        ("accounts.state", "from random import random", True),
        ("accounts.state", "import logging", False),
        ("accounts.state", "if TYPE_CHECKING:\n    import asyncio", False),
        ("accounts.state", "if True:\n    import asyncio", True),
        ("accounts.store", "import time", False),
    ],
)
def test_an_impurity_is_found(name: str, source: str, is_found: bool) -> None:
    assert bool(impurities(name, ast.parse(source))) is is_found


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("from aiohttp import web", True),
        ("import aiohttp.web", True),
        ("from aiohttp.web import Request", True),
        ("import aiohttp\naiohttp.web.run_app", True),
        ("import aiohttp\naiohttp.ClientSession", False),
    ],
)
def test_inbound_http_is_found(source: str, is_found: bool) -> None:
    assert speaks_inbound_http("upstream.backend", ast.parse(source)) is is_found
