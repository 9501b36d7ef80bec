"""Learns the responses of chats."""

from collections.abc import Callable, Sequence

import jax

from gptjax.batches.packed import PackedSequences, encode_chats
from gptjax.config.run import Config, DataConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.loss import Evaluation, make_eval_step, measure
from gptjax.model.gpt import Compute
from gptjax.tasks.pretrain import next_token_loss
from gptjax.tasks.task import Compile, Kind, Source, Task, hash_sequences, longest
from gptjax.text.labelled import Chat
from gptjax.text.rows import Row, field
from gptjax.text.tokenizer import Tokenizer


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    tokenizer, examples = source.tokenizer, source.examples[name]
    train, cut, left_out = encode_chats(examples.train, tokenizer, longest(config))
    if not train:
        raise UserError(
            f"task.max_tokens={longest(config)}: none of {len(examples.train):,} chats has a response that begins in it"
        )
    windows = PackedSequences(train, longest(config), config.seed)
    note = (
        f"{len(examples.train):,} chats, {len(examples.validation):,} to validate on; {cut:,} cut at"
        f" {longest(config)} tokens, {left_out:,} left out because nothing to learn was left"
    )
    evaluate = measure_chats(config, tokenizer, examples.validation, compute, compiled)
    return Task(windows, windows.mean_tokens, hash_sequences(train), evaluate, (note,))


def measure_chats(
    config: Config, tokenizer: Tokenizer, chats: Sequence[Chat], compute: Compute, compiled: Compile
) -> Callable[[dict, jax.sharding.Sharding], Evaluation]:
    """Returns the measurement of responses: the next token's loss on what is to be learned."""
    sequences, _, _ = encode_chats(chats, tokenizer, longest(config))
    batches = [batch for _, batch in PackedSequences(sequences, longest(config), 0).ordered(config.train.micro_batch)]
    asked = sum(int((sequence.targets >= 0).sum()) for sequence in sequences)
    size = sum(len(text.encode()) for chat in chats for text, learn in chat.pieces if learn)
    eval_step = compiled(make_eval_step(config.model, compute))
    return lambda params, sharding: measure(eval_step, params, batches, sharding, size / max(1, asked))


def parse_row(row: Row, task: TaskConfig, data: DataConfig, labelled: bool) -> Chat:
    """See `text.labelled.ParseRow`."""
    if task.messages_field in row.values:
        messages = field(row, task.messages_field, "task.messages_field")
        if not isinstance(messages, (list, tuple)) or not all(isinstance(m, dict) for m in messages):
            raise UserError(f"{row.where}: field {task.messages_field!r} must be a list of {{role, content}}")
    else:
        prompt = field(row, task.prompt_field, "task.prompt_field")
        response = field(row, task.response_field, "task.response_field")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    before, after = task.template.split("{content}")
    pieces: list[tuple[str, bool]] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
            raise UserError(f"{row.where}: a message needs a role and a content that is not empty, not {message!r}")
        learned = role == "assistant"
        pieces += [(before.replace("{role}", role), False), (content + after.replace("{role}", role), learned)]
    if not any(learned for _, learned in pieces):
        raise UserError(f"{row.where}: no message of role assistant, so there is nothing to learn")
    return Chat(tuple(pieces), row.where)


KIND = Kind(build, next_token_loss, parse_row, lambda example: "".join(text for text, _ in example.pieces))
