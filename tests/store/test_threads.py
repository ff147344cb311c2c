"""Long work in a thread ends soon after whoever waits for it has given up."""

import asyncio
import threading
from pathlib import Path

import pytest

from mehdb.store import OnProgress, in_thread, make_snapshot
from stores import leading, put, until


async def test_it_returns_what_the_work_returns_and_tells_of_its_steps() -> None:
    steps = []

    def work(step: OnProgress) -> str:
        step(1, 2)
        step(2, 2)
        return "done"

    assert await in_thread(work, lambda *step: steps.append(step)) == "done"
    assert steps == [(1, 2), (2, 2)]


async def test_what_the_work_raises_is_raised() -> None:
    def work(_: OnProgress) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await in_thread(work)


async def test_who_gives_up_waits_for_the_next_step_and_no_longer() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work(step: OnProgress) -> None:
        begun.set()
        try:
            while True:
                assert go_on.wait(30)
                step(0, 1)
        finally:
            ended.set()

    task = asyncio.create_task(in_thread(work))
    await until(begun.is_set)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert ended.is_set()


async def test_a_snapshot_that_nobody_waits_for_leaves_nothing(directory: Path, tmp_path: Path) -> None:
    async with leading(directory) as store:
        await put(store, b"large", bytes(32 << 20))
        begun, go_on = threading.Event(), threading.Event()

        def work(step: OnProgress) -> None:
            def slowly(done: int, total: int) -> None:
                begun.set()
                assert go_on.wait(30)
                step(done, total)

            make_snapshot(directory, tmp_path / "snapshot", None, slowly)

        task = asyncio.create_task(in_thread(work))
        await until(begun.is_set)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
    assert not (tmp_path / "snapshot").exists()
