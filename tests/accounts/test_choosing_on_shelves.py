"""All that is asked of a choice among few accounts, asked again of accounts that stand on shelves as many do."""

import pytest

from codex_proxy.accounts import pool
from tests.accounts import test_choosing, test_pool

TESTS = [
    (name, test)
    for module in (test_choosing, test_pool)
    for name, test in vars(module).items()
    if name.startswith("test_")
]
globals().update(TESTS)


@pytest.fixture(autouse=True)
def shelved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FEW", 0)


def test_no_two_of_them_are_called_the_same() -> None:
    assert len(TESTS) == len(dict(TESTS)) > 100
