"""Keys as paths: for every legal key, and without a disk."""

from hypothesis import example, given
from hypothesis import strategies as st

from client_keys import KEYS
from mehdb.client.paths import UNFINISHED, key_of, path_of

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1)
MARKS = st.sampled_from(["%", "%+", "%self", "%part", "%2E", "%25", ".", "a%+", "100%", "a%20b", "a"])
PATHS = st.lists(MARKS | NAMES, min_size=1).map("/".join)


@given(KEYS, st.booleans())
@example("../x", False)
@example("/absolute", False)
@example("a/" * 512, True)
@example("%" * 1024, False)
@example("é" * 512, True)
@example("." * 1024, False)
def test_every_key_comes_back_from_its_path(key: str, folder: bool) -> None:
    assert key_of(path_of(key, folder=folder)) == key


@given(KEYS, st.booleans())
@example(".", False)
@example("..", False)
@example("a" * 480 + "..", False)
@example(UNFINISHED, False)
def test_no_path_leads_out_of_its_folder_or_is_too_long_for_a_file_system(key: str, folder: bool) -> None:
    path = path_of(key, folder=folder)
    for name in path.split("/"):
        assert name not in ("", ".", "..", UNFINISHED)
        assert len(name.encode()) <= 255
    assert len(path.encode()) < 3200  # of 4096, with the folder that it is in


@given(st.lists(KEYS, unique=True, min_size=2))
@example(["a", "a/%self", "a/", "%self"])
@example(["a" * 240 + "b", "a" * 240 + "%+/b", "a" * 240])
def test_no_two_keys_share_a_path(keys: list[str]) -> None:
    paths = [path_of(key, folder=folder) for key in keys for folder in (False, True)]
    assert len(set(paths)) == len(paths)


@given(PATHS)
def test_a_path_that_no_key_is_kept_at_stands_for_the_key_that_reads_the_same(path: str) -> None:
    key = key_of(path)
    assert key == path or path in (path_of(key), path_of(key, folder=True))


def test_plain_keys_are_their_paths() -> None:
    for key in ("a", "docs/readme.md", "a b/ü", ".hidden", "...", "a\\b", "-rf"):
        assert path_of(key) == key
