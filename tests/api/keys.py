"""Keys, and the ways in which a client may write them in a URL."""

import string
from urllib.parse import quote

from hypothesis import strategies as st

from mehdb.model import KEY_BYTES_MAX

# RFC 3986, 3.3: what may stand in a path as it is, and the slash between its segments.
LITERAL = frozenset((string.ascii_letters + string.digits + "-._~" + "!$&'()*+,;=" + ":@" + "/").encode())
TELLING = [
    "/",
    "//",
    ".",
    "..",
    "%",
    "?",
    "#",
    "+",
    " ",
    "&",
    "=",
    "\\",
    '"',
    "%2F",
    "%25",
    "%ff",
    "\r\n",
    "\x7f",
    "é",
    "🗝",
]

KEYS = (
    st.lists(
        st.sampled_from(TELLING) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        min_size=1,
    )
    .map(lambda pieces: "".join(pieces).encode())
    .filter(lambda key: 0 < len(key) <= KEY_BYTES_MAX)
)


@st.composite
def encodings(draw: st.DrawFn, key: bytes) -> str:
    """Return one of the legal ways to write *key*: needless escapes and hexadecimal digits of either case."""
    escape = draw(st.sampled_from(["what must be", "some", "all"]))
    random = draw(st.randoms(use_true_random=False))

    def written(byte: int) -> str:
        if byte in LITERAL and (escape == "what must be" or (escape == "some" and random.random() < 0.5)):
            return chr(byte)
        return random.choice(["%{:02x}", "%{:02X}"]).format(byte)

    return "".join(map(written, key))


def in_url(key: bytes) -> str:
    """Return *key* as a careful client writes it: everything escaped but letters, digits and `-._~`."""
    return quote(key, safe="")
