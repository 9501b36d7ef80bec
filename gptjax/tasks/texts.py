"""Encodes texts, pairs and candidates of a task."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gptjax.batches.labelled import CandidateSet, Encoded, Marks, TextSet, encode_rows, end_marks
from gptjax.config.run import Config
from gptjax.tasks.heads import learned_marks
from gptjax.tasks.task import longest
from gptjax.text.labelled import Choice, Numbers, Text
from gptjax.text.ngrams import ngram_counts
from gptjax.text.replace import read_synonyms, replace_words
from gptjax.text.tokenizers.base import Tokenizer


def marks_of(config: Config, tokenizer: Tokenizer) -> Marks:
    """The tokens around the texts of a row, by `task.delimiters`."""
    return learned_marks(config.model) if config.task.delimiters == "learned" else end_marks(tokenizer)


def encode_examples(
    config: Config, tokenizer: Tokenizer, examples: Sequence[Text | Numbers], targets: np.ndarray
) -> Encoded:
    """Encodes texts or pairs; with `task.both_orders`, each pair in both orders."""
    marks, room = marks_of(config, tokenizer), longest(config)
    rows = [(example.text,) if example.second is None else (example.text, example.second) for example in examples]
    tokens, cut = encode_rows(rows, tokenizer, marks, room)
    if not config.task.both_orders:
        ngrams = _ngrams(config, tokenizer, rows, tokens, cut) if config.task.bag_of_words else ()
        return TextSet(tokens, targets, cut, room, ngrams)
    turned, cut_too = encode_rows([row[::-1] for row in rows], tokenizer, marks, room)
    return CandidateSet(list(zip(tokens, turned, strict=True)), targets, cut | cut_too, room, 2)


def _ngrams(
    config: Config,
    tokenizer: Tokenizer,
    rows: Sequence[tuple[str, ...]],
    tokens: Sequence[np.ndarray],
    cut: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The n-grams of each row and their counts. Those of a text that was cut are of the tokens that are left."""
    marks = {mark for place in marks_of(config, tokenizer) for mark in place}

    def left(ids: np.ndarray) -> Iterator[str]:
        for is_mark, group in itertools.groupby(ids.tolist(), marks.__contains__):
            if not is_mark:
                yield tokenizer.decode(group)

    return [
        ngram_counts("\n".join(left(ids) if short else row), config.task.bag_of_words)
        for row, ids, short in zip(rows, tokens, cut, strict=True)
    ]


def make_rewrite(
    config: Config, tokenizer: Tokenizer, examples: Sequence[Text | Numbers]
) -> Callable[[int, np.random.Generator], np.ndarray] | None:
    """Returns a function that encodes a training text with words replaced by synonyms; None without synonyms.

    Raises:
        UserError: The file of synonyms cannot be read.
    """
    share = config.task.augment_synonyms
    if not share:
        return None
    synonyms, marks = read_synonyms(config.task.synonyms), marks_of(config, tokenizer)

    def rewrite(number: int, random: np.random.Generator) -> np.ndarray:
        text = replace_words(examples[number].text, synonyms, share, random)
        [ids], _ = encode_rows([(text,)], tokenizer, marks, longest(config))
        return ids

    return rewrite


def encode_choices(config: Config, tokenizer: Tokenizer, examples: Sequence[Choice]) -> CandidateSet:
    """Encodes each candidate together with the text before it."""
    rows = [(example.text, candidate) for example in examples for candidate in example.candidates]
    tokens, cut = encode_rows(rows, tokenizer, marks_of(config, tokenizer), longest(config))
    ends = np.cumsum([len(example.candidates) for example in examples]).tolist()
    parts = [slice(end - len(e.candidates), end) for end, e in zip(ends, examples, strict=True)]
    return CandidateSet(
        [tokens[part] for part in parts],
        np.array([example.answer for example in examples], np.int32),
        np.array([cut[part].any() for part in parts], bool),
        longest(config),
        max((len(example.candidates) for example in examples), default=1),
    )
