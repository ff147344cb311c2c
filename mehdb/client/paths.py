"""Which file a key is kept in, and back. Pure: no disk is touched.

A key's path is the key, but for what a path cannot be. No two keys share a path, and none leads out of its folder:

    %25     a percent sign, as those below begin with one
    %2E     a dot, where the whole name would be `.` or `..`
    %       a name that is empty: `a//b` is in `a/%/b`, `a/` in `a/%`, `/a` in `%/a`
    …%+     a name that goes on in the next one, as it is too long for a file system
    %self   what a key holds that is a folder of others as well: of `a` and `a/b`, `a` is in `a/%self`
    %part   what an export has not finished: no key's

Any other path stands for the key that reads the same, so that folders which no export made need no care.
"""

import re
from typing import Final

NAME_BYTES_MAX: Final = 240  # most file systems take 255; the mark that it goes on has room as well
EMPTY: Final = "%"
GOES_ON: Final = "%+"
SELF: Final = "%self"
UNFINISHED: Final = "%part"
ESCAPE: Final = re.compile("%(2E|25)")


def path_of(key: str, *, folder: bool = False) -> str:
    """Return the path that *key* is kept at; if *folder*, when there are keys in it as well."""
    names = [name for part in key.split("/") for name in _names(part)]
    return "/".join([*names, SELF] if folder else names)


def key_of(path: str) -> str:
    """Return the key that is kept at *path*, which is relative. It may be no legal one."""
    inside = path.removesuffix(f"/{SELF}")
    key = inside.replace(f"{GOES_ON}/", "")
    key = "/".join("" if name == EMPTY else ESCAPE.sub(_unescaped, name) for name in key.split("/"))
    return key if path_of(key, folder=inside != path) == path else path


def _names(part: str) -> list[str]:
    """Return the names, one in the other, that *part* of a key becomes."""
    names, size_bytes = [""], 0
    for character in part:
        escaped = "%25" if character == "%" else character
        size_bytes += len(escaped.encode())
        if size_bytes > NAME_BYTES_MAX:  # between two characters: some file systems take no halves of them
            names[-1] += GOES_ON
            names.append("")
            size_bytes = len(escaped.encode())
        names[-1] += escaped
    if names[-1] in (".", ".."):
        names[-1] = names[-1].replace(".", "%2E")
    return names if part else [EMPTY]


def _unescaped(escape: re.Match[str]) -> str:
    return "." if escape[1] == "2E" else "%"
