"""deploy/app.yaml, held against the schemas of Kubernetes, the blog's transcript and the code.

What is made of it for production is in test_kustomization.py.
"""

import copy
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import typer

from cluster import Cluster, Node
from mehdb import __version__, cli, roles
from mehdb.model import Role
from mehdb.settings import SETTINGS, load
from sources import (
    APP,
    CONTAINER,
    ENVIRONMENT,
    KUBERNETES,
    PEERS_SERVICE,
    POD,
    PROBES,
    SERVICE,
    STATEFUL_SET,
    quantity,
    settings_in_pod,
)

NODE_MEMORY_BYTES = 300 << 20  # what a node with a million keys may take under load, kept by `make bench`
CLOSE_MARGIN_S = 15  # to start preStop's command in a busy pod, and for the last checkpoint
DNS_TTL_S = 5  # how long CoreDNS' answers about pods are kept, unless it is told otherwise
START_S = 600  # what a start must be given at least: a large volume is attached, checked and recovered

DEFAULTS = load({}, {}, find_host_name=lambda: "mehdb")


def names(objects: list[dict[str, Any]]) -> list[str]:
    return [one["name"] for one in objects]


# Kubernetes' own rules


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_document_is_valid_for_each_kubernetes_that_we_support(version: str) -> None:
    assert [one["kind"] for one in APP] == ["StatefulSet", "Service", "Service"]
    for document in APP:
        kubernetes_validate.validate(document, version, strict=True)


def test_a_misspelt_field_is_not_valid() -> None:
    """The Go mehdb's manifest had a `readniessProbe`, and so no readiness probe."""
    misspelt = copy.deepcopy(STATEFUL_SET)
    container = misspelt["spec"]["template"]["spec"]["containers"][0]
    container["readniessProbe"] = container.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="readniessProbe"):
        kubernetes_validate.validate(misspelt, KUBERNETES[-1], strict=True)


# The blog's transcript


