"""Every error that mehdb raises on purpose, in one tree.

    MehdbError
    ├── RequestError        the caller's fault: the answer says what to send instead
    │   ├── MalformedRequest, BadKey, BadParameter, BadBody  400
    │   ├── Unauthorized                                   401
    │   ├── Forbidden                                      403
    │   ├── KeyNotFound, RouteNotFound                     404
    │   ├── MethodNotAllowed                               405
    │   ├── BodyTooSlow, HeadTooSlow, TooSlow              408
    │   ├── PreconditionFailed                             412
    │   ├── ValueTooLarge, BatchTooLarge, AnswerTooLarge   413
    │   └── ExpectationFailed                              417
    ├── NotNow              nobody's fault: the same request may succeed later
    │   ├── QueueFull, NotSynced, Draining, Stopping, Recovering, StoreAway, ReadOnly, SnapshotBusy  503
    │   ├── NotLeader, LeaderUnreachable, NotConfirmedLeader, TooStale  503
    │   └── NotReady                                       500 (what `/status?level=full` has always answered)
    ├── NotInTime           what was asked for may still come true; how far it has come is in the answer
    │   └── NotReached, NotConfirmed, OutcomeUnknown       504
    ├── PositionError       two nodes' positions do not fit together
    │   ├── Diverged                                       409
    │   └── Compacted                                      410
    ├── PeerError           another node's fault, or the network's
    │   └── PeerUnreachable (─ PeerAbsent, NotRunning), PeerAnswerInvalid, PeerRefused, SnapshotRefused, StaleEpoch
    ├── StoreError          this disk's fault
    │   ├── DirectoryInUse, CommandAtWork, UnsafeSqlite, UnknownSchema, Damaged  before anything is opened or changed
    │   ├── DamagedRow                                     500
    │   ├── StoreFailed                                    500
    │   └── DiskFull                                       507
    ├── Refused             an operator's command would do harm, or nothing
    └── SettingsError       the operator's fault: all that is wrong at once

Each class has a stable `code` (clients may match on it), the HTTP `status` it is answered with, and a message that says
what to do next. Only `mehdb.api` turns them into answers.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar


class MehdbError(Exception):
    """The root: catch it to catch everything that mehdb raises on purpose.

    *details* are for programs: the answer's JSON has them beside the message.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retry_after_s: ClassVar[int | None] = None
    etag: ClassVar[bool] = False
    """Whether the `revision` in *details* is that of the key asked for, and goes into `ETag`."""

    def __init__(self, message: str = "", **details: object) -> None:
        super().__init__(message)
        self.details: Mapping[str, object] = details


class RequestError(MehdbError):
    """The request cannot be answered as it was sent."""

    code = "bad_request"
    status = 400


class MalformedRequest(RequestError):
    """The request is no HTTP, or not by the letter."""

    code = "malformed_request"


class BadKey(RequestError):
    """The key is empty, too long, not UTF-8, holds NUL, or was not percent-encoded properly."""

    code = "bad_key"


class BadParameter(RequestError):
    """A query parameter is unknown, repeated or has a value that it cannot have."""

    code = "bad_parameter"


class BadBody(RequestError):
    """The body ended early, its framing was broken, or it is not what the route takes."""

    code = "bad_body"


class Unauthorized(RequestError):
    """The request bears no token, or one that is not known (RFC 6750)."""

    code = "unauthorized"
    status = 401


class Forbidden(RequestError):
    """The token is known, and lacks the right: details have `needs`, and `prefixes` where it is for other keys."""

    code = "forbidden"
    status = 403


class KeyNotFound(RequestError):
    """No such key is live."""

    code = "key_not_found"
    status = 404


class RouteNotFound(RequestError):
    """No such route."""

    code = "route_not_found"
    status = 404


class MethodNotAllowed(RequestError):
    """The route exists, but not with this method. *allowed* goes into `Allow`."""

    code = "method_not_allowed"
    status = 405

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class BodyTooSlow(RequestError):
    """The body stalled, or came slower than the server waits for."""

    code = "body_too_slow"
    status = 408


class HeadTooSlow(RequestError):
    """The head of a request was begun, and took longer than the server waits for."""

    code = "head_too_slow"
    status = 408


class TooSlow(RequestError):
    """A watcher does not read what it is sent."""

    code = "too_slow"
    status = 408


class PreconditionFailed(RequestError):
    """The key is not at the revision that the request asked for. Nothing was written.

    Details: `revision`, where the key is (0: there is none); or `failed`, the checks of a batch, each with its own.
    """

    code = "precondition_failed"
    status = 412
    etag = True


class ValueTooLarge(RequestError):
    """The value is larger than this node takes."""

    code = "value_too_large"
    status = 413


class BatchTooLarge(RequestError):
    """The request has more operations, keys or bytes than one may have."""

    code = "batch_too_large"
    status = 413


class AnswerTooLarge(RequestError):
    """What was asked for at once is more than one answer holds."""

    code = "answer_too_large"
    status = 413


class ExpectationFailed(RequestError):
    """An `Expect` other than `100-continue` (RFC 9110, 10.1.1)."""

    code = "expectation_failed"
    status = 417


class NotNow(MehdbError):
    """The same request may succeed later."""

    code = "not_now"
    status = 503
    retry_after_s = 1


class QueueFull(NotNow):
    """More bytes wait to be written than the queue may hold."""

    code = "queue_full"


class NotSynced(NotNow):
    """This follower holds nothing yet, so it cannot know whether a key exists."""

    code = "not_synced"


