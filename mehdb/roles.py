"""Who leads, where the leader is, and at which epoch: from the host name alone.

Everything else asks a `Leadership`, so that an election can take the place of `OrdinalLeadership` without touching the
store, the API or the replication. This module opens no connection and no file.
"""

from dataclasses import dataclass
from typing import Final, Protocol

from mehdb.model import Epoch, Role
from mehdb.settings import LOCAL_LEADER_URL, ORDINAL, Settings

ORDINALS_MAX: Final = 100  # more pods than one leader could feed


class Leadership(Protocol):
    """What a node must know about who leads."""

    @property
    def role(self) -> Role:
        """This node's role."""
        ...

    @property
    def leader_url(self) -> str | None:
        """The leader's base URL as nodes reach it; None on the leader itself."""
        ...

    @property
    def redirect_url(self) -> str | None:
        """The leader's base URL as clients reach it; None on the leader itself."""
        ...

    def next_epoch(self, seen: Epoch) -> Epoch:
        """Return the epoch at which this node starts to lead, when *seen* is the highest that its store knows."""
        ...


@dataclass(frozen=True)
class OrdinalLeadership:
    """One ordinal leads, for good: the StatefulSet guarantees at most one pod of each."""

    role: Role
    leader_url: str | None = None
    redirect_url: str | None = None

    def next_epoch(self, seen: Epoch) -> Epoch:
        """Each start of the leader is a new epoch: it fences what an earlier process of the same pod may still send."""
        return Epoch(seen + 1)


def assign(settings: Settings) -> OrdinalLeadership:
    """Return the role that *settings* give this node. A host name without an ordinal is a single leader."""
    if settings.ordinal == settings.leader_ordinal or (settings.ordinal is None and not settings.local):
        return OrdinalLeadership(Role.LEADER)
    leader_url = _leader_url(settings)
    redirect_url = (settings.advertise_url or leader_url).replace("{ordinal}", str(settings.leader_ordinal))
    return OrdinalLeadership(Role.FOLLOWER, leader_url, redirect_url)


def peer_urls(settings: Settings) -> tuple[str, ...]:
    """Return the base URLs of the other nodes that there may be, by ordinal. Most pods among them do not exist."""
    if settings.peers:
        return tuple(url for ordinal, url in enumerate(settings.peers) if ordinal != (settings.ordinal or 0))
    if settings.fqdn is None or settings.ordinal is None:
        return ()
    ordinals = range(settings.leader_ordinal, settings.leader_ordinal + ORDINALS_MAX)
    return tuple(pod_url(settings, ordinal) for ordinal in ordinals if ordinal != settings.ordinal)


def _leader_url(settings: Settings) -> str:
    if settings.local:
        return LOCAL_LEADER_URL
    if settings.peers:
        return settings.peers[settings.leader_ordinal]
    return pod_url(settings, settings.leader_ordinal)


def pod_url(settings: Settings, ordinal: int) -> str:
    """Return the base URL of the pod with *ordinal* in this pod's StatefulSet.

    The name is the pod's own with another ordinal: `mehdb-1.mehdb.NS.svc.cluster.local` → `mehdb-0.mehdb.NS.svc…`.
    `MEHDB_SERVICE` and `MEHDB_NAMESPACE` replace its second and third label.
    """
    return address_url(settings, ".".join([pod_name(settings, ordinal), *_service_labels(settings)]))


def pod_name(settings: Settings, ordinal: int) -> str:
    """Return what the pod with *ordinal* in this pod's StatefulSet is called."""
    match = ORDINAL.fullmatch(settings.host)
    assert match, "settings are refused when a pod has no ordinal"  # noqa: S101  our own invariant
    return f"{match['name']}-{ordinal}"


def peers_service(settings: Settings) -> str | None:
    """Return the DNS name of the Service that lists all pods, ready or not; None where there is none to be asked.

    It is in the namespace and domain of the pods' names: `mehdb-peers.NS.svc.cluster.local`.
    """
    if not settings.in_kubernetes or settings.peers or settings.local:
        return None
    service, *domain = _service_labels(settings)
    return ".".join([settings.peers_service or f"{service}-peers", *domain])


def address_url(settings: Settings, address: str) -> str:
    """Return the base URL of a node of this cluster at *address*, a name or an IP: all listen on one port."""
    return f"{settings.scheme}://{f'[{address}]' if ':' in address else address}:{settings.port}"


def _service_labels(settings: Settings) -> list[str]:
    """Return the governing Service, the namespace and the domain, as labels."""
    labels = (settings.fqdn or "").split(".")[1:]
    # A pod's resolver appends the cluster's domain, so `svc` is enough where the pod does not know more.
    service, namespace, *domain = labels if len(labels) > 1 else ["", "", "svc"]
    return [settings.service or service, settings.namespace or namespace, *domain]
