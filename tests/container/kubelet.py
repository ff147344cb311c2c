"""A small kubelet: runs the pods of a StatefulSet's template in real containers, and does to them what a kubelet does.

It takes all numbers from the template. Probes run at their periods and count to their thresholds: the startup probe
comes first, a liveness probe that fails restarts the container, readiness is told to whoever keeps the endpoints. A pod
that is deleted gets preStop, SIGTERM, what is left of its grace period, and SIGKILL.
"""

import contextlib
import http.client
import os
import select
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final

from engine import CommandFailed, Engine
from network import GATEWAY, Network, Place
from sources import quantity

NAMESPACE: Final = "shop"
DOMAIN: Final = f"{NAMESPACE}.svc.cluster.local"
RESOLVER: Final = f"nameserver {GATEWAY}\nsearch {DOMAIN} svc.cluster.local cluster.local\noptions ndots:5\n"
BACK_OFF_S: Final = 10.0  # between a container's later starts; the first restart comes at once
END_DEADLINE_S: Final = 30.0  # after SIGKILL, or for a loop to notice that it is over


@dataclass(frozen=True)
class Probe:
    """A probe of a manifest, with Kubernetes' own defaults."""

    path: str
    port: int
    initial_delay_s: float
    period_s: float
    timeout_s: float
    failures_max: int
    successes_min: int

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Probe":
        """Return the probe that *manifest* describes."""
        get = manifest["httpGet"]
        return cls(
            get["path"], get["port"], manifest.get("initialDelaySeconds", 0), manifest.get("periodSeconds", 10),
            manifest.get("timeoutSeconds", 1), manifest.get("failureThreshold", 3), manifest.get("successThreshold", 1),
        )  # fmt: skip

    def passes(self, address: str) -> bool:
        """Ask once, on a connection of its own."""
        connection = http.client.HTTPConnection(address, self.port, timeout=self.timeout_s)
        try:
            connection.request("GET", self.path)
            return 200 <= connection.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@dataclass
