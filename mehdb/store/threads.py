"""Long work: in a thread, which ends soon after whoever waits for it has given up; or such as must come to its end."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

OnProgress = Callable[[int, int], None]
"""Told how much has been done, of how much. Work goes no further if it raises."""


def unheard(_done: int, _total: int) -> None:
    """Tell nobody."""


async def in_thread(work: Callable[[OnProgress], T], on_progress: OnProgress = unheard) -> T:
    """Return what *work* returns, given what to call at each of its steps; *on_progress* is told of them, there.

    Cancelled, it waits until *work* has come to its next step and ended.
    """
    given_up = threading.Event()

    def step(done: int, total: int) -> None:
        if given_up.is_set():
            raise InterruptedError("nobody waits for this any more")
        on_progress(done, total)

    task = asyncio.ensure_future(asyncio.to_thread(work, step))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        given_up.set()
        await asyncio.gather(task, return_exceptions=True)
        raise


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Return what *work* returns. Whoever is cancelled meanwhile waits for its end: half of it would leave no store."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
