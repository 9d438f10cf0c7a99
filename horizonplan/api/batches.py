"""Small pieces of work done together, in a thread, in the order in which they came.

A transaction ends when the disk has it, which takes as long for ten plans as for one. And threads that compute share
the interpreter's lock: all at once they are no faster than in turn, and one of them can be passed over again and again.
So what comes while one batch is worked on makes up the next.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(Exception):
    """Too many wait already."""


class Batches(Generic[Item, Result]):
    """Hands items to ``work`` together, which is called in a thread, never twice at a time.

    Args:
        work: returns a result, or the error of that item, for each item. What it raises is the error of all.
        largest: the most items of a batch.
        most_waiting: the most items that wait for theirs.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Result | Exception]],
        largest: int = 16,
        most_waiting: int = 256,
    ) -> None:
        self._work, self._largest, self._most_waiting = work, largest, most_waiting
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._task: asyncio.Task[None] | None = None

    async def add(self, item: Item) -> Result:
        """Wait for an item's result.

        Raises:
            QueueFull: ``most_waiting`` items wait already.
            Exception: the item's error.
        """
        if len(self._waiting) >= self._most_waiting:
            raise QueueFull
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[: self._largest], self._waiting[self._largest :]
                results: Sequence[Result | Exception]
                try:
                    results = await run_in_threadpool(self._work, [item for item, _ in batch])
                except Exception as error:
                    results = [error] * len(batch)
                for (_, done), result in zip(batch, results, strict=True):
                    if done.cancelled():  # its request is gone
                        continue
                    if isinstance(result, Exception):
                        done.set_exception(result)
                    else:
                        done.set_result(result)
        finally:
            self._task = None