def test_the_names_and_sizes_are_those_of_the_blog() -> None:
    assert STATEFUL_SET["metadata"]["name"] == SERVICE["metadata"]["name"] == "mehdb"
    assert STATEFUL_SET["spec"]["replicas"] == 2
    assert CONTAINER["name"] == "shard"
    (claim,) = STATEFUL_SET["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "data"
    assert claim["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}


def test_the_service_is_headless_and_selects_the_pods() -> None:
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["metadata"]["labels"] == SERVICE["spec"]["selector"] == {"app": "mehdb"}
    assert STATEFUL_SET["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"]
    assert STATEFUL_SET["spec"]["template"]["metadata"]["labels"] == SERVICE["spec"]["selector"]


def test_the_service_lists_ready_pods_only_since_clients_use_it() -> None:
    assert SERVICE["spec"]["publishNotReadyAddresses"] is False


def test_the_service_for_peers_lists_all_pods_and_differs_in_nothing_else() -> None:
    node = settings_in_pod(1, ENVIRONMENT)
    assert roles.peers_service(node) == f"{PEERS_SERVICE['metadata']['name']}.shop.svc.cluster.local"
    assert PEERS_SERVICE["spec"] == SERVICE["spec"] | {"publishNotReadyAddresses": True}


def test_the_service_gives_the_pods_their_names() -> None:
    assert STATEFUL_SET["spec"]["serviceName"] == SERVICE["metadata"]["name"]


def test_pods_start_one_after_the_other() -> None:
    assert STATEFUL_SET["spec"]["podManagementPolicy"] == "OrderedReady"


# The code


def test_every_port_is_the_one_that_a_node_listens_on_by_default() -> None:
    ports = [port["containerPort"] for port in CONTAINER["ports"]]
    for service in (SERVICE, PEERS_SERVICE):
        ports += [port.get("targetPort", port["port"]) for port in service["spec"]["ports"]]
        ports += [port["port"] for port in service["spec"]["ports"]]
    ports += [probe["httpGet"]["port"] for probe in PROBES.values()]
    assert set(ports) == {DEFAULTS.port}


def test_every_variable_is_a_setting() -> None:
    assert set(ENVIRONMENT) <= {setting.metadata["variable"] for setting in SETTINGS}


def test_the_data_directory_is_the_volume() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts["data"] == ENVIRONMENT["MEHDB_DATADIR"]
    assert set(mounts) == {*names(POD["volumes"]), "data"}


def test_the_image_is_of_this_version() -> None:
    assert CONTAINER["image"] == f"mehdb:{__version__}"


# All that the Go mehdb's manifest set, and what the README says to add.
GO_ENVIRONMENT = {"MEHDB_DATADIR": "/mehdbdata", "MEHDB_OPEN": "yes"}
SERVICE_LINK = {"MEHDB_PORT": "tcp://10.96.0.7:9876"}  # by a Service called mehdb that has a cluster IP


@pytest.mark.parametrize("environment", [ENVIRONMENT, GO_ENVIRONMENT, GO_ENVIRONMENT | SERVICE_LINK])
def test_the_environment_tells_each_pod_its_role_and_where_the_leader_is(environment: dict[str, str]) -> None:
    leader, follower = (settings_in_pod(ordinal, environment) for ordinal in (0, 1))
    assert roles.assign(leader).role is Role.LEADER
    assert roles.assign(follower).role is Role.FOLLOWER
    assert roles.assign(follower).leader_url == "http://mehdb-0.mehdb.shop.svc.cluster.local:9876"
    assert leader.port == follower.port == DEFAULTS.port
    assert leader.data_dir == Path("/mehdbdata")


def test_the_container_runs_what_the_image_runs() -> None:
    """So that the Go mehdb's manifest, which names no command either, runs with only its image changed."""
    assert not {"command", "args"} & set(CONTAINER)


# The probes, on real nodes


def pod(cluster: Cluster) -> Node:
    """Return the cluster's next node, not started, with the manifest's environment on a volume of its own."""
    given = {name: value for name, value in ENVIRONMENT.items() if name != "MEHDB_DATADIR"}
    return cluster.add(**given | {"MEHDB_LAME_DUCK": "0"})  # nobody's DNS has to learn that it goes


def answers(node: Node) -> dict[str, int]:
    """Ask what the kubelet asks, and return the statuses. Fails if one takes longer than its probe allows."""
    headers = {"User-Agent": "kube-probe/1.37", "Accept": "*/*", "Connection": "close"}
    return {
        name: httpx.get(
            node.url + probe["httpGet"]["path"],
            headers=headers,
            timeout=probe["timeoutSeconds"],
            follow_redirects=False,
            trust_env=False,
        ).status_code
        for name, probe in PROBES.items()
    }


def test_a_leader_and_its_follower_pass_every_probe_without_a_redirect(cluster: Cluster) -> None:
    for node in (pod(cluster).start(), pod(cluster).start()):
        assert answers(node) == {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 200}


def test_a_follower_that_never_found_its_leader_is_alive_but_not_ready(cluster: Cluster) -> None:
    """A restart would not help it, and clients must not read from it."""
    pod(cluster)
    follower = pod(cluster).start(ready=False)
    assert answers(follower) == {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 500}


def test_readiness_asks_for_the_full_status_as_the_blog_says() -> None:
    assert PROBES["readinessProbe"]["httpGet"]["path"] == "/status?level=full"


@pytest.mark.parametrize("name", PROBES)
def test_no_probe_has_the_default_timeout_of_one_second(name: str) -> None:
    assert PROBES[name]["timeoutSeconds"] > 1


def test_a_start_may_take_long() -> None:
    startup = PROBES["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= START_S


def test_a_busy_node_is_not_restarted() -> None:
    liveness = PROBES["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= DEFAULTS.body_timeout


# What a pod may take and do


def drain_command() -> tuple[list[str], dict[str, Any]]:
    """Return what preStop calls on the command line, and what the command makes of it. Fails if it would refuse it."""
    program, name, *arguments = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    group = typer.main.get_command(cli.app)
    command = group.commands[name]  # type: ignore[attr-defined]  a group's
    return [program, name], command.make_context(name, arguments).params


def test_the_stop_begins_with_a_drain_that_waits() -> None:
    called, parameters = drain_command()
    assert called == ["mehdb", "drain"]
    assert parameters["wait"] is True
    assert parameters["data_dir"] == Path("data"), "so that the environment names it"


def test_the_time_that_a_stop_takes_fits_the_grace_period() -> None:
    node = settings_in_pod(0, ENVIRONMENT)
    _, parameters = drain_command()
    assert node.grace_period == POD["terminationGracePeriodSeconds"] - parameters["timeout"]
    stop_s = node.drain_timeout + node.lame_duck + node.stop_timeout
    assert stop_s + CLOSE_MARGIN_S <= node.grace_period


def test_a_pod_that_stops_answers_until_dns_has_forgotten_it() -> None:
    assert settings_in_pod(0, ENVIRONMENT).lame_duck >= DNS_TTL_S


def test_the_memory_limit_holds_a_node_under_load_with_a_full_queue() -> None:
    requests, limits = CONTAINER["resources"]["requests"], CONTAINER["resources"]["limits"]
    assert quantity(limits["memory"]) >= NODE_MEMORY_BYTES + DEFAULTS.queue_size
    assert requests["memory"] == limits["memory"]


def test_the_cpu_limit_leaves_the_event_loop_and_the_writer_a_core_each() -> None:
    requests, limits = CONTAINER["resources"]["requests"], CONTAINER["resources"]["limits"]
    assert quantity(limits["cpu"]) >= 2
    assert quantity(requests["cpu"]) <= quantity(limits["cpu"])


def test_pods_run_as_nobody_in_particular() -> None:
    context = POD["securityContext"]
    user = context["runAsUser"]
    assert user > 0
    assert context == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_pods_know_nothing_of_the_cluster() -> None:
    assert POD["automountServiceAccountToken"] is False
    assert POD["enableServiceLinks"] is False


def test_a_read_only_root_leaves_a_bounded_place_for_temporary_files() -> None:
    (tmp,) = [mount["name"] for mount in CONTAINER["volumeMounts"] if mount["mountPath"] == "/tmp"]  # noqa: S108  the pod's
    (volume,) = [volume for volume in POD["volumes"] if volume["name"] == tmp]
    assert quantity(volume["emptyDir"]["sizeLimit"]) > 0
