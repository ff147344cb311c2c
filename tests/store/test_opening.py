"""A store is opened whatever is in the way for the moment, or it is said what is."""

from pathlib import Path

import pytest

from mehdb.errors import DiskFull
from mehdb.store import Store
from mehdb.store.room import BALLAST_NAME
from mehdb.store.schema import open_reader
from stores import child, leading, opened, problems_of, put
from volumes import FOREIGN, MIB, fill, tmpfs

KILLED = """
import asyncio, pathlib, sys
from mehdb.model import Epoch
from mehdb.store import Store, Write

async def live():
    store = await Store.open(pathlib.Path(sys.argv[1]))
    await store.lead(Epoch(1))
    await store.write(Write(b"key", b"value"))
    print("written", flush=True)
    sys.stdin.read()

asyncio.run(live())
"""


async def test_a_full_volume_has_room_for_the_index_of_the_wal(tmp_path: Path) -> None:
    """A clean stop takes that away: something else may have filled the volume before the next start."""
    with tmpfs(tmp_path / "volume", 32 * MIB) as volume:
        async with leading(volume) as store:
            await put(store, b"key", b"value")
        assert (volume / BALLAST_NAME).exists()
        fill(volume)
        async with opened(volume) as store:
            change = await store.get(b"key")
            assert change is not None
            assert change.value == b"value"
            assert await put(store, b"key", None) == 2
        (volume / BALLAST_NAME).unlink(missing_ok=True)
        fill(volume)
        with pytest.raises(DiskFull, match="make room or enlarge it"):
            await Store.open(volume)
        (volume / FOREIGN).unlink()
        assert problems_of(volume) == ()


async def test_a_store_is_opened_while_a_backup_reads_it(directory: Path) -> None:
    """What a killed process left in the WAL cannot be moved out of it meanwhile: that it is synced is enough."""
    with child(KILLED, directory) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "written\n"
    reader = open_reader(directory)
    try:
        reader.execute("BEGIN; SELECT * FROM meta").fetchall()
        async with opened(directory) as store:
            change = await store.get(b"key")
            assert change is not None
            assert await put(store, b"key", b"newer") == 2
            assert reader.execute("SELECT head FROM meta").get == 1
    finally:
        reader.close()