class Container:
    """One run of a pod's container. *over* is set once its first process has ended."""

    name: str
    pidfd: int
    started_s: float
    over: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)
    exit_code: int | None = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its first process, if that runs."""
        if not self.over.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def wait(self) -> None:
        """Wait until its first process has ended."""
        waiter = select.poll()
        waiter.register(self.pidfd, select.POLLIN)
        waiter.poll()


@dataclass
class Pod:
    """A pod. *deleted* is set when somebody has said that it is to go, *gone* when nothing of it is left."""

    name: str
    volume: Path
    place: Place
    deleted: threading.Event = field(default_factory=threading.Event)
    lost: bool = False
    gone: threading.Event = field(default_factory=threading.Event)
    ready: threading.Event = field(default_factory=threading.Event)
    container: Container | None = None
    runs: int = 0
    events: list[str] = field(default_factory=list)
    log: str = ""
    keeper: threading.Thread | None = None

    @property
    def address(self) -> str:
        return self.place.address


class Kubelet:
    """Runs pods of *template*, with their volumes in *directory*. Calls *changed* when the readiness of one changes."""

    def __init__(
        self, engine: Engine, network: Network, image: str, template: dict[str, Any], directory: Path,
        changed: Callable[[], None], *, limits: bool,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._network = network
        self._image = image
        self._spec = template["spec"]
        (self._container,) = self._spec["containers"]
        self._directory = directory
        self._changed = changed
        self._limits = limits
        (directory / "resolv.conf").write_text(RESOLVER)
        self.grace_s = float(self._spec["terminationGracePeriodSeconds"])
        kinds = ("startup", "liveness", "readiness")
        self._probes = {kind: Probe.of(self._container[f"{kind}Probe"]) for kind in kinds}
        self.port: int = self._container["ports"][0]["containerPort"]

    def start(self, name: str, service: str) -> Pod:
        """Have a new pod, with an address of its own, on the volume that *name* has or gets."""
        place = self._network.place()
        pod = Pod(name, self.volume(name), place)
        (self._directory / f"{place.interface}.hosts").write_text(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
            f"{place.address}\t{name}.{service}.{DOMAIN}\t{name}\n"
        )
        pod.keeper = threading.Thread(target=self._keep, args=(pod,), name=f"{name} at {place.address}")
        pod.keeper.start()
        return pod

    def volume(self, name: str) -> Path:
        """Return the volume of the pod *name*: made if there is none, its group set as `fsGroup` says."""
        volume = self._directory / f"data-{name}"
        if not volume.exists():
            volume.mkdir()
            os.chown(volume, 0, self._spec["securityContext"]["fsGroup"])
            volume.chmod(0o2775)
        return volume

    def delete(self, pod: Pod) -> None:
        """Stop a pod, within its grace period. Returns when nothing of it is left but its volume."""
        pod.deleted.set()
        self._changed()  # who goes is taken from the endpoints at once, while it still answers
        if pod.container:
            self._stop(pod, pod.container)
        assert pod.gone.wait(END_DEADLINE_S), f"{pod.name} does not end"

    def _stop(self, pod: Pod, container: Container) -> None:
        """End a container: preStop, SIGTERM, and when the grace period of both is over, SIGKILL."""
        end_s = monotonic() + self.grace_s
        command = self._container["lifecycle"]["preStop"]["exec"]["command"]
        try:
            said = self._engine.podman("exec", container.name, *command, deadline_s=self.grace_s)
        except CommandFailed as error:
            said = f"FailedPreStopHook {error}"
        pod.events.append(f"preStop: {said}")
        container.signal(signal.SIGTERM)
        if not container.over.wait(end_s - monotonic()):
            pod.events.append("SIGKILL: the grace period is over")
            container.signal(signal.SIGKILL)

    def log(self, pod: Pod) -> str:
        """Return what a pod's containers have written so far."""
        running = pod.container and not pod.container.over.is_set()
        return pod.log + (self._engine.logs(pod.container.name) if running and pod.container else "")

    def crash(self, pod: Pod) -> None:
        """End the first process of a pod's container as lack of memory would: with SIGKILL. It is started again."""
        container = pod.container
        assert container
        container.signal(signal.SIGKILL)
        assert container.over.wait(END_DEADLINE_S), f"{pod.name} does not end"

    def lose(self, pod: Pod, *, volume: bool) -> None:
        """Lose the machine of a pod: it is not heard from again. With it goes its *volume*, if so told."""
        pod.lost = True
        pod.place.cut_off()
        pod.deleted.set()
        if pod.container:
            pod.container.signal(signal.SIGKILL)
        assert pod.gone.wait(END_DEADLINE_S), f"{pod.name} does not end"
        if volume:
            shutil.rmtree(pod.volume)

    def _keep(self, pod: Pod) -> None:
        """Run a pod's container, again and again, until the pod is deleted."""
        while not pod.deleted.is_set():
            self._run(pod)
            if pod.runs > 1:
                pod.deleted.wait(BACK_OFF_S)
        pod.place.remove()
        pod.gone.set()
        if not pod.lost:  # nobody hears of the end of a pod on a lost machine
            self._changed()

    def _run(self, pod: Pod) -> None:
        """Run a pod's container once, with its probes."""
        pod.runs += 1
        container = pod.container = self._start_container(pod)
        if pod.deleted.is_set():  # while it was being made: nobody else has seen this container
            container.signal(signal.SIGKILL)
        watchers = [
            threading.Thread(target=self._probe, args=(pod, container, kind), name=f"{kind} of {pod.name}")
            for kind in self._probes
        ]
        for watcher in watchers:
            watcher.start()
        container.wait()
        container.exit_code = int(self._engine.podman("wait", container.name))
        container.over.set()
        container.started.set()  # so that nobody waits for it
        if not pod.lost:
            self._set_ready(pod, ready=False)
        for watcher in watchers:
            watcher.join()
        pod.events.append(f"ended with {container.exit_code}")
        pod.log += self._engine.logs(container.name)
        self._engine.podman("rm", container.name)
        os.close(container.pidfd)

    def _probe(self, pod: Pod, container: Container, kind: str) -> None:
        """Run one probe of a container until that is over, or until the probe has told what there was to tell."""
        probe = self._probes[kind]
        if kind != "startup":
            container.started.wait()
        passed = failed = 0
        wait_s = probe.initial_delay_s
        while not container.over.wait(wait_s) and not (pod.deleted.is_set() and kind != "readiness"):
            passed, failed = (passed + 1, 0) if probe.passes(pod.address) else (0, failed + 1)
            wait_s = probe.period_s
            if kind == "readiness" and (passed >= probe.successes_min or failed >= probe.failures_max):
                self._set_ready(pod, ready=passed > 0)
            elif kind == "startup" and passed:
                container.started.set()
                return
            elif failed >= probe.failures_max:
                pod.events.append(f"{kind} failed")
                self._stop(pod, container)
                return

    def _set_ready(self, pod: Pod, *, ready: bool) -> None:
        if ready != pod.ready.is_set():
            pod.events.append(f"ready={ready}")
            if ready:
                pod.ready.set()
            else:
                pod.ready.clear()
            self._changed()

    def _start_container(self, pod: Pod) -> Container:
        """Start a pod's container as its template says."""
        name = f"{pod.name}-{pod.place.interface}-{pod.runs}"
        started_s = monotonic()
        files = {f"{pod.place.interface}.hosts": "/etc/hosts", "resolv.conf": "/etc/resolv.conf"}
        self._engine.podman(
            "run", "--detach", "--name", name, "--pull", "never",
            "--network", f"ns:{pod.place.namespace}", "--hostname", pod.name, "--no-hosts",
            *(f"--volume={self._directory / file}:{target}:ro" for file, target in files.items()),
            *self._mounts(pod), *self._rights(), *self._bounds(), *self._variables(), self._image,
        )  # fmt: skip
        pid = int(self._engine.podman("inspect", "--format", "{{.State.Pid}}", name))
        return Container(name, os.pidfd_open(pid), started_s)

    def _mounts(self, pod: Pod) -> list[str]:
        """Return the options for the template's volumes: the claim is the pod's folder, an emptyDir is in memory."""
        empty = {volume["name"]: volume["emptyDir"] for volume in self._spec["volumes"]}
        options = []
        for mount in self._container["volumeMounts"]:
            if mount["name"] in empty:
                size = int(quantity(empty[mount["name"]]["sizeLimit"]))
                options.append(f"--tmpfs={mount['mountPath']}:rw,size={size},mode=1777")
            else:
                options.append(f"--volume={pod.volume}:{mount['mountPath']}")
        return options

    def _rights(self) -> list[str]:
        """Return the options for the template's security contexts. Seccomp's default is the engine's as well."""
        pod, container = self._spec["securityContext"], self._container["securityContext"]
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        options = [f"--user={pod['runAsUser']}:{pod['runAsGroup']}", f"--group-add={pod['fsGroup']}"]
        options += [f"--cap-drop={capability}" for capability in container["capabilities"]["drop"]]
        if container["readOnlyRootFilesystem"]:
            options += ["--read-only", "--read-only-tmpfs=false"]
        if not container["allowPrivilegeEscalation"]:
            options.append("--security-opt=no-new-privileges")
        return options

    def _bounds(self) -> list[str]:
        if not self._limits:
            return []
        limits = self._container["resources"]["limits"]
        memory = int(quantity(limits["memory"]))
        return [f"--memory={memory}", f"--memory-swap={memory}", f"--cpus={quantity(limits['cpu'])}"]

    def _variables(self) -> list[str]:
        """Return the options for the environment: the template's, and what Kubernetes adds for its API."""
        variables = {variable["name"]: variable["value"] for variable in self._container["env"]}
        variables |= {"KUBERNETES_SERVICE_HOST": GATEWAY, "KUBERNETES_SERVICE_PORT": "443"}
        return [f"--env={name}={value}" for name, value in variables.items()]
