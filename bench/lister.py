"""List all keys again and again, page by page, until SIGTERM; print how many each whole listing had.

Usage: `python bench/lister.py URL`. A process of its own, so that it works on a page while the load goes on.
"""

import http.client
import os
import re
import sys
from typing import Final
from urllib.parse import urlsplit

import msgspec

FIRST_PAGE: Final = "/keys?limit=10000"
NEXT: Final = re.compile('<([^>]+)>; rel="next"')
TIMEOUT_S: Final = 30.0


def list_all(connection: http.client.HTTPConnection) -> int:
    """Follow the pages from the first to the last. Return how many keys they had."""
    keys, path = 0, FIRST_PAGE
    while path:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != http.client.OK:
            raise SystemExit(f"{path}: status {answer.status}: {body[:200]!r}")
        keys += len(msgspec.json.decode(body, type=list[str]))
        following = NEXT.search(answer.getheader("Link", ""))
        path = following[1] if following else ""
    return keys


def main() -> None:
    """List until stopped."""
    os.nice(19)  # wrk is on the same core: what it measures must not be how long it waits for this
    connection = http.client.HTTPConnection(urlsplit(sys.argv[1]).netloc, timeout=TIMEOUT_S)
    while True:
        print(list_all(connection), flush=True)


if __name__ == "__main__":
    main()
