"""Text classification, with one or several labels per text."""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.batches.labelled import Encoded, label_targets
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import Predictions, score, score_table
from gptjax.model.bag import inverse_document_frequencies
from gptjax.tasks.head_task import HeadTask, count_note, head_kind
from gptjax.tasks.texts import encode_examples, make_rewrite
from gptjax.text.formats import Row, missing_field
from gptjax.text.labelled import Text, is_missing, is_placeholder, label_name, text_and_second
from gptjax.text.tokenizers.base import Tokenizer


def outputs(predictions: Predictions) -> Iterator[dict[str, Any]]:
    """The predicted label or labels of each text, and the probabilities of all labels."""
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
    if task.labels and any(is_placeholder(label, task.labels) for label in labels):
        counts["placeholder_label"] += 1
        return None
    if len(set(labels)) < len(labels):
        raise UserError(f"{row.where}: field {task.label_field!r} names a label twice")
    return Text(text, labels, row.where, listed, second)


def plain_text(example: Text | Any) -> str:
    """The text of an example, or its two texts on two lines."""
    return example.text if example.second is None else f"{example.text}\n{example.second}"


def _encode(config: Config, tokenizer: Tokenizer, examples: Sequence[Text]) -> Encoded:
    targets = label_targets(examples, config.task.labels, config.task.multi_label)
    return encode_examples(config, tokenizer, examples, targets)


def _decode(config: Config, _examples: Sequence[Text], rows: Encoded, probabilities_EN: np.ndarray) -> Predictions:
    return Predictions(probabilities_EN, rows.targets, config.task.labels, cut=tuple(rows.cut.tolist()))


def _constants(config: Config, train: Any) -> dict[str, np.ndarray]:
    if not config.task.bag_of_words:
        return {}
    return {"idf": inverse_document_frequencies([buckets for buckets, _ in train.ngrams])}


HEAD = HeadTask(
    _encode,
    lambda config, _: len(config.task.labels),
    _decode,
    score,
    functools.partial(count_note, what="texts"),
    make_rewrite,
    constants=_constants,
)
KIND = head_kind(HEAD, parse_row, plain_text, outputs, score_table)
