"""Sequence to sequence: an encoder-decoder generates a target text from a source text."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from gptjax.batches.pairs import PairBatches, encode_pairs
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.loss import Evaluation, make_eval_step, measure
from gptjax.model.gpt import Compute
from gptjax.tasks.pretrain import next_token_loss
from gptjax.tasks.task import Compile, Kind, Source, Task, hash_arrays, longest
from gptjax.text.formats import Row, text_value
from gptjax.text.rows import field_value
from gptjax.text.tokenizers.base import Tokenizer


class Pair(NamedTuple):
    """A source and its target."""

    source: str
    target: str
    where: str


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    tokenizer, examples, room = source.tokenizer, source.examples[name], longest(config)
    windows, cut = _batches(config, tokenizer, examples.train)
    evaluate = measure_pairs(config, tokenizer, examples.validation, compute, compiled)
    note = f"{len(examples.train):,} pairs, {len(examples.validation):,} to validate on; {cut:,} cut at {room} tokens"
    return Task(
        windows,
        windows.mean_tokens,
        hash_arrays([side for pair in windows.pairs for side in pair]),
        evaluate,
        (note, *examples.notes),
        evaluation_batches=-(-len(examples.validation) // config.train.micro_batch),
        measured_on=hash_arrays(
            [side for pair in _batches(config, tokenizer, examples.validation)[0].pairs for side in pair]
        ),
    )


def measure_pairs(
    config: Config, tokenizer: Tokenizer, pairs: Sequence[Pair], compute: Compute, compiled: Compile
) -> Callable[[dict, jax.sharding.Sharding], Evaluation]:
    """Returns a function that measures the loss of the targets; bits per byte count the bytes of the targets."""
    windows, _ = _batches(config, tokenizer, pairs)
    eval_step = compiled(make_eval_step(config.model, compute))
    of_text = [target[:-1] for _, target in windows.pairs]
    ratio = sum(int(tokenizer.byte_lengths[ids].sum()) for ids in of_text) / sum(len(ids) + 1 for ids in of_text)
    batches = list(windows.ordered(config.train.micro_batch))
    return lambda params, sharding: measure(eval_step, params, batches, sharding, ratio)


def _batches(config: Config, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> tuple[PairBatches, int]:
    encoded, cut = encode_pairs([pair[:2] for pair in pairs], tokenizer, longest(config))
    assert tokenizer.end_of_text is not None  # `encode_pairs` checks it
    return PairBatches(encoded, tokenizer.end_of_text, longest(config), config.seed), cut


def parse_row(row: Row, task: TaskConfig, _data: DataConfig, _labelled: bool, _counts: Counter[str]) -> Pair:
    """See `text.labelled.ParseRow`."""
    sides = []
    for option in ("source_field", "target_field"):
        name = getattr(task, option)
        text = text_value(field_value(row, name, f"task.{option}"), row.where, name)
        if not text.strip():
            raise UserError(f"{row.where}: field {name!r} is an empty text; give it some, or take the row out")
        sides.append(text)
    return Pair(sides[0], sides[1], row.where)


KIND = Kind(build, next_token_loss, parse_row, lambda example: f"{example.source}\n{example.target}")
