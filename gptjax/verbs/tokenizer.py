"""`gptjax tokenizer`: measures tokenizers on text, or changes the vocabulary of a run."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.run import Config
from gptjax.config.tokenizer import TIKTOKEN_NAMES
from gptjax.config.verbs.tokenizer import TokenizerVerbConfig
from gptjax.errors import UserError
from gptjax.exchange.vocabulary import write_with_vocabulary
from gptjax.report.progress import notify
from gptjax.text.clean import clean
from gptjax.text.cleaning.stages import make_language_of
from gptjax.text.formats import Document
from gptjax.text.sources import read_documents
from gptjax.text.tokenizer import load_tokenizer
from gptjax.text.tokenizer_report import fit_lines, measure_fit, sample, token_lines
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.text.tokenizers.byte_pair import published_encoding
from gptjax.text.vocabulary import extend, learn_tokens, prune, require_byte_pairs


def run_tokenizer(place: str, options: TokenizerVerbConfig) -> int:
    """Prints how the tokenizers fit the text; with extend or prune, writes a run and prints its vocabulary."""
    if options.to:
        config = change_vocabulary(place, options)
        print(f"{options.to}: vocabulary {config.model.vocab_size:,}")
        return 0
    print("\n".join(report_lines(place, options)))
    return 0


def report_lines(place: str, options: TokenizerVerbConfig) -> list[str]:
    """Returns the report's lines.

    Args:
        place: A run directory, a tokenizer.json, or the name of a published encoding.
        options: The text, and what to compare with.

    Raises:
        UserError: The tokenizer or the text cannot be read.
    """
    own = _tokenizer(place)
    others = {name: published_encoding(name) for name in options.compare if name != place}
    languages = make_language_of() if options.languages else None
    fits, counts = measure_fit({place: own, **others}, _sources(options), languages)
    return [*fit_lines(fits), f"{place}: {own.vocab_size:,} ids", *token_lines(own, counts[place], options.show)]


def change_vocabulary(place: str, options: TokenizerVerbConfig) -> Config:
    """Makes a run directory with more or fewer tokens; returns its config.

    Raises:
        UserError: The run has no byte-pair encoding, the text has too few pairs, or the folder holds a run.
    """
    run = load_run(Path(place).expanduser(), options.checkpoint, options.strict, notify, options.base)
    tokenizer = require_byte_pairs(run.tokenizer, place)
    texts = [document.text for documents in _sources(options).values() for document in documents]
    if options.extend:
        tokens = learn_tokens(tokenizer, texts, options.extend)
        if len(tokens) < options.extend:
            raise UserError(f"extend={options.extend}: the text has pairs for {len(tokens)} new tokens; give more text")
        changed, pieces = extend(tokenizer, tokens)
        rows = [np.array([i]) for i in range(tokenizer.vocab_size)] + pieces
    else:
        counts = sum(np.bincount(ids, minlength=tokenizer.vocab_size) for ids in tokenizer.encode_batch(texts))
        changed, old_ids = prune(tokenizer, np.asarray(counts), options.prune)
        rows = list(old_ids[:, None])
    return write_with_vocabulary(run, Path(options.to).expanduser(), changed, rows)


def _tokenizer(place: str) -> Tokenizer:
    if place in TIKTOKEN_NAMES:
        return published_encoding(place)
    path = Path(place).expanduser()
    return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


def _sources(options: TokenizerVerbConfig) -> dict[str, Iterator[Document]]:
    """The documents of each entry of data.path, or of another source."""
    data = options.data
    parts = {path: dataclasses.replace(data, path=(path,)) for path in data.path} or {
        data.source or data.hf_dataset: data
    }
    return {
        name: sample(clean(read_documents(part, Counter()), part, Counter()), options.characters)
        for name, part in parts.items()
    }
