"""Outbound calls are tested on each event loop that the daemon may run on, and trust nobody but a test's own issuer."""

import asyncio
import importlib
import ssl
from collections.abc import Callable, Mapping

import pytest


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test of this folder on asyncio's own loop, and on uvloop where there is one."""
    factories = {"asyncio": asyncio.new_event_loop}
    try:
        factories["uvloop"] = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        pass
    return factories


@pytest.fixture(autouse=True)
def no_issuers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the machine's own list of issuers unread: reading it takes longer than most of these tests."""
    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", lambda *_: None)
