"""Instruction tuning on the responses of chats."""

from collections import Counter
from collections.abc import Callable, Sequence

import jax

from gptjax.batches.packed import PackedSequences, encode_chats
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import CHATS, TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.loss import Evaluation, make_eval_step, measure
from gptjax.model.gpt import Compute
from gptjax.tasks.multi import parts_of
from gptjax.tasks.pretrain import next_token_loss
from gptjax.tasks.task import Compile, Kind, Source, Task, hash_sequences, hash_texts, longest
from gptjax.text.chats import Chat, parse_chat
from gptjax.text.formats import Row
from gptjax.text.tokenizers.base import Tokenizer


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    tokenizer, examples = source.tokenizer, source.examples[name]
    train = encode_chats(examples.train, tokenizer, longest(config))
    if not train.sequences:
        raise UserError(
            f"task.max_tokens={longest(config)}: none of {len(examples.train):,} chats has a response that begins in it"
        )
    windows = PackedSequences(train.sequences, longest(config), config.seed)
    note = (
        f"{len(examples.train):,} chats, {len(examples.validation):,} to validate on; {train.cut:,} cut at"
        f" {longest(config)} tokens, {train.left_out:,} left out because no response begins before that"
    )
    evaluate = measure_chats(config, tokenizer, examples.validation, compute, compiled)
    return Task(
        windows,
        windows.mean_tokens,
        hash_sequences(train.sequences),
        evaluate,
        (note, *examples.notes),
        measured_on=hash_texts(map(repr, examples.validation)),
    )


def measure_chats(
    config: Config, tokenizer: Tokenizer, chats: Sequence[Chat], compute: Compute, compiled: Compile
) -> Callable[[dict, jax.sharding.Sharding], Evaluation]:
    """Returns a function that measures the next-token loss on the targets of chats.

    Raises:
        UserError: The chats have no target.
    """
    found = encode_chats(chats, tokenizer, longest(config))
    if not found.sequences:
        raise UserError(
            f"task.max_tokens={longest(config)}: none of {len(chats):,} chats to validate on has a response that"
            " begins in it"
        )
    packed = PackedSequences(found.sequences, longest(config), 0)
    batches = [batch for _, batch in packed.ordered(config.train.micro_batch)]
    n_targets = sum(int((sequence.targets >= 0).sum()) for sequence in found.sequences)
    eval_step = compiled(make_eval_step(config.model, compute))
    return lambda params, sharding: measure(eval_step, params, batches, sharding, found.target_bytes / n_targets)


def chat_template(config: Config) -> str | None:
    """The chat template of a run, for sampling; None if the run has no chats.

    Raises:
        UserError: The run has several templates.
    """
    templates = {part.task.template for part in parts_of(config).values() if part.task.kind in CHATS}
    if len(templates) > 1:
        raise UserError("the run has chats of several templates; write the prompt in one of them and add --raw")
    return templates.pop() if templates else None


def parse_row(row: Row, task: TaskConfig, _data: DataConfig, _labelled: bool, counts: Counter[str]) -> Chat | None:
    """See `text.labelled.ParseRow`."""
    return parse_chat(row, task, counts)


KIND = Kind(build, next_token_loss, parse_row, lambda example: example.text)
