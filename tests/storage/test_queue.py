"""What waits to be written."""

import threading

from codex_proxy.storage.queue import Queue


def test_what_was_put_in_comes_out_in_order() -> None:
    queue: Queue[int] = Queue(10)
    for number in range(5):
        queue.put(number)
    assert queue.take(3) == [0, 1, 2]
    assert queue.take(3) == [3, 4]
    assert queue.take(3) == []
    assert (len(queue), queue.dropped) == (0, 0)


def test_the_first_item_wakes_and_the_others_do_not() -> None:
    queue: Queue[int] = Queue(10)
    queue.put(1)
    assert queue.wake.is_set()
    queue.wake.clear()
    queue.put(2)
    assert not queue.wake.is_set()
    queue.take(10)
    queue.put(3)
    assert queue.wake.is_set()


def test_what_is_too_much_costs_the_oldest_and_is_counted() -> None:
    queue: Queue[int] = Queue(3)
    for number in range(10):
        queue.put(number)
    assert (queue.take(10), queue.dropped) == ([7, 8, 9], 7)


def test_nothing_is_lost_between_two_threads() -> None:
    queue: Queue[int] = Queue(1_000_000)
    taken: list[int] = []

    def take() -> None:
        while len(taken) < 20_000:
            queue.wake.wait(5.0)
            queue.wake.clear()
            taken.extend(queue.take(100_000))

    thread = threading.Thread(target=take)
    thread.start()
    for number in range(20_000):
        queue.put(number)
    thread.join(10.0)
    assert taken == list(range(20_000))
