"""The forwarder is tested on each event loop that it may run on, where a loop can matter."""

import asyncio
import importlib
from collections.abc import Callable, Mapping

import pytest

# What these look at is decided before anything is written, or by code that no loop has a part in.
_ON_ONE_LOOP = ("test_service.py", "test_tls.py")


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run a test on asyncio's own loop and on uvloop; one of a table, or of what no loop changes, on uvloop alone.

    Both are there in any case for a test that names its own; without uvloop all run on asyncio's.
    """
    factories = {"asyncio": asyncio.new_event_loop}
    try:
        factories["uvloop"] = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        return factories
    names_its_own = any("loop_factories" in mark.kwargs for mark in item.iter_markers("asyncio"))
    is_of_a_table = any(True for _ in item.iter_markers("parametrize")) and item.path.name == "test_relay.py"
    if not names_its_own and (is_of_a_table or item.path.name in _ON_ONE_LOOP):
        del factories["asyncio"]
    return factories
