"""Everything that can be set, parsed once into one frozen object.

Only this module reads `os.environ`. A flag beats the environment, which beats the default. All problems are reported
together, before anything is opened. The variables of the Go mehdb (`MEHDB_HOST`, `MEHDB_PORT`, `MEHDB_DATADIR`,
`MEHDB_NAMESPACE`, `MEHDB_LOCAL`) keep their meaning.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from mehdb import parsing
from mehdb.errors import SettingsError
from mehdb.model import PAGE_BYTES, VALUE_BYTES_LIMIT

ORDINAL = re.compile(r"(?P<name>.+)-(?P<ordinal>0|[1-9][0-9]{0,8})")  # the host name that a StatefulSet gives a pod
LOCAL_LEADER_URL: Final = "http://localhost:9999"  # where the Go mehdb looked for the leader under MEHDB_LOCAL
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
ACKS_MAX: Final = 100  # as many followers as a leader lists
WAIT_S_MAX: Final = 60.0  # proxies and clients give up on a silent connection at about this age
EVERYWHERE: Final = "0.0.0.0"  # noqa: S104  a pod's port is its API
LOOPBACK: Final = "127.0.0.1"
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMATS: Final = ("text", "json")


def _setting(variable: str, parse: Callable[[str], Any], default: str | None, help_: str, shown: str = "") -> Any:
    """Declare a setting. *default* is parsed like any other text; *shown* is how `--help` names a computed default."""
    return field(metadata={"variable": variable, "parse": parse, "default": default, "help": help_, "shown": shown})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one node runs with. Times are in seconds, sizes in bytes."""

    host: str = _setting(
        "MEHDB_HOST", parsing.matching(HOST_NAME, "host name"), None,
        "This node's name, NAME-ORDINAL: the ordinal decides the role.", "the host name",
    )  # fmt: skip
    port: int = _setting("MEHDB_PORT", parsing.whole_number(1, 65535), "9876", "The TCP port of every node.")
    listen: str = _setting(
        "MEHDB_LISTEN", parsing.matching(re.compile(r"[0-9A-Za-z.:%-]+"), "address"), None,
        "The address to listen on.", f"{EVERYWHERE}; outside Kubernetes, where anyone may ask, {LOOPBACK}",
    )  # fmt: skip
    health_port: int | None = _setting(
        "MEHDB_HEALTH_PORT", parsing.whole_number(1, 65535), None,
        "A second TCP port, without TLS, that answers the probes alone: /livez, /readyz and /status.", "none",
    )  # fmt: skip
    tokens_file: Path | None = _setting(
        "MEHDB_TOKENS_FILE", Path, None,
        "The tokens that are let in, hashed, with their rights: `mehdb token` makes its lines.", "none",
    )  # fmt: skip
    token_file: Path | None = _setting(
        "MEHDB_TOKEN_FILE", Path, None, "The token that this node shows to the others (right: replicate).", "none"
    )  # fmt: skip
    open: bool = _setting("MEHDB_OPEN", parsing.yes_or_no, None, "Let everybody do everything, without a token.", "off")
    tls_cert: Path | None = _setting(
        "MEHDB_TLS_CERT", Path, None,
        "This node's certificate, with those between it and its authority: PEM. It then talks TLS alone.", "none",
    )  # fmt: skip
    tls_key: Path | None = _setting("MEHDB_TLS_KEY", Path, None, "The certificate's private key: PEM.", "none")
    tls_ca: Path | None = _setting(
        "MEHDB_TLS_CA", Path, None, "The authorities that other nodes' certificates are of: PEM.", "the system's"
    )  # fmt: skip
    tls_verify_clients: bool = _setting(
        "MEHDB_TLS_VERIFY_CLIENTS",
        parsing.yes_or_no,
        None,
        "Talk only to clients with a certificate of --tls-ca.",
        "off",
    )
    data_dir: Path = _setting("MEHDB_DATADIR", Path, "data", "The directory that holds the store: this node's volume.")
    peers: tuple[str, ...] = _setting(
        "MEHDB_PEERS", parsing.base_urls, None,
        "Outside Kubernetes: the base URLs of the nodes, by ordinal, with commas between.", "none",
    )  # fmt: skip
    namespace: str | None = _setting(
        "MEHDB_NAMESPACE", parsing.matching(DNS_LABEL, "namespace"), None,
        "Inside Kubernetes: the namespace of the StatefulSet.", "from the pod's DNS name",
    )  # fmt: skip
    service: str | None = _setting(
        "MEHDB_SERVICE", parsing.matching(DNS_LABEL, "Service name"), None,
        "Inside Kubernetes: the governing Service.", "from the pod's DNS name",
    )  # fmt: skip
    peers_service: str | None = _setting(
        "MEHDB_PEERS_SERVICE", parsing.matching(DNS_LABEL, "Service name"), None,
        "Inside Kubernetes: the headless Service that lists all pods, ready or not (publishNotReadyAddresses).",
        "the governing Service's name with -peers",
    )  # fmt: skip
    local: bool = _setting(
        "MEHDB_LOCAL", parsing.switch, None, f"Follow a leader at {LOCAL_LEADER_URL}, as the Go mehdb did.", "off"
    )
    leader_ordinal: int = _setting(
        "MEHDB_LEADER_ORDINAL",
        parsing.whole_number(0, 999_999_999),
        "0",
        "The ordinal that leads (`.spec.ordinals.start`).",
    )
    advertise_url: str | None = _setting(
        "MEHDB_ADVERTISE_URL", parsing.advertise_url, None,
        "The base URL in redirects, for clients elsewhere; {ordinal} stands for the leader's.", "as nodes see it",
    )  # fmt: skip
    max_value: int = _setting(
        "MEHDB_MAX_VALUE", parsing.size_between(1, VALUE_BYTES_LIMIT), "8MiB", "The largest value taken."
    )
    queue_size: int = _setting(
        "MEHDB_QUEUE_SIZE", parsing.size_between(PAGE_BYTES, 1 << 34), "64MiB",
        "How many bytes may arrive at once, wait to be written, or be on their way out, each before a 503.",
    )  # fmt: skip
    body_timeout: float = _setting(
        "MEHDB_BODY_TIMEOUT",
        parsing.seconds_between(0.1, 3600),
        "30",
        "How long a client may stall, sending a body or reading an answer.",
    )
    keepalive_timeout: float = _setting(
        "MEHDB_KEEPALIVE_TIMEOUT", parsing.seconds_between(1, 3600), "75", "How long an idle connection is kept open."
    )
    header_timeout: float = _setting(
        "MEHDB_HEADER_TIMEOUT",
        parsing.seconds_between(0.1, 3600),
        "10",
        "How long a request's head may take, before a 408.",
    )
    max_connections: int = _setting(
        "MEHDB_MAX_CONNECTIONS", parsing.whole_number(16, 1_000_000), "4096",
        "How many connections there may be; one more takes the place of the longest idle.",
    )  # fmt: skip
    stop_timeout: float = _setting(
        "MEHDB_STOP_TIMEOUT", parsing.seconds_between(0.1, 3600), "10",
        "How long a stop waits for requests under way; set the pod's grace period well above it.",
    )  # fmt: skip
    drain_timeout: float = _setting(
        "MEHDB_DRAIN_TIMEOUT", parsing.seconds_between(0, 3600), "10",
        "How long a stop waits for writes under way, and for connected followers to hold them.",
    )  # fmt: skip
    lame_duck: float = _setting(
        "MEHDB_LAME_DUCK", parsing.seconds_between(0, 3600), "2",
        "How long a node that stops goes on answering, unready, until clients have been told.",
    )  # fmt: skip
    grace_period: float = _setting(
        "MEHDB_GRACE_PERIOD", parsing.seconds_between(0.1, 86400), "30",
        "What preStop leaves of the pod's terminationGracePeriodSeconds: the three times above must fit into it.",
    )  # fmt: skip
    disk_reserve: int = _setting(
        "MEHDB_DISK_RESERVE", parsing.size_between(0, 1 << 40), "64MiB",
        "How much of the volume is kept free: below it, sets get 507. At most an eighth of the volume.",
    )  # fmt: skip
    retain_changes: int = _setting(
        "MEHDB_RETAIN_CHANGES", parsing.whole_number(1, 10**12), "100000",
        "How many of the newest changes are kept for followers to catch up with, superseded or not.",
    )  # fmt: skip
    snapshot_lag: int = _setting(
        "MEHDB_SNAPSHOT_LAG", parsing.whole_number(1, 10**12), "100000",
        "How many changes a follower may be behind before it is sent for a snapshot.",
    )  # fmt: skip
    acks: int = _setting(
        "MEHDB_ACKS", parsing.whole_number(0, ACKS_MAX), "0",
        "How many followers must hold a write before it is answered, where it does not say (acks=).",
    )  # fmt: skip
    acks_timeout: float = _setting(
        "MEHDB_ACKS_TIMEOUT", parsing.seconds_between(0, WAIT_S_MAX), "5",
        "How long a write waits for them, where it does not say (wait=).",
    )  # fmt: skip
    forward_writes: bool = _setting(
        "MEHDB_FORWARD_WRITES", parsing.switch, None,
        "Have this node pass writes on to the leader, in place of a redirect.", "off",
    )  # fmt: skip
    log_level: str = _setting(
        "MEHDB_LOG_LEVEL", parsing.choice(*LOG_LEVELS), "info", f"One of {', '.join(LOG_LEVELS)}."
    )
    log_format: str = _setting(
        "MEHDB_LOG_FORMAT", parsing.choice(*LOG_FORMATS), "text", "text, or json: an object on each line."
    )
    fqdn: str | None = None
    """The pod's own DNS name; None outside Kubernetes. Found, not set."""

    @property
    def in_kubernetes(self) -> bool:
        """Whether this process runs in a pod."""
        return self.fqdn is not None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can ask."""
        try:
            return ipaddress.ip_address(self.listen.partition("%")[0]).is_loopback
        except ValueError:
            return self.listen == "localhost"

    @property
    def anonymous(self) -> bool:
        """Whether everybody who can reach it may do everything."""
        return self.tokens_file is None and not self.tls_verify_clients

    @property
    def scheme(self) -> str:
        """How nodes are asked: all of them talk TLS, or none."""
        return "https" if self.tls_cert else "http"

    @property
    def ordinal(self) -> int | None:
        """The number at the end of the host name, None if there is none."""
        match = ORDINAL.fullmatch(self.host)
        return int(match["ordinal"]) if match else None


SETTINGS: Final = tuple(one for one in fields(Settings) if one.metadata)


def flag(name: str) -> str:
    """Return the flag of the setting *name*: `data_dir` → `--data-dir`."""
    return "--" + name.replace("_", "-")


def is_switch(setting: Field[Any]) -> bool:
    """Return whether *setting* is on or off: its flag takes no value."""
    return setting.metadata["parse"] in (parsing.switch, parsing.yes_or_no)


def load(
    flags: Mapping[str, str | None],
    environ: Mapping[str, str] = os.environ,
    *,
    find_host_name: Callable[[], str] = socket.gethostname,
    find_fqdn: Callable[[str], str] = socket.getfqdn,
) -> Settings:
    """Return the settings from *flags* (by field name; None: not given), the environment and this host's names.

    Raises `SettingsError` with every problem at once.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in SETTINGS:
        source, text = _source(setting, flags.get(setting.name), environ)
        try:
            values[setting.name] = None if text is None else setting.metadata["parse"](text)
        except ValueError as error:
            problems.append(f"{source}: {text!r} {error}")
    if problems:
        # What is missing may be what could not be read, so relations are judged only between values that were.
        raise SettingsError(problems)
    values["host"] = values["host"] or find_host_name()
    if not HOST_NAME.fullmatch(values["host"]):
        raise SettingsError([f"--host: the host name {values['host']!r} is none, name the node"])
    values["peers"] = values["peers"] or ()
    for setting in SETTINGS:
        if is_switch(setting):
            values[setting.name] = bool(values[setting.name])
    in_pod = environ.get("KUBERNETES_SERVICE_HOST")  # the kubelet sets it in every container
    values["fqdn"] = find_fqdn(values["host"]) if in_pod else None
    at_home = not any(values[name] for name in ("fqdn", "open", "tokens_file", "tls_verify_clients"))
    values["listen"] = values["listen"] or (LOOPBACK if at_home else EVERYWHERE)
    settings = Settings(**values)
    if problems := _relations(settings):
        raise SettingsError(problems)
    return settings


