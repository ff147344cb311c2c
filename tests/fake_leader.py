"""A leader that answers as a test tells it to: honestly, out of a real store, or not at all like one."""

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from aiohttp import web

from cluster import ADDRESS, DEADLINE_S, PAUSE_S
from mehdb.errors import Diverged
from mehdb.model import GENESIS, Chain, Epoch, History, Page, Position, Revision, encode_page
from mehdb.store import Meta, Store, Write

T = TypeVar("T")

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Asked(NamedTuple):
    """One request that came."""

    at_s: float
    path: str
    query: Mapping[str, str]


class FakeLeader:
    """A server whose every answer is `answer`, which tests replace. It remembers what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.port = 0
        self._runner: web.ServerRunner | None = None

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}"

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, ADDRESS, self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close every connection and listen no more."""
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(Asked(time.monotonic(), request.path, dict(request.query)))
        return await self.answer(request)


@asynccontextmanager
async def fake_leader(answer: Answer) -> AsyncIterator[FakeLeader]:
    """Have a fake leader run."""
    leader = FakeLeader(answer)
    await leader.start()
    try:
        yield leader
    finally:
        await leader.stop()


def page_answer(
    page: Page | bytes | None, *, head: object, epoch: object = 1, history: object = "aa" * 16, status: int = 0
) -> web.Response:
    """Return an answer to `/replicate` with any contents: of a page or none, and of the headers."""
    body = encode_page(page) if isinstance(page, Page) else page
    headers = {
        "Mehdb-Role": "leader",
        "Mehdb-History": str(history),
        "Mehdb-Epoch": str(epoch),
        "Mehdb-Revision": str(head),
    }
    return web.Response(status=status or (204 if body is None else 200), body=body, headers=headers)


async def next_page(store: Store, request: web.BaseRequest) -> Page | None:
    """Return the page that *request* asks for, after waiting for it as long as it says. Raises `Diverged`."""
    query = request.query
    history = History(query["history"]) if "history" in query else None
    chain = Chain(bytes.fromhex(query["chain"])) if "chain" in query else GENESIS
    position = Position(history, Revision(int(query["after"])), chain)
    page = await store.page_after(position)
    if page is None and await store.wait_beyond(position.revision, float(query["wait"])):
        page = await store.page_after(position)
    return page


def honest(store: Store) -> Answer:
    """Answer as a leader with *store* does."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        try:
            page = await next_page(store, request)
        except Diverged as error:
            return page_answer(
                str(error).encode(), head=store.head, epoch=store.meta.epoch, history=store.meta.history, status=409
            )
        meta = store.meta
        return page_answer(page, head=meta.head, epoch=meta.epoch, history=meta.history)

    return answer


class Copy(NamedTuple):
    """The bytes of a snapshot, and the state of the store that it is of."""

    data: bytes
    meta: Meta


async def copied(store: Store) -> Copy:
    """Return a snapshot of *store*, as its node would send it."""
    snapshot = await store.snapshot()
    try:
        return Copy(snapshot.path.read_bytes(), snapshot.meta)
    finally:
        snapshot.path.unlink()


def snapshot_headers(copy: Copy) -> dict[str, str]:
    """Return the headers that a snapshot comes with."""
    digest = base64.b64encode(hashlib.sha256(copy.data).digest()).decode()
    return {
        "Content-Type": "application/vnd.sqlite3",
        "Content-Length": str(len(copy.data)),
        "Repr-Digest": f"sha-256=:{digest}:",
        "Mehdb-Snapshot-History": str(copy.meta.history),
        "Mehdb-Snapshot-Revision": str(copy.meta.head),
        "Mehdb-Snapshot-Chain": copy.meta.chain.hex(),
    }


def snapshot_answer(copy: Copy, *pieces: bytes, pause_s: float = 0, **headers: str | None) -> Answer:
    """Answer `/snapshot` with *copy*, but for *headers* (None: without that one), sent in *pieces* with pauses between.

    What the headers announce and does not come ends with the connection.
    """
    told = snapshot_headers(copy) | {name.replace("_", "-"): value for name, value in headers.items()}

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={name: value for name, value in told.items() if value is not None})
        await response.prepare(request)
        for number, piece in enumerate(pieces or (copy.data,)):
            await asyncio.sleep(pause_s if number else 0)  # as slow as a test wants it to be
            await response.write(piece)
        if request.transport is not None and response.content_length != sum(map(len, pieces or (copy.data,))):
            request.transport.close()
        return response

    return answer


def with_snapshots(store: Store, snapshot: Answer, *, below: int, pages: bool) -> Answer:
    """Answer as a leader with *store* does that sends followers below a revision for *snapshot*.

    Without *pages* that is its floor; else those who ask with `snapshot=no` get pages.
    """
    others = honest(store)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/snapshot":
            return await snapshot(request)
        if int(request.query["after"]) < below and not (pages and request.query.get("snapshot") == "no"):
            meta = store.meta
            return page_answer(b"take the snapshot", head=meta.head, epoch=meta.epoch, history=meta.history, status=410)
        return await others(request)

    return answer


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Store]:
    """Have a store open; at the end, every invariant of it holds."""
    store = await Store.open(directory)
    try:
        yield store
        assert (await store.check()).problems == ()
    finally:
        await store.close()


@asynccontextmanager
async def leading(directory: Path, changes: int, *, epoch: int = 1) -> AsyncIterator[Store]:
    """Have a leader's store open, with so many changes."""
    async with opened(directory) as store:
        await store.lead(Epoch(epoch))
        for number in range(changes):
            await store.write(Write(b"key/%d" % number, b"value %d" % number))
        yield store


async def soon(look: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Return the first true value of *look*, as `cluster.eventually` does, while this loop goes on."""
    end_s = time.monotonic() + deadline_s
    while not (value := look()):
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        await asyncio.sleep(PAUSE_S)  # between two looks, not instead of one
    return value
