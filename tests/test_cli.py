"""The `mehdb` command: what it says of itself, what it refuses before it does anything, and how it ends."""

import asyncio
import json
import os
import platform
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import apsw
import httpx
import pytest

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, clean_environment, curl, eventually, free_port
from mehdb import __version__
from mehdb.model import Epoch
from mehdb.settings import SETTINGS, flag
from mehdb.store import SCHEMA_VERSION, Store, Write
from mehdb.store.schema import use_page_checksums

MODULE = (sys.executable, "-m", "mehdb")
SCRIPT = (str(Path(sys.executable).with_name("mehdb")),)
WIDE = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}


def mehdb(*arguments: str, command: tuple[str, ...] = MODULE, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command that is to end by itself."""
    return subprocess.run(
        [*command, *arguments], env=clean_environment() | WIDE | environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip


def serve(directory: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a single leader that is not to start."""
    usual = {
        "MEHDB_HOST": "laptop",
        "MEHDB_LISTEN": ADDRESS,
        "MEHDB_PORT": str(free_port()),
        "MEHDB_DATADIR": str(directory),
    }
    return mehdb("serve", *arguments, **usual | environment)


def assert_told(done: "subprocess.CompletedProcess[str]", code: int, *problems: str) -> None:
    """It ended with *code*, and said no more than a line for each of *problems*, which are patterns."""
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (code, "", len(problems)), done.stderr
    for line, problem in zip(lines, problems, strict=True):
        assert re.fullmatch(f"mehdb: {problem}", line), line


# What it says of itself.


@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["python -m mehdb", "mehdb"])
def test_both_ways_to_call_it_are_the_same(command: tuple[str, ...]) -> None:
    for ask in ("--version", "version"):
        assert mehdb(ask, command=command).stdout == f"mehdb {__version__}\n"


def test_the_version_as_json_says_what_else_it_runs_with() -> None:
    assert json.loads(mehdb("version", "--json").stdout) == {
        "version": __version__, "python": platform.python_version(), "sqlite": apsw.sqlite_lib_version(),
        "schema": SCHEMA_VERSION,
    }  # fmt: skip


def test_without_arguments_it_helps() -> None:
    done = mehdb()
    for word in ("serve", "local", "--version", "--help"):
        assert word in done.stdout
    assert done.stderr == ""


def test_the_help_of_serve_names_flag_variable_and_default_of_every_setting() -> None:
    done = mehdb("serve", "--help")
    assert done.returncode == 0
    told = {
        words[1]: line
        for line in done.stdout.splitlines()
        if len(words := line.split()) > 1 and words[1].startswith("--")
    }
    assert set(told) == {flag(setting.name) for setting in SETTINGS} | {"--help"}
    for setting in SETTINGS:
        about = setting.metadata
        line = " ".join(told[flag(setting.name)].split())
        assert about["help"] in line
        assert f"(env {about['variable']}, default {about['shown'] or about['default']})" in line


def test_a_command_or_a_flag_that_does_not_exist_is_told(tmp_path: Path) -> None:
    for arguments, unknown in ((["sreve"], "sreve"), (["serve", "--prot", "1"], "--prot"), (["serve", "x1"], "x1")):
        done = mehdb(*arguments, MEHDB_DATADIR=str(tmp_path / "data"))
        assert done.returncode == 2
        assert unknown in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


# Settings.


def test_all_bad_settings_are_told_together_before_anything_is_opened(tmp_path: Path) -> None:
    done = serve(
        tmp_path / "data", "--max-value", "huge", "--log-level", "loud", MEHDB_PORT="0", MEHDB_PEERS="mehdb-0:9876"
    )
    assert_told(
        done, 2, "MEHDB_PORT: '0' .*from 1 to 65535", "MEHDB_PEERS: .*base URL.*", "--max-value: 'huge' .*size.*",
        "--log-level: 'loud' .*debug.*",
    )  # fmt: skip
    assert not (tmp_path / "data").exists()


