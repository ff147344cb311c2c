"""The follower's loop: ask the leader for what comes after this store's position, apply it, ask again.

The invariant it owns (promise 3): only `Store.apply` changes the store, and it applies a page only if it continues the
store exactly. A follower whose position the leader does not recognise keeps its data and is diverged (promise 4). One
that is empty, too far behind or damaged takes the leader's snapshot; what was damaged is kept.

    syncing ── reached the head that the leader had when first asked ──▶ serving
       ▲                                                                   │ 409
       └───────── the leader recognises the position again ── diverged ◀───┘
"""

import asyncio
import logging
import random
from time import monotonic
from typing import Final

from mehdb.errors import (
    Compacted,
    DamagedRow,
    DiskFull,
    Diverged,
    MehdbError,
    NotNow,
    PeerAnswerInvalid,
    PeerError,
    SnapshotRefused,
    StaleEpoch,
)
from mehdb.model import LeaderStatus, Page, Position, Revision, State
from mehdb.peers import Peer, Pull
from mehdb.store import Meta, Store, forget_divergence, note_divergence, read_divergence
from mehdb.transfer import ProgressLog, fetch

log = logging.getLogger("mehdb.replication")

# How long the leader holds a request when nothing is new. It bounds how old "last heard" gets meanwhile.
WAIT_S: Final = 1.5
BACKOFF_LEAST_S: Final = 0.1  # a leader that restarts is back within a second
BACKOFF_MOST_S: Final = 1.0  # as often as a kubelet probes; with what it takes to notice silence, well below 5 s
DIVERGED_ADVICE: Final = (
    "; this node keeps its data: bring the leader's own volume back, or run `mehdb rejoin` here to take the leader's "
    "data in place of it"
)
DIVERGED_MOST_S: Final = 10.0  # in the long run an operator has to act: asking often helps nobody
HEAL_AGAIN_S: Final = 600.0  # a disk that damages what was mended just now is not mended by more of it
HEAL_RETRY_S: Final = 30.0
SNAPSHOT_RETRY_S: Final = (
    0.5  # after one that was of no use; twice as long each time: the leader copies its whole store
)
SNAPSHOT_MOST_S: Final = 60.0
LEAVING: Final = (State.DRAINING, State.STOPPED)


class Freshness:
    """When a follower last held everything that the leader then had.

    A leader that is written to all the time is ahead again whenever one of its heads is reached. So one head is kept,
    with the moment at which it was the newest, until the store holds it: the follower was complete as of that moment.
    """

    def __init__(self) -> None:
        self._as_of_s: float | None = None
        self._pending: tuple[Revision, float] | None = None

    def note(self, held: Revision, head: Revision, as_of_s: float) -> None:
        """Take down that the store holds *held*, and that the leader had nothing beyond *head* at *as_of_s*."""
        if self._pending is not None and held >= self._pending[0]:
            self._as_of_s, self._pending = self._pending[1], None
        if held >= head:
            self._as_of_s, self._pending = as_of_s, None
        elif self._pending is None:
            self._pending = head, as_of_s

    def staleness_s(self) -> float | None:
        """Return how long ago that was; None if it never was."""
        return None if self._as_of_s is None else monotonic() - self._as_of_s


