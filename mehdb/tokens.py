"""Who may do what: bearer tokens (RFC 6750), known by their hashes alone, with rights on keys of some prefixes.

A file has a line for each, so that it fits a Secret and can be read in a review:

    # name      hash of the token      rights            prefixes of keys (none: all keys)
    app         sha256:9f86d0…          read,write        app/ shared/
    backup      sha256:60303a…          replicate
    prometheus  sha256:fd61a0…          none

A token is 256 random bits, made by `mehdb token`: SHA-256 of one cannot be guessed back, so that it needs neither salt
nor stretching. What is shown is hashed, and compared with every line in constant time.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Final

from mehdb.credentials import Files
from mehdb.errors import SettingsError

TOKENS_MAX: Final = 256  # comparing with all of them takes 40 µs
FILE_BYTES_MAX: Final = 1 << 20  # as large as a Secret may be
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
HASH: Final = re.compile(r"sha256:([0-9a-f]{64})")
TOKEN_BYTES: Final = 32


class Right(StrEnum):
    """What a token lets its bearer do."""

    READ = "read"
    WRITE = "write"
    REPLICATE = "replicate"
    """Have everything, as other nodes and backups do."""
    ADMIN = "admin"
    """All of these, and what is for operators."""


WHOLE: Final = frozenset({Right.REPLICATE, Right.ADMIN})  # rights that know no keys
NO_RIGHTS: Final = "none"  # the bearer may see how the node does, as Prometheus does


class Grant:
    """A token's line: what its bearer may do. *digest* is the token's hash."""

    __slots__ = ("digest", "name", "prefixes", "rights", "valid")

    def __init__(self, name: str, digest: bytes, rights: frozenset[Right], prefixes: tuple[bytes, ...]) -> None:
        self.name = name
        self.digest = digest
        self.rights = rights
        self.prefixes = prefixes
        self.valid = True
        """Whether it still stands in the file as it did. Whoever has one for long looks again."""

    def has(self, right: Right) -> bool:
        """Return whether it gives *right*, on some keys."""
        return right in self.rights or Right.ADMIN in self.rights

    def covers(self, start: bytes) -> bool:
        """Return whether it is for all keys that begin with *start*."""
        return not self.prefixes or start.startswith(self.prefixes)

    @property
    def line(self) -> str:
        """The line that says all this."""
        rights = ",".join(right for right in Right if right in self.rights) or NO_RIGHTS
        prefixes = " ".join(prefix.decode() for prefix in self.prefixes)
        return f"{self.name} sha256:{self.digest.hex()} {rights} {prefixes}".rstrip()


class Tokens:
    """The tokens in the file at *path*, as it is now. Raises `SettingsError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._grants: tuple[Grant, ...] = ()
        self._files = Files((path,), self._read)

    def grant(self, token: bytes) -> Grant | None:
        """Return what *token* lets its bearer do; None if it is not known."""
        digest, found = hashlib.sha256(token).digest(), None
        for grant in self._grants:  # to the end: the time tells nothing of which it was
            if hmac.compare_digest(grant.digest, digest):
                found = grant
        return found

    def refresh(self) -> None:
        """Read the file again if it has changed. While it is wrong, what it said before stays."""
        self._files.refresh()

    def _read(self) -> None:
        try:
            with self._path.open("rb") as file:
                text = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise SettingsError([f"--tokens-file: {self._path}: {error.strerror}"]) from error
        grants = _parse(self._path, text)
        before = {grant.line: grant for grant in self._grants}
        self._grants = tuple(before.pop(grant.line, grant) for grant in grants)
        for gone in before.values():
            gone.valid = False


def _parse(path: Path, text: bytes, flag: str = "--tokens-file") -> list[Grant]:
    """Return what *text*, of the file named with *flag*, grants.

    Raises `SettingsError` with everything that is wrong, but no hash and no token.
    """
    problems, grants = [], []
    if len(text) > FILE_BYTES_MAX:
        raise SettingsError([f"{flag}: {path} has more than {FILE_BYTES_MAX} bytes"])
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        try:
            grants.append(_grant(words))
        except ValueError as error:
            problems.append(f"{flag}: {path}, line {number}: {error}")
    for what, values in (("name", [one.name for one in grants]), ("token", [one.digest.hex() for one in grants])):
        if len(set(values)) < len(values):
            problems.append(f"{flag}: {path}: a {what} is there twice: give each once")
    if not problems and not 1 <= len(grants) <= TOKENS_MAX:
        problems.append(f"{flag}: {path} has {len(grants)} tokens: it must have 1 to {TOKENS_MAX}")
    if problems:
        raise SettingsError(problems)
    return grants


def _grant(words: list[bytes]) -> Grant:
    """Return what the *words* of a line grant. Raises `ValueError`."""
    try:
        name, hashed, rights, *prefixes = (word.decode() for word in words)
    except UnicodeDecodeError as error:
        raise ValueError("must be UTF-8") from error
    except ValueError:
        raise ValueError("must be NAME sha256:HEX RIGHTS [PREFIX…], as `mehdb token` makes it") from None
    match = HASH.fullmatch(hashed)
    if match is None:
        raise ValueError("the second word must be sha256: and 64 hexadecimal digits, as `mehdb token` makes it")
    return _granted(name, bytes.fromhex(match[1]), rights, prefixes)


def _granted(name: str, digest: bytes, rights_text: str, prefixes: Iterable[str]) -> Grant:
    """Return what these words grant. Raises `ValueError`."""
    rights, keys = _rights(rights_text), _prefixes(prefixes)
    if not NAME.fullmatch(name):
        raise ValueError("the name must be 1 to 63 letters, digits, '.', '_' or '-'")
    if keys and rights & WHOLE:
        raise ValueError(f"{min(rights & WHOLE)} is for all keys: leave the prefixes out")
    if keys and not rights:
        raise ValueError(f"{NO_RIGHTS} is for no keys: leave the prefixes out")
    return Grant(name, digest, rights, keys)


def _rights(text: str) -> frozenset[Right]:
    try:
        return frozenset() if text == NO_RIGHTS else frozenset(Right(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"rights must be of {', '.join(Right)}, with commas between, or {NO_RIGHTS}") from None


def _prefixes(prefixes: Iterable[str]) -> tuple[bytes, ...]:
    if any(prefix.split() != [prefix] for prefix in prefixes):
        raise ValueError("a prefix must have no spaces: they stand between two of them")
    return tuple(prefix.encode() for prefix in prefixes)


def make(name: str, rights: str, prefixes: Iterable[str]) -> tuple[str, Grant]:
    """Return a new random token, and what it grants. Raises `ValueError`."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    return token, _granted(name, hashlib.sha256(token.encode()).digest(), rights, prefixes)


def add(path: Path, grant: Grant) -> None:
    """Add a line to the tokens file at *path*, which is made if it is not there. Raises `SettingsError`."""
    try:
        text = path.read_bytes() if path.exists() else b""
        whole = text + (b"\n" if text and not text.endswith(b"\n") else b"") + f"{grant.line}\n".encode()
        _parse(path, whole, "--into")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with open(descriptor, "ab") as file:  # noqa: PTH123  of a descriptor, which has the mode
            file.write(whole[len(text) :])
    except OSError as error:
        raise SettingsError([f"--into: {path}: {error.strerror}"]) from error
