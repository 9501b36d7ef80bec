import unicodedata
from collections import Counter

from gptjax.config.data import DataConfig
from gptjax.text.clean import clean
from gptjax.text.sources import Document


def cleaned(texts: list[str], counts: Counter | None = None, **options) -> list[str]:
    documents = [Document(text, f"a:{i}") for i, text in enumerate(texts)]
    counts = Counter() if counts is None else counts
    return [document.text for document in clean(documents, DataConfig(**options), counts)]


def test_text_is_left_as_it_is_by_default():
    texts = ["a\r\nb\rc", "e\u0301", " ", "\0", "a\r\nb\rc"]
    assert cleaned(texts) == texts


def test_unix_newlines_and_nfc_do_what_they_say():
    assert cleaned(["a\r\nb\rc\n\r\n"], newlines="unix") == ["a\nb\nc\n\n"]
    text = "e\u0301 \u1112\u1161\u11ab ﬁ"
    assert cleaned([text], unicode="NFC") == [unicodedata.normalize("NFC", text)]


def test_each_rule_counts_what_it_leaves_out():
    counts = Counter()
    texts = ["", "short", "long enough", "long enough", "another text"]
    assert cleaned(texts, counts, min_characters=6, drop_duplicates=True) == ["long enough", "another text"]
    assert counts == {"empty": 1, "short": 1, "duplicate": 1}


def test_duplicates_are_found_after_normalisation_and_the_first_is_kept():
    texts = ["a\r\n", "b", "a\n"]
    assert cleaned(texts, newlines="unix", drop_duplicates=True) == ["a\n", "b"]
    assert cleaned(texts, drop_duplicates=True) == texts


def test_length_is_counted_after_normalisation():
    assert cleaned(["e\u0301"], unicode="NFC", min_characters=2) == []
    assert cleaned(["e\u0301"], min_characters=2) == ["e\u0301"]
