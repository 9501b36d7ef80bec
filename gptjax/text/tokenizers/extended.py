"""Tokenizers with added tokens."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gptjax.text.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class ExtendedTokenizer(Tokenizer):
    """Another tokenizer with added tokens, whose ids come after its own; no text encodes to an added token."""

    base: Tokenizer
    names: tuple[str, ...]
    kind = "extended"

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size + len(self.names)

    @property
    def end_of_text(self) -> int | None:
        return self.base.end_of_text

    @property
    def end_token(self) -> str:
        return self.base.end_token

    @property
    def special_tokens(self) -> dict[str, int]:
        return self.base.special_tokens | {name: self.base.vocab_size + i for i, name in enumerate(self.names)}

    def encode(self, text: str) -> np.ndarray:
        return self.base.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.base.encode_batch(texts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        size, decoded = self.base.vocab_size, []
        for added, group in itertools.groupby(self._checked(ids), lambda i: i >= size):
            run = list(group)
            decoded += [self.names[i - size].encode() for i in run] if added else [self.base.decode_bytes(run)]
        return b"".join(decoded)

    @classmethod
    def from_dict(cls, content: dict, read: Callable[[dict], Tokenizer]) -> "ExtendedTokenizer":
        names = content["names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("names must be strings")
        if len(set(names)) < len(names):
            raise ValueError("a name is given twice")
        return cls(read(content["base"]), tuple(names))

    def to_dict(self) -> dict:
        return {"kind": self.kind, "base": self.base.to_dict(), "names": list(self.names)}


def with_special_tokens(tokenizer: Tokenizer, names: tuple[str, ...]) -> Tokenizer:
    """Returns a tokenizer that also has the tokens `names`, with the same ids for all others."""
    new = tuple(name for name in names if name not in tokenizer.special_tokens)
    return ExtendedTokenizer(tokenizer, new) if new else tokenizer
