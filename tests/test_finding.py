"""Finding the leader behind the Service that lists all pods, and what a leader makes of those that are listed."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from mehdb.credentials import ANONYMOUS
from mehdb.errors import PeerUnreachable
from mehdb.model import Epoch
from mehdb.names import NameAbsent
from mehdb.peers import Peer, Relay
from mehdb.recovery.known import KnownPeers
from mehdb.recovery.table import Peers
from mehdb.whereabouts import Whereabouts
from neighbours import LEADER, SERVICE, Listed, listed, position

QUICK_S = 2.0  # answers come at once, also beside one that never comes


async def leader(them: Listed, least_epoch: int = 0) -> str | None:
    return await them.neighbours.leader(LEADER, lambda one: one.epoch < least_epoch)


async def test_the_leader_is_who_says_so_under_its_name() -> None:
    async with listed(a2=position("mehdb-1"), a3=position(LEADER), a4=position("mehdb-2")) as them:
        assert await leader(them) == "127.0.0.3"
    other_set = position("other-0") | {"role": "leader"}
    told_to_follow = position(LEADER) | {"role": "follower"}
    async with listed(a2=position("mehdb-1"), a3=other_set, a4=told_to_follow) as them:
        assert await leader(them) is None


async def test_of_two_that_lead_the_later_one_is_taken_and_none_whose_time_is_over() -> None:
    async with listed(a2=position(LEADER, epoch=4), a3=position(LEADER, epoch=5)) as them:
        assert await leader(them) == "127.0.0.3"
        assert await leader(them, 5) == "127.0.0.3"
        assert await leader(them, 6) is None


async def test_who_is_silent_or_no_node_does_not_hide_the_leader() -> None:
    async with asyncio.timeout(QUICK_S), listed(a2=None, a3={"hello": "world"}, a4=position(LEADER)) as them:
        them.addresses.insert(0, "127.0.0.9")  # nobody listens there
        assert await leader(them) == "127.0.0.4"


async def test_nobody_listed_is_nobody_found() -> None:
    async with listed() as them:
        assert await leader(them) is None
        them.failure = socket.gaierror(socket.EAI_AGAIN, "try again")
        assert await leader(them) is None


async def ask(
    them: Listed, urls: tuple[str, ...] = (), guests: tuple[str, ...] = (), *, refusing_is_silent: bool = True
) -> Peers:
    """Return what a leader called mehdb-0 that has seen epoch 5 learns of its peers."""
    known = KnownPeers([them.url(address) for address in urls], ANONYMOUS, them.neighbours, LEADER)
    for address in guests:
        known.add_guest(them.url(address))
    try:
        return await known.ask(Epoch(5), refusing_is_silent=refusing_is_silent)
    finally:
        await known.close()


def at(them: Listed, *addresses: str) -> set[str]:
    return {them.url(address) for address in addresses}


async def test_a_leader_leaves_itself_out() -> None:
    async with listed(a2=position(LEADER, epoch=5), a3=position("mehdb-1")) as them:
        peers = await ask(them)
        assert set(peers.positions) == at(them, "127.0.0.3")
        assert not peers.silent


async def test_another_process_of_the_leader_is_not_taken_for_it() -> None:
    """It leads in a later epoch, so that this one must neither confirm that it leads nor begin anything."""
    async with listed(a2=position(LEADER, epoch=6), a3=position("mehdb-1")) as them:
        peers = await ask(them)
        assert set(peers.silent) == at(them, "127.0.0.2")
        assert "another process of mehdb-0" in next(iter(peers.silent.values()))


async def test_each_node_counts_once_by_whichever_way_it_was_asked() -> None:
    async with listed(a2=position("mehdb-1"), a3=position("mehdb-1"), a4=position("mehdb-2")) as them:
        peers = await ask(them, urls=("127.0.0.2",), guests=("127.0.0.4",))
        assert set(peers.positions) == at(them, "127.0.0.2", "127.0.0.4")
        assert them.asked.count("127.0.0.2") == 1, "it was asked at an address where it had been asked already"
        assert them.asked.count("127.0.0.4") == 1


async def test_whoever_holds_more_or_something_else_counts_whatever_its_name() -> None:
    other = position("mehdb-1", history="bb" * 16)
    async with listed(a2=position("mehdb-1"), a3=position("mehdb-1", 2), a4=other) as them:
        peers = await ask(them, urls=("127.0.0.2",))
        assert set(peers.positions) == at(them, "127.0.0.2", "127.0.0.3", "127.0.0.4")


@pytest.mark.parametrize("refusing_is_silent", [True, False])
async def test_who_is_listed_exists_whether_it_answers_or_not(refusing_is_silent: bool) -> None:
    async with listed(a2=None, a4=position("mehdb-2")) as them:
        them.addresses.append("127.0.0.9")  # nobody listens there
        peers = await ask(them, urls=("127.0.0.8",), refusing_is_silent=refusing_is_silent)
        expected = ("127.0.0.2", "127.0.0.9") if refusing_is_silent else ("127.0.0.2",)
        assert set(peers.silent) == at(them, *expected)
        assert set(peers.positions) == at(them, "127.0.0.4")


async def test_a_list_that_is_not_to_be_had_is_somebody_silent_and_one_that_does_not_exist_nobody() -> None:
    async with listed() as them:
        assert not (await ask(them)).silent
        them.failure = socket.gaierror(socket.EAI_AGAIN, "try again")
        assert set((await ask(them)).silent) == {SERVICE}


async def test_a_guest_that_is_listed_is_none_any_more() -> None:
    async with listed(a2=position("mehdb-1")) as them:
        known = KnownPeers([], ANONYMOUS, them.neighbours, LEADER)
        known.add_guest(them.url("127.0.0.2"))
        known.add_guest(them.url("127.0.0.9"))
        assert set((await known.ask(Epoch(5))).positions) == at(them, "127.0.0.2")
        assert known.guests == at(them, "127.0.0.9")
        await known.close()


def searching(*found: str | None) -> tuple[Callable[[], Awaitable[str | None]], list[str | None]]:
    """Return a search that finds these, one after the other, and those that it still has to find."""
    left = list(found)

    async def search() -> str | None:
        return left.pop(0)

    return search, left


async def test_an_address_counts_until_it_fails_and_then_the_name_comes_first() -> None:
    async with listed() as them:
        names = {"mehdb-0.mehdb": ["10.0.0.1"]}
        search, left = searching("10.0.0.2")
        where = Whereabouts("http://mehdb-0.mehdb:9876", search, names=them.names(lambda: names))
        assert await where.addresses() == ("10.0.0.1",)
        names["mehdb-0.mehdb"] = ["10.0.0.3"]
        assert await where.addresses() == ("10.0.0.1",)
        where.forget("10.0.0.7")
        assert await where.addresses() == ("10.0.0.1",), "what failed was another"
        where.forget("10.0.0.1")
        assert await where.addresses() == ("10.0.0.3",)
        assert left == ["10.0.0.2"], "it searched though the name told something new"


async def test_where_the_name_tells_only_what_has_failed_it_is_searched_for() -> None:
    async with listed() as them:
        names = {"mehdb-0.mehdb": ["10.0.0.1"]}
        search, _ = searching("10.0.0.2")
        where = Whereabouts("http://mehdb-0.mehdb:9876", search, names=them.names(lambda: names))
        await where.addresses()
        where.forget()
        assert await where.addresses() == ("10.0.0.2",)
        where.reached("10.0.0.2")
        where.forget()
        assert await where.addresses() == ("10.0.0.1",), "it was given up for good"


async def test_many_who_look_at_once_search_once_and_not_again_at_once() -> None:
    async with listed() as them:
        search, left = searching(None, "10.0.0.2")
        where = Whereabouts("http://mehdb-0.mehdb:9876", search, names=them.names())
        for _ in range(3):
            outcomes = await asyncio.gather(*(where.addresses() for _ in range(50)), return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {NameAbsent}
        assert left == ["10.0.0.2"]


async def test_who_gives_up_looking_leaves_the_others_to_it() -> None:
    async with listed() as them:
        found = asyncio.Event()

        async def search() -> str:
            await found.wait()
            return "10.0.0.2"

        where = Whereabouts("http://mehdb-0.mehdb:9876", search, names=them.names())
        first, second = (asyncio.create_task(where.addresses()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        found.set()
        assert await second == ("10.0.0.2",)


async def test_what_is_passed_on_to_who_does_not_lead_has_the_leader_looked_for() -> None:
    """The answer is the client's all the same; the next request goes elsewhere."""
    async with listed(a2=position("mehdb-1")) as them, Peer(them.url("127.0.0.2")) as peer:
        relayed = await peer.forward(Relay("GET", b"/get/k", [], b""), 1)
        assert b"".join([chunk async for chunk in relayed.chunks()])
        assert peer.whereabouts.known == ()


async def test_the_name_stays_in_what_is_asked_at_an_address() -> None:
    """In the Host header, in messages, and for a certificate."""
    async with listed(a2=position(LEADER)) as them:
        url = f"http://mehdb-0.mehdb:{them.port}"
        search, _ = searching("127.0.0.2", None)
        where = Whereabouts(url, search, names=them.names(lambda: {"mehdb-0.mehdb": ["127.0.0.9"]}))
        async with Peer(url, whereabouts=where) as peer:
            with pytest.raises(PeerUnreachable, match=url):
                await peer.status()
            assert where.certified_as == "mehdb-0.mehdb"
            with pytest.raises(Exception, match="status"):  # it answers with a position
                await peer.status()
            assert where.known == ("127.0.0.2",)
    by_address = Whereabouts("http://[fd00::1]", certified_as="mehdb-1.mehdb")
    assert (by_address.host, by_address.port, by_address.certified_as) == ("fd00::1", 80, "mehdb-1.mehdb")
