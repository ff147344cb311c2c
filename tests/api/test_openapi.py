"""docs/openapi.yaml is the one description of the API: it is whole, and a leader and a follower do as it says."""

import inspect
import re

import pytest

from cluster import Cluster
from described import DESCRIPTION, OPERATIONS, SCHEMA, Exercise, is_made_up
from mehdb import errors
from mehdb.errors import MehdbError
from wire import ask

QUICK = 12
THOROUGH = 20_000


def described_methods() -> dict[str, set[str]]:
    return {path: {name.upper() for name in item} for path, item in DESCRIPTION["paths"].items()}


def test_the_description_is_valid() -> None:
    SCHEMA.validate()
    assert DESCRIPTION["openapi"] == "3.1.0"


def test_every_route_and_method_is_described_and_no_other(pair: Cluster) -> None:
    told = ask(pair.leader, "GET", "/nowhere").json["message"].partition("there are ")[2].split(", ")
    described = described_methods()
    assert sorted(path.replace("{key}", "") for path in described) == sorted(told)
    for path, methods in described.items():
        refused = ask(pair.leader, "PATCH", path.replace("{key}", "k"))
        assert set(refused.headers["Allow"].split(", ")) == methods, path


def test_every_code_of_an_error_that_clients_can_get_is_described() -> None:
    text = str(DESCRIPTION)
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.RequestError | errors.NotNow | errors.NotInTime | errors.PositionError):
            abstract = kind in (errors.RequestError, errors.NotInTime, errors.PositionError)
            everywhere = kind in (errors.RouteNotFound, errors.MethodNotAllowed, errors.TooSlow)
            assert abstract or everywhere or re.search(rf"'{kind.code}'", text), kind
    assert issubclass(errors.DiskFull, MehdbError)


def test_every_parameter_in_the_description_is_one(pair: Cluster) -> None:
    """A parameter that a route does not know is a 400: so those that are described are taken, whatever they ask for."""
    for path, item in DESCRIPTION["paths"].items():
        for method, operation in item.items():
            for reference in operation.get("parameters", []):
                name = reference["$ref"].rpartition("/")[2]
                parameter = DESCRIPTION["components"]["parameters"][name]
                if parameter["in"] == "query":
                    reply = ask(pair.leader, method.upper(), f"{path.replace('{key}', 'k')}?{parameter['name']}=%ff")
                    assert reply.status == 400, (path, name)
                    if method != "head":
                        assert "unknown parameter" not in reply.json["message"], (path, name)


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_described(pair: Cluster, label: str) -> None:
    Exercise(pair.nodes).run(label, QUICK)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_twenty_thousand_answers_are_as_described(cluster: Cluster) -> None:
    cluster.start(2)
    exercise = Exercise(cluster.nodes)
    made_up = [label for label, one in OPERATIONS.items() if is_made_up(one)]
    for label in sorted(OPERATIONS.keys() - set(made_up)):
        exercise.run(label, 1)
    for label in made_up:
        exercise.run(label, THOROUGH // 2 // len(made_up) + 1)
    exercise.run("GET /keys", max(2, (THOROUGH - exercise.count) // 2 + 2))  # some have few values to choose from
    statuses = sorted({status for counts in exercise.answered.values() for status in counts})
    assert exercise.count >= THOROUGH
    assert set(exercise.answered) == set(OPERATIONS)
    assert 500 not in statuses
    print(
        f"OpenAPI: {exercise.count:,} requests of {len(OPERATIONS)} operations, half to a leader, half to a follower; "
        f"statuses {statuses}: 0 errors, 0 undocumented"
    )
