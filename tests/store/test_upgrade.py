"""Stores of another version: the first release's is upgraded when it is opened, a newer one is refused, not touched.

`fixtures/make_first.py` says how the stores were made by the code of that time.
"""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pytest

from cluster import clean_environment, free_port
from commands import mehdb
from disk import DATABASE, WAL
from mehdb import __version__
from mehdb.errors import Compacted, UnknownSchema
from mehdb.model import Change, Position, Revision
from mehdb.store import Store, Write, install, make_snapshot, verify_snapshot
from mehdb.store.schema import EXPIRY_INDEX, SCHEMA_VERSION
from power import Image, Recorder, Replay
from stores import child, leading, opened, problems_of, sql

FIRST: Final = Path(__file__).parent / "fixtures" / "first"
MARK: Final = "acknowledged"
SEEDS: Final = 12


def first(name: str, to: Path) -> dict[str, Any]:
    """Put the store *name* of the first schema at *to*. Return what the code of that time said that it holds."""
    shutil.copytree(FIRST / name, to)
    told: dict[str, Any] = json.loads((FIRST / f"{name}.json").read_text())
    return told


def index_of(directory: Path) -> list[tuple[Any, ...]]:
    return sql(directory, "SELECT sql FROM sqlite_schema WHERE name = 'change_expiry'")


async def holds(store: Store, told: dict[str, Any]) -> None:
    """Expect *store* to hold exactly what it held when it was made."""
    meta = asdict(store.meta) | {"chain": store.meta.chain.hex()}
    assert meta == {name: told[name] for name in meta}
    live = {key: await store.get(bytes.fromhex(key)) for key in told["live"]}
    assert live == {
        key: Change(revision, bytes.fromhex(key), bytes.fromhex(value), content_type, None)
        for key, (revision, value, content_type) in told["live"].items()
    }
    assert store.meta.keys == len(live), "there are others"
    assert (await store.check()).problems == ()


async def history_is_whole(store: Store, told: dict[str, Any]) -> None:
    """Expect that a follower which was behind the floor can go on from there, and none from before it."""
    start = told["floor"] + 1
    position = Position(store.meta.history, Revision(start), await chain_at(store, start))
    revisions: list[int] = []
    while (page := await store.page_after(position)) is not None:
        revisions += [change.revision for change in page.changes]
        position = page.end
    assert revisions == list(range(start + 1, told["head"] + 1))
    assert position == store.position
    with pytest.raises(Compacted):
        await store.page_after(Position(store.meta.history, Revision(1), b"c" * 16))  # type: ignore[arg-type]


async def chain_at(store: Store, revision: int) -> Any:
    return await store.scan(lambda reader: reader.chain(Revision(revision)))


@pytest.mark.parametrize("name", ["closed", "killed"])
async def test_a_store_of_the_first_schema_keeps_everything_and_goes_on(directory: Path, name: str) -> None:
    told = first(name, directory)
    async with opened(directory) as store:
        await holds(store, told)
        await history_is_whole(store, told)
    assert index_of(directory) == [(EXPIRY_INDEX.replace(" IF NOT EXISTS", ""),)]
    async with leading(directory) as store:
        assert store.meta.epoch == told["epoch"] + 1
        assert await store.write(Write(b"new", b"1", "text/plain", ttl_ms=1)) == told["head"] + 1
        assert (await store.check()).problems == ()
    assert problems_of(directory) == ()


@pytest.mark.parametrize("name", ["closed", "killed"])
async def test_commands_read_a_store_that_was_not_upgraded_yet(directory: Path, tmp_path: Path, name: str) -> None:
    told = first(name, directory)
    assert mehdb("check", data_dir=directory).code == 0
    assert mehdb("backup", tmp_path / "backup.db", data_dir=directory).code == 0
    assert mehdb("check", tmp_path / "backup.db").code == 0
    assert index_of(directory) == [], "they changed it"
    assert mehdb("restore", tmp_path / "backup.db", data_dir=tmp_path / "restored").code == 0
    async with opened(tmp_path / "restored") as store:
        assert (store.head, store.meta.keys) == (told["head"], told["keys"])


async def test_a_snapshot_of_the_first_schema_is_upgraded_once_it_is_in_place(directory: Path, tmp_path: Path) -> None:
    """An older leader's, say, in a rolling update: followers are newer than it until the end."""
    told = first("closed", tmp_path / "old")
    snapshot = make_snapshot(tmp_path / "old", tmp_path / "incoming", None)
    async with leading(directory) as store:
        await store.write(Write(b"other", b"1"))
    install(directory, snapshot.path, verify_snapshot(snapshot.path), None)
    async with opened(directory) as store:
        await holds(store, told)
    assert index_of(directory)


@pytest.mark.parametrize("name", ["closed", "killed"])
async def test_an_upgrade_that_the_power_ends_leaves_the_old_store_or_the_new_one(in_memory: Path, name: str) -> None:
    told = first(name, in_memory / "store")
    before = Image({path.name: path.read_bytes() for path in (in_memory / "store").iterdir()}, 0, "before")
    with Recorder(in_memory / "store") as recorder:
        async with opened(in_memory / "store"):
            pass
    upgraded = count = 0
    for seed in range(SEEDS):
        for image in Replay(seed, before).images(recorder.events):
            if image.files.get(MARK) == b"":  # as it is, after a power loss, where there is no journal: `test_mark`
                image = image._replace(files={**image.files, MARK: before.files[MARK]})
            directory = in_memory / f"image-{count}"
            image.write(directory)
            had_index = bool(index_of(copied(directory, in_memory / f"look-{count}")))
            async with opened(directory) as store:
                await holds(store, told)
            assert index_of(directory), image.label
            upgraded += had_index
            count += 1
            shutil.rmtree(directory)
    assert 0 < upgraded < count, "the images are all from before, or all from after"


