"""Followers whose way to the leader fails in every way are exact prefixes of it at each revision (promise 3).

A schedule is a few faults of the network in a row, with writes in between, and at times a `kill -9` of the follower, of
the leader, or the loss of the follower's volume. Several followers of one leader go through a schedule each at the same
time: a round. It ends with healing, after which each must have the leader's position within `EQUAL_WITHIN_S`, and then
the same rows. In the second half of the rounds changes are compacted away: who has missed some takes a snapshot.
"""

import asyncio
import contextlib
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any, Final, TypeVar

import aiohttp
import apsw
import pytest

from cluster import Cluster, Node
from faults import Fault, Proxy, proxied
from mehdb.model import GENESIS, Epoch
from mehdb.store import Store, Write
from scenes import chains, contents, opened

T = TypeVar("T")

EQUAL_WITHIN_S: Final = 5.0  # after healing: the promise
LOOK_EVERY_S: Final = 0.1
KEYS: Final = 12  # few: schedules overwrite and delete each other's
# What followers say of their leader, at least, in hundreds of schedules: that the network really failed in these ways.
SYMPTOMS: Final = ("ConnectError", "ReadError", "ReadTimeout", "RemoteProtocolError", "answer_invalid", "stale_epoch")
ASK_TIMEOUT_S: Final = 5.0  # a node that lives answers in milliseconds


# What was seen, and what is true.


@dataclass
class Sight:
    """All positions that one follower was seen at, and what is wrong with them by themselves."""

    node: str
    seen: dict[int, tuple[str | None, str]] = field(default_factory=dict)  # history and chain by revision
    wrong: list[str] = field(default_factory=list)
    _newest: int = 0

    def note(self, position: dict[str, Any]) -> None:
        """Take down that the follower is at *position* now."""
        revision, place = position["revision"], (position["history"], position["chain"])
        if place == (None, GENESIS.hex()) and revision == 0:
            return  # what holds nothing is a prefix of everything
        if revision < self._newest:
            self.wrong.append(f"{self.node} went back from revision {self._newest} to {revision}")
        if self.seen.setdefault(revision, place) != place:
            self.wrong.append(f"{self.node} was at revision {revision} twice, with {self.seen[revision]} and {place}")
        self._newest = revision

    def forget_newest(self) -> None:
        """The follower has lost its volume: it may begin again."""
        self._newest = 0

    def mismatches(self, history: str, chains: dict[int, str]) -> list[str]:
        """Return what is wrong, by itself or beside the leader's *history*, with its chain at each revision."""
        strangers = [
            f"{self.node} was at {revision} with {place}, the leader with {chains.get(revision)}"
            for revision, place in self.seen.items()
            if place != (history, chains.get(revision))
        ]
        return self.wrong + strangers


class Truth:
    """The leader's chain at each revision, taken down while it still has that: it compacts changes away."""

    def __init__(self, leader: Path) -> None:
        self.chains = {0: GENESIS.hex()}
        self._leader = leader

    def note(self) -> None:
        """Take down what is new. To be called more often than a window of changes passes."""
        self.chains |= chains(self._leader, after=max(self.chains))
        assert len(self.chains) == max(self.chains) + 1, "the leader has compacted what nobody had taken down"


def meta(volume: Path, column: str) -> Any:
    with contextlib.closing(opened(volume)) as connection:
        return connection.execute(f"SELECT {column} FROM meta").get  # noqa: S608  a name of ours


def strangers(nodes: Sequence[Node]) -> list[str]:
    """Return which of *nodes* hold other rows than the first one, where all must still hold the same."""
    floor = max(meta(node.volume, "floor") for node in nodes)
    whole = contents(nodes[0].volume, floor)
    return [node.name for node in nodes if contents(node.volume, floor) != whole]


# Schedules.


@dataclass(frozen=True)
class Writes:
    """So many writes to the leader."""

    count: int


@dataclass(frozen=True)
class Pause:
    """Time for what was begun to go wrong."""

    seconds: float


