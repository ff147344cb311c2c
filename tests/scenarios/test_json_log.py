"""With `--log-format json` each line of a node's log is an object: from its start to its end, whatever happens."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, clean_environment, eventually, free_port

OPEN = "open to everybody who reaches it"
TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def records(log: str) -> list[dict[str, Any]]:
    """Return the lines of a log. Each must be a record."""
    found = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(one) for one in found)
    assert all(TIME.fullmatch(one["time"]) for one in found)
    return found


def events(node: Node) -> list[str]:
    return [one["message"] for one in records(node.log)]


def test_each_change_of_state_is_one_object(cluster: Cluster) -> None:
    leader, follower = cluster.start(2, MEHDB_LOG_FORMAT="json").nodes
    leader.put("k", b"a value that no log may show")
    cluster.converge()
    leader.kill()
    eventually(lambda: "leader not followed" in events(follower), "the follower to notice")
    leader.start()
    eventually(lambda: "leader back" in events(follower), "the follower to find it again")
    eventually(lambda: follower.ready(), "it to be ready")
    cluster.stop()
    assert events(leader) == [
        "started", OPEN, "recovering", "leading", "started", OPEN, "recovering", "leading",
        "draining", "stopping", "stopped",
    ]  # fmt: skip
    assert [one for one in events(follower) if one != "snapshot taken"] == [
        "started", OPEN, "syncing", "synced", "leader not followed", "leader back", "draining", "stopping", "stopped",
    ]  # fmt: skip
    [lost] = [one for one in records(follower.log) if one["message"] == "leader not followed"]
    assert (lost["level"], lost["code"], lost["leader"]) == ("WARNING", "peer_unreachable", leader.url)
    [started, *_] = records(leader.log)
    assert (started["node"], started["port"], started["role"]) == ("mehdb-0", leader.port, "leader")
    assert "no log may show" not in leader.log + follower.log


def test_a_follower_that_starts_again_as_diverged_says_so_once(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"1")
    cluster.converge()
    leader.environment["MEHDB_DATADIR"] = str(leader.volume.with_name("another"))
    follower.stop()
    leader.stop()
    leader.start()
    leader.put("k", b"2")
    follower.start(ready=False)
    eventually(lambda: follower.status().state == "diverged", "the follower to find out")
    assert follower.log.count("leader not followed code=diverged") == 1
    follower.stop()
    follower.start(ready=False)
    eventually(lambda: "still diverged" in follower.log, "it to say so again")
    assert follower.log.count("still diverged") == 1
    assert follower.log.count("leader not followed code=diverged") == 1


@pytest.mark.parametrize(("form", "code"), [("text", 1), ("json", 1)])
def test_why_a_node_ends_is_its_last_record(tmp_path: Path, form: str, code: int) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "mehdb", "serve", "--log-format", form, "--data-dir", str(tmp_path / "file" / "data")],
        env=clean_environment() | {"MEHDB_HOST": "one", "MEHDB_LISTEN": ADDRESS, "MEHDB_PORT": str(free_port())},
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "")
    if form == "json":
        [failed] = records(done.stderr)
        assert (failed["message"], failed["level"], failed["code"]) == ("failed", "ERROR", "store_failed")
        assert "cannot be used" in failed["reason"]
    else:
        assert re.fullmatch("mehdb: .*cannot be used: .*\n", done.stderr)
