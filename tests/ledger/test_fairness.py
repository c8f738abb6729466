"""Places under pressure: never more than there are, none lost, and nobody starved by who asks for most."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from codex_proxy.ledger import fairness
from codex_proxy.ledger.fairness import Ceilings, Crowded, Places


@dataclass
class Hall:
    """Places, and those who want one."""

    all: int | None = None
    keys: dict[str, int] = field(default_factory=dict)
    users: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = Places(lambda key, user: Ceilings(self.keys.get(key), self.users.get(user), self.all))
        self.tasks: list[asyncio.Task[None]] = []

    async def want(self, key: str, user: str | None = None, *, seconds: float = 5.0) -> None:
        """Have *key* want a place; its task, the last one, ends when it has one."""

        async def enter() -> None:
            await self.places.enter(key, user or key, seconds)
            self.order.append(key)

        self.tasks.append(asyncio.get_running_loop().create_task(enter()))
        await asyncio.sleep(0)

    async def leave(self, key: str, user: str | None = None) -> None:
        """Give back one of *key*'s places, and let whoever gets it notice."""
        self.places.leave(key, user or key)
        for _ in range(3):
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Nobody waits any more."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def is_empty(places: Places) -> bool:
    return (places.taken, places.waiting) == (0, 0) and not any((
        places._keys,
        places._users,
        places._queues,
        places._last,
        places._waiting_of,
    ))


async def test_with_room_a_turn_begins_at_once() -> None:
    hall = Hall(all=2)
    assert hall.places.try_enter("a", "a")
    assert hall.places.try_enter("a", "a")
    assert not hall.places.try_enter("b", "b")
    hall.places.leave("a", "a")
    assert hall.places.try_enter("b", "b")
    hall.places.leave("a", "a")
    hall.places.leave("b", "b")
    assert is_empty(hall.places)


@pytest.mark.parametrize(
    ("keys", "users", "most", "whose"),
    [
        ({"a": 1}, {}, None, "key"),
        ({}, {"u": 1}, None, "user"),
        ({}, {}, 1, "all"),
        ({"a": 0}, {}, None, "key"),
    ],
)
async def test_each_ceiling_holds_and_is_named(
    keys: dict[str, int], users: dict[str, int], most: int | None, whose: str
) -> None:
    hall = Hall(most, keys, users)
    if keys.get("a") != 0:
        await hall.places.enter("a", "u", 0)
    with pytest.raises(Crowded) as refused:
        await hall.places.enter("a", "u", 0)
    assert refused.value.whose == whose
    with pytest.raises(Crowded):
        await hall.places.enter("a", "u", 0.01)
    assert hall.places.waiting == 0


async def test_a_place_that_becomes_free_goes_to_who_has_the_fewest() -> None:
    hall = Hall(all=4)
    for _ in range(10):
        await hall.want("greedy")
    for key in ("b", "c", "b"):
        await hall.want(key)
    assert hall.order == ["greedy"] * 4
    for _ in range(4):
        await hall.leave("greedy")
    # One for each of those without any, then all have the same, and whose last one is longest ago counts.
    assert hall.order[4:] == ["b", "c", "greedy", "b"]
    await hall.close()


async def test_many_keys_of_one_user_are_no_more_than_one_user() -> None:
    hall = Hall(all=6)
    for number in range(12):
        await hall.want(f"key-{number}", "crowd")
    for _ in range(3):
        await hall.want("single", "other")
    for number in range(6):
        await hall.leave(f"key-{number}", "crowd")
    assert Counter(key.partition("-")[0] for key in hall.order[6:]) == {"single": 3, "key": 3}
    await hall.close()


async def test_who_is_held_up_by_a_ceiling_of_its_own_does_not_hold_up_the_others() -> None:
    hall = Hall(all=3, keys={"a": 1})
    for key in ("a", "a", "a"):
        await hall.want(key)
    await hall.want("b")
    assert hall.order == ["a", "b"]
    await hall.leave("a")
    assert hall.order == ["a", "b", "a"]
    await hall.close()


async def test_nobody_overtakes_in_the_queue_of_a_key() -> None:
    hall = Hall(keys={"a": 1})
    hall.places.try_enter("a", "a")
    await hall.want("a")
    hall.places.leave("a", "a")
    # The place is the first one's, who has not heard of it yet.
    assert not hall.places.try_enter("a", "a")
    await hall.tasks[-1]
    await hall.close()


async def test_a_raised_ceiling_counts_at_the_next_look() -> None:
    hall = Hall(all=1)
    for key in ("a", "b", "c", "d"):
        await hall.want(key)
    hall.all = 2
    hall.places.look()
    await asyncio.sleep(0)
    assert hall.order == ["a", "b"]
    hall.all = None
    # Whoever comes next brings it about too.
    assert hall.places.try_enter("e", "e")
    await asyncio.sleep(0)
    assert hall.order == ["a", "b", "c", "d"]
    assert hall.places.taken == 5


async def test_the_time_in_the_queue_is_bounded() -> None:
    hall = Hall(all=1)
    await hall.want("a")
    with pytest.raises(Crowded) as refused:
        await hall.places.enter("b", "b", 0.02)
    assert (refused.value.whose, refused.value.limit) == ("all", 1)
    assert hall.places.waiting == 0


async def test_the_queues_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MAX_WAITING", 5)
    monkeypatch.setattr(fairness, "MAX_WAITING_OF_ONE", 3)
    hall = Hall(all=1)
    for key in ("x", "a", "a", "a"):
        await hall.want(key)
    with pytest.raises(Crowded):
        await hall.places.enter("a", "a", 5)
    for key in ("b", "c"):
        await hall.want(key)
    with pytest.raises(Crowded):
        await hall.places.enter("d", "d", 5)
    await hall.close()
    assert hall.places.waiting == 0


