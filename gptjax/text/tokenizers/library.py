"""Tokenizers that the tokenizers library runs."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gptjax.config.tokenizer import TokenizerConfig
from gptjax.text.pieces import split_text
from gptjax.text.tokenizers.base import END_OF_TEXT, Tokenizer, to_utf8

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_SPACE_IN_PIECES = "\u2581"


@dataclasses.dataclass(frozen=True, eq=False)
class LibraryTokenizer(Tokenizer):
    """A tokenizer that tiktoken cannot run and the tokenizers library can.

    It is a byte-level BPE, or of the kind that SentencePiece makes: its tokens are pieces of text in which U+2581
    stands for a space, and characters that no piece has are encoded as bytes, with tokens such as <0x0A>. Many of the
    second kind put a space before the text; the ids decode to the text with this space.
    """

    content: str
    """The text of its tokenizer.json."""
    size: int
    """Number of ids in the model; the last ones may have no token."""
    end_token: str
    kind = "library"

    @property
    def vocab_size(self) -> int:
        return self.size

    @property
    def end_of_text(self) -> int | None:
        return self._library.token_to_id(self.end_token)

    @property
    def special_tokens(self) -> dict[str, int]:
        added = self._library.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            to_utf8(text)
        encoded = self._library.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encoded]

    def encode_with_special(self, text: str) -> np.ndarray:
        to_utf8(text)
        return np.asarray(self._with_special.encode(text, add_special_tokens=False).ids, np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in self._checked(ids))

    @classmethod
    def from_dict(cls, content: dict) -> "LibraryTokenizer":
        text, size, end_token = content["tokenizer"], content["size"], content["end_token"]
        if not isinstance(text, str) or type(size) is not int or not isinstance(end_token, str):
            raise ValueError("tokenizer and end_token must be strings, size a whole number")
        tokenizer = cls(text, size, end_token)
        try:
            largest = max(tokenizer._library.get_vocab().values())
        except Exception as error:  # the library raises plain exceptions
            raise ValueError(f"the tokenizers library cannot read it: {error}") from None
        if largest >= size:
            raise ValueError(f"size is {size}, and there is a token of id {largest}")
        return tokenizer

    def to_dict(self) -> dict:
        return {"kind": self.kind, "tokenizer": self.content, "size": self.size, "end_token": self.end_token}

    @functools.cached_property
    def _library(self):
        library = self._read_content()
        library.encode_special_tokens = True  # names of special tokens in a text are plain text
        return library

    @functools.cached_property
    def _with_special(self):
        return self._read_content()

    def _read_content(self):
        import tokenizers

        library = tokenizers.Tokenizer.from_str(self.content)
        library.no_truncation()
        library.no_padding()
        return library

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        from gptjax.text.train_bpe import byte_of_character

        byte_of, added = byte_of_character(), self._library.get_added_tokens_decoder()
        continues = getattr(self._library.model, "continuing_subword_prefix", None) or ""
        has_pieces = bool(json.loads(self.content)["model"].get("byte_fallback"))
        table = []
        for i in range(self.size):
            token = self._library.id_to_token(i)
            if token is None:
                table.append(f"<|reserved_{i}|>".encode())
                continue
            token = token if i in added else token.removeprefix(continues)
            if has_pieces and (byte := _BYTE_PIECE.fullmatch(token)):
                table.append(bytes([int(byte[1], 16)]))
            elif i in added or (not has_pieces and not set(token) <= byte_of.keys()):
                table.append(token.encode())
            elif has_pieces:
                table.append(token.replace(_SPACE_IN_PIECES, " ").encode())
            else:
                table.append(bytes(byte_of[character] for character in token))
        return table


def train_word_pieces(
    config: TokenizerConfig, documents: Iterable[str], report: Callable[[str], object]
) -> LibraryTokenizer:
    """Learns the word pieces of a corpus."""
    from gptjax.text.train_wordpiece import train_wordpiece

    pieces = (piece for text in documents for piece in split_text(text))
    tokenizer = LibraryTokenizer(train_wordpiece(pieces, config.vocab_size, END_OF_TEXT, report), 0, END_OF_TEXT)
    return dataclasses.replace(tokenizer, size=tokenizer._library.get_vocab_size())
