"""Encodes a whole text in memory, to measure a model on it. There is no split and no tokenizer training."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import xxhash

from gptjax.config.data import DataConfig
from gptjax.errors import UserError
from gptjax.text.clean import clean
from gptjax.text.formats import batch_documents
from gptjax.text.remote import file_size
from gptjax.text.shards import TokenSplit, token_dtype
from gptjax.text.sources import given_files, read_documents
from gptjax.text.tokenizer import Tokenizer, encode_each

BATCH = 2**22
"""Number of characters that are encoded at once."""
MOST_BYTES = 2**28
"""Files of more bytes in total are not read again to compare texts."""


class WholeText(NamedTuple):
    """A text as one stream of tokens."""

    split: TokenSplit
    documents: frozenset[int]
    """Hashes of the documents."""
    counts: Counter[str]
    """Counts of documents that were read and left out, see `read_documents` and `clean`."""


def read_whole(data: DataConfig, tokenizer: Tokenizer) -> WholeText:
    """Reads, cleans and encodes all documents as in training data: each is end-of-text followed by its tokens.

    Raises:
        UserError: Something cannot be read or encoded (the message names the document), or there is no text.
    """
    counts: Counter[str] = Counter()
    end = tokenizer.end_of_text
    dtype, separator = token_dtype(tokenizer.vocab_size), [] if end is None else [end]
    tokens, starts, n_tokens, n_bytes, hashes = [], [], 0, 0, set()
    for batch in batch_documents(clean(read_documents(data, counts), data, counts), BATCH):
        for document, ids in zip(batch, encode_each(tokenizer, batch), strict=True):
            raw = document.text.encode()
            starts.append(n_tokens)
            tokens.append(np.concatenate([separator, ids]).astype(dtype))
            n_tokens, n_bytes = n_tokens + len(tokens[-1]), n_bytes + len(raw)
            hashes.add(xxhash.xxh3_64_intdigest(raw))
    if not tokens:
        raise UserError(f"no text to measure: {counts['read']:,} documents were read, and none has any text")
    stream = np.concatenate([*tokens, np.array(separator, dtype)])
    split = TokenSplit((stream,), (np.array(starts, np.uint64),), n_bytes, end)
    return WholeText(split, frozenset(hashes), counts)


def document_hashes(data: DataConfig) -> frozenset[int] | None:
    """Hashes of all documents of a text; None if it is missing or too large to be read again."""
    if data.hf_dataset:
        return None
    try:
        if data.path and sum(map(file_size, given_files(data, Counter()))) > MOST_BYTES:
            return None
        counts: Counter[str] = Counter()
        documents = clean(read_documents(data, counts), data, counts)
        return frozenset(xxhash.xxh3_64_intdigest(document.text.encode()) for document in documents)
    except (UserError, OSError):
        return None
