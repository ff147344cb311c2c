"""Pods as a cluster has them: an address and a name each, in a network of their own with a DNS server.

Their names resolve while they are ready, and the Service `mehdb-peers` lists all that run, as Kubernetes has it. The
network is this thread's own, and each process has an `/etc/resolv.conf` and `/etc/hosts` of its own: that needs root.
"""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from cluster import Cluster, Node
from dns_server import DnsServer
from volumes import unavailable

DOMAIN: Final = "shop.svc.cluster.local"
DNS: Final = "10.77.0.2"
PORT: Final = 9876
LOOK_EVERY_S: Final = 0.05
PROBE_TIMEOUT_S: Final = 3.0  # as in the manifest
# What the kubelet writes.
RESOLV: Final = f"nameserver {DNS}\nsearch {DOMAIN} svc.cluster.local cluster.local\noptions ndots:5 "
OWN_NAMES: Final = 'mount --bind "$1" /etc/resolv.conf && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
CLONE_NEWNET: Final = 0x40000000
SIOCSIFADDR, SIOCSIFNETMASK, SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8916, 0x891C, 0x8913, 0x8914
IFF_UP: Final = 1


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Have this thread, and what it starts, in a network of its own, in which all of 10.77.0.0/24 is at hand."""
    if os.geteuid() != 0:
        unavailable("only root can have a network of its own")
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net", "rb") as before:  # noqa: PTH123  a handle, not a file
        if libc.unshare(CLONE_NEWNET) != 0:
            unavailable(f"no network can be made here: {os.strerror(ctypes.get_errno())}")
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                _set_up(control)
            yield
        finally:
            assert libc.setns(before.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


def _set_up(control: socket.socket) -> None:
    flags = fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", struct.unpack("16sh14x", flags)[1] | IFF_UP))
    for request, value in ((SIOCSIFADDR, "10.77.0.1"), (SIOCSIFNETMASK, "255.255.255.0")):
        address = struct.pack("H2x4s8x", socket.AF_INET, socket.inet_aton(value))
        fcntl.ioctl(control, request, struct.pack("16s16s", b"lo:1", address))


@dataclass
class Pod(Node):
    """A node at an address of its own."""

    address: str = ""

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}:{self.port}"

    @property
    def dns_name(self) -> str:
        return f"{self.name}.mehdb.{DOMAIN}"


@dataclass
class Pods:
    """The pods of one StatefulSet, and what DNS says of them: kept up in a thread, as the cluster does."""

    directory: Path
    dns: DnsServer
    cluster: Cluster
    hidden: set[str] = field(default_factory=set)
    """Names that a resolver still takes for absent, or of pods that shall have none."""
    frozen: dict[str, list[str]] = field(default_factory=dict)
    """What a resolver still takes for an answer, whatever has become of the pods."""
    stale: list[str] = field(default_factory=list)
    """Addresses that are listed and are no pod's."""
    resolver: str = "timeout:5 attempts:2"
    """How long the resolvers of pods wait for an answer: as they do by themselves."""
    _over: threading.Event = field(default_factory=threading.Event)

    def add(self, ordinal: int, address: str = "", **environment: str) -> Pod:
        """Return the pod with *ordinal*, not started: at another *address* a new one, on its volume."""
        address = address or f"10.77.0.{10 + ordinal}"
        name = f"mehdb-{ordinal}"
        hosts, resolv = self.directory / f"{name}.hosts", self.directory / "resolv.conf"
        hosts.write_text(f"127.0.0.1 localhost\n{address} {name}.mehdb.{DOMAIN} {name}\n")
        resolv.write_text(f"{RESOLV}{self.resolver}\n")
        usual = {
            "KUBERNETES_SERVICE_HOST": "10.96.0.1", "MEHDB_HOST": name, "MEHDB_LISTEN": address, "MEHDB_OPEN": "yes",
            "MEHDB_DATADIR": str(self.directory / name), "MEHDB_LAME_DUCK": "0",
        }  # fmt: skip
        run_by = ("unshare", "--mount", "sh", "-c", OWN_NAMES, "sh", str(resolv), str(hosts))
        pod = Pod(
            name, PORT, self.directory / name, usual | environment, run_by=run_by, address=address,
            scheme=self.cluster.scheme, client=self.cluster.client,
        )  # fmt: skip
        self.cluster.nodes = [node for node in self.cluster.nodes if node.name != name]
        self.cluster.nodes.insert(ordinal, pod)
        return pod

    def publish(self) -> None:
        """Say in DNS what is so now."""
        running = [pod for pod in self.cluster.nodes if isinstance(pod, Pod) and pod.process]
        ready = [pod for pod in running if _ready(pod)]
        records = {pod.dns_name: [pod.address] for pod in ready}
        records[f"mehdb.{DOMAIN}"] = [pod.address for pod in ready]
        records[f"mehdb-peers.{DOMAIN}"] = self.stale + [pod.address for pod in running]
        records |= self.frozen
        self.dns.records = {
            name: addresses for name, addresses in records.items() if addresses and name not in self.hidden
        }

    def keep_publishing(self) -> None:
        """Do so, over and over, until the end."""
        while not self._over.wait(LOOK_EVERY_S):
            self.publish()


def _ready(pod: Pod) -> bool:
    try:
        return pod.get("/readyz", timeout=PROBE_TIMEOUT_S).is_success
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def pods(directory: Path) -> Iterator[Pods]:
    """Have a network with a DNS server for pods. They are stopped at its end."""
    with network(), DnsServer(DNS) as dns:
        cluster = Cluster(directory)
        them = Pods(directory, dns, cluster)
        publishing = threading.Thread(target=them.keep_publishing, name="publish")
        publishing.start()
        try:
            yield them
            cluster.stop()
        finally:
            them._over.set()  # noqa: SLF001  its own
            publishing.join()
            cluster.discard()


@contextlib.contextmanager
def deaf(address: str) -> Iterator[None]:
    """Have nobody at *address*, as where a pod was: whoever connects there hears nothing, not even that."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((address, PORT), backlog=0))
        for _ in range(4):  # once its queue is full, the kernel answers nothing
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield
