"""List all keys again and again, page by page, until SIGTERM. For each page, print how many keys it had, and the next.

Usage: `python bench/lister.py URL PATH`, PATH being the page to begin with. A process of its own, so that it works on
a page while the load goes on.
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


def read_page(connection: http.client.HTTPConnection, path: str) -> tuple[int, str]:
    """Return how many keys the page at *path* has, and where the next one is: the first, behind the last."""
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != http.client.OK:
        raise SystemExit(f"{path}: status {answer.status}: {body[:200]!r}")
    following = NEXT.search(answer.getheader("Link", ""))
    return len(msgspec.json.decode(body, type=list[str])), following[1] if following else FIRST_PAGE


def main() -> None:
    """List until stopped."""
    os.nice(19)  # wrk is on the same core: what it measures must not be how long it waits for this
    url, path = sys.argv[1:]
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    while True:
        keys, path = read_page(connection, path)
        print(keys, path, flush=True)


if __name__ == "__main__":
    main()
