"""The leader's loop that deletes what has outlived its time.

Only the leader decides that something has: to its followers it is a deletion like any other, so that all nodes agree,
and no clock but the leader's matters.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from mehdb.errors import DamagedRow, DiskFull, NotNow
from mehdb.store import Store

log = logging.getLogger("mehdb.expiry")

LOOK_EVERY_S: Final = 0.1  # a life is exact to a second; looking costs nothing, as the next end of one is in memory
RETRY_S: Final = 2.0  # after one that could not be deleted: what was in the way seldom goes at once


async def expire(store: Store, writing: Callable[[], AbstractContextManager[object]]) -> None:
    """Delete what has expired in *store*, for ever, whenever *writing*, which counts a write, allows one.

    Nothing is deleted twice, and nothing that has been written anew. Raises only what no retry can mend.
    """
    problem: str | None = None  # told once
    while True:
        delay_s = LOOK_EVERY_S
        try:
            while store.expiry_due:
                with writing():
                    await store.expire()
            if problem is not None:
                log.info("expiry goes on")
            problem = None
        except NotNow:  # not leading yet, or draining: the next leader will
            pass
        except (DamagedRow, DiskFull) as error:
            delay_s = RETRY_S
            if problem != error.code:
                log.warning('expiry waits code=%s reason="%s"', error.code, error)
                problem = error.code
        await asyncio.sleep(delay_s)
