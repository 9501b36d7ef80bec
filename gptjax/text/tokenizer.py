"""Makes, saves and loads tokenizers of all kinds."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.text.tokenizers.base import FORMAT, FORMAT_VERSION, Tokenizer, tokenizer_to_json
from gptjax.text.tokenizers.byte_pair import BytePairTokenizer, published_encoding, train_byte_pair
from gptjax.text.tokenizers.extended import ExtendedTokenizer
from gptjax.text.tokenizers.library import LibraryTokenizer, train_word_pieces
from gptjax.text.tokenizers.plain import ByteTokenizer, CharTokenizer, characters_of

Documents = Callable[[], Iterable[str]]
Report = Callable[[str], object]
MAKERS: dict[str, Callable[[TokenizerConfig, Documents, Report], Tokenizer]] = {
    "bytes": lambda _config, _documents, _report: ByteTokenizer(),
    "chars": lambda _config, documents, _report: characters_of(documents()),
    "tiktoken": lambda config, _documents, _report: published_encoding(config.name),
    "bpe": lambda config, documents, report: train_byte_pair(config, documents(), report),
    "wordpiece": lambda config, documents, report: train_word_pieces(config, documents(), report),
}
"""Functions that make the tokenizer of each `tokenizer.kind`."""
READERS: dict[str, Callable[[dict], Tokenizer]] = {
    "bytes": ByteTokenizer.from_dict,
    "chars": CharTokenizer.from_dict,
    "tiktoken": BytePairTokenizer.from_dict,
    "bpe": BytePairTokenizer.from_dict,
    "library": LibraryTokenizer.from_dict,
    "extended": lambda content: ExtendedTokenizer.from_dict(content, _read),
}
"""Functions that read each kind of saved tokenizer."""


def make_tokenizer(config: TokenizerConfig, documents: Documents, report: Report = print) -> Tokenizer:
    """Builds the tokenizer that `config` asks for.

    Args:
        config: Its kind and size.
        documents: Returns the corpus; read once for the kinds that learn from it, not at all for the others.
        report: Gets a line where something is other than asked for.

    Raises:
        UserError: A published encoding cannot be loaded, or the corpus is empty.
    """
    return MAKERS[config.kind](config, documents, report)


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
        return _read(content)
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


def encode_each(tokenizer: Tokenizer, documents: Iterable[tuple[str, str]]) -> list[np.ndarray]:
    """Encodes documents, given as pairs of text and place.

    Raises:
        UserError: A text cannot be encoded; the message begins with its place.
    """
    documents = list(documents)
    try:
        return tokenizer.encode_batch([text for text, _ in documents])
    except UserError:
        for text, where in documents:  # one by one, to find the one that cannot be encoded
            try:
                tokenizer.encode(text)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        raise


def _read(content: dict) -> Tokenizer:
    kind = content["kind"]
    if kind not in READERS:
        raise ValueError(f"kind is {kind!r}, must be {', '.join(READERS)}")
    return READERS[kind](content)
