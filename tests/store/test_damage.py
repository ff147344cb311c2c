"""What a disk may do to a row or a page behind the store's back: it is noticed, and never served.

The checksum of its page is what notices first. Where a test is about the CRC of the row, the page's is right again.
"""

import itertools
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from disk import DATABASE, WAL
from mehdb.errors import Damaged, DamagedRow, StoreFailed
from mehdb.model import Position
from mehdb.store import Store, Write, check_directory, require_sound, verify_snapshot
from mehdb.store.reader import Reader
from stores import checksum_of, child, enqueue, keys_of, leading, opened, outcomes, put, rewrite, sql

KEY: Final = b"the key"
VALUE: Final = b"the value"
TYPE: Final = "text/plain"
ROW: Final = KEY + VALUE + TYPE.encode()  # how SQLite lays the three columns out


@pytest.fixture
async def to_damage(directory: Path) -> Path:
    """A closed store with one row to damage, between two others."""
    async with leading(directory) as store:
        await put(store, b"before", b"1")
        await put(store, KEY, VALUE, TYPE)
        await put(store, b"after", b"3")
    return directory


def flip(directory: Path, offset: int, bit: int = 0, *, right_checksum: bool = True) -> None:
    """Flip one bit of the row in the file, *offset* bytes from its key; its CRC follows the last of `ROW`.

    The page's checksum is right again, or else it notices before the row's CRC can.
    """
    data = (directory / "store.db").read_bytes()
    assert data.count(ROW) == 1
    place = data.index(ROW) + offset
    rewrite(directory, place, bytes([data[place] ^ 1 << bit]), right_checksum=right_checksum)


async def read_log(store: Store) -> None:
    """Read page after page, as a follower does: the one before a damage ends there."""
    position = Position()
    while page := await store.page_after(position):
        position = page.end


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize(
    "offset",
    [
        pytest.param(0, id="key"),
        pytest.param(len(KEY) - 1, id="end of the key"),
        pytest.param(len(KEY), id="value"),
        pytest.param(len(KEY + VALUE) - 1, id="end of the value"),
        pytest.param(len(KEY + VALUE), id="content type"),
        pytest.param(len(ROW) - 1, id="end of the content type"),
        pytest.param(len(ROW), id="crc"),
    ],
)
async def test_a_flipped_bit_is_never_served(to_damage: Path, offset: int, bit: int) -> None:
    flip(to_damage, offset, bit)
    async with opened(to_damage) as store:
        with pytest.raises(DamagedRow, match="read another node"):
            await store.get(KEY)
        with pytest.raises(DamagedRow, match="revision 2 is damaged"):
            await read_log(store)
        problems = (await store.check()).problems
        assert [line for line in problems if line.startswith("revision 2: the CRC")]
        for key, value in [(b"before", b"1"), (b"after", b"3")]:  # the others are as good as ever
            change = await store.get(key)
            assert change is not None
            assert change.value == value


async def test_no_bit_of_a_row_can_flip_unseen(to_damage: Path) -> None:
    original = (to_damage / "store.db").read_bytes()
    for offset, bit in itertools.product(range(len(ROW)), range(8)):
        (to_damage / "store.db").write_bytes(original)
        flip(to_damage, offset, bit)
        reader = Reader(to_damage)
        no_utf8 = bit == 7 and offset >= len(KEY + VALUE)
        with pytest.raises(DamagedRow, match="cannot be read" if no_utf8 else "the change of revision 2"):
            reader.get(KEY, 1 << 20)
        reader.close()


@pytest.mark.parametrize("table", ["sqlite_schema", "change", "entry", "meta"])
@pytest.mark.parametrize("place", ["in the middle, which no row uses", "in the checksum"])
async def test_a_page_that_does_not_match_its_checksum_is_never_read_from(
    to_damage: Path, table: str, place: str
) -> None:
    [(number,)] = sql(to_damage, "SELECT pageno FROM dbstat WHERE name = ?", (table,))
    offset = 4096 * number - (1 if place == "in the checksum" else 2000)
    byte = (to_damage / "store.db").read_bytes()[offset]
    rewrite(to_damage, offset, bytes([byte ^ 4]), right_checksum=False)
    with suppress(StoreFailed):  # of the first page, nothing more can be said
        assert (check_directory(to_damage)).problems
        assert table != "sqlite_schema"
    if table == "entry":  # what opening has no need of
        async with opened(to_damage) as store:
            with pytest.raises(DamagedRow, match="'the key' cannot be read"):
                await store.get(KEY)
            with pytest.raises(DamagedRow, match="index"):
                await keys_of(store)
            with pytest.raises(DamagedRow, match="nothing was written"):
                await put(store, b"new", b"1")
            assert store.damage is not None
            assert not store.failure.done()
            page = await store.page_after(Position())
            assert page is not None
            assert page.end == store.position  # the log is as good as ever
    else:
        with pytest.raises(Damaged):
            await Store.open(to_damage)
        with pytest.raises(Damaged):
            require_sound(to_damage)


async def test_a_damaged_row_can_be_written_anew(to_damage: Path) -> None:
    flip(to_damage, len(KEY))
    async with opened(to_damage) as store:
        await put(store, KEY, b"new")
        change = await store.get(KEY)
        assert change is not None
        assert change.value == b"new"
        with pytest.raises(DamagedRow):  # the log still holds the damage
            await read_log(store)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET revision = 1 WHERE revision = 2",
        "UPDATE change SET value = NULL WHERE revision = 2",
        "UPDATE change SET expires_at = 7 WHERE revision = 2",
        "UPDATE change SET expires_at = -2 WHERE revision = 2",
        "UPDATE change SET revision = -2 WHERE revision = 2; UPDATE entry SET revision = -2 WHERE revision = 2",
        "UPDATE change SET content_type = NULL WHERE revision = 2",
    ],
)
async def test_a_row_that_says_anything_else_than_was_written_is_never_served(to_damage: Path, statement: str) -> None:
    sql(to_damage, statement)
    async with opened(to_damage) as store:
        with pytest.raises(DamagedRow):
            await store.get(KEY)


