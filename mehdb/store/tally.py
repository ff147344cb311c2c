"""What the store counts of its own work, over all openings of its files."""

from dataclasses import dataclass, field

from mehdb.figures import CHANGES, SECONDS, Histogram, Transfers


@dataclass
class Tally:
    """Counted where it happens: each figure by one thread alone. Closing and opening the files leaves it as it is."""

    sync_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """COMMIT statements: what was changed is written to the WAL and synced. By the writer's thread."""
    commit_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """Batches that changed something, from when the writer begins with one to its acknowledgement. On the loop."""
    commit_changes: Histogram = field(default_factory=lambda: Histogram(CHANGES))
    """How many changes each of these made. On the loop."""
    compacted_changes: int = 0
    """How many changes compaction has removed. By the writer's thread."""
    sent: Transfers = field(default_factory=Transfers)
    """Snapshots given to others. On the loop."""
    taken: Transfers = field(default_factory=Transfers)
    """Snapshots of others, put in this store's place. Progress by whichever thread makes it, one at a time."""
