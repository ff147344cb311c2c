"""The walk of the blog in real containers: the pods of deploy/app.yaml, each with its address, names and volume.

Clients that find the pods by DNS read and write all the time. What was acknowledged is never lost; ready pods serve; a
planned restart resets no connection.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import httpx
import pytest

import clients
from cluster import check_volume
from conftest import World
from kubelet import Pod
from load import Load
from stateful_set import StatefulSet

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]

EQUAL_DEADLINE_S = 30.0


@contextmanager
def step(what: str, load: Load) -> Iterator[None]:
    """Do one step of the walk, and go on when clients' writes do."""
    begin_s = monotonic()
    yield
    load.wait_for_writes()
    print(f"{what}: {monotonic() - begin_s:.0f} s", flush=True)


def url(pods: StatefulSet, pod: Pod) -> str:
    return f"http://{pod.address}:{pods.kubelet.port}"


def equal_positions(pods: StatefulSet) -> dict[str, object]:
    """Return the position that all pods come to have."""
    end_s = monotonic() + EQUAL_DEADLINE_S
    while True:
        positions = [httpx.get(f"{url(pods, pod)}/position", trust_env=False).json() for pod in pods.pods.values()]
        found = [{name: one[name] for name in ("history", "revision", "chain")} for one in positions]
        if all(one == found[0] for one in found):
            return found[0]
        assert monotonic() < end_s, f"not equal: {found}"
        sleep(0.1)  # between two looks


def recovered_to(pod: Pod, pods: StatefulSet) -> int:
    """Return the revision of the snapshot that a leader without a volume has begun with."""
    log = pods.kubelet.log(pod)
    match = re.search(r"snapshot taken revision=(\d+)", log)
    assert match, log
    return int(match[1])


def held(pods: StatefulSet, pod: Pod, keys: list[str]) -> dict[str, str]:
    """Return what a pod holds of *keys*."""
    values = {}
    with httpx.Client(base_url=url(pods, pod), trust_env=False) as client:
        for key in keys:
            answer = client.get(f"/get/{key}")
            if answer.status_code == 200:
                values[key] = answer.text
    return values


def test_the_walk_of_the_blog(world: World, tmp_path: Path) -> None:
    pods = world.stateful_set
    pods.scale(3)
    load = world.load()
    # Written through a follower, by its name, with curl; read from the others.
    file = tmp_path / "test"
    file.write_bytes(clients.VALUE)
    answer = load.curl("-L", "-XPUT", "-T", file, f"mehdb-1.{pods.service}:{pods.kubelet.port}/set/{clients.KEY}")
    assert answer == "WRITE completed"
    equal_positions(pods)
    for ordinal in range(3):
        name = f"mehdb-{ordinal}.{pods.service}:{pods.kubelet.port}"
        assert load.curl(f"{name}/get/{clients.KEY}").encode() == clients.VALUE
        assert load.curl(f"{name}/status") == ("follower" if ordinal else "leader")

    with load:
        load.wait_for_writes()
        with step("scaled to 4", load):
            pods.scale(4)
        with step("a pod deleted", load):
            pods.delete(1)
        with step("a container killed", load):
            pods.crash(2)
        with step("a follower's machine lost, its volume kept", load):
            pods.lose(3, volume=False)
        with step("a follower's machine and volume lost", load):
            pods.lose(1, volume=True)
        with step("the leader's machine lost, its volume kept", load):
            pods.lose(0, volume=False)
        with step("the leader's machine and volume lost", load):
            lost_s = monotonic()
            pods.lose(0, volume=True)
        begun_at = recovered_to(pods.pods[0], pods)
        with step("all updated, from the highest ordinal down", load):
            pods.update()

    # Nothing acknowledged is lost, but for what only the leader's disk had when that was: it was not asked for more.
    gone = [
        entry.key for entry in load.acknowledged()
        if entry.key.startswith("plain/") and entry.end_s < lost_s and int(entry.revision) > begun_at
    ]  # fmt: skip
    acknowledged = {entry.key: entry.value for entry in load.acknowledged() if entry.key not in gone}
    position = equal_positions(pods)
    for pod in pods.pods.values():
        values = held(pods, pod, list(acknowledged))
        assert [key for key, value in acknowledged.items() if values.get(key) != value] == [], f"lost on {pod.name}"

    reads, failed, resets = load.reads(), load.failed_reads(pods.losses), load.resets(pods.losses)
    others = Counter(entry.status or entry.error.partition(":")[0] for entry in load.entries if not entry.good)
    print(
        f"{len(reads)} reads, {len(failed)} failed at ready pods, {len(resets)} resets, {len(acknowledged)} writes "
        f"acknowledged, none lost ({len(gone)} that only the lost disk had), at revision {position['revision']}, "
        f"longest gap for writes {load.longest_gap_s():.0f} s; not served: {dict(others)}"
    )
    assert failed == []
    assert resets == []
    assert load.failed_reads([]), "the control: these clients notice a pod that is lost"
    assert len(reads) > len(acknowledged) > 100, "fewer prove less"

    # Whoever was to go went by itself, in time, and drained.
    pods.scale(0)
    for pod in pods.former:
        if not pod.lost:
            assert pod.container
            assert pod.container.exit_code == 0, pod.events
            assert not [event for event in pod.events if "SIGKILL" in event or "FailedPreStopHook" in event], pod.events
            assert "Traceback" not in pod.log
            assert not [event for event in pod.events if event.endswith(" failed")], pod.events
    for volume in sorted(world.directory.glob("data-*")):
        asyncio.run(check_volume(volume))
