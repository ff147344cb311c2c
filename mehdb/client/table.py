"""A table of text. Not rich's: that takes as long to load as a cluster takes to answer."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return *rows*, of equal length, with each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
