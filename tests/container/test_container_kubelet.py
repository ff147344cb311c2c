"""The small kubelet heeds probes, thresholds and grace periods: the walk would notice a pod that hangs."""

import copy
import signal

import pytest

from cluster import eventually
from conftest import World
from sources import STATEFUL_SET

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]

DEADLINE_S = 60.0


def test_a_container_that_hangs_is_not_ready_and_is_started_again(world: World) -> None:
    """With the manifest's own times that takes two minutes: here they are shorter."""
    template = copy.deepcopy(STATEFUL_SET["spec"]["template"])
    (container,) = template["spec"]["containers"]
    for kind, failures in (("liveness", 4), ("readiness", 2)):
        container[f"{kind}Probe"] |= {"periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": failures}
    template["spec"]["terminationGracePeriodSeconds"] = 5
    world.use(template)
    pods = world.stateful_set
    pods.scale(1)
    pod = pods.pods[0]
    first = pod.container
    assert first
    assert f"mehdb-0.{pods.service}.shop.svc.cluster.local" in pods.dns.records
    first.signal(signal.SIGSTOP)
    eventually(lambda: not pod.ready.is_set(), "the pod not to be ready", DEADLINE_S)
    assert not [name for name in pods.dns.records if name.startswith("mehdb-0")], "nobody is to ask it"
    assert pods.dns.records[f"{pods.service}-peers.shop.svc.cluster.local"] == [pod.address]
    eventually(lambda: pod.container is not first and pod.ready.is_set(), "the pod to be ready again", DEADLINE_S)
    assert [event for event in pod.events if not event.startswith("preStop")] == [
        "ready=True", "ready=False", "liveness failed", "SIGKILL: the grace period is over", "ended with 137",
        "ready=True",
    ]  # fmt: skip
    assert [event for event in pod.events if event.startswith("preStop: FailedPreStopHook")]
