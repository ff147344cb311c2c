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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the proofs have found: the last line that each test has printed, which pytest keeps to itself."""
    proofs = [report for report in terminalreporter.getreports("passed") if report.capstdout.strip()]
    if proofs:
        terminalreporter.section("proofs")
    for report in proofs:
        terminalreporter.line(f"{report.capstdout.splitlines()[-1]} ({report.head_line})")
