"""Folders in and out: each file a key, each key a file.

Both may be interrupted at any moment and run again: what is there and equal is not carried a second time. Nothing is
passed over without a word, no link is followed, and no file is written outside of the folder.
"""

import base64
import contextlib
import fcntl
import mimetypes
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

import msgspec
from msgspec import UNSET, UnsetType

from mehdb.client.http import Answer, Client, Request, Twice, key_in_url
from mehdb.client.lines import Entry, list_entries, list_keys, several
from mehdb.client.paths import SELF, UNFINISHED, key_of, path_of
from mehdb.errors import BadKey, MehdbError, PeerAnswerInvalid, Refused
from mehdb.model import VALUE_BYTES_LIMIT, checked_key
from mehdb.progress import OnStep

BATCH_OPERATIONS_MAX: Final = 1000  # the most that a node takes at once
BATCH_BYTES: Final = 1 << 20  # of values: a batch of 8 MiB holds them, even with every byte written as six
SMALL_BYTES: Final = 64 << 10  # a larger value gains nothing from company
AT_ONCE_MAX: Final = 4  # large values under way: they hide each other's way to the node, and are held in memory
STALENESS_S_MAX: Final = 5  # of what a node takes for the state of a key: what has changed since would not be undone
NOT_TAKEN: Final = (400, 413)  # something about one of many: which, only each by itself tells


@dataclass
class Carried:
    """What has become of the files or keys so far. *on_problem* is told of each that stays behind."""

    on_problem: Callable[[str], None]
    written: int = 0
    equal: int = 0
    problems: int = 0

    def fail(self, what: str, why: object) -> None:
        """Count one that stays behind, and say why."""
        self.problems += 1
        self.on_problem(f"{what}: {why}")


class Source(NamedTuple):
    """A file, and the key that it becomes."""

    key: str
    path: Path
    content_type: str | None


class _Set(msgspec.Struct, tag_field="op", tag="set"):
    """A line of a batch."""

    key: str
    value: str | UnsetType = UNSET
    base64: str | UnsetType = UNSET
    content_type: str | UnsetType = UNSET


# In.


def import_tree(client: Client, folder: Path, prefix: str, carried: Carried, on_step: OnStep) -> None:
    """Write each regular file under *folder* to the key that is *prefix* and its path.

    The files are found first, so that two of one key are known before either is written. Raises what `Client.ask` does.
    """
    if not folder.is_dir():
        raise Refused(f"{folder} is no folder: name the one whose files are to be imported")
    sources = list(_sources(folder, prefix, carried))
    with _Import(client, carried) as importer:
        for number, source in enumerate(sources, 1):
            importer.add(source)
            on_step("import", number, len(sources))
        importer.finish()


def _sources(folder: Path, prefix: str, carried: Carried) -> Iterator[Source]:
    """Yield what there is to import, in a steady order. What is none is told."""
    for path in _files(folder, carried):
        relative = path.relative_to(folder).as_posix()
        try:
            rest = key_of(relative)
            checked_key((prefix + rest).encode())
        except UnicodeEncodeError:
            carried.fail(_shown(path), "its name is not UTF-8: rename it")
            continue
        except BadKey as error:
            carried.fail(_shown(path), error)
            continue
        own = path_of(rest)
        if relative != own and os.path.isfile(folder / own):  # noqa: PTH113  the other one raises for a long name
            carried.fail(_shown(path), f"{own} stands for the same key: keep one of them")
        else:
            yield Source(prefix + rest, path, _content_type(path.name))


