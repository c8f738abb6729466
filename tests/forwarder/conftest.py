"""The forwarder is tested on each event loop that it may run on."""

import asyncio
import importlib
from collections.abc import Callable, Mapping


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test of this folder on asyncio's own loop, and on uvloop where there is one."""
    factories = {"asyncio": asyncio.new_event_loop}
    try:
        factories["uvloop"] = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        pass
    return factories
