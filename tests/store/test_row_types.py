"""One flipped bit of a row's head makes text of bytes, or bytes of text: damage like any other, wherever it is met.

The page's checksum is right, as it is where the bit flips in memory before the page is written.
"""

from pathlib import Path

import pytest

from mehdb.errors import Damaged, DamagedRow
from mehdb.model import Position, Revision
from mehdb.store import Store, check_directory, make_snapshot, verify_snapshot
from stores import leading, opened, problems_of, put, sql

CHANGES = 9
RETYPED = {
    "key": "CAST(key AS TEXT)",
    "value": "CAST(value AS TEXT)",
    "content_type": "CAST('text/plain' AS BLOB)",
    "expires_at": "'soon'",
    "crc": "CAST('x' AS BLOB)",
    "chain": "CAST('0123456789abcdef' AS TEXT)",
}
SEALED = [column for column in RETYPED if column != "chain"]  # by the row's own CRC


async def damaged(directory: Path, column: str, revision: int) -> Path:
    """Return a store in which *column* of one change is of another type."""
    async with leading(directory) as store:
        for number in range(CHANGES):
            await put(store, b"key-%d" % number, b"value-%d" % number)
    strict = sql(directory, "SELECT sql FROM sqlite_schema WHERE name = 'change'")[0]
    rewritten = "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = {} WHERE name = 'change'"
    sql(directory, rewritten.format("replace(sql, 'STRICT', '')"))
    sql(directory, f"UPDATE change SET {column} = {RETYPED[column]} WHERE revision = ?", (revision,))  # noqa: S608
    sql(directory, rewritten.format("?"), strict)
    return directory


@pytest.mark.parametrize("column", SEALED)
async def test_such_a_row_is_never_served(directory: Path, column: str) -> None:
    async with opened(await damaged(directory, column, 5)) as store:
        with pytest.raises(DamagedRow):
            await store.get(b"key-4")
        assert store.damage is not None
        for number in (3, 5):
            change = await store.get(b"key-%d" % number)
            assert change is not None
            assert change.value == b"value-%d" % number


@pytest.mark.parametrize("column", SEALED)
async def test_a_page_ends_before_such_a_row(directory: Path, column: str) -> None:
    async with opened(await damaged(directory, column, 5)) as store:
        page = await store.page_after(Position())
        assert page is not None
        assert page.end.revision == 4
        with pytest.raises(DamagedRow):
            await store.page_after(page.end)
        assert store.damage is not None


@pytest.mark.parametrize("column", RETYPED)
async def test_a_check_and_a_snapshot_find_it(directory: Path, tmp_path: Path, column: str) -> None:
    await damaged(directory, column, 5)
    report = check_directory(directory)
    assert any("revision 5: " in problem or "revision 6: " in problem for problem in report.problems)
    assert report.position.revision == CHANGES
    make_snapshot(directory, tmp_path / "snapshot", None)
    with pytest.raises(Damaged):
        verify_snapshot(tmp_path / "snapshot")


@pytest.mark.parametrize("column", RETYPED)
async def test_a_store_whose_newest_row_is_such_is_damaged(directory: Path, column: str) -> None:
    await damaged(directory, column, CHANGES)
    with pytest.raises(Damaged):
        await Store.open(directory)


async def test_the_rows_are_right_but_for_that(directory: Path) -> None:
    """Or the tests above would find something else."""
    await damaged(directory, "expires_at", 5)
    assert problems_of(directory) != ()
    sql(directory, "UPDATE change SET expires_at = NULL WHERE revision = ?", (Revision(5),))
    assert problems_of(directory) == ()
