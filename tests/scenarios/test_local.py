"""`mehdb local`: a StatefulSet of real processes on one machine."""

import asyncio
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster import DEADLINE_S, check_volume, clean_environment, eventually, free_ports
from mehdb.model import NodeStatus, decode_status

REPLICAS = 3
STOP_DEADLINE_S = 60


class Local:
    """One `mehdb local`, and what it printed."""

    def __init__(self, data_dir: Path, output: Path) -> None:
        self.data_dir = data_dir
        self.port = free_ports(REPLICAS)
        self._output = output
        command = [sys.executable, "-m", "mehdb", "local", "--replicas", str(REPLICAS), "--port", str(self.port)]
        with output.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--data-dir", str(data_dir)], env=clean_environment(), stdin=subprocess.DEVNULL,
                stdout=out, stderr=out,
            )  # fmt: skip

    @property
    def printed(self) -> str:
        return self._output.read_text()

    def url(self, ordinal: int) -> str:
        return f"http://127.0.0.1:{self.port + ordinal}"

    def status(self, ordinal: int) -> NodeStatus | None:
        try:
            answer = httpx.get(f"{self.url(ordinal)}/status", headers={"Accept": "application/json"}, trust_env=False)
        except httpx.TransportError:
            return None
        return decode_status(answer.content)

    def all_ready(self) -> bool:
        assert self.process.poll() is None, self.printed
        return all((status := self.status(ordinal)) and status.ready for ordinal in range(REPLICAS))

    def pid(self, ordinal: int) -> int:
        return int((self.data_dir / f"mehdb-{ordinal}" / "lock").read_text().split()[0])

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        assert self.process.wait(STOP_DEADLINE_S) == 0, self.printed


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    running = Local(tmp_path / "data", tmp_path / "output")
    try:
        eventually(running.all_ready, "a local cluster", STOP_DEADLINE_S)
        yield running
    finally:
        if running.process.poll() is None:
            running.stop(signal.SIGTERM)
    for ordinal in range(REPLICAS):
        asyncio.run(check_volume(tmp_path / "data" / f"mehdb-{ordinal}"))


def test_nodes_start_in_order_each_when_the_one_before_is_ready(local: Local) -> None:
    eventually(lambda: "Try, in another terminal" in local.printed, "the commands to try")
    starts = re.findall(r"^node=(mehdb-\d) role=\S+ url=\S+ pid=\d+ ready=yes", local.printed, re.MULTILINE)
    assert starts == ["mehdb-0", "mehdb-1", "mehdb-2"]
    leader, *followers = (local.status(ordinal) for ordinal in range(REPLICAS))
    assert leader is not None
    assert leader.role == "leader"
    assert [follower.role for follower in followers if follower] == ["follower", "follower"]
    ages = [status.uptime_seconds for status in (leader, *followers) if status]
    assert ages == sorted(ages, reverse=True)


def test_a_killed_node_comes_back_on_its_volume_with_its_data(local: Local) -> None:
    httpx.put(f"{local.url(0)}/set/k", content=b"v", trust_env=False)
    for ordinal in (2, 0):
        eventually(lambda: (status := local.status(2)) and status.revision == 1, "the write on a follower")
        before = local.pid(ordinal)
        os.kill(before, signal.SIGKILL)
        eventually(lambda: local.pid(ordinal) != before and local.all_ready(), "another process")  # noqa: B023
        assert httpx.get(f"{local.url(ordinal)}/get/k", trust_env=False).content == b"v"
        eventually(lambda: f"(pid {before}) ended: signal 9" in local.printed, "a word about it")  # noqa: B023


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_in_reverse_order(local: Local, number: int) -> None:
    pids = [local.pid(ordinal) for ordinal in range(REPLICAS)]
    local.stop(number)
    assert re.findall(r"^(mehdb-\d) stopped", local.printed, re.MULTILINE) == ["mehdb-2", "mehdb-1", "mehdb-0"]
    for ordinal, pid in enumerate(pids):
        assert not Path(f"/proc/{pid}").exists()
        assert "stopped node=" in (local.data_dir / f"mehdb-{ordinal}.log").read_text()


def started_beside(local: Local, data_dir: Path, port: int) -> str:
    """Return what a second cluster says before it starts anything."""
    done = subprocess.run(
        [sys.executable, "-m", "mehdb", "local", "--port", str(port), "--data-dir", str(data_dir)],
        env=clean_environment(), capture_output=True, timeout=DEADLINE_S, check=False, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert local.all_ready()
    return done.stderr


def test_a_taken_port_is_refused_before_anything_starts(local: Local, tmp_path: Path) -> None:
    said = started_beside(local, tmp_path / "other", local.port)
    assert len(re.findall(r"--port: \d+ is in use", said)) == REPLICAS
    assert not (tmp_path / "other" / "mehdb-0").exists()


def test_a_volume_in_use_is_refused_and_says_which_process_to_end(local: Local) -> None:
    said = started_beside(local, local.data_dir, free_ports(REPLICAS))
    for ordinal in range(REPLICAS):
        assert f"end it with `kill {local.pid(ordinal)}`" in said


def test_a_stop_while_it_starts_leaves_no_process_and_no_traceback(tmp_path: Path) -> None:
    running = Local(tmp_path / "data", tmp_path / "output")
    eventually(lambda: (tmp_path / "data" / "mehdb-0" / "lock").exists(), "the first node to start", STOP_DEADLINE_S)
    running.stop(signal.SIGINT)
    assert "Warning" not in running.printed
    assert "Traceback" not in running.printed
    assert "mehdb-2" not in running.printed
    assert running.status(0) is None


def test_a_cluster_that_cannot_be_kept_ends_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "mehdb-0.log").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "mehdb", "local", "--port", str(free_ports(REPLICAS)), "--data-dir", str(tmp_path)],
        env=clean_environment(), capture_output=True, timeout=DEADLINE_S, check=False, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "mehdb-0.log" in done.stderr


def test_a_terminal_shows_a_line_for_each_node_that_stays_current(tmp_path: Path) -> None:
    """A pseudo-terminal stands in for the real one; what is drawn on it is looked at without its escape sequences."""
    port = free_ports(2)
    command = [sys.executable, "-m", "mehdb", "local", "--replicas", "2", "--port", str(port)]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*command, "--data-dir", str(tmp_path / "data")],
        env=clean_environment() | {"TERM": "xterm", "COLUMNS": "120"}, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    drawn = b""

    def shows(pattern: str) -> bool:
        nonlocal drawn
        while select.select([ours], [], [], 0)[0]:
            drawn += os.read(ours, 65536)
        return re.search(pattern, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode(errors="replace"))) is not None

    line = r"mehdb-0\s+leader\s+\S+\s+\d+\s+yes\s+{0}\s+-\s+mehdb-1\s+follower\s+\S+\s+\d+\s+yes\s+{0}\s+0"
    try:
        eventually(lambda: shows(line.format(0)), "both lines", STOP_DEADLINE_S)
        httpx.put(f"http://127.0.0.1:{port}/set/k", content=b"v", trust_env=False)
        eventually(lambda: shows(line.format(1)), "the lines to stay current")
    finally:
        process.terminate()
        process.wait(STOP_DEADLINE_S)
        os.close(ours)
        os.close(theirs)