@dataclass(frozen=True)
class Restart:
    """`kill -9`, and a new process on the volume after a while."""

    leader: bool = False
    empty: bool = False  # the volume is lost
    after_s: float = 0.0


Step = Fault | Writes | Pause | Restart


def schedule(seed: int) -> list[Step]:
    """Return the steps of one schedule; the same seed gives the same ones."""
    chosen = random.Random(seed)
    steps: list[Step] = []
    for _ in range(chosen.randint(2, 5)):
        healthy = chosen.random() < 0.2  # for a while: the follower moves, and is seen on its way
        steps += [Fault() if healthy else Fault.any(chosen), Writes(chosen.randint(0, 10))]
        steps.append(Pause(chosen.choice([0, 0.02, 0.1, 0.3])))
    if (kind := chosen.random()) < 0.20:
        restart = Restart(leader=kind < 0.04, empty=kind > 0.15, after_s=chosen.uniform(0, 0.3))
        steps.insert(chosen.randrange(len(steps) + 1), restart)
    return steps


@dataclass
class Stage:
    """One leader for all, and what has happened to it."""

    cluster: Cluster
    client: aiohttp.ClientSession
    truth: Truth
    restarting: asyncio.Lock = field(default_factory=asyncio.Lock)
    counts: Counter[str] = field(default_factory=Counter)

    async def position(self, node: Node) -> dict[str, Any] | None:
        """Return where *node* is, None if it cannot say: it is away, or its store is being replaced."""
        try:
            async with self.client.get(f"{node.url}/position") as answer:
                if answer.status == 503:
                    return None
                position = await answer.json()
        except (aiohttp.ClientError, TimeoutError):
            return None
        return {name: position[name] for name in ("history", "revision", "chain")}

    async def write(self, chosen: random.Random) -> None:
        """Set or delete a key, if the leader is there."""
        url = f"{self.cluster.leader.url}/{{}}/{chosen.randrange(KEYS)}"
        value = chosen.randbytes(int(10 ** chosen.choices([(1, 2.5), (3, 5), (5, 6)], [84, 15, 1])[0][0]))
        delete = chosen.random() < 0.15
        self.truth.note()  # as often as anybody writes: no window can pass
        try:
            request = (
                self.client.delete(url.format("delete")) if delete else self.client.put(url.format("set"), data=value)
            )
            async with request as answer:
                assert answer.status in (200, 404, 503), await answer.text()
                self.counts["writes"] += answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            self.counts["writes that failed"] += 1

    async def restart_leader(self, after_s: float) -> None:
        """Restart what all followers follow, unless another schedule is at it."""
        if not self.restarting.locked():
            async with self.restarting:
                await restart(self.cluster.leader, after_s)
                self.counts["restarts"] += 1

    async def compact(self, retained: int) -> None:
        """Have the leader keep only *retained* changes from now on, and each follower from its next start on."""
        for node in self.cluster.nodes:
            node.environment |= {"MEHDB_RETAIN_CHANGES": str(retained), "MEHDB_SNAPSHOT_LAG": str(retained)}
        await self.restart_leader(0)

    async def compare(self) -> None:
        """Fail if a follower holds other rows than the leader, at its position.

        There is a moment in which it may: an epoch is still to come, or a write that its client gave up on.
        """
        equal_at_s = monotonic()
        while others := await asyncio.to_thread(strangers, self.cluster.nodes):
            assert monotonic() - equal_at_s < EQUAL_WITHIN_S, f"other rows than the leader's are on {others}"
            await asyncio.sleep(LOOK_EVERY_S)
        self.counts["stores"] += len(self.cluster.followers)


async def restart(node: Node, after_s: float, *, empty: bool = False) -> None:
    await asyncio.to_thread(node.kill)
    if empty:
        await asyncio.to_thread(shutil.rmtree, node.volume)
    await asyncio.sleep(after_s)
    await asyncio.to_thread(node.start, ready=False)


