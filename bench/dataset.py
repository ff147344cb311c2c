"""What is stored: a million keys, each with a value of 128 bytes that says which key it belongs to.

Lua says the same in `random_keys.lua`: change both.
"""

import asyncio
import random
from pathlib import Path
from typing import Final

from mehdb.model import Epoch
from mehdb.store import Store, Write

VALUE_BYTES: Final = 128
MANY: Final = 100  # keys in a batch of writes, and in a question for several
FILL_AT_ONCE: Final = 2_000  # two of the writer's batches: it never waits, and few tasks wait for it
SEED: Final = 1  # the same order in every run: figures differ by the machine's noise, not by luck


def key(number: int) -> bytes:
    """Return the key with *number*."""
    return b"key/%08d" % number


def value(number: int) -> bytes:
    """Return the value of that key: the key, filled up to `VALUE_BYTES`."""
    return key(number).ljust(VALUE_BYTES, b"v")


async def fill(directory: Path, keys: int) -> None:
    """Write *keys* keys in random order into a new store in *directory*, and close it.

    Directly through `Store`, not over HTTP: several times as quick, and the same rows in the same order.
    """
    numbers = random.Random(SEED).sample(range(keys), keys)  # noqa: S311  an order, not a secret
    store = await Store.open(directory)
    await store.lead(Epoch(1))
    for start in range(0, keys, FILL_AT_ONCE):
        chunk = numbers[start : start + FILL_AT_ONCE]
        await asyncio.gather(*(store.write(Write(key(number), value(number))) for number in chunk))
    await store.close()
