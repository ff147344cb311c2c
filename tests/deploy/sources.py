"""What the files that deploy mehdb say, in the form in which the tests ask for it. It judges nothing."""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from kubernetes_validate.utils import all_versions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mehdb.settings import Settings, load

ROOT = Path(__file__).resolve().parents[2]
OLDEST_KUBERNETES: Final = Version("1.27")  # the first whose StatefulSets have `.spec.ordinals` without a feature gate
KUBERNETES: Final = [str(one) for one in sorted(set(map(Version, all_versions()))) if one >= OLDEST_KUBERNETES]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


APP = [one for one in yaml.safe_load_all((ROOT / "deploy/app.yaml").read_text()) if one]


def find(documents: list[dict[str, Any]], kind: str, name: str = "mehdb") -> dict[str, Any]:
    """Return the only document of *kind* that is called *name*."""
    (one,) = [one for one in documents if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return one


STATEFUL_SET = find(APP, "StatefulSet")
SERVICE = find(APP, "Service")
PEERS_SERVICE = find(APP, "Service", "mehdb-peers")
POD = STATEFUL_SET["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
PROBES = {name: CONTAINER[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")}


def quantity(text: str) -> float:
    """Return a quantity of Kubernetes, such as 512Mi or 250m, as a number of bytes or cores."""
    units = {"": 1.0, "m": 0.001, "Mi": 2.0**20, "Gi": 2.0**30}
    match = re.fullmatch(r"([0-9]+)([A-Za-z]*)", text)
    assert match, text
    return int(match[1]) * units[match[2]]


def settings_in_pod(ordinal: int, environment: Mapping[str, str]) -> Settings:
    """Return what a node reads in the StatefulSet's pod *ordinal*, whose container has *environment*."""
    host = f"{STATEFUL_SET['metadata']['name']}-{ordinal}"
    fqdn = f"{host}.{STATEFUL_SET['spec']['serviceName']}.shop.svc.cluster.local"
    by_the_kubelet = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    return load({}, by_the_kubelet | environment, find_host_name=lambda: host, find_fqdn=lambda _: fqdn)


class Instruction(NamedTuple):
    """One instruction of a Dockerfile; *stage* is the number of its stage, 0 before the first."""

    stage: int
    name: str
    text: str


@dataclass(frozen=True)
class Dockerfile:
    """A Dockerfile without its comments and line breaks."""

    instructions: tuple[Instruction, ...]

    @classmethod
    def parse(cls, text: str) -> "Dockerfile":
        """Read the text of a Dockerfile."""
        lines = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
        instructions: list[Instruction] = []
        stage = 0
        for line in re.sub(r"\\\n\s*", "", lines).splitlines():
            name, _, rest = line.partition(" ")
            stage += name == "FROM"
            instructions.append(Instruction(stage, name, rest.strip()))
        return cls(tuple(instructions))

    def all(self, name: str, *, final: bool = False) -> list[str]:
        """Return the texts of all instructions *name*, or of those in the final stage."""
        last = self.instructions[-1].stage
        return [one.text for one in self.instructions if one.name == name and (one.stage == last or not final)]

    def command(self) -> list[str]:
        """Return what a container runs. Fails if that is not in the exec form."""
        (entrypoint,), (arguments,) = self.all("ENTRYPOINT", final=True), self.all("CMD", final=True)
        return [*json.loads(entrypoint), *json.loads(arguments)]

    def environment(self) -> dict[str, str]:
        """Return the variables that the final stage sets."""
        return dict(re.findall(r"(\w+)=(\S+)", " ".join(self.all("ENV", final=True))))


DOCKERFILE = Dockerfile.parse((ROOT / "Dockerfile").read_text())


@dataclass(frozen=True)
class Locked:
    """One package of a lock file."""

    version: str
    hashes: tuple[str, ...]


def lock(name: str) -> dict[str, Locked]:
    """Return the packages of a lock file, by their normalised names. Fails on a line that pins nothing."""
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    text = "\n".join(line for line in lines if not line.startswith("#"))
    packages = {}
    for entry in re.sub(r"\s*\\\n", " ", text).splitlines():
        match = re.fullmatch(r"([\w.-]+)==(\S+)(?: ; [^\\]+?)?((?: --hash=sha256:[0-9a-f]{64})*)", entry)
        assert match, f"{name}: {entry} pins nothing"
        packages[canonicalize_name(match[1])] = Locked(match[2], tuple(match[3].split()))
    return packages


def requirements(*path: str) -> list[Requirement]:
    """Return the requirements listed at *path* in pyproject.toml."""
    part: Any = PYPROJECT
    for key in path:
        part = part[key]
    return [Requirement(text) for text in part]
