"""What an expression of PromQL asks for: metrics, with the labels that it compares, and the labels that it groups by.

Enough of the language for deploy/; promtool, where it is at hand, knows it all.
"""

import re
from dataclasses import dataclass
from typing import Final

GROUPS: Final = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SELECTOR: Final = re.compile(r"(?<![\w:$])([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?(?!\s*\(|[\w:])")
MATCHER: Final = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*(?:,|$)')
WORDS: Final = {"and", "or", "unless", "bool", "offset"}


@dataclass(frozen=True)
class Matcher:
    """What one label of a metric is compared with."""

    label: str
    operator: str
    value: str


@dataclass(frozen=True)
class Selector:
    """One metric that is asked for."""

    metric: str
    matchers: tuple[Matcher, ...]

    def given(self) -> dict[str, str]:
        """Return the labels that must have a value."""
        return {one.label: one.value for one in self.matchers if one.operator == "="}


def selectors(expression: str) -> list[Selector]:
    """Return every metric that *expression* asks for. Fails on matchers that cannot be read."""
    text = re.sub(r"\[[^\]]*\]", "", GROUPS.sub("", expression))
    text = re.sub(r"\b(?:sum|max|min|count|avg|topk)\s*(?=\()", "", text)
    found = []
    for metric, inside in SELECTOR.findall(text):
        matchers = [Matcher(*match.groups()) for match in MATCHER.finditer(inside)]
        assert "".join(match.group() for match in MATCHER.finditer(inside)) == inside, inside
        if metric not in WORDS:
            found.append(Selector(metric, tuple(matchers)))
    return found


def groups(expression: str) -> set[str]:
    """Return the labels by which *expression* groups or joins."""
    return {label.strip() for inside in GROUPS.findall(expression) for label in inside.split(",") if label.strip()}


def shown(template: str) -> set[str]:
    """Return the labels that a text of an alert or a legend shows."""
    return set(re.findall(r"\{\{\s*\$labels\.(\w+)", template)) | set(re.findall(r"\{\{\s*(\w+)\s*\}\}", template))
