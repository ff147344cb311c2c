"""The pods' network: a bridge and a namespace for each pod, all of them in a network namespace of this process's own.

The machine's interfaces, addresses and firewall are not seen from there, and not changed.
"""

import contextlib
import ctypes
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from engine import run

CLONE_NEWNET: Final = 0x40000000
PREFIX: Final = "10.77.0"  # private; nothing else is in that namespace
GATEWAY: Final = f"{PREFIX}.1"
FIRST: Final = 10
LIBC: Final = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Have this thread, and the threads and processes that it starts, in a network namespace of their own."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _checked(LIBC.unshare(CLONE_NEWNET))  # os.unshare exists from Python 3.12 on
        try:
            yield
        finally:
            _checked(LIBC.setns(before, CLONE_NEWNET))
    finally:
        os.close(before)


@dataclass(frozen=True)
class Place:
    """Where a pod is in the network: its address, and the namespace in which its containers run."""

    address: str
    namespace: Path
    interface: str

    def cut_off(self) -> None:
        """Take the pod from the network: what is sent to it gets no answer, as from a machine without power."""
        run("ip", "link", "set", self.interface, "down")

    def remove(self) -> None:
        """Give the place up."""
        run("ip", "link", "delete", self.interface)
        run("umount", self.namespace)
        self.namespace.unlink()


class Network:
    """A bridge with the address `GATEWAY`. A context manager, entered in `own_network`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count(FIRST)  # none twice: who still asks an old address gets no new pod's answer
        self._places: list[Place] = []

    def __enter__(self) -> Self:
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "pods", "type", "bridge")
        run("ip", "address", "add", f"{GATEWAY}/24", "dev", "pods")
        run("ip", "link", "set", "pods", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place in self._places:
            if place.namespace.exists():
                place.remove()
        run("ip", "link", "delete", "pods")

    def place(self) -> Place:
        """Return a new place, connected."""
        number = next(self._numbers)
        place = Place(f"{PREFIX}.{number}", self._directory / f"net-{number}", f"pod{number}")
        place.namespace.touch()
        run("unshare", f"--net={place.namespace}", "true")
        self._places.append(place)
        run("ip", "link", "add", place.interface, "type", "veth", "peer", "name", "eth0", "netns", place.namespace)
        run("ip", "link", "set", place.interface, "master", "pods", "up")
        inside = f"""ip link set lo up && ip address add {place.address}/24 dev eth0 && ip link set eth0 up &&
            ip route add default via {GATEWAY}"""
        run("nsenter", f"--net={place.namespace}", "sh", "-c", inside)
        return place