def test_bad_relations_between_settings_are_told_together_before_anything_is_opened(tmp_path: Path) -> None:
    done = serve(tmp_path / "data", "--host", "mehdb-1", "--queue-size", "2MiB")
    assert_told(done, 2, "--queue-size: .*--max-value.*", "--peers: missing: .*ordinal 0.*")
    assert not (tmp_path / "data").exists()


def test_a_pod_without_an_ordinal_is_told_to_be_a_statefulset(tmp_path: Path) -> None:
    assert_told(serve(tmp_path / "data", KUBERNETES_SERVICE_HOST="10.0.0.1"), 2, "--host: 'laptop' .*StatefulSet.*")


def test_a_flag_beats_the_environment_which_beats_the_default(tmp_path: Path, cluster: Cluster) -> None:
    node = cluster.add(MEHDB_DATADIR=str(tmp_path / "environment"), MEHDB_MAX_VALUE="1")
    node.start("--data-dir", str(tmp_path / "flag"))
    assert (tmp_path / "flag" / "store.db").exists()
    assert not (tmp_path / "environment").exists()
    assert node.put("k", b"12").status_code == 413


# What it needs from the machine.


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server((ADDRESS, 0)) as taken:
        port = taken.getsockname()[1]
        done = serve(tmp_path / "data", MEHDB_PORT=str(port))
    assert_told(done, 2, rf"--listen {ADDRESS}, --port {port}: cannot listen there: .*in use.*")


def test_an_address_that_is_not_ours_is_told(tmp_path: Path) -> None:
    assert_told(
        serve(tmp_path / "data", "--listen", "192.0.2.1", "--open"),
        2,
        r"--listen 192\.0\.2\.1, .*cannot listen there: .*",
    )


def test_a_data_directory_in_use_names_who_uses_it(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    assert node.process is not None
    assert_told(serve(node.volume), 1, rf"{node.volume} is in use by process {node.process.pid}: .*")
    assert node.put("k", b"v").status_code == 200


def test_a_data_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "data", Path("/proc/data")):
        assert_told(serve(directory), 1, rf"{directory} cannot be used: .*")


def test_a_data_directory_that_is_not_writable_is_told(tmp_path: Path) -> None:
    """Root may write in any directory but the kernel's own."""
    (tmp_path / "data").mkdir(mode=0o500)
    directory = Path("/proc") if os.access(tmp_path / "data", os.W_OK) else tmp_path / "data"
    assert_told(serve(directory), 1, rf"{directory} cannot be used: .*fsGroup.*")


# Stores that are none.


def random_bytes(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def another_database(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (a)")
    database.close()


def newer_schema(path: Path) -> None:
    our_store(path)
    use_page_checksums()
    database = apsw.Connection(str(path))
    database.execute("PRAGMA user_version = 999; PRAGMA journal_mode = DELETE").fetchall()
    database.close()


def torn_tables(path: Path) -> None:
    our_store(path)
    data = path.read_bytes()
    path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))


def cut_short(path: Path) -> None:
    our_store(path)
    os.truncate(path, 4096)


def nothing(path: Path) -> None:
    path.touch()


def our_store(path: Path) -> None:
    async def write() -> None:
        store = await Store.open(path.parent)
        await store.lead(Epoch(1))
        await store.write(Write(b"k", b"v"))
        await store.close()

    asyncio.run(write())


