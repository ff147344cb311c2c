"""A server that does to each request what a test has written down: for what a healthy node never does."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from cluster import ADDRESS, DEADLINE_S

CLOSE = b""
"""An answer: the connection ends without one."""


def answer(status: int, body: bytes = b"", *, node: str | None = "mehdb-9", **headers: str) -> bytes:
    """Return an answer of a node; of something else, if *node* is None."""
    lines = [f"HTTP/1.1 {status} -", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Mehdb-Node: {node}"] if node else []
    return "\r\n".join([*lines, "\r\n"]).encode() + body


def refusal(status: int, code: str, **headers: str) -> bytes:
    return answer(status, f'{{"error":"{code}","message":"because of {code}","status":{status}}}'.encode(), **headers)


@dataclass
class Scripted:
    """Gives *answers* one after the other, the last one for good, and keeps the *requests*, head and body."""

    answers: list[bytes]
    requests: list[bytes] = field(default_factory=list)
    url: str = ""

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # the test is over
                return
            with connection:
                connection.settimeout(DEADLINE_S)
                self.requests.append(_request(connection))
                answered = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                with contextlib.suppress(OSError):
                    connection.sendall(answered)


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < int(lengths[0] if lengths else 0):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@contextlib.contextmanager
def scripted(*answers: bytes) -> Iterator[Scripted]:
    """Have such a server."""
    with socket.create_server((ADDRESS, 0)) as listener:
        server = Scripted(list(answers), url=f"http://{ADDRESS}:{listener.getsockname()[1]}")
        thread = threading.Thread(target=server.serve, args=(listener,))
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE_S)
