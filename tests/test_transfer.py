"""A store from another node: believed only when all of it has come and been verified; else the old one stays."""

import asyncio
import base64
import contextlib
import hashlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import apsw
import pytest
from aiohttp import web

from fake_leader import (
    Answer,
    Copy,
    FakeLeader,
    copied,
    fake_leader,
    honest,
    leading,
    opened,
    snapshot_answer,
    soon,
    with_snapshots,
)
from mehdb.errors import MehdbError, PeerAnswerInvalid, PeerUnreachable, SnapshotRefused
from mehdb.figures import Transfers
from mehdb.model import GENESIS, Page, Position, State
from mehdb.peers import ANSWER_TIMEOUT_S, Peer
from mehdb.replication import Follower
from mehdb.store import Store, Write
from mehdb.store.schema import use_page_checksums
from mehdb.store.seal import seal
from mehdb.transfer import PROGRESS_EVERY_S, ProgressLog, fetch

CHANGES = 200
HELD = 20
DIGEST_OF_NOTHING = "sha-256=:" + base64.b64encode(bytes(32)).decode() + ":"

Lie = Callable[[Copy], Answer]


def unheard(_step: str, _done: int, _total: int) -> None:
    """Is told how a transfer goes on, and does not care."""


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def inode(path: Path) -> int:
    return path.stat().st_ino


def leftovers(directory: Path) -> list[str]:
    """Return what a download has left on a follower's volume."""
    return [name for name in files(directory / "follower") if "incoming" in name]


def answered(status: int, text: str = "") -> Lie:
    """Return the lie that is no snapshot at all."""

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, text=text)

    return lambda _copy: answer


def bent(bend: Callable[[bytes], bytes]) -> Lie:
    """Return the lie that sends other bytes, whose length and digest are right: a leader whose own disk lies."""

    def lie(copy: Copy) -> Answer:
        return snapshot_answer(Copy(bend(copy.data), copy.meta))

    return lie


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def rewritten(statements: str) -> Callable[[bytes], bytes]:
    """Return a function that changes a snapshot as SQLite does, so that every page has its right checksum."""

    def rewrite(data: bytes) -> bytes:
        use_page_checksums()
        with contextlib.closing(apsw.Connection(":memory:")) as memory:
            memory.deserialize("main", data)
            memory.execute(statements)
            return memory.serialize("main")

    return rewrite


def another_program(_: bytes) -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.execute("CREATE TABLE theirs (a)")
        return memory.serialize()


async def hang(_: web.BaseRequest) -> web.StreamResponse:
    await asyncio.sleep(60)  # longer than anybody waits
    return web.Response()


