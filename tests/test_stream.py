"""Text from bytes that arrive in pieces."""

import random

import pytest

from gptjax.generation.stream import make_text_stream

TEXTS = ["plain", "né à Zürich", "日本語", "👩‍👩‍👧‍👦 ok", "\U0010ffff\x00", ""]
BROKEN = [
    b"\xff",
    b"a\x80b",
    b"\xe2\x82",
    b"\xf0\x9f\x98A",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xe2\x82\xe2\x82\xac",
    b"\xf5",
]


def feed(data: bytes, size: int) -> list[str]:
    stream = make_text_stream()
    pieces = [stream(data[i : i + size], False) for i in range(0, len(data), size)]
    return [*pieces, stream(b"", True)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_pieces_are_whole_characters_and_join_to_the_text(text, size):
    pieces = feed(text.encode(), size)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_pieces_of_any_bytes_join_to_what_decoding_them_all_gives():
    rng = random.Random(0)
    starts = bytes.fromhex("41 80 bf c2 e0 e2 82 ac ed a0 f0 9f 98 f4 90 ff")  # all that UTF-8 tells apart
    for _ in range(2000):
        data = bytes(rng.choices(starts, k=rng.randrange(12)))
        assert "".join(feed(data, rng.randint(1, 5))) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("data", BROKEN)
def test_invalid_bytes_join_to_what_decoding_all_bytes_gives(data):
    assert "".join(feed(data, 1)) == data.decode("utf-8", "replace")


def test_a_character_is_held_back_until_its_last_byte_and_comes_at_once_then():
    stream = make_text_stream()
    assert [stream(bytes([byte]), False) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]


def test_bytes_that_cannot_become_valid_do_not_wait():
    stream = make_text_stream()
    assert stream(b"\xff", False) == "\ufffd"
    assert stream(b"\xe2\x82", False) == ""
    assert stream(b"A", False) == "\ufffdA"


def test_what_is_held_back_comes_out_at_the_end():
    stream = make_text_stream()
    assert stream("é".encode()[:1], False) == ""
    assert stream(b"", True) == "\ufffd"
