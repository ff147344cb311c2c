"""A disk that writes down all that is done to it, and what of that a power loss at any moment may leave.

Only what was synced is certain. Of what was written since, any sector may have made it or not, in any order; of the
last write, any part. A new name is certain once its file was synced, a deleted one may come back until another file's
name is made certain. The acknowledged mark is never synced: what it said at any time before may be what is left.
"""

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from disk import DATABASE, WAL, Disk
from mehdb.model import Change
from mehdb.store.mark import FILE_NAME as MARK

SECTOR_BYTES: Final = 512


class Kind(Enum):
    """What an event is."""

    WRITE = "write"
    TRUNCATE = "truncate"
    SYNC = "sync"
    DELETE = "delete"
    RENAME = "rename"
    MARK = "mark"
    ACKNOWLEDGED = "acknowledged"


class Event(NamedTuple):
    """One thing that happened: *file* is its name, *at* an offset or a size; of a sync, the number when it began."""

    number: int
    kind: Kind
    file: str = ""
    at: int = 0
    data: bytes = b""
    change: Change | None = None


class Recorder(Disk):
    """A disk that remembers everything, in order, with the acknowledgements that a client saw in between."""

    def __init__(self, directory: Path) -> None:
        """Record the store in *directory*, which may hold one already."""
        super().__init__()
        self.events: list[Event] = []
        self._directory = directory
        self._mark = self._mark_now()
        self._named = {DATABASE} if (directory / DATABASE).exists() else set()
        self._began: dict[tuple[str, int], int] = {}  # the syncs under way, by file and thread
        self._lock = threading.Lock()

    def acknowledged(self, change: Change) -> None:
        """Note that a client was told that *change* is durable."""
        self._note(Kind.ACKNOWLEDGED, change=change)

    def opened(self, file: str) -> None:
        """Note a new name. A new store gets its own when it is whole, and synced, directory and all."""
        if file == DATABASE and DATABASE not in self._named:
            self._note(Kind.RENAME, f"{DATABASE}.new")
        self._named.add(file)

    def deleted(self, file: str) -> None:
        """Note that a name has gone."""
        self._note(Kind.DELETE, file)

    def wrote(self, file: str, offset: int, data: bytes) -> None:
        """Note a write."""
        self._note(Kind.WRITE, file, offset, bytes(data))

    def truncated(self, file: str, size_bytes: int) -> None:
        """Note a change of a file's size."""
        self._note(Kind.TRUNCATE, file, size_bytes)

    def before_sync(self, file: str) -> None:
        """Note that only what is written by now is certain when the sync is done."""
        self._began[file, threading.get_ident()] = len(self.events)

    def synced(self, file: str, read: Callable[[], bytes]) -> None:  # noqa: ARG002  all of it is known already
        """Note a sync."""
        self._note(Kind.SYNC, file, self._began.pop((file, threading.get_ident())))

    def _note(self, kind: Kind, file: str = "", at: int = 0, data: bytes = b"", change: Change | None = None) -> None:
        with self._lock:
            # The mark moves between two things that its writer does to the disk, or before a client knows.
            mark = self._mark_now()
            if mark != self._mark:
                self._mark = mark
                self.events.append(Event(len(self.events), Kind.MARK, data=mark))
            self.events.append(Event(len(self.events), kind, file, at, data, change))

    def _mark_now(self) -> bytes:
        path = self._directory / MARK
        return path.read_bytes() if path.exists() else b""


def without_sync_at_commit(events: list[Event]) -> list[Event]:
    """Return *events* as they would be with `synchronous=NORMAL`: the WAL is synced for its header and a checkpoint."""
    kept = []
    for n, event in enumerate(events):
        if (event.kind, event.file) == (Kind.SYNC, WAL):
            before = events[n - 1]
            after = next((e for e in events[n + 1 :] if e.kind in (Kind.WRITE, Kind.SYNC) and e.file), None)
            header = (before.kind, before.file, before.at) == (Kind.WRITE, WAL, 0)
            if not header and (after is None or (after.kind, after.file) != (Kind.WRITE, DATABASE)):
                continue
        kept.append(event)
    return kept


# What is left.


@dataclass
class _File:
    certain: bytearray = field(default_factory=bytearray)
    since: list[Event] = field(default_factory=list)
    named: bool = False  # whether the name is certain

    def sync(self, began: int) -> None:
        for event in self.since:
            if event.number < began:
                _do(self.certain, event)
        self.since = [event for event in self.since if event.number >= began]
        self.named = True


def _do(data: bytearray, event: Event) -> None:
    if event.kind is Kind.TRUNCATE:
        del data[event.at :]
        data.extend(bytes(event.at - len(data)))
    else:
        data.extend(bytes(max(0, event.at - len(data))))
        data[event.at : event.at + len(event.data)] = event.data


