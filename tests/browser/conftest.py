"""One browser and one event loop for all tests here: to start either for each of them would take longer than they do."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.browser.desk import NAMES, browsing, fill, named_files, settle, steady_pace, work
from tests.clients.fence import installed
from tests.harness import Stand, standing

AXE_VERSION = "4.14.1"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Start a browser for all tests."""
    async with browsing() as started:
        yield started


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stand]:
    """Make a pool that has everything, for tests that only look."""
    with pytest.MonkeyPatch.context() as patch:
        steady_pace(patch)
        folder = tmp_path_factory.mktemp("world")
        async with standing(folder, accounts=len(NAMES), auths=named_files) as stand:
            await settle(stand)
            await fill(stand)
            await work(stand, rounds=2)
            yield stand


@pytest.fixture(scope="session")
def axe(request: pytest.FixtureRequest) -> str:
    """Return the script that looks for what shuts people out; installed from npm once, as the real clients are."""
    folder: Path = installed(request.config, "axe-core", AXE_VERSION)
    return (folder / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
