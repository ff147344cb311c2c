"""Files that go from under a running node, or that a command is pointed at by mistake."""

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from cluster import DEADLINE_S, Cluster, Node, eventually


def empty(path: Path) -> None:
    with path.open("wb"):
        pass


def mehdb(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mehdb", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.mark.parametrize(
    ("file", "what"),
    [("store.db", Path.unlink), ("store.db", empty), ("store.db-wal", Path.unlink)],
    ids=["store deleted", "store emptied", "WAL deleted"],
)
def test_a_node_whose_files_are_gone_acknowledges_no_more_and_says_why(
    cluster: Cluster, file: str, what: Callable[[Path], None]
) -> None:
    node = cluster.add().start()
    node.put("k", b"v")
    what(node.volume / file)
    process = node.process
    assert process is not None
    eventually(lambda: process.poll() is not None, "the node to notice")
    assert process.returncode == 1
    assert "was deleted or replaced while it was open" in node.log
    cluster.nodes.clear()  # what is left is no store


@pytest.mark.parametrize("gone", ["store.db", "store.db-wal"])
def test_nothing_is_acknowledged_into_a_deleted_file(cluster: Cluster, gone: str) -> None:
    node = cluster.add().start()
    assert node.put("k", b"v").is_success
    (node.volume / gone).unlink()
    with contextlib.suppress(httpx.TransportError):  # the node may have noticed by itself
        assert node.put("k", b"lost").status_code == 500
    process = node.process
    assert process is not None
    eventually(lambda: process.poll() is not None, "the node to end")
    assert process.returncode == 1
    cluster.nodes.clear()  # what is left is no store


@pytest.fixture
def node(cluster: Cluster) -> Node:
    node = cluster.add().start()
    node.put("k", b"v")
    return node


def test_a_backup_never_goes_where_a_node_has_its_store(node: Node) -> None:
    for target, reason in (
        (node.volume / "store.db", "is in a data directory: name a file elsewhere"),
        (node.volume / "backup.db", "is in a data directory: name a file elsewhere"),
        (node.volume, "is a directory: name a file"),
    ):
        done = mehdb("backup", target, "--yes", "--data-dir", node.volume)
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr
    assert node.get("/get/k").content == b"v"


@pytest.mark.parametrize("command", ["check", "restore"])
def test_a_file_without_its_wal_is_not_taken_for_a_backup(node: Node, tmp_path: Path, command: str) -> None:
    done = mehdb(command, node.volume / "store.db", "--data-dir", tmp_path / "new")
    assert done.returncode == 1
    assert "is not all of its store, store.db-wal is beside it" in done.stderr