def _files(folder: Path, carried: Carried) -> Iterator[Path]:
    """Yield each regular file under *folder*."""

    def unreadable(error: OSError) -> None:
        carried.fail(str(error.filename), f"cannot be read: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        for name in sorted([*names, *folders]):
            path = Path(place, name)
            try:
                mode = path.lstat().st_mode
            except OSError as error:
                unreadable(error)
                continue
            if stat.S_ISLNK(mode):
                carried.fail(_shown(path), "is a symbolic link, which is not followed: import what it leads to")
            elif name == UNFINISHED:
                carried.fail(_shown(path), "is what an interrupted export left: run it again, or remove the file")
            elif stat.S_ISREG(mode):
                yield path
            elif not stat.S_ISDIR(mode):
                carried.fail(_shown(path), "is no regular file")


@dataclass
class _Import:
    """Gathers small files into batches, and has a few large ones under way at once.

    A write whose answer is lost is made again: whoever writes one of these keys while the import is at work may come
    before it or after it, and the second attempt is no more than a later one.
    """

    client: Client
    carried: Carried
    small: list[tuple[Source, bytes]] = field(default_factory=list)
    small_bytes: int = 0
    large: deque[tuple[Source, "Future[Answer | None]"]] = field(default_factory=deque)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # Ctrl-C: nobody waits for answers any more
        for source, sent in self.large:  # under way when something else failed: that is what is told
            with contextlib.suppress(MehdbError):
                self._count(source, sent.result())

    def add(self, source: Source) -> None:
        """Import one file, now or with others."""
        try:
            with source.path.open("rb") as file:
                value = file.read(VALUE_BYTES_LIMIT + 1)
        except OSError as error:
            self.carried.fail(_shown(source.path), f"cannot be read: {error.strerror}")
            return
        if len(value) > VALUE_BYTES_LIMIT:
            self.carried.fail(_shown(source.path), f"no value has more than {VALUE_BYTES_LIMIT} bytes")
        elif len(value) > SMALL_BYTES:
            if len(self.large) == AT_ONCE_MAX:
                self._wait_for_one()
            self.large.append((source, self._sent(source, value)))
        else:
            self.small.append((source, value))
            self.small_bytes += len(value) + len(source.key.encode())
            if len(self.small) == BATCH_OPERATIONS_MAX or self.small_bytes >= BATCH_BYTES:
                self._import_gathered()

    def finish(self) -> None:
        """Import what has been gathered, and wait for what is under way."""
        self._import_gathered()
        while self.large:
            self._wait_for_one()

    def _sent(self, source: Source, value: bytes) -> "Future[Answer | None]":
        """Have one file imported in a thread of its own, which dies with the process: an executor's do not."""
        outcome: Future[Answer | None] = Future()

        def work() -> None:
            try:
                outcome.set_result(self._import_alone(source, value))
            except BaseException as error:  # noqa: BLE001  whatever it is, whoever takes the outcome is to have it
                outcome.set_exception(error)

        threading.Thread(target=work, name="import", daemon=True).start()
        return outcome

    def _wait_for_one(self) -> None:
        source, sent = self.large.popleft()
        self._count(source, sent.result())

    def _import_gathered(self) -> None:
        small, self.small, self.small_bytes = self.small, [], 0
        if not small:
            return
        entries = several(self.client, [source.key for source, _ in small], STALENESS_S_MAX)
        different = small
        if entries is not None:
            if len(entries) != len(small):
                raise PeerAnswerInvalid(f"asked for {len(small)} keys, a node answered with {len(entries)}")
            pairs = zip(small, entries, strict=True)
            different = [(source, value) for (source, value), entry in pairs if not _is_held(source, value, entry)]
        self.carried.equal += len(small) - len(different)
        if different:
            self._write_batch(different)

    def _write_batch(self, files: list[tuple[Source, bytes]]) -> None:
        lines = msgspec.json.Encoder().encode_lines([_line(source, value) for source, value in files])
        answer = self.client.ask(Request("POST", "/batch", lines, twice=Twice.SAME))
        if answer.status == 200:
            self.carried.written += len(files)
        elif answer.status in NOT_TAKEN:
            for source, value in files:
                self._count(source, self._put(source, value))
        else:
            raise answer.refused()

    def _import_alone(self, source: Source, value: bytes) -> Answer | None:
        """Write *value* unless it is there; return the answer to the write. In a thread: it counts nothing."""
        found = self.client.ask(Request("GET", f"/get/{key_in_url(source.key)}?max_staleness={STALENESS_S_MAX}"))
        kept = found.headers.get("Content-Type") == (source.content_type or "application/octet-stream")
        if found.status == 200 and found.body == value and kept and "Mehdb-TTL" not in found.headers:
            return None
        return self._put(source, value)

    def _put(self, source: Source, value: bytes) -> Answer:
        headers = {"Content-Type": source.content_type} if source.content_type else {}
        return self.client.ask(Request("PUT", f"/set/{key_in_url(source.key)}", value, headers, Twice.SAME))

    def _count(self, source: Source, answer: Answer | None) -> None:
        """Take note of what has become of a file: *answer* is None where it was there and equal."""
        if answer is None:
            self.carried.equal += 1
        elif answer.status == 200:
            self.carried.written += 1
        elif answer.status in NOT_TAKEN:
            self.carried.fail(_shown(source.path), answer.refused())
        else:
            raise answer.refused()


def _is_held(source: Source, value: bytes, entry: Entry) -> bool:
    """Return whether *entry* is what the import would write. What ends by itself is not."""
    return entry.data == value and entry.content_type == source.content_type and entry.ttl is None


def _line(source: Source, value: bytes) -> _Set:
    line = _Set(source.key, content_type=source.content_type or UNSET)
    try:
        line.value = value.decode()
    except UnicodeDecodeError:
        line.base64 = base64.b64encode(value).decode()
    return line


def _content_type(name: str) -> str | None:
    """Return what a file of that name holds, None if it does not tell."""
    kind, encoding = mimetypes.guess_type(name)
    return f"application/{encoding}" if encoding else kind


# Out.


def export_tree(client: Client, folder: Path, prefix: str, carried: Carried, on_step: OnStep) -> None:
    """Write each key that begins with *prefix* to a file under *folder*, named by the rest of the key.

    Other files in there are left alone. Raises `Refused`, and what `Client.ask` does.
    """
    total = sum(1 for _ in list_keys(client, prefix))
    with _exclusive(folder):
        export = _Export(folder)
        for number, entry in enumerate(list_entries(client, prefix), 1):
            data = entry.data
            if data is None:
                raise PeerAnswerInvalid(f"a listing without the value of {entry.key!r}")
            try:
                is_new = export.put(entry.key.removeprefix(prefix), data)
                carried.written += is_new
                carried.equal += not is_new
            except (OSError, Refused) as error:
                carried.fail(repr(entry.key), error)
            on_step("export", number, max(total, number))


class _Export:
    """Puts keys into files."""

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._folders = {folder}  # known to be folders, and no links to some
        self._begins: list[str] = []  # the keys so far that the last one begins with: others cannot be folders any more

    def put(self, key: str, data: bytes) -> bool:
        """Have a file hold *data*; return whether it did not already. Keys come in byte order.

        Raises `OSError` and `Refused`.
        """
        while self._begins and not key.startswith(self._begins[-1]):
            self._begins.pop()
        self._begins.append(key)
        path = self._root / path_of(key)
        self._make(path.parent)
        if _is_folder(path):
            path = path / SELF
        if _holds(path, data):
            return False
        _write_whole(path, data)
        return True

    def _make(self, folder: Path) -> None:
        """Make *folder*. A file in its place is of a key that holds others as well: it moves into it."""
        if folder in self._folders:
            return
        self._make(folder.parent)
        if not _is_folder(folder):
            with contextlib.suppress(FileNotFoundError):
                is_file = stat.S_ISREG(folder.lstat().st_mode)
                if not is_file or key_of(folder.relative_to(self._root).as_posix()) not in self._begins:
                    raise Refused(f"{folder} is in the way, and no key's file: move it")
                aside = folder.parent / UNFINISHED
                folder.rename(aside)
                folder.mkdir()
                aside.rename(folder / SELF)
            folder.mkdir(exist_ok=True)
        self._folders.add(folder)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _holds(path: Path, data: bytes) -> bool:
    """Return whether *path* is a regular file that holds *data*."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == len(data) and path.read_bytes() == data


def _write_whole(path: Path, data: bytes) -> None:
    """Have *path* hold *data*, or what it held before, at each moment."""
    unfinished = path.parent / UNFINISHED
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()  # an interrupted export's, or a link that somebody has put there
    with unfinished.open("xb") as file:
        file.write(data)
    unfinished.replace(path)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Have *folder* to ourselves among exports. Raises `Refused`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"{folder} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise Refused(f"another export is at work in {folder}: wait for it, or name another folder") from error
    finally:
        os.close(fd)


def _shown(path: Path) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")
