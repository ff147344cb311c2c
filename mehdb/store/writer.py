"""The one thread that writes: it takes all that waits, commits it in one transaction, and only then acknowledges.

The invariant it owns (promise 1): a caller gets its outcome after the COMMIT that made it durable has returned. Once a
write or a sync has failed for any reason but a full disk, nothing is acknowledged any more: a sync that succeeds after
one that failed proves nothing (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import Final, NamedTuple, TypeVar, cast

import apsw

from mehdb.errors import (
    DamagedRow,
    DiskFull,
    MehdbError,
    NotNow,
    QueueFull,
    ReadOnly,
    RequestError,
    Stopping,
    StoreFailed,
)
from mehdb.model import Change
from mehdb.store.decision import Outcome, Request
from mehdb.store.feed import Feed
from mehdb.store.log import Log
from mehdb.store.mark import AcknowledgedMark
from mehdb.store.room import Room
from mehdb.store.schema import PAGE_SIZE, is_damage

T = TypeVar("T")

log = logging.getLogger("mehdb.store")

BATCH_WRITES_MAX: Final = 1000  # amortises the sync; a commit of so many still takes only a few milliseconds
BATCH_BYTES_MAX: Final = 4 << 20  # keeps a batch of large values short as well
CHECKPOINT_PAGES: Final = 4096  # 16 MiB of WAL: seldom enough to be cheap, short enough for a restart within a second
SQUEEZE_FACTOR: Final = 2  # of the reserve: the window is let go before a set has to be refused
SQUEEZE_AFTER_S: Final = 60.0  # what was the head so long ago, a follower has that restarts as planned
SQUEEZE_HARD_FACTOR: Final = 1.5
SQUEEZE_HARD_AFTER_S: Final = 2.0  # the same, nearer to the reserve: a follower is back so soon after its leader is
SQUEEZE_EVERY_S: Final = 1.0
CALM_S: Final = 60.0  # without a refusal by the volume, before the next one is told

Task = Callable[[Log], None]
"""Work that is not a client's write, such as applying a page: alone in its transaction."""


class _Job(NamedTuple):
    work: Request | Task | None  # None: the last job
    done: "asyncio.Future[Outcome | None]"
    size_bytes: int


