"""What nodes know and tell each other: changes, pages, positions and status, and their wire form.

Pure values: nothing here touches a disk, a socket or a clock. A page travels as msgpack, everything else as JSON; both
forms are fixed by the field order and names below, so a field is only ever added at the end.
"""

import re
from enum import StrEnum
from typing import Annotated, Final, NewType

import msgspec

from mehdb.errors import BadKey, PeerAnswerInvalid

Revision = NewType("Revision", int)
"""The number of a change: 1, 2, 3 … without gaps. 0 is the position before the first."""

Epoch = NewType("Epoch", int)
"""A counter that each start of a leader raises. 0: no leader has been seen."""

History = NewType("History", str)
"""The random 128-bit ID of one sequence of changes, as 32 lower-case hexadecimal digits."""

Chain = NewType("Chain", bytes)
"""The 128-bit hash over a whole sequence of changes up to one revision, 16 bytes."""

ORIGIN: Final = Revision(0)
GENESIS: Final = Chain(bytes(16))  # the chain at revision 0, the same in every history

KEY_BYTES_MAX: Final = 1024  # fits an index page of the store four times, and any proxy's limit on a URL when encoded
PAGE_BYTES: Final = 1 << 20  # amortises a round trip, stays small beside a follower's memory
VALUE_BYTES_LIMIT: Final = 64 << 20  # the most that `--max-value` may be set to: a value is held in memory whole
PAGE_BYTES_MAX: Final = PAGE_BYTES + VALUE_BYTES_LIMIT + (1 << 16)  # a page ends with the change that fills it
_STORABLE: Final = msgspec.Meta(ge=0, le=2**63 - 1)  # what a column holds: other numbers are the sender's fault


class Role(StrEnum):
    """What a node does: accept writes, or copy the node that does."""

    LEADER = "leader"
    FOLLOWER = "follower"


class State(StrEnum):
    """Where a node is in its life. Only `SERVING` is ready."""

    STARTING = "starting"
    RECOVERING = "recovering"
    SYNCING = "syncing"
    SERVING = "serving"
    DIVERGED = "diverged"
    FAILED = "failed"
    DRAINING = "draining"
    STOPPED = "stopped"


