"""Requests to a cluster: to the first node that answers, with redirects, credentials, retries and a limit on time.

It owns the promise that nothing is sent twice that must not be. A request is repeated only when it reads, when it is
certain that nothing was taken (no connection, or a 503 that a node marks as one to repeat), or when its sender says
that twice is as good as once. Otherwise an answer that is lost is `OutcomeUnknown`.
"""

import contextlib
import random
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import TracebackType
from typing import Final, NoReturn, Self
from urllib.parse import quote

import httpx
import msgspec

from mehdb.credentials import ANONYMOUS, NO_TLS, Credentials
from mehdb.errors import (
    OutcomeUnknown,
    PeerAnswerInvalid,
    PeerRefused,
    PeerUnreachable,
    RouteNotFound,
    SettingsError,
)
from mehdb.model import PAGE_BYTES_MAX, error_message

HOPS_MAX: Final = 4  # one leads to the leader; a second, if that moves meanwhile; more are a circle
CONNECT_TIMEOUT_S: Final = 2.0  # a dead address answers nothing: one retry of the kernel's SYN
QUIET_MAX_S: Final = 15.0  # of a stream that beats every 5 s: two may be lost to a busy machine
PAUSE_LEAST_S: Final = 0.1
PAUSE_MOST_S: Final = 2.0
ANSWER_BYTES_MAX: Final = PAGE_BYTES_MAX * 6  # JSON may write a control character with six
NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class Twice(Enum):
    """What comes of a request that is made twice."""

    SAME = "as good as once"
    HARM = "must not be"


@dataclass(frozen=True)
class Request:
    """What to ask. *target* is path and query, encoded. *twice* matters where it writes."""

    method: str
    target: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    twice: Twice = Twice.HARM

    @property
    def writes(self) -> bool:
        """Whether it may change anything."""
        return self.method != "GET" and not self.target.startswith("/get")


