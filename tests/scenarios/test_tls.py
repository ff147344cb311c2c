"""TLS between nodes and for clients, certificates of both sides, and that they change under a node that runs."""

import contextlib
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from client_command import mehdb
from cluster import ADDRESS, CLIENT, DEADLINE_S, Cluster, Node, curl, eventually, free_port
from guards import Authority, Certificate, recovers_without_its_volume, swap
from mehdb.api.handshake import HANDSHAKES_MAX


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def encrypted(nodes: Cluster, authority: Authority, certificate: Certificate, **environment: str) -> dict[str, str]:
    """Have *nodes* talk TLS, and return what they are to run with."""
    nodes.scheme, nodes.client = "https", authority.client()
    tls = {"MEHDB_TLS_CERT": certificate.cert, "MEHDB_TLS_KEY": certificate.key, "MEHDB_TLS_CA": authority.ca}
    return {name: str(path) for name, path in tls.items()} | environment


def serial(node: Node, authority: Authority) -> str:
    """Return which certificate *node* shows to a new connection."""
    context = ssl.create_default_context(cafile=authority.ca)
    with (
        socket.create_connection((ADDRESS, node.port), DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname=ADDRESS) as connection,
    ):
        return str((connection.getpeercert() or {})["serialNumber"])


def test_nodes_and_clients_talk_tls(cluster: Cluster, authority: Authority) -> None:
    cluster.start(2, **encrypted(cluster, authority, authority.issue("node")))
    follower = cluster.followers[0]
    redirected = follower.put("k", b"v")
    assert (redirected.status_code, redirected.headers["Location"]) == (307, f"{cluster.leader.url}/set/k")
    url = f"{follower.url}/set/k"
    assert curl("--cacert", str(authority.ca), "-L", "-XPUT", "-d", "v", url) == b"WRITE completed"
    assert follower.put("forwarded?forward=true", b"v").status_code == 200
    cluster.converge()
    assert follower.get("/get/k").content == b"v"
    stranger = subprocess.run(["curl", "-sS", url], capture_output=True, check=False, timeout=DEADLINE_S)
    assert stranger.returncode == 60, "curl does not know the authority"


def test_a_large_value_goes_through_both_ways(cluster: Cluster, authority: Authority) -> None:
    cluster.start(2, **encrypted(cluster, authority, authority.issue("node")))
    value = bytes(range(256)) * (8 << 12)
    assert cluster.leader.put("large", value).status_code == 200
    cluster.converge()
    assert cluster.followers[0].get("/get/large").content == value