def copied(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to)
    return to


async def test_an_upgrade_that_is_killed_is_done_by_the_next_start(directory: Path) -> None:
    told = first("killed", directory)
    code = """
import os, signal, sys
from pathlib import Path
import apsw
from mehdb.store import schema

def trace(cursor, statement, bindings):
    if statement.startswith("CREATE INDEX"):
        cursor.connection.set_commit_hook(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return True

apsw.connection_hooks.append(lambda connection: connection.set_exec_trace(trace))
schema.open_writer(Path(sys.argv[1]))
"""
    with child(code, directory) as upgrade:
        assert upgrade.wait(30) == -signal.SIGKILL
    async with opened(directory) as store:
        await holds(store, told)
    assert index_of(directory)


# A newer one.


def newer(directory: Path) -> None:
    """Make a store that a mehdb of the next schema has closed."""
    first("closed", directory)
    sql(directory, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    sql(directory, "UPDATE meta SET schema = ?", (SCHEMA_VERSION + 1,))


def newer_with_a_wal(directory: Path) -> None:
    """Make one whose process was killed, so that its file still says the old schema, and only its WAL the new one."""
    first("closed", directory)
    code = """
import os, signal, sys, apsw
from mehdb.store.schema import use_page_checksums
use_page_checksums()
connection = apsw.Connection(sys.argv[1])
connection.execute(f"PRAGMA user_version = {sys.argv[2]}; UPDATE meta SET schema = {sys.argv[2]}").fetchall()
os.kill(os.getpid(), signal.SIGKILL)
"""
    with child(code, directory / DATABASE, SCHEMA_VERSION + 1) as other:
        other.wait(30)
    assert (directory / WAL).stat().st_size > 0


def newer_in_the_midst_of_a_checkpoint(directory: Path) -> None:
    """Make one that the power has left with a part of a page at its end, which its WAL still has."""
    newer(directory)
    with (directory / DATABASE).open("ab") as file:
        file.write(b"part")
    (directory / WAL).write_bytes(b"frames")


NEWER: Final = [newer, newer_with_a_wal, newer_in_the_midst_of_a_checkpoint]
SAYS: Final = (
    f"has schema {SCHEMA_VERSION + 1}, this mehdb ({__version__}) knows {SCHEMA_VERSION}: "
    "run the one that wrote it, or a newer one"
)


def files_of(directory: Path) -> dict[str, bytes]:
    """Return each file and what it holds, but whose the directory was, and what processes share in memory."""
    return {
        path.name: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("lock", "operation", "store.db-shm")
    }


@pytest.mark.parametrize("make", NEWER)
def test_a_node_refuses_a_newer_store_and_leaves_every_byte_of_it(
    directory: Path, make: Callable[[Path], None]
) -> None:
    make(directory)
    before = files_of(directory)
    with pytest.raises(UnknownSchema) as raised:
        asyncio.run(Store.open(directory))
    assert SAYS in str(raised.value)
    node = subprocess.run(
        [sys.executable, "-m", "mehdb", "serve", "--host", "mehdb-0", "--listen", "127.0.0.1", "--port",
         str(free_port()), "--data-dir", directory],
        env=clean_environment(), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (node.returncode, node.stderr.count("\n")) == (1, 1), node.stderr
    assert SAYS in node.stderr
    assert files_of(directory) == before


@pytest.mark.parametrize("make", NEWER)
@pytest.mark.parametrize(
    "command", [("check",), ("backup", "-"), ("accept-loss", "--yes"), ("accept-loss", "--start-empty", "--yes")]
)
def test_commands_refuse_a_newer_store_as_well(
    directory: Path, make: Callable[[Path], None], command: tuple[str, ...]
) -> None:
    make(directory)
    before = files_of(directory)
    assert SAYS in mehdb(*command, data_dir=directory).failed_in_one_line
    assert files_of(directory) == before


def test_a_newer_backup_is_neither_checked_nor_restored(directory: Path, tmp_path: Path) -> None:
    newer(tmp_path / "newer")
    backup = tmp_path / "newer" / DATABASE
    first("closed", directory)
    before, held = files_of(directory), backup.read_bytes()
    assert SAYS in mehdb("check", backup).failed_in_one_line
    for replace in ((), ("--replace", "--yes")):
        refused = mehdb("restore", backup, *replace, data_dir=directory)
        assert refused.code == 1
        assert replace == () or SAYS in refused.said
    assert files_of(directory) | {WAL: b""} == before | {WAL: b""}, "an empty WAL holds nothing"
    assert backup.read_bytes() == held


def test_a_newer_store_makes_way_for_a_backup_when_an_operator_says_so_and_is_kept(
    directory: Path, tmp_path: Path
) -> None:
    newer(directory)
    before = (directory / DATABASE).read_bytes()
    first("closed", tmp_path / "old")
    assert mehdb("restore", tmp_path / "old" / DATABASE, "--replace", "--yes", data_dir=directory).code == 0
    (kept,) = directory.glob("replaced-*")
    assert (kept / DATABASE).read_bytes() == before
