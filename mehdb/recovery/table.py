"""The table of a leader's start, without I/O: what a node does that holds this, while its peers hold that.

    own store                          peers                                 then
    at or ahead of all of its history  any                                   `Lead`
    behind one of its history          any                                   `CatchUp`, then lead
    empty or damaged                   one history among them                `TakeSnapshot`, then lead
    empty or damaged                   several histories                     `Refuse`: an operator chooses
    empty or damaged                   one that does not answer              `Wait`
    empty                              all empty, or none                    `Lead`, in a history of its own
    damaged                            all empty, or none                    `Refuse`: an operator decides
    behind, empty or damaged           they contradict each other            `Refuse`: an operator chooses

A peer that exists and does not answer is waited for, but by a store with data only for a while. A peer of another
history, or on another chain, is left alone by a store with data: it will be diverged, and keep its data.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from mehdb.errors import Damaged
from mehdb.model import ORIGIN, Epoch, History, NodePosition, Revision


class Own(NamedTuple):
    """What this node holds itself. Of a *damaged* store, *history* and *head* are what it once acknowledged."""

    history: History | None
    head: Revision
    epoch: Epoch
    damaged: Damaged | None = None


@dataclass(frozen=True)
class Peers:
    """What the peers that exist said: where they are, or why they did not answer. By base URL.

    *forked* are those whose changes have turned out not to continue what this node holds, or once acknowledged;
    *unclear* those of which nobody can tell that any more, and which are not with their leader.
    """

    positions: dict[str, NodePosition]
    silent: dict[str, str]
    forked: frozenset[str] = frozenset()
    unclear: frozenset[str] = frozenset()

    def without(self, forked: set[str]) -> "Peers":
        """Return these where *forked* are so too."""
        return replace(self, forked=self.forked | forked)

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
    """Take the missing changes from the first of *urls* that can give them, the most advanced first."""

    urls: tuple[str, ...]


class TakeSnapshot(NamedTuple):
    """Take the whole store of the first of *urls* that can give it. They hold equally much."""

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
        if continuing[0] in peers.unclear:
            return Refuse(
                f"{continuing[0]} holds more and is diverged: whether this node has changes of its own nobody can tell "
                f"any more. Take what is there with `mehdb adopt --from {continuing[0]}`, or end that node"
            )
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
    forked = peers.forked & holders.keys() if own.damaged else frozenset()
    holders = {url: one for url, one in holders.items() if url not in forked}
    histories = {one.history for one in holders.values()}
    if len(histories) > 1 or (own.damaged and own.history and histories - {own.history}):
        held = "; ".join(f"{url} has {one.history} at revision {one.revision}" for url, one in holders.items())
        lost = f"{own.damaged}, of history {own.history}; " if own.damaged else ""
        return Refuse(f"{lost}peers hold other histories ({held}): choose one with `mehdb adopt --from URL`")
    if holders:
        return _decide_whose_snapshot(own, holders)
    if forked:
        return Refuse(
            f"{own.damaged}; {', '.join(sorted(forked))} has other changes than it had acknowledged: bring the volume "
            "back, or take what is there with `mehdb adopt --from URL`"
        )
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


def contradiction(best: str, others: Iterable[str], peers: Peers) -> Refuse:
    """Return why nothing is taken where the changes of *best* are not those of *others*: any may be the right ones."""
    held = "; ".join(f"{url} at revision {peers.positions[url].revision}" for url in (best, *others))
    return Refuse(f"peers hold different changes in one history ({held}): choose with `mehdb adopt --from URL`")


def _listed(silent: dict[str, str]) -> str:
    return "; ".join(f"{url} ({why})" for url, why in silent.items())
