"""What clients can make a node hold in memory is bounded."""

import socket
from contextlib import ExitStack

from cluster import ADDRESS, Cluster, Node, eventually

MIB = 1 << 20


def begin(node: Node, size_bytes: int) -> socket.socket:
    """Send all of a value but its last byte, and leave the connection open."""
    connection = socket.create_connection((ADDRESS, node.port), timeout=20)
    connection.sendall(b"PUT /set/held HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size_bytes)
    connection.sendall(bytes(size_bytes - 1))
    return connection


def has_room(node: Node, size_bytes: int) -> bool:
    """Ask whether a body may come, without sending any of it."""
    with socket.create_connection((ADDRESS, node.port), timeout=20) as connection:
        head = "PUT /set/k HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.format(size_bytes).encode())
        return connection.recv(12) == b"HTTP/1.1 100"


def test_bodies_that_arrive_share_a_bound_and_give_it_back(cluster: Cluster) -> None:
    leader = cluster.add(MEHDB_QUEUE_SIZE="8MiB").start()
    with ExitStack() as stack:
        held = stack.enter_context(begin(leader, 6 * MIB))
        eventually(lambda: not has_room(leader, 3 * MIB), "the bound to be reached")
        refused = leader.put("k", bytes(3 * MIB))
        assert (refused.status_code, refused.json()["error"]) == (503, "queue_full")
        assert refused.headers["Retry-After"] == "1"
        assert leader.put("small", b"1").status_code == 200, "what came with its head needs no room"
        held.sendall(b"\0")
        assert held.recv(12) == b"HTTP/1.1 200"
    assert leader.put("k", bytes(3 * MIB)).status_code == 200


def test_a_client_that_goes_away_gives_back_what_it_held(cluster: Cluster) -> None:
    leader = cluster.add(MEHDB_QUEUE_SIZE="8MiB").start()
    with begin(leader, 6 * MIB):
        eventually(lambda: not has_room(leader, 3 * MIB), "the bound to be reached")
    eventually(lambda: leader.put("k", bytes(3 * MIB)).status_code == 200, "the room to be free again")
    assert leader.get("/get/held").status_code == 404


def test_one_value_of_the_largest_size_always_has_room(cluster: Cluster) -> None:
    leader = cluster.add(MEHDB_QUEUE_SIZE="8MiB", MEHDB_MAX_VALUE="8MiB").start()
    for _ in range(2):
        assert leader.put("large", bytes(8 * MIB)).status_code == 200
