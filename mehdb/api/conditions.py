"""Conditional requests by HTTP's own means: `If-Match` and `If-None-Match` (RFC 9110, 13.1).

A value's entity tag is its revision: `ETag: "7"`.
"""

import re
from typing import Final

from aiohttp import hdrs
from multidict import CIMultiDictProxy

from mehdb.errors import BadParameter
from mehdb.model import Revision
from mehdb.store import Condition

TAG: Final = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\uffff]*)"')  # RFC 9110, 8.8.3
TAGS: Final = re.compile(rf"\s*(?:{TAG.pattern})(?:\s*,\s*(?:{TAG.pattern}))*\s*")
REVISION: Final = re.compile("[1-9][0-9]{0,18}")
TAGS_MAX: Final = 64


def write_conditions(headers: CIMultiDictProxy[str]) -> tuple[Condition, ...]:
    """Return the conditions on a write that *headers* name. Raises `BadParameter`."""
    return tuple(
        Condition(_revisions(",".join(headers.getall(name)), name), negated=negated)
        for name, negated in ((hdrs.IF_MATCH, False), (hdrs.IF_NONE_MATCH, True))
        if name in headers
    )


def is_unchanged(headers: CIMultiDictProxy[str], revision: Revision) -> bool:
    """Return whether a client that sent `If-None-Match` in *headers* has what is at *revision*.

    Raises `BadParameter`.
    """
    header = ",".join(headers.getall(hdrs.IF_NONE_MATCH))
    return not Condition(_revisions(header, hdrs.IF_NONE_MATCH), negated=True).holds(revision)


def _revisions(header: str, name: str) -> frozenset[int] | None:
    """Return the revisions that *header* lists, None for `*`. A tag that is none of ours matches nothing.

    A weak tag is never equal to a strong one under If-Match, and as good as one under If-None-Match (8.8.3.2).
    """
    if header.strip() == "*":
        return None
    tags = TAG.findall(header) if TAGS.fullmatch(header) else []
    if not 1 <= len(tags) <= TAGS_MAX:
        raise BadParameter(f'{name} must be * or a list of revisions in quotes, such as {name}: "7"')
    weak_too = name == hdrs.IF_NONE_MATCH
    return frozenset(int(tag) for weak, tag in tags if (weak_too or not weak) and REVISION.fullmatch(tag))
