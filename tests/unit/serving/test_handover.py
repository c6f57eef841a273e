"""What another thread hands over comes in its order, by one wake-up for many, and never keeps a loop alive."""

import asyncio
import gc
import threading
from weakref import ref

import pytest

from tunesmith.serving.handover import Handover, handover


def test_calls_of_threads_come_in_order_and_none_is_lost():
    async def gather() -> list[tuple[int, int]]:
        handed, arrived = handover(), asyncio.Queue[tuple[int, int]]()

        def hand(thread: int) -> None:
            for number in range(2_000):
                handed.call(arrived.put_nowait, (thread, number))

        threads = [threading.Thread(target=hand, args=(thread,)) for thread in range(3)]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(30):
            found = [await arrived.get() for _ in range(6_000)]
        for thread in threads:
            thread.join()
        assert arrived.empty()
        return found

    found = asyncio.run(gather())
    for thread in range(3):
        assert [number for other, number in found if other == thread] == list(range(2_000))


def test_many_calls_wake_the_loop_once():
    async def count() -> tuple[int, list[int]]:
        loop, woken, found = asyncio.get_running_loop(), 0, list[int]()
        wake = loop.call_soon_threadsafe

        def counted(*given):
            nonlocal woken
            woken += 1
            return wake(*given)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        handed = handover()
        for number in range(16):
            handed.call(found.append, number)
        await asyncio.sleep(0)
        handed.call(found.append, 16)
        await asyncio.sleep(0)
        return woken, found

    assert asyncio.run(count()) == (2, list(range(17)))


def test_a_loop_has_one_and_is_let_go_with_it():
    async def twice() -> "tuple[bool, ref[asyncio.AbstractEventLoop], ref[Handover]]":
        found = handover()
        return found is handover(), ref(asyncio.get_running_loop()), ref(found)

    is_one, loop, found = asyncio.run(twice())
    assert is_one
    gc.collect()
    assert loop() is None
    assert found() is None


def test_what_a_stopped_loop_leaves_does_not_keep_it():
    async def leave() -> "tuple[Handover, asyncio.Queue[int], ref[asyncio.AbstractEventLoop]]":
        arrived = asyncio.Queue[int]()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await arrived.get()  # from here on the queue knows its loop
        return handover(), arrived, ref(asyncio.get_running_loop())

    handed, arrived, loop = asyncio.run(leave())
    handed._is_awake = True  # as where a loop was stopped before it came to what had woken it
    handed.call(arrived.put_nowait, 1)
    del handed, arrived
    gc.collect()
    assert loop() is None


def test_what_comes_after_the_end_of_the_loop_is_dropped():
    async def one() -> Handover:
        return handover()

    found: list[int] = []
    handed = asyncio.run(one())
    for number in range(3):
        handed.call(found.append, number)
    assert found == []
