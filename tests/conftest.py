"""Fixtures for more than one test file."""

import gc
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

# Before any test, and before any fixture that serves a whole file, has run a command.
_LEVEL = logging.getLogger("codex_proxy").level


@pytest.fixture(autouse=True)
def _same_logging_after_each_test() -> Iterator[None]:
    """Undo what a command or a daemon set up: the next test may look for lines that were switched off."""
    root, ours = logging.getLogger(), logging.getLogger("codex_proxy")
    handlers = root.handlers[:]
    ours.setLevel(_LEVEL)
    yield
    ours.setLevel(_LEVEL)
    for handler in [
        one for one in root.handlers if one not in handlers and type(one).__module__ == "codex_proxy.logs"
    ]:
        root.removeHandler(handler)


@pytest.fixture
def one_shot_http(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Answer one-shot calls of aiohttp's client without a server.

    Yields the `aioresponses` mock. That library builds a `ClientResponse` by hand and does not know
    `stream_writer` yet, which aiohttp asks for since 3.14.
    """
    import aiohttp
    import aioresponses

    class Response(aiohttp.ClientResponse):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"stream_writer": mock.Mock(), **kwargs})

    # The class is looked up in the module that builds the answers.
    monkeypatch.setattr("aioresponses.core.ClientResponse", Response)
    with aioresponses.aioresponses() as mocked:
        yield mocked


def pytest_collection_finish() -> None:
    """Leave the thousands of collected tests out of every garbage collection from now on.

    A full one over them takes a second, in the middle of whatever test it falls into.
    """
    gc.collect()
    gc.freeze()
