"""What a node says of itself: /status, /livez, /readyz and /metrics."""

from typing import Final

from aiohttp import web

from mehdb import metrics
from mehdb.api.access import Anyone, Gate
from mehdb.api.answers import JSON, TEXT, Answer, json_answer
from mehdb.api.node import NodeView
from mehdb.api.requests import Parameters, Target, no_parameters
from mehdb.errors import NotReady
from mehdb.metrics import Metrics

LEVELS: Final = ("brief", "full")


def _level(text: str) -> str:
    if text not in LEVELS:
        raise ValueError(f"must be one of {', '.join(LEVELS)}")
    return text


class StatusRoutes:
    """The routes for people, probes and Prometheus. None of them reads the disk or asks another node."""

    def __init__(self, node: NodeView, node_metrics: Metrics, gate: Gate | None) -> None:
        """Without a *gate*, which says who may know, nothing is told but what probes need."""
        self._gate = gate
        self._node = node
        self._metrics = node_metrics

    async def status(self, request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer with the role; with the number of keys or why not ready; or with everything, as JSON."""
        parameters = Parameters(target.query)
        level = parameters.take("level", _level, "brief")
        parameters.finish()
        if self._gate is not None and JSON in request.headers.get("Accept", ""):
            self._gate.admit(request, "/status", Anyone.KNOWN)
            return json_answer(self._node.status())
        if level == "brief":
            return Answer(self._node.role.encode())
        problems = [f"{check.name}: {check.problem}" for check in self._node.checks() if check.problem]
        if problems:
            raise NotReady("; ".join(problems))
        return Answer(str(self._node.status().keys).encode())

    async def livez(self, _request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer 200: that the event loop gets to answer is all there is to liveness."""
        no_parameters(target.query)
        return Answer(b"event loop: ok\n")

    async def readyz(self, _request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer 200 or 503, with a line for each check."""
        no_parameters(target.query)
        checks = self._node.checks()
        lines = "".join(f"{check.name}: {check.problem or 'ok'}\n" for check in checks)
        return Answer(lines.encode(), TEXT, status=503 if any(check.problem for check in checks) else 200)

    async def metrics(self, _request: web.BaseRequest, target: Target, _rest: str) -> Answer:
        """Answer with all metrics, in Prometheus' text format."""
        no_parameters(target.query)
        return Answer(self._metrics.render(), metrics.CONTENT_TYPE)
