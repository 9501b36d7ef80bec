"""The interface of tokenizers."""

import abc
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence

import numpy as np

from gptjax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
FORMAT = "gptjax-tokenizer"
FORMAT_VERSION = 1


class Tokenizer(abc.ABC):
    """Converts text to ids in `[0, vocab_size)` and back. Every text decodes to the same bytes."""

    kind: str
    end_token = END_OF_TEXT
    """Name of the token with id `end_of_text`."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    @property
    @abc.abstractmethod
    def end_of_text(self) -> int | None:
        """Id of the token that starts every document and ends the last one; None if there is no such token."""

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns int32 ids of `text`. <|endoftext|> in it is encoded as plain text.

        Raises:
            UserError: The text has a character that cannot be encoded.
        """

    @abc.abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the UTF-8 bytes of `ids`, which may begin or end inside a character.

        Raises:
            UserError: An id is outside the vocabulary.
        """

    @abc.abstractmethod
    def to_dict(self) -> dict:
        """Everything that defines the tokenizer, as JSON values; class method `from_dict` reads it."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids, by name, of the tokens that no text encodes to."""
        return {} if self.end_of_text is None else {self.end_token: self.end_of_text}

    def encode_with_special(self, text: str) -> np.ndarray:
        """Returns int32 ids of a text; names of special tokens are encoded as these tokens. If two overlap, the first
        one is used.

        Raises:
            UserError: The text has a character that cannot be encoded.
        """
        special = self.special_tokens
        if not special:
            return self.encode(text)
        names = re.compile(f"({'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})")
        parts = (np.array([special[part]]) if part in special else self.encode(part) for part in names.split(text))
        return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes each text, on all cores if that is faster."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, with U+FFFD for bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """int32 `[vocab_size]`: number of bytes of each id; the ids of a text sum to the length of its UTF-8."""
        return np.array([len(self.decode_bytes([i])) for i in range(self.vocab_size)], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the saved tokenizer, 64 hexadecimal digits: equal only for equal tokenizers."""
        return hashlib.sha256(tokenizer_to_json(self).encode()).hexdigest()

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token id {i} is outside the vocabulary: must lie in [0, {self.vocab_size}); was the text"
                    " made with another tokenizer?"
                )
        return ids


def tokenizer_to_json(tokenizer: Tokenizer) -> str:
    """Returns the tokenizer as self-contained JSON; equal tokenizers give equal text."""
    content = {"format": FORMAT, "version": FORMAT_VERSION, **tokenizer.to_dict()}
    return json.dumps(content, separators=(",", ":")) + "\n"


def to_utf8(text: str) -> bytes:
    """Returns the UTF-8 of a text.

    Raises:
        UserError: The text has half of a surrogate pair.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise surrogate_error(error) from None


def surrogate_error(error: UnicodeEncodeError) -> UserError:
    """The error for a text with a character that cannot be encoded as UTF-8."""
    code = ord(error.object[error.start])
    return UserError(f"U+{code:04X} at character {error.start} is half of a surrogate pair and has no UTF-8; remove it")
