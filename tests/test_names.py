"""Looking names up: answers that are none, resolvers that say nothing, and how many threads that may cost."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cluster import DEADLINE_S
from mehdb.names import NameAbsent, Names, NameUnknown

Found = list[tuple[Any, ...]]


def found(*addresses: str) -> Found:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]


class Resolver:
    """Stands in for `socket.getaddrinfo`: says nothing before it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked: list[str] = []
        self.under_way = 0
        self.outcome: Found | OSError = found("10.0.0.1")

    def __call__(self, name: str, _port: None, **_options: Any) -> Found:
        self.asked.append(name)
        self.under_way += 1
        assert self.go.wait(DEADLINE_S)
        self.under_way -= 1
        if isinstance(self.outcome, OSError):
            raise self.outcome
        return self.outcome


@contextmanager
def silent(lookups_max: int = 8) -> Iterator[tuple[Resolver, Names]]:
    resolver = Resolver()
    try:
        yield resolver, Names(resolver, lookups_max)
    finally:
        resolver.go.set()


async def test_an_address_is_no_name() -> None:
    with silent() as (resolver, names):
        for address in ("10.0.0.7", "fd00::7"):
            assert await names.addresses(address) == (address,)
        assert resolver.asked == []


async def test_a_name_has_each_of_its_addresses_once() -> None:
    with silent() as (resolver, names):
        resolver.outcome = found("10.0.0.2", "10.0.0.1", "10.0.0.2")
        resolver.go.set()
        assert await names.addresses("mehdb-peers") == ("10.0.0.2", "10.0.0.1")


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (socket.gaierror(socket.EAI_NONAME, "no such name"), NameAbsent),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), NameUnknown),
        (socket.gaierror(socket.EAI_FAIL, "failed"), NameUnknown),
        (OSError("too many open files"), NameUnknown),
    ],
)
async def test_that_there_is_no_such_name_differs_from_not_knowing(outcome: OSError, error: type[OSError]) -> None:
    with silent() as (resolver, names):
        resolver.outcome = outcome
        resolver.go.set()
        with pytest.raises(error) as raised:
            await names.addresses("mehdb-0")
    assert type(raised.value) is error
    assert "mehdb-0" in str(raised.value)


async def test_what_is_no_name_at_all_is_unknown() -> None:
    with pytest.raises(NameUnknown):
        await Names().addresses("a" * 64 + ".example")


async def test_nobody_waits_longer_than_told_and_all_share_one_lookup() -> None:
    with silent() as (resolver, names):
        for _ in range(3):
            waiting = [names.addresses("mehdb-0", timeout_s=0.05) for _ in range(20)]
            for outcome in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(outcome, NameUnknown)
        assert resolver.asked == ["mehdb-0"], "each asked for itself"
        late = asyncio.create_task(names.addresses("mehdb-0", timeout_s=DEADLINE_S))
        await asyncio.sleep(0)
        resolver.go.set()
        assert await late == ("10.0.0.1",), "the lookup that had been given up served nobody"
        assert resolver.asked == ["mehdb-0"]


async def test_an_answer_that_came_too_late_serves_who_asks_next_and_only_once() -> None:
    with silent() as (resolver, names):
        with pytest.raises(NameUnknown):
            await names.addresses("mehdb-0", timeout_s=0.01)
        resolver.go.set()
        async with asyncio.timeout(DEADLINE_S):
            while resolver.under_way:  # noqa: ASYNC110  a thread ends it
                await asyncio.sleep(0.01)
        assert await names.addresses("mehdb-0") == ("10.0.0.1",)
        assert resolver.asked == ["mehdb-0"]
        resolver.outcome = found("10.0.0.2")
        assert await names.addresses("mehdb-0") == ("10.0.0.2",), "an old answer"


async def test_lookups_that_are_waited_for_are_bounded() -> None:
    with silent(lookups_max=3) as (resolver, names):
        asked = [names.addresses(f"mehdb-{number}", timeout_s=0.05) for number in range(10)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(outcome, NameUnknown) for outcome in outcomes)
        assert resolver.under_way == 3
        resolver.go.set()
        async with asyncio.timeout(DEADLINE_S):
            while resolver.under_way:  # noqa: ASYNC110  threads end it
                await asyncio.sleep(0.01)
        assert await names.addresses("mehdb-9") == ("10.0.0.1",), "it did not recover"


def test_a_lookup_in_one_loop_serves_the_next() -> None:
    with silent() as (resolver, names):

        async def give_up() -> None:
            with pytest.raises(NameUnknown):
                await names.addresses("mehdb-0", timeout_s=0.01)

        asyncio.run(give_up())
        resolver.go.set()
        assert asyncio.run(names.addresses("mehdb-0")) == ("10.0.0.1",)
