"""A store put in another's place: every crash leaves the one or the other, and whoever is there waits or is told."""

import asyncio
import itertools
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from disk import DATABASE, WAL
from mehdb.errors import Damaged, MehdbError
from mehdb.model import Epoch, Position, Revision
from mehdb.store import (
    Meta,
    Store,
    abandon,
    check_directory,
    install,
    keep_copy,
    make_snapshot,
    read_mark,
    require_sound,
    verify_snapshot,
)
from stores import child, fill, keys_of, leading, opened, put, rewrite, sql, tables_of, until

OLD_CHANGES: Final = 40
NEW_CHANGES: Final = 60


@pytest.fixture
async def old(directory: Path) -> Path:
    """A closed store."""
    async with leading(directory) as store:
        await fill(store, OLD_CHANGES, b"old")
    return directory


@pytest.fixture
async def incoming(tmp_path: Path) -> tuple[Path, Meta]:
    """A snapshot of another store, and its state."""
    async with leading(tmp_path / "other") as store:
        await fill(store, NEW_CHANGES, b"new")
    snapshot = make_snapshot(tmp_path / "other", tmp_path / "incoming", None)
    return snapshot.path, verify_snapshot(snapshot.path)


# Installing.


async def test_an_installed_store_takes_the_place_of_the_old_one(old: Path, incoming: tuple[Path, Meta]) -> None:
    path, meta = incoming
    assert install(old, path, meta, None) is None
    assert not path.exists()
    assert read_mark(old) == meta.position
    async with opened(old) as store:
        assert store.meta == meta
        assert (await store.check()).problems == ()
        assert await put(store, b"k", b"v") == NEW_CHANGES + 1


async def test_a_store_is_installed_where_none_was(volume: Path, incoming: tuple[Path, Meta]) -> None:
    path, meta = incoming
    assert install(volume, path, meta, "replaced") is None
    assert require_sound(volume) == meta


async def test_a_kept_copy_is_a_whole_store(old: Path, incoming: tuple[Path, Meta]) -> None:
    path, meta = incoming
    before = tables_of(old)
    kept = install(old, path, meta, "rejoined")
    assert kept is not None
    assert kept.parent == old
    assert kept.name.startswith("rejoined-")
    assert (kept / DATABASE).stat().st_nlink == 1
    assert check_directory(kept).problems == ()
    assert require_sound(kept).head == OLD_CHANGES
    assert tables_of(kept) == before
    mark = read_mark(kept)
    assert mark is not None
    assert mark.revision == OLD_CHANGES
    async with opened(kept) as store:
        await put(store, b"k", b"v")
    assert require_sound(old) == meta
    async with opened(old) as store:
        assert store.meta == meta
    assert kept.exists()


async def test_only_a_later_state_of_it_continues_what_was_open(tmp_path: Path, incoming: tuple[Path, Meta]) -> None:
    """Those who watch go on over the first, and over nothing else: not over a fork within the same history."""
    follower, leader, fork = (tmp_path / name for name in ("follower", "leader", "fork"))
    async with leading(leader) as store:
        await fill(store, 5, b"shared")
        first = await store.snapshot()
        copied = first.path.rename(tmp_path / "first")
    fork.mkdir()
    shutil.copy(copied, fork / DATABASE)
    async with opened(leader) as later, opened(fork) as forked:
        await put(later, b"k", b"later")
        await put(forked, b"k", b"forked")
    async with opened(follower) as store:
        lineages = [store.lineage]
        for source in (copied, leader, leader, fork, incoming[0]):
            path = source
            if source in (leader, fork):
                path = make_snapshot(source, tmp_path / "next", None).path
            await store.replace(path, verify_snapshot(path), None)
            lineages.append(store.lineage)
        async with store.suspended():
            pass
        lineages.append(store.lineage)
    changed = [after != before for before, after in pairwise(lineages)]
    assert changed == [True, False, False, True, True, False]


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from mehdb.store import Store, Write

async def main():
    store = await Store.open(Path(sys.argv[1]))
    for n in range(10):
        await store.write(Write(b"late-%d" % n, b"value"))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_store_that_was_not_closed_is_kept_with_its_wal_though_nobody_asked(
    old: Path, incoming: tuple[Path, Meta]
) -> None:
    with child(KILLED, old) as process:
        process.wait(30)
    assert (old / WAL).stat().st_size > 0
    path, meta = incoming
    kept = install(old, path, meta, None)
    assert kept is not None
    assert check_directory(kept).problems == ()
    assert require_sound(kept).head == OLD_CHANGES + 10
    assert require_sound(old) == meta


async def test_a_damaged_store_is_kept_as_it_is(old: Path, incoming: tuple[Path, Meta]) -> None:
    rewrite(old, 100, b"\xa5" * 100, right_checksum=False)
    damaged = (old / DATABASE).read_bytes()
    path, meta = incoming
    kept = install(old, path, meta, "damaged")
    assert kept is not None
    assert (kept / DATABASE).read_bytes() == damaged
    assert require_sound(old) == meta


