"""Text ⇄ token ids: bytes, characters, published encodings and own BPE, behind one interface."""

import abc
import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.text.pieces import available_cores, group_pieces, split_text

END_OF_TEXT = "<|endoftext|>"
FORMAT = "gptjax-tokenizer"
FORMAT_VERSION = 1
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_SPACE_IN_PIECES = "\u2581"


class Tokenizer(abc.ABC):
    """Turns text into ids in `[0, vocab_size)` and back; what is encoded decodes to the same bytes."""

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
        """Id of the token that starts every document and ends the last; None: the tokenizer has none."""

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns int32 ids of `text`, in which <|endoftext|> is plain text.

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
        """Everything that defines the tokenizer, as JSON values."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids, by name, of the tokens that no text encodes to."""
        return {} if self.end_of_text is None else {self.end_token: self.end_of_text}

    def encode_with_special(self, text: str) -> np.ndarray:
        """Returns int32 ids of a text in which names of special tokens are these; of two that overlap, the first.

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
        """Encodes each text, on all cores where that is faster."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, with U+FFFD for bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """int32 `[vocab_size]`: bytes that each id decodes to; those of a text add up to its UTF-8."""
        return np.array([len(self.decode_bytes([i])) for i in range(self.vocab_size)], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the saved form, 64 hexadecimal digits: equal for equal tokenizers alone."""
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
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in self._checked(ids))

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
            raise _surrogate(error) from None
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

    def to_dict(self) -> dict:
        return {"kind": self.kind, "characters": self.characters, "end_of_text": self.has_end_of_text}

    @functools.cached_property
    def _id_of_code(self) -> np.ndarray:
        table = np.full(0x110000, -1, np.int32)
        table[[ord(character) for character in self.characters]] = np.arange(len(self.characters))
        return table


@dataclasses.dataclass(frozen=True, eq=False)
class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding, run by tiktoken: lower rank merges first, and the rank is the id."""

    kind: str
    name: str
    pattern: str
    ranks: dict[bytes, int]
    special: dict[str, int]
    end_token: str = END_OF_TEXT
    """One of `special`; where it is none of them, the tokenizer has no end-of-text."""

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
        with ThreadPoolExecutor(available_cores()) as pool:
            encoded = itertools.chain.from_iterable(pool.map(self._encode_pieces, groups))
            parts = [[next(encoded) for _ in document] for document in pieces]
        return [part[0] if len(part) == 1 else np.concatenate([np.empty(0, np.int32), *part]) for part in parts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(self._checked(ids))

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
            raise _surrogate(error) from None
        return [np.asarray(array).astype(np.int32) for array in arrays]


@dataclasses.dataclass(frozen=True, eq=False)
class LibraryTokenizer(Tokenizer):
    """A tokenizer that the tokenizers library runs, for those that are no tiktoken encoding.

    It is a byte-level BPE, or one as SentencePiece makes them: pieces of text in which U+2581 stands for a space, and
    tokens such as <0x0A> for the bytes of what no piece holds. Of the latter kind, many put a space before a text; it
    is part of what the ids decode to.
    """

    content: str
    """Its tokenizer.json, whole."""
    size: int
    """Number of ids of the model, of which the last may have no token."""
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
            _utf8(text)
        encoded = self._library.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encoded]

    def encode_with_special(self, text: str) -> np.ndarray:
        _utf8(text)
        return np.asarray(self._with_special.encode(text, add_special_tokens=False).ids, np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in self._checked(ids))

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


@dataclasses.dataclass(frozen=True, eq=False)
class ExtendedTokenizer(Tokenizer):
    """Another tokenizer, and after its ids those of tokens that no text encodes to."""

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

    def to_dict(self) -> dict:
        return {"kind": self.kind, "base": self.base.to_dict(), "names": list(self.names)}


def with_special_tokens(tokenizer: Tokenizer, names: tuple[str, ...]) -> Tokenizer:
    """Returns a tokenizer that also has the tokens `names`, with the same ids for all others."""
    new = tuple(name for name in names if name not in tokenizer.special_tokens)
    return ExtendedTokenizer(tokenizer, new) if new else tokenizer


def make_tokenizer(
    config: TokenizerConfig,
    documents: Callable[[], Iterable[str]],
    report: Callable[[str], object] = print,
) -> Tokenizer:
    """Builds the tokenizer that `config` asks for.

    Args:
        config: Its kind and size.
        documents: Returns the corpus; read once for kinds chars and bpe, not at all for the others.
        report: Gets a line where something is other than asked for.

    Raises:
        UserError: A published encoding cannot be loaded, or the corpus is empty.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "chars":
        return _chars_of(documents())
    if config.kind == "tiktoken":
        return _published(config.name)
    if config.kind == "wordpiece":
        from gptjax.text.train_wordpiece import train_wordpiece

        pieces = (piece for text in documents() for piece in split_text(text))
        content = train_wordpiece(pieces, config.vocab_size, END_OF_TEXT, report)
        library = LibraryTokenizer(content, 0, END_OF_TEXT)
        return dataclasses.replace(library, size=library._library.get_vocab_size())
    from gptjax.text.train_bpe import PATTERN, train_ranks

    ranks = train_ranks((piece for text in documents() for piece in split_text(text)), config.vocab_size - 1, report)
    return _byte_pair("bpe", "", ranks, PATTERN, {END_OF_TEXT: len(ranks)})


