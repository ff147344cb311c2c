"""Damages to the files of a store, one per case, and what a node then answers: for `test_damage_anywhere`.

Run as a program it works off a range of cases, as a damage may end the process by a signal, and prints a line for each.
"""

import asyncio
import json
import logging
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Final

import apsw

from disk import DATABASE, WAL
from mehdb.errors import MehdbError
from mehdb.model import Change, Epoch, History, Position, Revision
from mehdb.store import Store, StoreOptions, Write
from mehdb.store.log import Log
from mehdb.store.mark import FILE_NAME as MARK
from mehdb.store.mark import AcknowledgedMark
from mehdb.store.schema import PAGE_SIZE, SHM_NAME, open_reader, open_writer
from stores import checksum_of, keys_of

HISTORY: Final = History("0123456789abcdef" * 2)
KEYS: Final = 300
RETAINED: Final = 200  # where a base is compacted
CASE_S: Final = 30  # a case that takes longer hangs
WAL_HEADER_BYTES: Final = 32
FRAME_BYTES: Final = 24 + PAGE_SIZE
INDEX_PAGES: Final = (2, 10)  # the first byte of an inner page, and of a leaf; https://sqlite.org/fileformat.html
BASES: Final = ("closed", "compacted", "killed", "backfilled", "restarted")


# What a store holds. The same in each process.


def value_of(n: int) -> bytes:
    """Return the value of the *n*-th write: mostly small, some larger than a page."""
    return (b"value %d " % n) * (2000 if n % 50 == 7 else n % 20)


def key_of(n: int) -> bytes:
    """Return a key: most are short, some so long that a page of the index holds their beginning alone."""
    key = b"key-%03d" % n
    return key * 146 if n % 20 == 1 else key


def writes() -> list[Write]:
    """Return what is written: each key once, half of them again, a third deleted, a few after that once more."""
    numbers = list(range(KEYS)) + [n for n in range(KEYS) if n % 2] + [n for n in range(KEYS) if n % 5 == 0]
    sets = [Write(key_of(n * 7 % KEYS), value_of(i), f"type/{i}") for i, n in enumerate(numbers)]
    deletions = [Write(key_of(n), None) for n in range(0, KEYS, 3)]
    return [*sets, *deletions, *[Write(key_of(n), b"again %d" % n) for n in range(0, KEYS, 30)]]


def live_writes() -> list[Write]:
    """Return what is written to a store that is damaged while it is open, so that there is something in its WAL."""
    return [Write(key_of(n), b"live " + value_of(n)) for n in range(1, KEYS, 3)]


@dataclass
class Truth:
    """What every answer is compared with."""

    changes: list[Change] = field(default_factory=list)
    live: dict[bytes, Change] = field(default_factory=dict)

    def take(self, write: Write) -> None:
        """Note a write of a key that is live, or the deletion of one."""
        change = Change(Revision(len(self.changes) + 1), write.key, write.value, write.content_type)
        self.changes.append(change)
        if write.value is None:
            del self.live[write.key]
        else:
            self.live[write.key] = change


def truth(*, live: bool = False) -> Truth:
    """Return what all of `writes` come to, and of `live_writes` where there were any."""
    known = Truth()
    for write in writes() + (live_writes() if live else []):
        known.take(write)
    return known


def make_base(kind: str, directory: Path) -> None:
    """Make the store that the cases of *kind* damage. Ends the process for those that were killed."""
    directory.mkdir()
    connection = open_writer(directory)
    log, mark = Log(connection, RETAINED if kind == "compacted" else 100_000), AcknowledgedMark.open(directory)
    log.adopt(HISTORY, Epoch(1))
    every = writes()
    reader = open_reader(directory)
    for start in range(0, len(every), 10):
        if start == 300 and kind == "backfilled":  # a reader holds back what may be checkpointed
            reader.execute("BEGIN; SELECT * FROM meta").fetchall()
        log.write(every[start : start + 10])
        mark.move(log.meta.position)
        if start == 400 and kind in ("backfilled", "restarted"):
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    while log.compaction_due:
        log.compact()
    if kind in ("killed", "backfilled", "restarted"):
        os.kill(os.getpid(), signal.SIGKILL)
    reader.close()
    connection.close()


# Damages.

Files = dict[str, bytes]
Damage = "partial[None]"


def flip(name: str, offset: int, bit: int, files: Files) -> None:
    """Flip one bit."""
    files[name] = files[name][:offset] + bytes([files[name][offset] ^ 1 << bit]) + files[name][offset + 1 :]


def flip_under_a_right_checksum(offset: int, bit: int, files: Files) -> None:
    """Flip one bit as if there were no page checksums."""
    flip(DATABASE, offset, bit, files)
    start = offset - offset % PAGE_SIZE
    end = start + PAGE_SIZE
    page = files[DATABASE][start:end]
    files[DATABASE] = files[DATABASE][:start] + page[:-8] + checksum_of(page) + files[DATABASE][end:]


