"""What a disk may do to a row behind the store's back: it is noticed, and never served."""

import itertools
from pathlib import Path
from typing import Final

import pytest

from mehdb.errors import DamagedRow
from mehdb.model import Position
from mehdb.store import Write
from mehdb.store.reader import Reader
from stores import enqueue, leading, opened, outcomes, put, sql

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


def flip(directory: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of the row in the file, *offset* bytes from its key; its CRC follows the last of `ROW`."""
    path = directory / "store.db"
    data = bytearray(path.read_bytes())
    assert data.count(ROW) == 1
    data[data.index(ROW) + offset] ^= 1 << bit
    path.write_bytes(data)


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
            await store.page_after(Position())
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
        with pytest.raises(DamagedRow):
            reader.get(KEY, 1 << 20)
        reader.close()


async def test_a_damaged_row_can_be_written_anew(to_damage: Path) -> None:
    flip(to_damage, len(KEY))
    async with opened(to_damage) as store:
        await put(store, KEY, b"new")
        change = await store.get(KEY)
        assert change is not None
        assert change.value == b"new"
        with pytest.raises(DamagedRow):  # the log still holds the damage
            await store.page_after(Position())


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


async def test_a_torn_page_of_the_file_is_never_served(directory: Path) -> None:
    async with leading(directory) as store:
        await outcomes(await enqueue(store, [Write(b"key-%03d" % n, b"value" * 50) for n in range(200)]))
    [(number,)] = sql(directory, "SELECT max(pageno) FROM dbstat WHERE name = 'change'")
    with (directory / "store.db").open("r+b") as file:
        file.seek((number - 1) * 4096)
        file.write(b"\xa5" * 4096)
    async with opened(directory) as store:
        with pytest.raises(DamagedRow):
            await store.get(b"key-199")
        with pytest.raises(DamagedRow):
            await store.page_after(Position())
        change = await store.get(b"key-000")
        assert change is not None
        assert change.value == b"value" * 50
