"""Options of cleaning text before it is tokenized. Every stage is off by default."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from gptjax.config.rules import import_path, not_negative, positive, usable_paths
from gptjax.errors import UserError, did_you_mean

RULE_SETS = ("gopher", "gopher_repetition", "c4", "fineweb")
PERSONAL_DATA = ("email", "phone", "ip", "card", "iban", "secret")


_LIMITS = {
    "gopher": "min_words max_words min_word_length max_word_length max_symbols_per_word max_bullet_lines"
    " max_ellipsis_lines min_alphabetic_words min_stop_words",
    "gopher_repetition": "max_repeated_lines max_repeated_line_characters ngram_factor",
    "c4": "min_sentences min_words_per_line",
    "fineweb": "min_punctuated_lines max_short_lines max_repeated_characters max_newlines_per_word",
}
RULE_SET_OF = {limit: rules for rules, limits in _LIMITS.items() for limit in limits.split()}
"""The rule set of each limit."""


def _known(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    for value in given:
        if value not in known:
            raise UserError(f"{name}: {value!r} must be one of {', '.join(known)}.{did_you_mean(value, known)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Quality rules for documents, and their limits. The defaults are those of the papers."""

    rules: tuple[str, ...] = ()
    """Rule sets to apply: gopher and gopher_repetition (arXiv:2112.11446, section A.1), c4 (arXiv:1910.10683, section
    2.2), fineweb (arXiv:2406.17557, section 3.6)."""
    min_words: int = 50
    """gopher: smallest number of words in a document."""
    max_words: int = 100_000
    """gopher: largest number of words in a document."""
    min_word_length: float = 3.0
    """gopher: smallest mean word length, in characters."""
    max_word_length: float = 10.0
    """gopher: largest mean word length, in characters."""
    max_symbols_per_word: float = 0.1
    """gopher: largest number of "#" per word, and of ellipses per word."""
    max_bullet_lines: float = 0.9
    """gopher: largest share of lines that begin with a bullet."""
    max_ellipsis_lines: float = 0.3
    """gopher: largest share of lines that end with an ellipsis."""
    min_alphabetic_words: float = 0.8
    """gopher: smallest share of words that contain a letter."""
    min_stop_words: int = 2
    """gopher: smallest number of different words among: the, be, to, of, and, that, have, with. Use 0 for text that is
    not English."""
    max_repeated_lines: float = 0.3
    """gopher_repetition: largest share of lines that occur earlier in the document, and of such paragraphs."""
    max_repeated_line_characters: float = 0.2
    """gopher_repetition: largest share of characters in lines that occur earlier in the document, and in such
    paragraphs."""
    ngram_factor: float = 1.0
    """gopher_repetition: factor on the paper's limits for repeated word 2-grams to 10-grams."""
    min_sentences: int = 5
    """c4: smallest number of sentences, after removing lines without end punctuation or with fewer words than
    min_words_per_line."""
    min_words_per_line: int = 3
    """c4: lines with fewer words are removed."""
    min_punctuated_lines: float = 0.12
    """fineweb: smallest share of lines that end with punctuation."""
    max_short_lines: float = 0.67
    """fineweb: largest share of lines of at most 30 characters."""
    max_repeated_characters: float = 0.01
    """fineweb: largest share of characters in lines that occur earlier in the document."""
    max_newlines_per_word: float = 0.3
    """fineweb: largest number of newlines per word."""

    def __post_init__(self):
        _known("data.clean.quality.rules", self.rules, RULE_SETS)
        numbers = [field.name for field in dataclasses.fields(self) if field.name != "rules"]
        not_negative("data.clean.quality", self, *numbers)
        for field in dataclasses.fields(self):
            needed = (field.name == "rules") or RULE_SET_OF[field.name] in self.rules
            if not needed and getattr(self, field.name) != field.default:
                raise UserError(
                    f"data.clean.quality.{field.name}={getattr(self, field.name)} has no effect without"
                    f" data.clean.quality.rules={RULE_SET_OF[field.name]}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Cleaning stages, in the order of these options. Documents that a stage leaves out are counted."""

    html: Literal["keep", "visible", "main"] = "keep"
    """Convert HTML documents to text. visible: all visible text; main: the main text without menus and footers. Other
    documents are unchanged."""
    repair: bool = False
    """Repair text that was decoded with a wrong encoding, with the ftfy library."""
    languages: tuple[str, ...] = ()
    """Keep only documents in these languages (ISO 639 codes such as en, de, zh), detected by py3langid; empty: keep
    all."""
    language_confidence: float = 0.0
    """Leave out documents whose detected language has a lower probability than this."""
    quality: QualityConfig = QualityConfig()
    filter: str = ""
    """Your own function, as module:function. It gets a text and returns a text, or None to leave the document out."""
    personal_data: tuple[str, ...] = ()
    """Kinds of personal data to replace by placeholders such as <EMAIL>: email, phone, ip, card and iban (both only
    with a valid checksum), secret (keys and tokens)."""
    decontaminate: tuple[str, ...] = ()
    """Files, folders or globs of evaluation data. Documents that share a word n-gram with them are left out."""
    decontaminate_ngram: int = 13
    """Number of words in an n-gram of decontaminate (arXiv:2005.14165, appendix C)."""
    near_duplicates: float = 0.0
    """Leave out documents whose word 5-grams have at least this Jaccard similarity with those of an earlier document,
    estimated by MinHash; 0: keep them."""
    duplicate_parts: Literal["keep", "lines", "paragraphs"] = "keep"
    """Remove lines or paragraphs that occur earlier in the corpus. Those of fewer than 20 characters are kept."""
    duplicate_substrings: int = 0
    """Remove substrings of at least this many characters that occur earlier in the corpus; 0: keep them.
    arXiv:2107.06499 uses 50 tokens, about 200 characters."""
    workers: int = 0
    """Number of cleaning processes; 0: one per core. The result is the same for any number."""
    dask: str = ""
    """Address of a Dask scheduler (tcp://HOST:8786) whose workers clean; local: start one with `workers` processes;
    empty: without Dask."""

    def __post_init__(self):
        _known("data.clean.personal_data", self.personal_data, PERSONAL_DATA)
        for name in ("language_confidence", "near_duplicates"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.clean.{name}={getattr(self, name)} must lie between 0 and 1")
        if self.language_confidence and not self.languages:
            raise UserError(
                f"data.clean.language_confidence={self.language_confidence} has no effect without data.clean.languages"
            )
        if self.decontaminate_ngram != 13 and not self.decontaminate:
            raise UserError(
                f"data.clean.decontaminate_ngram={self.decontaminate_ngram} has no effect without"
                " data.clean.decontaminate"
            )
        for name in ("workers", "dask"):
            if getattr(self, name) and not self.active:
                raise UserError(f"data.clean.{name}={getattr(self, name)} has no effect without a stage of cleaning")
        if self.dask and self.dask != "local" and "://" not in self.dask:
            raise UserError(f"data.clean.dask={self.dask!r} must be local, or an address such as tcp://localhost:8786")
        if self.workers and "://" in self.dask:
            raise UserError(
                f"data.clean.workers={self.workers} has no effect with data.clean.dask={self.dask}, which has workers"
            )
        import_path("data.clean", self, "filter")
        not_negative("data.clean", self, "workers", "duplicate_substrings")
        if 0 < self.duplicate_substrings < 20:
            raise UserError(
                f"data.clean.duplicate_substrings={self.duplicate_substrings} must be 0 or at least 20: shorter runs"
                " occur everywhere"
            )
        positive("data.clean", self, "decontaminate_ngram")
        usable_paths("data.clean", self, "decontaminate")

    @property
    def active(self) -> bool:
        """Whether any stage is on."""
        return {**vars(self), "workers": 0, "dask": ""} != vars(CleanConfig())
