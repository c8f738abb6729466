"""Retries pass a few at a time, and nobody waits for a place that is free."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from codex_proxy.tasks import Background
from codex_proxy.upstream.budget import AT_LEAST, RetryBudget, Slot


async def turns(number: int = 6) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


class Crowd:
    """Retries that hold their slot until they are let go."""

    def __init__(self, background: Background, budget: RetryBudget) -> None:
        self.budget = budget
        self.inside: list[int] = []
        self._background = background
        self._out: dict[int, asyncio.Event] = {}

    def retry(self, number: int) -> asyncio.Task[None]:
        self._out[number] = asyncio.Event()
        return self._background.spawn(self._work(number), name=str(number))

    def let_go(self, *numbers: int) -> None:
        for number in numbers:
            self._out[number].set()

    async def _work(self, number: int) -> None:
        async with self.budget.slot():
            self.inside.append(number)
            try:
                await self._out[number].wait()
            finally:
                self.inside.remove(number)


@pytest_asyncio.fixture
async def crowd() -> AsyncIterator[Crowd]:
    background = Background()
    yield Crowd(background, RetryBudget())
    await background.aclose()


@pytest.mark.parametrize(("active", "limit"), [(0, 3), (1, 3), (19, 3), (20, 4), (100, 20), (1000, 200)])
def test_a_fifth_may_retry_and_a_few_in_any_case(active: int, limit: int) -> None:
    budget = RetryBudget()
    budget.active = active
    assert budget.limit == limit


async def test_only_so_many_retries_are_under_way(crowd: Crowd) -> None:
    for number in range(10):
        _ = crowd.retry(number)
    await turns()
    assert crowd.inside == [0, 1, 2]
    assert crowd.budget.retrying == AT_LEAST
    crowd.let_go(1)
    await turns()
    assert crowd.inside == [0, 2, 3]
    crowd.let_go(0, 2, 3)
    await turns()
    assert sorted(crowd.inside) == [4, 5, 6]


async def test_a_limit_that_grew_lets_in_all_that_fit(crowd: Crowd) -> None:
    for number in range(10):
        _ = crowd.retry(number)
    await turns()
    crowd.budget.active = 30
    crowd.let_go(0)
    await turns()
    assert sorted(crowd.inside) == [1, 2, 3, 4, 5, 6]


async def test_one_who_gives_up_waiting_takes_no_place_with_him(crowd: Crowd) -> None:
    tasks = [crowd.retry(number) for number in range(6)]
    await turns()
    tasks[3].cancel()
    await turns()
    crowd.let_go(0)
    await asyncio.sleep(0)
    # Called and gone in the same moment.
    tasks[4].cancel()
    await turns(20)
    assert crowd.inside == [1, 2, 5]
    crowd.let_go(1, 2, 5)
    await turns()
    assert crowd.budget.retrying == 0


async def test_a_slot_is_given_back_once_and_early(crowd: Crowd) -> None:
    budget = crowd.budget
    async with budget.slot() as slot:
        assert budget.retrying == 1
        slot.free()
        slot.free()
        assert budget.retrying == 0
    assert budget.retrying == 0


async def test_a_failure_gives_the_slot_back(crowd: Crowd) -> None:
    with pytest.raises(LookupError):
        async with crowd.budget.slot():
            raise LookupError
    assert crowd.budget.retrying == 0


def test_a_first_try_has_no_slot_to_give_back() -> None:
    Slot(None).free()
