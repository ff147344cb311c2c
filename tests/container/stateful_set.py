"""A small StatefulSet controller, and the endpoints and DNS names that Kubernetes keeps for its pods.

Pods are added in order, each when the one before is ready; one that has gone is made again; an update replaces them
from the highest ordinal down. Names are as in CoreDNS: under the governing Service those of ready pods that stay,
behind the Service for peers all.
"""

import random
import threading
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any, Final

from dns_server import DnsServer
from kubelet import DOMAIN, Kubelet, Pod

LATE_S: Final = 5.0  # until the endpoints forget a pod whose machine is lost; Kubernetes takes 40 s
READY_DEADLINE_S: Final = 120.0
RUNS_MAX: Final = 3  # of a pod's container, before it is ready: one that ends each time does so for a reason


@dataclass
class Loss:
    """A time in which nobody could know that a pod is away: from its loss until the endpoints forget it."""

    name: str
    address: str
    begin_s: float
    end_s: float = float("inf")


@dataclass
class StatefulSet:
    """The StatefulSet of *manifest*, with its names in *dns*. The `kubelet` is set before the first pod is made."""

    manifest: dict[str, Any]
    dns: DnsServer
    pods: dict[int, Pod] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    former: list[Pod] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    kubelet: Kubelet = field(init=False)

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def service(self) -> str:
        """The governing Service."""
        return str(self.manifest["spec"]["serviceName"])

    def publish(self) -> None:
        """Set the names to what the pods are now."""
        with self._lock:
            pods = list(self.pods.values())
            ready = [pod for pod in pods if pod.ready.is_set() and (pod.lost or not pod.deleted.is_set())]
            records = {f"{pod.name}.{self.service}.{DOMAIN}": [pod.address] for pod in ready}
            records[f"{self.service}.{DOMAIN}"] = random.sample([pod.address for pod in ready], len(ready))
            all_there_are = [pod.address for pod in pods if pod.lost or not pod.gone.is_set()]
            records[f"{self.service}-peers.{DOMAIN}"] = all_there_are
            self.dns.records = {name: addresses for name, addresses in records.items() if addresses}

    def scale(self, replicas: int) -> None:
        """Have so many pods: the missing ones added in order, the superfluous ones deleted from the highest down."""
        for ordinal in sorted(self.pods, reverse=True):
            if ordinal >= replicas:
                self._delete(ordinal)
        for ordinal in range(replicas):
            if ordinal not in self.pods:
                self.pods[ordinal] = self.kubelet.start(f"{self.name}-{ordinal}", self.service)
                self.publish()
            self.wait(ordinal)

    def delete(self, ordinal: int) -> None:
        """Delete a pod, as `kubectl delete pod` does: it is made again."""
        replicas = len(self.pods)
        self._delete(ordinal)
        self.scale(replicas)

    def update(self) -> None:
        """Replace all pods, from the highest ordinal down, each when the one before is ready."""
        for ordinal in sorted(self.pods, reverse=True):
            self.delete(ordinal)

    def crash(self, ordinal: int) -> None:
        """Have a pod's container end all of a sudden. It starts again in the same pod."""
        pod = self.pods[ordinal]
        loss = Loss(pod.name, pod.address, monotonic())
        self.losses.append(loss)
        runs = pod.runs
        self.kubelet.crash(pod)
        self._until(lambda: pod.runs > runs and pod.ready.is_set(), pod)
        loss.end_s = monotonic()

    def lose(self, ordinal: int, *, volume: bool) -> None:
        """Lose a pod's machine, and its *volume* if so told. Once that is noticed, the pod is made anew elsewhere."""
        replicas = len(self.pods)
        pod = self.pods[ordinal]
        loss = Loss(pod.name, pod.address, monotonic())
        self.losses.append(loss)
        self.kubelet.lose(pod, volume=volume)
        sleep(LATE_S)  # what takes Kubernetes some time
        self.former.append(self.pods.pop(ordinal))
        self.publish()
        loss.end_s = monotonic()
        self.scale(replicas)

    def wait(self, ordinal: int) -> None:
        """Wait until a pod is ready."""
        self._until(self.pods[ordinal].ready.is_set, self.pods[ordinal])
        sleep(self.manifest["spec"].get("minReadySeconds", 0))

    def end(self) -> None:
        """Stop all pods at once, whatever they are about."""
        for ordinal in sorted(self.pods):
            pod = self.pods[ordinal]
            if not pod.gone.is_set():
                self.kubelet.lose(pod, volume=False)
            assert pod.keeper
            pod.keeper.join()

    def _delete(self, ordinal: int) -> None:
        pod = self.pods[ordinal]
        self.kubelet.delete(pod)
        self.former.append(self.pods.pop(ordinal))
        self.publish()

    @staticmethod
    def _until(look: Any, pod: Pod) -> None:
        end_s = monotonic() + READY_DEADLINE_S
        while not look():
            hopeless = pod.runs > RUNS_MAX or monotonic() > end_s
            assert not hopeless, f"{pod.name} is not ready: {pod.events}; its log:\n{pod.log}"
            sleep(0.05)  # between two looks
