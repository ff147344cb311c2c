"""docs/openapi.yaml is the one description of the API: it is whole, and a leader and a follower do as it says."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from itertools import repeat
from math import ceil
from multiprocessing import get_context
from operator import getitem
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from schemathesis import APIOperation
from schemathesis.core.failures import FailureGroup

from cluster import Cluster
from described import (
    DESCRIPTION,
    OPERATIONS,
    SCHEMA,
    Exercise,
    as_tested,
    described_operations,
    exercised,
    is_made_up,
    operations_of,
    resolved,
)
from guards import Tokens
from mehdb import __version__, errors
from mehdb.errors import MehdbError
from wire import ask

QUICK = 24
THOROUGH = 20_000
PROCESSES = 2  # as many as CI has cores: to make up a request takes three times as long as to answer it
NEVER_ANSWERED = {errors.RequestError, errors.NotInTime, errors.PositionError}  # only what derives from them is raised
BY_ANY_ROUTE = {errors.RouteNotFound, errors.MethodNotAllowed, errors.HeadTooSlow}  # told once, at the top
IN_A_STREAM = {errors.TooSlow}
OF_THE_DISK = {errors.DamagedRow, errors.StoreFailed, errors.DiskFull}
LEADER, FOLLOWER = 0, 1


def nodes_of(description: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping in the *description*."""
    if isinstance(description, dict):
        yield description
    if isinstance(description, dict | list):
        for inner in description.values() if isinstance(description, dict) else description:
            yield from nodes_of(inner)


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({"allOf": [schema], "components": DESCRIPTION["components"]})


def answered_kinds() -> set[type[MehdbError]]:
    """Return the errors that clients can get."""
    kinds = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MehdbError)}
    bases = (errors.RequestError, errors.NotNow, errors.NotInTime, errors.PositionError)
    return {kind for kind in kinds if issubclass(kind, bases)} - NEVER_ANSWERED | OF_THE_DISK | {MehdbError}


