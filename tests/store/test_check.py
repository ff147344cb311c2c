"""Each invariant of the schema, broken on purpose behind the store's back: `check` must say so."""

import asyncio
import shutil
from pathlib import Path
from typing import Final

import pytest

from mehdb.store import Store, Write
from mehdb.store.check import PROBLEMS_MAX
from stores import catch_up, enqueue, leading, next_page, opened, problems_of, put, rewrite, sql

# What the store of these tests holds. Live: b and c; superseded: 1 and 2; deleted: a.
WRITES: Final = [
    Write(b"a", b"1", "text/plain"),
    Write(b"b", b"2"),
    Write(b"a", b"3"),
    Write(b"b", b"4", "text/plain"),
    Write(b"a", None),
    Write(b"c", b""),
]
HEAD: Final = len(WRITES)


async def fill(directory: Path) -> None:
    """Write `WRITES` into a new store."""
    async with leading(directory) as store:
        for write in WRITES:
            await store.write(write)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a closed store that holds `WRITES`, made once: copies of it are what the tests break."""
    directory = tmp_path_factory.mktemp("check") / "template"
    asyncio.run(fill(directory))
    return directory


@pytest.fixture
def closed(template: Path, directory: Path) -> Path:
    """The directory of a closed store of this test's own."""
    return shutil.copytree(template, directory)


