"""What a batch of writes or a page does to the tables, each in one transaction.

The invariant it owns: `meta`, `entry` and `change` move together, and `Log.meta` is what the last COMMIT made durable.
Only the writer thread uses it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Final, cast

import apsw

from mehdb.errors import Diverged, PeerAnswerInvalid, StaleEpoch
from mehdb.model import ORIGIN, Change, Epoch, History, Page, Revision
from mehdb.store.clock import Clock
from mehdb.store.decision import Outcome, Request, decide
from mehdb.store.expiry import Due, Expiry
from mehdb.store.reader import require_absent
from mehdb.store.schema import PAGE_SIZE, Meta, read_meta
from mehdb.store.seal import seal
from mehdb.store.tally import Tally

LIVE: Final = "SELECT key, revision FROM entry WHERE key IN carray(?)"
# The sizes come from the rows' heads alone: a value is not read to be measured.
NEXT: Final = """
    SELECT max(revision) FROM (
        SELECT revision, sum(bytes) OVER (ORDER BY revision) - bytes AS before FROM (
            SELECT revision, ifnull(length(value), 0) AS bytes FROM change
            WHERE revision > ? AND revision <= ? ORDER BY revision LIMIT ?))
    WHERE before < ?"""
COMPACT: Final = """
    DELETE FROM change WHERE revision > ?1 AND revision <= ?2 AND NOT EXISTS (
        SELECT 1 FROM entry WHERE entry.key = change.key AND entry.revision = change.revision)"""
COMPACT_FACTOR: Final = 4  # changes looked at for each one written: a sweep ends long before the next one is due
COMPACT_STEP: Final = 500  # changes looked at in one transaction when nothing else is to do: a few milliseconds
COMPACT_BYTES: Final = 4 << 20  # of values in either: each page of a large value is touched to be freed
EXPIRE_STEP: Final = 1000  # changes looked at, and keys deleted, in one transaction: a few milliseconds
SQUEEZE_SHARE: Final = 16  # with so many times fewer superseded than live, a sweep frees little, squeezed or not


class Log:
    """The tables, for the one thread that changes them.

    *retain_changes* is how many of the newest changes are kept, superseded or not; at least 1, as the head always is.
    What is superseded behind that window is removed in sweeps, each from the beginning of the log to the window, when
    it has become half as much as what must stay: to look for it at each write would cost as much as the write.
    """

    def __init__(
        self, connection: apsw.Connection, retain_changes: int, clock: Clock | None = None, tally: Tally | None = None
    ) -> None:
        self.tally = tally or Tally()
        self._connection = connection
        self._clock = clock or Clock()
        self._expiry = Expiry(connection)
        self.commits = 0
        self.committed: list[Change] = []
        """What has been committed since somebody last took it from here."""
        self.meta = read_meta(connection)
        self.compacts = True  # until a damaged page is in the way: writes must not fail over what they do not need
        self._retain_changes = retain_changes
        self._squeeze_to = ORIGIN
        self._swept_to: Revision | None = None  # how far a sweep has come, None between two
        self._sweep_end = ORIGIN

    @property
    def compaction_due(self) -> bool:
        """Whether a sweep is under way, or worth beginning."""
        return self.compacts and (self._swept_to is not None or self._is_worthwhile(self.meta))

    def squeeze(self, revision: Revision) -> None:
        """Let the superseded changes up to *revision* go, window or not: the volume is short of room."""
        self._squeeze_to = max(self._squeeze_to, revision)

    def compact(self) -> None:
        """Commit one step of compaction."""
        with self._transaction():
            meta = self._compacted(self.meta, COMPACT_STEP)
            if meta == self.meta:
                return
            self._save(meta)
        self._move_to(meta, 0)

    def backlog_changes(self, meta: Meta) -> int:
        """Return how many changes compaction may remove at *meta*: superseded, behind the window. At least so many."""
        return max(0, self._superseded(meta, self._window_start(meta)))

    def _window_start(self, meta: Meta) -> Revision:
        """Return the revision behind which superseded changes may go."""
        squeezed = min(self._squeeze_to, meta.head - 1)
        return Revision(max(meta.head - self._retain_changes, squeezed, meta.floor))

    def _is_worthwhile(self, meta: Meta) -> bool:
        """Return whether so much behind the window is superseded that a sweep pays. All that is live may be there."""
        start = self._window_start(meta)
        superseded = self._superseded(meta, start)
        squeezed = start > meta.head - self._retain_changes and start > meta.floor
        return superseded > (meta.keys // SQUEEZE_SHARE if squeezed else max(self._retain_changes, meta.keys) // 2)

    def _superseded(self, meta: Meta, start: Revision) -> int:
        """Return how many changes up to *start* are superseded, if all that is live is there: more if not."""
        return meta.changes - (meta.head - start) - meta.keys

    def _move_to(self, meta: Meta, added: int) -> None:
        """Be at *meta*, which is durable: after *added* changes more, and without those that were compacted."""
        self.tally.compacted_changes += self.meta.changes + added - meta.changes
        self.meta = meta

    def _compacted(self, meta: Meta, steps: int) -> Meta:
        """Look at the next *steps* changes of a sweep, if one is due. Return *meta* with what has become of it."""
        if self._swept_to is None:
            if not self._is_worthwhile(meta):
                return meta
            self._swept_to, self._sweep_end = ORIGIN, self._window_start(meta)
        begin = self._swept_to
        end = self._connection.execute(NEXT, (begin, self._sweep_end, steps, COMPACT_BYTES)).get
        self._swept_to = cast("Revision | None", end)
        if end is None:
            return meta
        self._connection.execute(COMPACT, (begin, end))
        floor = max(meta.floor, self._sweep_end)
        return replace(meta, floor=floor, changes=meta.changes - self._connection.changes())

    def reusable_bytes(self) -> int:
        """Return how much of the file is free for new rows."""
        return int(self._connection.pragma("freelist_count")) * PAGE_SIZE

    def owed_bytes(self) -> int:
        """Return by how much the file grows when a checkpoint moves into it what is in the WAL."""
        size_bytes = os.stat(self._connection.filename).st_size  # noqa: PTH116  as quick as it gets: before each batch
        return max(0, int(self._connection.pragma("page_count")) * PAGE_SIZE - size_bytes)

    def write(self, requests: Sequence[Request], *, compact: bool = True) -> list[Outcome]:
        """Commit *requests* in one transaction and return an outcome for each, in order."""
        live = self._live(tuple(key for request in requests for key in request.keys))
        before = len(live)
        outcomes, changes = decide(requests, live, self.meta.head, self._clock.now_ms())
        if not changes:  # deletions of what was not there, say: nothing to sync
            return outcomes
        with self._transaction():
            meta = self._append(changes, replace(self.meta, keys=self.meta.keys - before + len(live)), compact=compact)
        self._move_to(meta, len(changes))
        self.committed += changes
        for change in changes:
            if change.expires_at is not None:
                self._expiry.note(change.expires_at)
        return outcomes

    @property
    def expiry_due(self) -> bool:
        """Whether something has expired, or may have."""
        return self._expiry.next_ms is not None and self._expiry.next_ms <= self._clock.now_ms()

    def due(self) -> Due:
        """Return what has expired, the first of it."""
        return self._expiry.due(self._clock.now_ms(), EXPIRE_STEP)

    def expired(self, due: Due) -> None:
        """Take down that *due* has been deleted, or cannot be."""
        self._expiry.move(due.cursor)

    def apply(self, page: Page) -> None:
        """Commit a leader's *page* in one transaction, if it continues this store exactly; else change nothing.

        Raises `StaleEpoch`, `Diverged` (another history or chain) and `PeerAnswerInvalid` (not contiguous, or empty).
        """
        adopted = self._continued_by(page)
        with self._transaction():
            newest = {change.key: change.value for change in page.changes}
            gone, come = len(self._live(tuple(newest))), sum(value is not None for value in newest.values())
            meta = self._append(page.changes, replace(adopted, keys=adopted.keys - gone + come), compact=True)
            if meta.chain != page.chain:
                raise Diverged(f"the leader's chain at revision {meta.head} is another: the changes before it differ")
        self._move_to(meta, len(page.changes))
        self.committed += page.changes
        self._expiry.restart()

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

    def _append(self, changes: Sequence[Change], meta: Meta, *, compact: bool) -> Meta:
        """Write *changes* and *meta* with its head moved to the last of them. Return that."""
        rows, chain = [], meta.chain
        for change in changes:
            crc, chain = seal(chain, change)
            rows.append((*_columns(change), crc, chain))
        newest = {change.key: change for change in changes}
        execute = self._connection.executemany
        execute("INSERT INTO change VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        execute(
            "INSERT INTO entry VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET revision = excluded.revision",
            [(change.key, change.revision) for change in newest.values() if change.value is not None],
        )
        execute("DELETE FROM entry WHERE key = ?", [(c.key,) for c in newest.values() if c.value is None])
        meta = replace(meta, head=Revision(meta.head + len(rows)), chain=chain, changes=meta.changes + len(rows))
        if compact and self.compacts:
            meta = self._compacted(meta, COMPACT_FACTOR * len(rows))
        self._save(meta)
        return meta

    def _live(self, keys: tuple[bytes, ...]) -> dict[bytes, Revision]:
        """Return those of *keys* that are live, each with its revision."""
        found = self._connection.execute(LIVE, (apsw.carray(keys),))
        live: dict[bytes, Revision] = dict(found)
        for key in keys:
            if key not in live:
                require_absent(self._connection, key)
        return live

    def _save(self, meta: Meta) -> None:
        self._connection.execute(
            "UPDATE meta SET history = ?, epoch = ?, head = ?, chain = ?, floor = ?, keys = ?, changes = ?",
            (meta.history, meta.epoch, meta.head, meta.chain, meta.floor, meta.keys, meta.changes),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit what the block did, or nothing of it."""
        swept_to = self._swept_to
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            begun_s = perf_counter()
            self._connection.execute("COMMIT")
            self.tally.sync_seconds.observe(perf_counter() - begun_s)
            self.commits += 1
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            self._swept_to = swept_to  # what was removed is back
            raise


def _columns(change: Change) -> tuple[int, bytes, bytes | None, str | None, int | None]:
    return change.revision, change.key, change.value, change.content_type, change.expires_at
