"""The seals on a change: a CRC that shows damage to its row, and a chain that shows any difference before it.

A page's checksum is made when the page is written, and says nothing of what became of a row before or after, in memory
or in a live WAL; a row's own is verified at each read. Pure functions.
"""

import hashlib
import struct
import zlib

from mehdb.model import Chain, Change

# Revision, bytes of key, of content type (-1: none), of value (-1: deleted), expires_at. All but the key's length are
# signed, so that a damaged row packs too, whatever its columns hold.
_HEAD = struct.Struct("<qIiqq")
CHAIN_BYTES = 16


def _preamble(change: Change) -> bytes:
    """Return all of *change* but its value, with lengths in front, so that no two changes are encoded alike."""
    content_type = None if change.content_type is None else change.content_type.encode()
    head = _HEAD.pack(
        change.revision,
        len(change.key),
        -1 if content_type is None else len(content_type),
        -1 if change.value is None else len(change.value),
        -1 if change.expires_at is None else change.expires_at,
    )
    return head + change.key + (content_type or b"")


def seal(previous: Chain, change: Change) -> tuple[int, Chain]:
    """Return the CRC of *change*, and the chain at it when *previous* is the chain at the change before."""
    preamble, value = _preamble(change), change.value or b""
    digest = hashlib.blake2b(previous, digest_size=CHAIN_BYTES)
    digest.update(preamble)
    digest.update(value)
    return zlib.crc32(value, zlib.crc32(preamble)), Chain(digest.digest())


def crc(change: Change) -> int:
    """Return the CRC of *change*: 32 bits over everything that its row says."""
    return zlib.crc32(change.value or b"", zlib.crc32(_preamble(change)))


def is_intact(change: Change, expected_crc: object) -> bool:
    """Return whether *change* has that CRC. A flipped bit may have made text of bytes: such a change has none."""
    try:
        return crc(change) == expected_crc
    except (TypeError, AttributeError, struct.error):  # columns of other types than were written
        return False
