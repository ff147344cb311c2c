"""Large files are imported a few at once; what becomes of each is counted, also when another one fails."""

import contextlib
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from client_command import arguments, environment
from cluster import ADDRESS, DEADLINE_S
from mehdb.client.http import Client
from mehdb.client.tree import AT_ONCE_MAX, SMALL_BYTES, Carried, import_tree
from mehdb.errors import PeerRefused
from scripted import CLOSE, answer, scripted


@contextlib.contextmanager
def node(on_put: Callable[[str], int]) -> Iterator[str]:
    """Have a node that holds nothing, and answers a PUT of a key with the status that *on_put* returns."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(404)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(on_put(self.path.removeprefix("/set/")))

        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Mehdb-Node", "mehdb-9")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer((ADDRESS, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{ADDRESS}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(DEADLINE_S)


def large(folder: Path, count: int) -> Path:
    for number in range(count):
        (folder / str(number)).write_bytes(bytes(SMALL_BYTES + 1))
    return folder


def quiet(_step: str, _done: int, _total: int) -> None:
    """Show no progress."""


def test_a_few_are_under_way_at_once_and_no_more(tmp_path: Path) -> None:
    together = threading.Barrier(AT_ONCE_MAX, timeout=DEADLINE_S)
    lock, begun, ended, most, most_held = threading.Lock(), 0, 0, 0, 0

    def on_put(_key: str) -> int:
        nonlocal begun, ended, most
        with lock:
            begun += 1
            most = max(most, begun - ended)
        together.wait()  # breaks, and the request fails, unless so many come
        with lock:
            ended += 1
        return 200

    def on_step(_step: str, done: int, _total: int) -> None:
        nonlocal most_held
        most_held = max(most_held, done - ended)

    carried = Carried(pytest.fail)
    with node(on_put) as url, Client((url,)) as client:
        import_tree(client, large(tmp_path, 3 * AT_ONCE_MAX), "", carried, on_step)
    assert (carried.written, most) == (3 * AT_ONCE_MAX, AT_ONCE_MAX)
    assert most_held <= AT_ONCE_MAX, "no more are held in memory"


def test_what_was_under_way_when_one_failed_is_counted(tmp_path: Path) -> None:
    others, refused = threading.Semaphore(0), threading.Event()

    def on_put(key: str) -> int:
        if key == "0":
            for _ in range(AT_ONCE_MAX - 1):
                assert others.acquire(timeout=DEADLINE_S)
            refused.set()
            return 507
        others.release()
        assert refused.wait(DEADLINE_S)
        return 200

    carried = Carried(pytest.fail)
    with node(on_put) as url, Client((url,)) as client, pytest.raises(PeerRefused, match="507"):
        import_tree(client, large(tmp_path, AT_ONCE_MAX), "", carried, quiet)
    assert carried.written == AT_ONCE_MAX - 1


@pytest.mark.parametrize(
    ("size_bytes", "absent"),
    [(5, answer(200, b'{"key":"a","revision":0}\n')), (SMALL_BYTES + 1, answer(404))],
    ids=["small", "large"],
)
def test_an_imports_write_is_made_again_when_its_answer_is_lost(tmp_path: Path, size_bytes: int, absent: bytes) -> None:
    (tmp_path / "a").write_bytes(bytes(size_bytes))
    carried = Carried(pytest.fail)
    with scripted(absent, CLOSE, answer(200)) as server, Client((server.url,)) as client:
        import_tree(client, tmp_path, "", carried, quiet)
        assert server.requests[1] == server.requests[2]
    assert carried.written == 1


def test_an_interrupted_import_waits_for_nobody(tmp_path: Path) -> None:
    """It ends as Ctrl-C has it end, with requests under way that nobody answers."""
    with socket.create_server((ADDRESS, 0)) as silent:
        url = f"http://{ADDRESS}:{silent.getsockname()[1]}"
        command = arguments("import", large(tmp_path, AT_ONCE_MAX), "--timeout", 3600)
        with subprocess.Popen(command, env=environment(url), stderr=subprocess.PIPE) as process:
            silent.settimeout(DEADLINE_S)
            with silent.accept()[0]:
                process.send_signal(signal.SIGINT)
                try:
                    said = process.communicate(timeout=DEADLINE_S)[1]
                finally:
                    process.kill()
    assert (process.returncode, said) == (128 + signal.SIGINT, b"")
