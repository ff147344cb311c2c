"""What texts stand for, in settings and in requests: numbers, sizes, times, URLs. Each parser raises `ValueError`."""

import re
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

SIZE_UNITS: Final = {"": 1, "b": 1, "k": 1000, "kb": 1000, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9} | {
    "ki": 1 << 10, "kib": 1 << 10, "mi": 1 << 20, "mib": 1 << 20, "gi": 1 << 30, "gib": 1 << 30
}  # fmt: skip


def matching(pattern: re.Pattern[str], what: str) -> Callable[[str], str]:
    """Return a parser of texts that *pattern* matches whole; any other is no *what*."""

    def parse(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"is no {what}")
        return text

    return parse


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from *least* to *most*."""

    def parse(text: str) -> int:
        if not (re.fullmatch("[0-9]{1,20}", text) and least <= int(text) <= most):
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(text)

    return parse


def seconds_between(least: float, most: float) -> Callable[[str], float]:
    """Return a parser of seconds from *least* to *most*, with an `s` behind them or without."""

    def parse(text: str) -> float:
        try:
            value = float(text.removesuffix("s"))
        except ValueError:
            value = -1
        if not least <= value <= most:
            raise ValueError(f"must be a number of seconds from {least:g} to {most:g}")
        return value

    return parse


def size_between(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of sizes from *least* to *most* bytes, such as 512KiB or 8MiB."""

    def parse(text: str) -> int:
        match = re.fullmatch(r"([0-9]{1,15}) ?([A-Za-z]{0,3})", text)
        unit = SIZE_UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None or not least <= int(match[1]) * unit <= most:
            raise ValueError(f"must be a size from {least} to {most} bytes, such as 1048576, 512KiB or 8MiB")
        return int(match[1]) * unit

    return parse


def base_url(text: str) -> str:
    """Return the base URL that *text* is, without a slash at its end. Raises `ValueError`."""
    parts = urlsplit(text)
    try:
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        fine = False
    if not fine or parts.path.strip("/") or re.search(r"[\s@?#]", text):
        raise ValueError(f"{text!r} must be a base URL such as http://mehdb-0.example:9876")
    return text.rstrip("/")


def base_urls(text: str) -> tuple[str, ...]:
    """Return the base URLs in *text*, with commas between. Raises `ValueError`."""
    return tuple(base_url(url.strip()) for url in text.split(","))


def advertise_url(text: str) -> str:
    """Return the base URL that *text* is, in which `{ordinal}` may stand for one. Raises `ValueError`."""
    base_url(text.replace("{ordinal}", "0"))
    return text.rstrip("/")


def switch(text: str) -> bool:
    """Return whether *text* switches something on: all does that says no other thing, as it did in the Go mehdb."""
    return text.lower() not in ("0", "false", "no", "off")


def yes_or_no(text: str) -> bool:
    """Return whether *text* says yes: nothing lets anybody in by a slip. Raises `ValueError`."""
    if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("must be yes or no")
    return switch(text)


def choice(*choices: str) -> Callable[[str], str]:
    """Return a parser of one of *choices*, in any case."""

    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text.lower()

    return parse
