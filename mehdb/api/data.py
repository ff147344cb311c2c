"""Keys and values: /set/KEY, /get/KEY, /delete/KEY and /keys."""

import re
from typing import Final
from urllib.parse import quote, urlencode

from aiohttp import web

from mehdb.api.acks import Acks, Wanted
from mehdb.api.answers import TEXT, Answer, json_answer
from mehdb.api.consistency import Reads
from mehdb.api.forward import ToLeader
from mehdb.api.node import NodeView
from mehdb.api.requests import BodyBudget, Parameters, Target, decode_key, read_body
from mehdb.errors import BadParameter, DamagedRow, KeyNotFound, NotSynced
from mehdb.model import Role
from mehdb.settings import Settings, whole_number
from mehdb.store import Store, Write

KEYS_DEFAULT: Final = 1000  # one screenful for a person, one round trip for a program
KEYS_MAX: Final = 10_000  # at 1 KiB a key, 10 MiB in memory
BYTES: Final = "application/octet-stream"
CONTENT_TYPE: Final = re.compile(r"[\x20-\x7e]{1,255}")
WRITTEN: Final = b"WRITE completed"  # what the Go mehdb answered, to the byte
REPAIR: Final = {
    Role.LEADER: "To repair the leader, GET the key from a follower and PUT it anew, or take a follower's whole store "
    "with `mehdb adopt --from URL`",
    Role.FOLLOWER: "This follower mends itself with a snapshot of the leader's",
}


class DataRoutes:
    """The routes that read and write."""

    def __init__(
        self,
        node: NodeView,
        store: Store,
        settings: Settings,
        *,
        arriving: BodyBudget,
        to_leader: ToLeader,
        reads: Reads,
        acks: Acks,
    ) -> None:
        self._node = node
        self._store = store
        self._settings = settings
        self._arriving = arriving
        self._to_leader = to_leader
        self._reads = reads
        self._acks = acks

    async def get(self, request: web.BaseRequest, target: Target, rest: str) -> Answer:
        """Answer with the value of a key, as it was written."""
        key = decode_key(rest)
        if target.query and (answer := await self._reads.admit(request, target, Parameters(target.query))):
            return answer
        try:
            change = await self._store.get(key)
        except DamagedRow as error:
            raise DamagedRow(f"{error}. {REPAIR[self._node.role]}") from error
        if change is None or change.value is None:
            self._refuse_if_empty()
            raise KeyNotFound("no such key on this node")
        return Answer(
            change.value,
            change.content_type or BYTES,
            headers=f'ETag: "{change.revision}"\r\nX-Content-Type-Options: nosniff\r\n',
            revision=change.revision,
        )

    async def set(self, request: web.BaseRequest, target: Target, rest: str) -> Answer:
        """Store the body as the value of a key."""
        key = decode_key(rest)
        parameters = Parameters(target.query)
        if answer := await self._to_leader.write(request, target, parameters):
            return answer
        wanted = self._acks.wanted(parameters)
        parameters.finish()
        content_type = request.headers.get("Content-Type") or None
        if content_type is not None and not CONTENT_TYPE.fullmatch(content_type):
            raise BadParameter("the Content-Type must be 1 to 255 characters of ASCII: nothing was written")
        settings = self._settings
        with self._node.writing() as recheck:
            value = await read_body(request, settings.max_value, settings.body_timeout, self._arriving)
            recheck()
            return await self._write(Write(key, value, content_type), wanted)

    async def delete(self, request: web.BaseRequest, target: Target, rest: str) -> Answer:
        """Delete a key."""
        key = decode_key(rest)
        parameters = Parameters(target.query)
        if answer := await self._to_leader.write(request, target, parameters):
            return answer
        wanted = self._acks.wanted(parameters)
        parameters.finish()
        with self._node.writing():
            return await self._write(Write(key, None), wanted)

    async def keys(self, request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """List live keys in byte order: one page, and a link to the next."""
        parameters = Parameters(target.query)
        prefix = parameters.take("prefix", str, "")
        after = parameters.take("after", str, "")
        limit = parameters.take("limit", whole_number(1, KEYS_MAX), KEYS_DEFAULT)
        if answer := await self._reads.admit(request, target, parameters):
            return answer
        self._refuse_if_empty()
        keys = [key.decode() for key in await self._store.keys(prefix.encode(), after.encode(), limit + 1)]
        if len(keys) <= limit:
            return json_answer(keys)
        keys.pop()
        cursor = {"prefix": prefix, "after": keys[-1], "limit": str(limit)}
        query = urlencode({name: value for name, value in cursor.items() if value}, quote_via=quote)
        return json_answer(keys, headers=f'Link: </keys?{query}>; rel="next"\r\n')

    async def _write(self, write: Write, wanted: Wanted) -> Answer:
        revision = await self._store.write(write)
        await self._acks.confirm(wanted, revision)
        return Answer(WRITTEN, TEXT, headers=f'ETag: "{revision}"\r\n', revision=revision)

    def _refuse_if_empty(self) -> None:
        if self._store.meta.history is None:
            raise NotSynced("this node holds nothing yet, so it cannot know: ask another node, or again in a moment")
