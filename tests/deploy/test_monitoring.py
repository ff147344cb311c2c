"""Alerts and dashboard, held against what nodes tell Prometheus; and alerts against faults, by promtool."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from cluster import running
from exposed import FIXED, OF_PROMETHEUS, OF_TARGETS, Exposed, expose
from kustomize import DEPLOY
from promql import Selector, groups, selectors, shown
from sources import ROOT

RULE_FILE: Final = DEPLOY / "components" / "monitoring" / "prometheus-rule.yaml"
GROUPS: Final[list[dict[str, Any]]] = yaml.safe_load(RULE_FILE.read_text())["spec"]["groups"]
ALERTS: Final[dict[str, dict[str, Any]]] = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
DASHBOARD: Final[dict[str, Any]] = json.loads((DEPLOY / "components" / "dashboard" / "mehdb.json").read_text())
PANELS: Final = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS: Final = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
PAGE: Final = (ROOT / "docs" / "OPERATIONS.md").read_text()
FAULTS: Final = Path(__file__).with_name("faults-and-alerts.yaml")
ROUTES: Final = (ROOT / "mehdb" / "api" / "routes.py").read_text()
PROMTOOL_TIMEOUT_S: Final = 60


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exposed]:
    """What a leader and its follower tell."""
    with running(tmp_path_factory.mktemp("exposed")) as cluster:
        yield expose(cluster)


def expressions() -> list[tuple[str, str]]:
    """Return every expression there is, with what it is of."""
    of_dashboard = [(title, target["expr"]) for title, target in TARGETS]
    of_dashboard += [(one["name"], one["expr"]) for one in DASHBOARD["annotations"]["list"]]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match
            of_dashboard.append((variable["name"], f"max by ({match[2]}) ({match[1]})"))
    return [(name, alert["expr"]) for name, alert in ALERTS.items()] + of_dashboard


EXPRESSIONS: Final = expressions()


def metrics(found: list[Selector]) -> set[str]:
    return {one.metric for one in found}


# Names


def test_every_metric_that_is_asked_for_is_one_that_nodes_have(exposed: Exposed) -> None:
    asked = {metric for _, expression in EXPRESSIONS for metric in metrics(selectors(expression))}
    assert len(asked) > 30
    assert exposed.missing(asked) == set()


@pytest.mark.parametrize(("name", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_every_label_is_one_that_the_metric_has(name: str, expression: str, exposed: Exposed) -> None:
    found = selectors(expression)
    assert found, name
    labels = {one.metric: OF_TARGETS | exposed.labels.get(one.metric, set()) for one in found}
    for one in found:
        assert {matcher.label for matcher in one.matchers} <= labels[one.metric], one
    assert groups(expression) <= set.union(*labels.values())


@pytest.mark.parametrize(("name", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_every_expression_is_about_the_job_that_scrapes_nodes(name: str, expression: str) -> None:
    assert all(one.given()["job"] == "mehdb" for one in selectors(expression)), name


@pytest.mark.parametrize(("name", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_every_value_of_a_label_is_one_that_there_is(name: str, expression: str) -> None:
    for one in selectors(expression):
        for matcher in one.matchers:
            values = matcher.value.split("|")
            if matcher.label == "route":
                assert all(f'"{value}"' in ROUTES for value in values), name
            assert set(values) <= FIXED.get(matcher.label, set(values)), name


# Alerts


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_what_and_where(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("warning", "critical")
    texts = alert["annotations"]["summary"] + alert["annotations"]["description"]
    known = OF_TARGETS | groups(alert["expr"])
    assert shown(texts) <= known
    if name != "MehdbNotScraped":
        assert "$labels.namespace" in texts
    assert all(text.endswith(".") for text in (alert["annotations"]["summary"], alert["annotations"]["description"]))


def runbook(name: str) -> str:
    """Return what docs/OPERATIONS.md says about an alert."""
    match = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match, f"docs/OPERATIONS.md has no section `### {name}`"
    return match[1]


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_names_its_part_of_the_page_which_says_what_to_do(name: str) -> None:
    assert ALERTS[name]["annotations"]["runbook"] == f"docs/OPERATIONS.md#{name.lower()}"
    assert len(runbook(name).split()) > 15


def test_the_page_tells_of_no_alert_that_does_not_exist() -> None:
    assert re.findall(r"^### (Mehdb\w+)$", PAGE, re.MULTILINE) == list(ALERTS), "in the same order"


@pytest.mark.parametrize("name", ["MehdbNoLeader", "MehdbLeaderNotHeard", "MehdbLagging"])
def test_what_is_not_known_does_not_hide_the_fault(name: str) -> None:
    """These are about metrics that are absent while they are unknown."""
    assert " unless on (namespace" in " ".join(ALERTS[name]["expr"].split())


def promtool(*arguments: str, directory: Path) -> str:
    """Run promtool in *directory*. Skips the test where it is not at hand; fails it in CI."""
    if not shutil.which("promtool"):
        if os.environ.get("CI"):
            pytest.fail("CI needs promtool, which is in Prometheus' packages")
        pytest.skip("promtool is not here: it is in Prometheus' packages")
    done = subprocess.run(
        ["promtool", *arguments], cwd=directory, capture_output=True, text=True, timeout=PROMTOOL_TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": GROUPS}))
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", "rules.yaml", directory=tmp_path)


def test_faults_raise_their_alerts_and_a_healthy_cluster_none(tmp_path: Path) -> None:
    silent = [
        {
            "name": group["name"],
            "rules": [{k: v for k, v in rule.items() if k != "annotations"} for rule in group["rules"]],
        }
        for group in GROUPS
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": silent}))
    (tmp_path / "tests.yaml").write_text(FAULTS.read_text())
    assert "SUCCESS" in promtool("test", "rules", "tests.yaml", directory=tmp_path)


def test_every_alert_is_raised_by_a_fault_and_quiet_when_nothing_is_wrong() -> None:
    raised, quiet = set(), set()
    for scene in yaml.safe_load(FAULTS.read_text())["tests"]:
        for one in scene["alert_rule_test"]:
            (raised if one.get("exp_alerts") else quiet).add(one["alertname"])
    assert raised == set(ALERTS)
    assert quiet == set(ALERTS)


def test_prometheus_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    variables = {"$__rate_interval": "5m", "$namespace": "shop", "$pod": "mehdb-.*"}
    rules = []
    for number, (_, expression) in enumerate(EXPRESSIONS):
        text = expression
        for variable, value in variables.items():
            text = text.replace(variable, value)
        assert "$" not in text
        rules.append({"record": f"expression_{number}", "expr": text})
    (tmp_path / "dashboard.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"SUCCESS: {len(rules)} rules found" in promtool("check", "rules", "dashboard.yaml", directory=tmp_path)


# The dashboard


def test_the_dashboard_goes_from_health_to_the_process() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Health", "Traffic and latency", "Replication", "Disk", "Process"]


def test_the_dashboard_asks_which_prometheus_which_namespace_and_which_pods() -> None:
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "pod"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert variables["pod"]["multi"]
    sources = [one["datasource"]["uid"] for one in (*PANELS, *(target for _, target in TARGETS))]
    assert set(sources) == {"${datasource}"}


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=[f"{title}-{one['refId']}" for title, one in TARGETS])
def test_every_panel_is_about_the_chosen_namespace_and_pods(title: str, target: dict[str, Any]) -> None:
    for one in selectors(target["expr"]):
        assert {(matcher.label, matcher.operator, matcher.value) for matcher in one.matchers} >= {
            ("namespace", "=", "$namespace"), ("pod", "=~", "$pod")
        }, title  # fmt: skip
    assert shown(target["legendFormat"]) <= OF_TARGETS | groups(target["expr"]) | {"direction"}


def test_panels_have_titles_explanations_and_places_of_their_own() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["title"] and panel["description"].endswith(".") for panel in PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_metric_of_a_node_is_on_the_dashboard(exposed: Exposed) -> None:
    """But for what only tells of Python, and of memory that is merely promised."""
    asked = {re.sub(r"_(bucket|sum|count)$", "", one) for _, text in EXPRESSIONS for one in metrics(selectors(text))}
    told = {
        re.sub(r"_(bucket|sum|count)$", "", metric)
        for metric in exposed.labels
        if metric.startswith("mehdb_") and not metric.endswith("_created")
    }
    assert told - asked == set()


def test_a_name_that_no_node_has_is_noticed(exposed: Exposed) -> None:
    [wrong] = selectors('mehdb_leader_hear_seconds{job="mehdb"} > 60')
    assert exposed.missing([wrong.metric]) == {"mehdb_leader_hear_seconds"}
    assert not OF_PROMETHEUS & {wrong.metric}
