"""Addresses of names, in bounded time, with a bounded number of threads.

A resolver whose server is silent takes a minute to say so, and cannot be told to stop. So each name is looked up in a
thread of its own, which whoever asks for it meanwhile shares, and which nobody waits for: not the event loop, not the
threads that read the store, not the end of the process.
"""

import asyncio
import ipaddress
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Any, Final

LOOKUP_TIMEOUT_S: Final = 2.5  # as long as a node may take for an answer
LOOKUPS_MAX: Final = 32  # threads: as many names as anybody asks for at once, several times
KEEP_S: Final = 5.0  # an answer that came too late serves who asks again so soon: else a slow server would never do
ABSENT: Final = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
# Whole: in one of the resolver's search domains a wildcard may stand for everything that does not exist.
IN_CLUSTER: Final = re.compile(r".+\.svc\..*[^.]")

Find = Callable[..., list[tuple[Any, ...]]]


class NameAbsent(OSError):
    """There is no such name: the answer was that, and not that nobody knows."""


class NameUnknown(OSError):
    """Whether there is such a name could not be found out, or not in time."""


class _Lookup:
    """One question, from its thread's start until somebody has had the answer."""

    def __init__(self) -> None:
        self.answer: Future[list[tuple[Any, ...]]] = Future()
        self.answer.set_running_or_notify_cancel()  # whoever stops waiting for it must not cancel it for the others
        self.done_at_s: float | None = None
        self.taken = False

    def of_use(self) -> bool:
        """Return whether it tells who asks now what is so now."""
        return self.done_at_s is None or (not self.taken and monotonic() - self.done_at_s < KEEP_S)


class Names:
    """Looks names up with *find*, which blocks and is called as `socket.getaddrinfo` is."""

    def __init__(self, find: Find = socket.getaddrinfo, lookups_max: int = LOOKUPS_MAX) -> None:
        self._find = find
        self._lookups_max = lookups_max
        self._lock = threading.Lock()
        self._lookups: dict[tuple[str, int], _Lookup] = {}

    async def addresses(
        self, name: str, *, family: int = socket.AF_UNSPEC, timeout_s: float = LOOKUP_TIMEOUT_S
    ) -> tuple[str, ...]:
        """Return the addresses of *name*, at least one; of an address, itself. Raises `NameAbsent` and `NameUnknown`.

        What is being looked up already counts: that answer comes no earlier than now.
        """
        if is_address(name):
            return (name,)
        lookup = self._under_way(f"{name}." if IN_CLUSTER.fullmatch(name) else name, family)
        try:
            async with asyncio.timeout(timeout_s):
                found = await asyncio.wrap_future(lookup.answer)
        except TimeoutError as error:
            raise NameUnknown(f"whether {name} resolves was not found out within {timeout_s:g} s") from error
        except socket.gaierror as error:
            lookup.taken = True
            if error.errno in ABSENT:
                raise NameAbsent(f"the name {name} does not resolve") from error
            raise NameUnknown(f"whether {name} resolves cannot be found out: {error.strerror}") from error
        except (OSError, UnicodeError) as error:
            lookup.taken = True
            raise NameUnknown(f"{name} cannot be looked up: {error}") from error
        lookup.taken = True
        return tuple(dict.fromkeys(str(address[0]) for *_, address in found))

    def _under_way(self, name: str, family: int) -> _Lookup:
        """Return the lookup of *name* that is under way, or begin one."""
        with self._lock:
            lookup = self._lookups.get((name, family))
            if lookup is not None and lookup.of_use():
                return lookup
            self._lookups = {key: one for key, one in self._lookups.items() if one.of_use()}
            busy = sum(one.done_at_s is None for one in self._lookups.values())
            if busy >= self._lookups_max:
                raise NameUnknown(f"{name} is not looked up: {busy} other names are still waited for")
            lookup = self._lookups[name, family] = _Lookup()
        # A daemon: the end of the process does not wait for it.
        threading.Thread(target=self._look_up, args=(lookup, name, family), name=f"look up {name}", daemon=True).start()
        return lookup

    def _look_up(self, lookup: _Lookup, name: str, family: int) -> None:
        try:
            found = self._find(name, None, family=family, type=socket.SOCK_STREAM)
        except Exception as error:  # noqa: BLE001  it is raised where it was asked for
            lookup.done_at_s = monotonic()
            lookup.answer.set_exception(error)
        else:
            lookup.done_at_s = monotonic()
            lookup.answer.set_result(found)


def is_address(host: str) -> bool:
    """Return whether *host* is an IP address: there is nothing to look up."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


NAMES: Final = Names()
"""For all of this process, so that there is one bound."""
