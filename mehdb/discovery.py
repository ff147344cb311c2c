"""The pods behind the headless Service that lists them ready or not, for when their names do not resolve.

A pod's own name resolves while it is ready, and a resolver may hold "no such name" for half a minute after. The
Service `mehdb-peers` publishes the addresses of all pods from their start on. Which node is at which of them, only that
node can say. What follows from that is up to whoever asks.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from mehdb.credentials import ANONYMOUS, Credentials
from mehdb.errors import PeerError
from mehdb.model import NodePosition, Role
from mehdb.names import NAMES, NameAbsent, Names, NameUnknown
from mehdb.peers import Peer
from mehdb.whereabouts import Whereabouts

LISTED_MAX: Final = 128  # more addresses are no StatefulSet of ours
SEARCH_TIMEOUT_S: Final = 3.0  # for all addresses at once: some may be stale, and answer nothing
OTHERS_S: Final = 0.3  # for a second process that says that it leads, once one has said so


class Neighbours:
    """The nodes at the addresses of *service*, a DNS name, this one among them.

    *url_at* makes a base URL of an address. Their certificates must be of *certified_as*. Only addresses of *family*
    count: a Service with two families lists each pod twice, and a node that listens on one refuses the other.
    """

    def __init__(
        self,
        service: str,
        url_at: Callable[[str], str],
        credentials: Credentials = ANONYMOUS,
        *,
        certified_as: str | None = None,
        family: int = socket.AF_UNSPEC,
        names: Names = NAMES,
    ) -> None:
        self.service = service
        self._url_at = url_at
        self._credentials = credentials
        self._certified_as = certified_as
        self._family = family
        self._names = names
        self._peers: dict[str, Peer] = {}

    async def peers(self) -> list[Peer]:
        """Return a client to each address that is listed. Raises `NameUnknown` if the list is not to be had.

        No Service of that name is an empty list: it is not everybody's.
        """
        try:
            addresses = await self._names.addresses(self.service, family=self._family)
        except NameAbsent:
            addresses = ()
        urls = [self._url_at(address) for address in addresses[:LISTED_MAX]]
        gone = [self._peers.pop(url) for url in list(self._peers) if url not in urls]
        peers = [self.at(url) for url in urls]
        for peer in gone:
            await peer.disconnect()
        return peers

    def at(self, url: str) -> Peer:
        """Return the client to *url*."""
        if url not in self._peers:
            self._peers[url] = self.client(url)
        return self._peers[url]

    def client(self, url: str) -> Peer:
        """Return a client of its own to a node of this StatefulSet at *url*, an address."""
        return Peer(url, self._credentials, whereabouts=Whereabouts(url, certified_as=self._certified_as))

    async def leader(self, node: str, is_over: Callable[[NodePosition], bool]) -> str | None:
        """Return the address at which *node* says that it leads, in the highest epoch; None if it does at none.

        That an address is listed says nothing: it may be another pod's by now. An answer of which *is_over* is true
        comes from a process whose time is over.
        """
        try:
            peers = await self.peers()
        except NameUnknown:
            return None
        asked = {asyncio.create_task(peer.position(), name=f"ask {peer.url} who leads"): peer for peer in peers}
        try:
            answers = await _answers(
                asked, lambda one: one.node == node and one.role is Role.LEADER and not is_over(one)
            )
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if not answers:
            return None
        return urlsplit(max(answers, key=lambda answer: answer[0].epoch)[1].url).hostname

    async def close(self) -> None:
        """Close all connections."""
        while self._peers:
            await self._peers.popitem()[1].disconnect()


async def _answers(
    asked: dict["asyncio.Task[NodePosition]", Peer], fits: Callable[[NodePosition], bool]
) -> list[tuple[NodePosition, Peer]]:
    """Return the answers that fit: of all who have answered in time, or not long after the first of them."""
    clock = asyncio.get_running_loop().time
    end_s, fitting, pending = clock() + SEARCH_TIMEOUT_S, [], set(asked)
    while pending and clock() < end_s:
        done, pending = await asyncio.wait(pending, timeout=end_s - clock(), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            try:
                position = task.result()
            except PeerError:
                continue
            if fits(position):
                fitting.append((position, asked[task]))
                end_s = min(end_s, clock() + OTHERS_S)
    return fitting
