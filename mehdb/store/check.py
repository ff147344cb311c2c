"""Every invariant of the schema, verified. See `schema` for what they are.

Reads one consistent state of a store, live or not, and changes nothing. Memory does not grow with the store.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import sleep
from typing import Final, cast

import apsw

from mehdb.errors import DamagedRow, StoreFailed
from mehdb.model import GENESIS, ORIGIN, Chain, Change, Position
from mehdb.store.schema import FILE_NAME, PAGE_SIZE, SCHEMA_VERSION, Meta, is_damage, open_reader, read_meta
from mehdb.store.seal import is_intact, seal
from mehdb.store.threads import OnProgress, unheard

PROBLEMS_MAX: Final = 100  # enough to see the pattern; a wholly damaged store has one for each row
INTEGRITY: Final = f"PRAGMA integrity_check({PROBLEMS_MAX})"
ROWS: Final = """
    SELECT revision, key, value, CAST(content_type AS BLOB), expires_at, crc, chain FROM change ORDER BY revision"""
COMPARISONS: Final = {
    "an entry points to no change, another key's or a deletion": """
        SELECT entry.revision FROM entry LEFT JOIN change USING (revision)
        WHERE change.key IS NOT entry.key OR change.value IS NULL""",
    "an entry points to a change that a newer one of its key supersedes": """
        SELECT change.revision FROM change JOIN entry USING (key) WHERE change.revision > entry.revision""",
    "a key whose newest change is no deletion has no entry": """
        SELECT max(revision) AS newest FROM change
        WHERE NOT EXISTS (SELECT 1 FROM entry WHERE entry.key = change.key) GROUP BY key
        HAVING (SELECT value IS NULL FROM change WHERE revision = newest) = 0""",
}
INTEGRITY_STEPS: Final = 1_000_000  # of SQLite's machine, between two looks whether anybody still waits
YIELD_ROWS: Final = 256  # a thread that gives way so often delays the event loop by a millisecond at most


@dataclass(frozen=True)
class CheckReport:
    """What a check found: where the store is, how much it holds, and a line for each problem, at most 100."""

    position: Position
    changes: int
    keys: int
    problems: tuple[str, ...]


def check_directory(directory: Path, on_progress: OnProgress = unheard) -> CheckReport:
    """Verify every invariant of the store in *directory*, which may be open elsewhere. Raises `StoreFailed`.

    *on_progress* is told how many changes have been read, of how many.
    """
    try:
        connection = open_reader(directory)
        try:
            report = check(connection, on_progress)
        finally:
            connection.close()
    except apsw.Error as error:
        raise StoreFailed(f"the store in {directory} cannot be opened: {error}") from error
    if (directory / FILE_NAME).stat().st_size % PAGE_SIZE:  # which has no checksum that is verified
        report = replace(report, problems=("the file ends within a page", *report.problems))
    return report


def check(connection: apsw.Connection, on_progress: OnProgress = unheard) -> CheckReport:
    """Verify all invariants of the store that *connection* reads, in one read transaction."""
    problems: list[str] = []
    position, changes, keys = Position(), 0, 0
    try:
        connection.execute("BEGIN")
        meta = read_meta(connection)
        position = meta.position
        changes = cast("int", connection.execute("SELECT count(*) FROM change").get)
        keys = cast("int", connection.execute("SELECT count(*) FROM entry").get)
        on_progress(0, changes)
        connection.set_progress_handler(partial(_go_on, on_progress, changes), INTEGRITY_STEPS)
        problems += (
            f"SQLite: {' '.join(str(line).split())}" for (line,) in connection.execute(INTEGRITY) if line != "ok"
        )
        connection.set_progress_handler(None)
        problems += islice(_problems(connection, meta, keys, lambda done: on_progress(done, changes)), PROBLEMS_MAX)
    except (apsw.Error, DamagedRow) as error:
        if not (is_damage(error) or isinstance(error, apsw.SQLError | DamagedRow)):
            raise
        problems.append(f"the rest cannot be read: {error}")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return CheckReport(position, changes, keys, tuple(problems[:PROBLEMS_MAX]))


def _go_on(on_progress: OnProgress, changes: int) -> bool:
    """Have SQLite go on, unless nobody waits for the check any more."""
    on_progress(0, changes)
    return False


def _problems(connection: apsw.Connection, meta: Meta, keys: int, on_progress: Callable[[int], None]) -> Iterator[str]:
    schema = connection.execute("SELECT schema FROM meta").get
    if schema != SCHEMA_VERSION:
        yield f"meta says schema {schema}, the file's header {SCHEMA_VERSION}"
    if keys != meta.keys:
        yield f"meta counts {meta.keys} keys, entry has {keys}"
    changes = connection.execute("SELECT count(*) FROM change").get
    if changes != meta.changes:
        yield f"meta counts {meta.changes} changes, the log has {changes}"
    if meta.history is None and meta.head != ORIGIN:
        yield f"there are changes up to revision {meta.head}, but no history"
    if not ORIGIN <= meta.floor <= meta.head:
        yield f"the floor {meta.floor} is not between 0 and the head {meta.head}"
    yield from _log_problems(connection, meta, on_progress)
    for problem, query in COMPARISONS.items():
        for (revision,) in connection.execute(query):
            yield f"revision {revision}: {problem}"


def _log_problems(connection: apsw.Connection, meta: Meta, on_progress: Callable[[int], None]) -> Iterator[str]:
    """Yield what is wrong with the rows of `change`: their CRC, the chain from each to the next, gaps, the end."""
    revision, chain = ORIGIN, GENESIS
    for number, row in enumerate(connection.execute(ROWS)):
        if number % YIELD_ROWS == 0:
            sleep(0)  # lets go of the interpreter
            on_progress(number)
        row_revision, key, value, content_type, expires_at, row_crc, row_chain = row
        text = None if content_type is None else content_type.decode(errors="replace")
        change = Change(row_revision, key, value, text, expires_at)
        intact = is_intact(change, row_crc)
        if not intact:
            yield f"revision {change.revision}: the CRC does not match the row"
        if change.revision != revision + 1 and change.revision > meta.floor + 1:
            yield f"revision {change.revision}: those from {revision + 1} on are missing, above the floor {meta.floor}"
        elif change.revision == revision + 1 and intact and row_chain != seal(chain, change)[1]:
            yield f"revision {change.revision}: the chain does not follow from the change before"
        revision, chain = change.revision, Chain(row_chain if isinstance(row_chain, bytes) else GENESIS)
    if (revision, chain) != (meta.head, meta.chain):
        yield f"the log ends at revision {revision}, the head is {meta.head}, or their chains differ"
