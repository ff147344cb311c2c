"""A whole store from another node: downloaded beside this one's, and believed only when all of it has been verified.

It puts nothing in any store's place. Whoever asked for it does, once it is known to be sound.
"""

import asyncio
import logging
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final

from mehdb.errors import Damaged, PeerAnswerInvalid, UnknownSchema
from mehdb.figures import Transfers
from mehdb.peers import Peer
from mehdb.progress import OnStep
from mehdb.store import Meta, in_thread, verify_snapshot

log = logging.getLogger("mehdb.transfer")

DOWNLOAD: Final = "download"  # the step of bytes that arrive
PROGRESS_EVERY_S: Final = 5.0  # a line so often says that a long one goes on, and floods no log


class ProgressLog:
    """Logs how a long transfer goes on, and takes it down in *taken*. Short ones say nothing."""

    def __init__(self, url: str, taken: Transfers) -> None:
        self._url = url
        self._taken = taken
        self._said_at_s = monotonic()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Log a line, if the last one is some time ago."""
        if step == DOWNLOAD:
            self._taken.move(done, total)
        if monotonic() - self._said_at_s >= PROGRESS_EVERY_S:
            self._said_at_s = monotonic()
            log.info("snapshot progress step=%s done=%d of=%d from=%s", step, done, total, self._url)


async def fetch(peer: Peer, path: Path, on_step: OnStep) -> Meta:
    """Download the snapshot of *peer* to *path* and verify all of it. Return its state.

    Raises what `Peer.download` does, and `PeerAnswerInvalid` if what came is damaged. Nothing is left at *path* then.
    """
    try:
        return await _fetch(peer, path, on_step)
    except BaseException as error:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        if isinstance(error, Damaged):
            raise PeerAnswerInvalid(f"the snapshot of {peer.url} is damaged, as that store is: {error}") from error
        if isinstance(error, UnknownSchema):  # of what came, not of this node's own store: no reason to end
            raise PeerAnswerInvalid(f"what {peer.url} sends is no store of this version: {error}") from error
        raise


async def _fetch(peer: Peer, path: Path, say: OnStep) -> Meta:
    announced = await peer.download(path, partial(say, DOWNLOAD))
    meta = await in_thread(partial(verify_snapshot, path), partial(say, "verify"))
    if (meta.history, meta.head) != (announced.history, announced.revision):
        raise PeerAnswerInvalid(f"{peer.url}: the snapshot is not the one that was announced")
    return meta
