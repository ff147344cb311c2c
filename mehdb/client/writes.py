"""Single writes. One whose condition holds only once may be repeated, and is then looked after; others may not."""

from dataclasses import dataclass
from typing import Final

from mehdb.client.http import Answer, Client, Request, Twice, checked_headers, key_in_url
from mehdb.client.lines import query
from mehdb.errors import OutcomeUnknown, PeerError, PeerRefused

WAIT_SHARE: Final = 0.8  # of the whole time: the node's word that a write is not confirmed must come before we give up
WAIT_S_MAX: Final = 60.0  # the most that a node takes


@dataclass(frozen=True)
class Conditions:
    """What must hold for a write to be made: revisions as the user gave them, `*`, or nothing."""

    if_match: str | None = None
    if_none_match: str | None = None

    def headers(self) -> dict[str, str]:
        """Return them as HTTP has them."""
        given = {"If-Match": self.if_match, "If-None-Match": self.if_none_match}
        return {name: _tags(text) for name, text in given.items() if text is not None}


@dataclass(frozen=True)
class Written:
    """A write that was made. *revision* is 0 where its own answer was lost and none tells; *note* says so."""

    revision: int
    note: str = ""


def set_key(
    client: Client,
    key: str,
    value: bytes,
    *,
    conditions: Conditions,
    ttl: str | None = None,
    content_type: str | None = None,
    acks: int | None = None,
) -> Written:
    """Write *value*. Raises `OutcomeUnknown`, `PeerRefused`, `PeerUnreachable` and `SettingsError`."""
    headers = conditions.headers() | ({"Content-Type": content_type} if content_type else {})
    target = query(f"/set/{key_in_url(key)}", {"ttl": ttl or ""} | acks_parameters(client, acks))
    return _write(client, Request("PUT", target, value, checked_headers(headers), _twice(conditions)), key)


def delete_key(client: Client, key: str, *, conditions: Conditions, acks: int | None = None) -> Written:
    """Delete *key*. Raises as `set_key` does."""
    target = query(f"/delete/{key_in_url(key)}", acks_parameters(client, acks))
    headers = checked_headers(conditions.headers())
    return _write(client, Request("DELETE", target, b"", headers, _twice(conditions)), key)


def acks_parameters(client: Client, acks: int | None) -> dict[str, str]:
    """Return what asks a node to wait for so many followers, for less time than we wait for it."""
    if acks is None:
        return {}
    return {"acks": str(acks), "wait": f"{min(WAIT_SHARE * client.timeout_s, WAIT_S_MAX):.3f}"}


def _write(client: Client, request: Request, key: str) -> Written:
    answer = client.ask(request)
    if answer.status == 200:
        return Written(answer.revision)
    if answer.lost and answer.status in (404, 412):
        return _looked_after(client, request, key, answer.refused())
    raise answer.refused()


def _looked_after(client: Client, request: Request, key: str, refusal: PeerRefused) -> Written:
    """Find out whether an attempt without an answer is why the next one was refused.

    Another writer may have written the same value: only values that differ from each other's tell whose it is.
    """
    try:
        found = client.ask(Request("GET", f"/get/{key_in_url(key)}?consistency=leader"))
    except PeerError as error:
        raise OutcomeUnknown(f"whether anything was written is unknown ({refusal}; {error}): read {key!r}") from error
    if _is_done(request, found):
        what = "the key holds this value" if request.method == "PUT" else "the key is gone"
        return Written(found.revision, f"the answer to an earlier attempt was lost; {what}")
    raise PeerRefused(f"{refusal}. An earlier attempt got no answer: it may have been made", 412, refusal.refusal)


def _is_done(request: Request, found: Answer) -> bool:
    if request.method == "DELETE":
        return found.status == 404
    return found.status == 200 and found.body == request.body


def _twice(conditions: Conditions) -> Twice:
    """Return whether the first of two equal attempts makes the condition of the second false.

    It does for "is at revision 7" and for "is not there", and not for "is there" or "is not at revision 7".
    """
    if conditions.if_none_match == "*" or (conditions.if_match or "*").strip('" ').isdigit():
        return Twice.SAME
    return Twice.HARM


def _tags(text: str) -> str:
    """Return *text*, revisions separated by commas, as entity tags."""
    if text.strip() == "*":
        return "*"
    return ", ".join('"{}"'.format(part.strip().strip('"')) for part in text.split(","))
