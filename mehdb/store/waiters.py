"""Those that wait for something to be committed."""

import asyncio
from collections.abc import Callable


class Waiters:
    """Wakes all that wait when something may have changed. All methods belong to one event loop."""

    def __init__(self) -> None:
        self.ended = False
        """Whether nobody waits any more, from now on."""
        self._changed = asyncio.Event()  # set, and replaced, each time
        self._interrupts = 0

    async def until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until *holds*, at most *timeout_s* or until interrupted. Return whether it does."""
        interrupts = self._interrupts
        try:
            async with asyncio.timeout(timeout_s):
                while not holds() and self._interrupts == interrupts and not self.ended:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return holds()

    def wake(self) -> None:
        """Have everyone look."""
        self._changed.set()
        self._changed = asyncio.Event()

    def interrupt(self) -> None:
        """Let everyone go who waits now: there is something else to say."""
        self._interrupts += 1
        self.wake()

    def end(self) -> None:
        """Let everyone go, also who comes later."""
        self.ended = True
        self.wake()
