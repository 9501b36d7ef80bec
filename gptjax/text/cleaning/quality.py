"""Heuristic quality filters. `QualityConfig` cites their sources.

Words are separated by white space; gopher ignores words of punctuation only. A rule set returns the name of the first
limit that a document violates: the name of the option, if there is one.
"""

import re
from collections import Counter
from collections.abc import Callable

from gptjax.config.clean import QualityConfig

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")
_PARAGRAPHS = re.compile(r"\n{2,}")
_NOT_PUNCTUATION = re.compile(r"[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")
_TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
_REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_C4_ENDS = (".", "?", "!", '"', "'")
_C4_SENTENCE = re.compile(r"[.?!]+[\"')\]]*(?:\s|$)")
_C4_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_FINEWEB_ENDS = (".", "?", "!", "\u3002", "\uff0e", "\uff1f", "\uff01", "\u061f", "\u06d4", "\u0964", "\u0965")
_SHORT_LINE = 30

Verdict = tuple[str, str]
"""The text, and the name of the violated limit (empty: none)."""


def apply_rules(text: str, quality: QualityConfig) -> Verdict:
    """Applies the selected rule sets in the order of `RULES`. Only c4 changes the text."""
    for name, rule in RULES.items():
        if name in quality.rules:
            text, broken = rule(text, quality)
            if broken:
                return text, broken
    return text, ""


def gopher(text: str, q: QualityConfig) -> Verdict:
    """Length, symbols, bullets, letters and stop words."""
    words, lines = text.split(), text.splitlines()
    n, real = len(words), [word for word in words if _NOT_PUNCTUATION.search(word)]
    if len(real) < q.min_words:
        return text, "min_words"
    if len(real) > q.max_words:
        return text, "max_words"
    if sum(map(len, real)) < q.min_word_length * len(real):
        return text, "min_word_length"
    if sum(map(len, real)) > q.max_word_length * len(real):
        return text, "max_word_length"
    symbols = max(text.count("#"), text.count("...") + text.count("…"))
    if symbols > q.max_symbols_per_word * n:
        return text, "max_symbols_per_word"
    if sum(line.lstrip().startswith(_BULLETS) for line in lines) > q.max_bullet_lines * len(lines):
        return text, "max_bullet_lines"
    if sum(line.rstrip().endswith(_ELLIPSES) for line in lines) > q.max_ellipsis_lines * len(lines):
        return text, "max_ellipsis_lines"
    if sum(_LETTER.search(word) is not None for word in words) < q.min_alphabetic_words * n:
        return text, "min_alphabetic_words"
    if len(STOP_WORDS.intersection(words)) < q.min_stop_words:
        return text, "min_stop_words"
    return text, ""


def gopher_repetition(text: str, q: QualityConfig) -> Verdict:
    """Limits on the share of characters in repeated lines and paragraphs, frequent short and repeated long n-grams."""
    for pieces in (_PARAGRAPHS.split(text.strip()), [line for line in text.split("\n") if line]):
        n_repeated, characters = _repeated(pieces)
        if n_repeated > q.max_repeated_lines * len(pieces):
            return text, "max_repeated_lines"
        if characters > q.max_repeated_line_characters * len(text):
            return text, "max_repeated_line_characters"
    words = text.split()
    for n, limit in _TOP_NGRAMS.items():
        ngrams = Counter(zip(*(words[k:] for k in range(n)), strict=False))
        if ngrams:
            [(ngram, times)] = ngrams.most_common(1)
            if times > 1 and (sum(map(len, ngram)) + n - 1) * times > limit * q.ngram_factor * len(text):
                return text, f"top_{n}_gram"
    for n, limit in _REPEATED_NGRAMS.items():
        if _repeated_ngrams(words, n) > limit * q.ngram_factor * len(text):
            return text, f"repeated_{n}_grams"
    return text, ""


def c4(text: str, q: QualityConfig) -> Verdict:
    """Keeps lines that are sentences; rejects documents with too few of them, with code, or with placeholder text."""
    if "lorem ipsum" in text.lower():
        return text, "lorem_ipsum"
    if "{" in text:
        return text, "curly_bracket"
    kept = []
    for line in map(str.strip, text.splitlines()):
        lower = line.lower()
        if (
            line.endswith(_C4_ENDS)
            and not line.endswith("...")
            and len(line.split()) >= q.min_words_per_line
            and "javascript" not in lower
            and not any(phrase in lower for phrase in _C4_POLICY)
        ):
            kept.append(line)
    text = "\n".join(kept)
    return text, "min_sentences" if len(_C4_SENTENCE.findall(text)) < q.min_sentences else ""


def fineweb(text: str, q: QualityConfig) -> Verdict:
    """Limits on punctuation, short lines, repeated lines and lists."""
    lines = [line for line in text.split("\n") if line.strip()]
    if sum(line.endswith(_FINEWEB_ENDS) for line in lines) < q.min_punctuated_lines * len(lines):
        return text, "min_punctuated_lines"
    if sum(len(line) <= _SHORT_LINE for line in lines) > q.max_short_lines * len(lines):
        return text, "max_short_lines"
    if _repeated(lines)[1] > q.max_repeated_characters * len(text.replace("\n", "")):
        return text, "max_repeated_characters"
    if text.count("\n") > q.max_newlines_per_word * len(text.split()):
        return text, "max_newlines_per_word"
    return text, ""


def _repeated(pieces: list[str]) -> tuple[int, int]:
    """Number of pieces that occur earlier, and their characters."""
    seen: set[str] = set()
    n = characters = 0
    for piece in pieces:
        if piece in seen:
            n, characters = n + 1, characters + len(piece)
        seen.add(piece)
    return n, characters


def _repeated_ngrams(words: list[str], n: int) -> int:
    """Characters of non-overlapping n-grams that occur earlier."""
    seen: set[tuple[str, ...]] = set()
    characters = place = 0
    while place <= len(words) - n:
        ngram = tuple(words[place : place + n])
        if ngram in seen:
            characters += sum(map(len, ngram))
            place += n
        else:
            seen.add(ngram)
            place += 1
    return characters


RULES: dict[str, Callable[[str, QualityConfig], Verdict]] = {
    "gopher": gopher,
    "gopher_repetition": gopher_repetition,
    "c4": c4,
    "fineweb": fineweb,
}
LIMITS = (
    *("min_words", "max_words", "min_word_length", "max_word_length", "max_symbols_per_word", "max_bullet_lines"),
    *("max_ellipsis_lines", "min_alphabetic_words", "min_stop_words"),
    *("max_repeated_lines", "max_repeated_line_characters"),
    *(f"top_{n}_gram" for n in _TOP_NGRAMS),
    *(f"repeated_{n}_grams" for n in _REPEATED_NGRAMS),
    *("lorem_ipsum", "curly_bracket", "min_sentences"),
    *("min_punctuated_lines", "max_short_lines", "max_repeated_characters", "max_newlines_per_word"),
)
"""All names that rules can return."""
