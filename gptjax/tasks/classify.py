"""Text classification, with one or several labels per text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gptjax.batches.labelled import Encoded, TextBatches, label_targets
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import LabelScores, Predictions, score, score_table
from gptjax.evaluation.metric import ScoresWithMetric
from gptjax.evaluation.predict import predict_texts
from gptjax.model.gpt import Compute
from gptjax.tasks.functions import with_metric
from gptjax.tasks.heads import compiled_predict, head_states_loss, make_predict
from gptjax.tasks.task import Compile, Kind, Source, Task
from gptjax.tasks.texts import encode_examples, encoded_task, make_rewrite
from gptjax.text.formats import Row, missing_field
from gptjax.text.labelled import Text, is_missing, label_name, text_and_second
from gptjax.text.tokenizers.base import Tokenizer


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    tokenizer, examples = source.tokenizer, source.examples[name]
    task = config.task
    train, validation = (_encode(config, tokenizer, side) for side in (examples.train, examples.validation))
    rewrite = make_rewrite(config, tokenizer, examples.train)
    windows = TextBatches(train, config.task, config.seed, rewrite)
    predict = compiled(make_predict(config.model, task, name, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> LabelScores | ScoresWithMetric:
        found, loss = predict_texts(predict, params, validation, task.labels, config.train.micro_batch, sharding)
        return with_metric(task, found, score(found, loss))

    return encoded_task(config, examples, windows, train, validation, evaluate, "texts")


def predict(
    config: Config,
    name: str,
    params: dict,
    tokenizer: Tokenizer,
    examples: Sequence[Text],
    batch_size: int,
    compute: Compute,
    sharding: jax.sharding.Sharding,
) -> tuple[Predictions, float]:
    """Returns the predictions of head `name`, and the mean loss over examples with labels."""
    task = config.task
    texts = _encode(config, tokenizer, examples)
    compiled = compiled_predict(config.model, task, name, compute)
    return predict_texts(compiled, params, texts, task.labels, batch_size, sharding)


def outputs(predictions: Predictions) -> Iterator[dict[str, Any]]:
    """The label or labels of each text, and the probability of every one."""
    labels = predictions.labels
    for probabilities, chosen in zip(predictions.probabilities_EN, predictions.chosen, strict=True):
        several = predictions.targets.ndim == 2
        name = [label for label, has in zip(labels, chosen, strict=True) if has] if several else labels[chosen]
        yield {"predicted": name, "probabilities": dict(zip(labels, map(float, probabilities), strict=True))}


def parse_row(row: Row, task: TaskConfig, data: DataConfig, labelled: bool, counts: Counter[str]) -> Text | None:
    """See `text.labelled.ParseRow`."""
    text, second = text_and_second(row, task, data)
    if not labelled:
        return Text(text, (), row.where, second=second)
    if task.label_field not in row.values:
        raise missing_field(row.where, task.label_field, "task.label_field", row.values)
    value = row.values[task.label_field]
    listed = isinstance(value, (list, tuple))
    given = value if listed else [value]
    if any(is_missing(item, task.labels) for item in given):
        counts["missing_label"] += 1
        return None
    labels = tuple(label_name(item, row, task.label_field) for item in given)
    if len(set(labels)) < len(labels):
        raise UserError(f"{row.where}: field {task.label_field!r} names a label twice")
    return Text(text, labels, row.where, listed, second)


def plain_text(example: Text | Any) -> str:
    """The text or the two texts of an example."""
    return example.text if example.second is None else f"{example.text}\n{example.second}"


def _encode(config: Config, tokenizer: Tokenizer, examples: Sequence[Text]) -> Encoded:
    targets = label_targets(examples, config.task.labels, config.task.multi_label)
    return encode_examples(config, tokenizer, examples, targets)


KIND = Kind(build, head_states_loss, parse_row, plain_text, predict, outputs, score_table)
