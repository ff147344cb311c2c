"""deploy/ as kustomize renders it: every variant, held against the schemas of Kubernetes and the code.

What all variants have in common with deploy/app.yaml is looked at in test_manifests.py.
"""

import copy
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster import Cluster, Node, clean_environment, eventually, free_port
from custom_resources import CUSTOM_RESOURCES
from guards import Authority, Tokens
from kustomize import COMPONENTS, DEPLOY, EXAMPLES, RENDERERS, VARIANTS, build, parsed, rendered_by, with_components
from mehdb import __version__, roles
from mehdb.model import Role
from mehdb.settings import SETTINGS
from sources import CONTAINER, ENVIRONMENT, KUBERNETES, POD, ROOT, STATEFUL_SET, find
from variants import Variant


@pytest.fixture(params=["app", *VARIANTS])
def variant(request: pytest.FixtureRequest) -> Variant:
    """Every variant, and the one file."""
    return Variant(request.param)


@pytest.fixture(params=VARIANTS)
def production(request: pytest.FixtureRequest) -> Variant:
    """Every variant that kustomize makes."""
    return Variant(request.param)


BASE = Variant("base")

# Kubernetes' own rules


@pytest.mark.parametrize("version", [KUBERNETES[0], KUBERNETES[-1]], ids=["oldest", "newest"])
def test_every_document_of_every_variant_is_valid(variant: Variant, version: str) -> None:
    for document in variant.documents:
        if document["kind"] in CUSTOM_RESOURCES:
            jsonschema.validate(document, CUSTOM_RESOURCES[document["kind"]])
        else:
            kubernetes_validate.validate(document, version, strict=True)


def test_each_document_is_there_once(variant: Variant) -> None:
    counted = Counter((one["kind"], one["metadata"]["name"]) for one in variant.documents)
    assert max(counted.values()) == 1


def test_the_base_and_the_components_name_no_namespace(variant: Variant) -> None:
    """`kubectl -n` says where they go; only an example shows how to set it."""
    namespaces = {one["metadata"].get("namespace") for one in variant.documents}
    assert namespaces == ({"mehdb"} if variant.name == "production" else {None})


@pytest.mark.parametrize("variant_name", VARIANTS)
def test_every_tool_that_is_here_renders_the_same(variant_name: str) -> None:
    build(DEPLOY)  # or skip
    first, *others = [parsed(rendered_by(renderer, variant_name)) for renderer in RENDERERS]
    assert all(other == first for other in others)


def test_the_folder_itself_is_the_base() -> None:
    """What `kubectl apply -k deploy` applies."""
    assert parsed(build(DEPLOY)) == BASE.documents


# The files, also where nothing is here to render them


def kustomizations() -> list[Path]:
    return sorted([*DEPLOY.rglob("kustomization.yaml"), *EXAMPLES.rglob("kustomization.yaml")])


def named_in(path: Path) -> set[Path]:
    """Return the files and folders that the kustomization *path* is made of."""
    said = yaml.safe_load(path.read_text())
    names = [*said.get("resources", []), *said.get("components", [])]
    names += [patch["path"] for patch in said.get("patches", []) if "path" in patch]
    names += [name for made in said.get("configMapGenerator", []) for name in made["files"]]
    return {(path.parent / name).resolve() for name in names}


