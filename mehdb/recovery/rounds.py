"""Rounds of one piece of work that all share who come before it begins.

Whoever asks must not be answered with what was found out before: so a round under way is of no use to who comes now,
but one round after it is enough for all who come meanwhile.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, TypeVar

from mehdb.errors import Recovering

T = TypeVar("T")

ENDED: Final = "this node begins anew: ask again in a moment"


class Rounds(Generic[T]):
    """Does *work*, one round after the other, for as long as somebody asks."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]], name: str) -> None:
        self._work = work
        self._name = name
        self._under_way: asyncio.Task[T] | None = None
        self._next: asyncio.Task[T] | None = None
        self._closed = False

    async def result(self) -> T:
        """Return what a round gives that begins after this was called. Raises `Recovering` if there will be none."""
        if self._closed:
            raise Recovering(ENDED)
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._under_way), name=self._name)
        task = self._next
        await asyncio.wait([task])  # others wait for it, too: who is cancelled leaves it as it is
        if task.cancelled():
            raise Recovering(ENDED)
        return task.result()

    async def _after(self, before: "asyncio.Task[T] | None") -> T:
        if before is not None:
            await asyncio.wait([before])
        self._under_way, self._next = self._next, None
        return await self._work()

    async def close(self) -> None:
        """End what is under way, for good."""
        self._closed = True
        tasks = [task for task in (self._under_way, self._next) if task is not None and not task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
