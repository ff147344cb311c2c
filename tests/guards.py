"""What keeps strangers out of nodes under test: a tokens file, and an authority that makes certificates."""

import re
import shutil
import ssl
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import trustme

from cluster import DEADLINE_S, Cluster, clean_environment


@dataclass
class Tokens:
    """A tokens file, and the tokens that are in it, by their names."""

    path: Path
    given: dict[str, str] = field(default_factory=dict)

    def give(self, name: str, rights: str, *prefixes: str) -> str:
        """Make a token as an operator does, and return it."""
        command = [sys.executable, "-m", "mehdb", "token", name, rights, *prefixes, "--into", str(self.path)]
        done = subprocess.run(command, env=clean_environment(), capture_output=True, timeout=DEADLINE_S, check=True)
        self.given[name] = done.stdout.decode().strip()
        return self.given[name]

    def take_back(self, name: str) -> None:
        """Take the line of *name* out, as an editor does: in a new file that takes the place of the old."""
        kept = re.sub(rf"(?m)^{re.escape(name)} .*\n", "", self.path.read_text())
        swap(self.path, kept.encode())

    def file(self, name: str) -> Path:
        """Return a file with the token of *name*, as a Secret has it."""
        path = self.path.with_name(f"token-{name}")
        path.write_text(self.given[name] + "\n")
        return path

    def headers(self, name: str | None) -> dict[str, str]:
        return {} if name is None else {"Authorization": f"Bearer {self.given[name]}"}


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, in files."""

    cert: Path
    key: Path


def recovers_without_its_volume(cluster: Cluster) -> None:
    """Expect that the leader of *cluster* takes what its follower holds, having lost what it held."""
    cluster.introduce()
    cluster.leader.put("k", b"v")
    before = cluster.converge()
    cluster.leader.kill()
    shutil.rmtree(cluster.leader.volume)
    cluster.leader.start()
    assert cluster.leader.get("/get/k").content == b"v"
    assert cluster.converge() == before


class Authority:
    """Makes certificates. Its own is in `ca`."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._ca = trustme.CA(organization_name=name)
        self.ca = directory / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *hosts: str, into: Certificate | None = None) -> Certificate:
        """Make a certificate called *name* for *hosts*, or this machine; *into* the files of one that it replaces."""
        leaf = self._ca.issue_cert(*(hosts or ("127.0.0.1", "localhost")), common_name=name)
        made = into or Certificate(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        swap(made.key, leaf.private_key_pem.bytes())
        swap(made.cert, b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return made

    def client(
        self,
        certificate: Certificate | None = None,
        headers: dict[str, str] | None = None,
        *,
        any_name: bool = False,
    ) -> httpx.Client:
        """Return a client that trusts this authority alone, with *any_name* whomever it is for; shows *certificate*."""
        context = ssl.create_default_context(cafile=self.ca)
        context.check_hostname = not any_name
        if certificate:
            context.load_cert_chain(certificate.cert, certificate.key)
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(verify=context, timeout=DEADLINE_S, trust_env=False, limits=limits, headers=headers)


def swap(path: Path, data: bytes) -> None:
    """Put *data* at *path* as the kubelet does: at once, in a new file."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    new.replace(path)
