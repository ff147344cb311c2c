"""What the benchmark runs on: which core does what, how fast the disk syncs, what a process occupies.

Reads /proc: Linux only.
"""

import os
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, Self

MIB: Final = 1 << 20
SYNC_SAMPLES: Final = 50
LOOP_SAMPLES: Final = 30
LOOP_ADDITIONS: Final = 100_000
QUIET_CORES: Final = 0.1  # what others may use before they show in the figures


@dataclass(frozen=True)
class Cores:
    """Which core the measured server has, which the load, and which a second node. Equal where there are too few."""

    server: int
    load: int
    second: int

    @classmethod
    def choose(cls) -> Self:
        """Choose among the cores that this process may use."""
        usable = sorted(os.sched_getaffinity(0))
        load, server, *more = usable if len(usable) > 1 else usable * 2
        return cls(server, load, more[0] if more else load)

    @property
    def note(self) -> str:
        """Who shares a core with whom, in words."""
        if self.server == self.load:
            return f"ONE core ({self.server}) for server and load alike: ratios are flattered, absolute figures halved"
        second = "that of the load" if self.second == self.load else f"core {self.second}"
        return f"server on core {self.server}, load on core {self.load}, a second node on {second}"


def pin(pid: int, core: int) -> None:
    """Bind all present threads of process *pid* to *core*; threads and processes that they start inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


def peak_memory_bytes(pid: int) -> int:
    """Return the most that process *pid* has ever had resident: the kernel's own maximum of VmRSS, no sampling."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(f"process {pid} has ended: its memory can no longer be read")


def processor_us(pid: int) -> int:
    """Return how many microseconds of a core all threads of process *pid* have used so far, kernel's part included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold spaces
    user, system = int(fields[11]), int(fields[12])
    return (user + system) * 1_000_000 // os.sysconf("SC_CLK_TCK")


class Disturbance:
    """How much of this machine others use, from here on."""

    def __init__(self) -> None:
        self._before = self._used_s()

    def describe(self) -> str:
        """Say how many cores, on average, other processes and the hypervisor have taken. Call it without children."""
        changes = (now - then for now, then in zip(self._used_s(), self._before, strict=True))
        used_s, stolen_s, own_s, elapsed_s = changes
        others = max(0.0, used_s - own_s) / elapsed_s
        advice = " (measure again when it is quiet)" if others + stolen_s / elapsed_s > QUIET_CORES else ""
        return f"other processes used {others:.2f} cores, the hypervisor took {stolen_s / elapsed_s:.2f}{advice}"

    def _used_s(self) -> tuple[float, float, float, float]:
        """Return the seconds of cores used by all, stolen, and used by this process and its ended children; and now."""
        user, nice, system, *_, stolen = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
        own = os.times()
        tick = os.sysconf("SC_CLK_TCK")
        own_s = own.user + own.system + own.children_user + own.children_system
        return (user + nice + system) / tick, stolen / tick, own_s, own.elapsed


def sync_s(directory: Path) -> float:
    """Return how long writing 4 KiB and syncing it takes in *directory*: the least that one durable write waits."""
    durations = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(SYNC_SAMPLES):
            start = time.perf_counter()
            os.pwrite(file.fileno(), bytes(4096), 0)
            os.fdatasync(file.fileno())
            durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def loop_s() -> float:
    """Return how long a loop of Python's takes at best: absolute figures of two machines differ by about that."""
    durations = []
    for _ in range(LOOP_SAMPLES):
        start, total = time.perf_counter(), 0
        for number in range(LOOP_ADDITIONS):
            total += number
        durations.append(time.perf_counter() - start)
    return min(durations)


def describe(directory: Path, cores: Cores) -> dict[str, str]:
    """Return what a reader of the results must know of this machine."""
    file_system = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(directory)], capture_output=True, text=True, check=True
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "uvloop", "apsw"))
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} usable of {os.cpu_count()} cores, "
        f"a hundred thousand additions in Python {loop_s() * 1000:.1f} ms",
        "cores": cores.note,
        "disk": f"{directory} on {file_system.stdout.strip()}, one sync {sync_s(directory) * 1000:.2f} ms",
        "software": f"Linux {platform.release()}, Python {platform.python_version()}, {packages}",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
