"""Who is let in: which right each request needs, and what its bearer token gives (RFC 6750).

The invariant it owns: with a tokens file, nothing is answered before the request's token was found to have the right
that the route needs, and to be for the key in its path. A route that takes keys elsewhere asks with `require`.
"""

from enum import Enum
from typing import Final

from aiohttp import hdrs, web

from mehdb.api.audit import Audit
from mehdb.api.requests import decode_key
from mehdb.errors import Forbidden, MehdbError, Unauthorized
from mehdb.tokens import Grant, Right, Tokens

GRANT: Final = "grant"  # what the token of a request gives, beside the request; not there where everybody is let in


class Anyone(Enum):
    """What needs less than a right."""

    PROBE = "probe"
    """Nothing: a kubelet has no token."""
    KNOWN = "any"
    """Any token that is known."""


Need = Right | Anyone


class Gate:
    """Lets those in whose token is one of *tokens*; everybody if that is None. What is denied goes to *audit*."""

    def __init__(self, tokens: Tokens | None, audit: Audit) -> None:
        self._tokens = tokens
        self._audit = audit

    def looks_at(self, route: str, need: Need) -> bool:
        """Return whether requests to *route*, which needs *need*, have to be admitted: not where anybody may ask."""
        return need is not Anyone.PROBE and (self._tokens is not None or _is_administrative(route, need))

    def admit(self, request: web.BaseRequest, route: str, need: Need, rest: str = "") -> None:
        """Return if *request* may have what *need* is for. *rest* is what stands behind the route: a key, or nothing.

        Raises `Unauthorized`, `Forbidden`, and `BadKey`.
        """
        grant = None
        if self._tokens is not None:
            grant = self._bearer(request, self._tokens, need)
            request[GRANT] = grant
            if isinstance(need, Right) and not grant.has(need):
                raise Forbidden(
                    f"the token {grant.name!r} lacks the right {need}: use one that has it, or add it to its line in "
                    "the tokens file", needs=need,
                )  # fmt: skip
            if isinstance(need, Right) and grant.prefixes and route.endswith("/"):
                require(request, need, decode_key(rest))
        if _is_administrative(route, need):
            self._audit.administrative(request, route, grant)

    def denied(self, request: web.BaseRequest, route: str, error: MehdbError) -> None:
        """Take note that *error* was the answer to *request*, if that is what it is."""
        if isinstance(error, Unauthorized | Forbidden):
            self._audit.denied(request, route, error, request.get(GRANT))

    def _bearer(self, request: web.BaseRequest, tokens: Tokens, need: Need) -> Grant:
        """Return what the token of *request* grants. Raises `Unauthorized`."""
        what = f"a token with the right {need}" if isinstance(need, Right) else "a token"
        shown = request.headers.getall(hdrs.AUTHORIZATION, [])
        if not shown:
            raise Unauthorized(
                f"this needs {what}: send 'Authorization: Bearer TOKEN'; where curl follows a redirect, it does that "
                "with --location-trusted", needs=need.value,
            )  # fmt: skip
        scheme, _, token = shown[0].strip().partition(" ")
        grant = None
        if scheme.lower() == "bearer" and len(shown) == 1:
            grant = tokens.grant(token.strip().encode("utf-8", "surrogateescape"))
        if grant is None:
            raise Unauthorized(
                f"this needs {what}: the token is none of this node's (--tokens-file), or not sent as "
                "'Authorization: Bearer TOKEN'", needs=need.value,
            )  # fmt: skip
        return grant


def _is_administrative(route: str, need: Need) -> bool:
    """Return whether who asks is written down: for what operators do, and where the whole store goes out."""
    return need is Right.ADMIN or route == "/snapshot"


def require_valid(request: web.BaseRequest) -> None:
    """Return if the token of *request* was not taken back while something was waited for. Raises `Unauthorized`."""
    grant: Grant | None = request.get(GRANT)
    if grant is not None and not grant.valid:
        raise Unauthorized("the token is no longer valid: another is needed", needs=Anyone.KNOWN.value)


def require(request: web.BaseRequest, right: Right, start: bytes) -> None:
    """Return if *request* may use *right* on all keys from *start* on. Raises `Forbidden` and `Unauthorized`."""
    grant: Grant | None = request.get(GRANT)
    if grant is None:
        return
    require_valid(request)
    if not (grant.has(right) and grant.covers(start)):
        prefixes = ", ".join(prefix.decode() for prefix in grant.prefixes) or "all keys"
        raise Forbidden(
            f"the token {grant.name!r} may {right} only {prefixes}: ask for keys with such a prefix, or add one to its "
            "line in the tokens file", needs=right, prefixes=[prefix.decode() for prefix in grant.prefixes],
        )  # fmt: skip
