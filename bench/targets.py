"""What the figures must reach, from the issues. A figure is called by the same name everywhere."""

from typing import Final

from results import Target

TARGETS: Final = {
    "gets": Target("random GETs ÷ a bare aiohttp server", "x", 0.75),
    "put-batching": Target("PUTs over 64 connections ÷ over 1", "x", 6),
    "puts": Target("PUTs ÷ a bare aiohttp server that stores nothing", "x", 0.5),
    "catch-up": Target("a new follower catches up", "changes/s", 50_000),
    "lag": Target("acknowledged → readable on a follower, p99", "ms", 20, at_least=False),
    "batches": Target("keys written in batches of 100", "keys/s", 60_000),
    "batches-to-puts": Target("keys written in batches ÷ single PUTs over 64 connections", "x", 4),
    "several": Target("keys read by 100 at once", "keys/s", 150_000),
    "watch": Target("acknowledged → seen by a watcher, p99", "ms", 20, at_least=False),
    "listing": Target("p99 of GETs beside a listing of all keys ÷ without", "x", 3, at_least=False),
    "cost-gets": Target("random GETs ÷ the version before conditions and TTL", "x", 0.95),
    "cost-puts": Target("PUTs ÷ the version before conditions and TTL", "x", 0.95),
    "cost-metrics": Target("random GETs ÷ the version before durations were measured", "x", 0.97),
    "restart": Target("kill -9 and restart until ready", "s", 1, at_least=False),
    "memory": Target("resident memory under load", "MiB", 300, at_least=False),
}
