"""What a client makes of the lines that nodes answer."""

import pytest

from mehdb.client.lines import Entry
from mehdb.errors import PeerAnswerInvalid


@pytest.mark.parametrize("text", ["a", "*", "é"])
def test_a_value_that_is_no_base64_is_an_error_in_words(text: str) -> None:
    with pytest.raises(PeerAnswerInvalid, match="'k' is no base64"):
        _ = Entry("k", 1, base64=text).data
