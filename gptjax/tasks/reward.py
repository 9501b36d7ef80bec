"""A reward model: a score for a response to a prompt, from pairs of responses of which one was preferred.

The probability that a response is preferred is the sigmoid of the difference of the scores (Bradley and Terry 1952),
which is the softmax over the two; the loss is the negative logarithm of that (arXiv:2203.02155, equation 1).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.batches.labelled import CandidateSet, TextBatches, encode_rows, end_marks
from gptjax.config.run import Config
from gptjax.evaluation.predict import Predict, predict_rows
from gptjax.evaluation.preferences import PreferenceScores, ScorePredictions, preference_report, score_preferences
from gptjax.model.gpt import Compute
from gptjax.tasks.heads import compiled_predict, head_states_loss, make_predict
from gptjax.tasks.task import Compile, Kind, Source, Task, longest
from gptjax.tasks.texts import encoded_task
from gptjax.text.labelled import Preference
from gptjax.text.preferences import parse_preference, plain_text
from gptjax.text.tokenizers.base import Tokenizer


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    examples = source.examples[name]
    train, validation = (_encode(config, source.tokenizer, side) for side in (examples.train, examples.validation))
    windows = TextBatches(train, config.task, config.seed)
    predict = compiled(make_predict(config.model, config.task, name, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> PreferenceScores:
        return score_preferences(*_predicted(predict, params, validation, config.train.micro_batch, sharding))

    return encoded_task(config, examples, windows, train, validation, evaluate, "pairs of responses")


def predict(
    config: Config,
    name: str,
    params: dict,
    tokenizer: Tokenizer,
    examples: Sequence[Preference],
    batch_size: int,
    compute: Compute,
    sharding: jax.sharding.Sharding,
) -> tuple[ScorePredictions, float]:
    """See `classify.predict`."""
    compiled = compiled_predict(config.model, config.task, name, compute)
    return _predicted(compiled, params, _encode(config, tokenizer, examples), batch_size, sharding)


def outputs(predictions: ScorePredictions) -> Iterator[dict[str, Any]]:
    """The score of each response."""
    for score in predictions.scores_ES[:, 0].tolist():
        yield {"predicted": score}


def _encode(config: Config, tokenizer: Tokenizer, examples: Sequence[Preference]) -> CandidateSet:
    """Chats between two end-of-text tokens, the chosen one first."""
    chats = [[chat for chat in (example.chosen, example.rejected) if chat is not None] for example in examples]
    rows = [(chat.text,) for pair in chats for chat in pair]
    tokens, cut = encode_rows(rows, tokenizer, end_marks(tokenizer), longest(config))
    several = max(map(len, chats), default=1)
    numbers = np.arange(len(rows)).reshape(-1, several)
    return CandidateSet(
        [[tokens[n] for n in pair] for pair in numbers],
        np.zeros(len(numbers), np.int32),
        np.array([cut[pair].any() for pair in numbers], bool),
        longest(config),
        several,
    )


def _predicted(
    predict: Predict, params: dict, rows: CandidateSet, batch_size: int, sharding: jax.sharding.Sharding
) -> tuple[ScorePredictions, float]:
    scores_ES, loss = predict_rows(predict, params, rows, rows.candidates, batch_size, sharding)
    return ScorePredictions(scores_ES, tuple(rows.cut.tolist())), loss


KIND = Kind(build, head_states_loss, parse_preference, plain_text, predict, outputs, preference_report)