@dataclass(frozen=True)
class Answer:
    """A whole answer of a node. *lost*: an earlier attempt was sent, and what became of it is not known."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str
    lost: bool = False

    @property
    def revision(self) -> int:
        """What its ETag says; 0 if there is none."""
        return _number(self.headers.get("ETag", "").strip('"'))

    def refused(self) -> PeerRefused:
        """Return what it is, as an error."""
        try:
            refusal = msgspec.json.decode(self.body, type=dict[str, object])
        except (msgspec.DecodeError, UnicodeDecodeError):
            refusal = {}
        message = " ".join(error_message(self.body)[:500].split()) or f"{self.url} answered {self.status}"
        if self.status == 401:
            message += " (here: --token-file names a file with the token)"
        return PeerRefused(message, self.status, refusal)


class Patience:
    """Waits between attempts, longer and longer, and never as long as another client, until *timeout_s* is over."""

    def __init__(self, timeout_s: float) -> None:
        self.end_s = time.monotonic() + timeout_s
        self._most_s = PAUSE_LEAST_S

    def again(self, asked_s: int = 0) -> bool:
        """Return whether there is time for another attempt: at once, as the pause before it is over.

        *asked_s* is how long a node would have us wait.
        """
        most_s = max(self._most_s, min(asked_s, PAUSE_MOST_S))
        pause_s = random.uniform(most_s / 2, most_s)  # noqa: S311  no secret
        self._most_s = min(2 * self._most_s, PAUSE_MOST_S)
        if time.monotonic() + pause_s >= self.end_s:
            return False
        time.sleep(pause_s)
        return True


class _Lost(Exception):
    """No whole answer came. *sent*: something may have been taken."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class Client:
    """Asks the nodes at *urls*, the one that answered last before the others. Each request may take *timeout_s*.

    The token in *credentials* goes with each request, also where a node redirects it to, and nowhere else. Threads may
    share it.
    """

    def __init__(self, urls: tuple[str, ...], credentials: Credentials = ANONYMOUS, timeout_s: float = 10.0) -> None:
        self.urls = urls
        self.timeout_s = timeout_s
        self._credentials = credentials
        self._headers = credentials.headers()
        self._clients: dict[str, httpx.Client] = {}
        self._first = 0
        self._stack = contextlib.ExitStack()
        self._making = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def ask(self, request: Request) -> Answer:
        """Return the answer, whatever its status, of the first node that gives one.

        Raises `PeerUnreachable` when nobody did in time, `OutcomeUnknown` when somebody may have, and
        `PeerAnswerInvalid`.
        """
        patience, lost = Patience(self.timeout_s), False
        while True:
            failures, asked_s = [], 0
            for url in self._in_turn():
                try:
                    answer = self._attempt(url, request, patience.end_s)
                except _Lost as error:
                    lost |= error.sent and request.writes
                    if lost and request.twice is Twice.HARM:
                        raise _unknown(str(error)) from error
                    failures.append(str(error))
                    continue
                if answer.status != 503 or "Retry-After" not in answer.headers:
                    return replace(answer, lost=lost)
                failures.append(f"{url}: {answer.refused()}")
                asked_s = max(asked_s, _number(answer.headers["Retry-After"]))
            if not patience.again(asked_s):
                self._give_up(failures, lost=lost)

    @contextlib.contextmanager
    def stream(self, target: str) -> Iterator["Stream"]:
        """Have an answer that goes on. Raises `PeerUnreachable` if nobody begins one now, and `PeerRefused`."""
        with contextlib.ExitStack() as stack:
            yield self._begun(target, stack)

    def _begun(self, target: str, stack: contextlib.ExitStack) -> "Stream":
        failures, request = [], Request("GET", target)
        for url in self._in_turn():
            deadline_s = time.monotonic() + self.timeout_s
            try:
                answer = stack.enter_context(self._answer(url, request, deadline_s, QUIET_MAX_S))
                if answer.status_code == 200:
                    return Stream(answer, url)
                refusal = self._whole(answer, url, deadline_s).refused()
            except _Lost as error:
                failures.append(str(error))
                continue
            if refusal.answered != 503:
                raise refusal
            failures.append(f"{url}: {refusal}")
        raise PeerUnreachable("; ".join(failures))

    def _in_turn(self) -> Iterator[str]:
        """Yield each URL once. One that fails is not the first the next time."""
        first, count = self._first, len(self.urls)
        for turn in range(first, first + count):
            yield self.urls[turn % count]
            self._first = (turn + 1) % count  # not reached where the caller has its answer

    def _give_up(self, failures: list[str], *, lost: bool) -> NoReturn:
        why = "; ".join(failures)
        if lost:
            raise _unknown(why)
        raise PeerUnreachable(f"no node took it in {self.timeout_s:g} s ({why}): see `mehdb status`, or give --timeout")

    def _attempt(self, url: str, request: Request, deadline_s: float) -> Answer:
        """Return the answer of the node at *url*, or of the one that it sends us to. Raises `_Lost`."""
        with self._answer(url, request, deadline_s) as answer:
            whole = self._whole(answer, url, deadline_s)
        if whole.status == 504 and whole.refused().refusal.get("error") == OutcomeUnknown.code:
            raise _Lost(str(whole.refused()), sent=True)
        if whole.status == RouteNotFound.status and whole.refused().refusal.get("error") == RouteNotFound.code:
            raise PeerAnswerInvalid(f"{url} is a node's health port, or of another version: see to --url")
        return whole

    @contextlib.contextmanager
    def _answer(
        self, url: str, request: Request, deadline_s: float, quiet_max_s: float | None = None
    ) -> Iterator[httpx.Response]:
        """Have the answer, whose body is still to come. Only a node may send us on. Raises `_Lost`."""
        where = url + request.target
        for _ in range(HOPS_MAX + 1):
            with self._sent(where, request, deadline_s, quiet_max_s) as answer:
                if "Mehdb-Node" not in answer.headers:
                    self._refuse_stranger(url, answer)
                if answer.status_code != 307:
                    yield answer
                    return
                where = _onward(where, answer.headers.get("Location", ""))
        raise PeerAnswerInvalid(f"{url} redirects in a circle: are the peers of its nodes in order?")

    def _refuse_stranger(self, url: str, answer: httpx.Response) -> NoReturn:
        """Say that no node answered. A gateway that failed may have passed on what it was sent."""
        if answer.status_code >= 500:
            raise _Lost(f"{url}: a gateway answered {answer.status_code}", sent=True)
        raise PeerAnswerInvalid(f"{url} is no mehdb node (it answered {answer.status_code}): see to --url")

    @contextlib.contextmanager
    def _sent(
        self, url: str, request: Request, deadline_s: float, quiet_max_s: float | None
    ) -> Iterator[httpx.Response]:
        """Have what is at *url* answer. Raises `_Lost`, which knows whether anything was sent."""
        left_s = max(0.01, deadline_s - time.monotonic())
        timeout = httpx.Timeout(quiet_max_s or left_s, connect=min(CONNECT_TIMEOUT_S, left_s))
        with _losses(url):
            client = self._client(httpx.URL(url).scheme)
            content = request.body if request.method in ("PUT", "POST") else None
            headers = {**self._headers, **request.headers}
            built = client.build_request(request.method, url, content=content, headers=headers, timeout=timeout)
            answer = client.send(built, stream=True)
        try:
            yield answer
        finally:
            answer.close()

    def _whole(self, answer: httpx.Response, url: str, deadline_s: float) -> Answer:
        """Return *answer* with its body. Raises `_Lost` where its end does not come in time."""
        chunks, size_bytes = [], 0
        with _losses(url):
            for chunk in answer.iter_bytes():
                size_bytes += len(chunk)
                chunks.append(chunk)
                if time.monotonic() > deadline_s:
                    raise httpx.ReadTimeout("the answer takes too long")
                if size_bytes > ANSWER_BYTES_MAX:
                    raise PeerAnswerInvalid(f"{url}: an answer of more than {ANSWER_BYTES_MAX} bytes is no node's")
        return Answer(answer.status_code, answer.headers, b"".join(chunks), url)

    def _client(self, scheme: str) -> httpx.Client:
        """Return one client for each scheme: reading the authorities' certificates takes longer than a request."""
        with self._making:
            if scheme not in self._clients:
                tls = self._credentials.client if scheme == "https" else NO_TLS
                self._clients[scheme] = self._stack.enter_context(httpx.Client(verify=tls, trust_env=False))
            return self._clients[scheme]


