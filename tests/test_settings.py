"""Flags, variables, defaults, and the relations between them."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mehdb.errors import SettingsError
from mehdb.settings import LOCAL_LEADER_URL, SETTINGS, Settings, flag, is_switch, load

IN_POD: Final = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "MEHDB_OPEN": "yes"}
POD_FQDN: Final = "{host}.mehdb.shop.svc.cluster.local"

# field, variable, a text that is not the default, what it means, what the default means
EACH: Final = [
    ("host", "MEHDB_HOST", "lonely", "lonely", "this-machine"),
    ("port", "MEHDB_PORT", "19876", 19876, 9876),
    ("listen", "MEHDB_LISTEN", "::1", "::1", "127.0.0.1"),
    ("health_port", "MEHDB_HEALTH_PORT", "19877", 19877, None),
    ("tokens_file", "MEHDB_TOKENS_FILE", "/tokens/all", Path("/tokens/all"), None),
    ("token_file", "MEHDB_TOKEN_FILE", "/tokens/mine", Path("/tokens/mine"), None),
    ("open", "MEHDB_OPEN", "yes", True, False),
    ("tls_cert", "MEHDB_TLS_CERT", "/tls/tls.crt", Path("/tls/tls.crt"), None),
    ("tls_key", "MEHDB_TLS_KEY", "/tls/tls.key", Path("/tls/tls.key"), None),
    ("tls_ca", "MEHDB_TLS_CA", "/tls/ca.crt", Path("/tls/ca.crt"), None),
    ("tls_verify_clients", "MEHDB_TLS_VERIFY_CLIENTS", "on", True, False),
    ("data_dir", "MEHDB_DATADIR", "/volume/mehdb data", Path("/volume/mehdb data"), Path("data")),
    (
        "peers", "MEHDB_PEERS", "http://a:1/, https://b.example",
        ("http://a:1", "https://b.example"), (),
    ),
    ("namespace", "MEHDB_NAMESPACE", "shop", "shop", None),
    ("service", "MEHDB_SERVICE", "kv-2", "kv-2", None),
    ("peers_service", "MEHDB_PEERS_SERVICE", "kv-all", "kv-all", None),
    ("local", "MEHDB_LOCAL", "true", True, False),
    ("leader_ordinal", "MEHDB_LEADER_ORDINAL", "5", 5, 0),
    (
        "advertise_url", "MEHDB_ADVERTISE_URL", "https://mehdb-{ordinal}.example.com/",
        "https://mehdb-{ordinal}.example.com", None,
    ),
    ("max_value", "MEHDB_MAX_VALUE", "64MiB", 64 << 20, 8 << 20),
    ("queue_size", "MEHDB_QUEUE_SIZE", "1GB", 10**9, 64 << 20),
    ("body_timeout", "MEHDB_BODY_TIMEOUT", "0.5", 0.5, 30.0),
    ("keepalive_timeout", "MEHDB_KEEPALIVE_TIMEOUT", "15s", 15.0, 75.0),
    ("header_timeout", "MEHDB_HEADER_TIMEOUT", "2.5", 2.5, 10.0),
    ("max_connections", "MEHDB_MAX_CONNECTIONS", "64", 64, 4096),
    ("stop_timeout", "MEHDB_STOP_TIMEOUT", "15", 15.0, 10.0),
    ("drain_timeout", "MEHDB_DRAIN_TIMEOUT", "0", 0.0, 10.0),
    ("lame_duck", "MEHDB_LAME_DUCK", "0.5s", 0.5, 2.0),
    ("grace_period", "MEHDB_GRACE_PERIOD", "120", 120.0, 30.0),
    ("disk_reserve", "MEHDB_DISK_RESERVE", "0", 0, 64 << 20),
    ("retain_changes", "MEHDB_RETAIN_CHANGES", "1", 1, 100_000),
    ("snapshot_lag", "MEHDB_SNAPSHOT_LAG", "2000", 2000, 100_000),
    ("acks", "MEHDB_ACKS", "2", 2, 0),
    ("acks_timeout", "MEHDB_ACKS_TIMEOUT", "0.5", 0.5, 5.0),
    ("forward_writes", "MEHDB_FORWARD_WRITES", "yes", True, False),
    ("log_level", "MEHDB_LOG_LEVEL", "WARNING", "warning", "info"),
    ("log_format", "MEHDB_LOG_FORMAT", "JSON", "json", "text"),
]  # fmt: skip
TLS: Final = {"tls_cert": "/tls/tls.crt", "tls_key": "/tls/tls.key", "tls_ca": "/tls/ca.crt"}
BESIDE: Final[dict[str, dict[str, str | None]]] = {
    "tls_cert": {"tls_key": "k"}, "tls_key": {"tls_cert": "c"}, "tls_verify_clients": {**TLS},
}  # fmt: skip
"""What some settings cannot do without."""
each_setting = pytest.mark.parametrize(
    ("name", "variable", "text", "meaning", "default"), EACH, ids=[name for name, *_ in EACH]
)

# field, then texts that it cannot have
BAD: Final = [
    ("host", ["-mehdb", "mehdb-", "me hdb", "mehdb/0", "méhdb-0", "h" * 254, "mehdb-0\n"]),
    ("port", ["0", "65536", "-1", "+1", "1.5", "http", "0x10", "9 876", "٩٨٧٦", "9876\n", "9" * 5000]),
    ("listen", ["0.0.0.0:1 ", "a b", "[::1]", "*"]),
    (
        "peers",
        [
            "mehdb-0:9876", "http://", "http://a,", "http://a,,http://b", "ftp://a", "http://a:b", "http://a:0",
            "http://a:99999", "http://a/path", "http://a?x=1", "http://a?", "http://a#x", "http://a#", "http://me@a",
            "http://me:secret@a", "http://:secret@a", "http://@a", "http://[::1", "http://a b", "http://a\r\nX: y",
        ],
    ),
    ("namespace", ["Shop", "a.b", "-a", "a-", "a_b", "a" * 64]),
    ("service", ["Shop", "a.b", "-a", "a-", "a_b", "a" * 64]),
    ("peers_service", ["Shop", "a.b", "-a", ""]),
    ("leader_ordinal", ["-1", "first", "1000000000", "1e3", "0" * 12 + "9" * 12]),
    ("advertise_url", ["mehdb-{ordinal}", "https://{name}.example/{ordinal}", "http://x/{ordinal}", "http://a?{ordinal}"]),
    ("max_value", ["0", "-1", "65MiB", "8 MiBs", "8 QB", "MiB", "1.5MiB", "1e6", "8MiB\n", "9" * 5000]),
    ("queue_size", ["0", "1MB", "17GiB", "lots"]),
    ("body_timeout", ["0", "-1", "nan", "inf", "3601", "1m", "soon", "s", "", " "]),
    ("keepalive_timeout", ["0.9", "nan", "3600.1"]),
    ("header_timeout", ["0", "nan", "3601"]),
    ("max_connections", ["15", "1000001", "-1"]),
    ("stop_timeout", ["0.05", "-inf", "3601"]),
    ("drain_timeout", ["-1", "nan", "3601"]),
    ("lame_duck", ["-0.1", "long", "3601"]),
    ("grace_period", ["0", "86401", "1h"]),
    ("disk_reserve", ["-1", "10%", "2TiB", "1025GiB"]),
    ("retain_changes", ["0", "-1", "1k", "1000000000001"]),
    ("snapshot_lag", ["0", "-1", "1e5", "1000000000001"]),
    ("peers_service", ["Mehdb", "a.b", "-a", "a" * 64]),
    ("health_port", ["0", "65536", "http"]),
    ("acks", ["-1", "101", "1.5", "all"]),
    ("acks_timeout", ["-1", "61", "nan", "soon"]),
    ("log_level", ["loud", "infos", "info,debug"]),
    ("log_format", ["xml", "jsonl", "text,json"]),
]  # fmt: skip


def loaded(
    flags: Mapping[str, str | None] | None = None,
    environ: Mapping[str, str] | None = None,
    host: str = "this-machine",
    fqdn: str = POD_FQDN,
) -> Settings:
    """Load settings on a machine called *host*, whose DNS would say *fqdn*."""
    return load(flags or {}, environ or {}, find_host_name=lambda: host, find_fqdn=lambda name: fqdn.format(host=name))


def problems(
    flags: Mapping[str, str | None] | None = None, environ: Mapping[str, str] | None = None, **machine: str
) -> tuple[str, ...]:
    """Return what is wrong with settings that must be refused."""
    with pytest.raises(SettingsError) as caught:
        loaded(flags, environ, **machine)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# Where a value comes from.


def test_every_setting_is_tested_here() -> None:
    assert [(one.name, one.metadata["variable"]) for one in SETTINGS] == [(name, var) for name, var, *_ in EACH]
    paths = {one.name for one in SETTINGS if one.metadata["parse"] is Path}
    switches = {one.name for one in SETTINGS if is_switch(one)}
    assert {name for name, _ in BAD} | paths | switches == {one.name for one in SETTINGS}


@each_setting
def test_a_default_holds_where_nothing_is_set(name: str, variable: str, text: str, meaning: Any, default: Any) -> None:  # noqa: ARG001
    assert getattr(loaded(), name) == default
    assert getattr(loaded({name: None}, {"MEHDB_OTHER": text}), name) == default


@each_setting
def test_an_empty_variable_counts_as_unset(name: str, variable: str, text: str, meaning: Any, default: Any) -> None:  # noqa: ARG001
    assert getattr(loaded(environ={variable: ""}), name) == default


@each_setting
def test_a_variable_beats_the_default(name: str, variable: str, text: str, meaning: Any, default: Any) -> None:
    assert getattr(loaded(BESIDE.get(name), {variable: text}), name) == meaning != default


@each_setting
def test_a_flag_beats_the_default(name: str, variable: str, text: str, meaning: Any, default: Any) -> None:  # noqa: ARG001
    assert getattr(loaded({name: text} | BESIDE.get(name, {})), name) == meaning != default


OTHERS: Final = {
    "host": "other", "peers": "http://c:3", "local": "off", "forward_writes": "off", "log_level": "debug",
    "data_dir": "other", "listen": "127.0.0.1", "open": "off", "tls_verify_clients": "off",
}  # fmt: skip


@each_setting
def test_a_flag_beats_the_variable(name: str, variable: str, text: str, meaning: Any, default: Any) -> None:
    default_text = next(one.metadata["default"] for one in SETTINGS if one.name == name)
    other = OTHERS.get(name) or default_text or text
    beside = BESIDE.get(name, {})
    of_other = getattr(loaded(beside, {variable: other}), name)
    assert getattr(loaded({name: text} | beside, {variable: other}), name) == meaning
    assert getattr(loaded({name: other} | beside, {variable: text}), name) == of_other
    assert default is None or of_other != meaning


def test_a_flag_is_the_name_with_dashes() -> None:
    assert [flag(name) for name in ("host", "data_dir", "keepalive_timeout")] == [
        "--host", "--data-dir", "--keepalive-timeout",
    ]  # fmt: skip


# What a value may be.


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD for text in texts])
def test_a_bad_value_is_refused_with_its_source(name: str, text: str) -> None:
    variable = next(one.metadata["variable"] for one in SETTINGS if one.name == name)
    [problem] = problems({name: text})
    assert problem.startswith(f"{flag(name)}: {text!r} ")
    if text:  # an empty variable is none
        [problem] = problems(environ={variable: text})
        assert problem.startswith(f"{variable}: {text!r} ")


@pytest.mark.parametrize(
    ("name", "text", "meaning"),
    [
        ("host", "a.b_c-d", "a.b_c-d"),
        ("port", "1", 1),
        ("port", "65535", 65535),
        ("port", "09876", 9876),
        ("listen", "127.0.0.9", "127.0.0.9"),
        ("leader_ordinal", "999999999", 999_999_999),
        ("max_value", "1", 1),
        ("max_value", "512kib", 512 << 10),
        ("max_value", "3 MB", 3_000_000),
        ("queue_size", "16GiB", 1 << 34),
        ("body_timeout", "0.1", 0.1),
        ("body_timeout", "3600s", 3600.0),
        ("grace_period", "86400", 86400.0),
        ("disk_reserve", "1024GiB", 1 << 40),
        ("retain_changes", "1000000000000", 10**12),
        ("snapshot_lag", "1", 1),
        ("peers", "http://[::1]:9876", ("http://[::1]:9876",)),
        ("advertise_url", "http://example.com:3{ordinal}", "http://example.com:3{ordinal}"),
        ("log_level", "Error", "error"),
        *(("local", text, False) for text in ("0", "false", "No", "OFF")),
        *(("local", text, True) for text in ("1", "true", "yes", "x")),
    ],
)
def test_a_value_at_its_bound_is_taken(name: str, text: str, meaning: Any) -> None:
    assert getattr(loaded({name: text}), name) == meaning


UNITS: Final = {"": 1, "B": 1, "k": 10**3, "kB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9} | {
    "Ki": 2**10, "KiB": 2**10, "Mi": 2**20, "MiB": 2**20, "Gi": 2**30, "GiB": 2**30
}  # fmt: skip


@given(st.integers(0, 2**40), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
@example(2**34 + 1, "", "")
@example(2**20 - 1, "B", "")
def test_a_size_is_its_number_times_its_unit(number: int, unit: str, space: str) -> None:
    size = number * UNITS[unit]
    text = f"{number}{space}{unit}"
    if (8 << 20) <= size <= 2**34:
        assert loaded({"queue_size": text}).queue_size == size
    else:
        assert "--queue-size" in problems({"queue_size": text})[0]


@given(st.integers(-10, 70_000))
def test_a_port_is_a_whole_number_in_its_range(number: int) -> None:
    if 1 <= number <= 65535:
        assert loaded({"port": str(number)}).port == number
    else:
        problems({"port": str(number)})


@given(st.floats())
def test_a_time_is_a_number_of_seconds_in_its_range(number: float) -> None:
    if 0.1 <= number <= 3600:
        assert loaded({"body_timeout": repr(number)}).body_timeout == number
    else:
        problems({"body_timeout": repr(number)})


URL_PIECES: Final = st.sampled_from(
    ["http://", "https://", "a", "1", ":", "/", "[", "]", "@", "%", "?", "#", ",", "é", " "]
)


@given(
    st.sampled_from([one.name for one in SETTINGS]),
    st.text(max_size=20) | st.lists(URL_PIECES, max_size=6).map("".join) | st.from_regex(r"[0-9.]+[a-zA-Z]*"),
)
def test_any_text_is_taken_or_refused_by_name(name: str, text: str) -> None:
    """Never another error, whatever an operator writes."""
    found: tuple[str, ...] = ()
    try:
        loaded({name: text})
    except SettingsError as error:
        found = error.problems
    assert all("--" in problem for problem in found)


def test_all_problems_are_reported_together() -> None:
    found = problems(
        {"port": "none", "max_value": "huge", "listen": None},
        {"MEHDB_PEERS": "mehdb-0", "MEHDB_BODY_TIMEOUT": "-1", "MEHDB_PORT": "8", "MEHDB_LOG_LEVEL": "loud"},
    )
    sources = [problem.split(":")[0] for problem in found]
    assert sources == ["--port", "MEHDB_PEERS", "--max-value", "MEHDB_BODY_TIMEOUT", "MEHDB_LOG_LEVEL"]


def test_nobody_is_let_in_by_accident() -> None:
    """Open to all the world only where that is said."""
    assert loaded().listen == "127.0.0.1"
    assert loaded({"open": "yes"}).listen == "0.0.0.0"  # noqa: S104  as was said
    assert loaded({"tokens_file": "t"}).listen == "0.0.0.0"  # noqa: S104  who may do what is known
    [problem] = problems({"listen": "0.0.0.0"})  # noqa: S104
    assert problem.startswith("--tokens-file: missing: whoever reaches 0.0.0.0 could read and write everything.")
    assert "MEHDB_OPEN=yes" in problem
    [problem] = problems(environ={"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, host="mehdb-0")
    assert problem.startswith("--tokens-file: missing")
    assert loaded({"listen": "0.0.0.0", "tls_verify_clients": "yes"} | TLS).anonymous is False  # noqa: S104


@pytest.mark.parametrize("address", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_on_loopback_nobody_else_can_ask(address: str) -> None:
    assert loaded({"listen": address}).loopback


@pytest.mark.parametrize("address", ["::", "10.0.0.1", "fe80::1%eth0", "localhost.example"])
def test_no_other_address_is_loopback(address: str) -> None:
    assert not loaded({"listen": address, "open": "yes"}).loopback


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"tls_cert": "c"}, "--tls-cert, --tls-key: give both"),
        ({"tls_key": "k"}, "--tls-cert, --tls-key: give both"),
        ({"tls_verify_clients": "yes", "tls_cert": "c", "tls_key": "k"}, "--tls-verify-clients: needs"),
        ({"tls_verify_clients": "yes", "tls_ca": "a"}, "--tls-verify-clients: needs"),
        ({"open": "yes", "tokens_file": "t"}, "--open: contradicts"),
        ({"open": "yes", "tls_verify_clients": "yes"} | TLS, "--open: contradicts"),
        ({"tokens_file": "t", "host": "mehdb-1", "peers": "http://a"}, "--token-file: missing"),
        ({"peers": "https://a,http://b"} | TLS, "--peers: with --tls-cert"),
        ({"open": "maybe"}, "--open: 'maybe' must be yes or no"),
        ({"health_port": "9876"}, "--health-port: 9876 is --port already"),
    ],
)
def test_who_may_ask_and_how_must_make_sense(flags: dict[str, str], problem: str) -> None:
    [found] = problems(flags)
    assert found.startswith(problem)


def test_nodes_talk_tls_if_they_have_a_certificate() -> None:
    assert (loaded().scheme, loaded(TLS).scheme) == ("http", "https")


def test_all_relations_are_reported_together() -> None:
    found = problems({"max_value": "32MiB", "queue_size": "16MiB", "grace_period": "22", "host": "mehdb-1"})
    assert [problem.split(":")[0] for problem in found] == ["--queue-size", "--grace-period", "--peers"]


# The names around a node.


def test_the_host_name_is_asked_for_only_where_none_is_set() -> None:
    assert loaded(host="mehdb-0").host == "mehdb-0"
    assert loaded(environ={"MEHDB_HOST": "mehdb-0"}, host="other-7").host == "mehdb-0"


@pytest.mark.parametrize(
    ("host", "ordinal"),
    [
        ("mehdb-0", 0),
        ("mehdb-12", 12),
        ("my-own-mehdb-3", 3),
        ("mehdb-999999999", 999_999_999),
        ("mehdb", None),
        ("mehdb0", None),
        ("mehdb-01", None),
        ("mehdb-1a", None),
        ("mehdb-7d4b9c-x2x4z", None),
        ("mehdb-1.example", None),
        ("mehdb-1234567890", None),
    ],
)
def test_the_ordinal_is_the_number_at_the_end_of_the_host_name(host: str, ordinal: int | None) -> None:
    assert loaded({"peers": "http://a"}, host=host).ordinal == ordinal


@pytest.mark.parametrize("value", ["tcp://10.96.12.7:9876", "tcp://[fd00::7]:9876"])
def test_the_link_to_a_service_called_mehdb_is_no_port(value: str) -> None:
    """The kubelet sets MEHDB_PORT in every pod beside a Service called mehdb."""
    assert loaded(environ={"MEHDB_PORT": value}).port == 9876
    assert "--port" in problems({"port": value})[0]


def test_the_environment_of_the_go_mehdb_keeps_its_meaning() -> None:
    """Its manifest sets these, and runs with only the image changed."""
    settings = loaded(
        environ=IN_POD
        | {
            "MEHDB_HOST": "mehdb-1",
            "MEHDB_PORT": "9999",
            "MEHDB_DATADIR": "/mehdbdata",
            "MEHDB_NAMESPACE": "shop",
        }
    )
    assert (settings.host, settings.ordinal, settings.port) == ("mehdb-1", 1, 9999)
    assert (settings.data_dir, settings.namespace) == (Path("/mehdbdata"), "shop")


@pytest.mark.parametrize("host", ["mehdb-1", "this-machine"])
def test_a_local_follower_needs_no_peers(host: str) -> None:
    assert LOCAL_LEADER_URL == "http://localhost:9999"
    assert loaded(environ={"MEHDB_LOCAL": "true", "MEHDB_HOST": host}).local


# Relations.


def test_a_pod_knows_its_dns_name_and_a_machine_has_none() -> None:
    pod = loaded(environ=IN_POD, host="mehdb-1")
    assert (pod.in_kubernetes, pod.fqdn) == (True, "mehdb-1.mehdb.shop.svc.cluster.local")
    machine = loaded({"peers": "http://a"}, {"KUBERNETES_SERVICE_HOST": ""}, host="mehdb-1")
    assert (machine.in_kubernetes, machine.fqdn) == (False, None)


@pytest.mark.parametrize("host", ["mehdb-7d4b9c-x2x4z", "mehdb", "mehdb-01"])
def test_a_pod_without_an_ordinal_is_told_to_be_a_statefulset(host: str) -> None:
    [problem] = problems(environ=IN_POD, host=host)
    assert problem.startswith(f"--host: {host!r} ")
    assert "run me as a StatefulSet" in problem


def test_a_machine_without_an_ordinal_needs_nothing() -> None:
    assert loaded(host="laptop").ordinal is None


def test_a_follower_outside_kubernetes_needs_to_know_where_the_leader_is() -> None:
    [problem] = problems(host="mehdb-2")
    assert problem.startswith("--peers: missing")
    assert "ordinal 2" in problem
    assert loaded({"peers": "http://a"}, host="mehdb-2").peers == ("http://a",)


def test_the_leader_needs_no_peers() -> None:
    assert loaded(host="mehdb-0").peers == ()
    assert loaded({"leader_ordinal": "3"}, host="mehdb-3").peers == ()


def test_peers_without_the_leader_are_refused() -> None:
    peers = "http://a,http://b"
    [problem] = problems({"peers": peers, "leader_ordinal": "2"}, host="mehdb-0")
    assert problem.startswith("--peers: ")
    assert "ordinal 2" in problem
    assert loaded({"peers": peers, "leader_ordinal": "1"}, host="mehdb-0").leader_ordinal == 1


@pytest.mark.parametrize("fqdn", ["mehdb-1", "mehdb-1.localdomain"])
def test_a_follower_pod_without_a_headless_service_is_told_so(fqdn: str) -> None:
    names = {"MEHDB_SERVICE": "mehdb", "MEHDB_NAMESPACE": "shop"}
    for missing in itertools.chain([names], ({name: ""} for name in names)):
        environ = IN_POD | {name: value for name, value in names.items() if name not in missing}
        [problem] = problems(environ=environ, host="mehdb-1", fqdn=fqdn)
        assert problem.startswith("--service, --namespace: missing")
        assert "headless Service" in problem
    assert loaded(environ=IN_POD | names, host="mehdb-1", fqdn=fqdn).service == "mehdb"
    assert loaded({"peers": "http://a"}, IN_POD, host="mehdb-1", fqdn=fqdn).peers == ("http://a",)


def test_a_queue_that_cannot_hold_one_value_is_refused() -> None:
    [problem] = problems({"max_value": "2MiB", "queue_size": "2097151"})
    assert problem.startswith("--queue-size: 2097151 bytes")
    assert loaded({"max_value": "2MiB", "queue_size": "2097152"}).queue_size == 2 << 20


def test_a_stop_that_may_outlast_the_grace_period_is_refused() -> None:
    """What comes after its end is SIGKILL, which cuts connections off."""
    times = {"drain_timeout": "5", "lame_duck": "3", "stop_timeout": "2"}
    [problem] = problems(times | {"grace_period": "10"})
    assert problem.startswith("--grace-period: 10 s is too short")
    assert "= 10 s" in problem
    assert loaded(times | {"grace_period": "10.1"}).grace_period == 10.1


def test_settings_cannot_be_changed_once_read() -> None:
    with pytest.raises(AttributeError):
        loaded().port = 1  # type: ignore[misc]
