"""Small pieces of work done together, in threads, in the order in which they came.

A transaction ends when the disk has it, which takes as long for ten plans as for one. And threads that compute share
the interpreter's lock: all at once they are no faster than in turn, and one of them can be passed over again and again.
So what comes while one batch is made makes up the next, which is made while the first one is stored.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

from anyio import CapacityLimiter, to_thread

Item = TypeVar("Item")
Result = TypeVar("Result")

_STAGES = 2  # one batch is made, another one is stored


class TooManyWaiting(Exception):
    """Too many wait already."""


class Batches(Generic[Item, Result]):
    """Makes results of items together, and stores them together.

    Args:
        make: returns a result, or the error of that item, for each item. Called in a thread, never twice at a time.
        store: keeps results. What it raises is the error of all of them.
        largest: the most items of a batch.
        most_waiting: the most items that wait for theirs.
    """

    def __init__(
        self,
        make: Callable[[list[Item]], Sequence[Result | Exception]],
        store: Callable[[list[Result]], None],
        largest: int = 16,
        most_waiting: int = 256,
    ) -> None:
        self._make, self._store, self._largest, self._most_waiting = make, store, largest, most_waiting
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._making = asyncio.Lock()
        self._threads = CapacityLimiter(_STAGES)  # of its own: those who wait for results may hold all others

    async def add(self, item: Item) -> Result:
        """Wait until an item's result is stored.

        Raises:
            TooManyWaiting: ``most_waiting`` items wait already.
            Exception: the item's error.
        """
        if len(self._waiting) >= self._most_waiting:
            raise TooManyWaiting
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if len(self._tasks) < _STAGES:
            self._tasks.add(asyncio.create_task(self._run()))
        return await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._next()
        finally:  # and not in a callback, which a loop that is closed now would not call
            self._tasks.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _next(self) -> None:
        """Make, store and hand out one batch."""
        async with self._making:
            batch, self._waiting = self._waiting[: self._largest], self._waiting[self._largest :]
            results = await self._made([item for item, _ in batch])
        results = await self._stored(results)
        for (_, done), result in zip(batch, results, strict=True):
            if done.cancelled():  # its request is gone
                continue
            if isinstance(result, Exception):
                done.set_exception(result)
            else:
                done.set_result(result)

    async def _made(self, items: list[Item]) -> Sequence[Result | Exception]:
        try:
            return await to_thread.run_sync(self._make, items, limiter=self._threads) if items else []
        except Exception as error:
            return [error] * len(items)

    async def _stored(self, results: Sequence[Result | Exception]) -> Sequence[Result | Exception]:
        made = [result for result in results if not isinstance(result, Exception)]
        try:
            if made:
                await to_thread.run_sync(self._store, made, limiter=self._threads)
        except Exception as error:
            return [result if isinstance(result, Exception) else error for result in results]
        return results
