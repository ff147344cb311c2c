"""What a store has to give to another one at some position: the next page, or why there is none."""

from mehdb.errors import Compacted, Diverged
from mehdb.model import ORIGIN, PAGE_BYTES, Chain, Page, Position
from mehdb.store.reader import Reader
from mehdb.store.schema import Meta


def is_at_head(position: Position, meta: Meta) -> bool:
    """Return whether *position* is the newest of a store with *meta*, which has nothing to give then.

    Raises `Diverged` if it is no place in its history, and `Compacted` if it is behind the floor.
    """
    if position.history not in (None, meta.history) and position.revision > ORIGIN:
        raise Diverged(f"history {position.history} is another than {meta.history}")
    if position.revision > meta.head:
        raise Diverged(f"revision {position.revision} is ahead of the head {meta.head}")
    if position.revision < meta.floor:
        raise Compacted(f"revision {position.revision} is behind the floor {meta.floor}", floor=meta.floor)
    if position.revision == meta.head:
        _compare(position, meta.chain)
    return position.revision == meta.head


def page_after(reader: Reader, position: Position, meta: Meta) -> Page | None:
    """Return the changes after *position*, about a page of them, up to the head of *meta*.

    Raises `Diverged` if the chain there is another, `Compacted` and `DamagedRow`.
    """
    _compare(position, reader.chain(position.revision))
    return reader.page(position.revision, meta, PAGE_BYTES)


def _compare(position: Position, chain: Chain) -> None:
    if position.chain != chain:
        raise Diverged(f"the chain at revision {position.revision} is another: the changes before it differ")
