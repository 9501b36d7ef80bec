"""Byte-pair encodings, published or trained on the corpus, run by tiktoken."""

import base64
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.machine.processor import core_count
from gptjax.text.pieces import group_pieces, split_text
from gptjax.text.tokenizers.base import END_OF_TEXT, Tokenizer, surrogate_error


@dataclasses.dataclass(frozen=True, eq=False)
class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding, run by tiktoken: lower rank merges first, and the rank is the id."""

    kind: str
    name: str
    pattern: str
    ranks: dict[bytes, int]
    special: dict[str, int]
    end_token: str = END_OF_TEXT
    """Name of the end-of-text token; if `special` does not have it, the tokenizer has no such token."""

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.special)

    @property
    def end_of_text(self) -> int | None:
        return self.special.get(self.end_token)

    @property
    def special_tokens(self) -> dict[str, int]:
        return self.special

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int32), *self._encode_pieces(list(split_text(text)))])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [list(split_text(text)) for text in texts]
        groups = group_pieces(itertools.chain.from_iterable(pieces))
        with ThreadPoolExecutor(core_count()) as pool:
            encoded = itertools.chain.from_iterable(pool.map(self._encode_pieces, groups))
            parts = [[next(encoded) for _ in document] for document in pieces]
        return [part[0] if len(part) == 1 else np.concatenate([np.empty(0, np.int32), *part]) for part in parts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(self._checked(ids))

    @classmethod
    def from_dict(cls, content: dict) -> "BytePairTokenizer":
        tokens, special = content["tokens"], content["special_tokens"]
        ranks = {base64.b64decode(token, validate=True): i for i, token in enumerate(tokens) if token is not None}
        if len(ranks) + tokens.count(None) < len(tokens):
            raise ValueError("a token is given twice")
        if any(type(i) is not int for i in special.values()):
            raise ValueError("ids of special tokens must be whole numbers")
        end_token = content.get("end_token", END_OF_TEXT)
        if end_token != END_OF_TEXT and end_token not in special:
            raise ValueError(f"end_token {end_token!r} is none of special_tokens")
        return byte_pair_tokenizer(content["kind"], content["name"], ranks, content["pattern"], special, end_token)

    def to_dict(self) -> dict:
        tokens: list[str | None] = [None] * self.vocab_size
        for token, rank in self.ranks.items():
            tokens[rank] = base64.b64encode(token).decode()
        return {
            "kind": self.kind,
            "name": self.name,
            "pattern": self.pattern,
            "tokens": tokens,
            "special_tokens": dict(sorted(self.special.items(), key=lambda item: item[1])),
        } | ({} if self.end_token == END_OF_TEXT else {"end_token": self.end_token})

    @functools.cached_property
    def _encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    def _encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        try:
            arrays = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from None
        return [np.asarray(array).astype(np.int32) for array in arrays]


def bpe_tokenizer_from_ranks(
    ranks: dict[bytes, int], pattern: str, special: dict[str, int], end_token: str = END_OF_TEXT
) -> Tokenizer:
    """Builds a BPE tokenizer from another program's files.

    Args:
        ranks: Id of each token's bytes, in the order in which they merge. All 256 single bytes are among them.
        pattern: Regular expression that cuts text before bytes are merged.
        special: Ids of tokens that no text encodes to.
        end_token: The special token that starts a document; if `special` does not have it, no token does.

    Raises:
        UserError: An id is given twice, a single byte is missing, or the pattern is not valid.
    """
    return byte_pair_tokenizer("bpe", "", ranks, pattern, special, end_token)


def train_byte_pair(
    config: TokenizerConfig, documents: Iterable[str], report: Callable[[str], object]
) -> BytePairTokenizer:
    """Learns the merges of a corpus."""
    from gptjax.text.train_bpe import PATTERN, train_ranks

    ranks = train_ranks((piece for text in documents for piece in split_text(text)), config.vocab_size - 1, report)
    return byte_pair_tokenizer("bpe", "", ranks, PATTERN, {END_OF_TEXT: len(ranks)})


def published_encoding(name: str) -> BytePairTokenizer:
    """Loads an encoding of tiktoken by its name.

    Raises:
        UserError: It can be neither read nor downloaded.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # of many kinds: network, cache folder, checksum
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(
            f"tokenizer.name={name}: cannot load the vocabulary ({reason}); it is downloaded once, or read from"
            " the folder that the variable TIKTOKEN_CACHE_DIR names"
        ) from None
    ranks, special = encoding._mergeable_ranks, dict(encoding._special_tokens)
    return byte_pair_tokenizer("tiktoken", name, ranks, encoding._pat_str, special)


def byte_pair_tokenizer(
    kind: str, name: str, ranks: dict[bytes, int], pattern: str, special: dict[str, int], end_token: str = END_OF_TEXT
) -> BytePairTokenizer:
    """Builds a tokenizer, with a name for each id that no token has.

    Raises:
        UserError: An id is given twice, a single byte is missing, or the pattern is not valid.
    """
    ids = sorted([*ranks.values(), *special.values()])
    size = ids[-1] + 1 if ids else 0
    if len(set(ids)) < len(ids) or not ids or ids[0] < 0:
        raise UserError("tokenizer: ids must be different numbers from 0 on")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"tokenizer: no token for the single byte 0x{missing[0]:02x}; all 256 are needed")
    # cl100k_base and o200k_base leave ids unused. A model can still predict them, so they get a name.
    unused = set(range(size)).difference(ids)
    special = special | {f"<|reserved_{i}|>": i for i in sorted(unused)}
    tokenizer = BytePairTokenizer(kind, name, pattern, ranks, special, end_token)
    try:
        _ = tokenizer._encoding
    except ValueError as error:
        raise UserError(f"tokenizer: not a valid byte-pair encoding: {' '.join(str(error).split())}") from None
    return tokenizer
