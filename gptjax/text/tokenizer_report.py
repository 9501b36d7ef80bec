"""How well tokenizers fit a text: bytes per token, tokens per word, longest and unused tokens."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from gptjax.text.formats import Document, batch_documents
from gptjax.text.tokenizers.base import Tokenizer

_WORD = re.compile(r"\w+")
_BATCH = 2**22


class Fit(NamedTuple):
    """Sizes of a text in one tokenizer."""

    tokenizer: str
    source: str
    n_bytes: int
    n_words: int
    n_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """Higher is shorter sequences."""
        return self.n_bytes / max(1, self.n_tokens)

    @property
    def fertility(self) -> float:
        """Tokens per word; a word is a run of letters, digits and _."""
        return self.n_tokens / max(1, self.n_words)


def measure_fit(
    tokenizers: Mapping[str, Tokenizer],
    sources: Mapping[str, Iterable[Document]],
    language_of: Callable[[str], str] | None,
) -> tuple[list[Fit], dict[str, np.ndarray]]:
    """Encodes each source with each tokenizer.

    Args:
        tokenizers: By name.
        sources: By name, read once.
        language_of: Divides each source by the language of its documents; None: not.

    Returns:
        The sizes by source (and language) and tokenizer, and how often each tokenizer's ids occur, int64 `[V]`.
    """
    counts = {name: np.zeros(one.vocab_size, np.int64) for name, one in tokenizers.items()}
    sizes: dict[tuple[str, str], np.ndarray] = {}
    for source, documents in sources.items():
        for batch in batch_documents(documents, _BATCH):
            texts = [document.text for document in batch]
            groups = [f"{source}, {language_of(text)}" if language_of else source for text in texts]
            about = [(len(text.encode()), sum(1 for _ in _WORD.finditer(text))) for text in texts]
            for name, tokenizer in tokenizers.items():
                for group, (n_bytes, n_words), ids in zip(groups, about, tokenizer.encode_batch(texts), strict=True):
                    counts[name] += np.bincount(ids, minlength=tokenizer.vocab_size)
                    size = np.array([n_bytes, n_words, len(ids)], np.int64)
                    sizes[group, name] = sizes.get((group, name), 0) + size
    return [Fit(name, group, *map(int, size)) for (group, name), size in sorted(sizes.items())], counts


def sample(documents: Iterable[Document], characters: int) -> Iterator[Document]:
    """Yields the leading documents, up to the one with which they have this many characters; 0: all."""
    total = 0
    for document in documents:
        yield document
        total += len(document.text)
        if 0 < characters <= total:
            return


def fit_lines(fits: Iterable[Fit]) -> list[str]:
    """A table of the sizes, grouped by source."""
    lines = []
    for source, group in itertools.groupby(fits, lambda fit: fit.source):
        rows = list(group)
        lines.append(f"{source}: {rows[0].n_bytes:,} bytes, {rows[0].n_words:,} words")
        lines += [
            f"  {fit.tokenizer:<16} {fit.n_tokens:>12,} tokens  {fit.bytes_per_token:6.3f} bytes per token"
            f"  {fit.fertility:6.3f} tokens per word"
            for fit in rows
        ]
    return lines


def token_lines(tokenizer: Tokenizer, counts: np.ndarray, show: int) -> list[str]:
    """Lines about single tokens: how many are not used, examples of these, and the longest that are used."""
    special = set(tokenizer.special_tokens.values())
    plain = np.array([i for i in range(tokenizer.vocab_size) if i not in special], np.int64)
    unused, used = plain[counts[plain] == 0], plain[counts[plain] > 0]
    longest = used[np.argsort(-tokenizer.byte_lengths[used], kind="stable")][:show]
    text = {int(i): repr(tokenizer.decode([int(i)])) for i in (*unused[:show], *longest)}
    return [
        f"unused: {len(unused):,} of {len(plain):,} tokens, such as {' '.join(text[int(i)] for i in unused[:show])}",
        *(f"long: {text[int(i)]} occurs {counts[i]:,} times" for i in longest),
    ]
