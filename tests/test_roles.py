"""Who leads, and where the leader is, from the settings of one node."""

from typing import Final

import pytest

from mehdb.model import Epoch, Role
from mehdb.roles import OrdinalLeadership, address_url, assign, peers_service, pod_url
from mehdb.settings import load

DOMAIN: Final = "mehdb.shop.svc.cluster.local"


def assigned(host: str, fqdn: str | None = None, **environ: str) -> OrdinalLeadership:
    """Return what a node called *host* is; it runs in a pod if it has an *fqdn*."""
    if fqdn:
        environ |= {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "MEHDB_OPEN": "yes"}
    settings = load({}, environ, find_host_name=lambda: host, find_fqdn=lambda _: fqdn or "")
    return assign(settings)


def pod(host: str, **environ: str) -> OrdinalLeadership:
    """Return what a pod called *host* of the StatefulSet is."""
    return assigned(host, f"{host}.{DOMAIN}", **environ)


@pytest.mark.parametrize("host", ["mehdb-0", "my-own-mehdb-0"])
def test_ordinal_zero_leads(host: str) -> None:
    assert pod(host) == OrdinalLeadership(Role.LEADER, leader_url=None, redirect_url=None)


@pytest.mark.parametrize("host", ["mehdb-1", "mehdb-2", "mehdb-10"])
def test_every_other_ordinal_follows_ordinal_zero_of_its_own_statefulset(host: str) -> None:
    url = f"http://mehdb-0.{DOMAIN}:9876"
    assert pod(host) == OrdinalLeadership(Role.FOLLOWER, leader_url=url, redirect_url=url)


def test_a_node_without_an_ordinal_is_a_single_leader() -> None:
    assert assigned("laptop").role is Role.LEADER
    assert assigned("mehdb-01").role is Role.LEADER


def test_another_ordinal_may_lead() -> None:
    assert pod("mehdb-5", MEHDB_LEADER_ORDINAL="5").role is Role.LEADER
    for host in ("mehdb-0", "mehdb-6"):
        follower = pod(host, MEHDB_LEADER_ORDINAL="5")
        assert (follower.role, follower.leader_url) == (Role.FOLLOWER, f"http://mehdb-5.{DOMAIN}:9876")


def test_the_name_of_the_statefulset_is_kept() -> None:
    assert (
        assigned("my-own-kv-3", "my-own-kv-3.kv.shop.svc.example").leader_url
        == "http://my-own-kv-0.kv.shop.svc.example:9876"
    )


def test_the_port_is_that_of_every_node() -> None:
    assert pod("mehdb-1", MEHDB_PORT="80").leader_url == f"http://mehdb-0.{DOMAIN}:80"


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"MEHDB_SERVICE": "kv"}, "mehdb-0.kv.shop.svc.cluster.local"),
        ({"MEHDB_NAMESPACE": "test"}, "mehdb-0.mehdb.test.svc.cluster.local"),
        ({"MEHDB_SERVICE": "kv", "MEHDB_NAMESPACE": "test"}, "mehdb-0.kv.test.svc.cluster.local"),
    ],
)
def test_service_and_namespace_replace_what_the_dns_name_says(environ: dict[str, str], name: str) -> None:
    assert pod("mehdb-1", **environ).leader_url == f"http://{name}:9876"


@pytest.mark.parametrize("fqdn", ["mehdb-1", "mehdb-1.localdomain"])
def test_service_and_namespace_stand_in_for_a_dns_name_that_does_not_tell_them(fqdn: str) -> None:
    follower = assigned("mehdb-1", fqdn, MEHDB_SERVICE="kv", MEHDB_NAMESPACE="test")
    assert follower.leader_url == "http://mehdb-0.kv.test.svc:9876"


def test_peers_win_over_dns_names() -> None:
    peers = "http://127.0.0.1:9876,http://127.0.0.1:9877,http://127.0.0.1:9878"
    for follower in (assigned("mehdb-1", MEHDB_PEERS=peers), pod("mehdb-2", MEHDB_PEERS=peers, MEHDB_SERVICE="kv")):
        assert (follower.role, follower.leader_url) == (Role.FOLLOWER, "http://127.0.0.1:9876")
    assert assigned("mehdb-0", MEHDB_PEERS=peers, MEHDB_LEADER_ORDINAL="2").leader_url == "http://127.0.0.1:9878"


@pytest.mark.parametrize("host", ["mehdb-1", "mehdb-12", "laptop"])
def test_a_local_follower_finds_its_leader_where_the_go_mehdb_did(host: str) -> None:
    follower = assigned(host, MEHDB_LOCAL="1", MEHDB_PEERS="http://a,http://b")
    assert (follower.role, follower.leader_url) == (Role.FOLLOWER, "http://localhost:9999")


def test_ordinal_zero_leads_locally_too() -> None:
    assert assigned("mehdb-0", MEHDB_LOCAL="1").role is Role.LEADER


def test_clients_may_be_sent_to_another_base_than_nodes_use() -> None:
    follower = pod("mehdb-1", MEHDB_ADVERTISE_URL="https://mehdb-{ordinal}.example.com:8443/", MEHDB_LEADER_ORDINAL="7")
    assert follower.leader_url == f"http://mehdb-7.{DOMAIN}:9876"
    assert follower.redirect_url == "https://mehdb-7.example.com:8443"
    assert pod("mehdb-1", MEHDB_ADVERTISE_URL="https://example.com").redirect_url == "https://example.com"


def test_a_pod_finds_each_other_pod() -> None:
    settings = load(
        {}, {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "MEHDB_OPEN": "yes"},
        find_host_name=lambda: "mehdb-0", find_fqdn=lambda host: f"{host}.{DOMAIN}",
    )  # fmt: skip
    assert [pod_url(settings, ordinal) for ordinal in (0, 3, 10)] == [
        f"http://mehdb-{ordinal}.{DOMAIN}:9876" for ordinal in (0, 3, 10)
    ]


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "mehdb-peers.shop.svc.cluster.local"),
        ({"MEHDB_SERVICE": "kv"}, "kv-peers.shop.svc.cluster.local"),
        ({"MEHDB_NAMESPACE": "test"}, "mehdb-peers.test.svc.cluster.local"),
        ({"MEHDB_PEERS_SERVICE": "all"}, "all.shop.svc.cluster.local"),
        ({"MEHDB_PEERS": "http://a,http://b"}, None),
        ({"MEHDB_LOCAL": "yes"}, None),
    ],
)
def test_all_pods_are_listed_in_the_namespace_of_their_names(environ: dict[str, str], name: str | None) -> None:
    environ |= {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "MEHDB_OPEN": "yes"}
    settings = load({}, environ, find_host_name=lambda: "mehdb-1", find_fqdn=lambda host: f"{host}.{DOMAIN}")
    assert peers_service(settings) == name


def test_outside_kubernetes_nobody_lists_them() -> None:
    settings = load({}, {"MEHDB_PEERS": "http://a,http://b"}, find_host_name=lambda: "mehdb-1")
    assert peers_service(settings) is None


def test_a_node_is_asked_at_an_address_on_the_port_of_all() -> None:
    settings = load({}, {"MEHDB_PORT": "80"}, find_host_name=lambda: "mehdb")
    assert [address_url(settings, one) for one in ("10.0.0.1", "fd00::1")] == [
        "http://10.0.0.1:80",
        "http://[fd00::1]:80",
    ]


def test_each_start_of_a_leader_is_the_next_epoch() -> None:
    leadership = assigned("mehdb-0")
    assert [leadership.next_epoch(Epoch(seen)) for seen in (0, 1, 41)] == [1, 2, 42]
