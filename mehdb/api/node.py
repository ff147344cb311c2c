"""What the API must know of the node that it speaks for."""

from typing import NamedTuple, Protocol

from mehdb.model import NodeStatus, Role, State


class Check(NamedTuple):
    """One condition of readiness. *problem* is None when it holds."""

    name: str
    problem: str | None


class NodeView(Protocol):
    """A node, as the API sees it. Everything here is known without I/O."""

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
    def redirect_url(self) -> str | None:
        """The leader's base URL for clients; None on the leader."""
        ...

    def checks(self) -> tuple[Check, ...]:
        """Return what must hold for the node to be ready."""
        ...

    def status(self) -> NodeStatus:
        """Return everything that the node tells about itself."""
        ...
