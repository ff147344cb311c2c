"""The nodes that the tests of this folder share: no test changes a role, and each keeps to keys of its own."""

from collections.abc import Iterator

import pytest

from cluster import Cluster, Node, running


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
