"""What nodes ask each other: /position and /replicate.

A follower's next request acknowledges what it holds durably, so that a node knows who pulls from it, and how far they
are, without any state on disk.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import floor
from time import monotonic
from typing import Final

from aiohttp import web

from mehdb.api.access import require_valid
from mehdb.api.answers import Answer, heard, json_answer, waiting
from mehdb.api.node import NodeView
from mehdb.api.requests import REVISION_MAX, Parameters, Target, no_parameters, revision_number, seconds
from mehdb.errors import BadParameter, Compacted, Diverged, NotSynced, StoreAway
from mehdb.model import (
    GENESIS,
    ORIGIN,
    Chain,
    Epoch,
    FollowerStatus,
    History,
    NodePosition,
    Position,
    Revision,
    State,
    encode_page,
    is_history,
)
from mehdb.parsing import whole_number
from mehdb.settings import WAIT_S_MAX
from mehdb.store import Store
from mehdb.store.waiters import Waiters

log = logging.getLogger("mehdb.api")

MSGPACK: Final = "application/vnd.msgpack"
FOLLOWERS_MAX: Final = 100  # a StatefulSet has a few; names come from clients, so their number is bounded
CONNECTED_S: Final = 4.0  # a follower asks at least every 1.5 s
REFUSED_TOLD_MAX: Final = 16  # log lines about nodes that are diverged, in so long a time:
FORGET_AFTER_S: Final = 300.0  # a follower that was scaled away is no longer listed


@dataclass(frozen=True)
class _Seen:
    revision: Revision
    at_s: float
    told: bool = False  # that this node drains


class Followers:
    """Who pulls from this node, and what they hold durably."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._history: History | None = None  # in which all of *_seen* is
        self._waiters = Waiters()
        self._refused: set[str] = set()  # told of since
        self._refused_since_s = monotonic()

    def note(self, node: str, revision: Revision, history: History | None) -> None:
        """Take down that *node* holds everything up to *revision* in *history*, which is this node's."""
        if history != self._history:  # another store is in this one's place: revisions of the old one say nothing
            self._seen.clear()
            self._history = history
        if node not in self._seen and len(self._seen) >= FOLLOWERS_MAX:
            del self._seen[min(self._seen, key=lambda name: self._seen[name].at_s)]
        self._seen[node] = _Seen(revision, monotonic(), self.is_told(node))
        self._waiters.wake()

    async def held(self, revision: Revision, history: History | None, count: int, timeout_s: float) -> int:
        """Wait until *count* followers hold *revision* in *history*, at most *timeout_s*. Return how many do.

        What a follower has once held durably it holds, connected or not. A drain does not end the wait: followers go on
        pulling from a node that drains.
        """

        def holding() -> int:
            same = history == self._history
            return sum(seen.revision >= revision for seen in self._seen.values()) if same else 0

        await self._waiters.until(lambda: holding() >= count, timeout_s)
        return holding()

    def refuse(self, node: str, reason: str) -> None:
        """Take down that *node* is diverged, and tell once. Names come from clients: few are told in a while."""
        self._seen.pop(node, None)
        if monotonic() - self._refused_since_s > FORGET_AFTER_S:
            self._refused.clear()
            self._refused_since_s = monotonic()
        if node not in self._refused and len(self._refused) < REFUSED_TOLD_MAX:
            self._refused.add(node)
            log.warning('follower refused node=%s reason="%s"', node, reason)

    def is_told(self, node: str) -> bool:
        """Return whether *node* has been told that this one drains. Until then no long poll may keep that from it."""
        return node in self._seen and self._seen[node].told

    def tell(self, node: str) -> None:
        """Take down that an answer to *node* says that this one drains."""
        if node in self._seen:
            self._seen[node] = replace(self._seen[node], told=True)

    def missing(self, head: Revision) -> tuple[str, ...]:
        """Return those that are connected and do not hold *head*, or would still send writers to a node that drains."""
        now = monotonic()
        return tuple(
            node
            for node, seen in sorted(self._seen.items())
            if now - seen.at_s < CONNECTED_S and (seen.revision < head or not seen.told)
        )

    def status(
        self, head: Revision, came_at_s: Callable[[Revision], float | None] = lambda _revision: None
    ) -> tuple[FollowerStatus, ...]:
        """Return those heard of lately, by name, and how far they are behind *head*.

        *came_at_s* tells when a revision came to be, by the monotonic clock.
        """
        now = monotonic()

        def lag_s(held: Revision) -> float | None:
            lacks_since_s = now if held >= head else came_at_s(Revision(held + 1))
            return None if lacks_since_s is None else round(max(0.0, now - lacks_since_s), 3)

        self._seen = {node: seen for node, seen in self._seen.items() if now - seen.at_s < FORGET_AFTER_S}
        return tuple(
            FollowerStatus(
                node, seen.revision, max(0, head - seen.revision), round(now - seen.at_s, 3), lag_s(seen.revision)
            )
            for node, seen in sorted(self._seen.items())
        )