class Follower:
    """Keeps *store* a copy of *leader*'s. `run` never returns; `state`, `problem` and `status` say how it goes."""

    def __init__(self, store: Store, leader: Peer, node: str) -> None:
        self.state = State.SYNCING
        self.leader_leaves = False
        """Whether the leader said, when last heard, that it takes no more writes."""
        self._store = store
        self._leader = leader
        self._node = node
        self._heal_at_s = monotonic()  # not before
        self._heals = 0
        self._refused: MehdbError | None = None  # why the last snapshot was of no use
        self._snapshot_at_s = 0.0  # no other before
        self._snapshot_delay_s = SNAPSHOT_RETRY_S
        self._pages_only = False  # the leader could not give a snapshot: pages will have to do
        self._target: Revision | None = None  # the head to reach before serving: the leader's when first asked
        self._head: Revision | None = None  # the leader's, when last heard
        self._heard_at_s: float | None = None
        self._error: MehdbError | None = None  # why the leader is not followed, None while it is
        self._divergence = read_divergence(store.directory)  # what is written down beside the store
        if self._divergence and store.reached().revision:
            self.state, self._error = State.DIVERGED, Diverged(self._divergence)
        self._freshness = Freshness()
        self._progress = 0  # how often it was: a failure after some is a new one

    @property
    def problem(self) -> str | None:
        """Why this follower is not ready, None if it is. One that has synced once is, with or without a leader."""
        if self.state is State.SERVING:
            return None
        damaged = self._store.damaged
        reasons = [f"{damaged.code}: {damaged}"] if damaged else []
        if self._error is not None:
            advice = DIVERGED_ADVICE if self.state is State.DIVERGED else ""
            reasons.append(f"{self._error.code}: {self._error}{advice}")
        target = "the leader" if self._target is None else self._target
        return "; ".join(reasons) or f"at revision {self._store.head}, must reach {target}"

    def status(self) -> LeaderStatus:
        """Return what is known of the leader."""
        return LeaderStatus(
            self._leader.url,
            self._head,
            None if self._head is None else max(0, self._head - self._store.head),
            None if self._heard_at_s is None else round(monotonic() - self._heard_at_s, 3),
            None if self._error is None else f"{self._error.code}: {self._error}",
            None if (staleness_s := self.staleness_s()) is None else round(staleness_s, 3),
        )

    def staleness_s(self) -> float | None:
        """Return how long ago this store last held everything that the leader then had; None if it is not known."""
        return self._freshness.staleness_s()

    async def run(self) -> None:
        """Follow the leader for ever, with pauses when that fails. Raises only what no retry can mend."""
        if self.state is State.DIVERGED:
            log.error('still diverged leader=%s reason="%s"', self._leader.url, self._error)
        else:
            log.info("syncing revision=%d leader=%s", self._store.head, self._leader.url)
        delay_s = BACKOFF_LEAST_S
        while True:
            progress = self._progress
            try:
                await self._follow()
            except (PeerError, Diverged, Compacted, DiskFull, DamagedRow, NotNow) as error:
                await self._note_failure(error)
                await self._leader.disconnect()
            delay_s = BACKOFF_LEAST_S if self._progress != progress else delay_s
            await asyncio.sleep(delay_s * random.uniform(0.5, 1))  # noqa: S311  no secret
            most_s = DIVERGED_MOST_S if self.state is State.DIVERGED else BACKOFF_MOST_S
            delay_s = min(delay_s * 2, most_s)

    async def _follow(self) -> None:
        """Ask, apply, ask again, until something fails."""
        await self._store.reopen()
        if self._store.damaged:
            if self.state is State.DIVERGED:
                raise Diverged(self._divergence or "it was found to have diverged")
            await self._take_snapshot()
        await self._heal_if_damaged()
        pull = await self._pull_or_snapshot()
        while True:
            if pull.page is not None and pull.page.end.revision < pull.head:
                pull = await self._apply_and_pull(pull, pull.page)
                continue
            if pull.page is None:
                await self._store.adopt(pull.history, pull.epoch)
            else:
                await self._store.apply(pull.page)
            self._note_progress(pull)
            self._pages_only = False
            await self._heal_if_damaged()
            # Only now, at the head: what this asks after is durable here, and asking is what acknowledges it.
            pull = await self._pull(self._store.position)

    async def _pull_or_snapshot(self) -> Pull:
        """Return the next page, after taking the leader's snapshot if it says that there is no other way."""
        try:
            return await self._pull(self._store.position)
        except Compacted as error:
            if self.state is State.DIVERGED and self._store.head:
                self._stay_diverged(error)
        try:
            await self._take_snapshot()
        except (PeerError, DiskFull):
            self._pages_only = True  # if pages will do, the leader sends them
            raise
        return await self._pull(self._store.position)

    def _stay_diverged(self, error: Compacted) -> None:
        """Do not let a snapshot replace what has diverged, because the leader has compacted away what shows it."""
        if self._pages_only:
            raise Diverged(f"it differed before, and the leader can no longer tell where: {error}") from error
        self._pages_only = True  # if pages will do, the leader finds this store to be an earlier state of its own
        raise error

    async def _take_snapshot(self) -> None:
        """Take the leader's whole store. What is damaged here is kept, what is certainly only older is not.

        Raises what `fetch` does, and `Diverged` if what is here is no older state of it: nothing is replaced then.
        """
        if self._refused and monotonic() < self._snapshot_at_s:
            raise self._refused
        try:
            with self._store.taken.under_way():
                progress = ProgressLog(self._leader.url, self._store.taken)
                await self._replace_by(await fetch(self._leader, self._store.incoming, progress))
        except (DiskFull, Diverged, StaleEpoch, PeerAnswerInvalid, SnapshotRefused) as error:
            self._refused, self._snapshot_at_s = error, monotonic() + self._snapshot_delay_s
            self._snapshot_delay_s = min(2 * self._snapshot_delay_s, SNAPSHOT_MOST_S)
            raise
        finally:
            await asyncio.to_thread(self._store.incoming.unlink, missing_ok=True)
        self._refused, self._pages_only = None, False
        self._snapshot_delay_s = SNAPSHOT_RETRY_S

    async def _replace_by(self, meta: Meta) -> None:
        """Put what has arrived, whose state is *meta*, in the store's place, if that was an older state of it."""
        store, own = self._store, self._store.reached()
        if own.revision and (meta.history != own.history or meta.head < own.revision):
            raise Diverged(f"the leader's snapshot is of {meta.history} at {meta.head}, no later state of this store")
        if meta.history == own.history and meta.epoch < store.meta.epoch:
            raise StaleEpoch(f"the snapshot is of epoch {meta.epoch}, which is over: {store.meta.epoch} has been seen")
        certain = await store.continued_by(store.incoming)
        keep = "damaged" if store.damaged or store.damage else None if certain else "behind"
        kept = await store.replace(store.incoming, meta, keep)
        self._freshness = Freshness()  # what was to be reached may have been of another history
        log.info("snapshot taken revision=%d leader=%s kept=%s", meta.head, self._leader.url, kept or "nothing")

    async def _heal_if_damaged(self) -> None:
        """Take a snapshot if damage was met. If that fails, go on with what is sound, and try again later."""
        if self._store.damage is None or self.state is State.DIVERGED or monotonic() < self._heal_at_s:
            return
        log.error('damage met, taking a snapshot reason="%s"', self._store.damage)
        self._heal_at_s = monotonic() + HEAL_AGAIN_S * 2**self._heals
        try:
            await self._take_snapshot()
            self._heals += 1  # each leaves a copy: a disk that goes on damaging must not be filled with them
        except (PeerError, DiskFull, Diverged, DamagedRow, NotNow) as error:
            self._heal_at_s = monotonic() + HEAL_RETRY_S
            log.warning('damage stays code=%s reason="%s"', error.code, error)

    async def _apply_and_pull(self, pull: Pull, page: Page) -> Pull:
        """Apply the *page* of *pull* while the one after it travels, and return that."""

        async def apply() -> None:
            await self._store.apply(page)
            self._note_progress(pull)

        # Both always run to their end: neither is left behind when the other fails.
        applied, following = await asyncio.gather(apply(), self._pull(page.end), return_exceptions=True)
        if isinstance(applied, BaseException):
            raise applied
        if isinstance(following, BaseException):
            raise following
        return following

    async def _pull(self, position: Position) -> Pull:
        # Until it serves, and after a failure, it wants to know the leader's head and epoch, not to wait for a change.
        wait_s = WAIT_S if self.state is State.SERVING and self._error is None else 0.0
        meta = self._store.meta
        pull = await self._leader.pull(
            position, meta.epoch, node=self._node, durable=meta.head, wait_s=wait_s, pages_only=self._pages_only
        )
        self.leader_leaves = pull.state in LEAVING
        return pull

    def _note_progress(self, pull: Pull) -> None:
        """The leader has recognised this store's position, and what it sent was accepted and is durable here.

        Only now is its head believed: an answer that was refused says nothing about what there is to reach.
        """
        self._progress += 1
        self._head, self._heard_at_s = pull.head, monotonic()
        self._freshness.note(self._store.head, pull.head, pull.as_of_s)
        # A leader may come back with less than it had when first asked: there is no more to reach than there is.
        self._target = pull.head if self._target is None else min(self._target, pull.head)
        if self._error is not None:
            log.info("leader back url=%s revision=%d", self._leader.url, self._store.head)
            self._error = None
        if self.state is State.DIVERGED:
            self.state = State.SYNCING
        if self._divergence is not None:
            forget_divergence(self._store.directory)
            self._divergence = None
        if self.state is State.SYNCING and self._target is not None and self._store.head >= self._target:
            self.state = State.SERVING
            log.info("synced revision=%d leader=%s", self._store.head, self._leader.url)

    async def _note_failure(self, error: MehdbError) -> None:
        if self.state is State.DIVERGED and not isinstance(error, Diverged):
            return  # a leader that is away as well makes that no better: the first reason stands
        if self._error is None or self._error.code != error.code:
            level = logging.ERROR if isinstance(error, Diverged | Compacted) else logging.WARNING
            log.log(level, 'leader not followed code=%s leader=%s reason="%s"', error.code, self._leader.url, error)
        if isinstance(error, Diverged):
            if self._divergence is None:
                self._divergence = str(error)
                await asyncio.to_thread(note_divergence, self._store.directory, self._divergence)
            self.state, self._target, self._head = State.DIVERGED, None, None
            self._freshness = Freshness()  # the leader is at revisions of its own
        self._error = error