class Change(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One write: a key and its new value, or its deletion (*value* is None).

    *content_type* is what the writer named, None if nothing. *expires_at* is in milliseconds since the Unix epoch, None
    for never.
    """

    revision: Annotated[Revision, _STORABLE]
    key: bytes
    value: bytes | None
    content_type: str | None = None
    expires_at: Annotated[int, _STORABLE] | None = None


class Position(msgspec.Struct, frozen=True):
    """A place in a history. Equal positions mean identical stores. *history* is None for a store that never had one."""

    history: History | None = None
    revision: Revision = ORIGIN
    chain: Chain = GENESIS


class Page(msgspec.Struct, frozen=True, array_like=True):
    """A run of consecutive changes: revisions *after* + 1 and on, without gaps. *chain* is that of the last one."""

    history: History
    epoch: Annotated[Epoch, _STORABLE]
    after: Annotated[Revision, _STORABLE]
    chain: Chain
    changes: tuple[Change, ...]

    @property
    def end(self) -> Position:
        """The position of a store that has applied this page."""
        return Position(self.history, Revision(self.after + len(self.changes)), self.chain)


class NodePosition(msgspec.Struct, frozen=True):
    """The answer to `GET /position`. *chain* is in hexadecimal; *history* is null for a store that never had one."""

    node: str
    role: Role
    state: State
    epoch: Epoch
    history: History | None
    revision: Revision
    chain: str


class FollowerStatus(msgspec.Struct, frozen=True):
    """What a node knows of one that pulls from it: what it holds durably, and how long ago it said so.

    *lag_seconds* is how long ago it held everything that the node had: 0 while it does; null from a node that does not
    tell. A follower that has not asked again counts as holding what it said last.
    """

    node: str
    revision: Revision
    lag_revisions: int
    seen_seconds_ago: float
    lag_seconds: float | None = None


class LeaderStatus(msgspec.Struct, frozen=True):
    """What a follower knows of its leader. Null: never heard from since this process started.

    *problem* says why it is not followed just now; null while it is. *staleness_seconds* is how long ago the follower
    last held everything that the leader then had.
    """

    url: str
    revision: Revision | None
    lag_revisions: int | None
    heard_seconds_ago: float | None
    problem: str | None = None
    staleness_seconds: float | None = None


class NodeStatus(msgspec.Struct, frozen=True):
    """Everything that `GET /status` tells with `Accept: application/json`.

    *reason* says why the node is not ready; *leader* is null on the leader; *followers* lists who pulls from this node.
    *size_bytes* is what the store's files take, 0 from a node that does not tell.
    """

    node: str
    role: Role
    state: State
    ready: bool
    reason: str | None
    history: History | None
    epoch: Epoch
    revision: Revision
    chain: str
    floor: Revision
    keys: int
    queue_bytes: int
    leader: LeaderStatus | None
    followers: tuple[FollowerStatus, ...]
    uptime_seconds: float
    version: str
    commits: int
    free_bytes: int = 0
    damage: str | None = None
    watchers: int = 0
    size_bytes: int = 0


class DrainReport(msgspec.Struct, frozen=True):
    """How far a drain has come: done, or the bytes and requests not yet durable, and the followers behind the head."""

    done: bool
    queue_bytes: int
    writes: int
    missing: tuple[str, ...]


_page_decoder = msgspec.msgpack.Decoder(Page)
_status_decoder = msgspec.json.Decoder(NodeStatus)
_position_decoder = msgspec.json.Decoder(NodePosition)
_drain_decoder = msgspec.json.Decoder(DrainReport)
_page_encoder = msgspec.msgpack.Encoder()
# The last is what comes of arrays in arrays in arrays …, also in a field that is passed over.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode_page(page: Page) -> bytes:
    """Return *page* in msgpack: nested arrays, with the fields of `Page` and `Change` in their order."""
    return _page_encoder.encode(page)


def decode_page(data: bytes) -> Page:
    """Return the page in *data*. Raises `PeerAnswerInvalid` for anything but one whole page of legal keys."""
    try:
        page = _page_decoder.decode(data)
        for change in page.changes:
            checked_key(change.key)
    except (*_UNREADABLE, BadKey) as error:
        raise PeerAnswerInvalid(f"not a page: {error}") from error
    return page


def decode_status(data: bytes) -> NodeStatus:
    """Return the status in *data*, JSON. Raises `PeerAnswerInvalid` for anything else."""
    try:
        return _status_decoder.decode(data)
    except _UNREADABLE as error:
        raise PeerAnswerInvalid(f"not a node's status: {error}") from error


def decode_position(data: bytes) -> NodePosition:
    """Return the node's position in *data*, JSON. Raises `PeerAnswerInvalid` for anything that is none."""
    try:
        position = _position_decoder.decode(data)
    except _UNREADABLE as error:
        raise PeerAnswerInvalid(f"not a node's position: {error}") from error
    if position.history is not None and not is_history(position.history):
        raise PeerAnswerInvalid(f"not a history: {position.history[:100]!r}")
    if not is_history(position.chain):  # the same form
        raise PeerAnswerInvalid(f"not a chain: {position.chain[:100]!r}")
    return position


def decode_drain_report(data: bytes) -> DrainReport:
    """Return the drain report in *data*, JSON. Raises `PeerAnswerInvalid` for anything else."""
    try:
        return _drain_decoder.decode(data)
    except _UNREADABLE as error:
        raise PeerAnswerInvalid(f"not a drain report: {error}") from error


class _ErrorBody(msgspec.Struct):
    message: str


def error_message(body: bytes) -> str:
    """Return the `message` of an error's JSON, or *body* as text if it is none of ours."""
    try:
        return msgspec.json.decode(body, type=_ErrorBody).message
    except _UNREADABLE:
        return body.decode(errors="replace")


def is_history(text: str) -> bool:
    """Return whether *text* is the ID of a history."""
    return re.fullmatch("[0-9a-f]{32}", text) is not None


def checked_key(key: bytes) -> bytes:
    """Return *key* if it is one: 1 to 1024 bytes of UTF-8 without NUL. Raises `BadKey`."""
    if not key:
        raise BadKey("the key is empty: name one after the route, as in /get/KEY")
    if len(key) > KEY_BYTES_MAX:
        raise BadKey(f"the key has {len(key)} bytes: use at most {KEY_BYTES_MAX}")
    if b"\0" in key:
        raise BadKey("the key holds a NUL byte: leave it out")
    if not key.isascii():
        try:
            key.decode()
        except UnicodeDecodeError as error:
            raise BadKey(f"the key is not UTF-8 at byte {error.start}: percent-encode its UTF-8 bytes") from error
    return key
