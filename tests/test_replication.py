"""The follower's loop against a leader that lies, fails and comes back: nothing wrong is applied (promise 3)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import monotonic

import pytest
from aiohttp import web

from cluster import Cluster, eventually
from fake_leader import Answer, FakeLeader, fake_leader, honest, leading, next_page, opened, page_answer, soon
from mehdb.errors import Diverged
from mehdb.model import GENESIS, Chain, Change, Epoch, History, Page, Position, Revision, State
from mehdb.peers import ANSWER_TIMEOUT_S, Peer
from mehdb.replication import BACKOFF_LEAST_S, DIVERGED_MOST_S, WAIT_S, Follower
from mehdb.store import Store, Write

CHANGES = 5
OTHER = History("0123456789abcdef" * 2)


@dataclass
class Scene:
    """A leader's store, a server that tells what is in it or not, and a follower of that with a store of its own."""

    truth: Store
    leader: FakeLeader
    copy: Store
    follower: Follower

    @property
    def equal(self) -> bool:
        return self.copy.position == self.truth.position

    def lie(self, answer: Answer) -> None:
        self.leader.answer = answer

    def relent(self) -> None:
        self.leader.answer = honest(self.truth)

    async def write(self, key: bytes = b"k", value: bytes = b"v") -> None:
        await self.truth.write(Write(key, value))


@asynccontextmanager
async def scene(
    directory: Path, *, held: int = 0, lacking: int = CHANGES, answer: Answer | None = None
) -> AsyncIterator[Scene]:
    """Have a follower run that holds *held* changes and lacks others. The leader answers with *answer*, or honestly."""
    async with (
        leading(directory / "leader", held) as truth,
        fake_leader(answer or honest(truth)) as leader,
        opened(directory / "follower") as copy,
        Peer(leader.url) as peer,
    ):
        if held:
            page = await truth.page_after(Position())
            assert page is not None
            await copy.apply(page)
        for number in range(lacking):
            await truth.write(Write(b"later/%d" % number, b"value"))
        follower = Follower(copy, peer, "mehdb-1")
        task = asyncio.create_task(follower.run())
        try:
            yield Scene(truth, leader, copy, follower)
            assert not task.done(), task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


# A leader that is one.


