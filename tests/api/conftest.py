"""The nodes that the tests of this folder share: no test changes a role, and each keeps to keys of its own."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import Cluster, Node
from wire import Connection


@contextmanager
def running(directory: Path) -> Iterator[Cluster]:
    """Have nodes for many tests, as the fixture `cluster` does for one."""
    nodes = Cluster(directory)
    try:
        yield nodes
        nodes.stop()
    finally:
        nodes.discard()
    asyncio.run(nodes.check())


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A leader and a follower."""
    with running(tmp_path_factory.mktemp("pair")) as nodes:
        yield nodes.start(2)


@pytest.fixture
def leader(pair: Cluster) -> Node:
    return pair.leader


@pytest.fixture
def follower(pair: Cluster) -> Node:
    return pair.followers[0]


@pytest.fixture
def connection(leader: Node) -> Iterator[Connection]:
    """A connection to the leader, for requests one after the other."""
    with Connection(leader) as connection:
        yield connection