async def cut(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


REFUSED: dict[str, Lie] = {
    "no room for it": answered(507, '{"error": "disk_full"}'),
    "no such route": answered(404),
    "damage over there": answered(500, '{"error": "damaged_row"}'),
}
UNREACHABLE: dict[str, Lie] = {
    "others are first": answered(503, '{"error": "snapshot_busy"}'),
    "no answer": lambda _: hang,
    "a connection cut": lambda _: cut,
    "half of it": lambda copy: snapshot_answer(copy, copy.data[: len(copy.data) // 2]),
    "all but a byte": lambda copy: snapshot_answer(copy, copy.data[:-1]),
    "nothing of it": lambda copy: snapshot_answer(copy, b""),
    "another digest": lambda copy: snapshot_answer(copy, Repr_Digest=DIGEST_OF_NOTHING),
    "a flipped bit on the way": lambda copy: snapshot_answer(copy, flipped(copy.data, len(copy.data) // 2)),
    "less than it is": lambda copy: snapshot_answer(copy, copy.data[:-4096], Content_Length=str(len(copy.data) - 4096)),
}
INVALID: dict[str, Lie] = {
    "a web page": answered(200, "<html>"),
    "no digest": lambda copy: snapshot_answer(copy, Repr_Digest=None),
    "a digest of another kind": lambda copy: snapshot_answer(
        copy,
        Repr_Digest=f"md5=:{base64.b64encode(hashlib.md5(copy.data).digest()).decode()}:",  # noqa: S324
    ),
    "a digest that is none": lambda copy: snapshot_answer(copy, Repr_Digest="sha-256=:" + "=" * 44 + ":"),
    "no length": lambda copy: snapshot_answer(copy, Content_Length=None),
    "no history": lambda copy: snapshot_answer(copy, Mehdb_Snapshot_History=None),
    "a history that is none": lambda copy: snapshot_answer(copy, Mehdb_Snapshot_History="xyz"),
    "another history": lambda copy: snapshot_answer(copy, Mehdb_Snapshot_History="0123456789abcdef" * 2),
    "another revision": lambda copy: snapshot_answer(copy, Mehdb_Snapshot_Revision=str(copy.meta.head + 1)),
    "a revision that is none": lambda copy: snapshot_answer(copy, Mehdb_Snapshot_Revision="-1"),
    "an empty file": bent(lambda _: b""),
    "garbage": bent(lambda data: b"\xc1" * len(data)),
    "a flipped bit": bent(lambda data: flipped(data, len(data) // 2)),
    "a flipped bit in the last page": bent(lambda data: flipped(data, len(data) - 2000)),
    "a page too few": bent(lambda data: data[:-4096]),
    "half a page too few": bent(lambda data: data[:-2048]),
    "a page of nothing": bent(lambda data: data[:8192] + bytes(4096) + data[12288:]),
    "another program's database": bent(another_program),
    "a newer schema": bent(rewritten("PRAGMA user_version = 999")),
    "a change too few": bent(rewritten("DELETE FROM change WHERE revision = (SELECT max(revision) FROM change)")),
    "another value": bent(rewritten("UPDATE change SET value = CAST('forged' AS BLOB) WHERE revision = 3")),
    "a key too few": bent(rewritten("DELETE FROM entry WHERE key = (SELECT min(key) FROM entry)")),
    "another head": bent(rewritten("UPDATE meta SET head = head + 1")),
    "no head": bent(rewritten("DELETE FROM meta")),
}

LIES = REFUSED | UNREACHABLE | INVALID


def kind_of(name: str) -> type[MehdbError]:
    """Return what the lie called *name* is taken for."""
    return SnapshotRefused if name in REFUSED else PeerUnreachable if name in UNREACHABLE else PeerAnswerInvalid


@dataclass
class Scene:
    """A leader's store, a server that sends a snapshot of it or not, and a follower that has to take one."""

    truth: Store
    copy: Copy
    leader: FakeLeader
    store: Store
    follower: Follower

    @property
    def equal(self) -> bool:
        return self.store.position == self.truth.position

    def send(self, snapshot: Answer, *, pages: bool = False) -> None:
        self.leader.answer = with_snapshots(self.truth, snapshot, below=CHANGES, pages=pages)


@asynccontextmanager
async def scene(directory: Path, lie: Lie, *, pages: bool = False) -> AsyncIterator[Scene]:
    """Have a follower run that holds the first HELD changes. Its leader sends it for a snapshot, and then *lie*."""
    async with (
        leading(directory / "leader", HELD) as truth,
        fake_leader(honest(truth)) as leader,
        opened(directory / "follower") as store,
        Peer(leader.url) as peer,
    ):
        page = await truth.page_after(Position())
        assert page is not None
        await store.apply(page)
        writes = [Write(b"later/%d" % number, bytes(1000)) for number in range(CHANGES - HELD)]
        await asyncio.gather(*map(truth.write, writes))  # one commit
        copy = await copied(truth)
        stage = Scene(truth, copy, leader, store, Follower(store, peer, "mehdb-1"))
        stage.send(lie(copy), pages=pages)
        task = asyncio.create_task(stage.follower.run())
        try:
            yield stage
            assert not task.done(), task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


# What is fetched.


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A snapshot of a store with some changes."""

    async def make() -> Copy:
        async with leading(tmp_path_factory.mktemp("truth"), CHANGES) as truth:
            return await copied(truth)

    return asyncio.run(make())


async def test_a_whole_snapshot_is_what_its_sender_says(copy: Copy, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    async with fake_leader(snapshot_answer(copy)) as leader, Peer(leader.url) as peer:
        meta = await fetch(peer, tmp_path / "incoming", lambda *step: steps.append(step))
    assert meta == copy.meta
    assert (tmp_path / "incoming").read_bytes() == copy.data
    assert [asked.path for asked in leader.asked] == ["/snapshot"]
    assert list(dict.fromkeys(step for step, *_ in steps)) == ["download", "verify"]
    assert ("download", len(copy.data), len(copy.data)) in steps
    assert all(0 <= done <= total for _, done, total in steps)


@pytest.mark.parametrize("name", LIES)
async def test_what_is_no_whole_sound_snapshot_is_refused_and_nothing_of_it_stays(
    copy: Copy, tmp_path: Path, name: str
) -> None:
    error = kind_of(name)
    async with fake_leader(LIES[name](copy)) as leader, Peer(leader.url) as peer:
        started_s = monotonic()
        with pytest.raises(error) as raised:
            await fetch(peer, tmp_path / "incoming", unheard)
        assert monotonic() - started_s < ANSWER_TIMEOUT_S + 5
    assert type(raised.value) is error
    assert leader.url in str(raised.value)
    assert not files(tmp_path)


async def test_a_download_that_is_given_up_leaves_nothing(copy: Copy, tmp_path: Path) -> None:
    halves = snapshot_answer(copy, copy.data[:5000], copy.data[5000:], pause_s=60)
    async with fake_leader(halves) as leader, Peer(leader.url) as peer:
        task = asyncio.create_task(fetch(peer, tmp_path / "incoming", unheard))
        await soon(lambda: (tmp_path / "incoming").exists(), "the download to begin")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not files(tmp_path)


async def test_a_long_transfer_says_how_it_goes_on_and_a_short_one_nothing(
    copy: Copy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mehdb")
    count = 8
    size = -(-len(copy.data) // count)
    pieces = [copy.data[start : start + size] for start in range(0, len(copy.data), size)]
    slow = snapshot_answer(copy, *pieces, pause_s=(PROGRESS_EVERY_S + 1) / (count - 1))
    async with fake_leader(snapshot_answer(copy)) as leader, Peer(leader.url) as peer:
        await fetch(peer, tmp_path / "short", ProgressLog(leader.url, Transfers()))
        assert not caplog.messages
        leader.answer, taken = slow, Transfers()
        await fetch(peer, tmp_path / "long", ProgressLog(leader.url, taken))
    (line,) = caplog.messages
    assert line.startswith("snapshot progress step=download done=")
    assert line.endswith(f" of={len(copy.data)} from={leader.url}")
    assert (taken.done_bytes, taken.size_bytes) == (len(copy.data), len(copy.data))


# What a follower makes of it.


async def test_a_follower_behind_the_floor_takes_the_snapshot_and_goes_on_from_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mehdb")
    async with scene(tmp_path, snapshot_answer) as stage:
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        assert stage.equal
        assert f"snapshot taken revision={CHANGES} leader={stage.leader.url}" in caplog.text
        await stage.truth.write(Write(b"k", b"v"))
        await soon(lambda: stage.equal, "the next change")
        assert sum(asked.path == "/snapshot" for asked in stage.leader.asked) == 1
        assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", LIES)
async def test_a_snapshot_that_fails_leaves_the_old_store_in_service(tmp_path: Path, name: str) -> None:
    code = kind_of(name).code
    async with scene(tmp_path, LIES[name]) as stage:
        before, file = stage.store.meta, inode(tmp_path / "follower" / "store.db")
        async with asyncio.timeout(30):
            while not (stage.follower.problem or "").startswith(f"{code}: "):  # read all the while
                assert await stage.store.get(b"key/1") is not None
                await asyncio.sleep(0)
        assert stage.follower.state is State.SYNCING
        assert stage.store.meta == before
        assert inode(tmp_path / "follower" / "store.db") == file
        assert not leftovers(tmp_path)
        stage.send(snapshot_answer(stage.copy))
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to take it when it is sound")
        assert stage.equal
        assert stage.follower.problem is None


@pytest.mark.parametrize("name", ["no room for it", "others are first", "half of it", "a flipped bit"])
async def test_where_no_snapshot_can_be_had_pages_do(tmp_path: Path, name: str) -> None:
    async with scene(tmp_path, LIES[name], pages=True) as stage:
        await soon(lambda: stage.follower.state is State.SERVING, "the follower to serve")
        assert stage.equal
        asked = [asked.query.get("snapshot", "yes") for asked in stage.leader.asked if asked.path == "/replicate"]
        assert asked[:2] == ["yes", "no"]


def beginning(page: Page, count: int) -> Page:
    """Return the page with the first *count* changes of *page*, which is the first of its history."""
    changes, chain = page.changes[:count], GENESIS
    for change in changes:
        _, chain = seal(chain, change)
    return Page(page.history, page.epoch, page.after, chain, changes)


@pytest.mark.parametrize("which", ["another history", "an earlier revision"])
async def test_a_sound_snapshot_that_is_no_later_state_of_the_store_replaces_nothing(
    tmp_path: Path, which: str
) -> None:
    """A leader that says 410 and is another one, or forgot: the follower is diverged, and keeps what it has."""
    async with (
        leading(tmp_path / "other", CHANGES) as other,
        opened(tmp_path / "early") as early,
        scene(tmp_path, lambda _: cut) as stage,
    ):
        page = await stage.truth.page_after(Position())
        assert page is not None
        await early.apply(beginning(page, HELD - 1))
        before = stage.store.meta
        stage.send(snapshot_answer(await copied(other if which == "another history" else early)))
        await soon(lambda: stage.follower.state is State.DIVERGED, "the follower to notice")
        assert stage.store.meta == before
        assert await stage.store.get(b"key/1") is not None
        assert "no later state of this store" in (stage.follower.problem or "")