class Image(NamedTuple):
    """What a power loss left, and how much of the past had been acknowledged by then."""

    files: dict[str, bytes]
    acknowledged: int
    label: str

    @property
    def fingerprint(self) -> int:
        """What images have in common that nothing tells apart: the same files, when as much had been acknowledged."""
        return hash((self.acknowledged, *sorted(self.files.items())))

    def write(self, directory: Path) -> None:
        """Put the files into *directory*, which is made."""
        directory.mkdir()
        for name, data in self.files.items():
            (directory / name).write_bytes(data)


class Replay:
    """The disk as the events make it, one after the other, from what *image* left."""

    def __init__(self, seed: int, image: Image = Image({}, 0, "")) -> None:  # noqa: B008  nobody changes it
        self._files = {n: _File(bytearray(data), named=True) for n, data in image.files.items() if n != MARK}
        self._deleted: dict[str, _File] = {}  # may come back
        self._marks = [image.files.get(MARK, b"")]
        self._acknowledged = image.acknowledged
        self._chance = random.Random(seed)

    def images(self, events: Iterable[Event], every: int = 1) -> Iterator[Image]:
        """Yield what may be left behind each of *events*, or behind each that is sure and every *every*-th other."""
        for event in events:
            self._take(event)
            if event.kind in (Kind.SYNC, Kind.ACKNOWLEDGED, Kind.DELETE, Kind.RENAME):
                yield self._image(f"{event.number}, synced alone", lambda file: file.certain)
            if event.number % every == 0:
                yield self._image(f"{event.number}, any sectors", self._any_sectors)
                if event.kind in (Kind.WRITE, Kind.TRUNCATE):
                    yield self._image(f"{event.number}, torn", self._torn)

    def certain(self, events: Iterable[Event]) -> Iterator[Image]:
        """Yield what is certainly left behind each acknowledgement, without the mark."""
        for event in events:
            self._take(event)
            if event.kind is Kind.ACKNOWLEDGED:
                image = self._image(f"{event.number}, synced alone", lambda file: file.certain)
                yield image._replace(files={name: data for name, data in image.files.items() if name != MARK})

    def _take(self, event: Event) -> None:  # each kind on a line of its own
        if event.kind in (Kind.WRITE, Kind.TRUNCATE):
            self._files.setdefault(event.file, _File()).since.append(event)
        elif event.kind is Kind.SYNC:
            file = self._files.setdefault(event.file, _File())
            if not file.named:  # SQLite syncs the directory with it, and with that what has gone
                self._deleted.clear()
            file.sync(event.at)
        elif event.kind is Kind.DELETE:
            file = self._files.pop(event.file, _File())
            if file.named:
                self._deleted[event.file] = file
        elif event.kind is Kind.RENAME:
            self._files[DATABASE] = self._files.pop(event.file)
            self._deleted.clear()
        elif event.kind is Kind.MARK:
            self._marks.append(event.data)
        else:
            self._acknowledged += 1

    def _image(self, label: str, left_of: Callable[[_File], bytearray]) -> Image:
        files = {name: bytes(left_of(file)) for name, file in self._files.items() if file.named}
        if label.endswith("sectors"):  # names too may have made it, or not
            files |= {
                n: bytes(left_of(f)) for n, f in self._files.items() if not f.named and self._chance.random() < 0.5
            }
        for name, file in self._deleted.items():
            if name not in files and (label.endswith("alone") or self._chance.random() < 0.5):
                files[name] = bytes(file.certain)
        match self._chance.randrange(6):
            case 0:
                pass
            case 1:
                files[MARK] = b""
            case 2:
                files[MARK] = self._chance.choice(self._marks)
            case _:
                files[MARK] = self._marks[-1]
        return Image(files, self._acknowledged, label)

    def _any_sectors(self, file: _File) -> bytearray:
        """Return the file with some of what was written since the last sync."""
        data, share = bytearray(file.certain), self._chance.random()
        for event in file.since:
            if event.kind is Kind.TRUNCATE:
                if self._chance.random() < share:
                    _do(data, event)
                continue
            first = -event.at % SECTOR_BYTES
            for start in (0, *range(first or SECTOR_BYTES, len(event.data), SECTOR_BYTES)):
                end = start + SECTOR_BYTES - (event.at + start) % SECTOR_BYTES
                if self._chance.random() < share:
                    _do(data, event._replace(at=event.at + start, data=event.data[start:end]))
        return data

    def _torn(self, file: _File) -> bytearray:
        """Return the file with all that was written, but only the beginning of the last write."""
        data = bytearray(file.certain)
        for event in file.since[:-1]:
            _do(data, event)
        for event in file.since[-1:]:
            if event.kind is Kind.WRITE:
                _do(data, event._replace(data=event.data[: self._chance.randrange(len(event.data) + 1)]))
        return data
