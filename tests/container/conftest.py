"""The image, built once, and clusters of it."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from base import base, pip_mounts
from dns_server import DnsServer
from engine import Engine
from kubelet import Kubelet
from load import Load
from mehdb import __version__
from network import GATEWAY, Network, own_network
from sources import ROOT, STATEFUL_SET
from stateful_set import StatefulSet

IMAGE = f"localhost/mehdb:{__version__}"


@dataclass(frozen=True)
class Image:
    """The image that the Dockerfile makes, the one it stands on, and its files."""

    engine: Engine
    name: str
    base: str
    files: Path
    limits: bool


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """The image, in a storage of its own that is removed at the end."""
    # Not in pytest's folder, which keeps the files of the last runs.
    directory = Path(tempfile.mkdtemp(prefix="mehdb-container-"))
    with Engine(directory) as engine:
        stands_on = base(engine)
        settings = directory / "pip"
        settings.mkdir()
        arguments = {"BASE": stands_on, "VERSION": __version__, "REVISION": revision()}
        engine.build(ROOT, IMAGE, arguments, pip_mounts(settings))
        files = Path(engine.podman("image", "mount", IMAGE))
        yield Image(engine, IMAGE, stands_on, files, engine.limits_memory(IMAGE))
        engine.podman("image", "unmount", "--all")


def revision() -> str:
    """Return the commit that is here."""
    said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return said.stdout.strip()


@dataclass
class World:
    """What a test runs containers in: a network with DNS, a StatefulSet of none yet, and a folder of its volumes."""

    image: Image
    network: Network
    stateful_set: StatefulSet
    directory: Path

    def use(self, template: dict[str, Any]) -> None:
        """Have the pods made from *template* from now on."""
        self.stateful_set.kubelet = Kubelet(
            self.image.engine, self.network, self.image.name, template, self.directory, self.stateful_set.publish,
            limits=self.image.limits,
        )  # fmt: skip

    def load(self) -> Load:
        """Return clients, not started."""
        port = self.stateful_set.kubelet.port
        resolver = self.directory / "resolv.conf"
        service = self.stateful_set.service
        return Load(self.image.engine, self.network, self.image.name, self.directory, resolver, service, port)


@pytest.fixture
def world(image: Image) -> Iterator[World]:
    """A world for one test."""
    with contextlib.ExitStack() as stack:
        # The containers' user must be able to pass through each folder above its volume, which those of pytest forbid.
        directory = Path(tempfile.mkdtemp(prefix="mehdb-pods-"))
        directory.chmod(0o755)
        stack.callback(shutil.rmtree, directory)
        stack.enter_context(own_network())
        network = stack.enter_context(Network(directory))
        dns = stack.enter_context(DnsServer(GATEWAY, 53))
        pods = StatefulSet(STATEFUL_SET, dns)
        stack.callback(pods.end)
        one = World(image, network, pods, directory)
        one.use(STATEFUL_SET["spec"]["template"])
        yield one