BREAKAGES: Final = {  # a: x'61', b: x'62' …
    # CRC: of every column, of live rows and superseded ones
    "value": ("UPDATE change SET value = x'35' WHERE revision = 4", "revision 4: the CRC"),
    "superseded value": ("UPDATE change SET value = x'FF' WHERE revision = 1", "revision 1: the CRC"),
    "empty value": ("UPDATE change SET value = x'00' WHERE revision = 6", "revision 6: the CRC"),
    "deletion with a value": ("UPDATE change SET value = x'' WHERE revision = 5", "revision 5: the CRC"),
    "value gone": ("UPDATE change SET value = NULL WHERE revision = 6", "revision 6: the CRC"),
    "key": ("UPDATE change SET key = x'7A' WHERE revision = 2", "revision 2: the CRC"),
    "content type": ("UPDATE change SET content_type = 'text/html' WHERE revision = 4", "revision 4: the CRC"),
    "content type that is no text": (
        "UPDATE change SET content_type = CAST(x'FF' AS TEXT) WHERE revision = 4",
        "revision 4: the CRC",
    ),
    "content type gone": ("UPDATE change SET content_type = NULL WHERE revision = 4", "revision 4: the CRC"),
    "expiry": ("UPDATE change SET expires_at = 0 WHERE revision = 4", "revision 4: the CRC"),
    "negative expiry": ("UPDATE change SET expires_at = -2 WHERE revision = 4", "revision 4: the CRC"),
    "crc": ("UPDATE change SET crc = crc + 1 WHERE revision = 3", "revision 3: the CRC"),
    "negative revision": ("UPDATE change SET revision = -6 WHERE revision = 6", "revision -6: the CRC"),
    "revision": ("UPDATE change SET revision = 7 WHERE revision = 6", "revision 7: the CRC"),
    # Chain
    "chain": ("UPDATE change SET chain = zeroblob(16) WHERE revision = 3", "revision 3: the chain"),
    "chain of the first": ("UPDATE change SET chain = zeroblob(16) WHERE revision = 1", "revision 1: the chain"),
    "chain before": ("UPDATE change SET chain = zeroblob(16) WHERE revision = 3", "revision 4: the chain"),
    "chain of the last": ("UPDATE change SET chain = zeroblob(16) WHERE revision = 6", "revision 6: the chain"),
    "chain cut": ("UPDATE change SET chain = substr(chain, 1, 15) WHERE revision = 3", "revision 3: the chain"),
    # Gaps
    "gap": ("DELETE FROM change WHERE revision = 3", "revision 4: those from 3 on are missing"),
    "gap at the start": ("DELETE FROM change WHERE revision = 1", "revision 2: those from 1 on are missing"),
    "gap above the floor": (
        "DELETE FROM change WHERE revision = 3; UPDATE meta SET floor = 2",
        "revision 4: those from 3 on are missing, above the floor 2",
    ),
    "log gone": ("DELETE FROM change", "the log ends at revision 0, the head is 6"),
    # Index against log
    "entry without a change": (
        "INSERT INTO entry VALUES (x'64', 99); UPDATE meta SET keys = 3",
        "revision 99: an entry",
    ),
    "entry of another key": ("UPDATE entry SET revision = 4 WHERE key = x'63'", "revision 4: an entry points to no"),
    "entry of a deletion": ("INSERT INTO entry VALUES (x'61', 5); UPDATE meta SET keys = 3", "revision 5: an entry"),
    "entry with another key": ("UPDATE entry SET key = x'64' WHERE key = x'63'", "revision 6: an entry points to no"),
    "stale entry": (
        "UPDATE entry SET revision = 2 WHERE key = x'62'",
        "revision 4: an entry points to a change that a",
    ),
    "entry from before a deletion": (
        "INSERT INTO entry VALUES (x'61', 3); UPDATE meta SET keys = 3",
        "revision 5: an entry points to a change that a newer",
    ),
    "missing entry": (
        "DELETE FROM entry WHERE key = x'63'; UPDATE meta SET keys = 1",
        "revision 6: a key whose newest",
    ),
    # Meta
    "number of keys": ("UPDATE meta SET keys = 3", "meta counts 3 keys, entry has 2"),
    "head behind": ("UPDATE meta SET head = 5", "the log ends at revision 6, the head is 5"),
    "head ahead": ("UPDATE meta SET head = 7", "the log ends at revision 6, the head is 7"),
    "chain of meta": ("UPDATE meta SET chain = zeroblob(16)", "the log ends at revision 6"),
    "floor below": ("UPDATE meta SET floor = -1", "the floor -1 is not between 0 and the head 6"),
    "floor above": ("UPDATE meta SET floor = 7", "the floor 7 is not between 0 and the head 6"),
    "history": ("UPDATE meta SET history = NULL", "there are changes up to revision 6, but no history"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_each_broken_invariant_is_reported(closed: Path, breakage: str) -> None:
    statements, problem = BREAKAGES[breakage]
    assert problems_of(closed) == ()
    sql(closed, statements)
    assert [line for line in problems_of(closed) if line.startswith(problem)]


def test_a_broken_file_is_reported(closed: Path) -> None:
    """What SQLite itself can tell: here, that its list of free pages does not have the length that the header says."""
    rewrite(closed, 36, (77).to_bytes(4, "big"), right_checksum=True)
    assert [line for line in problems_of(closed) if line.startswith("SQLite: ")]


@pytest.mark.parametrize("table", ["change", "entry"])
async def test_a_torn_page_of_the_file_is_reported(closed: Path, table: str) -> None:
    async with opened(closed) as store:
        await asyncio.gather(*[put(store, b"key-%d" % n, b"value" * 50) for n in range(300)])
    [(number,)] = sql(closed, "SELECT max(pageno) FROM dbstat WHERE name = ?", (table,))
    rewrite(closed, (number - 1) * 4096, b"\xa5" * 4096, right_checksum=False)
    assert problems_of(closed)
    rewrite(closed, (number - 1) * 4096, b"\xa5" * 4096, right_checksum=True)
    assert problems_of(closed)


async def test_a_healthy_store_has_no_problems(closed: Path) -> None:
    async with opened(closed) as store:
        report = await store.check()
    assert (report.changes, report.keys, report.problems) == (HEAD, 2, ())


async def test_an_empty_store_has_no_problems(directory: Path) -> None:
    async with opened(directory) as store:
        assert await store.check() == await store.check()
        assert (await store.check()).problems == ()


@pytest.mark.parametrize("floor", [1, 3, 4, 5])
def test_superseded_changes_may_be_gone_up_to_the_floor(closed: Path, floor: int) -> None:
    sql(closed, "DELETE FROM change WHERE revision <= min(3, ?)", (floor,))
    sql(closed, "UPDATE meta SET floor = ?, changes = (SELECT count(*) FROM change)", (floor,))
    assert problems_of(closed) == ()


async def test_the_report_of_a_wholly_damaged_store_is_bounded(directory: Path) -> None:
    async with leading(directory) as store:
        await asyncio.gather(*[put(store, b"key-%d" % n, b"value") for n in range(PROBLEMS_MAX + 50)])
    sql(directory, "UPDATE change SET crc = 0 WHERE revision < (SELECT head FROM meta)")
    async with opened(directory) as store:
        report = await store.check()
    assert len(report.problems) == PROBLEMS_MAX
    assert report.changes == PROBLEMS_MAX + 50


def test_a_check_changes_nothing(closed: Path) -> None:
    sql(closed, "UPDATE change SET crc = 0")
    before = (closed / "store.db").read_bytes()
    assert problems_of(closed)
    assert (closed / "store.db").read_bytes() == before


async def test_a_store_that_is_being_written_has_no_problems(leader: Store, follower: Store) -> None:
    """A check sees one moment, however many commits pass while it runs."""
    for n in range(20):
        tasks = await enqueue(leader, [Write(b"key-%d" % (i % 7), b"%d" % n if i % 3 else None) for i in range(40)])
        assert (await leader.check()).problems == ()
        await asyncio.gather(*tasks, return_exceptions=True)
        await follower.apply(await next_page(leader, follower))
    assert await catch_up(follower, leader) == 0
    assert (await follower.check()).problems == ()
