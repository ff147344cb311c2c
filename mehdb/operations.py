"""What an operator does to one node's store: check, back up, restore, rejoin, adopt, drain, accept a loss.

Each works on a data directory, whether a node runs on it or not: one that runs is suspended for the moment in which the
files change. Nothing is deleted: what is replaced is kept in a folder of its own beside it.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import BinaryIO, Final

from mehdb.control import Control
from mehdb.errors import (
    CommandAtWork,
    Damaged,
    DamagedRow,
    DirectoryInUse,
    DiskFull,
    NotRunning,
    Refused,
    StoreError,
    StoreFailed,
    UnknownSchema,
)
from mehdb.model import DrainReport, NodePosition, NodeStatus, Role, State
from mehdb.peers import Peer
from mehdb.progress import OnStep
from mehdb.store import (
    INCOMING,
    LOCK_NAME,
    OUTGOING,
    CheckReport,
    CommandLock,
    DirectoryLock,
    Meta,
    Room,
    StoreOptions,
    abandon,
    begin_new_history,
    check_directory,
    in_thread,
    install,
    make_snapshot,
    missing_behind,
    new_history,
    raise_epoch,
    read_mark,
    remove_leftovers_of_commands,
    require_sound,
    sync_directory,
    sync_file,
    take_back_half_kept,
    verify_snapshot,
    write_mark,
)
from mehdb.transfer import fetch

CHUNK_BYTES: Final = 1 << 20
READY_TIMEOUT_S: Final = 30.0
LOOK_EVERY_S: Final = 0.1
STANDARD: Final = Path("-")  # standard input or output
SETTLED: Final = (State.SERVING, State.DIVERGED, State.DRAINING, State.FAILED)  # which pass slowly, or never


@dataclass(frozen=True)
class Found:
    """What a check found, and how many acknowledged changes are missing at the end."""

    report: CheckReport
    missing: int


def check(directory: Path, on_step: OnStep) -> Found:
    """Verify the store in *directory*, live or not. Raises `StoreError` if there is none."""
    _require_store(directory)
    with _usable(directory):
        mark = read_mark(directory)  # before the store, which goes on being written
        report = check_directory(directory, partial(on_step, "check"))
    return Found(report, missing_behind(mark, report.position))


def check_file(path: Path, on_step: OnStep) -> Meta:
    """Verify the backup at *path*. Raises `StoreError` and `Refused`."""
    _require_whole_file(path)
    return verify_snapshot(path, partial(on_step, "check"))


def backup(directory: Path, path: Path, on_step: OnStep) -> Meta:
    """Copy the store in *directory*, live or not, to *path* ("-": standard output): whole, verified and durable.

    Or not at all. Raises `StoreError`, and `Refused` where *path* is a directory or lies in a node's.
    """
    require_elsewhere(path)
    to_output = path == STANDARD
    _require_store(directory)
    unfinished = directory / f"{OUTGOING}-{os.getpid()}" if to_output else path.with_name(f"{path.name}.part")
    try:
        meta = _copy_whole(directory, unfinished, on_step)
        if to_output:
            with unfinished.open("rb") as file:
                _copy(file, sys.stdout.buffer)
        else:
            sync_file(unfinished)
            unfinished.replace(path)
            sync_directory(path.parent)
    except (Damaged, DamagedRow) as error:
        why = str(error).replace(str(unfinished), "the copy")
        raise Damaged(f"the store in {directory} cannot be backed up ({why}): back up another node") from error
    except OSError as error:
        raise StoreFailed(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return meta


def _require_store(directory: Path) -> None:
    """Raise `StoreFailed` if there is none in *directory*, sound or not."""
    with _usable(directory):
        try:
            require_sound(directory)
        except FileNotFoundError:
            raise StoreFailed(f"{directory} holds no store: name another with --data-dir") from None
        except UnknownSchema:  # nothing that this program says of it would be true
            raise
        except StoreError:  # whoever reads on finds out more
            return


def require_elsewhere(path: Path) -> None:
    """Raise `Refused` unless a backup may be put at *path*: never where a node has its store."""
    if path.is_dir():
        raise Refused(f"{path} is a directory: name a file")
    if path != STANDARD and (path.parent / LOCK_NAME).exists():
        raise Refused(f"{path} is in a data directory: name a file elsewhere")
    if path != STANDARD and not path.parent.is_dir():
        raise Refused(f"{path.parent} is no directory: make it, or name a file elsewhere")


def _copy_whole(directory: Path, path: Path, on_step: OnStep) -> Meta:
    """Copy the store in *directory* to *path*, verified. Raises `Damaged` and `DamagedRow`."""
    remove_leftovers_of_commands(directory)
    mark = read_mark(directory)  # before the store, which goes on being written
    snapshot = make_snapshot(directory, path, _room_for(path, directory), partial(on_step, "copy"))
    verify_snapshot(path, partial(on_step, "verify"))
    if missing := missing_behind(mark, snapshot.meta.position):
        raise Damaged(f"{missing} acknowledged changes are missing at its end", missing)
    return snapshot.meta


def _require_whole_file(path: Path) -> None:
    """Raise `Refused` if the store at *path* has more beside it: then the file alone is an older state of it."""
    wal = path.with_name(f"{path.name}-wal")
    if wal.exists() and wal.stat().st_size:
        raise Refused(
            f"{path} is not all of its store, {wal.name} is beside it: `mehdb backup FILE --data-dir {path.parent}`"
        )


def _room_for(copy: Path, directory: Path) -> Room | None:
    """Return what a *copy* of the store must leave room in: the data directory, where that is in there."""
    inside = copy.resolve().is_relative_to(directory.resolve())
    return Room(directory, StoreOptions().disk_reserve_bytes) if inside else None


async def restore(directory: Path, path: Path, *, replace: bool, on_step: OnStep) -> tuple[Meta, Path | None]:
    """Put the backup at *path* ("-": standard input) into *directory*, in a new history. Return what is there now.

    Also returns where the store is kept that was there. Raises `Refused` if there is one and *replace* is not given.
    """
    status = await status_of(directory)
    if status and status.role is Role.FOLLOWER:
        raise Refused(f"{status.node} follows: restore on the leader, then `mehdb rejoin` on each follower")
    if path != STANDARD:
        _require_whole_file(path)
    if not replace:
        _require_no_data(directory)
    with _incoming(directory) as incoming:
        if path == STANDARD:
            await asyncio.to_thread(_copy_to, sys.stdin.buffer, incoming)
        else:
            with _opened(path) as file:
                await asyncio.to_thread(_copy_to, file, incoming)
        try:
            await in_thread(partial(verify_snapshot, incoming), partial(on_step, "verify"))
        except StoreError as error:
            raise Refused(str(error).replace(str(incoming), str(path)) + ": nothing was changed") from error
        await asyncio.to_thread(begin_new_history, incoming, new_history())
        meta = await in_thread(partial(verify_snapshot, incoming), partial(on_step, "verify again"))
        if meta.head == 0:
            raise Refused(f"{path} holds no change at all: nothing was changed")
        return meta, await _install(directory, incoming, meta, "replaced", only_if_empty=not replace)


async def take(directory: Path, peer: Peer, keep: str, on_step: OnStep) -> tuple[Meta, Path | None]:
    """Put the whole store of *peer* into *directory*. Return it, and where that is kept which was there."""
    with _incoming(directory) as incoming:
        async with peer:
            meta = await fetch(peer, incoming, on_step)
        own = meta_of(directory)
        if own and own.history == meta.history:  # this node may have led since: no epoch must be led at twice
            await asyncio.to_thread(raise_epoch, incoming, own.epoch)
        return meta, await _install(directory, incoming, meta, keep)


def meta_of(directory: Path) -> Meta | None:
    """Return the state of the store in *directory*, live or not; None if there is none that is sound."""
    try:
        return require_sound(directory)
    except (StoreError, OSError):
        return None


def loss(directory: Path, *, start_empty: bool, on_step: OnStep) -> str:
    """Return what is wrong with the store in *directory* as a whole, or for *start_empty* with any part of it.

    Raises `Refused` if nothing is.
    """
    with _usable(directory):
        try:
            require_sound(directory)
        except Damaged as error:
            return str(error)
        except FileNotFoundError:
            raise Refused(f"{directory} holds no store, so nothing is missing: name another with --data-dir") from None
        if start_empty and (problems := check(directory, on_step).report.problems):
            return problems[0]
    raise Refused("nothing is missing: this store can be used as it is")


async def accept_loss(directory: Path, *, start_empty: bool, on_step: OnStep) -> Path | None:
    """Have the store in *directory* trusted as it is, without the changes that are missing at its end.

    Where more is broken, *start_empty* sets it aside: returns where. Raises `Refused` without that.
    """
    async with _alone(directory):
        with _usable(directory):
            take_back_half_kept(directory)
        broken = await asyncio.to_thread(loss, directory, start_empty=start_empty, on_step=on_step)
        try:
            found = await asyncio.to_thread(check, directory, on_step)
            if not found.report.problems:
                write_mark(directory, found.report.position)
                return None
            broken = found.report.problems[0]
        except StoreError as error:
            broken = str(error)
        if not start_empty:
            raise Refused(
                f"more is broken than the end ({broken}): restore a backup with `mehdb restore FILE --replace`, or say "
                "--start-empty to keep what is here aside and begin with nothing"
            )
        return abandon(directory)


async def drain(directory: Path, wait_s: float) -> DrainReport:
    """Drain the node that runs on *directory*, and wait until that is done, at most *wait_s*. Raises `NotRunning`."""
    async with Control(directory) as control:
        return await control.drain(wait_s)


async def status_of(directory: Path) -> NodeStatus | None:
    """Return what the node on *directory* says of itself; None if none runs there."""
    try:
        async with Control(directory) as control:
            return await control.status()
    except NotRunning:
        return None


async def position_of(peer: Peer) -> NodePosition:
    """Return where *peer* is. Raises `PeerError`."""
    async with peer:
        return await peer.position()


async def until_settled(directory: Path) -> NodeStatus | None:
    """Return the status of the node on *directory* once it is settled, or was not for long; None if none runs."""
    end_s = monotonic() + READY_TIMEOUT_S
    while True:
        status = await status_of(directory)
        if status is None or status.state in SETTLED or monotonic() > end_s:
            return status
        await asyncio.sleep(LOOK_EVERY_S)


def holds_data(directory: Path) -> bool:
    """Return whether *directory* has a store with changes, or one that cannot be read."""
    with _usable(directory):
        try:
            return require_sound(directory).head > 0
        except StoreError:
            return True
        except FileNotFoundError:
            return False


def _require_no_data(directory: Path) -> None:
    if holds_data(directory):
        raise Refused(f"{directory} holds a store: say --replace to keep it aside and restore into its place")


async def _install(
    directory: Path, incoming: Path, meta: Meta, keep: str, *, only_if_empty: bool = False
) -> Path | None:
    with _usable(directory):
        await asyncio.to_thread(sync_file, incoming)  # before the node is suspended: this may take long
        async with _alone(directory):
            if only_if_empty:  # no longer, if somebody has written meanwhile
                _require_no_data(directory)
            return await asyncio.to_thread(install, directory, incoming, meta, keep)


@contextlib.asynccontextmanager
async def _alone(directory: Path) -> AsyncIterator[None]:
    """Have the files in *directory* to ourselves: by its lock, or by suspending the node that holds that.

    No other command works there meanwhile, nor does a node start: a suspended one that ends lets go of its lock.
    """
    with contextlib.ExitStack() as locks:
        with _usable(directory):
            try:
                locks.callback(CommandLock(directory).release)
            except CommandAtWork as error:
                raise Refused(
                    f"another command, process {error.holder}, is at work on {directory}: wait for it"
                ) from error
            try:
                locks.callback(DirectoryLock(directory).release)
                in_use = None
            except DirectoryInUse as error:
                in_use = error
        if in_use is None:
            yield
            return
        try:
            async with Control(directory) as control, control.suspended():
                yield
        except NotRunning:
            raise in_use from None


@contextlib.contextmanager
def _incoming(directory: Path) -> Iterator[Path]:
    """Have a place in *directory*, which is made, for a store that arrives."""
    with _usable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers_of_commands(directory)
    incoming = directory / f"{INCOMING}-{os.getpid()}"
    try:
        yield incoming
    finally:
        incoming.unlink(missing_ok=True)


@contextlib.contextmanager
def _usable(directory: Path) -> Iterator[None]:
    """Tell an error of the volume in one line."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{directory} cannot be used: {error.strerror}") from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error


def _copy_to(source: BinaryIO, path: Path) -> None:
    try:
        with path.open("wb") as target:
            _copy(source, target)
    except OSError as error:
        raise DiskFull(f"{path} cannot be written: {error.strerror}") from error


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
    target.flush()