async def test_an_index_that_leads_to_a_deletion_is_damage(directory: Path) -> None:
    async with leading(directory) as store:
        await put(store, b"k", b"v")
        await put(store, b"k", None)
    sql(directory, "INSERT INTO entry VALUES (x'6B', 2)")
    async with opened(directory) as store:
        with pytest.raises(DamagedRow):
            await store.get(b"k")


async def test_an_index_that_leads_nowhere_is_damage(directory: Path) -> None:
    async with leading(directory) as store:
        await put(store, b"k", b"v")
        await put(store, b"l", b"v")
    sql(directory, "DELETE FROM change WHERE revision = 1")
    async with opened(directory) as store:
        with pytest.raises(DamagedRow, match="revision 1, of the key 'k'"):
            await store.get(b"k")
        assert await store.get(b"never") is None


async def test_a_torn_page_of_the_file_is_never_served(directory: Path) -> None:
    async with leading(directory) as store:
        await outcomes(await enqueue(store, [Write(b"key-%03d" % n, b"value" * 50) for n in range(200)]))
    [(number,)] = sql(directory, "SELECT pageno FROM dbstat WHERE name = 'change' AND path = '/007/'")
    rewrite(directory, (number - 1) * 4096, b"\xa5" * 4096, right_checksum=False)
    async with opened(directory) as store:
        with pytest.raises(DamagedRow):
            await store.get(b"key-100")
        with pytest.raises(DamagedRow):
            await read_log(store)
        change = await store.get(b"key-000")
        assert change is not None
        assert change.value == b"value" * 50


# The end of the file. What is missing of a page SQLite reads as zeros, and cksumvfs verifies whole pages only.


@pytest.fixture
async def ends_in_the_index(directory: Path) -> Path:
    """A closed store whose last page is one of the index of keys."""
    async with leading(directory) as store:
        for n in range(7):
            await put(store, b"%d" % n * 1000, b"value")
    pages = sql(directory, "SELECT name FROM dbstat ORDER BY pageno DESC LIMIT 1")
    assert pages == [("entry",)]
    return directory


@pytest.mark.parametrize("missing_bytes", [1, 8, 9, 100, 1500, 3000, 4000, 4095])
async def test_a_file_that_ends_within_a_page_is_refused(ends_in_the_index: Path, missing_bytes: int) -> None:
    path = ends_in_the_index / DATABASE
    os.truncate(path, path.stat().st_size - missing_bytes)
    before = path.read_bytes()
    for refuse in (require_sound, verify_snapshot):
        with pytest.raises(Damaged, match="ends within a page"):
            refuse(ends_in_the_index if refuse is require_sound else path)
    assert "the file ends within a page" in check_directory(ends_in_the_index).problems
    (ends_in_the_index / WAL).unlink()  # which a reader has made, and nothing is in it
    with pytest.raises(Damaged, match="ends within a page"):
        await Store.open(ends_in_the_index)
    assert path.read_bytes() == before


async def test_the_end_of_a_long_key_is_never_zeros(ends_in_the_index: Path) -> None:
    """A page of nothing but zeros matches its checksum."""
    path, key = ends_in_the_index / DATABASE, b"6" * 1000
    assert checksum_of(bytes(4096)) == bytes(8)
    rewrite(ends_in_the_index, path.stat().st_size - 4096, bytes(4096), right_checksum=True)
    async with opened(ends_in_the_index) as store:
        for refused in (
            store.get(key), put(store, key, b"new"), put(store, key, None), keys_of(store),
            keys_of(store, after=key[:900]),
        ):  # fmt: skip
            with pytest.raises(DamagedRow):
                await refused
        assert await store.get(b"0" * 1000) is not None
        assert await store.get(b"9" * 1000) is None
        assert await keys_of(store, limit=5) == [b"%d" % n * 1000 for n in range(5)]  # one more is read
        assert (await store.check()).problems
        assert await put(store, b"short", b"v") == 8


WRITE_AND_BE_KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from mehdb.store import Store, Write

async def main():
    store = await Store.open(Path(sys.argv[1]))
    await store.write(Write(b"late", b"value"))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.parametrize("missing_bytes", [1, 8, 9, 100, 1500, 3000, 4000, 4095])
async def test_what_is_missing_of_a_page_is_never_read_as_zeros(ends_in_the_index: Path, missing_bytes: int) -> None:
    """The power may go in a checkpoint, so with a WAL that is no damage yet: but then the WAL has that page."""
    with child(WRITE_AND_BE_KILLED, ends_in_the_index) as process:
        process.wait(30)
    path = ends_in_the_index / DATABASE
    os.truncate(path, path.stat().st_size - missing_bytes)
    expected = [b"%d" % n * 1000 for n in range(7)] + [b"late"]
    with suppress(Damaged):
        async with opened(ends_in_the_index) as store:
            assert store.head == 8
            with suppress(DamagedRow):
                assert await keys_of(store) == expected
            for key in expected:
                with suppress(DamagedRow):
                    change = await store.get(key)
                    assert change is not None
                    assert change.value == b"value"
