"""What a request says, before any node does something about it: pure functions."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from keys import KEYS, encodings
from mehdb.api.requests import PARAMETERS_MAX, Parameters, decode_key, no_parameters, seconds, target
from mehdb.errors import BadKey, BadParameter
from mehdb.parsing import whole_number


@given(key=KEYS, data=st.data())
def test_a_key_is_read_back_from_every_legal_way_to_write_it(key: bytes, data: st.DataObject) -> None:
    assert decode_key(data.draw(encodings(key))) == key


@given(key=KEYS, other=KEYS, data=st.data())
def test_no_way_to_write_a_key_means_another_key(key: bytes, other: bytes, data: st.DataObject) -> None:
    assume(key != other)
    assert data.draw(encodings(key)) != data.draw(encodings(other))


@given(st.text())
def test_any_text_is_a_key_or_refused_as_one(text: str) -> None:
    try:
        key = decode_key(text)
    except BadKey:
        return
    assert 1 <= len(key) <= 1024
    assert b"\0" not in key
    key.decode()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a%2Fb", b"a/b"),
        ("a%2fb", b"a/b"),
        ("%25ff", b"%ff"),
        ("%252F", b"%2F"),
        ("a+b", b"a+b"),
        ("a%20b", b"a b"),
        ("/", b"/"),
        ("..", b".."),
        ("%2E%2e/x", b"../x"),
        ("%c3%A9", "é".encode()),
    ],
)
def test_a_key_is_decoded_once(text: str, key: bytes) -> None:
    assert decode_key(text) == key


@pytest.mark.parametrize(
    "text",
    ["", "%", "a%", "%2", "%g0", "%%41", "%u00e9", "%ff", "%c3", "%ed%a0%80", "%C0%80", "a%00b", "a#b", "a" * 1025],
)
def test_what_stands_for_no_key_is_refused(text: str) -> None:
    with pytest.raises(BadKey):
        decode_key(text)


@pytest.mark.parametrize(
    ("raw", "path", "query"),
    [
        ("/get/a", "/get/a", ""),
        ("/get/a?b=c?d", "/get/a", "b=c?d"),
        ("http://host:1/get/a%2Fb?x", "/get/a%2Fb", "x"),
        ("http://host", "", ""),
        ("/set/http://host/x", "/set/http://host/x", ""),
        ("//host/x", "//host/x", ""),
        ("*", "", ""),
        ("host:443", "", ""),
    ],
)
def test_a_target_is_taken_apart_without_decoding(raw: str, path: str, query: str) -> None:
    assert target(raw) == (path, query)


@given(st.text(alphabet=st.characters(codec="ascii", exclude_characters="?"), min_size=1))
def test_the_text_of_a_target_is_what_was_sent(path: str) -> None:
    for raw in (f"/{path}", f"/{path}?x=%2F&y"):
        assert target(raw).text == raw
        assert target(f"http://host{raw}").text == raw


def test_parameters_are_decoded() -> None:
    parameters = Parameters("a=1&b=%2F%C3%A9&c=x+y&d=")
    assert [parameters.take(name, str, "none") for name in "abcde"] == ["1", "/é", "x y", "", "none"]
    parameters.finish()


@pytest.mark.parametrize(
    "query", ["a=%ff", "a=%zz", "a=1%", "a=1&a=2", "a=1&a=1", "&".join(f"a{n}=" for n in range(PARAMETERS_MAX + 1))]
)
def test_a_query_that_says_nothing_for_certain_is_refused(query: str) -> None:
    with pytest.raises(BadParameter):
        Parameters(query)


def test_a_parameter_that_is_not_taken_is_unknown() -> None:
    parameters = Parameters("limit=1&limmit=2")
    assert parameters.take("limit", whole_number(1, 9), 5) == 1
    with pytest.raises(BadParameter, match="limmit"):
        parameters.finish()
    no_parameters("")
    with pytest.raises(BadParameter, match="x"):
        no_parameters("x=1")


@given(st.integers(0, 10**30) | st.sampled_from([9, 10, 99, 100, 101]), st.sampled_from([0, 1, 17, 18, 100, 5000]))
def test_a_whole_number_is_within_its_bounds(number: int, zeros: int) -> None:
    """However long it is: a number that is cut short, or read whole when it has thousands of digits, is a trap."""
    text = "0" * zeros + str(number)
    parse = whole_number(10, 100)
    if 10 <= number <= 100 and len(text) <= 20:
        assert parse(text) == number
    else:
        with pytest.raises(ValueError, match="from 10 to 100"):
            parse(text)


@pytest.mark.parametrize("text", ["", " 50", "50 ", "+50", "-50", "5_0", "5e1", "5.0", "\u0665\u0660", "0x32", "fifty"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        whole_number(10, 100)(text)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("60", 60), ("0.25", 0.25), ("007", 7)])
def test_seconds_may_have_a_fraction(text: str, value: float) -> None:
    assert seconds(60)(text) == value


@pytest.mark.parametrize("text", ["", "-1", "60.1", "1e1", "nan", "inf", "1.", ".5", "1_0", "\u0665", "1s", "9" * 400])
def test_what_are_no_seconds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="seconds from 0 to 60"):
        seconds(60)(text)
