"""Requests made up from `docs/openapi.yaml`, and held against it: every answer must be one that it describes."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster import DEADLINE_S, Node

DESCRIPTION = yaml.safe_load((Path(__file__).parents[2] / "docs/openapi.yaml").read_text())
SCHEMA = schemathesis.openapi.from_dict(DESCRIPTION)
OPERATIONS: dict[str, APIOperation] = {}
for _result in SCHEMA.get_all_operations():
    OPERATIONS[_result.ok().label] = _result.ok()
CHECKS = [
    status_code_conformance, content_type_conformance, response_headers_conformance, response_schema_conformance
]  # fmt: skip
WAIT_S = 0.01  # instead of up to a minute, or the 5 s that are waited where nothing is said
WAITED_FOR = ("min_revision", "revision", "acks", "wait")  # what makes a request wait
KEYS = 5  # as many does every second request with a key share: otherwise no key would ever be found
PARTLY_MADE_UP = 2
# What a server may answer with 5xx, and only where a request has asked for what it cannot have.
EXCUSED = {"not_reached", "not_confirmed", "too_stale"}


def is_made_up(operation: APIOperation) -> bool:
    """Return whether there is more than one request of *operation* that can be made."""
    return any((operation.path_parameters, operation.query, operation.headers, operation.body))


@schemathesis.serializer("application/x-ndjson")
def _ndjson(_context: schemathesis.SerializationContext, value: Any) -> Any:
    lines = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@dataclass
class Exercise:
    """Requests, each to all of *nodes*: to make one up takes longer than to answer it. Counts what is answered."""

    nodes: list[Node]
    answered: dict[str, Counter[int]] = field(default_factory=dict)
    session: requests.Session = field(default_factory=requests.Session)

    @property
    def count(self) -> int:
        return sum(sum(statuses.values()) for statuses in self.answered.values())

    def run(self, label: str, number: int) -> None:
        """Make up *number* requests of one operation, half of them against its description, where that can be."""
        operation = OPERATIONS[label]
        self._run(operation, GenerationMode.POSITIVE, number - number // 2)
        if is_made_up(operation):
            self._run(operation, GenerationMode.NEGATIVE, number // 2)

    def _run(self, operation: APIOperation, mode: GenerationMode, number: int) -> None:
        numbers = iter(range(number))

        @seed(4)
        @settings(
            max_examples=number, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            _shorten(case)
            number = next(numbers, 0)
            if mode is GenerationMode.POSITIVE and "key" in (case.path_parameters or {}) and number % PARTLY_MADE_UP:
                case.path_parameters["key"] = f"shared/{number % KEYS}"
            for node in self.nodes:
                self._ask(case, node)

        ask()

    def _ask(self, case: Case, node: Node) -> None:
        answer = case.call(
            base_url=node.url, session=self.session, allow_redirects=False, timeout=DEADLINE_S
        )  # fmt: skip
        self.answered.setdefault(case.operation.label, Counter())[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)
        if answer.status_code >= 500:
            error = json.loads(answer.content).get("error") if answer.content else "told to HEAD alone"
            asked = {**(case.query or {})}
            assert error in EXCUSED or (case.method == "HEAD" and asked), (answer.request.url, answer.content)
            assert any(name in asked for name in (*WAITED_FOR, "max_staleness")), answer.request.url


def _shorten(case: Case) -> None:
    """Have a request wait for next to nothing."""
    query = case.query
    if not isinstance(query, dict):
        return
    wait = query.get("wait", WAIT_S)
    waits = case.path == "/watch" or any(name in query for name in WAITED_FOR)
    if waits and ("wait" not in query or (isinstance(wait, int | float) and wait > WAIT_S)):
        query["wait"] = WAIT_S