async def test_a_follower_comes_to_its_leaders_position_and_stays_there(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        assert stage.follower.state is State.SYNCING
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        assert stage.equal
        for number in range(20):
            await stage.write(b"k/%d" % number)
            await soon(lambda: stage.equal, "the change to arrive")
        assert stage.follower.problem is None


async def test_a_follower_waits_for_changes_only_once_it_serves(tmp_path: Path) -> None:
    """Before, it wants to know the leader's head; after, it would be asking all the time."""
    async with scene(tmp_path) as stage:
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        await soon(lambda: stage.leader.asked[-1].query["wait"] == str(WAIT_S), "a long poll")
        assert [asked.query["wait"] for asked in stage.leader.asked] == ["0.0", str(WAIT_S)]


async def test_an_empty_leader_has_a_follower_that_serves(tmp_path: Path) -> None:
    async with scene(tmp_path, lacking=0) as stage:
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        assert stage.copy.meta == stage.truth.meta


async def test_only_what_is_durable_is_acknowledged_while_pages_fly(tmp_path: Path) -> None:
    async with scene(tmp_path, answer=refuse) as stage:
        for number in range(8):
            await stage.write(b"large/%d" % number, bytes(600_000))
        tell, claims = honest(stage.truth), []

        async def watch(request: web.BaseRequest) -> web.StreamResponse:
            asked, durable = int(request.query["after"]), int(request.query["durable"])
            assert durable <= stage.copy.head, "more was acknowledged than is durable"
            claims.append((asked, durable))
            return await tell(request)

        stage.lie(watch)
        await soon(
            lambda: stage.equal and stage.leader.asked[-1].query["wait"] != "0.0", "the follower to be at the head"
        )
    assert any(durable < asked for asked, durable in claims), "a page was asked for while the one before was applied"
    assert [asked for asked, _ in claims] == sorted({asked for asked, _ in claims}), "each page once"
    assert claims[-1] == (stage.truth.head, stage.truth.head)


async def test_a_page_is_kept_when_the_one_behind_it_does_not_come(tmp_path: Path) -> None:
    async with scene(tmp_path, answer=refuse) as stage:
        for number in range(4):
            await stage.write(b"large/%d" % number, bytes(600_000))
        tell = honest(stage.truth)

        async def only_the_first(request: web.BaseRequest) -> web.StreamResponse:
            return await tell(request) if request.query["after"] == "0" else await refuse(request)

        stage.lie(only_the_first)
        await soon(lambda: stage.copy.head, "the first page")
        await soon(lambda: stage.follower.problem and "503" in stage.follower.problem, "the second to fail")
        assert 0 < stage.copy.head < stage.truth.head
        first = stage.copy.head
        stage.relent()
        await soon(lambda: stage.equal, "the rest")
        assert sum(
            asked.query["after"] == str(first) and asked.query["durable"] == str(first) for asked in stage.leader.asked
        )


# A leader that is none. Each lie is told to a follower that is behind: what it would take, and must not.


async def refuse(_: web.BaseRequest) -> web.StreamResponse:
    return web.Response(status=503, text='{"error":"not_synced"}')


async def cut(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def web_page(_: web.BaseRequest) -> web.StreamResponse:
    return web.Response(text="<html>It works!</html>", content_type="text/html")


def bent(bend: Callable[[Page], Page | bytes | None], **headers: object) -> Callable[[Store], Answer]:
    """Return the lie that gives the true page, but bent."""

    def lie(truth: Store) -> Answer:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            try:
                page = await next_page(truth, request)
            except Diverged as error:  # asked for what follows the lie
                return page_answer(str(error).encode(), head=truth.head, history=truth.meta.history, status=409)
            assert page is not None
            told = {"head": truth.head, "epoch": truth.meta.epoch, "history": truth.meta.history} | headers
            return page_answer(bend(page), **told)  # type: ignore[arg-type]

        return answer

    return lie


def with_(page: Page, **fields: object) -> Page:
    return Page(**{name: getattr(page, name) for name in Page.__struct_fields__} | fields)  # type: ignore[arg-type]


def renumbered(page: Page, by: int) -> Page:
    changes = tuple(Change(Revision(change.revision + by), change.key, change.value) for change in page.changes)
    return with_(page, after=Revision(page.after + by), changes=changes)


INVALID = {
    "a gap": bent(lambda page: with_(page, changes=page.changes[:1] + page.changes[2:])),
    "no beginning": bent(lambda page: with_(page, changes=page.changes[1:])),
    "disorder": bent(lambda page: with_(page, changes=page.changes[::-1])),
    "a change twice": bent(lambda page: with_(page, changes=page.changes[:1] + page.changes)),
    "later changes": bent(lambda page: renumbered(page, 1)),
    "earlier changes": bent(lambda page: renumbered(page, -1)),
    "another place": bent(lambda page: with_(page, after=Revision(page.after + 1))),
    "nothing": bent(lambda page: with_(page, changes=(), chain=GENESIS)),
    "another history in the page": bent(lambda page: with_(page, history=OTHER)),
    "half a page": bent(lambda _: b"\x95"),
    "garbage": bent(lambda _: b"\xc1" * 1000),
    "an epoch beyond all": bent(lambda page: page, epoch=10**30),
    "a head beyond all": bent(lambda page: page, head=10**30),
    "an epoch in the page beyond all": bent(
        lambda _: b"\x95" + b"\xd9\x20" + b"a" * 32 + b"\xcf" + b"\xff" * 8 + b"\x00\xc4\x00\x90"
    ),
    "a web page": lambda _: web_page,
}
UNREACHABLE = {"a refusal": lambda _: refuse, "a connection cut": lambda _: cut}
FORKED = {
    "a changed value": bent(
        lambda page: with_(page, changes=(Change(page.changes[0].revision, b"k", b"forged"), *page.changes[1:]))
    ),
    "another chain": bent(lambda page: with_(page, chain=Chain(b"x" * 16))),
    "another history": bent(lambda page: with_(page, history=OTHER), history=OTHER),
}
STALE = {"an epoch that is over": bent(lambda page: with_(page, epoch=Epoch(0)), epoch=0)}


# A follower that has seen no epoch cannot know that one is over.
TOLD = [(name, held) for name in INVALID | UNREACHABLE for held in (0, 3)] + [(name, 3) for name in STALE]


@pytest.mark.parametrize(("name", "held"), TOLD)
async def test_a_lie_changes_nothing_and_is_got_over(tmp_path: Path, name: str, held: int) -> None:
    code = "peer_answer_invalid" if name in INVALID else "peer_unreachable" if name in UNREACHABLE else "stale_epoch"
    async with scene(tmp_path, held=held, answer=refuse) as stage:
        before = stage.copy.meta
        stage.lie((INVALID | UNREACHABLE | STALE)[name](stage.truth))
        first = len(stage.leader.asked)
        await soon(
            lambda: len(stage.leader.asked) > first + 1 and f"{code}: " in (stage.follower.problem or ""),
            "the lie to be told twice",
        )
        assert stage.copy.meta == before
        assert stage.follower.state is State.SYNCING
        stage.relent()
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        assert stage.equal
        assert stage.follower.problem is None


@pytest.mark.parametrize("name", FORKED)
async def test_a_follower_whose_leader_tells_another_story_keeps_its_own(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene(tmp_path, held=3, answer=refuse) as stage:
        before = stage.copy.meta
        stage.lie(FORKED[name](stage.truth))
        await soon(lambda: stage.follower.state is State.DIVERGED, "the follower to notice")
        assert (stage.follower.problem or "").startswith("diverged: ")
        assert stage.copy.meta == before
        assert await stage.copy.get(b"key/1") is not None
    assert [(record.levelno, "code=diverged" in record.message) for record in caplog.records][-1] == (
        logging.ERROR,
        True,
    )


async def test_a_diverged_follower_asks_more_and_more_seldom_and_follows_again_when_it_is_recognised(
    tmp_path: Path,
) -> None:
    disowned_at_s: list[float] = []

    async def disown(_: web.BaseRequest) -> web.StreamResponse:
        disowned_at_s.append(monotonic())
        history = stage.truth.meta.history
        return page_answer(b"revision 3 is ahead of the head 1", head=1, history=history, status=409)

    async with scene(tmp_path, held=3) as stage:
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        stage.lie(disown)
        await stage.write()  # ends the long poll, which is still an honest one
        await soon(lambda: stage.follower.state is State.DIVERGED, "the follower to notice")
        assert "revision 3 is ahead of the head 1" in (stage.follower.problem or "")
        await soon(lambda: len(disowned_at_s) > 4, "the follower to ask again and again")
        stage.relent()
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to be recognised", DIVERGED_MOST_S + 10)
        assert stage.equal
    for number, (earlier, later) in enumerate(pairwise(disowned_at_s)):
        assert later - earlier >= BACKOFF_LEAST_S * 2**number / 2  # half of it is jitter


async def test_a_follower_that_serves_goes_on_when_its_leader_lies(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        await soon(lambda: stage.leader.asked[-1].query["wait"] == str(WAIT_S), "its long poll")
        stage.lie(INVALID["later changes"](stage.truth))
        await stage.write()  # ends the long poll, which is still an honest one
        await soon(lambda: stage.leader.asked[-1].query["after"] == str(stage.truth.head), "the next long poll")
        before = stage.copy.position
        await stage.write()
        asked = len(stage.leader.asked)
        await soon(lambda: len(stage.leader.asked) > asked + 2, "the lie to be told")
        assert stage.copy.position == before
        assert (stage.follower.state, stage.follower.problem) == (State.SERVING, None)
        stage.relent()
        await soon(lambda: stage.equal, "the follower to catch up")


def attempts(stage: Scene) -> list[float]:
    """Return when the follower asked for what it lacks, and not for the page behind one that it was just given."""
    return [asked.at_s for asked in stage.leader.asked if asked.query["after"] == asked.query["durable"]]


@pytest.mark.parametrize("name", ["a refusal", "a gap", "an epoch that is over"])
async def test_a_leader_that_does_no_good_is_asked_more_and_more_seldom(tmp_path: Path, name: str) -> None:
    async with scene(tmp_path, held=3, answer=cut) as stage:
        await soon(lambda: len(stage.leader.asked) == 1, "the first request")
        stage.lie((INVALID | UNREACHABLE | STALE)[name](stage.truth))
        await soon(lambda: len(attempts(stage)) >= 4, "more of them")
    times = attempts(stage)
    pauses = [later - earlier for earlier, later in pairwise(times)]
    for number, pause in enumerate(pauses):
        assert pause >= BACKOFF_LEAST_S * 2**number / 2, f"{pauses}"  # half of it is jitter


async def test_a_leader_that_comes_back_with_less_does_not_keep_a_follower_from_serving(tmp_path: Path) -> None:
    """What it had when first asked is gone, and what is left is an exact prefix: there is nothing more to reach."""
    async with scene(tmp_path, held=3, answer=refuse) as stage:
        tell = honest(stage.truth)

        async def announce_more(request: web.BaseRequest) -> web.StreamResponse:
            answer = await tell(request)
            answer.headers["Mehdb-Revision"] = "1000"
            stage.relent()
            return answer

        stage.lie(announce_more)
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        assert stage.equal
        assert len(stage.leader.asked) < 20


async def test_a_leader_that_is_away_is_found_when_it_is_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with scene(tmp_path) as stage:
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        for _ in range(2):
            caplog.clear()
            await stage.leader.stop()
            await stage.write()
            await soon(lambda: "leader not followed" in caplog.text, "the follower to notice")
            assert stage.follower.state is State.SERVING
            assert not stage.equal
            await stage.leader.start()
            await soon(lambda: stage.equal, "the follower to find it again")
            assert "leader back" in caplog.text
            assert caplog.text.count("leader not followed") == 1, "one line for a change of state"


async def test_a_leader_that_hangs_is_given_up(tmp_path: Path) -> None:
    """For what is asked without a wait: a long poll may take that much longer."""
    release = asyncio.Event()

    async def hang(_: web.BaseRequest) -> web.StreamResponse:
        await release.wait()
        return web.Response(status=503)

    started_s = monotonic()
    async with scene(tmp_path, held=3, answer=hang) as stage:
        await soon(
            lambda: "peer_unreachable" in (stage.follower.problem or ""),
            "the follower to give up",
            ANSWER_TIMEOUT_S + 10,
        )
        assert monotonic() - started_s >= ANSWER_TIMEOUT_S
        assert "Timeout" in (stage.follower.problem or "")
        stage.relent()
        await soon(lambda: stage.equal, "the follower to follow")
        release.set()


# The status.


async def test_a_follower_tells_what_it_knows_of_its_leader(tmp_path: Path) -> None:
    async with scene(tmp_path, held=3, answer=refuse) as stage:
        await soon(lambda: stage.leader.asked, "the first request")
        told = stage.follower.status()
        assert (told.url, told.revision, told.lag_revisions, told.heard_seconds_ago) == (
            stage.leader.url,
            None,
            None,
            None,
        )
        assert stage.follower.problem is not None
        stage.relent()
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        told = stage.follower.status()
        assert (told.revision, told.lag_revisions) == (3 + CHANGES, 0)
        assert told.heard_seconds_ago is not None
        assert 0 <= told.heard_seconds_ago < 10


async def test_a_follower_behind_tells_by_how_much(tmp_path: Path) -> None:
    first, second = asyncio.Event(), asyncio.Event()

    async def step_by_step(request: web.BaseRequest) -> web.StreamResponse:
        await (first if request.query["after"] == "0" else second).wait()
        return await honest(stage.truth)(request)

    async with scene(tmp_path, answer=step_by_step) as stage:
        assert stage.follower.problem == "at revision 0, must reach the leader"
        for number in range(4):
            await stage.write(b"large/%d" % number, bytes(600_000))
        first.set()
        await soon(lambda: stage.copy.head, "the first page")
        problem = f"at revision {stage.copy.head}, must reach {stage.truth.head}"
        await soon(lambda: stage.follower.problem == problem, "the follower to tell where it is")
        told = stage.follower.status()
        assert (told.revision, told.lag_revisions) == (stage.truth.head, stage.truth.head - stage.copy.head)
        second.set()
        await soon(lambda: stage.equal, "the rest")


# A whole process.


async def test_a_node_lives_through_a_lying_leader_and_says_why_it_is_not_ready(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with leading(tmp_path / "truth", CHANGES) as truth, fake_leader(web_page) as leader:
        cluster.add()
        node = cluster.add(MEHDB_PEERS=leader.url)
        await asyncio.to_thread(node.start, ready=False)
        for lie, code in (
            (web_page, "peer_answer_invalid"),
            (refuse, "peer_unreachable"),
            (INVALID["an epoch beyond all"](truth), "peer_answer_invalid"),
        ):
            leader.answer = lie

            def reason(code: str = code) -> str | None:
                told = node.status().reason
                return told if told and code in told else None

            assert (await asyncio.to_thread(eventually, reason, f"{code} in the status") or "").startswith("synced: ")
            ready = await asyncio.to_thread(node.get, "/readyz")
            assert (ready.status_code, code in ready.text) == (503, True)
            full = await asyncio.to_thread(node.get, "/status?level=full")
            assert (full.status_code, code in full.json()["message"]) == (500, True)
        assert (await asyncio.to_thread(node.get, "/get/k")).status_code == 503
        leader.answer = honest(truth)
        await asyncio.to_thread(eventually, node.ready, "the node to be ready")
        assert (await asyncio.to_thread(node.get, "/get/key/1")).content == b"value 1"


async def test_a_node_stops_at_once_although_its_leader_hangs(cluster: Cluster) -> None:
    release = asyncio.Event()

    async def hang(_: web.BaseRequest) -> web.StreamResponse:
        await release.wait()
        return web.Response(status=503)

    async with fake_leader(hang) as leader:
        cluster.add()
        node = cluster.add(MEHDB_PEERS=leader.url)
        await asyncio.to_thread(node.start, ready=False)
        await soon(lambda: leader.asked, "the node to ask")
        started_s = monotonic()
        await asyncio.to_thread(node.stop)
        assert monotonic() - started_s < 5
        release.set()
