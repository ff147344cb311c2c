"""The way to another node: who it is stays the name in its URL, where it is may change with each connection.

The name goes into the Host header, and is what a certificate must be of; connections go to an address. That is what the
name resolves to, or, where it resolves to nothing or to one that has failed, what is found otherwise. An address counts
until it fails. What is asked there is `peers`' to say.
"""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Final
from urllib.parse import urlsplit

import httpx

from mehdb.names import NAMES, NameAbsent, Names, NameUnknown, is_address

log = logging.getLogger("mehdb.whereabouts")

# Between two searches: each asks every pod. Twice as long each time that nothing is found.
SEARCH_LEAST_S: Final = 0.5
SEARCH_MOST_S: Final = 4.0

Search = Callable[[], Awaitable[str | None]]
"""Returns an address at which the node is, as it says itself; None if it is not found."""


class Whereabouts:
    """Where the node with the base URL *url* is. *search* finds it where its name does not tell.

    *certified_as* is the name that its certificate must be of, where *url* has an address in place of one.
    """

    def __init__(
        self, url: str, search: Search | None = None, *, certified_as: str | None = None, names: Names = NAMES
    ) -> None:
        parts = urlsplit(url)
        self.url = url
        self.host = parts.hostname or ""
        self.port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        self.certified_as = certified_as or (None if is_address(self.host) else self.host)
        self._search = search
        self._names = names
        self._known: tuple[str, ...] = ()  # where the last connection was made, or may be
        self._failed: set[str] = set()  # since one was made
        self._looking: asyncio.Task[tuple[str, ...]] | None = None
        self._search_at_s = monotonic()  # not before
        self._search_delay_s = SEARCH_LEAST_S

    async def addresses(self) -> tuple[str, ...]:
        """Return where the node may be, at least one address. Raises `NameAbsent` and `NameUnknown`."""
        if self._known:
            return self._known
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name=f"look for {self.url}")
            self._looking.add_done_callback(_heed)
        return await asyncio.shield(self._looking)  # others wait for it, too

    @property
    def known(self) -> tuple[str, ...]:
        """Where it was last thought to be, if it was."""
        return self._known

    async def resolved(self) -> tuple[str, ...]:
        """Return what the name resolves to now, and go there from now on. Raises `NameAbsent` and `NameUnknown`."""
        self._known = ()
        self._known = await self._names.addresses(self.host)
        return self._known

    def reached(self, address: str) -> None:
        """Take note that a connection to *address* was made."""
        if self._known != (address,):
            self._known = (address,)
        self._failed.clear()

    def forget(self, address: str | None = None) -> None:
        """Look anew before the next connection, as *address* (None: wherever it was thought to be) has failed."""
        if address is None or address in self._known:
            self._failed.update(self._known)
            self._known = ()

    async def _look(self) -> tuple[str, ...]:
        trouble: NameAbsent | NameUnknown | None = None
        found: tuple[str, ...] = ()
        try:
            found = await self._names.addresses(self.host)
        except (NameAbsent, NameUnknown) as error:
            trouble = error
        untried = tuple(address for address in found if address not in self._failed)
        if not untried and (address := await self._searched()):
            found = (address,)
        if not found:
            assert trouble is not None, "a name that resolves has an address"  # noqa: S101  our own invariant
            raise trouble
        self._known = untried or found
        return self._known

    async def _searched(self) -> str | None:
        """Search, unless that was done just now: the name, however old, may be right again as well."""
        if self._search is None or monotonic() < self._search_at_s:
            return None
        address = await self._search()
        if address:
            self._search_delay_s = SEARCH_LEAST_S
            log.info("found node=%s address=%s", self.url, address)
        self._search_at_s = monotonic() + self._search_delay_s
        self._search_delay_s = SEARCH_LEAST_S if address else min(2 * self._search_delay_s, SEARCH_MOST_S)
        return address


def _heed(task: "asyncio.Task[tuple[str, ...]]") -> None:
    """Take what a look ended with, also where nobody waits for it any more."""
    if not task.cancelled():
        task.exception()


class Transport(httpx.AsyncHTTPTransport):
    """Carries requests for *whereabouts* to where that is."""

    def __init__(self, whereabouts: Whereabouts, tls: ssl.SSLContext, limits: httpx.Limits) -> None:
        # trust_env: a proxy for the outside world must not come between two pods.
        super().__init__(verify=tls, limits=limits, trust_env=False)
        self._whereabouts = whereabouts

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send *request* to the first address that takes a connection, and return the answer's head.

        Raises `httpx.ConnectError` if none does, or none is known: nothing was sent then.
        """
        try:
            addresses = await self._whereabouts.addresses()
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        if self._whereabouts.certified_as:
            request.extensions = {**request.extensions, "sni_hostname": self._whereabouts.certified_as}
        for address in addresses:
            request.url = request.url.copy_with(host=address)
            try:
                answer = await super().handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if address == addresses[-1]:
                    self._whereabouts.forget()
                    raise
            else:
                self._whereabouts.reached(address)
                return answer
        raise AssertionError("there is at least one address")
