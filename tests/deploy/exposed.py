"""What nodes tell Prometheus: the metrics of a leader and of a follower that have worked, with their labels."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from cluster import Cluster, eventually
from mehdb.model import Role, State

PENDING: Final[frozenset[str]] = frozenset()  # metrics that manifests may name before the code has them: none
OF_PROMETHEUS: Final = {"up"}  # Prometheus makes it itself
OF_TARGETS: Final = {"job", "namespace", "pod"}  # what the operator adds to each sample, of what is used here
FIXED: Final = {"role": set(map(str, Role)), "state": set(map(str, State)), "direction": {"sent", "taken"}}


@dataclass
class Exposed:
    """The labels of each metric, by its name as Prometheus stores it."""

    labels: dict[str, set[str]] = field(default_factory=dict)
    values: dict[str, set[str]] = field(default_factory=dict)

    def read(self, text: str) -> None:
        """Take in what a node has answered."""
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.labels.setdefault(sample.name, set()).update(sample.labels)
                for label, value in sample.labels.items():
                    self.values.setdefault(label, set()).add(value)

    def missing(self, metrics: Iterable[str]) -> set[str]:
        """Return those of *metrics* that no node has."""
        return set(metrics) - set(self.labels) - OF_PROMETHEUS - PENDING


def expose(cluster: Cluster) -> Exposed:
    """Have a leader and a follower work, and read what both tell."""
    cluster.start(2)
    leader, follower = cluster.nodes
    assert leader.put("k", b"v").is_success
    cluster.converge()
    for node in cluster.nodes:
        assert node.get("/get/k").is_success
        assert node.get("/status").is_success
    exposed = Exposed()
    eventually(lambda: "mehdb_follower_lag_seconds{" in leader.get("/metrics").text, "the leader to know its follower")
    eventually(lambda: "mehdb_staleness_seconds" in follower.get("/metrics").text, "the follower to know its leader")
    for node in cluster.nodes:
        exposed.read(node.get("/metrics").text)
    return exposed
