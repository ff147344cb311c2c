"""HTTP as it goes over the wire: raw targets, halves of requests, several at once. Clients with manners send none."""

import http.client
import json
import socket
from collections.abc import Mapping
from email.message import Message
from types import TracebackType
from typing import Any, NamedTuple, Self

from cluster import ADDRESS, DEADLINE_S, Node

NO_HEADERS: Mapping[str, str] = {}


class Reply(NamedTuple):
    """One answer. *headers* take names in any case."""

    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The stable code of an error."""
        return str(self.json["error"])

    @property
    def revision(self) -> int:
        """The number in the ETag."""
        return int(self.headers["ETag"].strip('"'))


class Connection:
    """One connection to a node."""

    def __init__(self, node: Node) -> None:
        self.socket = socket.create_connection((ADDRESS, node.port), DEADLINE_S)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self, method: str = "") -> Reply:
        """Read the next answer; the one to HEAD has no body, whatever its Content-Length."""
        status = 102  # says only that somebody is at it
        while status == 102:
            line = self._file.readline()
            assert line.startswith(b"HTTP/1.1 "), f"not the start of an answer: {line!r}"
            status, headers = int(line.split()[1]), http.client.parse_headers(self._file)
        bodiless = method == "HEAD" or status in (100, 204, 304)
        size_bytes = 0 if bodiless else int(headers["Content-Length"])
        return Reply(status, headers, self._file.read(size_bytes))

    def ask(
        self, method: str, target: str | bytes, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS
    ) -> Reply:
        """Send a whole request, with *target* as it is, and read its answer."""
        self.send(request(method, target, body, headers))
        return self.reply(method)

    def end(self) -> bytes:
        """Send nothing more, and return what comes until the node closes the connection."""
        self.socket.shutdown(socket.SHUT_WR)
        return self.rest()

    def rest(self) -> bytes:
        """Return what comes until the node closes the connection."""
        return self._file.read()


def request(method: str, target: str | bytes, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS) -> bytes:
    """Return a whole request, with *target* and *headers* as they are."""
    raw = target if isinstance(target, bytes) else target.encode()
    return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method.encode(), raw, lines({"Content-Length": len(body)} | headers), body)


def lines(headers: Mapping[str, object]) -> bytes:
    """Return *headers* as lines, with a Host."""
    return "".join(f"{name}: {value}\r\n" for name, value in ({"Host": "mehdb"} | headers).items()).encode()


def ask(
    node: Node, method: str, target: str | bytes, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS
) -> Reply:
    """Send one request on a connection of its own."""
    with Connection(node) as connection:
        return connection.ask(method, target, body, headers)
