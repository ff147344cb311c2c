"""`Api`: finds the route, turns errors into answers, adds the headers that every answer bears.

It reads the raw target: aiohttp's own router would decode `a%2Fb` and `a/b` before the key could be told apart.
"""

import logging
from email.utils import formatdate
from math import ceil, inf
from time import monotonic, perf_counter, time
from typing import Final, NamedTuple

from aiohttp import web

from mehdb import __version__
from mehdb.api.access import Gate
from mehdb.api.answers import JOIN_BYTES_MAX, WAITED_S, Answer, Sending, StreamedAnswer, error_answer
from mehdb.api.consistency import AS_OF
from mehdb.api.node import NodeView
from mehdb.api.requests import target
from mehdb.api.routes import Handler, Routes
from mehdb.errors import MehdbError, MethodNotAllowed, RouteNotFound
from mehdb.metrics import Metrics
from mehdb.model import Role, State
from mehdb.store import Meta, Store

log = logging.getLogger("mehdb.api")

UNKNOWN: Final = "unknown"  # what metrics call a route or method that does not exist: clients must not make labels


class Api:
    """The request handler of a node, for one of its ports. Call it with a request."""

    def __init__(
        self, node: NodeView, store: Store, metrics: Metrics, gate: Gate, routes: Routes, sending: Sending
    ) -> None:
        self._routes = routes
        self._gate = gate
        self._guarded = frozenset(route for route, one in routes.items() if gate.looks_at(route, one.needs))
        self._sending = sending
        self._node = node
        self._store = store
        self._metrics = metrics
        self._node_headers = f"Server: mehdb/{__version__}\r\nMehdb-Node: {node.name}\r\nMehdb-Role: {node.role}\r\n"
        self._common = NOTHING_SHOWN
        self._follows = node.role is Role.FOLLOWER

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer *request*. Never raises but for a client that has gone."""
        begun_s = perf_counter()
        route, method, known, query = UNKNOWN, request.method, UNKNOWN, ""
        as_of_s = self._as_of_s()  # before anything is read: what the answer shows is no older
        try:
            where = target(request.raw_path)
            query = where.query
            route, rest = self._route(where.path)
            handler = self._handler(route, method)
            known = method
            if route in self._guarded:
                self._gate.admit(request, route, self._routes[route].needs, rest)
            answer = await handler(request, where, rest)
            if isinstance(answer, Answer) and len(answer.content) > JOIN_BYTES_MAX:
                self._sending.require(len(answer.content))
        except MehdbError as error:
            self._gate.denied(request, route, error)
            answer = error_answer(error)
        except ConnectionError:
            raise  # the client has gone: nobody is left to answer
        except Exception:
            log.exception("unexpected route=%s method=%s", route, method)
            answer = error_answer(
                MehdbError("an unexpected error, see the node's log: whether it was written is unknown")
            )
        # The head of the answer is all that is measured: how fast a client reads says nothing about this node.
        duration_s = perf_counter() - begun_s - (request.get(WAITED_S, 0.0) if query else 0.0)
        self._metrics.count_request(route, known, answer.status, duration_s)
        if isinstance(answer, Answer):
            if query:  # or it was not read before something was waited for
                as_of_s = request.get(AS_OF, as_of_s)
            common = self._common_headers(answer.revision, as_of_s)
            answer.complete(request, common, self._sending, last=self._node.closing)
        if isinstance(answer, StreamedAnswer):
            await answer.send(request)
        return answer

    def refuse(self, request: web.BaseRequest, error: MehdbError) -> web.StreamResponse:
        """Answer *error* to a *request* that could not be parsed, and end the connection."""
        answer = error_answer(error)
        self._metrics.count_request(UNKNOWN, UNKNOWN, answer.status, 0.0)  # there is no telling when its head began
        answer.complete(request, self._common_headers(0, self._as_of_s()), self._sending, last=True)
        return answer

    def _route(self, path: str) -> tuple[str, str]:
        """Return the route of *path*, and what follows it."""
        end = path.find("/", 1) + 1
        prefix = path[:end] if end else path
        if prefix in self._routes:
            return prefix, path[len(prefix) :]
        if path in self._routes:
            return path, ""
        raise RouteNotFound(f"no such route: there are {', '.join(self._routes)}")

    def _handler(self, route: str, method: str) -> Handler:
        handlers = self._routes[route].handlers
        try:
            return handlers[method]
        except KeyError:
            allowed = ", ".join(handlers)
            raise MethodNotAllowed(f"{route} takes {allowed}: nothing was changed", allowed) from None

    def _as_of_s(self) -> float:
        """Return the moment, of the monotonic clock, at which this node last held all that its leader had; or -inf."""
        if not self._follows:
            return 0.0
        staleness_s = self._node.staleness_s()
        return -inf if staleness_s is None else monotonic() - staleness_s

    def _common_headers(self, revision: int, as_of_s: float) -> str:
        """Return the header lines that every answer bears. *revision* is the newest that the answer itself shows.

        A follower held all that its leader had at *as_of_s*: how long ago that is, is told in tenths, rounded up.

        SQLite shows a commit to readers a moment before the writer's thread can say so. Clients must not see the
        revision go back in between.
        """
        meta, state, now = self._store.meta, self._node.state, int(time())
        staleness = 0 if not self._follows else -1 if as_of_s == -inf else ceil(10 * (monotonic() - as_of_s))
        shown = self._common
        if (
            meta is shown.meta and state is shown.state and now == shown.now and staleness == shown.staleness
            and revision <= shown.revision
        ):  # fmt: skip
            return shown.lines
        if shown.meta is None or meta.history != shown.meta.history or meta.head < shown.meta.head:
            shown = NOTHING_SHOWN  # another store has taken its place
        revision = max(meta.head, revision, shown.revision)
        history = f"Mehdb-History: {meta.history}\r\n" if meta.history else ""
        lines = (
            f"{self._node_headers}Date: {formatdate(now, usegmt=True)}\r\nMehdb-State: {state}\r\n"
            f"Mehdb-Revision: {revision}\r\nMehdb-Epoch: {meta.epoch}\r\n{history}"
        )
        if self._follows:
            lines += f"Mehdb-Staleness: {UNKNOWN if staleness < 0 else staleness / 10}\r\n"
        self._common = _Common(meta, state, now, staleness, revision, lines)
        return lines


class _Common(NamedTuple):
    """The headers that all answers share until one of these changes, and what they were made of."""

    meta: Meta | None
    state: State | None
    now: int
    staleness: int
    """In tenths of a second, -1 if it is unknown. 0 on the leader, which tells none."""
    revision: int
    lines: str


NOTHING_SHOWN: Final = _Common(None, None, 0, 0, 0, "")
