"""Which routes there are, who answers them, and what right each needs."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import web

from mehdb.api.access import Anyone, Gate, Need
from mehdb.api.acks import Acks
from mehdb.api.batch import BatchRoutes
from mehdb.api.consistency import Reads
from mehdb.api.data import DataRoutes
from mehdb.api.debug import DebugRoutes
from mehdb.api.forward import ToLeader
from mehdb.api.listing import ListingRoutes
from mehdb.api.node import NodeView
from mehdb.api.replicate import Followers, ReplicationRoutes
from mehdb.api.requests import Target
from mehdb.api.snapshot import SnapshotRoutes
from mehdb.api.status import StatusRoutes
from mehdb.api.watch import WatchRoutes
from mehdb.metrics import Metrics
from mehdb.settings import Settings
from mehdb.store import Store
from mehdb.tokens import Right

Handler = Callable[[web.BaseRequest, Target, str], Awaitable[web.StreamResponse]]
"""Answers a request, given its target and the rest of the raw path behind the route's prefix."""


class Route(NamedTuple):
    """One route. A path that ends in a slash is a prefix: what follows it is the key."""

    needs: Need
    handlers: dict[str, Handler]
    """By method."""


Routes = dict[str, Route]


def all_routes(
    node: NodeView,
    store: Store,
    settings: Settings,
    followers: Followers,
    metrics: Metrics,
    gate: Gate,
    to_leader: ToLeader,
) -> Routes:
    """Return every route of a node."""
    bodies, reads, acks = to_leader.bodies, Reads(node, store, to_leader), Acks(store, followers, settings)
    data = DataRoutes(node, store, bodies, to_leader, reads, acks)
    batches = BatchRoutes(node, store, bodies, to_leader, acks)
    listings = ListingRoutes(store, bodies, reads)
    watches = WatchRoutes(node, store)
    replication = ReplicationRoutes(node, store, followers, settings.snapshot_lag)
    snapshots = SnapshotRoutes(node, store)
    debug = DebugRoutes()
    return {
        "/get/": Route(Right.READ, _read(data.get)),
        "/set/": Route(Right.WRITE, {"PUT": data.set}),
        "/delete/": Route(Right.WRITE, {"DELETE": data.delete}),
        "/batch": Route(Right.WRITE, {"POST": batches.batch}),
        "/get": Route(Right.READ, {"POST": listings.several}),
        "/keys": Route(Right.READ, _read(listings.keys)),
        "/watch": Route(Right.READ, {"GET": watches.watch}),
        "/history/": Route(Right.READ, _read(listings.history)),
        **_probes(status := StatusRoutes(node, metrics, gate)),
        "/metrics": Route(Anyone.KNOWN, _read(status.metrics)),
        "/position": Route(Right.REPLICATE, _read(replication.position)),
        "/replicate": Route(Right.REPLICATE, {"GET": replication.replicate}),
        "/snapshot": Route(Right.REPLICATE, {"GET": snapshots.snapshot}),
        "/debug/tasks": Route(Right.ADMIN, {"GET": debug.tasks}),
        "/debug/threads": Route(Right.ADMIN, {"GET": debug.threads}),
    }


def probe_routes(node: NodeView, metrics: Metrics) -> Routes:
    """Return those of the health port."""
    return _probes(StatusRoutes(node, metrics, None))


def _probes(status: StatusRoutes) -> Routes:
    return {
        "/status": Route(Anyone.PROBE, _read(status.status)),
        "/livez": Route(Anyone.PROBE, _read(status.livez)),
        "/readyz": Route(Anyone.PROBE, _read(status.readyz)),
    }


def _read(handler: Handler) -> dict[str, Handler]:
    return {"GET": handler, "HEAD": handler}
