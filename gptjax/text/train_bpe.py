"""Trains a byte-pair encoding on a corpus, with the trainer of the tokenizers library."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gptjax.errors import UserError

# Pre-tokenization as in GPT-4: words, up to three digits, punctuation, white space.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_CHARACTERS = 2**28
"""The encoding is trained on at most this many characters at the start of the corpus."""


def train_ranks(texts: Iterable[str], n_tokens: int, report: Callable[[str], object]) -> dict[bytes, int]:
    """Returns the rank of each token's bytes: first the 256 bytes, then the merges in order.

    Pairs that occur only once are not merged, so a small corpus can give fewer than `n_tokens`. `report` receives a
    line in that case, and one if only a part of the corpus is used.

    Raises:
        UserError: The corpus is empty.
    """
    from tokenizers.trainers import BpeTrainer

    tokenizer = make_byte_level()
    trainer = BpeTrainer(
        vocab_size=n_tokens,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=sorted(byte_of_character()),
    )
    read: list[int] = []
    tokenizer.train_from_iterator(leading_part(texts, report, read), trainer)
    if not sum(read):
        raise UserError("tokenizer.kind=bpe: the corpus has no text to learn from")
    bytes_of = byte_of_character()
    vocabulary = tokenizer.get_vocab()
    ranks = {bytes(bytes_of[c] for c in token): rank for token, rank in vocabulary.items()}
    if len(ranks) < n_tokens:
        report(
            f"tokenizer: the corpus has only {len(ranks) + 1} tokens to learn, fewer than"
            f" tokenizer.vocab_size={n_tokens + 1}"
        )
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def leading_part(texts: Iterable[str], report: Callable[[str], object], read: list[int]) -> Iterator[str]:
    """Yields texts until they have `MAX_CHARACTERS`; adds the length of each to `read`."""
    total = 0
    for text in texts:
        if total >= MAX_CHARACTERS:
            report(f"tokenizer: tokens are learned from the first {total / 1e6:.0f} M characters of the corpus")
            return
        total += len(text)
        read.append(len(text))
        yield text


def make_byte_level(model: Any = None):
    """A tokenizer of the tokenizers library with `PATTERN` as its pre-tokenization; by default an untrained BPE."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE() if model is None else model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def byte_of_character() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 characters are unchanged, the others are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
