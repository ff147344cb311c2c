"""mehdb: a replicated key-value store on a Kubernetes StatefulSet that you talk to with curl."""

__version__ = "0.1.0"