class Lane:
    """A follower, its way to the leader, and all that was seen of it."""

    def __init__(self, stage: Stage, node: Node, proxy: Proxy) -> None:
        self.sight = Sight(node.name)
        self._stage = stage
        self._node = node
        self._proxy = proxy
        self._looking = asyncio.Lock()  # answers to two questions at once could be noted in the wrong order

    async def suffer(self, seed: int) -> None:
        """Go through the schedule of *seed*."""
        chosen = random.Random(-seed)
        for step in schedule(seed):
            await self._take(step, chosen)

    async def equal(self, seed: int) -> float:
        """Heal, wait until the follower is where the leader is, and return how long that took, in seconds.

        The leader is asked each time: a write that its client gave up on may still land.
        """
        await self._proxy.heal()
        healed_at_s, equal = monotonic(), False
        while not equal:
            own, goal = await self._look(), await self._stage.position(self._stage.cluster.leader)
            equal, took_s = own is not None and own == goal, monotonic() - healed_at_s
            assert took_s <= EQUAL_WITHIN_S, await self._complaint(own, goal, seed)
            if not equal:
                await asyncio.sleep(LOOK_EVERY_S)
        return took_s

    async def watch(self) -> None:
        """Look again and again, for ever."""
        while True:
            await self._look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _take(self, step: Step, chosen: random.Random) -> None:
        match step:
            case Fault():
                await self._proxy.set(step)
                self._stage.counts["faults"] += step != Fault()
            case Writes():
                for _ in range(step.count):
                    await self._stage.write(chosen)
                    await self._look()
            case Pause():
                await asyncio.sleep(step.seconds)
            case Restart():
                if step.leader:
                    await self._stage.restart_leader(step.after_s)
                    return
                async with self._looking:
                    await restart(self._node, step.after_s, empty=step.empty)
                    if step.empty:
                        self.sight.forget_newest()
                self._stage.counts["restarts"] += 1

    async def _complaint(self, own: object, goal: object, seed: int) -> str:
        status = await asyncio.to_thread(self._node.status)
        return (
            f"{self._node.name} is at {own}, the leader at {goal}, {EQUAL_WITHIN_S:g} s after schedule {seed}: "
            f"{schedule(seed)}. It says {status.leader}; its log:\n{self._node.log[-3000:]}"
        )

    async def _look(self) -> dict[str, Any] | None:
        async with self._looking:
            position = await self._stage.position(self._node)
            if position is not None:
                self.sight.note(position)
            return position


@contextlib.asynccontextmanager
async def lanes(cluster: Cluster, count: int) -> AsyncIterator[tuple[Stage, list[Lane]]]:
    """Have a leader and *count* followers run, each of which reaches it through a proxy of its own."""
    leader = await asyncio.to_thread(cluster.add().start)
    async with contextlib.AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(ASK_TIMEOUT_S)
        client = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        stage = Stage(cluster, client, Truth(leader.volume))
        proxies = [await stack.enter_async_context(proxied(leader.port, random.Random(n))) for n in range(count)]
        nodes = [cluster.add(MEHDB_PEERS=proxy.url) for proxy in proxies]
        await asyncio.gather(*(asyncio.to_thread(node.start) for node in nodes))
        running = [Lane(stage, node, proxy) for node, proxy in zip(nodes, proxies, strict=True)]
        watching = [asyncio.create_task(lane.watch()) for lane in running]
        try:
            yield stage, running
        finally:
            for task in watching:
                task.cancel()
            await asyncio.wait(watching)


