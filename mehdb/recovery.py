"""The leader's start: it asks its peers what they hold before it leads, so that a lost volume never empties theirs.

The invariant it owns (promise 4): a leader never leads with less than a peer of its history holds, as long as that peer
can be asked, and never begins a history while one may exist elsewhere. `decide` is the whole table, without I/O:

    own store                          peers                                 then
    at or ahead of all of its history  any                                   `Lead`
    behind one of its history          any                                   `CatchUp`, then lead
    empty or damaged                   one history among them                `TakeSnapshot`, then lead
    empty or damaged                   several histories                     `Refuse`: an operator chooses
    empty or damaged                   one that does not answer              `Wait`
    empty                              all empty, or none                    `Lead`, in a history of its own
    damaged                            all empty, or none                    `Refuse`: an operator decides

A peer that exists and does not answer is waited for, but by a store with data only for a while. A peer of another
history, or on another chain, is left alone: it will be diverged, and keep its data.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Final, NamedTuple

from msgspec.structs import replace

from mehdb.errors import Compacted, Damaged, DamagedRow, DiskFull, Diverged, NotNow, PeerAbsent, PeerError
from mehdb.model import ORIGIN, Epoch, History, NodePosition, Revision, State
from mehdb.peers import Peer
from mehdb.roles import Leadership
from mehdb.store import Store, read_mark
from mehdb.transfer import fetch

log = logging.getLogger("mehdb.recovery")

SILENT_TIMEOUT_S: Final = 10.0  # how long a store with data waits for a peer that exists and does not answer
ASK_EVERY_S: Final = 0.5
ASK_AGAIN_S: Final = 2.0  # between two looks at peers that seem to hold more
PEERS_MAX: Final = 128  # with those that have shown up by themselves
ASKED_AT_ONCE: Final = 8  # pods have consecutive ordinals: where so many in a row do not exist, no more are looked for


class Own(NamedTuple):
    """What this node holds itself. Of a *damaged* store, *history* and *head* are what it once acknowledged."""

    history: History | None
    head: Revision
    epoch: Epoch
    damaged: Damaged | None = None


@dataclass(frozen=True)
class Peers:
    """What the peers that exist said: where they are, or why they did not answer. By base URL.

    *forked* are those whose changes have turned out not to continue this node's.
    """

    positions: dict[str, NodePosition]
    silent: dict[str, str]
    forked: frozenset[str] = frozenset()

    def with_data(self) -> dict[str, NodePosition]:
        """Return those that hold changes, the most advanced first."""
        found = {url: one for url, one in self.positions.items() if one.history and one.revision > ORIGIN}
        return dict(sorted(found.items(), key=lambda item: -item[1].revision))

    def epoch_of(self, history: History | None) -> Epoch:
        """Return the highest epoch that a peer has seen in *history*."""
        return max((one.epoch for one in self.positions.values() if one.history == history), default=Epoch(0))


class Lead(NamedTuple):
    """Lead on the own store, which is in *history* if it is in none yet; *notes* say what an operator should know."""

    epoch: Epoch
    history: History | None
    notes: tuple[str, ...] = ()


class CatchUp(NamedTuple):
    """Take the missing changes from one of *urls*, the most advanced first."""

    urls: tuple[str, ...]


class TakeSnapshot(NamedTuple):
    """Take the whole store of one of *urls*, the most advanced first."""

    urls: tuple[str, ...]


class Wait(NamedTuple):
    """Ask again: *reason* says whom."""

    reason: str


class Refuse(NamedTuple):
    """Do not lead: *reason* says why, and what an operator can do."""

    reason: str


Decision = Lead | CatchUp | TakeSnapshot | Wait | Refuse


def decide(own: Own, peers: Peers, *, waited: bool) -> Decision:
    """Return what a leader does that holds *own*. *waited* says that silent peers have had their time."""
    if peers.silent and not waited:
        return Wait(f"waiting for {_listed(peers.silent)}")
    if own.head > ORIGIN and not own.damaged:
        return _decide_with_data(own, peers)
    return _decide_without(own, peers)


def _decide_with_data(own: Own, peers: Peers) -> Decision:
    holders = peers.with_data()
    ahead = {url: one for url, one in holders.items() if one.history == own.history and one.revision > own.head}
    if continuing := tuple(url for url in ahead if url not in peers.forked):
        return CatchUp(continuing)
    notes = [f"{url} was not asked: {why}" for url, why in peers.silent.items()]
    notes += [
        f"{url} has other changes ({one.history} at revision {one.revision}): it keeps them and will be diverged"
        for url, one in holders.items()
        if one.history != own.history or url in ahead
    ]
    return Lead(Epoch(max(own.epoch, peers.epoch_of(own.history))), own.history, tuple(notes))


def _decide_without(own: Own, peers: Peers) -> Decision:
    holders = peers.with_data()
    histories = {one.history for one in holders.values()}
    if len(histories) > 1 or (own.damaged and own.history and histories - {own.history}):
        held = "; ".join(f"{url} has {one.history} at revision {one.revision}" for url, one in holders.items())
        lost = f"{own.damaged}, of history {own.history}; " if own.damaged else ""
        return Refuse(f"{lost}peers hold other histories ({held}): choose one with `mehdb adopt --from URL`")
    if holders:
        return _decide_whose_snapshot(own, holders)
    if peers.silent:
        return Wait(
            f"waiting for {_listed(peers.silent)}, which may hold data: bring it back; if its store is damaged, run "
            "`mehdb accept-loss` there, or `mehdb restore` here"
        )
    if own.damaged:
        return Refuse(
            f"{own.damaged}; no peer holds a copy: bring the volume back, restore a backup with `mehdb restore`, or "
            "start without what is missing with `mehdb accept-loss`"
        )
    empty = sorted({one.history for one in peers.positions.values() if one.history})
    history = own.history or (empty[0] if len(empty) == 1 else None)
    return Lead(Epoch(max(own.epoch, peers.epoch_of(history))), history)


def _decide_whose_snapshot(own: Own, holders: dict[str, NodePosition]) -> Decision:
    newest = max(one.revision for one in holders.values())
    best = tuple(url for url, one in holders.items() if one.revision == newest)
    if own.damaged and own.head > newest:
        return Refuse(
            f"{own.damaged}; {best[0]} holds the most, but lacks {own.head - newest} acknowledged changes: bring the "
            f"volume back, or do without them with `mehdb adopt --from {best[0]}`"
        )
    return TakeSnapshot(best)


def _listed(silent: dict[str, str]) -> str:
    return "; ".join(f"{url} ({why})" for url, why in silent.items())


class Leader:
    """Recovers *store* from the peers, leads, and looks again when a peer shows up that holds more.

    `run` never returns; `state` and `problem` say how it goes. *damaged* says why the store could not be opened.
    """

    def __init__(
        self, store: Store, leadership: Leadership, peer_urls: Sequence[str], damaged: Damaged | None = None
    ) -> None:
        self.state = State.RECOVERING
        self.problem: str | None = "asking its peers what they hold"
        self._store = store
        self._leadership = leadership
        self._damaged = damaged
        self._doubted = asyncio.Event()  # a peer showed up that holds more, or another history
        self._led_from: Revision | None = None
        self._forked: frozenset[str] = frozenset()
        self._peers = [Peer(url) for url in peer_urls]

    def doubt(self, url: str | None) -> None:
        """Look at the table again, unless a write has been accepted since this node leads.

        *url* is where the peer answers that gave rise to it, if that is known: a pod's name does not resolve before it
        is ready, and it cannot be ready before its leader leads.
        """
        if url and url not in {peer.url for peer in self._peers} and len(self._peers) < PEERS_MAX:
            self._peers.insert(0, Peer(url))
        if self._led_from == self._store.head:
            self._doubted.set()

    async def run(self) -> None:
        """Recover and lead, for ever."""
        try:
            while True:
                await self._recover()
                await self._until_peers_hold_more()
        finally:
            for peer in self._peers:
                await peer.disconnect()

    async def _recover(self) -> None:
        """Return when this node leads."""
        started_at_s, said = monotonic(), ""
        while True:
            try:
                await self._reopen()
                peers = await self._ask()
                decision = decide(self._own(), peers, waited=monotonic() - started_at_s > SILENT_TIMEOUT_S)
                if await self._carry_out(decision):
                    return
            except DiskFull:
                self.problem = (
                    "the volume is full, no epoch can be begun: make room on it or enlarge it; it goes on by itself"
                )
            except (PeerError, Compacted, DamagedRow, NotNow) as error:
                self.problem = f"{error.code}: {error}"
            if self.problem and self.problem != said:
                log.warning('not leading yet state=%s reason="%s"', self.state, self.problem)
                said = self.problem
            await asyncio.sleep(ASK_EVERY_S)

    async def _carry_out(self, decision: Decision) -> bool:
        """Do what was decided. Return whether this node leads now; if not, the table has to be looked at again."""
        match decision:
            case Lead():
                await self._lead(decision)
                return True
            case CatchUp(urls):
                self.state, self.problem = State.RECOVERING, f"catching up from {urls[0]}"
                await self._with_peer(urls[0], self._catch_up)
            case TakeSnapshot(urls):
                self.state, self.problem = State.RECOVERING, f"taking the snapshot of {urls[0]}"
                await self._with_peer(urls[0], self._take_snapshot)
            case Wait(reason):
                self.state, self.problem = State.RECOVERING, reason
            case Refuse(reason):
                self.state, self.problem = State.FAILED, reason
        return False

    async def _lead(self, decision: Lead) -> None:
        for note in decision.notes:
            log.warning('leading note="%s"', note)
        epoch = self._leadership.next_epoch(decision.epoch)
        await self._store.lead(epoch, decision.history)
        self._led_from = self._store.head
        self.state, self.problem = State.SERVING, None
        log.info("leading epoch=%d history=%s revision=%d", epoch, self._store.meta.history, self._store.head)

    async def _with_peer(self, url: str, work: Callable[[Peer], Awaitable[None]]) -> None:
        """Do *work* with the peer at *url*. One on another chain is remembered as such, and left alone."""
        try:
            await work(next(peer for peer in self._peers if peer.url == url))
        except Diverged as error:
            log.warning('forked peer=%s reason="%s"', url, error)
            self._forked |= {url}

    async def _catch_up(self, peer: Peer) -> None:
        """Apply what *peer* has beyond this store's head, or take its snapshot where that is no longer whole."""
        store = self._store
        while True:
            try:
                pull = await peer.pull(
                    store.position, store.meta.epoch, node=None, durable=store.head, wait_s=0, pages_only=True,
                    from_leader=False,
                )  # fmt: skip
            except Compacted:
                return await self._take_snapshot(peer)
            if pull.page is None:
                log.info("caught up revision=%d from=%s", store.head, peer.url)
                return None
            # This node is about to lead, so no epoch of its own history is over for it.
            await store.apply(replace(pull.page, epoch=max(pull.page.epoch, store.meta.epoch)))

    async def _take_snapshot(self, peer: Peer) -> None:
        """Take the whole store of *peer* in place of this one's, which is kept if there was anything in it."""
        store = self._store
        before = store.head
        try:
            meta = await fetch(peer, store.incoming)
            keep = "damaged" if self._damaged else "replaced" if before else None
            kept = await store.replace(store.incoming, meta, keep, only_at=before)
        finally:
            await asyncio.to_thread(store.incoming.unlink, missing_ok=True)
        self._damaged = None
        log.info("snapshot taken revision=%d from=%s kept=%s", meta.head, peer.url, kept or "nothing")

    async def _until_peers_hold_more(self) -> None:
        """Return when a peer holds what this node lacks, and it has accepted no write yet."""
        while True:
            await self._doubted.wait()
            self._doubted.clear()
            decision = decide(self._own(), await self._ask(), waited=True)
            if not isinstance(decision, Lead):
                self.state, self.problem = State.RECOVERING, "a peer has shown up that holds more"
                await self._store.queue_worked_off()
                if self._store.head == self._led_from:
                    log.warning("a peer has shown up that holds more, recovering from it")
                    return
                self.state, self.problem = State.SERVING, None
            await asyncio.sleep(ASK_AGAIN_S)

    async def _reopen(self) -> None:
        """Open the store, if it could not be opened after another one was to be put in its place. Raises `DiskFull`."""
        if self._damaged is None and not self._store.is_open:
            try:
                await self._store.start()
            except Damaged as error:
                self._damaged = error

    def _own(self) -> Own:
        if self._damaged is None:
            meta = self._store.meta
            return Own(meta.history, meta.head, meta.epoch)
        mark = read_mark(self._store.directory)
        if mark is None:
            return Own(None, ORIGIN, Epoch(0), self._damaged)
        return Own(mark.history, mark.revision, Epoch(0), self._damaged)

    async def _ask(self) -> Peers:
        """Return what all peers say that exist."""
        positions: dict[str, NodePosition] = {}
        silent: dict[str, str] = {}
        for start in range(0, len(self._peers), ASKED_AT_ONCE):
            several = self._peers[start : start + ASKED_AT_ONCE]
            answers = await asyncio.gather(*(peer.position() for peer in several), return_exceptions=True)
            for peer, answer in zip(several, answers, strict=True):
                if isinstance(answer, NodePosition):
                    positions[peer.url] = answer
                elif not isinstance(answer, PeerError):
                    raise answer
                elif not isinstance(answer, PeerAbsent):
                    silent[peer.url] = str(answer)
            if all(isinstance(answer, PeerAbsent) for answer in answers):
                break
        return Peers(positions, silent, self._forked)