class Writer:
    """A queue of writes and tasks, bounded in bytes, and the thread that works it off in order."""

    def __init__(
        self,
        connection: apsw.Connection,
        changes: Log,
        mark: AcknowledgedMark,
        room: Room,
        vanished: Callable[[], bool],
        *,
        queue_bytes_max: int,
        on_commit: Callable[[], None],
        on_damage: Callable[[DamagedRow], None],
        failure: "asyncio.Future[StoreFailed]",
    ) -> None:
        """Start the thread, which owns *connection*, *changes* and *mark* from here on.

        *vanished* tells whether the files are no longer where they were: what is written to them is lost then.
        *on_commit* is called on the loop after a commit, *on_damage* when compaction met some, which no caller is told;
        *failure* is done when nothing can be written any more.
        """
        self.queue_bytes = 0
        self._failure = failure
        self._queue_bytes_max = queue_bytes_max
        self._on_commit, self._on_damage = on_commit, on_damage
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._log = changes
        self._mark = mark
        self._room = room
        self._vanished = vanished
        self.meta = changes.meta  # what is durable: the thread replaces it after each COMMIT
        self.feed = Feed(changes.meta.head)
        self.short_of_room = False  # as of the last batch
        self._failed: StoreFailed | None = None
        self._closing = False
        self._wal_pages = 0
        self._refused_at_s = -CALM_S  # when the volume last refused something
        self._compaction_error: str | None = None  # why it stopped last, None since it has gone on
        self._heads = deque([(monotonic(), changes.meta.head)], round(SQUEEZE_AFTER_S / SQUEEZE_EVERY_S) + 1)
        connection.set_wal_hook(self._note_wal_pages)
        self._queue: SimpleQueue[_Job] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mehdb-writer", daemon=True)
        self._thread.start()

    # On the event loop.

    @property
    def commits(self) -> int:
        """How many transactions have been committed."""
        return self._log.commits

    @property
    def expiry_due(self) -> bool:
        """Whether something has expired, or may have."""
        return self._log.expiry_due

    @property
    def checkpoint_due(self) -> bool:
        """Whether the WAL is long enough, or takes room that is short: no snapshot may be held until it is moved."""
        return self._wal_pages >= CHECKPOINT_PAGES or (self.short_of_room and self._wal_pages > 0)

    async def write(self, request: Request) -> Outcome:
        """Return the outcome of *request* once it is durable.

        Raises `QueueFull`, `DiskFull`, `StoreFailed` and `Stopping`.
        """
        size_bytes = request.size_bytes
        if self.queue_bytes and self.queue_bytes + size_bytes > self._queue_bytes_max:
            raise QueueFull(f"{self.queue_bytes} bytes wait to be written, nothing of this was: try again in a moment")
        outcome = await self._submit(request, size_bytes)
        assert outcome is not None, "only tasks have no outcome"  # noqa: S101  our own invariant
        return outcome

    async def run(self, task: Task) -> None:
        """Run *task* in the writer's thread, after all that was queued before.

        Raises what it raises, and `Stopping`.
        """
        await self._submit(task, 0)

    async def expire(self) -> None:
        """Delete keys that have outlived their time: one step of it. Raises as `write` does, but for damage."""
        await self.run(self._expire)

    async def close(self) -> None:
        """Finish what is queued, checkpoint, end the thread and close the connection."""
        self._closing = True
        self._queue.put(_Job(None, self._loop.create_future(), 0))
        await asyncio.to_thread(self._thread.join)

    async def _submit(self, work: Request | Task, size_bytes: int) -> Outcome | None:
        if self._closing:  # nobody would come to what is queued behind the last job
            raise Stopping("the store is closed, nothing was written: try again in a moment")
        done: asyncio.Future[Outcome | None] = self._loop.create_future()
        self.queue_bytes += size_bytes
        self._queue.put(_Job(work, done, size_bytes))
        outcome = await done
        if isinstance(outcome, MehdbError):
            raise outcome
        return outcome

    def backlog_changes(self) -> int:
        """Return how many changes compaction may remove."""
        return self._log.backlog_changes(self.meta)

    def _acknowledge(
        self, jobs: Sequence[_Job], outcomes: Sequence[Outcome | None], changes: Sequence[Change], begun_s: float | None
    ) -> None:
        size_bytes = 0
        for job, outcome in zip(jobs, outcomes, strict=True):
            size_bytes += job.size_bytes
            if not job.done.done():  # cancelled: the client has gone, its write has not
                job.done.set_result(outcome)
        self.queue_bytes -= size_bytes
        if changes:
            self.feed.extend(changes, size_bytes)
        if changes and begun_s is not None:
            self._log.tally.commit_seconds.observe(perf_counter() - begun_s)
            self._log.tally.commit_changes.observe(len(changes))
        if self._failed and not self._failure.done():
            self._failure.set_result(self._failed)
        self._on_commit()

    # In the writer's thread.

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failed = StoreFailed(f"the writer ended, restart the node: {type(error).__name__}: {error}")
            self._publish([], [])
            raise

    def _work(self) -> None:
        following: _Job | None = None
        while (job := following or self._next_job()).work is not None:
            batch, following = self._take_batch(job)
            begun_s = perf_counter()
            with_checkpoint = self.checkpoint_due  # since the commit before, so that readers have let go
            self._publish(batch, self._perform(batch), begun_s)
            if with_checkpoint:  # after acknowledging, which need not wait
                self._checkpoint()
        if isinstance(self._move_wal(apsw.SQLITE_CHECKPOINT_TRUNCATE), MehdbError):
            # What the WAL holds is for the restart to verify, not to pass on and delete.
            self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self._connection.close()
        self._mark.close()

    def _next_job(self) -> _Job:
        """Return the next job, and compact while there is none."""
        while True:
            while self._log.compaction_due and self._queue.empty() and self._failed is None:
                with_checkpoint = self.checkpoint_due
                error = self._guarded(self._log.compact)
                if isinstance(error, MehdbError):
                    self._note_compaction_stopped(error)
                    break
                if self._compaction_error is not None:
                    log.info("compaction goes on")
                self._compaction_error = None
                if self._log.meta is not self.meta:
                    self._publish([], [])
                if with_checkpoint:
                    self._checkpoint()
            try:
                return self._queue.get(
                    timeout=SQUEEZE_EVERY_S if self.short_of_room or self._log.compaction_due else None
                )
            except Empty:
                self._look_for_room()

    def _note_compaction_stopped(self, error: MehdbError) -> None:
        if isinstance(error, DamagedRow):
            self._log.compacts = False  # until the store is mended and opened again
            self._loop.call_soon_threadsafe(self._on_damage, error)
        if error.code != self._compaction_error:
            log.warning('compaction stopped code=%s reason="%s"', error.code, error)
            self._compaction_error = error.code

    def _take_batch(self, first: _Job) -> tuple[list[_Job], _Job | None]:
        """Return *first* with the requests that wait behind it, up to the bounds, and the job that ended the batch.

        A task is a batch of its own.
        """
        batch, size_bytes = [first], first.size_bytes
        if not isinstance(first.work, Request):
            return batch, None
        writes = first.work.count
        while writes < BATCH_WRITES_MAX and size_bytes < BATCH_BYTES_MAX:
            try:
                job = self._queue.get_nowait()
            except Empty:
                break
            if not isinstance(job.work, Request):
                return batch, job
            batch.append(job)
            writes += job.work.count
            size_bytes += job.size_bytes
        return batch, None

    def _perform(self, batch: list[_Job]) -> Sequence[Outcome | None]:
        """Return what becomes of each job of *batch*, all of which is durable."""
        outcomes = self._committed(batch)
        if self._failed is None and self._vanished():
            self._failed = StoreFailed("the store was deleted or replaced while it was open: restart the node")
        return [self._failed] * len(batch) if self._failed else outcomes

    def _committed(self, batch: list[_Job]) -> Sequence[Outcome | None]:
        self._look_for_room()
        requests = [job.work for job in batch if isinstance(job.work, Request)]
        if requests:
            return self._without_growth(requests, _no_room()) if self.short_of_room else self._write(requests)
        task = cast("Task", batch[0].work)
        return [self._with_room(lambda: task(self._log), *self._measures())]

    def _write(self, requests: Sequence[Request]) -> Sequence[Outcome]:
        """Commit *requests*; what a full volume or a damaged page is in the way of, without the others' harm."""
        grows = any(request.grows for request in requests)
        outcomes = self._with_room(lambda: self._log.write(requests), *(() if grows else self._measures()))
        if isinstance(outcomes, DiskFull) and grows:
            return self._without_growth(requests, outcomes)
        if isinstance(outcomes, DamagedRow):
            return self._write_around(outcomes, requests)
        return [outcomes] * len(requests) if isinstance(outcomes, MehdbError) else outcomes

    def _expire(self, changes: Log) -> None:
        """Delete what has expired, as clients' writes are made: around damage, which ends no other key's life."""
        due = changes.due()
        for outcome in self._write(due.deletions) if due.deletions else ():
            if isinstance(outcome, DamagedRow):
                self._loop.call_soon_threadsafe(self._on_damage, outcome)
            elif isinstance(outcome, MehdbError) and not isinstance(outcome, RequestError):
                raise outcome  # a key that was deleted, or written anew, is the caller's fault: and there is none
        changes.expired(due)

    def _write_around(self, damage: DamagedRow, requests: Sequence[Request]) -> Sequence[Outcome]:
        """Commit those of *requests* that do not need what is damaged. If only compaction does, that stops."""
        if self._log.compacts:
            outcomes = self._guarded(lambda: self._log.write(requests, compact=False))
            if not isinstance(outcomes, MehdbError):
                self._note_compaction_stopped(damage)
                return outcomes
            if not isinstance(outcomes, DamagedRow):
                return [outcomes] * len(requests)
        return [self._write([request])[0] for request in requests] if len(requests) > 1 else [damage]

    def _without_growth(self, requests: Sequence[Request], refusal: MehdbError) -> Sequence[Outcome]:
        """Commit those of *requests* that only delete. The others get *refusal*."""
        deletions = [request for request in requests if not request.grows]
        outcomes = iter(self._write(deletions) if deletions else ())
        return [refusal if request.grows else next(outcomes) for request in requests]

    def _with_room(self, work: Callable[[], T], *measures: Callable[[], bool]) -> T | MehdbError:
        """Return what *work* returns, or its error. On a full volume it is tried again after each of *measures*."""
        outcome = self._guarded(work)
        for make_room in measures:
            if isinstance(outcome, DiskFull) and self._guarded(make_room) is True:
                outcome = self._guarded(work)
        return outcome

    def _measures(self) -> tuple[Callable[[], bool], ...]:
        """Return what makes room, the dearest last. The ballast may be what moving the WAL lacks."""
        return self._reuse_wal, self._room.drop_ballast, self._reuse_wal

    def _reuse_wal(self) -> bool:
        """Have the WAL written from its start again, rather than grow. Return whether all of it could be moved."""
        moved = self._move_wal(apsw.SQLITE_CHECKPOINT_PASSIVE)
        return not isinstance(moved, MehdbError) and 0 < moved[0] == moved[1]

    def _move_wal(self, mode: int) -> tuple[int, int] | MehdbError:
        """Move what is in the WAL into the file: how many pages were in it and how many were moved, or an error.

        Not where the file has no room for all of it: what is left is worth more to deletions than half of that.
        """

        def move() -> tuple[int, int]:
            if not self._room.may_hold(self._log.owed_bytes()):
                raise _no_room()
            return self._connection.wal_checkpoint(mode=mode)

        return self._guarded(move)

    def _look_for_room(self) -> None:
        """Find out whether the volume is short of room; if so, let go of what the window retains."""
        now_s = monotonic()
        if not self._heads or now_s - self._heads[-1][0] >= SQUEEZE_EVERY_S:
            self._heads.append((now_s, self._log.meta.head))
            if self.short_of_room:
                self._give_wal_back()
        try:
            soon = self._is_short(SQUEEZE_FACTOR)
            hard = soon and self._is_short(SQUEEZE_HARD_FACTOR)
            short = hard and self._is_short()
            if short != self.short_of_room:
                self.short_of_room = short
                if short:
                    log.warning("volume short of room free_bytes=%d", self._room.free_bytes())
                else:
                    log.warning("volume has room free_bytes=%d", self._room.free_bytes())
            if not short:
                self._room.take_ballast()
        except (OSError, apsw.Error):
            return  # what cannot be asked is no reason to fail: the write itself will say
        if soon:
            self._squeeze(SQUEEZE_HARD_AFTER_S if hard else SQUEEZE_AFTER_S)

    def _give_wal_back(self) -> None:
        """Move what is in the WAL into the file, and give back the room that it took. Where it is read, not yet."""
        if not isinstance(self._move_wal(apsw.SQLITE_CHECKPOINT_TRUNCATE), MehdbError):
            self._wal_pages = 0

    def _squeeze(self, age_s: float) -> None:
        """Let go of the window up to what was the head *age_s* ago."""
        while self._heads and monotonic() - self._heads[0][0] >= age_s:
            self._log.squeeze(self._heads.popleft()[1])

    def _is_short(self, factor: float = 1) -> bool:
        """Return whether less than *factor* times the reserve is left."""
        # What is in the WAL takes room a second time when it is moved into the file: without it, neither shrinks.
        return self._room.lacks(-self._wal_pages * PAGE_SIZE, factor) and self._room.lacks(
            self._log.reusable_bytes() - self._log.owed_bytes(), factor
        )

    def _publish(self, batch: list[_Job], outcomes: Sequence[Outcome | None], begun_s: float | None = None) -> None:
        """Show what is durable, then acknowledge it. *begun_s* is when *batch* was begun."""
        if self._log.meta is not self.meta:
            self._mark.move(self._log.meta.position)
            self.meta = self._log.meta
        changes, self._log.committed = self._log.committed, []
        self._loop.call_soon_threadsafe(self._acknowledge, batch, outcomes, changes, begun_s)

    def _checkpoint(self) -> None:
        if not isinstance(self._move_wal(apsw.SQLITE_CHECKPOINT_PASSIVE), DiskFull):
            self._wal_pages = 0  # until the next commit says how many there are
        if self._failed:
            self._publish([], [])  # so that it is known at once, not at the next write

    def _note_wal_pages(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def _refused(self, error: MehdbError) -> MehdbError:
        """Log that the volume refuses what was tried, with *error*: once, and again only after a time without."""
        now_s = monotonic()
        if now_s - self._refused_at_s >= CALM_S:
            log.warning('volume refuses writes code=%s reason="%s"', error.code, error)
        self._refused_at_s = now_s
        return error

    def _guarded(self, work: Callable[[], T]) -> T | MehdbError:
        """Return what *work* returns, or the error that it ended in. Any that may have reached the disk is final."""
        if self._failed:
            return self._failed
        try:
            return work()
        except MehdbError as error:
            return error
        except (apsw.BusyError, apsw.LockedError):  # an operator's sqlite3 holds the database: nothing was tried yet
            return NotNow("another process uses the database, nothing was written: try again in a moment")
        except apsw.FullError:
            return self._refused(
                DiskFull("the volume is full, nothing was written: delete keys, make room or enlarge it")
            )
        except apsw.ReadOnlyError:
            return self._refused(ReadOnly("the volume can only be read, nothing was written: see to the disk"))
        except Exception as error:  # noqa: BLE001  whatever it was, this process can no longer vouch for its writes
            if is_damage(error):  # while reading, and all was rolled back
                return DamagedRow(f"a page that this write needs is damaged, nothing was written ({error})")
            self._failed = StoreFailed(
                f"nothing more is acknowledged, restart the node: {type(error).__name__}: {error}"
            )
            return self._failed


def _no_room() -> DiskFull:
    return DiskFull(
        "less room is left on the volume than the reserve, nothing was written: delete keys, make room or enlarge it"
    )
