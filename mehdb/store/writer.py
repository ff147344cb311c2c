"""The one thread that writes: it takes all that waits, commits it in one transaction, and only then acknowledges.

The invariant it owns (promise 1): a caller gets its outcome after the COMMIT that made it durable has returned. Once a
write or a sync has failed for any reason but a full disk, nothing is acknowledged any more: a sync that succeeds after
one that failed proves nothing (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Final, NamedTuple, TypeVar, cast

import apsw

from mehdb.errors import DiskFull, MehdbError, NotNow, QueueFull, Stopping, StoreFailed
from mehdb.store.log import Log, Outcome, Write

T = TypeVar("T")

BATCH_WRITES_MAX: Final = 1000  # amortises the sync; a commit of so many still takes only a few milliseconds
BATCH_BYTES_MAX: Final = 4 << 20  # keeps a batch of large values short as well
WRITE_OVERHEAD_BYTES: Final = 256  # about what a queued write occupies beside its key and value
CHECKPOINT_PAGES: Final = 4096  # 16 MiB of WAL: seldom enough to be cheap, short enough for a restart within a second

Task = Callable[[Log], None]
"""Work that is not a client's write, such as applying a page: alone in its transaction."""


class _Job(NamedTuple):
    work: Write | Task | None  # None: the last job
    done: "asyncio.Future[Outcome | None]"
    size_bytes: int


class Writer:
    """A queue of writes and tasks, bounded in bytes, and the thread that works it off in order."""

    def __init__(self, connection: apsw.Connection, queue_bytes_max: int, on_commit: Callable[[], None]) -> None:
        """Start the thread, which owns *connection* from here on. *on_commit* is called on the loop after a commit."""
        self.queue_bytes = 0
        self.failure: asyncio.Future[StoreFailed] = asyncio.get_running_loop().create_future()
        self._queue_bytes_max = queue_bytes_max
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._log = Log(connection)
        self.meta = self._log.meta  # what is durable: the thread replaces it after each COMMIT
        self._failed: StoreFailed | None = None
        self._closing = False
        self._wal_pages = 0
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
    def checkpoint_due(self) -> bool:
        """Whether the WAL is long enough: no snapshot may be held until the next commit has checkpointed it."""
        return self._wal_pages >= CHECKPOINT_PAGES

    async def write(self, write: Write) -> Outcome:
        """Return the outcome of *write* once it is durable.

        Raises `QueueFull`, `DiskFull`, `StoreFailed` and `Stopping`.
        """
        size_bytes = len(write.key) + len(write.value or b"") + WRITE_OVERHEAD_BYTES
        if self.queue_bytes and self.queue_bytes + size_bytes > self._queue_bytes_max:
            raise QueueFull(f"{self.queue_bytes} bytes wait to be written, nothing of this was: try again in a moment")
        outcome = await self._submit(write, size_bytes)
        assert outcome is not None, "only tasks have no outcome"  # noqa: S101  our own invariant
        return outcome

    async def run(self, task: Task) -> None:
        """Run *task* in the writer's thread, after all that was queued before.

        Raises what it raises, and `Stopping`.
        """
        await self._submit(task, 0)

    async def close(self) -> None:
        """Finish what is queued, checkpoint, end the thread and close the connection."""
        self._closing = True
        self._queue.put(_Job(None, self._loop.create_future(), 0))
        await asyncio.to_thread(self._thread.join)

    async def _submit(self, work: Write | Task, size_bytes: int) -> Outcome | None:
        if self._closing:  # nobody would come to what is queued behind the last job
            raise Stopping("the store is closed, nothing was written: try again in a moment")
        done: asyncio.Future[Outcome | None] = self._loop.create_future()
        self.queue_bytes += size_bytes
        self._queue.put(_Job(work, done, size_bytes))
        outcome = await done
        if isinstance(outcome, MehdbError):
            raise outcome
        return outcome

    def _acknowledge(self, jobs: Sequence[_Job], outcomes: Sequence[Outcome | None]) -> None:
        for job, outcome in zip(jobs, outcomes, strict=True):
            self.queue_bytes -= job.size_bytes
            if not job.done.done():  # cancelled: the client has gone, its write has not
                job.done.set_result(outcome)
        if self._failed and not self.failure.done():
            self.failure.set_result(self._failed)
        self._on_commit()

    # In the writer's thread.

    def _run(self) -> None:
        job = self._queue.get()
        while job.work is not None:
            due = self.checkpoint_due
            batch, following = self._take_batch(job)
            self._publish(batch, self._perform(batch))
            if due:  # since the commit before, so that readers have let go; after acknowledging, which need not wait
                self._guarded(self._checkpoint)
                self._publish([], [])  # so that a failure is known at once, not at the next write
            job = following or self._queue.get()
        if self._failed is None:
            self._guarded(lambda: self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE))
        self._connection.close()

    def _take_batch(self, first: _Job) -> tuple[list[_Job], _Job | None]:
        """Return *first* with the writes that wait behind it, up to the bounds, and the job that ended the batch.

        A task is a batch of its own.
        """
        batch, size_bytes = [first], first.size_bytes
        if not isinstance(first.work, Write):
            return batch, None
        while len(batch) < BATCH_WRITES_MAX and size_bytes < BATCH_BYTES_MAX:
            try:
                job = self._queue.get_nowait()
            except Empty:
                break
            if not isinstance(job.work, Write):
                return batch, job
            batch.append(job)
            size_bytes += job.size_bytes
        return batch, None

    def _perform(self, batch: list[_Job]) -> Sequence[Outcome | None]:
        writes = [job.work for job in batch if isinstance(job.work, Write)]
        if writes:
            outcomes = self._guarded(lambda: self._log.write(writes))
            return [outcomes] * len(batch) if isinstance(outcomes, MehdbError) else outcomes
        task = cast("Task", batch[0].work)
        return [self._guarded(lambda: task(self._log))]

    def _publish(self, batch: list[_Job], outcomes: Sequence[Outcome | None]) -> None:
        """Show what is durable, then acknowledge it."""
        self.meta = self._log.meta
        self._loop.call_soon_threadsafe(self._acknowledge, batch, outcomes)

    def _checkpoint(self) -> None:
        self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        self._wal_pages = 0  # until the next commit says how many there are

    def _note_wal_pages(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

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
            return DiskFull("the volume is full, nothing was written: make room or enlarge it")
        except Exception as error:  # noqa: BLE001  whatever it was, this process can no longer vouch for its writes
            self._failed = StoreFailed(
                f"nothing more is acknowledged, restart the node: {type(error).__name__}: {error}"
            )
            return self._failed
