"""Schemas of what the Prometheus operator defines, as far as deploy/ uses it. What is not named here is refused."""

from typing import Any, Final

TEXT: Final = {"type": "string", "minLength": 1}
DURATION: Final = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h|d))+$"}
LABELS: Final = {"type": "object", "additionalProperties": {"type": "string"}}


def strict(required: str = "", **properties: Any) -> dict[str, Any]:
    """Return the schema of an object with *properties* and no others."""
    return {
        "type": "object", "properties": properties, "required": required.split(), "additionalProperties": False,
    }  # fmt: skip


def some(items: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a list of one or more *items*."""
    return {"type": "array", "items": items, "minItems": 1}


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a resource."""
    return strict(
        "apiVersion kind metadata spec",
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"const": kind},
        metadata=strict("name", name=TEXT, namespace=TEXT, labels=LABELS),
        spec=spec,
    )


KEY: Final = strict("name key", name=TEXT, key=TEXT)  # of a Secret
TLS: Final = strict("serverName ca", serverName=TEXT, ca=strict(secret=KEY), cert=strict(secret=KEY), keySecret=KEY)
ENDPOINT: Final = strict(
    "port path interval scrapeTimeout",
    port=TEXT,
    path={"type": "string", "pattern": "^/"},
    scheme={"enum": ["http", "https"]},
    interval=DURATION,
    scrapeTimeout=DURATION,
    authorization=strict("credentials", credentials=KEY),
    tlsConfig=TLS,
)
RULE: Final = strict(
    "alert expr labels annotations",
    alert={"type": "string", "pattern": "^Mehdb[A-Z][A-Za-z]+$"},
    expr=TEXT,
    **{"for": DURATION},
    labels=strict("severity", severity={"enum": ["critical", "warning"]}),
    annotations=strict("summary description runbook", summary=TEXT, description=TEXT, runbook=TEXT),
)
CUSTOM_RESOURCES: Final = {
    "ServiceMonitor": resource(
        "ServiceMonitor",
        strict(
            "jobLabel selector endpoints",
            jobLabel=TEXT,
            selector=strict("matchLabels", matchLabels=LABELS),
            endpoints=some(ENDPOINT),
        ),
    ),
    "PrometheusRule": resource(
        "PrometheusRule", strict("groups", groups=some(strict("name rules", name=TEXT, rules=some(RULE))))
    ),
}
