"""Legal keys, above all those that no path can be."""

from hypothesis import strategies as st

from mehdb.model import KEY_BYTES_MAX

TELLING = ["/", "//", ".", "..", "%", "%2E", "%25", "%+", "%self", "%part", "a", "b", "\n", "é", "🗝", "a" * 241]

KEYS = (
    st.lists(
        st.sampled_from(TELLING) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        min_size=1,
    )
    .map("".join)
    .filter(lambda key: 0 < len(key.encode()) <= KEY_BYTES_MAX)
)
