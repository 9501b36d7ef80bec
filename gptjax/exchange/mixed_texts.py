"""Texts for comparing two tokenizers: random mixes of words, numbers, punctuation, white space and scripts."""

import random
from collections.abc import Sequence

NUMBER_OF_TEXTS = 3000
_WORDS = (
    *(
        "the",
        "The",
        "of",
        "token",
        "Tokenizer",
        "LLAMA",
        "x",
        "I",
        "don't",
        "we'll",
        "IT'S",
        "they've",
        "I'm",
        "O'Neil",
    ),
    *("naïve", "Straße", "café", "e\u0301te\u0301", "İstanbul", "Ångström", "ﬁne", "ﷺ", "Ⅷ", "x²", "½"),
    *("日本語", "中文字", "한국어", "русский", "Ελλάδα", "עברית", "العربية", "हिन्दी", "ไทย", "🙂", "👩‍👩‍👧", "🇩🇪"),
    *(
        "https://a.b/c?d=e&f",
        "a_b",
        "snake_case",
        "camelCase",
        "x=1;",
        "//",
        "/*",
        "#!",
        "<a>",
        "{}",
        "[0]",
        "()",
        "&amp;",
    ),
)
_NUMBERS = ("0", "7", "12", "123", "1234", "12345", "1234567", "3.14", "1,000", "2024-01-31", "٣٤٥", "१२३४", "٠" * 5)  # noqa: RUF001
_MARKS = (
    ".",
    ",",
    "!",
    "?",
    "...",
    "--",
    "—",
    "'",
    '"',
    "''",
    "$",
    "%",
    "@",
    "…",
    "「",
    "」",
    "。",
    "、",
    "'s",
    "'S",
    "\\",
)
_SPACES = (
    "",
    "",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\t",
    " \n",
    "\n ",
    "\u00a0",
    "\u3000",
    "\u2028",
)
_ODD = ("\0", "\x1c", "\x85", "\ufeff", "\u200b", "\u200d", "\ufffd", "\U0010ffff", "\u0301")


def mixed_texts(tokens: Sequence[str]) -> list[str]:
    """Returns `NUMBER_OF_TEXTS` short texts, some of which contain `tokens`. The result depends only on `tokens`."""
    source = random.Random(0)
    kinds = (_WORDS, _WORDS, _NUMBERS, _MARKS, _SPACES, _ODD, tokens or _WORDS)
    weights = (4, 4, 3, 3, 2, 1, 6)
    texts = []
    for _ in range(NUMBER_OF_TEXTS):
        parts = []
        for kind in source.choices(kinds, weights, k=source.randint(1, 12)):
            parts += [source.choice(kind), source.choice(_SPACES)]
        texts.append("".join(parts))
    return texts