async def test_a_mark_is_durable_before_the_wal_goes_that_it_tells_of(
    old: Path, incoming: tuple[Path, Meta], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After power loss the old database alone would look sound, at an earlier revision."""
    with child(KILLED, old) as process:
        process.wait(30)
    synced: list[Path] = []
    sync = os.fsync

    def noted(fd: int) -> None:
        if (old / WAL).exists():
            synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        sync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    path, meta = incoming
    install(old, path, meta, None)
    assert old / "acknowledged" in synced


async def test_a_copy_of_what_was_not_replaced_then_goes_at_the_next_start(old: Path) -> None:
    """Its file is the store's own, which goes on being written: it would be no state of anything."""
    async with opened(old) as store:
        kept = keep_copy(old, "replaced")
        assert kept is not None
        async with store.suspended():
            pass
        await put(store, b"k", b"v")
    async with opened(old) as store:
        assert store.head == OLD_CHANGES + 1
        assert not kept.exists()


async def test_a_wal_that_only_the_copy_has_goes_back(old: Path) -> None:
    with child(KILLED, old) as process:
        process.wait(30)
    kept = keep_copy(old, "replaced")
    assert kept is not None
    (old / WAL).unlink()
    async with opened(old) as store:
        assert store.head == OLD_CHANGES + 10
        assert (await store.check()).problems == ()
        assert not kept.exists()


async def test_a_wal_of_an_earlier_state_never_goes_back(old: Path) -> None:
    with child(KILLED, old) as process:
        process.wait(30)
    kept = keep_copy(old, "replaced")
    assert kept is not None
    shutil.copy(kept / WAL, kept / "copy")
    (kept / "copy").replace(kept / WAL)  # its own, as if the other had been removed and made anew
    os.rename(kept, old.with_name("away"))  # noqa: PTH104  not while the store is opened in between
    async with leading(old) as store:  # which is written, though no mark tells
        epoch = store.meta.epoch
    os.rename(old.with_name("away"), kept)  # noqa: PTH104
    async with opened(old) as store:
        assert (store.head, store.meta.epoch) == (OLD_CHANGES + 10, epoch)
        assert (await store.check()).problems == ()


async def test_what_a_living_command_is_at_is_left_to_it(old: Path) -> None:
    with child("import sys; sys.stdin.read()") as command:
        names = [f"store.db.{kind}-{command.pid}" for kind in ("incoming", "outgoing")]
        for name in names:
            (old / name).write_bytes(b"half")
        async with opened(old):
            assert all((old / name).exists() for name in names)
    async with opened(old):
        assert not any((old / name).exists() for name in names)


def test_there_is_nothing_to_keep_of_no_store(volume: Path) -> None:
    assert keep_copy(volume, "kept") is None
    assert list(volume.iterdir()) == []


async def test_an_abandoned_store_is_kept_and_leaves_an_empty_directory(old: Path) -> None:
    kept = abandon(old)
    assert kept is not None
    assert require_sound(kept).head == OLD_CHANGES
    async with opened(old) as store:
        assert store.position == Position()


# Crashes. A hook of the interpreter copies the directory before each file that is opened, linked, renamed or removed.

RECORDED: Final = """
import os, shutil, sys
from pathlib import Path
from mehdb.store import abandon, install, verify_snapshot
from mehdb.store.schema import Meta

directory, images = Path(sys.argv[1]), Path(sys.argv[2])
watching = False

def before(event, arguments):
    global watching
    if watching and event in {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.truncate"}:
        watching = False
        shutil.copytree(directory, images / f"{len(list(images.iterdir())):03}")
        watching = True

incoming = Path(sys.argv[3]) if len(sys.argv) > 3 else None
meta = verify_snapshot(incoming) if incoming else None
sys.addaudithook(before)
watching = True
if incoming:
    install(directory, incoming, meta, sys.argv[4] or None)
else:
    abandon(directory)
watching = False
"""


def recorded(directory: Path, images: Path, *arguments: object) -> list[Path]:
    """Do the work in another process and return an image of *directory* for each of its steps."""
    images.mkdir()
    with child(RECORDED, directory, images, *arguments) as process:
        assert process.wait(60) == 0
    return sorted(images.iterdir())


@pytest.mark.parametrize("keep", ["", "kept"])
@pytest.mark.parametrize("left", ["closed", "killed"])
async def test_a_crash_at_any_step_of_an_installation_leaves_the_old_store_or_the_new_one(
    old: Path, tmp_path: Path, incoming: tuple[Path, Meta], keep: str, left: str
) -> None:
    if left == "killed":
        with child(KILLED, old) as process:
            process.wait(30)
    before = require_sound(old)
    path, meta = incoming
    shutil.move(path, old / "store.db.incoming")
    images = recorded(old, tmp_path / "images", old / "store.db.incoming", keep)
    assert len(images) >= (8 if keep or left == "killed" else 5)
    found = []
    for image in images:
        kept = [folder for folder in image.iterdir() if folder.is_dir()]
        try:
            async with opened(image) as store:
                found.append(store.meta)
                assert (await store.check()).problems == ()
        except Damaged:  # its WAL has gone, and the mark tells: what was in it has been kept
            assert left == "killed"
            assert [require_sound(folder) for folder in kept] == [before]
            found.append(before)
    assert set(found) <= {before, meta}
    assert found[0] == before
    assert found[-1] == require_sound(old) == meta
    assert found == sorted(found, key=lambda state: state == meta)  # old, and from one step on new


async def test_a_crash_while_a_store_is_abandoned_never_leaves_one_that_looks_new(old: Path, tmp_path: Path) -> None:
    """Until the last step has kept what there was, its own mark shows that something is missing."""
    before = require_sound(old)
    for image in recorded(old, tmp_path / "images"):
        kept = [folder for folder in image.iterdir() if folder.is_dir() and (folder / DATABASE).exists()]
        try:
            async with opened(image) as store:
                assert store.meta == before or [require_sound(folder) for folder in kept] == [before]
        except Damaged:
            assert [require_sound(folder) for folder in kept] == [before]
    async with opened(old) as store:
        assert store.position == Position()


# In place of a store that is in use.


async def test_reads_and_writes_wait_out_a_replacement(old: Path, incoming: tuple[Path, Meta]) -> None:
    """While the files are away each gets `StoreAway`; whatever was acknowledged before is in the kept copy."""
    acknowledged: dict[bytes, Revision] = {}
    errors: set[str] = set()
    async with opened(old) as store, asyncio.timeout(90):
        clients = [asyncio.create_task(write_on(store, b"w-%d" % n, acknowledged, errors)) for n in range(8)]
        clients += [asyncio.create_task(read_on(store, errors)) for _ in range(4)]
        await until(lambda: len(acknowledged) > 200, timeout_s=30)
        path, meta = incoming
        kept = await store.replace(path, meta, "kept")
        before = len(acknowledged)
        await until(lambda: len(acknowledged) > before + 200, timeout_s=30)
        assert [client for client in clients if client.done()] == []
        for client in clients:
            client.cancel()
        await asyncio.wait(clients)
        assert errors <= {"store_away"}
        assert (await store.check()).problems == ()
    assert kept is not None
    assert check_directory(kept).problems == ()
    held = [dict(sql(folder, "SELECT key, revision FROM entry")) for folder in (kept, old)]
    assert [key for key, revision in acknowledged.items() if revision not in (held[0].get(key), held[1].get(key))] == []


async def write_on(store: Store, name: bytes, acknowledged: dict[bytes, Revision], errors: set[str]) -> None:
    """Write new keys until cancelled."""
    for n in itertools.count():
        key = b"%s-%d" % (name, n)
        try:
            acknowledged[key] = await put(store, key, b"value")
        except MehdbError as error:
            errors.add(error.code)
            await asyncio.sleep(0)


async def read_on(store: Store, errors: set[str]) -> None:
    """Read in every way until cancelled."""
    while True:
        try:
            change = await store.get(b"key-0")
            assert change is not None
            assert change.value in (b"old-1", b"new-1")
            assert len(await keys_of(store, b"key-", limit=5)) == 5
            position = store.position
            page = await store.page_after(position)  # a commit may come between the two
            assert page is None or page.after == position.revision
        except MehdbError as error:
            errors.add(error.code)
        await asyncio.sleep(0)


async def test_a_replacement_mends_a_store_that_could_not_be_opened(old: Path, incoming: tuple[Path, Meta]) -> None:
    path, meta = incoming
    (old / DATABASE).write_bytes(b"")
    store = Store(old)
    with pytest.raises(Damaged):
        await store.start()
    assert not store.is_open
    kept = await store.replace(path, meta, "damaged")
    assert (store.meta, store.is_open) == (meta, True)
    assert kept is not None
    assert (kept / DATABASE).stat().st_size == 0
    assert await put(store, b"k", b"v") == NEW_CHANGES + 1
    await store.close()


async def test_who_waits_for_a_change_is_woken_by_a_replacement(old: Path, incoming: tuple[Path, Meta]) -> None:
    path, meta = incoming
    async with opened(old) as store:
        waiter = asyncio.create_task(store.wait_beyond(Revision(OLD_CHANGES), 30))
        await asyncio.sleep(0)
        await store.replace(path, meta, None)
        assert await asyncio.wait_for(waiter, 10)


async def test_epochs_and_positions_go_on_from_the_installed_store(old: Path, incoming: tuple[Path, Meta]) -> None:
    path, meta = incoming
    async with opened(old) as store:
        await store.replace(path, meta, None)
        await store.lead(Epoch(meta.epoch + 1))
        page = await store.page_after(Position())
        assert page is not None
        assert page.end == store.position == meta.position
