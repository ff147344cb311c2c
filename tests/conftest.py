"""What all tests share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import settings

from cluster import Cluster

# The same examples in every run: a failure is a finding, never a coincidence.
settings.register_profile("mehdb", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("mehdb")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Nodes for one test: stopped in order at its end, and every store that is left verified."""
    nodes = Cluster(tmp_path)
    try:
        yield nodes
        nodes.stop()
    finally:
        nodes.discard()
    await nodes.check()
