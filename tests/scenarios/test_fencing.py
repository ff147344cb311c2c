"""A leader whose time is over goes on, and who has heard of the next one takes nothing from it (epochs).

Each round stops the leader's process with SIGSTOP, starts another one of the same name on a copy of its volume, as if
that had been attached elsewhere, and wakes the first one again: it takes writes of its own, which make a fork, and
offers them. A proxy between follower and leader says which of the two is at the leader's address.
"""

import asyncio
import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import httpx
import pytest

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, eventually, free_port
from fake_leader import soon
from faults import Answer, Fault, Kind, Proxy, proxied
from scenes import chains, resume, suspend

SNAPSHOT_LAG: Final = 20  # who lacks more is sent for the snapshot
OFFERS: Final = 3  # how often the old leader is heard in a round: the follower must refuse it again and again
NOT_COPIED: Final = ("lock", "control", "*-shm")  # what belongs to a process, not to the data


class Way(StrEnum):
    """How the follower comes to hear the old leader again."""

    QUIET = "quiet"  # the new leader wrote nothing: the old one's page continues the follower, only its epoch tells
    BUSY = "busy"  # the new leader wrote: the old one calls the follower diverged, and is not believed either
    RESTARTED = "restarted"  # as quiet, but the follower has only its disk to know the epoch from
    SNAPSHOT = (
        "snapshot"  # the follower lacks so much that it takes a snapshot: of the old leader, which is asked for it
    )
    LATE = "late"  # a long poll hung at the old leader when it stopped; its answer arrives when the new one is asked


PAGED: Final = (Way.QUIET, Way.RESTARTED, Way.LATE)  # in the other ways, it is offered a refusal, or the snapshot


@dataclass
class Stage:
    """A leader, the next one when there is one, and a follower that reaches either through *proxy*."""

    cluster: Cluster
    proxy: Proxy
    leader: Node
    follower: Node
    forked: set[tuple[int, str]] = field(default_factory=set)  # the old leaders' own changes: revision and chain
    counts: Counter[str] = field(default_factory=Counter)

    async def round(self, way: Way, chosen: random.Random) -> None:
        """Have one leader succeed another, hear the old one, and come back to the new one."""
        old = self.leader
        await write(old, chosen.randrange(4))
        await self._follows(old)
        await soon(lambda: self.proxy.waiting, "a long poll to hang at the leader")
        suspend(old)
        new = self.leader = await self._successor(old)
        self.proxy.lead_to(new.port, cut=way is not Way.LATE)
        # What comes while it is stopped is done when it goes on; with the long poll, that is then answered by it.
        forking = asyncio.create_task(write(old, 1)) if way is Way.LATE else None
        await self._follows(new)
        if way is Way.BUSY:
            await write(new, chosen.randint(1, 5))
            await self._follows(new)
        held = await asyncio.to_thread(self.follower.position)
        if way is Way.SNAPSHOT:
            await asyncio.to_thread(self.follower.kill)
            await write(new, SNAPSHOT_LAG + 1)
        resume(old)
        if way is Way.SNAPSHOT:
            await write(old, SNAPSHOT_LAG)
        await (forking or write(old, chosen.randint(1, 5)))
        self.forked |= chains(old.volume).items() - chains(new.volume).items()
        await self._hear(old, new, way)
        if way is Way.SNAPSHOT:
            await self._follows(new)  # it can do without
        else:
            assert await asyncio.to_thread(self.follower.position) == held, f"{way}: the follower moved"
        await self._refused(way)
        await self.proxy.heal()
        self.proxy.lead_to(
            new.port, cut=False
        )  # as when a name resolves to another address: what is connected stays so
        await write(new, 1)
        await self._follows(new)
        await asyncio.to_thread(old.kill)
        self.counts["rounds"] += 1

    async def _successor(self, old: Node) -> Node:
        """Start a new process of the leader on a copy of the volume of *old*, which is stopped."""
        port, volume = free_port(), self.cluster.directory / f"{old.name}-{self.counts['rounds']}"
        await asyncio.to_thread(shutil.copytree, old.volume, volume, ignore=shutil.ignore_patterns(*NOT_COPIED))
        moved = {"MEHDB_PORT": str(port), "MEHDB_DATADIR": str(volume), "MEHDB_PEERS": f"http://{ADDRESS}:{port}"}
        new = Node(old.name, port, volume, old.environment | moved)
        self.cluster.nodes.append(new)
        return await asyncio.to_thread(new.start)

    async def _follows(self, leader: Node) -> None:
        """Wait until the follower is where *leader* is, and has heard its epoch."""

        def look() -> bool:
            own, its = self.follower.status(), leader.status()
            return (own.epoch, own.history, own.revision, own.chain) == (
                its.epoch,
                its.history,
                its.revision,
                its.chain,
            )

        try:
            await asyncio.to_thread(eventually, look, f"the follower to follow {leader.url}")
        except AssertionError as error:
            error.add_note(f"its log:\n{self.follower.log}")
            raise

    async def _hear(self, old: Node, new: Node, way: Way) -> None:
        """Let the follower hear the *old* leader again, several times."""
        if way is Way.LATE:
            await soon(lambda: self._late(old), "the late answer to the long poll")
            self.proxy.replayed = 0
            await self.proxy.set(Fault(Kind.REPLAY, answer=self._late(old)))
            self.proxy.lead_to(new.port, cut=True)  # it asks again
            await soon(lambda: self.proxy.replayed >= OFFERS, "the late answer to be heard")
            self.counts["pages"] += self.proxy.replayed
            return
        if way is Way.RESTARTED:
            await asyncio.to_thread(self.follower.kill)
        self.proxy.answers.clear()
        if way is Way.SNAPSHOT:
            self.proxy.detour = (b"GET /snapshot", old.port)
            await asyncio.to_thread(self.follower.start, ready=False)
            await soon(lambda: self._late(old), "the old leader's snapshot")
            self.proxy.detour = None
            self.counts["snapshots"] += 1
            return
        self.proxy.lead_to(old.port, cut=True)
        if way is Way.RESTARTED:
            await asyncio.to_thread(self.follower.start, ready=False)
        await soon(lambda: sum(map(offered, self.proxy.answers)) >= OFFERS, "the old leader to be heard")
        told = Counter(answer.status for answer in self.proxy.answers if offered(answer))
        self.counts["pages"] += told.pop(200, 0)
        self.counts["refusals"] += told.pop(409, 0)
        assert not told, f"{way}: the follower is at the old leader's head, or was told something else: {told}"
        assert {answer.upstream for answer in self.proxy.answers if offered(answer)} == {old.port}

    def _late(self, old: Node) -> Answer | None:
        found = [answer for answer in self.proxy.answers if answer.upstream == old.port and answer.status == 200]
        return found[-1] if found and found[-1].complete else None

    async def _refused(self, way: Way) -> None:
        """The follower must say why it takes nothing."""

        def says() -> bool:
            told = self.follower.status().leader
            return told is not None and (told.problem or "").startswith("stale_epoch: ")

        if way is not Way.SNAPSHOT:  # else all is well again by now
            await asyncio.to_thread(eventually, says, "the follower to say that an epoch is over")
        lines = self.follower.log.count("code=stale_epoch")
        assert lines > self.counts["lines"], "the log says nothing of it"
        self.counts["lines"] = lines
        assert self.follower.status().state != "diverged", f"{way}: the old leader was believed"


