"""Single keys and values: /set/KEY, /get/KEY and /delete/KEY."""

import re
from typing import Final

from aiohttp import hdrs, web

from mehdb.api.access import require_valid
from mehdb.api.acks import Acks, Wanted
from mehdb.api.answers import TEXT, Answer
from mehdb.api.bodies import Bodies
from mehdb.api.conditions import is_unchanged, write_conditions
from mehdb.api.consistency import Reads
from mehdb.api.forward import ToLeader
from mehdb.api.lines import ttl_s
from mehdb.api.node import NodeView
from mehdb.api.requests import Parameters, Target, decode_key, revision_number
from mehdb.errors import BadParameter, DamagedRow, KeyNotFound, NotSynced
from mehdb.model import ORIGIN, Change, Revision, Role
from mehdb.store import Store, Write, value_at

BYTES: Final = "application/octet-stream"
CONTENT_TYPE: Final = re.compile(r"[\x20-\x7e]{1,255}")
WRITTEN: Final = b"WRITE completed"  # what the Go mehdb answered, to the byte
TTL_S_MAX: Final = 10 * 366 * 86400  # what is to live longer needs no end
REPAIR: Final = {
    Role.LEADER: "To repair the leader, GET the key from a follower and PUT it anew, or take a follower's whole store "
    "with `mehdb adopt --from URL`",
    Role.FOLLOWER: "This follower mends itself with a snapshot of the leader's",
}


class DataRoutes:
    """The routes that read and write one key."""

    def __init__(
        self,
        node: NodeView,
        store: Store,
        bodies: Bodies,
        to_leader: ToLeader,
        reads: Reads,
        acks: Acks,
    ) -> None:
        self._node = node
        self._store = store
        self._bodies = bodies
        self._to_leader = to_leader
        self._reads = reads
        self._acks = acks

    async def get(self, request: web.BaseRequest, target: Target, rest: str) -> Answer:
        """Answer with the value of a key, as it was written."""
        key, revision = decode_key(rest), None
        if target.query:
            parameters = Parameters(target.query)
            revision = parameters.take("revision", revision_number, None)
            if answer := await self._reads.admit(request, target, parameters, revision or ORIGIN):
                return answer
        try:
            change = await (self._store.get(key) if revision is None else self._get_at(key, revision))
        except DamagedRow as error:
            raise DamagedRow(f"{error}. {REPAIR[self._node.role]}") from error
        if change is None or change.value is None:
            refuse_if_empty(self._store)
            raise KeyNotFound("no such key on this node" if revision is None else f"no such key at revision {revision}")
        headers = f'ETag: "{change.revision}"\r\nX-Content-Type-Options: nosniff\r\n'
        if change.expires_at is not None and revision is None:
            headers += f"Mehdb-TTL: {ttl_s(change.expires_at, self._store.now_ms()):.3f}\r\n"
        if hdrs.IF_NONE_MATCH in request.headers and is_unchanged(request.headers, change.revision):
            return Answer(status=304, headers=headers, revision=change.revision)
        return Answer(change.value, change.content_type or BYTES, headers=headers, revision=change.revision)

    async def _get_at(self, key: bytes, revision: Revision) -> Change | None:
        """Return the change that *key* was live with at *revision*."""
        return await self._store.scan(lambda reader: value_at(reader, key, revision))

    async def set(self, request: web.BaseRequest, target: Target, rest: str) -> Answer:
        """Store the body as the value of a key."""
        key, parameters = decode_key(rest), Parameters(target.query)
        if answer := await self._to_leader.write(request, target, parameters):
            return answer
        wanted, ttl_ms = self._acks.wanted(parameters), parameters.take("ttl", ttl, None)
        parameters.finish()
        content_type = request.headers.get(hdrs.CONTENT_TYPE) or None
        if content_type is not None and not CONTENT_TYPE.fullmatch(content_type):
            raise BadParameter("the Content-Type must be 1 to 255 characters of ASCII: nothing was written")
        conditions = write_conditions(request.headers)
        with self._node.writing() as recheck:
            value = await self._bodies.read(request, self._bodies.value_bytes_max)
            recheck()
            require_valid(request)
            return await self._write(Write(key, value, content_type, ttl_ms, conditions), wanted)

    async def delete(self, request: web.BaseRequest, target: Target, rest: str) -> Answer:
        """Delete a key."""
        key, parameters = decode_key(rest), Parameters(target.query)
        if answer := await self._to_leader.write(request, target, parameters):
            return answer
        wanted = self._acks.wanted(parameters)
        parameters.finish()
        conditions = write_conditions(request.headers)
        with self._node.writing():
            return await self._write(Write(key, None, conditions=conditions), wanted)

    async def _write(self, write: Write, wanted: Wanted) -> Answer:
        revision = await self._store.write(write)
        await self._acks.confirm(wanted, revision)
        return Answer(WRITTEN, TEXT, headers=f'ETag: "{revision}"\r\n', revision=revision)


def refuse_if_empty(store: Store) -> None:
    """Raise `NotSynced` for a node that cannot know whether there is anything."""
    if store.meta.history is None:
        raise NotSynced("this node holds nothing yet, so it cannot know: ask another node, or again in a moment")


def ttl(text: str) -> int:
    """Return the milliseconds that *text*, decimal seconds, stands for. Raises `ValueError`."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?", text) and 0 < float(text) <= TTL_S_MAX:
        return round(float(text) * 1000)
    raise ValueError(f"must be a number of seconds from 0.001 to {TTL_S_MAX}")