@pytest.mark.parametrize("path", kustomizations(), ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_every_file_is_part_of_the_kustomization_beside_it(path: Path) -> None:
    named = named_in(path)
    assert all(one.exists() for one in named)
    assert {one for one in path.parent.iterdir() if one.is_file()} - {path} == {
        one for one in named if one.parent == path.parent and one.is_file()
    }


def test_the_example_of_production_has_every_component_in_order() -> None:
    path = EXAMPLES / "production" / "kustomization.yaml"
    listed = [(path.parent / name).resolve() for name in yaml.safe_load(path.read_text())["components"]]
    assert set(COMPONENTS) == {one.name for one in (DEPLOY / "components").iterdir()}
    assert [one for one in listed if one.name not in ("monitoring", "dashboard")] == with_components(
        *[name for name in COMPONENTS if name not in ("monitoring", "dashboard")]
    )
    assert set(listed) == set(with_components(*COMPONENTS))
    assert listed.index(*with_components("monitoring")) < listed.index(*with_components("auth"))


def test_the_readme_names_what_there_is() -> None:
    readme = (ROOT / "README.md").read_text()
    for folder in (*with_components(*COMPONENTS), *EXAMPLES.iterdir()):
        assert f"`{folder.name}`" in readme or f"({folder.relative_to(ROOT)})" in readme, folder


# The code


def test_the_port_is_the_one_that_a_node_listens_on_and_has_a_name_everywhere(variant: Variant) -> None:
    node = variant.settings(variant.ordinals[0])
    expected = {"http": node.port} | ({"health": node.health_port} if node.health_port else {})
    assert variant.ports == expected
    for service in variant.all("Service"):
        assert service["spec"]["ports"] == [{"name": "http", "port": node.port}]


def test_probes_go_where_no_certificate_and_no_token_is_needed(variant: Variant) -> None:
    node = variant.settings(variant.ordinals[0])
    assert (node.scheme == "https") == (node.health_port is not None)
    for name, probe in variant.probes.items():
        assert set(probe["httpGet"]) == {"path", "port"}, "plain HTTP"
        assert probe["httpGet"]["port"] == (node.health_port or node.port)
        as_in_app = {"httpGet": CONTAINER[name]["httpGet"] | {"port": probe["httpGet"]["port"]}}
        assert probe == CONTAINER[name] | as_in_app


def test_every_variable_is_a_setting_of_the_code(variant: Variant) -> None:
    assert set(variant.environment) <= {setting.metadata["variable"] for setting in SETTINGS}
    for name, value in ENVIRONMENT.items():
        assert variant.environment.get(name, value) == value, "said once, in app.yaml"


def test_who_is_let_in_is_said_once(variant: Variant) -> None:
    """The code refuses to start with two answers, or with none."""
    node = variant.settings(variant.ordinals[0])
    guarded = {"auth", "mutual-tls", "all", "production", "monitoring-auth", "monitoring-mutual-tls", "auth-tls"}
    assert node.open == node.anonymous == (variant.name not in guarded)


def test_the_first_ordinal_leads_and_all_others_find_it(variant: Variant) -> None:
    first, *others = variant.ordinals
    assert roles.assign(variant.settings(first)).role is Role.LEADER
    for ordinal in others:
        found = roles.assign(variant.settings(ordinal))
        scheme = variant.settings(ordinal).scheme
        assert found.role is Role.FOLLOWER
        assert found.leader_url == f"{scheme}://mehdb-{first}.mehdb.shop.svc.cluster.local:9876"


def test_nodes_look_for_each_other_behind_a_service_that_is_there(variant: Variant) -> None:
    name = str(roles.peers_service(variant.settings(variant.ordinals[0]))).partition(".")[0]
    peers = find(variant.documents, "Service", name)["spec"]
    assert (peers["clusterIP"], peers["publishNotReadyAddresses"]) == ("None", True)
    assert variant.selected(peers["selector"]) == variant.ordinals


def test_what_stops_a_pod_is_as_in_the_one_file(production: Variant) -> None:
    """So that the times, which are looked at there, fit here."""
    for name in (
        "terminationGracePeriodSeconds",
        "securityContext",
        "automountServiceAccountToken",
        "enableServiceLinks",
    ):
        assert production.pod[name] == POD[name]
    for name in ("lifecycle", "resources", "securityContext"):
        assert production.container[name] == CONTAINER[name]
    assert not {"command", "args"} & set(production.container)
    assert production.spec["podManagementPolicy"] == "OrderedReady"
    assert production.spec["serviceName"] == STATEFUL_SET["spec"]["serviceName"]


def test_the_image_is_of_this_version_everywhere(variant: Variant) -> None:
    assert variant.container["image"].rpartition("/")[2] == f"mehdb:{__version__}"


def test_every_file_that_a_node_reads_is_in_a_secret_that_is_mounted(variant: Variant) -> None:
    expected = {
        "MEHDB_TOKENS_FILE": ("mehdb-tokens", "tokens"),
        "MEHDB_TOKEN_FILE": ("mehdb-tokens", "node-token"),
        "MEHDB_TLS_CERT": ("mehdb-tls", "tls.crt"),
        "MEHDB_TLS_KEY": ("mehdb-tls", "tls.key"),
        "MEHDB_TLS_CA": ("mehdb-tls", "ca.crt"),
    }
    given = {name: variant.mounted(path) for name, path in variant.environment.items() if name in expected}
    assert given == {name: expected[name] for name in given}
    secrets = {volume["secret"]["secretName"] for volume in variant.pod["volumes"] if "secret" in volume}
    assert secrets == {secret for secret, _ in given.values()}


def test_volumes_and_their_mounts_are_the_same(variant: Variant) -> None:
    volumes = {volume["name"] for volume in variant.pod["volumes"]} | {"data"}
    assert volumes == {mount["name"] for mount in variant.container["volumeMounts"]}


# What selects the pods


def test_services_lead_to_the_leader_to_all_and_to_the_ready(production: Variant) -> None:
    services = {one["metadata"]["name"]: one["spec"] for one in production.all("Service")}
    assert set(services) == {"mehdb", "mehdb-peers", "mehdb-leader", "mehdb-read"}
    first, everybody = production.ordinals[:1], production.ordinals
    selected = {name: production.selected(spec["selector"]) for name, spec in services.items()}
    assert selected == {"mehdb": everybody, "mehdb-peers": everybody, "mehdb-leader": first, "mehdb-read": everybody}
    for name in ("mehdb-leader", "mehdb-read"):
        assert not {"clusterIP", "publishNotReadyAddresses"} & set(services[name]), (
            "an address of its own, for the ready"
        )


def test_every_other_selector_selects_all_pods(production: Variant) -> None:
    (budget,), (policy,) = production.all("PodDisruptionBudget"), production.all("NetworkPolicy")
    spread = production.pod["topologySpreadConstraints"]
    (apart,) = production.pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    selectors = [budget["spec"]["selector"], policy["spec"]["podSelector"], apart["podAffinityTerm"]["labelSelector"]]
    selectors += [one["labelSelector"] for one in spread]
    selectors += [production.spec["selector"]]
    for selector in selectors:
        assert production.selected(selector["matchLabels"]) == production.ordinals


def test_the_policy_lets_in_clients_nodes_and_prometheus_at_the_clients_port_alone(production: Variant) -> None:
    (policy,) = production.all("NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    clients, nodes, prometheus = policy["spec"]["ingress"]
    assert all(rule["ports"] == [{"port": "http"}] for rule in (clients, nodes, prometheus))
    assert "http" in production.ports
    label = {"matchLabels": {"mehdb-client": "true"}}
    assert clients["from"] == [{"podSelector": label}, {"podSelector": label, "namespaceSelector": label}]
    (node,) = nodes["from"]
    assert set(node) == {"podSelector"}
    assert production.selected(node["podSelector"]["matchLabels"]) == production.ordinals
    (scraper,) = prometheus["from"]
    assert set(scraper) == {"podSelector", "namespaceSelector"}, "of that name, in that namespace"
    assert not set(clients["from"][0]["podSelector"]["matchLabels"]) & set(production.labels(production.ordinals[0]))


def test_nodes_get_out_to_each_other_and_to_dns(production: Variant) -> None:
    (policy,) = production.all("NetworkPolicy")
    nodes, dns = policy["spec"]["egress"]
    assert nodes["ports"] == [{"port": production.ports["http"]}]
    assert production.selected(nodes["to"][0]["podSelector"]["matchLabels"]) == production.ordinals
    assert "to" not in dns
    assert {(port["protocol"], port["port"]) for port in dns["ports"]} == {("UDP", 53), ("TCP", 53)}


# What a platform asks for


def test_one_pod_at_a_time_goes_and_never_its_volume(production: Variant) -> None:
    (budget,) = production.all("PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert "minAvailable" not in budget["spec"]
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert production.spec["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}
    assert production.spec["persistentVolumeClaimRetentionPolicy"] == {"whenScaled": "Retain", "whenDeleted": "Retain"}


def test_a_pod_counts_only_once_dns_and_probes_have_had_time(production: Variant) -> None:
    ready = production.probes["readinessProbe"]
    lame_duck = production.settings(production.ordinals[0]).lame_duck  # as long as DNS keeps an answer
    assert production.spec["minReadySeconds"] >= max(2 * ready["periodSeconds"], 2 * lame_duck)


def test_pods_are_apart_where_that_is_possible(production: Variant) -> None:
    spread = production.pod["topologySpreadConstraints"]
    assert [(one["topologyKey"], one["maxSkew"], one["whenUnsatisfiable"]) for one in spread] == [
        ("topology.kubernetes.io/zone", 1, "ScheduleAnyway"),
        ("kubernetes.io/hostname", 1, "ScheduleAnyway"),
    ]
    assert set(production.pod["affinity"]["podAntiAffinity"]) == {"preferredDuringSchedulingIgnoredDuringExecution"}
    assert production.spec["replicas"] >= 3


def test_a_volume_is_one_pods_alone_only_with_that_component(variant: Variant) -> None:
    (claim,) = variant.spec["volumeClaimTemplates"]
    once = variant.name in ("read-write-once-pod", "all", "production")
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod" if once else "ReadWriteOnce"]


def test_the_three_numbers_of_another_first_ordinal_are_one() -> None:
    other = Variant("first-ordinal")
    start = other.spec["ordinals"]["start"]
    assert start > 0
    assert other.settings(start).leader_ordinal == start
    assert other.selected(find(other.documents, "Service", "mehdb-leader")["spec"]["selector"]) == [start]


# Scraping


MONITORED = [name for name in VARIANTS if name.startswith("monitoring") or name in ("all", "production")]


@pytest.mark.parametrize("name", MONITORED)
def test_prometheus_finds_all_pods_once_ready_or_not(name: str) -> None:
    monitored = Variant(name)
    (monitor,) = monitored.all("ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (service,) = [one for one in monitored.all("Service") if wanted <= one["metadata"]["labels"].items()]
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "mehdb"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert f'"{endpoint["path"]}": Route(' in (ROOT / "mehdb" / "api" / "routes.py").read_text()


@pytest.mark.parametrize("name", MONITORED)
def test_prometheus_shows_what_nodes_ask_for(name: str) -> None:
    monitored = Variant(name)
    (monitor,) = monitored.all("ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    node = monitored.settings(monitored.ordinals[0])
    assert endpoint.get("scheme", "http") == node.scheme
    assert ("authorization" in endpoint) == (node.tokens_file is not None)
    assert ("tlsConfig" in endpoint) == (node.tls_cert is not None)
    assert ("cert" in endpoint.get("tlsConfig", {})) == node.tls_verify_clients
    assert ("keySecret" in endpoint.get("tlsConfig", {})) == node.tls_verify_clients


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in MONITORED])
def test_nothing_needs_the_operator_of_prometheus_but_that_component(name: str) -> None:
    assert not [one for one in Variant(name).documents if one["apiVersion"].startswith("monitoring.")]


# Real nodes, with the environment and the Secrets of a variant


def secrets_in(directory: Path, authority: Authority) -> dict[tuple[str, str], Path]:
    """Make what the Secrets hold, as their descriptions say, and return the file of each key."""
    tokens = Tokens(directory / "tokens")
    for name, rights in (("node", "replicate"), ("prometheus", "none"), ("app", "read,write")):
        tokens.give(name, rights)
    certificate = authority.issue("node")
    return {
        ("mehdb-tokens", "tokens"): tokens.path,
        ("mehdb-tokens", "node-token"): tokens.file("node"),
        ("mehdb-prometheus", "token"): tokens.file("prometheus"),
        ("app", "token"): tokens.file("app"),
        ("mehdb-tls", "tls.crt"): certificate.cert,
        ("mehdb-tls", "tls.key"): certificate.key,
        ("mehdb-tls", "ca.crt"): authority.ca,
    }


def pod_of(variant: Variant, cluster: Cluster, secrets: dict[tuple[str, str], Path]) -> Node:
    """Return the cluster's next node, not started, with *variant*'s environment. Ports, peers and paths are others."""
    given = dict(variant.environment)
    for name in ("MEHDB_DATADIR", "MEHDB_LEADER_ORDINAL", "MEHDB_LAME_DUCK"):
        given.pop(name, None)
    for name, path in given.items():
        if path.startswith("/etc/mehdb/"):
            given[name] = str(secrets[variant.mounted(path)])
    if "MEHDB_HEALTH_PORT" in given:
        given["MEHDB_HEALTH_PORT"] = str(free_port())
    return cluster.add(**given)


@pytest.mark.parametrize("name", ["base", "auth", "tls", "mutual-tls", "all"])
def test_nodes_of_a_variant_start_pass_their_probes_follow_and_are_scraped(
    name: str, cluster: Cluster, tmp_path: Path
) -> None:
    variant = Variant(name)
    node = variant.settings(variant.ordinals[0])
    authority = Authority(tmp_path)
    secrets = secrets_in(tmp_path, authority)
    shown = {"Authorization": f"Bearer {secrets['app', 'token'].read_text().strip()}"} if node.tokens_file else {}
    cluster.scheme = node.scheme
    certificate = authority.issue("client") if node.tls_verify_clients else None
    cluster.client = authority.client(certificate, shown)
    nodes = [pod_of(variant, cluster, secrets).start() for _ in range(2)]
    assert nodes[0].put("k", b"v").status_code == 200
    eventually(lambda: nodes[1].get("/get/k").content == b"v", "the follower to have it")
    for one in nodes:
        health = one.environment.get("MEHDB_HEALTH_PORT")
        base = f"http://127.0.0.1:{health}" if health else one.url
        for probe in variant.probes.values():
            answer = httpx.get(base + probe["httpGet"]["path"], trust_env=False, timeout=probe["timeoutSeconds"])
            assert answer.status_code == 200
    prometheus = authority.client(certificate)
    with prometheus:
        if node.tokens_file:
            assert prometheus.get(f"{nodes[0].url}/metrics").status_code == 401
            token = secrets["mehdb-prometheus", "token"].read_text().strip()
            prometheus.headers["Authorization"] = f"Bearer {token}"
        assert "mehdb_ready 1.0" in prometheus.get(f"{nodes[0].url}/metrics").text
        assert prometheus.get(f"{nodes[0].url}/get/k").status_code == (403 if node.tokens_file else 200)


def test_an_unknown_field_of_a_custom_resource_is_noticed() -> None:
    monitor = copy.deepcopy(yaml.safe_load((DEPLOY / "components/monitoring/service-monitor.yaml").read_text()))
    jsonschema.validate(monitor, CUSTOM_RESOURCES["ServiceMonitor"])
    monitor["spec"]["endpoints"][0]["intervall"] = "15s"
    with pytest.raises(jsonschema.ValidationError, match="intervall"):
        jsonschema.validate(monitor, CUSTOM_RESOURCES["ServiceMonitor"])


def run_in(directory: Path, line: str) -> "subprocess.CompletedProcess[str]":
    """Type *line* in *directory*, with `mehdb` on the path."""
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-c", line], cwd=directory, env=clean_environment() | {"PATH": path}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def commands_in(path: Path) -> list[str]:
    """Return what the comments of a file say to type."""
    return re.findall(r"^# {5}(\S.*)$", path.read_text(), re.MULTILINE)


def test_the_secrets_that_the_comments_say_to_make_are_those_that_are_mounted(tmp_path: Path) -> None:
    """Their commands are run, but for `kubectl`."""
    typed = commands_in(DEPLOY / "components/auth/kustomization.yaml")
    made: dict[str, set[str]] = {}
    for line in typed:
        if line.startswith("kubectl "):
            secret = line.split()[6]
            files = re.findall(r"--from-file=(\S+)", line)
            made[secret] = {one.partition("=")[0] for one in files}
            assert all((tmp_path / one.rpartition("=")[2]).stat().st_size for one in files), "made by the lines before"
        else:
            done = run_in(tmp_path, line)
            assert done.returncode == 0, done.stderr
    everything = Variant("all")
    (monitor,) = everything.all("ServiceMonitor")
    shown = monitor["spec"]["endpoints"][0]["authorization"]["credentials"]
    paths = [everything.environment[name] for name in ("MEHDB_TOKENS_FILE", "MEHDB_TOKEN_FILE")]
    mounted = [everything.mounted(path) for path in paths]
    assert made == {"mehdb-tokens": {key for _, key in mounted}, shown["name"]: {shown["key"]}}
