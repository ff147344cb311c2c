"""A change that is live when the window passes it goes once it is superseded, or it would stay for ever."""

from pathlib import Path

from stores import changes_of, leading, problems_of, put

WINDOW = 2


async def test_what_is_superseded_behind_the_window_goes(directory: Path) -> None:
    async with leading(directory, retain_changes=WINDOW) as store:
        for key in (b"overwritten", b"deleted", b"live"):
            await put(store, key, b"old" * 2000)
        for number in range(10):
            await put(store, b"key-%d" % number, b"value")
        await put(store, b"overwritten", b"new")
        await put(store, b"deleted", None)
        for number in range(100):
            await put(store, b"key-%d" % (number % 10), b"value")
        assert store.meta.floor > 15
        assert problems_of(directory) == ()
        value = await store.get(b"live")
        assert value is not None
        assert value.value == b"old" * 2000
    left = [(change.revision, change.key) for change in changes_of(directory) if not change.key.startswith(b"key")]
    assert left == [(3, b"live"), (14, b"overwritten")]


async def test_a_store_that_is_overwritten_slowly_does_not_grow(directory: Path) -> None:
    """Each key is overwritten only after the window has passed its last change."""
    async with leading(directory, retain_changes=WINDOW) as store:
        for _ in range(20):
            for number in range(10):
                await put(store, b"key-%d" % number, b"value" * 100)
    assert problems_of(directory) == ()
    assert len(changes_of(directory)) <= 10 + 2 + 5 + 1
