"""What a variant of the manifests says, in the form in which tests ask for it. It judges nothing."""

from dataclasses import dataclass
from typing import Any

from kustomize import documents
from mehdb.settings import Settings
from sources import find, settings_in_pod

Labels = dict[str, str]


@dataclass(frozen=True)
class Variant:
    """The documents of one variant."""

    name: str

    @property
    def documents(self) -> list[dict[str, Any]]:
        return documents(self.name)

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [one for one in self.documents if one["kind"] == kind]

    @property
    def stateful_set(self) -> dict[str, Any]:
        return find(self.documents, "StatefulSet")

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.stateful_set["spec"]
        return spec

    @property
    def pod(self) -> dict[str, Any]:
        pod: dict[str, Any] = self.spec["template"]["spec"]
        return pod

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.pod["containers"]
        found: dict[str, Any] = container
        return found

    @property
    def environment(self) -> dict[str, str]:
        variables = self.container["env"]
        found = {variable["name"]: variable["value"] for variable in variables}
        assert len(found) == len(variables), "each once"
        return found

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def probes(self) -> dict[str, dict[str, Any]]:
        return {name: self.container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")}

    @property
    def ordinals(self) -> list[int]:
        start = self.spec.get("ordinals", {}).get("start", 0)
        return list(range(start, start + self.spec["replicas"]))

    def settings(self, ordinal: int) -> Settings:
        """Return what a node reads in the pod *ordinal*."""
        return settings_in_pod(ordinal, self.environment)

    def labels(self, ordinal: int) -> Labels:
        """Return the labels of the pod *ordinal*: the template's, and those that Kubernetes 1.27 adds."""
        name = f"{self.stateful_set['metadata']['name']}-{ordinal}"
        added = {"statefulset.kubernetes.io/pod-name": name}
        return self.spec["template"]["metadata"]["labels"] | added

    def selected(self, selector: Labels) -> list[int]:
        """Return the ordinals of the pods that have all labels of *selector*."""
        return [ordinal for ordinal in self.ordinals if selector.items() <= self.labels(ordinal).items()]

    def mounted(self, path: str) -> tuple[str, str]:
        """Return the Secret, and the key in it, that a container finds at *path*."""
        folder, _, name = path.rpartition("/")
        (mount,) = [mount for mount in self.container["volumeMounts"] if mount["mountPath"] == folder]
        (volume,) = [volume for volume in self.pod["volumes"] if volume["name"] == mount["name"]]
        assert mount["readOnly"] is True
        assert volume["secret"]["defaultMode"] == 0o440, "for the node's group alone"
        items = {item["path"]: item["key"] for item in volume["secret"].get("items", [])}
        return volume["secret"]["secretName"], items[name] if items else name
