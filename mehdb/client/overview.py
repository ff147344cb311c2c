"""The state of a whole cluster: what each node says of itself, and what the leader says of those that were not asked.

It asks and lays side by side; it takes no node's word for another's readiness.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from mehdb.client.http import Client, Request
from mehdb.credentials import Credentials
from mehdb.errors import MehdbError
from mehdb.model import NodeStatus, Role, decode_status

AT_ONCE_MAX: Final = 16
NOT_ASKED: Final = "not asked: no URL given"
UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
COLUMNS: Final = ("name", "role", "ready", "revision", "lag", "keys", "size", "last contact")
UNKNOWN: Final = "-"


class Row(msgspec.Struct, frozen=True):
    """One node. What is not known is null. *problem* is why it is not ready, or was not asked, or did not answer.

    *last_contact_seconds* is how long ago a follower heard its leader, or, of one not asked, the leader heard it.
    """

    name: str
    url: str | None
    asked: bool
    role: Role | None = None
    ready: bool | None = None
    revision: int | None = None
    lag_revisions: int | None = None
    keys: int | None = None
    size_bytes: int | None = None
    last_contact_seconds: float | None = None
    problem: str | None = None

    def cells(self) -> tuple[str, ...]:
        """Return what `COLUMNS` names."""
        contact = UNKNOWN if self.last_contact_seconds is None else f"{self.last_contact_seconds:.1f} s ago"
        size = UNKNOWN if self.size_bytes is None else human_size(self.size_bytes)
        ready = UNKNOWN if self.ready is None else "yes" if self.ready else "no"
        numbers = (
            UNKNOWN if number is None else str(number) for number in (self.revision, self.lag_revisions, self.keys)
        )
        return (self.name, self.role or UNKNOWN, ready, *numbers, size, contact)


class Overview(msgspec.Struct, frozen=True):
    """A cluster. *healthy*: every node that was asked is ready, and exactly one of them leads."""

    healthy: bool
    nodes: tuple[Row, ...]


def overview(urls: Sequence[str], credentials: Credentials, timeout_s: float) -> Overview:
    """Ask the nodes at *urls*, and the leaders that they follow, within twice *timeout_s*."""
    answers = _ask_all(urls, credentials, timeout_s)
    followed = {answer.leader.url for answer in answers.values() if isinstance(answer, NodeStatus) and answer.leader}
    leads = any(isinstance(answer, NodeStatus) and answer.role is Role.LEADER for answer in answers.values())
    for url, answer in _ask_all(sorted(followed - set(answers)), credentials, timeout_s).items():
        # Followers may know the leader by a name that means nothing here: no matter, if it was found by another.
        if isinstance(answer, NodeStatus) or not leads:
            answers[url] = answer
    rows: list[Row] = []
    said: dict[tuple[object, ...], str] = {}
    for url, answer in answers.items():
        if isinstance(answer, str):
            rows.append(Row(url, url, asked=True, ready=False, problem=answer))
        elif said.setdefault((answer.node, answer.role, answer.history, answer.epoch), url) == url:  # two URLs of one
            rows.append(_row(url, answer))
    known = {row.name for row in rows}
    for answer in answers.values():
        if isinstance(answer, NodeStatus) and answer.role is Role.LEADER:
            rows += _not_asked(answer, known)
            known.update(follower.node for follower in answer.followers)
    asked = [row for row in rows if row.asked]
    leaders = [row for row in asked if row.role is Role.LEADER]
    return Overview(len(leaders) == 1 and all(row.ready for row in asked), tuple(rows))


def human_size(size_bytes: int) -> str:
    """Return *size_bytes* as a person reads it."""
    size, unit = float(size_bytes), 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {UNITS[unit]}" if unit == 0 else f"{size:.1f} {UNITS[unit]}"


def _ask_all(urls: Sequence[str], credentials: Credentials, timeout_s: float) -> dict[str, NodeStatus | str]:
    """Return the status of the node at each of *urls*, or why there is none."""

    def ask(url: str) -> NodeStatus | str:
        try:
            with Client((url,), credentials, timeout_s) as client:
                answer = client.ask(Request("GET", "/status", headers={"Accept": "application/json"}))
            return decode_status(answer.body) if answer.status == 200 else str(answer.refused())
        except MehdbError as error:
            return str(error)

    if not urls:
        return {}
    with ThreadPoolExecutor(min(len(urls), AT_ONCE_MAX)) as pool:
        return dict(zip(urls, pool.map(ask, urls), strict=True))


def _row(url: str, status: NodeStatus) -> Row:
    leader = status.leader
    return Row(
        name=status.node,
        url=url,
        asked=True,
        role=status.role,
        ready=status.ready,
        revision=status.revision,
        lag_revisions=leader.lag_revisions if leader else None,
        keys=status.keys,
        size_bytes=status.size_bytes or None,
        last_contact_seconds=leader.heard_seconds_ago if leader else None,
        problem=status.reason,
    )


def _not_asked(leader: NodeStatus, known: set[str]) -> list[Row]:
    """Return those that the *leader* alone knows of."""
    return [
        Row(
            name=follower.node,
            url=None,
            asked=False,
            role=Role.FOLLOWER,
            revision=follower.revision,
            lag_revisions=follower.lag_revisions,
            last_contact_seconds=follower.seen_seconds_ago,
            problem=NOT_ASKED,
        )
        for follower in leader.followers
        if follower.node not in known
    ]
