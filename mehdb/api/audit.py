"""The audit log: what was denied to whom, and what operators did. A line each, by the logger `mehdb.audit`.

It holds no token and no value. Whoever is denied all the time cannot flood it: beyond some lines a second, it counts.
"""

import logging
import socket
import struct
from time import monotonic
from typing import Final, NamedTuple

from aiohttp import web

from mehdb.errors import MehdbError
from mehdb.metrics import HANDSHAKE, Metrics
from mehdb.tokens import Grant

log = logging.getLogger("mehdb.audit")

LINES_AT_ONCE: Final = 100  # a burst is told whole
LINES_PER_S: Final = 10.0
PEER: Final = struct.Struct("3i")  # struct ucred: process, user, group (unix(7))
NOBODY: Final = "-"
TEXT_MAX: Final = 256  # characters of what a client sent


class _Allowance:
    """Lines that may be written: a burst, and so many a second. Counts those that may not."""

    def __init__(self) -> None:
        self._lines = float(LINES_AT_ONCE)
        self._at_s = monotonic()
        self.suppressed = 0

    def take(self) -> bool:
        """Return whether there is a line left: they come back with time."""
        now = monotonic()
        self._lines = min(LINES_AT_ONCE, self._lines + (now - self._at_s) * LINES_PER_S)
        self._at_s = now
        if self._lines < 1:
            self.suppressed += 1
            return False
        self._lines -= 1
        return True

    def told(self) -> int:
        """Return how many lines were suppressed since this was last asked."""
        suppressed, self.suppressed = self.suppressed, 0
        return suppressed


class Audit:
    """Writes down what was denied, and what was administrative.

    Strangers cannot use up the lines of those whose token is known, nor they each other's.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._handshakes, self._administrative = _Allowance(), _Allowance()
        self._by_token: dict[str, _Allowance] = {}  # as many as the tokens file has, and one for what is not known

    def denied(self, request: web.BaseRequest, route: str, error: MehdbError, grant: Grant | None) -> None:
        """Take down that *request* was answered with *error*; *grant* is that of its token, if it is known."""
        self._metrics.count_denied(error.code)
        allowance = self._by_token.setdefault(grant.name if grant else NOBODY, _Allowance())
        if not allowance.take():
            return
        who = _who(request, grant)
        log.warning(
            'denied token=%s from=%s certificate="%s" via=%s method=%s route=%s target="%s" code=%s needs=%s '
            "suppressed=%d",
            who.token, who.address, who.certificate, who.via, request.method, route, request.raw_path[:TEXT_MAX],
            error.code, error.details.get("needs"), allowance.told(),
        )  # fmt: skip

    def refused(self, address: str, reason: str) -> None:
        """Take down that no connection was made with who is at *address*: it shows no certificate, or talks no TLS."""
        self._metrics.count_denied(HANDSHAKE)
        if self._handshakes.take():
            log.warning('refused from=%s reason="%s" suppressed=%d', address, reason, self._handshakes.told())

    def administrative(self, request: web.BaseRequest, route: str, grant: Grant | None) -> None:
        """Take down that *request* is let in, which is for operators."""
        if not self._administrative.take():
            return
        who = _who(request, grant)
        log.info(
            'administrative token=%s from=%s certificate="%s" via=%s method=%s route=%s target="%s" suppressed=%d',
            who.token, who.address, who.certificate, who.via, request.method, route, request.raw_path[:TEXT_MAX],
            self._administrative.told(),
        )  # fmt: skip


def local(request: web.BaseRequest) -> None:
    """Take down a request of a process on this machine, that came by the socket in the data directory."""
    connection = request.get_extra_info("socket")
    pid, uid, _ = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    log.info(
        "administrative from=%s pid=%d uid=%d method=%s route=%s", "socket", pid, uid, request.method, request.path
    )


class _Who(NamedTuple):
    """Who asks, as far as it is known."""

    token: str
    address: str
    certificate: str
    via: str


def _who(request: web.BaseRequest, grant: Grant | None) -> _Who:
    return _Who(
        grant.name if grant else NOBODY,
        request.remote or NOBODY,
        _common_name(request.get_extra_info("peercert")),
        request.headers.get("Mehdb-Forwarded", NOBODY)[:TEXT_MAX],
    )


def _common_name(certificate: dict[str, tuple[tuple[tuple[str, str], ...], ...]] | None) -> str:
    names = [value for part in (certificate or {}).get("subject", ()) for name, value in part if name == "commonName"]
    return names[0] if names else NOBODY
