"""Whoever waits for a change holds a connection, and nothing more: probes and writers find their way all the same."""

from contextlib import ExitStack

from cluster import Cluster, eventually
from wire import Connection, ask, request

CONNECTIONS = 32
WAITING = CONNECTIONS + 8


def test_long_polls_do_not_keep_out_the_probes(cluster: Cluster) -> None:
    node = cluster.add(MEHDB_MAX_CONNECTIONS=str(CONNECTIONS)).start()
    assert node.put("key", b"v").is_success
    at = node.position()
    poll = f"/replicate?history={at['history']}&after={at['revision']}&chain={at['chain']}&wait=60"
    with ExitStack() as stack:
        waiting = [stack.enter_context(Connection(node)) for _ in range(WAITING)]
        for connection in waiting:
            connection.send(request("GET", poll))
        for _ in range(10):
            assert ask(node, "GET", "/livez").status == ask(node, "GET", "/readyz").status == 200
        assert node.put("key", b"w").is_success  # which all that are left are told
        assert waiting[-1].reply().status == 200


def test_names_that_a_client_makes_up_do_not_flood_the_log(cluster: Cluster) -> None:
    node = cluster.add().start()
    assert node.put("key", b"v").is_success
    for number in range(300):
        reply = ask(node, "GET", f"/replicate?history={'0' * 32}&after=1&chain={'1' * 32}&node=made-up-{number}")
        assert reply.status == 409
    eventually(lambda: "follower refused" in node.log, "the log to tell of the first")
    assert node.log.count("follower refused") < 20
