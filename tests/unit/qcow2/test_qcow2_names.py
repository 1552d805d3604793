"""Names of an image as safe, exact text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.qcow2.names import escape, unescape


@given(st.binary(max_size=60))
def test_any_bytes_come_back_and_print(raw):
    text = escape(raw)
    assert unescape(text) == raw
    assert text.isprintable()
    text.encode("utf-8")


@given(st.binary(max_size=6), st.binary(max_size=6))
def test_different_names_never_look_the_same(a, b):
    assert (escape(a) == escape(b)) == (a == b)


@pytest.mark.parametrize(
    "raw, text",
    [
        (b"island-7f-3", "island-7f-3"),
        ("täglich".encode(), "täglich"),
        (b"a\xffb", "a\\xffb"),
        (b"a\\xffb", "a\\\\xffb"),
        (b"\x1b[2J\n\0", "\\x1b[2J\\x0a\\x00"),
        ("\u202e".encode(), "\\xe2\\x80\\xae"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
    ],
)
def test_examples(raw, text):
    assert escape(raw) == text
    assert unescape(text) == raw


@pytest.mark.parametrize("text", ["\\", "a\\q", "\\x1", "\\xZZ", "\\\\\\"])
def test_what_escape_never_makes_is_refused(text):
    with pytest.raises(ValueError):
        unescape(text)
