"""Watching: each change once and in order, through lost connections and from whichever node answers."""

from collections.abc import Iterator
from typing import Final

from mehdb.client.http import Client, Patience, Stream
from mehdb.client.lines import decode_event, query
from mehdb.errors import PeerRefused, PeerUnreachable

PASSING: Final = frozenset({"stopping", "too_slow", "store_away", "queue_full"})
"""Why a node may end a stream that the next one goes on with."""


class Watch:
    """The changes of keys that begin with *prefix*, after the revision *after* (None: from now on).

    *after* is where it has got to: everything up to there has been yielded.
    """

    def __init__(self, client: Client, prefix: str, after: int | None) -> None:
        self.after = after
        self._client = client
        self._prefix = prefix
        self._history = ""

    def lines(self) -> Iterator[bytes]:
        """Yield a line of JSON for each change, without end. Raises `PeerUnreachable` and `PeerRefused`."""
        patience: Patience | None = None
        while True:
            problem = "the stream ended"
            try:
                with self._client.stream(self._target()) as stream:
                    for line in self._new(stream):
                        patience = None
                        if line:
                            yield line
            except PeerUnreachable as error:
                problem = str(error)
            except PeerRefused as error:
                raise self._over(error) from error
            patience = patience or Patience(self._client.timeout_s)
            if not patience.again():
                raise PeerUnreachable(f"no node can be watched ({problem}): {self._go_on()}")

    def _new(self, stream: Stream) -> Iterator[bytes]:
        """Yield each line that tells something new; an empty one for those that only show that somebody is there."""
        self._history = self._history or stream.headers.get("Mehdb-History", "")
        for line in stream.lines():
            event = decode_event(line)
            if event.op == "error":
                if event.error in PASSING:
                    return
                raise PeerRefused(event.message, 200, {"error": event.error})
            is_new = self.after is None or event.revision > self.after
            yield line if is_new and event.op != "heartbeat" else b""
            if is_new:
                self.after = event.revision

    def _target(self) -> str:
        after = "" if self.after is None else str(self.after)
        # Revisions mean something in one history only: a node of another one must refuse, not go on.
        return query("/watch", {"prefix": self._prefix, "after": after, "history": self._history if after else ""})

    def _over(self, error: PeerRefused) -> PeerRefused:
        """Return *error* with what to do about it."""
        if error.refusal.get("error") not in ("compacted", "diverged"):
            return error
        advice = "read what is there with `mehdb keys` or `mehdb export`, and watch from now on, without --after"
        return PeerRefused(f"{error}: {advice}", error.answered, error.refusal)

    def _go_on(self) -> str:
        return "see `mehdb status`" if self.after is None else f"go on later with --after {self.after}"
