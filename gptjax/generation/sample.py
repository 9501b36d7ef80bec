"""Continuations of prompts as text, for the command line and the trainer."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.decode import BUFFER, stream
from gptjax.generation.stream import make_text_stream
from gptjax.text.tokenizer import Tokenizer

STREAM_LENGTH = 8  # tokens between two pieces of text


def sample_texts(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: SampleConfig,
    *,
    at_start: bool = False,
    on_text: Callable[[int, int, str], None] | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> list[list[str]]:
    """Returns the continuations of every prompt, `[prompt][sample]`, without the prompt.

    Args:
        config: Shape of the model.
        params: As `init_params` returns them.
        tokenizer: The one that the model was trained with.
        prompts: Texts, none empty; the tokenizer's end token in them is plain text unless `options.allow_special`.
        options: How many, how long, how chosen, in which precision; `prompt` and `run_dir` are not read here.
        at_start: Whether each prompt begins a document, so that end-of-text stands before it as in training.
        on_text: Called with prompt number, sample number (both from 0) and the next piece of text, always whole
            characters, as they come; the pieces join to what is returned.
        notify: Gets one line about a prompt that is cut or a context that slides.

    Raises:
        UserError: A prompt is empty or cannot be encoded, or `options.top_k` passes the vocabulary.
    """
    ids = [_encode(tokenizer, text, options.allow_special, number) for number, text in enumerate(prompts, 1)]
    if at_start and tokenizer.end_of_text is not None:
        ids = [np.concatenate([[tokenizer.end_of_text], tokens]) for tokens in ids]
    if tokenizer.vocab_size < config.vocab_size:  # ids that only the model has are never chosen: they have no text
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    feeds = [make_text_stream() for _ in range(len(prompts) * options.num_samples)]
    texts = [""] * len(feeds)

    def take(row: int, new: bytes, final: bool) -> None:
        piece = feeds[row](new, final)
        texts[row] += piece
        if piece and on_text:
            on_text(*divmod(row, options.num_samples), piece)

    for pieces in stream(
        config,
        params,
        ids,
        options,
        end_of_text=tokenizer.end_of_text,
        notify=notify,
        piece_length=STREAM_LENGTH if on_text else BUFFER,
    ):
        for row, new in enumerate(pieces):
            take(row, tokenizer.decode_bytes(new), False)
    for row in range(len(feeds)):
        take(row, b"", True)
    return [texts[i : i + options.num_samples] for i in range(0, len(texts), options.num_samples)]


def _encode(tokenizer: Tokenizer, text: str, allow_special: bool, number: int) -> np.ndarray:
    if not text:
        raise UserError(f"prompt {number} is empty; give at least one character")
    end = tokenizer.end_token
    if not allow_special or end not in text:
        return tokenizer.encode(text)
    if tokenizer.end_of_text is None:
        raise UserError(f"prompt {number} holds {end}, but this model's tokenizer has no such token")
    first, *others = (tokenizer.encode(part) for part in text.split(end))
    return np.concatenate([first, *(np.concatenate([[tokenizer.end_of_text], part]) for part in others)])