def zero(name: str, offset: int, size_bytes: int, files: Files) -> None:
    """Make a page, or a frame of the WAL, nothing but zeros."""
    end = min(offset + size_bytes, len(files[name]))
    files[name] = files[name][:offset] + bytes(end - offset) + files[name][end:]


def cut(name: str, size_bytes: int, files: Files) -> None:
    """Cut a file short."""
    files[name] = files[name][:size_bytes]


def cut_live(name: str, sixteenths: int, unit_bytes: int, directory: Path) -> None:
    """Cut a file of a store short while that is open."""
    size_bytes = (directory / name).stat().st_size * sixteenths // 16
    os.truncate(directory / name, size_bytes - size_bytes % unit_bytes)


def fill(name: str, seed: int, files: Files) -> None:
    """Make a file nothing but noise."""
    files[name] = random.Random(seed).randbytes(max(len(files[name]), 1000))


def both(one: Damage, other: Damage, files: Files) -> None:
    """Do two damages."""
    one(files)
    other(files)


def damages_to(kind: str, files: Files) -> Iterator[Damage]:
    """Yield damages to *files* without end: first each page, and each bit of what SQLite looks at first."""
    chance = random.Random(kind)
    for offset in range(0, len(files[DATABASE]), PAGE_SIZE):
        yield partial(zero, DATABASE, offset, PAGE_SIZE)
    if kind == "closed":
        for offset, bit in product(range(100), range(8)):
            yield partial(flip, DATABASE, offset, bit)
    if kind == "restarted":
        for offset, bit in product(range(WAL_HEADER_BYTES + 24), range(8)):  # the WAL's header, and its first frame's
            yield partial(flip, WAL, offset, bit)
    while True:
        yield anything(files, chance)


def anything(files: Files, chance: random.Random) -> Damage:
    """Return a damage anywhere."""
    name = chance.choice([name for name in (DATABASE, WAL) if files.get(name)])
    offset = chance.randrange(len(files[name]))
    frame = offset - offset % FRAME_BYTES + WAL_HEADER_BYTES
    other = chance.randrange(len(files[DATABASE]))
    kinds: list[Damage] = [
        *[partial(flip, name, offset, chance.randrange(8))] * 8,
        partial(zero, name, offset - offset % 512, PAGE_SIZE),
        partial(cut, name, offset),
        partial(cut, name, offset - offset % PAGE_SIZE),
        partial(cut, WAL, frame) if name == WAL else partial(cut, name, offset - 1),
        partial(both, partial(flip, name, offset, 0), partial(flip, DATABASE, other, 7)),
        partial(both, partial(flip, DATABASE, other, 3), partial(cut, name, offset)),
    ]
    if SHM_NAME in files:
        kinds.append(partial(both, partial(fill, SHM_NAME, other), partial(flip, name, offset, 1)))
    return chance.choice(kinds)


