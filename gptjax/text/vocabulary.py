"""Tokens that are added to a byte-pair encoding, or taken out of it.

Ids of an extended encoding are those of the old one, then the new tokens. A pruned one numbers the tokens that are left
in their old order, and encodes text that consists of these tokens to the same tokens as before.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from gptjax.errors import UserError
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.text.tokenizers.byte_pair import BytePairTokenizer, byte_pair_tokenizer

_RESERVED = "<|reserved_"
_LEAST = 2
"""Pairs that occur less often are not merged."""


def require_byte_pairs(tokenizer: Tokenizer | None, where: str) -> BytePairTokenizer:
    """Returns a tokenizer whose vocabulary can be changed.

    Raises:
        UserError: It is of another kind.
    """
    if not isinstance(tokenizer, BytePairTokenizer):
        kind = "none" if tokenizer is None else tokenizer.kind
        raise UserError(f"{where}: has a tokenizer of kind {kind}; only bpe and tiktoken can change")
    return tokenizer


def learn_tokens(tokenizer: BytePairTokenizer, texts: Iterable[str], n: int) -> list[bytes]:
    """Continues to learn merges on a text, from its tokens in this encoding; returns up to n new tokens in their order.

    The most frequent pair of neighbours inside a word is merged, again and again, as in the training of any byte-pair
    encoding (Sennrich et al., arXiv:1508.07909).
    """
    words = _count_words(tokenizer, texts)
    pieces = [[tokenizer.decode_bytes([i]) for i in tokenizer.encode(word)] for word in words]
    counts = list(words.values())
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    places: dict[tuple[bytes, bytes], set[int]] = {}
    for word, parts in enumerate(pieces):
        for pair in itertools.pairwise(parts):
            pairs[pair] += counts[word]
            places.setdefault(pair, set()).add(word)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    learned: dict[bytes, None] = {}
    while heap and len(learned) < n:
        count, pair = heapq.heappop(heap)
        token = pair[0] + pair[1]
        if -count != pairs[pair]:
            if pairs[pair] >= _LEAST:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if -count < _LEAST:
            break
        if token in tokenizer.ranks:  # two tokens that the old encoding never joins here
            continue
        learned[token] = None
        changed: set[tuple[bytes, bytes]] = set()
        for word in places.pop(pair):
            before = pieces[word]
            after = _merged(before, pair)
            for old in itertools.pairwise(before):
                pairs[old] -= counts[word]
            for new in itertools.pairwise(after):
                pairs[new] += counts[word]
                places.setdefault(new, set()).add(word)
                changed.add(new)
            pieces[word] = after
        for new in changed:
            heapq.heappush(heap, (-pairs[new], new))
    return list(learned)


def extend(tokenizer: BytePairTokenizer, tokens: Iterable[bytes]) -> tuple[BytePairTokenizer, list[np.ndarray]]:
    """Returns the encoding with new tokens, and for each of them the old ids of its bytes."""
    tokens = list(tokens)
    ranks = tokenizer.ranks | {token: tokenizer.vocab_size + i for i, token in enumerate(tokens)}
    pieces = [np.array(tokenizer._encoding._encode_single_piece(token), np.int32) for token in tokens]
    return byte_pair_tokenizer("bpe", "", ranks, tokenizer.pattern, tokenizer.special, tokenizer.end_token), pieces


def prune(tokenizer: BytePairTokenizer, counts: np.ndarray, size: int) -> tuple[BytePairTokenizer, np.ndarray]:
    """Keeps the most frequent tokens; returns the smaller encoding, and the old id of each of its ids.

    Single bytes and special tokens stay, and so do the tokens that a kept one is merged from. Special tokens that only
    name unused ids go.

    Args:
        tokenizer: The encoding.
        counts: How often each id occurs `[V]`.
        size: Most ids to keep.

    Raises:
        UserError: The size is less than what must stay, or not less than the vocabulary.
    """
    special = {name: i for name, i in tokenizer.special.items() if not name.startswith(_RESERVED)}
    kept = {tokenizer.ranks[bytes([byte])] for byte in range(256)} | set(special.values())
    if not len(kept) <= size < tokenizer.vocab_size:
        raise UserError(
            f"prune={size} must be at least {len(kept)}, the single bytes and special tokens, and less than the"
            f" vocabulary's {tokenizer.vocab_size}"
        )
    token_of = {rank: token for token, rank in tokenizer.ranks.items()}
    for rank in sorted(token_of, key=lambda rank: (-counts[rank], rank)):
        needed, waiting = set(), [rank]
        while waiting:
            one = waiting.pop()
            if one not in kept and one not in needed:
                needed.add(one)
                waiting += [tokenizer.ranks[part] for part in _merged_from(tokenizer.ranks, token_of[one])]
        if len(kept) + len(needed) <= size:
            kept |= needed
        if len(kept) == size:
            break
    old_ids = np.array(sorted(kept), np.int64)
    new_id = {int(old): new for new, old in enumerate(old_ids)}
    ranks = {token: new_id[rank] for token, rank in tokenizer.ranks.items() if rank in new_id}
    special = {name: new_id[i] for name, i in special.items()}
    return byte_pair_tokenizer("bpe", "", ranks, tokenizer.pattern, special, tokenizer.end_token), old_ids


def _count_words(tokenizer: BytePairTokenizer, texts: Iterable[str]) -> Counter[str]:
    import regex

    pattern = regex.compile(tokenizer.pattern)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(match[0] for match in pattern.finditer(text))
    return words


def _merged(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    i = 0
    while i < len(parts):
        found = tuple(parts[i : i + 2]) == pair
        merged.append(pair[0] + pair[1] if found else parts[i])
        i += 2 if found else 1
    return merged


def _merged_from(ranks: Mapping[bytes, int], token: bytes) -> list[bytes]:
    """The two tokens whose merge gives this one; it is a token by itself if it is a single byte or never merged."""
    parts, own = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, own), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank >= own:  # no merge leads to it, so no text encodes to it
            return []
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts if len(parts) == 2 else []
