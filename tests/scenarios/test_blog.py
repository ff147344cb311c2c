"""What the blog post shows, to the byte, with the real curl. See README for the walk-through."""

from pathlib import Path

from cluster import Cluster, curl, eventually


def test_a_value_written_through_a_follower_is_read_from_it(cluster: Cluster, tmp_path: Path) -> None:
    follower = cluster.start(2).followers[0]
    (tmp_path / "test").write_text("test data\n")
    assert curl("-L", "-XPUT", "-T", str(tmp_path / "test"), f"{follower.url}/set/test") == b"WRITE completed"
    cluster.converge()
    assert curl(f"{follower.url}/get/test") == b"test data\n"


def test_a_follower_redirects_a_write_to_the_leader(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    answer = curl("-i", "-XPUT", "-d", "test data", f"{follower.url}/set/test").decode()
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 307 Temporary Redirect\r\n")
    assert f"\r\nLocation: {leader.url}/set/test\r\n" in head
    assert "nothing was written" in body
    assert leader.get("/get/test").status_code == 404


def test_the_status_is_the_role_and_at_level_full_the_number_of_keys(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    for key in ("a", "b", "c"):
        leader.put(key, b"1")
    leader.request("DELETE", "/delete/b")
    cluster.converge()
    for node, role in ((leader, b"leader"), (follower, b"follower")):
        assert curl(f"{node.url}/status") == role
        assert curl(f"{node.url}/status?level=full") == b"2"
    assert curl(f"{follower.url}/keys") == b'["a","c"]\n'


def test_a_scaled_out_cluster_has_all_data_on_every_node(cluster: Cluster) -> None:
    cluster.start(2)
    for number in range(50):
        cluster.leader.put(f"key/{number}", b"%d" % number)
    cluster.start(2)
    cluster.converge()
    for node in cluster.nodes:
        assert curl(f"{node.url}/status?level=full") == b"50"
        assert curl(f"{node.url}/get/key/49") == b"49"


def test_a_deleted_follower_comes_back_with_its_data(cluster: Cluster) -> None:
    follower = cluster.start(2).followers[0]
    cluster.leader.put("test", b"test data\n")
    cluster.converge()
    follower.stop()
    cluster.leader.put("later", b"written meanwhile")
    follower.start()
    assert curl(f"{follower.url}/get/test") == b"test data\n"
    assert curl(f"{follower.url}/get/later") == b"written meanwhile"


def test_the_environment_of_the_go_mehdb_keeps_its_meaning(cluster: Cluster, tmp_path: Path) -> None:
    """What an old shell script sets: MEHDB_HOST, MEHDB_PORT and MEHDB_DATADIR for a leader, MEHDB_LOCAL for a follower.

    The leader that MEHDB_LOCAL means is at port 9999, which may be taken here: that is all that this leaves out.
    """
    leader = cluster.add(MEHDB_PEERS="")
    leader.start()
    assert curl(f"{leader.url}/status") == b"leader"
    assert (tmp_path / "mehdb-0" / "store.db").exists()
    follower = cluster.add(MEHDB_HOST="laptop", MEHDB_LOCAL="yes", MEHDB_PEERS="")
    follower.start(ready=False)
    assert curl(f"{follower.url}/status") == b"follower"
    answer = follower.put("test", b"1")
    assert (answer.status_code, answer.headers["Location"]) == (307, "http://localhost:9999/set/test")
    assert eventually(lambda: follower.status().leader, "a status").url == "http://localhost:9999"