def frame_by_frame(_kind: str, files: Files) -> Iterator[Damage]:
    """Yield the loss of each frame of the WAL, its end at each and within each, and flips in the -shm alone."""
    for start in range(WAL_HEADER_BYTES, len(files[WAL]), FRAME_BYTES):
        yield partial(zero, WAL, start, FRAME_BYTES)
        yield partial(cut, WAL, start)
        yield partial(cut, WAL, start + FRAME_BYTES // 2)
    for offset in range(0, len(files[SHM_NAME]), 509):  # a prime: no two in the same place of their page
        yield partial(flip, SHM_NAME, offset, offset % 8)


def flips_of_frames(_kind: str, files: Files) -> Iterator[Damage]:
    """Yield flips in the WAL alone."""
    chance = random.Random(1)
    while True:
        yield partial(flip, WAL, chance.randrange(WAL_HEADER_BYTES, len(files[WAL])), chance.randrange(8))


def flips_of_pages(_kind: str, files: Files) -> Iterator[Damage]:
    """Yield flips in the index of keys that no page checksum shows."""
    chance = random.Random(2)
    pages = [start for start in range(0, len(files[DATABASE]), PAGE_SIZE) if files[DATABASE][start] in INDEX_PAGES]
    while True:
        yield partial(
            flip_under_a_right_checksum, chance.choice(pages) + chance.randrange(PAGE_SIZE - 8), chance.randrange(8)
        )


def cuts_of_live_files(_kind: str, _files: Files) -> Iterator[Damage]:
    """Yield cuts anywhere in the files of an open store, but none to nothing: a node that finds that one ends."""
    for name, sixteenths, unit_bytes in product((DATABASE, WAL), range(1, 16), (1, PAGE_SIZE)):
        yield partial(cut_live, name, sixteenths, unit_bytes)


# What the node answers.


class Answers:
    """Every answer that a store gives, compared with the truth."""

    def __init__(self, store: Store, known: Truth) -> None:
        self.store = store
        self.known = known
        self.wrong: list[str] = []
        self.unexpected: list[str] = []
        self.errors: Counter[str] = Counter()

    async def compare(self, kind: str) -> None:
        """Read every key that ever was, the list of them, and the log."""
        for key in sorted({change.key for change in self.known.changes}):
            await self._read(f"get {key!r}", self.store.get(key), self.known.live.get(key))
        await self._read("keys", keys_of(self.store, limit=2 * KEYS), sorted(self.known.live))
        if kind != "compacted":
            await self._read("changes", self._changes(), self.known.changes)

    async def write(self) -> None:
        """Write a new key, one that is live and one that was deleted, as what is free may be damaged too."""
        if self.store.meta.history is None:  # nobody leads such a store
            return
        live = [key for key in self.known.live if key.startswith(b"key")]
        for write in (
            Write(b"new", b"x" * 5000), Write(live[0], b"y" * 9000), Write(b"key-003", b"z"), Write(live[-1], None),
        ):  # fmt: skip
            try:
                await self.store.write(write)
            except MehdbError as error:
                self.errors[type(error).__name__] += 1
            else:
                self.known.take(write)

    async def _changes(self) -> list[Change]:
        changes, position = [], Position()
        while page := await self.store.page_after(position):
            changes += page.changes
            position = page.end
        return changes

    async def _read(self, what: str, answer: "asyncio.Future[object] | object", expected: object) -> None:
        try:
            found = await answer  # type: ignore[misc]
        except MehdbError as error:
            self.errors[type(error).__name__] += 1
        except Exception as error:  # noqa: BLE001  a bug, if no wrong value
            self.unexpected.append(f"{what}: {error!r}")
        else:
            if found != expected:
                self.wrong.append(f"{what}: {str(found)[:80]}, not {str(expected)[:80]}")


async def examine(directory: Path, kind: str, known: Callable[[], Truth] = truth) -> dict[str, object]:
    """Open the store in *directory* as a node does, and say what came of it."""
    try:
        store = await Store.open(directory, StoreOptions(disk_reserve_bytes=0))
    except MehdbError as error:
        return {"refused": type(error).__name__}
    answers = Answers(store, known())
    try:
        await answers.compare(kind)
        await answers.write()
        await answers.compare(kind)
    finally:
        await store.close()
    return {"wrong": answers.wrong, "unexpected": answers.unexpected, "errors": answers.errors.total()}


async def examine_live(directory: Path, damage: Damage) -> dict[str, object]:
    """Do a damage to the store in *directory* while it is open and in use. Say what came of it, then and later."""
    store = await Store.open(directory, StoreOptions(disk_reserve_bytes=0))
    answers = Answers(store, truth())
    try:
        for write in live_writes():
            await store.write(write)
            answers.known.take(write)
        await answers.compare("live")
        assert (answers.wrong, answers.unexpected, answers.errors.total()) == ([], [], 0)
        damage(directory)
        await answers.compare("live")
        await answers.write()
        await answers.compare("live")
    finally:
        await store.close()
    later = await examine(directory, "live", lambda: answers.known)
    found = {"wrong": answers.wrong, "unexpected": answers.unexpected, "errors": answers.errors.total()}
    return later | {name: some + later.get(name, type(some)()) for name, some in found.items()}


SORTS: Final = {
    "anywhere": damages_to,
    "frame by frame": frame_by_frame,
    "frames": flips_of_frames,
    "live": cuts_of_live_files,
    "pages": flips_of_pages,
}


def seen(damage: Damage) -> str:
    """Return what *damage* does, to be read."""
    parts = [f"({seen(part)})" if callable(part) else str(part) for part in damage.args]
    return " ".join([damage.func.__name__, *parts])


def work(base: Path, sort: str, first: int, last: int, without_mark: bool) -> None:
    """Work off the cases from *first* up to *last*, and print a line for each."""
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.name != "lock"}
    if without_mark:
        del files[MARK]
    for number, damage in enumerate(islice(SORTS[sort](base.name, files), first, last), start=first):
        damaged = dict(files)
        if sort != "live":
            damage(damaged)
        with tempfile.TemporaryDirectory(dir=base.parent) as name:
            directory = Path(name)
            for file, data in damaged.items():
                (directory / file).write_bytes(data)
            case = examine_live(directory, damage) if sort == "live" else examine(directory, base.name)
            found = asyncio.run(asyncio.wait_for(case, CASE_S))
        print(json.dumps({"case": number, "damage": seen(damage)} | found), flush=True)


if __name__ == "__main__":
    logging.disable()
    if sys.argv[1] == "make":
        make_base(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1] == "live":
        without_end = partial(cut_live, SHM_NAME, int(sys.argv[3]), 1)
        print(json.dumps(asyncio.run(examine_live(Path(sys.argv[2]), without_end))))
    else:
        _, _, base_name, sort_name, first_case, last_case, marked = sys.argv
        work(Path(base_name), sort_name, int(first_case), int(last_case), marked == "without mark")
