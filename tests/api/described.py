"""Requests made up from `docs/openapi.yaml`, and held against it: every answer must be one that it describes."""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from math import ceil
from pathlib import Path
from traceback import format_exception
from typing import Any

import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import APIOperation, BaseSchema, Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster import DEADLINE_S

DESCRIPTION = yaml.safe_load((Path(__file__).parents[2] / "docs/openapi.yaml").read_text())
LINES_MAX = 5  # of a body that is made up: a thousand would take minutes


def as_tested(description: dict[str, Any]) -> BaseSchema:
    """Return the *description*, with bodies of few lines, and without room for what is not described.

    Clients must expect that an answer has a new field one day. Here that is one which somebody has forgotten.
    """
    tested = copy.deepcopy(description)
    for path, media_type in (("/batch", "application/x-ndjson"), ("/get", "application/json")):
        tested["paths"][path]["post"]["requestBody"]["content"][media_type]["schema"]["maxItems"] = LINES_MAX
    base = tested["components"]["schemas"].pop("Error")  # answers add fields to it
    _close(tested["components"])
    tested["components"]["schemas"]["Error"] = base
    return schemathesis.openapi.from_dict(tested)


def _close(node: Any) -> None:
    """Have all objects in *node* be without other properties than those named."""
    if isinstance(node, dict):
        if "allOf" in node or (node.get("type") == "object" and "additionalProperties" not in node):
            node["unevaluatedProperties"] = False
        for inner in node.values():
            _close(inner)
    elif isinstance(node, list):
        for inner in node:
            _close(inner)


def operations_of(schema: BaseSchema) -> dict[str, APIOperation]:
    """Return all operations by method and path, such as `GET /keys`."""
    return {one.label: one for one in (result.ok() for result in schema.get_all_operations())}


SCHEMA = as_tested(DESCRIPTION)
OPERATIONS = operations_of(SCHEMA)
METHODS = ("get", "head", "put", "post", "delete")
CHECKS = [
    status_code_conformance, content_type_conformance, response_headers_conformance, response_schema_conformance
]  # fmt: skip
WAIT_S = 0.01  # instead of up to a minute, or the 5 s that are waited where nothing is said
WAITED_FOR = ("min_revision", "revision", "acks", "wait")  # what makes a request wait
REVISIONS = ("min_revision", "revision", "after", "before", "durable")
CONDITIONS = {"If-Match", "If-None-Match"}
BAD_REQUEST = 400  # never to what is as described
KEYS = 5  # as many do likely requests share: otherwise no key would ever be found
LEARN_EVERY = 10  # likely requests, before the first node is asked again where it is
OF_ANY_ANSWER = {"server", "date", "content-type", "content-length", "transfer-encoding", "connection"}  # HTTP's own
ACCEPTED = ("*/*", "application/json", "text/event-stream")  # in turn: OpenAPI has no parameter for it
# What a server may answer with 5xx, and only where a request has asked for what it cannot have.
EXCUSED = {
    "not_reached": (504, ("min_revision", "revision")),
    "not_confirmed": (504, ("acks",)),
    "too_stale": (503, ("max_staleness",)),
}


def is_made_up(operation: APIOperation) -> bool:
    """Return whether there is more than one request of *operation* that can be made."""
    return any((operation.path_parameters, operation.query, operation.headers, operation.body))


