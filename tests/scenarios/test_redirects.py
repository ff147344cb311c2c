"""A follower sends writers to the leader before their body, whatever the body is."""

import os
import re
import socket
from pathlib import Path

import pytest

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, curl


def exchange(node: Node, request: bytes) -> bytes:
    """Return all that *node* answers to a raw *request*, until it closes the connection or is silent for a second."""
    with socket.create_connection((ADDRESS, node.port), timeout=5) as connection:
        connection.sendall(request)
        connection.settimeout(DEADLINE_S)
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
                connection.settimeout(1)
        except TimeoutError:
            pass
        return answer


@pytest.mark.parametrize("size_bytes", [0, 1, 100_000, 900_000, 5 << 20])
@pytest.mark.parametrize("piped", [True, False], ids=["pipe", "file"])
def test_curl_writes_any_body_through_a_follower(
    cluster: Cluster, tmp_path: Path, size_bytes: int, piped: bool
) -> None:
    leader, follower = cluster.start(2).nodes
    value = os.urandom(size_bytes)
    source = tmp_path / "value"
    source.write_bytes(value)
    arguments = ("-L", "-XPUT", "-T", "-" if piped else str(source), f"{follower.url}/set/value")
    assert curl(*arguments, stdin=value if piped else b"") == b"WRITE completed"
    assert leader.get("/get/value").content == value


def test_the_redirect_comes_before_any_100_continue(cluster: Cluster) -> None:
    follower = cluster.start(2).followers[0]
    head = "PUT /set/x HTTP/1.1\r\nHost: x\r\nContent-Length: 5242880\r\nExpect: 100-continue\r\n\r\n"
    answer = exchange(follower, head.encode())
    assert answer.startswith(b"HTTP/1.1 307 ")
    assert b"100 Continue" not in answer
    assert b"\r\nConnection: close\r\n" in answer


def test_the_leader_says_100_continue_only_when_it_wants_the_body(cluster: Cluster) -> None:
    leader = cluster.start(1).leader
    head = "PUT /set/{} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n"
    assert exchange(leader, head.format("x", 5).encode()).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    for refused in (head.format("x", 1 << 30), head.format("%00", 5)):
        answer = exchange(leader, refused.encode())
        assert re.match(rb"HTTP/1.1 4(13|00) ", answer)
        assert b"100 Continue" not in answer


def test_a_location_is_built_from_the_configuration_and_the_raw_target_alone(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    for target in ("/set/a%2Fb?x=%20y&z", "/set/a/b", "/set/%C3%A9", "/set/a%2fb"):
        for host in ("evil.example", f"{ADDRESS}:{follower.port}"):
            for prefix in ("", "http://evil.example"):
                request = f"PUT {prefix}{target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                answer = exchange(follower, request.encode())
                assert f"\r\nLocation: {leader.url}{target}\r\n".encode() in answer, (target, host, prefix)


def test_redirects_use_the_advertised_base_for_clients_elsewhere(cluster: Cluster) -> None:
    cluster.start(1)
    follower = cluster.add(MEHDB_ADVERTISE_URL="https://mehdb-{ordinal}.example/")
    follower.start()
    assert follower.put("k", b"v").headers["Location"] == "https://mehdb-0.example/set/k"
    assert follower.request("DELETE", "/delete/k").headers["Location"] == "https://mehdb-0.example/delete/k"
