"""A client that watches: it reads lines as they come, each within a deadline."""

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

from cluster import ADDRESS, DEADLINE_S, Node

NO_HEADERS: Mapping[str, str] = {}


class Watcher:
    """An answer that has no end."""

    def __init__(self, node: Node, target: str, headers: Mapping[str, str] = NO_HEADERS) -> None:
        self.socket = socket.create_connection((ADDRESS, node.port), DEADLINE_S)
        lines = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
        self.socket.sendall(f"GET {target} HTTP/1.1\r\nHost: n\r\n{lines}\r\n".encode())
        self.answer = HTTPResponse(self.socket)
        self.answer.begin()

    def close(self) -> None:
        self.answer.close()
        self.socket.close()

    def line(self) -> bytes:
        """Return the next line, empty at the end."""
        return self.answer.readline()

    def event(self) -> dict[str, Any]:
        """Return the next line of JSON."""
        line = self.line()
        assert line, "the stream has ended"
        event: dict[str, Any] = json.loads(line)
        return event

    def change(self) -> dict[str, Any]:
        """Return the next event that is no heartbeat."""
        while (event := self.event())["op"] == "heartbeat":
            pass
        return event

    def changes(self, count: int) -> list[dict[str, Any]]:
        return [self.change() for _ in range(count)]

    def until(self, revision: int) -> list[dict[str, Any]]:
        """Return the changes up to *revision*, which is the last of them or told by a heartbeat."""
        found = []
        while True:
            event = self.event()
            if event["op"] in ("set", "delete"):
                found.append(event)
            if event["revision"] >= revision:
                return found

    def sent(self) -> dict[str, str]:
        """Return the fields of the next Server-Sent Event."""
        fields = {}
        while line := self.line().rstrip(b"\n"):
            name, _, text = line.decode().partition(": ")
            fields[name] = text
        return fields


@contextmanager
def watching(node: Node, query: str = "", headers: Mapping[str, str] = NO_HEADERS) -> Iterator[Watcher]:
    """Have a watch that has begun: its first line has come, or it was refused."""
    watcher = Watcher(node, f"/watch?{query}", headers)
    try:
        yield watcher
    finally:
        watcher.close()
