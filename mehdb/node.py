"""A node: what it is, where it is in its life, and what it says of itself.

    starting → recovering (leader) / syncing (follower) → serving → draining → stopped
                        ↘ failed            ↘ diverged

It decides what is taken and what is refused in each of these states. How they follow each other is `life`'s.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

from mehdb import __version__
from mehdb.api import Check, Followers
from mehdb.errors import Draining, NotNow, ReadOnly, Recovering
from mehdb.model import DrainReport, Epoch, NodeStatus, Position, Role, State
from mehdb.recovery import Leader
from mehdb.replication import Follower
from mehdb.roles import Leadership, address_url
from mehdb.settings import Settings
from mehdb.store import Store
from mehdb.whereabouts import Whereabouts

log = logging.getLogger("mehdb.node")

LOOK_EVERY_S: Final = 0.02  # how often a drain looks whether it is done
OPENING: Final = "the store is not open yet"


class Node:
    """What the API speaks for (`mehdb.api.NodeView`). *part* is what it does about its role, once its store is open."""

    def __init__(self, settings: Settings, leadership: Leadership, store: Store, leader_at: Whereabouts | None) -> None:
        self.name = settings.host
        self.role = leadership.role
        self.leader_at = leader_at
        self.redirect_url = leadership.redirect_url
        self.followers = Followers()
        self.part: Leader | Follower | None = None
        self.obstacle = OPENING
        """Why there is no part yet."""
        self.draining = False
        self.closing = False
        self.stopped = False
        self._store = store
        self._settings = settings
        self.writes = 0
        self.watchers = 0
        self._started_at_s = monotonic()

    @property
    def state(self) -> State:
        """Where it is in its life: derived, so that it cannot disagree with what happens."""
        if self.stopped:
            return State.STOPPED
        if self.draining:
            return State.DRAINING
        return self.part.state if self.part else State.STARTING

    @property
    def leader_leaves(self) -> bool:
        """Whether this node follows one that is about to stop: a redirect there would lead nowhere."""
        return isinstance(self.part, Follower) and self.part.leader_leaves

    def writing(self) -> "_Writing":
        """Count a write while it is under way. Raises `NotNow` if none is taken now: nothing was written.

        What it gives is to be called once the body has come: it raises `NotNow` if this node no longer leads as it did.
        """
        if self.state is not State.SERVING or self.part is None:
            raise self.refusal()
        return _Writing(self, self.part)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count a watcher while it watches."""
        self.watchers += 1
        try:
            yield
        finally:
            self.watchers -= 1

    def writing_of_its_own(self) -> "_Writing":
        """Count a write that no client has asked for. Raises `NotNow` where one might cost what a follower holds."""
        if isinstance(self.part, Leader) and not self.part.settled:
            head = self._store.head
            if not any(follower.revision == head for follower in self.followers.status(head)):
                raise Recovering("no follower has come yet: it may hold more")
        return self.writing()

    def refusal(self) -> NotNow:
        """Return why no write is taken now."""
        if self.draining:
            return Draining("this node is about to stop, nothing was written: try again in a moment")
        if self._store.read_only:
            return ReadOnly("the volume can only be read, nothing was written: see to the disk")
        problem = self.part.problem if self.part else self.obstacle
        return Recovering(f"this node does not lead yet, nothing was written: {problem}")

    def require_leading(self) -> None:
        """Raise `Recovering` on a leader that does not lead yet: nobody may copy what it holds."""
        if self.role is Role.LEADER and not (self.part and self.part.state is State.SERVING):
            raise Recovering("this node does not lead yet: ask again in a moment")

    async def confirm_leading(self) -> None:
        """Return once it is certain that this node still led after this was called, as far as its peers know.

        Raises `Recovering` and `NotConfirmedLeader`.
        """
        part = self.part
        if isinstance(part, Leader) and part.state is State.SERVING:
            await part.confirm()
        if not isinstance(part, Leader) or self.part is not part or part.state is not State.SERVING:
            raise Recovering("this node does not lead just now: ask again in a moment")

    def staleness_s(self) -> float | None:
        """Return how long ago this node last held everything that its leader then had; None if it is not known."""
        if self.role is Role.LEADER:
            return 0.0
        return self.part.staleness_s() if isinstance(self.part, Follower) else None

    def note_follower(self, position: Position, epoch: Epoch, address: str | None) -> None:
        """Take note of a node at *address* whose store is at *position*: it may hold what this leader lacks.

        *epoch* is the highest that it has seen: it would not obey a lower one.
        """
        if not isinstance(self.part, Leader) or position.history is None:
            return
        meta = self._store.meta
        same = position.history == meta.history
        ahead = same and position.revision > meta.head
        lacks = position.revision > 0 and (meta.head == 0 or self.part.state is not State.SERVING)
        if ahead or lacks or (same and epoch > meta.epoch):
            self.part.doubt(self._peer_url(address), epoch if same else Epoch(0))

    def _peer_url(self, address: str | None) -> str | None:
        """Return where the node at *address* answers. All pods listen on one port; other nodes are in the settings."""
        if address is None or not self._settings.in_kubernetes:
            return None
        return address_url(self._settings, address)

    def checks(self) -> tuple[Check, ...]:
        """Return what must hold for the node to be ready."""
        failure = self._store.failure
        store = str(failure.result()) if failure.done() else None if self.part else self.obstacle
        if self._store.read_only:
            store = "the volume can only be read"
        running = "the node is about to stop" if self.draining or self.closing else None
        part = "leading" if self.role is Role.LEADER else "synced"
        return (
            Check("store", store),
            Check("running", running),
            Check(part, self.part.problem if self.part else OPENING),
        )

    def status(self) -> NodeStatus:
        """Return everything that the node tells about itself."""
        meta = self._store.meta
        problems = [f"{check.name}: {check.problem}" for check in self.checks() if check.problem]
        return NodeStatus(
            node=self.name,
            role=self.role,
            state=self.state,
            ready=not problems,
            reason="; ".join(problems) or None,
            history=meta.history,
            epoch=meta.epoch,
            revision=meta.head,
            chain=meta.chain.hex(),
            floor=meta.floor,
            keys=meta.keys,
            queue_bytes=self._store.queue_bytes,
            leader=self.part.status() if isinstance(self.part, Follower) else None,
            followers=self.followers.status(meta.head, self._store.came_at_s),
            uptime_seconds=round(monotonic() - self._started_at_s, 3),
            version=__version__,
            commits=self._store.commits,
            free_bytes=self._free_bytes(),
            damage=str(self._store.damage) if self._store.damage else None,
            watchers=self.watchers,
            size_bytes=self._store.size_bytes(),
        )

    def _free_bytes(self) -> int:
        try:
            return self._store.free_bytes()
        except OSError:  # a volume that has gone has no room
            return 0

    def drain(self) -> None:
        """Take no more writes from now on. Reads go on, the node is no longer ready, and its followers are told."""
        if not self.draining:
            self.draining = True
            log.info("draining node=%s revision=%d", self.name, self._store.head)
            self._store.interrupt_waiting()

    async def drained(self, timeout_s: float) -> DrainReport:
        """Drain, and wait until what was taken is durable here and on the followers that are connected."""
        self.drain()
        end_s = monotonic() + timeout_s
        while not (report := self._drain_report()).done and monotonic() < end_s:  # noqa: ASYNC110  many parts end it
            await asyncio.sleep(LOOK_EVERY_S)
        return report

    def _drain_report(self) -> DrainReport:
        queue_bytes, writes, missing = self._store.queue_bytes, self.writes, self.followers.missing(self._store.head)
        return DrainReport(not (queue_bytes or writes or missing), queue_bytes, writes, missing)


class _Writing:
    """A write under way on *node*, begun while *part* served. Not a generator: each PUT passes here."""

    def __init__(self, node: Node, part: Leader | Follower) -> None:
        self._node = node
        self._part = part

    def __enter__(self) -> Callable[[], None]:
        self._node.writes += 1
        return self._recheck

    def __exit__(self, *_: object) -> None:
        self._node.writes -= 1

    def _recheck(self) -> None:
        # A drain finishes what was taken. Another store, or a doubt, does not.
        if self._node.part is not self._part or self._part.state is not State.SERVING:
            raise self._node.refusal()
