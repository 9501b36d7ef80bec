"""Multiple choice: the right one of several candidates, each read after the same text (GPT-1, section 3.3)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.batches.labelled import CandidateSet, TextBatches
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.choices import ChoicePredictions, ChoiceScores, choice_report, score_choices
from gptjax.evaluation.metric import ScoresWithMetric
from gptjax.evaluation.predict import Predict, predict_rows
from gptjax.model.gpt import Compute
from gptjax.tasks.functions import with_metric
from gptjax.tasks.heads import compiled_predict, head_states_loss, make_predict
from gptjax.tasks.task import Compile, Kind, Source, Task
from gptjax.tasks.texts import encode_choices, encoded_task
from gptjax.text.formats import Row, missing_field
from gptjax.text.labelled import Choice, string_list
from gptjax.text.rows import text_field
from gptjax.text.tokenizers.base import Tokenizer


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    examples = source.examples[name]
    train, validation = (
        encode_choices(config, source.tokenizer, side) for side in (examples.train, examples.validation)
    )
    windows = TextBatches(train, config.task, config.seed)
    predict = compiled(make_predict(config.model, config.task, name, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> ChoiceScores | ScoresWithMetric:
        found, loss = _predicted(predict, params, validation, config.train.micro_batch, sharding)
        return with_metric(config.task, found, score_choices(found, loss))

    return encoded_task(
        config, examples, windows, train, validation, evaluate, f"rows of up to {train.candidates} candidates"
    )


def predict(
    config: Config,
    name: str,
    params: dict,
    tokenizer: Tokenizer,
    examples: Sequence[Choice],
    batch_size: int,
    compute: Compute,
    sharding: jax.sharding.Sharding,
) -> tuple[ChoicePredictions, float]:
    """See `classify.predict`."""
    compiled = compiled_predict(config.model, config.task, name, compute)
    return _predicted(compiled, params, encode_choices(config, tokenizer, examples), batch_size, sharding)


def outputs(predictions: ChoicePredictions) -> Iterator[dict[str, Any]]:
    """The number of the chosen candidate of each row, from 0, and the probability of every one."""
    for probabilities, count in zip(predictions.probabilities_EK, predictions.counts, strict=True):
        yield {"predicted": int(probabilities[:count].argmax()), "probabilities": probabilities[:count].tolist()}


def parse_row(row: Row, task: TaskConfig, data: DataConfig, labelled: bool, _counts: Counter[str]) -> Choice:
    """See `text.labelled.ParseRow`."""
    text = text_field(row, data.text_field)
    candidates = string_list(row, task.candidates_field, "task.candidates_field")
    if len(candidates) < 2:
        raise UserError(f"{row.where}: field {task.candidates_field!r} has {len(candidates)} candidate(s), needs two")
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, str) or not candidate.strip():
            raise UserError(
                f"{row.where}: candidate {number} of field {task.candidates_field!r} is {candidate!r}, must be a text"
            )
    if not labelled:
        return Choice(text, candidates, -1, row.where)
    if task.label_field not in row.values:
        raise missing_field(row.where, task.label_field, "task.label_field", row.values)
    return Choice(text, candidates, _answer(row.values[task.label_field], candidates, row, task), row.where)


def _answer(value: Any, candidates: tuple[str, ...], row: Row, task: TaskConfig) -> int:
    """The number of the right candidate, of a row that gives the number or the text."""
    if isinstance(value, str) and candidates.count(value) == 1:
        return candidates.index(value)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(candidates):
        return value
    raise UserError(
        f"{row.where}: field {task.label_field!r} holds {value!r}; must be one of the {len(candidates)} candidates of"
        f" {task.candidates_field!r}: a number from 0 to {len(candidates) - 1}, or the text of one"
    )


def _predicted(
    predict: Predict, params: dict, rows: CandidateSet, batch_size: int, sharding: jax.sharding.Sharding
) -> tuple[ChoicePredictions, float]:
    probabilities_EK, loss = predict_rows(predict, params, rows, rows.candidates, batch_size, sharding)
    counts = tuple(len(row) for row in rows.tokens)
    probabilities_EK[np.arange(rows.candidates)[None] >= np.array(counts)[:, None]] = 0.0
    return ChoicePredictions(probabilities_EK, rows.targets, counts, tuple(rows.cut.tolist())), loss


KIND = Kind(
    build,
    head_states_loss,
    parse_row,
    lambda example: "\n".join((example.text, *example.candidates)),
    predict,
    outputs,
    choice_report,
)