@pytest.mark.parametrize("make", [another_database, newer_schema])
def test_a_store_of_another_program_is_told_in_one_line_and_not_touched(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "store.db"
    make(path)
    before = path.read_bytes()
    assert_told(serve(tmp_path), 1, r".*store\.db .*")
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", [random_bytes, cut_short, torn_tables, nothing])
def test_a_damaged_store_without_a_copy_is_not_touched_and_the_leader_says_what_to_do(
    cluster: Cluster, make: Callable[[Path], None]
) -> None:
    """It runs, so that an operator can run commands there, but does not lead."""
    node = cluster.add()
    path = node.volume / "store.db"
    node.volume.mkdir()
    make(path)
    before = path.read_bytes()
    node.start(ready=False)
    eventually(lambda: node.status().state == "failed", "the leader to find out that nobody has a copy")
    reason = node.status().reason or ""
    assert str(node.volume) in reason
    for advice in ("bring the volume back", "`mehdb restore`", "`mehdb accept-loss`"):
        assert advice in reason
    assert node.get("/readyz").status_code == 503
    assert node.get("/livez").status_code == 200
    assert (node.put("k", b"v").status_code, node.get("/get/k").status_code) == (503, 503)
    node.stop()
    assert path.read_bytes() == before
    cluster.nodes.remove(node)  # its store is not to be verified


# How it ends.


class Writing(threading.Thread):
    """Writes one key after the other until the node is gone, and knows which were acknowledged."""

    def __init__(self, node: Node, name: str) -> None:
        super().__init__(name=name)
        self.acknowledged: list[str] = []
        self._client = httpx.Client(base_url=node.url, trust_env=False, timeout=DEADLINE_S)

    def run(self) -> None:
        with self._client as client, suppress(httpx.TransportError):
            while True:
                key = f"{self.name}/{len(self.acknowledged)}"
                answer = client.put(f"/set/{key}", content=key.encode())
                if answer.status_code != 200:
                    assert (answer.status_code, answer.json()["error"]) == (503, "draining")
                    return
                self.acknowledged.append(key)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_exits_0_and_what_was_acknowledged_is_there(cluster: Cluster, number: int) -> None:
    node = cluster.start(1).leader
    writers = [Writing(node, f"writer-{n}") for n in range(4)]
    for writer in writers:
        writer.start()
    eventually(lambda: all(len(writer.acknowledged) > 50 for writer in writers), "some writes")
    node.stop(number)
    for writer in writers:
        writer.join(DEADLINE_S)
    acknowledged = {key for writer in writers for key in writer.acknowledged}
    wal = node.volume / "store.db-wal"
    assert not wal.exists() or wal.stat().st_size == 0, "closed properly: all of it is in the database file"
    node.start()
    with httpx.Client(base_url=node.url, trust_env=False) as client:
        assert acknowledged <= set(client.get("/keys?limit=10000").json())
        assert {client.get(f"/get/{key}").text for key in acknowledged} == acknowledged


def test_a_start_and_a_stop_are_a_line_each(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    for number in range(20):
        node.put(f"k/{number}", b"value that no log may show")
    node.stop()
    events = [re.split(r"logger=mehdb\.\w+ ", line)[1].split()[0] for line in node.log.splitlines()]
    assert events == ["started", "open", "recovering", "leading", "draining", "stopping", "stopped"]
    assert "no log may show" not in node.log


def test_a_log_level_silences_what_is_below_it(cluster: Cluster) -> None:
    node = cluster.add(MEHDB_LOG_LEVEL="warning").start()
    node.stop()
    [line] = node.log.splitlines()
    assert "level=WARNING logger=mehdb.life open to everybody who reaches it listen=127.0.0.1" in line


def test_a_single_leader_starts_with_no_setting_at_all(tmp_path: Path) -> None:
    """But the port, which may be taken here, and the host name, which may have an ordinal."""
    port = free_port()
    process = subprocess.Popen(
        [*MODULE, "serve"], cwd=tmp_path, env=clean_environment() | {"MEHDB_PORT": str(port), "MEHDB_HOST": "laptop"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        url = f"http://{ADDRESS}:{port}"
        curl("--retry", "15", "--retry-delay", "1", "--retry-connrefused", f"{url}/readyz")
        assert curl(f"{url}/status") == b"leader"
        assert curl("-XPUT", "-d", "v", f"{url}/set/k") == b"WRITE completed"
        assert (tmp_path / "data" / "store.db").exists()
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait(DEADLINE_S)