def inherited_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a node that is set up by flags alone."""
    return {name: text for name, text in environ.items() if not name.startswith(("MEHDB_", "KUBERNETES_"))}


def _source(setting: Field[Any], given: str | None, environ: Mapping[str, str]) -> tuple[str, str | None]:
    """Return where the text of *setting* comes from, by the name its user knows, and the text."""
    if given is not None:
        return flag(setting.name), given
    variable = setting.metadata["variable"]
    text = environ.get(variable)
    if text and not (variable == "MEHDB_PORT" and text.startswith("tcp://")):
        # A Service mehdb with a cluster IP makes the kubelet set MEHDB_PORT=tcp://ADDRESS:PORT in the namespace's pods.
        return variable, text
    return "default", setting.metadata["default"]


def _relations(settings: Settings) -> list[str]:
    """Return what is wrong between settings that are each fine."""
    problems = []
    if settings.queue_size < settings.max_value:
        problems.append(
            f"--queue-size: {settings.queue_size} bytes cannot hold one value of --max-value {settings.max_value}"
        )
    stop_s = settings.drain_timeout + settings.lame_duck + settings.stop_timeout
    if stop_s >= settings.grace_period:
        problems.append(
            f"--grace-period: {settings.grace_period:g} s is too short for a stop, which may take --drain-timeout + "
            f"--lame-duck + --stop-timeout = {stop_s:g} s: shorten those, or give the pod more and say so here"
        )
    problems += _access_problems(settings)
    if settings.in_kubernetes and settings.ordinal is None:
        problems.append(
            f"--host: {settings.host!r} has no ordinal: run me as a StatefulSet, whose pods are called NAME-ORDINAL"
        )
    elif settings.ordinal is not None and not settings.local:
        problems += _missing_others(settings)
    return problems


def _access_problems(settings: Settings) -> list[str]:
    """Return what is wrong with who may ask, and how."""
    problems = []
    if settings.anonymous and not settings.open and not settings.loopback:
        problems.append(
            f"--tokens-file: missing: whoever reaches {settings.listen} could read and write everything. Name a file "
            "with tokens, or say --open (MEHDB_OPEN=yes) if that is meant"
        )
    others = settings.in_kubernetes or settings.ordinal not in (None, settings.leader_ordinal)
    if settings.tokens_file and not settings.token_file and others:
        problems.append("--token-file: missing: nodes show each other a token, with the right replicate; name its file")
    if settings.open and not settings.anonymous:
        problems.append("--open: contradicts --tokens-file and --tls-verify-clients: leave it out")
    if (settings.tls_cert is None) != (settings.tls_key is None):
        problems.append("--tls-cert, --tls-key: give both, or neither")
    if settings.tls_cert and any(url.startswith("http:") for url in settings.peers):
        problems.append("--peers: with --tls-cert nodes talk TLS: each must begin with https://")
    if settings.tls_verify_clients and not (settings.tls_cert and settings.tls_ca):
        problems.append("--tls-verify-clients: needs --tls-cert, --tls-key and --tls-ca")
    if settings.health_port == settings.port:
        problems.append(f"--health-port: {settings.port} is --port already: give another")
    return problems


def _missing_others(settings: Settings) -> list[str]:
    """Return why a node with these settings cannot know where its leader is, or, if it leads, the others."""
    follows = settings.ordinal != settings.leader_ordinal
    if settings.peers:
        if not follows or len(settings.peers) > settings.leader_ordinal:
            return []
        return [f"--peers: the URL of the leader, ordinal {settings.leader_ordinal}, is missing: add it"]
    if settings.fqdn is None:
        return (
            [
                f"--peers: missing: {settings.host!r} has ordinal {settings.ordinal}, so this node follows ordinal "
                f"{settings.leader_ordinal}; say where that is, or give a single node a --host without one"
            ]
            if follows
            else []
        )
    if settings.fqdn.count(".") < 2 and not (settings.service and settings.namespace):  # NAME.SERVICE.NAMESPACE
        return [
            f"--service, --namespace: missing, and the pod's DNS name {settings.fqdn!r} does not tell them: "
            "is the StatefulSet's serviceName a headless Service?"
        ]
    return []