def test_what_comes_right_behind_a_handshake_is_answered(cluster: Cluster, authority: Authority) -> None:
    """A client may send its request in one packet with the end of the handshake."""
    node = cluster.start(1, **encrypted(cluster, authority, authority.issue("node"))).leader
    context = ssl.create_default_context(cafile=authority.ca)
    for _ in range(50):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname=ADDRESS)
        with socket.create_connection((ADDRESS, node.port), DEADLINE_S) as connection:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(1 << 16))
            tls.write(b"GET /livez HTTP/1.1\r\nHost: n\r\n\r\n")
            connection.sendall(outgoing.read())  # the end of the handshake and the request, at once
            answer = b""
            while not answer:
                incoming.write(connection.recv(1 << 16))
                with contextlib.suppress(ssl.SSLWantReadError):  # a session ticket comes first
                    answer = tls.read(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


def test_only_those_with_a_certificate_are_let_in(cluster: Cluster, authority: Authority) -> None:
    """And nodes show each other theirs. The probes have a port of their own."""
    health_ports = [free_port(), free_port()]
    tls = encrypted(cluster, authority, authority.issue("node"), MEHDB_TLS_VERIFY_CLIENTS="yes")
    client = authority.issue("app")
    cluster.client.close()
    cluster.client = authority.client(client)
    for port in health_ports:
        cluster.add(**tls, MEHDB_HEALTH_PORT=str(port)).start()
    leader, follower = cluster.nodes
    assert leader.put("k", b"v").status_code == 200
    cluster.converge()
    assert follower.get("/get/k").content == b"v"
    with authority.client() as nobody, Authority(authority.ca.parent, "other").client() as stranger:
        for one in (nobody, stranger):
            with pytest.raises(httpx.TransportError):
                one.get(f"{follower.url}/livez")
    with pytest.raises(httpx.TransportError):
        CLIENT.get(f"http://{ADDRESS}:{follower.port}/livez")
    assert re.search(
        rf"logger=mehdb\.audit refused from={ADDRESS} reason=PEER_DID_NOT_RETURN_A_CERTIFICATE", follower.log
    )
    for port, node in zip(health_ports, cluster.nodes, strict=True):
        probes = f"http://{ADDRESS}:{port}"
        assert CLIENT.get(f"{probes}/livez").text == "event loop: ok\n"
        assert CLIENT.get(f"{probes}/readyz").status_code == 200
        assert CLIENT.get(f"{probes}/status?level=full").text == "1"
        assert CLIENT.get(f"{probes}/status", headers={"Accept": "application/json"}).text == node.status().role
        for target in ("/get/k", "/keys", "/metrics", "/position", "/snapshot", "/watch", "/replicate"):
            assert CLIENT.get(probes + target).status_code == 404
        assert CLIENT.put(f"{probes}/set/k", content=b"v").status_code == 404


def test_a_follower_believes_no_leader_of_another_authority(
    cluster: Cluster, authority: Authority, tmp_path: Path
) -> None:
    cluster.start(1, **encrypted(cluster, authority, authority.issue("node")))
    other = Authority(tmp_path, "other")
    guards = encrypted(cluster, other, other.issue("stranger"))
    follower = cluster.add(**guards).start(ready=False)
    eventually(lambda: "CERTIFICATE_VERIFY_FAILED" in (follower.status().reason or ""), "the reason to be told")
    assert not follower.ready()
    follower.stop()


def test_a_new_certificate_is_shown_without_a_restart(cluster: Cluster, authority: Authority) -> None:
    certificate = authority.issue("node")
    cluster.start(2, **encrypted(cluster, authority, certificate))
    leader = cluster.leader
    before = serial(leader, authority)
    leader.put("k", b"1")
    authority.issue("renewed", into=certificate)
    eventually(lambda: serial(leader, authority) != before, "the new certificate to be shown")
    leader.put("k", b"2")
    cluster.converge()
    shown = serial(leader, authority)
    swap(certificate.cert, b"not a certificate\n")
    eventually(lambda: "credentials not read, the old ones stay" in leader.log, "the wrong file to be noticed")
    assert serial(leader, authority) == shown
    leader.put("k", b"3")
    cluster.converge()


def test_another_authority_takes_over_without_a_restart(cluster: Cluster, authority: Authority, tmp_path: Path) -> None:
    """First both are believed, then certificates are of the new one, then the old one is no longer believed."""
    certificate, old = authority.issue("node"), authority.issue("old-client")
    tls = encrypted(cluster, authority, certificate, MEHDB_TLS_VERIFY_CLIENTS="yes")
    bundle = Path(tls["MEHDB_TLS_CA"])
    cluster.client.close()
    cluster.client = authority.client(old)
    cluster.start(2, **tls)
    leader, follower = cluster.nodes
    new = Authority(tmp_path, "new")
    both = tmp_path / "both.pem"
    both.write_bytes(bundle.read_bytes() + new.ca.read_bytes())
    swap(bundle, both.read_bytes())
    eventually(lambda: all(node.log.count("credentials read") == 1 for node in cluster.nodes), "both to be believed")
    new.issue("node-of-new", into=certificate)
    eventually(lambda: all(node.log.count("credentials read") >= 2 for node in cluster.nodes), "the new to be shown")
    swap(bundle, new.ca.read_bytes())
    with new.client(new.issue("new-client")) as client, httpx.Client(verify=_trusting(new, old)) as late:
        for node in cluster.nodes:
            node.client = client
            eventually(lambda node=node: _refused(late, node), f"{node.name} to believe the old authority no longer")
        leader.put("k", b"v")
        cluster.converge()
        assert follower.get("/get/k").content == b"v"
        cluster.stop()


def _trusting(authority: Authority, certificate: Certificate) -> ssl.SSLContext:
    """Return what believes *authority* and shows *certificate*, which is of another."""
    context = ssl.create_default_context(cafile=authority.ca)
    context.load_cert_chain(certificate.cert, certificate.key)
    return context


def _refused(client: httpx.Client, node: Node) -> bool:
    try:
        client.get(f"{node.url}/livez", headers={"Connection": "close"})
    except httpx.TransportError:
        return True
    return False


def test_a_leader_without_its_volume_recovers_over_tls(cluster: Cluster, authority: Authority) -> None:
    cluster.start(2, **encrypted(cluster, authority, authority.issue("node")))
    recovers_without_its_volume(cluster)


def test_handshakes_that_never_end_keep_nobody_out(cluster: Cluster, authority: Authority) -> None:
    tls = encrypted(cluster, authority, authority.issue("node"))
    node = cluster.start(1, **tls, MEHDB_MAX_CONNECTIONS="16", MEHDB_HEADER_TIMEOUT="60").leader
    with _silent(node, 100) as silent:
        assert node.put("k", b"v").status_code == 200
        assert node.get("/get/k").content == b"v"
        assert _closed(silent[0]), "the longest idle made room"


def test_there_are_not_many_handshakes_at_once(cluster: Cluster, authority: Authority) -> None:
    """Each holds what a stranger has sent: the oldest makes room, however many connections there may be."""
    tls = encrypted(cluster, authority, authority.issue("node"))
    node = cluster.start(1, **tls, MEHDB_HEADER_TIMEOUT="60").leader
    with _silent(node, 200) as silent:
        assert all(_closed(one) for one in silent[: 200 - HANDSHAKES_MAX])
        assert node.put("k", b"v").status_code == 200


def test_a_handshake_has_the_time_that_a_head_has(cluster: Cluster, authority: Authority) -> None:
    tls = encrypted(cluster, authority, authority.issue("node"))
    node = cluster.start(1, **tls, MEHDB_HEADER_TIMEOUT="0.3").leader
    with _silent(node, 1) as [silent]:
        assert _closed(silent)


@contextlib.contextmanager
def _silent(node: Node, count: int) -> Iterator[list[socket.socket]]:
    """Have *count* connections to *node* on which nothing is said."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((ADDRESS, node.port), DEADLINE_S)) for _ in range(count)]


def _closed(connection: socket.socket) -> bool:
    """Return once the other end has closed *connection*; it times out otherwise."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_the_command_line_shows_its_certificate(cluster: Cluster, authority: Authority) -> None:
    tls = encrypted(cluster, authority, authority.issue("node"), MEHDB_TLS_VERIFY_CLIENTS="yes")
    client = authority.issue("app")
    cluster.client.close()
    cluster.client = authority.client(client)
    node = cluster.start(1, **tls).leader
    flags = ("--tls-ca", str(authority.ca), "--tls-cert", str(client.cert), "--tls-key", str(client.key))
    assert mehdb(node.url, "set", "k", "v", *flags).code == 0
    assert mehdb(node.url, "get", "k", *flags).out == b"v"
    assert mehdb(node.url, "status", *flags).code == 0
    assert mehdb(node.url, "get", "k", "--timeout", 0.5, *flags[:2]).code == 1
    assert mehdb(node.url, "get", "k", *flags[:4]).code == 2, "a certificate needs its key"


def test_the_command_line_says_at_once_which_flag_would_help(cluster: Cluster, authority: Authority) -> None:
    """Not after having tried again for --timeout."""
    plain = cluster.start(1).leader
    assert "--url" in mehdb(plain.url.replace("http", "https"), "get", "k", "--timeout", 3600).failed()
    tls = encrypted(cluster, authority, authority.issue("node"))
    node = cluster.add(**tls, MEHDB_HOST="mehdb-0", MEHDB_PEERS="").start()
    assert "--tls-ca" in mehdb(node.url, "get", "k", "--timeout", 3600).failed()


def test_the_command_line_takes_the_health_port_for_no_node_without_keys(cluster: Cluster) -> None:
    port = free_port()
    cluster.start(1, MEHDB_HEALTH_PORT=str(port))
    assert "health port" in mehdb(f"http://{ADDRESS}:{port}", "get", "k").failed()


def test_the_command_line_follows_nobody_to_where_others_can_read(cluster: Cluster, authority: Authority) -> None:
    tls = encrypted(cluster, authority, authority.issue("node"))
    cluster.start(1, **tls)
    follower = cluster.add(**tls, MEHDB_ADVERTISE_URL=f"http://{ADDRESS}:{free_port()}").start()
    said = mehdb(follower.url, "set", "k", "v", "--tls-ca", authority.ca).failed()
    assert "which is not encrypted" in said


def test_adopt_knows_a_node_at_an_address_by_its_name(cluster: Cluster, authority: Authority, tmp_path: Path) -> None:
    certificate = authority.issue("node", "mehdb-1.mehdb.shop.svc.cluster.local")
    tls = encrypted(cluster, authority, certificate)
    cluster.client.close()
    cluster.client = authority.client(any_name=True)
    node = cluster.start(1, **tls).leader
    node.put("k", b"v")
    adopt = ("adopt", "--from", node.url, "--data-dir", tmp_path / "new", "--yes", "--tls-ca", authority.ca)
    assert "certificate verify failed" in mehdb("", *adopt).failed().lower()
    done = mehdb("", *adopt, "--tls-server-name", "mehdb-1.mehdb.shop.svc.cluster.local")
    assert (done.code, b"took 1 keys" in done.out) == (0, True), done


@pytest.mark.parametrize("wrong", ["cert", "key", "ca"])
def test_what_cannot_be_read_is_told_before_anything_is_opened(
    cluster: Cluster, authority: Authority, tmp_path: Path, wrong: str
) -> None:
    tls = encrypted(cluster, authority, authority.issue("node"))
    tls[f"MEHDB_TLS_{wrong.upper()}"] = str(tmp_path / "nowhere")
    node = cluster.add(**tls)
    with pytest.raises(AssertionError, match="ended by itself"):
        node.start()
    node.process = None
    assert re.search(rf"mehdb: .*--tls-{wrong}.* cannot be read: No such file", node.log)
    assert not node.volume.exists()
