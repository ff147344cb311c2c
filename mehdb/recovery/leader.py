"""The leader, from asking its peers to leading, and back when one shows up that holds more."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Final

from msgspec.structs import replace

from mehdb.credentials import Credentials
from mehdb.discovery import Neighbours
from mehdb.errors import (
    Compacted,
    DamagedRow,
    DiskFull,
    Diverged,
    NotConfirmedLeader,
    NotNow,
    PeerError,
    SnapshotRefused,
)
from mehdb.model import Chain, Epoch, Position, Revision, State
from mehdb.peers import Peer, Pull
from mehdb.recovery.known import KnownPeers
from mehdb.recovery.rounds import Rounds
from mehdb.recovery.table import CatchUp, Decision, Lead, Own, Peers, Refuse, TakeSnapshot, Wait, contradiction, decide
from mehdb.roles import Leadership
from mehdb.store import Store
from mehdb.transfer import ProgressLog, fetch

log = logging.getLogger("mehdb.recovery")

SILENT_TIMEOUT_S: Final = 10.0  # how long a store with data waits for a peer that exists and does not answer
ASK_EVERY_S: Final = 0.5
ASK_MOST_S: Final = 5.0  # between two tries to take a peer's data: each may have it copy its whole store
ASK_AGAIN_S: Final = 2.0  # between two looks at peers that seem to hold more, or for room on the volume
SETTLED_AFTER_S: Final = 30.0  # pods start one after the other: the next one should have come by then
CONFIRM_TIMEOUT_S: Final = 3.0  # a reader waits for it; a peer that is alive needs milliseconds
EPOCH_STEP_MAX: Final = 1_000_000  # a store that is older than so many starts is none of ours: who says so is wrong


class Leader:
    """Recovers *store* from the peers, leads, and looks again when a peer shows up that holds more.

    The peers are those at *peer_urls* that exist, and all *neighbours*, among whom is this *node* itself.
    `run` never returns; `state` and `problem` say how it goes.
    """

    def __init__(
        self,
        store: Store,
        leadership: Leadership,
        peer_urls: Sequence[str],
        credentials: Credentials,
        neighbours: Neighbours | None,
        node: str,
    ) -> None:
        self.state = State.RECOVERING
        self.problem: str | None = "asking its peers what they hold"
        self._store = store
        self._leadership = leadership
        self._doubted = asyncio.Event()  # a peer showed up that holds more, or another history
        self._led_from: Revision | None = None
        self._led_at_s = 0.0
        self._forked: frozenset[str] = frozenset()
        self._unclear: frozenset[str] = frozenset()
        self._diverged: frozenset[str] = frozenset()  # what they said when last asked
        self._known = KnownPeers(peer_urls, credentials, neighbours, node)
        self._epoch_seen = Epoch(0)  # by a peer, in this store's history
        self._confirmations = Rounds(self._obstacle_to_leading, "confirm leading")

    def doubt(self, url: str | None, epoch: Epoch) -> None:
        """Look at the table again, unless a write has been accepted since this node leads.

        *url* is where the peer answers that gave rise to it, if that is known: a pod's name does not resolve before it
        is ready, and it cannot be ready before its leader leads. *epoch* is the highest that it has seen in this
        store's history.
        """
        if url:
            self._known.add_guest(url)
        if epoch <= self._store.meta.epoch + EPOCH_STEP_MAX:
            self._epoch_seen = max(self._epoch_seen, epoch)
        if self._led_from == self._store.head:
            self._doubted.set()

    @property
    def settled(self) -> bool:
        """Whether nothing is lost if this node writes of its own accord: no peer that is ahead can come any more.

        When a whole cluster restarts, the leader may be first, and its volume older than a follower's. It could not go
        back to the table after a change of its own.
        """
        waited = monotonic() - self._led_at_s > SETTLED_AFTER_S
        return self.state is State.SERVING and (self._led_from != self._store.head or not self._known or waited)

    async def run(self) -> None:
        """Recover and lead, for ever."""
        log.info("recovering revision=%d", self._store.head)
        try:
            while True:
                await self._recover()
                await self._until_peers_hold_more()
        finally:
            await self._confirmations.close()
            await self._known.close()

    async def confirm(self) -> None:
        """Return once all peers that exist have said, after this was called, that they know of no later leader.

        Raises `NotConfirmedLeader` if one does, or does not answer: this may be an old process beside a newer one.
        """
        if obstacle := await self._confirmations.result():
            raise NotConfirmedLeader(f"{obstacle}: read from another node, or try again in a moment")

    async def _obstacle_to_leading(self) -> str | None:
        """Ask the peers, and return why another node may lead by now, if that is so."""
        end_s = asyncio.get_running_loop().time() + CONFIRM_TIMEOUT_S
        peers = await self._known.ask(self._store.meta.epoch, end_s, refusing_is_silent=False)
        meta = self._store.meta
        for url, one in peers.positions.items():
            if one.history == meta.history and (one.epoch > meta.epoch or one.revision > meta.head):
                self.doubt(None, one.epoch)
                return f"{url} is in epoch {one.epoch} at revision {one.revision}, beyond this node's"
        if self._epoch_seen > meta.epoch:
            return f"a node has seen epoch {self._epoch_seen}, and this one leads in {meta.epoch}"
        # Guests may have moved to another address since they came; they would have come again, and told their epoch.
        silent = [f"{url} does not tell ({why})" for url, why in peers.silent.items() if url not in self._known.guests]
        return "; ".join(silent) or None

    async def _recover(self) -> None:
        """Return when this node leads."""
        started_at_s, said, delay_s = monotonic(), "", ASK_EVERY_S
        while True:
            try:
                await self._store.reopen()
                waited = monotonic() - started_at_s > SILENT_TIMEOUT_S
                decision = await self._decide(waited=waited)
                moved = await self._carry_out(decision)
                if self.state is State.SERVING:
                    return
                if moved:
                    continue
                delay_s = ASK_EVERY_S
                if isinstance(decision, Refuse):
                    delay_s = ASK_MOST_S  # an operator is waited for
                if waited and isinstance(decision, Wait):
                    await self._known.forget_guests()  # they came by themselves, and would again
            except (PeerError, Compacted, DiskFull, DamagedRow, NotNow) as error:
                self.problem = f"{error.code}: {error}"
                delay_s = min(2 * delay_s, ASK_AGAIN_S if isinstance(error, DiskFull) else ASK_MOST_S)
            if self.problem and self.problem != said:
                log.warning('not leading yet state=%s reason="%s"', self.state, self.problem)
                said = self.problem
            await asyncio.sleep(delay_s)

    async def _decide(self, *, waited: bool) -> Decision:
        """Ask the peers, and return what follows."""
        own, peers = self._own(), await self._ask()
        if own.damaged and own.history:
            peers = peers.without(await self._against_mark(own, peers))
        decision = decide(own, peers, waited=waited)
        if isinstance(decision, CatchUp | TakeSnapshot):
            best = decision.urls[0]
            if others := await self._contradicted_by(best, own, peers):
                return contradiction(best, others, peers)
        return decision

    async def _carry_out(self, decision: Decision) -> bool:
        """Do what was decided. Return whether the table has another answer now."""
        match decision:
            case Lead():
                await self._lead(decision)
            case CatchUp(urls):
                self.state, self.problem = State.RECOVERING, f"catching up from {urls[0]}"
                return await self._with_one_of(urls, self._catch_up)
            case TakeSnapshot(urls):
                self.state, self.problem = State.RECOVERING, f"taking the snapshot of {urls[0]}"
                return await self._with_one_of(urls, self._take_whole)
            case Wait(reason):
                self.state, self.problem = State.RECOVERING, reason
            case Refuse(reason):
                self.state, self.problem = State.FAILED, reason
        return False

    async def _lead(self, decision: Lead) -> None:
        for note in decision.notes:
            log.warning('leading note="%s"', note)
        epoch = self._leadership.next_epoch(decision.epoch)
        try:
            await self._store.lead(epoch, decision.history)
        except DiskFull as error:
            raise DiskFull(
                "the volume is full, no epoch can be begun: make room on it or enlarge it; it goes on by itself"
            ) from error
        if self.state is not State.SERVING:  # or it only goes beyond an epoch, and writes are taken meanwhile
            self._led_from, self._led_at_s = self._store.head, monotonic()
        self.state, self.problem = State.SERVING, None
        log.info("leading epoch=%d history=%s revision=%d", epoch, self._store.meta.history, self._store.head)

    async def _with_one_of(self, urls: Sequence[str], work: Callable[[Peer], Awaitable[bool]]) -> bool:
        """Do *work* with the first of the peers that has something to give. One on another chain is remembered as such.

        Return whether there was either. Raises what was in the way with the first, if there was none.
        """
        obstacle: PeerError | Compacted | None = None
        for url in urls:
            try:
                if await work(self._known.at(url)):
                    return True
            except Diverged as error:
                log.warning('forked peer=%s reason="%s"', url, error)
                self._forked |= {url}
                return True
            except (PeerError, Compacted) as error:
                obstacle = obstacle or error
        if obstacle is not None:
            raise type(obstacle)(
                f"{obstacle}; this node does not lead with less: mend {urls[0]}, or, if its store is damaged, have it "
                "given up with `mehdb accept-loss --start-empty` there"
            ) from obstacle
        return False

    async def _catch_up(self, peer: Peer) -> bool:
        """Apply what *peer* has beyond this store's head, or take its snapshot where that is no longer whole."""
        try:
            return await self._take_pages(peer)
        except Compacted:
            return await self._take_snapshot(peer)

    async def _take_whole(self, peer: Peer) -> bool:
        """Take the snapshot of *peer*; if it has no room for one, and nothing is to be replaced here, its pages."""
        try:
            return await self._take_snapshot(peer)
        except SnapshotRefused as refusal:
            if self._store.damaged:
                raise
            try:
                return await self._take_pages(peer)
            except Compacted:
                raise refusal from None

    async def _take_pages(self, peer: Peer) -> bool:
        """Apply all that *peer* has beyond this store's head. Return whether there was anything."""
        store, before = self._store, self._store.head
        while (pull := await self._pull(peer, store.position)).page is not None:
            # This node is about to lead, so no epoch of its own history is over for it.
            await store.apply(replace(pull.page, epoch=max(pull.page.epoch, store.meta.epoch)))
        if store.head > before:
            log.info("caught up revision=%d from=%s", store.head, peer.url)
        return store.head > before

    async def _take_snapshot(self, peer: Peer) -> bool:
        """Take the whole store of *peer* in place of this one's, which is kept if there was anything in it."""
        store, before = self._store, self._store.reached()
        damaged = store.damaged is not None
        try:
            with store.taken.under_way():
                meta = await fetch(peer, store.incoming, ProgressLog(peer.url, store.taken))
            if before.history == meta.history and not await store.continued_by(store.incoming):
                if peer.url in self._diverged and not damaged:
                    self._unclear |= {peer.url}
                    return True
                log.warning("perhaps forked, nobody can tell any more revision=%d peer=%s", before.revision, peer.url)
            kept = await store.replace(
                store.incoming, meta, "damaged" if damaged else "replaced" if before.revision else None
            )
        finally:
            await asyncio.to_thread(store.incoming.unlink, missing_ok=True)
        log.info("snapshot taken revision=%d from=%s kept=%s", meta.head, peer.url, kept or "nothing")
        return True

    async def _until_peers_hold_more(self) -> None:
        """Return when a peer holds what this node lacks, and it has accepted no write yet.

        Nor does it begin an epoch beyond one that a peer has seen, once it has: it may be an old process.
        """
        while True:
            await self._doubted.wait()
            self._doubted.clear()
            decision = await self._decide(waited=True)
            if isinstance(decision, Lead):
                if decision.epoch > self._store.meta.epoch and self._led_from == self._store.head:
                    with contextlib.suppress(DiskFull):  # then whoever has seen a higher epoch has to wait
                        await self._lead(decision)
            else:
                self.state, self.problem = State.RECOVERING, "a peer has shown up that holds more"
                await self._store.queue_worked_off()
                if self._store.head == self._led_from:
                    log.warning("a peer has shown up that holds more, recovering from it")
                    return
                self.state, self.problem = State.SERVING, None
            await asyncio.sleep(ASK_AGAIN_S)

    def _own(self) -> Own:
        reached, epoch = self._store.reached(), max(self._store.meta.epoch, self._epoch_seen)
        return Own(reached.history, reached.revision, epoch, self._store.damaged)

    async def _ask(self) -> Peers:
        """Return what all peers say that exist."""
        peers = await self._known.ask(self._store.meta.epoch)
        self._diverged = frozenset(url for url, one in peers.positions.items() if one.state is State.DIVERGED)
        return dataclasses.replace(peers, forked=self._forked, unclear=self._unclear)

    async def _against_mark(self, own: Own, peers: Peers) -> set[str]:
        """Return the peers that never were where this store, which is damaged, was when it last acknowledged."""
        against = set()
        for url, one in peers.with_data().items():
            if one.history == own.history and one.revision >= own.head:
                try:
                    await self._pull(self._known.at(url), self._store.reached())
                except Diverged:
                    against.add(url)
                except (Compacted, PeerError):  # it cannot tell
                    continue
        return against

    async def _contradicted_by(self, best: str, own: Own, peers: Peers) -> list[str]:
        """Return the peers whose changes are certainly not those of *best*, which holds the most.

        Those that this store has itself, and those on another chain than it, have no say: it is not empty.
        """
        others = []
        for url, one in peers.with_data().items():
            said_by_own = not own.damaged and one.revision <= own.head
            if url == best or said_by_own or one.history != peers.positions[best].history or url in peers.forked:
                continue
            try:
                await self._pull(
                    self._known.at(best), Position(one.history, one.revision, Chain(bytes.fromhex(one.chain)))
                )
            except Diverged:
                others.append(url)
            except Compacted:  # only what they say of themselves is left: that one of them is not with its leader
                if (one.state is State.DIVERGED) != (peers.positions[best].state is State.DIVERGED):
                    others.append(url)
            except PeerError:  # that it cannot tell is no contradiction, and will be in the way of more than this
                continue
        return others

    async def _pull(self, peer: Peer, position: Position) -> Pull:
        meta = self._store.meta
        return await peer.pull(
            position, meta.epoch, node=None, durable=position.revision, wait_s=0, pages_only=True, from_leader=False
        )
