"""What a read asks for is what it gets, or an error: a revision, the leader's own answer, or nothing too old."""

import asyncio
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic
from typing import Final

import httpx
import pytest

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, eventually, free_port, running
from fake_leader import soon
from faults import Fault, Kind, proxied
from mehdb.model import Revision
from mehdb.replication import Freshness
from scenes import resume, suspend
from wire import Connection, ask, request

NOT_COPIED: Final = ("lock", "control", "*-shm")  # what belongs to a process, not to the data


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A leader that knows its two followers. No test changes what they are."""
    with running(tmp_path_factory.mktemp("trio")) as nodes:
        yield introduced(nodes, 3)


def introduced(cluster: Cluster, replicas: int) -> Cluster:
    """Start a leader that asks its followers, and these."""
    for _ in range(replicas):
        cluster.add()
    cluster.introduce()
    for node in cluster.nodes:
        node.start()
    return cluster


def written(node: Node, key: str, value: bytes) -> int:
    """Write, and return the revision."""
    return ask(node, "PUT", f"/set/{key}", value).revision


def staleness_s(node: Node, query: str = "") -> float:
    told = ask(node, "GET", f"/keys{query}").headers["Mehdb-Staleness"]
    assert re.fullmatch(r"[0-9]+\.[0-9]|unknown", told)
    return float("inf") if told == "unknown" else float(told)


# A revision.


def test_a_follower_that_is_given_the_revision_of_a_write_shows_it(trio: Cluster) -> None:
    for number in range(30):
        for follower in trio.followers:
            revision = written(trio.leader, "own", b"%d" % number)
            reply = ask(follower, "GET", f"/get/own?min_revision={revision}")
            assert (reply.status, reply.body) == (200, b"%d" % number)
    head = ask(trio.leader, "GET", f"/keys?min_revision={revision}&limit=1")
    assert (head.status, head.json) == (200, ["own"])
    assert ask(trio.followers[0], "HEAD", f"/get/own?min_revision={revision}").status == 200


def test_a_revision_that_does_not_come_is_504_with_what_there_is(trio: Cluster) -> None:
    for node in trio.nodes:
        head = node.position()["revision"]
        started_s = monotonic()
        reply = ask(node, "GET", f"/get/own?min_revision={head + 1}&wait=0.3")
        assert (reply.status, reply.error, reply.json["revision"]) == (504, "not_reached", head)
        assert reply.headers["ETag"] is None, "it is no revision of the key"
        assert 0.3 <= monotonic() - started_s < 0.3 + DEADLINE_S / 4
        assert ask(node, "GET", f"/keys?min_revision={head + 1}&wait=0").error == "not_reached"


async def test_a_follower_that_is_cut_off_says_so_and_answers_once_it_is_not(cluster: Cluster) -> None:
    leader = await asyncio.to_thread(cluster.add().start)
    async with proxied(leader.port) as proxy:
        follower = await asyncio.to_thread(cluster.add(MEHDB_PEERS=proxy.url).start)
        before = await asyncio.to_thread(written, leader, "k", b"old")
        await asyncio.to_thread(cluster.converge)
        await proxy.set(Fault(Kind.HOLD))
        revision = await asyncio.to_thread(written, leader, "k", b"new")
        reply = await asyncio.to_thread(ask, follower, "GET", f"/get/k?min_revision={revision}&wait=0.2")
        assert (reply.status, reply.json["revision"]) == (504, before)
        assert (await asyncio.to_thread(ask, follower, "GET", "/get/k")).body == b"old"
        waiting = asyncio.create_task(
            asyncio.to_thread(ask, follower, "GET", f"/get/k?min_revision={revision}&wait=15")
        )
        await proxy.heal()
        assert (await waiting).body == b"new"
        await asyncio.to_thread(cluster.stop)


def test_a_drain_ends_no_wait_for_a_revision_as_reads_go_on(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    assert follower.process is not None
    with Connection(follower) as waiting:
        waiting.send(request("GET", "/get/k?min_revision=1&wait=20"))
        follower.process.send_signal(signal.SIGUSR1)
        eventually(lambda: follower.status().state == "draining", "the follower to drain")
        written(leader, "k", b"v")
        assert waiting.reply().body == b"v"


def test_those_who_wait_for_a_revision_keep_no_probe_out(cluster: Cluster) -> None:
    leader = cluster.add(MEHDB_MAX_CONNECTIONS="16").start()
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(Connection(leader)).send(request("GET", "/get/k?min_revision=9&wait=60"))
        for _ in range(10):
            assert ask(leader, "GET", "/livez").status == 200


@pytest.mark.parametrize(
    "query",
    ["min_revision=", "min_revision=-1", "min_revision=9223372036854775808", "min_revision=1&wait=60.1", "wait=x",
     "consistency=follower", "consistency=", "max_staleness=-1", "max_staleness=soon", "forward=yes", "min_revison=1",
     "min_revision=1&min_revision=1"],
)  # fmt: skip
def test_what_is_asked_for_badly_is_an_error_at_once(trio: Cluster, query: str) -> None:
    for node in trio.nodes[:2]:
        for target in ("/get/own", "/keys"):
            reply = ask(node, "GET", f"{target}?{query}")
            assert (reply.status, reply.error) == (400, "bad_parameter")


# The leader.


def test_a_follower_sends_who_asks_for_the_leader_there(trio: Cluster) -> None:
    follower, target = trio.followers[0], "/get/a%2Fb?consistency=leader&wait=%31"
    reply = ask(follower, "GET", target)
    assert (reply.status, reply.error) == (307, "not_leader")
    assert reply.headers["Location"] == trio.leader.url + target
    assert ask(follower, "GET", "/keys?consistency=leader").status == 307
    passed_on = ask(follower, "GET", "/keys?consistency=leader", headers={"Mehdb-Forwarded": "mehdb-9"})
    assert (passed_on.status, passed_on.error, passed_on.headers["Location"]) == (503, "not_leader", None)


def test_a_leader_asks_its_followers_before_it_says_that_it_leads(trio: Cluster) -> None:
    written(trio.leader, "own", b"v")
    before = asked_of(trio.followers[0])
    assert ask(trio.leader, "GET", "/get/own?consistency=leader").body == b"v"
    assert asked_of(trio.followers[0]) == before + 1
    assert ask(trio.leader, "GET", "/get/own").body == b"v"
    assert asked_of(trio.followers[0]) == before + 1, "only who asks for it pays for it"


def test_many_readers_at_once_share_the_questions(trio: Cluster) -> None:
    written(trio.leader, "own", b"v")
    before = asked_of(trio.followers[0])
    readers = 40
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(trio.leader)) for _ in range(readers)]
        for connection in connections:
            connection.send(request("GET", "/get/own?consistency=leader"))
        assert {connection.reply().status for connection in connections} == {200}
    assert 1 <= asked_of(trio.followers[0]) - before < readers / 2


def asked_of(node: Node) -> int:
    """Return how often *node* was asked where it is."""
    found = re.search(
        r'mehdb_requests_total{method="GET",route="/position",status="200"} (\d+)', node.get("/metrics").text
    )
    return int(found[1]) if found else 0


def test_a_peer_that_does_not_answer_leaves_it_open_who_leads(cluster: Cluster) -> None:
    leader, silent, other = introduced(cluster, 3).nodes
    written(leader, "k", b"v")
    suspend(silent)
    started_s = monotonic()
    reply = ask(leader, "GET", "/get/k?consistency=leader")
    assert monotonic() - started_s < 3 + DEADLINE_S / 4
    assert (reply.status, reply.error) == (503, "not_confirmed_leader")
    assert silent.url in reply.json["message"]
    assert other.url not in reply.json["message"]
    assert reply.headers["Retry-After"]
    assert ask(leader, "GET", "/get/k").body == b"v"
    resume(silent)
    assert ask(leader, "GET", "/get/k?consistency=leader").status == 200
    other.kill()  # its port is closed: it does not exist
    assert ask(leader, "GET", "/get/k?consistency=leader").status == 200


async def test_an_old_leader_beside_a_newer_one_does_not_confirm_that_it_leads(cluster: Cluster) -> None:
    old = cluster.add()
    follower = cluster.add()
    cluster.introduce()
    await asyncio.to_thread(old.start)
    async with proxied(old.port) as proxy:
        follower.environment["MEHDB_PEERS"] = proxy.url
        await asyncio.to_thread(follower.start)
        await asyncio.to_thread(written, old, "k", b"old")
        await asyncio.to_thread(cluster.converge)
        assert (await asyncio.to_thread(ask, old, "GET", "/get/k?consistency=leader")).body == b"old"
        suspend(old)
        new = await asyncio.to_thread(successor, cluster, old)
        proxy.lead_to(new.port, cut=True)
        await asyncio.to_thread(written, new, "k", b"new")
        await soon(lambda: ask(follower, "GET", "/get/k").body == b"new", "the follower to follow the new leader")
        resume(old)
        reply = await asyncio.to_thread(ask, old, "GET", "/get/k?consistency=leader")
        assert (reply.status, reply.error) == (503, "not_confirmed_leader")
        assert follower.url in reply.json["message"]
        assert (await asyncio.to_thread(ask, old, "GET", "/get/k")).body == b"old", "what is not asked for is not given"
        await asyncio.to_thread(follower.kill)  # what the old leader was told, it does not forget
        reply = await asyncio.to_thread(ask, old, "GET", "/get/k?consistency=leader")
        assert (reply.status, reply.error) == (503, "not_confirmed_leader")
        assert (await asyncio.to_thread(ask, new, "GET", "/get/k?consistency=leader")).body == b"new"
        await asyncio.to_thread(old.kill)


def successor(cluster: Cluster, old: Node) -> Node:
    """Start a new process of the leader on a copy of the volume of *old*, which is stopped."""
    port, volume = free_port(), cluster.directory / f"{old.name}-new"
    shutil.copytree(old.volume, volume, ignore=shutil.ignore_patterns(*NOT_COPIED))
    moved = {"MEHDB_PORT": str(port), "MEHDB_DATADIR": str(volume), "MEHDB_PEERS": f"http://{ADDRESS}:{port}"}
    cluster.nodes.append(Node(old.name, port, volume, old.environment | moved))
    return cluster.nodes[-1].start()


# How old it may be.


def test_a_leader_is_never_too_stale_and_says_nothing_of_it(trio: Cluster) -> None:
    reply = ask(trio.leader, "GET", "/keys?max_staleness=0")
    assert (reply.status, reply.headers["Mehdb-Staleness"]) == (200, None)


def test_every_answer_of_a_follower_says_how_old_it_may_be(trio: Cluster) -> None:
    follower = trio.followers[0]
    for asked in ("GET /get/own", "GET /get/none", "PUT /set/own", "GET /livez", "GET /"):
        told = ask(follower, *asked.split()).headers.get_all("Mehdb-Staleness")
        assert told is not None, asked
        assert len(told) == 1
    assert 0 < staleness_s(follower) <= 5, "it asks at least every 1.5 s"
    leader = follower.status().leader
    assert leader is not None
    assert leader.staleness_seconds is not None
    assert "\nmehdb_staleness_seconds " in follower.get("/metrics").text


def test_staleness_grows_while_the_leader_stands_still(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    written(leader, "k", b"v")
    assert ask(follower, "GET", "/get/k?min_revision=1&max_staleness=20").body == b"v"
    suspend(leader)
    since_s = monotonic()
    eventually(lambda: staleness_s(follower) > 1, "a second to pass")
    assert staleness_s(follower) >= monotonic() - since_s - 0.1, "what was written since it stands still: nothing"
    for target in ("/get/k", "/keys"):
        reply = ask(follower, "GET", f"{target}?max_staleness=0.9")
        assert (reply.status, reply.error) == (503, "too_stale")
        assert ask(follower, "GET", f"{target}?max_staleness=600").status == 200
    follower.kill()
    follower.start(ready=False)
    assert staleness_s(follower) == float("inf")
    assert ask(follower, "GET", "/get/k?max_staleness=600").error == "too_stale"
    assert ask(follower, "GET", "/get/k").body == b"v"
    resume(leader)
    eventually(lambda: staleness_s(follower) < 5, "the follower to be fresh again")


def test_one_head_is_kept_until_it_is_reached_so_that_constant_writes_hide_nothing() -> None:
    freshness = Freshness()
    assert freshness.staleness_s() is None
    now = monotonic()
    freshness.note(Revision(5), Revision(9), now - 50)
    assert freshness.staleness_s() is None
    freshness.note(Revision(8), Revision(12), now - 40)
    assert freshness.staleness_s() is None
    freshness.note(Revision(10), Revision(14), now - 30)
    assert freshness.staleness_s() == pytest.approx(50, abs=5), "9 was the head 50 s ago"
    freshness.note(Revision(13), Revision(18), now - 20)
    assert freshness.staleness_s() == pytest.approx(50, abs=5)
    freshness.note(Revision(14), Revision(20), now - 10)
    assert freshness.staleness_s() == pytest.approx(30, abs=5)
    freshness.note(Revision(20), Revision(20), now - 1)
    assert freshness.staleness_s() == pytest.approx(1, abs=0.9)


class Writer(threading.Thread):
    """Writes to *leader* until it is stopped, and knows when each revision was acknowledged."""

    def __init__(self, leader: Node) -> None:
        super().__init__()
        self.acknowledged: list[tuple[float, int]] = []
        self.over = threading.Event()
        self._leader = leader

    def run(self) -> None:
        with httpx.Client(timeout=DEADLINE_S, trust_env=False) as client:
            while not self.over.is_set():
                answer = client.put(f"{self._leader.url}/set/clock", content=b"x")
                self.acknowledged.append((monotonic(), int(answer.headers["ETag"].strip('"'))))

    def head_at(self, moment_s: float) -> int:
        """Return the newest revision that was certainly there at that moment."""
        return max((revision for at_s, revision in self.acknowledged if at_s <= moment_s), default=0)


def sample(follower: Node) -> tuple[float, float, int]:
    """Return when *follower* was asked, how old it says that it is, and the revision that it shows."""
    asked_at_s = monotonic()
    reply = ask(follower, "GET", "/get/clock")
    told = reply.headers["Mehdb-Staleness"]
    return asked_at_s, float("inf") if told == "unknown" else float(told), reply.revision if reply.status == 200 else 0


async def test_no_follower_says_that_it_is_fresher_than_it_is(cluster: Cluster) -> None:
    """What is on its way for long is as old as that when it arrives; and a follower is not too modest either."""
    leader = await asyncio.to_thread(cluster.add().start)
    async with proxied(leader.port) as proxy:
        follower = await asyncio.to_thread(cluster.add(MEHDB_PEERS=proxy.url).start)
        writer, samples = Writer(leader), []
        writer.start()
        try:
            for held_s in (0.0, 0.9, 0.0, 1.3):
                await proxy.set(Fault(Kind.HOLD) if held_s else Fault())
                end_s = monotonic() + (held_s or 0.8)
                while monotonic() < end_s:
                    samples.append(await asyncio.to_thread(sample, follower))
        finally:
            writer.over.set()
            await asyncio.to_thread(writer.join)
        await proxy.heal()
        await asyncio.to_thread(cluster.stop)
    wrong = [one for one in samples if one[1] < float("inf") and one[2] < writer.head_at(one[0] - one[1])]
    assert wrong == [], f"{len(wrong)} of {len(samples)}"
    told = sorted(one[1] for one in samples)
    assert told[len(told) // 4] < 0.6, "while nothing is in the way, it is known to be fresh"
    assert told[-1] > 0.9, "and that something was, too"
    print(f"staleness: {len(samples)} reads beside {len(writer.acknowledged)} writes, none fresher than told")


def test_an_idle_follower_is_known_to_be_fresh(trio: Cluster) -> None:
    """The leader says how long it held a request: else a follower that waits for nothing would look 3 s old."""
    trio.converge()
    follower = trio.followers[0]
    end_s, told = monotonic() + 2.5, []
    while monotonic() < end_s:
        told.append(staleness_s(follower))
    assert sorted(told)[len(told) // 2] < 1.5, "half of the time, half of a long poll"