def resolved(node: Any) -> Any:
    """Return what *node* refers to in the description, or itself."""
    while isinstance(node, dict) and "$ref" in node:
        target: Any = DESCRIPTION
        for name in node["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        node = target
    return node


def described_operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield path, method and operation of all that the description has."""
    for path, item in DESCRIPTION["paths"].items():
        for method in METHODS:
            if method in item:
                parameters = [*item.get("parameters", ()), *item[method].get("parameters", ())]
                yield path, method.upper(), item[method] | {"parameters": [resolved(one) for one in parameters]}


@schemathesis.serializer("application/x-ndjson")
def _to_lines(_context: schemathesis.SerializationContext, value: Any) -> Any:
    lines = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@schemathesis.deserializer("application/x-ndjson")
def _from_lines(_context: schemathesis.DeserializationContext, answer: Any) -> Any:
    assert not answer.content or answer.content.endswith(b"\n"), "half a line"
    return [json.loads(line) for line in answer.content.splitlines()]


@schemathesis.deserializer("text/plain")
def _from_text(_context: schemathesis.DeserializationContext, answer: Any) -> Any:
    return answer.content.decode()


def exercised(urls: list[str], label: str, number: int) -> Counter[int]:
    """Return the statuses of *number* requests of one operation. To be called in a process of its own, too."""
    exercise = Exercise(urls)
    try:
        with exercise.session:
            exercise.run(label, number)
    except (Exception, BaseExceptionGroup) as failure:  # noqa: BLE001  whatever it is
        text = "".join(format_exception(failure))  # as text: schemathesis' failures do not travel between processes
        raise AssertionError(f"{label}: {text}") from None
    return exercise.answered


@dataclass
class Exercise:
    """Requests, each to the nodes at all *urls*: to make one up takes longer than to answer it. Counts the answers."""

    urls: list[str]
    answered: Counter[int] = field(default_factory=Counter)
    """How often each status was answered."""
    session: requests.Session = field(default_factory=requests.Session)
    position: dict[str, Any] = field(default_factory=dict)
    """Where the first node was a moment ago."""

    def run(self, label: str, number: int) -> None:
        """Make up *number* requests or more, half of them against the description; few, if all are equal."""
        operation = OPERATIONS[label]
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if is_made_up(operation) else ():
            self._run(operation, mode, ceil(number / 2 / len(self.urls) / (2 if has_likely(operation) else 1)))
        if not is_made_up(operation):
            self._run(operation, GenerationMode.POSITIVE, 1)

    def _run(self, operation: APIOperation, mode: GenerationMode, number: int) -> None:
        """Make up *number* cases, and ask each as it is, and about what there is, where that is another."""
        numbers = count()

        @seed(4)
        @settings(
            max_examples=number, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            number = next(numbers)
            if case.path in ("/status", "/watch"):
                case.headers["Accept"] = ACCEPTED[number % len(ACCEPTED)]
            _shorten(case)
            _have_types(case)
            self._ask_all(case, mode)
            if has_likely(operation):
                if number % LEARN_EVERY == 0:
                    self.position = self.session.get(f"{self.urls[0]}/position").json()
                self._make_likely(case, number)
                self._ask_all(case, mode)

        ask()

    def _ask_all(self, case: Case, mode: GenerationMode) -> None:
        for url in self.urls:
            answer = self.ask(case, url)
            understood = mode is GenerationMode.NEGATIVE or answer.status_code != BAD_REQUEST
            assert understood, (answer.request.url, answer.request.body, answer.content)

    def _make_likely(self, case: Case, number: int) -> None:
        """Have a request be about a key, and a place in the history, that there are or soon will be."""
        key, head = f"shared/{number % KEYS}", self.position["revision"]
        if "key" in case.path_parameters:
            case.path_parameters["key"] = key
        for name in REVISIONS:
            if isinstance(case.query.get(name), int):
                case.query[name] %= head + 2
        if isinstance(case.body, list):
            case.body = [line | {"key": key} if isinstance(line, dict) else key for line in case.body]
        for name in CONDITIONS & case.headers.keys():
            if number % 2:
                found = self.session.head(f"{self.urls[0]}/get/{key}")
                case.headers[name] = found.headers.get("ETag", "*")
        if case.path == "/watch" and "history" in case.query and number % 2:
            case.query["history"] = self.position["history"]
        if case.path == "/replicate" and number % 2:
            case.query |= {"history": self.position["history"], "after": head, "chain": self.position["chain"]}
            case.headers.pop("Mehdb-Epoch", None)  # of this history, a leader would believe that another has led since

    def ask(self, case: Case, url: str) -> requests.Response:
        """Have the node at *url* answer *case* as described, with no 5xx that is not asked for."""
        answer = self.answer(case, url)
        if answer.status_code >= 500:
            error = None if case.method == "HEAD" else json.loads(answer.content)["error"]
            assert _is_excused(case, answer.status_code, error), (answer.request.url, answer.content)
        return answer

    def answer(self, case: Case, url: str) -> requests.Response:
        """Have the node at *url* answer *case* as described."""
        accept = {"Accept": (case.headers or {}).get("Accept", ACCEPTED[0])}  # the session's beats that of the case
        answer = case.call(
            base_url=url, session=self.session, headers=accept, allow_redirects=False, timeout=DEADLINE_S
        )
        self.answered[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)
        described = case.operation.responses.find_by_status_code(answer.status_code).headers
        unknown = (
            {name.lower() for name in answer.headers} - {name.lower() for name, _ in described.items()} - OF_ANY_ANSWER
        )
        assert not unknown, (answer.request.url, answer.status_code, unknown)
        return answer


def _is_excused(case: Case, status: int, error: str | None) -> bool:
    """Return whether *case* has asked for that answer. *error* is None where the answer has no body."""
    return any(
        status == excused and error in (code, None) and any(name in (case.query or {}) for name in names)
        for code, (excused, names) in EXCUSED.items()
    )


def has_likely(operation: APIOperation) -> bool:
    """Return whether requests of *operation* name keys or revisions: few that are made up are there."""
    names = {parameter.name for parameter in operation.query}
    return bool(operation.path_parameters or operation.body or names.intersection(REVISIONS))


def _have_types(case: Case) -> None:
    """Have what a batch writes be of a type with a subtype: any other text is kept as well, but would be none later."""
    for line in case.body if isinstance(case.body, list) else ():
        content_type = line.get("content_type") if isinstance(line, dict) else None
        if isinstance(content_type, str) and content_type.strip() and "/" not in content_type:
            line["content_type"] = f"x/{content_type}"[:255]


def _shorten(case: Case) -> None:
    """Have a request wait for next to nothing, and a watch be a long poll, also where `wait` is against the rules."""
    wait = case.query.get("wait")
    text = str(wait[0] if isinstance(wait, list) and wait else wait)
    is_long = text.replace(".", "", 1).isdecimal() and float(text) > WAIT_S
    is_left_out = wait in (None, [], {})
    waits = case.path == "/watch" or any(name in case.query for name in WAITED_FOR)
    if is_long or (is_left_out and waits):
        case.query["wait"] = WAIT_S
