"""Clients in a container beside the pods. They are run by the image's Python, and find the nodes by DNS alone.

    python clients.py JOURNAL SERVICE PORT

Readers ask each address behind the Service in turn for one key, on connections that they keep. They look the Service
up again when its answer is as old as its TTL, as a resolver with a cache would have them. Writers set keys of their
own, on any of these addresses, follow the redirect, and go on to the next key when one was acknowledged. Half of them
ask for a follower's disk as well (`acks=1`). Each request becomes a line of the journal. SIGTERM ends them.

This file runs in the image, so that it imports nothing of the tests.
"""

import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Final, TextIO

import httpx

TTL_S: Final = 5.0  # of the cluster's DNS
READERS: Final = 2
WRITERS: Final = 4
READ_EVERY_S: Final = 0.02
WRITE_EVERY_S: Final = 0.1
READ_TIMEOUT_S: Final = 5.0
WRITE_TIMEOUT_S: Final = 15.0  # beyond what acks=1 waits for by itself
KEY: Final = "read/this"
VALUE: Final = b"the same all the time"


class Service:
    """The addresses behind a Service, each answer used until it is as old as its TTL."""

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._port = port
        self._addresses: list[str] = []
        self._until_s = 0.0
        self._turn = 0

    def url(self) -> str | None:
        """Return the base URL of the next address; None if there is none."""
        if time.monotonic() >= self._until_s:
            try:
                found = socket.getaddrinfo(self._name, self._port, socket.AF_INET, socket.SOCK_STREAM)
            except socket.gaierror:
                found = []
            self._addresses = [str(address[4][0]) for address in found]
            self._until_s = time.monotonic() + TTL_S
        if not self._addresses:
            self._until_s = 0.0
            return None
        self._turn += 1
        return f"http://{self._addresses[self._turn % len(self._addresses)]}:{self._port}"


class Journal:
    """A line of JSON for each request."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def add(self, **entry: object) -> None:
        """Write a line."""
        with self._lock:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()


def ask(client: httpx.Client, journal: Journal, kind: str, key: str, url: str, **options: bytes) -> bool:
    """Send one request, write down what became of it, and return whether it was answered with 200."""
    begin_s = time.monotonic()
    status, body, revision, error, last = 0, b"", "", "", url
    try:
        answer = client.request("GET" if kind == "read" else "PUT", url, **options)
        status, body, last = answer.status_code, answer.content, str(answer.url)
        revision = answer.headers.get("ETag", "").strip('"')
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"
        if failure._request is not None:  # noqa: SLF001  the one after a redirect, if that failed
            last = str(failure.request.url)
    good = status == 200 and (kind != "read" or body == VALUE)
    text = "" if good else body.decode(errors="replace")
    journal.add(
        kind=kind, key=key, value=options.get("content", b"").decode(), begin_s=begin_s, end_s=time.monotonic(),
        first=url, last=last, status=status, good=good, revision=revision, error=error, body=text,
    )  # fmt: skip
    return good


def read(journal: Journal, service: Service, over: threading.Event) -> None:
    """Read the same key from each address in turn."""
    with httpx.Client(timeout=READ_TIMEOUT_S, trust_env=False) as client:
        while not over.wait(READ_EVERY_S):
            if url := service.url():
                ask(client, journal, "read", KEY, f"{url}/get/{KEY}")
            else:
                journal.add(kind="nobody", begin_s=time.monotonic(), end_s=time.monotonic())


def write(journal: Journal, service: Service, over: threading.Event, name: str, target: str) -> None:
    """Write key after key, whose names begin with *name*, each until it is acknowledged."""
    number = tries = 0
    with httpx.Client(timeout=WRITE_TIMEOUT_S, trust_env=False, follow_redirects=True) as client:
        while not over.wait(WRITE_EVERY_S):
            if url := service.url():
                key = f"{name}/{number:06}"
                tries += 1
                if ask(client, journal, "write", key, f"{url}/set/{key}{target}", content=f"{key} {tries}".encode()):
                    number += 1


def main() -> None:
    """Run until SIGTERM."""
    path, name, port = sys.argv[1:]
    over = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        over.set()

    signal.signal(signal.SIGTERM, stop)
    with Path(path).open("a") as file:
        journal = Journal(file)
        threads = []
        for number in range(READERS + WRITERS):
            usual = (journal, Service(name, int(port)), over)
            if number < READERS:
                threads.append(threading.Thread(target=read, args=usual))
            elif number % 2:
                threads.append(threading.Thread(target=write, args=(*usual, f"acks/{number}", "?acks=1")))
            else:
                threads.append(threading.Thread(target=write, args=(*usual, f"plain/{number}", "")))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
