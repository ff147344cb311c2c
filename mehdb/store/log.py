"""What a batch of writes or a page does to the tables, each in one transaction.

The invariant it owns: `meta`, `entry` and `change` move together, and `Log.meta` is what the last COMMIT made durable.
Only the writer thread uses it.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import apsw
import msgspec

from mehdb.errors import Diverged, KeyNotFound, MehdbError, PeerAnswerInvalid, StaleEpoch
from mehdb.model import ORIGIN, Change, Epoch, History, Page, Revision
from mehdb.store.schema import PAGE_SIZE, Meta, read_meta
from mehdb.store.seal import seal


class Write(msgspec.Struct, frozen=True, gc=False):
    """A request to the leader's store: set *key* to *value*, or delete it (*value* is None)."""

    key: bytes
    value: bytes | None
    content_type: str | None = None


Outcome = Revision | MehdbError
"""What became of one write: the revision it was given, or why it changed nothing."""


def decide(writes: Iterable[Write], live: set[bytes], head: Revision) -> tuple[list[Outcome], list[Change]]:
    """Give each write its outcome, in order, and return the changes that they make after *head*.

    *live* are the keys among those written that are live before the first write. It is updated.
    """
    outcomes: list[Outcome] = []
    changes: list[Change] = []
    for write in writes:
        if write.value is not None:
            live.add(write.key)
        elif write.key in live:
            live.remove(write.key)
        else:
            outcomes.append(KeyNotFound("no such key: nothing was deleted"))
            continue
        head = Revision(head + 1)
        changes.append(Change(head, write.key, write.value, write.content_type))
        outcomes.append(head)
    return outcomes, changes


COMPACT: Final = """
    DELETE FROM change WHERE revision > ?1 AND revision <= ?2 AND NOT EXISTS (
        SELECT 1 FROM entry WHERE entry.key = change.key AND entry.revision = change.revision)"""
# What is live is behind the window for good, once that has passed it: so it goes when it is superseded, or never.
COMPACT_SUPERSEDED: Final = """
    DELETE FROM change WHERE revision IN (SELECT revision FROM entry WHERE key IN carray(?1) AND revision <= ?2)"""
COMPACT_FACTOR: Final = 2  # changes looked at for each one written: a backlog shrinks while writes go on
COMPACT_STEP: Final = 500  # changes looked at in one transaction when nothing else is to do: a few milliseconds