async def test_many_keys_of_one_user_leave_room_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MAX_WAITING_OF_USER", 4)
    hall = Hall(all=1)
    await hall.want("first")
    for number in range(4):
        await hall.want(f"key-{number}", "crowd")
    with pytest.raises(Crowded) as refused:
        await hall.places.enter("key-4", "crowd", 5.0)
    assert (refused.value.whose, refused.value.limit) == ("all", 1)
    await hall.want("single", "other")
    assert hall.places.waiting == 5
    await hall.leave("first")
    # Whoever has got a place waits no more.
    await hall.want("key-5", "crowd")
    assert hall.places.waiting == 5
    await hall.close()
    for key in hall.order[1:]:
        hall.places.leave(key, "crowd")
    assert is_empty(hall.places)


async def test_who_leaves_while_waiting_gives_its_place_up() -> None:
    hall = Hall(all=1)
    await hall.want("a")
    await hall.want("b")
    await hall.want("c")
    gone, stays = hall.tasks[-2:]
    gone.cancel()
    # Cancelled, and not yet told of it.
    await hall.leave("a")
    await stays
    assert hall.order == ["a", "c"]
    assert (hall.places.taken, hall.places.waiting) == (1, 0)


async def test_who_leaves_at_the_moment_it_gets_its_place_gives_it_back() -> None:
    hall = Hall(all=1)
    await hall.want("a")
    await hall.want("b")
    await hall.want("c")
    gone, stays = hall.tasks[-2:]
    hall.places.leave("a", "a")
    # It has it, and has not heard of it.
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert gone.cancelled()
    await stays
    assert hall.order == ["a", "c"]
    assert hall.places.taken == 1


async def test_a_place_that_comes_at_the_last_moment_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    hall = Hall(all=1)
    await hall.want("a")
    await hall.want("b", seconds=0.01)
    task = hall.tasks[-1]
    loop = asyncio.get_running_loop()
    # The place and the end of its patience in one turn of the loop.
    loop.call_at(loop.time() + 0.01, hall.places.leave, "a", "a")
    await asyncio.gather(task, return_exceptions=True)
    if task.exception() is None:
        assert (hall.places.taken, hall.order) == (1, ["a", "b"])
    else:
        assert (hall.places.taken, hall.order) == (0, ["a"])
    assert hall.places.waiting == 0


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_no_ceiling_is_passed_and_no_place_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    hall = Hall(rng.randint(1, 6), {"a": 2, "b": 3}, {"u": 4})
    users = {"a": "u", "b": "u", "c": "v", "d": "w"}
    under_way: list[str] = []
    peak = Counter[str]()

    async def turn(key: str) -> None:
        try:
            await hall.places.enter(key, users[key], rng.choice([0, 0.002, 5.0]))
        except Crowded:
            return
        under_way.append(key)
        count = Counter(under_way)
        assert len(under_way) <= 6
        for name, value in count.items():
            peak[name] = max(peak[name], value)
        try:
            for _ in range(rng.randint(0, 6)):
                await asyncio.sleep(0)
        finally:
            under_way.remove(key)
            hall.places.leave(key, users[key])

    tasks: list[asyncio.Task[None]] = []
    for _ in range(400):
        tasks.append(asyncio.get_running_loop().create_task(turn(rng.choice("aaaabcd"))))
        if rng.random() < 0.2:
            rng.choice(tasks).cancel()
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        if rng.random() < 0.05:
            hall.all = rng.randint(1, 6)
            hall.places.look()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [one for one in results if isinstance(one, Exception)]
    assert is_empty(hall.places)
    assert peak["a"] <= 2
    assert peak["b"] <= 3
    assert peak["a"] > 0
    assert peak["d"] > 0


async def test_a_key_that_floods_leaves_the_others_their_share() -> None:
    """One that wants fifty at a time gets what five leave that want one after the other, and no more."""
    hall = Hall(all=6)
    served = Counter[str]()
    end = asyncio.Event()

    async def keep_asking(key: str) -> None:
        while not end.is_set():
            await hall.places.enter(key, key, 5)
            for _ in range(5):
                await asyncio.sleep(0)
            served[key] += 1
            hall.places.leave(key, key)
            if served.total() >= 600:
                end.set()

    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(keep_asking("greedy")) for _ in range(50)]
    tasks += [loop.create_task(keep_asking(f"calm-{number}")) for number in range(5)]
    await asyncio.gather(*tasks)
    # A sixth would be its share, had it been there at every moment.
    assert min(served[f"calm-{number}"] for number in range(5)) > 0.75 * served.total() / 6
    assert is_empty(hall.places)


async def test_those_who_come_back_at_each_end_do_not_starve_who_has_waited() -> None:
    """Two that ask again and again, and one that asked for several at once: it has its turns among theirs."""
    hall = Hall(all=1)
    end = asyncio.Event()

    async def keep_asking(key: str) -> None:
        while not end.is_set():
            await hall.places.enter(key, key, 5)
            await asyncio.sleep(0)
            hall.order.append(key)
            hall.places.leave(key, key)
            if len(hall.order) >= 100:
                end.set()

    async def ask_once() -> None:
        await hall.places.enter("patient", "patient", 5)
        await asyncio.sleep(0)
        hall.order.append("patient")
        hall.places.leave("patient", "patient")

    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(keep_asking(key)) for key in ("eager", "keen")]
    tasks += [loop.create_task(ask_once()) for _ in range(5)]
    await asyncio.gather(*tasks)
    served = [place for place, key in enumerate(hall.order) if key == "patient"]
    # Each third place, as of three.
    assert len(served) == 5
    assert served[-1] < 18
    assert is_empty(hall.places)
