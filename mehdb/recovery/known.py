"""The peers that a leader knows of, and what they say when they are asked.

Three kinds: those in its settings, of which most may not exist; those that are listed behind `mehdb-peers`, ready or
not, each of which exists; and guests, which have shown up by themselves, and may have moved since.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from mehdb.credentials import Credentials
from mehdb.discovery import Neighbours
from mehdb.errors import PeerAbsent, PeerError, PeerUnreachable
from mehdb.model import Epoch, History, NodePosition, Revision
from mehdb.names import NameUnknown
from mehdb.peers import Peer
from mehdb.recovery.table import Peers

PEERS_MAX: Final = 128  # with those that have shown up by themselves
ASKED_AT_ONCE: Final = 8  # pods have consecutive ordinals: where so many in a row tell nothing, no more are looked for


class KnownPeers:
    """The nodes at *urls* that exist, all *neighbours* but *node*, which is this one, and guests."""

    def __init__(self, urls: Sequence[str], credentials: Credentials, neighbours: Neighbours | None, node: str) -> None:
        self._credentials = credentials
        self._peers = [Peer(url, credentials) for url in urls]
        self._neighbours = neighbours
        self._node = node
        self.guests: set[str] = set()
        """The base URLs of those that have shown up by themselves and are not listed."""

    def __bool__(self) -> bool:
        """Return whether there may be any."""
        return bool(self._peers) or self._neighbours is not None

    def add_guest(self, url: str) -> None:
        """Ask the peer at *url* as well from now on."""
        if url not in {peer.url for peer in self._peers} and len(self._peers) < PEERS_MAX:
            self._peers.insert(0, self._neighbours.client(url) if self._neighbours else Peer(url, self._credentials))
            self.guests.add(url)

    def at(self, url: str) -> Peer:
        """Return the client to *url*, of a peer that was asked."""
        for peer in self._peers:
            if peer.url == url:
                return peer
        return self._neighbours.at(url) if self._neighbours else Peer(url, self._credentials)

    async def forget_guests(self, urls: set[str] | None = None) -> None:
        """Ask the guests no more, or those at *urls*."""
        forgotten = self.guests & urls if urls is not None else set(self.guests)
        guests = [peer for peer in self._peers if peer.url in forgotten]
        self._peers = [peer for peer in self._peers if peer.url not in forgotten]
        self.guests -= forgotten
        for peer in guests:
            await peer.disconnect()

    async def close(self) -> None:
        """Close all connections."""
        for peer in self._peers:
            await peer.disconnect()

    async def ask(self, epoch: Epoch, end_s: float | None = None, *, refusing_is_silent: bool = True) -> Peers:
        """Return what all that exist say, until *end_s* of the loop's clock: who has not answered by then is silent.

        So is one that is listed and refuses connections: it may hold data. Unless *refusing_is_silent*: then nobody is
        there who could say anything. *epoch* is this node's: another process of it that has seen a higher one is not
        this one, and does not count as having answered.
        """
        said = _Said(self._node, epoch)
        listed = await self._listed(said)
        await self.forget_guests({peer.url for peer in listed})
        peers, asked = list(self._peers), set[str]()  # others may show up meanwhile
        for start in range(0, len(peers), ASKED_AT_ONCE):
            several = peers[start : start + ASKED_AT_ONCE]
            answers = await _positions(several, end_s)
            for peer, answer in zip(several, answers, strict=True):
                if not isinstance(answer, PeerAbsent):
                    said.note(peer, answer, may_be_known=peer.url in self.guests)
                asked.update(peer.whereabouts.known)
            if all(_tells_nothing(answer) for answer in answers):
                break
        listed = [peer for peer in listed if peer.whereabouts.host not in asked]
        for peer, answer in zip(listed, await _positions(listed, end_s), strict=True):
            if refusing_is_silent or not isinstance(answer, PeerAbsent):
                said.note(peer, answer, may_be_known=True)
        return Peers(said.positions, said.silent)

    async def _listed(self, said: "_Said") -> list[Peer]:
        """Return those that are listed. Where the list is not to be had, somebody is silent."""
        if self._neighbours is None:
            return []
        try:
            return await self._neighbours.peers()
        except NameUnknown as error:
            said.silent[self._neighbours.service] = str(error)
            return []


class _Said:
    """What peers have said, each node once."""

    def __init__(self, node: str, epoch: Epoch) -> None:
        self.positions: dict[str, NodePosition] = {}
        self.silent: dict[str, str] = {}
        self._node = node
        self._epoch = epoch
        self._heads: dict[tuple[str, History | None], Revision] = {}

    def note(self, peer: Peer, answer: NodePosition | PeerError, *, may_be_known: bool) -> None:
        """Take down what *peer* has answered. *may_be_known* says that the same node may have been asked elsewhere."""
        if isinstance(answer, PeerError):
            self.silent[peer.url] = str(answer)
            return
        if may_be_known and answer.node == self._node:
            if answer.epoch > self._epoch:
                self.silent[peer.url] = f"another process of {answer.node}, which has seen epoch {answer.epoch}"
            return
        same = (answer.node, answer.history)
        if may_be_known and same in self._heads and answer.revision <= self._heads[same]:
            return
        self._heads[same] = answer.revision
        self.positions[peer.url] = answer


def _tells_nothing(answer: NodePosition | PeerError) -> bool:
    """Return whether nobody is there, or no resolver tells whether somebody is: then asking for more names is idle."""
    return isinstance(answer, PeerAbsent) or (
        isinstance(answer, PeerUnreachable) and isinstance(answer.__cause__, NameUnknown)
    )


async def _positions(peers: Sequence[Peer], end_s: float | None) -> list[NodePosition | PeerError]:
    """Return where *peers* are, or what was in the way until *end_s* of the loop's clock."""
    answers = await asyncio.gather(*(_position(peer, end_s) for peer in peers), return_exceptions=True)
    said = []
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, PeerError):
            raise answer
        said.append(answer)
    return said


async def _position(peer: Peer, end_s: float | None) -> NodePosition:
    """Return where *peer* is, if it says so until *end_s* of the loop's clock. Raises `PeerError`."""
    try:
        async with asyncio.timeout_at(end_s):
            return await peer.position()
    except TimeoutError as error:
        raise PeerUnreachable(f"{peer.url}: no answer in time") from error