class Log:
    """The tables, for the one thread that changes them.

    *retain_changes* is how many of the newest changes are kept, superseded or not; at least 1, as the head always is.
    """

    def __init__(self, connection: apsw.Connection, retain_changes: int) -> None:
        self._connection = connection
        self.commits = 0
        self.meta = read_meta(connection)
        self.compacts = True  # until a damaged page is in the way: writes must not fail over what they do not need
        self._retain_changes = retain_changes
        self._squeeze_to = ORIGIN

    @property
    def backlog(self) -> int:
        """How many changes lie behind the window and above the floor."""
        return max(0, self._window_start - self.meta.floor) if self.compacts else 0

    @property
    def _window_start(self) -> int:
        return max(self.meta.head - self._retain_changes, min(self._squeeze_to, self.meta.head - 1))

    def squeeze(self, revision: Revision) -> None:
        """Let the changes up to *revision* go, window or not: the volume is short of room."""
        self._squeeze_to = max(self._squeeze_to, revision)

    def compact(self) -> None:
        """Commit one step of compaction."""
        with self._transaction():
            meta = self._compacted(self.meta, COMPACT_STEP)
            self._save(meta)
        self.meta = meta

    def reusable_bytes(self) -> int:
        """Return how much of the file is free for new rows."""
        return int(self._connection.pragma("freelist_count")) * PAGE_SIZE

    def owed_bytes(self) -> int:
        """Return by how much the file grows when a checkpoint moves into it what is in the WAL."""
        size_bytes = os.stat(self._connection.filename).st_size  # noqa: PTH116  as quick as it gets: before each batch
        return max(0, int(self._connection.pragma("page_count")) * PAGE_SIZE - size_bytes)

    def write(self, writes: Sequence[Write]) -> list[Outcome]:
        """Commit *writes* in one transaction and return an outcome for each, in order."""
        live = self._live(write.key for write in writes)
        before = len(live)
        outcomes, changes = decide(writes, live, self.meta.head)
        if not changes:  # deletions of what was not there: nothing to sync
            return outcomes
        with self._transaction():
            meta = self._append(changes, replace(self.meta, keys=self.meta.keys - before + len(live)))
        self.meta = meta
        return outcomes

    def apply(self, page: Page) -> None:
        """Commit a leader's *page* in one transaction, if it continues this store exactly; else change nothing.

        Raises `StaleEpoch`, `Diverged` (another history or chain) and `PeerAnswerInvalid` (not contiguous, or empty).
        """
        adopted = self._continued_by(page)
        with self._transaction():
            newest = {change.key: change.value for change in page.changes}
            gone, come = len(self._live(newest)), sum(value is not None for value in newest.values())
            meta = self._append(page.changes, replace(adopted, keys=adopted.keys - gone + come))
            if meta.chain != page.chain:
                raise Diverged(f"the leader's chain at revision {meta.head} is another: the changes before it differ")
        self.meta = meta

    def adopt(self, history: History, epoch: Epoch) -> None:
        """Take *history* into an empty store and *epoch* into any. Raises `StaleEpoch` and `Diverged`."""
        meta = self._adopted(history, epoch)
        if meta != self.meta:
            with self._transaction():
                self._save(meta)
            self.meta = meta

    def _adopted(self, history: History, epoch: Epoch) -> Meta:
        if self.meta.history not in (None, history):  # epochs of two histories cannot be compared
            if self.meta.head == ORIGIN:  # nothing is lost with a history without changes
                return replace(self.meta, history=history, epoch=epoch)
            raise Diverged(f"history {history} is another than this store's {self.meta.history}")
        if epoch < self.meta.epoch:
            raise StaleEpoch(f"epoch {epoch} is over: this store has seen {self.meta.epoch}")
        return replace(self.meta, history=history, epoch=epoch)

    def _continued_by(self, page: Page) -> Meta:
        """Return `meta` with the page's history and epoch, if *page* has changes, from the head on, without gaps."""
        meta = self._adopted(page.history, page.epoch)
        expected = range(meta.head + 1, meta.head + 1 + len(page.changes))
        revisions = [change.revision for change in page.changes]
        if not revisions or page.after != meta.head or revisions != list(expected):
            raise PeerAnswerInvalid(f"the page after revision {page.after} does not continue revision {meta.head}")
        return meta

    def _append(self, changes: Sequence[Change], meta: Meta) -> Meta:
        """Write *changes* and *meta* with its head moved to the last of them. Return that."""
        rows, chain = [], meta.chain
        for change in changes:
            crc, chain = seal(chain, change)
            rows.append((*_columns(change), crc, chain))
        newest = {change.key: change for change in changes}
        if meta.floor and self.compacts:
            self._connection.execute(COMPACT_SUPERSEDED, (apsw.carray(tuple(newest)), meta.floor))
        execute = self._connection.executemany
        execute("INSERT INTO change VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        execute(
            "INSERT INTO entry VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET revision = excluded.revision",
            [(change.key, change.revision) for change in newest.values() if change.value is not None],
        )
        execute("DELETE FROM entry WHERE key = ?", [(c.key,) for c in newest.values() if c.value is None])
        meta = replace(meta, head=Revision(meta.head + len(rows)), chain=chain)
        meta = self._compacted(meta, COMPACT_FACTOR * len(rows))
        self._save(meta)
        return meta

    def _compacted(self, meta: Meta, steps: int) -> Meta:
        """Delete superseded changes among the first *steps* behind the window. Return *meta* with its new floor."""
        floor = min(self._window_start, meta.floor + steps)
        if floor <= meta.floor or not self.compacts:
            return meta
        self._connection.execute(COMPACT, (meta.floor, floor))
        return replace(meta, floor=Revision(floor))

    def _live(self, keys: Iterable[bytes]) -> set[bytes]:
        """Return those of *keys* that are live."""
        wanted = apsw.carray(tuple(keys))
        return {key for (key,) in self._connection.execute("SELECT key FROM entry WHERE key IN carray(?)", (wanted,))}

    def _save(self, meta: Meta) -> None:
        self._connection.execute(
            "UPDATE meta SET history = ?, epoch = ?, head = ?, chain = ?, floor = ?, keys = ?",
            (meta.history, meta.epoch, meta.head, meta.chain, meta.floor, meta.keys),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit what the block did, or nothing of it."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
            self.commits += 1
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _columns(change: Change) -> tuple[int, bytes, bytes | None, str | None, int | None]:
    return change.revision, change.key, change.value, change.content_type, change.expires_at
