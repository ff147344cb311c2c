"""Load by wrk: as many requests as a server answers over a number of connections, and what came of them.

wrk runs in one thread, on the core that this process is bound to. A round with a single bad answer is no figure.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Final, Literal

import msgspec

from cluster import BenchError, Server
from dataset import MANY, VALUE_BYTES

Load = Literal["GET", "calm GET", "PUT", "batch", "several"]
"""What is asked for, each time of random keys: a value, the same after a pause, a write, `MANY` writes at once, `MANY`
values at once."""

KEYS_EACH: Final[dict[Load, int]] = {"GET": 1, "calm GET": 1, "PUT": 1, "batch": MANY, "several": MANY}
WRITTEN: Final = len("WRITE completed")
LEAST_BYTES: Final[dict[Load, int]] = {  # an answer that has less does not hold what was asked for
    load: each * (WRITTEN if load in ("PUT", "batch") else VALUE_BYTES) for load, each in KEYS_EACH.items()
}
SCRIPT: Final = Path(__file__).parent / "random_keys.lua"
GRACE_S: Final = 30.0  # wrk ends by itself; this only catches one that hangs
INSTALL_WRK: Final = (
    "wrk is not installed, and nothing can be measured without it: apt-get install wrk "
    "(Debian, Ubuntu), dnf install wrk (Fedora), or brew install wrk"
)


class Round(msgspec.Struct, frozen=True):
    """What wrk counted in one round. *broken*: connections that failed, broke off or timed out.

    *processor_us* is what the server used of its core meanwhile: others on the machine disturb it less than the speed.
    """

    answers: int
    duration_us: int
    bytes: int
    bad_statuses: int
    broken: int
    p50_us: int
    p99_us: int
    processor_us: int = 0

    @property
    def per_second(self) -> float:
        """Answers per second."""
        return self.answers / self.duration_us * 1e6

    @property
    def processor_us_each(self) -> float:
        """Microseconds of the server's core per answer."""
        return self.processor_us / self.answers

    def refuse_bad(self, what: str, least_bytes: int) -> None:
        """Raise `BenchError` if any answer was an error, was lost, or was too short to hold *least_bytes*."""
        if self.bad_statuses or self.broken:
            raise BenchError(f"{what}: {self.bad_statuses} answers of status ≥ 400, {self.broken} connections broke")
        if not self.answers or self.bytes < self.answers * least_bytes:
            raise BenchError(f"{what}: {self.bytes} bytes in {self.answers} answers cannot be what was asked for")


def wrk_path() -> str:
    """Return where wrk is. Raises `BenchError` that says how to install it."""
    path = shutil.which("wrk")
    if path is None:
        raise BenchError(INSTALL_WRK)
    return path


class Wrk:
    """Runs wrk against servers, with other random keys in each round."""

    def __init__(self, keys: int) -> None:
        """Ask for keys 0 to *keys* - 1. Raises `BenchError` if wrk is missing."""
        self._path = wrk_path()
        self._keys = keys
        self._seed = 0

    def run(self, server: Server, load: Load, connections: int, duration_s: int) -> Round:
        """Load *server* for *duration_s*. Raises `BenchError` if anything but good answers came."""
        self._seed += 1
        what = f"wrk: {load} on {server.name} over {connections} connections"
        options = ["--threads=1", f"--connections={connections}", f"--duration={duration_s}s", "--latency"]
        arguments = [f"--script={SCRIPT}", server.url, "--", load, str(self._keys), str(self._seed)]
        used_us = server.processor_us()
        try:
            result = subprocess.run(
                [self._path, *options, *arguments],
                capture_output=True, text=True, timeout=duration_s + GRACE_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{what}: did not end") from error
        _, _, line = result.stdout.partition("\nRESULT ")
        if result.returncode or not line:
            raise BenchError(f"{what}: status {result.returncode}\n{result.stdout}{result.stderr}")
        measured = msgspec.structs.replace(
            msgspec.json.decode(line, type=Round), processor_us=server.processor_us() - used_us
        )
        measured.refuse_bad(what, LEAST_BYTES[load])
        return measured
