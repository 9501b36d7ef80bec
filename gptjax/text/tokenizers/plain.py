"""Tokenizers whose ids are bytes or characters."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from gptjax.errors import UserError
from gptjax.text.tokenizers.base import END_OF_TEXT, Tokenizer, surrogate_error, to_utf8


@dataclasses.dataclass(frozen=True, eq=False)
class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 is end-of-text."""

    kind = "bytes"

    @property
    def vocab_size(self) -> int:
        return 257

    @property
    def end_of_text(self) -> int:
        return 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in self._checked(ids))

    @classmethod
    def from_dict(cls, content: dict) -> "ByteTokenizer":
        return cls()

    def to_dict(self) -> dict:
        return {"kind": self.kind}


@dataclasses.dataclass(frozen=True, eq=False)
class CharTokenizer(Tokenizer):
    """Each character of a fixed alphabet is an id, in the order of code points; end-of-text comes last."""

    characters: str
    has_end_of_text: bool
    kind = "chars"

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + self.has_end_of_text

    @property
    def end_of_text(self) -> int | None:
        return len(self.characters) if self.has_end_of_text else None

    def encode(self, text: str) -> np.ndarray:
        try:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from None
        ids = self._id_of_code[codes]
        if len(ids) and ids.min() < 0:
            at = int(np.argmax(ids < 0))
            raise UserError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at {at} is not among the {len(self.characters)}"
                " that the tokenizer knows; tokenizer.kind=bytes or bpe knows every character"
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        names = [*self.characters, END_OF_TEXT]
        return "".join(names[i] for i in self._checked(ids)).encode()

    @classmethod
    def from_dict(cls, content: dict) -> "CharTokenizer":
        characters, has_end_of_text = content["characters"], content["end_of_text"]
        if not isinstance(characters, str) or sorted(set(characters)) != list(characters):
            raise ValueError("characters must be different ones, in the order of code points")
        if not isinstance(has_end_of_text, bool):
            raise ValueError("end_of_text must be true or false")
        to_utf8(characters)
        return cls(characters, has_end_of_text)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "characters": self.characters, "end_of_text": self.has_end_of_text}

    @functools.cached_property
    def _id_of_code(self) -> np.ndarray:
        table = np.full(0x110000, -1, np.int32)
        table[[ord(character) for character in self.characters]] = np.arange(len(self.characters))
        return table


def characters_of(documents: Iterable[str]) -> CharTokenizer:
    """Builds the tokenizer of the characters of a corpus.

    Raises:
        UserError: The corpus is empty.
    """
    characters: set[str] = set()
    n_documents = 0
    for text in documents:
        characters.update(text)
        n_documents += 1
    if not characters:
        raise UserError("tokenizer.kind=chars: the corpus has no characters")
    # A corpus of one document, such as tiny Shakespeare, is one stream and needs no end-of-text.
    return CharTokenizer("".join(sorted(characters)), has_end_of_text=n_documents > 1)