def history_id(text: str) -> History:
    """Return the history that *text* names. Raises `ValueError`."""
    if not is_history(text):
        raise ValueError("must be 32 hexadecimal digits, or left out by an empty store")
    return History(text)


def _chain(text: str) -> Chain:
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise ValueError("must be 32 hexadecimal digits")
    return Chain(bytes.fromhex(text))


def _epoch(text: str) -> Epoch:
    try:
        return Epoch(whole_number(0, REVISION_MAX)(text))
    except ValueError as error:
        raise BadParameter(f"Mehdb-Epoch: {error}") from error


def _snapshot(text: str) -> bool:
    if text != "no":
        raise ValueError("must be no, or left out")
    return False


def _node(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", text):
        raise ValueError("must be a host name")
    return text


class ReplicationRoutes:
    """The routes for other nodes."""

    def __init__(self, node: NodeView, store: Store, followers: Followers, snapshot_lag: int) -> None:
        self._node = node
        self._store = store
        self._followers = followers
        self._snapshot_lag = snapshot_lag

    async def position(self, _request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer with this node's position."""
        no_parameters(target.query)
        if not self._store.is_open:  # else a store that cannot be read would look like an empty one
            problems = "; ".join(check.problem for check in self._node.checks() if check.problem)
            raise StoreAway(f"this node has not opened its store: {problems}")
        meta = self._store.meta
        return json_answer(
            NodePosition(
                self._node.name, self._node.role, self._node.state,
                meta.epoch, meta.history, meta.head, meta.chain.hex(),
            )
        )  # fmt: skip

    async def replicate(self, request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer with the page after a position, at the head after waiting for one; 204 if none came.

        *durable* is what the follower holds for certain, where that is less than *after*: it asks for a page while it
        still applies the one before.
        """
        parameters = Parameters(target.query)
        history = parameters.take("history", history_id, None)
        after = parameters.take("after", revision_number, ORIGIN)
        position = Position(history, after, parameters.take("chain", _chain, GENESIS))
        durable = min(after, parameters.take("durable", revision_number, after))
        node = parameters.take("node", _node, None)
        wait_s = parameters.take("wait", seconds(WAIT_S_MAX), 0.0)
        may_snapshot = parameters.take("snapshot", _snapshot, default=True)
        parameters.finish()
        self._node.note_follower(position, _epoch(request.headers.get("Mehdb-Epoch", "0")), request.remote)
        self._node.require_leading()
        if self._store.meta.history is None:
            raise NotSynced("this node holds nothing yet: ask another one")
        try:
            page = await heard(request, self._store.page_after(position))
        except Diverged as error:
            if node is not None:
                self._followers.refuse(node, str(error))
            raise
        if may_snapshot:
            self._send_for_snapshot(position)
        if node is not None:
            self._followers.note(node, durable, self._store.meta.history)
        may_wait = wait_s and (node is None or not self._draining or self._followers.is_told(node))
        waited = ""
        if page is None and may_wait:
            came_at_s = monotonic()
            with waiting(request):
                await heard(request, self._store.wait_beyond(after, wait_s))
            require_valid(request)
            # Nothing is awaited between this moment and the look at the head: as of then, the answer is complete.
            waited = f"Mehdb-Waited: {floor(1000 * (monotonic() - came_at_s)) / 1000:.3f}\r\n"
            page = await heard(request, self._store.page_after(position)) if self._store.head > after else None
        if node is not None and self._draining:
            self._followers.tell(node)
        if page is None:
            return Answer(status=204, headers=waited)
        return Answer(encode_page(page), MSGPACK, headers=waited)

    @property
    def _draining(self) -> bool:
        return self._node.state is State.DRAINING

    def _send_for_snapshot(self, position: Position) -> None:
        """Raise `Compacted` for a store to which the whole is quicker to give than all changes one by one."""
        behind = self._store.head - position.revision
        if behind and (position.history is None or behind > self._snapshot_lag):
            raise Compacted(f"{behind} changes are missing: take the snapshot (GET /snapshot), or ask with snapshot=no")
