"""What pods are in: names that do not resolve before the pod is ready, signals from the first moment on."""

import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster import DEADLINE_S, Cluster, Node, clean_environment, eventually, free_port

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
    return Pod(name, port, directory / name, environment, address=address)


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


def heeds(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has said what a signal does to it."""
    status = Path("/proc", str(pid), "status").read_text()
    masks = re.findall(r"^Sig(?:Ign|Cgt):\t([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_signals_count_before_a_node_is_loaded(tmp_path: Path) -> None:
    """A container's first process has no default handlers: the kernel would pass over a SIGTERM that comes early."""
    with subprocess.Popen(
        [sys.executable, "-m", "mehdb", "serve", "--host", "early", "--port", str(free_port()), "--data-dir", tmp_path],
        env=clean_environment(), stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        eventually(lambda: heeds(process.pid, signal.SIGUSR1), "the process to heed signals")
        process.send_signal(signal.SIGUSR1)
        eventually(lambda: heeds(process.pid, signal.SIGTERM), "the process to heed signals")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