def bpe_tokenizer_from_ranks(
    ranks: dict[bytes, int], pattern: str, special: dict[str, int], end_token: str = END_OF_TEXT
) -> Tokenizer:
    """Builds a BPE tokenizer from another program's files.

    Args:
        ranks: Id of each token's bytes, in the order in which they merge. All 256 single bytes are among them.
        pattern: Regular expression that cuts text before bytes are merged.
        special: Ids of tokens that no text encodes to.
        end_token: The one of them that starts a document; where it is none of them, the tokenizer has no such token.

    Raises:
        UserError: An id is given twice, a single byte is missing, or the pattern is not valid.
    """
    return _byte_pair("bpe", "", ranks, pattern, special, end_token)


def tokenizer_to_json(tokenizer: Tokenizer) -> str:
    """Returns the tokenizer as JSON that needs nothing else to be used; equal tokenizers give equal text."""
    content = {"format": FORMAT, "version": FORMAT_VERSION, **tokenizer.to_dict()}
    return json.dumps(content, separators=(",", ":")) + "\n"


def tokenizer_from_json(text: str, where: str) -> Tokenizer:
    """Reads what `tokenizer_to_json` wrote.

    Raises:
        UserError: Malformed, or of another version; the message begins with `where`.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, must be {FORMAT!r}")
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version is {content['version']!r}, this gptjax reads {FORMAT_VERSION}")
        return _from_dict(content)
    except KeyError as error:
        raise UserError(f"{where}: not a valid tokenizer file: no key {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: not a valid tokenizer file: {error}") from None


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes the tokenizer's JSON; the file is whole or not there."""
    write_atomic(path, tokenizer_to_json(tokenizer).encode())


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a file that `save_tokenizer` wrote.

    Raises:
        UserError: No such file, or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the tokenizer: {error}") from None
    return tokenizer_from_json(text, str(path))


def _chars_of(documents: Iterable[str]) -> CharTokenizer:
    characters: set[str] = set()
    n_documents = 0
    for text in documents:
        characters.update(text)
        n_documents += 1
    if not characters:
        raise UserError("tokenizer.kind=chars: the corpus has no characters")
    # A corpus of one document is one stream, as in the field's Shakespeare set: nothing ever ends in it.
    return CharTokenizer("".join(sorted(characters)), has_end_of_text=n_documents > 1)


def _published(name: str) -> BytePairTokenizer:
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
    return _byte_pair("tiktoken", name, ranks, encoding._pat_str, special)


def _byte_pair(
    kind: str, name: str, ranks: dict[bytes, int], pattern: str, special: dict[str, int], end_token: str = END_OF_TEXT
) -> BytePairTokenizer:
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


def _from_dict(content: dict) -> Tokenizer:
    match content["kind"]:
        case "bytes":
            return ByteTokenizer()
        case "chars":
            characters, has_end_of_text = content["characters"], content["end_of_text"]
            if not isinstance(characters, str) or sorted(set(characters)) != list(characters):
                raise ValueError("characters must be different ones, in the order of code points")
            if not isinstance(has_end_of_text, bool):
                raise ValueError("end_of_text must be true or false")
            _utf8(characters)
            return CharTokenizer(characters, has_end_of_text)
        case "bpe" | "tiktoken" as kind:
            tokens, special = content["tokens"], content["special_tokens"]
            ranks = {base64.b64decode(token, validate=True): i for i, token in enumerate(tokens) if token is not None}
            if len(ranks) + tokens.count(None) < len(tokens):
                raise ValueError("a token is given twice")
            if any(type(i) is not int for i in special.values()):
                raise ValueError("ids of special tokens must be whole numbers")
            end_token = content.get("end_token", END_OF_TEXT)
            if end_token != END_OF_TEXT and end_token not in special:
                raise ValueError(f"end_token {end_token!r} is none of special_tokens")
            return _byte_pair(kind, content["name"], ranks, content["pattern"], special, end_token)
        case "library":
            text, size, end_token = content["tokenizer"], content["size"], content["end_token"]
            if not isinstance(text, str) or type(size) is not int or not isinstance(end_token, str):
                raise ValueError("tokenizer and end_token must be strings, size a whole number")
            tokenizer = LibraryTokenizer(text, size, end_token)
            try:
                largest = max(tokenizer._library.get_vocab().values())
            except Exception as error:  # the library raises plain exceptions
                raise ValueError(f"the tokenizers library cannot read it: {error}") from None
            if largest >= size:
                raise ValueError(f"size is {size}, and there is a token of id {largest}")
            return tokenizer
        case "extended":
            names = content["names"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("names must be strings")
            if len(set(names)) < len(names):
                raise ValueError("a name is given twice")
            return ExtendedTokenizer(_from_dict(content["base"]), tuple(names))
        case kind:
            raise ValueError(f"kind is {kind!r}, must be bytes, chars, tiktoken, bpe, library or extended")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _surrogate(error) from None


def _surrogate(error: UnicodeEncodeError) -> UserError:
    code = ord(error.object[error.start])
    return UserError(f"U+{code:04X} at character {error.start} is half of a surrogate pair and has no UTF-8; remove it")
