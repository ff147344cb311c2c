"""Many writes at once: POST /batch. All of them are made, in consecutive revisions and one commit, or none."""

import base64
from typing import Annotated, Final

import msgspec
from aiohttp import hdrs, web
from msgspec import UNSET, UnsetType

from mehdb.api import lines
from mehdb.api.access import require
from mehdb.api.acks import Acks
from mehdb.api.answers import NDJSON, Answer
from mehdb.api.bodies import Bodies
from mehdb.api.data import CONTENT_TYPE, TTL_S_MAX
from mehdb.api.forward import ToLeader
from mehdb.api.node import NodeView
from mehdb.api.requests import REVISION_MAX, Parameters, Target
from mehdb.errors import BadBody, BadKey, BadParameter, BatchTooLarge, ValueTooLarge
from mehdb.model import Revision, checked_key
from mehdb.store import Batch, Check, Store, Write
from mehdb.tokens import Right

OPERATIONS_MAX: Final = 1000  # one commit's worth: more would keep other writers waiting
BATCH_BYTES_MAX: Final = 8 << 20
TOO_LARGE: Final = f"a batch may have {BATCH_BYTES_MAX} bytes: split it; nothing was written"


class Set(msgspec.Struct, tag_field="op", tag="set", forbid_unknown_fields=True, gc=False):
    """A line that sets a key. *ttl* is in seconds."""

    key: str
    value: str | UnsetType = UNSET
    base64: str | UnsetType = UNSET
    content_type: str | UnsetType | None = UNSET
    ttl: Annotated[float, msgspec.Meta(ge=0.001, le=TTL_S_MAX)] | UnsetType | None = UNSET


class Delete(msgspec.Struct, tag_field="op", tag="delete", forbid_unknown_fields=True, gc=False):
    """A line that deletes a key."""

    key: str


class CheckLine(msgspec.Struct, tag_field="op", tag="check", forbid_unknown_fields=True, gc=False):
    """A line that makes the batch fail unless the key is at *revision*; 0: unless there is none."""

    key: str
    revision: Annotated[int, msgspec.Meta(ge=0, le=REVISION_MAX)]


class Outcome(msgspec.Struct, gc=False):
    """What became of a line: the revision that it was given, or, of a check, that it found; 0: nothing was there."""

    op: str
    key: str
    revision: Revision


Operation = Set | Delete | CheckLine
NAMES: Final[dict[type[Operation], str]] = {Set: "set", Delete: "delete", CheckLine: "check"}
UNREADABLE: Final = (msgspec.DecodeError, UnicodeError, RecursionError)  # the last: arrays in arrays in arrays …
_decoder = msgspec.json.Decoder(Operation)


class BatchRoutes:
    """The route for batches."""

    def __init__(self, node: NodeView, store: Store, bodies: Bodies, to_leader: ToLeader, acks: Acks) -> None:
        self._node = node
        self._store = store
        self._bodies = bodies
        self._to_leader = to_leader
        self._acks = acks

    async def batch(self, request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Do what the lines of the body say, and answer with a line for each."""
        parameters = Parameters(target.query)
        if answer := await self._to_leader.write(request, target, parameters):
            return answer
        wanted = self._acks.wanted(parameters)
        parameters.finish()
        if hdrs.IF_MATCH in request.headers or hdrs.IF_NONE_MATCH in request.headers:
            raise BadParameter("a batch has lines of its own for conditions ('check'): nothing was written")
        with self._node.writing() as recheck:
            body = await self._bodies.read(request, BATCH_BYTES_MAX, TOO_LARGE)
            operations = _operations(body)
            batch = Batch(tuple(self._operation(number, line) for number, line in enumerate(operations, 1)))
            for key in batch.keys:  # of a check as well: it tells where a key is
                require(request, Right.WRITE, key)
            recheck()
            revisions = await self._store.write_batch(batch)
            answer = _answer(operations, revisions)
            await self._acks.confirm(wanted, Revision(answer.revision))
        return answer

    def _operation(self, number: int, line: Operation) -> Write | Check:
        """Return what *line* asks of the store. Raises `BadKey`, `BadBody` and `ValueTooLarge`."""
        try:
            key = checked_key(line.key.encode())
        except (BadKey, UnicodeEncodeError) as error:
            raise BadKey(f"operation {number}: {error}: nothing was written") from error
        if isinstance(line, CheckLine):
            return Check(key, Revision(line.revision))
        if isinstance(line, Delete):
            return Write(key, None)
        value, most = _value(number, line), self._bodies.value_bytes_max
        if len(value) > most:
            raise ValueTooLarge(f"operation {number}: a value may have {most} bytes (--max-value): nothing was written")
        content_type = line.content_type or None
        if content_type is not None and not CONTENT_TYPE.fullmatch(content_type):
            raise BadBody(f"operation {number}: content_type must be 1 to 255 characters of ASCII: nothing written")
        return Write(key, value, content_type, round(line.ttl * 1000) if line.ttl else None)


def _answer(operations: list[Operation], revisions: tuple[Revision, ...]) -> Answer:
    """Return the outcome of each operation as a line, and the last revision that was given."""
    outcomes = [
        Outcome(NAMES[type(line)], line.key, revision) for line, revision in zip(operations, revisions, strict=True)
    ]
    last = max((outcome.revision for outcome in outcomes if outcome.op != "check"), default=0)
    headers = f'ETag: "{last}"\r\n' if last else ""
    return Answer(lines.encode_lines(outcomes), NDJSON, headers=headers, revision=last)


def _operations(body: bytes) -> list[Operation]:
    """Return the lines of *body*. Raises `BadBody` and `BatchTooLarge`."""
    if max(body.count(b"\n"), body.count(b'"op"')) > OPERATIONS_MAX:  # before all of them are read
        raise BatchTooLarge(f"more than {OPERATIONS_MAX} lines or operations: split them; nothing was written")
    try:
        operations = _decoder.decode_lines(body)
    except UNREADABLE as error:
        raise BadBody(
            f'the body must be lines such as {{"op":"set","key":"a","value":"b"}}, {{"op":"delete","key":"a"}} or '
            f'{{"op":"check","key":"a","revision":7}}: nothing was written ({_located(body, error)})'
        ) from error
    if not 1 <= len(operations) <= OPERATIONS_MAX:
        kind = BatchTooLarge if operations else BadBody
        raise kind(f"{len(operations)} operations: send 1 to {OPERATIONS_MAX} at once; nothing was written")
    return operations


def _located(body: bytes, error: Exception) -> str:
    """Return *error* with the number of the operation that it is in."""
    for number, line in enumerate(filter(bytes.strip, body.splitlines()), 1):
        try:
            _decoder.decode(line)
        except UNREADABLE as first:
            return f"operation {number}: {first}"
    return str(error)


def _value(number: int, line: Set) -> bytes:
    if isinstance(line.value, UnsetType) == isinstance(line.base64, UnsetType):
        raise BadBody(f"operation {number}: give either value or base64: nothing was written")
    if not isinstance(line.value, UnsetType):
        return line.value.encode()
    try:
        return base64.b64decode(str(line.base64), validate=True)
    except ValueError as error:  # not only binascii.Error: what is no ASCII is refused before it is looked at
        raise BadBody(f"operation {number}: base64 is none ({error}): nothing was written") from error