async def together(waited_for: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what all gave. If one fails, so does this, and the others end."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in waited_for]
    return [task.result() for task in tasks]


async def prove(cluster: Cluster, *, count: int, rounds: int, retained: int) -> None:
    """Run *rounds* of a schedule on each of *count* followers, compare all that was seen, and print the numbers."""
    took_s: list[float] = []
    async with lanes(cluster, count) as (stage, running):
        for number in range(rounds):
            if number == rounds // 2:
                await stage.compact(retained)
            seeds = range(number * count, (number + 1) * count)
            await together(lane.suffer(seed) for lane, seed in zip(running, seeds, strict=True))
            took_s += await together(lane.equal(seed) for lane, seed in zip(running, seeds, strict=True))
            await stage.compare()
    await asyncio.to_thread(cluster.stop)
    stage.truth.note()
    history, chains = meta(cluster.leader.volume, "history"), stage.truth.chains
    mismatches = [line for lane in running for line in lane.sight.mismatches(history, chains)]
    assert not mismatches, "\n".join(mismatches[:20])
    assert strangers(cluster.nodes) == []
    counts, compared = stage.counts, sum(len(lane.sight.seen) for lane in running)
    assert compared > len(took_s), "hardly anything was seen on the way"
    floor, snapshots = meta(cluster.leader.volume, "floor"), sum(n.log.count("snapshot taken") for n in cluster.nodes)
    assert min(floor, snapshots) > 0, "nothing was compacted, or nobody missed it"
    print(
        f"convergence: {len(took_s):,} schedules, {counts['faults']:,} faults, {counts['restarts']:,} restarts, "
        f"{snapshots:,} snapshots, {len(chains) - 1:,} changes to floor {floor:,}, {compared:,} positions and "
        f"{counts['stores']:,} whole stores compared, {len(mismatches)} mismatches, "
        f"equal after {median(took_s):.1f} s, at most {max(took_s):.1f} s"
    )


async def test_a_follower_is_an_exact_prefix_through_every_fault_and_equal_soon_after(cluster: Cluster) -> None:
    await prove(cluster, count=5, rounds=4, retained=20)


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_followers_are_exact_prefixes_through_hundreds_of_schedules(cluster: Cluster) -> None:
    await prove(cluster, count=16, rounds=32, retained=100)
    logs = "".join(node.log for node in cluster.followers)
    for symptom in SYMPTOMS:
        assert symptom in logs, "the faults did not bite"


# The checker can fail.


CHAINS: Final = {0: GENESIS.hex(), 1: "11" * 16, 2: "22" * 16}
HISTORY: Final = "aa" * 16


def sight(*positions: tuple[str | None, int, str]) -> Sight:
    seen = Sight("mehdb-1")
    for history, revision, chain in positions:
        seen.note({"history": history, "revision": revision, "chain": chain})
    return seen


def test_an_exact_prefix_has_no_mismatch() -> None:
    seen = sight((None, 0, CHAINS[0]), (HISTORY, 0, CHAINS[0]), (HISTORY, 1, CHAINS[1]), (HISTORY, 2, CHAINS[2]))
    assert seen.mismatches(HISTORY, CHAINS) == []


@pytest.mark.parametrize(
    ("positions", "complaint"),
    [
        ([(HISTORY, 1, "99" * 16)], "was at 1"),
        ([("bb" * 16, 1, CHAINS[1])], "was at 1"),
        ([(HISTORY, 3, "33" * 16)], "was at 3"),
        ([(HISTORY, 2, CHAINS[2]), (HISTORY, 1, CHAINS[1])], "went back from revision 2 to 1"),
        ([(HISTORY, 1, CHAINS[1]), (HISTORY, 1, "99" * 16)], "twice"),
    ],
    ids=["another chain", "another history", "beyond the leader", "backwards", "two chains at one revision"],
)
def test_the_checker_notices(positions: list[tuple[str | None, int, str]], complaint: str) -> None:
    assert any(complaint in line for line in sight(*positions).mismatches(HISTORY, CHAINS))


async def test_a_row_that_was_changed_changes_the_contents(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    await store.lead(Epoch(1))
    await store.write(Write(b"key", b"value"))
    await store.close()
    before = contents(tmp_path, floor=1)
    with contextlib.closing(apsw.Connection(str(tmp_path / "store.db"))) as connection:
        connection.execute("UPDATE change SET value = x'56'")
    assert contents(tmp_path, floor=1) != before
