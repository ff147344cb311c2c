"""Rounds that many share: none answers who came after it began, and one is enough for all who come meanwhile."""

import asyncio

import pytest

from cluster import DEADLINE_S
from mehdb.errors import Recovering
from mehdb.recovery.rounds import Rounds


class Work:
    """Gives the number of its round, when the test lets it end."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = asyncio.Semaphore(0)
        self.rounds = Rounds(self.do, "work")

    async def do(self) -> int:
        self.begun += 1
        number = self.begun
        await self.may_end.acquire()
        return number

    async def ask(self, count: int) -> "list[asyncio.Task[int]]":
        """Have *count* wait, each since now."""
        tasks = [asyncio.create_task(self.rounds.result()) for _ in range(count)]
        for _ in range(5):  # turns of the loop, until all that can begin has begun
            await asyncio.sleep(0)
        return tasks


async def results(tasks: "list[asyncio.Task[int]]") -> list[int]:
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.gather(*tasks)


async def test_who_comes_during_a_round_gets_the_next_and_all_of_them_the_same() -> None:
    work = Work()
    first = await work.ask(1)
    assert work.begun == 1
    later, last = await work.ask(10), await work.ask(10)
    assert work.begun == 1, "one at a time"
    work.may_end.release()
    assert await results(first) == [1]
    work.may_end.release()
    assert await results(later + last) == [2] * 20
    assert work.begun == 2
    work.may_end.release()
    assert await results(await work.ask(1)) == [3], "what is over is of no use to anybody"


async def test_who_gives_up_leaves_the_others_their_round() -> None:
    work = Work()
    impatient, patient = await work.ask(2)
    impatient.cancel()
    work.may_end.release()
    assert await results([patient]) == [1]


async def test_what_goes_wrong_is_told_to_all_and_the_next_round_begins_anew() -> None:
    failures = [ValueError("the first")]

    async def fail_once() -> str:
        if failures:
            raise failures.pop()
        return "fine"

    rounds = Rounds(fail_once, "work")
    told = await asyncio.gather(rounds.result(), rounds.result(), return_exceptions=True)
    assert [str(error) for error in told] == ["the first"] * 2
    assert await rounds.result() == "fine"


async def test_the_end_is_told_to_who_waits_and_who_comes_later() -> None:
    work = Work()
    waiting = await work.ask(1) + await work.ask(1)
    await work.rounds.close()
    for task in waiting:
        with pytest.raises(Recovering):
            await task
    with pytest.raises(Recovering):
        await work.rounds.result()
