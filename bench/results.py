"""What was measured: figures against their targets, as a table for people and as JSON for programs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

DECIMALS: Final = {"x": 2, "changes/s": 0, "keys/s": 0, "ms": 1, "s": 2, "MiB": 0}


@dataclass(frozen=True)
class Target:
    """What a figure must reach, from the issue: at least, or at most, *bound*, in *unit*."""

    title: str
    unit: str
    bound: float
    at_least: bool = True

    def met_by(self, value: float) -> bool:
        """Whether *value* is good enough."""
        return value >= self.bound if self.at_least else value <= self.bound

    def show(self, value: float) -> str:
        """Return *value* with its unit, as `24,310 changes/s`."""
        return f"{self.number(value)} {self.unit}"

    def number(self, value: float) -> str:
        """Return *value* without its unit, as `24,310`."""
        return f"{value:,.{DECIMALS[self.unit]}f}"


@dataclass(frozen=True)
class Figure:
    """One measured figure: *value* out of *samples*, in the target's unit, or the *problem* that prevented it.

    *parts* are the numbers that it was made of, by name, with their unit at the end of the name.
    """

    name: str
    target: Target
    value: float | None
    samples: list[float] = field(default_factory=list)
    method: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    @property
    def met(self) -> bool:
        """Whether it was measured and reaches its target."""
        return self.value is not None and self.target.met_by(self.value)


def show(figures: list[Figure], machine: dict[str, str], console: Console) -> None:
    """Print the table, and below it how each figure came about."""
    table = Table(title="mehdb against its targets", title_justify="left")
    table.add_column("figure")
    for column in ("measured", "spread", "target"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("met", justify="center")
    for figure in figures:
        target = figure.target
        measured = "[red]not measured" if figure.value is None else target.show(figure.value)
        spread = (
            f"{target.number(min(figure.samples))} to {target.number(max(figure.samples))}" if figure.samples else ""
        )
        bound = f"{'≥' if target.at_least else '≤'} {target.show(target.bound)}"
        table.add_row(target.title, measured, spread, bound, "[green]yes" if figure.met else "[bold red]NO")
    console.print(table)
    for figure in figures:
        console.print(f"[bold]{figure.name}[/]: {escape(figure.problem or figure.method)}")
        parts = "; ".join(f"{name}: {round(value, 3 if value < 100 else 0):,g}" for name, value in figure.parts.items())
        if parts:
            console.print(f"    {escape(parts)}")
    for name, what in machine.items():
        console.print(f"[dim]{name}: {escape(what)}")


def write_json(path: Path, figures: list[Figure], about: dict[str, Any]) -> None:
    """Write everything measured to *path*, with *about*: when, where, and with which plan."""
    measured = [
        {
            "name": figure.name,
            "title": figure.target.title,
            "value": figure.value,
            "unit": figure.target.unit,
            "target": figure.target.bound,
            "at_least": figure.target.at_least,
            "met": figure.met,
            "samples": figure.samples,
            "method": figure.method,
            "parts": figure.parts,
            "problem": figure.problem,
        }
        for figure in figures
    ]
    path.write_bytes(msgspec.json.format(msgspec.json.encode({**about, "figures": measured}), indent=2) + b"\n")