def offered(answer: Answer) -> bool:
    return answer.status != 0


async def write(leader: Node, count: int) -> None:
    """Write *count* values. Waits for a leader that is stopped."""
    async with httpx.AsyncClient(timeout=DEADLINE_S, trust_env=False) as client:
        for _ in range(count):
            value = os.urandom(20)
            assert (await client.put(f"{leader.url}/set/{value[0] % 8}", content=value)).is_success


def accepted(follower: Node, forked: set[tuple[int, str]]) -> int:
    """Return how many changes of a fork are, or ever were, in the store of *follower*: none is ever taken out again."""
    return len(chains(follower.volume).items() & forked)


@contextlib.asynccontextmanager
async def staged(cluster: Cluster) -> AsyncIterator[Stage]:
    """Have a leader run, and a follower that reaches it through a proxy."""
    leader = await asyncio.to_thread(cluster.add(MEHDB_SNAPSHOT_LAG=str(SNAPSHOT_LAG)).start)
    async with proxied(leader.port) as proxy:
        follower = await asyncio.to_thread(cluster.add(MEHDB_PEERS=proxy.url).start)
        yield Stage(cluster, proxy, leader, follower)


async def prove(cluster: Cluster, ways: list[Way]) -> None:
    """Have a round in each of *ways*, and print the numbers."""
    async with staged(cluster) as stage:
        for number, way in enumerate(ways):
            await stage.round(way, random.Random(number))
    await asyncio.to_thread(cluster.stop)
    taken = accepted(stage.follower, stage.forked)
    counts = stage.counts
    assert len(stage.forked) >= len(ways)
    assert counts["pages"] >= OFFERS * sum(way in PAGED for way in ways) > 0, "pages of the old epoch were offered"
    assert counts["snapshots"] == ways.count(Way.SNAPSHOT)
    assert taken == 0
    assert chains(stage.follower.volume) == chains(stage.leader.volume)
    print(
        f"fencing: {counts['rounds']} rounds, {counts['pages']} pages, {counts['snapshots']} snapshots and "
        f"{counts['refusals']} refusals offered by the old leader, {taken} accepted"
    )


async def test_who_has_heard_of_a_new_leader_takes_nothing_from_the_old_one(cluster: Cluster) -> None:
    await prove(cluster, list(Way))


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_old_leaders_are_fenced_round_after_round(cluster: Cluster) -> None:
    await prove(cluster, list(Way) * 3)


async def test_what_the_old_leader_offers_would_be_accepted_but_for_its_epoch(cluster: Cluster) -> None:
    """The control: a follower that has not heard of the new leader takes the very same page, and that is noticed."""
    async with staged(cluster) as stage:
        old = stage.leader
        unaware = await asyncio.to_thread(cluster.add(MEHDB_PEERS=old.url).start)
        await stage.round(Way.QUIET, random.Random(1))
    assert (accepted(stage.follower, stage.forked), accepted(unaware, stage.forked)) == (0, len(stage.forked))
