"""What the API must know of the node that it speaks for."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from mehdb.model import Epoch, NodeStatus, Position, Role, State
from mehdb.whereabouts import Whereabouts


class Check(NamedTuple):
    """One condition of readiness. *problem* is None when it holds."""

    name: str
    problem: str | None


class NodeView(Protocol):
    """A node, as the API sees it. Everything here is known without I/O, but for what is awaited."""

    @property
    def name(self) -> str:
        """The host name."""
        ...

    @property
    def role(self) -> Role:
        """Leader or follower."""
        ...

    @property
    def state(self) -> State:
        """Where it is in its life."""
        ...

    @property
    def leader_at(self) -> Whereabouts | None:
        """Where nodes reach the leader; None on the leader."""
        ...

    @property
    def redirect_url(self) -> str | None:
        """The leader's base URL for clients; None on the leader."""
        ...

    @property
    def leader_leaves(self) -> bool:
        """Whether this node follows one that is about to stop: a redirect there would lead nowhere."""
        ...

    @property
    def closing(self) -> bool:
        """Whether every answer ends its connection, as the node is about to stop."""
        ...

    def writing(self) -> AbstractContextManager[Callable[[], None]]:
        """Count a write while it is under way. Raises `NotNow` if none is taken now: nothing was written.

        What it gives is to be called once the body has come: it raises `NotNow` if this node no longer leads as it did.
        """
        ...

    def watching(self) -> AbstractContextManager[None]:
        """Count a watcher while it watches."""
        ...

    def require_leading(self) -> None:
        """Raise `Recovering` on a leader that does not lead yet: nobody may copy what it holds."""
        ...

    async def confirm_leading(self) -> None:
        """Return once it is certain that this node still led after this was called, as far as its peers know.

        Raises `Recovering` and `NotConfirmedLeader`.
        """
        ...

    def staleness_s(self) -> float | None:
        """Return how long ago this node last held everything that its leader then had; None if it is not known.

        0 on the leader.
        """
        ...

    def note_follower(self, position: Position, epoch: Epoch, address: str | None) -> None:
        """Take note of a node at *address* (an IP) whose store is at *position*: it may hold what this one lacks.

        *epoch* is the highest that it has seen: it would not obey a lower one.
        """
        ...

    def checks(self) -> tuple[Check, ...]:
        """Return what must hold for the node to be ready."""
        ...

    def status(self) -> NodeStatus:
        """Return everything that the node tells about itself."""
        ...
