"""Generates continuations of prompts up to a stop string."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.decode import stream
from gptjax.generation.request import Request
from gptjax.generation.sample import TextCollector
from gptjax.text.tokenizers.base import Tokenizer

PIECE = 16
"""Number of tokens between two searches for stop strings."""


def generate_until(
    model: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    options: SampleConfig,
    batch_size: int,
    notify: Callable[[str], None] = lambda message: None,
) -> list[str]:
    """Returns the continuation of each prompt, cut before the first stop string of `options.stop`.

    Prompts are decoded in batches of similar length, each of `batch_size` sequences, so that few programs are compiled.

    Args:
        model: Shape of the model.
        params: Parameters of the model.
        tokenizer: Decodes the new tokens; its end-of-text also ends a continuation.
        prompts: Token ids, none empty.
        options: Choice of tokens, their largest number, and stop strings.
        batch_size: Sequences in a batch.
        notify: Receives one line about prompts that are cut or contexts that slide.
    """
    if tokenizer.vocab_size < model.vocab_size:  # never choose ids that the tokenizer does not have
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        rows = [prompts[number] for number in numbers]
        rows += rows[-1:] * (batch_size - len(rows))
        collectors = [TextCollector(tokenizer, options) for _ in rows]
        request = Request(
            *(rows, options, tokenizer.end_of_text),
            is_finished=lambda row, collectors=collectors: collectors[row].stopped,
            notify=notify,
        )
        for pieces in stream(model, params, request, piece_length=PIECE):
            for collector, piece in zip(collectors, pieces, strict=True):
                collector.add(piece)
        for number, collector in zip(numbers, collectors, strict=False):
            collector.end()
            texts[number] = collector.sample().text
    return texts
