"""Every invariant of the schema, verified. See `schema` for what they are.

Reads one consistent state of a store, live or not, and changes nothing. Memory does not grow with the store.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, cast

import apsw

from mehdb.model import GENESIS, ORIGIN, Chain, Change
from mehdb.store.schema import Meta, read_meta
from mehdb.store.seal import seal

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
        SELECT max(revision) AS newest FROM change GROUP BY key
        HAVING (SELECT value IS NULL FROM change WHERE revision = newest) = 0
           AND change.key NOT IN (SELECT key FROM entry)""",
}


@dataclass(frozen=True)
class CheckReport:
    """What a check found: how many changes and live keys it read, and a line for each problem, at most 100."""

    changes: int
    keys: int
    problems: tuple[str, ...]


def check(connection: apsw.Connection) -> CheckReport:
    """Verify all invariants of the store that *connection* reads, in one read transaction."""
    problems: list[str] = []
    changes = keys = 0
    connection.execute("BEGIN")
    try:
        meta = read_meta(connection)
        problems += (f"SQLite: {line}" for (line,) in connection.execute(INTEGRITY) if line != "ok")
        changes = cast("int", connection.execute("SELECT count(*) FROM change").get)
        keys = cast("int", connection.execute("SELECT count(*) FROM entry").get)
        problems += islice(_problems(connection, meta, keys), PROBLEMS_MAX)
    except apsw.CorruptError as error:
        problems.append(f"SQLite: the rest cannot be read: {error}")
    finally:
        connection.execute("ROLLBACK")
    return CheckReport(changes, keys, tuple(problems[:PROBLEMS_MAX]))


def _problems(connection: apsw.Connection, meta: Meta, keys: int) -> Iterator[str]:
    if keys != meta.keys:
        yield f"meta counts {meta.keys} keys, entry has {keys}"
    if meta.history is None and meta.head != ORIGIN:
        yield f"there are changes up to revision {meta.head}, but no history"
    if not ORIGIN <= meta.floor <= meta.head:
        yield f"the floor {meta.floor} is not between 0 and the head {meta.head}"
    yield from _log_problems(connection, meta)
    for problem, query in COMPARISONS.items():
        for (revision,) in connection.execute(query):
            yield f"revision {revision}: {problem}"


def _log_problems(connection: apsw.Connection, meta: Meta) -> Iterator[str]:
    """Yield what is wrong with the rows of `change`: their CRC, the chain from each to the next, gaps, the end."""
    revision, chain = ORIGIN, GENESIS
    for row_revision, key, value, content_type, expires_at, row_crc, row_chain in connection.execute(ROWS):
        text = None if content_type is None else content_type.decode(errors="replace")
        change = Change(row_revision, key, value, text, expires_at)
        expected_crc, expected_chain = seal(chain, change)
        if row_crc != expected_crc:
            yield f"revision {change.revision}: the CRC does not match the row"
        if change.revision != revision + 1 and change.revision > meta.floor + 1:
            yield f"revision {change.revision}: those from {revision + 1} on are missing, above the floor {meta.floor}"
        elif change.revision == revision + 1 and row_chain != expected_chain:
            yield f"revision {change.revision}: the chain does not follow from the change before"
        revision, chain = change.revision, Chain(row_chain)
    if (revision, chain) != (meta.head, meta.chain):
        yield f"the log ends at revision {revision}, the head is {meta.head}, or their chains differ"