class Draining(NotNow):
    """The node takes no new writes, as it is about to stop."""

    code = "draining"
    retry_after_s = 2


class Stopping(NotNow):
    """The store is closed for good: the process ends."""

    code = "stopping"


class Recovering(NotNow):
    """The leader does not lead yet: it is finding out what its peers hold."""

    code = "recovering"


class StoreAway(NotNow):
    """The store is not open: the node opens it, or puts another in its place."""

    code = "store_away"


class ReadOnly(NotNow):
    """The volume can only be read."""

    code = "read_only"
    retry_after_s = 10


class SnapshotBusy(NotNow):
    """Other snapshots are under way, one after the other."""

    code = "snapshot_busy"
    retry_after_s = 10


class NotLeader(NotNow):
    """Another node passed the request on to this one, which does not lead either."""

    code = "not_leader"


class LeaderUnreachable(NotNow):
    """The request could not be passed on: nothing reached the leader."""

    code = "leader_unreachable"


class NotConfirmedLeader(NotNow):
    """This node leads, but cannot exclude that another one does by now."""

    code = "not_confirmed_leader"


class TooStale(NotNow):
    """This follower last held everything that the leader had longer ago than the reader accepts."""

    code = "too_stale"


class NotReady(NotNow):
    """The node is not ready. The Go mehdb answered 500 here, and probes of its manifest count on it."""

    code = "not_ready"
    status = 500


class NotInTime(MehdbError):
    """The time that the client gave, or this node takes, was too short."""

    code = "not_in_time"
    status = 504


class NotReached(NotInTime):
    """This node does not hold the revision yet that the reader must see."""

    code = "not_reached"


class NotConfirmed(NotInTime):
    """The write is on the leader, and fewer followers hold it than were asked for."""

    code = "not_confirmed"
    etag = True


class OutcomeUnknown(NotInTime):
    """The request was passed on to the leader, and no whole answer came back."""

    code = "outcome_unknown"


class PositionError(MehdbError):
    """A position does not lie on the sequence that a store holds."""


class Diverged(PositionError):
    """Another history, ahead, or another chain at that revision."""

    code = "diverged"
    status = 409


class Compacted(PositionError):
    """The changes after that revision are partly gone: behind the floor."""

    code = "compacted"
    status = 410


class PeerError(MehdbError):
    """Another node, or the way to it, failed."""

    code = "peer"
    status = 503


class PeerUnreachable(PeerError):
    """No answer within the time limits, or a refusal that may pass."""

    code = "peer_unreachable"


class PeerAbsent(PeerUnreachable):
    """Nobody is there: the name does not resolve, or the address does not accept a connection."""

    code = "peer_absent"


class NotRunning(PeerUnreachable):
    """No node runs on that data directory."""

    code = "not_running"


class PeerAnswerInvalid(PeerError):
    """An answer that no healthy node gives: nothing of it was applied."""

    code = "peer_answer_invalid"


class PeerRefused(PeerError):
    """What a client asked of a node, it refused; the message is the node's. *refusal* is its answer's JSON."""

    code = "peer_refused"

    def __init__(self, message: str, status: int, refusal: Mapping[str, object]) -> None:
        super().__init__(message)
        self.answered = status
        self.refusal = refusal


class SnapshotRefused(PeerError):
    """The other node cannot give a snapshot, for want of room, say: asked again at once, it could not either."""

    code = "snapshot_refused"


class StaleEpoch(PeerError):
    """A page from a leader of an epoch lower than one already seen: never obeyed."""

    code = "stale_epoch"


class StoreError(MehdbError):
    """The data directory, or the disk under it."""

    code = "store"


class DirectoryInUse(StoreError):
    """Another process, *holder*, has the lock of the data directory."""

    code = "directory_in_use"

    def __init__(self, directory: object, holder: str) -> None:
        super().__init__(
            f"{directory} is in use by process {holder}: stop that one, or give this node a --data-dir of its own"
        )
        self.holder = holder


class CommandAtWork(StoreError):
    """An operator's command, *holder*, has the files of the data directory."""

    code = "command_at_work"

    def __init__(self, directory: object, holder: str) -> None:
        super().__init__(f"a command, process {holder}, is at work on {directory}: start again when it has ended")
        self.holder = holder


class UnsafeSqlite(StoreError):
    """The SQLite library has a bug that loses data in WAL mode."""

    code = "unsafe_sqlite"


class UnknownSchema(StoreError):
    """The file was written by another program or a newer mehdb. It is not touched."""

    code = "unknown_schema"


class Damaged(StoreError):
    """The store as a whole cannot be trusted. It is left as it is.

    *missing* is how many acknowledged changes are known to be gone, None if that cannot be told.
    """

    code = "damaged"

    def __init__(self, reason: str, missing: int | None = None) -> None:
        super().__init__(reason)
        self.missing = missing


class DamagedRow(StoreError):
    """A row, or a page of the file, does not match its checksum. What it holds is never served."""

    code = "damaged_row"


class StoreFailed(StoreError):
    """A write or a sync failed: this process acknowledges nothing more."""

    code = "store_failed"


class DiskFull(StoreError):
    """The volume has no room. Nothing of the batch was written."""

    code = "disk_full"
    status = 507


class Refused(MehdbError):
    """The command would do harm, or nothing. The message says what to do instead."""

    code = "refused"


class SettingsError(MehdbError):
    """One or more settings are wrong. *problems* has a line each."""

    code = "settings"

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