class Stream:
    """An answer that goes on."""

    def __init__(self, answer: httpx.Response, url: str) -> None:
        self.headers: Mapping[str, str] = answer.headers
        self._answer = answer
        self._url = url

    def lines(self) -> Iterator[bytes]:
        """Yield each whole line as it comes. Raises `PeerUnreachable` when it breaks off; it may simply end."""
        rest = b""
        try:
            for chunk in self._answer.iter_bytes():
                *whole, rest = (rest + chunk).split(b"\n")
                yield from filter(None, whole)
                if len(rest) > ANSWER_BYTES_MAX:
                    raise PeerAnswerInvalid(f"{self._url}: a line of more than {ANSWER_BYTES_MAX} bytes is no node's")
        except (httpx.HTTPError, OSError) as error:
            raise PeerUnreachable(f"{self._url}: {_reason(error)}") from error


def key_in_url(key: str) -> str:
    """Return *key* as it stands in a path: nothing of it is left to mean a folder above."""
    return quote(key, safe="/").replace(".", "%2E")


def checked_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return *headers*. Raises `SettingsError` where one cannot be sent: it has come from a flag."""
    for name, value in headers.items():
        if not (value.isascii() and value.isprintable()):
            raise SettingsError([f"{name}: {value!r} must be printable ASCII"])
    return headers


def _onward(url: str, location: str) -> str:
    """Return *location*, to which *url* redirects. Raises `PeerAnswerInvalid` where others could read what is sent."""
    if url.startswith("https:") and not location.startswith("https:"):
        raise PeerAnswerInvalid(f"{url} redirects to {location!r}, which is not encrypted: see to its --advertise-url")
    return location


@contextlib.contextmanager
def _losses(url: str) -> Iterator[None]:
    """Turn what the network may do into `_Lost`."""
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
        raise PeerAnswerInvalid(f"{url}: {_reason(error)}") from error
    except (httpx.HTTPError, OSError) as error:
        if _is_of_tls(error):  # no second attempt makes that better
            raise PeerAnswerInvalid(
                f"{url}: {_reason(error)}: see to --url, which is http:// where nodes talk no TLS; to --tls-ca, which "
                "names who signed their certificates; to --tls-cert and --tls-key"
            ) from error
        raise _Lost(f"{url}: {_reason(error)}", sent=not isinstance(error, NOT_SENT)) from error


def _is_of_tls(error: BaseException | None) -> bool:
    """Return whether *error* comes from a handshake that failed: nothing was sent."""
    if not isinstance(error, NOT_SENT):
        return False
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None


def _number(text: str) -> int:
    """Return the number that *text* is, 0 if it is none."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


def _reason(error: Exception) -> str:
    """Return *error* for a person: some have no text, and some begin it with a number."""
    if isinstance(error, httpx.TimeoutException):
        return "cannot be reached" if isinstance(error, NOT_SENT) else "no answer in time"
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__


def _unknown(why: str) -> OutcomeUnknown:
    return OutcomeUnknown(f"whether anything was written is unknown ({why}): read what is there before you repeat it")
