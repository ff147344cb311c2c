"""The client to another node: what it asks, and what it makes of any answer."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from cluster import ADDRESS, Cluster, free_port
from fake_leader import FakeLeader, fake_leader, page_answer
from mehdb.errors import Compacted, Diverged, MehdbError, PeerAnswerInvalid, PeerUnreachable, StaleEpoch
from mehdb.model import PAGE_BYTES_MAX, Chain, Change, Epoch, History, Page, Position, Revision, encode_page
from mehdb.peers import Peer, Pull

HISTORY = History("aa" * 16)
POSITION = Position(HISTORY, Revision(2), Chain(b"c" * 16))
PAGE = Page(
    HISTORY, Epoch(3), Revision(2), Chain(b"d" * 16), (Change(Revision(3), b"k", b"v"), Change(Revision(4), b"k", None))
)
EMPTY_PAGE = Page(HISTORY, Epoch(3), Revision(2), Chain(b"c" * 16), ())


async def nothing_new(request: web.BaseRequest) -> web.StreamResponse:
    return page_answer(None, head=request.query["after"], epoch=3)


@pytest.fixture
async def leader() -> AsyncIterator[FakeLeader]:
    async with fake_leader(nothing_new) as leader:
        yield leader


@pytest.fixture
async def peer(leader: FakeLeader) -> AsyncIterator[Peer]:
    async with Peer(leader.url) as peer:
        yield peer


async def pull(peer: Peer, position: Position = POSITION, wait_s: float = 0) -> Pull:
    return await peer.pull(position, Epoch(3), node="mehdb-1", durable=Revision(1), wait_s=wait_s)


async def test_a_pull_says_where_the_follower_is(leader: FakeLeader, peer: Peer) -> None:
    await pull(peer, wait_s=1.5)
    assert leader.asked[-1].path == "/replicate"
    assert leader.asked[-1].query == {
        "history": HISTORY, "after": "2", "chain": b"c".hex() * 16, "durable": "1", "node": "mehdb-1", "wait": "1.5"
    }  # fmt: skip


async def test_an_empty_follower_names_no_history(leader: FakeLeader, peer: Peer) -> None:
    await pull(peer, Position())
    assert leader.asked[-1].query == {"after": "0", "durable": "1", "node": "mehdb-1", "wait": "0"}


async def test_a_page_comes_with_what_the_leader_says_of_itself(leader: FakeLeader, peer: Peer) -> None:
    async def page(_: web.BaseRequest) -> web.StreamResponse:
        return page_answer(PAGE, head=9, epoch=3)

    leader.answer = page
    assert (await pull(peer))._replace(as_of_s=0) == Pull(HISTORY, Epoch(3), Revision(9), PAGE)


async def test_nothing_new_is_no_page(peer: Peer) -> None:
    assert (await pull(peer))._replace(as_of_s=0) == Pull(HISTORY, Epoch(3), POSITION.revision, None)


def answers() -> dict[str, tuple[web.Response, type[MehdbError]]]:
    """Return answers that are none, and what each is taken for."""
    page = encode_page(PAGE)
    other_history = Page(History("bb" * 16), PAGE.epoch, PAGE.after, PAGE.chain, PAGE.changes)
    named = {
        "a refusal": (page_answer(b"diverged", head=9, epoch=3, status=409), Diverged),
        "a snapshot is needed": (page_answer(b"compacted", head=9, epoch=3, status=410), Compacted),
        "a refusal by no node": (web.Response(status=409, text="gone"), PeerAnswerInvalid),
        "a refusal by a leader whose time is over": (page_answer(b"", head=9, epoch=2, status=409), StaleEpoch),
        "a refusal by the leader of another history": (
            page_answer(b"", head=9, epoch=2, history="bb" * 16, status=409),
            Diverged,
        ),
        "a page of a leader whose time is over": (page_answer(PAGE, head=9, epoch=2), StaleEpoch),
        "no such route": (web.Response(status=404, text="<h1>404</h1>", content_type="text/html"), PeerUnreachable),
        "not now": (web.Response(status=503), PeerUnreachable),
        "an error with a page": (page_answer(PAGE, head=9, status=500), PeerUnreachable),
        "a redirect": (web.Response(status=307, headers={"Location": "http://127.0.0.1:1/"}), PeerUnreachable),
        "part of a page": (page_answer(PAGE, head=9, status=206), PeerUnreachable),
        "another site": (web.Response(text="<html>", content_type="text/html"), PeerAnswerInvalid),
        "a page without headers": (web.Response(body=page), PeerAnswerInvalid),
        "nothing, without headers": (web.Response(status=204), PeerAnswerInvalid),
        "an empty body": (page_answer(b"", head=9, epoch=3), PeerAnswerInvalid),
        "garbage": (page_answer(b"\xc1garbage", head=9, epoch=3), PeerAnswerInvalid),
        "JSON": (page_answer(b"[]", head=9, epoch=3), PeerAnswerInvalid),
        "a page cut short": (page_answer(page[:-1], head=9, epoch=3), PeerAnswerInvalid),
        "more than a page": (page_answer(page + b"\0", head=9, epoch=3), PeerAnswerInvalid),
        "a page of nothing": (page_answer(EMPTY_PAGE, head=9, epoch=3), PeerAnswerInvalid),
        "a page of another history": (page_answer(other_history, head=9, epoch=3), PeerAnswerInvalid),
    }
    for what, values in {
        "history": ("", "<html>", "AA" * 16, "aa" * 17),
        "epoch": ("", "x", "-1", "1.5", "9223372036854775808", "9" * 5000, "٣"),
        "head": ("", "x", "-1", "9223372036854775808", "1e3"),
    }.items():
        for number, value in enumerate(values):
            headers = {"head": POSITION.revision} | {what: value}
            named[f"{what} that is none, {number}"] = (page_answer(None, **headers), PeerAnswerInvalid)
    return named


@pytest.mark.parametrize("name", answers())
async def test_an_answer_that_is_none_is_refused(leader: FakeLeader, peer: Peer, name: str) -> None:
    answer, error = answers()[name]

    async def lie(_: web.BaseRequest) -> web.StreamResponse:
        return answer

    leader.answer = lie
    with pytest.raises(error):
        await pull(peer)
    leader.answer = nothing_new
    assert (await pull(peer)).page is None


async def test_what_the_leader_says_is_told(leader: FakeLeader, peer: Peer) -> None:
    async def refuse(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=503, text="come back\n" + "x" * 10_000)

    leader.answer = refuse
    with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1:\d+ answered 503: come back") as raised:
        await pull(peer)
    assert len(str(raised.value)) < 1000, "it goes into logs"


async def test_an_endless_answer_is_not_read_to_its_end(leader: FakeLeader, peer: Peer) -> None:
    sent_bytes = 0

    async def flood(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal sent_bytes
        response = web.StreamResponse(headers={"Mehdb-Epoch": "3"})
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 20))
            sent_bytes += 1 << 20

    leader.answer = flood
    with pytest.raises(PeerAnswerInvalid, match="no page"):
        await pull(peer)
    assert PAGE_BYTES_MAX <= sent_bytes < PAGE_BYTES_MAX + (16 << 20)


async def test_a_page_of_the_largest_size_is_taken(leader: FakeLeader, peer: Peer) -> None:
    large = Page(HISTORY, Epoch(3), Revision(2), Chain(b"d" * 16), (Change(Revision(3), b"k", bytes(64 << 20)),))

    async def page(_: web.BaseRequest) -> web.StreamResponse:
        return page_answer(large, head=3, epoch=3)

    leader.answer = page
    assert (await pull(peer)).page == large


async def test_half_a_page_is_none(leader: FakeLeader, peer: Peer) -> None:
    async def half(request: web.BaseRequest) -> web.StreamResponse:
        page = encode_page(PAGE)
        response = page_answer(page, head=9, epoch=3)
        response.content_length = len(page) + 1
        await response.prepare(request)
        await response.write_eof()
        assert request.transport is not None
        request.transport.close()
        return response

    leader.answer = half
    with pytest.raises(PeerUnreachable):
        await pull(peer)


async def test_a_connection_that_is_cut_is_no_answer(leader: FakeLeader, peer: Peer) -> None:
    async def cut(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    leader.answer = cut
    with pytest.raises(PeerUnreachable):
        await pull(peer)


@pytest.mark.parametrize("url", [f"http://{ADDRESS}:1", "http://no-such-name.invalid:9876"])
async def test_a_leader_that_is_not_there_is_named(url: str) -> None:
    async with Peer(url) as peer:
        with pytest.raises(PeerUnreachable) as raised:
            await pull(peer)
    assert url in str(raised.value)


async def test_a_server_that_speaks_no_http_is_no_leader() -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        await writer.drain()
        writer.close()

    async with (
        await asyncio.start_server(greet, ADDRESS, 0) as server,
        Peer(f"http://{ADDRESS}:{server.sockets[0].getsockname()[1]}") as peer,
    ):
        with pytest.raises(PeerUnreachable):
            await pull(peer)


async def test_a_leader_that_comes_back_is_found_again(leader: FakeLeader, peer: Peer) -> None:
    """On a new connection: the ones of before are broken."""
    for _ in range(3):
        await pull(peer)
        await leader.stop()
        with pytest.raises(PeerUnreachable):
            await pull(peer)
        await leader.start()
    await pull(peer)


async def test_no_proxy_comes_between_two_nodes(leader: FakeLeader, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://{ADDRESS}:{free_port()}")
    async with Peer(leader.url) as peer:
        await pull(peer)
    assert len(leader.asked) == 1


async def test_many_pulls_use_one_connection(peer: Peer, leader: FakeLeader) -> None:
    ports = set()

    async def note(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        return await nothing_new(request)

    leader.answer = note
    for _ in range(20):
        await pull(peer)
    assert len(ports) == 1


async def test_a_status_is_read(cluster: Cluster) -> None:
    node = cluster.add()
    await asyncio.to_thread(node.start)
    async with Peer(node.url) as peer:
        status = await peer.status()
    assert (status.node, status.role, status.ready) == ("mehdb-0", "leader", True)


@pytest.mark.parametrize("text", ["leader", "{}", '{"node": 1}', ""])
async def test_a_status_that_is_none_is_refused(leader: FakeLeader, peer: Peer, text: str) -> None:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text=text)

    leader.answer = answer
    with pytest.raises(PeerAnswerInvalid):
        await peer.status()
    await leader.stop()
    with pytest.raises(PeerUnreachable):
        await peer.status()