def test_the_description_is_valid() -> None:
    SCHEMA.validate()
    assert (DESCRIPTION["openapi"], DESCRIPTION["info"]["version"]) == ("3.1.0", __version__)
    names = [operation["operationId"] for _, _, operation in described_operations()]
    assert len(set(names)) == len(names)
    for node in nodes_of(DESCRIPTION):
        resolved(node)
        if isinstance(node.get("schema"), dict):
            Draft202012Validator.check_schema(node["schema"])
            if "example" in node:
                validator(node["schema"]).validate(node["example"])
    for schema in DESCRIPTION["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_every_route_and_method_is_described_and_no_other(pair: Cluster) -> None:
    told = ask(pair.leader, "GET", "/nowhere").json["message"].partition("there are ")[2].split(", ")
    assert sorted(path.replace("{key}", "") for path in DESCRIPTION["paths"]) == sorted(told)
    for path in DESCRIPTION["paths"]:
        refused = ask(pair.leader, "PATCH", path.replace("{key}", "k"))
        methods = {method for of, method, _ in described_operations() if of == path}
        assert set(refused.headers["Allow"].split(", ")) == methods, path


def test_every_error_that_clients_can_get_is_described_with_its_status_and_no_other() -> None:
    described = set()
    for _, _, operation in described_operations():
        for status, response in operation["responses"].items():
            for media_type in resolved(response).get("content", {}).values():
                for node in nodes_of(media_type["schema"]):
                    described |= {(int(status), code) for code in node.get("error", {}).get("enum", ())}
    told = answered_kinds() - BY_ANY_ROUTE - IN_A_STREAM
    redirect = (307, errors.NotLeader.code)
    assert described == {(kind.status, kind.code) for kind in told} | {redirect}
    assert all(f"{kind.status} `{kind.code}`" in DESCRIPTION["info"]["description"] for kind in BY_ANY_ROUTE)
    ends = DESCRIPTION["components"]["schemas"]["EndLine"]["properties"]["error"]["enum"]
    assert {kind.code for kind in IN_A_STREAM} < set(ends) < {kind.code for kind in answered_kinds()}


def test_every_parameter_in_the_description_is_one(pair: Cluster) -> None:
    """A parameter that a route does not know is a 400 that says so."""
    for path, method, operation in described_operations():
        names = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"}
        for name in names - {"wait"} if method != "HEAD" else ():  # HEAD has those of GET, and does not tell
            at_once = "&wait=0" if "wait" in names else ""
            reply = ask(pair.leader, method, f"{path.replace('{key}', 'k')}?{name}=~{at_once}")
            assert b"unknown parameter" not in reply.body, (path, name)


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_described(pair: Cluster, label: str) -> None:
    exercised([node.url for node in pair.nodes], label, QUICK)


TEXT, JSON, LINES, EVENTS = "text/plain", "application/json", "application/x-ndjson", "text/event-stream"
AS_JSON, AS_EVENTS = ({"headers": {"Accept": media_type}} for media_type in (JSON, EVENTS))
SELDOM: list[tuple[int, str, dict[str, Any], int, str]] = [
    (LEADER, "PUT /set/{key}", {"body": b"v"}, 200, TEXT),
    (LEADER, "PUT /set/{key}", {"body": b"\xff", "query": {"ttl": 1000}}, 200, TEXT),
    (LEADER, "PUT /set/{key}", {"body": b"v", "headers": {"If-None-Match": "*"}}, 412, "precondition_failed"),
    (LEADER, "PUT /set/{key}", {"body": b"v", "headers": {"Expect": "more"}}, 417, "expectation_failed"),
    (LEADER, "PUT /set/{key}", {"body": bytes((8 << 20) + 1)}, 413, "value_too_large"),
    (LEADER, "PUT /set/{key}", {"body": b"v", "query": {"acks": 9, "wait": 0.01}}, 504, "not_confirmed"),
    (LEADER, "GET /get/{key}", {"headers": {"If-None-Match": "*"}}, 304, ""),
    (LEADER, "GET /history/{key}", {"query": {"values": "true"}}, 200, LINES),
    (LEADER, "GET /keys", {"query": {"values": "true"}}, 200, LINES),
    (LEADER, "GET /keys", {"query": {"values": "true", "delimiter": "/"}}, 200, LINES),
    (LEADER, "POST /get", {"body": ["described/k", "described/none"]}, 200, LINES),
    (LEADER, "POST /get", {"body": ["k"] * 1001}, 413, "batch_too_large"),
    (LEADER, "POST /batch", {"body": [{"op": "delete", "key": "k"}] * 1001}, 413, "batch_too_large"),
    (LEADER, "POST /batch", {"body": [{"op": "check", "key": "k", "revision": 1 << 40}]}, 412, "precondition_failed"),
    (LEADER, "POST /batch", {"body": [{"op": "set", "key": "k", "value": "v"}, {"op": "delete", "key": "k"}]}, 200,
     LINES),
    (LEADER, "GET /watch", {"query": {"history": "0" * 32, "wait": 0}}, 409, "diverged"),
    (LEADER, "GET /watch", {"query": {"after": 0, "wait": 0}}, 200, LINES),
    (LEADER, "GET /watch", {"query": {"after": 0, "wait": 0}} | AS_EVENTS, 200, EVENTS),
    (LEADER, "GET /replicate", {}, 410, "compacted"),
    (LEADER, "GET /status", AS_JSON, 200, JSON),
    (FOLLOWER, "GET /status", AS_JSON, 200, JSON),
    (FOLLOWER, "GET /get/{key}", {"query": {"consistency": "leader"}}, 307, "not_leader"),
    (FOLLOWER, "GET /keys", {"query": {"consistency": "leader", "forward": "true"}}, 200, JSON),
    (FOLLOWER, "PUT /set/{key}", {"body": b"v", "headers": {"Mehdb-Forwarded": "mehdb-9"}}, 503, "not_leader"),
    (FOLLOWER, "DELETE /delete/{key}", {"query": {"forward": "true"}, "headers": {"Expect": "more"}}, 417,
     "expectation_failed"),
    (FOLLOWER, "DELETE /delete/{key}", {"query": {"forward": "true"}}, 200, TEXT),
]  # fmt: skip


def ask_as_described(
    cluster: Cluster, node: int, label: str, request: dict[str, Any], of: Mapping[str, APIOperation] = OPERATIONS
) -> tuple[int, str]:
    """Return the status of an answer that is as described, and its code if it is an error, or else its media type."""
    operation = of[label]
    key = {"path_parameters": {"key": "described/k"}} if "{key}" in operation.path else {}
    media_type = next((one.media_type for one in operation.body), None) if "body" in request else None
    case = operation.Case(**key, **request, media_type=media_type)
    answer = Exercise([]).answer(case, cluster.nodes[node].url)
    kind = answer.headers.get("content-type", [""])[0].partition(";")[0]
    return answer.status_code, answer.json()["error"] if answer.status_code > 304 else kind


def test_answers_that_are_seldom_given_are_as_described(pair: Cluster) -> None:
    for node, label, request, status, kind in SELDOM:
        assert ask_as_described(pair, node, label, request) == (status, kind), (label, str(request)[:200])
    held = pair.leader.position()
    place = {"history": held["history"], "after": held["revision"], "chain": held["chain"]}
    assert ask_as_described(pair, LEADER, "GET /replicate", {"query": place}) == (204, "")


FORGOTTEN = {
    "a status": (["paths", "/get/{key}", "get", "responses", "404"], "GET /get/{key}", {"query": {"revision": 0}}),
    "a media type": (
        ["components", "responses", "Watch", "content", "text/event-stream"],
        "GET /watch", {"query": {"wait": 0}, "headers": {"Accept": "text/event-stream"}},
    ),
    "a header": (["components", "responses", "Written", "headers", "ETag"], "PUT /set/{key}", {"body": b"v"}),
    "a code": (
        ["components", "responses", "BadRequest", "content", "application/json", "schema", "allOf", 1, "properties",
         "error", "enum", 0],
        "GET /keys", {"query": {"limit": 0}},
    ),
    "a field of an error": (
        ["components", "responses", "PreconditionFailed", "content", "application/json", "schema", "allOf", 1,
         "properties", "revision"],
        "PUT /set/{key}", {"body": b"v", "headers": {"If-Match": '"0"'}},
    ),
    "a field of a status": (
        ["components", "schemas", "NodeStatus", "properties", "version"],
        "GET /status", {"headers": {"Accept": "application/json"}},
    ),
    "a field of a line": (
        ["components", "schemas", "SetLine", "properties", "value"], "GET /watch", {"query": {"after": 0, "wait": 0}}
    ),
    "a field of an event": (
        ["components", "schemas", "Event", "properties", "id"],
        "GET /watch", {"query": {"after": 0, "wait": 0}, "headers": {"Accept": "text/event-stream"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("place", "label", "request_"), FORGOTTEN.values(), ids=FORGOTTEN)
def test_what_is_missing_in_the_description_is_noticed(
    pair: Cluster, place: list[Any], label: str, request_: dict[str, Any]
) -> None:
    ask(pair.leader, "PUT", "/set/described/other", b"v")
    ask_as_described(pair, LEADER, label, request_)
    lacking = copy.deepcopy(DESCRIPTION)
    *way, last = place
    del reduce(getitem, way, lacking)[last]
    with pytest.raises((AssertionError, FailureGroup)):
        ask_as_described(pair, LEADER, label, request_, operations_of(as_tested(lacking)))


def test_who_is_not_let_in_is_told_as_described(cluster: Cluster, tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens")
    tokens.give("app", "read", "app/")
    tokens.give("node", "admin")
    cluster.client = httpx.Client(headers=tokens.headers("node"), trust_env=False)
    cluster.start(1, MEHDB_TOKENS_FILE=str(tokens.path))
    known = {"headers": tokens.headers("app")}
    for label, request, status, code in (
        ("GET /keys", {}, 401, "unauthorized"),
        ("GET /status", {"headers": {"Accept": "application/json"}}, 401, "unauthorized"),
        ("GET /metrics", {}, 401, "unauthorized"),
        ("PUT /set/{key}", {"body": b"v"}, 401, "unauthorized"),
        ("PUT /set/{key}", {"body": b"v"} | known, 403, "forbidden"),
        ("GET /get/{key}", known, 403, "forbidden"),
        ("GET /keys", known, 403, "forbidden"),
        ("GET /snapshot", known, 403, "forbidden"),
    ):
        assert ask_as_described(cluster, LEADER, label, request) == (status, code), (label, request)


def test_a_follower_that_holds_nothing_answers_as_described(cluster: Cluster) -> None:
    cluster.add()
    cluster.add().start(ready=False)
    for label, request, status, code in (
        ("GET /status", {"query": {"level": "full"}}, 500, "not_ready"),
        ("GET /get/{key}", {}, 503, "not_synced"),
        ("GET /keys", {}, 503, "not_synced"),
        ("GET /watch", {}, 503, "not_synced"),
        ("GET /snapshot", {}, 503, "not_synced"),
        ("GET /replicate", {}, 503, "not_synced"),
        ("GET /keys", {"query": {"max_staleness": 60}}, 503, "too_stale"),
        ("PUT /set/{key}", {"body": b"v", "query": {"forward": "true"}}, 503, "leader_unreachable"),
        ("PUT /set/{key}", {"body": b"v"}, 307, "not_leader"),
    ):
        assert ask_as_described(cluster, FOLLOWER, label, request) == (status, code), (label, request)
    unready = Exercise([]).answer(OPERATIONS["GET /readyz"].Case(), cluster.followers[0].url)
    assert unready.status_code == 503
    with pytest.raises(AssertionError, match="not_synced"):  # of all that is described, what no healthy node answers
        Exercise([]).ask(OPERATIONS["GET /keys"].Case(), cluster.followers[0].url)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_twenty_thousand_answers_are_as_described(cluster: Cluster) -> None:
    """Takes 180 s of CPU, the nodes' included, of which two processes share nearly all."""
    cluster.start(2, MEHDB_RETAIN_CHANGES="100")
    urls = [node.url for node in cluster.nodes]
    made_up = sum(map(is_made_up, OPERATIONS.values()))
    share = ceil(THOROUGH / made_up)
    # Writes first: otherwise there is nothing to read. And they take longest.
    labels = sorted(OPERATIONS, key=lambda label: OPERATIONS[label].method not in ("put", "post", "delete"))
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        answered = dict(zip(labels, pool.map(exercised, repeat(urls), labels, repeat(share)), strict=True))
    statuses = sum(answered.values(), Counter())
    assert min(counts.total() for counts in answered.values()) >= len(urls)
    assert statuses.total() >= THOROUGH
    assert set(statuses) >= {200, 204, 304, 307, 400, 404, 409, 410, 412, 503, 504}, "some are never made up"
    print(
        f"OpenAPI: {statuses.total():,} requests of {len(answered)} operations, half to a leader, half to a follower; "
        f"statuses {sorted(statuses)}: 0 errors, 0 undocumented"
    )
