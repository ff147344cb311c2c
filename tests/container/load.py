"""What clients.py does in its container, seen from the test: its journal, and what in it should not be there."""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Final, Self

import clients
from engine import Engine, run
from network import Network
from sources import DOCKERFILE
from stateful_set import Loss

SCRIPT: Final = Path(clients.__file__)
USER: Final = DOCKERFILE.all("USER", final=True)[0]
DEADLINE_S: Final = 60.0
BROKEN: Final = ("ReadError", "WriteError", "RemoteProtocolError")  # a connection that ended within a request


@dataclass(frozen=True)
class Entry:
    """One line of the journal."""

    kind: str
    begin_s: float
    end_s: float
    key: str = ""
    value: str = ""
    first: str = ""
    last: str = ""
    status: int = 0
    good: bool = False
    revision: str = ""
    error: str = ""
    body: str = ""

    def met(self, losses: list[Loss]) -> bool:
        """Return whether the request went to a pod that was lost, when the clients could not know it yet."""
        return any(
            self.end_s >= loss.begin_s and self.begin_s <= loss.end_s + clients.TTL_S
            for loss in losses
            if f"//{loss.address}:" in self.first + self.last or f"//{loss.name}." in self.last
        )


class Load:
    """Clients of *service* in a container. A context manager: they run while the block does."""

    def __init__(
        self, engine: Engine, network: Network, image: str, directory: Path, resolver: Path, service: str, port: int
    ) -> None:
        self._engine = engine
        self._place = network.place()
        self._image = image
        self._journal = directory / "journal"
        self._resolver = resolver
        self._arguments = (service, str(port))
        self.entries: list[Entry] = []

    def __enter__(self) -> Self:
        self._journal.touch()
        os.chown(self._journal, *(int(part) for part in USER.split(":")))
        self._engine.podman(
            "run", "--detach", "--name", "clients", "--network", f"ns:{self._place.namespace}",
            f"--volume={SCRIPT}:/clients.py:ro", f"--volume={self._journal}:/journal", f"--user={USER}",
            f"--volume={self._resolver}:/etc/resolv.conf:ro", "--no-hosts", "--entrypoint", "/opt/mehdb/bin/python",
            self._image, "/clients.py", "/journal", *self._arguments,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.podman("stop", "--time", str(int(DEADLINE_S)), "clients")
        said = self._engine.logs("clients")
        self._engine.podman("rm", "clients")
        self.entries = self._read()
        assert "Traceback" not in said, said

    def _read(self, begin: int = 0) -> list[Entry]:
        """Return what has been written from the byte *begin* on."""
        with self._journal.open() as file:
            file.seek(begin)
            return [Entry(**json.loads(line)) for line in file if line.endswith("\n")]

    def wait_for_writes(self) -> None:
        """Wait until each kind of request that is sent from now on has been answered well."""
        begin, begin_s = self._journal.stat().st_size, monotonic()
        seen: set[str] = set()
        while seen < {"acks", "plain", "read"}:
            assert monotonic() < begin_s + DEADLINE_S, f"only {seen} are answered any more"
            sleep(0.2)  # between two looks
            if self._journal.stat().st_size > begin:
                seen = {
                    entry.key.partition("/")[0] for entry in self._read(begin) if entry.good and entry.begin_s > begin_s
                }

    def curl(self, *arguments: "str | Path") -> str:
        """Return what curl prints, run where the clients are, with their DNS. It must succeed."""
        script = 'mount --bind "$1" /etc/resolv.conf && shift && exec curl -sS --fail "$@"'
        inside = ("nsenter", f"--net={self._place.namespace}", "unshare", "--mount", "sh", "-c", script, "sh")
        return run(*inside, self._resolver, *arguments)

    # What is in the journal, once they have ended

    def reads(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == "read"]

    def acknowledged(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == "write" and entry.good]

    def failed_reads(self, losses: list[Loss]) -> list[Entry]:
        """Return the reads that failed, and the times in which nobody was there to ask, but for those of a lost pod."""
        failed = [entry for entry in self.entries if entry.kind in ("read", "nobody") and not entry.good]
        return [entry for entry in failed if not entry.met(losses)]

    def resets(self, losses: list[Loss]) -> list[Entry]:
        """Return the requests whose connection broke, but for those to a lost pod."""
        return [entry for entry in self.entries if entry.error.startswith(BROKEN) and not entry.met(losses)]

    def longest_gap_s(self) -> float:
        """Return the longest time without an acknowledged write."""
        times = sorted(entry.end_s for entry in self.acknowledged())
        return max(later - earlier for earlier, later in itertools.pairwise(times))
