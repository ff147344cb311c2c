"""A consistent copy of the whole store: GET /snapshot, for other nodes and for backups.

One at a time: each takes as much room on the volume as the store itself.
"""

import asyncio
import base64
from typing import Final

from aiohttp import web

from mehdb.api.answers import FileAnswer, heard
from mehdb.api.node import NodeView
from mehdb.api.requests import Target, no_parameters
from mehdb.errors import NotSynced, SnapshotBusy
from mehdb.store import Store

TURN_TIMEOUT_S: Final = 1.0  # a client has all of a snapshot a moment before the node knows that it was sent


class SnapshotRoutes:
    """The route that sends the store."""

    def __init__(self, node: NodeView, store: Store) -> None:
        self._node = node
        self._store = store
        self._turn = asyncio.Lock()

    async def snapshot(self, request: web.BaseRequest, target: Target, _rest: str) -> FileAnswer:
        """Answer with a snapshot: a SQLite database, with its digest and its position in the headers."""
        no_parameters(target.query)
        sent = self._store.sent
        self._node.require_leading()
        if self._store.meta.history is None:
            raise NotSynced("this node holds nothing yet: ask another one")
        try:  # not for long: who asks has pages to go on with, or asks again
            async with asyncio.timeout(TURN_TIMEOUT_S):
                await self._turn.acquire()
        except TimeoutError as error:
            raise SnapshotBusy("another snapshot is being sent, one at a time: try again in a moment") from error
        try:
            snapshot = await heard(request, self._store.snapshot())
            sent.move(0, snapshot.size_bytes)
        except BaseException:
            self._turn.release()
            raise

        def on_sent(done_bytes: int) -> None:
            sent.move(done_bytes, snapshot.size_bytes)

        def close() -> None:
            sent.completed += sent.done_bytes == snapshot.size_bytes
            sent.move(0, 0)
            snapshot.path.unlink(missing_ok=True)
            self._turn.release()

        meta = snapshot.meta
        headers = (
            f"Repr-Digest: sha-256=:{base64.b64encode(snapshot.digest).decode()}:\r\n"
            f"Mehdb-Snapshot-History: {meta.history}\r\nMehdb-Snapshot-Revision: {meta.head}\r\n"
            f"Mehdb-Snapshot-Chain: {meta.chain.hex()}\r\n"
        )
        return FileAnswer(snapshot.path, snapshot.size_bytes, headers, on_sent, close)
