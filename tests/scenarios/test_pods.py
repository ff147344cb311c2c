"""A StatefulSet that starts anew, where a pod's name does not resolve before the pod is ready."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster, Node, eventually, free_port

LEADER, FOLLOWER = "127.0.0.2", "127.0.0.1"  # whoever connects to the first, comes from the second


@dataclass
class Pod(Node):
    """A node at an address of its own, on the port of all pods."""

    address: str = FOLLOWER

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"


def pod(directory: Path, name: str, address: str, port: int) -> Pod:
    environment = {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1", "MEHDB_HOST": name, "MEHDB_PORT": str(port), "MEHDB_LISTEN": address,
        "MEHDB_PEERS": f"http://{LEADER}:{port}", "MEHDB_DATADIR": str(directory / name), "MEHDB_LAME_DUCK": "0",
    }  # fmt: skip
    return Pod(name, port, directory / name, environment, None, address)


def test_a_leader_that_lost_its_volume_finds_a_follower_that_has_no_name_yet(cluster: Cluster, tmp_path: Path) -> None:
    """Pods start in order: the leader is up, alone and empty, before the follower that has its data starts."""
    port = free_port()
    leader, follower = pod(tmp_path, "mehdb-0", LEADER, port), pod(tmp_path, "mehdb-1", FOLLOWER, port)
    cluster.nodes += [leader, follower]
    leader.start()
    follower.start()
    leader.put("k", b"v")
    before = cluster.converge()
    follower.stop()
    leader.stop()
    shutil.rmtree(leader.volume)
    leader.start()
    assert leader.get("/get/k").status_code == 404, "nobody is there whom it could ask"
    follower.start(ready=False)
    eventually(lambda: leader.get("/get/k").content == b"v", "the leader to take what the follower holds")
    eventually(follower.ready, "the follower to be ready")
    assert cluster.converge() == before
    leader.put("k", b"w")
    cluster.converge()
